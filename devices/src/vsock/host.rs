// SPDX-License-Identifier: Apache-2.0
//! The host's ways in and out of a guest: what other threads share with the device's data side.
//!
//! [`VsockHandle`] and [`VsockListener`] are for the program that hosts the cell. All that crosses is port numbers and
//! file descriptors. A connection is a pair of unix stream sockets: one end stays with the device, the other is the
//! caller's. A listener is one end of a pair of sequenced-packet sockets, over which the device passes one descriptor
//! per connection; it can be polled like any socket.
//!
//! The handle works at any time: what is asked before the guest's driver is ready waits until it is.

use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::metrics::{Counters, VsockMetrics};

/// Who waits for a connection from the host to be accepted.
pub(super) enum Completion {
    /// A client of the unix socket: gets `OK <port>\n`.
    Uds,
    /// A thread in [`VsockHandle::connect_timeout`]. Dropped without a message: refused.
    Thread(SyncSender<()>),
}

impl Completion {
    pub fn connected(self, stream: Option<&UnixStream>, host_port: u32) {
        match self {
            Self::Uds => {
                if let Some(stream) = stream {
                    // The socket's buffer is empty, so this fits; a client that is gone shows as end of file.
                    let line = format!("OK {host_port}\n");
                    let _ =
                        rustix::net::send(stream, line.as_bytes(), SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
                }
            }
            Self::Thread(sender) => drop(sender.try_send(())),
        }
    }
}

/// A connection that the host wants.
pub(super) struct Connect {
    pub guest_port: u32,
    pub stream: UnixStream,
    pub completion: Option<Completion>,
    pub deadline: Instant,
}

#[derive(Default)]
struct Shared {
    connects: VecDeque<Connect>,
    listeners: HashMap<u32, OwnedFd>,
    closed: bool,
}

/// What the handles and the device share.
pub(super) struct Host {
    shared: Mutex<Shared>,
    /// Tells the data side that `connects` has something.
    pub wake: EventFd,
    pub counters: Counters,
    max_connections: usize,
    connect_timeout: Duration,
}

impl Host {
    pub fn new(max_connections: usize, connect_timeout: Duration) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            shared: Mutex::default(),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            counters: Counters::default(),
            max_connections,
            connect_timeout,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        // Every change under the lock is complete in itself.
        self.shared
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub fn connect_timeout(&self) -> Duration {
        self.connect_timeout
    }

    fn connect(
        &self,
        guest_port: u32,
        timeout: Duration,
        completion: Option<Completion>,
    ) -> io::Result<UnixStream> {
        let mut shared = self.lock();
        if shared.closed {
            return Err(gone());
        }
        if shared.connects.len() >= self.max_connections {
            return Err(io::Error::new(
                io::ErrorKind::WouldBlock,
                "too many connections wait for the guest's vsock driver",
            ));
        }
        let (ours, theirs) = pair()?;
        let now = Instant::now();
        shared.connects.push_back(Connect {
            guest_port,
            stream: ours,
            completion,
            deadline: now.checked_add(timeout).unwrap_or(now),
        });
        drop(shared);
        // EAGAIN: the device has been told already.
        let _ = self.wake.write(1);
        Ok(theirs)
    }

    pub fn next_connect(&self) -> Option<Connect> {
        self.lock().connects.pop_front()
    }

