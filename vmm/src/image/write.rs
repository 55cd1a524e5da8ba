// SPDX-License-Identifier: Apache-2.0
//! Writing an image: RAM in one pass, the header last, so that a file that was not finished is no image.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use super::format::{self, Header, MAX_EXTENTS, PAGE};
use super::{ImageError, io_error};
use crate::cell::SavedCell;
use crate::memory::Memory;

/// Bytes of RAM that are looked at at once.
pub const BUFFER: usize = 256 << 10;

/// Checksum and count of the pages that are not zero.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageSum {
    pages: u64,
    crc: u32,
}

impl PageSum {
    /// Adds whole pages that lie at `offset` of the memory file.
    pub fn add(&mut self, offset: u64, pages: &[u8]) {
        let mut hasher = crc32fast::Hasher::new_with_initial(self.crc);
        for (page, at) in pages.chunks(PAGE).zip((offset..).step_by(PAGE)) {
            hasher.update(&at.to_le_bytes());
            hasher.update(page);
            self.pages += 1;
        }
        self.crc = hasher.finalize();
    }

    /// What was added, in bytes.
    pub fn bytes(&self) -> u64 {
        self.pages.saturating_mul(PAGE as u64)
    }
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Bytes of RAM that are not zero.
    pub ram_bytes: u64,
    /// Bytes of everything else.
    pub state_bytes: u64,
    /// Bytes of the file that are the image's, holes included.
    pub file_bytes: u64,
}

/// The runs of pages that are not zero in a piece of RAM, as ranges of its bytes.
pub fn runs(piece: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (page, start) in piece.chunks(PAGE).zip((0..).step_by(PAGE)) {
        // Sixteen bytes at a time, as the compiler makes of it.
        if page.iter().fold(0, |all, byte| all | byte) == 0 {
            continue;
        }
        let end = start + page.len();
        match runs.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => runs.push(start..end),
        }
    }
    runs
}

/// Joins neighbours, the nearest first, until so many are left.
fn join(mut extents: Vec<Range<u64>>, most: usize) -> Vec<Range<u64>> {
    if extents.len() > most {
        let mut gaps: Vec<u64> = extents.windows(2).map(|two| two[1].start - two[0].end).collect();
        gaps.sort_unstable_by(|a, b| b.cmp(a));
        // The widest stay, one fewer than there are to be extents; of those that are as wide as the last, only some.
        let least = gaps[most - 1];
        let mut joined: Vec<Range<u64>> = Vec::with_capacity(most);
        for extent in extents {
            match joined.last_mut() {
                Some(last) if extent.start - last.end <= least => last.end = extent.end,
                _ => joined.push(extent),
            }
        }
        extents = joined;
    }
    extents
}

/// All that an image is made of.
pub struct Whole<'a> {
    pub saved: SavedCell,
    pub memory: &'a Memory,
}

/// Writes an image into `file`, which is empty.
pub fn write(file: &File, whole: Whole<'_>) -> Result<Written, ImageError> {
    let Whole { saved, memory } = whole;
    let mut header = Header {
        data_start: 0,
        ram_len: memory.len(),
        extents: Vec::new(),
        ram_sum: PageSum::default(),
        saved,
    };
    header.data_start = format::data_start(header.encode()?.len());
    let mut buffer = vec![0; BUFFER];
    let mut extents: Vec<Range<u64>> = Vec::new();
    for range in memory.holding() {
        let mut at = range.start;
        while at < range.end {
            let len = usize::try_from(range.end - at).unwrap_or(usize::MAX).min(BUFFER);
            let piece = &mut buffer[..len];
            memory.read(at, piece).map_err(io_error("read the RAM for"))?;
            for run in runs(piece) {
                let start = at + run.start as u64;
                let pages = &piece[run];
                file.write_all_at(pages, header.data_start + start)
                    .map_err(io_error("write"))?;
                header.ram_sum.add(start, pages);
                let end = start + pages.len() as u64;
                match extents.last_mut() {
                    Some(last) if last.end == start => last.end = end,
                    _ => extents.push(start..end),
                }
            }
            at += len as u64;
        }
    }
    header.extents = join(extents, MAX_EXTENTS);
    let first = header.encode()?;
    if first.len() as u64 > header.data_start {
        return Err(ImageError::TooLarge { bytes: first.len() });
    }
    // A run of zeroes at the end of an extent cannot be: the file ends with its last page.
    file.set_len(header.file_len()).map_err(io_error("write"))?;
    file.write_all_at(&first, 0).map_err(io_error("write"))?;
    Ok(Written {
        ram_bytes: header.ram_sum.bytes(),
        state_bytes: first.len() as u64,
        file_bytes: header.file_len(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_of_whole_pages_that_are_not_zero() {
        let mut piece = vec![0; 5 * PAGE];
        assert!(runs(&piece).is_empty());
        piece[PAGE + 17] = 1;
        piece[2 * PAGE] = 1;
        piece[5 * PAGE - 1] = 1;
        assert_eq!(runs(&piece), [PAGE..3 * PAGE, 4 * PAGE..5 * PAGE]);
    }

    #[test]
    fn the_nearest_are_joined() {
        let extents = || vec![0..1, 2..3, 10..11, 12..13, 100..101];
        assert_eq!(join(extents(), 5), extents());
        assert_eq!(join(extents(), 3), [0..3, 10..13, 100..101]);
        assert_eq!(join(extents(), 2), [0..13, 100..101]);
        assert_eq!(join(extents(), 1), vec![Range { start: 0, end: 101 }]);
        // As wide as each other: never too many.
        let even: Vec<Range<u64>> = (0..100).map(|n| 2 * n..2 * n + 1).collect();
        assert!(join(even, 16).len() <= 16);
    }

    #[test]
    fn a_sum_tells_places_and_contents() {
        let (mut one, mut other, mut moved) = (PageSum::default(), PageSum::default(), PageSum::default());
        one.add(0, &[1; 2 * PAGE]);
        other.add(0, &[1; PAGE]);
        other.add(PAGE as u64, &[1; PAGE]);
        assert_eq!(one, other);
        moved.add(PAGE as u64, &[1; 2 * PAGE]);
        assert_ne!(one, moved);
    }
}
