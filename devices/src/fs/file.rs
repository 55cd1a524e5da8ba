// SPDX-License-Identifier: Apache-2.0
//! Requests on open files and directories.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{FallocateFlags, FileType, Mode, OFlags, SeekFrom, Statx};
use rustix::io::Errno;

use super::abi::{
    CopyFileRangeIn, EntryOut, FSYNC_FDATASYNC, FallocateIn, FlushIn, FsyncIn, LK_FLOCK, LkIn, LkOut,
    LseekIn, LseekOut, OPEN_KILL_SUIDGID, OpenIn, OpenOut, ROOT_ID, ReadIn, ReleaseIn, WRITE_KILL_SUIDGID,
    WriteIn, WriteOut, fopen, init,
};
use super::credentials;
use super::directory::Records;
use super::host;
use super::inode::{Inode, name};
use super::lock;
use super::message::{read_file, write_file};
use super::root::CachePolicy;
use super::server::{MAX_WRITE, Request, Server};

impl Server {
    /// The guest's open flags as far as they reach the host.
    pub(super) fn host_flags(&self, flags: u32) -> Result<OFlags, Errno> {
        let flags = OFlags::from_bits_retain(flags);
        // O_DIRECT is left out: it would ask for alignment that the guest's buffers need not have.
        let mut host = flags
            & (OFlags::RWMODE
                | OFlags::APPEND
                | OFlags::TRUNC
                | OFlags::DSYNC
                | OFlags::SYNC
                | OFlags::NOATIME);
        if host & OFlags::RWMODE == OFlags::RWMODE {
            return Err(Errno::INVAL);
        }
        if self.has(init::WRITEBACK_CACHE) {
            // The guest's page cache reads pages that it writes a part of, and knows itself where the end is.
            if host & OFlags::RWMODE == OFlags::WRONLY {
                host = (host - OFlags::WRONLY) | OFlags::RDWR;
            }
            host -= OFlags::APPEND;
        }
        Ok(host)
    }

