// SPDX-License-Identifier: Apache-2.0
//! An IOAPIC of our own, for KVM's split interrupt chip (Intel 82093AA datasheet).
//!
//! With KVM_CAP_SPLIT_IRQCHIP only the local APICs live in the kernel. A pin of this IOAPIC is a KVM GSI; when the
//! guest programs a redirection entry, the entry becomes an MSI route of that GSI (KVM_SET_GSI_ROUTING), and a device's
//! irqfd goes straight to the local APIC. There is no PIC, no PIT and nothing for the guest to probe; and pins that no
//! device uses do not exist, which saves the guest the exits of clearing them.
//!
//! Edge-triggered pins (all that our tables describe) need nothing further. When a guest makes a pin level-triggered,
//! KVM reports the end of interrupt (KVM_EXIT_IOAPIC_EOI), and the interrupt is sent again if the device still asserts
//! it. An interrupt that came while its pin was masked is sent at unmasking if the device still asserts it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi, kvm_msi,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use cloister_devices::rate_limit::RateLimit;

/// Most pins. KVM reserves as many routes; the MP table has room for their entries.
pub const MAX_PINS: u8 = 32;
/// Bytes of register space.
pub const REGISTERS_SIZE: u64 = 0x20;
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const REG_ID: u8 = 0;
const REG_VERSION: u8 = 1;
const REG_ARBITRATION: u8 = 2;
const REG_TABLE: u8 = 0x10;
const VERSION: u32 = 0x11;

/// Redirection entry: the pin is masked.
const MASKED: u64 = 1 << 16;
/// Level-triggered.
const LEVEL: u64 = 1 << 15;
/// Bits a guest cannot write: delivery status and remote IRR.
const READ_ONLY: u64 = 1 << 12 | 1 << 14;

/// Whether a pin's device still asserts its interrupt.
pub type Asserted = Box<dyn Fn() -> bool + Send + Sync>;

/// What a redirection entry sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Message {
    address: u32,
    data: u32,
}

/// The guest-visible registers; also what is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoapicState {
    id: u8,
    select: u8,
    table: Vec<u64>,
}

/// The IOAPIC.
pub struct Ioapic {
    vm: Arc<VmFd>,
    state: Mutex<IoapicState>,
    asserted: OnceLock<HashMap<u32, Asserted>>,
    complaints: RateLimit,
}

impl Ioapic {
    /// An IOAPIC after reset, with all of its `pins` masked.
    pub fn new(vm: Arc<VmFd>, pins: u8) -> Self {
        let table = vec![MASKED; usize::from(pins.min(MAX_PINS))];
        Self {
            vm,
            state: Mutex::new(IoapicState {
                id: 0,
                select: 0,
                table,
            }),
            asserted: OnceLock::new(),
            complaints: RateLimit::new(),
        }
    }

    /// Says, per pin, how to ask its device whether it still asserts its interrupt. Once, before the guest runs.
    pub fn set_asserted(&self, asserted: HashMap<u32, Asserted>) {
        let _ = self.asserted.set(asserted);
    }

    fn lock(&self) -> MutexGuard<'_, IoapicState> {
        // No code panics between two writes of the state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest ended the interrupt with this vector (KVM_EXIT_IOAPIC_EOI).
    pub fn end_of_interrupt(&self, vector: u8) {
        let pins: Vec<usize> = {
            let state = self.lock();
            let entries = state.table.iter().enumerate();
            entries
                .filter(|(_, e)| **e & (MASKED | LEVEL) == LEVEL && **e & 0xff == u64::from(vector))
                .map(|(pin, _)| pin)
                .collect()
        };
        for pin in pins {
            self.send_if_asserted(pin);
        }
    }

    fn send_if_asserted(&self, pin: usize) {
        let asserted = self
            .asserted
            .get()
            .and_then(|all| all.get(&u32::try_from(pin).ok()?));
        if !asserted.is_some_and(|asserted| asserted()) {
            return;
        }
        let Some(message) = self.lock().table.get(pin).copied().and_then(message) else {
            return;
        };
        let msi = kvm_msi {
            address_lo: message.address,
            data: message.data,
            ..kvm_msi::default()
        };
        if let Err(error) = self.vm.signal_msi(msi) {
            self.complaints
                .warn("ioapic", format_args!("pin {pin}: interrupt refused: {error}"));
        }
    }

    fn read_register(&self) -> u32 {
        let state = self.lock();
        match state.select {
            REG_ID | REG_ARBITRATION => u32::from(state.id) << 24,
            REG_VERSION => VERSION | u32::try_from(state.table.len().saturating_sub(1)).unwrap_or(0) << 16,
            select => match table_position(select, &state.table) {
                Some((pin, high)) => half(state.table[pin], high),
                None => 0,
            },
        }
    }

