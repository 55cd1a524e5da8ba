// SPDX-License-Identifier: Apache-2.0
//! Which pages of a private mapping are there: /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst). What it says
//! of a process's own pages needs no rights.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use vm_memory::{GuestMemoryRegion, GuestRegionMmap};

const PAGE: u64 = 4096;
/// Bytes per page in the file.
const ENTRY: u64 = 8;
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// Of a file, or shared.
const FILE: u64 = 1 << 61;
/// Entries read at once.
const BATCH: u64 = 4096;

/// A page that has been touched.
pub(crate) fn is_there(entry: u64) -> bool {
    entry & (PRESENT | SWAPPED) != 0
}

/// A page that is this mapping's alone: written since it was made.
pub(crate) fn is_own(entry: u64) -> bool {
    is_there(entry) && entry & FILE == 0
}

/// Calls `see` with each page's offset in the mapping and its entry.
fn walk(region: &GuestRegionMmap<()>, mut see: impl FnMut(u64, u64)) -> Option<()> {
    let file = File::open("/proc/self/pagemap").ok()?;
    let first = u64::try_from(region.as_ptr().addr()).ok()? / PAGE;
    let pages = region.len() / PAGE;
    let mut buffer = vec![0; usize::try_from(BATCH * ENTRY).ok()?];
    let mut page = 0;
    while page < pages {
        let count = BATCH.min(pages - page);
        let part = buffer.get_mut(..usize::try_from(count * ENTRY).ok()?)?;
        file.read_exact_at(part, (first + page) * ENTRY).ok()?;
        for (entry, number) in part.chunks_exact(8).zip(page..) {
            see(number * PAGE, u64::from_ne_bytes(entry.try_into().ok()?));
        }
        page += count;
    }
    Some(())
}

/// Bytes of the pages that count.
pub(crate) fn count(region: &GuestRegionMmap<()>, counts: impl Fn(u64) -> bool) -> Option<u64> {
    let mut bytes = 0;
    walk(region, |_, entry| bytes += if counts(entry) { PAGE } else { 0 })?;
    Some(bytes)
}

/// The pages that count, as ranges of the mapping's bytes.
pub(crate) fn ranges(region: &GuestRegionMmap<()>, counts: impl Fn(u64) -> bool) -> Option<Vec<Range<u64>>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    walk(region, |at, entry| {
        if !counts(entry) {
            return;
        }
        match ranges.last_mut() {
            Some(last) if last.end == at => last.end += PAGE,
            _ => ranges.push(at..at + PAGE),
        }
    })?;
    Some(ranges)
}
