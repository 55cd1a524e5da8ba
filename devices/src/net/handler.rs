// SPDX-License-Identifier: Apache-2.0
//! The data side: frames between queues and tap.
//!
//! ```text
//!  receive:  watching ──frame, no buffers──▶ starved (tap not watched) ──driver notifies──▶ watching
//!  transmit: open ──tap full──▶ held (tap watched for writing) ──writable──▶ open
//! ```

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use serde::{Deserialize, Serialize};
use virtio_queue::QueueState;
use vm_memory::VolatileSlice;

use super::NetMetrics;
use super::control::{self, Command};
use super::device::{STATE_VERSION, WHAT, feature};
use super::filter::{Filter, Mac};
use super::header::{self, ETHERNET_SIZE, HEADER_SIZE, MAX_FRAME, NUM_BUFFERS};
use super::tap;
use crate::GuestRam;
use crate::host_io;
use crate::state::{SavedState, StateError};
use crate::virtio::{ActiveDevice, ActiveQueue, Buffers, Chain, Health, QueueError, Slices};
use crate::watched::Watched;

/// Frames per turn on the event loop, pair and direction.
const BUDGET: usize = 64;
/// Parts of receive buffers taken for a frame, at most; well within what one host call takes.
const MAX_PARTS: usize = 512;

/// Event sources are numbered: four per pair.
const SOURCES: u32 = 4;
const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;
const TAP: u32 = 2;
const CONTROL: u32 = u32::MAX;

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct HandlerState {
    /// Queue pairs that the driver uses.
    pub pairs: u16,
    /// The frames that it wants.
    pub filter: Filter,
}

impl HandlerState {
    /// That of a device of this address which is new to its driver.
    pub(super) fn new(mac: Mac) -> Self {
        // 5.1.5: one, until the driver says otherwise.
        Self {
            pairs: 1,
            filter: Filter::new(mac),
        }
    }
}

/// Why the device stops.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("cannot watch its tap: {0}")]
    Watch(#[from] event_manager::Error),
}

/// A queue pair.
pub(super) struct Pair {
    receive: ActiveQueue,
    transmit: ActiveQueue,
    fd: Arc<OwnedFd>,
    tap: Watched,
    base: u32,
    /// The driver uses it.
    on: bool,
    /// The tap is gone, or the socket's other end, or there never was one.
    pub(super) gone: bool,
    /// No buffers for what arrives.
    starved: bool,
    /// The tap takes no more.
    held: bool,
}

impl Pair {
    pub(super) fn new(index: usize, receive: ActiveQueue, transmit: ActiveQueue, fd: Arc<OwnedFd>) -> Self {
        // A few pairs only.
        let base = u32::try_from(index).unwrap_or(0) * SOURCES;
        Self {
            receive,
            transmit,
            tap: Watched::new(Arc::clone(&fd), base + TAP),
            fd,
            base,
            on: false,
            gone: false,
            starved: false,
            held: false,
        }
    }

    fn watch(&mut self, ops: &mut EventOps) -> Result<(), event_manager::Error> {
        let mut events = EventSet::empty();
        if self.on && !self.gone {
            if !self.starved {
                events |= EventSet::IN;
            }
            if self.held {
                events |= EventSet::OUT;
            }
        }
        self.tap.want(events, ops)
    }
}

/// What all pairs share.
pub(super) struct Common {
    features: u64,
    filter: Filter,
    /// Bytes of buffers that any frame fits into, header included.
    room_needed: usize,
    health: Arc<Health>,
    metrics: Arc<NetMetrics>,
}

pub(super) struct NetHandler {
    pairs: Vec<Pair>,
    control: Option<ActiveQueue>,
    common: Common,
    used_pairs: u16,
    /// Queues of the device, whether the driver set them up or not.
    queue_count: usize,
}

