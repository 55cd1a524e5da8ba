// SPDX-License-Identifier: Apache-2.0
//! The file: a prefix of fixed layout, the header in postcard's encoding, and RAM from the next page on.
//!
//! | offset | bytes | |
//! | --- | --- | --- |
//! | 0 | 8 | `CLOISTER` |
//! | 8 | 4 | epoch, little-endian like all numbers |
//! | 12 | 4 | length of the header |
//! | 16 | 4 | CRC-32 of the header |
//! | 20 | 44 | zero |
//! | 64 | | the header |
//! | `data_start` | | RAM: the byte at offset `n` of the memory file is at `data_start + n` |

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use super::write::PageSum;
use super::{ImageError, io_error};
use crate::cell::SavedCell;

/// Grows with every change of the file's layout or of [`Header`].
pub const EPOCH: u32 = 1;
const MAGIC: &[u8; 8] = b"CLOISTER";
/// Where the header begins.
const HEADER_START: u64 = 64;
/// Longest header: the states of a file system with a million nodes.
const MAX_HEADER: usize = 256 << 20;
/// Most extents: each is a mapping of each clone's, of which a process has some 65,000.
pub const MAX_EXTENTS: usize = 16;
/// Bytes per page of the host.
pub const PAGE: usize = 4096;
/// Most RAM: what x86_64 can address.
const MAX_RAM: u64 = 1 << 52;

/// What a cell consists of: a clone must be configured alike.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// RAM in MiB.
    pub memory_mib: u64,
    /// What a memory device can plug, in MiB; 0 without one.
    pub pluggable_mib: u64,
    /// vCPUs that there can be.
    pub max_vcpus: u8,
    /// Whether it has a serial port.
    pub serial: bool,
    /// Names of the devices in the order of their register pages. In the place of a `slot` a clone may have any device:
    /// the guest has not seen it yet.
    pub devices: Vec<String>,
}

/// All but RAM.
#[derive(Debug, Serialize, Deserialize)]
pub struct Header {
    /// Where RAM begins in the file.
    pub data_start: u64,
    /// Size of the memory file.
    pub ram_len: u64,
    /// The parts of it that are stored: whole pages, ascending, disjoint.
    pub extents: Vec<Range<u64>>,
    /// Of the pages that are not zero.
    pub ram_sum: PageSum,
    /// The cell.
    pub saved: SavedCell,
}

impl Header {
    /// The least length of the file.
    pub fn file_len(&self) -> u64 {
        let end = self.extents.last().map_or(0, |extent| extent.end);
        self.data_start.saturating_add(end)
    }

    fn check(&self, header_end: u64) -> Result<(), ImageError> {
        let wrong = |what| Err(ImageError::Damaged { what });
        let aligned = |offset: u64| offset.is_multiple_of(PAGE as u64);
        if !aligned(self.data_start) || self.data_start < header_end || self.data_start > MAX_RAM {
            return wrong("its RAM begins at an impossible place");
        }
        if self.ram_len > MAX_RAM || self.extents.len() > MAX_EXTENTS {
            return wrong("its RAM is impossibly large");
        }
        let mut last = 0;
        for extent in &self.extents {
            if !aligned(extent.start)
                || !aligned(extent.end)
                || extent.start < last
                || extent.end <= extent.start
            {
                return wrong("its extents are out of order");
            }
            last = extent.end;
        }
        if last > self.ram_len {
            return wrong("its extents are beyond its RAM");
        }
        Ok(())
    }

    /// The first bytes of the file.
    pub fn encode(&self) -> Result<Vec<u8>, ImageError> {
        let header = postcard::to_stdvec(self).map_err(|_| ImageError::Damaged {
            what: "it cannot be encoded",
        })?;
        let bytes = header.len();
        let length = u32::try_from(bytes)
            .ok()
            .filter(|_| bytes <= MAX_HEADER)
            .ok_or(ImageError::TooLarge { bytes })?;
        let mut all = Vec::with_capacity(bytes + 64);
        all.extend_from_slice(MAGIC);
        for number in [EPOCH, length, crc32fast::hash(&header)] {
            all.extend_from_slice(&number.to_le_bytes());
        }
        all.resize(64, 0);
        all.extend_from_slice(&header);
        Ok(all)
    }
}

/// Where RAM begins behind a header of so many bytes; there is room for extents to come.
pub fn data_start(header: usize) -> u64 {
    let end = u64::try_from(header)
        .unwrap_or(u64::MAX)
        .saturating_add(2 * PAGE as u64);
    end.saturating_add(HEADER_START).next_multiple_of(PAGE as u64)
}

/// Reads and checks everything before RAM.
pub fn read(file: &File) -> Result<Header, ImageError> {
    let mut prefix = [0; 64];
    let read = file.read_at(&mut prefix, 0).map_err(io_error("read"))?;
    let number = |at: usize| {
        let bytes = prefix.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u32::from_le_bytes)
    };
    if read < prefix.len() || !prefix.starts_with(MAGIC) {
        return Err(ImageError::NotAnImage);
    }
    if number(8) != EPOCH {
        return Err(ImageError::Epoch {
            found: number(8),
            expected: EPOCH,
        });
    }
    let damaged = |what| ImageError::Damaged { what };
    let length = u64::from(number(12));
    let there = file.metadata().map_err(io_error("look at"))?.len();
    // Before memory is asked for.
    if length > MAX_HEADER as u64 || length > there.saturating_sub(HEADER_START) {
        return Err(damaged("its header is cut short"));
    }
    let mut header = vec![0; usize::try_from(length).unwrap_or(0)];
    file.read_exact_at(&mut header, HEADER_START)
        .map_err(io_error("read"))?;
    if crc32fast::hash(&header) != number(16) {
        return Err(damaged("the checksum of its header is another"));
    }
    let header: Header = postcard::from_bytes(&header).map_err(|_| damaged("its header cannot be read"))?;
    header.check(HEADER_START + length)?;
    if there < header.file_len() {
        return Err(damaged("its end is missing"));
    }
    Ok(header)
}
