// SPDX-License-Identifier: Apache-2.0
//! The DAX window: host files mapped where the guest can touch them (virtio 1.3, section 5.11.6.4).
//!
//! The window is one reserved range of this process's address space, PROT_NONE at first, that the VMM gives to KVM as
//! a memory slot. SETUPMAPPING maps a part of a file over a part of it, REMOVEMAPPING makes it inaccessible again.
//! KVM follows by itself (MMU notifiers).
//!
//! What a guest can do wrong there hurts only itself: an access to what is not mapped, a write to a read-only mapping,
//! an access beyond the end of a file that was truncated on the host all make KVM_RUN return EFAULT on its own vCPU,
//! and the cell stops with a reason; or the access is tried for ever (seen with a 6.1 host, whose KVM waits for the page
//! and tries again, whether or not the guest takes asynchronous page faults). They cannot raise a signal here because
//! nothing in this process ever touches the window: it is not part of `GuestRam`, so no descriptor can point to it.
//!
//! A read-only attachment's files are mapped PROT_READ from descriptors that are open for reading only: no write can
//! reach them, whatever the guest does. When an attachment goes, its mappings become read-only zeros.
//!
//! On an overlay, opening a file for writing copies it up, and what was mapped before shows the lower file for ever.
//! So whenever a node is opened for writing, its read-only mappings are mapped anew from a descriptor opened after
//! that ([`DaxWindow::renew`]), before anything is written. A mapping that is made at the same time notices by the
//! node's count of such opens.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard};

use rustix::io::Errno;

use super::host;

/// Alignment of mappings, in bytes: the host's page size, told to the guest as its logarithm.
pub const ALIGNMENT: u64 = 4096;

/// What Linux maps at a time, in bytes (FUSE_DAX_SZ).
const RANGE: u64 = 2 << 20;

/// Mappings that even the smallest window takes.
const MIN_MAPPINGS: u64 = 16;

/// Smallest file, in bytes, that a guest is told to map (FUSE_ATTR_DAX): Linux maps 2 MiB at a time, so a smaller one
/// would waste most of its part of the window.
pub const MIN_FILE: u64 = 1 << 20;

/// A mapping in the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Its length.
    pub len: u64,
    /// What it shows; `None` once that was detached.
    pub source: Option<MapSource>,
}

/// What a mapping shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapSource {
    /// Whose file it is.
    pub attachment: u32,
    /// The node.
    pub nodeid: u64,
    /// Where the mapping begins in the file.
    pub file_offset: u64,
    /// Whether the guest may write.
    pub writable: bool,
}

/// A reserved range of this process's address space for file mappings.
#[derive(Debug)]
pub struct DaxWindow {
    base: usize,
    len: u64,
    mappings: Mutex<BTreeMap<u64, Mapping>>,
}

/// What SETUPMAPPING asks for, with the file to map.
#[derive(Debug)]
pub struct MapRequest<'a> {
    /// The file, open for reading (and writing, if `writable`).
    pub file: BorrowedFd<'a>,
    /// Where it begins in the window.
    pub window_offset: u64,
    /// Its length.
    pub len: u64,
    /// What of the file, and how.
    pub source: MapSource,
}

