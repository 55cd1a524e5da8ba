// SPDX-License-Identifier: Apache-2.0
//! Virtio 1.3 over MMIO with split queues.
//!
//! [`MmioTransport`] is the register page (section 4.2), [`VirtioDevice`] what each device type supplies for it,
//! [`ActiveQueue`] a split queue (section 2.7) from DRIVER_OK on, [`Interrupt`] and [`Health`] the ways back to the
//! guest and to the cell.

mod buffers;
mod device;
mod empty;
mod health;
mod interrupt;
mod mmio;
mod queue;
mod report;

pub use buffers::{Buffers, ChainError, Slices};
pub use device::{
    ActivateError, ActivationContext, ActiveDevice, DeviceType, RestoreError, SharedMemory, VirtioDevice,
    copy_config,
};
pub use empty::Empty;
pub use health::Health;
pub use interrupt::{ConfigSignal, Interrupt};
pub use mmio::{MmioTransport, REGISTER_PAGE_SIZE, TransportError};
pub use queue::{ActiveQueue, Chain, Outcome, QueueError};
pub use report::{DeviceReport, QueueReport};

/// Feature bit VIRTIO_F_INDIRECT_DESC (section 6): descriptors may refer to a table of descriptors.
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// Feature bit VIRTIO_F_EVENT_IDX (section 6): both sides say at which index they want to hear next.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// Feature bit VIRTIO_F_VERSION_1 (section 6): not a legacy device. Always offered and required.
pub const F_VERSION_1: u64 = 1 << 32;

/// Device status bits (section 2.1).
pub mod status {
    /// The guest has seen the device.
    pub const ACKNOWLEDGE: u32 = 1;
    /// The guest has a driver for it.
    pub const DRIVER: u32 = 2;
    /// The driver is set up and the device is live.
    pub const DRIVER_OK: u32 = 4;
    /// Feature negotiation is done.
    pub const FEATURES_OK: u32 = 8;
    /// The device met an error that only a reset cures.
    pub const DEVICE_NEEDS_RESET: u32 = 64;
    /// The driver gave up.
    pub const FAILED: u32 = 128;
}
