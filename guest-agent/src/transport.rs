// SPDX-License-Identifier: Apache-2.0
//! The ways to and from the host: vsock in a VM, unix sockets in tests.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::pin::Pin;

use crate::fd::register;
use cloister_protocol::HOST_CID;
use tokio::io::{AsyncRead, AsyncWrite, Interest};
use tokio::net::UnixStream;
use tokio_vsock::{VsockAddr, VsockListener, VsockStream};

/// A connected byte stream.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Sync {}
impl<T: AsyncRead + AsyncWrite + Send + Sync> Duplex for T {}

/// A connection to the host.
pub type Conn = Pin<Box<dyn Duplex>>;

/// Where the host is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Host {
    /// vsock, context id 2.
    Vsock,
    /// `DIR/<port>.sock`
    Unix(PathBuf),
}

impl Host {
    /// Connects to a port of the host.
    ///
    /// # Errors
    /// As of connect(2): above all ECONNRESET or ECONNREFUSED when nobody listens there.
    pub async fn connect(&self, port: u32) -> io::Result<Conn> {
        Ok(match self {
            Self::Vsock => Box::pin(VsockStream::connect(VsockAddr::new(HOST_CID, port)).await?),
            Self::Unix(dir) => Box::pin(UnixStream::connect(dir.join(format!("{port}.sock"))).await?),
        })
    }
}

fn vsock_socket() -> io::Result<OwnedFd> {
    // SAFETY: takes no pointers.
    let fd = unsafe {
        libc::socket(
            libc::AF_VSOCK,
            libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
            0,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A vsock listener of the agent's, made before there is a runtime: from here on the kernel queues connections.
///
/// # Errors
/// EAFNOSUPPORT without vsock in the kernel, ENODEV and EADDRNOTAVAIL without a vsock device.
pub fn listen_vsock(port: u32) -> io::Result<OwnedFd> {
    vsock::VsockListener::bind(&VsockAddr::new(libc::VMADDR_CID_ANY, port)).map(OwnedFd::from)
}

/// A vsock connection that is being made.
pub struct Dial {
    socket: OwnedFd,
    /// Something has been said on it already.
    said: bool,
}

/// How long [`Dial::say`] waits for the host, which takes well under a millisecond if it listens.
const SAY_TIMEOUT: rustix::event::Timespec = rustix::event::Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// Starts a connection to a port of the host and does not wait for it, so that there is time to do other things.
///
/// # Errors
/// As of connect(2).
pub fn dial_vsock(port: u32) -> io::Result<Dial> {
    let socket = vsock_socket()?;
    let address = VsockAddr::new(HOST_CID, port);
    let length = libc::socklen_t::try_from(size_of::<VsockAddr>()).map_err(io::Error::other)?;
    // SAFETY: VsockAddr is a sockaddr_vm, valid for the length given.
    let result = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) };
    if result < 0 {
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EINPROGRESS) {
            return Err(error);
        }
    }
    Ok(Dial { socket, said: false })
}

impl Dial {
    /// Writes `words`, all or nothing, without a runtime. If the host is not there yet nothing is written.
    ///
    /// # Errors
    /// As of connect(2) and write(2).
    pub fn say(&mut self, words: &[u8]) -> io::Result<()> {
        use rustix::event::{PollFd, PollFlags, poll};
        let mut fds = [PollFd::new(&self.socket, PollFlags::OUT)];
        if poll(&mut fds, Some(&SAY_TIMEOUT))? == 0 {
            return Ok(());
        }
        rustix::net::sockopt::socket_error(&self.socket)??;
        // A new connection has room for far more.
        if rustix::io::write(&self.socket, words)? != words.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.said = true;
        Ok(())
    }

    /// Whether [`Dial::say`] has said its words.
    pub fn said(&self) -> bool {
        self.said
    }

    /// Waits until the connection stands.
    ///
    /// # Errors
    /// As of connect(2).
    pub async fn finish(self) -> io::Result<Conn> {
        let poll = register(self.socket, Interest::WRITABLE)?;
        poll.writable().await?.retain_ready();
        let socket = poll.into_inner();
        rustix::net::sockopt::socket_error(&socket)??;
        Ok(Box::pin(VsockStream::new(vsock::VsockStream::from(socket))?))
    }
}

/// Hands a listener made by [`listen_vsock`] to ttrpc.
pub fn vsock_server(listener: OwnedFd) -> cloister_protocol::ttrpc::asynchronous::transport::Listener {
    VsockListener::from(listener).into()
}
