// SPDX-License-Identifier: Apache-2.0
//! The initial RAM disk: at the top of low memory, page-aligned, clear of the kernel.
//!
//! High because Linux allocates what it needs early next to its image, and relocates a RAM disk that is in the
//! way, which costs a copy. Below the hole under 4 GiB because the boot protocol carries 32-bit addresses.

use crate::file_at::FileAt;
use std::fs::File;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// Page size the RAM disk is aligned to, in bytes.
pub const ALIGNMENT: u64 = 0x1000;

/// Where the RAM disk lies in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Initrd {
    /// Guest-physical address, page-aligned.
    pub address: u64,
    /// Size in bytes.
    pub size: u64,
}

/// Why the RAM disk was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is not a file that can be read by position.
    #[error("cannot open the initial RAM disk: give a regular file")]
    File(#[source] std::io::Error),
    /// It is empty.
    #[error("the initial RAM disk is empty")]
    Empty,
    /// No room between the kernel and the end of low memory.
    #[error(
        "the initial RAM disk of {size} bytes does not fit between the kernel's end at {kernel_end:#x} and the end \
         of low memory at {low_end:#x} ({} bytes free); give the pod more memory",
        low_end.saturating_sub(*kernel_end)
    )]
    NoRoom {
        /// Its size in bytes.
        size: u64,
        /// First free guest-physical address after the kernel.
        kernel_end: u64,
        /// End of low memory, exclusive.
        low_end: u64,
    },
    /// Reading failed, or the file shrank meanwhile.
    #[error("cannot read the initial RAM disk of {size} bytes")]
    Read {
        /// Its size in bytes when it was opened.
        size: u64,
        /// The cause.
        source: vm_memory::GuestMemoryError,
    },
}

/// The highest page-aligned place below `low_end` for `size` bytes that is not below `kernel_end`.
pub fn place(size: u64, kernel_end: u64, low_end: u64) -> Result<Initrd, Error> {
    if size == 0 {
        return Err(Error::Empty);
    }
    low_end
        .checked_sub(size)
        .map(|address| address & !(ALIGNMENT - 1))
        .filter(|&address| address >= kernel_end)
        .map(|address| Initrd { address, size })
        .ok_or(Error::NoRoom {
            size,
            kernel_end,
            low_end,
        })
}

/// Reads the whole of `file` into guest memory below `low_end`.
pub fn load<M: GuestMemoryBackend>(
    mem: &M,
    file: &File,
    kernel_end: u64,
    low_end: u64,
) -> Result<Initrd, Error> {
    let mut reader = FileAt::new(file).map_err(Error::File)?;
    let size = reader.size();
    let initrd = place(size, kernel_end, low_end)?;
    let len = usize::try_from(size).map_err(|_| Error::NoRoom {
        size,
        kernel_end,
        low_end,
    })?;
    mem.read_exact_volatile_from(GuestAddress(initrd.address), &mut reader, len)
        .map_err(|source| Error::Read { size, source })?;
    Ok(initrd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file_at::tests::memfd;
    use vm_memory::GuestMemoryMmap;

    #[test]
    fn placed_at_the_top_page_aligned() {
        let got = place(0x1801, 0x100_0000, 0x800_0000).unwrap();
        assert_eq!(
            got,
            Initrd {
                address: 0x7ff_e000,
                size: 0x1801
            }
        );
    }

    #[test]
    fn refused_with_numbers_when_it_overlaps_the_kernel() {
        let text = place(0x1001, 0x2000, 0x3000).unwrap_err().to_string();
        assert!(
            text.contains("4097 bytes") && text.contains("0x2000") && text.contains("4096 bytes free"),
            "{text}"
        );
        assert!(place(0x1000, 0x2000, 0x3000).is_ok());
        assert!(place(u64::MAX, 0, 0x3000).is_err());
        assert!(matches!(place(0, 0, 0x3000), Err(Error::Empty)));
    }

    #[test]
    fn loads_the_bytes() {
        let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let got = load(&mem, &memfd(&[7; 5000]), 0x1000, 0x10_0000).unwrap();
        assert_eq!(got.address, 0xf_e000);
        let mut last = [0];
        mem.read_slice(&mut last, GuestAddress(got.address + 4999))
            .unwrap();
        assert_eq!(last, [7]);
    }
}
