// SPDX-License-Identifier: Apache-2.0
//! What a device type supplies to the transport.

use std::sync::{Arc, Mutex};

use event_manager::MutEventSubscriber;

use super::{ActiveQueue, Health, Interrupt, QueueError};
use crate::GuestRam;
use crate::state::{SavedState, StateError};

/// Virtio device types that Cloister has (section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum DeviceType {
    /// No device: drivers take no notice of it (4.2.2, DeviceID).
    Empty = 0,
    /// Network device (5.1).
    Net = 1,
    /// Block device (5.2).
    Block = 2,
    /// Console (5.3).
    Console = 3,
    /// Entropy device (5.4).
    Rng = 4,
    /// Memory balloon (5.5).
    Balloon = 5,
    /// Socket device (5.10).
    Vsock = 19,
    /// Memory device (5.15).
    Mem = 24,
    /// File system device (5.11).
    Fs = 26,
}

impl DeviceType {
    /// What errors call it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Net => "net",
            Self::Block => "block",
            Self::Console => "console",
            Self::Rng => "rng",
            Self::Balloon => "balloon",
            Self::Vsock => "vsock",
            Self::Mem => "mem",
            Self::Fs => "virtio-fs",
        }
    }
}

/// A shared-memory region of a device (section 2.10), for example the DAX window of a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedMemory {
    /// shmid: 0 is the DAX window of a file system device (5.11.5).
    pub id: u8,
    /// Guest physical address.
    pub base: u64,
    /// Length in bytes.
    pub length: u64,
}

/// Why a device could not go live.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// A queue's addresses or size are unusable.
    #[error("queue {index} is unusable")]
    Queue {
        /// Queue number.
        index: usize,
        /// What is wrong with it.
        #[source]
        source: QueueError,
    },
    /// The driver left a queue out that the device cannot do without.
    #[error("the driver did not set up queue {0}")]
    MissingQueue(usize),
    /// The host refused something the device needs.
    #[error("{what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: std::io::Error,
    },
    /// The event loop is gone.
    #[error(transparent)]
    EventLoop(#[from] crate::event_loop::EventLoopError),
}

/// Everything a device gets when its driver sets DRIVER_OK.
pub struct ActivationContext {
    /// The guest's RAM.
    pub ram: Arc<GuestRam>,
    /// The queues, by number; `None` where the driver left one out.
    pub queues: Vec<Option<ActiveQueue>>,
    /// The features that were negotiated.
    pub features: u64,
    /// The way to the driver.
    pub interrupt: Arc<Interrupt>,
    /// The way to the cell.
    pub health: Arc<Health>,
}

impl ActivationContext {
    /// Takes queue `index`, which the device needs.
    pub fn take_queue(&mut self, index: usize) -> Result<ActiveQueue, ActivateError> {
        self.queues
            .get_mut(index)
            .and_then(Option::take)
            .ok_or(ActivateError::MissingQueue(index))
    }
}

/// The control side of a device: called on a vCPU's thread, so quick, and never blocking.
///
/// ```text
///  new ──▶ inactive ──activate()──▶ active (an ActiveDevice exists, on an event loop)
///             ▲                        │
///             └────────reset()─────────┘   the ActiveDevice is off the loop before reset() is called
/// ```
pub trait VirtioDevice: Send {
    /// The device type.
    fn device_type(&self) -> DeviceType;

    /// The maximum size of each queue; powers of two, at most 32768. Its length is the number of queues.
    fn queue_max_sizes(&self) -> &[u16];

    /// The queue whose requests drivers wait for with their processor spinning, if there is one: it is served on the vCPU's
    /// thread ([`ActiveDevice::serve_at_once`]), so that no other thread has to come to run first.
    fn queue_served_at_once(&self) -> Option<usize> {
        None
    }

    /// The device-specific features offered. The transport adds the ring features and VERSION_1.
    fn features(&self) -> u64;

