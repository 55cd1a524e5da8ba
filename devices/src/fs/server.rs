// SPDX-License-Identifier: Apache-2.0
//! The FUSE server: one request in, one reply out, on any thread.
//!
//! [`Server::handle`] parses a request, checks that it is one that was negotiated, runs it, and writes the reply. No
//! lock is held across input or output, except that two reads of one open directory wait for one another.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::abi::{
    BatchForgetIn, EXT_GROUPS, ExtHeader, ForgetIn, ForgetOne, InHeader, InitIn, InitInExt, InitOut,
    InterruptIn, KERNEL_MINOR_VERSION, KERNEL_VERSION, MIN_KERNEL_MINOR_VERSION, Opcode, ROOT_ID,
    RemovemappingIn, RemovemappingOne, SETUPMAPPING_FLAG_READ, SETUPMAPPING_FLAG_WRITE, SetupmappingIn, init,
};
use super::config::{FsConfig, FsError};
use super::credentials::Caller;
use super::dax::{self, DaxWindow, MapRequest, MapSource};
use super::deleted::Copies;
use super::handle::HandleTable;
use super::host::ProcFd;
use super::inode::{FdBudget, Inode, InodeStore};
use super::message::{Reader, Writer};
use super::metrics::{Metrics, MetricsSnapshot};
use super::root::{AttachError, AttachOptions, Attachment, Root};
use crate::virtio::Slices;

/// Most bytes of data in one request or its reply: 256 pages, the most that Linux sends.
pub const MAX_WRITE: u32 = 1 << 20;

/// Most bytes of a request that are copied (names, values, extensions).
const MAX_COPIED: usize = 128 << 10;

/// Most nodes that one request forgets: as many as fit the longest request. By virtio Linux forgets one at a time; where
/// it reads requests from /dev/fuse (`examples/fuse-bridge.rs`), as many as the buffer takes.
pub(super) const MAX_FORGETS: usize = (MAX_WRITE as usize + MAX_COPIED) / size_of::<ForgetOne>();

/// Set in the feature word once INIT was answered; no FUSE feature has this bit.
const INITIALIZED: u64 = 1 << 63;

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Answered (or nothing to answer): this many bytes were written.
    Done {
        /// Length of the reply.
        len: u32,
    },
    /// It waits for a lock: handle it again later, or interrupt it.
    Blocked {
        /// The request's number.
        unique: u64,
    },
    /// Another request is to be interrupted, if it waits. No reply.
    Interrupt {
        /// The other request's number.
        unique: u64,
    },
    /// It broke the protocol so that it cannot be answered.
    Malformed,
}

/// One file system.
#[derive(Debug)]
pub struct Server {
    config: FsConfig,
    root: Root,
    inodes: InodeStore,
    handles: HandleTable,
    budget: Arc<FdBudget>,
    proc: ProcFd,
    dax: Option<Arc<DaxWindow>>,
    features: AtomicU64,
    unlocks: AtomicU64,
    metrics: Metrics,
    copies: Copies,
}

/// A request being handled.
#[derive(Debug)]
pub struct Request<'a> {
    /// Its header.
    pub header: InHeader,
    /// Where the reply goes.
    pub out: Writer<'a>,
    reader: Reader<'a>,
}

impl<'a> Request<'a> {
    /// Reads the next structure of the arguments.
    pub fn read<T: FromBytes + IntoBytes>(&mut self) -> Result<T, Errno> {
        self.reader.read()
    }

