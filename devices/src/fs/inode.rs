// SPDX-License-Identifier: Apache-2.0
//! The nodes that the guest knows of.
//!
//! ```text
//!  lookup, create, readdirplus ──▶ known (lookup count +1 each time) ──FORGET of as many──▶ gone, descriptor closed
//!                                    └──────────────attachment detached──────────────────────▲
//! ```
//!
//! A node holds an O_PATH descriptor, so the host's inode cannot go away or be reused under it. Node ids are never
//! used twice. Descriptors are a shared resource of the process, so each guest has a budget: beyond it, nodes are
//! kept as host file handles, which are opened for each use; where the host's file system has none, the guest gets
//! ENFILE. A forgotten node's descriptor stays, and counts, for as long as a file is open through it.
//!
//! Two maps, both in shards with a lock each: id to node, and host identity to node. Counts change under the lock of
//! the identity's shard.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::ffi::CString;
use std::hash::{BuildHasher, BuildHasherDefault, Hasher};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};

use rustix::fs::{FileType, Statx};
use rustix::io::Errno;

use super::abi::ROOT_ID;
use super::host::{self, FileHandle, ProcFd};
use super::lock::OwnerLocks;
use super::root::Attachment;

/// What makes a host inode the same one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct InodeKey {
    /// The attachment it was reached through: access rights differ by it.
    pub attachment: u32,
    /// The host's mount.
    pub mount_id: u64,
    /// The host's device.
    pub dev: u64,
    /// The host's inode number.
    pub ino: u64,
}

#[derive(Debug)]
enum Reference {
    Fd { fd: OwnedFd, _admission: Admission },
    Handle(FileHandle),
}

/// A descriptor of a node, its own or opened for this use.
#[derive(Debug)]
pub enum NodeFd<'a> {
    /// The node's.
    Kept(BorrowedFd<'a>),
    /// Opened now.
    Opened(OwnedFd),
}

impl AsFd for NodeFd<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Kept(fd) => fd.as_fd(),
            Self::Opened(fd) => fd.as_fd(),
        }
    }
}

/// A node.
#[derive(Debug)]
pub struct Inode {
    /// The node id that the guest uses.
    pub id: u64,
    /// Its identity on the host.
    pub key: InodeKey,
    /// Its type, which never changes.
    pub kind: FileType,
    /// Where it belongs.
    pub attachment: Arc<Attachment>,
    /// What its data looked like when the guest last opened it (`file.rs`).
    pub seen: AtomicU64,
    /// Record locks taken through it.
    pub locks: OwnerLocks,
    /// How often it was opened for writing. Counted where there is a DAX window only (`dax.rs`).
    pub write_opens: AtomicU64,
    reference: Reference,
    // Changed under the lock of the identity's shard only.
    lookups: AtomicU64,
}

impl Inode {
    /// An O_PATH descriptor for it.
    pub fn fd(&self, proc: &ProcFd) -> Result<NodeFd<'_>, Errno> {
        match &self.reference {
            Reference::Fd { fd, .. } => Ok(NodeFd::Kept(fd.as_fd())),
            Reference::Handle(handle) => handle.open(self.attachment.mount(proc)?).map(NodeFd::Opened),
        }
    }

    /// Lookups that the guest has not forgotten.
    pub fn lookups(&self) -> u64 {
        self.lookups.load(Ordering::Relaxed)
    }

    /// Fails with EROFS if it cannot be changed.
    pub fn check_writable(&self) -> Result<(), Errno> {
        if self.attachment.options.read_only {
            return Err(Errno::ROFS);
        }
        Ok(())
    }
}

/// Node ids are our own counter: multiplying spreads them, and no one can choose them.
#[derive(Default)]
pub(super) struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
    }
    fn write_u64(&mut self, id: u64) {
        self.0 = id.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

pub(super) type IdMap<V> = HashMap<u64, V, BuildHasherDefault<IdHasher>>;

const SHARDS: usize = 16;

/// The table of nodes.
#[derive(Debug)]
pub struct InodeStore {
    by_id: [RwLock<IdMap<Arc<Inode>>>; SHARDS],
    by_key: [Mutex<HashMap<InodeKey, Arc<Inode>>>; SHARDS],
    hasher: RandomState,
    next_id: AtomicU64,
    count: AtomicUsize,
    max: usize,
    budget: Arc<FdBudget>,
}

impl std::fmt::Debug for IdHasher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("IdHasher")
    }
}

