// SPDX-License-Identifier: Apache-2.0
//! When a driver hears of what a device has done, and a device of what its driver wants.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use cloister_devices::rng::Rng;
use cloister_devices::virtio::QueueReport;
use cloister_tests::driver::{Descriptor, Driver, Machine, TIMEOUT, wait_until};

#[test]
fn a_driver_that_wants_no_interrupts_gets_none() {
    let machine = Machine::new();
    let mut driver = Driver::new(&machine, Box::new(Rng::new()));
    let mut queues = driver.start(0, &[16]);
    let queue = &mut queues[0];
    let buffer = machine.allocate(64, 16);
    queue.set_available_flags(1);
    queue.add(&[Descriptor::writable(buffer, 8)]);
    driver.kick(0);
    assert!(wait_until(|| queue.used_index() == 1));
    driver.transport.pause();
    assert_eq!(driver.wait_interrupt(Duration::ZERO), 0);
    driver.transport.resume().unwrap();
    queue.set_available_flags(0);
    queue.add(&[Descriptor::writable(buffer, 8)]);
    driver.kick(0);
    assert_eq!(driver.wait_interrupt(TIMEOUT), 1);
}

#[test]
fn with_event_idx_the_interrupt_comes_at_the_index_asked_for() {
    let machine = Machine::new();
    let mut driver = Driver::new(&machine, Box::new(Rng::new()));
    let mut queues = driver.start_with_event_idx(0, &[16]);
    let queue = &mut queues[0];
    let buffer = machine.allocate(64, 16);
    let mut expected: u16 = 0;
    // Across the wrap of the index, too.
    for round in 0..70_000u32 {
        let quiet = round % 1000 != 0;
        // Behind the third from now, or behind the first.
        queue.set_used_event(expected.wrapping_add(if quiet { 0 } else { 2 }));
        let count = if quiet { 1 } else { 3 };
        for sent in 0..count {
            queue.add(&[Descriptor::writable(buffer, 1)]);
            driver.kick(0);
            expected = expected.wrapping_add(1);
            if !quiet && sent < 2 {
                assert!(wait_until(|| queue.used_index() == expected));
                driver.transport.pause();
                assert_eq!(
                    driver.wait_interrupt(Duration::ZERO),
                    0,
                    "round {round}: too early"
                );
                driver.transport.resume().unwrap();
            }
        }
        assert_eq!(driver.wait_interrupt(TIMEOUT), 1, "round {round}: none");
        assert_eq!(queue.used_index(), expected);
    }
}

#[test]
fn a_device_says_where_it_wants_a_notification() {
    let machine = Machine::new();
    let mut driver = Driver::new(&machine, Box::new(Rng::new()));
    let mut queues = driver.start_with_event_idx(0, &[16]);
    let queue = &mut queues[0];
    for count in 1..40 {
        driver.request(queue, &[], &[4]);
        assert!(wait_until(|| queue.available_event() == count));
    }
}

#[test]
fn it_can_be_seen_whose_turn_it_is() {
    let machine = Machine::new();
    let mut driver = Driver::new(&machine, Box::new(Rng::new()));
    assert_eq!(driver.transport.report(), None);
    let mut queues = driver.start_with_event_idx(0, &[16]);
    let queue = &mut queues[0];
    driver.request(queue, &[], &[4]);
    // It has looked for another one before it rests.
    assert!(wait_until(|| queue.available_event() == 1));
    assert!(wait_until(|| driver.transport.report().is_some()));
    // The device's turn, of which it has not been notified.
    queue.set_used_event(7);
    let buffer = machine.allocate(64, 16);
    queue.add(&[Descriptor::writable(buffer, 8)]);
    assert!(wait_until(|| driver.transport.report().is_some()));
    let report = driver.transport.report().unwrap();
    let expected = QueueReport {
        queue: 0,
        size: 16,
        next_available: 1,
        available_index: Some(2),
        notify_at: Some(1),
        used_index: 1,
        interrupt_at: Some(7),
    };
    assert_eq!(report.queues, [expected]);
    driver.kick(0);
    assert!(wait_until(|| queue.used_index() == 2));
}
