// SPDX-License-Identifier: Apache-2.0
//! The host's files, reached by descriptor only.
//!
//! A name from the guest is one component, checked by [`check_name`] and resolved by `openat2` below a directory's
//! descriptor, never following a symlink. What is opened for input and output is reopened through /proc/self/fd, and
//! only after its type is known to be a regular file or a directory: device nodes, FIFOs and sockets are never opened
//! (CVE-2020-35517).

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, Statx, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::path::DecInt;

/// Longest file name, in bytes.
pub const NAME_MAX: usize = 255;

/// Checks that `name` names something in a directory and nothing else.
pub fn check_name(name: &[u8]) -> Result<(), Errno> {
    match name {
        b"" | b"." | b".." => Err(Errno::INVAL),
        _ if name.len() > NAME_MAX => Err(Errno::NAMETOOLONG),
        _ if name.iter().any(|byte| matches!(byte, b'/' | 0)) => Err(Errno::INVAL),
        _ => Ok(()),
    }
}

/// Never out of the directory, never through a symlink, not even one of /proc's.
pub fn beneath() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS
}

/// Opens what `name` names in `dir`, whatever it is, as a path only.
pub fn open_path(dir: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat2(dir, name, flags, Mode::empty(), beneath())
}

/// The attributes of what `fd` refers to.
pub fn stat(fd: BorrowedFd<'_>) -> Result<Statx, Errno> {
    let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::MNT_ID;
    rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW, mask)
}

/// Host device number as one integer.
pub fn device(stat: &Statx) -> u64 {
    u64::from(stat.stx_dev_major) << 32 | u64::from(stat.stx_dev_minor)
}

/// This process's /proc/self/fd, through which descriptors are reopened.
#[derive(Debug)]
pub struct ProcFd(OwnedFd);

impl ProcFd {
    /// Opens it, once per server.
    pub fn open() -> Result<Self, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::openat(CWD, c"/proc/self/fd", flags, Mode::empty()).map(Self)
    }

    /// Opens what `fd` refers to again, with `flags`. The caller knows that it is a regular file or a directory.
    pub fn reopen(&self, fd: BorrowedFd<'_>, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
        let flags = (flags | OFlags::CLOEXEC) - OFlags::NOFOLLOW;
        rustix::fs::openat(&self.0, DecInt::from_fd(fd), flags, mode)
    }

    /// The directory itself, for `*at` calls on a descriptor's number.
    pub fn dir(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The path under which calls without a directory argument (extended attributes) reach what `fd` refers to.
pub fn magic_path(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// Another descriptor, O_PATH, for what `fd` refers to.
pub fn reopen_as_path(fd: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    ProcFd::open()?.reopen(fd, OFlags::PATH, Mode::empty())
}

/// A descriptor for what `fd` refers to on a private clone of its mount that is `nodev`, `nosuid` and (if asked)
/// read-only. The clone goes with the last descriptor on it.
pub fn private_mount(fd: BorrowedFd<'_>, read_only: bool) -> Result<OwnedFd, Errno> {
    const AT_RECURSIVE: libc::c_uint = 0x8000;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    let clone = open_tree(fd, c"", flags)?;
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_NODEV
            | libc::MOUNT_ATTR_NOSUID
            | if read_only { libc::MOUNT_ATTR_RDONLY } else { 0 },
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: the path is a NUL-terminated string, and the structure's size is given with it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            clone.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH.cast_unsigned() | AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result != 0 {
        return Err(last_errno());
    }
    Ok(clone)
}

/// The calling thread's errno.
pub fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// A host file handle (`name_to_handle_at`): names an inode without holding a descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileHandle {
    kind: i32,
    bytes: Vec<u8>,
}

// Linux MAX_HANDLE_SZ.
const MAX_HANDLE: usize = 128;

#[repr(C)]
struct RawHandle {
    bytes: u32,
    kind: i32,
    handle: [u8; MAX_HANDLE],
}

impl FileHandle {
    /// The handle of what `fd` refers to; an error where the host's file system has none.
    pub fn of(fd: BorrowedFd<'_>) -> Result<Self, Errno> {
        let mut raw = RawHandle {
            bytes: 128,
            kind: 0,
            handle: [0; MAX_HANDLE],
        };
        let mut mount_id = 0i32;
        // SAFETY: the path is NUL-terminated; the structure has the layout of `struct file_handle` with room for as
        // many bytes as its first field says; the mount id is one int.
        let result = unsafe {
            libc::syscall(
                libc::SYS_name_to_handle_at,
                fd.as_raw_fd(),
                c"".as_ptr(),
                &raw mut raw,
                &raw mut mount_id,
                libc::AT_EMPTY_PATH,
            )
        };
        if result != 0 {
            return Err(last_errno());
        }
        let len = usize::try_from(raw.bytes).unwrap_or(0).min(MAX_HANDLE);
        Ok(Self {
            kind: raw.kind,
            bytes: raw.handle[..len].to_vec(),
        })
    }

    /// Opens it as a path only. `mount` is any descriptor on its mount.
    pub fn open(&self, mount: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
        let mut raw = RawHandle {
            bytes: u32::try_from(self.bytes.len()).map_err(|_| Errno::INVAL)?,
            kind: self.kind,
            handle: [0; MAX_HANDLE],
        };
        raw.handle
            .get_mut(..self.bytes.len())
            .ok_or(Errno::INVAL)?
            .copy_from_slice(&self.bytes);
        let flags = libc::O_PATH | libc::O_CLOEXEC | libc::O_NOFOLLOW;
        // SAFETY: the structure has the layout of `struct file_handle` and as many bytes as it says; the call returns
        // a new descriptor or fails.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_open_by_handle_at,
                mount.as_raw_fd(),
                &raw mut raw,
                flags,
            )
        };
        let fd = i32::try_from(fd).map_err(|_| Errno::OVERFLOW)?;
        if fd < 0 {
            return Err(last_errno());
        }
        // SAFETY: the descriptor is new and nobody else's.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_are_names() {
        for name in ["", ".", "..", "a/b", "/", "a\0b"] {
            assert_eq!(check_name(name.as_bytes()), Err(Errno::INVAL), "{name:?}");
        }
        assert_eq!(check_name(&[b'x'; 256]), Err(Errno::NAMETOOLONG));
        for name in ["a", "...", " ", "..a", "\u{fc}", "\n"] {
            assert_eq!(check_name(name.as_bytes()), Ok(()), "{name:?}");
        }
        assert_eq!(check_name(&[b'x'; 255]), Ok(()));
    }
}
