// SPDX-License-Identifier: Apache-2.0
//! A guest that does what bytes tell it: for random tests and for fuzzing.
//!
//! Each step takes [`BYTES_PER_STEP`] bytes: one chooses the move, the others its values. Values are biased towards
//! what is interesting: small numbers, the edges of memory, the queue's own areas.

use cloister_devices::virtio::{F_INDIRECT_DESC, F_VERSION_1, status};

use crate::driver::{Descriptor, Driver, Layout, Machine, VirtQueue, register};
use crate::random::Random;
use crate::zoo::{Animal, Specimen};

/// Bytes that one step takes.
pub const BYTES_PER_STEP: usize = 12;

/// Where the rings of queue `n` are: one page each from here.
const RINGS: u64 = 0x1000;
/// Buffers are around here.
const BUFFERS: u64 = 0x20_0000;
/// Descriptors per queue.
const SIZE: u16 = 16;

/// Plays one game of `steps` random steps with a device of this kind; answers how many chains the device gave back.
/// Panics if the device is not as good as new after a reset.
pub fn play(machine: &Machine, specimen: &Specimen, seed: u64, steps: usize) -> u64 {
    let Animal { device, keep } = (specimen.make)(machine);
    let mut driver = Driver::new(machine, device);
    let mut player = Player::new(&mut driver);
    let moves = Random::new(seed).bytes(steps * BYTES_PER_STEP);
    player.play(&mut driver, &moves);
    // Whatever happened: after a reset there is a device, and the event loop still turns.
    driver.reset();
    assert_eq!(driver.status(), 0, "{} seed {seed}", specimen.name);
    assert_ne!(driver.read32(register::DEVICE_ID), 0);
    assert!(!driver.health().is_failed());
    // Fails if a handler panicked.
    drop(driver);
    drop(keep);
    player.served()
}

/// Plays a guest.
pub struct Player {
    queues: Vec<VirtQueue>,
    served: u64,
}

struct Values<'a>(&'a [u8]);

