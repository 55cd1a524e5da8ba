// SPDX-License-Identifier: Apache-2.0
//! Round trips and throughput over AF_VSOCK, with the host (CID 2) as server.
//!
//! Port 5001 echoes; port 5002 reads to the end, then answers one byte.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};

use crate::{report, timed};

const ECHO_PORT: u32 = 5001;
const SINK_PORT: u32 = 5002;
const ROUND_TRIPS: u32 = 2_000;
const BYTES: usize = 64 << 20;
const CHUNK: usize = 64 << 10;

fn connect(port: u32) -> io::Result<File> {
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
    address.svm_cid = libc::VMADDR_CID_HOST;
    address.svm_port = port;
    let length = libc::socklen_t::try_from(size_of_val(&address)).unwrap_or_default();
    // SAFETY: the address is a sockaddr_vm of that length, and outlives the call.
    if unsafe { libc::connect(raw, (&raw const address).cast(), length) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(File::from(socket))
}

/// Runs both measurements.
pub fn run() -> io::Result<()> {
    for _ in 0..3 {
        round_trips()?;
        throughput()?;
    }
    Ok(())
}

fn round_trips() -> io::Result<()> {
    let mut socket = connect(ECHO_PORT)?;
    let mut byte = [42];
    socket.write_all(&byte)?;
    socket.read_exact(&mut byte)?;
    let (seconds, ()) = timed(|| {
        for _ in 0..ROUND_TRIPS {
            socket.write_all(&byte)?;
            socket.read_exact(&mut byte)?;
        }
        Ok(())
    })?;
    report("vsock.rtt", seconds * 1e6 / f64::from(ROUND_TRIPS), "us");
    Ok(())
}

fn throughput() -> io::Result<()> {
    let mut socket = connect(SINK_PORT)?;
    let chunk = vec![7; CHUNK];
    let (seconds, ()) = timed(|| {
        for _ in 0..BYTES / CHUNK {
            socket.write_all(&chunk)?;
        }
        // Half-close, then wait for the host to say that it has it all.
        rustix::net::shutdown(&socket, rustix::net::Shutdown::Write)?;
        socket.read_exact(&mut [0])
    })?;
    let bytes = f64::from(u32::try_from(BYTES).unwrap_or(u32::MAX));
    report("vsock.throughput", bytes / 1_048_576.0 / seconds, "MiB/s");
    Ok(())
}
