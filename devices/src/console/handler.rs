// SPDX-License-Identifier: Apache-2.0
//! The data side: bytes in, bytes out.

use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use serde::{Deserialize, Serialize};
use virtio_queue::QueueState;

use super::ConsoleMetrics;
use super::device::{STATE_VERSION, WHAT};
use crate::host_io;
use crate::output_tail::OutputTail;
use crate::state::{SavedState, StateError};
use crate::virtio::{ActiveDevice, ActiveQueue, Buffers, Health, QueueError, Slices};
use crate::watched::Watched;

const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;
const INPUT: u32 = 2;
const OUTPUT: u32 = 3;

/// Bytes per host call.
const CHUNK: usize = 64 << 10;
/// Host calls, or chains, per turn on the event loop and direction.
const BUDGET: usize = 64;

#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct HandlerState {
    /// Bytes of the transmit queue's next chain that have been written already.
    written: u64,
}

/// Why serving stopped for good.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("cannot watch its host end: {0}")]
    Watch(#[from] event_manager::Error),
}

enum Sunk {
    /// The sink, or nobody, took this many bytes.
    Taken(usize),
    /// The sink is full.
    Full,
}

pub(super) struct ConsoleHandler {
    receive: ActiveQueue,
    transmit: ActiveQueue,
    input: Option<Watched>,
    output: Option<Watched>,
    tail: OutputTail,
    health: Arc<Health>,
    metrics: Arc<ConsoleMetrics>,
    written: usize,
}

impl ConsoleHandler {
    #[expect(clippy::too_many_arguments, reason = "called in one place")]
    pub(super) fn new(
        receive: ActiveQueue,
        transmit: ActiveQueue,
        input: Option<Arc<OwnedFd>>,
        output: Option<Arc<OwnedFd>>,
        tail: OutputTail,
        health: Arc<Health>,
        metrics: Arc<ConsoleMetrics>,
        state: HandlerState,
    ) -> Self {
        Self {
            receive,
            transmit,
            input: input.map(|fd| Watched::new(fd, INPUT)),
            output: output.map(|fd| Watched::new(fd, OUTPUT)),
            tail,
            health,
            metrics,
            // More than the chain holds counts as all of it.
            written: usize::try_from(state.written).unwrap_or(usize::MAX),
        }
    }

    fn bad_chain(&self, complaint: impl std::fmt::Display) {
        self.metrics.bad_chains.increment();
        self.health.complain(complaint);
    }

    /// Moves input into the guest's buffers.
    fn receive(&mut self, ops: &mut EventOps) -> Result<(), Failure> {
        let mut completed = false;
        let mut watch = true;
        self.receive.disable_notification()?;
        for _ in 0..BUDGET {
            if self.input.is_none() {
                break;
            }
            let Some(chain) = self.receive.pop()? else {
                // Input waits on the host until the driver notifies us of a buffer.
                watch = self.receive.enable_notification()?;
                if watch {
                    continue;
                }
                break;
            };
            let buffers = match Buffers::of(&chain) {
                Ok(buffers) if !buffers.writable.is_empty() => buffers,
                Ok(_) => {
                    self.bad_chain("a buffer for input without room for any");
                    self.receive.complete(chain.head_index(), 0)?;
                    completed = true;
                    continue;
                }
                Err(error) => {
                    self.bad_chain(error);
                    self.receive.complete(chain.head_index(), 0)?;
                    completed = true;
                    continue;
                }
            };
            let Some(input) = &self.input else { break };
            match host_io::readv(input.fd(), buffers.writable.range(0, CHUNK).parts()) {
                Ok(n) if n > 0 => {
                    self.metrics.input_bytes.add(n);
                    // At most CHUNK.
                    self.receive
                        .complete(chain.head_index(), u32::try_from(n).unwrap_or(0))?;
                    completed = true;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.receive.undo_pop();
                    break;
                }
                end => {
                    self.receive.undo_pop();
                    // EIO is how a pty says that its other end was closed.
                    if let Err(error) = end
                        && error.raw_os_error() != Some(libc::EIO)
                    {
                        log::warn!("{}: input ended: {error}", self.health.name());
                    }
                    if let Some(mut input) = self.input.take() {
                        input.want(EventSet::empty(), ops)?;
                    }
                }
            }
        }
        if let Some(input) = &mut self.input {
            // Still readable after the budget: level-triggered, so the loop comes back.
            let events = if watch { EventSet::IN } else { EventSet::empty() };
            input.want(events, ops)?;
        }
        if completed {
            self.receive.signal()?;
        }
        Ok(())
    }

