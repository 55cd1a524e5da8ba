// SPDX-License-Identifier: Apache-2.0
//! Images: a saved cell and its RAM in one file, from which any number of cells can be made.
//!
//! # Theory of operation
//!
//! ```text
//!  Cell::write_image(file) ──▶ [prefix | header: shape, CPUID, states | RAM, sparse] ──Image::open──▶ Arc<Image>
//!                                                                                                       │ Boot::Clone
//!      template's file, never written ◀── MAP_PRIVATE ── clone's RAM ── copies of the pages it writes ◀─┘ any number
//! ```
//!
//! Only pages that are not zero are stored, each at its own place: the file is sparse, and of the length of what it
//! holds last. A clone maps the file's few extents privately and everything between them as fresh memory. Nothing is
//! read before the guest touches it, and what it does not write is the page cache's, once for all clones. The first clone
//! tells by [`crate::Cell::note_ready`] which pages it has written until then: those are copied for the next ones before
//! they run, which costs a tenth of a fault for each.
//!
//! *Compatibility*: the prefix carries an epoch. It changes with the layout of the file or of what is in the header; a
//! file of another epoch is refused, never guessed at. The states of devices have versions of their own.
//!
//! *Trust*: a file is untrusted input. Prefix, header and extents are checked before they are used; a checksum tells
//! damage, not malice. States are checked by those whose they are. RAM is the guest's anyway. That the file cannot
//! be cut short while it is mapped, which would kill the process, is known of a memory file that is sealed, and of a file
//! that only root (or the user who runs this program) can write; any other is copied into memory first.

mod format;
mod map;
mod new_file;
mod write;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use rustix::fs::{MemfdFlags, SealFlags};

use format::Header;
pub use format::Shape;
pub(crate) use map::{copy_into, map_over};
pub use new_file::NewFile;
pub use write::Written;
pub(crate) use write::{Whole, write};

use crate::cell::SavedCell;

/// Most ranges of pages that are copied ahead of a clone's first run: each is a call of the kernel's.
const MAX_WORKING_SET: usize = 512;

