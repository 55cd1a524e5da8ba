// SPDX-License-Identifier: Apache-2.0
//! Telling kernels apart and loading them through linux-loader.
//!
//! linux-loader trusts lengths in the file more than we do, so what it will follow is checked here first: every
//! loaded segment against the file's size and against RAM, the entry point against the loaded segments, the
//! note segments against the file. What remains is copying.

use super::layout::{HIGH_MEMORY, Layout};
use crate::file_at::FileAt;
use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{self, BzImage, KernelLoader};
use std::fs::File;
use vm_memory::{ByteValued, GuestAddress, GuestMemoryBackend};

/// Most program headers of an ELF kernel; Linux has about five.
const MAX_PROGRAM_HEADERS: u16 = 64;
const ELF_HEADER_SIZE: usize = 64;
const PROGRAM_HEADER_SIZE: usize = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Name of the notes that Linux puts into itself, with its NUL.
const LINUX_NOTE: &[u8] = b"Linux\0";
/// Most bytes of notes looked through for the PVH note.
const MAX_NOTES: u64 = 1 << 20;
/// Where the setup header lies in a bzImage.
const SETUP_HEADER: u64 = 0x1f1;
/// "HdrS" at 0x202.
const SETUP_MAGIC: u32 = 0x5372_6448;
/// Boot protocol 2.12: `xloadflags` tells of the 64-bit entry point.
const PROTOCOL_2_12: u16 = 0x020c;
/// `xloadflags`: 64-bit entry point at 0x200.
const XLF_KERNEL_64: u16 = 1;

/// How a loaded kernel is entered.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// By PVH at this 32-bit address.
    ElfPvh {
        /// Guest-physical entry address.
        entry: u32,
    },
    /// In long mode at the ELF entry point.
    Elf64 {
        /// Guest-physical entry address.
        entry: u64,
    },
    /// In long mode at the 64-bit entry point of a bzImage.
    BzImage {
        /// Guest-physical entry address.
        entry: u64,
        /// The kernel's setup header, to go into the zero page.
        header: setup_header,
    },
}

/// A kernel in guest memory.
#[derive(Debug, Clone, Copy)]
pub struct Kernel {
    /// How to enter it.
    pub kind: Kind,
    /// First guest-physical address it occupies.
    pub start: u64,
    /// End of what it occupies, BSS and decompression room included, exclusive.
    pub end: u64,
    /// Bytes of command line it reads, without the closing NUL, where it says so.
    pub command_line_limit: Option<usize>,
}

/// Why a file is not a kernel that can be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading failed.
    #[error("cannot read the kernel image: give a regular file that can be read")]
    Read(#[source] std::io::Error),
    /// Neither ELF nor bzImage.
    #[error("not a kernel: neither an ELF vmlinux nor an x86 bzImage (first bytes {magic:02x?})")]
    UnknownFormat {
        /// First four bytes of the file, fewer when it is shorter.
        magic: Vec<u8>,
    },
    /// The file ends before something it refers to.
    #[error("the kernel image is cut off: {what} ends at byte {end} of {size}")]
    Truncated {
        /// The missing part.
        what: &'static str,
        /// Where it should end.
        end: u64,
        /// Size of the file.
        size: u64,
    },
    /// An ELF file of another kind.
    #[error("the ELF file is not a 64-bit x86 kernel: {why}")]
    NotOurElf {
        /// What is different.
        why: &'static str,
    },
    /// A part would lie outside RAM.
    #[error(
        "the kernel wants {what} at {start:#x}..{end:#x}, outside of RAM from {HIGH_MEMORY:#x} to {ram_end:#x}; \
         give the pod more memory"
    )]
    OutsideRam {
        /// The part.
        what: &'static str,
        /// First guest-physical address.
        start: u64,
        /// End, exclusive.
        end: u64,
        /// End of low RAM.
        ram_end: u64,
    },
    /// The entry point is not in a loaded part.
    #[error("the kernel's entry point {entry:#x} is not in a loaded segment")]
    Entry {
        /// The address.
        entry: u64,
    },
    /// A bzImage without the 64-bit entry point.
    #[error(
        "the bzImage has boot protocol {version:#06x} and no 64-bit entry point; Linux 3.8 or later is needed"
    )]
    OldBzImage {
        /// Its boot protocol version.
        version: u16,
    },
    /// linux-loader refused it.
    #[error("the kernel image is damaged")]
    Loader(#[source] loader::Error),
}