    /// Gives up to CHUNK bytes from `written` on to the sink and to the tail.
    fn sink(&mut self, output: &Slices<'_>, ops: &mut EventOps) -> Result<Sunk, Failure> {
        let chunk = output.range(self.written, CHUNK);
        let mut taken = chunk.len();
        if let Some(sink) = &self.output {
            match host_io::writev(sink.fd(), chunk.parts()) {
                Ok(n) => taken = n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return Ok(Sunk::Full);
                }
                Err(error) => {
                    self.metrics.dropped_bytes.add(taken);
                    self.health
                        .complain(format_args!("output lost, as its sink fails: {error}"));
                    if error.kind() == ErrorKind::BrokenPipe
                        && let Some(mut sink) = self.output.take()
                    {
                        sink.want(EventSet::empty(), ops)?;
                    }
                }
            }
        } else {
            self.metrics.dropped_bytes.add(taken);
        }
        let mut bytes = vec![0; taken.min(OutputTail::CAPACITY)];
        let n = chunk.read(taken - bytes.len(), &mut bytes);
        self.tail.push(&bytes[..n]);
        self.metrics.output_bytes.add(taken);
        Ok(Sunk::Taken(taken))
    }

    /// Moves the guest's output to the sink.
    fn transmit(&mut self, ops: &mut EventOps) -> Result<(), Failure> {
        let mut completed = false;
        let mut again = true;
        let mut full = false;
        self.transmit.disable_notification()?;
        for _ in 0..BUDGET {
            let Some(chain) = self.transmit.pop()? else {
                again = self.transmit.enable_notification()?;
                if again {
                    continue;
                }
                break;
            };
            let done = match Buffers::of(&chain) {
                Err(error) => {
                    self.bad_chain(error);
                    true
                }
                Ok(buffers) => match self.sink(&buffers.readable, ops)? {
                    Sunk::Taken(n) => {
                        self.written = self.written.saturating_add(n);
                        self.written >= buffers.readable.len()
                    }
                    Sunk::Full => {
                        full = true;
                        false
                    }
                },
            };
            if done {
                self.written = 0;
                self.transmit.complete(chain.head_index(), 0)?;
                completed = true;
            } else {
                self.transmit.undo_pop();
            }
            if full {
                self.metrics.sink_full.increment();
                again = false;
                break;
            }
        }
        if let Some(output) = &mut self.output {
            let events = if full { EventSet::OUT } else { EventSet::empty() };
            output.want(events, ops)?;
        }
        if again {
            // The budget is spent. EAGAIN: a notification is pending already.
            let _ = self.transmit.notification().write(1);
        }
        if completed {
            self.transmit.signal()?;
        }
        Ok(())
    }

    fn start(&mut self, ops: &mut EventOps) -> Result<(), Failure> {
        let receive = Events::with_data(self.receive.notification(), RECEIVE, EventSet::IN);
        let transmit = Events::with_data(self.transmit.notification(), TRANSMIT, EventSet::IN);
        ops.add(receive)?;
        ops.add(transmit)?;
        for watched in [&mut self.input, &mut self.output].into_iter().flatten() {
            watched.forget();
        }
        self.receive(ops)?;
        self.transmit(ops)
    }

    fn handle(&mut self, source: u32, ops: &mut EventOps) -> Result<(), Failure> {
        match source {
            RECEIVE => {
                self.receive.clear_notification();
                self.receive(ops)
            }
            INPUT => self.receive(ops),
            TRANSMIT => {
                self.transmit.clear_notification();
                self.transmit(ops)
            }
            _ => self.transmit(ops),
        }
    }
}

impl MutEventSubscriber for ConsoleHandler {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = self.start(ops) {
            self.health.fail(error);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if let Err(error) = self.handle(events.data(), ops) {
            self.health.fail(error);
        }
    }
}

impl ActiveDevice for ConsoleHandler {
    fn save(&self) -> Result<SavedState, StateError> {
        let state = HandlerState {
            written: u64::try_from(self.written).unwrap_or(u64::MAX),
        };
        SavedState::encode(WHAT, STATE_VERSION, &state)
    }

    fn queues(&self) -> Vec<Option<QueueState>> {
        vec![Some(self.receive.state()), Some(self.transmit.state())]
    }
}
