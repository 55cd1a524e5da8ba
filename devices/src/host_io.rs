// SPDX-License-Identifier: Apache-2.0
//! Host system calls that move bytes straight into and out of guest memory.
//!
//! The standard library's and rustix's vectored calls take `&mut [u8]`, and a reference to memory that the guest
//! changes at will would be undefined behaviour. The calls here take [`VolatileSlice`]s and hand their addresses to
//! the kernel, which copies. They are the only users of those addresses in this crate.
//!
//! All of them are retried on EINTR, and may move fewer bytes than asked.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;

/// Most slices per call (IOV_MAX of Linux).
pub const MAX_SLICES: usize = 1024;

/// The slices as the kernel wants them; what exceeds [`MAX_SLICES`] is left for another call.
fn iovecs(slices: &[VolatileSlice<'_>]) -> Vec<libc::iovec> {
    slices
        .iter()
        .take(MAX_SLICES)
        .map(|slice| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        })
        .collect()
}

fn retry(mut call: impl FnMut() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        // A negative result is the only one that does not fit.
        match usize::try_from(call()) {
            Ok(n) => return Ok(n),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

fn count(iovecs: &[libc::iovec]) -> libc::c_int {
    // At most MAX_SLICES.
    libc::c_int::try_from(iovecs.len()).unwrap_or(libc::c_int::MAX)
}

/// readv(2): fills `slices` from `fd`.
pub fn readv(fd: BorrowedFd<'_>, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let iovecs = iovecs(slices);
    // SAFETY: each iovec is a VolatileSlice's range, which stays mapped while `slices` is borrowed; the kernel
    // tolerates concurrent access to it.
    retry(|| unsafe { libc::readv(fd.as_raw_fd(), iovecs.as_ptr(), count(&iovecs)) })
}

/// writev(2): writes `slices` to `fd`.
pub fn writev(fd: BorrowedFd<'_>, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let iovecs = iovecs(slices);
    // SAFETY: as in `readv`.
    retry(|| unsafe { libc::writev(fd.as_raw_fd(), iovecs.as_ptr(), count(&iovecs)) })
}

/// preadv(2): fills `slices` from `offset` of `fd`.
pub fn preadv(fd: BorrowedFd<'_>, slices: &[VolatileSlice<'_>], offset: libc::off64_t) -> io::Result<usize> {
    let iovecs = iovecs(slices);
    // SAFETY: as in `readv`.
    retry(|| unsafe { libc::preadv64(fd.as_raw_fd(), iovecs.as_ptr(), count(&iovecs), offset) })
}

/// pwritev(2): writes `slices` at `offset` of `fd`.
pub fn pwritev(fd: BorrowedFd<'_>, slices: &[VolatileSlice<'_>], offset: libc::off64_t) -> io::Result<usize> {
    let iovecs = iovecs(slices);
    // SAFETY: as in `readv`.
    retry(|| unsafe { libc::pwritev64(fd.as_raw_fd(), iovecs.as_ptr(), count(&iovecs), offset) })
}

/// getrandom(2): fills `slice` from the host's random number generator.
pub fn getrandom(slice: &VolatileSlice<'_>) -> io::Result<usize> {
    let guard = slice.ptr_guard_mut();
    // SAFETY: the range is the VolatileSlice's, as in `readv`.
    retry(|| unsafe { libc::getrandom(guard.as_ptr().cast(), slice.len(), 0) })
}

fn message(iovecs: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: msghdr is plain data, for which all zeroes (null pointers, zero lengths) is a valid value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = iovecs.as_mut_ptr();
    message.msg_iovlen = iovecs.len();
    message
}

/// sendmsg(2): sends `slices` on a socket, as much as it takes without waiting. EPIPE comes as an error only, never as
/// a signal.
pub fn send(socket: BorrowedFd<'_>, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let mut iovecs = iovecs(slices);
    let message = message(&mut iovecs);
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: as for writev; `message` refers to `iovecs`, and both outlive the call.
    retry(|| unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) })
}

/// recvmsg(2): fills `slices` from a socket without waiting; 0 is the end of the stream.
pub fn receive(socket: BorrowedFd<'_>, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let mut iovecs = iovecs(slices);
    let mut message = message(&mut iovecs);
    // SAFETY: as for readv; `message` refers to `iovecs`, and both outlive the call.
    retry(|| unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, Write};
    use std::os::fd::AsFd;

    #[test]
    fn bytes_go_straight_through() {
        let mut memory = [0u8; 16];
        let slice = VolatileSlice::from(&mut memory[..]);
        let parts = [slice.subslice(0, 4).unwrap(), slice.subslice(8, 4).unwrap()];
        let mut file = std::fs::File::from(
            rustix::fs::memfd_create("host-io-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap(),
        );
        file.write_all(b"abcdefgh").unwrap();
        assert_eq!(preadv(file.as_fd(), &parts, 1).unwrap(), 7);
        assert_eq!(pwritev(file.as_fd(), &parts, 8).unwrap(), 8);
        file.seek(std::io::SeekFrom::Start(0)).unwrap();
        assert_eq!(readv(file.as_fd(), &[slice]).unwrap(), 16);
        assert_eq!(&memory, b"abcdefghbcdefgh\0");
    }

    #[test]
    fn errors_are_the_kernels() {
        let mut memory = [0u8; 4];
        let slice = VolatileSlice::from(&mut memory[..]);
        let (reader, _writer) = std::io::pipe().unwrap();
        assert_eq!(
            writev(reader.as_fd(), &[slice]).unwrap_err().raw_os_error(),
            Some(libc::EBADF)
        );
    }
}
