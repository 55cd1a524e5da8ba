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
//! tells by [`crate::Cell::note_ready`] which pages it has touched until then, its [`WorkingSet`], and the first one with a
//! container, by [`crate::Cell::note_container`], which it takes to make that. For the next ones, what
//! it has written is copied before they run, which costs a tenth of a fault for each page, and what it has only read is
//! asked for of the disk, in the background. The set can be kept in a file for other processes.
//!
//! # Images on a base
//!
//! ```text
//!  image ──base──▶ image ──base──▶ image without one      at most 8; a page is the first one's that has it, or zero
//! ```
//!
//! An image can be written on another one, its *base*: it holds the states as ever, and of the RAM the pages that differ from
//! what the base has there, pages that have become zero among them. It names its base by identity, a number drawn when that
//! was written with the checksum of its header, and tells the name that its file had. It can be opened only on that one.
//!
//! What differs is found by comparison with the base, of which pages there is no doubt. In a cell that was made of the base
//! itself only its own pages are compared: the host's page tables have kept account of them since, whoever wrote, a vCPU,
//! a device, or the kernel on behalf of one; what a balloon gave back shows the base's page again. In any other cell, such
//! as one that booted, all of RAM that is there is compared with all that the base has. That needs no log of writes
//! (KVM_GET_DIRTY_LOG): a log costs a fault for every page that is written after each snapshot and small pages in the
//! place of huge ones, has to be told of each write of a device, and belongs to one base, while a comparison costs reading,
//! once, at some GiB a second, and goes with any image of the same cell.
//!
//! # Files
//!
//! *Compatibility*: the prefix carries an epoch. It changes with the layout of the file or of what is in the header; a
//! file of another epoch is refused, never guessed at. The states of devices have versions of their own.
//!
//! *Trust*: a file is untrusted input. Prefix, header and extents are checked before they are used; a checksum tells
//! damage, not malice. States are checked by those whose they are. RAM is the guest's anyway. That the file cannot
//! be cut short while it is mapped, which would kill the process, is known of a memory file that is sealed, and of a file
//! that only root (or the user who runs this program) can write; any other is copied into memory first.

mod bounded;
mod format;
mod map;
mod new_file;
mod working_set;
mod write;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{MemfdFlags, SealFlags};

pub(crate) use bounded::bounded;
use format::Header;
pub use format::{Base, EPOCH, Identity, Shape};
pub(crate) use map::{copy_into, map_over};
pub use new_file::NewFile;
pub(crate) use working_set::Noted;
pub use working_set::WorkingSet;
pub use write::{NewBase, Written};
pub(crate) use write::{Whole, write};

use crate::cell::SavedCell;
use crate::memory::merge;

/// Most images that stand on each other.
pub const MAX_CHAIN: usize = 8;

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
    /// It cannot be opened alone.
    #[error("the image holds only what differs from its base {name:?} ({identity}), which is needed, too")]
    NeedsBase {
        /// Name of the base's file when this was written.
        name: String,
        /// Which image that is.
        identity: Identity,
    },
    /// It is opened on another image than that on which it was written.
    #[error(
        "this is not the base on which the image was written: that was {name:?} ({wanted}), this is {found}"
    )]
    WrongBase {
        /// Name of the base's file when this was written.
        name: String,
        /// The right one.
        wanted: Identity,
        /// What was given.
        found: Identity,
    },
    /// It has no base, and was given one.
    #[error("the image is whole: it has no base")]
    NoBase,
    /// The base is of another cell.
    #[error("the base has {base} bytes of RAM, the cell has {cell}: take a whole image")]
    OtherRam {
        /// The base's.
        base: u64,
        /// The cell's.
        cell: u64,
    },
    /// There are as many images on each other as there can be.
    #[error("{MAX_CHAIN} images stand on each other, and no more can: take a whole one")]
    TooDeep,
    /// It would take more to say where pages differ than to store them.
    #[error(
        "the RAM differs from its base in more than {} places: take a whole image",
        format::MAX_CHANGES
    )]
    TooManyChanges,
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> ImageError {
    move |source| ImageError::Io { what, source }
}

/// Part of the memory file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part {
    start: u64,
    end: u64,
}

impl Part {
    fn len(self) -> u64 {
        self.end - self.start
    }
}

