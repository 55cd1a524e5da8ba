// SPDX-License-Identifier: Apache-2.0
//! The guest-physical address space of a cell.
//!
//! ```text
//! 0x0000_0000  GDT, start info or zero page, page tables, command line (all given back by the kernel)
//! 0x0009_fc00  MP table (last KiB of base memory)
//! 0x000a_0000  hole, then ACPI tables at 0xe_0000
//! 0x0010_0000  RAM: kernel ............................ initrd at the top
//! 0xd000_0000  virtio-mmio register pages, 4 KiB each   \
//! 0xfec0_0000  IOAPIC                                    > the hole below 4 GiB: no RAM
//! 0xfee0_0000  local APIC                               /
//! 0x1_0000_0000  RAM above 3.25 GiB
//! aligned to 1 GiB after RAM: the region of a memory device, then shared-memory windows (virtio-fs DAX), each aligned
//! to its huge pages
//! ```

/// GDT for the entry into the kernel.
pub const GDT: u64 = 0x500;
/// `hvm_start_info` (PVH entry).
pub const PVH_START_INFO: u64 = 0x6000;
/// Module list (PVH entry): one entry of 32 bytes, the initial RAM disk.
pub const PVH_MODULES: u64 = 0x6040;
/// Memory map (PVH entry).
pub const PVH_MEMORY_MAP: u64 = 0x6080;
/// `boot_params`, 4 KiB (64-bit entry).
pub const ZERO_PAGE: u64 = 0x7000;
/// Page-map level 4 (64-bit entry); the two lower levels follow.
pub const PML4: u64 = 0x9000;
/// Page-directory-pointer table.
pub const PDPT: u64 = 0xa000;
/// Page directory: 512 pages of 2 MiB.
pub const PAGE_DIRECTORY: u64 = 0xb000;
/// The kernel command line, up to 2 KiB.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// The MP floating pointer and table: Linux looks in the last KiB of the 640 KiB of base memory.
pub const MP_TABLE: u64 = 0x9_fc00;
/// End of base memory.
pub const BASE_MEMORY_END: u64 = 0xa_0000;
/// RSDP and ACPI tables: Linux looks for the RSDP from here to 1 MiB.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// Start of extended memory; kernels load here or above.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// End of RAM below 4 GiB at most: 3.25 GiB.
pub const HOLE_START: u64 = 0xd000_0000;
/// End of the hole.
pub const HOLE_END: u64 = 0x1_0000_0000;
/// First virtio-mmio register page.
pub const VIRTIO_MMIO_BASE: u64 = 0xd000_0000;
/// Size of one register page in bytes.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// The global system interrupts of virtio-mmio devices, in order: as low as they come, since each pin that the IOAPIC has
/// costs a booting guest 14 exits, wired or not. Not 0 (the timer's), 2 (Linux takes it for a second PIC) and 4 (the
/// serial port's).
pub fn virtio_mmio_gsis() -> impl Iterator<Item = u32> {
    [1, 3].into_iter().chain(5..)
}
/// The IOAPIC's registers.
pub const IOAPIC: u64 = 0xfec0_0000;
/// The local APICs' registers.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// Intel's EPT identity map page (`KVM_SET_IDENTITY_MAP_ADDR`), in the hole; the TSS pages follow it.
pub const KVM_IDENTITY_MAP: u64 = 0xfeff_c000;
/// Three pages for Intel's real-mode TSS (`KVM_SET_TSS_ADDR`).
pub const KVM_TSS: u64 = 0xfeff_d000;
/// Power port (one I/O port byte each): see `cloister_vmm`'s power device and the FADT written here.
pub const POWER_PORT: u16 = 0x600;

/// Bytes of one memory section of Linux on x86_64: the least that it hot-adds.
const SECTION: u64 = 128 << 20;

/// Least guest memory in MiB: below it no Linux kernel with an initial RAM disk starts.
pub const MIN_MEMORY_MIB: u64 = 1;
/// Most guest memory in MiB: 1 TiB, well inside the 46 physical address bits of current processors.
pub const MAX_MEMORY_MIB: u64 = 1024 * 1024;

/// Why a memory layout cannot be had.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// Size out of range.
    #[error("memory size {mib} MiB is not between {MIN_MEMORY_MIB} and {MAX_MEMORY_MIB} MiB")]
    MemorySize {
        /// The size asked for in MiB.
        mib: u64,
    },
    /// Shared-memory windows beyond the guest's physical addresses.
    #[error(
        "a shared-memory window of {size:#x} bytes does not fit in guest addresses; ask for a smaller one"
    )]
    Window {
        /// The window's size in bytes.
        size: u64,
    },
}

/// RAM of one cell: one or two ranges around the hole below 4 GiB.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    size: u64,
    /// The region of a memory device: address and bytes.
    pluggable: Option<(u64, u64)>,
    next_window: u64,
}

