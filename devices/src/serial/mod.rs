// SPDX-License-Identifier: Apache-2.0
//! The one 8250 (16550A) serial port, for early messages and the last words of a panic.
//!
//! # Theory of operation
//!
//! The registers are vm-superio's. The guest accesses them byte by byte through port I/O, on its vCPU's thread; that
//! thread must not wait for whoever reads the output. So output goes to an [`OutputTail`] that keeps the last 16 KiB,
//! and beyond that to a sink if there is one. A sink is expected not to block: what it refuses (`WouldBlock`, or any
//! other error) is dropped and counted. Input is queued up to the 64 bytes of the port's FIFO.
//!
//! The interrupt is an eventfd for KVM's irqfd (GSI 4 for ttyS0).

mod metrics;

use std::io::{self, Write};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState as UartState};
use vm_superio::{Serial as Uart, Trigger};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use metrics::SerialMetrics;

use crate::output_tail::OutputTail;
use crate::state::{SavedState, StateError};

/// First I/O port of the first serial port of a PC.
pub const COM1_PORT: u16 = 0x3f8;
/// Number of I/O ports.
pub const PORT_COUNT: u16 = 8;
/// Interrupt of the first serial port of a PC.
pub const COM1_GSI: u32 = 4;

/// Version of [`SerialState`].
const STATE_VERSION: u16 = 1;
const WHAT: &str = "serial";

struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        match self.0.write(1) {
            // The counter is at its maximum: the line is as raised as it can be.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            result => result,
        }
    }
}

/// Where output goes. Never fails, as far as the port is concerned.
struct Output {
    tail: OutputTail,
    sink: Option<Box<dyn Write + Send>>,
    metrics: Arc<SerialMetrics>,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.tail.push(bytes);
        self.metrics.written_bytes.add(bytes.len());
        if let Some(sink) = &mut self.sink
            && sink.write_all(bytes).is_err()
        {
            self.metrics.dropped_bytes.add(bytes.len());
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if let Some(sink) = &mut self.sink {
            // What a sink loses at flush cannot be told apart from what it will lose later; it has its own report.
            let _ = sink.flush();
        }
        Ok(())
    }
}

/// vm-superio's state in a form that serde knows. Field for field the 16550A's registers.
#[derive(Serialize, Deserialize)]
struct SerialState {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

/// An emulated serial port.
pub struct Serial {
    uart: Uart<Line, NoEvents, Output>,
    tail: OutputTail,
    metrics: Arc<SerialMetrics>,
}

impl Serial {
    /// A port whose output goes to `tail` and, if given, to `sink`, which must not block.
    pub fn new(tail: OutputTail, sink: Option<Box<dyn Write + Send>>) -> io::Result<Self> {
        let metrics = Arc::<SerialMetrics>::default();
        let output = Output {
            tail: tail.clone(),
            sink,
            metrics: Arc::clone(&metrics),
        };
        let line = Line(EventFd::new(EFD_NONBLOCK)?);
        Ok(Self {
            uart: Uart::new(line, output),
            tail,
            metrics,
        })
    }

    /// The interrupt line, to be registered as irqfd.
    pub fn interrupt(&self) -> &EventFd {
        &self.uart.interrupt_evt().0
    }

    /// The guest's latest output.
    pub fn tail(&self) -> &OutputTail {
        &self.tail
    }

    /// What the port counts.
    pub fn metrics(&self) -> &Arc<SerialMetrics> {
        &self.metrics
    }

    /// The guest reads the port at `offset` (0 to 7) from the first. Wider accesses than a byte read 0xff.
    pub fn read(&mut self, offset: u16, data: &mut [u8]) {
        match (u8::try_from(offset), data) {
            (Ok(offset), [byte]) => *byte = self.uart.read(offset),
            (_, data) => data.fill(0xff),
        }
    }

