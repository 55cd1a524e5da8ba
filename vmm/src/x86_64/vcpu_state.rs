// SPDX-License-Identifier: Apache-2.0
//! Making a vCPU ready, saving it and putting it back.
//!
//! Order matters. CPUID first, since KVM checks much of the rest against it. Restoring: special registers before
//! MSRs, the local APIC after the special registers (its base is one), the TSC before the TSC deadline, events last.

use cloister_boot::x86_64::entry::EntryPoint;
use cloister_boot::x86_64::msr;
use cloister_devices::state::{SavedState, StateError};
use kvm_bindings::{
    CpuId, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::error::CreateError;

const WHAT: &str = "vCPU";
/// Version of [`VcpuState`].
const STATE_VERSION: u16 = 1;
const IA32_TSC: u32 = 0x10;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// More cycles than any processor has in a second.
const FAR_TSC: u64 = 1 << 40;

#[derive(Serialize, Deserialize)]
struct VcpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    mp: kvm_mp_state,
    msrs: Vec<kvm_msr_entry>,
    tsc_khz: Option<u32>,
}

/// Gives a new vCPU its CPUID, and then the MSRs that depend on it.
pub(crate) fn set_cpuid(vcpu: &VcpuFd, cpuid: &[kvm_cpuid_entry2]) -> Result<(), CreateError> {
    let kvm = |what| move |source| CreateError::Kvm { what, source };
    let cpuid =
        CpuId::from_entries(cpuid).map_err(|_| kvm("KVM_SET_CPUID2")(kvm_ioctls::Error::new(libc::E2BIG)))?;
    vcpu.set_cpuid2(&cpuid).map_err(kvm("KVM_SET_CPUID2"))
}

/// Gives the first vCPU its registers and every vCPU its MSRs.
pub(crate) fn prepare_boot(vcpu: &VcpuFd, entry: Option<&EntryPoint>) -> Result<(), CreateError> {
    let kvm = |what| move |source| CreateError::Kvm { what, source };
    for entry in msr::boot_msrs() {
        let msrs = Msrs::from_entries(&[entry])
            .map_err(|_| kvm("KVM_SET_MSRS")(kvm_ioctls::Error::new(libc::E2BIG)))?;
        if vcpu.set_msrs(&msrs).map_err(kvm("KVM_SET_MSRS"))? != 1 {
            return Err(CreateError::Msr { index: entry.index });
        }
    }
    if let Some(entry) = entry {
        let mut sregs = vcpu.get_sregs().map_err(kvm("KVM_GET_SREGS"))?;
        entry.set_sregs(&mut sregs);
        vcpu.set_sregs(&sregs).map_err(kvm("KVM_SET_SREGS"))?;
        vcpu.set_regs(&entry.regs()).map_err(kvm("KVM_SET_REGS"))?;
        vcpu.set_fpu(&EntryPoint::fpu()).map_err(kvm("KVM_SET_FPU"))?;
    }
    Ok(())
}

/// Makes KVM look for the destinations of interrupts again. Its map of local APICs is made when one is reset, at which time a
/// vCPU that is being created is not in the VM's list yet: without this, INIT and SIPI for one that is created while the VM
/// runs would go nowhere (Linux 6.1). KVM_SET_LAPIC makes the map anew.
pub(crate) fn publish_lapic(vcpu: &VcpuFd) -> Result<(), CreateError> {
    let kvm = |what| move |source| CreateError::Kvm { what, source };
    let lapic = vcpu.get_lapic().map_err(kvm("KVM_GET_LAPIC"))?;
    vcpu.set_lapic(&lapic).map_err(kvm("KVM_SET_LAPIC"))
}

/// MSRs that describe the processor rather than its state: they follow from CPUID and the host.
fn is_description(index: u32) -> bool {
    // Platform id, microcode, MTRR capabilities, ARCH_CAPABILITIES, PERF_CAPABILITIES, VMX capabilities, AMD's
    // DE_CFG and hardware configuration.
    matches!(
        index,
        0x17 | 0x8b | 0xfe | 0x10a | 0x345 | 0x3a | 0x480..=0x491 | 0xc001_0015 | 0xc001_1029
    )
}

/// The state of a vCPU that does not run. `msr_indices` are those of KVM_GET_MSR_INDEX_LIST.
pub(crate) fn save(vcpu: &VcpuFd, msr_indices: &[u32]) -> Result<SavedState, StateError> {
    let busy = |what: &str, error: kvm_ioctls::Error| StateError::Busy {
        what: WHAT,
        why: format!("{what}: {error}"),
    };
    // Events that are under way are only in mp_state and events once this has been asked for.
    let mp = vcpu.get_mp_state().map_err(|e| busy("KVM_GET_MP_STATE", e))?;
    let state = VcpuState {
        regs: vcpu.get_regs().map_err(|e| busy("KVM_GET_REGS", e))?,
        sregs: vcpu.get_sregs().map_err(|e| busy("KVM_GET_SREGS", e))?,
        xsave: vcpu.get_xsave().map_err(|e| busy("KVM_GET_XSAVE", e))?,
        xcrs: vcpu.get_xcrs().map_err(|e| busy("KVM_GET_XCRS", e))?,
        debug: vcpu.get_debug_regs().map_err(|e| busy("KVM_GET_DEBUGREGS", e))?,
        lapic: vcpu.get_lapic().map_err(|e| busy("KVM_GET_LAPIC", e))?,
        events: vcpu
            .get_vcpu_events()
            .map_err(|e| busy("KVM_GET_VCPU_EVENTS", e))?,
        mp,
        msrs: get_msrs(vcpu, msr_indices)?,
        tsc_khz: vcpu.get_tsc_khz().ok(),
    };
    SavedState::encode(WHAT, STATE_VERSION, &state)
}

