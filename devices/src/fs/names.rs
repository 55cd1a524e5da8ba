// SPDX-License-Identifier: Apache-2.0
//! Requests on names: looking them up, making, moving and removing them.

use std::ffi::CStr;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, Statx};
use rustix::io::Errno;
use rustix::path::DecInt;

use super::abi::{
    CreateIn, EntryOut, LinkIn, MkdirIn, MknodIn, OPEN_KILL_SUIDGID, OpenOut, ROOT_ID, Rename2In, RenameIn,
    init,
};
use super::attributes::decode_device;
use super::credentials::create_as;
use super::host;
use super::inode::{Inode, name};
use super::root::CachePolicy;
use super::server::{Request, Server};

/// Longest symlink target, in bytes.
const TARGET_MAX: usize = 4095;

impl Server {
    /// Looks `name` up in `parent`, counting a lookup of what it finds.
    pub(super) fn find(&self, parent: &Inode, name: &CStr) -> Result<(Arc<Inode>, Statx), Errno> {
        let fd = host::open_path(parent.fd(self.proc())?.as_fd(), name)?;
        let stat = host::stat(fd.as_fd())?;
        let inode = self.inodes().intern(&parent.attachment, fd, &stat)?;
        Ok((inode, stat))
    }

    /// Looks an attachment's own node up, counting a lookup.
    pub(super) fn find_attached(&self, name: &[u8]) -> Result<(Arc<Inode>, Statx), Errno> {
        let attachment = self.root().get(name).ok_or(Errno::NOENT)?;
        let fd = rustix::io::fcntl_dupfd_cloexec(attachment.fd(), 0)?;
        let stat = host::stat(fd.as_fd())?;
        let inode = self.inodes().intern(&attachment, fd, &stat)?;
        Ok((inode, stat))
    }

    pub(super) fn lookup(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let bytes = request.only_name()?;
        request.need_room(size_of::<EntryOut>())?;
        if request.header.nodeid == ROOT_ID {
            let (inode, stat) = self.find_attached(&bytes)?;
            return request.reply(&self.entry(&inode, &stat, None));
        }
        let parent = self.inodes().get(request.header.nodeid)?;
        match self.find(&parent, &name(&bytes)?) {
            Ok((inode, stat)) => request.reply(&self.entry(&inode, &stat, Some(parent.key.mount_id))),
            // A reply without a node: the guest may remember that there is nothing.
            Err(Errno::NOENT) if parent.attachment.options.cache == CachePolicy::Always => {
                request.reply(&EntryOut {
                    entry_valid: CachePolicy::Always.timeout().as_secs(),
                    ..EntryOut::default()
                })
            }
            Err(errno) => Err(errno),
        }
    }

    /// Answers with what now stands under `name`.
    fn reply_found(&self, request: &Request<'_>, parent: &Inode, name: &CStr) -> Result<usize, Errno> {
        let (inode, stat) = self.find(parent, name)?;
        request.reply(&self.entry(&inode, &stat, Some(parent.key.mount_id)))
    }

    /// The directory that a request wants to change.
    fn writable_directory(&self, nodeid: u64) -> Result<Arc<Inode>, Errno> {
        let parent = self.inode(nodeid)?;
        parent.check_writable()?;
        Ok(parent)
    }

    /// The mask to create with: with ACLs the guest leaves applying it to the host.
    fn mask(&self, umask: u32) -> u32 {
        if self.has(init::DONT_MASK) { umask } else { 0 }
    }

    pub(super) fn mkdir(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let args: MkdirIn = request.read()?;
        let (bytes, caller) = request.name_and_caller()?;
        request.need_room(size_of::<EntryOut>())?;
        let parent = self.writable_directory(request.header.nodeid)?;
        let name = name(&bytes)?;
        let fd = parent.fd(self.proc())?;
        create_as(&caller, self.mask(args.umask), || {
            rustix::fs::mkdirat(&fd, &*name, Mode::from_raw_mode(args.mode & 0o7777))
        })?;
        self.reply_found(request, &parent, &name)
    }