/// What there is to receive into.
enum Filled {
    /// Buffers for a frame.
    Enough,
    /// Not enough, and no more in the queue.
    TooLittle,
    /// The first buffer was useless and went back.
    BadBuffer,
}

/// One that was read.
struct Frame {
    /// Its bytes, header included.
    len: usize,
    /// Whom it is for, as the guest's memory has it: only the guest itself can have changed that.
    to: Mac,
}

/// Takes the buffers that a frame of `len` bytes, header included, fills; their heads and how much is in each.
fn take_used(buffers: &mut VecDeque<(u16, Slices<'_>)>, len: usize) -> Vec<(u16, u32)> {
    let mut used = Vec::new();
    let mut left = len;
    while left > 0
        && let Some((head, slices)) = buffers.pop_front()
    {
        let here = left.min(slices.len());
        left -= here;
        // At most a frame.
        used.push((head, u32::try_from(here).unwrap_or(0)));
    }
    used
}

impl NetHandler {
    /// A handler that has still to be told how many pairs are on.
    pub(super) fn new(
        pairs: Vec<Pair>,
        control: Option<ActiveQueue>,
        queue_count: usize,
        common: Common,
    ) -> Self {
        Self {
            pairs,
            control,
            common,
            used_pairs: 1,
            queue_count,
        }
    }

    /// How many pairs there are.
    pub(super) fn pair_count(&self) -> usize {
        self.pairs.len()
    }

    /// Turns the first `count` pairs on, the others off. The caller watches them, or not, accordingly.
    pub(super) fn set_pairs(&mut self, count: u16) -> io::Result<()> {
        let count = usize::from(count).min(self.pairs.len()).max(1);
        let several = self.pairs.len() > 1;
        for (index, pair) in self.pairs.iter_mut().enumerate() {
            let on = index < count;
            if several && !pair.gone {
                tap::set_attached(pair.fd.as_fd(), on)?;
            }
            pair.on = on;
        }
        self.used_pairs = u16::try_from(count).unwrap_or(1);
        Ok(())
    }

    fn obey(&mut self, command: Command) -> Result<(), String> {
        let needed = match &command {
            Command::Pairs(_) => feature::CTRL_VQ,
            Command::Address(_) => feature::CTRL_MAC_ADDR,
            Command::Promiscuous(_) | Command::AllMulticast(_) | Command::Table(..) => feature::CTRL_RX,
        };
        if self.common.features & needed == 0 {
            return Err("a control command of a feature that was not accepted".to_owned());
        }
        match command {
            Command::Pairs(count) if count == 0 || usize::from(count) > self.pairs.len() => {
                return Err(format!("{count} queue pairs do not exist"));
            }
            Command::Pairs(count) => {
                return self
                    .set_pairs(count)
                    .map_err(|error| format!("the tap does not do {count} queue pairs: {error}"));
            }
            Command::Promiscuous(on) => self.common.filter.set_promiscuous(on),
            Command::AllMulticast(on) => self.common.filter.set_all_multicast(on),
            Command::Table(unicast, multicast) => self.common.filter.set_table(unicast, multicast),
            Command::Address(mac) => self.common.filter.set_mac(mac),
        }
        Ok(())
    }

    fn start(&mut self, ops: &mut EventOps) -> Result<(), Failure> {
        for pair in &mut self.pairs {
            pair.tap.forget();
            for (queue, source) in [(&pair.receive, RECEIVE), (&pair.transmit, TRANSMIT)] {
                let events = Events::with_data(queue.notification(), pair.base + source, EventSet::IN);
                ops.add(events)?;
            }
        }
        if let Some(control) = &self.control {
            ops.add(Events::with_data(control.notification(), CONTROL, EventSet::IN))?;
        }
        self.serve_control()?;
        for pair in &mut self.pairs {
            self.common.receive(pair)?;
            self.common.transmit(pair)?;
            pair.watch(ops)?;
        }
        Ok(())
    }

    fn handle(&mut self, events: Events, ops: &mut EventOps) -> Result<(), Failure> {
        if events.data() == CONTROL {
            if let Some(control) = &self.control {
                control.clear_notification();
            }
            self.serve_control()?;
            for pair in &mut self.pairs {
                pair.watch(ops)?;
            }
            return Ok(());
        }
        let index = usize::try_from(events.data() / SOURCES).unwrap_or(usize::MAX);
        let Some(pair) = self.pairs.get_mut(index) else {
            return Ok(());
        };
        match events.data() % SOURCES {
            RECEIVE => {
                pair.receive.clear_notification();
                self.common.receive(pair)?;
            }
            TRANSMIT => {
                pair.transmit.clear_notification();
                self.common.transmit(pair)?;
            }
            _ => {
                let set = events.event_set();
                if set.intersects(EventSet::IN | EventSet::ERROR | EventSet::HANG_UP) {
                    self.common.receive(pair)?;
                }
                if set.intersects(EventSet::OUT) {
                    self.common.transmit(pair)?;
                }
                // Reported although not asked for, and nothing to be read: it would be so for ever.
                if set.intersects(EventSet::ERROR | EventSet::HANG_UP) && !set.contains(EventSet::IN) {
                    self.common.lose(pair, "it reports an error");
                }
            }
        }
        pair.watch(ops)?;
        Ok(())
    }

    /// Serves the control queue. What pairs are watched for has then to be looked at anew.
    fn serve_control(&mut self) -> Result<(), Failure> {
        let Some(mut queue) = self.control.take() else {
            return Ok(());
        };
        let result = queue.serve(|chain| {
            let served = Buffers::of(chain)
                .map_err(|error| error.to_string())
                .and_then(|buffers| {
                    control::serve(&buffers, |command| self.obey(command))
                        // An answer was written all the same.
                        .or_else(|complaint| {
                            self.common.health.complain(complaint);
                            Ok(u32::from(!buffers.writable.is_empty()))
                        })
                });
            let len = served.unwrap_or_else(|complaint: String| {
                self.common.health.complain(complaint);
                0
            });
            crate::virtio::Outcome::Done { len }
        });
        self.control = Some(queue);
        Ok(result?)
    }
}

impl Common {
    pub(super) fn new(
        features: u64,
        filter: Filter,
        mtu: usize,
        health: Arc<Health>,
        metrics: Arc<NetMetrics>,
    ) -> Self {
        let frame = if features & feature::GUEST_BIG != 0 {
            MAX_FRAME
        } else {
            mtu + ETHERNET_SIZE + 8
        };
        Self {
            features,
            filter,
            room_needed: HEADER_SIZE + frame,
            health,
            metrics,
        }
    }

    /// The tap is gone: nothing is read any more, what the guest sends is dropped.
    fn lose(&self, pair: &mut Pair, why: impl std::fmt::Display) {
        if !pair.gone {
            pair.gone = true;
            self.health.complain(format_args!("its tap is lost: {why}"));
        }
    }

    /// Moves frames to the guest.
    fn receive(&self, pair: &mut Pair) -> Result<(), QueueError> {
        if !pair.on || pair.gone {
            return Ok(());
        }
        let ram = Arc::clone(pair.receive.ram());
        // Popped from the queue, not used yet; what is left at the end goes back.
        let mut buffers = VecDeque::new();
        let mut completed = false;
        pair.starved = false;
        pair.receive.disable_notification()?;
        for _ in 0..BUDGET {
            match self.fill(pair, &ram, &mut buffers)? {
                Filled::Enough => {}
                Filled::BadBuffer => {
                    completed = true;
                    continue;
                }
                Filled::TooLittle => {
                    // Asked while all of them are popped: for a notification of the next one.
                    if pair.receive.enable_notification()? {
                        continue;
                    }
                    pair.starved = true;
                    self.metrics.starved.increment();
                    break;
                }
            }
            let Some(frame) = self.read_frame(pair, &buffers) else {
                break;
            };
            let Frame { len, to } = frame;
            // The next one is read into the same buffers.
            if len < HEADER_SIZE + ETHERNET_SIZE {
                self.metrics.receive_dropped.increment();
                continue;
            }
            if !self.filter.wants(to) {
                self.metrics.receive_unwanted.increment();
                continue;
            }
            let used = take_used(&mut buffers, len);
            pair.receive.complete_all(&used)?;
            completed = true;
            self.metrics.received_frames.increment();
            self.metrics.received_bytes.add(len - HEADER_SIZE);
        }
        for _ in buffers {
            pair.receive.undo_pop();
        }
        if completed {
            pair.receive.signal()?;
        }
        Ok(())
    }

    /// Pops buffers until the next frame fits, whatever its size.
    fn fill<'a>(
        &self,
        pair: &mut Pair,
        ram: &'a GuestRam,
        buffers: &mut VecDeque<(u16, Slices<'a>)>,
    ) -> Result<Filled, QueueError> {
        let mergeable = self.features & feature::MRG_RXBUF != 0;
        let mut room: usize = buffers.iter().map(|(_, slices)| slices.len()).sum();
        let mut parts: usize = buffers.iter().map(|(_, slices)| slices.parts().len()).sum();
        loop {
            // A driver whose whole ring holds less than a frame gets frames cut, rather than none.
            let whole_ring = buffers.len() >= usize::from(pair.receive.size());
            if room >= self.room_needed || parts >= MAX_PARTS || whole_ring || !mergeable && room > 0 {
                return Ok(Filled::Enough);
            }
            let Some(chain) = pair.receive.pop()? else {
                return Ok(Filled::TooLittle);
            };
            let complaint = match Buffers::in_ram(ram, &chain) {
                Ok(Buffers { writable, .. }) if writable.len() > HEADER_SIZE + ETHERNET_SIZE => {
                    room += writable.len();
                    parts += writable.parts().len();
                    buffers.push_back((chain.head_index(), writable));
                    continue;
                }
                Ok(_) => "a receive buffer without room for a frame".to_owned(),
                Err(error) => error.to_string(),
            };
            if !buffers.is_empty() {
                // Its turn comes when it is the first.
                pair.receive.undo_pop();
                return Ok(Filled::Enough);
            }
            self.health.complain(complaint);
            pair.receive.complete(chain.head_index(), 0)?;
            return Ok(Filled::BadBuffer);
        }
    }

    /// Reads a frame into the first of `buffers`; `None` if there is none.
    fn read_frame(&self, pair: &mut Pair, buffers: &VecDeque<(u16, Slices<'_>)>) -> Option<Frame> {
        let mut room = Slices::default();
        for (_, slices) in buffers {
            room.append(slices.clone());
        }
        match host_io::readv(pair.tap.fd(), room.parts()) {
            Ok(0) => self.lose(pair, "the other end is closed"),
            Ok(len) => {
                let mut left = len;
                let mut count: u16 = 0;
                for (_, slices) in buffers {
                    if left == 0 {
                        break;
                    }
                    left = left.saturating_sub(slices.len());
                    count = count.saturating_add(1);
                }
                // Taps leave this field alone.
                room.write(NUM_BUFFERS, &count.to_le_bytes());
                let mut to = Mac::default();
                room.read(HEADER_SIZE, &mut to);
                return Some(Frame { len, to });
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => self.lose(pair, error),
        }
        None
    }

    /// Moves frames to the tap.
    fn transmit(&self, pair: &mut Pair) -> Result<(), QueueError> {
        let mut completed = false;
        let mut again = true;
        pair.held = false;
        pair.transmit.disable_notification()?;
        for _ in 0..BUDGET {
            let Some(chain) = pair.transmit.pop()? else {
                again = pair.transmit.enable_notification()?;
                if again {
                    continue;
                }
                break;
            };
            match self.send(pair, &chain) {
                Ok(len) => {
                    self.metrics.transmitted_frames.increment();
                    self.metrics.transmitted_bytes.add(len);
                }
                Err(Unsent::Full) => {
                    pair.transmit.undo_pop();
                    pair.held = true;
                    again = false;
                    self.metrics.tap_full.increment();
                    break;
                }
                Err(Unsent::Gone) => self.metrics.transmit_dropped.increment(),
                Err(Unsent::Bad(complaint)) => {
                    self.metrics.transmit_dropped.increment();
                    self.health.complain(complaint);
                }
            }
            pair.transmit.complete(chain.head_index(), 0)?;
            completed = true;
        }
        if again {
            // The budget is spent. EAGAIN: a notification is pending already.
            let _ = pair.transmit.notification().write(1);
        }
        if completed {
            pair.transmit.signal()?;
        }
        Ok(())
    }

    /// Sends the frame in `chain`; returns its length.
    fn send(&self, pair: &Pair, chain: &Chain) -> Result<usize, Unsent> {
        let bad = |error: &dyn std::fmt::Display| Unsent::Bad(error.to_string());
        let buffers = Buffers::of(chain).map_err(|error| bad(&error))?;
        let mut head = [0; HEADER_SIZE];
        if buffers.readable.read(0, &mut head) < HEADER_SIZE {
            return Err(Unsent::Bad("a frame without a header".to_owned()));
        }
        let frame = buffers.readable.range(HEADER_SIZE, buffers.readable.len());
        let len = frame.len();
        header::check(&mut head, len, self.features).map_err(|error| bad(&error))?;
        if pair.gone || !pair.on {
            return Err(Unsent::Gone);
        }
        let mut parts = Slices::default();
        parts.push(VolatileSlice::from(&mut head[..]));
        parts.append(frame);
        match host_io::writev(pair.tap.fd(), parts.parts()) {
            Ok(_) => Ok(len),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Err(Unsent::Full),
            Err(error) => Err(Unsent::Bad(format!("the host does not take a frame: {error}"))),
        }
    }
}

/// Why a frame was not sent.
enum Unsent {
    /// Later.
    Full,
    /// There is no tap any more.
    Gone,
    /// It is dropped, with a complaint.
    Bad(String),
}

impl MutEventSubscriber for NetHandler {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = self.start(ops) {
            self.common.health.fail(error);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if let Err(error) = self.handle(events, ops) {
            self.common.health.fail(error);
        }
    }
}

impl ActiveDevice for NetHandler {
    /// Linux spins until a command is answered, and gives several when it starts the interface.
    fn serve_at_once(&mut self) {
        let pairs = self.used_pairs;
        if let Err(error) = self.serve_control() {
            self.common.health.fail(error);
        } else if pairs != self.used_pairs
            && let Some(control) = &self.control
        {
            // Which are watched is the event loop's to change.
            let _ = control.notification().write(1);
        }
    }

    fn save(&self) -> Result<SavedState, StateError> {
        let state = HandlerState {
            pairs: self.used_pairs,
            filter: self.common.filter.clone(),
        };
        SavedState::encode(WHAT, STATE_VERSION, &state)
    }

    fn queues(&self) -> Vec<Option<QueueState>> {
        let mut queues: Vec<_> = self
            .pairs
            .iter()
            .flat_map(|pair| [Some(pair.receive.state()), Some(pair.transmit.state())])
            .collect();
        // The control queue is behind the pairs that there could be: one without MQ.
        if let Some(control) = &self.control {
            let multi_queue = self.common.features & feature::MQ != 0;
            queues.resize(if multi_queue { self.queue_count - 1 } else { 2 }, None);
            queues.push(Some(control.state()));
        }
        queues.resize(self.queue_count, None);
        queues
    }
}
