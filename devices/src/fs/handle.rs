// SPDX-License-Identifier: Apache-2.0
//! Open files and directories.
//!
//! A handle belongs to one node, and its number is only good together with that node's id.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::directory::Listing;
use super::inode::{Admission, FdBudget, IdMap, Inode};

/// An open file or directory.
#[derive(Debug)]
pub struct Handle {
    /// What is open.
    pub inode: Arc<Inode>,
    /// How it was opened on the host.
    pub flags: OFlags,
    /// Where the reading of a directory stands.
    pub listing: Mutex<Listing>,
    file: OwnedFd,
    _admission: Admission,
}

impl Handle {
    /// The open file.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

const SHARDS: usize = 8;

/// The table of handles.
#[derive(Debug)]
pub struct HandleTable {
    shards: [RwLock<IdMap<Arc<Handle>>>; SHARDS],
    next: AtomicU64,
    budget: Arc<FdBudget>,
}

fn shard(fh: u64) -> usize {
    usize::try_from(fh % SHARDS as u64).unwrap_or(0)
}

impl HandleTable {
    /// An empty table, whose descriptors come out of `budget`.
    pub fn new(budget: Arc<FdBudget>) -> Self {
        Self {
            shards: Default::default(),
            next: AtomicU64::new(1),
            budget,
        }
    }

    /// Takes a descriptor out of the budget before a file is opened; ENFILE if there is none.
    pub fn admit(&self) -> Result<Admission, Errno> {
        self.budget.take(0).ok_or(Errno::NFILE)
    }

    /// Adds an open file; returns its number.
    pub fn insert(
        &self,
        admission: Admission,
        inode: Arc<Inode>,
        file: OwnedFd,
        flags: OFlags,
    ) -> Result<u64, Errno> {
        let fh = self.next.fetch_add(1, Ordering::Relaxed);
        self.insert_as(fh, admission, inode, file, flags)?;
        Ok(fh)
    }

    /// The next number to give out.
    pub(super) fn next_number(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    /// Gives out no number below `number` any more.
    pub(super) fn skip_to(&self, number: u64) {
        self.next.fetch_max(number, Ordering::Relaxed);
    }

    /// Adds an open file under the number it had in a snapshot.
    pub(super) fn insert_as(
        &self,
        fh: u64,
        admission: Admission,
        inode: Arc<Inode>,
        file: OwnedFd,
        flags: OFlags,
    ) -> Result<(), Errno> {
        let handle = Arc::new(Handle {
            inode,
            flags,
            listing: Mutex::default(),
            file,
            _admission: admission,
        });
        let mut shard = self.shards[shard(fh)]
            .write()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        // Under the lock: the sweep of a detached attachment comes after.
        if !handle.inode.attachment.is_live() {
            return Err(Errno::STALE);
        }
        shard.insert(fh, handle);
        Ok(())
    }

    /// Handle `fh` of node `nodeid`.
    pub fn get(&self, nodeid: u64, fh: u64) -> Result<Arc<Handle>, Errno> {
        self.shards[shard(fh)]
            .read()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .get(&fh)
            .filter(|handle| handle.inode.id == nodeid)
            .cloned()
            .ok_or(Errno::BADF)
    }

    /// Takes handle `fh` of node `nodeid` out.
    pub fn remove(&self, nodeid: u64, fh: u64) -> Result<Arc<Handle>, Errno> {
        let mut shard = self.shards[shard(fh)]
            .write()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        if shard.get(&fh).is_none_or(|handle| handle.inode.id != nodeid) {
            return Err(Errno::BADF);
        }
        shard.remove(&fh).ok_or(Errno::BADF)
    }

    /// Drops the handles that `which` picks.
    pub fn sweep(&self, which: impl Fn(&Handle) -> bool) {
        for shard in &self.shards {
            let mut gone = Vec::new();
            shard
                .write()
                .unwrap_or_else(|poisoned| poisoned.into_inner())
                .retain(|_, handle| {
                    let keep = !which(handle);
                    if !keep {
                        gone.push(Arc::clone(handle));
                    }
                    keep
                });
            drop(gone);
        }
    }

    /// All handles with their numbers, for a snapshot.
    pub fn all(&self) -> Vec<(u64, Arc<Handle>)> {
        let mut all = Vec::new();
        for shard in &self.shards {
            let shard = shard.read().unwrap_or_else(|poisoned| poisoned.into_inner());
            all.extend(shard.iter().map(|(fh, handle)| (*fh, Arc::clone(handle))));
        }
        all.sort_by_key(|(fh, _)| *fh);
        all
    }
}
