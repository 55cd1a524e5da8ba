// SPDX-License-Identifier: Apache-2.0
//! What a memory device counts.

use crate::metrics::Counter;

/// Counters of one memory device.
#[derive(Debug, Default)]
pub struct MemMetrics {
    /// Blocks plugged.
    pub plugged_blocks: Counter,
    /// Blocks unplugged.
    pub unplugged_blocks: Counter,
    /// Requests to plug more than the host had asked for.
    pub refused_requests: Counter,
    /// Requests to unplug that the host could not fulfil.
    pub busy_requests: Counter,
    /// Chains, and requests in them, that broke the rules.
    pub bad_requests: Counter,
}
