// SPDX-License-Identifier: Apache-2.0
//! What only x86_64 has: the interrupt chip, legacy ports, and a vCPU's registers.

pub(crate) mod cpu_check;
pub mod interrupt_chip;
pub mod ioapic;
pub mod ports;
pub mod vcpu_state;
