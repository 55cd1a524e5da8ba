// SPDX-License-Identifier: Apache-2.0
//! What a hostile guest can do to the registers and rings of any device.
//!
//! Every test runs against one of each device. What counts: the process lives, the device says what it met (a
//! complaint, or failure with DEVICE_NEEDS_RESET), and a reset gives the driver a working device again.
#![allow(clippy::unwrap_used)]

use cloister_devices::virtio::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, status};
use cloister_tests::driver::{
    Descriptor, Driver, Layout, Machine, NoReply, VirtQueue, flag, register, wait_until,
};
use cloister_tests::random::Random;
use cloister_tests::zoo::{self, Animal, Specimen};

/// Runs `test` with one of each device, in turn.
fn for_each(test: impl Fn(&Specimen, &Machine, &mut Driver)) {
    for specimen in zoo::ALL {
        println!("--- {}", specimen.name);
        let machine = Machine::new();
        let Animal { device, keep } = (specimen.make)(&machine);
        let mut driver = Driver::new(&machine, device);
        test(specimen, &machine, &mut driver);
        drop(driver);
        drop(keep);
    }
}

fn queue_count(driver: &mut Driver) -> u32 {
    (0..)
        .find(|&index| {
            driver.write32(register::QUEUE_SEL, index);
            driver.read32(register::QUEUE_SIZE_MAX) == 0
        })
        .unwrap()
}

/// A working driver: every queue set up with 16 descriptors.
fn start(driver: &mut Driver) -> Vec<VirtQueue> {
    let sizes = vec![16; queue_count(driver) as usize];
    let queues = driver.start(0, &sizes);
    assert_ne!(driver.status() & status::DRIVER_OK, 0);
    assert!(driver.transport.is_active());
    queues
}

/// Resets, and sees that the device works: it takes a chain from its busy queue and gives it back.
fn assert_usable(specimen: &Specimen, machine: &Machine, driver: &mut Driver) {
    let mut queues = start(driver);
    assert_eq!(driver.status() & status::DEVICE_NEEDS_RESET, 0);
    let queue = &mut queues[specimen.busy_queue as usize];
    assert_answers(machine, driver, queue);
}

/// Every device gives back at once a chain on its busy queue that it cannot make sense of.
fn assert_answers(machine: &Machine, driver: &mut Driver, queue: &mut VirtQueue) {
    let buffer = machine.allocate(64, 16);
    let head = queue.add(&[
        Descriptor::readable(buffer, 1),
        Descriptor::writable(buffer + 8, 1),
    ]);
    driver.kick(queue.index);
    assert_eq!(driver.wait_used(queue).unwrap().head, u32::from(head));
}

/// Complaint or failure: the device noticed.
fn assert_noticed(driver: &Driver, complaints: u64, what: &str) {
    assert!(
        wait_until(|| driver.health().is_failed() || driver.health().complaints() > complaints),
        "{}: {what} went unnoticed",
        driver.health().name()
    );
}

#[test]
fn the_register_page_says_what_it_is() {
    for_each(|_, _, driver| {
        assert_eq!(driver.read32(register::MAGIC_VALUE), 0x7472_6976);
        assert_eq!(driver.read32(register::VERSION), 2);
        assert_ne!(driver.read32(register::DEVICE_ID), 0);
        let offered = driver.offered();
        let ring = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC;
        assert_eq!(offered & ring, ring);
        assert_eq!(driver.health().complaints(), 0);
    });
}

#[test]
fn wrong_widths_and_offsets_are_ignored() {
    for_each(|specimen, machine, driver| {
        for width in [0, 1, 2, 3, 5, 8, 64] {
            for offset in [0, 1, 0x10, 0x34, 0x70, 0xfe] {
                let before = driver.health().complaints();
                let mut data = vec![0xff; width];
                driver.transport.read(offset, &mut data);
                assert_eq!(data, vec![0; width]);
                driver.transport.write(offset, &data);
                assert_eq!(driver.health().complaints(), before + 2);
            }
        }
        let before = driver.health().complaints();
        for offset in [0x3, 0x18, 0x1d, 0x48, 0x72, 0xfd] {
            assert_eq!(driver.read32(offset), 0);
            driver.write32(offset, u32::MAX);
        }
        assert_eq!(driver.health().complaints(), before + 12);
        // Configuration space takes any width and ends softly.
        for width in [0, 1, 2, 3, 4, 8, 64] {
            for offset in [0x100, 0x101, 0x1ff, 0xffe, 0xfff, u64::MAX / 2, u64::MAX] {
                let mut data = vec![0; width];
                driver.transport.read(offset, &mut data);
                driver.transport.write(offset, &data);
            }
        }
        assert_usable(specimen, machine, driver);
    });
}

