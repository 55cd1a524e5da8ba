// SPDX-License-Identifier: Apache-2.0
//! The data side: queues and event loop.
//!
//! Queue notifications are watched edge-triggered, which saves reading their eventfds: each notification is a new
//! edge. Everything else is level-triggered.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_memory::Bytes;

use super::host::Host;
use super::mux::Mux;
use super::packet::TxPacket;
use super::persist::ActiveState;
use super::poll::Timeout;
use super::rx::RxRing;
use crate::state::{SavedState, StateError};
use crate::virtio::{
    ActivateError, ActivationContext, ActiveDevice, ActiveQueue, Health, Interrupt, QueueError,
};

/// Packets from the guest per turn on the event loop.
const TX_BUDGET: usize = 128;
/// Bytes from the guest per turn on the event loop.
const TX_BYTES: usize = 1 << 20;

/// Event data on the event loop.
const RX: u32 = 0;
const TX: u32 = 1;
const EVENT: u32 = 2;
const POLL: u32 = 3;

/// `struct virtio_vsock_event` with VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (section 5.10.6.6).
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("queue: {0}")]
    Queue(#[from] QueueError),
    #[error("epoll: {0}")]
    Poll(#[from] io::Error),
}

/// How long the driver may have to wait to hear that tx buffers were used. It only gets their memory back then, so
/// this rides along with the next interrupt for the rx queue if there is one soon, as with a reply to a request.
const TX_SIGNAL_DELAY: Duration = Duration::from_millis(10);

pub(super) struct VsockHandler {
    rx: RxRing,
    tx: ActiveQueue,
    event: ActiveQueue,
    mux: Mux,
    host: Arc<Host>,
    interrupt: Arc<Interrupt>,
    health: Arc<Health>,
    /// The tx queue waits until the guest has taken RSTs.
    tx_waits: bool,
    /// Used tx buffers that the driver wants to hear of.
    tx_owed: u16,
    /// When it hears of them at the latest.
    tx_deadline: Option<Instant>,
    /// The driver is to be interrupted at the end of this turn.
    interrupting: bool,
    reset: Reset,
}

/// How far the driver of a restored guest is with its connections, which are gone.
///
/// It drops all that it has when it takes the event, those that were made since the restore, too, and without a word to
/// the other side. So the host's own connections are held until it has put the event's buffer back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reset {
    /// Nothing to be told, or all done.
    Done,
    /// It has no buffer yet for the event.
    Unsaid,
    /// It has been told; so many buffers for events were left then.
    Said(u16),
}

impl VsockHandler {
    /// Takes the queues. With `restored`, the guest comes out of a snapshot and its connections are gone.
    pub fn new(
        mut context: ActivationContext,
        mut mux: Mux,
        host: Arc<Host>,
        restored: bool,
    ) -> Result<Self, ActivateError> {
        let health = Arc::clone(&context.health);
        if restored {
            // The driver would drop them with those that are gone.
            mux.hold();
        }
        Ok(Self {
            rx: RxRing::new(context.take_queue(0)?, Arc::clone(&health)),
            tx: context.take_queue(1)?,
            event: context.take_queue(2)?,
            mux,
            host,
            interrupt: context.interrupt,
            health,
            tx_waits: false,
            tx_owed: 0,
            tx_deadline: None,
            interrupting: restored,
            reset: if restored { Reset::Unsaid } else { Reset::Done },
        })
    }

