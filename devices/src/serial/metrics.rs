// SPDX-License-Identifier: Apache-2.0
//! What a serial port counts.

use crate::metrics::Counter;

/// Counters of one serial port.
#[derive(Debug, Default)]
pub struct SerialMetrics {
    /// Bytes the guest wrote.
    pub written_bytes: Counter,
    /// Bytes of those that the sink did not take.
    pub dropped_bytes: Counter,
}
