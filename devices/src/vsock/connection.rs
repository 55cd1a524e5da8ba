// SPDX-License-Identifier: Apache-2.0
//! One stream connection between a guest port and a unix socket.
//!
//! ```text
//!  host connects ──▶ Connecting ──RESPONSE──▶ Established ──▶ both directions done ──▶ Closing ──RST──▶ (gone)
//!                        │                       ▲   │                                   │
//!                        └─RST, timeout─▶(gone)  │   └─RST, rule broken──▶ (gone)        └─timeout──▶ (gone)
//!  guest's REQUEST ──────────────────────────────┘
//! ```
//!
//! In Established each direction ends on its own:
//!
//! | what happens | what follows |
//! | --- | --- |
//! | the host's socket says end of file | SHUTDOWN(send) to the guest |
//! | the host's socket refuses data (EPIPE) | SHUTDOWN(receive) to the guest; what it still sends is dropped |
//! | both of these (the host closed) | SHUTDOWN(both), the socket is closed, Closing: wait for the guest's RST |
//! | SHUTDOWN(send) from the guest | once all its data is out: shutdown(2) of the socket's write side |
//! | SHUTDOWN(receive) from the guest | shutdown(2) of the socket's read side |
//! | both of these | once all its data is out: RST to the guest, the socket is closed |
//!
//! # Credit (section 5.10.6.3)
//!
//! From the guest: what it sends beyond the last `fwd_cnt` it was told must stay within `buf_alloc`, so the backlog never
//! exceeds `buf_alloc`. Once it used up half of that (or of its own buffer, if that is smaller) it gets new credit for
//! all that was passed on, but only when the host's program has read most of it (the socket is writable in epoll's
//! sense). With a send buffer of the right size ([`fit_credit`]) everything within the credit then fits into the socket,
//! and the backlog, which costs two more copies, stays empty even if the host is slower than the guest. To the guest: at most `peer_buf_alloc - (tx_cnt -
//! peer_fwd_cnt)` bytes. All counters are modulo 2^32.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{SendFlags, sockopt};

use super::backlog::Backlog;
use super::host::Completion;
use super::packet::{Header, shutdown};
use crate::host_io;
use crate::virtio::Slices;

/// Gives `stream` a send buffer for `credit` bytes; returns the credit that fits.
///
/// Linux reports a unix socket as writable while at most a quarter of its buffer is used. So what is there when new
/// credit is given, and the credit, and the overhead, fit if the credit is up to 5/8 of the buffer.
fn fit_credit(stream: &UnixStream, credit: u32) -> u32 {
    // The kernel doubles the number. More than its usual limit takes CAP_NET_ADMIN.
    let size = credit as usize;
    if sockopt::set_socket_send_buffer_size_force(stream, size).is_err() {
        let _ = sockopt::set_socket_send_buffer_size(stream, size);
    }
    let granted = sockopt::socket_send_buffer_size(stream).unwrap_or(0);
    let fits = u32::try_from(granted / 8 * 5).unwrap_or(u32::MAX);
    credit.min(fits.max(LEAST_CREDIT))
}

/// What a connection can do with even if it has to be buffered.
const LEAST_CREDIT: u32 = 8 << 10;

/// What tells the connections of a cell apart; the CIDs are always the host's and the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub host_port: u32,
    pub guest_port: u32,
}

/// Control packets that wait for a buffer in the rx queue. Each kind waits at most once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pending {
    pub request: bool,
    pub response: bool,
    pub credit_update: bool,
    pub credit_request: bool,
    /// SHUTDOWN flags.
    pub shutdown: u32,
}

impl Pending {
    pub fn any(self) -> bool {
        self != Self::default()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Connecting,
    Established,
    Closing,
}

/// The guest broke the rules of a connection, which ends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Violation {
    #[error("data on a connection that is not established")]
    NotEstablished,
    #[error("data after the guest's own end of stream")]
    AfterShutdown,
    #[error("data beyond the credit it was given")]
    Credit,
}

/// How the host's side of a direction stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flow {
    Going,
    /// The socket cannot take or give more now.
    Blocked,
    /// The socket failed: the connection is to be reset.
    Failed,
}

