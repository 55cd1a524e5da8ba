// SPDX-License-Identifier: Apache-2.0
//! Extended attributes.
//!
//! The calls take a path, so a node is named as /proc/self/fd/N: the kernel goes straight from there to the inode,
//! whatever its type, and opens nothing.

use std::ffi::CString;
use std::os::fd::AsFd;

use rustix::fs::XattrFlags;
use rustix::io::Errno;

use super::abi::{GetxattrIn, GetxattrOut, ROOT_ID, SETXATTR_ACL_KILL_SGID, SetxattrExtIn, SetxattrIn, init};
use super::credentials;
use super::host;
use super::server::{Request, Server};

/// Longest value and longest list (Linux XATTR_SIZE_MAX, XATTR_LIST_MAX), in bytes.
const SIZE_MAX: usize = 65_536;
/// Longest name (Linux XATTR_NAME_MAX), in bytes.
const NAME_MAX: usize = 255;

const ACL: &[u8] = b"system.posix_acl_";

/// What the guest may set on the host. Labels of the host's security modules are the host's.
fn may_set(name: &[u8], acl: bool) -> Result<(), Errno> {
    let allowed = name.starts_with(b"user.")
        || name.starts_with(b"trusted.")
        || name == b"security.capability"
        || acl && name.starts_with(ACL);
    if allowed { Ok(()) } else { Err(Errno::OPNOTSUPP) }
}

fn checked(name: Vec<u8>) -> Result<CString, Errno> {
    if name.is_empty() || name.len() > NAME_MAX {
        return Err(Errno::RANGE);
    }
    CString::new(name).map_err(|_| Errno::INVAL)
}

impl Server {
    pub(super) fn setxattr(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let args = if self.has(init::SETXATTR_EXT) {
            request.read()?
        } else {
            let args: SetxattrIn = request.read()?;
            SetxattrExtIn {
                size: args.size,
                flags: args.flags,
                ..SetxattrExtIn::default()
            }
        };
        let size = args.size as usize;
        if size > SIZE_MAX {
            return Err(Errno::TOOBIG);
        }
        let (name, value) = request.name_and_value(size)?;
        may_set(&name, self.has(init::POSIX_ACL))?;
        let name = checked(name)?;
        let inode = self.inode(request.header.nodeid)?;
        inode.check_writable()?;
        let flags = XattrFlags::from_bits(args.flags).ok_or(Errno::INVAL)?;
        let fd = inode.fd(self.proc())?;
        let set = || rustix::fs::setxattr(host::magic_path(fd.as_fd()), &*name, &value, flags);
        if args.setxattr_flags & SETXATTR_ACL_KILL_SGID != 0 {
            credentials::without_fsetid(set)?;
        } else {
            set()?;
        }
        Ok(0)
    }

    pub(super) fn getxattr(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let args: GetxattrIn = request.read()?;
        let name = checked(request.only_name()?)?;
        if request.header.nodeid == ROOT_ID {
            return Err(Errno::NODATA);
        }
        if name.as_bytes().starts_with(ACL) && !self.has(init::POSIX_ACL) {
            return Err(Errno::OPNOTSUPP);
        }
        let inode = self.inodes().get(request.header.nodeid)?;
        let fd = inode.fd(self.proc())?;
        let path = host::magic_path(fd.as_fd());
        if args.size == 0 {
            return reply_length(request, rustix::fs::getxattr_query(&*path, &*name)?);
        }
        reply_filled(request, args.size, |buffer| {
            rustix::fs::getxattr(&*path, &*name, buffer)
        })
    }

    pub(super) fn listxattr(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let args: GetxattrIn = request.read()?;
        if request.header.nodeid == ROOT_ID {
            return if args.size == 0 {
                reply_length(request, 0)
            } else {
                Ok(0)
            };
        }
        let inode = self.inodes().get(request.header.nodeid)?;
        let fd = inode.fd(self.proc())?;
        let path = host::magic_path(fd.as_fd());
        if args.size == 0 {
            return reply_length(request, rustix::fs::listxattr_query(&*path)?);
        }
        reply_filled(request, args.size, |buffer| rustix::fs::listxattr(&*path, buffer))
    }

    pub(super) fn removexattr(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let name = request.only_name()?;
        may_set(&name, self.has(init::POSIX_ACL))?;
        let name = checked(name)?;
        let inode = self.inode(request.header.nodeid)?;
        inode.check_writable()?;
        let fd = inode.fd(self.proc())?;
        rustix::fs::removexattr(host::magic_path(fd.as_fd()), &*name)?;
        Ok(0)
    }
}

fn reply_length(request: &Request<'_>, length: usize) -> Result<usize, Errno> {
    request.reply(&GetxattrOut {
        size: u32::try_from(length).map_err(|_| Errno::TOOBIG)?,
        padding: 0,
    })
}

/// Answers with what `get` puts into a buffer of `size` bytes (or less, if the guest has less room).
fn reply_filled(
    request: &Request<'_>,
    size: u32,
    get: impl FnOnce(&mut [u8]) -> Result<usize, Errno>,
) -> Result<usize, Errno> {
    let room = request.out.room().unwrap_or(0);
    let mut buffer = vec![0; (size as usize).min(SIZE_MAX).min(room)];
    if buffer.is_empty() {
        // To the host an empty buffer would be a question for the length.
        return Err(Errno::RANGE);
    }
    let length = get(&mut buffer)?;
    request.reply_bytes(buffer.get(..length).ok_or(Errno::RANGE)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_labels_are_the_hosts() {
        for name in [
            "security.selinux",
            "security.ima",
            "system.posix_acl_access",
            "system.x",
            "",
            "userx",
        ] {
            assert_eq!(may_set(name.as_bytes(), false), Err(Errno::OPNOTSUPP), "{name}");
        }
        for name in ["user.a", "trusted.overlay.opaque", "security.capability"] {
            assert_eq!(may_set(name.as_bytes(), false), Ok(()), "{name}");
        }
        assert_eq!(may_set(b"system.posix_acl_default", true), Ok(()));
    }
}