/// KVM lists MSRs that this vCPU's CPUID does not have: those it does not answer are left out.
fn get_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, StateError> {
    let failed = |why: String| StateError::Busy { what: WHAT, why };
    let mut rest: Vec<kvm_msr_entry> = indices
        .iter()
        .filter(|index| !is_description(**index))
        .map(|index| kvm_msr_entry {
            index: *index,
            ..kvm_msr_entry::default()
        })
        .collect();
    // The deadline is relative to the TSC.
    rest.sort_by_key(|entry| (entry.index == IA32_TSC_DEADLINE, entry.index != IA32_TSC));
    let mut found = Vec::new();
    while !rest.is_empty() {
        let mut msrs = Msrs::from_entries(&rest).map_err(|_| failed("too many MSRs".to_owned()))?;
        let count = vcpu
            .get_msrs(&mut msrs)
            .map_err(|e| failed(format!("KVM_GET_MSRS: {e}")))?;
        found.extend_from_slice(&msrs.as_slice()[..count.min(rest.len())]);
        rest.drain(..(count + 1).min(rest.len()));
    }
    Ok(found)
}

/// Puts back what `save` gave, into a vCPU that has its CPUID and has not run. `first`: no other one of the VM has been
/// restored yet.
///
/// KVM takes a TSC that is within a second of what another vCPU has for an attempt to make both the same, and before
/// Linux 6.7 that of a new VM counts, too: the TSC of a guest that was saved in its first second would begin anew, behind
/// what the guest has seen. So the first one is set far away before it is set.
pub(crate) fn restore(vcpu: &VcpuFd, saved: &SavedState, first: bool) -> Result<(), StateError> {
    let refused = |what: &str, error: kvm_ioctls::Error| StateError::Invalid {
        what: WHAT,
        why: format!("{what} refused it: {error}"),
    };
    let state: VcpuState = saved.decode(WHAT, STATE_VERSION)?;
    if let Some(khz) = state.tsc_khz
        && vcpu.get_tsc_khz().is_ok_and(|own| own.abs_diff(khz) > own / 4000)
    {
        // More than 250 ppm apart (the bound other VMMs use, too): the guest's clock would drift.
        vcpu.set_tsc_khz(khz).map_err(|e| refused("KVM_SET_TSC_KHZ", e))?;
    }
    vcpu.set_mp_state(state.mp)
        .map_err(|e| refused("KVM_SET_MP_STATE", e))?;
    vcpu.set_regs(&state.regs)
        .map_err(|e| refused("KVM_SET_REGS", e))?;
    vcpu.set_sregs(&state.sregs)
        .map_err(|e| refused("KVM_SET_SREGS", e))?;
    vcpu.set_xcrs(&state.xcrs)
        .map_err(|e| refused("KVM_SET_XCRS", e))?;
    // SAFETY: a kvm_xsave of 4 KiB is what KVM reads: no process of ours asks for larger, dynamically enabled state.
    unsafe { vcpu.set_xsave(&state.xsave) }.map_err(|e| refused("KVM_SET_XSAVE", e))?;
    vcpu.set_debug_regs(&state.debug)
        .map_err(|e| refused("KVM_SET_DEBUGREGS", e))?;
    vcpu.set_lapic(&state.lapic)
        .map_err(|e| refused("KVM_SET_LAPIC", e))?;
    if first && let Some(tsc) = state.msrs.iter().find(|msr| msr.index == IA32_TSC) {
        let data = tsc.data.wrapping_add(FAR_TSC);
        set_msrs(vcpu, &[kvm_msr_entry { data, ..*tsc }])?;
    }
    set_msrs(vcpu, &state.msrs)?;
    vcpu.set_vcpu_events(&state.events)
        .map_err(|e| refused("KVM_SET_VCPU_EVENTS", e))
}

/// Sets MSRs, in their order.
fn set_msrs(vcpu: &VcpuFd, mut entries: &[kvm_msr_entry]) -> Result<(), StateError> {
    let invalid = |why: String| StateError::Invalid { what: WHAT, why };
    while !entries.is_empty() {
        let msrs = Msrs::from_entries(entries).map_err(|_| invalid("too many MSRs".to_owned()))?;
        let set = vcpu
            .set_msrs(&msrs)
            .map_err(|e| invalid(format!("KVM_SET_MSRS refused it: {e}")))?;
        let Some(refused) = entries.get(set) else {
            return Ok(());
        };
        // Some that read as zero cannot be written at all; zero they are in a new vCPU as well.
        if refused.data != 0 {
            return Err(invalid(format!(
                "MSR {:#x} cannot be set to {:#x} here",
                refused.index, refused.data
            )));
        }
        entries = entries.get(set + 1..).unwrap_or_default();
    }
    Ok(())
}