impl Layout {
    /// A layout for `mib` MiB of RAM.
    pub fn new(mib: u64) -> Result<Self, Error> {
        if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&mib) {
            return Err(Error::MemorySize { mib });
        }
        let size = mib.checked_mul(1 << 20).ok_or(Error::MemorySize { mib })?;
        let mut layout = Self {
            size,
            pluggable: None,
            next_window: 0,
        };
        layout.next_window = layout.ram_end().next_multiple_of(1 << 30).max(HOLE_END);
        Ok(layout)
    }

    /// RAM in bytes.
    pub fn ram_size(&self) -> u64 {
        self.size
    }

    /// End of RAM below 4 GiB, exclusive.
    pub fn low_ram_end(&self) -> u64 {
        self.size.min(HOLE_START)
    }

    /// End of the highest RAM, exclusive.
    pub fn ram_end(&self) -> u64 {
        match self.size.checked_sub(HOLE_START) {
            None | Some(0) => self.size,
            Some(above) => HOLE_END + above,
        }
    }

    /// The RAM ranges as (guest-physical address, bytes), ascending: one, or two when there is RAM above 4 GiB.
    pub fn ram(&self) -> Vec<(u64, u64)> {
        let mut ranges = vec![(0, self.low_ram_end())];
        if self.size > HOLE_START {
            ranges.push((HOLE_END, self.size - HOLE_START));
        }
        ranges
    }

    /// Reserves guest-physical addresses for memory that the guest can be given while it runs. No map tells a kernel of
    /// it: the device does. Whole sections of Linux's (128 MiB), so that none is shared with anything else. Once at most,
    /// and before the memory is made.
    pub fn add_pluggable(&mut self, size: u64) -> Result<(), Error> {
        let error = Error::Window { size };
        let whole = size
            .checked_next_multiple_of(SECTION)
            .ok_or(Error::Window { size })?;
        if size == 0 || self.pluggable.is_some() {
            return Err(error);
        }
        self.pluggable = Some((self.add_window(whole)?, whole));
        Ok(())
    }

    /// What [`Layout::add_pluggable`] reserved, as (guest-physical address, bytes).
    pub fn pluggable(&self) -> Option<(u64, u64)> {
        self.pluggable
    }

    /// All ranges that are memory to the host, as (guest-physical address, bytes), ascending: RAM, and what can be plugged.
    pub fn memory(&self) -> Vec<(u64, u64)> {
        let mut ranges = self.ram();
        ranges.extend(self.pluggable);
        ranges
    }

    /// Reserves guest-physical addresses for a shared-memory window (virtio 1.3, 2.10) of `size` bytes above RAM.
    /// The address is a multiple of 1 GiB for large windows, of 128 MiB (Linux's memory section) for others.
    pub fn add_window(&mut self, size: u64) -> Result<u64, Error> {
        let error = Error::Window { size };
        if size == 0 || !size.is_multiple_of(0x1000) {
            return Err(error);
        }
        let alignment = if size >= 1 << 30 { 1 << 30 } else { SECTION };
        let address = self.next_window.checked_next_multiple_of(alignment);
        let end = address
            .and_then(|a| a.checked_add(size))
            .filter(|&end| end <= 1 << 45);
        match (address, end) {
            (Some(address), Some(end)) => {
                self.next_window = end;
                Ok(address)
            }
            _ => Err(error),
        }
    }

    /// First guest-physical address above RAM and all windows.
    pub fn address_space_end(&self) -> u64 {
        self.next_window
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_memory_is_one_range() {
        let layout = Layout::new(256).unwrap();
        assert_eq!(layout.ram(), vec![(0, 256 << 20)]);
        assert_eq!(layout.ram_end(), 256 << 20);
        assert_eq!(layout.low_ram_end(), 256 << 20);
    }

    #[test]
    fn memory_up_to_the_hole_stays_one_range() {
        let layout = Layout::new(HOLE_START >> 20).unwrap();
        assert_eq!(layout.ram(), vec![(0, HOLE_START)]);
        assert_eq!(layout.ram_end(), HOLE_START);
    }

    #[test]
    fn memory_beyond_the_hole_goes_on_at_4_gib() {
        let layout = Layout::new(64 * 1024).unwrap();
        let ram = layout.ram();
        assert_eq!(ram.len(), 2);
        assert_eq!(ram[1].0, HOLE_END);
        assert_eq!(ram.iter().map(|r| r.1).sum::<u64>(), 64 << 30);
        assert_eq!(layout.ram_end(), ram[1].0 + ram[1].1);
    }

    #[test]
    fn sizes_that_overflow_or_are_none_are_refused() {
        for mib in [0, MAX_MEMORY_MIB + 1, u64::MAX, u64::MAX >> 20, 1 << 44] {
            assert_eq!(Layout::new(mib), Err(Error::MemorySize { mib }));
        }
    }

    #[test]
    fn pluggable_memory_is_no_ram_to_the_kernel() {
        let mut layout = Layout::new(5000).unwrap();
        let (ram, end) = (layout.ram(), layout.ram_end());
        layout.add_pluggable(300 << 20).unwrap();
        let (base, size) = layout.pluggable().unwrap();
        assert_eq!((layout.ram(), layout.ram_end()), (ram.clone(), end));
        assert_eq!(size, 384 << 20);
        assert!(base >= end && base.is_multiple_of(128 << 20));
        assert_eq!(layout.memory(), [ram, vec![(base, size)]].concat());
        assert!(layout.add_window(4096).unwrap() >= base + size);
        assert!(layout.add_pluggable(1 << 20).is_err(), "only one");
        for size in [0, u64::MAX, 1 << 46] {
            assert!(Layout::new(1).unwrap().add_pluggable(size).is_err(), "{size:#x}");
        }
    }

    #[test]
    fn windows_lie_above_ram_and_never_overlap() {
        let mut layout = Layout::new(5000).unwrap();
        let a = layout.add_window(256 << 20).unwrap();
        let b = layout.add_window(2 << 30).unwrap();
        assert!(a >= layout.ram_end() && a >= HOLE_END && a.is_multiple_of(128 << 20));
        assert!(b >= a + (256 << 20) && b.is_multiple_of(1 << 30));
        assert!(layout.add_window(!0xfff).is_err());
        assert!(layout.add_window(0).is_err());
        assert!(layout.add_window(0x1001).is_err());
        assert_eq!(layout.address_space_end(), b + (2 << 30));
    }
}
