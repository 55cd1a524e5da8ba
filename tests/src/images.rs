// SPDX-License-Identifier: Apache-2.0
//! Small images of real cells, for tests of those who read them: of a VM with a few devices that has not run yet, and of the
//! same one a moment later, on the first as its base. Needs /dev/kvm.

use std::fs::File;
use std::io::Write;

use cloister_boot::x86_64::Description;
use cloister_vmm::image::{Image, NewBase, memory_file};
use cloister_vmm::{Boot, Cell, CellConfig, CellHost, CellHostConfig, DeviceConfig, KernelBoot};
use vm_memory::{Bytes, GuestAddress};

/// Where the guest's program is.
const PROGRAM: u64 = 0x10_0000;

/// Two images, the second of which stands on the first.
pub struct Small {
    /// All of it.
    pub whole: File,
    /// What has changed since.
    pub later: File,
}

/// A program of one instruction, `hlt`, as an ELF file that is entered by PVH.
fn program() -> File {
    let mut elf = vec![0; 0x1000];
    let mut put = |at: usize, bytes: &[u8]| elf[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0x7f, b'E', b'L', b'F', 2, 1, 1]);
    put(16, &[2, 0, 62, 0]);
    put(24, &PROGRAM.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &2u16.to_le_bytes());
    // A segment to be loaded, and the note with the entry.
    for (at, kind, offset, address, len) in [(64, 1u32, 0x1000, PROGRAM, 1u64), (120, 4, 0x800, 0, 20)] {
        put(at, &kind.to_le_bytes());
        for (field, value) in [(8, offset), (24, address), (32, len), (40, len)] {
            put(at + field, &u64::to_le_bytes(value));
        }
    }
    put(0x800, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    put(0x80c, b"Xen\0");
    put(0x810, &0x10_0000u32.to_le_bytes());
    elf.push(0xf4);
    let mut file = memory_file().unwrap();
    file.write_all(&elf).unwrap();
    file
}

/// Makes them.
pub fn small() -> Small {
    let host = CellHost::new(CellHostConfig::default()).expect("images of real cells need /dev/kvm");
    let boot = KernelBoot {
        kernel: program(),
        initrd: None,
        command_line: String::new(),
        description: Description::MpTable,
    };
    let mut config = CellConfig::new("small", Boot::Kernel(boot));
    config.memory_mib = 4;
    let balloon = DeviceConfig::Balloon {
        deflate_on_oom: false,
    };
    config.devices = vec![DeviceConfig::Rng, DeviceConfig::Slot, balloon];
    let cell = Cell::create(config, &host).unwrap();
    let ram = cell.ram().unwrap();
    for page in 0..3u64 {
        ram.write_obj(page + 1, GuestAddress(0x10_4000 + page * 0x3000))
            .unwrap();
    }
    let whole = memory_file().unwrap();
    cell.write_image(&whole).unwrap();
    // One page is new, one another, and one zero.
    for (address, value) in [(0x11_0000, 7), (0x10_4000, 8), (0x10_7000, 0u64)] {
        ram.write_obj(value, GuestAddress(address)).unwrap();
    }
    let later = memory_file().unwrap();
    let image = Image::open(whole.try_clone().unwrap()).unwrap();
    let base = NewBase {
        image: &image,
        name: "whole",
    };
    let written = cell.write_image_on(&later, base).unwrap();
    assert_eq!(written.ram_bytes, 3 * 4096);
    Small { whole, later }
}
