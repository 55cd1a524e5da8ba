// SPDX-License-Identifier: Apache-2.0
//! Writing an image: RAM in one pass, the header last, so that a file that was not finished is no image.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};

use super::format::{self, Base, Header, MAX_CHANGES, MAX_EXTENTS, PAGE};
use super::{Image, ImageError, io_error};
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
    /// Bytes of RAM that are not zero; on a base, of those pages that differ.
    pub ram_bytes: u64,
    /// Bytes of everything else.
    pub state_bytes: u64,
    /// Bytes of the file that are the image's, holes included.
    pub file_bytes: u64,
}

/// The runs of pages for which `is_one` holds, as ranges of a piece's bytes.
fn runs_of(piece: &[u8], mut is_one: impl FnMut(&[u8], usize) -> bool) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (page, start) in piece.chunks(PAGE).zip((0..).step_by(PAGE)) {
        if !is_one(page, start) {
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

/// The runs of pages that are not zero in a piece of RAM, as ranges of its bytes.
pub fn runs(piece: &[u8]) -> Vec<Range<usize>> {
    // Sixteen bytes at a time, as the compiler makes of it.
    runs_of(piece, |page, _| page.iter().fold(0, |all, byte| all | byte) != 0)
}

/// The runs of pages that are not the same in two pieces of one length.
fn differing(piece: &[u8], other: &[u8]) -> Vec<Range<usize>> {
    runs_of(piece, |page, start| {
        other.get(start..start + page.len()) != Some(page)
    })
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

/// What an image is to be written on.
#[derive(Clone, Copy)]
pub struct NewBase<'a> {
    /// The base.
    pub image: &'a Arc<Image>,
    /// Name of its file, without a folder.
    pub name: &'a str,
}

/// All that an image is made of.
pub struct Whole<'a> {
    pub saved: SavedCell,
    pub memory: &'a Memory,
    pub base: Option<NewBase<'a>>,
}

fn random() -> Result<[u8; 16], ImageError> {
    let mut drawn = [0; 16];
    // So few bytes come whole.
    match getrandom(&mut drawn, GetRandomFlags::empty()) {
        Ok(16) => Ok(drawn),
        Ok(_) => Err(std::io::ErrorKind::UnexpectedEof.into()),
        Err(error) => Err(error.into()),
    }
    .map_err(io_error("draw an identity for"))
}

/// Writes an image into `file`, which is empty.
pub fn write(file: &File, whole: Whole<'_>) -> Result<Written, ImageError> {
    let Whole { saved, memory, base } = whole;
    if let Some(base) = base {
        base.image.check_can_be_base(memory.len())?;
    }
    let mut header = Header {
        drawn: random()?,
        base: base.map(|base| Base {
            name: base.name.to_owned(),
            identity: base.image.identity(),
        }),
        data_start: 0,
        ram_len: memory.len(),
        extents: Vec::new(),
        ram_sum: PageSum::default(),
        saved,
    };
    let (ranges, most) = match base {
        None => (memory.holding(), MAX_EXTENTS),
        Some(base) => {
            let ranges = memory.changed_since(base.image);
            let pages: u64 = ranges.iter().map(|range| range.end - range.start).sum::<u64>() / PAGE as u64;
            // Every other page of each range.
            let most = usize::try_from(pages / 2).unwrap_or(usize::MAX);
            let most = most.saturating_add(ranges.len());
            (ranges, most.min(MAX_CHANGES))
        }
    };
    header.data_start = format::data_start(header.encode()?.len(), most);
    let mut buffer = vec![0; BUFFER];
    let mut was = vec![0; if base.is_some() { BUFFER } else { 0 }];
    let mut extents: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            let len = usize::try_from(range.end - at).unwrap_or(usize::MAX).min(BUFFER);
            let piece = &mut buffer[..len];
            memory.read(at, piece).map_err(io_error("read the RAM for"))?;
            let stored = match base {
                None => runs(piece),
                Some(base) => {
                    let was = &mut was[..len];
                    base.image.read(at, was).map_err(io_error("read the base of"))?;
                    differing(piece, was)
                }
            };
            for run in stored {
                let start = at + run.start as u64;
                let pages = &piece[run];
                // Those of zeroes that differ from the base's are holes of the file.
                for run in runs(pages) {
                    file.write_all_at(&pages[run.clone()], header.data_start + start + run.start as u64)
                        .map_err(io_error("write"))?;
                }
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
    header.extents = match base {
        None => join(extents, MAX_EXTENTS),
        Some(_) if extents.len() > MAX_CHANGES => return Err(ImageError::TooManyChanges),
        Some(_) => extents,
    };
    let first = header.encode()?;
    if first.len() as u64 > header.data_start {
        return Err(ImageError::TooLarge { bytes: first.len() });
    }
    // A run of zeroes at the end of an extent cannot be, unless it has a base: the file ends with its last page.
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
    fn pages_that_differ_are_found_zero_or_not() {
        let (mut piece, mut was) = (vec![0; 5 * PAGE], vec![0; 5 * PAGE]);
        was[PAGE] = 1;
        piece[2 * PAGE + 9] = 1;
        for both in [&mut piece, &mut was] {
            both[4 * PAGE] = 7;
        }
        assert_eq!(
            differing(&piece, &was),
            vec![Range {
                start: PAGE,
                end: 3 * PAGE
            }]
        );
        assert!(differing(&was, &was).is_empty());
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