    /// Handles what the guest sent, a bounded part of it.
    fn serve_tx(&mut self) -> Result<(), QueueError> {
        let ram = Arc::clone(self.tx.ram());
        let (mut packets, mut bytes) = (TX_BUDGET, TX_BYTES);
        let mut completed = 0u16;
        'looking: loop {
            self.tx.disable_notification()?;
            loop {
                if self.mux.is_clogged() {
                    self.tx_waits = true;
                    break 'looking;
                }
                let Some(chain) = self.tx.pop()? else { break };
                let head = chain.head_index();
                match TxPacket::parse(&chain, &ram) {
                    Ok(packet) => {
                        self.mux.packet(&packet);
                        bytes = bytes.saturating_sub(packet.header.len as usize);
                    }
                    Err(error) => self.mux.malformed(error),
                }
                self.tx.complete(head, 0)?;
                completed += 1;
                packets -= 1;
                if packets == 0 || bytes == 0 {
                    notify_self(&self.tx);
                    break 'looking;
                }
            }
            if !self.tx.enable_notification()? {
                break;
            }
            // A driver that moves the available index to and fro gets no further for it.
            packets -= 1;
            if packets == 0 {
                notify_self(&self.tx);
                break;
            }
        }
        if completed > 0 && (self.tx.wants_signal()? || self.tx_owed > 0) {
            self.tx_owed = self.tx_owed.saturating_add(completed);
        }
        Ok(())
    }

    /// Tells the driver of the transport reset, once it has a buffer for that.
    fn send_event(&mut self) -> Result<(), QueueError> {
        if self.reset != Reset::Unsaid {
            return Ok(());
        }
        for _ in 0..self.event.size() {
            if let Some(mut chain) = self.event.pop()? {
                let head = chain.head_index();
                let buffer = chain.next().filter(|buffer| {
                    buffer.is_write_only() && buffer.len() as usize >= TRANSPORT_RESET.len()
                });
                let written = buffer.is_some_and(|buffer| {
                    self.event
                        .ram()
                        .write_slice(&TRANSPORT_RESET, buffer.addr())
                        .is_ok()
                });
                let length = if written { 4 } else { 0 };
                self.event.complete(head, length)?;
                self.interrupting |= self.event.wants_signal()?;
                if written {
                    self.reset = Reset::Said(self.event.available()?);
                    self.event.await_next()?;
                    return Ok(());
                }
                self.health.complain("event queue: a useless buffer");
            } else if !self.event.enable_notification()? {
                break;
            }
        }
        Ok(())
    }

    /// Sees whether the driver has dropped its connections, and reminds it if it has not for long.
    fn see_reset(&mut self) -> Result<(), QueueError> {
        let reminding = self.mux.take_reminder();
        match self.reset {
            Reset::Done => {}
            Reset::Said(left) if self.event.available()? != left => self.end_reset(),
            Reset::Said(_) if reminding => {
                self.health.complain(
                    "the driver has not taken the event that its connections are gone; interrupted again",
                );
                self.interrupting = true;
            }
            // A driver that takes no events drops nothing, either.
            Reset::Unsaid if reminding => self.end_reset(),
            Reset::Said(_) | Reset::Unsaid => {}
        }
        Ok(())
    }

    fn end_reset(&mut self) {
        self.reset = Reset::Done;
        self.mux.release();
    }

    /// Ends a turn: packets to the guest, interrupt, epoll.
    fn finish(&mut self) -> Result<(), Failure> {
        self.see_reset()?;
        self.mux.pump(&mut self.rx)?;
        if self.tx_waits && self.mux.is_unclogged() {
            self.tx_waits = false;
            notify_self(&self.tx);
        }
        if self.mux.wants_turn() {
            notify_self(&self.rx.queue);
        }
        if self.rx.take_unsignalled() && self.rx.queue.wants_signal()? {
            self.interrupting = true;
        }
        self.interrupt();
        self.mux.settle()?;
        Ok(())
    }

    fn interrupt(&mut self) {
        if self.tx_owed >= self.tx.size() / 4
            || self
                .tx_deadline
                .is_some_and(|deadline| deadline <= Instant::now())
        {
            self.interrupting = true;
        }
        if self.interrupting {
            self.interrupting = false;
            self.tx_owed = 0;
            if let Some(deadline) = self.tx_deadline.take() {
                self.mux.timers().cancel(deadline, Timeout::TxSignal);
            }
            self.host.counters.interrupts.increment();
            self.interrupt.signal_used();
        } else if self.tx_owed > 0 && self.tx_deadline.is_none() {
            let deadline = Instant::now() + TX_SIGNAL_DELAY;
            self.tx_deadline = Some(deadline);
            self.mux.timers().set(deadline, Timeout::TxSignal);
        }
    }

    fn start(&mut self, ops: &mut EventOps) -> Result<(), Failure> {
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        for (fd, data, events) in [
            (self.rx.queue.notification().as_raw_fd(), RX, edge),
            (self.tx.notification().as_raw_fd(), TX, edge),
            (self.event.notification().as_raw_fd(), EVENT, edge),
            (self.mux.poller().as_raw_fd(), POLL, EventSet::IN),
        ] {
            ops.add(Events::with_data_raw(fd, data, events))
                .map_err(|error| io::Error::other(error.to_string()))?;
        }
        self.rx.queue.disable_notification()?;
        self.send_event()?;
        self.mux.start_connects();
        self.serve_tx()?;
        self.finish()
    }

    fn turn(&mut self, source: u32) -> Result<(), Failure> {
        self.host.counters.wakeups.increment();
        match source {
            TX => self.serve_tx()?,
            EVENT => self.send_event()?,
            POLL => self.mux.poll()?,
            // RX: there are buffers again, or it is our turn again.
            _ => {}
        }
        self.finish()
    }
}

/// Makes the event loop come back to this queue after others had their turn.
fn notify_self(queue: &ActiveQueue) {
    // EAGAIN: it comes anyway.
    let _ = queue.notification().write(1);
}

impl MutEventSubscriber for VsockHandler {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = self.start(ops) {
            self.health.fail(error);
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps) {
        if let Err(error) = self.turn(events.data()) {
            self.health.fail(error);
        }
    }
}

impl ActiveDevice for VsockHandler {
    fn save(&self) -> Result<SavedState, StateError> {
        ActiveState {
            next_host_port: self.mux.next_host_port(),
        }
        .save()
    }

    fn queues(&self) -> Vec<Option<virtio_queue::QueueState>> {
        [&self.rx.queue, &self.tx, &self.event]
            .map(|queue| Some(queue.state()))
            .to_vec()
    }
}