    pub(super) fn mknod(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let args: MknodIn = request.read()?;
        let (bytes, caller) = request.name_and_caller()?;
        request.need_room(size_of::<EntryOut>())?;
        let parent = self.writable_directory(request.header.nodeid)?;
        let name = name(&bytes)?;
        let kind = FileType::from_raw_mode(args.mode);
        let (major, minor) = decode_device(args.rdev);
        let device = match kind {
            FileType::RegularFile | FileType::Fifo | FileType::Socket => 0,
            // 0:0 is no device but overlayfs's mark for a deleted name.
            FileType::CharacterDevice if args.rdev == 0 => 0,
            FileType::CharacterDevice | FileType::BlockDevice => {
                if !parent.attachment.options.device_nodes {
                    return Err(Errno::PERM);
                }
                rustix::fs::makedev(major, minor)
            }
            _ => return Err(Errno::INVAL),
        };
        let fd = parent.fd(self.proc())?;
        create_as(&caller, self.mask(args.umask), || {
            rustix::fs::mknodat(&fd, &*name, kind, Mode::from_raw_mode(args.mode & 0o7777), device)
        })?;
        self.reply_found(request, &parent, &name)
    }

    pub(super) fn symlink(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let (names, caller) = request.names_and_caller::<2>()?;
        request.need_room(size_of::<EntryOut>())?;
        let parent = self.writable_directory(request.header.nodeid)?;
        let [link, target] = names;
        let link = name(&link)?;
        if target.is_empty() {
            return Err(Errno::NOENT);
        }
        if target.len() > TARGET_MAX {
            return Err(Errno::NAMETOOLONG);
        }
        let fd = parent.fd(self.proc())?;
        create_as(&caller, 0, || rustix::fs::symlinkat(&*target, &fd, &*link))?;
        self.reply_found(request, &parent, &link)
    }

    pub(super) fn readlink(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let inode = self.inode(request.header.nodeid)?;
        if inode.kind != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        let mut buffer = [0u8; TARGET_MAX + 1];
        let length = rustix::fs::readlinkat_raw(inode.fd(self.proc())?, c"", &mut buffer)?;
        request.reply_bytes(buffer.get(..length).ok_or(Errno::IO)?)
    }

    pub(super) fn link(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let args: LinkIn = request.read()?;
        let bytes = request.only_name()?;
        request.need_room(size_of::<EntryOut>())?;
        let parent = self.writable_directory(request.header.nodeid)?;
        let inode = self.inode(args.oldnodeid)?;
        if inode.attachment.id != parent.attachment.id {
            return Err(Errno::XDEV);
        }
        let name = name(&bytes)?;
        let fd = inode.fd(self.proc())?;
        rustix::fs::linkat(
            self.proc().dir(),
            DecInt::from_fd(&fd),
            parent.fd(self.proc())?,
            &*name,
            AtFlags::SYMLINK_FOLLOW,
        )?;
        self.reply_found(request, &parent, &name)
    }

    pub(super) fn unlink(&self, request: &mut Request<'_>, flags: AtFlags) -> Result<usize, Errno> {
        let bytes = request.only_name()?;
        let parent = self.writable_directory(request.header.nodeid)?;
        rustix::fs::unlinkat(parent.fd(self.proc())?, &*name(&bytes)?, flags)?;
        Ok(0)
    }

    pub(super) fn rename(&self, request: &mut Request<'_>, second: bool) -> Result<usize, Errno> {
        let (newdir, flags) = if second {
            let args: Rename2In = request.read()?;
            (args.newdir, args.flags)
        } else {
            (request.read::<RenameIn>()?.newdir, 0)
        };
        let known = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE | RenameFlags::WHITEOUT;
        let flags = RenameFlags::from_bits(flags)
            .filter(|flags| known.contains(*flags))
            .ok_or(Errno::INVAL)?;
        let [old, new] = request.names()?;
        let from = self.writable_directory(request.header.nodeid)?;
        let to = self.writable_directory(newdir)?;
        if from.attachment.id != to.attachment.id {
            return Err(Errno::XDEV);
        }
        let (old, new) = (name(&old)?, name(&new)?);
        let (from, to) = (from.fd(self.proc())?, to.fd(self.proc())?);
        rustix::fs::renameat_with(&from, &*old, &to, &*new, flags)?;
        Ok(0)
    }