    /// The next `len` bytes of file data.
    pub fn data(&mut self, len: usize) -> Result<Slices<'a>, Errno> {
        self.reader.data(len)
    }

    /// Fails unless a body of `len` bytes has room: to be asked before anything is done that would have to be undone.
    pub fn need_room(&self, len: usize) -> Result<(), Errno> {
        if self.out.room().is_none_or(|room| room < len) {
            return Err(Errno::INVAL);
        }
        Ok(())
    }

    /// How many bytes to answer with if the guest asks for `size`: no more than it has room for, nor than INIT allowed.
    /// Less than asked for means the end of the file only to reads into the guest's cache, and those ask for no more.
    pub fn wanted(&self, size: u32) -> usize {
        let room = self.out.room().unwrap_or(0);
        room.min(size.min(MAX_WRITE) as usize)
    }

    /// Writes the reply's body.
    pub fn reply<T: IntoBytes + Immutable>(&self, body: &T) -> Result<usize, Errno> {
        self.out.write(0, body)
    }

    /// Writes a body of two structures.
    pub fn reply_two<T, U>(&self, first: &T, second: &U) -> Result<usize, Errno>
    where
        T: IntoBytes + Immutable,
        U: IntoBytes + Immutable,
    {
        let length = self.out.write(0, first)?;
        Ok(length + self.out.write(length, second)?)
    }

    /// Writes a body of plain bytes.
    pub fn reply_bytes(&self, body: &[u8]) -> Result<usize, Errno> {
        self.out.write_bytes(0, body)
    }

    /// The rest of the arguments, and the caller as extensions describe it.
    fn rest(&mut self) -> Result<(Vec<u8>, Caller), Errno> {
        let rest = self.reader.remaining();
        if rest > MAX_COPIED {
            return Err(Errno::INVAL);
        }
        let mut bytes = self.reader.read_bytes(rest)?;
        let extensions = usize::from(self.header.total_extlen) * 8;
        let start = rest.checked_sub(extensions).ok_or(Errno::INVAL)?;
        let group = supplementary_group(&bytes[start..])?;
        bytes.truncate(start);
        let caller = Caller {
            uid: self.header.uid,
            gid: self.header.gid,
            group,
        };
        Ok((bytes, caller))
    }

    /// The rest of the arguments as `N` NUL-terminated strings, and the caller.
    pub fn names_and_caller<const N: usize>(&mut self) -> Result<([Vec<u8>; N], Caller), Errno> {
        let (bytes, caller) = self.rest()?;
        Ok((strings(&bytes)?, caller))
    }

    /// The rest of the arguments as `N` NUL-terminated strings.
    pub fn names<const N: usize>(&mut self) -> Result<[Vec<u8>; N], Errno> {
        self.names_and_caller().map(|(names, _)| names)
    }

    /// The rest of the arguments as one name, and the caller.
    pub fn name_and_caller(&mut self) -> Result<(Vec<u8>, Caller), Errno> {
        self.names_and_caller::<1>()
            .map(|([name], caller)| (name, caller))
    }

    /// The rest of the arguments as one name.
    pub fn only_name(&mut self) -> Result<Vec<u8>, Errno> {
        self.names::<1>().map(|[name]| name)
    }

    /// The rest of the arguments as a name and a value of `size` bytes.
    pub fn name_and_value(&mut self, size: usize) -> Result<(Vec<u8>, Vec<u8>), Errno> {
        let (mut bytes, _) = self.rest()?;
        let nul = bytes.iter().position(|byte| *byte == 0).ok_or(Errno::INVAL)?;
        let value = bytes.split_off(nul + 1);
        bytes.truncate(nul);
        if value.len() != size {
            return Err(Errno::INVAL);
        }
        Ok((bytes, value))
    }
}

/// Splits `bytes` into exactly `N` NUL-terminated strings.
fn strings<const N: usize>(bytes: &[u8]) -> Result<[Vec<u8>; N], Errno> {
    let body = bytes.strip_suffix(&[0]).ok_or(Errno::INVAL)?;
    let parts: Vec<Vec<u8>> = body.split(|byte| *byte == 0).map(<[u8]>::to_vec).collect();
    parts.try_into().map_err(|_| Errno::INVAL)
}

/// The group in a FUSE_EXT_GROUPS extension, if there is one.
fn supplementary_group(mut extensions: &[u8]) -> Result<Option<u32>, Errno> {
    let mut group = None;
    while !extensions.is_empty() {
        let (header, body) = ExtHeader::read_from_prefix(extensions).map_err(|_| Errno::INVAL)?;
        let size = header.size as usize;
        let body_size = size.checked_sub(size_of::<ExtHeader>()).ok_or(Errno::INVAL)?;
        let body = body.get(..body_size).ok_or(Errno::INVAL)?;
        if header.r#type == EXT_GROUPS {
            let (count, groups) = u32::read_from_prefix(body).map_err(|_| Errno::INVAL)?;
            // The kernel sends one: the one that matters, the directory's.
            group = match count {
                0 => None,
                1 => Some(u32::read_from_prefix(groups).map_err(|_| Errno::INVAL)?.0),
                _ => return Err(Errno::INVAL),
            };
        }
        let next = size.next_multiple_of(8).min(extensions.len());
        extensions = &extensions[next..];
    }
    Ok(group)
}

