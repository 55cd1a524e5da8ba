// SPDX-License-Identifier: Apache-2.0
//! What a network device counts.

use crate::metrics::Counter;

/// Counters of one network device. Received and transmitted are the guest's view.
#[derive(Debug, Default)]
pub struct NetMetrics {
    /// Frames given to the guest (one with segmentation offload counts once).
    pub received_frames: Counter,
    /// Their bytes, headers not counted.
    pub received_bytes: Counter,
    /// Frames taken from the guest.
    pub transmitted_frames: Counter,
    /// Their bytes, headers not counted.
    pub transmitted_bytes: Counter,
    /// Times that frames waited on the host because the guest had no buffers. What the tap then drops, it counts.
    pub starved: Counter,
    /// Frames from the host that made no sense.
    pub receive_dropped: Counter,
    /// Frames from the host that the driver has not asked for.
    pub receive_unwanted: Counter,
    /// Frames from the guest that were malformed, or that the host did not take.
    pub transmit_dropped: Counter,
    /// Times that frames waited in the guest because the tap was full.
    pub tap_full: Counter,
}
