// SPDX-License-Identifier: Apache-2.0
//! Files that are open and have no name any more: for a snapshot they get one, as copies beside everything else.
//!
//! ```text
//!  keep_deleted(): /.cloister-open-<node id>, a copy of each ──▶ save() names that one ──▶ Kept is dropped: copies gone
//!                                                                     │
//!                                      restore() opens it, and takes the name away once its handles are there
//! ```
//!
//! That is for attachments whose files go with the snapshot, such as the root file system of a container. In others, as in
//! read-only ones, such a file stays without a name, and answers ESTALE once it is restored.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, SeekFrom, Uid};
use rustix::io::Errno;

use super::host;
use super::root::Attachment;
use super::server::Server;

/// What the copies' names begin with.
const PREFIX: &str = ".cloister-open-";

/// The copies that there are at the moment, by node id: paths below the node's attachment.
#[derive(Debug, Default)]
pub(super) struct Copies(Mutex<HashMap<u64, (Arc<Attachment>, CString)>>);

impl Copies {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, (Arc<Attachment>, CString)>> {
        // Every change is complete in itself.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The path of a node's copy below its attachment.
    pub(super) fn of(&self, node: u64) -> Option<Vec<u8>> {
        self.lock().get(&node).map(|(_, path)| path.as_bytes().to_vec())
    }
}

/// The copies of deleted files, until it is dropped.
#[derive(Debug)]
pub struct Kept {
    server: Arc<Server>,
}

impl Drop for Kept {
    fn drop(&mut self) {
        for (_, (attachment, path)) in self.server.copies().lock().drain() {
            remove(&attachment, &path);
        }
    }
}

/// Takes the name of a copy away.
pub(super) fn remove(attachment: &Attachment, path: &CString) {
    if let Err(errno) = rustix::fs::unlinkat(attachment.fd(), path.as_c_str(), AtFlags::empty()) {
        log::warn!(
            "the copy {path:?} of a deleted file stays in {:?}: {errno}",
            String::from_utf8_lossy(&attachment.name)
        );
    }
}

/// Whether a snapshot's path may be that of a copy.
pub(super) fn is_copy(path: &[u8]) -> bool {
    path.starts_with(PREFIX.as_bytes()) && !path.contains(&b'/')
}

impl Server {
    /// Gives copies to the deleted files that are open in the attachments that `goes_along` picks by name. No request may be
    /// under way until the answer is dropped, and one only at a time.
    ///
    /// # Errors
    /// A file cannot be read, or its copy not be written; there are no copies then.
    pub(super) fn keep_deleted(self: &Arc<Self>, goes_along: impl Fn(&str) -> bool) -> io::Result<Kept> {
        let kept = Kept {
            server: Arc::clone(self),
        };
        for (_, handle) in self.handles().all() {
            let (inode, attachment) = (&handle.inode, &handle.inode.attachment);
            let along = std::str::from_utf8(&attachment.name).is_ok_and(&goes_along);
            if inode.kind != FileType::RegularFile
                || !along
                || attachment.options.read_only
                || self.copies().of(inode.id).is_some()
                || host::stat(handle.file())?.stx_nlink > 0
            {
                continue;
            }
            let path = CString::new(format!("{PREFIX}{}", inode.id))?;
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let copy = rustix::fs::openat2(
                attachment.fd(),
                path.as_c_str(),
                flags,
                Mode::RUSR | Mode::WUSR,
                host::beneath(),
            )?;
            self.copies()
                .lock()
                .insert(inode.id, (Arc::clone(attachment), path));
            // It may be open for writing only.
            let from = self.proc().reopen(handle.file(), OFlags::RDONLY, Mode::empty())?;
            copy_all(File::from(from), File::from(copy))?;
        }
        Ok(kept)
    }
}

/// Holes stay holes: a guest makes a file of any length at no cost.
fn copy_content(from: &File, to: &File, length: u64) -> io::Result<()> {
    to.set_len(length)?;
    let mut at = 0;
    while at < length {
        let start = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            // Nothing but a hole is left.
            Err(Errno::NXIO) => return Ok(()),
            start => start?,
        };
        let end = rustix::fs::seek(from, SeekFrom::Hole(start))?.min(length);
        rustix::fs::seek(from, SeekFrom::Start(start))?;
        rustix::fs::seek(to, SeekFrom::Start(start))?;
        io::copy(&mut from.take(end.saturating_sub(start)), &mut { to })?;
        // A file system that made no progress would keep us here.
        at = end.max(at.saturating_add(1));
    }
    Ok(())
}

fn copy_all(from: File, to: File) -> io::Result<()> {
    let data = from.metadata()?;
    copy_content(&from, &to, data.len())?;
    let (owner, group) = (Uid::from_raw(data.uid()), Gid::from_raw(data.gid()));
    // Not every file system has owners.
    match rustix::fs::fchown(to.as_fd(), Some(owner), Some(group)) {
        Ok(()) | Err(Errno::PERM | Errno::OPNOTSUPP) => {}
        Err(errno) => return Err(errno.into()),
    }
    to.set_permissions(std::fs::Permissions::from_mode(data.mode() & 0o7777))?;
    let times = std::fs::FileTimes::new()
        .set_accessed(data.accessed()?)
        .set_modified(data.modified()?);
    to.set_times(times)
}
