// SPDX-License-Identifier: Apache-2.0
//! Connections between the queues and the host's sockets.
//!
//! Three things make work: a packet from the guest ([`Mux::packet`]), an event of the host's sockets ([`Mux::poll`]),
//! and buffers in the rx queue. The first two note on a connection what has to go to the guest and put it on the
//! `ready` list; [`Mux::pump`] then serves that list, each connection for at most one read, in turns, as long as there
//! are buffers and budget. [`Mux::settle`] ends each turn on the event loop: it tells epoll what to watch for every
//! connection that was touched.
//!
//! What the guest can make wait here is bounded: the backlogs by the credit given out ([`CREDIT_BUDGET`]), the resets
//! by [`MAX_RESETS`] (then the tx queue waits, as section 5.10.6.1 wants it), everything else by the number of
//! connections.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::connection::{Connection, Flow, Interest, Key, State};
use super::host::{Completion, Connect, Host};
use super::packet::{Header, RxBuffer, TYPE_STREAM, TxPacket, op, shutdown};
use super::poll::{Event, Poller, Source, Timeout, Timers};
use super::rx::RxRing;
use super::table::{Table, Token};
use super::uds::{Handshake, Line, UdsPath};
use super::{FIRST_HOST_PORT, HOST_CID};
use crate::GuestRam;
use crate::virtio::{Health, QueueError, Slices};

/// Credit for a connection while there are few: the buffer that Linux has by default, beyond which it does not send.
const MAX_CREDIT: u32 = 256 << 10;
/// Least credit for a connection.
const MIN_CREDIT: u32 = 8 << 10;
/// Credit for all connections together as long as each has the least: what a hostile guest can make the host buffer,
/// next to [`MIN_CREDIT`] per connection.
const CREDIT_BUDGET: u64 = 32 << 20;
/// RSTs without a connection that may wait for rx buffers before the tx queue has to.
const MAX_RESETS: usize = 256;
/// Unix socket clients that may be in the middle of their first line.
const MAX_HANDSHAKES: usize = 64;
/// How long a client may take for its first line.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the guest may take for the RST that ends a connection in good order.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long accepting rests when the process is out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// How often a restored guest's driver is reminded to drop its connections while new ones wait for that.
const REMINDER: Duration = Duration::from_secs(1);
/// Packets to the guest per turn on the event loop.
const PUMP_BUDGET: usize = 256;
/// Rx buffers gathered for one read.
const MAX_GATHER: usize = 32;

/// Who gets an RST that no connection sends.
struct Reset {
    key: Key,
    socket_type: u16,
}

/// How serving a connection went.
enum Served {
    /// Nothing left for now.
    Done,
    /// More to do; others first.
    More,
    /// The rx queue is empty.
    Starved,
    /// The connection is to be taken out; `true`: with an RST.
    Remove(bool),
}

pub(super) struct Mux {
    guest_cid: u64,
    max_connections: usize,
    host: Arc<Host>,
    uds: Option<Arc<UdsPath>>,
    health: Arc<Health>,
    poller: Poller,
    timers: Timers,
    table: Table,
    next_host_port: u32,
    /// Connections with something for the rx queue, each at most once (`Connection::queued`).
    ready: VecDeque<Token>,
    resets: VecDeque<Reset>,
    /// Connections whose interest in epoll may have changed in this turn.
    touched: Vec<Token>,
    events: Vec<Event>,
    handshakes: HashMap<u32, (Handshake, Instant)>,
    next_handshake: u32,
    accepting: bool,
    credit_given: u64,
    starved: bool,
    /// The host's own connections, as long as they would be dropped with the old ones by a restored guest's driver.
    held: Option<VecDeque<Connect>>,
    /// The driver is to be reminded.
    reminding: bool,
}

