// SPDX-License-Identifier: Apache-2.0
//! What an entropy device counts.

use crate::metrics::Counter;

/// Counters of one entropy device.
#[derive(Debug, Default)]
pub struct RngMetrics {
    /// Random bytes given to the guest.
    pub bytes: Counter,
    /// Requests that broke the rules or that the host could not serve.
    pub failed_requests: Counter,
}