    /// Reads configuration space at `offset`. Bytes beyond the device's configuration read as zero; `data` comes
    /// zeroed. The default is for a device without one.
    fn read_config(&self, _offset: u32, _data: &mut [u8]) {}

    /// Writes configuration space. The default ignores it, as most fields are read-only.
    fn write_config(&mut self, _offset: u32, _data: &[u8]) {}

    /// The shared-memory region with this id, if the device has it.
    fn shared_memory(&self, _id: u8) -> Option<SharedMemory> {
        None
    }

    /// The driver is ready: make the data side. The transport puts it on an event loop.
    fn activate(&mut self, context: ActivationContext)
    -> Result<Arc<Mutex<dyn ActiveDevice>>, ActivateError>;

    /// The driver reset the device. Its data side is off the event loop and may be dropped.
    fn reset(&mut self);

    /// The control side's own state, beyond what transport and data side save; none by default.
    fn save(&self) -> Result<SavedState, StateError> {
        Ok(SavedState::nothing())
    }

    /// Puts back what `save` gave, before any activation.
    fn restore(&mut self, state: &SavedState) -> Result<(), StateError> {
        state.expect_nothing(self.device_type().name())
    }

    /// Puts the data side's saved state back into a freshly activated one. The queues in `context` already stand
    /// where they stood. The default is for a data side that keeps no state.
    fn restore_active(
        &mut self,
        context: ActivationContext,
        state: &SavedState,
    ) -> Result<Arc<Mutex<dyn ActiveDevice>>, RestoreError> {
        state.expect_nothing(self.device_type().name())?;
        Ok(self.activate(context)?)
    }
}

/// Why an active device could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Its state does not fit.
    #[error(transparent)]
    State(#[from] StateError),
    /// It could not go live.
    #[error(transparent)]
    Activate(#[from] ActivateError),
}

/// The data side of a device: owns the queues, runs on an event loop.
///
/// Its `init` registers the queues' notification eventfds ([`ActiveQueue::notification`]) and whatever host
/// descriptors it watches, and serves what is already in the queues (a restored device gets no new notification). It
/// runs again each time that the device comes back to its event loop ([`super::MmioTransport::resume`]).
pub trait ActiveDevice: MutEventSubscriber + Send {
    /// Serves what is in [`VirtioDevice::queue_served_at_once`]; called on a vCPU's thread. What the event loop has to do about
    /// it is left to that, by the queue's notification.
    fn serve_at_once(&mut self) {}

    /// Waits until no request is under way outside the event loop (in a worker pool), so that queues and memory
    /// stand still; called with the vCPUs paused. The default has none.
    fn quiesce(&mut self) {}

    /// The data side's state: queue positions are saved by [`ActiveDevice::queues`], this is the rest, which
    /// most devices lack.
    fn save(&self) -> Result<SavedState, StateError> {
        Ok(SavedState::nothing())
    }

    /// The state of each queue, in order; `None` where the driver left one out.
    fn queues(&self) -> Vec<Option<virtio_queue::QueueState>>;
}

/// Answers a read of configuration space that holds `config`: bytes beyond it stay as they are.
pub fn copy_config(config: &[u8], offset: u32, data: &mut [u8]) {
    let source = usize::try_from(offset)
        .ok()
        .and_then(|offset| config.get(offset..))
        .unwrap_or_default();
    let n = source.len().min(data.len());
    data[..n].copy_from_slice(&source[..n]);
}

#[cfg(test)]
mod tests {
    use super::copy_config;

    #[test]
    fn configuration_ends_where_it_ends() {
        let read = |offset| {
            let mut data = [0; 4];
            copy_config(&[1, 2, 3, 4, 5, 6], offset, &mut data);
            data
        };
        assert_eq!(read(0), [1, 2, 3, 4]);
        assert_eq!(read(4), [5, 6, 0, 0]);
        assert_eq!(read(6), [0; 4]);
        assert_eq!(read(u32::MAX), [0; 4]);
    }
}
