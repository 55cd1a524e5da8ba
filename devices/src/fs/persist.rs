// SPDX-License-Identifier: Apache-2.0
//! What a snapshot holds of a file system: what the guest's kernel believes to exist.
//!
//! Node ids and handle numbers live on in the guest's memory, so they must mean the same after a restore. A node is
//! saved as its attachment's name and its path below that, and restored by opening that path as confined as a lookup
//! would. Before `restore` the VMM attaches the same names again; what they refer to may be on another machine. A node
//! that cannot be named (deleted but open, and not kept: `deleted.rs`) or is not there any more is left out: the guest gets
//! ESTALE for it, and EBADF for its handles. Locks that reached the host are not saved: their holders were told so by nobody, so volumes
//! with `remote_locks` must not be used across a restore.

use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::path::DecInt;
use serde::{Deserialize, Serialize};

use super::deleted;
use super::device::WHAT;
use super::host;
use super::inode::Inode;
use super::server::Server;
use crate::state::{SavedState, StateError};

/// Version of [`FsState`].
const STATE_VERSION: u16 = 2;

#[derive(Debug, Serialize, Deserialize)]
struct FsState {
    tag: String,
    features: u64,
    /// The next numbers to give out: also those of what could not be saved are never used again.
    next_node: u64,
    next_handle: u64,
    nodes: Vec<NodeState>,
    handles: Vec<HandleState>,
    mappings: Vec<MappingState>,
}

#[derive(Debug, Serialize, Deserialize)]
struct NodeState {
    id: u64,
    lookups: u64,
    attachment: Vec<u8>,
    /// Below the attachment; empty for itself.
    path: Vec<u8>,
    /// Its type, as in st_mode.
    kind: u32,
    /// The path is that of a copy of it, which goes once it is open: it has been deleted.
    deleted: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct HandleState {
    fh: u64,
    nodeid: u64,
    flags: u32,
}

#[derive(Debug, Serialize, Deserialize)]
struct MappingState {
    window_offset: u64,
    len: u64,
    nodeid: u64,
    file_offset: u64,
    writable: bool,
}

impl Server {
    /// Where `fd` is, as the host's kernel sees it.
    fn path(&self, fd: BorrowedFd<'_>) -> Result<PathBuf, Errno> {
        let path = rustix::fs::readlinkat(self.proc().dir(), DecInt::from_fd(fd), Vec::new())?;
        Ok(PathBuf::from(OsStr::from_bytes(path.as_bytes())))
    }

    /// A node's path below its attachment, if that path leads to it.
    fn path_below(&self, inode: &Inode) -> Option<Vec<u8>> {
        let root = self.path(inode.attachment.fd()).ok()?;
        let node = self.path(inode.fd(self.proc()).ok()?.as_fd()).ok()?;
        let below: &Path = node.strip_prefix(&root).ok()?;
        let path = below.as_os_str().as_bytes().to_owned();
        let found = self
            .open_beneath(&inode.attachment, &CString::new(path.clone()).ok()?)
            .ok()?;
        let stat = host::stat(found.as_fd()).ok()?;
        (stat.stx_ino == inode.key.ino && host::device(&stat) == inode.key.dev).then_some(path)
    }

    /// The state of nodes, handles and mappings. Call while no request is under way.
    pub(super) fn save(&self) -> Result<SavedState, StateError> {
        let node = |inode: &Inode| {
            let copy = self.copies().of(inode.id);
            Some(NodeState {
                id: inode.id,
                lookups: inode.lookups(),
                attachment: inode.attachment.name.clone(),
                deleted: copy.is_some(),
                path: copy.or_else(|| self.path_below(inode))?,
                kind: inode.kind.as_raw_mode(),
            })
        };
        let nodes = self.inodes().all();
        let handles = self.handles().all();
        let mappings = self.window().map(|window| window.all()).unwrap_or_default();
        let state = FsState {
            tag: self.config().tag.clone(),
            features: self.features(),
            next_node: self.inodes().next_id(),
            next_handle: self.handles().next_number(),
            nodes: nodes.iter().filter_map(|inode| node(inode)).collect(),
            handles: handles
                .iter()
                .map(|(fh, handle)| HandleState {
                    fh: *fh,
                    nodeid: handle.inode.id,
                    flags: handle.flags.bits(),
                })
                .collect(),
            mappings: mappings
                .iter()
                .filter_map(|(window_offset, mapping)| {
                    let source = mapping.source?;
                    Some(MappingState {
                        window_offset: *window_offset,
                        len: mapping.len,
                        nodeid: source.nodeid,
                        file_offset: source.file_offset,
                        writable: source.writable,
                    })
                })
                .collect(),
        };
        SavedState::encode(WHAT, STATE_VERSION, &state)
    }

