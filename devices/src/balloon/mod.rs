// SPDX-License-Identifier: Apache-2.0
//! Virtio memory balloon (virtio 1.3, section 5.5): gives memory that the guest does not use back to the host.
//!
//! # Theory of operation
//!
//! *Inflating*: the driver hands over page numbers until it has as many pages in the balloon as the host's target in
//! configuration space says; each page's memory on the host is freed. *Deflating* needs nothing of the host: a page
//! comes back, zeroed, with the first access. *Free page reporting*: the driver lends pages that its allocator does
//! not need now; they are freed while it holds still, and it may use them again as soon as their chain is returned.
//!
//! Freeing is a hole in the memory file where the guest's RAM is a shared mapping of one (MADV_REMOVE), and dropping
//! the private pages where it is not (MADV_DONTNEED). Each call walks the MMU notifiers of all cells in the process,
//! so pages that follow each other are freed together, and the work is done in a lane on the worker pool, not on the
//! event loop. A page number or range outside of RAM is complained about and skipped.
//!
//! The statistics queue and free page hints are not offered.

mod device;
mod handler;
mod metrics;

pub use device::{Balloon, BalloonHandle};
pub use metrics::BalloonMetrics;

/// Bytes per balloon page, whatever the page size of guest and host (5.5.6).
pub const PAGE_SIZE: u64 = 4096;