/// The descriptors that one guest may hold.
#[derive(Debug)]
pub struct FdBudget {
    used: AtomicUsize,
    limit: usize,
}

impl FdBudget {
    /// A budget of `limit` descriptors.
    pub fn new(limit: usize) -> Self {
        Self {
            used: AtomicUsize::new(0),
            limit,
        }
    }

    /// Takes one, if more than `reserve` are left.
    pub fn take(self: &Arc<Self>, reserve: usize) -> Option<Admission> {
        let available = self.limit.saturating_sub(reserve);
        self.used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                (used < available).then_some(used + 1)
            })
            .ok()
            .map(|_| Admission(Arc::clone(self)))
    }

    /// Descriptors held.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// The part that nodes leave to open files.
    pub fn reserve(&self) -> usize {
        self.limit / 4
    }
}

/// One descriptor's worth of budget, given back when dropped: whoever holds it with the descriptor has it behind that
/// among its fields, so that the descriptor is closed by then.
#[derive(Debug)]
pub struct Admission(Arc<FdBudget>);

impl Drop for Admission {
    fn drop(&mut self) {
        self.0.used.fetch_sub(1, Ordering::Relaxed);
    }
}

fn shard(id: u64) -> usize {
    usize::try_from(id % SHARDS as u64).unwrap_or(0)
}

impl InodeStore {
    /// An empty table for at most `max` nodes, whose descriptors come out of `budget`.
    pub fn new(budget: Arc<FdBudget>, max: usize) -> Self {
        Self {
            by_id: Default::default(),
            by_key: Default::default(),
            hasher: RandomState::new(),
            next_id: AtomicU64::new(ROOT_ID + 1),
            count: AtomicUsize::new(0),
            max,
            budget,
        }
    }

    fn keys(&self, key: &InodeKey) -> MutexGuard<'_, HashMap<InodeKey, Arc<Inode>>> {
        self.by_key[shard(self.hasher.hash_one(key))]
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn ids(&self, id: u64) -> std::sync::RwLockWriteGuard<'_, IdMap<Arc<Inode>>> {
        self.by_id[shard(id)]
            .write()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The node with this id. An id that is unknown was forgotten, detached, or never given out: ESTALE.
    pub fn get(&self, id: u64) -> Result<Arc<Inode>, Errno> {
        self.by_id[shard(id)]
            .read()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .get(&id)
            .cloned()
            .ok_or(Errno::STALE)
    }

    /// Finds or makes the node for `fd`, an O_PATH descriptor whose attributes are `stat`, and counts one lookup.
    pub fn intern(
        &self,
        attachment: &Arc<Attachment>,
        fd: OwnedFd,
        stat: &Statx,
    ) -> Result<Arc<Inode>, Errno> {
        let key = InodeKey {
            attachment: attachment.id,
            mount_id: stat.stx_mnt_id,
            dev: host::device(stat),
            ino: stat.stx_ino,
        };
        let mut keys = self.keys(&key);
        // Checked under the shard's lock: the sweep of a detached attachment comes after.
        if !attachment.is_live() {
            return Err(Errno::STALE);
        }
        if let Some(inode) = keys.get(&key) {
            // A node without a descriptor does not keep its inode number from being used again.
            let same = match &inode.reference {
                Reference::Fd { .. } => true,
                Reference::Handle(handle) => FileHandle::of(fd.as_fd()).as_ref() == Ok(handle),
            };
            if same {
                let lookups = inode.lookups.load(Ordering::Relaxed);
                inode.lookups.store(lookups.saturating_add(1), Ordering::Relaxed);
                return Ok(Arc::clone(inode));
            }
        }
        if self.count.load(Ordering::Relaxed) >= self.max {
            return Err(Errno::NFILE);
        }
        let reference = if let Some(admission) = self.budget.take(self.budget.reserve()) {
            Reference::Fd {
                fd,
                _admission: admission,
            }
        } else if stat.stx_mnt_id == attachment.mount_id {
            Reference::Handle(FileHandle::of(fd.as_fd()).map_err(|_| Errno::NFILE)?)
        } else {
            return Err(Errno::NFILE);
        };
        let inode = Arc::new(Inode {
            id: self.next_id.fetch_add(1, Ordering::Relaxed),
            key,
            kind: FileType::from_raw_mode(stat.stx_mode.into()),
            attachment: Arc::clone(attachment),
            seen: AtomicU64::new(0),
            locks: OwnerLocks::default(),
            write_opens: AtomicU64::new(0),
            reference,
            lookups: AtomicU64::new(1),
        });
        self.count.fetch_add(1, Ordering::Relaxed);
        keys.insert(key, Arc::clone(&inode));
        self.ids(inode.id).insert(inode.id, Arc::clone(&inode));
        Ok(inode)
    }

