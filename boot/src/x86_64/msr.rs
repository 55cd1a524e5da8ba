// SPDX-License-Identifier: Apache-2.0
//! The MSRs each vCPU is given before it runs: only what differs from KVM's reset values.
//!
//! Set after CPUID, never before: from Linux 6.13 on KVM refuses MSRs that the vCPU's CPUID does not have
//! (Firecracker #6120). Nothing is copied from the host: KVM refuses some of those values on some hosts
//! (IA32_ARCH_CAPABILITIES under kvm_pvm), and the guest has no business with the rest. SYSENTER, STAR, FS and
//! GS bases are zero after reset already, as the boot protocols want them.

use kvm_bindings::kvm_msr_entry;

/// IA32_MISC_ENABLE.
pub const IA32_MISC_ENABLE: u32 = 0x1a0;
/// Its bit for fast string operations, without which Linux copies slowly.
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// IA32_MTRR_DEF_TYPE.
pub const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs enabled, everything write-back: without it Linux believes all memory to be uncached.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// The MSRs of a vCPU about to enter a kernel.
pub fn boot_msrs() -> [kvm_msr_entry; 2] {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..kvm_msr_entry::default()
    };
    [
        entry(IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(IA32_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
    ]
}
