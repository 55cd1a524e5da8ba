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
/// Addresses of a kind that are kept.
const MOST: usize = 64;

/// Addresses of a kind, or `None`: more than are kept, so that the driver gets all of that kind, which the specification allows.
pub(super) type Table = Option<Vec<Mac>>;

/// What the driver has said.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Filter {
    mac: Mac,
    promiscuous: bool,
    all_multicast: bool,
    unicast: Table,
    multicast: Table,
}

impl Filter {
    /// That of a device of this address whose driver has said nothing.
    pub(super) fn new(mac: Mac) -> Self {
        Self {
            mac,
            promiscuous: true,
            all_multicast: false,
            unicast: Some(Vec::new()),
            multicast: Some(Vec::new()),
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

    /// VIRTIO_NET_CTRL_MAC_TABLE_SET.
    pub(super) fn set_table(&mut self, unicast: Table, multicast: Table) {
        self.unicast = unicast;
        self.multicast = multicast;
    }

    /// What a tap is to let through: whether all multicast, and these. `None` is everything.
    pub(super) fn wanted(&self) -> Option<(bool, Vec<Mac>)> {
        // With the device's own that is as many as a tap compares.
        let unicast = self.unicast.as_ref().filter(|table| table.len() < EXACT)?;
        if self.promiscuous {
            return None;
        }
        // A snapshot may say anything.
        let multicast = self.multicast.as_ref().filter(|table| table.len() <= MOST);
        let all = self.all_multicast || multicast.is_none();
        let mut addresses = vec![self.mac];
        addresses.extend_from_slice(unicast);
        addresses.push(BROADCAST);
        // A tap takes no filter at all for one that is not what it should be.
        let multicast = multicast
            .into_iter()
            .flatten()
            .filter(|[first, ..]| first & 1 != 0);
        addresses.extend(multicast);
        Some((all, addresses))
    }
}

/// A table of so many entries.
pub(super) fn table(entries: u64, mut entry: impl FnMut(u64) -> Mac) -> Table {
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
        assert_eq!(
            filter.wanted(),
            Some((true, vec![[6; 6], [4; 6], BROADCAST, GROUP]))
        );
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
