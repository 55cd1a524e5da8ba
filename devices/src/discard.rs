// SPDX-License-Identifier: Apache-2.0
//! Frees guest memory on the host: what a balloon or a memory device takes back.

use std::io;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

use crate::GuestRam;

/// Bytes per page of the host.
const PAGE_SIZE: u64 = 4096;

/// Why a range was not freed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiscardError {
    #[error("{len:#x} bytes at {address:#x} are not all in RAM")]
    Outside { address: u64, len: u64 },
    #[error("the host does not free guest memory: {0}")]
    Host(#[source] io::Error),
}

/// Frees the whole pages within `len` bytes from `address`; they read as zeroes afterwards (or as the template that a
/// clone was made of). Returns how many pages that were.
pub(crate) fn discard(ram: &GuestRam, address: u64, len: u64) -> Result<u64, DiscardError> {
    let outside = || DiscardError::Outside { address, len };
    let end = address.checked_add(len).ok_or_else(outside)?;
    let bytes = usize::try_from(len).map_err(|_| outside())?;
    if !ram.check_range(GuestAddress(address), bytes) {
        return Err(outside());
    }
    let mut next = address.checked_next_multiple_of(PAGE_SIZE).ok_or_else(outside)?;
    let end = end - end % PAGE_SIZE;
    let mut pages = 0;
    while next < end {
        let (region, start) = ram.to_region_addr(GuestAddress(next)).ok_or_else(outside)?;
        let here = (region.len() - start.0).min(end - next);
        free(region, start, here).map_err(DiscardError::Host)?;
        pages += here / PAGE_SIZE;
        next += here;
    }
    Ok(pages)
}

fn free(region: &GuestRegionMmap<()>, start: MemoryRegionAddress, len: u64) -> io::Result<()> {
    let len = usize::try_from(len).unwrap_or(0);
    let slice = region
        .get_slice(start, len)
        .map_err(|error| io::Error::other(error.to_string()))?;
    // Of a shared mapping MADV_DONTNEED would only drop our page table entries; the file would keep the pages.
    let advice = if region.flags() & libc::MAP_SHARED != 0 && region.file_offset().is_some() {
        libc::MADV_REMOVE
    } else {
        libc::MADV_DONTNEED
    };
    // SAFETY: the range is within a mapping of guest RAM, to which nobody holds references, only volatile slices; that
    // its contents become zero is what its owner, the guest, asked for.
    let result = unsafe { libc::madvise(slice.ptr_guard_mut().as_ptr().cast(), len, advice) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryMmap};

    #[test]
    fn whole_pages_within_the_range_are_freed() {
        let ranges = [(GuestAddress(0), 0x4000), (GuestAddress(0x4000), 0x4000)];
        let ram: GuestRam = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        let read = |page: u64| ram.read_obj::<u8>(GuestAddress(page * PAGE_SIZE + 17)).unwrap();
        ram.write_slice(&[7; 0x8000], GuestAddress(0)).unwrap();
        // From the middle of page 1 to the middle of page 6, across two regions.
        assert_eq!(discard(&ram, 0x1800, 0x5000).unwrap(), 4);
        assert_eq!((0..8).map(read).collect::<Vec<_>>(), [7, 7, 0, 0, 0, 0, 7, 7]);
        assert_eq!(discard(&ram, 0x6001, 0xffe).unwrap(), 0);
        assert_eq!(discard(&ram, 0x7000, 0).unwrap(), 0);
        assert_eq!(read(6), 7);
    }

    #[test]
    fn ranges_outside_of_ram_are_refused_whole() {
        let ranges = [(GuestAddress(0), 0x4000), (GuestAddress(0x8000), 0x4000)];
        let ram: GuestRam = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        ram.write_slice(&[7; 0x4000], GuestAddress(0)).unwrap();
        for (address, len) in [
            (0x3000, 0x2000),
            (0x3000, 0x6000),
            (0x4000, 0x1000),
            (0xb000, 0x2000),
            (u64::MAX - 0xfff, 0x1000),
            (u64::MAX - 0xfff, 0xfff),
            (0, u64::MAX),
        ] {
            assert!(discard(&ram, address, len).is_err(), "{address:#x} {len:#x}");
        }
        assert_eq!(ram.read_obj::<u8>(GuestAddress(0x3000)).unwrap(), 7);
    }
}
