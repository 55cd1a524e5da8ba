// SPDX-License-Identifier: Apache-2.0
//! What a cell and its devices count.

use super::metrics::{Source, Totals};
use cloister_devices::mem::BLOCK_SIZE;
use cloister_vmm::{Cell, DeviceHandle};

impl Source for Cell {
    fn totals(&self) -> Totals {
        let mut totals = Totals::default();
        let exits = self.stats();
        totals.exits = [
            ("io_in", exits.io_in),
            ("io_out", exits.io_out),
            ("mmio_read", exits.mmio_read),
            ("mmio_write", exits.mmio_write),
            ("interrupted", exits.interrupted),
            ("eoi", exits.eoi),
            ("other", exits.other),
        ]
        .into();
        for handle in self.devices() {
            count(handle, &mut totals);
        }
        totals
    }

    fn memory(&self) -> Option<u64> {
        self.resident_ram()
    }
}

/// Adds a device's counters. A pod may have several of a kind.
pub fn count(handle: &DeviceHandle, totals: &mut Totals) {
    type Counters<'a> = &'a [(&'static str, u64)];
    let mut add = |device, bytes: Counters<'_>, events: Counters<'_>| {
        for (sums, values) in [(&mut totals.bytes, bytes), (&mut totals.events, events)] {
            for (counter, value) in values {
                let sum = sums.entry((device, *counter)).or_default();
                *sum = sum.saturating_add(*value);
            }
        }
    };
    match handle {
        DeviceHandle::Fs(fs) => {
            let m = fs.metrics();
            add(
                "fs",
                &[("read", m.bytes_read), ("written", m.bytes_written)],
                &[
                    ("requests", m.requests),
                    ("errors", m.errors),
                    ("malformed", m.malformed),
                    ("lock_waits", m.lock_waits),
                ],
            );
        }
        DeviceHandle::Vsock(vsock) => {
            let m = vsock.metrics();
            add(
                "vsock",
                &[("received", m.rx_bytes), ("transmitted", m.tx_bytes)],
                &[
                    ("received_packets", m.rx_packets),
                    ("transmitted_packets", m.tx_packets),
                    ("established", m.established),
                    ("refused", m.refused),
                    ("resets", m.resets),
                    ("malformed", m.malformed),
                    ("host_stalls", m.host_stalls),
                    ("rx_stalls", m.rx_stalls),
                    ("credit_stalls", m.credit_stalls),
                ],
            );
        }
        DeviceHandle::Net(net) => {
            let m = net.metrics();
            add(
                "net",
                &[
                    ("received", m.received_bytes.get()),
                    ("transmitted", m.transmitted_bytes.get()),
                ],
                &[
                    ("received_frames", m.received_frames.get()),
                    ("transmitted_frames", m.transmitted_frames.get()),
                    ("receive_dropped", m.receive_dropped.get()),
                    ("receive_unwanted", m.receive_unwanted.get()),
                    ("transmit_dropped", m.transmit_dropped.get()),
                    ("starved", m.starved.get()),
                    ("tap_full", m.tap_full.get()),
                ],
            );
        }
        DeviceHandle::Block(block) => {
            let m = block.metrics();
            add(
                "block",
                &[("read", m.read_bytes.get()), ("written", m.written_bytes.get())],
                &[
                    ("reads", m.reads.get()),
                    ("writes", m.writes.get()),
                    ("flushes", m.flushes.get()),
                    ("discards", m.discards.get()),
                    ("failed_requests", m.failed_requests.get()),
                    ("bad_chains", m.bad_chains.get()),
                ],
            );
        }
        DeviceHandle::Balloon(balloon) => {
            let m = balloon.metrics();
            let bytes = |pages: u64| pages.saturating_mul(4096);
            add(
                "balloon",
                &[
                    ("inflated", bytes(m.inflated_pages.get())),
                    ("deflated", bytes(m.deflated_pages.get())),
                    ("reported", bytes(m.reported_pages.get())),
                ],
                &[
                    ("kept_pages", m.kept_pages.get()),
                    ("bad_requests", m.bad_requests.get()),
                ],
            );
        }
        DeviceHandle::Mem(mem) => {
            let m = mem.metrics();
            let bytes = |blocks: u64| blocks.saturating_mul(BLOCK_SIZE);
            add(
                "mem",
                &[
                    ("plugged", bytes(m.plugged_blocks.get())),
                    ("unplugged", bytes(m.unplugged_blocks.get())),
                ],
                &[
                    ("refused_requests", m.refused_requests.get()),
                    ("busy_requests", m.busy_requests.get()),
                    ("bad_requests", m.bad_requests.get()),
                ],
            );
        }
        _ => {}
    }
}
