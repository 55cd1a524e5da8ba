// SPDX-License-Identifier: Apache-2.0
//! The rx queue: buffers that the driver supplies for packets to the guest.

use std::sync::Arc;

use super::packet::{Header, RxBuffer};
use crate::GuestRam;
use crate::virtio::{ActiveQueue, Health, QueueError};

pub(super) struct RxRing {
    pub queue: ActiveQueue,
    ram: Arc<GuestRam>,
    health: Arc<Health>,
    /// Buffers were returned that the driver has not been told of.
    unsignalled: bool,
    /// The driver was asked to notify of new buffers.
    starved: bool,
}

impl RxRing {
    pub fn new(queue: ActiveQueue, health: Arc<Health>) -> Self {
        let ram = Arc::clone(queue.ram());
        Self {
            queue,
            ram,
            health,
            unsignalled: false,
            starved: false,
        }
    }

    pub fn ram(&self) -> Arc<GuestRam> {
        Arc::clone(&self.ram)
    }

    /// The next buffer, if the driver supplied one. With `first` unset (others were taken and may go back) a buffer
    /// that breaks the rules ends the batch; otherwise it is returned to the driver unused.
    pub fn take<'a>(&mut self, ram: &'a GuestRam, first: bool) -> Result<Option<RxBuffer<'a>>, QueueError> {
        // A driver gets no more than one ring of useless buffers looked at per turn.
        for _ in 0..self.queue.size() {
            let Some(chain) = self.queue.pop()? else {
                self.starved = true;
                if self.queue.enable_notification()? {
                    // Some arrived just now.
                    continue;
                }
                return Ok(None);
            };
            if self.starved {
                self.starved = false;
                self.queue.disable_notification()?;
            }
            match RxBuffer::parse(&chain, ram) {
                Ok(buffer) => return Ok(Some(buffer)),
                Err(_) if !first => {
                    self.queue.undo_pop();
                    return Ok(None);
                }
                Err(error) => {
                    self.health.complain(format_args!("rx queue: {error}"));
                    self.queue.complete(chain.head_index(), 0)?;
                    self.unsignalled = true;
                }
            }
        }
        Ok(None)
    }

    /// Puts the `count` buffers that were taken last back.
    pub fn put_back(&mut self, count: usize) {
        for _ in 0..count {
            self.queue.undo_pop();
        }
    }

    /// Gives a buffer with a packet in it to the driver; its payload is in place already.
    pub fn give(&mut self, buffer: &RxBuffer<'_>, header: Header) -> Result<(), QueueError> {
        let length = buffer.write_header(header);
        self.queue.complete(buffer.head_index(), length)?;
        self.unsignalled = true;
        Ok(())
    }

    /// Gives a buffer that nothing fits into back to the driver.
    pub fn give_unused(&mut self, buffer: &RxBuffer<'_>) -> Result<(), QueueError> {
        self.queue.complete(buffer.head_index(), 0)?;
        self.unsignalled = true;
        Ok(())
    }

    /// Whether the driver has to be told of buffers, which this counts as done.
    pub fn take_unsignalled(&mut self) -> bool {
        std::mem::take(&mut self.unsignalled)
    }
}
