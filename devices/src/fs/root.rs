// SPDX-License-Identifier: Apache-2.0
//! The root directory that the guest mounts: a synthetic directory whose entries are attached host directories or
//! files.
//!
//! ```text
//!  attach() ──▶ live ──detach()──▶ dead: the name is gone, nodes and handles below it answer ESTALE, and their
//!                                  descriptors are closed, so that the host can unmount what was attached
//! ```
//!
//! virtio-fs has no way to tell the guest about a change, and needs none: that a name does not exist is never cached, so
//! a new one shows at once; a node that went answers ESTALE, upon which Linux looks its name up again.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, RwLock};
use std::time::Duration;

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use super::host::{self, ProcFd};

/// How long the guest may believe what it was told about names, attributes and data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CachePolicy {
    /// For a while: one second for names and attributes; data as long as size and time stamps stay the same.
    /// For what others may change as well.
    #[default]
    Auto,
    /// For ever. Only for what no one but this guest changes.
    Always,
    /// Not at all: every access asks, data bypasses the guest's page cache.
    Never,
}

impl CachePolicy {
    pub(super) fn timeout(self) -> Duration {
        match self {
            Self::Auto => Duration::from_secs(1),
            Self::Always => Duration::from_secs(86_400),
            Self::Never => Duration::ZERO,
        }
    }
}

/// How a directory or file is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttachOptions {
    /// Nothing below it can be changed: every request that would is refused here, and where the host allows
    /// (`private_mount`) by the host kernel as well.
    pub read_only: bool,
    /// How long the guest may cache.
    pub cache: CachePolicy,
    /// Whether the guest may create device nodes. Nothing here ever opens one; but they are real on the host.
    pub device_nodes: bool,
    /// Reach the tree through a private clone of its mount, with `nodev`, `nosuid` and (if so) read-only set by the
    /// kernel. Needs CAP_SYS_ADMIN and is left out where the host refuses it. Mounts that the host makes below the
    /// tree later do not appear in it.
    pub private_mount: bool,
    /// Have the guest map larger files through the DAX window, where the file system has one and the guest did not
    /// mount with `dax=never`. Only for what nobody but this guest changes: when something else cuts a mapped file
    /// short, the guest's next access to what was cut off ends that guest, or never completes (`dax.rs`).
    pub dax: bool,
}

impl Default for AttachOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            cache: CachePolicy::Auto,
            device_nodes: true,
            private_mount: true,
            dax: false,
        }
    }
}

/// Why something could not be attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Not a file name.
    #[error("{0:?} cannot be a name in a shared directory: give 1 to 255 bytes without '/', not '.' or '..'")]
    Name(String),
    /// The name is taken.
    #[error("{0:?} is attached already: detach it first or take another name")]
    Exists(String),
    /// There is no such entry.
    #[error("{0:?} is not attached")]
    Missing(String),
    /// Neither a directory nor a regular file.
    #[error("{0:?} cannot be attached: only directories and regular files can")]
    Type(String),
    /// The host refused.
    #[error("{name:?} cannot be attached: {what}")]
    Host {
        /// The entry's name.
        name: String,
        /// What was tried.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: std::io::Error,
    },
}

/// An attached directory or file.
#[derive(Debug)]
pub struct Attachment {
    /// Never used again for another.
    pub id: u32,
    /// Its name in the root.
    pub name: Vec<u8>,
    /// How it is attached.
    pub options: AttachOptions,
    /// Directory or regular file.
    pub kind: FileType,
    /// The mount that `fd` is on.
    pub mount_id: u64,
    live: AtomicBool,
    fd: OwnedFd,
    mount: OnceLock<OwnedFd>,
}

impl Attachment {
    /// A descriptor on its mount that host file handles can be opened with (an O_PATH one does not do).
    pub fn mount(&self, proc: &ProcFd) -> Result<BorrowedFd<'_>, Errno> {
        if let Some(mount) = self.mount.get() {
            return Ok(mount.as_fd());
        }
        if self.kind != FileType::Directory {
            return Err(Errno::OPNOTSUPP);
        }
        let mount = proc.reopen(self.fd(), OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())?;
        Ok(self.mount.get_or_init(|| mount).as_fd())
    }

    /// Whether it is attached still.
    pub fn is_live(&self) -> bool {
        self.live.load(Ordering::Acquire)
    }

    /// Its O_PATH descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The root directory.
#[derive(Debug)]
pub struct Root {
    entries: RwLock<Entries>,
    devices: RwLock<HashMap<u64, u16>>,
    changes: AtomicU64,
}

#[derive(Debug, Default)]
struct Entries {
    by_name: BTreeMap<Vec<u8>, Arc<Attachment>>,
    by_id: BTreeMap<u32, Arc<Attachment>>,
    last_id: u32,
}

