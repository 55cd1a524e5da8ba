// SPDX-License-Identifier: Apache-2.0
//! What a balloon counts.

use crate::metrics::Counter;

/// Counters of one balloon, in pages of 4096 bytes.
#[derive(Debug, Default)]
pub struct BalloonMetrics {
    /// Pages that went into the balloon.
    pub inflated_pages: Counter,
    /// Pages that came out of it, as far as the driver tells.
    pub deflated_pages: Counter,
    /// Pages freed by free page reporting.
    pub reported_pages: Counter,
    /// Pages that the host could not free (for example parts of huge pages).
    pub kept_pages: Counter,
    /// Chains, and page numbers in them, that broke the rules.
    pub bad_requests: Counter,
}