impl Values<'_> {
    fn byte(&mut self) -> u8 {
        let (&first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        first
    }

    fn half(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    fn word(&mut self) -> u32 {
        u32::from(self.half()) | u32::from(self.half()) << 16
    }

    fn address(&mut self) -> u64 {
        let choice = self.byte();
        let offset = u64::from(self.half());
        match choice % 8 {
            0..4 => BUFFERS + offset,
            4 => RINGS + offset % 0x8000,
            5 => Machine::HOLE.wrapping_sub(0x8000) + offset,
            6 => Machine::END.wrapping_sub(0x8000) + offset,
            _ => u64::from(choice) << 56 | offset.wrapping_sub(16),
        }
    }

    fn len(&mut self) -> u32 {
        let value = self.half();
        match value % 16 {
            0 => u32::from(value) << 16,
            1 => u32::MAX,
            2 => 0,
            3..8 => u32::from(value & 15) * 512,
            _ => u32::from(value >> 6),
        }
    }
}

impl Player {
    /// A guest for this device, before its first move.
    pub fn new(driver: &mut Driver) -> Self {
        let mut queues = Vec::new();
        for index in 0..16 {
            driver.write32(register::QUEUE_SEL, index);
            if driver.read32(register::QUEUE_SIZE_MAX) == 0 {
                break;
            }
            queues.push(Self::queue(driver.machine, index));
        }
        Self { queues, served: 0 }
    }

    fn queue(machine: &Machine, index: u32) -> VirtQueue {
        let base = RINGS + 0x1000 * u64::from(index);
        let layout = Layout {
            size: SIZE.into(),
            descriptors: base,
            available: base + 0x400,
            used: base + 0x800,
        };
        VirtQueue::new(machine, index, layout)
    }

    /// Plays all of `moves`.
    pub fn play(&mut self, driver: &mut Driver, moves: &[u8]) {
        for step in moves.chunks(BYTES_PER_STEP) {
            self.step(driver, &mut Values(step));
        }
    }

    /// How many chains the device has given back, so far as the guest's nonsense lets one count.
    pub fn served(&self) -> u64 {
        self.served
    }

    fn step(&mut self, driver: &mut Driver, values: &mut Values<'_>) {
        let choice = values.byte();
        match choice % 24 {
            // A proper start, with as many of the offered features as the next values say.
            0..2 => {
                let wanted = u64::from(values.word()) | u64::from(values.half()) << 32;
                self.start(driver, wanted);
            }
            // Any register, any width.
            2 => {
                let offset = u64::from(values.half() % 0x1200);
                let width = usize::from(values.byte() % 9);
                let bytes: Vec<u8> = (0..width).map(|_| values.byte()).collect();
                driver.transport.write(offset, &bytes);
            }
            3 => {
                let offset = u64::from(values.half() % 0x1200);
                let mut data = vec![0; usize::from(values.byte() % 9)];
                driver.transport.read(offset, &mut data);
            }
            // A register that exists.
            4..6 => {
                let offset = u64::from(values.byte() % 0x30) * 4;
                let value = if choice & 0x80 == 0 {
                    values.word()
                } else {
                    u32::from(values.byte() % 16)
                };
                // Not RESET half of the time: too short a life.
                if offset != register::STATUS || value != 0 || choice & 0x40 != 0 {
                    driver.write32(offset, value);
                }
            }
            // Configuration space.
            6 => {
                let offset = u64::from(values.byte() % 0x50);
                let width = 1usize << (values.byte() % 4);
                let bytes: Vec<u8> = (0..width).map(|_| values.byte()).collect();
                driver.write_config(offset, &bytes);
                let _: [u8; 8] = driver.config(offset);
            }
            // Rings, raw.
            7..9 => {
                let word = values.half();
                let at = values.half();
                if let Some(queue) = self.pick(values) {
                    let base = queue.layout.descriptors;
                    driver
                        .machine
                        .write(base + u64::from(at % 0xc00), &word.to_le_bytes());
                }
            }
            9 => {
                let jump = values.half();
                if let Some(queue) = self.pick(values) {
                    let by = if choice & 0x80 == 0 { jump % 20 } else { jump };
                    queue.set_available_index(queue.available_index().wrapping_add(by));
                }
            }
            10..12 => {
                let slot = values.byte();
                let descriptor = Descriptor {
                    address: values.address(),
                    len: values.len(),
                    flags: u16::from(values.byte() % 8),
                    next: u16::from(values.byte() % 20),
                };
                if let Some(queue) = self.pick(values) {
                    queue.write_descriptor(u16::from(slot) % SIZE, descriptor);
                }
            }
            // Contents of buffers, where headers are.
            12..14 => {
                let at = BUFFERS + u64::from(values.half());
                driver.machine.write(at, values.0);
            }
            // A chain that is shaped like a request: header, data, status.
            14..20 => {
                let header = BUFFERS + u64::from(values.byte()) * 64;
                let [first, second] = [values.byte(), values.byte()];
                let kind = if first & 0x80 == 0 {
                    u32::from(first % 16)
                } else {
                    values.word()
                };
                driver.machine.write(header, &kind.to_le_bytes());
                driver
                    .machine
                    .write(header + 8, &u64::from(second % 64).to_le_bytes());
                let data = BUFFERS + 0x1_0000 + u64::from(values.half());
                let len = u32::from(values.byte()) * 64;
                let middle = if first & 1 == 0 {
                    Descriptor::readable(data, len)
                } else {
                    Descriptor::writable(data, len)
                };
                let lens = [8, 10, 12, 16, 16, 16, 24, 40];
                let parts = [
                    Descriptor::readable(header, lens[usize::from(second >> 5)]),
                    middle,
                    Descriptor::writable(header + 32, 1),
                ];
                if let Some(queue) = self.pick(values) {
                    // Some requests without data, some without status.
                    match second & 3 {
                        0 => queue.add(&parts[..2]),
                        1 => queue.add(&parts[1..2]),
                        _ => queue.add(&parts),
                    };
                    let index = queue.index;
                    driver.kick(index);
                }
            }
            20..23 => {
                let index = u32::from(values.byte() % 8);
                driver.kick(index);
                for queue in &mut self.queues {
                    self.served += u64::from(queue.take_used().is_some());
                }
            }
            _ => {
                if choice & 0x80 == 0 {
                    driver.transport.quiesce();
                } else {
                    // A state that cannot be saved says so.
                    let _ = driver.transport.save();
                }
            }
        }
    }

    fn pick(&mut self, values: &mut Values<'_>) -> Option<&mut VirtQueue> {
        let count = self.queues.len().max(1);
        self.queues.get_mut(usize::from(values.byte()) % count)
    }

    fn start(&mut self, driver: &mut Driver, wanted: u64) {
        driver.reset();
        let features = driver.offered() & wanted | F_VERSION_1 | wanted & F_INDIRECT_DESC;
        driver.negotiate(features);
        for index in 0..self.queues.len() {
            let number = u32::try_from(index).unwrap();
            let queue = Self::queue(driver.machine, number);
            driver.machine.write(queue.layout.descriptors, &[0; 0x1000]);
            driver.configure_queue(number, queue.layout);
            self.queues[index] = queue;
        }
        driver.add_status(status::DRIVER_OK);
    }
}