    fn write_register(&self, value: u32) {
        let mut state = self.lock();
        let select = state.select;
        if select == REG_ID {
            state.id = u8::try_from(value >> 24 & 0xf).unwrap_or(0);
            return;
        }
        let Some((pin, high)) = table_position(select, &state.table) else {
            return;
        };
        let old = state.table[pin];
        let new = if high {
            old & 0xffff_ffff | u64::from(value) << 32
        } else {
            old & !0xffff_ffff | u64::from(value)
        };
        let new = new & !READ_ONLY;
        state.table[pin] = new;
        // A route costs KVM a grace period: only what changes what is sent is passed on.
        if message(old) != message(new) {
            self.set_routes(&state);
        }
        drop(state);
        if old & MASKED != 0 && new & MASKED == 0 {
            self.send_if_asserted(pin);
        }
    }

    fn set_routes(&self, state: &IoapicState) {
        let entries = routes(&state.table);
        let result = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))
            .and_then(|routing| self.vm.set_gsi_routing(&routing));
        if let Err(error) = result {
            self.complaints
                .warn("ioapic", format_args!("KVM refused interrupt routes: {error}"));
        }
    }

    /// The registers, for a snapshot.
    pub fn save(&self) -> IoapicState {
        self.lock().clone()
    }

    /// Puts back saved registers. `false` when they belong to an IOAPIC with another number of pins.
    pub fn restore(&self, saved: IoapicState) -> bool {
        let mut state = self.lock();
        if saved.table.len() != state.table.len() {
            return false;
        }
        *state = saved;
        for entry in &mut state.table {
            *entry &= !READ_ONLY;
        }
        self.set_routes(&state);
        true
    }
}

/// Which entry and half `select` means.
fn table_position(select: u8, table: &[u64]) -> Option<(usize, bool)> {
    let at = usize::from(select.checked_sub(REG_TABLE)?);
    (at / 2 < table.len()).then_some((at / 2, at % 2 == 1))
}

fn half(entry: u64, high: bool) -> u32 {
    u32::try_from((if high { entry >> 32 } else { entry }) & 0xffff_ffff).unwrap_or(0)
}

/// What an entry sends, unless it is masked (Intel SDM volume 3, 11.11: message address and data).
fn message(entry: u64) -> Option<Message> {
    if entry & MASKED != 0 {
        return None;
    }
    let bits = |shift: u32, width: u32| u32::try_from(entry >> shift & ((1 << width) - 1)).unwrap_or(0);
    let (vector, delivery, logical, level, destination) =
        (bits(0, 8), bits(8, 3), bits(11, 1), bits(15, 1), bits(56, 8));
    // Lowest priority is sent with the redirection hint.
    let hint = u32::from(delivery == 1);
    Some(Message {
        address: 0xfee0_0000 | destination << 12 | hint << 3 | logical << 2,
        data: vector | delivery << 8 | level << 14 | level << 15,
    })
}

fn routes(table: &[u64]) -> Vec<kvm_irq_routing_entry> {
    let pins = table.iter().zip(0u32..);
    pins.filter_map(|(entry, gsi)| {
        let message = message(*entry)?;
        Some(kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_MSI,
            u: kvm_irq_routing_entry__bindgen_ty_1 {
                msi: kvm_irq_routing_msi {
                    address_lo: message.address,
                    data: message.data,
                    ..kvm_irq_routing_msi::default()
                },
            },
            ..kvm_irq_routing_entry::default()
        })
    })
    .collect()
}

impl BusDevice for Ioapic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let value = match offset {
            SELECT => u32::from(self.lock().select),
            WINDOW => self.read_register(),
            _ => return,
        };
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (SELECT, [select, ..]) => self.lock().select = *select,
            (WINDOW, &[a, b, c, d]) => self.write_register(u32::from_le_bytes([a, b, c, d])),
            _ => self
                .complaints
                .warn("ioapic", format_args!("odd write at {offset:#x}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_becomes_the_message_of_the_specification() {
        // Vector 0x31, fixed, physical, edge, APIC id 3.
        let entry = 0x31 | 3 << 56;
        assert_eq!(
            message(entry),
            Some(Message {
                address: 0xfee0_3000,
                data: 0x31
            })
        );
        // Lowest priority, logical, level.
        let entry = 0x42 | 1 << 8 | 1 << 11 | LEVEL | 0xff << 56;
        assert_eq!(
            message(entry),
            Some(Message {
                address: 0xfeef_f00c,
                data: 0xc142
            })
        );
        assert_eq!(message(entry | MASKED), None);
    }

    #[test]
    fn masked_pins_have_no_route() {
        let table = [MASKED, 0x20, MASKED | 0x21, 0x22];
        let gsis: Vec<u32> = routes(&table).iter().map(|r| r.gsi).collect();
        assert_eq!(gsis, [1, 3]);
    }

    #[test]
    fn selectors_outside_the_table_mean_nothing() {
        let table = [MASKED; 5];
        assert_eq!(table_position(0x10, &table), Some((0, false)));
        assert_eq!(table_position(0x19, &table), Some((4, true)));
        for select in [0, 1, 2, 0xf, 0x1a, 0xff] {
            assert_eq!(table_position(select, &table), None);
        }
    }
}
