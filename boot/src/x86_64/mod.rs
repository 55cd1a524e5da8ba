// SPDX-License-Identifier: Apache-2.0
//! Loading and entering a kernel on x86_64.
//!
//! Three kinds of kernel are told apart by what is in the file:
//!
//! | kind | recognised by | entered |
//! | --- | --- | --- |
//! | ELF with a PVH note | ELF magic, note `Xen` type 18, no note `Linux` | 32-bit protected mode, paging off, EBX = `hvm_start_info` |
//! | ELF | ELF magic | 64-bit long mode, identity map, RSI = zero page |
//! | bzImage | `HdrS` at 0x202 | 64-bit long mode at +0x200, RSI = zero page (Linux boot protocol 2.12) |
//!
//! A kernel learns of processors and devices in one of two ways ([`Description`]): our own kernel has no ACPI
//! and reads an MP table and its command line; a distribution's kernel gets ACPI tables and no devices on the
//! command line, for it would find them twice.

pub mod acpi;
pub mod cpuid;
pub mod entry;
pub mod kernel;
pub mod layout;
pub mod memory_map;
pub mod mp_table;
pub mod msr;
mod pvh;
mod zero_page;

use crate::command_line::{self, KernelCommandLine};
use crate::initrd::{self, Initrd};
use entry::EntryPoint;
use layout::Layout;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

/// How the kernel learns of processors, interrupt controllers and virtio-mmio devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Description {
    /// MP table in low memory, devices on the command line: for kernels without ACPI. Fewest instructions.
    #[default]
    MpTable,
    /// ACPI (hardware-reduced) with the devices in the DSDT: for distribution kernels.
    Acpi,
}

impl Description {
    /// What a kernel understands: distributions' come as a bzImage and have ACPI, ours is an ELF file and has not. A file that
    /// cannot be read is taken for ours; loading it will say so.
    pub fn of(kernel: &File) -> Self {
        let mut magic = [0; 4];
        // Offset of the boot protocol's magic, Documentation/arch/x86/boot.rst.
        if kernel.read_exact_at(&mut magic, 0x202).is_ok() && &magic == b"HdrS" {
            Self::Acpi
        } else {
            Self::MpTable
        }
    }
}

/// One virtio-mmio device as the kernel is told of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioDevice {
    /// Guest-physical address of the register page.
    pub base: u64,
    /// Size of the register page in bytes.
    pub size: u64,
    /// Global system interrupt, edge-triggered, active high.
    pub gsi: u32,
}

/// What to boot and what to tell the kernel.
#[derive(Debug)]
pub struct BootRequest<'a> {
    /// The kernel image.
    pub kernel: &'a File,
    /// The initial RAM disk, if any.
    pub initrd: Option<&'a File>,
    /// The command line without the devices; those are appended as `description` asks.
    pub command_line: &'a str,
    /// How to describe the machine.
    pub description: Description,
    /// Number of vCPUs that there can be; APIC ids are 0 to `vcpus` - 1.
    pub vcpus: u8,
    /// How many of them the kernel is to start: it leaves the others to whoever sets them online later.
    pub started: u8,
    /// Interrupts that are wired beside the devices', for example the serial port's 4.
    pub other_gsis: &'a [u32],
    /// The virtio-mmio devices.
    pub devices: &'a [MmioDevice],
}

