// SPDX-License-Identifier: Apache-2.0
//! What a console counts.

use crate::metrics::Counter;

/// Counters of one console.
#[derive(Debug, Default)]
pub struct ConsoleMetrics {
    /// Bytes of input given to the guest.
    pub input_bytes: Counter,
    /// Bytes of output taken from the guest.
    pub output_bytes: Counter,
    /// Bytes of those that no sink took.
    pub dropped_bytes: Counter,
    /// Times that output had to wait for the sink.
    pub sink_full: Counter,
    /// Chains that broke the rules.
    pub bad_chains: Counter,
}
