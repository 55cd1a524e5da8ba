// SPDX-License-Identifier: Apache-2.0
//! What CPUID answers in the guest: KVM's supported set, minus what a pod must not have, plus its own topology.
//!
//! Removed: performance counters, hardware virtualisation (no nested guests), MONITOR/MWAIT, SGX, processor trace,
//! thermal and power management. Added: the hypervisor bit, the KVM leaf (without it Linux calibrates its TSC
//! against timers that are not there and waits for ever), x2APIC and TSC-deadline timer where KVM has them, the
//! timing leaf 0x4000_0010. Topology: one package, one thread per core, a shared last-level cache; APIC id = index.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Most vCPUs of a cell.
pub const MAX_VCPUS: u8 = 32;

/// The base of hypervisor leaves: "KVMKVMKVM".
const KVM_SIGNATURE: u32 = 0x4000_0000;
const KVM_FEATURES: u32 = 0x4000_0001;
const TIMING: u32 = 0x4000_0010;
/// Local APIC bus frequency that KVM emulates, in kHz (1 ns per cycle).
const APIC_BUS_KHZ: u32 = 1_000_000;

mod leaf1 {
    pub const ECX_DTES64: u32 = 1 << 2;
    pub const ECX_MONITOR: u32 = 1 << 3;
    pub const ECX_DS_CPL: u32 = 1 << 4;
    pub const ECX_VMX: u32 = 1 << 5;
    pub const ECX_SMX: u32 = 1 << 6;
    pub const ECX_EIST: u32 = 1 << 7;
    pub const ECX_TM2: u32 = 1 << 8;
    pub const ECX_PDCM: u32 = 1 << 15;
    pub const ECX_X2APIC: u32 = 1 << 21;
    pub const ECX_TSC_DEADLINE: u32 = 1 << 24;
    pub const ECX_HYPERVISOR: u32 = 1 << 31;
    pub const EDX_DS: u32 = 1 << 21;
    pub const EDX_HTT: u32 = 1 << 28;
}

/// Facts of the host and the cell that CPUID depends on.
#[derive(Debug, Clone, Copy)]
pub struct CpuidConfig {
    /// Number of vCPUs of the cell, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// KVM has the in-kernel local APIC's TSC-deadline mode (KVM_CAP_TSC_DEADLINE_TIMER).
    pub tsc_deadline: bool,
    /// Frequency of the guest's TSC in kHz (KVM_GET_TSC_KHZ), when known.
    pub tsc_khz: Option<u32>,
}

/// Why CPUID could not be computed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// Number of vCPUs out of range.
    #[error("{0} vCPUs is not between 1 and {MAX_VCPUS}")]
    Vcpus(u8),
    /// KVM does not support a leaf that nothing runs without.
    #[error("KVM's supported CPUID lacks leaf {0:#x}; this host's KVM cannot run a guest kernel")]
    MissingLeaf(u32),
}

/// Filters `supported` (KVM_GET_SUPPORTED_CPUID) for all vCPUs of a cell; [`for_vcpu`] adds each one's APIC id.
pub fn filter(supported: &[kvm_cpuid_entry2], config: &CpuidConfig) -> Result<Vec<kvm_cpuid_entry2>, Error> {
    if !(1..=MAX_VCPUS).contains(&config.vcpus) {
        return Err(Error::Vcpus(config.vcpus));
    }
    for leaf in [0, 1] {
        if !supported.iter().any(|e| e.function == leaf) {
            return Err(Error::MissingLeaf(leaf));
        }
    }
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .iter()
        // Topology leaves are written anew; SGX, processor trace and the newer duplicates of topology are left out.
        .filter(|e| !matches!(e.function, 0xb | 0x12 | 0x14 | 0x1f | 0x8000_0026 | TIMING))
        .filter(|e| (e.function & 0xffff_0000) != 0x4000_0000 || e.function <= KVM_FEATURES)
        .copied()
        .collect();
    for entry in &mut entries {
        filter_entry(entry, config);
    }
    if entries.iter().any(|e| e.function == 0 && e.eax >= 0xb) {
        for index in 0..3 {
            entries.push(extended_topology(index, config));
        }
    }
    if let Some(tsc_khz) = config.tsc_khz
        && entries.iter().any(|e| e.function == KVM_SIGNATURE)
    {
        entries.push(kvm_cpuid_entry2 {
            function: TIMING,
            eax: tsc_khz,
            ebx: APIC_BUS_KHZ,
            ..kvm_cpuid_entry2::default()
        });
    }
    Ok(entries)
}

/// Writes the APIC id of vCPU `index` into a copy of the filtered leaves.
pub fn for_vcpu(filtered: &[kvm_cpuid_entry2], index: u8) -> Vec<kvm_cpuid_entry2> {
    let id = u32::from(index);
    let mut entries = filtered.to_vec();
    for entry in &mut entries {
        match entry.function {
            1 => entry.ebx = (entry.ebx & 0x00ff_ffff) | id << 24,
            0xb => entry.edx = id,
            0x8000_001e => {
                entry.eax = id;
                entry.ebx = id;
            }
            _ => {}
        }
    }
    entries
}

