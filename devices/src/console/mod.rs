// SPDX-License-Identifier: Apache-2.0
//! Virtio console (virtio 1.3, section 5.3) with a single port.
//!
//! # Theory of operation
//!
//! Queue 0 carries input to the guest, queue 1 its output; there is no control queue, as there is one port.
//!
//! *Output* goes from guest memory to the sink's descriptor by writev, and to the [`OutputTail`] that is kept for the
//! report of a panic. When the sink is full the chain stays in the queue, with a note of how much of it is written,
//! until the sink is writable: the guest's writer waits, the event loop does not. A sink that is gone (EPIPE) or
//! that there never was lets output through to the tail only. A regular file is never full; whoever gives one must
//! be ready to have it filled by the guest.
//!
//! *Input* is read straight into the guest's buffers when both are there. Without a buffer the input's descriptor is
//! not watched, so nothing spins; end of file ends the watching for good, as a console has no end of file.
//!
//! The *size* of the terminal is in configuration space; [`ConsoleHandle::resize`] changes it and tells the driver.

mod device;
mod handler;
mod metrics;

pub use device::{Console, ConsoleConfig, ConsoleHandle, TerminalSize};
pub use metrics::ConsoleMetrics;

#[cfg(doc)]
use crate::output_tail::OutputTail;
