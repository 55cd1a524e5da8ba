// SPDX-License-Identifier: Apache-2.0
//! The I/O ports by which a guest ends itself, and the serial port's place among them.
//!
//! | port | what | who uses it |
//! | --- | --- | --- |
//! | 0x600 | ACPI sleep control: writing SLP_TYP 5 and SLP_EN powers off | kernels with ACPI (our FADT), tests |
//! | 0x601 | ACPI sleep status: reads 0 | the same |
//! | 0x602 | ACPI reset register: writing 1 restarts | the same |
//! | 0x64 | keyboard controller: writing 0xfe restarts | `reboot=k` |
//!
//! Our own kernel has no ACPI and no user-space port access: its agent restarts it (`RB_AUTOBOOT`), and `reboot=t` makes
//! that a triple fault. `RB_POWER_OFF` would halt it without a word, so the agent never uses it; see
//! [`crate::stop`] for how the end is told apart.

use std::sync::{Mutex, PoisonError};

use cloister_boot::x86_64::acpi::{RESET_VALUE, SLEEP_TYPE_S5};
use cloister_devices::serial::Serial;

use crate::bus::BusDevice;
use crate::stop::StopReason;

/// I/O port of the keyboard controller's commands.
pub const KEYBOARD_COMMAND: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;
/// Number of power ports.
pub const POWER_PORTS: u64 = 3;
const SLEEP_ENABLE: u8 = 1 << 5;

/// Who is told that the guest ends itself.
pub type OnStop = Box<dyn Fn(StopReason) + Send + Sync>;

/// Sleep control, sleep status and reset.
pub struct PowerPorts(pub OnStop);

impl BusDevice for PowerPorts {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        match offset {
            0 if value & SLEEP_ENABLE != 0 && value >> 2 & 7 == SLEEP_TYPE_S5 => self.0(StopReason::PowerOff),
            2 if value == RESET_VALUE => self.0(StopReason::Reset),
            _ => {}
        }
    }
}

/// The keyboard controller's command port: no keyboard, only the reset line.
pub struct KeyboardReset(pub OnStop);

impl BusDevice for KeyboardReset {
    fn read(&self, _: u64, data: &mut [u8]) {
        // Status 0: both buffers empty, so that a guest which waits for that goes on to its reset.
        data.fill(0);
    }

    fn write(&self, _: u64, data: &[u8]) {
        if data.first() == Some(&KEYBOARD_RESET) {
            self.0(StopReason::Reset);
        }
    }
}

/// Ports of old hardware that every kernel tries without meaning harm: two PICs, the PIT, the CMOS clock (through
/// which Linux starts processors, too) and the delay port. Start and length.
pub const ABSENT: [(u64, u64); 5] = [(0x20, 2), (0xa0, 2), (0x40, 4), (0x70, 2), (0x80, 1)];

/// Hardware that is not there, and is no reason to write a log about.
pub struct Absent;

impl BusDevice for Absent {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, _: u64, _: &[u8]) {}
}

/// The serial port on the bus. A string instruction brings several bytes for one register: each is one access.
pub struct SerialPorts(pub Mutex<Option<Serial>>);

impl SerialPorts {
    /// Calls `f` with the port.
    pub fn with<T>(&self, f: impl FnOnce(&mut Serial) -> T) -> Option<T> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_mut()
            .map(f)
    }
}

impl BusDevice for SerialPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let Ok(offset) = u16::try_from(offset) else { return };
        self.with(|serial| data.chunks_mut(1).for_each(|byte| serial.read(offset, byte)));
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(offset) = u16::try_from(offset) else { return };
        self.with(|serial| data.chunks(1).for_each(|byte| serial.write(offset, byte)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn recorder() -> (OnStop, Arc<Mutex<Vec<StopReason>>>) {
        let seen = Arc::<Mutex<Vec<StopReason>>>::default();
        let record = Arc::clone(&seen);
        (Box::new(move |reason| record.lock().unwrap().push(reason)), seen)
    }

    #[test]
    fn only_the_right_values_end_the_guest() {
        let (on_stop, seen) = recorder();
        let power = PowerPorts(on_stop);
        for (offset, value) in [(0, 0x20), (0, 5 << 2), (1, 0x34), (2, 0), (2, 0x34), (0, 0)] {
            power.write(offset, &[value]);
        }
        power.write(0, &[]);
        assert_eq!(*seen.lock().unwrap(), []);
        power.write(0, &[0x34]);
        power.write(2, &[1]);
        assert_eq!(*seen.lock().unwrap(), [StopReason::PowerOff, StopReason::Reset]);
    }

    #[test]
    fn the_keyboard_controller_resets_on_0xfe_only() {
        let (on_stop, seen) = recorder();
        let keyboard = KeyboardReset(on_stop);
        keyboard.write(0, &[0xd1]);
        assert_eq!(*seen.lock().unwrap(), []);
        keyboard.write(0, &[0xfe]);
        assert_eq!(*seen.lock().unwrap(), [StopReason::Reset]);
    }
}
