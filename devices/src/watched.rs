// SPDX-License-Identifier: Apache-2.0
//! A host descriptor that a handler watches now and then.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events};

/// A descriptor, and what the event loop watches it for.
#[derive(Debug)]
pub(crate) struct Watched {
    fd: Arc<OwnedFd>,
    data: u32,
    events: EventSet,
}

impl Watched {
    /// Not watched yet. `data` tells its events from others of the handler.
    pub(crate) fn new(fd: Arc<OwnedFd>, data: u32) -> Self {
        Self {
            fd,
            data,
            events: EventSet::empty(),
        }
    }

    /// The descriptor.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Forgets what was watched: the handler has been off its event loop.
    pub(crate) fn forget(&mut self) {
        self.events = EventSet::empty();
    }

    /// Watches for `events` from now on. For none the descriptor is taken out: as long as it is in, hang-ups and
    /// errors are reported whether wanted or not, and would spin the loop.
    pub(crate) fn want(&mut self, events: EventSet, ops: &mut EventOps) -> Result<(), event_manager::Error> {
        if events == self.events {
            return Ok(());
        }
        let wanted = Events::with_data(&*self.fd, self.data, events);
        if self.events.is_empty() {
            ops.add(wanted)?;
        } else if events.is_empty() {
            ops.remove(wanted)?;
        } else {
            ops.modify(wanted)?;
        }
        self.events = events;
        Ok(())
    }
}