    /// The guest wants to connect to `host_port`: gives the device's end, or why the listener does not take it;
    /// `None` if there is no listener.
    pub fn accept(&self, host_port: u32, guest_port: u32) -> Option<io::Result<UnixStream>> {
        let mut shared = self.lock();
        let listener = shared.listeners.get(&host_port)?;
        let accepted = hand_over(listener, guest_port);
        if accepted
            .as_ref()
            .is_err_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
        {
            // The listener was dropped.
            shared.listeners.remove(&host_port);
            return None;
        }
        Some(accepted)
    }
    /// The device is gone: listeners see end of file, new connections fail.
    pub fn close(&self) {
        let mut shared = self.lock();
        shared.closed = true;
        shared.connects.clear();
        shared.listeners.clear();
    }
}

/// Passes the far end of a new connection to a listener, and gives the near one. Never blocks: a listener that does
/// not accept fast enough refuses.
fn hand_over(listener: &OwnedFd, guest_port: u32) -> io::Result<UnixStream> {
    let (ours, theirs) = pair()?;
    let fds = [theirs.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    rustix::net::sendmsg(
        listener,
        &[IoSlice::new(&guest_port.to_le_bytes())],
        &mut ancillary,
        SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
    )?;
    Ok(ours)
}

fn gone() -> io::Error {
    io::Error::new(
        io::ErrorKind::NotConnected,
        "the cell of this vsock device is gone",
    )
}

/// A connection's two ends: the device's never blocks, the caller's is as std makes them.
fn pair() -> io::Result<(UnixStream, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    Ok((ours, theirs))
}

/// Connects to and listens for the guest. Clones share one device; all methods can be called from any thread.
#[derive(Clone)]
pub struct VsockHandle {
    host: Arc<Host>,
}

impl VsockHandle {
    pub(super) fn new(host: Arc<Host>) -> Self {
        Self { host }
    }

    /// Starts a connection to `port` in the guest and gives the host's end at once. What is written before the guest
    /// accepts is delivered once it does. The stream reads end of file if the guest refuses or does not answer within
    /// the configured time (counted from when its driver is ready).
    ///
    /// # Errors
    /// No file descriptors; the cell is gone (`NotConnected`); `WouldBlock` when as many connections as the device
    /// allows wait for the guest's driver.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        self.host.connect(port, self.host.connect_timeout, None)
    }

    /// Connects to `port` in the guest and waits until it accepts, for at most `timeout`. For threads that may block.
    ///
    /// # Errors
    /// `ConnectionRefused` if the guest refuses, `TimedOut`, and those of [`VsockHandle::connect`].
    pub fn connect_timeout(&self, port: u32, timeout: Duration) -> io::Result<UnixStream> {
        let (sender, receiver) = sync_channel(1);
        let stream = self
            .host
            .connect(port, timeout, Some(Completion::Thread(sender)))?;
        match receiver.recv_timeout(timeout) {
            Ok(()) => Ok(stream),
            Err(RecvTimeoutError::Timeout) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("the guest did not answer a vsock connection to port {port} in {timeout:?}"),
            )),
            Err(RecvTimeoutError::Disconnected) => Err(io::Error::new(
                io::ErrorKind::ConnectionRefused,
                format!("the guest refused a vsock connection to port {port}"),
            )),
        }
    }

    /// Takes the guest's connections to `port` of CID 2. Goes before a unix socket for the same port.
    ///
    /// # Errors
    /// `AddrInUse` if there is a listener for the port; the cell is gone (`NotConnected`); no file descriptors.
    pub fn listen(&self, port: u32) -> io::Result<VsockListener> {
        let mut shared = self.host.lock();
        if shared.closed {
            return Err(gone());
        }
        // The device has no use for what its end receives; that end is readable when the listener was dropped.
        if let Some(listener) = shared.listeners.get(&port)
            && rustix::net::recv(listener, &mut [0; 1], RecvFlags::DONTWAIT) == Err(rustix::io::Errno::AGAIN)
        {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        shared.listeners.insert(port, ours);
        Ok(VsockListener { socket: theirs })
    }

    /// The device's counters.
    pub fn metrics(&self) -> VsockMetrics {
        self.host.counters.snapshot()
    }
}

impl std::fmt::Debug for VsockHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VsockHandle").finish_non_exhaustive()
    }
}

/// The guest's connections to one port. Dropping it refuses further ones.
///
/// The descriptor becomes readable when [`VsockListener::accept`] has something; for use in an async program set it
/// non-blocking and register it.
#[derive(Debug)]
pub struct VsockListener {
    socket: OwnedFd,
}

impl VsockListener {
    /// Waits for the next connection (or gives `WouldBlock` if set non-blocking): the host's end, in blocking mode,
    /// and the guest's port.
    ///
    /// # Errors
    /// `NotConnected` when the cell is gone; no file descriptors.
    pub fn accept(&self) -> io::Result<(UnixStream, u32)> {
        let mut port = [0; 4];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::io::retry_on_intr(|| {
            rustix::net::recvmsg(
                &self.socket,
                &mut [IoSliceMut::new(&mut port)],
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            )
        })?;
        let stream = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        match stream {
            Some(stream) => Ok((UnixStream::from(stream), u32::from_le_bytes(port))),
            // The descriptor could not be installed here: this process has too many.
            None if received.flags.contains(ReturnFlags::CTRUNC) => {
                Err(io::Error::from_raw_os_error(libc::EMFILE))
            }
            None => Err(gone()),
        }
    }

    /// Whether [`VsockListener::accept`] waits or gives `WouldBlock`.
    ///
    /// # Errors
    /// None in practice: fcntl(2) on an open descriptor.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        rustix::io::ioctl_fionbio(&self.socket, nonblocking).map_err(Into::into)
    }
}

impl AsFd for VsockListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl std::os::fd::AsRawFd for VsockListener {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        std::os::fd::AsRawFd::as_raw_fd(&self.socket)
    }
}