impl Root {
    /// An empty directory.
    pub fn new() -> Self {
        Self {
            entries: RwLock::default(),
            devices: RwLock::default(),
            changes: AtomicU64::new(0),
        }
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Entries> {
        self.entries
            .read()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Entries> {
        self.entries
            .write()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Adds an entry for what `fd` refers to.
    pub fn attach(
        &self,
        name: &str,
        fd: &OwnedFd,
        options: AttachOptions,
    ) -> Result<Arc<Attachment>, AttachError> {
        if host::check_name(name.as_bytes()).is_err() {
            return Err(AttachError::Name(name.to_owned()));
        }
        let refused = |what| {
            move |errno: Errno| AttachError::Host {
                name: name.to_owned(),
                what,
                source: errno.into(),
            }
        };
        let fd = match options
            .private_mount
            .then(|| host::private_mount(fd.as_fd(), options.read_only))
        {
            Some(Ok(fd)) => fd,
            // Every request is checked here in any case; the mount is the second line.
            Some(Err(Errno::PERM | Errno::INVAL | Errno::NOSYS)) | None => {
                host::reopen_as_path(fd.as_fd()).map_err(refused("its descriptor cannot be reopened"))?
            }
            Some(Err(errno)) => return Err(refused("its mount cannot be cloned")(errno)),
        };
        let stat = host::stat(fd.as_fd()).map_err(refused("its attributes cannot be read"))?;
        let kind = FileType::from_raw_mode(stat.stx_mode.into());
        if !matches!(kind, FileType::Directory | FileType::RegularFile) {
            return Err(AttachError::Type(name.to_owned()));
        }
        let mut entries = self.write();
        if entries.by_name.contains_key(name.as_bytes()) {
            return Err(AttachError::Exists(name.to_owned()));
        }
        // Four thousand million attachments in one cell's life do not happen; if they did, none would be confused.
        let id = entries.last_id.checked_add(1).ok_or(Errno::OVERFLOW);
        let id = id.map_err(refused("too many attachments"))?;
        entries.last_id = id;
        let attachment = Arc::new(Attachment {
            id,
            name: name.as_bytes().to_owned(),
            options,
            kind,
            mount_id: stat.stx_mnt_id,
            live: AtomicBool::new(true),
            fd,
            mount: OnceLock::new(),
        });
        entries
            .by_name
            .insert(attachment.name.clone(), Arc::clone(&attachment));
        entries.by_id.insert(id, Arc::clone(&attachment));
        drop(entries);
        self.changes.fetch_add(1, Ordering::Relaxed);
        Ok(attachment)
    }

    /// Takes an entry away. The caller sweeps nodes, handles and mappings.
    pub fn detach(&self, name: &str) -> Result<Arc<Attachment>, AttachError> {
        let mut entries = self.write();
        let attachment = entries
            .by_name
            .remove(name.as_bytes())
            .ok_or_else(|| AttachError::Missing(name.to_owned()))?;
        entries.by_id.remove(&attachment.id);
        attachment.live.store(false, Ordering::Release);
        drop(entries);
        self.changes.fetch_add(1, Ordering::Relaxed);
        Ok(attachment)
    }

    /// The entry called `name`.
    pub fn get(&self, name: &[u8]) -> Option<Arc<Attachment>> {
        self.read().by_name.get(name).cloned()
    }

    /// The entries with ids above `id`, in order of their ids: ids serve as directory offsets, so that a listing
    /// stays whole while entries come and go.
    pub fn after(&self, id: u64) -> Vec<Arc<Attachment>> {
        let Some(first) = id.checked_add(1).and_then(|id| u32::try_from(id).ok()) else {
            return Vec::new();
        };
        self.read()
            .by_id
            .range(first..)
            .map(|(_, entry)| Arc::clone(entry))
            .collect()
    }

    /// All entries.
    pub fn all(&self) -> Vec<Arc<Attachment>> {
        self.after(0)
    }

    /// How often entries have come or gone; shown as the root's modification time.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }

    /// The inode number to show the guest. All attachments appear as one file system there, so numbers of different
    /// host devices must not meet: the top 16 bits tell the device.
    pub fn guest_ino(&self, dev: u64, ino: u64) -> u64 {
        if ino >> 48 != 0 {
            return ino;
        }
        let known = self
            .devices
            .read()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .get(&dev)
            .copied();
        let index = known.unwrap_or_else(|| {
            let mut devices = self
                .devices
                .write()
                .unwrap_or_else(|poisoned| poisoned.into_inner());
            // Beyond 65,534 devices numbers may meet: two files could look like links of one another.
            let next = u16::try_from(devices.len()).unwrap_or(u16::MAX - 1);
            *devices.entry(dev).or_insert(next)
        });
        // The first device's numbers show unchanged, except that the root's own number stays unique.
        if index == 0 && ino == super::abi::ROOT_ID {
            return u64::from(u16::MAX) << 48 | ino;
        }
        u64::from(index) << 48 | ino
    }
}

impl Default for Root {
    fn default() -> Self {
        Self::new()
    }
}