impl Mux {
    pub fn new(
        guest_cid: u64,
        max_connections: usize,
        next_host_port: u32,
        host: Arc<Host>,
        uds: Option<Arc<UdsPath>>,
        health: Arc<Health>,
    ) -> io::Result<Self> {
        let poller = Poller::new()?;
        let read = Interest {
            read: true,
            write: false,
        };
        poller.watch(host.wake.as_raw_fd(), Source::Wake, read)?;
        let mut mux = Self {
            guest_cid,
            max_connections,
            host,
            uds,
            health,
            poller,
            timers: Timers::default(),
            table: Table::default(),
            next_host_port: next_host_port.max(FIRST_HOST_PORT),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            touched: Vec::new(),
            events: Vec::new(),
            handshakes: HashMap::new(),
            next_handshake: 0,
            accepting: false,
            credit_given: 0,
            starved: false,
            held: None,
            reminding: false,
        };
        mux.accept_again()?;
        Ok(mux)
    }

    /// The descriptor that is readable when [`Mux::poll`] has something to do.
    pub fn poller(&self) -> &Poller {
        &self.poller
    }

    pub fn next_host_port(&self) -> u32 {
        self.next_host_port
    }

    pub fn timers(&mut self) -> &mut Timers {
        &mut self.timers
    }

    // ---- from the guest ----

    /// Whether the tx queue has to wait until the guest has taken RSTs.
    pub fn is_clogged(&self) -> bool {
        self.resets.len() >= MAX_RESETS
    }

    /// Whether so few RSTs wait that a tx queue that waited can go on.
    pub fn is_unclogged(&self) -> bool {
        self.resets.len() <= MAX_RESETS / 2
    }

    fn complain(&self, what: impl std::fmt::Display) {
        self.host.counters.malformed.increment();
        self.health.complain(what);
    }

    /// Counts and reports a chain that holds no packet.
    pub fn malformed(&self, what: impl std::fmt::Display) {
        self.complain(format_args!("tx queue: {what}"));
    }