#[test]
fn status_bits_out_of_order_are_refused() {
    for_each(|specimen, machine, driver| {
        for wrong in [
            status::DRIVER,
            status::FEATURES_OK,
            status::DRIVER_OK,
            status::DRIVER_OK | status::FEATURES_OK | status::DRIVER,
            status::ACKNOWLEDGE | status::DRIVER | status::DRIVER_OK,
        ] {
            driver.reset();
            let before = driver.health().complaints();
            driver.write32(register::STATUS, wrong);
            assert_eq!(driver.status() & status::DRIVER_OK, 0, "{wrong:#x}");
            assert!(!driver.transport.is_active());
            assert!(driver.health().complaints() > before);
        }
        // Nothing is taken back but by a reset.
        start(driver);
        driver.write32(register::STATUS, status::ACKNOWLEDGE);
        assert_ne!(driver.status() & status::DRIVER_OK, 0);
        // FAILED is the driver's own affair, and final.
        driver.reset();
        driver.add_status(status::FAILED);
        driver.add_status(status::ACKNOWLEDGE);
        driver.add_status(status::DRIVER);
        assert_eq!(driver.status() & status::DRIVER, 0);
        assert_usable(specimen, machine, driver);
    });
}

#[test]
fn features_that_were_not_offered_are_refused() {
    for_each(|specimen, machine, driver| {
        let offered = driver.offered();
        for bit in 0..64 {
            let feature = 1u64 << bit;
            driver.reset();
            let accepted = driver.negotiate(F_VERSION_1 | feature);
            assert_eq!(accepted, offered & feature != 0, "bit {bit}");
        }
        driver.reset();
        assert!(!driver.negotiate(0), "a legacy driver");
        // Features change no more after FEATURES_OK.
        driver.reset();
        assert!(driver.negotiate(F_VERSION_1));
        let before = driver.health().complaints();
        driver.write32(register::DRIVER_FEATURES, 0);
        assert_eq!(driver.health().complaints(), before + 1);
        assert_usable(specimen, machine, driver);
    });
}

#[test]
fn impossible_queues_stop_the_device_until_reset() {
    for_each(|specimen, machine, driver| {
        driver.write32(register::QUEUE_SEL, specimen.busy_queue);
        let max = driver.read32(register::QUEUE_SIZE_MAX);
        let good = Layout::new(machine, 16);
        let out = [Machine::HOLE, Machine::HOLE - 64, Machine::END, u64::MAX - 0xfff];
        let mut bad: Vec<Layout> = [0, 3, 2 * max, max + 1, 0x1_0010, u32::MAX]
            .iter()
            .map(|&size| Layout { size, ..good })
            .collect();
        for address in out {
            bad.push(Layout {
                descriptors: address & !15,
                ..good
            });
            // Shorter rings: nearer to the end.
            bad.push(Layout {
                available: (address | 0x3e) & !1,
                ..good
            });
            bad.push(Layout {
                used: address & !3,
                ..good
            });
        }
        bad.push(Layout {
            descriptors: good.descriptors + 8,
            ..good
        });
        bad.push(Layout {
            available: good.available + 1,
            ..good
        });
        bad.push(Layout {
            used: good.used + 2,
            ..good
        });
        for layout in bad {
            driver.reset();
            assert!(driver.negotiate(F_VERSION_1));
            for index in 0..queue_count(driver) {
                if index == specimen.busy_queue {
                    driver.configure_queue(index, layout);
                } else {
                    driver.set_up_queue(index, 16);
                }
            }
            driver.add_status(status::DRIVER_OK);
            assert!(driver.health().is_failed(), "{layout:x?}");
            assert!(!driver.transport.is_active());
            assert_ne!(driver.status() & status::DEVICE_NEEDS_RESET, 0);
            driver.kick(specimen.busy_queue);
        }
        assert_usable(specimen, machine, driver);
    });
}

#[test]
fn a_driver_that_sets_up_no_queue_gets_no_device() {
    for_each(|specimen, machine, driver| {
        assert!(driver.negotiate(F_VERSION_1));
        driver.add_status(status::DRIVER_OK);
        assert!(driver.health().is_failed());
        assert_usable(specimen, machine, driver);
    });
}

