// SPDX-License-Identifier: Apache-2.0
//! What a block device counts.

use crate::metrics::Counter;

/// Counters of one block device.
#[derive(Debug, Default)]
pub struct BlockMetrics {
    /// Read requests.
    pub reads: Counter,
    /// Write requests.
    pub writes: Counter,
    /// Bytes read.
    pub read_bytes: Counter,
    /// Bytes written.
    pub written_bytes: Counter,
    /// Flush requests.
    pub flushes: Counter,
    /// Discard and write-zeroes requests.
    pub discards: Counter,
    /// Requests answered with an error.
    pub failed_requests: Counter,
    /// Chains that were no request at all.
    pub bad_chains: Counter,
}
