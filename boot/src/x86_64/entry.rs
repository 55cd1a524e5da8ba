// SPDX-License-Identifier: Apache-2.0
//! Register values of the first vCPU at the kernel's first instruction.
//!
//! Only the first vCPU gets them: KVM's in-kernel local APIC starts the others from INIT/SIPI as the guest asks.

use super::layout::{GDT, HIGH_MEMORY, PAGE_DIRECTORY, PDPT, PML4};
use super::{Error, write as write_bytes};
use kvm_bindings::{kvm_dtable, kvm_fpu, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::GuestMemoryBackend;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// RFLAGS with its always-one bit only: interrupts off.
const RFLAGS: u64 = 2;
/// Page table entry: present and writable.
const PAGE_PRESENT_WRITABLE: u64 = 0b11;
/// Page directory entry: also a 2 MiB page.
const PAGE_LARGE: u64 = 1 << 7;
/// Boot stack: below everything this crate writes. PVH kernels bring their own, the 64-bit protocol asks for none.
const BOOT_STACK: u64 = 0x8ff0;

/// How the first vCPU enters the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryPoint {
    /// PVH: 32-bit protected mode, paging off, EBX holds the start info's address.
    Pvh {
        /// Entry address.
        eip: u32,
        /// Guest-physical address of `hvm_start_info`.
        start_info: u64,
    },
    /// Linux 64-bit boot protocol: long mode with the first GiB mapped one to one, RSI holds the zero page's
    /// address.
    Long64 {
        /// Entry address.
        rip: u64,
        /// Guest-physical address of `boot_params`.
        zero_page: u64,
    },
}

impl EntryPoint {
    /// The general registers.
    pub fn regs(&self) -> kvm_regs {
        let stack = BOOT_STACK;
        match *self {
            Self::Pvh { eip, start_info } => kvm_regs {
                rip: u64::from(eip),
                rbx: start_info,
                rflags: RFLAGS,
                ..kvm_regs::default()
            },
            Self::Long64 { rip, zero_page } => kvm_regs {
                rip,
                rsi: zero_page,
                rsp: stack,
                rbp: stack,
                rflags: RFLAGS,
                ..kvm_regs::default()
            },
        }
    }

    /// Changes `sregs`, as KVM_GET_SREGS answered them after reset, into those of the entry.
    pub fn set_sregs(&self, sregs: &mut kvm_sregs) {
        let gdt = self.gdt();
        sregs.gdt = kvm_dtable {
            base: GDT,
            limit: u16::try_from(gdt.len() * 8 - 1).unwrap_or(u16::MAX),
            ..kvm_dtable::default()
        };
        sregs.idt = kvm_dtable::default();
        let data = segment(gdt[2], 2);
        sregs.cs = segment(gdt[1], 1);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = segment(gdt[3], 3);
        match self {
            Self::Pvh { .. } => {
                sregs.cr0 = CR0_PE | CR0_ET;
                sregs.cr4 = 0;
                sregs.efer = 0;
            }
            Self::Long64 { .. } => {
                sregs.cr3 = PML4;
                sregs.cr4 = CR4_PAE;
                sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
                sregs.efer = EFER_LME | EFER_LMA;
            }
        }
    }

    /// The floating-point state after FNINIT, with all SSE exceptions masked.
    pub fn fpu() -> kvm_fpu {
        kvm_fpu {
            fcw: 0x37f,
            mxcsr: 0x1f80,
            ..kvm_fpu::default()
        }
    }

    /// Null, code, data, task state.
    fn gdt(&self) -> [u64; 4] {
        match self {
            // Flat 4 GiB, 32-bit code. The task state is 32-bit too, and 0x67 bytes long as PVH asks.
            Self::Pvh { .. } => [
                0,
                descriptor(0xc09b, 0xfffff),
                descriptor(0xc093, 0xfffff),
                descriptor(0x008b, 0x67),
            ],
            Self::Long64 { .. } => [
                0,
                descriptor(0xa09b, 0xfffff),
                descriptor(0xc093, 0xfffff),
                descriptor(0x808b, 0xfffff),
            ],
        }
    }
}

/// A segment descriptor with base 0. `flags`: G, D/B, L, AVL in bits 12 to 15, P, DPL, S, type in bits 0 to 7.
fn descriptor(flags: u16, limit: u32) -> u64 {
    (u64::from(flags & 0xf0ff) << 40) | (u64::from(limit & 0xf_0000) << 32) | u64::from(limit & 0xffff)
}

