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

use super::bounded::bounded;
use super::write::PageSum;
use super::{ImageError, io_error};
use crate::cell::SavedCell;

/// Grows with every change of the file's layout or of [`Header`].
pub const EPOCH: u32 = 2;
const MAGIC: &[u8; 8] = b"CLOISTER";
/// Where the header begins.
const HEADER_START: u64 = 64;
/// Longest header: the states of a file system with a million nodes.
const MAX_HEADER: usize = 256 << 20;
/// Most extents: each is a mapping of each clone's, of which a process has some 65,000.
pub const MAX_EXTENTS: usize = 16;
/// Most extents of an image that has a base. Those are exact, and most of them are copied.
pub const MAX_CHANGES: usize = 1 << 20;
/// Most bytes that an extent takes in the header: two numbers below [`MAX_RAM`].
pub const EXTENT_BYTES: usize = 16;
/// Most devices. There are fewer: each needs an interrupt of its own.
const MAX_DEVICES: usize = 256;
/// Longest name of a base, as file systems have it.
pub const MAX_NAME: usize = 255;
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
    #[serde(deserialize_with = "bounded::<_, _, MAX_DEVICES>")]
    pub devices: Vec<String>,
}

/// Tells an image from all others: drawn when it is written, and the checksum of its header, in which that of its RAM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    drawn: [u8; 16],
    sum: u32,
}

#[cfg(test)]
impl Identity {
    pub(super) fn of_test(sum: u32) -> Self {
        Self { drawn: [9; 16], sum }
    }
}

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}-{:08x}", u128::from_be_bytes(self.drawn), self.sum)
    }
}

/// What an image differs from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// Name of its file, without a folder, when this was written. Nothing but a hint.
    pub name: String,
    /// Which image it is.
    pub identity: Identity,
}

/// All but RAM.
#[derive(Debug, Serialize, Deserialize)]
pub struct Header {
    /// Random.
    pub drawn: [u8; 16],
    /// What the RAM differs from; from nothing but zeroes if none.
    pub base: Option<Base>,
    /// Where RAM begins in the file.
    pub data_start: u64,
    /// Size of the memory file.
    pub ram_len: u64,
    /// The parts of it that are stored: whole pages, ascending, disjoint. With a base exactly those that differ, pages
    /// of zeroes among them; what is not in any of them is as in the base.
    #[serde(deserialize_with = "bounded::<_, _, MAX_CHANGES>")]
    pub extents: Vec<Range<u64>>,
    /// Of the pages that are not zero; with a base, of all that are stored.
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
        let most = if self.base.is_some() {
            MAX_CHANGES
        } else {
            MAX_EXTENTS
        };
        if self.ram_len > MAX_RAM || self.extents.len() > most {
            return wrong("its RAM is impossibly large");
        }
        if self.base.as_ref().is_some_and(|base| !is_name(&base.name)) {
            return wrong("the name of its base is no file's");
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

/// Whether a file in a folder can be called so.
pub fn is_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..")
        && name.len() <= MAX_NAME
        && !name.chars().any(|c| c == '/' || c.is_control())
}

/// Where RAM begins behind a header of so many bytes, to which so many extents are to come. The room is a hole.
pub fn data_start(header: usize, extents: usize) -> u64 {
    let room = extents.saturating_add(1).saturating_mul(EXTENT_BYTES);
    let end = u64::try_from(header.saturating_add(room))
        .unwrap_or(u64::MAX)
        .saturating_add(PAGE as u64);
    end.saturating_add(HEADER_START).next_multiple_of(PAGE as u64)
}

/// Reads and checks everything before RAM.
pub fn read(file: &File) -> Result<(Header, Identity), ImageError> {
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
    let identity = Identity {
        drawn: header.drawn,
        sum: number(16),
    };
    Ok((header, identity))
}