/// CVE-2026-5747: the rings moved under a live device.
#[test]
fn queue_registers_are_frozen_after_driver_ok() {
    for_each(|specimen, machine, driver| {
        let mut queues = start(driver);
        let elsewhere = machine.allocate(4096, 4096);
        machine.write(elsewhere, &[0xff; 4096]);
        for index in 0..queue_count(driver) {
            driver.write32(register::QUEUE_SEL, index);
            for (offset, value) in [
                (register::QUEUE_SIZE, 32768),
                (register::QUEUE_DESC_LOW, u32::try_from(elsewhere).unwrap()),
                (register::QUEUE_DESC_HIGH, u32::MAX),
                (register::QUEUE_DRIVER_LOW, u32::MAX),
                (register::QUEUE_DRIVER_HIGH, u32::MAX),
                (register::QUEUE_DEVICE_LOW, u32::try_from(elsewhere).unwrap()),
                (register::QUEUE_DEVICE_HIGH, u32::MAX),
                (register::QUEUE_READY, 0),
                (register::QUEUE_READY, 1),
            ] {
                let before = driver.health().complaints();
                driver.write32(offset, value);
                assert_eq!(driver.health().complaints(), before + 1);
            }
            assert_eq!(driver.read32(register::QUEUE_READY), 1);
        }
        assert_answers(machine, driver, &mut queues[specimen.busy_queue as usize]);
        assert_eq!(
            machine.read(elsewhere, 4096),
            vec![0xff; 4096],
            "the device wrote there"
        );
        assert!(!driver.health().is_failed());
    });
}

#[test]
fn a_ready_queue_is_configured_no_further() {
    for_each(|specimen, machine, driver| {
        assert!(driver.negotiate(F_VERSION_1));
        for index in 0..queue_count(driver) {
            driver.set_up_queue(index, 16);
            let before = driver.health().complaints();
            driver.write32(register::QUEUE_DESC_HIGH, u32::MAX);
            driver.write32(register::QUEUE_SIZE, 0);
            assert_eq!(driver.health().complaints(), before + 2);
        }
        driver.add_status(status::DRIVER_OK);
        assert!(driver.transport.is_active());
        assert_usable(specimen, machine, driver);
    });
}

#[test]
fn queues_and_regions_that_do_not_exist() {
    for_each(|specimen, machine, driver| {
        let count = queue_count(driver);
        for index in [count, count + 1, 0xffff, 0x1_0000, u32::MAX] {
            driver.write32(register::QUEUE_SEL, index);
            assert_eq!(driver.read32(register::QUEUE_SIZE_MAX), 0);
            assert_eq!(driver.read32(register::QUEUE_READY), 0);
            let before = driver.health().complaints();
            driver.write32(register::QUEUE_READY, 1);
            driver.write32(register::QUEUE_DESC_LOW, 0x1000);
            driver.kick(index);
            assert_eq!(driver.health().complaints(), before + 3);
        }
        for id in [1, 255, 256, u32::MAX] {
            driver.write32(register::SHM_SEL, id);
            assert_eq!(driver.read32(register::SHM_LEN_LOW), u32::MAX);
            assert_eq!(driver.read32(register::SHM_LEN_HIGH), u32::MAX);
        }
        // Early: nobody listens yet.
        driver.kick(specimen.busy_queue);
        assert_usable(specimen, machine, driver);
    });
}