impl DaxWindow {
    /// Reserves `len` bytes, a multiple of the page size.
    pub fn new(len: u64) -> std::io::Result<Self> {
        let size = usize::try_from(len).ok();
        let Some(size) = size.filter(|size| *size > 0 && len.is_multiple_of(ALIGNMENT)) else {
            return Err(std::io::Error::from(std::io::ErrorKind::InvalidInput));
        };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), size, libc::PROT_NONE, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        Ok(Self {
            base: base.addr(),
            len,
            mappings: Mutex::default(),
        })
    }

    /// Where the window is in this process, to make a KVM memory slot of it.
    pub fn host_address(&self) -> u64 {
        self.base as u64
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Never: a window has at least one page.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The mappings now in it, with their places.
    pub(super) fn all(&self) -> Vec<(u64, Mapping)> {
        let mappings = self.mappings();
        mappings
            .iter()
            .map(|(offset, mapping)| (*offset, *mapping))
            .collect()
    }

    fn mappings(&self) -> MutexGuard<'_, BTreeMap<u64, Mapping>> {
        self.mappings
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Checks that a range is aligned, not empty, and inside of the window.
    fn check(&self, offset: u64, len: u64) -> Result<(), Errno> {
        let end = offset.checked_add(len).ok_or(Errno::INVAL)?;
        if len == 0 || !offset.is_multiple_of(ALIGNMENT) || !len.is_multiple_of(ALIGNMENT) || end > self.len {
            return Err(Errno::INVAL);
        }
        Ok(())
    }

    /// Maps over a checked part of the window.
    fn place(
        &self,
        offset: u64,
        len: u64,
        protection: libc::c_int,
        file: Option<(BorrowedFd<'_>, u64)>,
    ) -> Result<(), Errno> {
        self.check(offset, len)?;
        let offset = usize::try_from(offset).map_err(|_| Errno::INVAL)?;
        let len = usize::try_from(len).map_err(|_| Errno::INVAL)?;
        let (kind, fd, at) = match file {
            Some((file, at)) => {
                let at = i64::try_from(at).map_err(|_| Errno::INVAL)?;
                (libc::MAP_SHARED, file.as_raw_fd(), at)
            }
            None => (
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            ),
        };
        let address = std::ptr::without_provenance_mut(self.base + offset);
        // SAFETY: the range lies inside of the window (checked above), which this object owns, and nothing in this
        // process refers to memory there.
        let mapped = unsafe { libc::mmap(address, len, protection, kind | libc::MAP_FIXED, fd, at) };
        if mapped == libc::MAP_FAILED {
            return Err(host::last_errno());
        }
        Ok(())
    }

    /// How many mappings it takes: what Linux needs. The host's kernel allows a process a number of mappings
    /// (vm.max_map_count) that all cells share, and a guest that maps single pages would use them up.
    fn max_mappings(&self) -> usize {
        usize::try_from((self.len / RANGE).max(MIN_MAPPINGS)).unwrap_or(usize::MAX)
    }

    /// Maps a part of a file. It may replace what is mapped there (the guest upgrades a mapping to a writable one
    /// so), but only exactly: a mapping that is cut through is refused. ENOSPC if there are too many.
    pub fn map(&self, request: &MapRequest<'_>) -> Result<(), Errno> {
        self.check(request.window_offset, request.len)?;
        let file_offset = request.source.file_offset;
        if !file_offset.is_multiple_of(ALIGNMENT) || file_offset.checked_add(request.len).is_none() {
            return Err(Errno::INVAL);
        }
        let mut mappings = self.mappings();
        overlapping(&mappings, request.window_offset, request.len)?;
        let end = request.window_offset + request.len;
        let replaced = mappings.range(request.window_offset..end).count();
        if mappings.len() - replaced >= self.max_mappings() {
            return Err(Errno::NOSPC);
        }
        let protection = libc::PROT_READ
            | if request.source.writable {
                libc::PROT_WRITE
            } else {
                0
            };
        let file = Some((request.file, request.source.file_offset));
        self.place(request.window_offset, request.len, protection, file)?;
        mappings.retain(|offset, _| *offset < request.window_offset || *offset >= end);
        let mapping = Mapping {
            len: request.len,
            source: Some(request.source),
        };
        mappings.insert(request.window_offset, mapping);
        Ok(())
    }

    /// Makes a part of the window inaccessible. It must not cut a mapping through.
    pub fn unmap(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.check(offset, len)?;
        let mut mappings = self.mappings();
        overlapping(&mappings, offset, len)?;
        self.place(offset, len, libc::PROT_NONE, None)?;
        mappings.retain(|start, _| *start < offset || *start >= offset + len);
        Ok(())
    }

    /// Whether read-only mappings show the node.
    pub fn has_readers(&self, nodeid: u64) -> bool {
        self.mappings()
            .values()
            .any(|mapping| reader(mapping, nodeid).is_some())
    }

    /// Replaces the node's read-only mappings by the same parts of `file`, open for reading.
    pub fn renew(&self, nodeid: u64, file: BorrowedFd<'_>) -> Result<(), Errno> {
        let mappings = self.mappings();
        for (offset, mapping) in mappings.iter() {
            if let Some(source) = reader(mapping, nodeid) {
                let file = Some((file, source.file_offset));
                self.place(*offset, mapping.len, libc::PROT_READ, file)?;
            }
        }
        Ok(())
    }

    /// Makes everything inaccessible.
    pub fn clear(&self) {
        let mut mappings = self.mappings();
        // Replacing a mapping by an anonymous one can only fail for want of kernel memory; then the file stays mapped
        // and recorded.
        mappings.retain(|offset, mapping| self.place(*offset, mapping.len, libc::PROT_NONE, None).is_err());
    }

    /// Replaces the mappings of an attachment that goes away: read-only zeros, which cost no memory.
    pub fn detach(&self, attachment: u32) {
        let mut mappings = self.mappings();
        for (offset, mapping) in mappings.iter_mut() {
            if mapping
                .source
                .is_some_and(|source| source.attachment == attachment)
                && self.place(*offset, mapping.len, libc::PROT_READ, None).is_ok()
            {
                mapping.source = None;
            }
        }
    }
}

/// What a mapping shows, if that is the node and it is read-only.
fn reader(mapping: &Mapping, nodeid: u64) -> Option<MapSource> {
    mapping
        .source
        .filter(|source| source.nodeid == nodeid && !source.writable)
}

/// Fails if a mapping lies across a border of the range.
fn overlapping(mappings: &BTreeMap<u64, Mapping>, offset: u64, len: u64) -> Result<(), Errno> {
    let end = offset + len;
    let before = mappings.range(..offset).next_back();
    if before.is_some_and(|(start, mapping)| start + mapping.len > offset) {
        return Err(Errno::INVAL);
    }
    let last = mappings.range(offset..end).next_back();
    if last.is_some_and(|(start, mapping)| start + mapping.len > end) {
        return Err(Errno::INVAL);
    }
    Ok(())
}

impl Drop for DaxWindow {
    fn drop(&mut self) {
        // `len` was a usize when the window was made.
        let len = usize::try_from(self.len).unwrap_or(0);
        // SAFETY: the window is this object's own, and its KVM slot is gone before the VMM drops it.
        unsafe { libc::munmap(std::ptr::without_provenance_mut(self.base), len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;

    const PAGE: u64 = ALIGNMENT;

    /// Reads a byte of the window through the kernel: an inaccessible one is EFAULT, not a signal.
    fn peek(window: &DaxWindow, offset: u64) -> Result<u8, Errno> {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let address = std::ptr::without_provenance::<libc::c_void>(
            usize::try_from(window.host_address() + offset).unwrap(),
        );
        // SAFETY: the kernel checks the address.
        let written = unsafe { libc::write(writer.as_raw_fd(), address, 1) };
        if written != 1 {
            return Err(host::last_errno());
        }
        let mut byte = [0u8];
        rustix::io::read(reader, &mut byte).unwrap();
        Ok(byte[0])
    }

    fn request(file: &std::fs::File, file_page: u64, window_page: u64, pages: u64) -> MapRequest<'_> {
        MapRequest {
            file: file.as_fd(),
            window_offset: window_page * PAGE,
            len: pages * PAGE,
            source: MapSource {
                attachment: 7,
                nodeid: 2,
                file_offset: file_page * PAGE,
                writable: false,
            },
        }
    }

    #[test]
    fn map_read_unmap() {
        let directory = crate::fs::testing::TempDir::new();
        let mut file = std::fs::File::create_new(directory.path().join("f")).unwrap();
        for page in 0..4u8 {
            file.write_all(&[page + 1; 4096]).unwrap();
        }
        let file = std::fs::File::open(directory.path().join("f")).unwrap();
        let window = DaxWindow::new(16 * PAGE).unwrap();
        assert_eq!(peek(&window, 0), Err(Errno::FAULT));
        window.map(&request(&file, 1, 2, 2)).unwrap();
        assert_eq!(peek(&window, 2 * PAGE), Ok(2));
        assert_eq!(peek(&window, 3 * PAGE), Ok(3));
        assert_eq!(peek(&window, 4 * PAGE), Err(Errno::FAULT));
        // Beyond the file's end the kernel raises no signal on an access of its own, as KVM's are.
        window.map(&request(&file, 3, 8, 2)).unwrap();
        assert_eq!(peek(&window, 9 * PAGE), Err(Errno::FAULT));
        // The whole mapping again is an upgrade; a part of it is not.
        window.map(&request(&file, 0, 2, 2)).unwrap();
        assert_eq!(peek(&window, 2 * PAGE), Ok(1));
        for (page, pages) in [(1, 2), (3, 2), (3, 1), (2, 1)] {
            assert_eq!(
                window.map(&request(&file, 0, page, pages)),
                Err(Errno::INVAL),
                "{page}"
            );
            assert_eq!(
                window.unmap(page * PAGE, pages * PAGE),
                Err(Errno::INVAL),
                "{page}"
            );
        }
        window.detach(7);
        assert_eq!(peek(&window, 2 * PAGE), Ok(0));
        window.unmap(0, 16 * PAGE).unwrap();
        assert_eq!(window.all(), []);
        assert_eq!(peek(&window, 2 * PAGE), Err(Errno::FAULT));
    }

    #[test]
    fn a_guest_that_maps_single_pages_does_not_use_up_the_processs_mappings() {
        let directory = crate::fs::testing::TempDir::new();
        std::fs::write(directory.path().join("f"), [1; 4096]).unwrap();
        let file = std::fs::File::open(directory.path().join("f")).unwrap();
        let window = DaxWindow::new(256 * PAGE).unwrap();
        for page in 0..MIN_MAPPINGS {
            window.map(&request(&file, 0, 2 * page, 1)).unwrap();
        }
        assert_eq!(window.map(&request(&file, 0, 200, 1)), Err(Errno::NOSPC));
        // What replaces another is none more, and what goes makes room.
        window.map(&request(&file, 0, 0, 1)).unwrap();
        window.unmap(0, PAGE).unwrap();
        window.map(&request(&file, 0, 200, 1)).unwrap();
        assert_eq!(DaxWindow::new(64 * RANGE).unwrap().max_mappings(), 64);
    }

    #[test]
    fn nothing_outside_of_the_window_is_touched() {
        let directory = crate::fs::testing::TempDir::new();
        std::fs::write(directory.path().join("f"), [1; 4096]).unwrap();
        let file = std::fs::File::open(directory.path().join("f")).unwrap();
        let window = DaxWindow::new(4 * PAGE).unwrap();
        for (offset, len) in [
            (0, 0),
            (0, 5 * PAGE),
            (4 * PAGE, PAGE),
            (3 * PAGE, 2 * PAGE),
            (u64::MAX - PAGE + 1, PAGE),
            (u64::MAX, u64::MAX),
            (1, PAGE),
            (0, PAGE + 1),
        ] {
            let map = MapRequest {
                window_offset: offset,
                len,
                ..request(&file, 0, 0, 1)
            };
            assert_eq!(window.map(&map), Err(Errno::INVAL), "map {offset:#x} {len:#x}");
            assert_eq!(
                window.unmap(offset, len),
                Err(Errno::INVAL),
                "unmap {offset:#x} {len:#x}"
            );
        }
        for file_offset in [1, u64::MAX - PAGE + 1, 1 << 63] {
            let mut map = request(&file, 0, 0, 1);
            map.source.file_offset = file_offset;
            assert_eq!(window.map(&map), Err(Errno::INVAL), "{file_offset:#x}");
        }
        assert!(DaxWindow::new(0).is_err());
        assert!(DaxWindow::new(4097).is_err());
        assert!(DaxWindow::new(!0xfff).is_err());
    }
}