/// An open image: checked, but for the content of its RAM.
#[derive(Debug)]
pub struct Image {
    file: Arc<File>,
    header: Header,
    identity: Identity,
    base: Option<Arc<Image>>,
    /// What a clone touches before it is ready.
    working_set: Mutex<Option<Arc<WorkingSet>>>,
    /// How far a clone had come when it was noted last: see [`Noted`].
    noted: AtomicU8,
}

/// Which image is in the file.
///
/// # Errors
/// None of this program's, or a damaged one; or the file cannot be read.
pub fn identity_of(file: &File) -> Result<Identity, ImageError> {
    Ok(format::read(file)?.1)
}

/// On which other image the one in the file stands, if on any.
///
/// # Errors
/// As of [`identity_of`].
pub fn base_of(file: &File) -> Result<Option<Base>, ImageError> {
    Ok(format::read(file)?.0.base)
}

impl Image {
    /// Opens the image in `file`, which is kept.
    ///
    /// # Errors
    /// It is not one of this program's, or damaged; it has a base; or the file cannot be read.
    pub fn open(file: File) -> Result<Arc<Self>, ImageError> {
        let (header, identity) = format::read(&file)?;
        match header.base {
            None => Self::with(file, header, identity, None),
            Some(Base { name, identity }) => Err(ImageError::NeedsBase { name, identity }),
        }
    }

    /// Opens the image in `file`, which was written on `base`.
    ///
    /// # Errors
    /// As of [`Image::open`], or that is not its base.
    pub fn open_on(file: File, base: Arc<Self>) -> Result<Arc<Self>, ImageError> {
        let (header, identity) = format::read(&file)?;
        let wanted = header.base.as_ref().ok_or(ImageError::NoBase)?;
        if wanted.identity != base.identity {
            return Err(ImageError::WrongBase {
                name: wanted.name.clone(),
                wanted: wanted.identity,
                found: base.identity,
            });
        }
        base.check_can_be_base(header.ram_len)?;
        Self::with(file, header, identity, Some(base))
    }

    /// Opens the image in the first file, which stands on that in the second, and so on.
    ///
    /// # Errors
    /// As of [`Image::open_on`].
    pub fn open_chain(mut files: Vec<File>) -> Result<Arc<Self>, ImageError> {
        let last = files.pop().ok_or(ImageError::NotAnImage)?;
        // Before anything is read.
        if files.len() >= MAX_CHAIN {
            return Err(ImageError::TooDeep);
        }
        let whole = Self::open(last)?;
        files
            .into_iter()
            .rev()
            .try_fold(whole, |base, file| Self::open_on(file, base))
    }

