// SPDX-License-Identifier: Apache-2.0
//! A split queue from DRIVER_OK on.
//!
//! [`ActiveQueue`] is made once, out of the registers as they stood at DRIVER_OK, and owns its configuration: there
//! is no way to change it but a reset, which drops the queue (Firecracker's CVE-2026-5747 is the bug that this rules
//! out by type). Rings and descriptors live in guest memory and can change under us at any time: each index is
//! checked where it is read, by virtio-queue, and chains are bounded by the queue's size.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};
use vmm_sys_util::eventfd::EventFd;

use super::Interrupt;
use crate::GuestRam;

/// A descriptor chain that the driver made available.
pub type Chain = DescriptorChain<Arc<GuestRam>>;

/// Why a queue cannot be used (any further).
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// Size zero, not a power of two, or above the maximum offered.
    #[error("size {size} is not a power of two between 1 and {max}")]
    Size {
        /// What the driver asked for.
        size: u16,
        /// What the device offers.
        max: u16,
    },
    /// A ring is misaligned or outside the guest's RAM.
    #[error("{ring} at {address:#x} is misaligned or outside of guest memory")]
    Address {
        /// Which of the three areas.
        ring: &'static str,
        /// Where the driver put it.
        address: u64,
    },
    /// The rings hold something impossible.
    #[error("the driver corrupted the ring")]
    Ring(#[source] virtio_queue::Error),
}

/// What a handler did with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is done; `len` bytes were written into the chain's writable part.
    Done {
        /// Bytes written.
        len: u32,
    },
    /// It will be completed later through [`ActiveQueue::complete`].
    Deferred,
    /// It cannot be handled now: put it back and stop.
    Break,
}

/// A live split queue. `serve` hands chains to a closure and returns them to the driver.
pub struct ActiveQueue {
    queue: Queue,
    ram: Arc<GuestRam>,
    notification: Arc<EventFd>,
    interrupt: Arc<Interrupt>,
    /// Chains completed since the driver's wish was looked at last.
    unsignalled: u16,
}

impl ActiveQueue {
    /// Chains handled per call of [`ActiveQueue::serve`] before others get their turn on the event loop.
    pub const BUDGET: usize = 256;

    /// Checks the configuration and freezes it. `state.ready` must be set.
    pub(super) fn new(
        state: QueueState,
        ram: Arc<GuestRam>,
        notification: Arc<EventFd>,
        interrupt: Arc<Interrupt>,
    ) -> Result<Self, QueueError> {
        let size = state.size;
        if size == 0 || !size.is_power_of_two() || size > state.max_size {
            return Err(QueueError::Size {
                size,
                max: state.max_size,
            });
        }
        // Section 2.7: 16 bytes per descriptor; 6 + 2n bytes; 6 + 8n bytes, with their alignments.
        let n = usize::from(size);
        let areas = [
            (
                "descriptor table",
                state.desc_table,
                16,
                16 * n,
                Permissions::Read,
            ),
            (
                "available ring",
                state.avail_ring,
                2,
                6 + 2 * n,
                Permissions::Read,
            ),
            ("used ring", state.used_ring, 4, 6 + 8 * n, Permissions::Write),
        ];
        for (ring, address, align, length, access) in areas {
            if address % align != 0 || !ram.check_range(GuestAddress(address), length, access) {
                return Err(QueueError::Address { ring, address });
            }
        }
        let queue = Queue::try_from(state).map_err(QueueError::Ring)?;
        Ok(Self {
            queue,
            ram,
            notification,
            interrupt,
            unsignalled: 0,
        })
    }

    /// The eventfd that the driver's notifications arrive on.
    pub fn notification(&self) -> &EventFd {
        &self.notification
    }