/// Loads the kernel in `file` into `mem`.
pub fn load<M: GuestMemoryBackend>(mem: &M, layout: &Layout, file: &File) -> Result<Kernel, Error> {
    let mut file = FileAt::new(file).map_err(Error::Read)?;
    let mut magic = [0u8; 4];
    let known = usize::try_from(file.size())
        .unwrap_or(usize::MAX)
        .min(magic.len());
    file.read_exact_at(&mut magic[..known], 0).map_err(Error::Read)?;
    if magic == *b"\x7fELF" {
        return load_elf(mem, layout, &mut file);
    }
    if let Some(header) = setup_header_of(&file)? {
        return load_bz_image(mem, layout, &mut file, &header);
    }
    Err(Error::UnknownFormat {
        magic: magic[..known].to_vec(),
    })
}

/// A segment of an ELF file that was checked against the file's size.
struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    file_size: u64,
    end: u64,
}

fn load_elf<M: GuestMemoryBackend>(mem: &M, layout: &Layout, file: &mut FileAt) -> Result<Kernel, Error> {
    let (entry, segments) = read_elf_headers(file)?;
    let ram_end = layout.low_ram_end();
    let loads: Vec<&Segment> = segments
        .iter()
        .filter(|s| s.kind == PT_LOAD && s.end > s.address)
        .collect();
    if loads.is_empty() {
        return Err(Error::NotOurElf {
            why: "it has no segment to load",
        });
    }
    for segment in &loads {
        if segment.address < HIGH_MEMORY || segment.end > ram_end {
            let (start, end) = (segment.address, segment.end);
            return Err(Error::OutsideRam {
                what: "a segment",
                start,
                end,
                ram_end,
            });
        }
    }
    let loaded = Elf::load(mem, None, file, Some(GuestAddress(HIGH_MEMORY))).map_err(Error::Loader)?;
    let inside = |address: u64| {
        loads
            .iter()
            .any(|s| (s.address..s.address + s.file_size).contains(&address))
    };
    let kind = match loaded.pvh_boot_cap {
        // Linux can be entered both ways. By PVH it would first look for Xen, with 256 CPUID exits.
        PvhBootCapability::PvhEntryPresent(_) if inside(entry) && is_linux(file, &segments)? => {
            Kind::Elf64 { entry }
        }
        PvhBootCapability::PvhEntryPresent(GuestAddress(address)) => match u32::try_from(address) {
            Ok(entry) if inside(address) => Kind::ElfPvh { entry },
            _ => return Err(Error::Entry { entry: address }),
        },
        _ if inside(entry) => Kind::Elf64 { entry },
        _ => return Err(Error::Entry { entry }),
    };
    Ok(Kernel {
        kind,
        start: loads.iter().map(|s| s.address).min().unwrap_or(HIGH_MEMORY),
        end: loads.iter().map(|s| s.end).max().unwrap_or(HIGH_MEMORY),
        command_line_limit: None,
    })
}

/// Whether a note says that this is Linux (include/linux/build-salt.h: every vmlinux has notes by that name).
fn is_linux(file: &FileAt, segments: &[Segment]) -> Result<bool, Error> {
    for segment in segments.iter().filter(|s| s.kind == PT_NOTE) {
        // Its size was bounded when the headers were read.
        let mut notes = vec![0; usize::try_from(segment.file_size).unwrap_or(0)];
        file.read_exact_at(&mut notes, segment.offset)
            .map_err(Error::Read)?;
        let mut rest = notes.as_slice();
        while let Some((header, body)) = rest.split_at_checked(12) {
            let padded = |at| {
                usize::try_from(u32_at(header, at))
                    .unwrap_or(usize::MAX)
                    .checked_next_multiple_of(4)
            };
            let (Some(name), Some(content)) = (padded(0), padded(4)) else {
                break;
            };
            if body.starts_with(LINUX_NOTE) {
                return Ok(true);
            }
            let Some(next) = name.checked_add(content).and_then(|skip| body.get(skip..)) else {
                break;
            };
            rest = next;
        }
    }
    Ok(false)
}

