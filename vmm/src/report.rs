// SPDX-License-Identifier: Apache-2.0
//! What a cell says to somebody who wants to know why its guest does nothing.

use cloister_devices::virtio::DeviceReport;
use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE};
use kvm_ioctls::VcpuFd;
use serde::Serialize;

/// Interrupt enable flag of RFLAGS.
const RFLAGS_IF: u64 = 1 << 9;
/// Offsets of the local APIC's in-service and interrupt request registers: 8 of 32 bits, 16 bytes apart (Intel SDM volume 3,
/// table 11-1).
const ISR: usize = 0x100;
const IRR: usize = 0x200;

/// See [`crate::Cell::report`].
#[derive(Clone, Debug, Serialize)]
pub struct CellReport {
    /// Name and queues of each device that has a driver and is not at work right now.
    pub devices: Vec<(String, DeviceReport)>,
    /// The vCPUs.
    pub vcpus: Vec<VcpuReport>,
}

/// Where a vCPU stands. Fields are `None` where KVM did not tell.
#[derive(Clone, Debug, Serialize)]
pub struct VcpuReport {
    /// Its instruction pointer.
    pub rip: Option<u64>,
    /// Whether it takes interrupts.
    pub interruptible: Option<bool>,
    /// `running`, `halted` or another state of KVM's.
    pub state: &'static str,
    /// Interrupt vectors that wait for it.
    pub pending: Vec<usize>,
    /// Interrupt vectors that it has not ended.
    pub in_service: Vec<usize>,
}

impl VcpuReport {
    pub(crate) fn new(fd: &VcpuFd) -> Self {
        let registers = fd.get_regs().ok();
        let apic = fd.get_lapic().ok();
        let vectors = |offset: usize| {
            let set = |vector: &usize| {
                let at = offset + vector / 32 * 16 + vector % 32 / 8;
                let byte = apic.as_ref().and_then(|apic| apic.regs.get(at));
                byte.is_some_and(|byte| byte.cast_unsigned() >> (vector % 8) & 1 != 0)
            };
            (0..256).filter(set).collect()
        };
        Self {
            rip: registers.map(|registers| registers.rip),
            interruptible: registers.map(|registers| registers.rflags & RFLAGS_IF != 0),
            state: match fd.get_mp_state().map(|state| state.mp_state) {
                Ok(KVM_MP_STATE_RUNNABLE) => "running",
                Ok(KVM_MP_STATE_HALTED) => "halted",
                Ok(_) => "not started",
                Err(_) => "unknown",
            },
            pending: vectors(IRR),
            in_service: vectors(ISR),
        }
    }
}