/// Why a kernel could not be made ready.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel image.
    #[error("cannot load the kernel")]
    Kernel(#[from] kernel::Error),
    /// The initial RAM disk.
    #[error("cannot load the initial RAM disk")]
    Initrd(#[from] initrd::Error),
    /// The command line.
    #[error("cannot build the kernel command line")]
    CommandLine(#[from] command_line::Error),
    /// The kernel reads fewer bytes of command line than given (bzImage states its limit).
    #[error("the command line has {given} bytes, this kernel reads {limit}; shorten it")]
    CommandLineLimit {
        /// Bytes given, closing NUL excluded.
        given: usize,
        /// Bytes the kernel reads, closing NUL excluded.
        limit: usize,
    },
    /// Processor and interrupt tables.
    #[error("cannot write the MP table")]
    MpTable(#[from] mp_table::Error),
    /// ACPI tables.
    #[error("cannot write the ACPI tables")]
    Acpi(#[from] acpi::Error),
    /// Boot data did not fit in guest memory.
    #[error("cannot write {what} into guest memory at {address:#x}")]
    Memory {
        /// What was written.
        what: &'static str,
        /// Guest-physical address.
        address: u64,
        /// The cause.
        source: GuestMemoryError,
    },
}

/// The files in guest memory: what [`load_images`] put there.
#[derive(Debug, Clone, Copy)]
pub struct Images {
    kernel: kernel::Kernel,
    initrd: Option<Initrd>,
}

/// What [`load`] put into guest memory.
#[derive(Debug, Clone, Copy)]
pub struct Loaded {
    /// How to enter the kernel.
    pub entry: EntryPoint,
    /// Guest-physical range of the kernel, BSS included.
    pub kernel: (u64, u64),
    /// The initial RAM disk.
    pub initrd: Option<Initrd>,
}

/// Writes kernel, RAM disk, command line and tables into `mem`, which must be laid out as `layout` says.
pub fn load<M: GuestMemoryBackend>(mem: &M, layout: &Layout, request: &BootRequest) -> Result<Loaded, Error> {
    let images = load_images(mem, layout, request.kernel, request.initrd)?;
    describe(mem, layout, &images, request)
}

/// The first half of [`load`], the same for all machines of one size: writes the kernel and the RAM disk.
pub fn load_images<M: GuestMemoryBackend>(
    mem: &M,
    layout: &Layout,
    kernel: &File,
    initrd: Option<&File>,
) -> Result<Images, Error> {
    let kernel = kernel::load(mem, layout, kernel)?;
    let initrd = initrd
        .map(|file| initrd::load(mem, file, kernel.end, layout.low_ram_end()))
        .transpose()?;
    Ok(Images { kernel, initrd })
}

/// The second half of [`load`]: writes what differs from machine to machine, beside `images` that are in `mem` already.
/// The files of `request` are not read.
pub fn describe<M: GuestMemoryBackend>(
    mem: &M,
    layout: &Layout,
    images: &Images,
    request: &BootRequest,
) -> Result<Loaded, Error> {
    let &Images { kernel, initrd } = images;
    let mut line = KernelCommandLine::new()?;
    line.push(request.command_line)?;
    if request.started < request.vcpus {
        line.push(&format!("maxcpus={}", request.started))?;
    }
    let rsdp = match request.description {
        Description::MpTable => {
            for device in request.devices {
                line.push_virtio_mmio(device.base, device.size, device.gsi)?;
            }
            let devices = request.devices.iter().map(|device| device.gsi);
            let gsis: Vec<u32> = request.other_gsis.iter().copied().chain(devices).collect();
            mp_table::write(mem, request.vcpus, &gsis)?;
            None
        }
        Description::Acpi => Some(acpi::write(mem, request.vcpus, request.devices)?),
    };
    if let Some(limit) = kernel.command_line_limit
        && line.len_with_nul() > limit.saturating_add(1)
    {
        return Err(Error::CommandLineLimit {
            given: line.len_with_nul() - 1,
            limit,
        });
    }
    write(
        mem,
        "the command line",
        layout::COMMAND_LINE,
        &line.to_bytes_with_nul(),
    )?;

    let map = memory_map::memory_map(layout);
    let entry = match kernel.kind {
        kernel::Kind::ElfPvh { entry } => {
            pvh::write(mem, &map, initrd, rsdp)?;
            EntryPoint::Pvh {
                eip: entry,
                start_info: layout::PVH_START_INFO,
            }
        }
        kernel::Kind::Elf64 { entry } => {
            zero_page::write(mem, &map, None, line.len_with_nul(), initrd, rsdp)?;
            entry::write_page_tables(mem)?;
            EntryPoint::Long64 {
                rip: entry,
                zero_page: layout::ZERO_PAGE,
            }
        }
        kernel::Kind::BzImage { entry, header } => {
            zero_page::write(mem, &map, Some(header), line.len_with_nul(), initrd, rsdp)?;
            entry::write_page_tables(mem)?;
            EntryPoint::Long64 {
                rip: entry,
                zero_page: layout::ZERO_PAGE,
            }
        }
    };
    entry::write_gdt(mem, &entry)?;
    Ok(Loaded {
        entry,
        kernel: (kernel.start, kernel.end),
        initrd,
    })
}

/// Writes `bytes` at guest-physical `address`, naming `what` on failure.
fn write<M: GuestMemoryBackend>(
    mem: &M,
    what: &'static str,
    address: u64,
    bytes: &[u8],
) -> Result<(), Error> {
    mem.write_slice(bytes, GuestAddress(address))
        .map_err(|source| Error::Memory {
            what,
            address,
            source,
        })
}
