// SPDX-License-Identifier: Apache-2.0
//! What the containers of a VM have of the host's files, each thing attached once.
//!
//! Two containers with the same directory must find the same inodes in the guest: a fifo or a socket that one of them makes is
//! no meeting place for the other otherwise. So what is attached already in the same way is used again, and taken away with
//! the last container that has it.

use super::guest::{Guest, ShareOptions};
use rustix::fs::{AtFlags, StatxFlags};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Tells things of the host apart. While one is attached it is held open, so that its inode number is not another's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    device: (u32, u32),
    inode: u64,
    /// Through which mount: others can show other things below.
    mount: u64,
}

impl Identity {
    fn of(tree: &OwnedFd) -> io::Result<Self> {
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
        let stat = rustix::fs::statx(tree.as_fd(), c"", AtFlags::EMPTY_PATH, wanted)?;
        Ok(Self {
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
            mount: stat.stx_mnt_id,
        })
    }
}

struct Volume {
    name: String,
    identity: Identity,
    options: ShareOptions,
    users: usize,
}

/// See the module.
pub struct Volumes {
    guest: Arc<dyn Guest>,
    attached: Mutex<Vec<Volume>>,
}

impl Volumes {
    /// Nothing is attached yet.
    pub fn new(guest: Arc<dyn Guest>) -> Self {
        Self {
            guest,
            attached: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Volume>> {
        // Every change under it is complete in itself.
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows a directory or file in the shared directory, as `name` unless it is there already. Answers its name.
    ///
    /// # Errors
    /// The descriptor is of no use, or the VM is gone.
    pub fn attach(&self, name: &str, tree: OwnedFd, options: ShareOptions) -> io::Result<String> {
        let identity = Identity::of(&tree)?;
        let mut attached = self.lock();
        let same = |volume: &&mut Volume| volume.identity == identity && volume.options == options;
        if let Some(volume) = attached.iter_mut().find(same) {
            volume.users = volume.users.saturating_add(1);
            return Ok(volume.name.clone());
        }
        self.guest.attach(name, tree, options)?;
        attached.push(Volume {
            name: name.to_owned(),
            identity,
            options,
            users: 1,
        });
        Ok(name.to_owned())
    }

    /// One container has it no more.
    ///
    /// # Errors
    /// It cannot be taken away, or there is none of that name.
    pub fn release(&self, name: &str) -> io::Result<()> {
        let mut attached = self.lock();
        let at = attached.iter().position(|volume| volume.name == name);
        let at = at.ok_or(io::ErrorKind::NotFound)?;
        let volume = &mut attached[at];
        volume.users = volume.users.saturating_sub(1);
        if volume.users > 0 {
            return Ok(());
        }
        attached.swap_remove(at);
        self.guest.detach(name)
    }
}