fn filter_entry(entry: &mut kvm_cpuid_entry2, config: &CpuidConfig) {
    let vcpus = u32::from(config.vcpus);
    match entry.function {
        // Leaf 0xb is the last that is described; above it are PMU, trace and the like except state (0xd).
        0 => entry.eax = entry.eax.min(0xd),
        1 => {
            // Initial APIC id by vCPU; logical processors; CLFLUSH line in 8 bytes; brand none.
            entry.ebx = vcpus.next_power_of_two() << 16 | 8 << 8;
            entry.ecx &= !(leaf1::ECX_DTES64
                | leaf1::ECX_MONITOR
                | leaf1::ECX_DS_CPL
                | leaf1::ECX_VMX
                | leaf1::ECX_SMX
                | leaf1::ECX_EIST
                | leaf1::ECX_TM2
                | leaf1::ECX_PDCM
                | leaf1::ECX_TSC_DEADLINE);
            entry.ecx |= leaf1::ECX_HYPERVISOR | leaf1::ECX_X2APIC;
            if config.tsc_deadline {
                entry.ecx |= leaf1::ECX_TSC_DEADLINE;
            }
            entry.edx &= !(leaf1::EDX_DS | leaf1::EDX_HTT);
            if vcpus > 1 {
                entry.edx |= leaf1::EDX_HTT;
            }
        }
        4 => {
            entry.eax = share_cache(entry.eax, vcpus);
            if entry.eax & 0x1f != 0 {
                entry.eax = entry.eax & 0x03ff_ffff | (vcpus - 1).min(0x3f) << 26;
            }
        }
        // MONITOR/MWAIT is not there.
        5 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        // Thermal and power management: only that the APIC timer always runs.
        6 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (1 << 2, 0, 0, 0),
        // SGX (EBX 2, ECX 30), processor trace (EBX 25), hybrid (EDX 15), architectural LBR (EDX 19).
        7 if entry.index == 0 => {
            entry.ebx &= !(1 << 2 | 1 << 25);
            entry.ecx &= !(1 << 30);
            entry.edx &= !(1 << 15 | 1 << 19);
        }
        // Performance monitoring: none.
        0xa | 0x8000_0022 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        KVM_SIGNATURE => {
            entry.eax = if config.tsc_khz.is_some() {
                TIMING
            } else {
                KVM_FEATURES
            };
        }
        0x8000_0001 => {
            // CMP_LEGACY, SVM, IBS (10), performance counter extensions (23, 24, 28).
            entry.ecx &= !(1 << 1 | 1 << 2 | 1 << 10 | 1 << 23 | 1 << 24 | 1 << 28);
            if vcpus > 1 {
                entry.ecx |= 1 << 1;
            }
        }
        // Bits an APIC id needs for the core, and the number of cores less one (AMD).
        0x8000_0008 => entry.ecx = (vcpus - 1) | vcpus.next_power_of_two().trailing_zeros() << 12,
        // SVM features, IBS: none.
        0x8000_000a | 0x8000_001b => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0x8000_001d => entry.eax = share_cache(entry.eax, vcpus),
        // One thread per core, node 0 of 1; ids by vCPU.
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        _ => {}
    }
}

/// Sets how many logical processors share a cache (bits 14 to 25, less one): level 3 and up all, below it one.
fn share_cache(eax: u32, vcpus: u32) -> u32 {
    if eax & 0x1f == 0 {
        return eax;
    }
    let level = (eax >> 5) & 7;
    let shared = if level >= 3 {
        vcpus.next_power_of_two() - 1
    } else {
        0
    };
    eax & !(0xfff << 14) | shared << 14
}