pub(super) struct Connection {
    pub key: Key,
    pub state: State,
    /// `None` once the host's side is closed.
    stream: Option<UnixStream>,
    pub pending: Pending,
    /// On the list of connections that have something for the rx queue.
    pub queued: bool,
    /// epoll said (or it is likely) that the socket has data; epoll is not asked again until it is drained.
    pub readable: bool,
    /// What epoll watches the socket for; `None` when it is not registered.
    pub watched: Option<Interest>,
    /// When to give up in Connecting and Closing.
    pub deadline: Option<Instant>,
    /// The guest's side is gone; only the backlog still goes to the host.
    pub detached: bool,
    /// Told once how connecting went.
    pub completion: Option<Completion>,
    /// Bytes to ask the socket for at once.
    pub read_size: usize,

    // What cannot happen any more in each direction.
    host_eof: bool,
    host_refuses: bool,
    host_gone: bool,
    guest_shutdown: u32,
    announced_shutdown: u32,

    // Guest to host.
    backlog: Backlog,
    buf_alloc: u32,
    /// Bytes passed on to the host.
    passed: u32,
    /// The part of them that the guest is to know of, and the last it was told.
    fwd_cnt: u32,
    announced_fwd_cnt: u32,
    /// The guest needs credit, but the host has to read first.
    waits_for_reader: bool,

    // Host to guest.
    tx_cnt: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    asked_for_credit: bool,
}

/// What epoll is to watch a socket for. HUP and errors are always included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Interest {
    pub read: bool,
    pub write: bool,
}

impl Connection {
    /// First and smallest read: about one of the buffers that Linux puts into the rx queue.
    pub const MIN_READ: usize = 4 << 10;
    /// Largest read, so that one connection does not keep the others waiting.
    pub const MAX_READ: usize = 64 << 10;

    /// A connection whose guest gets up to `credit` bytes of credit.
    pub fn new(key: Key, stream: UnixStream, state: State, credit: u32) -> Self {
        let buf_alloc = fit_credit(&stream, credit);
        Self {
            key,
            state,
            stream: Some(stream),
            pending: Pending {
                request: state == State::Connecting,
                response: state == State::Established,
                ..Pending::default()
            },
            queued: false,
            readable: false,
            watched: None,
            deadline: None,
            detached: false,
            completion: None,
            read_size: Self::MIN_READ,
            host_eof: false,
            host_refuses: false,
            host_gone: false,
            guest_shutdown: 0,
            announced_shutdown: 0,
            backlog: Backlog::default(),
            buf_alloc,
            passed: 0,
            fwd_cnt: 0,
            announced_fwd_cnt: 0,
            waits_for_reader: false,
            tx_cnt: 0,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            asked_for_credit: false,
        }
    }

    pub fn fd(&self) -> Option<RawFd> {
        self.stream.as_ref().map(AsRawFd::as_raw_fd)
    }

    pub fn buf_alloc(&self) -> u32 {
        self.buf_alloc
    }

    /// A packet's header on this connection. Tells the guest how much credit it has.
    pub fn header(&mut self, op: u16, len: u32, flags: u32) -> Header {
        self.announced_fwd_cnt = self.fwd_cnt;
        self.pending.credit_update = false;
        Header {
            src_port: self.key.host_port,
            dst_port: self.key.guest_port,
            len,
            op,
            flags,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
            ..Header::default()
        }
    }

    // ---- from the guest ----

    /// Takes the credit fields, which every packet carries.
    pub fn update_credit(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = header.fwd_cnt;
        if self.credit() >= Self::MAX_READ.min(self.peer_buf_alloc as usize / 2) {
            self.asked_for_credit = false;
        }
    }

    /// The guest accepted our REQUEST.
    pub fn establish(&mut self) {
        self.state = State::Established;
        self.deadline = None;
        if let Some(completion) = self.completion.take() {
            let stream = self.stream.as_ref();
            completion.connected(stream, self.key.host_port);
        }
    }

    /// Data from the guest: into the socket as far as it takes it, into the backlog beyond.
    pub fn receive(&mut self, payload: &Slices<'_>) -> Result<Flow, Violation> {
        let length = payload.len();
        if self.state == State::Connecting {
            return Err(Violation::NotEstablished);
        }
        if self.guest_shutdown & shutdown::SEND != 0 {
            return Err(Violation::AfterShutdown);
        }
        let unread = self.passed.wrapping_sub(self.announced_fwd_cnt) as usize + self.backlog.len();
        if unread + length > self.buf_alloc as usize {
            return Err(Violation::Credit);
        }
        let Some(stream) = self.stream.as_ref().filter(|_| !self.host_refuses) else {
            // The guest may not have seen our SHUTDOWN yet. Counted as read, since it is gone.
            self.forwarded(length);
            return Ok(Flow::Going);
        };
        let mut sent = 0;
        if self.backlog.is_empty() && length > 0 {
            match host_io::send(stream.as_fd(), payload.parts()) {
                Ok(count) => {
                    sent = count;
                    self.forwarded(count);
                }
                Err(error) => match Self::send_failed(&error) {
                    Flow::Failed => return Ok(self.refuse()),
                    _ => sent = 0,
                },
            }
        }
        if sent < length {
            self.backlog.push(payload, sent);
            return Ok(Flow::Blocked);
        }
        Ok(Flow::Going)
    }