/// Reads and checks the ELF header and the program headers.
fn read_elf_headers(file: &FileAt) -> Result<(u64, Vec<Segment>), Error> {
    let size = file.size();
    let mut header = [0u8; ELF_HEADER_SIZE];
    let truncated = |what, end| Error::Truncated { what, end, size };
    if size < ELF_HEADER_SIZE as u64 {
        return Err(truncated("the ELF header", ELF_HEADER_SIZE as u64));
    }
    file.read_exact_at(&mut header, 0).map_err(Error::Read)?;
    if header[4] != 2 || header[5] != 1 {
        return Err(Error::NotOurElf {
            why: "not 64-bit little-endian",
        });
    }
    if u16_at(&header, 18) != 62 {
        return Err(Error::NotOurElf {
            why: "its machine is not x86-64",
        });
    }
    let entry = u64_at(&header, 24);
    let table = u64_at(&header, 32);
    let count = u16_at(&header, 56);
    if usize::from(u16_at(&header, 54)) != PROGRAM_HEADER_SIZE || count == 0 || count > MAX_PROGRAM_HEADERS {
        return Err(Error::NotOurElf {
            why: "it has no sensible program headers",
        });
    }
    let table_end = table
        .checked_add(u64::from(count) * PROGRAM_HEADER_SIZE as u64)
        .ok_or(Error::NotOurElf {
            why: "its program headers are beyond any file",
        })?;
    if table_end > size {
        return Err(truncated("the program header table", table_end));
    }
    let mut segments = Vec::new();
    for index in 0..u64::from(count) {
        let mut raw = [0u8; PROGRAM_HEADER_SIZE];
        file.read_exact_at(&mut raw, table + index * PROGRAM_HEADER_SIZE as u64)
            .map_err(Error::Read)?;
        let (kind, offset, address) = (u32_at(&raw, 0), u64_at(&raw, 8), u64_at(&raw, 24));
        let (file_size, memory_size) = (u64_at(&raw, 32), u64_at(&raw, 40));
        if kind != PT_LOAD && kind != PT_NOTE {
            continue;
        }
        let file_end = offset.checked_add(file_size).ok_or(Error::NotOurElf {
            why: "a segment is beyond any file",
        })?;
        if file_end > size {
            return Err(truncated("a segment", file_end));
        }
        if kind == PT_LOAD && memory_size < file_size {
            return Err(Error::NotOurElf {
                why: "a segment is larger in the file than in memory",
            });
        }
        if kind == PT_NOTE && file_size > MAX_NOTES {
            return Err(Error::NotOurElf {
                why: "its notes are larger than 1 MiB",
            });
        }
        let end = address.checked_add(memory_size).ok_or(Error::NotOurElf {
            why: "a segment is beyond any memory",
        })?;
        segments.push(Segment {
            kind,
            offset,
            address,
            file_size,
            end,
        });
    }
    Ok((entry, segments))
}

/// The setup header when the file has one.
fn setup_header_of(file: &FileAt) -> Result<Option<setup_header>, Error> {
    let mut header = setup_header::default();
    let len = header.as_slice().len() as u64;
    if file.size() < SETUP_HEADER + len {
        return Ok(None);
    }
    file.read_exact_at(header.as_mut_slice(), SETUP_HEADER)
        .map_err(Error::Read)?;
    let magic = header.header;
    Ok((magic == SETUP_MAGIC).then_some(header))
}

