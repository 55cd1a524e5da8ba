// SPDX-License-Identifier: Apache-2.0
//! The host's end of the vsock benchmark: the same two services for a peer's guest (AF_VSOCK, served by vhost-vsock)
//! and for ours (unix sockets, served in-process).

use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread;

/// Echoes what it reads.
pub const ECHO_PORT: u32 = 5001;
/// Reads to the end, then answers one byte.
pub const SINK_PORT: u32 = 5002;

/// A listening AF_VSOCK socket on any CID.
pub fn listen(port: u32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers; the result is checked.
    let raw = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    let socket = unsafe { OwnedFd::from_raw_fd(raw) };
    // SAFETY: sockaddr_vm is plain data for which zero is valid.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).unwrap_or_default();
    address.svm_cid = libc::VMADDR_CID_ANY;
    address.svm_port = port;
    let length = libc::socklen_t::try_from(size_of_val(&address)).unwrap_or_default();
    // SAFETY: the address is a sockaddr_vm of that length, and outlives the call.
    if unsafe { libc::bind(raw, (&raw const address).cast(), length) } != 0 {
        return Err(io::Error::last_os_error());
    }
    rustix::net::listen(&socket, 64)?;
    Ok(socket)
}

/// Takes one connection. The stream's type is only for reading and writing: its address is not a unix one.
pub fn accept(listener: &OwnedFd) -> io::Result<UnixStream> {
    let socket = rustix::io::retry_on_intr(|| rustix::net::accept(listener))?;
    Ok(UnixStream::from(socket))
}

/// Serves one connection of the echo service.
pub fn echo(mut stream: UnixStream) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            n => stream.write_all(&buffer[..n])?,
        }
    }
}

/// Serves one connection of the sink.
pub fn sink(mut stream: UnixStream) -> io::Result<()> {
    let mut buffer = vec![0; 256 << 10];
    while stream.read(&mut buffer)? > 0 {}
    stream.write_all(&[1])
}

/// Serves both ports on a thread each, until `accept` fails.
pub fn serve<A>(accept: impl Fn(u32) -> io::Result<A>)
where
    A: FnMut() -> io::Result<UnixStream> + Send + 'static,
{
    for (port, service) in [
        (ECHO_PORT, echo as fn(UnixStream) -> io::Result<()>),
        (SINK_PORT, sink),
    ] {
        match accept(port) {
            Ok(mut next) => {
                thread::spawn(move || {
                    while let Ok(stream) = next() {
                        // A guest that went away in the middle shows in its own figures.
                        let _ = service(stream);
                    }
                });
            }
            Err(error) => eprintln!("cannot listen on vsock port {port}: {error}"),
        }
    }
}
