// SPDX-License-Identifier: Apache-2.0
//! The entropy device, driven well and badly.

#![allow(clippy::unwrap_used)]

use cloister_devices::rng::{BYTE_BUDGET, MAX_REQUEST, Rng};
use cloister_tests::driver::{Descriptor, Driver, Machine, Reply, TIMEOUT, VirtQueue};

#[test]
fn entropy_arrives_in_every_part_of_a_request() {
    let machine = Machine::new();
    let mut driver = Driver::new(&machine, Box::new(Rng::new()));
    let mut queues = driver.start(0, &[16]);
    let Reply { len, buffers } = driver.request(&mut queues[0], &[], &[64, 1, 64]);
    assert_eq!(len, 129);
    assert_ne!(buffers[0], vec![0xa5; 64]);
    assert_ne!(buffers[2], vec![0xa5; 64]);
    assert_ne!(buffers[0], buffers[2]);
}

#[test]
fn a_huge_request_is_answered_in_part() {
    let machine = Machine::new();
    let mut driver = Driver::new(&machine, Box::new(Rng::new()));
    let mut queues = driver.start(0, &[16]);
    let address = machine.allocate(1 << 20, 4096);
    queues[0].add(&[Descriptor::writable(address, 1 << 20)]);
    driver.kick(0);
    let used = driver.wait_used(&mut queues[0]).unwrap();
    assert_eq!(used.len as usize, MAX_REQUEST);
    assert_ne!(machine.read(address, MAX_REQUEST), vec![0; MAX_REQUEST]);
    assert_eq!(machine.read(address + MAX_REQUEST as u64, 4096), vec![0; 4096]);
}

#[test]
fn a_full_queue_beyond_the_byte_budget_is_still_served_whole() {
    let machine = Machine::new();
    let device = Rng::new();
    let metrics = device.metrics().clone();
    let mut driver = Driver::new(&machine, Box::new(device));
    let mut queues = driver.start_with_event_idx(0, &[64]);
    let address = machine.allocate(8192, 4096);
    for _ in 0..64 {
        queues[0].add(&[Descriptor::writable(address, 8192)]);
    }
    driver.kick(0);
    for _ in 0..64 {
        assert_eq!(
            driver.wait_used(&mut queues[0]).unwrap().len as usize,
            MAX_REQUEST
        );
    }
    let total = 64 * MAX_REQUEST;
    assert!(total > BYTE_BUDGET);
    assert_eq!(metrics.bytes.get(), total as u64);
}

#[test]
fn requests_in_flight_at_a_snapshot_are_answered_once_and_differently_in_each_copy() {
    let machine = Machine::new();
    let mut driver = Driver::new(&machine, Box::new(Rng::new()));
    let mut queue = driver.start_with_event_idx(0, &[16]).remove(0);
    driver.request(&mut queue, &[], &[8]);
    driver.transport.pause();
    let buffers: Vec<u64> = (0..5).map(|_| machine.allocate(64, 16)).collect();
    let heads: Vec<u16> = buffers
        .iter()
        .map(|buffer| queue.add(&[Descriptor::writable(*buffer, 64)]))
        .collect();
    driver.kick(0);
    let saved = driver.transport.save().unwrap();
    let copy = machine.copy();
    let mut queue_there = queue.in_copy(&copy);
    let mut clone = Driver::restored(&copy, Box::new(Rng::new()), &saved).unwrap();
    driver.transport.resume().unwrap();
    let mut drawn = Vec::new();
    let mut check = |driver: &mut Driver<'_>, queue: &mut VirtQueue| {
        assert_eq!(driver.wait_interrupt(TIMEOUT), 1);
        for used in driver.wait_each_used(queue, &heads) {
            assert_eq!(used.len, 64);
        }
        drawn.extend(buffers.iter().map(|buffer| driver.machine.read(*buffer, 64)));
        assert_eq!(driver.request(queue, &[], &[8]).len, 8);
    };
    check(&mut driver, &mut queue);
    check(&mut clone, &mut queue_there);
    drawn.sort();
    drawn.dedup();
    assert_eq!(drawn.len(), 10, "two were given the same");
}

#[test]
fn requests_that_ask_for_nothing_come_back_empty() {
    let machine = Machine::new();
    let mut driver = Driver::new(&machine, Box::new(Rng::new()));
    let mut queues = driver.start(0, &[16]);
    // A readable buffer, and a writable one outside of memory.
    assert_eq!(driver.request(&mut queues[0], &[b"text"], &[]).len, 0);
    queues[0].add(&[Descriptor::writable(Machine::HOLE, 64)]);
    driver.kick(0);
    assert_eq!(driver.wait_used(&mut queues[0]).unwrap().len, 0);
    assert_eq!(driver.health().complaints(), 2);
    assert_eq!(driver.request(&mut queues[0], &[], &[8]).len, 8);
}