/// Chains that no driver may make. Each comes back with length 0, or the device stops; none is served.
#[test]
fn broken_chains_are_noticed() {
    type Build = fn(&Machine, &mut VirtQueue) -> u16;
    let builds: &[(&str, Build)] = &[
        ("a descriptor that is its own next", |machine, queue| {
            let buffer = machine.allocate(64, 16);
            let head = queue.write_chain(&[Descriptor::writable(buffer, 4)]);
            let flags = flag::NEXT | flag::WRITE;
            queue.write_descriptor(
                head,
                Descriptor {
                    flags,
                    next: head,
                    ..Descriptor::writable(buffer, 4)
                },
            );
            head
        }),
        ("two descriptors in a circle", |machine, queue| {
            let buffer = machine.allocate(64, 16);
            let head = queue.write_chain(&[
                Descriptor::readable(buffer, 4),
                Descriptor::readable(buffer + 4, 4),
            ]);
            let last = (head + 1) % queue.size;
            queue.write_descriptor(
                last,
                Descriptor {
                    flags: flag::NEXT,
                    next: head,
                    ..Descriptor::readable(buffer + 4, 4)
                },
            );
            head
        }),
        ("a next beyond the table", |machine, queue| {
            let buffer = machine.allocate(64, 16);
            let head = queue.write_chain(&[Descriptor::readable(buffer, 4)]);
            queue.write_descriptor(
                head,
                Descriptor {
                    flags: flag::NEXT,
                    next: queue.size,
                    ..Descriptor::readable(buffer, 4)
                },
            );
            head
        }),
        ("a head beyond the table", |_, queue| queue.size),
        ("a head far beyond the table", |_, _| u16::MAX),
        ("a buffer in the hole", |_, queue| {
            queue.write_chain(&[
                Descriptor::readable(Machine::HOLE, 16),
                Descriptor::writable(Machine::HOLE, 16),
            ])
        }),
        ("a buffer across the end of memory", |_, queue| {
            queue.write_chain(&[
                Descriptor::readable(Machine::END - 8, 16),
                Descriptor::writable(Machine::END - 8, 16),
            ])
        }),
        ("a buffer across the end of the address space", |_, queue| {
            queue.write_chain(&[
                Descriptor::readable(u64::MAX - 7, 16),
                Descriptor::writable(u64::MAX - 7, 16),
            ])
        }),
        ("buffers of more than 4 GiB", |_, queue| {
            queue.write_chain(&[
                Descriptor::readable(0x1000, u32::MAX),
                Descriptor::readable(0, 64),
            ])
        }),
        ("a writable buffer before a readable one", |machine, queue| {
            let buffer = machine.allocate(64, 16);
            queue.write_chain(&[Descriptor::writable(buffer, 16), Descriptor::readable(buffer, 16)])
        }),
        (
            "an indirect table inside of an indirect table",
            |machine, queue| {
                let inner = machine.allocate(64, 16);
                machine.write(inner, &Descriptor::writable(0x1000, 4).bytes());
                queue.write_indirect(
                    machine,
                    &[Descriptor {
                        flags: flag::INDIRECT,
                        ..Descriptor::readable(inner, 16)
                    }],
                )
            },
        ),
        ("an indirect table that refers to itself", |machine, queue| {
            let table = machine.allocate(64, 16);
            let itself = Descriptor {
                flags: flag::INDIRECT,
                ..Descriptor::readable(table, 16)
            };
            machine.write(table, &itself.bytes());
            queue.write_chain(&[itself])
        }),
        ("an indirect table of no length", |_, queue| {
            queue.write_chain(&[Descriptor {
                flags: flag::INDIRECT,
                ..Descriptor::readable(0x1000, 0)
            }])
        }),
        ("an indirect table of a crooked length", |_, queue| {
            queue.write_chain(&[Descriptor {
                flags: flag::INDIRECT,
                ..Descriptor::readable(0x1000, 24)
            }])
        }),
        ("an indirect table in the hole", |_, queue| {
            queue.write_chain(&[Descriptor {
                flags: flag::INDIRECT,
                ..Descriptor::readable(Machine::HOLE, 32)
            }])
        }),
        ("an indirect table of 4 GiB", |_, queue| {
            queue.write_chain(&[Descriptor {
                flags: flag::INDIRECT,
                ..Descriptor::readable(0x1000, 0xffff_fff0)
            }])
        }),
        (
            "an indirect chain longer than any host call takes",
            |machine, queue| {
                let buffer = machine.allocate(64, 16);
                queue.write_indirect(machine, &vec![Descriptor::readable(buffer, 1); 2000])
            },
        ),
    ];
    for_each(|specimen, machine, driver| {
        for (what, build) in builds {
            let mut queues = start(driver);
            let queue = &mut queues[specimen.busy_queue as usize];
            let before = driver.health().complaints();
            let head = build(machine, queue);
            queue.push_available(head);
            driver.kick(queue.index);
            match driver.wait_used(queue) {
                Ok(used) => assert_eq!((used.head, used.len), (u32::from(head), 0), "{what}"),
                Err(why) => assert_eq!(why, NoReply::Failed, "{what}"),
            }
            assert_noticed(driver, before, what);
        }
        assert_usable(specimen, machine, driver);
    });
}