    fn with(
        file: File,
        header: Header,
        identity: Identity,
        base: Option<Arc<Self>>,
    ) -> Result<Arc<Self>, ImageError> {
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
            identity,
            base,
            working_set: Mutex::default(),
            noted: AtomicU8::new(0),
        }))
    }

    /// Whether images of cells with so many bytes of RAM can stand on this one; answers what stands against it.
    ///
    /// # Errors
    /// It has other RAM, or as many bases as there can be.
    pub fn check_can_be_base(&self, ram_len: u64) -> Result<(), ImageError> {
        if self.ram_len() != ram_len {
            return Err(ImageError::OtherRam {
                base: self.ram_len(),
                cell: ram_len,
            });
        }
        self.check_depth()
    }

    /// Whether another image can stand on this one.
    ///
    /// # Errors
    /// It has as many bases as there can be.
    pub fn check_depth(&self) -> Result<(), ImageError> {
        if self.chain().len() >= MAX_CHAIN {
            return Err(ImageError::TooDeep);
        }
        Ok(())
    }

    /// Which image this is.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// The image on which this one stands.
    pub fn base(&self) -> Option<&Arc<Self>> {
        self.base.as_ref()
    }

    pub(crate) fn has_base(&self) -> bool {
        self.base.is_some()
    }

    /// The images that stand on each other, the one without a base first, this one last.
    pub(crate) fn chain(&self) -> Vec<&Self> {
        let mut all: Vec<&Self> = std::iter::successors(Some(self), |image| image.base.as_deref()).collect();
        all.reverse();
        all
    }

    /// Reads the RAM, that of its bases, too, and compares the checksums.
    ///
    /// # Errors
    /// One is another, or a file cannot be read.
    pub fn verify(&self) -> Result<(), ImageError> {
        let mut buffer = vec![0; write::BUFFER];
        for layer in self.chain() {
            let mut sum = write::PageSum::default();
            for extent in layer.extents() {
                let mut at = extent.start;
                while at < extent.end {
                    let len = usize::try_from(extent.end - at)
                        .unwrap_or(usize::MAX)
                        .min(buffer.len());
                    let part = &mut buffer[..len];
                    layer
                        .file
                        .read_exact_at(part, layer.position(at))
                        .map_err(io_error("read"))?;
                    if layer.has_base() {
                        sum.add(at, part);
                    } else {
                        for run in write::runs(part) {
                            sum.add(at + run.start as u64, &part[run]);
                        }
                    }
                    at += len as u64;
                }
            }
            if sum != layer.header.ram_sum {
                return Err(ImageError::Damaged {
                    what: if std::ptr::eq(layer, self) {
                        "the checksum of its RAM is another"
                    } else {
                        "the checksum of its base's RAM is another"
                    },
                });
            }
        }
        Ok(())
    }

    /// Reads what the memory file had at `offset`.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        data.fill(0);
        for layer in self.chain() {
            for part in layer.parts(offset, data.len() as u64) {
                let place = |at: u64| usize::try_from(at - offset).unwrap_or(usize::MAX);
                let piece = data.get_mut(place(part.start)..place(part.end));
                let piece = piece.ok_or(io::ErrorKind::InvalidInput)?;
                layer.file.read_exact_at(piece, layer.position(part.start))?;
            }
        }
        Ok(())
    }

    /// What this image itself has of `len` bytes from `offset` of the memory file.
    pub(crate) fn parts(&self, offset: u64, len: u64) -> impl Iterator<Item = Part> {
        let end = offset.saturating_add(len);
        let extents = self.extents();
        let first = extents.partition_point(|extent| extent.end <= offset);
        let of_them = extents.get(first..).unwrap_or_default().iter();
        of_them
            .take_while(move |extent| extent.start < end)
            .map(move |extent| Part {
                start: extent.start.max(offset),
                end: extent.end.min(end),
            })
    }

    /// The parts of the memory file that may hold something else than zeroes.
    pub(crate) fn holding(&self) -> Vec<Range<u64>> {
        let chain = self.chain();
        merge(
            chain
                .iter()
                .flat_map(|layer| layer.extents().iter().cloned())
                .collect(),
        )
    }

    /// The parts that are not as in the image without a base.
    pub(crate) fn changes(&self) -> Vec<Range<u64>> {
        let chain = self.chain();
        let changes = chain.iter().filter(|layer| layer.has_base());
        merge(
            changes
                .flat_map(|layer| layer.extents().iter().cloned())
                .collect(),
        )
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

    /// Bytes of RAM that it holds: what is not zero, or differs from its base.
    pub fn ram_bytes(&self) -> u64 {
        self.header.ram_sum.bytes()
    }

    /// Has clones begin with what one has touched. Of several sets the one with most written pages is kept. Answers whether it
    /// is of this image.
    pub fn expect(&self, set: WorkingSet) -> bool {
        let fits = set.image() == self.identity;
        if fits {
            self.noted.fetch_max(Noted::Ready as u8, Ordering::Relaxed);
            let mut known = self.known_set();
            if known.as_ref().is_none_or(|known| known.bytes().0 < set.bytes().0) {
                *known = Some(Arc::new(set));
            }
        }
        fits
    }

    /// What clones will touch, if that is known.
    pub fn working_set(&self) -> Option<Arc<WorkingSet>> {
        self.known_set().clone()
    }

    fn known_set(&self) -> MutexGuard<'_, Option<Arc<WorkingSet>>> {
        self.working_set.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a clone that has come so far is the first one.
    pub(crate) fn is_first(&self, noted: Noted) -> bool {
        self.noted.fetch_max(noted as u8, Ordering::Relaxed) < noted as u8
    }

    /// Has the host's kernel read these parts of the memory file, in the background. What is there already costs nothing.
    pub(crate) fn read_ahead(&self, ranges: &[Range<u64>]) {
        for layer in self.chain() {
            for range in ranges {
                for part in layer.parts(range.start, range.end.saturating_sub(range.start)) {
                    let len = std::num::NonZeroU64::new(part.len());
                    let advice = rustix::fs::Advice::WillNeed;
                    // Only a wish.
                    let _ = rustix::fs::fadvise(&*layer.file, layer.position(part.start), len, advice);
                }
            }
        }
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