    /// epoll said that the socket has room: moves the backlog on, gives new credit.
    pub fn writable(&mut self) -> Flow {
        let Some(stream) = &self.stream else {
            return Flow::Going;
        };
        if self.backlog.is_empty() {
            if self.waits_for_reader {
                self.give_credit();
            }
            return Flow::Going;
        }
        match rustix::net::send(
            stream,
            self.backlog.front(),
            SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
        ) {
            Ok(count) => {
                self.backlog.consume(count);
                self.forwarded(count);
                if self.backlog.is_empty() {
                    self.finish_guest_sending();
                    Flow::Going
                } else {
                    Flow::Blocked
                }
            }
            Err(error) => match Self::send_failed(&error.into()) {
                Flow::Failed => self.refuse(),
                flow => flow,
            },
        }
    }

    fn send_failed(error: &io::Error) -> Flow {
        match error.kind() {
            io::ErrorKind::WouldBlock => Flow::Blocked,
            // ENOBUFS, ENOMEM: the kernel is short of memory; its socket reports room again later.
            _ if matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::ENOMEM)) => Flow::Blocked,
            _ => Flow::Failed,
        }
    }

    /// The host does not read any more.
    fn refuse(&mut self) -> Flow {
        self.host_refuses = true;
        self.waits_for_reader = false;
        let lost = self.backlog.len();
        self.backlog.consume(lost);
        self.forwarded(lost);
        self.finish_guest_sending();
        self.announce_shutdown();
        Flow::Going
    }

    /// Counts bytes that left for the host; when enough came together the guest gets to know.
    fn forwarded(&mut self, count: usize) {
        // At most `buf_alloc` bytes, which is a u32.
        self.passed = self.passed.wrapping_add(u32::try_from(count).unwrap_or(0));
        let used = self.passed.wrapping_sub(self.announced_fwd_cnt);
        if used < self.window() / 2 || self.guest_shutdown & shutdown::SEND != 0 || self.waits_for_reader {
            return;
        }
        if self.is_writable() {
            self.give_credit();
        } else {
            self.waits_for_reader = true;
        }
    }

    /// How much the guest can have under way: Linux keeps to its own buffer's size where the credit is larger (since
    /// 6.12.x), so an update that waited for half of a larger credit would never be due.
    fn window(&self) -> u32 {
        self.buf_alloc.min(self.peer_buf_alloc)
    }

    fn give_credit(&mut self) {
        self.waits_for_reader = false;
        self.fwd_cnt = self.passed;
        self.pending.credit_update = true;
    }

    /// Whether epoll would report the socket as writable. A closed one is.
    fn is_writable(&self) -> bool {
        let Some(stream) = self.stream.as_ref().filter(|_| !self.host_refuses) else {
            return true;
        };
        let mut fds = [PollFd::new(stream, PollFlags::OUT)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // An error, then, shows when data is sent.
        !matches!(rustix::event::poll(&mut fds, Some(&now)), Ok(0))
    }

    /// The guest asks how much credit it has.
    pub fn credit_requested(&mut self) {
        if self.is_writable() {
            self.give_credit();
        } else {
            self.pending.credit_update = true;
        }
    }

    /// SHUTDOWN from the guest. Flags only ever add up.
    pub fn guest_shut_down(&mut self, flags: u32) {
        self.guest_shutdown |= flags & shutdown::BOTH;
        if self.guest_shutdown & shutdown::SEND != 0 {
            // No more is to come that would need credit.
            self.waits_for_reader = false;
        }
        if self.guest_shutdown & shutdown::RECEIVE != 0 {
            self.readable = false;
            if let Some(stream) = &self.stream {
                // ENOTCONN: the host's side is closed already.
                let _ = stream.shutdown(std::net::Shutdown::Read);
            }
        }
        if self.backlog.is_empty() {
            self.finish_guest_sending();
        }
    }

    fn finish_guest_sending(&mut self) {
        if self.guest_shutdown & shutdown::SEND != 0
            && let Some(stream) = &self.stream
        {
            let _ = stream.shutdown(std::net::Shutdown::Write);
        }
    }

    /// Whether the guest closed and has all its data out: it wants an RST now.
    pub fn guest_is_done(&self) -> bool {
        self.guest_shutdown == shutdown::BOTH && self.backlog.is_empty()
    }

    /// The guest's RST. When its last data is still on its way to the host after an orderly SHUTDOWN, nothing is to
    /// be lost: the connection lingers without the guest, and this gives `true`.
    pub fn detach(&mut self) -> bool {
        if self.guest_shutdown & shutdown::SEND == 0 || self.backlog.is_empty() {
            return false;
        }
        self.guest_shutdown = shutdown::BOTH;
        self.detached = true;
        self.pending = Pending::default();
        self.readable = false;
        true
    }

    // ---- to the guest ----

    /// Bytes the guest has room for.
    pub fn credit(&self) -> usize {
        let in_flight = self.tx_cnt.wrapping_sub(self.peer_fwd_cnt);
        self.peer_buf_alloc.saturating_sub(in_flight) as usize
    }

    /// Whether anything may still go from the host to the guest.
    pub fn can_read(&self) -> bool {
        self.state == State::Established
            && self.stream.is_some()
            && !self.host_eof
            && self.guest_shutdown & shutdown::RECEIVE == 0
    }

    /// Asks the guest for credit, once per time it runs out: most drivers tell by themselves.
    pub fn out_of_credit(&mut self) {
        if !self.asked_for_credit {
            self.asked_for_credit = true;
            self.pending.credit_request = true;
        }
    }

    /// Reads into guest memory. The caller checks [`Connection::credit`] first.
    pub fn read(&mut self, slices: &Slices<'_>) -> Result<usize, Flow> {
        let wanted = slices.len();
        let Some(stream) = &self.stream else {
            return Err(Flow::Blocked);
        };
        match host_io::receive(stream.as_fd(), slices.parts()) {
            Ok(0) => {
                self.readable = false;
                self.host_eof = true;
                self.announce_shutdown();
                Err(Flow::Blocked)
            }
            Ok(count) => {
                // Bounded by `credit`, which is a u32.
                self.tx_cnt = self.tx_cnt.wrapping_add(u32::try_from(count).unwrap_or(0));
                // Less than wanted: drained. Should that be wrong, epoll says so.
                if count < wanted {
                    self.readable = false;
                }
                self.read_size = if count == wanted {
                    (self.read_size * 2).min(Self::MAX_READ)
                } else {
                    count.clamp(Self::MIN_READ, Self::MAX_READ)
                };
                Ok(count)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Err(Flow::Blocked)
            }
            Err(_) => Err(Flow::Failed),
        }
    }

    /// epoll reports that both of the socket's directions are shut.
    pub fn hung_up(&mut self) {
        self.host_gone = true;
        if self.can_read() {
            // What the host wrote before is still to be read; the end of file follows it.
            self.readable = true;
        } else {
            self.announce_shutdown();
        }
    }

    fn announce_shutdown(&mut self) {
        let mut flags = 0;
        if self.host_eof || self.guest_shutdown & shutdown::RECEIVE != 0 && self.host_gone {
            flags |= shutdown::SEND;
        }
        if self.host_refuses || self.host_gone && self.backlog.is_empty() {
            flags |= shutdown::RECEIVE;
        }
        if flags & !self.announced_shutdown != 0 {
            self.announced_shutdown |= flags;
            self.pending.shutdown = self.announced_shutdown;
        }
    }

    /// Goes to Closing: gives up the socket (take it out of epoll first).
    pub fn close_host(&mut self, deadline: Instant) {
        self.state = State::Closing;
        self.stream = None;
        self.readable = false;
        self.deadline = Some(deadline);
    }

    // ---- epoll ----

    /// What epoll should watch the socket for now; `None`: take it out, as HUP would be reported over and over.
    pub fn interest(&self) -> Option<Interest> {
        self.stream.as_ref()?;
        if self.state != State::Established {
            return None;
        }
        let read = self.can_read() && !self.readable;
        let write = !self.backlog.is_empty() || self.waits_for_reader;
        // With nothing to do but to wait for the host to close, HUP is the only news.
        let waits_for_hang_up = !self.can_read() && !self.host_gone;
        (read || write || waits_for_hang_up).then_some(Interest { read, write })
    }
}