/// Unusual, but nothing forbids it: no complaint is due, only an answer.
#[test]
fn odd_but_legal_chains_come_back() {
    for_each(|specimen, machine, driver| {
        let mut queues = start(driver);
        let queue = &mut queues[specimen.busy_queue as usize];
        let buffer = machine.allocate(64, 16);
        let empty = [Descriptor::readable(buffer, 0), Descriptor::writable(buffer, 0)];
        let nowhere = [
            Descriptor::readable(u64::MAX, 0),
            Descriptor::writable(Machine::HOLE, 0),
        ];
        let mixed = [
            Descriptor::readable(buffer, 0),
            Descriptor::readable(buffer, 1),
            Descriptor::writable(buffer, 0),
            Descriptor::writable(buffer, 1),
        ];
        for parts in [&empty[..], &nowhere, &mixed] {
            for indirect in [false, true] {
                let head = if indirect {
                    queue.add_indirect(machine, parts)
                } else {
                    queue.add(parts)
                };
                driver.kick(queue.index);
                assert_eq!(driver.wait_used(queue).unwrap().head, u32::from(head));
            }
        }
        // The same chain twice, and a buffer that is the queue's own ring.
        let head = queue.write_chain(&[
            Descriptor::readable(queue.layout.used, 16),
            Descriptor::writable(buffer, 4),
        ]);
        queue.push_available(head);
        queue.push_available(head);
        driver.kick(queue.index);
        driver.wait_used(queue).unwrap();
        driver.wait_used(queue).unwrap();
        assert!(!driver.health().is_failed());
    });
}

#[test]
fn an_available_index_that_jumps_stops_the_device() {
    for_each(|specimen, machine, driver| {
        for jump in [17, 1000, 0x8000, u16::MAX] {
            let mut queues = start(driver);
            let queue = &mut queues[specimen.busy_queue as usize];
            assert_answers(machine, driver, queue);
            queue.set_available_index(queue.available_index().wrapping_add(jump));
            driver.kick(queue.index);
            assert!(driver.wait_failed(), "jump by {jump}");
            assert_ne!(driver.status() & status::DEVICE_NEEDS_RESET, 0);
            // Kicks at a device that has stopped reach nobody.
            driver.kick(queue.index);
        }
        assert_usable(specimen, machine, driver);
    });
}

#[test]
fn indices_wrap_around() {
    for_each(|specimen, machine, driver| {
        let mut queues = start(driver);
        let queue = &mut queues[specimen.busy_queue as usize];
        let buffer = machine.allocate(64, 16);
        let head = queue.write_chain(&[
            Descriptor::readable(buffer, 1),
            Descriptor::writable(buffer + 8, 1),
        ]);
        for _ in 0..70_000 / 16 {
            for _ in 0..16 {
                queue.push_available(head);
            }
            driver.kick(queue.index);
            for _ in 0..16 {
                driver.wait_used(queue).unwrap();
            }
        }
    });
}

#[test]
fn rings_on_top_of_each_other_harm_only_the_guest() {
    for_each(|specimen, machine, driver| {
        for offsets in [[0, 0, 0], [0, 16, 8], [0x80, 0, 4], [0, 0x100, 0x100]] {
            driver.reset();
            assert!(driver.negotiate(F_VERSION_1));
            let base = machine.allocate(4096, 4096);
            let overlapping = Layout {
                size: 16,
                descriptors: base + offsets[0],
                available: base + offsets[1],
                used: base + offsets[2],
            };
            for index in 0..queue_count(driver) {
                driver.configure_queue(index, overlapping);
            }
            driver.add_status(status::DRIVER_OK);
            let mut queue = VirtQueue::new(machine, specimen.busy_queue, overlapping);
            for _ in 0..50 {
                queue.add(&[
                    Descriptor::readable(base, 64),
                    Descriptor::writable(base + 64, 64),
                ]);
                driver.kick(queue.index);
            }
        }
        assert_usable(specimen, machine, driver);
    });
}

#[test]
fn a_reset_in_the_middle_of_everything() {
    for_each(|specimen, machine, driver| {
        for round in 0..50 {
            let mut queues = start(driver);
            let buffer = machine.allocate(4096, 16);
            for queue in &mut queues {
                for _ in 0..round % 16 {
                    queue.add(&[
                        Descriptor::readable(buffer, 512),
                        Descriptor::writable(buffer, 512),
                    ]);
                }
                driver.kick(queue.index);
            }
            driver.reset();
            assert_eq!(driver.status(), 0);
            // Nobody writes to the rings any more.
            let used: Vec<u16> = queues.iter().map(VirtQueue::used_index).collect();
            machine.write(buffer, &[0x5a; 512]);
            driver.kick(specimen.busy_queue);
            std::thread::yield_now();
            assert_eq!(used, queues.iter().map(VirtQueue::used_index).collect::<Vec<_>>());
            assert_eq!(machine.read(buffer, 512), vec![0x5a; 512]);
        }
        assert_usable(specimen, machine, driver);
    });
}

