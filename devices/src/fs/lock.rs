// SPDX-License-Identifier: Apache-2.0
//! Record locks and flocks that reach the host.
//!
//! Locks among processes of one guest need no help from here; they reach the host only if the device is configured
//! so (`FsConfig::remote_locks`), for volumes that several guests share. A record lock belongs to a *lock owner*
//! (a process of the guest), so each owner of a node gets an open file description of its own on the host, and its
//! locks are open-file-description locks on that. They go when the owner closes the file (FLUSH) or the node goes. A
//! flock belongs to an open file: it is taken on the handle's descriptor.
//!
//! A lock that must be waited for never holds a thread: the request is parked (see `device.rs`), and tried again.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::abi::FileLock;
use super::host;

type Owners = HashMap<u64, Arc<OwnedFd>>;

/// Lock owners of one node. Most nodes have none.
#[derive(Debug, Default)]
pub struct OwnerLocks {
    owners: Mutex<Option<Box<Owners>>>,
}

/// Owners per node. Each costs a host descriptor.
const MAX_OWNERS: usize = 256;

impl OwnerLocks {
    fn owners(&self) -> MutexGuard<'_, Option<Box<Owners>>> {
        self.owners
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The description that `owner` locks with, opened by `open` if it is new.
    pub fn of(
        &self,
        owner: u64,
        open: impl FnOnce() -> Result<OwnedFd, Errno>,
    ) -> Result<Arc<OwnedFd>, Errno> {
        let mut owners = self.owners();
        let owners = owners.get_or_insert_default();
        if let Some(fd) = owners.get(&owner) {
            return Ok(Arc::clone(fd));
        }
        if owners.len() >= MAX_OWNERS {
            return Err(Errno::NOLCK);
        }
        let fd = Arc::new(open()?);
        owners.insert(owner, Arc::clone(&fd));
        Ok(fd)
    }

    /// Releases everything that `owner` holds; whether it held anything.
    pub fn release(&self, owner: u64) -> bool {
        let mut slot = self.owners();
        let Some(owners) = slot.as_mut() else {
            return false;
        };
        let held = owners.remove(&owner).is_some();
        if owners.is_empty() {
            *slot = None;
        }
        held
    }
}

fn to_host(lock: &FileLock) -> Result<libc::flock, Errno> {
    let kind = match i32::try_from(lock.r#type) {
        Ok(kind @ (libc::F_RDLCK | libc::F_WRLCK | libc::F_UNLCK)) => kind,
        _ => return Err(Errno::INVAL),
    };
    let start = i64::try_from(lock.start).map_err(|_| Errno::INVAL)?;
    // The protocol has the last byte, the host the length; OFFSET_MAX is "to the end", which the host writes as 0.
    let len = match i64::try_from(lock.end) {
        Err(_) | Ok(i64::MAX) => 0,
        Ok(end) if end < start => return Err(Errno::INVAL),
        Ok(end) => (end - start).checked_add(1).ok_or(Errno::OVERFLOW)?,
    };
    Ok(libc::flock {
        l_type: i16::try_from(kind).map_err(|_| Errno::INVAL)?,
        l_whence: 0,
        l_start: start,
        l_len: len,
        l_pid: 0,
    })
}

fn call(fd: BorrowedFd<'_>, command: libc::c_int, lock: &mut libc::flock) -> Result<(), Errno> {
    // SAFETY: the commands given here take a pointer to one `struct flock`.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), command, std::ptr::from_mut(lock)) };
    if result == 0 {
        Ok(())
    } else {
        Err(host::last_errno())
    }
}

/// Takes or gives back a record lock without waiting; EAGAIN if another holds it.
pub fn set(fd: BorrowedFd<'_>, lock: &FileLock) -> Result<(), Errno> {
    let mut lock = to_host(lock)?;
    call(fd, libc::F_OFD_SETLK, &mut lock).map_err(|errno| match errno {
        Errno::ACCESS => Errno::AGAIN,
        errno => errno,
    })
}

/// The lock that stands in the way of `lock`, or an unlocked one.
pub fn get(fd: BorrowedFd<'_>, lock: &FileLock) -> Result<FileLock, Errno> {
    let mut host = to_host(lock)?;
    call(fd, libc::F_OFD_GETLK, &mut host)?;
    let start = u64::try_from(host.l_start).map_err(|_| Errno::IO)?;
    let end = match u64::try_from(host.l_len).map_err(|_| Errno::IO)? {
        0 => i64::MAX.cast_unsigned(),
        len => start.saturating_add(len - 1),
    };
    Ok(FileLock {
        start,
        end,
        r#type: u32::try_from(i32::from(host.l_type)).unwrap_or(0),
        // An open-file-description lock has no process (-1); nor has the guest any use for a host's.
        pid: 0,
    })
}

/// Takes or gives back a flock without waiting; EAGAIN if another holds it.
pub fn flock(fd: BorrowedFd<'_>, kind: u32) -> Result<(), Errno> {
    let operation = match i32::try_from(kind) {
        Ok(libc::F_RDLCK) => FlockOperation::NonBlockingLockShared,
        Ok(libc::F_WRLCK) => FlockOperation::NonBlockingLockExclusive,
        Ok(libc::F_UNLCK) => FlockOperation::NonBlockingUnlock,
        _ => return Err(Errno::INVAL),
    };
    rustix::fs::flock(fd.as_fd(), operation)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_convert_and_nonsense_is_refused() {
        let lock = |start, end, kind: i32| FileLock {
            start,
            end,
            r#type: kind.cast_unsigned(),
            pid: 1,
        };
        let host = to_host(&lock(3, 3, libc::F_WRLCK)).unwrap();
        assert_eq!((host.l_start, host.l_len), (3, 1));
        let host = to_host(&lock(0, i64::MAX.cast_unsigned(), libc::F_RDLCK)).unwrap();
        assert_eq!((host.l_start, host.l_len), (0, 0));
        assert_eq!(to_host(&lock(5, 3, libc::F_RDLCK)).unwrap_err(), Errno::INVAL);
        assert_eq!(
            to_host(&lock(u64::MAX, u64::MAX, libc::F_RDLCK)).unwrap_err(),
            Errno::INVAL
        );
        assert_eq!(to_host(&lock(0, 1, 77)).unwrap_err(), Errno::INVAL);
        assert_eq!(to_host(&lock(0, 1, -1)).unwrap_err(), Errno::INVAL);
    }
}
