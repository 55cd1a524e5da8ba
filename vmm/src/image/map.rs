// SPDX-License-Identifier: Apache-2.0
//! A clone's RAM: fresh memory with the image's extents mapped over it, privately. What can be plugged is a copy.
//!
//! An image that has a base is many small changes: the longest of them are mapped over the base's extents, the others, for
//! which a mapping would cost more than what it saves, copied. The base comes first, so what is newer covers what is older.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vm_memory::{MmapRegion, VolatileMemory};

use super::format::MAX_EXTENTS;
use super::write::{BUFFER, runs};
use super::{Image, Part};

/// Fewest bytes of a change that is mapped.
const MAPPED: u64 = 64 << 10;

fn too_large<E>(_: E) -> io::Error {
    io::Error::from(io::ErrorKind::InvalidInput)
}

/// Maps over `region`, which is of fresh memory and holds the memory file from `offset` on, what `image` has of that. The
/// guest's writes make copies; the file is never written.
pub fn map_over(image: &Image, region: &MmapRegion<()>, offset: u64) -> io::Result<()> {
    for layer in image.chain() {
        let mut left = MAX_EXTENTS;
        for part in layer.parts(offset, region.size() as u64) {
            let few = !layer.has_base() || (part.len() >= MAPPED && left > 0);
            if few {
                left = left.saturating_sub(1);
                map_part(layer, region, offset, part)?;
            } else {
                copy_part(layer, region, offset, part)?;
            }
        }
    }
    Ok(())
}

fn map_part(layer: &Image, region: &MmapRegion<()>, offset: u64, part: Part) -> io::Result<()> {
    let within = usize::try_from(part.start - offset).map_err(too_large)?;
    let len = usize::try_from(part.len()).map_err(too_large)?;
    let position = libc::off64_t::try_from(layer.position(part.start)).map_err(too_large)?;
    // SAFETY: the addresses are within `region`, a mapping of our own that nobody has used yet and that is unmapped as
    // a whole, this part included. The file does not become shorter (see `Image::open`).
    let mapped = unsafe {
        libc::mmap64(
            region.as_ptr().wrapping_add(within).cast(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            layer.file().as_raw_fd(),
            position,
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Copies into `region`, which holds the memory file from `offset` on, what `image` has of that.
pub fn copy_into(image: &Image, region: &MmapRegion<()>, offset: u64) -> io::Result<()> {
    for layer in image.chain() {
        for part in layer.parts(offset, region.size() as u64) {
            copy_part(layer, region, offset, part)?;
        }
    }
    Ok(())
}

fn copy_part(layer: &Image, region: &MmapRegion<()>, offset: u64, part: Part) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER.min(usize::try_from(part.len()).map_err(too_large)?)];
    let mut at = part.start;
    while at < part.end {
        let len = usize::try_from(part.end - at)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let piece = &mut buffer[..len];
        layer.file().read_exact_at(piece, layer.position(at))?;
        let within = usize::try_from(at - offset).map_err(too_large)?;
        let write = |from: usize, bytes: &[u8]| {
            let slice = region.get_slice(within + from, bytes.len());
            slice
                .map(|slice| slice.copy_from(bytes))
                .map_err(io::Error::other)
        };
        if layer.has_base() {
            // Zeroes may cover something.
            write(0, piece)?;
        } else {
            for run in runs(piece) {
                write(run.start, &piece[run.clone()])?;
            }
        }
        at += len as u64;
    }
    Ok(())
}