#[test]
fn a_device_is_the_same_after_save_and_restore() {
    for specimen in zoo::ALL {
        println!("--- {}", specimen.name);
        let machine = Machine::new();
        let mut keep = Vec::new();
        let mut make = || {
            let animal = (specimen.make)(&machine);
            keep.extend(animal.keep);
            animal.device
        };
        // Untouched, half negotiated, and live.
        let mut driver = Driver::new(&machine, make());
        let fresh = driver.transport.save().unwrap();
        let mut driver = {
            let count = queue_count(&mut driver);
            assert!(driver.negotiate(F_VERSION_1));
            driver.set_up_queue(count - 1, 16);
            let saved = driver.transport.save().unwrap();
            let mut restored = Driver::restored(&machine, make(), &saved).unwrap();
            assert_eq!(restored.status(), driver.status());
            restored.write32(register::QUEUE_SEL, count - 1);
            assert_eq!(restored.read32(register::QUEUE_READY), 1);
            assert_eq!(restored.transport.save().unwrap(), saved);
            restored
        };
        let mut queues = start(&mut driver);
        let queue = &mut queues[specimen.busy_queue as usize];
        for _ in 0..3 {
            assert_answers(&machine, &mut driver, queue);
        }
        driver.transport.quiesce();
        let saved = driver.transport.save().unwrap();
        let config: [u8; 64] = driver.config(0);
        drop(driver);
        // A request that came between, with its notification lost.
        let buffer = machine.allocate(64, 16);
        queue.add(&[Descriptor::readable(buffer, 1), Descriptor::writable(buffer, 1)]);
        let mut restored = Driver::restored(&machine, make(), &saved).unwrap();
        assert_eq!(restored.config::<64>(0), config);
        restored.wait_used(queue).unwrap();
        for _ in 0..20 {
            assert_answers(&machine, &mut restored, queue);
        }
        // Still a device that can be reset, and taken back to where it was fresh.
        assert_usable(specimen, &machine, &mut restored);
        assert!(Driver::restored(&machine, make(), &fresh).is_ok());
        drop(restored);

        // Others' states, and damaged ones, are refused or harmless.
        for other in zoo::ALL {
            if other.name != specimen.name {
                let Animal { device, keep: _keep } = (other.make)(&machine);
                assert!(Driver::restored(&machine, device, &saved).is_err());
            }
        }
        let mut random = Random::new(42);
        for _ in 0..200 {
            let mut damaged = saved.clone();
            for _ in 0..=random.below(3) {
                let at = usize::try_from(random.below(damaged.bytes.len() as u64)).unwrap();
                damaged.bytes[at] ^= 1 << random.below(8);
            }
            if random.once_in(4) {
                let len = usize::try_from(random.below(damaged.bytes.len() as u64)).unwrap();
                damaged.bytes.truncate(len);
            }
            if let Ok(mut driver) = Driver::restored(&machine, make(), &damaged) {
                driver.kick(specimen.busy_queue);
            }
        }
    }
}

#[test]
fn a_paused_device_touches_nothing_and_goes_on_where_it_was() {
    for_each(|specimen, machine, driver| {
        let mut queues = start(driver);
        let queue = &mut queues[specimen.busy_queue as usize];
        for _ in 0..3 {
            assert_answers(machine, driver, queue);
            driver.transport.pause();
            // Twice is as good as once.
            driver.transport.pause();
            let used = queue.used_index();
            let buffer = machine.allocate(64, 16);
            queue.add(&[
                Descriptor::readable(buffer, 1),
                Descriptor::writable(buffer + 8, 1),
            ]);
            driver.kick(queue.index);
            let saved = driver.transport.save().unwrap();
            assert_eq!(driver.transport.save().unwrap(), saved);
            assert_eq!(queue.used_index(), used);
            driver.transport.resume().unwrap();
            driver.transport.resume().unwrap();
            driver.wait_used(queue).unwrap();
        }
        driver.transport.pause();
        assert_usable(specimen, machine, driver);
    });
}
