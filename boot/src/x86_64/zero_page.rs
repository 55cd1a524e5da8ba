// SPDX-License-Identifier: Apache-2.0
//! The zero page: `boot_params` of the Linux boot protocol (Documentation/arch/x86/boot.rst, zero-page.rst).

use super::layout::{COMMAND_LINE, HIGH_MEMORY, ZERO_PAGE};
use super::memory_map::Range;
use super::{Error, write as write_bytes};
use crate::initrd::Initrd;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{ByteValued, GuestMemoryBackend};

const BOOT_FLAG_MAGIC: u16 = 0xaa55;
/// "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
/// Boot loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
/// Kernel alignment stated for an ELF kernel, which has no header of its own.
const ELF_KERNEL_ALIGNMENT: u32 = 0x100_0000;

/// Writes the zero page. `header` is the kernel's own for a bzImage. `command_line_len` counts the closing NUL.
pub(super) fn write<M: GuestMemoryBackend>(
    mem: &M,
    map: &[Range],
    header: Option<setup_header>,
    command_line_len: usize,
    initrd: Option<Initrd>,
    rsdp: Option<u64>,
) -> Result<(), Error> {
    let for_elf = setup_header {
        boot_flag: BOOT_FLAG_MAGIC,
        header: HEADER_MAGIC,
        kernel_alignment: ELF_KERNEL_ALIGNMENT,
        ..setup_header::default()
    };
    let mut params = boot_params {
        hdr: header.unwrap_or(for_elf),
        ..boot_params::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    // All of these lie below 4 GiB by layout.
    let low = |value: u64| u32::try_from(value).unwrap_or(0);
    params.hdr.cmd_line_ptr = low(COMMAND_LINE);
    params.hdr.cmdline_size = u32::try_from(command_line_len).unwrap_or(0);
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = low(initrd.address);
        params.hdr.ramdisk_size = low(initrd.size);
    }
    params.acpi_rsdp_addr = rsdp.unwrap_or(0);
    // Without the ISA hole's size old code would read the BIOS data area.
    params.alt_mem_k = low(map
        .iter()
        .filter(|r| r.address >= HIGH_MEMORY)
        .map(|r| r.size / 1024)
        .take(1)
        .sum());
    for (entry, range) in params.e820_table.iter_mut().zip(map) {
        *entry = boot_e820_entry {
            addr: range.address,
            size: range.size,
            r#type: range.kind as u32,
        };
        params.e820_entries = params.e820_entries.saturating_add(1);
    }
    write_bytes(mem, "the zero page", ZERO_PAGE, params.as_slice())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86_64::layout::Layout;
    use crate::x86_64::memory_map::memory_map;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    #[test]
    fn fields_at_the_offsets_of_the_protocol() {
        let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let layout = Layout::new(4096).unwrap();
        let map = memory_map(&layout);
        let initrd = Initrd {
            address: 0x123_4000,
            size: 0x777,
        };
        write(&mem, &map, None, 10, Some(initrd), Some(0xe_0000)).unwrap();
        let u32_at = |offset: u64| mem.read_obj::<u32>(GuestAddress(ZERO_PAGE + offset)).unwrap();
        assert_eq!(u32_at(0x202), HEADER_MAGIC);
        assert_eq!(u32_at(0x218), 0x123_4000);
        assert_eq!(u32_at(0x21c), 0x777);
        assert_eq!(u32_at(0x228), 0x2_0000);
        assert_eq!(u32_at(0x70), 0xe_0000);
        let entries: u8 = mem.read_obj(GuestAddress(ZERO_PAGE + 0x1e8)).unwrap();
        assert_eq!(usize::from(entries), map.len());
        // Second e820 entry: 20 bytes each from 0x2d0.
        assert_eq!(u32_at(0x2d0 + 20), 0x9_fc00);
    }
}
