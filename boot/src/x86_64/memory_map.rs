// SPDX-License-Identifier: Apache-2.0
//! The memory map a kernel is given: the e820 map of the zero page, or PVH's table; the types agree.

use super::layout::{ACPI_TABLES, BASE_MEMORY_END, HIGH_MEMORY, HOLE_END, Layout, MP_TABLE};

/// What a range is for, with the numbers of ACPI 6.5, table 15.4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// Usable memory.
    Ram = 1,
    /// Not to be used.
    Reserved = 2,
}

/// One range of the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes.
    pub size: u64,
    /// What it is for.
    pub kind: Kind,
}

/// The map of `layout`: RAM without the last KiB of base memory (MP table) and the ACPI area, both reserved.
pub fn memory_map(layout: &Layout) -> Vec<Range> {
    let range = |kind, start: u64, end: u64| Range {
        address: start,
        size: end.saturating_sub(start),
        kind,
    };
    let mut map = vec![
        range(Kind::Ram, 0, MP_TABLE),
        range(Kind::Reserved, MP_TABLE, BASE_MEMORY_END),
        range(Kind::Reserved, ACPI_TABLES, HIGH_MEMORY),
        range(Kind::Ram, HIGH_MEMORY, layout.low_ram_end()),
    ];
    if layout.ram_end() > HOLE_END {
        map.push(range(Kind::Ram, HOLE_END, layout.ram_end()));
    }
    map.retain(|r| r.size > 0);
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ascending_without_overlap_and_within_ram() {
        for mib in [1, 128, 3328, 3329, 65536] {
            let layout = Layout::new(mib).unwrap();
            let map = memory_map(&layout);
            for pair in map.windows(2) {
                assert!(pair[0].address + pair[0].size <= pair[1].address);
            }
            let last = map.last().unwrap();
            assert_eq!(last.address + last.size, layout.ram_end());
        }
    }
}