impl Server {
    /// An empty file system. `dax` is its DAX window, if it has one.
    pub fn new(config: FsConfig, dax: Option<Arc<DaxWindow>>) -> Result<Self, FsError> {
        config.check()?;
        let proc = ProcFd::open().map_err(|errno| FsError::Host {
            what: "cannot open /proc/self/fd, which the file system needs: mount /proc",
            source: errno.into(),
        })?;
        let budget = Arc::new(FdBudget::new(config.fd_budget));
        Ok(Self {
            root: Root::new(),
            inodes: InodeStore::new(Arc::clone(&budget), config.max_nodes),
            handles: HandleTable::new(Arc::clone(&budget)),
            budget,
            proc,
            dax,
            features: AtomicU64::new(0),
            unlocks: AtomicU64::new(0),
            metrics: Metrics::default(),
            copies: Copies::default(),
            config,
        })
    }

    /// Its settings.
    pub fn config(&self) -> &FsConfig {
        &self.config
    }

    pub(super) fn root(&self) -> &Root {
        &self.root
    }

    pub(super) fn inodes(&self) -> &InodeStore {
        &self.inodes
    }

    pub(super) fn handles(&self) -> &HandleTable {
        &self.handles
    }

    pub(super) fn copies(&self) -> &Copies {
        &self.copies
    }

    pub(super) fn proc(&self) -> &ProcFd {
        &self.proc
    }

    pub(super) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    pub(super) fn features(&self) -> u64 {
        self.features.load(Ordering::Acquire)
    }

    pub(super) fn set_features(&self, features: u64) {
        self.features.store(features, Ordering::Release);
    }

    /// Whether one of `features` was negotiated.
    pub(super) fn has(&self, features: u64) -> bool {
        self.features.load(Ordering::Relaxed) & features != 0
    }

    /// A node that a request wants to open or change. The root is neither.
    pub(super) fn inode(&self, nodeid: u64) -> Result<Arc<Inode>, Errno> {
        if nodeid == ROOT_ID {
            return Err(Errno::ROFS);
        }
        self.inodes.get(nodeid)
    }

    /// A lock was given back: requests that wait for one may go on.
    pub(super) fn lock_released(&self) {
        self.unlocks.fetch_add(1, Ordering::Release);
    }

    /// How often locks were given back.
    pub fn unlocks(&self) -> u64 {
        self.unlocks.load(Ordering::Acquire)
    }

    /// Adds an entry to the root.
    pub fn attach(
        &self,
        name: &str,
        fd: &std::os::fd::OwnedFd,
        options: AttachOptions,
    ) -> Result<Arc<Attachment>, AttachError> {
        self.root.attach(name, fd, options)
    }

    /// Takes an entry out of the root; when this returns, no descriptor for anything below it is left but those of
    /// requests under way.
    pub fn detach(&self, name: &str) -> Result<(), AttachError> {
        let attachment = self.root.detach(name)?;
        self.handles
            .sweep(|handle| handle.inode.attachment.id == attachment.id);
        self.inodes.sweep(|inode| inode.attachment.id == attachment.id);
        if let Some(dax) = &self.dax {
            dax.detach(attachment.id);
        }
        self.lock_released();
        Ok(())
    }

    /// The counters.
    pub fn metrics_snapshot(&self) -> MetricsSnapshot {
        MetricsSnapshot {
            nodes: self.inodes.count() as u64,
            descriptors: self.budget.used() as u64,
            ..self.metrics.snapshot()
        }
    }

    /// Forgets everything that the guest knows: it unmounted, or its driver was reset.
    pub fn end_session(&self) {
        self.features.store(0, Ordering::Release);
        self.handles.sweep(|_| true);
        self.inodes.sweep(|_| true);
        if let Some(dax) = &self.dax {
            dax.clear();
        }
        self.lock_released();
    }

    /// Whether a request can wait for a disk or for another's writes, so that the next one should not wait behind it.
    pub fn may_block(opcode: u32) -> bool {
        !matches!(
            Opcode::new(opcode),
            None | Some(
                Opcode::Forget
                    | Opcode::BatchForget
                    | Opcode::Interrupt
                    | Opcode::Getattr
                    | Opcode::Statx
                    | Opcode::Init
                    | Opcode::Flush
                    | Opcode::Getlk
                    | Opcode::Setlk
                    | Opcode::Setlkw
                    | Opcode::Bmap
                    | Opcode::Ioctl
                    | Opcode::Poll
            )
        )
    }

