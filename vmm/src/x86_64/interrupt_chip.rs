// SPDX-License-Identifier: Apache-2.0
//! The interrupt chip: split where KVM has it, KVM's full one otherwise.

use std::sync::Arc;

use cloister_boot::x86_64::layout;
use cloister_devices::state::{SavedState, StateError};
use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_PIT_SPEAKER_DUMMY, kvm_clock_data, kvm_enable_cap, kvm_irqchip, kvm_pit_config, kvm_pit_state2,
};
use kvm_ioctls::{Cap, VmFd};
use serde::{Deserialize, Serialize};

use super::ioapic::{Ioapic, IoapicState};
use crate::config;
use crate::error::CreateError;

const WHAT: &str = "interrupt chip";
const STATE_VERSION: u16 = 1;
/// Pins of KVM's own IOAPIC.
pub const KERNEL_PINS: u8 = 24;

/// A VM's interrupt chip.
#[derive(Clone)]
pub enum Chip {
    /// Local APICs in the kernel, our IOAPIC, nothing else.
    Split(Arc<Ioapic>),
    /// KVM's local APICs, IOAPIC, PICs and PIT.
    Kernel,
}

#[derive(Serialize, Deserialize)]
enum ChipState {
    Split(IoapicState),
    Kernel {
        chips: Vec<kvm_irqchip>,
        pit: kvm_pit_state2,
    },
}

#[derive(Serialize, Deserialize)]
struct VmState {
    chip: ChipState,
    clock: kvm_clock_data,
}

impl Chip {
    /// Gives `vm` its interrupt chip: before any vCPU is made. `pins` counts the pins in use.
    pub fn create(vm: &Arc<VmFd>, wish: config::InterruptChip, pins: u8) -> Result<Self, CreateError> {
        let kvm = |what| move |source| CreateError::Kvm { what, source };
        // Intel's real-mode emulation needs four pages that are nobody's; others ignore the calls.
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(kvm("KVM_SET_IDENTITY_MAP_ADDR"))?;
        let tss = usize::try_from(layout::KVM_TSS).unwrap_or(0);
        vm.set_tss_address(tss).map_err(kvm("KVM_SET_TSS_ADDR"))?;
        if wish != config::InterruptChip::Kernel && vm.check_extension(Cap::SplitIrqchip) {
            let mut cap = kvm_enable_cap {
                cap: KVM_CAP_SPLIT_IRQCHIP,
                ..kvm_enable_cap::default()
            };
            cap.args[0] = u64::from(pins);
            match vm.enable_cap(&cap) {
                Ok(()) => return Ok(Self::Split(Arc::new(Ioapic::new(Arc::clone(vm), pins)))),
                Err(source) if wish == config::InterruptChip::Split => {
                    return Err(CreateError::Kvm {
                        what: "KVM_CAP_SPLIT_IRQCHIP",
                        source,
                    });
                }
                Err(error) => log::info!("no split interrupt chip here ({error}); using KVM's full one"),
            }
        } else if wish == config::InterruptChip::Split {
            return Err(CreateError::NoSplitChip);
        }
        vm.create_irq_chip().map_err(kvm("KVM_CREATE_IRQCHIP"))?;
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..kvm_pit_config::default()
        };
        vm.create_pit2(pit).map_err(kvm("KVM_CREATE_PIT2"))?;
        Ok(Self::Kernel)
    }

    /// State of the chip and of the VM's clock.
    pub fn save(&self, vm: &VmFd) -> Result<SavedState, StateError> {
        let busy = |error: kvm_ioctls::Error| StateError::Busy {
            what: WHAT,
            why: error.to_string(),
        };
        let chip = match self {
            Self::Split(ioapic) => ChipState::Split(ioapic.save()),
            Self::Kernel => {
                let mut chips = Vec::new();
                for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC] {
                    let mut chip = kvm_irqchip {
                        chip_id,
                        ..kvm_irqchip::default()
                    };
                    vm.get_irqchip(&mut chip).map_err(busy)?;
                    chips.push(chip);
                }
                ChipState::Kernel {
                    chips,
                    pit: vm.get_pit2().map_err(busy)?,
                }
            }
        };
        let mut clock = vm.get_clock().map_err(busy)?;
        // Only the clock's value goes back: the flags describe what the other fields meant on the saving host.
        clock.flags = 0;
        SavedState::encode(WHAT, STATE_VERSION, &VmState { chip, clock })
    }

    /// Puts back what `save` gave.
    pub fn restore(&self, vm: &VmFd, saved: &SavedState) -> Result<(), StateError> {
        let invalid = |why: String| StateError::Invalid { what: WHAT, why };
        let refused = |error: kvm_ioctls::Error| invalid(format!("KVM refused it: {error}"));
        let state: VmState = saved.decode(WHAT, STATE_VERSION)?;
        match (self, state.chip) {
            (Self::Split(ioapic), ChipState::Split(saved)) => {
                if !ioapic.restore(saved) {
                    return Err(invalid("another number of pins".to_owned()));
                }
            }
            (Self::Kernel, ChipState::Kernel { chips, pit }) => {
                for chip in &chips {
                    vm.set_irqchip(chip).map_err(refused)?;
                }
                vm.set_pit2(&pit).map_err(refused)?;
            }
            _ => return Err(invalid("saved from another kind of interrupt chip".to_owned())),
        }
        vm.set_clock(&state.clock).map_err(refused)
    }
}
