// SPDX-License-Identifier: Apache-2.0
//! What a vsock device counts.

use crate::metrics::Counter;

macro_rules! metrics {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        #[derive(Debug, Default)]
        pub(super) struct Counters {
            $(pub $name: Counter,)*
        }

        /// Counters of one vsock device since it was made, over resets of its driver.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
        pub struct VsockMetrics {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counters {
            pub fn snapshot(&self) -> VsockMetrics {
                VsockMetrics { $($name: self.$name.get(),)* }
            }
        }
    };
}

metrics! {
    /// Connections that were established, by either side.
    established,
    /// Connections that the host (nobody listens, limit reached) or the guest refused.
    refused,
    /// Connections that ended by RST or because the guest broke the rules.
    resets,
    /// Packets from the guest.
    tx_packets,
    /// Bytes from the guest's applications.
    tx_bytes,
    /// Packets to the guest.
    rx_packets,
    /// Bytes to the guest's applications.
    rx_bytes,
    /// Packets from the guest that broke a rule.
    malformed,
    /// Times that data from the guest had to be buffered, as the host's socket was full.
    host_stalls,
    /// Times that data to the guest had to wait, as the rx queue had no buffers.
    rx_stalls,
    /// Times that data to the guest had to wait for credit.
    credit_stalls,
    /// Times that the event loop ran the device's handler.
    wakeups,
    /// Interrupts raised.
    interrupts,
}