/// The segment register that loading descriptor number `index` would give.
fn segment(descriptor: u64, index: u16) -> kvm_segment {
    let bits = |shift: u32, width: u32| u8::try_from((descriptor >> shift) & ((1 << width) - 1)).unwrap_or(0);
    let limit = u32::try_from((descriptor & 0xffff) | ((descriptor >> 32) & 0xf_0000)).unwrap_or(0);
    let g = bits(55, 1);
    kvm_segment {
        base: 0,
        limit: if g == 1 { (limit << 12) | 0xfff } else { limit },
        selector: index * 8,
        type_: bits(40, 4),
        s: bits(44, 1),
        dpl: bits(45, 2),
        present: bits(47, 1),
        avl: bits(52, 1),
        l: bits(53, 1),
        db: bits(54, 1),
        g,
        unusable: 0,
        padding: 0,
    }
}

/// Writes the GDT that `entry`'s segment registers refer to.
pub(super) fn write_gdt<M: GuestMemoryBackend>(mem: &M, entry: &EntryPoint) -> Result<(), Error> {
    let bytes: Vec<u8> = entry.gdt().iter().flat_map(|d| d.to_le_bytes()).collect();
    write_bytes(mem, "the GDT", GDT, &bytes)
}

/// Writes page tables that map the first GiB one to one with pages of 2 MiB. Linux maps what it needs beyond.
pub fn write_page_tables<M: GuestMemoryBackend>(mem: &M) -> Result<(), Error> {
    const WHAT: &str = "the boot page tables";
    write_bytes(mem, WHAT, PML4, &(PDPT | PAGE_PRESENT_WRITABLE).to_le_bytes())?;
    write_bytes(
        mem,
        WHAT,
        PDPT,
        &(PAGE_DIRECTORY | PAGE_PRESENT_WRITABLE).to_le_bytes(),
    )?;
    let directory: Vec<u8> = (0..512u64)
        .flat_map(|n| ((n << 21) | PAGE_PRESENT_WRITABLE | PAGE_LARGE).to_le_bytes())
        .collect();
    write_bytes(mem, WHAT, PAGE_DIRECTORY, &directory)
}

const _: () = assert!(PAGE_DIRECTORY + 0x1000 <= HIGH_MEMORY && BOOT_STACK < PML4);

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    #[test]
    fn descriptors_are_the_well_known_flat_ones() {
        assert_eq!(descriptor(0xc09b, 0xfffff), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(0xa09b, 0xfffff), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(0xc093, 0xfffff), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(0x008b, 0x67), 0x0000_8b00_0000_0067);
    }

    #[test]
    fn pvh_enters_flat_protected_mode_without_paging() {
        let entry = EntryPoint::Pvh {
            eip: 0x100_0000,
            start_info: 0x6000,
        };
        let mut sregs = kvm_sregs {
            cr3: 5,
            efer: 1,
            ..kvm_sregs::default()
        };
        entry.set_sregs(&mut sregs);
        assert_eq!((sregs.cr0 & CR0_PG, sregs.efer, sregs.cr4), (0, 0, 0));
        assert_eq!(
            (sregs.cs.limit, sregs.cs.db, sregs.cs.l, sregs.cs.type_),
            (u32::MAX, 1, 0, 0xb)
        );
        assert_eq!((sregs.tr.limit, sregs.tr.type_, sregs.tr.s), (0x67, 0xb, 0));
        assert_eq!((entry.regs().rip, entry.regs().rbx), (0x100_0000, 0x6000));
    }

    #[test]
    fn long_mode_maps_the_first_gib_one_to_one() {
        let entry = EntryPoint::Long64 {
            rip: 0x100_0200,
            zero_page: 0x7000,
        };
        let mut sregs = kvm_sregs::default();
        entry.set_sregs(&mut sregs);
        assert_eq!(sregs.efer, EFER_LMA | EFER_LME);
        assert_eq!((sregs.cs.l, sregs.cs.db), (1, 0));
        let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write_page_tables(&mem).unwrap();
        write_gdt(&mem, &entry).unwrap();
        let read = |at: u64| mem.read_obj::<u64>(GuestAddress(at)).unwrap();
        assert_eq!(read(sregs.cr3) & !0xfff, PDPT);
        assert_eq!(read(PDPT) & !0xfff, PAGE_DIRECTORY);
        assert_eq!(read(PAGE_DIRECTORY + 8 * 511), 511 << 21 | 0x83);
        assert_eq!(read(GDT + 8), 0x00af_9b00_0000_ffff);
    }
}
