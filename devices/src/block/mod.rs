// SPDX-License-Identifier: Apache-2.0
//! Virtio block device (virtio 1.3, section 5.2) over a raw file or a block device of the host.
//!
//! # Theory of operation
//!
//! [`Disk`] is the host's side: a descriptor that the caller opened, what kind of thing it is, and how it may be used.
//! The kind comes from the configuration and is checked against the descriptor, never guessed from it
//! (CVE-2026-24054 is a bind mount that was taken for a block device). A read-only disk refuses writes here, whatever
//! the descriptor would allow and the guest's driver believes.
//!
//! Disk I/O blocks, so requests run in lanes on the shared worker pool (`lanes.rs`), straight between the file and
//! guest memory.
//!
//! *Nothing is lost*: FLUSH is fdatasync. In write-through mode (the driver did not take FLUSH, or turned the cache
//! off by CONFIG_WCE, or the host's configuration says so) each write is followed by it before it is reported. Linux
//! reports a failed write-back once and then forgets the pages; so after a failed fdatasync every later one fails as
//! well, until the disk is opened anew.

mod device;
mod disk;
mod handler;
mod metrics;
mod request;

pub use device::{Block, BlockHandle};
pub use disk::{BlockConfig, BlockError, CacheMode, Disk, DiskKind};
pub use metrics::BlockMetrics;

/// Bytes per sector, whatever the disk's own block size (5.2.2).
pub const SECTOR_SIZE: u64 = 512;