    /// Handles a packet from the guest. Its memory is not used after this returns.
    pub fn packet(&mut self, packet: &TxPacket<'_>) {
        let header = &packet.header;
        self.host.counters.tx_packets.increment();
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            // Section 5.10.6: not from who it says it is, or for nobody here. No reply: it would go astray.
            self.complain(format_args!(
                "packet from CID {} to CID {}",
                header.src_cid, header.dst_cid
            ));
            return;
        }
        let key = Key {
            host_port: header.dst_port,
            guest_port: header.src_port,
        };
        if header.socket_type != TYPE_STREAM {
            self.complain(format_args!("socket type {}", header.socket_type));
            self.reset_unknown(key, header);
            return;
        }
        let Some(token) = self.table.find(key) else {
            match header.op {
                op::REQUEST => self.requested(key, header),
                _ => self.reset_unknown(key, header),
            }
            return;
        };
        let Some(connection) = self.table.get_mut(token) else {
            return;
        };
        connection.update_credit(header);
        let mut reset = None;
        match header.op {
            op::RW => {
                self.host.counters.tx_bytes.add(packet.payload.len());
                match connection.receive(&packet.payload) {
                    Ok(Flow::Blocked) => self.host.counters.host_stalls.increment(),
                    Ok(_) => {}
                    Err(violation) => reset = Some(violation.to_string()),
                }
            }
            // Its fields have been taken already.
            op::CREDIT_UPDATE => {}
            op::CREDIT_REQUEST => connection.credit_requested(),
            op::SHUTDOWN => connection.guest_shut_down(header.flags),
            op::RESPONSE if connection.state == State::Connecting => {
                self.host.counters.established.increment();
                if let Some(deadline) = connection.deadline {
                    self.timers.cancel(deadline, Timeout::Connection(token));
                }
                connection.establish();
            }
            op::RST => {
                if connection.state == State::Connecting {
                    self.host.counters.refused.increment();
                } else if connection.state == State::Established {
                    self.host.counters.resets.increment();
                }
                if connection.detach() {
                    self.table.release_key(token);
                } else {
                    self.remove(token, false);
                }
                return;
            }
            op::REQUEST => reset = Some("a second request for a connection".to_owned()),
            op::RESPONSE => reset = Some("a response to nothing".to_owned()),
            unknown => reset = Some(format!("unknown operation {unknown}")),
        }
        if let Some(why) = reset {
            self.complain(why);
            self.host.counters.resets.increment();
            self.remove(token, true);
            return;
        }
        self.after(token);
    }

    /// After something happened to a connection: ends it, or puts it where it belongs.
    fn after(&mut self, token: Token) {
        let Some(connection) = self.table.get_mut(token) else {
            return;
        };
        if connection.guest_is_done() {
            let detached = connection.detached;
            self.remove(token, !detached);
            return;
        }
        if connection.readable && connection.can_read() && connection.credit() == 0 {
            connection.out_of_credit();
        }
        if !connection.queued
            && (connection.pending.any()
                || connection.readable && connection.can_read() && connection.credit() > 0)
        {
            connection.queued = true;
            self.ready.push_back(token);
        }
        self.touched.push(token);
    }

    fn requested(&mut self, key: Key, header: &Header) {
        let accepted = if self.table.len() >= self.max_connections {
            self.health.complain(format_args!(
                "more than {} connections: refused",
                self.max_connections
            ));
            None
        } else {
            let listener = self.host.accept(key.host_port, key.guest_port);
            match listener.unwrap_or_else(|| self.connect_uds(key.host_port)) {
                Ok(stream) => Some(stream),
                Err(error) => {
                    log::debug!(
                        "{}: nobody takes the connection to port {}: {error}",
                        self.health.name(),
                        key.host_port
                    );
                    None
                }
            }
        };
        let Some(stream) = accepted else {
            self.host.counters.refused.increment();
            self.reset_unknown(key, header);
            return;
        };
        let mut connection = Connection::new(key, stream, State::Established, self.next_credit());
        connection.update_credit(header);
        if let Some(token) = self.insert(connection) {
            self.host.counters.established.increment();
            self.after(token);
        }
    }

    fn connect_uds(&self, host_port: u32) -> io::Result<UnixStream> {
        match &self.uds {
            Some(uds) => uds.connect(host_port),
            None => Err(io::ErrorKind::ConnectionRefused.into()),
        }
    }

    fn insert(&mut self, connection: Connection) -> Option<Token> {
        let credit = connection.buf_alloc();
        let token = self.table.insert(connection)?;
        self.credit_given += u64::from(credit);
        Some(token)
    }

    /// Credit for a new connection: plenty while there are few, less and less as the budget is used up.
    fn next_credit(&self) -> u32 {
        let left = CREDIT_BUDGET.saturating_sub(self.credit_given);
        u32::try_from(left / 16)
            .unwrap_or(MAX_CREDIT)
            .clamp(MIN_CREDIT, MAX_CREDIT)
    }

    /// Takes a connection out, with an RST to the guest if `reset`.
    fn remove(&mut self, token: Token, reset: bool) {
        let Some(connection) = self.table.remove(token) else {
            return;
        };
        if connection.watched.is_some()
            && let Some(fd) = connection.fd()
        {
            self.poller.forget(fd);
        }
        if let Some(deadline) = connection.deadline {
            self.timers.cancel(deadline, Timeout::Connection(token));
        }
        self.credit_given -= u64::from(connection.buf_alloc());
        if reset {
            self.resets.push_back(Reset {
                key: connection.key,
                socket_type: TYPE_STREAM,
            });
        }
    }

    /// RST for a packet of no connection, unless it is one itself.
    fn reset_unknown(&mut self, key: Key, header: &Header) {
        if header.op != op::RST {
            self.resets.push_back(Reset {
                key,
                socket_type: header.socket_type,
            });
        }
    }

    // ---- from the host ----

    /// Handles what the host's sockets, handles and timers have to say, a bounded number of events.
    pub fn poll(&mut self) -> io::Result<()> {
        let mut events = std::mem::take(&mut self.events);
        let polled = self.poller.poll(&mut events);
        for event in &events {
            match event.source {
                Source::Connection(token) => self.socket_event(token, event),
                Source::Handshake(id) => self.handshake(id),
                Source::UdsListener => self.accept_clients()?,
                Source::Wake => self.woken(),
                Source::Timer => self.timed_out()?,
            }
        }
        self.events = events;
        polled
    }

    fn socket_event(&mut self, token: Token, event: &Event) {
        // Older than its connection's end: none.
        let Some(connection) = self.table.get_mut(token) else {
            return;
        };
        if event.readable && connection.can_read() {
            connection.readable = true;
        }
        if (event.writable || event.hung_up) && connection.writable() == Flow::Failed {
            self.host.counters.resets.increment();
            let detached = connection.detached;
            self.remove(token, !detached);
            return;
        }
        if event.hung_up {
            connection.hung_up();
        }
        self.after(token);
    }

    fn woken(&mut self) {
        let _ = self.host.wake.read();
        self.start_connects();
    }

    /// Takes up what the handles asked for, some of it if there is much.
    pub fn start_connects(&mut self) {
        for _ in 0..Poller::BATCH {
            match self.host.next_connect() {
                Some(connect) => self.start_connect(connect),
                None => return,
            }
        }
        let _ = self.host.wake.write(1);
    }

    /// From now on the host's own connections wait.
    pub fn hold(&mut self) {
        self.held.get_or_insert_default();
    }

    /// Those that waited go ahead.
    pub fn release(&mut self) {
        for connect in self.held.take().into_iter().flatten() {
            self.start_connect(connect);
        }
    }

    /// Whether the driver is to be reminded, once.
    pub fn take_reminder(&mut self) -> bool {
        std::mem::take(&mut self.reminding)
    }

    /// Ends those held connections that have waited for too long. As long as there are others the driver is reminded.
    fn review_held(&mut self, now: Instant) {
        let Some(held) = &mut self.held else { return };
        let before = held.len();
        held.retain(|connect| connect.deadline > now);
        self.host.counters.refused.add(before - held.len());
        if !held.is_empty() {
            self.timers.set(now + REMINDER, Timeout::Held);
        }
        self.reminding = true;
    }

    fn start_connect(&mut self, connect: Connect) {
        if let Some(held) = &mut self.held
            && held.len() < self.max_connections
        {
            if held.is_empty() {
                self.timers.set(Instant::now() + REMINDER, Timeout::Held);
            }
            held.push_back(connect);
            return;
        }
        if self.held.is_some() || self.table.len() >= self.max_connections {
            self.host.counters.refused.increment();
            self.health.complain(format_args!(
                "more than {} connections: the host's own is refused",
                self.max_connections
            ));
            return;
        }
        let mut key = Key {
            host_port: self.next_host_port,
            guest_port: connect.guest_port,
        };
        // The table is far smaller than the range of ports: this ends.
        while self.table.find(key).is_some() {
            key.host_port = next_port(key.host_port);
        }
        self.next_host_port = next_port(key.host_port);
        let mut connection = Connection::new(key, connect.stream, State::Connecting, self.next_credit());
        connection.completion = connect.completion;
        // What waited for the driver waits for the guest's answer from now on.
        let deadline = connect.deadline.max(Instant::now() + Duration::from_secs(1));
        connection.deadline = Some(deadline);
        if let Some(token) = self.insert(connection) {
            self.timers.set(deadline, Timeout::Connection(token));
            self.after(token);
        }
    }

    fn accept_again(&mut self) -> io::Result<()> {
        if let Some(uds) = &self.uds
            && !self.accepting
        {
            let read = Interest {
                read: true,
                write: false,
            };
            self.poller
                .watch(uds.listener.as_raw_fd(), Source::UdsListener, read)?;
            self.accepting = true;
        }
        Ok(())
    }

    fn pause_accepting(&mut self) {
        if let Some(uds) = &self.uds {
            self.poller.forget(uds.listener.as_raw_fd());
            self.accepting = false;
        }
    }

    fn accept_clients(&mut self) -> io::Result<()> {
        let Some(uds) = self.uds.clone() else {
            return Ok(());
        };
        for _ in 0..8 {
            if self.handshakes.len() >= MAX_HANDSHAKES {
                self.pause_accepting();
                break;
            }
            match uds.listener.accept() {
                Ok((stream, _)) => self.new_client(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    // Out of descriptors or memory: the listener stays readable, so it must not be watched.
                    self.health
                        .complain(format_args!("cannot accept a vsock client: {error}"));
                    self.pause_accepting();
                    self.timers.set(Instant::now() + ACCEPT_PAUSE, Timeout::Accept);
                    break;
                }
            }
        }
        Ok(())
    }

    fn new_client(&mut self, stream: UnixStream) {
        if stream.set_nonblocking(true).is_err() {
            return;
        }
        let id = self.next_handshake;
        self.next_handshake = self.next_handshake.wrapping_add(1);
        let read = Interest {
            read: true,
            write: false,
        };
        let source = Source::Handshake(id);
        if self.poller.watch(stream.as_raw_fd(), source, read).is_err() {
            return;
        }
        let deadline = Instant::now() + HANDSHAKE_TIMEOUT;
        self.handshakes.insert(id, (Handshake::new(stream), deadline));
        self.timers.set(deadline, Timeout::Handshake(id));
    }

    fn handshake(&mut self, id: u32) {
        let Some((handshake, _)) = self.handshakes.get_mut(&id) else {
            return;
        };
        match handshake.advance() {
            Line::Incomplete => {}
            Line::Invalid => drop(self.end_handshake(id)),
            Line::Connect(guest_port) => {
                if let Some(stream) = self.end_handshake(id) {
                    self.start_connect(Connect {
                        guest_port,
                        stream,
                        completion: Some(Completion::Uds),
                        deadline: Instant::now() + self.host.connect_timeout(),
                    });
                }
            }
        }
    }

    fn end_handshake(&mut self, id: u32) -> Option<UnixStream> {
        let (handshake, deadline) = self.handshakes.remove(&id)?;
        self.poller.forget(handshake.stream.as_raw_fd());
        self.timers.cancel(deadline, Timeout::Handshake(id));
        if !self.accepting {
            self.timers.set(Instant::now(), Timeout::Accept);
        }
        Some(handshake.stream)
    }

    fn timed_out(&mut self) -> io::Result<()> {
        self.timers.fired()?;
        let now = Instant::now();
        while let Some(timeout) = self.timers.due(now) {
            match timeout {
                // The handler looks at that after each turn.
                Timeout::TxSignal => {}
                Timeout::Held => self.review_held(now),
                Timeout::Accept => self.accept_again()?,
                Timeout::Handshake(id) => drop(self.end_handshake(id)),
                Timeout::Connection(token) => {
                    if let Some(connection) = self.table.get_mut(token) {
                        connection.deadline = None;
                        self.remove(token, true);
                    }
                }
            }
        }
        Ok(())
    }

    // ---- to the guest ----

    /// Whether there is something for the guest that only needs another turn.
    pub fn wants_turn(&self) -> bool {
        !self.starved && (!self.ready.is_empty() || !self.resets.is_empty())
    }

    /// Sends to the guest what there is, as far as the rx queue's buffers and the budget go.
    pub fn pump(&mut self, rx: &mut RxRing) -> Result<(), QueueError> {
        if self.resets.is_empty() && self.ready.is_empty() {
            return Ok(());
        }
        let ram = rx.ram();
        let mut budget = PUMP_BUDGET;
        self.starved = false;
        while budget > 0 {
            let Some(reset) = self.resets.front() else { break };
            let header = Header {
                src_port: reset.key.host_port,
                dst_port: reset.key.guest_port,
                socket_type: reset.socket_type,
                op: op::RST,
                ..Header::default()
            };
            if !self.send(rx, &ram, header)? {
                return Ok(());
            }
            self.resets.pop_front();
            budget -= 1;
        }
        while budget > 0 {
            let Some(token) = self.ready.pop_front() else {
                break;
            };
            let (served, packets) = self.serve(token, rx, &ram)?;
            budget = budget.saturating_sub(packets.max(1));
            self.touched.push(token);
            match served {
                Served::Remove(reset) => self.remove(token, reset),
                Served::Starved => {
                    self.host.counters.rx_stalls.increment();
                    self.ready.push_front(token);
                    break;
                }
                Served::More => self.ready.push_back(token),
                Served::Done => {
                    if let Some(connection) = self.table.get_mut(token) {
                        connection.queued = false;
                    }
                }
            }
        }
        Ok(())
    }

    /// Sends a packet without payload; `false` if there is no buffer.
    fn send(&mut self, rx: &mut RxRing, ram: &GuestRam, header: Header) -> Result<bool, QueueError> {
        let Some(buffer) = rx.take(ram, true)? else {
            self.starved = true;
            return Ok(false);
        };
        self.give(rx, &buffer, header)?;
        Ok(true)
    }

    fn give(&self, rx: &mut RxRing, buffer: &RxBuffer<'_>, header: Header) -> Result<(), QueueError> {
        self.host.counters.rx_packets.increment();
        let socket_type = if header.socket_type == 0 && header.op != op::RST {
            TYPE_STREAM
        } else {
            header.socket_type
        };
        rx.give(
            buffer,
            Header {
                src_cid: HOST_CID,
                dst_cid: self.guest_cid,
                socket_type,
                ..header
            },
        )
    }

    /// One connection's turn; gives the number of packets as well.
    fn serve(
        &mut self,
        token: Token,
        rx: &mut RxRing,
        ram: &GuestRam,
    ) -> Result<(Served, usize), QueueError> {
        let mut packets = 0;
        // Control packets that go before data, data, control packets that go after it.
        loop {
            let Some(connection) = self.table.get_mut(token) else {
                return Ok((Served::Done, packets));
            };
            let opening = if connection.pending.request {
                op::REQUEST
            } else if connection.pending.response {
                op::RESPONSE
            } else {
                break;
            };
            let header = connection.header(opening, 0, 0);
            if !self.send(rx, ram, header)? {
                return Ok((Served::Starved, packets));
            }
            packets += 1;
            if let Some(connection) = self.table.get_mut(token) {
                connection.pending.request = false;
                connection.pending.response = false;
            }
        }
        let mut more = false;
        if let Some(connection) = self.table.get_mut(token)
            && connection.readable
            && connection.can_read()
        {
            if connection.credit() == 0 {
                connection.out_of_credit();
                self.host.counters.credit_stalls.increment();
            } else {
                match self.read(token, rx, ram)? {
                    Read::Sent(count) => packets += count,
                    Read::Nothing => {}
                    Read::Starved => return Ok((Served::Starved, packets)),
                    Read::Failed => {
                        self.host.counters.resets.increment();
                        return Ok((Served::Remove(true), packets));
                    }
                }
                if let Some(connection) = self.table.get_mut(token) {
                    more = connection.readable && connection.can_read();
                }
            }
        }
        loop {
            let Some(connection) = self.table.get_mut(token) else {
                return Ok((Served::Done, packets));
            };
            let pending = connection.pending;
            let (operation, flags) = if pending.credit_request {
                (op::CREDIT_REQUEST, 0)
            } else if pending.credit_update {
                (op::CREDIT_UPDATE, 0)
            } else if pending.shutdown != 0 {
                (op::SHUTDOWN, pending.shutdown)
            } else {
                break;
            };
            let header = connection.header(operation, 0, flags);
            if !self.send(rx, ram, header)? {
                // `header` counted on being sent.
                if let Some(connection) = self.table.get_mut(token) {
                    connection.pending = pending;
                }
                return Ok((Served::Starved, packets));
            }
            packets += 1;
            let Some(connection) = self.table.get_mut(token) else {
                return Ok((Served::Done, packets));
            };
            match operation {
                op::CREDIT_REQUEST => connection.pending.credit_request = false,
                op::SHUTDOWN => {
                    connection.pending.shutdown = 0;
                    if flags == shutdown::BOTH {
                        self.close_host(token);
                    }
                }
                // `header` cleared it.
                _ => {}
            }
        }
        Ok((if more { Served::More } else { Served::Done }, packets))
    }

    /// The guest has been told that the host closed: nothing but its RST is to come.
    fn close_host(&mut self, token: Token) {
        let Some(connection) = self.table.get_mut(token) else {
            return;
        };
        if connection.watched.take().is_some()
            && let Some(fd) = connection.fd()
        {
            self.poller.forget(fd);
        }
        let deadline = Instant::now() + CLOSE_TIMEOUT;
        connection.close_host(deadline);
        self.timers.set(deadline, Timeout::Connection(token));
    }

    /// Reads from a connection's socket into as many rx buffers as that fills, with one system call.
    fn read(&mut self, token: Token, rx: &mut RxRing, ram: &GuestRam) -> Result<Read, QueueError> {
        let Some(connection) = self.table.get_mut(token) else {
            return Ok(Read::Nothing);
        };
        let wanted = connection.credit().min(connection.read_size);
        let mut buffers: Vec<RxBuffer<'_>> = Vec::with_capacity(1);
        let mut slices = Slices::default();
        for _ in 0..MAX_GATHER {
            if slices.len() >= wanted {
                break;
            }
            let Some(buffer) = rx.take(ram, buffers.is_empty())? else {
                break;
            };
            if buffer.capacity() == 0 {
                // Room for a header only. When others go before it, it has its turn later.
                if !buffers.is_empty() {
                    rx.put_back(1);
                    break;
                }
                self.health.complain("rx queue: a buffer without room for data");
                rx.give_unused(&buffer)?;
                continue;
            }
            slices.append(buffer.payload(wanted - slices.len()));
            buffers.push(buffer);
        }
        if buffers.is_empty() {
            self.starved = true;
            return Ok(Read::Starved);
        }
        let mut left = match connection.read(&slices) {
            Ok(count) => count,
            Err(flow) => {
                rx.put_back(buffers.len());
                return Ok(match flow {
                    Flow::Failed => Read::Failed,
                    Flow::Going | Flow::Blocked => Read::Nothing,
                });
            }
        };
        self.host.counters.rx_bytes.add(left);
        let mut packets = 0;
        for buffer in &buffers {
            if left == 0 {
                break;
            }
            let length = left.min(buffer.capacity());
            left -= length;
            let Some(connection) = self.table.get_mut(token) else {
                break;
            };
            // At most what was wanted, which is far below 4 GiB.
            let header = connection.header(op::RW, u32::try_from(length).unwrap_or(0), 0);
            self.give(rx, buffer, header)?;
            packets += 1;
        }
        rx.put_back(buffers.len() - packets);
        Ok(Read::Sent(packets))
    }

    /// Ends a turn on the event loop: epoll watches what can be handled, and nothing else.
    pub fn settle(&mut self) -> io::Result<()> {
        while let Some(token) = self.touched.pop() {
            let Some(connection) = self.table.get_mut(token) else {
                continue;
            };
            let wanted = connection.interest();
            let (Some(fd), true) = (connection.fd(), wanted != connection.watched) else {
                continue;
            };
            let source = Source::Connection(token);
            let result = match (wanted, connection.watched) {
                (Some(interest), None) => self.poller.watch(fd, source, interest),
                (Some(interest), Some(_)) => self.poller.change(fd, source, interest),
                (None, _) => {
                    self.poller.forget(fd);
                    Ok(())
                }
            };
            connection.watched = wanted;
            if let Err(error) = result {
                // ENOMEM, or the system's limit of watches.
                self.health
                    .complain(format_args!("cannot watch a vsock connection: {error}"));
                connection.watched = None;
                self.remove(token, true);
            }
        }
        self.timers.arm(&self.poller)
    }
}

/// How reading from a socket for the guest went.
enum Read {
    Sent(usize),
    Nothing,
    Starved,
    Failed,
}

fn next_port(port: u32) -> u32 {
    // u32::MAX is VMADDR_PORT_ANY.
    if port >= u32::MAX - 1 {
        FIRST_HOST_PORT
    } else {
        port + 1
    }
}
