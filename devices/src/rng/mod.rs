// SPDX-License-Identifier: Apache-2.0
//! Virtio entropy device (virtio 1.3, section 5.4).
//!
//! # Theory of operation
//!
//! One queue of writable buffers. The host's getrandom(2) fills them in place. The device may use less of a buffer
//! than there is (5.4.6.1), and it does: [`MAX_REQUEST`] bytes per chain and [`BYTE_BUDGET`] per turn on the event
//! loop, so that a guest with huge buffers cannot hold up the devices of others.

mod device;
mod handler;
mod metrics;

pub use device::Rng;
pub use handler::{BYTE_BUDGET, MAX_REQUEST};
pub use metrics::RngMetrics;
