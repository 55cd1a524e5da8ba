// SPDX-License-Identifier: Apache-2.0
//! Tap devices (Documentation/networking/tuntap.rst).

use super::Error;
use rustix::fs::{CWD, Mode, OFlags};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// Longest name of a network device.
pub const MAX_NAME: usize = libc::IFNAMSIZ - 1;

/// Opens a queue of a tap that is there already.
///
/// # Errors
/// There is no such device; and those of [`open`].
pub fn open_existing(name: &str) -> Result<OwnedFd, Error> {
    // TUNSETIFF would make it. A race with its removal ends in a device that goes with the pod.
    if !name.contains('/') && std::path::Path::new("/sys/class/net").join(name).exists() {
        return open(name);
    }
    let missing = io::Error::new(
        io::ErrorKind::NotFound,
        "no such device; make it with ip tuntap add mode tap",
    );
    Err(Error::Io(format!("use the tap {name}"), missing))
}

/// Opens a queue of the tap `name`, which is made unless it exists. The device goes with its last queue unless somebody
/// made it persistent. Frames carry a virtio-net header, as the device model wants them.
///
/// # Errors
/// No /dev/net/tun, no rights, the name in use by something else or by another queue.
pub fn open(name: &str) -> Result<OwnedFd, Error> {
    open_queue(name, 0)
}

/// Opens so many queues, at least one, of the tap `name`, as [`open`] does; several make it a multi-queue one.
///
/// # Errors
/// Those of [`open`].
pub fn open_queues(name: &str, count: usize) -> Result<Vec<OwnedFd>, Error> {
    let more = if count > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    (0..count.max(1)).map(|_| open_queue(name, more)).collect()
}

fn open_queue(name: &str, more: libc::c_int) -> Result<OwnedFd, Error> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let tun = rustix::fs::openat(CWD, "/dev/net/tun", flags, Mode::empty())
        .map_err(|e| Error::Io("open /dev/net/tun (modprobe tun)".into(), e.into()))?;
    if name.is_empty() || name.len() > MAX_NAME || name.contains(['/', '\0']) {
        return Err(Error::Io(
            format!("use {name:?} as a device name"),
            io::ErrorKind::InvalidInput.into(),
        ));
    }
    // SAFETY: ifreq is plain integers and a union of such; all zeroes is a value of it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let bits = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | more;
    request.ifr_ifru.ifru_flags = i16::try_from(bits).unwrap_or(0);
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives through the call; the descriptor is open.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 {
        return Err(Error::Io(
            format!("use the tap {name}"),
            io::Error::last_os_error(),
        ));
    }
    Ok(tun)
}
