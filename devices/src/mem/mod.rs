// SPDX-License-Identifier: Apache-2.0
//! Virtio memory device (virtio 1.3, section 5.15): memory that is given to a running guest and taken back.
//!
//! # Theory of operation
//!
//! The device has a region of guest-physical addresses above the RAM that the kernel boots with, in blocks of
//! [`BLOCK_SIZE`], all unplugged at first. The host says how much of it the guest should have; the driver, told by a
//! configuration interrupt, asks for blocks to be plugged until that is reached, or unplugs what it can do without:
//!
//! ```text
//!  unplugged ──PLUG, while plugged + asked <= requested──▶ plugged
//!      ▲                                                     │
//!      └──UNPLUG, UNPLUG_ALL: the memory goes to the host────┘
//! ```
//!
//! The region is part of the guest's RAM for the host (other devices do DMA there), one sparse mapping. Plugging costs
//! nothing: pages come with the first access. Unplugging frees them, on the worker pool like the balloon's. The driver
//! has agreed not to touch unplugged blocks (UNPLUGGED_INACCESSIBLE is required); nothing stops one that does. So the
//! owner of the memory compares what the file holds with [`MemHandle::plugged`] and stops a guest that took more.
//!
//! What was plugged stays so over a reset of the device (5.15.5.1): another kernel finds it by asking.

mod blocks;
mod device;
mod handler;
mod metrics;

pub use device::{Mem, MemHandle, Region, RegionError};
pub use metrics::MemMetrics;

/// Bytes per block: what is plugged and unplugged at once. A huge page, so that unplugging frees whole ones.
pub const BLOCK_SIZE: u64 = 2 << 20;