    /// Opens a regular file of the host. Nothing but regular files is ever opened here, and for writing only where
    /// that is allowed. Mappings in the DAX window follow what opening for writing may have made of it.
    pub(super) fn open_file(&self, inode: &Inode, flags: OFlags, kill: bool) -> Result<OwnedFd, Errno> {
        match inode.kind {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR),
            FileType::Symlink => return Err(Errno::LOOP),
            _ => return Err(Errno::NXIO),
        }
        let writing = flags & OFlags::RWMODE != OFlags::RDONLY || flags.contains(OFlags::TRUNC);
        if writing {
            inode.check_writable()?;
        }
        let fd = inode.fd(self.proc())?;
        let open = || self.proc().reopen(fd.as_fd(), flags, Mode::empty());
        let file = if kill {
            credentials::without_fsetid(open)?
        } else {
            open()?
        };
        if writing && let Some(window) = self.window() {
            inode.write_opens.fetch_add(1, Ordering::SeqCst);
            self.renew_mappings(window, inode)?;
        }
        Ok(file)
    }

    /// What the guest is told about caching an open file's data.
    pub(super) fn open_flags(&self, inode: &Inode, stat: &Statx) -> u32 {
        match inode.attachment.options.cache {
            CachePolicy::Never => fopen::DIRECT_IO | fopen::PARALLEL_DIRECT_WRITES,
            CachePolicy::Always => fopen::KEEP_CACHE | fopen::CACHE_DIR,
            CachePolicy::Auto => {
                // Unchanged since the guest last opened it: what it cached since then is good.
                let now = fingerprint(stat);
                let unchanged = inode.seen.swap(now, Ordering::Relaxed) == now;
                if unchanged { fopen::KEEP_CACHE } else { 0 }
            }
        }
    }

    pub(super) fn open(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let args: OpenIn = request.read()?;
        request.need_room(size_of::<OpenOut>())?;
        let inode = self.inode(request.header.nodeid)?;
        let flags = self.host_flags(args.flags)?;
        let admission = self.handles().admit()?;
        let file = self.open_file(&inode, flags, args.open_flags & OPEN_KILL_SUIDGID != 0)?;
        let open_flags = match inode.attachment.options.cache {
            CachePolicy::Auto => self.open_flags(&inode, &host::stat(file.as_fd())?),
            CachePolicy::Always => fopen::KEEP_CACHE,
            CachePolicy::Never => fopen::DIRECT_IO | fopen::PARALLEL_DIRECT_WRITES,
        };
        let fh = self.handles().insert(admission, inode, file, flags)?;
        request.reply(&OpenOut {
            fh,
            open_flags,
            backing_id: 0,
        })
    }

    pub(super) fn opendir(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let _: OpenIn = request.read()?;
        request.need_room(size_of::<OpenOut>())?;
        if request.header.nodeid == ROOT_ID {
            return request.reply(&OpenOut::default());
        }
        let inode = self.inodes().get(request.header.nodeid)?;
        if inode.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let admission = self.handles().admit()?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let file = self
            .proc()
            .reopen(inode.fd(self.proc())?.as_fd(), flags, Mode::empty())?;
        let open_flags = match inode.attachment.options.cache {
            CachePolicy::Always => fopen::KEEP_CACHE | fopen::CACHE_DIR,
            CachePolicy::Auto | CachePolicy::Never => 0,
        };
        let fh = self.handles().insert(admission, inode, file, flags)?;
        request.reply(&OpenOut {
            fh,
            open_flags,
            backing_id: 0,
        })
    }

    pub(super) fn read(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let args: ReadIn = request.read()?;
        let handle = self.handles().get(request.header.nodeid, args.fh)?;
        if handle.inode.kind != FileType::RegularFile {
            return Err(Errno::ISDIR);
        }
        let data = request.out.data(request.wanted(args.size))?;
        let read = read_file(handle.file(), args.offset, &data)?;
        self.metrics().bytes_read.add(read);
        Ok(read)
    }

    pub(super) fn write(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let args: WriteIn = request.read()?;
        request.need_room(size_of::<WriteOut>())?;
        if args.size > MAX_WRITE {
            return Err(Errno::INVAL);
        }
        let data = request.data(args.size as usize)?;
        let handle = self.handles().get(request.header.nodeid, args.fh)?;
        if handle.inode.kind != FileType::RegularFile {
            return Err(Errno::ISDIR);
        }
        // A descriptor for reading only would answer EBADF by itself; this says it for certain.
        if handle.flags & OFlags::RWMODE == OFlags::RDONLY {
            return Err(Errno::BADF);
        }
        let write = || write_file(handle.file(), args.offset, &data);
        let written = if args.write_flags & WRITE_KILL_SUIDGID != 0 && has_privileges(handle.file())? {
            credentials::without_fsetid(write)?
        } else {
            write()?
        };
        self.metrics().bytes_written.add(written);
        request.reply(&WriteOut {
            size: u32::try_from(written).map_err(|_| Errno::IO)?,
            padding: 0,
        })
    }

    pub(super) fn readdir(&self, request: &mut Request<'_>, plus: bool) -> Result<usize, Errno> {
        let args: ReadIn = request.read()?;
        if request.header.nodeid == ROOT_ID {
            return self.read_root(request, &args, plus);
        }
        let handle = self.handles().get(request.header.nodeid, args.fh)?;
        if handle.inode.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let mut records = Records::new(&request.out, request.wanted(args.size));
        let mut listing = handle.listing.lock().map_err(|_| Errno::IO)?;
        let visited = listing.each(handle.file(), args.offset, |entry| {
            if !records.fits(entry.name, plus) {
                return Ok(false);
            }
            let ino = self.root().guest_ino(handle.inode.key.dev, entry.ino);
            if !plus {
                return records.push(ino, entry.next, entry.kind, entry.name, None);
            }
            // "." and ".." are in the guest's hands already: they come without a lookup.
            if matches!(entry.name, b"." | b"..") {
                let none = EntryOut::default();
                return records.push(ino, entry.next, entry.kind, entry.name, Some(&none));
            }
            match name(entry.name).and_then(|name| self.find(&handle.inode, &name)) {
                Ok((inode, stat)) => {
                    let found = self.entry(&inode, &stat, Some(handle.inode.key.mount_id));
                    let pushed =
                        records.push(found.attr.ino, entry.next, entry.kind, entry.name, Some(&found));
                    if pushed != Ok(true) {
                        self.inodes().forget(inode.id, 1);
                    }
                    pushed
                }
                // Gone meanwhile, or no node to be had: the name alone.
                Err(_) => records.push(
                    ino,
                    entry.next,
                    entry.kind,
                    entry.name,
                    Some(&EntryOut::default()),
                ),
            }
        });
        match visited {
            // What was listed before an error counts.
            Err(errno) if records.used() == 0 => Err(errno),
            _ => Ok(records.used()),
        }
    }

    /// Lists the root. Offsets are attachment ids shifted by the two entries that every directory has.
    fn read_root(&self, request: &Request<'_>, args: &ReadIn, plus: bool) -> Result<usize, Errno> {
        const DIRECTORY: u8 = 4;
        const FILE: u8 = 8;
        const DOTS: u64 = 2;
        let mut records = Records::new(&request.out, request.wanted(args.size));
        for (next, dots) in [(1, &b"."[..]), (DOTS, &b".."[..])] {
            let none = EntryOut::default();
            if args.offset < next && !records.push(ROOT_ID, next, DIRECTORY, dots, plus.then_some(&none))? {
                return Ok(records.used());
            }
        }
        for attachment in self.root().after(args.offset.saturating_sub(DOTS)) {
            if !records.fits(&attachment.name, plus) {
                break;
            }
            let kind = if attachment.kind == FileType::Directory {
                DIRECTORY
            } else {
                FILE
            };
            let next = u64::from(attachment.id) + DOTS;
            let found = self.find_attached(&attachment.name);
            let Ok((inode, stat)) = found else { continue };
            let entry = self.entry(&inode, &stat, None);
            let pushed = records.push(
                entry.attr.ino,
                next,
                kind,
                &attachment.name,
                plus.then_some(&entry),
            );
            if !plus || pushed != Ok(true) {
                self.inodes().forget(inode.id, 1);
            }
            if !pushed? {
                break;
            }
        }
        Ok(records.used())
    }

    pub(super) fn release(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let args: ReleaseIn = request.read()?;
        if request.header.nodeid == ROOT_ID {
            return Ok(0);
        }
        let handle = self.handles().remove(request.header.nodeid, args.fh)?;
        if self.has(init::POSIX_LOCKS | init::FLOCK_LOCKS) {
            handle.inode.locks.release(args.lock_owner);
            drop(handle);
            self.lock_released();
        }
        Ok(0)
    }

    pub(super) fn flush(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let args: FlushIn = request.read()?;
        if !self.has(init::POSIX_LOCKS) {
            // Nothing is buffered here, so there is nothing to flush: the guest need not ask again.
            return Err(Errno::NOSYS);
        }
        let handle = self.handles().get(request.header.nodeid, args.fh)?;
        if handle.inode.locks.release(args.lock_owner) {
            self.lock_released();
        }
        Ok(0)
    }

    pub(super) fn fsync(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let args: FsyncIn = request.read()?;
        if request.header.nodeid == ROOT_ID {
            return Ok(0);
        }
        let handle = self.handles().get(request.header.nodeid, args.fh)?;
        if args.fsync_flags & FSYNC_FDATASYNC != 0 {
            rustix::fs::fdatasync(handle.file())?;
        } else {
            rustix::fs::fsync(handle.file())?;
        }
        Ok(0)
    }

    pub(super) fn syncfs(&self, request: &Request<'_>) -> Result<usize, Errno> {
        let attachments = match self.inodes().get(request.header.nodeid) {
            Ok(inode) => vec![Arc::clone(&inode.attachment)],
            Err(_) if request.header.nodeid == ROOT_ID => self.root().all(),
            Err(errno) => return Err(errno),
        };
        for attachment in attachments {
            // Nothing of the guest's can be unwritten where it cannot write.
            if !attachment.options.read_only {
                let flags = OFlags::RDONLY | OFlags::NONBLOCK;
                rustix::fs::syncfs(self.proc().reopen(attachment.fd(), flags, Mode::empty())?)?;
            }
        }
        Ok(0)
    }

    pub(super) fn fallocate(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let args: FallocateIn = request.read()?;
        let handle = self.handles().get(request.header.nodeid, args.fh)?;
        handle.inode.check_writable()?;
        let known = FallocateFlags::KEEP_SIZE
            | FallocateFlags::PUNCH_HOLE
            | FallocateFlags::ZERO_RANGE
            | FallocateFlags::COLLAPSE_RANGE
            | FallocateFlags::INSERT_RANGE
            | FallocateFlags::UNSHARE_RANGE;
        let mode = FallocateFlags::from_bits(args.mode)
            .filter(|mode| known.contains(*mode))
            .ok_or(Errno::OPNOTSUPP)?;
        let signed = |value: u64| i64::try_from(value).map_err(|_| Errno::INVAL);
        signed(args.offset)?;
        signed(args.length)?;
        rustix::fs::fallocate(handle.file(), mode, args.offset, args.length)?;
        Ok(0)
    }

    pub(super) fn lseek(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let args: LseekIn = request.read()?;
        request.need_room(size_of::<LseekOut>())?;
        let handle = self.handles().get(request.header.nodeid, args.fh)?;
        if handle.inode.kind != FileType::RegularFile {
            return Err(Errno::INVAL);
        }
        i64::try_from(args.offset).map_err(|_| Errno::NXIO)?;
        // The position itself means nothing: reads and writes carry theirs.
        let to = match i32::try_from(args.whence) {
            Ok(libc::SEEK_DATA) => SeekFrom::Data(args.offset),
            Ok(libc::SEEK_HOLE) => SeekFrom::Hole(args.offset),
            _ => return Err(Errno::INVAL),
        };
        let offset = rustix::fs::seek(handle.file(), to)?;
        request.reply(&LseekOut { offset })
    }

    pub(super) fn copy_file_range(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let args: CopyFileRangeIn = request.read()?;
        request.need_room(size_of::<WriteOut>())?;
        if args.flags != 0 {
            return Err(Errno::INVAL);
        }
        let from = self.handles().get(request.header.nodeid, args.fh_in)?;
        let to = self.handles().get(args.nodeid_out, args.fh_out)?;
        to.inode.check_writable()?;
        let signed = |value: u64| i64::try_from(value).map_err(|_| Errno::INVAL);
        signed(args.off_in)?;
        signed(args.off_out)?;
        let (mut off_in, mut off_out) = (args.off_in, args.off_out);
        // One request copies a bounded amount, so that it ends in bounded time; the guest asks for the rest.
        const MOST: usize = 64 << 20;
        let len = usize::try_from(args.len).unwrap_or(usize::MAX).min(MOST);
        let copied =
            rustix::fs::copy_file_range(from.file(), Some(&mut off_in), to.file(), Some(&mut off_out), len)?;
        request.reply(&WriteOut {
            size: u32::try_from(copied).map_err(|_| Errno::IO)?,
            padding: 0,
        })
    }

    fn check_locks(&self, args: &LkIn) -> Result<(), Errno> {
        let feature = if args.lk_flags & LK_FLOCK != 0 {
            init::FLOCK_LOCKS
        } else {
            init::POSIX_LOCKS
        };
        if self.has(feature) {
            Ok(())
        } else {
            Err(Errno::NOSYS)
        }
    }

    pub(super) fn getlk(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let args: LkIn = request.read()?;
        self.check_locks(&args)?;
        request.need_room(size_of::<LkOut>())?;
        let handle = self.handles().get(request.header.nodeid, args.fh)?;
        let owner = self.lock_owner(&handle.inode, args.owner)?;
        request.reply(&LkOut {
            lk: lock::get(owner.as_fd(), &args.lk)?,
        })
    }

    /// Takes or gives back a lock; EAGAIN if it is taken, whether or not the request wants to wait.
    pub(super) fn setlk(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let args: LkIn = request.read()?;
        self.check_locks(&args)?;
        let handle = self.handles().get(request.header.nodeid, args.fh)?;
        if args.lk_flags & LK_FLOCK != 0 {
            lock::flock(handle.file(), args.lk.r#type)?;
        } else {
            let owner = self.lock_owner(&handle.inode, args.owner)?;
            lock::set(owner.as_fd(), &args.lk)?;
        }
        if args.lk.r#type == libc::F_UNLCK.cast_unsigned() {
            self.lock_released();
        }
        Ok(0)
    }

    fn lock_owner(&self, inode: &Arc<Inode>, owner: u64) -> Result<Arc<OwnedFd>, Errno> {
        inode.locks.of(owner, || {
            // A write lock wants a descriptor for writing.
            let flags = if inode.attachment.options.read_only {
                OFlags::RDONLY
            } else {
                OFlags::RDWR
            };
            self.open_file(inode, flags, false)
        })
    }
}

/// Whether a file has bits that a write by an ordinary user clears.
fn has_privileges(file: std::os::fd::BorrowedFd<'_>) -> Result<bool, Errno> {
    const SUID_SGID: u16 = 0o6000;
    Ok(host::stat(file)?.stx_mode & SUID_SGID != 0)
}

/// A number that changes when the file's data does. Zero is "never seen".
fn fingerprint(stat: &Statx) -> u64 {
    let time = |time: &rustix::fs::StatxTimestamp| {
        time.tv_sec.cast_unsigned().wrapping_mul(1_000_000_007) ^ u64::from(time.tv_nsec)
    };
    let mixed = time(&stat.stx_mtime)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(time(&stat.stx_ctime))
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(stat.stx_size);
    mixed | 1
}