    /// The guest's RAM that this queue's chains refer to.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// The number of descriptors.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the next available chain.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        let chain = self
            .queue
            .iter(Arc::clone(&self.ram))
            .map_err(QueueError::Ring)?
            .next();
        Ok(chain)
    }

    /// Whether a chain waits. What a hostile driver writes into the index only shows at [`ActiveQueue::pop`].
    pub fn has_available(&self) -> Result<bool, QueueError> {
        Ok(self.available()? != 0)
    }

    /// How many chains wait, as far as the driver's index can be believed.
    pub fn available(&self) -> Result<u16, QueueError> {
        let index = self
            .queue
            .avail_idx(&*self.ram, Ordering::Acquire)
            .map_err(QueueError::Ring)?;
        Ok(index.0.wrapping_sub(self.queue.next_avail()))
    }

    /// Puts the chain that was popped last back.
    pub fn undo_pop(&mut self) {
        let previous = self.queue.next_avail().wrapping_sub(1);
        self.queue.set_next_avail(previous);
    }

    /// Returns a chain to the driver without interrupting it: call [`ActiveQueue::signal`] after the last one.
    pub fn complete(&mut self, head: u16, len: u32) -> Result<(), QueueError> {
        self.complete_all(&[(head, len)])
    }

    /// Returns several chains, heads and bytes written, so that the driver sees all of them or none. A packet that
    /// fills several buffers needs this: a driver that polls would miss the later ones (section 5.1.6.4).
    pub fn complete_all(&mut self, chains: &[(u16, u32)]) -> Result<(), QueueError> {
        let memory = |error| QueueError::Ring(virtio_queue::Error::GuestMemory(error));
        let (size, ring) = (self.queue.size(), self.queue.used_ring());
        let mut next = self.queue.next_used();
        for &(head, len) in chains {
            if head >= size {
                return Err(QueueError::Ring(virtio_queue::Error::InvalidDescriptorIndex));
            }
            // No overflow: the whole ring was checked to be in memory at activation.
            let slot = ring + 4 + 8 * u64::from(next % size);
            // struct virtq_used_elem: id, len.
            let element = u64::from(head) | u64::from(len) << 32;
            self.ram
                .write_obj(element.to_le(), GuestAddress(slot))
                .map_err(memory)?;
            next = next.wrapping_add(1);
            self.unsignalled = self.unsignalled.wrapping_add(1);
        }
        self.ram
            .store(next.to_le(), GuestAddress(ring + 2), Ordering::Release)
            .map_err(memory)?;
        self.queue.set_next_used(next);
        Ok(())
    }

    /// Interrupts the driver if it wants to hear of what was completed.
    pub fn signal(&mut self) -> Result<(), QueueError> {
        if self.wants_signal()? {
            self.interrupt.signal_used();
        }
        Ok(())
    }

    /// Whether the driver wants to hear of what was completed since this was asked last. For devices that interrupt
    /// once for several queues.
    pub fn wants_signal(&mut self) -> Result<bool, QueueError> {
        let completed = std::mem::take(&mut self.unsignalled);
        // The used index is out before what the driver says about interrupts is read (sections 2.7.7, 2.7.10).
        fence(Ordering::SeqCst);
        let available = self.queue.avail_ring();
        let load = |address| {
            self.ram
                .load(GuestAddress(address), Ordering::Relaxed)
                .map(u16::from_le)
                .map_err(|error| QueueError::Ring(virtio_queue::Error::GuestMemory(error)))
        };
        if self.queue.event_idx_enabled() {
            // Behind the ring: the index that, once passed, deserves an interrupt.
            let event = load(available + 4 + 2 * u64::from(self.queue.size()))?;
            let behind = self.queue.next_used().wrapping_sub(event).wrapping_sub(1);
            return Ok(behind < completed);
        }
        const NO_INTERRUPT: u16 = 1;
        Ok(load(available)? & NO_INTERRUPT == 0)
    }

    /// Asks the driver for no notifications while the queue is being looked at anyway.
    pub fn disable_notification(&mut self) -> Result<(), QueueError> {
        self.queue
            .disable_notification(&*self.ram)
            .map_err(QueueError::Ring)
    }

    /// Asks the driver for notifications again; `true` means that chains have arrived meanwhile, look again.
    pub fn enable_notification(&mut self) -> Result<bool, QueueError> {
        self.queue
            .enable_notification(&*self.ram)
            .map_err(QueueError::Ring)
    }

    /// Has the driver notify of the next chain that it makes available, whatever waits already. One that came just before
    /// is not notified of: compare [`ActiveQueue::available`] with what it was.
    pub fn await_next(&mut self) -> Result<(), QueueError> {
        let mut waiting = 0;
        // A ring holds no more.
        while waiting < self.size() && self.pop()?.is_some() {
            waiting += 1;
        }
        self.enable_notification()?;
        let first = self.queue.next_avail().wrapping_sub(waiting);
        self.queue.set_next_avail(first);
        Ok(())
    }

    /// Consumes the eventfd's count after it woke the event loop.
    pub fn clear_notification(&self) {
        // EAGAIN: somebody else consumed it; the queue is looked at all the same.
        let _ = self.notification.read();
    }

    /// Hands available chains to `handle` until the queue is empty, `handle` breaks, or the budget is spent; returns
    /// finished ones to the driver and interrupts it once. When the budget ends it, the queue notifies itself, so
    /// that the event loop comes back after the others had their turn.
    pub fn serve(&mut self, mut handle: impl FnMut(&Chain) -> Outcome) -> Result<(), QueueError> {
        let mut budget = Self::BUDGET;
        let mut completed = false;
        'looking: loop {
            self.disable_notification()?;
            while let Some(chain) = self.pop()? {
                match handle(&chain) {
                    Outcome::Done { len } => {
                        self.complete(chain.head_index(), len)?;
                        completed = true;
                    }
                    Outcome::Deferred => {}
                    Outcome::Break => {
                        self.undo_pop();
                        self.enable_notification()?;
                        break 'looking;
                    }
                }
                budget -= 1;
                if budget == 0 {
                    // EAGAIN would mean that a notification is pending already.
                    let _ = self.notification.write(1);
                    break 'looking;
                }
            }
            if !self.enable_notification()? {
                break;
            }
            // A guest that changes the index to and fro would keep us here for nothing.
            budget -= 1;
            if budget == 0 {
                let _ = self.notification.write(1);
                break;
            }
        }
        if completed {
            self.signal()?;
        }
        Ok(())
    }

    /// Where the queue stands, for a snapshot.
    pub fn state(&self) -> QueueState {
        self.queue.state()
    }
}