    /// Puts back what `save` gave. The attachments are there already.
    pub(super) fn restore(&self, saved: &SavedState) -> Result<(), StateError> {
        let invalid = |why: String| StateError::Invalid { what: WHAT, why };
        let state: FsState = saved.decode(WHAT, STATE_VERSION)?;
        if state.tag != self.config().tag {
            return Err(invalid(format!("its tag is {:?}", state.tag)));
        }
        if !self.knows_features(state.features) {
            return Err(invalid("it has features that this file system lacks".to_owned()));
        }
        if state.nodes.len() > self.config().max_nodes {
            return Err(invalid(format!("it has {} nodes", state.nodes.len())));
        }
        // Numbers that could run out in the guest's lifetime are not from a snapshot of ours.
        if state.next_node.max(state.next_handle) > u64::MAX / 2 {
            return Err(invalid("its numbers are used up".to_owned()));
        }
        // How files are opened depends on them.
        self.set_features(state.features);
        self.inodes().skip_to(state.next_node);
        self.handles().skip_to(state.next_handle);
        for node in &state.nodes {
            match self.restore_node(node) {
                // Not there any more, or another thing by now: stale for the guest.
                Ok(()) | Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV | Errno::STALE) => {}
                Err(errno) => {
                    return Err(invalid(format!("node {} cannot be restored: {errno}", node.id)));
                }
            }
        }
        for handle in &state.handles {
            // As above; a read-only attachment that was writable before refuses its writers.
            let _ = self.restore_handle(handle);
        }
        if let Some(window) = self.window() {
            for mapping in &state.mappings {
                if let Ok(inode) = self.inodes().get(mapping.nodeid) {
                    let at = mapping.window_offset;
                    let _ = self.map(
                        window,
                        &inode,
                        at,
                        mapping.len,
                        mapping.file_offset,
                        mapping.writable,
                    );
                }
            }
        } else if !state.mappings.is_empty() {
            return Err(invalid("it has mappings, but there is no window".to_owned()));
        }
        for node in state.nodes.iter().filter(|node| node.deleted) {
            self.forget_copy(node);
        }
        Ok(())
    }

    fn restore_node(&self, node: &NodeState) -> Result<(), Errno> {
        let attachment = self.root().get(&node.attachment).ok_or(Errno::STALE)?;
        let path = CString::new(node.path.clone()).map_err(|_| Errno::INVAL)?;
        let fd = self.open_beneath(&attachment, &path)?;
        let stat = host::stat(fd.as_fd())?;
        if FileType::from_raw_mode(stat.stx_mode.into()) != FileType::from_raw_mode(node.kind) {
            return Err(Errno::STALE);
        }
        self.inodes()
            .restore(node.id, node.lookups, &attachment, fd, &stat)
    }

    /// Takes away the name of a copy that has been opened.
    fn forget_copy(&self, node: &NodeState) {
        let attachment = self.root().get(&node.attachment);
        let writable = attachment.filter(|attachment| !attachment.options.read_only);
        if let Some(attachment) = writable
            && deleted::is_copy(&node.path)
            && let Ok(path) = CString::new(node.path.clone())
        {
            deleted::remove(&attachment, &path);
        }
    }

    fn restore_handle(&self, handle: &HandleState) -> Result<(), Errno> {
        let inode = self.inodes().get(handle.nodeid)?;
        let admission = self.handles().admit()?;
        let flags = OFlags::from_bits_retain(handle.flags);
        let file = if inode.kind == FileType::Directory {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY;
            self.proc()
                .reopen(inode.fd(self.proc())?.as_fd(), flags, Mode::empty())?
        } else {
            let flags = self.host_flags(flags.bits())? - OFlags::TRUNC;
            self.open_file(&inode, flags, false)?
        };
        self.handles().insert_as(handle.fh, admission, inode, file, flags)
    }
}