    pub(super) fn create(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let args: CreateIn = request.read()?;
        let (bytes, caller) = request.name_and_caller()?;
        request.need_room(size_of::<EntryOut>() + size_of::<OpenOut>())?;
        let parent = self.writable_directory(request.header.nodeid)?;
        let name = name(&bytes)?;
        let flags = self.host_flags(args.flags)?;
        let admission = self.handles().admit()?;
        // Only a name that is new is opened by name: an existing one could be a FIFO or a device.
        let create = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(args.mode & 0o7777);
        let dir = parent.fd(self.proc())?;
        let made = create_as(&caller, self.mask(args.umask), || {
            rustix::fs::openat2(&dir, &*name, create - OFlags::TRUNC, mode, host::beneath())
        });
        let (file, inode, stat) = match made {
            Ok(file) => {
                let path = self.proc().reopen(file.as_fd(), OFlags::PATH, Mode::empty())?;
                let stat = host::stat(path.as_fd())?;
                (file, self.inodes().intern(&parent.attachment, path, &stat)?, stat)
            }
            Err(Errno::EXIST) if !OFlags::from_bits_retain(args.flags).contains(OFlags::EXCL) => {
                let (inode, stat) = self.find(&parent, &name)?;
                let kill = args.open_flags & OPEN_KILL_SUIDGID != 0;
                let file = self.open_file(&inode, flags, kill).inspect_err(|_| {
                    self.inodes().forget(inode.id, 1);
                })?;
                (file, inode, stat)
            }
            Err(errno) => return Err(errno),
        };
        self.reply_created(request, &parent, admission, file, inode, flags, &stat)
    }

    #[expect(clippy::too_many_arguments, reason = "the tail that create and tmpfile share")]
    fn reply_created(
        &self,
        request: &Request<'_>,
        parent: &Inode,
        admission: super::inode::Admission,
        file: std::os::fd::OwnedFd,
        inode: Arc<Inode>,
        flags: OFlags,
        stat: &Statx,
    ) -> Result<usize, Errno> {
        let entry = self.entry(&inode, stat, Some(parent.key.mount_id));
        let open_flags = self.open_flags(&inode, stat);
        let nodeid = inode.id;
        let fh = self
            .handles()
            .insert(admission, inode, file, flags)
            .inspect_err(|_| {
                self.inodes().forget(nodeid, 1);
            })?;
        let open = OpenOut {
            fh,
            open_flags,
            backing_id: 0,
        };
        request.reply_two(&entry, &open)
    }

    pub(super) fn tmpfile(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let args: CreateIn = request.read()?;
        let (_, caller) = request.name_and_caller()?;
        request.need_room(size_of::<EntryOut>() + size_of::<OpenOut>())?;
        let parent = self.writable_directory(request.header.nodeid)?;
        if parent.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let admission = self.handles().admit()?;
        // O_TMPFILE wants write access; O_EXCL (never to be linked) passes on.
        let excl = OFlags::from_bits_retain(args.flags) & OFlags::EXCL;
        let flags = (self.host_flags(args.flags)? - OFlags::TRUNC) | excl;
        let mode = Mode::from_raw_mode(args.mode & 0o7777);
        let dir = parent.fd(self.proc())?;
        let file = create_as(&caller, self.mask(args.umask), || {
            self.proc().reopen(dir.as_fd(), flags | OFlags::TMPFILE, mode)
        })?;
        let path = self.proc().reopen(file.as_fd(), OFlags::PATH, Mode::empty())?;
        let stat = host::stat(path.as_fd())?;
        let inode = self.inodes().intern(&parent.attachment, path, &stat)?;
        self.reply_created(request, &parent, admission, file, inode, flags, &stat)
    }
}
