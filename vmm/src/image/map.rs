// SPDX-License-Identifier: Apache-2.0
//! A clone's RAM: fresh memory with the image's extents mapped over it, privately. What can be plugged is a copy.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress, MmapRegion};

use super::Image;
use super::write::{BUFFER, runs};

/// What `image` has of the `len` bytes from `offset` of the memory file: ranges of that.
fn parts(image: &Image, offset: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = offset.saturating_add(len);
    let cut = move |extent: &std::ops::Range<u64>| (extent.start.max(offset), extent.end.min(end));
    image
        .extents()
        .iter()
        .map(cut)
        .filter(|(start, stop)| start < stop)
}

/// Maps over `region`, which is of fresh memory and holds the memory file from `offset` on, what `image` has of that. The
/// guest's writes make copies; the file is never written.
pub fn map_over(image: &Image, region: &MmapRegion<()>, offset: u64) -> io::Result<()> {
    for (start, stop) in parts(image, offset, region.size() as u64) {
        let too_large = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let within = usize::try_from(start - offset).map_err(too_large)?;
        let len = usize::try_from(stop - start).map_err(too_large)?;
        let position = libc::off64_t::try_from(image.position(start)).map_err(too_large)?;
        // SAFETY: the addresses are within `region`, a mapping of our own that nobody has used yet and that is unmapped as
        // a whole, this part included. The file does not become shorter (see `Image::open`).
        let mapped = unsafe {
            libc::mmap64(
                region.as_ptr().wrapping_add(within).cast(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
                image.file().as_raw_fd(),
                position,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Copies into `region`, which holds the memory file from `offset` on, what `image` has of that.
pub fn copy_into(image: &Image, region: &GuestRegionMmap<()>, offset: u64) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    for (start, stop) in parts(image, offset, region.len()) {
        let mut at = start;
        while at < stop {
            let len = usize::try_from(stop - at).unwrap_or(usize::MAX).min(BUFFER);
            let piece = &mut buffer[..len];
            image.file().read_exact_at(piece, image.position(at))?;
            for run in runs(piece) {
                let address = MemoryRegionAddress(at - offset + run.start as u64);
                region
                    .write_slice(&piece[run], address)
                    .map_err(io::Error::other)?;
            }
            at += len as u64;
        }
    }
    Ok(())
}