    /// The next id to give out.
    pub(super) fn next_id(&self) -> u64 {
        self.next_id.load(Ordering::Relaxed)
    }

    /// Gives out no id below `id` any more.
    pub(super) fn skip_to(&self, id: u64) {
        self.next_id.fetch_max(id, Ordering::Relaxed);
    }

    /// Puts a node of a snapshot back under its old id, which [`InodeStore::skip_to`] has skipped. No request may be
    /// under way.
    pub(super) fn restore(
        &self,
        id: u64,
        lookups: u64,
        attachment: &Arc<Attachment>,
        fd: OwnedFd,
        stat: &Statx,
    ) -> Result<(), Errno> {
        let fresh = self.next_id();
        if id <= ROOT_ID || id >= fresh || lookups == 0 || self.get(id).is_ok() {
            return Err(Errno::INVAL);
        }
        self.next_id.store(id, Ordering::Relaxed);
        let inode = self.intern(attachment, fd, stat);
        self.next_id.store(fresh, Ordering::Relaxed);
        let inode = inode?;
        if inode.id != id {
            return Err(Errno::EXIST);
        }
        inode.lookups.store(lookups, Ordering::Relaxed);
        Ok(())
    }

    /// Forgets `count` lookups of a node. `false` if there were not that many.
    pub fn forget(&self, id: u64, count: u64) -> bool {
        let Ok(inode) = self.get(id) else {
            // Forgetting what was detached is no offence.
            return true;
        };
        let mut keys = self.keys(&inode.key);
        let lookups = inode.lookups.load(Ordering::Relaxed);
        let left = lookups.saturating_sub(count);
        inode.lookups.store(left, Ordering::Relaxed);
        if left == 0 {
            if keys.get(&inode.key).is_some_and(|known| known.id == id) {
                keys.remove(&inode.key);
            }
            if self.ids(id).remove(&id).is_some() {
                self.count.fetch_sub(1, Ordering::Relaxed);
            }
        }
        count <= lookups
    }

    /// Drops the nodes that `which` picks.
    pub fn sweep(&self, which: impl Fn(&Inode) -> bool) {
        for keys in &self.by_key {
            let mut keys = keys.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            keys.retain(|_, inode| !which(inode));
        }
        for ids in &self.by_id {
            let mut gone = Vec::new();
            ids.write()
                .unwrap_or_else(|poisoned| poisoned.into_inner())
                .retain(|_, inode| {
                    let keep = !which(inode);
                    if !keep {
                        gone.push(Arc::clone(inode));
                    }
                    keep
                });
            self.count.fetch_sub(gone.len(), Ordering::Relaxed);
            // Closing descriptors can take a while: not under the lock.
            drop(gone);
        }
    }

    /// Nodes known.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// All nodes, for a snapshot.
    pub fn all(&self) -> Vec<Arc<Inode>> {
        let mut all = Vec::with_capacity(self.count());
        for ids in &self.by_id {
            all.extend(
                ids.read()
                    .unwrap_or_else(|poisoned| poisoned.into_inner())
                    .values()
                    .cloned(),
            );
        }
        all.sort_by_key(|inode| inode.id);
        all
    }
}

/// A name from the guest, checked.
pub fn name(bytes: &[u8]) -> Result<CString, Errno> {
    host::check_name(bytes)?;
    CString::new(bytes).map_err(|_| Errno::INVAL)
}