fn load_bz_image<M: GuestMemoryBackend>(
    mem: &M,
    layout: &Layout,
    file: &mut FileAt,
    header: &setup_header,
) -> Result<Kernel, Error> {
    let version = header.version;
    if version < PROTOCOL_2_12 || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(Error::OldBzImage { version });
    }
    let size = file.size();
    let setup_sectors = if header.setup_sects == 0 {
        4
    } else {
        u64::from(header.setup_sects)
    };
    let setup = (setup_sectors + 1) * 512;
    // The protected-mode part must reach its 64-bit entry point at least; `syssize` counts it in 16 bytes.
    let end = setup + u64::from(header.syssize) * 16;
    if size < end || size < setup + 0x400 {
        return Err(Error::Truncated {
            what: "the protected-mode part",
            end: end.max(setup + 0x400),
            size,
        });
    }
    let ram_end = layout.low_ram_end();
    let start = u64::from(header.code32_start);
    let image_end = start + (size - setup);
    // It decompresses to its preferred address (or its own, when higher) and needs `init_size` bytes there.
    let runtime_end = header
        .pref_address
        .max(start)
        .saturating_add(u64::from(header.init_size));
    for (what, end) in [("its image", image_end), ("room to decompress", runtime_end)] {
        if start < HIGH_MEMORY || end > ram_end {
            return Err(Error::OutsideRam {
                what,
                start,
                end,
                ram_end,
            });
        }
    }
    let loaded = BzImage::load(mem, None, file, Some(GuestAddress(HIGH_MEMORY))).map_err(Error::Loader)?;
    let header = loaded.setup_header.unwrap_or(*header);
    let limit = usize::try_from(header.cmdline_size).unwrap_or(usize::MAX);
    Ok(Kernel {
        kind: Kind::BzImage {
            entry: loaded.kernel_load.0 + 0x200,
            header,
        },
        start,
        end: image_end.max(runtime_end),
        command_line_limit: Some(limit),
    })
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes
        .get(at..at + 2)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..at + 8)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::file_at::tests::memfd;
    use vm_memory::{Bytes, GuestMemoryMmap};

    /// A small ELF kernel: one segment of `code` at 0x100000, with a PVH note when asked.
    pub(crate) fn elf(code: &[u8], pvh: bool) -> Vec<u8> {
        let mut file = vec![0u8; 0x1000];
        file[..4].copy_from_slice(b"\x7fELF");
        (file[4], file[5], file[6]) = (2, 1, 1);
        file[16..18].copy_from_slice(&2u16.to_le_bytes());
        file[18..20].copy_from_slice(&62u16.to_le_bytes());
        file[24..32].copy_from_slice(&0x10_0000u64.to_le_bytes());
        file[32..40].copy_from_slice(&64u64.to_le_bytes());
        file[54..56].copy_from_slice(&56u16.to_le_bytes());
        file[56..58].copy_from_slice(&(if pvh { 2u16 } else { 1 }).to_le_bytes());
        header(
            &mut file,
            64,
            PT_LOAD,
            0x1000,
            0x10_0000,
            code.len() as u64,
            code.len() as u64 + 0x100,
        );
        if pvh {
            header(&mut file, 64 + 56, PT_NOTE, 0x800, 0, 20, 20);
            file[0x800..0x804].copy_from_slice(&4u32.to_le_bytes());
            file[0x804..0x808].copy_from_slice(&4u32.to_le_bytes());
            file[0x808..0x80c].copy_from_slice(&18u32.to_le_bytes());
            file[0x80c..0x810].copy_from_slice(b"Xen\0");
            file[0x810..0x814].copy_from_slice(&0x10_0002u32.to_le_bytes());
        }
        file.extend_from_slice(code);
        file
    }

    fn header(file: &mut [u8], at: usize, kind: u32, offset: u64, address: u64, size: u64, memory: u64) {
        file[at..at + 4].copy_from_slice(&kind.to_le_bytes());
        for (field, value) in [(8, offset), (24, address), (32, size), (40, memory)] {
            file[at + field..at + field + 8].copy_from_slice(&value.to_le_bytes());
        }
    }

    /// A bzImage with a protected-mode part of `size` bytes.
    fn bz_image(size: usize) -> Vec<u8> {
        let mut file = vec![0u8; 1024 + size];
        let header = setup_header {
            setup_sects: 1,
            syssize: u32::try_from(size / 16).unwrap(),
            boot_flag: 0xaa55,
            header: SETUP_MAGIC,
            version: 0x020f,
            loadflags: 1,
            code32_start: 0x10_0000,
            xloadflags: 1,
            cmdline_size: 2047,
            pref_address: 0x100_0000,
            init_size: 0x10_0000,
            kernel_alignment: 0x20_0000,
            ..setup_header::default()
        };
        let raw = header.as_slice();
        file[0x1f1..0x1f1 + raw.len()].copy_from_slice(raw);
        file[1024 + 0x200] = 0xf4;
        file
    }

    fn memory(mib: u64) -> (GuestMemoryMmap<()>, Layout) {
        let size = usize::try_from(mib << 20).unwrap();
        (
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).unwrap(),
            Layout::new(mib).unwrap(),
        )
    }

    #[test]
    fn pvh_is_preferred_when_the_note_is_there() {
        let (mem, layout) = memory(4);
        let kernel = load(&mem, &layout, &memfd(&elf(&[0x90, 0x90, 0xf4], true))).unwrap();
        assert!(matches!(kernel.kind, Kind::ElfPvh { entry: 0x10_0002 }));
        assert_eq!(mem.read_obj::<u8>(GuestAddress(0x10_0002)).unwrap(), 0xf4);
        assert_eq!((kernel.start, kernel.end), (0x10_0000, 0x10_0103));
        let kernel = load(&mem, &layout, &memfd(&elf(&[0xf4], false))).unwrap();
        assert!(matches!(kernel.kind, Kind::Elf64 { entry: 0x10_0000 }));
    }

    #[test]
    fn linux_is_entered_in_64_bits_although_it_has_the_pvh_note() {
        let (mem, layout) = memory(4);
        let mut image = elf(&[0x90, 0x90, 0xf4], true);
        // One more note behind the first: "Linux", four bytes.
        header(&mut image, 64 + 56, PT_NOTE, 0x800, 0, 44, 44);
        image[0x814..0x820].copy_from_slice(&[6, 0, 0, 0, 4, 0, 0, 0, 0, 1, 0, 0]);
        image[0x820..0x826].copy_from_slice(LINUX_NOTE);
        let kernel = load(&mem, &layout, &memfd(&image)).unwrap();
        assert!(matches!(kernel.kind, Kind::Elf64 { entry: 0x10_0000 }));
    }

    #[test]
    fn bz_image_is_entered_at_its_64_bit_entry_point() {
        let (mem, layout) = memory(32);
        let kernel = load(&mem, &layout, &memfd(&bz_image(0x1000))).unwrap();
        assert!(matches!(kernel.kind, Kind::BzImage { entry: 0x10_0200, .. }));
        assert_eq!(mem.read_obj::<u8>(GuestAddress(0x10_0200)).unwrap(), 0xf4);
        assert_eq!(kernel.end, 0x110_0000);
        assert_eq!(kernel.command_line_limit, Some(2047));
    }

    #[test]
    fn bz_image_without_room_to_decompress_is_refused() {
        let (mem, layout) = memory(16);
        let error = load(&mem, &layout, &memfd(&bz_image(0x1000))).unwrap_err();
        assert!(
            matches!(
                error,
                Error::OutsideRam {
                    what: "room to decompress",
                    ..
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn what_is_no_kernel_is_named() {
        let (mem, layout) = memory(4);
        for content in [&b""[..], b"#!", b"#!/bin/sh\n", &[0; 4096]] {
            let error = load(&mem, &layout, &memfd(content)).unwrap_err();
            assert!(matches!(error, Error::UnknownFormat { .. }), "{error}");
        }
    }

    #[test]
    fn every_truncation_gives_an_error_and_no_panic() {
        let (mem, layout) = memory(32);
        for image in [elf(&[0x90; 64], true), bz_image(0x400)] {
            assert!(load(&mem, &layout, &memfd(&image)).is_ok());
            for len in (0..image.len()).rev().step_by(7) {
                assert!(
                    load(&mem, &layout, &memfd(&image[..len])).is_err(),
                    "{len} of {}",
                    image.len()
                );
            }
        }
    }

    #[test]
    fn hostile_header_fields_never_panic() {
        let (mem, layout) = memory(4);
        let good = elf(&[0x90; 64], true);
        for at in (0..64 + 2 * 56).chain(0x800..0x814) {
            for value in [0u8, 1, 0x7f, 0x80, 0xff] {
                let mut image = good.clone();
                image[at] = value;
                let _ = load(&mem, &layout, &memfd(&image));
                // Whole fields of ones: offsets and sizes that overflow when added.
                if at + 8 <= image.len() {
                    image[at..at + 8].fill(0xff);
                    let _ = load(&mem, &layout, &memfd(&image));
                }
            }
        }
        let good = bz_image(0x400);
        for at in 0x1f1..0x1f1 + setup_header::default().as_slice().len() {
            let mut image = good.clone();
            image[at] = 0xff;
            let _ = load(&mem, &layout, &memfd(&image));
        }
    }

    #[test]
    fn segments_outside_ram_or_in_low_memory_are_refused() {
        let (mem, layout) = memory(4);
        let mut image = elf(&[0x90; 64], false);
        header(&mut image, 64, PT_LOAD, 0x1000, 0x1000, 64, 64);
        assert!(matches!(
            load(&mem, &layout, &memfd(&image)),
            Err(Error::OutsideRam { .. })
        ));
        header(&mut image, 64, PT_LOAD, 0x1000, 0x3f_ffff, 64, 64);
        assert!(matches!(
            load(&mem, &layout, &memfd(&image)),
            Err(Error::OutsideRam { .. })
        ));
        header(&mut image, 64, PT_LOAD, 0x1000, 0x20_0000, 64, 64);
        assert!(matches!(
            load(&mem, &layout, &memfd(&image)),
            Err(Error::Entry { entry: 0x10_0000 })
        ));
    }
}