/// Leaf 0xb: level 0 is the thread (one per core), level 1 the cores of the package.
fn extended_topology(index: u32, config: &CpuidConfig) -> kvm_cpuid_entry2 {
    const SMT: u32 = 1;
    const CORE: u32 = 2;
    let vcpus = u32::from(config.vcpus);
    let (shift, processors, kind) = match index {
        0 => (0, 1, SMT),
        1 => (vcpus.next_power_of_two().trailing_zeros(), vcpus, CORE),
        _ => (0, 0, 0),
    };
    kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: kind << 8 | index,
        ..kvm_cpuid_entry2::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..kvm_cpuid_entry2::default()
        }
    }

    fn all_ones() -> Vec<kvm_cpuid_entry2> {
        let ones = [u32::MAX; 4];
        let mut leaves = vec![leaf(0, 0, [0x1f, 0, 0, 0])];
        for function in [1, 6, 7, 0xa, 0xb, 0x14, 0x1f, KVM_SIGNATURE, KVM_FEATURES] {
            leaves.push(leaf(function, 0, ones));
        }
        // Data, instruction, unified level 2 and 3, end.
        for (index, eax) in [(0, 0x121), (1, 0x122), (2, 0x143), (3, 0x163), (4, 0)] {
            leaves.push(leaf(4, index, [eax, 0, 0, 0]));
        }
        for function in [0x8000_0001, 0x8000_0008, 0x8000_000a, 0x8000_001e] {
            leaves.push(leaf(function, 0, ones));
        }
        leaves
    }

    fn get(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let found: Vec<_> = entries
            .iter()
            .filter(|e| e.function == function && e.index == index)
            .collect();
        assert_eq!(found.len(), 1, "leaf {function:#x}.{index} not exactly once");
        *found[0]
    }

    const CONFIG: CpuidConfig = CpuidConfig {
        vcpus: 3,
        tsc_deadline: true,
        tsc_khz: Some(2_500_000),
    };

    #[test]
    fn topology_of_three_vcpus() {
        let filtered = filter(&all_ones(), &CONFIG).unwrap();
        for id in 0..3 {
            let cpu = for_vcpu(&filtered, id);
            assert_eq!(get(&cpu, 1, 0).ebx >> 24, u32::from(id));
            assert_eq!((get(&cpu, 1, 0).ebx >> 16) & 0xff, 4);
            let cores = get(&cpu, 0xb, 1);
            assert_eq!(
                (cores.eax, cores.ebx, cores.ecx, cores.edx),
                (2, 3, 0x201, u32::from(id))
            );
            assert_eq!(get(&cpu, 0xb, 0).ebx, 1);
            assert_eq!(get(&cpu, 0x8000_001e, 0).eax, u32::from(id));
        }
        assert_eq!(get(&filtered, 4, 0).eax >> 26, 2);
        assert_eq!((get(&filtered, 4, 0).eax >> 14) & 0xfff, 0);
        assert_eq!((get(&filtered, 4, 3).eax >> 14) & 0xfff, 3);
        assert_eq!(get(&filtered, 4, 4).eax, 0);
        assert_eq!(get(&filtered, 0x8000_0008, 0).ecx, 2 | 2 << 12);
    }

    #[test]
    fn what_a_pod_must_not_have_is_gone() {
        let filtered = filter(&all_ones(), &CONFIG).unwrap();
        let one = get(&filtered, 1, 0);
        assert_eq!(
            one.ecx & (leaf1::ECX_VMX | leaf1::ECX_MONITOR | leaf1::ECX_PDCM),
            0
        );
        assert_eq!(get(&filtered, 0x8000_0001, 0).ecx & 1 << 2, 0);
        let pmu = get(&filtered, 0xa, 0);
        assert_eq!((pmu.eax, pmu.ebx, pmu.ecx, pmu.edx), (0, 0, 0, 0));
        assert!(!filtered.iter().any(|e| matches!(e.function, 0x12 | 0x14 | 0x1f)));
        assert_eq!(get(&filtered, 0, 0).eax, 0xd);
    }

    #[test]
    fn hypervisor_leaves_and_timers_are_there() {
        let filtered = filter(&all_ones(), &CONFIG).unwrap();
        let ecx = get(&filtered, 1, 0).ecx;
        for bit in [leaf1::ECX_HYPERVISOR, leaf1::ECX_X2APIC, leaf1::ECX_TSC_DEADLINE] {
            assert_ne!(ecx & bit, 0);
        }
        assert_eq!(get(&filtered, KVM_SIGNATURE, 0).eax, TIMING);
        assert_eq!(get(&filtered, TIMING, 0).eax, 2_500_000);
        let without = CpuidConfig {
            tsc_deadline: false,
            tsc_khz: None,
            ..CONFIG
        };
        let filtered = filter(&all_ones(), &without).unwrap();
        assert_eq!(get(&filtered, 1, 0).ecx & leaf1::ECX_TSC_DEADLINE, 0);
        assert_eq!(get(&filtered, KVM_SIGNATURE, 0).eax, KVM_FEATURES);
    }

    #[test]
    fn one_vcpu_has_no_hyperthreading_bit() {
        let filtered = filter(&all_ones(), &CpuidConfig { vcpus: 1, ..CONFIG }).unwrap();
        assert_eq!(get(&filtered, 1, 0).edx & leaf1::EDX_HTT, 0);
        assert_eq!(get(&filtered, 0xb, 1).eax, 0);
    }

    #[test]
    fn impossible_requests_are_refused() {
        for vcpus in [0, 33, 255] {
            assert_eq!(
                filter(&all_ones(), &CpuidConfig { vcpus, ..CONFIG }).unwrap_err(),
                Error::Vcpus(vcpus)
            );
        }
        assert_eq!(
            filter(&[leaf(0, 0, [1, 0, 0, 0])], &CONFIG).unwrap_err(),
            Error::MissingLeaf(1)
        );
    }
}
