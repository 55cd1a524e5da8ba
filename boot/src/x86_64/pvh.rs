// SPDX-License-Identifier: Apache-2.0
//! What a kernel entered by PVH is given (xen/include/public/arch-x86/hvm/start_info.h, version 1).

use super::layout::{COMMAND_LINE, PVH_MEMORY_MAP, PVH_MODULES, PVH_START_INFO};
use super::memory_map::Range;
use super::{Error, write as write_bytes};
use crate::initrd::Initrd;
use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{ByteValued, GuestMemoryBackend};

/// Writes start info, module list and memory map.
pub(super) fn write<M: GuestMemoryBackend>(
    mem: &M,
    map: &[Range],
    initrd: Option<Initrd>,
    rsdp: Option<u64>,
) -> Result<(), Error> {
    let table: Vec<u8> = map
        .iter()
        .flat_map(|range| {
            let entry = hvm_memmap_table_entry {
                addr: range.address,
                size: range.size,
                type_: range.kind as u32,
                reserved: 0,
            };
            entry.as_slice().to_vec()
        })
        .collect();
    write_bytes(mem, "the PVH memory map", PVH_MEMORY_MAP, &table)?;
    if let Some(initrd) = initrd {
        let module = hvm_modlist_entry {
            paddr: initrd.address,
            size: initrd.size,
            cmdline_paddr: 0,
            reserved: 0,
        };
        write_bytes(mem, "the PVH module list", PVH_MODULES, module.as_slice())?;
    }
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        flags: 0,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: if initrd.is_some() { PVH_MODULES } else { 0 },
        cmdline_paddr: COMMAND_LINE,
        rsdp_paddr: rsdp.unwrap_or(0),
        memmap_paddr: PVH_MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).unwrap_or(0),
        reserved: 0,
    };
    write_bytes(mem, "the PVH start info", PVH_START_INFO, info.as_slice())
}
