// SPDX-License-Identifier: Apache-2.0
//! Which frames the driver wants (virtio 1.3, sections 5.1.6.5.1 and 5.1.6.5.2): a guest is not woken for what other hosts of the network
//! tell each other by multicast.
//!
//! A driver that never says what it wants gets everything. The tap could drop frames by itself (TUNSETTXFILTER), but is told so under
//! the lock of all of the node's network configuration: a guest that asks all the time would hold it up, and a lock that is held
//! elsewhere the event loop of many guests.

use serde::{Deserialize, Serialize};

/// An Ethernet address.
pub(super) type Mac = [u8; 6];

const BROADCAST: Mac = [0xff; 6];
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

    /// Whether a frame to this address is wanted.
    pub(super) fn wants(&self, to: Mac) -> bool {
        let [first, ..] = to;
        let (all, table) = if first & 1 == 0 {
            (false, &self.unicast)
        } else {
            (self.all_multicast, &self.multicast)
        };
        let listed = || table.as_ref().is_none_or(|table| table.contains(&to));
        self.promiscuous || all || to == self.mac || to == BROADCAST || listed()
    }

    /// Whether it can be one of this program's: tables have their bounds.
    pub(super) fn is_sound(&self) -> bool {
        let tables = [&self.unicast, &self.multicast];
        tables.into_iter().flatten().all(|table| table.len() <= MOST)
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

    const OTHER: Mac = [4; 6];

    fn wanted(filter: &Filter) -> Vec<Mac> {
        let all = [OWN, OTHER, GROUP, BROADCAST];
        all.into_iter().filter(|to| filter.wants(*to)).collect()
    }

    #[test]
    fn everything_until_the_driver_says_otherwise() {
        let mut filter = Filter::new(OWN);
        assert_eq!(wanted(&filter), [OWN, OTHER, GROUP, BROADCAST]);
        filter.set_promiscuous(false);
        assert_eq!(wanted(&filter), [OWN, BROADCAST]);
        filter.set_all_multicast(true);
        assert_eq!(wanted(&filter), [OWN, GROUP, BROADCAST]);
        filter.set_all_multicast(false);
        filter.set_table(Some(vec![OTHER]), Some(vec![GROUP]));
        assert_eq!(wanted(&filter), [OWN, OTHER, GROUP, BROADCAST]);
        filter.set_table(Some(Vec::new()), Some(Vec::new()));
        filter.set_mac(OTHER);
        assert_eq!(wanted(&filter), [OTHER, BROADCAST]);
    }

    #[test]
    fn more_than_is_kept_is_all_of_its_kind() {
        assert_eq!(table(MOST as u64 + 1, |_| GROUP), None);
        assert_eq!(table(2, |_| GROUP), Some(vec![GROUP; 2]));
        let mut filter = Filter::new(OWN);
        filter.set_promiscuous(false);
        filter.set_table(Some(Vec::new()), None);
        assert_eq!(wanted(&filter), [OWN, GROUP, BROADCAST]);
        filter.set_table(None, Some(Vec::new()));
        assert_eq!(wanted(&filter), [OWN, OTHER, BROADCAST]);
        assert!(filter.is_sound());
        filter.set_table(Some(vec![OTHER; MOST + 1]), None);
        assert!(!filter.is_sound());
    }
}