    /// Reads a request's header and cuts the request to the length it gives.
    pub fn header(reader: &mut Reader<'_>) -> Result<InHeader, Errno> {
        let header: InHeader = reader.read()?;
        if !reader.truncate(header.len as usize) {
            return Err(Errno::INVAL);
        }
        Ok(header)
    }

    /// Handles one request whose header was read from `reader` by [`Server::header`].
    pub fn handle(&self, header: InHeader, reader: Reader<'_>, out: Writer<'_>) -> Outcome {
        self.metrics.requests.increment();
        let mut request = Request { header, out, reader };
        let opcode = Opcode::new(header.opcode);
        let forgets = match opcode {
            Some(Opcode::Forget) => Some(self.forget(&mut request)),
            Some(Opcode::BatchForget) => Some(self.batch_forget(&mut request)),
            _ => None,
        };
        if let Some(result) = forgets {
            // These two have no reply, not even for errors.
            return match result {
                Ok(()) => Outcome::Done { len: 0 },
                Err(_) => self.malformed(),
            };
        }
        if opcode == Some(Opcode::Interrupt) {
            return match request.read::<InterruptIn>() {
                Ok(InterruptIn { unique }) => Outcome::Interrupt { unique },
                Err(_) => self.malformed(),
            };
        }
        if request.out.room().is_none() {
            return self.malformed();
        }
        let result = self.dispatch(opcode, &mut request);
        if opcode == Some(Opcode::Setlkw) && result == Err(Errno::AGAIN) {
            return Outcome::Blocked {
                unique: header.unique,
            };
        }
        if result.is_err() {
            self.metrics.errors.increment();
        }
        let len = request.out.finish(header.unique, result);
        Outcome::Done { len }
    }

    pub(super) fn malformed(&self) -> Outcome {
        self.metrics.malformed.increment();
        Outcome::Malformed
    }

    fn dispatch(&self, opcode: Option<Opcode>, request: &mut Request<'_>) -> Result<usize, Errno> {
        let Some(opcode) = opcode else {
            return Err(Errno::NOSYS);
        };
        if opcode == Opcode::Init {
            return self.init(request);
        }
        if !self.has(INITIALIZED) {
            // Nothing was negotiated, so nothing else means anything.
            return Err(Errno::IO);
        }
        match opcode {
            Opcode::Lookup => self.lookup(request),
            Opcode::Getattr => self.getattr(request),
            Opcode::Setattr => self.setattr(request),
            Opcode::Readlink => self.readlink(request),
            Opcode::Symlink => self.symlink(request),
            Opcode::Mknod => self.mknod(request),
            Opcode::Mkdir => self.mkdir(request),
            Opcode::Unlink => self.unlink(request, AtFlags::empty()),
            Opcode::Rmdir => self.unlink(request, AtFlags::REMOVEDIR),
            Opcode::Rename => self.rename(request, false),
            Opcode::Rename2 => self.rename(request, true),
            Opcode::Link => self.link(request),
            Opcode::Open => self.open(request),
            Opcode::Create => self.create(request),
            Opcode::Tmpfile => self.tmpfile(request),
            Opcode::Read => self.read(request),
            Opcode::Write => self.write(request),
            Opcode::Statfs => self.statfs(request),
            Opcode::Statx => self.statx(request),
            Opcode::Release | Opcode::Releasedir => self.release(request),
            Opcode::Fsync | Opcode::Fsyncdir => self.fsync(request),
            Opcode::Syncfs => self.syncfs(request),
            Opcode::Setxattr | Opcode::Getxattr | Opcode::Listxattr | Opcode::Removexattr
                if !self.config.xattr =>
            {
                Err(Errno::NOSYS)
            }
            Opcode::Setxattr => self.setxattr(request),
            Opcode::Getxattr => self.getxattr(request),
            Opcode::Listxattr => self.listxattr(request),
            Opcode::Removexattr => self.removexattr(request),
            Opcode::Flush => self.flush(request),
            Opcode::Opendir => self.opendir(request),
            Opcode::Readdir => self.readdir(request, false),
            Opcode::Readdirplus => self.readdir(request, true),
            Opcode::Getlk => self.getlk(request),
            Opcode::Setlk | Opcode::Setlkw => self.setlk(request),
            Opcode::Fallocate => self.fallocate(request),
            Opcode::Lseek => self.lseek(request),
            Opcode::CopyFileRange => self.copy_file_range(request),
            Opcode::Setupmapping => self.setupmapping(request),
            Opcode::Removemapping => self.removemapping(request),
            Opcode::Ioctl => Err(Errno::NOTTY),
            Opcode::Destroy => {
                self.end_session();
                Ok(0)
            }
            // ACCESS: the guest's kernel checks permissions itself. BMAP, POLL, NOTIFY_REPLY: nothing here has
            // blocks, blocks, or asks. FORGET and its kin are dealt with above.
            Opcode::Access
            | Opcode::Bmap
            | Opcode::Poll
            | Opcode::NotifyReply
            | Opcode::Init
            | Opcode::Forget
            | Opcode::BatchForget
            | Opcode::Interrupt => Err(Errno::NOSYS),
        }
    }

