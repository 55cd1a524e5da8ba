// SPDX-License-Identifier: Apache-2.0
//! What a clone touches first, noted once and made ready for those that come after it, in this process or, by a file of its
//! own beside the image's, in others.
//!
//! | offset | bytes | |
//! | --- | --- | --- |
//! | 0 | 8 | `CLOISSET` |
//! | 8 | 4 | epoch, little-endian like all numbers |
//! | 12 | 4 | CRC-32 of what follows |
//! | 16 | | the [`WorkingSet`] in postcard's encoding |
//!
//! It is a hint. What is wrong with such a file is told and changes nothing but how fast a clone starts; ranges that are not
//! of the RAM are passed over.

use std::cmp::Reverse;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::bounded::bounded;
use super::{Identity, ImageError, NewFile, io_error};

const MAGIC: &[u8; 8] = b"CLOISSET";
/// Grows with every change of the layout or of [`WorkingSet`].
const EPOCH: u32 = 1;
/// Most ranges of a kind: each is a call of the kernel's before a clone runs.
const MAX_RANGES: usize = 4096;
/// Longest file.
const MAX_FILE: u64 = 256 << 10;

/// What a clone of an image has touched until it was ready, as ranges of the memory file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkingSet {
    /// The image.
    pub(crate) image: Identity,
    /// Pages that it has written.
    #[serde(deserialize_with = "bounded::<_, _, MAX_RANGES>")]
    pub(crate) written: Vec<Range<u64>>,
    /// Pages that it has read only.
    #[serde(deserialize_with = "bounded::<_, _, MAX_RANGES>")]
    pub(crate) read: Vec<Range<u64>>,
}

/// How far a clone has come when what it has touched is noted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Noted {
    /// Its agent answers.
    Ready = 1,
    /// It has a container, of which nothing runs yet.
    Container = 2,
}

/// The longest ranges where there are too many, in their order.
fn longest(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    if ranges.len() > MAX_RANGES {
        ranges.sort_unstable_by_key(|range| Reverse(range.end.saturating_sub(range.start)));
        ranges.truncate(MAX_RANGES);
        ranges.sort_unstable_by_key(|range| range.start);
    }
    ranges
}

impl WorkingSet {
    /// Of these pages; of too many ranges the longest ones.
    pub(crate) fn new(image: Identity, written: Vec<Range<u64>>, read: Vec<Range<u64>>) -> Self {
        Self {
            image,
            written: longest(written),
            read: longest(read),
        }
    }

    /// Which image it is of.
    pub fn image(&self) -> Identity {
        self.image
    }

    /// Bytes of pages that were written, and of those that were read only.
    pub fn bytes(&self) -> (u64, u64) {
        let sum = |ranges: &[Range<u64>]| {
            let lengths = ranges.iter().map(|range| range.end.saturating_sub(range.start));
            lengths.fold(0u64, u64::saturating_add)
        };
        (sum(&self.written), sum(&self.read))
    }

    /// Reads one from a file.
    ///
    /// # Errors
    /// It is none, or damaged; or it cannot be read.
    pub fn load(path: &Path) -> Result<Self, ImageError> {
        let damaged = |what| ImageError::Damaged { what };
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = File::options().read(true).custom_flags(flags).open(path);
        let mut bytes = Vec::new();
        let read = file.and_then(|file| file.take(MAX_FILE).read_to_end(&mut bytes));
        read.map_err(io_error("read the working set of"))?;
        let number = |at: usize| {
            let bytes = bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(0, u32::from_le_bytes)
        };
        if !bytes.starts_with(MAGIC) {
            return Err(damaged("this is not its working set"));
        }
        if number(8) != EPOCH {
            return Err(ImageError::Epoch {
                found: number(8),
                expected: EPOCH,
            });
        }
        let body = bytes.get(16..).unwrap_or_default();
        if crc32fast::hash(body) != number(12) {
            return Err(damaged("the checksum of its working set is another"));
        }
        let set: Self = postcard::from_bytes(body).map_err(|_| damaged("its working set cannot be read"))?;
        // No page twice, or it could be a thousand times all of them.
        let ordered = |ranges: &[Range<u64>]| {
            ranges.iter().all(|range| range.start < range.end)
                && ranges.is_sorted_by(|one, next| one.end <= next.start)
        };
        if !ordered(&set.written) || !ordered(&set.read) {
            return Err(damaged("its working set is out of order"));
        }
        Ok(set)
    }

    /// Writes it to a file, which is there whole or not at all, in the place of one that is there.
    ///
    /// # Errors
    /// As of the system calls for files.
    pub fn store(&self, path: &Path) -> Result<(), ImageError> {
        let body = postcard::to_stdvec(self).map_err(|_| ImageError::Damaged {
            what: "its working set cannot be encoded",
        })?;
        let mut all = MAGIC.to_vec();
        all.extend(EPOCH.to_le_bytes());
        all.extend(crc32fast::hash(&body).to_le_bytes());
        all.extend(body);
        let failed = io_error("write the working set of");
        let new = NewFile::create(path).and_then(|new| {
            new.file().write_all_at(&all, 0)?;
            new.finish()
        });
        new.map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_stay() {
        let many: Vec<Range<u64>> = (0..5000).map(|n| n * 100..n * 100 + 1 + n % 50).collect();
        let kept = longest(many);
        assert_eq!(kept.len(), MAX_RANGES);
        assert!(kept.iter().all(|range| range.end - range.start > 5));
        assert!(kept.is_sorted_by_key(|range| range.start));
    }

    #[test]
    fn it_is_read_as_it_was_written_and_damage_is_told() {
        let path = std::env::temp_dir().join(format!("cloister-working-set-{}", std::process::id()));
        let image = Identity::of_test(7);
        let set = WorkingSet::new(
            image,
            vec![0..4096, 8192..16384],
            vec![1 << 39..1 << 40, 1 << 40..1 << 41],
        );
        assert_eq!(set.bytes(), (12288, 3 << 39));
        set.store(&path).unwrap();
        assert_eq!(WorkingSet::load(&path).unwrap(), set);
        let good = std::fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            std::fs::write(&path, &bad).unwrap();
            assert!(WorkingSet::load(&path).is_err(), "{at}");
            std::fs::write(&path, &good[..at]).unwrap();
            assert!(WorkingSet::load(&path).is_err(), "{at}");
        }
        std::fs::remove_file(&path).unwrap();
        assert!(WorkingSet::load(&path).is_err());
        let twice = WorkingSet {
            written: vec![0..8192, 4096..8192],
            ..set
        };
        twice.store(&path).unwrap();
        assert!(WorkingSet::load(&path).is_err());
        // Of full size it is well within the bound.
        let far = |n: u64| (1 << 51) + n * 8192..(1 << 51) + n * 8192 + 4096;
        let full = WorkingSet::new(image, (0..9000).map(far).collect(), (0..9000).map(far).collect());
        full.store(&path).unwrap();
        assert!(std::fs::metadata(&path).unwrap().len() < MAX_FILE);
        assert_eq!(WorkingSet::load(&path).unwrap(), full);
        std::fs::remove_file(&path).unwrap();
    }
}
