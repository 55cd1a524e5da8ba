// SPDX-License-Identifier: Apache-2.0
//! Single frames, sent and received at either end.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// For experiments (IEEE 802).
const PROTOCOL: u16 = 0x88b5;
/// A virtio-net header before anything was negotiated.
const TAP_HEADER: usize = 10;

/// A broadcast of so many bytes after the Ethernet header.
pub fn frame(bytes: usize) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 1]);
    frame.extend(PROTOCOL.to_be_bytes());
    frame.extend((0..bytes).map(|at| u8::try_from(at % 251).unwrap()));
    frame
}

/// A socket of type AF_PACKET on an interface of this thread's namespace: one for all protocols, for others do not see what
/// goes on to a bridge.
pub fn packet_socket(index: u32) -> OwnedFd {
    let protocol = u16::try_from(libc::ETH_P_ALL).unwrap().to_be();
    // SAFETY: takes no pointers; the descriptor is new.
    let socket = unsafe {
        let fd = libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            protocol.into(),
        );
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    };
    // SAFETY: all zeroes is a value of it.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
    address.sll_protocol = protocol;
    address.sll_ifindex = index.cast_signed();
    let length = u32::try_from(size_of::<libc::sockaddr_ll>()).unwrap();
    // SAFETY: the address is of the length given.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    assert_eq!(bound, 0, "{}", std::io::Error::last_os_error());
    socket
}

pub fn send(socket: &impl AsFd, frame: &[u8]) {
    assert_eq!(rustix::io::write(socket, frame).unwrap(), frame.len());
}

pub fn send_to_tap(tap: &impl AsFd, frame: &[u8]) {
    send(tap, &[&[0; TAP_HEADER], frame].concat());
}

/// Whether this frame comes in a while; the bridge floods others.
fn receive_after(from: &impl AsFd, header: usize, expected: &[u8]) -> bool {
    let mut buffer = vec![0; 1 << 16];
    loop {
        let mut fds = [PollFd::new(from, PollFlags::IN)];
        let patience = Timespec {
            tv_sec: 20,
            tv_nsec: 0,
        };
        if poll(&mut fds, Some(&patience)).unwrap() == 0 {
            return false;
        }
        let length = rustix::io::read(from, &mut buffer).unwrap();
        if &buffer[header..length] == expected {
            return true;
        }
    }
}

pub fn receive(socket: &impl AsFd, expected: &[u8]) -> bool {
    receive_after(socket, 0, expected)
}

pub fn receive_from_tap(tap: &impl AsFd, expected: &[u8]) -> bool {
    receive_after(tap, TAP_HEADER, expected)
}