    /// The features that this file system offers.
    pub(super) fn offered(&self) -> u64 {
        let mut features = init::ASYNC_READ
            | init::ATOMIC_O_TRUNC
            | init::BIG_WRITES
            | init::AUTO_INVAL_DATA
            | init::DO_READDIRPLUS
            | init::READDIRPLUS_AUTO
            | init::ASYNC_DIO
            | init::PARALLEL_DIROPS
            | init::MAX_PAGES
            | init::CACHE_SYMLINKS
            | init::HANDLE_KILLPRIV_V2
            | init::INIT_EXT
            | init::CREATE_SUPP_GROUP;
        let optional = [
            (self.config.writeback, init::WRITEBACK_CACHE),
            (self.config.remote_locks, init::POSIX_LOCKS | init::FLOCK_LOCKS),
            (
                self.config.posix_acl,
                init::POSIX_ACL | init::DONT_MASK | init::SETXATTR_EXT,
            ),
            (self.config.announce_submounts, init::SUBMOUNTS),
            (self.dax.is_some(), init::MAP_ALIGNMENT | init::HAS_INODE_DAX),
        ];
        for (wanted, feature) in optional {
            if wanted {
                features |= feature;
            }
        }
        features
    }

    /// Whether a snapshot's feature word is one that INIT could have led to.
    pub(super) fn knows_features(&self, features: u64) -> bool {
        features & !(self.offered() | INITIALIZED) == 0
    }

    fn init(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let args: InitIn = request.read()?;
        let mut reply = InitOut {
            major: KERNEL_VERSION,
            minor: KERNEL_MINOR_VERSION,
            ..InitOut::default()
        };
        request.need_room(size_of::<InitOut>())?;
        if args.major > KERNEL_VERSION {
            // It will ask again with our version.
            return request.reply(&reply);
        }
        if args.major < KERNEL_VERSION || args.minor < MIN_KERNEL_MINOR_VERSION {
            return Err(Errno::PROTO);
        }
        let mut wanted = u64::from(args.flags);
        if wanted & init::INIT_EXT != 0 {
            wanted |= u64::from(request.read::<InitInExt>()?.flags2) << 32;
        }
        // A second INIT without DESTROY: the guest starts over.
        self.end_session();
        let features = wanted & self.offered();
        let half = |half: u64| u32::try_from(half & 0xffff_ffff).unwrap_or(0);
        reply = InitOut {
            max_readahead: args.max_readahead,
            flags: half(features),
            flags2: half(features >> 32),
            max_background: u16::MAX,
            congestion_threshold: u16::MAX / 4 * 3,
            max_write: MAX_WRITE,
            time_gran: 1,
            max_pages: 256,
            map_alignment: if features & init::MAP_ALIGNMENT != 0 {
                u16::try_from(dax::ALIGNMENT.trailing_zeros()).unwrap_or(0)
            } else {
                0
            },
            ..reply
        };
        let length = request.reply(&reply)?;
        self.set_features(features | INITIALIZED);
        Ok(length)
    }

    fn forget(&self, request: &mut Request<'_>) -> Result<(), Errno> {
        let args: ForgetIn = request.read()?;
        self.forget_one(request.header.nodeid, args.nlookup)
    }

