// SPDX-License-Identifier: Apache-2.0
//! Waiting for the host's descriptors of one device.
//!
//! A device has an epoll instance of its own for its sockets, which is one descriptor to the event loop. So a cell
//! with thousands of busy connections takes one turn among the devices like any other, and does a bounded amount of
//! work in it. Everything is level-triggered: what cannot be handled now is not watched, and what is watched and
//! ready is reported again until it is handled.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Instant;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use super::connection::Interest;
use super::table::Token;

/// Who an event is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Connection(Token),
    Handshake(u32),
    UdsListener,
    /// The handles have something to do for the device.
    Wake,
    Timer,
}

const SPECIAL: u64 = 1 << 63;
const HANDSHAKE: u64 = SPECIAL | 1 << 62;

impl Source {
    fn encode(self) -> u64 {
        match self {
            // Generations have 31 bits.
            Self::Connection(token) => u64::from(token.generation) << 32 | u64::from(token.slot),
            Self::Handshake(id) => HANDSHAKE | u64::from(id),
            Self::UdsListener => SPECIAL,
            Self::Wake => SPECIAL | 1,
            Self::Timer => SPECIAL | 2,
        }
    }

    fn decode(data: u64) -> Option<Self> {
        let low = u32::try_from(data & 0xffff_ffff).ok()?;
        if data & SPECIAL == 0 {
            let generation = u32::try_from(data >> 32).ok()?;
            return Some(Self::Connection(Token {
                slot: low,
                generation,
            }));
        }
        if data & HANDSHAKE == HANDSHAKE {
            return Some(Self::Handshake(low));
        }
        match low {
            0 => Some(Self::UdsListener),
            1 => Some(Self::Wake),
            2 => Some(Self::Timer),
            _ => None,
        }
    }
}

/// What happened.
#[derive(Clone, Copy, Debug)]
pub(super) struct Event {
    pub source: Source,
    pub readable: bool,
    pub writable: bool,
    /// Both directions of the socket are shut, or it failed.
    pub hung_up: bool,
}

pub(super) struct Poller {
    epoll: Epoll,
}

impl Poller {
    /// Events taken per turn on the event loop.
    pub const BATCH: usize = 64;

    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new()? })
    }

    pub fn watch(&self, fd: RawFd, source: Source, interest: Interest) -> io::Result<()> {
        self.ctl(ControlOperation::Add, fd, source, interest)
    }

    pub fn change(&self, fd: RawFd, source: Source, interest: Interest) -> io::Result<()> {
        self.ctl(ControlOperation::Modify, fd, source, interest)
    }

    fn ctl(
        &self,
        operation: ControlOperation,
        fd: RawFd,
        source: Source,
        interest: Interest,
    ) -> io::Result<()> {
        let mut events = EventSet::empty();
        events.set(EventSet::IN | EventSet::READ_HANG_UP, interest.read);
        events.set(EventSet::OUT, interest.write);
        self.epoll
            .ctl(operation, fd, EpollEvent::new(events, source.encode()))
    }

    pub fn forget(&self, fd: RawFd) {
        // Not registered is as good. Explicit, as a forked child may hold the descriptor for a moment.
        let _ = self
            .epoll
            .ctl(ControlOperation::Delete, fd, EpollEvent::default());
    }

    /// What is ready now, at most [`Poller::BATCH`] events.
    pub fn poll(&self, events: &mut Vec<Event>) -> io::Result<()> {
        events.clear();
        let mut ready = [EpollEvent::default(); Self::BATCH];
        let count = match self.epoll.wait(0, &mut ready) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        events.extend(ready.iter().take(count).filter_map(|event| {
            let set = event.event_set();
            Some(Event {
                source: Source::decode(event.data())?,
                readable: set.intersects(EventSet::IN | EventSet::READ_HANG_UP | EventSet::ERROR),
                writable: set.contains(EventSet::OUT),
                hung_up: set.intersects(EventSet::HANG_UP | EventSet::ERROR),
            })
        }));
        Ok(())
    }
}

impl AsRawFd for Poller {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

/// What a deadline is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Timeout {
    Connection(Token),
    Handshake(u32),
    /// Accept clients of the unix socket again.
    Accept,
    /// Tell the driver of used tx buffers.
    TxSignal,
    /// Hold connections back no longer.
    Held,
}

/// Deadlines behind one timerfd, which exists from the first deadline on.
#[derive(Default)]
pub(super) struct Timers {
    deadlines: BTreeSet<(Instant, Timeout)>,
    timer: Option<TimerFd>,
    armed: Option<Instant>,
}

impl Timers {
    pub fn set(&mut self, deadline: Instant, timeout: Timeout) {
        self.deadlines.insert((deadline, timeout));
    }

    pub fn cancel(&mut self, deadline: Instant, timeout: Timeout) {
        self.deadlines.remove(&(deadline, timeout));
    }

    /// The next timeout that is due.
    pub fn due(&mut self, now: Instant) -> Option<Timeout> {
        let &(deadline, _) = self.deadlines.first()?;
        if deadline > now {
            return None;
        }
        self.deadlines.pop_first().map(|(_, timeout)| timeout)
    }

    /// The timer fired: makes it unreadable.
    pub fn fired(&mut self) -> io::Result<()> {
        self.armed = None;
        if let Some(timer) = &mut self.timer {
            timer.clear()?;
        }
        Ok(())
    }

    /// Makes the timer fire at the earliest deadline. Fires for nothing if that was cancelled, rather than to be set
    /// each time.
    pub fn arm(&mut self, poller: &Poller) -> io::Result<()> {
        let Some(&(deadline, _)) = self.deadlines.first() else {
            return Ok(());
        };
        if self.armed.is_some_and(|armed| armed <= deadline) {
            return Ok(());
        }
        let timer = match &mut self.timer {
            Some(timer) => timer,
            None => {
                let timer = TimerFd::new()?;
                let interest = Interest {
                    read: true,
                    write: false,
                };
                poller.watch(timer.as_raw_fd(), Source::Timer, interest)?;
                self.timer.insert(timer)
            }
        };
        // Zero would disarm it.
        let delay = deadline
            .saturating_duration_since(Instant::now())
            .max(std::time::Duration::from_nanos(1));
        timer.reset(delay, None)?;
        self.armed = Some(deadline);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_survive_epoll() {
        let token = Token {
            slot: u32::MAX,
            generation: u32::MAX >> 1,
        };
        for source in [
            Source::Connection(token),
            Source::Connection(Token {
                slot: 0,
                generation: 0,
            }),
            Source::Handshake(0),
            Source::Handshake(u32::MAX),
            Source::UdsListener,
            Source::Wake,
            Source::Timer,
        ] {
            assert_eq!(Source::decode(source.encode()), Some(source));
        }
    }
}
