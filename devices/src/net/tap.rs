// SPDX-License-Identifier: Apache-2.0
//! What a tap is asked for and told (linux/if_tun.h).
//!
//! The caller opens the tap, in whatever network namespace it belongs to, and hands in the descriptors; from then on
//! the device depends on no name.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::header::HEADER_SIZE;

/// TUNSETOFFLOAD: what the other side takes.
pub(super) mod offload {
    pub const CSUM: u32 = 0x01;
    pub const TSO4: u32 = 0x02;
    pub const TSO6: u32 = 0x04;
    pub const TSO_ECN: u32 = 0x08;
    pub const UFO: u32 = 0x10;
    pub const USO4: u32 = 0x20;
    pub const USO6: u32 = 0x40;
}

const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;

const IFF_TAP: u16 = 0x0002;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_ATTACH_QUEUE: u16 = 0x0200;
const IFF_DETACH_QUEUE: u16 = 0x0400;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

/// `struct ifreq` with its flags.
#[repr(C)]
#[derive(Default)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// Why a descriptor cannot be used as a tap.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// A system call failed.
    #[error("cannot {what} of the tap")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// It was opened in another way than needed.
    #[error("the tap was opened without {missing} (flags {flags:#x}): set it with TUNSETIFF")]
    Flags {
        /// The flag that is missing.
        missing: &'static str,
        /// The flags it has.
        flags: u16,
    },
    /// Fewer than one or more than 8 queues.
    #[error("{0} queue pairs asked for, 1 to 8 are possible")]
    Pairs(usize),
}

fn host(what: &'static str) -> impl Fn(io::Error) -> TapError {
    move |source| TapError::Host { what, source }
}

/// An ioctl whose argument is a pointer to `T`, read and written.
fn ioctl_struct<T>(fd: BorrowedFd<'_>, request: libc::c_ulong, argument: &mut T) -> io::Result<()> {
    // SAFETY: callers pair each request with the type that the kernel takes for it; the pointer is good for the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, std::ptr::from_mut(argument)) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Checks that `fd` is a tap as a device needs it, and sets the header's size.
pub(super) fn prepare(fd: BorrowedFd<'_>, multi_queue: bool) -> Result<(), TapError> {
    let mut request = InterfaceRequest::default();
    ioctl_struct(fd, TUNGETIFF, &mut request).map_err(host("read the flags"))?;
    let flags = request.flags;
    let mut needed = vec![
        (IFF_TAP, "IFF_TAP"),
        (IFF_NO_PI, "IFF_NO_PI"),
        (IFF_VNET_HDR, "IFF_VNET_HDR"),
    ];
    if multi_queue {
        needed.push((IFF_MULTI_QUEUE, "IFF_MULTI_QUEUE"));
    }
    for (flag, missing) in needed {
        if flags & flag == 0 {
            return Err(TapError::Flags { missing, flags });
        }
    }
    let mut size = libc::c_int::try_from(HEADER_SIZE).unwrap_or(0);
    ioctl_struct(fd, TUNSETVNETHDRSZ, &mut size).map_err(host("set the header size"))
}

/// Tells the tap which offloads the guest takes.
pub(super) fn set_offload(fd: BorrowedFd<'_>, offloads: u32) -> io::Result<()> {
    // SAFETY: the argument of this request is a plain number.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETOFFLOAD as _, libc::c_ulong::from(offloads)) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Attaches or detaches a queue of a multi-queue tap: the kernel sends flows to attached ones only.
pub(super) fn set_attached(fd: BorrowedFd<'_>, attached: bool) -> io::Result<()> {
    let mut request = InterfaceRequest {
        flags: if attached {
            IFF_ATTACH_QUEUE
        } else {
            IFF_DETACH_QUEUE
        },
        ..InterfaceRequest::default()
    };
    match ioctl_struct(fd, TUNSETQUEUE, &mut request) {
        // It is so already.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        result => result,
    }
}