    fn batch_forget(&self, request: &mut Request<'_>) -> Result<(), Errno> {
        let args: BatchForgetIn = request.read()?;
        let count = args.count as usize;
        // A chain may be of 4 GiB, and the worker is not this guest's alone.
        if count > MAX_FORGETS {
            return Err(Errno::INVAL);
        }
        let batch = request.reader.read_bytes(count * size_of::<ForgetOne>())?;
        let mut result = Ok(());
        for one in batch.chunks_exact(size_of::<ForgetOne>()) {
            let one = ForgetOne::read_from_bytes(one).map_err(|_| Errno::INVAL)?;
            result = result.and(self.forget_one(one.nodeid, one.nlookup));
        }
        result
    }

    fn forget_one(&self, nodeid: u64, count: u64) -> Result<(), Errno> {
        if nodeid == ROOT_ID || self.inodes.forget(nodeid, count) {
            Ok(())
        } else {
            Err(Errno::INVAL)
        }
    }

    fn setupmapping(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let dax = self.dax()?;
        let args: SetupmappingIn = request.read()?;
        if args.flags & !(SETUPMAPPING_FLAG_READ | SETUPMAPPING_FLAG_WRITE) != 0 {
            return Err(Errno::INVAL);
        }
        // The kernel gives no handle (-1): the node is what is mapped.
        let inode = self.inode(request.header.nodeid)?;
        let writable = args.flags & SETUPMAPPING_FLAG_WRITE != 0;
        self.map(dax, &inode, args.moffset, args.len, args.foffset, writable)?;
        Ok(0)
    }

    /// Maps a part of a node's data into the window.
    pub(super) fn map(
        &self,
        dax: &DaxWindow,
        inode: &Inode,
        window_offset: u64,
        len: u64,
        file_offset: u64,
        writable: bool,
    ) -> Result<(), Errno> {
        let flags = if writable { OFlags::RDWR } else { OFlags::RDONLY };
        let write_opens = inode.write_opens.load(Ordering::SeqCst);
        let file = self.open_file(inode, flags, false)?;
        dax.map(&MapRequest {
            file: file.as_fd(),
            window_offset,
            len,
            source: MapSource {
                attachment: inode.attachment.id,
                nodeid: inode.id,
                file_offset,
                writable,
            },
        })?;
        if !inode.attachment.is_live() {
            // Detached while we mapped: the sweep may have come before.
            dax.detach(inode.attachment.id);
            return Err(Errno::STALE);
        }
        if !writable && inode.write_opens.load(Ordering::SeqCst) != write_opens {
            // Opened for writing while we mapped: it may have looked for mappings before ours was there.
            self.renew_mappings(dax, inode)?;
        }
        Ok(())
    }

    /// Maps a node's read-only mappings anew from its present data (`dax.rs` says why).
    pub(super) fn renew_mappings(&self, dax: &DaxWindow, inode: &Inode) -> Result<(), Errno> {
        if !dax.has_readers(inode.id) {
            return Ok(());
        }
        let file = self.open_file(inode, OFlags::RDONLY, false)?;
        dax.renew(inode.id, file.as_fd())
    }

    /// The window, if there is one.
    pub(super) fn window(&self) -> Option<&DaxWindow> {
        self.dax.as_deref()
    }

    fn removemapping(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let dax = self.dax()?;
        let args: RemovemappingIn = request.read()?;
        // FUSE_REMOVEMAPPING_MAX_ENTRY: one page of them.
        if args.count > 256 {
            return Err(Errno::INVAL);
        }
        for _ in 0..args.count {
            let one: RemovemappingOne = request.read()?;
            dax.unmap(one.moffset, one.len)?;
        }
        Ok(0)
    }

    fn dax(&self) -> Result<&DaxWindow, Errno> {
        match &self.dax {
            Some(dax) if self.has(init::MAP_ALIGNMENT) => Ok(dax),
            _ => Err(Errno::NOSYS),
        }
    }

    /// Opens something below an attachment by its path there, for a snapshot's restore: as confined as a lookup.
    pub(super) fn open_beneath(
        &self,
        attachment: &Attachment,
        path: &std::ffi::CStr,
    ) -> Result<std::os::fd::OwnedFd, Errno> {
        if path.is_empty() {
            return rustix::io::fcntl_dupfd_cloexec(attachment.fd(), 0);
        }
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat2(
            attachment.fd(),
            path,
            flags,
            Mode::empty(),
            super::host::beneath(),
        )
    }
}