/// Why an image could not be written, or cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Something else.
    #[error("this is no image of a cell")]
    NotAnImage,
    /// Written by another version of this program.
    #[error("the image has epoch {found}, this program reads {expected}: take it anew with this version")]
    Epoch {
        /// The file's.
        found: u32,
        /// This program's.
        expected: u32,
    },
    /// Bytes have changed, or are missing.
    #[error("the image is damaged: {what}")]
    Damaged {
        /// Where.
        what: &'static str,
    },
    /// The file cannot be read, written or mapped.
    #[error("cannot {what} the image")]
    Io {
        /// The verb.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// The states do not fit in a header.
    #[error("the cell's devices hold too much to be saved: {bytes} bytes")]
    TooLarge {
        /// Size of the header.
        bytes: usize,
    },
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> ImageError {
    move |source| ImageError::Io { what, source }
}

/// An open image: checked, but for the content of its RAM.
#[derive(Debug)]
pub struct Image {
    file: Arc<File>,
    header: Header,
    /// What a clone has written by the time that it is ready, as ranges of the memory file.
    working_set: OnceLock<Vec<Range<u64>>>,
}

impl Image {
    /// Opens the image in `file`, which is kept.
    ///
    /// # Errors
    /// It is not one of this program's, or damaged; or the file cannot be read.
    pub fn open(file: File) -> Result<Arc<Self>, ImageError> {
        let header = format::read(&file)?;
        let file = if keeps_its_size(&file) {
            file
        } else {
            copied(&file, &header)?
        };
        // What was copied has the size that was checked, whatever has become of the file since.
        let len = file.metadata().map_err(io_error("look at"))?.len();
        if len < header.file_len() {
            return Err(ImageError::Damaged {
                what: "its end is missing",
            });
        }
        Ok(Arc::new(Self {
            file: Arc::new(file),
            header,
            working_set: OnceLock::new(),
        }))
    }

    /// Reads the RAM and compares its checksum.
    ///
    /// # Errors
    /// It is another one, or the file cannot be read.
    pub fn verify(&self) -> Result<(), ImageError> {
        let mut sum = write::PageSum::default();
        let mut buffer = vec![0; write::BUFFER];
        for extent in self.extents() {
            let mut at = extent.start;
            while at < extent.end {
                let len = usize::try_from(extent.end - at)
                    .unwrap_or(usize::MAX)
                    .min(buffer.len());
                let part = &mut buffer[..len];
                self.file
                    .read_exact_at(part, self.header.data_start + at)
                    .map_err(io_error("read"))?;
                for run in write::runs(part) {
                    sum.add(at + run.start as u64, &part[run]);
                }
                at += len as u64;
            }
        }
        if sum != self.header.ram_sum {
            return Err(ImageError::Damaged {
                what: "the checksum of its RAM is another",
            });
        }
        Ok(())
    }

    /// Writes the image to a file, which is there whole or not at all, in the place of one that is there.
    ///
    /// # Errors
    /// As of the system calls for files.
    pub fn copy_to(&self, path: &Path) -> Result<(), ImageError> {
        let new = NewFile::create(path).map_err(io_error("create"))?;
        copy(&self.file, &self.header, new.file())?;
        let start = usize::try_from(self.header.data_start).unwrap_or(0);
        let mut first = vec![0; start];
        self.file.read_exact_at(&mut first, 0).map_err(io_error("read"))?;
        new.file().write_all_at(&first, 0).map_err(io_error("write"))?;
        new.finish().map_err(io_error("write"))
    }

    /// Bytes of the file that are the image's. What comes behind them is somebody else's.
    pub fn file_len(&self) -> u64 {
        self.header.file_len()
    }

    /// What kind of cell it is of.
    pub fn shape(&self) -> &Shape {
        &self.header.saved.shape
    }

    /// Name of the processor on which it was taken.
    pub fn processor(&self) -> String {
        crate::x86_64::cpu_check::name(&self.header.saved.cpuid)
    }

    /// Bytes of RAM that are not zero.
    pub fn ram_bytes(&self) -> u64 {
        self.header.ram_sum.bytes()
    }

    /// Notes what a clone has written until it was ready. The first answer is kept: others differ little.
    pub(crate) fn note_working_set(&self, written: impl FnOnce() -> Vec<Range<u64>>) {
        self.working_set.get_or_init(|| {
            let mut ranges = written();
            ranges.truncate(MAX_WORKING_SET);
            ranges
        });
    }

    /// What the next clones will write, too.
    pub(crate) fn working_set(&self) -> &[Range<u64>] {
        self.working_set.get().map_or(&[], Vec::as_slice)
    }

    pub(crate) fn saved(&self) -> &SavedCell {
        &self.header.saved
    }

    /// Size of the memory file that the RAM was in.
    pub(crate) fn ram_len(&self) -> u64 {
        self.header.ram_len
    }

    /// Parts of the RAM that are in the file, as ranges of the memory file.
    pub(crate) fn extents(&self) -> &[Range<u64>] {
        &self.header.extents
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Where the byte of the memory file at `offset` is in the image's.
    pub(crate) fn position(&self, offset: u64) -> u64 {
        self.header.data_start.saturating_add(offset)
    }
}

/// Whether nobody but root or this program's user can cut the file short.
fn keeps_its_size(file: &File) -> bool {
    if rustix::fs::fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK)) {
        return true;
    }
    let Ok(metadata) = file.metadata() else {
        return false;
    };
    let own = rustix::process::geteuid().as_raw();
    metadata.is_file()
        && matches!(metadata.uid(), uid if uid == 0 || uid == own)
        && metadata.mode() & 0o022 == 0
}

/// A sealed copy in memory.
fn copied(file: &File, header: &Header) -> Result<File, ImageError> {
    let to = memory_file().map_err(io_error("copy"))?;
    copy(file, header, &to)?;
    seal(&to).map_err(io_error("copy"))?;
    Ok(to)
}

/// Copies RAM, each page to its place.
fn copy(file: &File, header: &Header, to: &File) -> Result<(), ImageError> {
    to.set_len(header.file_len()).map_err(io_error("copy"))?;
    let mut buffer = vec![0; write::BUFFER];
    for extent in &header.extents {
        let mut at = header.data_start + extent.start;
        let end = header.data_start + extent.end;
        while at < end {
            let len = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
            let part = &mut buffer[..len];
            file.read_exact_at(part, at).map_err(io_error("read"))?;
            for run in write::runs(part) {
                to.write_all_at(&part[run.clone()], at + run.start as u64)
                    .map_err(io_error("copy"))?;
            }
            at += len as u64;
        }
    }
    Ok(())
}

/// An empty memory file for an image. [`seal`] it once it is written.
///
/// # Errors
/// As of memfd_create(2).
pub fn memory_file() -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    Ok(File::from(rustix::fs::memfd_create("cloister-image", flags)?))
}

/// From now on nobody can change the memory file: neither its size nor a byte.
///
/// # Errors
/// As of fcntl(2): it is mapped shared and writable.
pub fn seal(file: &File) -> io::Result<()> {
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL;
    Ok(rustix::fs::fcntl_add_seals(file, seals)?)
}