    /// The guest writes the port at `offset` (0 to 7) from the first. Wider accesses than a byte are ignored.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        if let (Ok(offset), &[byte]) = (u8::try_from(offset), data) {
            // Output never fails, so this is the interrupt's eventfd; nothing can be done about it here.
            let _ = self.uart.write(offset, byte);
        }
    }

    /// Types `input` at the guest's keyboard; returns how many bytes the port's FIFO took.
    pub fn enqueue(&mut self, input: &[u8]) -> usize {
        // A full FIFO is an error to vm-superio, a count to us.
        self.uart.enqueue_raw_bytes(input).unwrap_or(0)
    }

    /// The registers and the queued input.
    pub fn save(&self) -> Result<SavedState, StateError> {
        let state = self.uart.state();
        let state = SerialState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer,
        };
        SavedState::encode(WHAT, STATE_VERSION, &state)
    }

    /// Puts back what `save` gave, into a new port.
    pub fn restore(self, saved: &SavedState) -> Result<Self, StateError> {
        let state: SerialState = saved.decode(WHAT, STATE_VERSION)?;
        let state = UartState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer,
        };
        let Self { uart, tail, metrics } = self;
        let invalid = |why: String| StateError::Invalid { what: WHAT, why };
        let line = uart
            .interrupt_evt()
            .0
            .try_clone()
            .map_err(|error| invalid(format!("its interrupt cannot be duplicated: {error}")))?;
        let uart = Uart::from_state(&state, Line(line), NoEvents, uart.into_writer())
            .map_err(|error| invalid(error.to_string()))?;
        Ok(Self { uart, tail, metrics })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sink that is always full.
    struct Full;

    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::WouldBlock.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn read(serial: &mut Serial, offset: u16) -> u8 {
        let mut data = [0];
        serial.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn a_full_sink_costs_output_but_not_the_tail() {
        let mut serial = Serial::new(OutputTail::new(), Some(Box::new(Full))).unwrap();
        for byte in *b"panic" {
            serial.write(0, &[byte]);
        }
        assert_eq!(serial.tail().bytes(), b"panic");
        assert_eq!(serial.metrics().written_bytes.get(), 5);
        assert_eq!(serial.metrics().dropped_bytes.get(), 5);
    }

    #[test]
    fn input_waits_in_the_fifo_and_survives_a_snapshot() {
        let mut serial = Serial::new(OutputTail::new(), None).unwrap();
        serial.write(1, &[1]);
        assert_eq!(serial.enqueue(&[b'a'; 100]), 64);
        assert_eq!(serial.enqueue(b"x"), 0);
        assert_eq!(serial.interrupt().read().unwrap(), 1);
        let saved = serial.save().unwrap();
        let mut other = Serial::new(OutputTail::new(), None)
            .unwrap()
            .restore(&saved)
            .unwrap();
        for serial in [&mut serial, &mut other] {
            for _ in 0..64 {
                assert_eq!(read(serial, 5) & 1, 1, "data ready");
                assert_eq!(read(serial, 0), b'a');
            }
            assert_eq!(read(serial, 5) & 1, 0);
        }
    }

    #[test]
    fn a_state_with_more_input_than_the_fifo_holds_is_refused() {
        let serial = Serial::new(OutputTail::new(), None).unwrap();
        let mut state: SerialState = serial.save().unwrap().decode(WHAT, STATE_VERSION).unwrap();
        state.in_buffer = vec![0; 65];
        let saved = SavedState::encode(WHAT, STATE_VERSION, &state).unwrap();
        assert!(matches!(serial.restore(&saved), Err(StateError::Invalid { .. })));
    }

    #[test]
    fn accesses_of_other_widths_and_offsets_do_nothing() {
        let mut serial = Serial::new(OutputTail::new(), None).unwrap();
        let mut data = [0; 4];
        serial.read(0, &mut data);
        assert_eq!(data, [0xff; 4]);
        serial.read(300, &mut data[..1]);
        serial.write(0, b"wide");
        serial.write(0x100, b"x");
        serial.write(0, &[]);
        assert_eq!(serial.tail().bytes(), b"");
    }
}
