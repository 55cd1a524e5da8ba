// SPDX-License-Identifier: Apache-2.0
//! Which frames the driver wants (virtio 1.3, sections 5.1.6.5.1 and 5.1.6.5.2), and what the tap is told of it.
//!
//! The kernel drops the others at the tap: nobody is woken for what other hosts of the network tell each other by multicast.
//! A driver that never says what it wants gets everything.

use serde::{Deserialize, Serialize};

/// An Ethernet address.
pub(super) type Mac = [u8; 6];

const BROADCAST: Mac = [0xff; 6];
/// Addresses that a tap compares whole; those behind them are hashed, which only works for multicast (`FLT_EXACT_COUNT`).
const EXACT: usize = 8;
/// Addresses of a kind that are kept; a driver with more gets all of that kind, which the specification allows.
const MOST: usize = 64;

/// What the driver has said.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Filter {
    mac: Mac,
    promiscuous: bool,
    all_multicast: bool,
    unicast: Vec<Mac>,
    multicast: Vec<Mac>,
}

impl Filter {
    /// That of a device of this address whose driver has said nothing.
    pub(super) fn new(mac: Mac) -> Self {
        Self {
            mac,
            promiscuous: true,
            all_multicast: false,
            unicast: Vec::new(),
            multicast: Vec::new(),
        }
    }

    /// VIRTIO_NET_CTRL_RX_PROMISC.
    pub(super) fn set_promiscuous(&mut self, on: bool) {
        self.promiscuous = on;
    }

    /// VIRTIO_NET_CTRL_RX_ALLMULTI.
    pub(super) fn set_all_multicast(&mut self, on: bool) {
        self.all_multicast = on;
    }

    /// VIRTIO_NET_CTRL_MAC_ADDR_SET.
    pub(super) fn set_mac(&mut self, mac: Mac) {
        self.mac = mac;
    }

    /// VIRTIO_NET_CTRL_MAC_TABLE_SET: `None` for more than are kept.
    pub(super) fn set_table(&mut self, unicast: Option<Vec<Mac>>, multicast: Option<Vec<Mac>>) {
        // One too many for what a tap compares is as good as all.
        self.unicast = unicast.unwrap_or_else(|| vec![BROADCAST; EXACT]);
        self.multicast = multicast.unwrap_or_else(|| vec![BROADCAST; MOST + 1]);
    }

    /// What a tap is to let through: whether all multicast, and these. `None` is everything.
    pub(super) fn wanted(&self) -> Option<(bool, Vec<Mac>)> {
        if self.promiscuous || self.unicast.len() >= EXACT {
            return None;
        }
        let all = self.all_multicast || self.multicast.len() > MOST;
        let multicast: &[Mac] = if all { &[] } else { &self.multicast };
        let mut addresses = vec![self.mac];
        addresses.extend_from_slice(&self.unicast);
        addresses.push(BROADCAST);
        // A tap takes no filter at all for one that is not what it should be.
        addresses.extend(multicast.iter().filter(|[first, ..]| first & 1 != 0));
        Some((all, addresses))
    }
}

/// The table of one kind from its bytes: `None` if it is longer than what is kept.
pub(super) fn table(entries: u64, mut entry: impl FnMut(u64) -> Mac) -> Option<Vec<Mac>> {
    (entries <= MOST as u64).then(|| (0..entries).map(&mut entry).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Mac = [2, 0, 0, 0, 0, 1];
    const GROUP: Mac = [0x33, 0x33, 0, 0, 0, 1];

    fn silent() -> Filter {
        let mut filter = Filter::new(OWN);
        filter.set_promiscuous(false);
        filter
    }

    #[test]
    fn everything_until_the_driver_says_otherwise() {
        let mut filter = Filter::new(OWN);
        assert_eq!(filter.wanted(), None);
        filter.set_promiscuous(false);
        assert_eq!(filter.wanted(), Some((false, vec![OWN, BROADCAST])));
        filter.set_promiscuous(true);
        assert_eq!(filter.wanted(), None);
    }

    #[test]
    fn what_is_in_the_table_and_nothing_else() {
        let mut filter = silent();
        filter.set_table(Some(vec![[4; 6]]), Some(vec![GROUP, [4; 6]]));
        assert_eq!(
            filter.wanted(),
            Some((false, vec![OWN, [4; 6], BROADCAST, GROUP]))
        );
        filter.set_mac([6; 6]);
        filter.set_all_multicast(true);
        assert_eq!(filter.wanted(), Some((true, vec![[6; 6], [4; 6], BROADCAST])));
    }

    #[test]
    fn more_than_is_kept_is_all_of_its_kind() {
        assert_eq!(table(MOST as u64 + 1, |_| GROUP), None);
        assert_eq!(table(2, |_| GROUP), Some(vec![GROUP; 2]));
        let mut filter = silent();
        filter.set_table(Some(Vec::new()), None);
        assert_eq!(filter.wanted(), Some((true, vec![OWN, BROADCAST])));
        filter.set_table(None, Some(Vec::new()));
        assert_eq!(filter.wanted(), None);
        filter.set_table(Some(vec![[4; 6]; EXACT]), Some(Vec::new()));
        assert_eq!(filter.wanted(), None, "a tap compares no more");
    }
}
