// SPDX-License-Identifier: Apache-2.0
//! The memory device, driven well and badly.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use cloister_devices::GuestRam;
use cloister_devices::mem::{BLOCK_SIZE, Mem, MemHandle, Region};
use cloister_tests::driver::{Descriptor, Driver, Machine, TIMEOUT, VirtQueue};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const BASE: u64 = 1 << 32;
const BLOCKS: u64 = 16;
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

const ACK: u8 = 0;
const NACK: u8 = 1;
const ERROR: u8 = 3;

/// RAM, and a region to plug.
fn machine() -> Machine {
    let size = usize::try_from(BLOCKS * BLOCK_SIZE).unwrap();
    let ranges = [(GuestAddress(0), 32 << 20), (GuestAddress(BASE), size)];
    Machine::with_ram(Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap()))
}

fn mem(machine: &Machine) -> (Box<Mem>, MemHandle) {
    let region = Region {
        base: BASE,
        size: BLOCKS * BLOCK_SIZE,
    };
    let mem = Box::new(Mem::new(region, machine.pool.clone()).unwrap());
    let handle = mem.handle();
    (mem, handle)
}

fn request(kind: u16, address: u64, count: u16) -> Vec<u8> {
    let mut bytes = vec![0; 24];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&count.to_le_bytes());
    bytes
}

/// Asks for something about blocks; answers the response's type and state.
fn ask(driver: &mut Driver, queue: &mut VirtQueue, kind: u16, block: u64, count: u16) -> (u8, u8) {
    let request = request(kind, BASE + block * BLOCK_SIZE, count);
    let reply = driver.request(queue, &[&request], &[10]);
    assert_eq!(reply.len, 10);
    (reply.buffers[0][0], reply.buffers[0][8])
}

fn config(driver: &mut Driver) -> [u64; 7] {
    let bytes = driver.config::<56>(0);
    let (fields, _) = bytes.as_chunks::<8>();
    std::array::from_fn(|n| u64::from_le_bytes(fields[n]))
}

#[test]
fn blocks_are_plugged_as_far_as_the_host_asks() {
    let machine = machine();
    let (device, handle) = mem(&machine);
    let mut driver = Driver::new(&machine, device);
    let mut queue = driver.start(UNPLUGGED_INACCESSIBLE, &[16]).remove(0);
    let size = BLOCKS * BLOCK_SIZE;
    assert_eq!(config(&mut driver), [BLOCK_SIZE, 0, BASE, size, size, 0, 0]);
    assert_eq!(
        ask(&mut driver, &mut queue, PLUG, 0, 1),
        (NACK, 0),
        "nobody asked"
    );

    assert_eq!(handle.set_requested(4 * BLOCK_SIZE - 1), 4 * BLOCK_SIZE);
    assert_eq!(driver.wait_interrupt(TIMEOUT) & 2, 2);
    assert_eq!(config(&mut driver)[6], 4 * BLOCK_SIZE);
    assert_eq!(handle.wait(Duration::ZERO), 0);
    assert_eq!(ask(&mut driver, &mut queue, PLUG, 2, 3), (ACK, 0));
    assert_eq!(
        ask(&mut driver, &mut queue, PLUG, 8, 2),
        (NACK, 0),
        "one too many"
    );
    assert_eq!(ask(&mut driver, &mut queue, PLUG, 8, 1), (ACK, 0));
    assert_eq!(
        (handle.wait(TIMEOUT), handle.plugged()),
        (4 * BLOCK_SIZE, 4 * BLOCK_SIZE)
    );
    for (block, count, state) in [(2, 3, 0), (8, 1, 0), (0, 2, 1), (9, 7, 1), (1, 2, 2), (0, 16, 2)] {
        let answer = ask(&mut driver, &mut queue, STATE, block, count);
        assert_eq!(answer, (ACK, state), "{block} {count}");
    }
    assert_eq!(handle.set_requested(u64::MAX), size, "no more than there is");
    assert_eq!(handle.metrics().plugged_blocks.get(), 4);
    assert_eq!(handle.metrics().bad_requests.get(), 0);
}

#[test]
fn unplugged_memory_is_the_hosts_again() {
    let machine = machine();
    let (device, handle) = mem(&machine);
    let mut driver = Driver::new(&machine, device);
    let mut queue = driver.start(UNPLUGGED_INACCESSIBLE, &[16]).remove(0);
    handle.set_requested(8 * BLOCK_SIZE);
    assert_eq!(ask(&mut driver, &mut queue, PLUG, 0, 8), (ACK, 0));
    let last = |block: u64| BASE + (block + 1) * BLOCK_SIZE - 1;
    for block in 0..8 {
        machine.write(last(block), &[7]);
    }
    assert_eq!(ask(&mut driver, &mut queue, UNPLUG, 2, 3), (ACK, 0));
    let bytes: Vec<u8> = (0..8).map(|block| machine.read(last(block), 1)[0]).collect();
    assert_eq!(bytes, [7, 7, 0, 0, 0, 7, 7, 7]);
    assert_eq!(handle.plugged(), 5 * BLOCK_SIZE);
    assert_eq!(ask(&mut driver, &mut queue, UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!(handle.plugged(), 0);
    assert_eq!(machine.read(last(7), 1), [0]);
    assert_eq!(handle.metrics().unplugged_blocks.get(), 8);
}

#[test]
fn what_is_plugged_outlives_a_reset_and_a_snapshot() {
    let machine = machine();
    let (device, handle) = mem(&machine);
    let mut driver = Driver::new(&machine, device);
    let mut queue = driver.start(UNPLUGGED_INACCESSIBLE, &[16]).remove(0);
    handle.set_requested(3 * BLOCK_SIZE);
    assert_eq!(ask(&mut driver, &mut queue, PLUG, 5, 3), (ACK, 0));
    driver.reset();
    let mut queue = driver.start(UNPLUGGED_INACCESSIBLE, &[16]).remove(0);
    assert_eq!(ask(&mut driver, &mut queue, STATE, 5, 3), (ACK, 0));
    let saved = driver.transport.save().unwrap();
    let (device, handle) = mem(&machine);
    let mut restored = Driver::restored(&machine, device, &saved).unwrap();
    assert_eq!(
        (handle.requested(), handle.plugged()),
        (3 * BLOCK_SIZE, 3 * BLOCK_SIZE)
    );
    assert_eq!(config(&mut restored)[5..], [3 * BLOCK_SIZE; 2]);
    // Into a region of another size.
    let region = Region {
        base: BASE,
        size: 8 * BLOCK_SIZE,
    };
    let other = Box::new(Mem::new(region, machine.pool.clone()).unwrap());
    assert!(Driver::restored(&machine, other, &saved).is_err());
}

#[test]
fn requests_in_flight_at_a_snapshot_are_obeyed_once_by_each_copy() {
    let machine = machine();
    let (device, handle) = mem(&machine);
    let mut driver = Driver::new(&machine, device);
    let mut queue = driver.start(UNPLUGGED_INACCESSIBLE, &[16]).remove(0);
    handle.set_requested(3 * BLOCK_SIZE);
    assert_eq!(ask(&mut driver, &mut queue, PLUG, 0, 2), (ACK, 0));
    let start = |block: u64| BASE + block * BLOCK_SIZE;
    for block in 0..2 {
        let address = GuestAddress(start(block));
        machine.ram.write_slice(b"mine", address).unwrap();
    }
    // The change of the request is acknowledged, too.
    while driver.wait_interrupt(Duration::from_millis(10)) != 0 {}

    driver.transport.pause();
    let mut heads = Vec::new();
    let mut answers = Vec::new();
    // In this order: there is room for the third block when the first has gone, and not for a fourth.
    for (kind, block, count, answer) in [
        (PLUG, 4, 1, (ACK, 0)),
        (PLUG, 5, 1, (NACK, 0)),
        (UNPLUG, 0, 1, (ACK, 0)),
        (PLUG, 5, 1, (ACK, 0)),
        (STATE, 0, 6, (ACK, 2)),
        (STATE, 4, 2, (ACK, 0)),
    ] {
        let (asked, reply) = (machine.allocate(24, 8), machine.allocate(10, 8));
        machine.write(asked, &request(kind, start(block), count));
        let parts = [Descriptor::readable(asked, 24), Descriptor::writable(reply, 10)];
        heads.push(queue.add(&parts));
        answers.push((reply, answer));
    }
    driver.kick(0);
    let saved = driver.transport.save().unwrap();
    let copy = machine.copy();
    let mut queue_there = queue.in_copy(&copy);
    let (device, handle_there) = mem(&copy);
    let mut clone = Driver::restored(&copy, device, &saved).unwrap();
    assert_eq!(handle.plugged(), 2 * BLOCK_SIZE);
    let check = |driver: &mut Driver<'_>, queue: &mut VirtQueue, handle: &MemHandle| {
        assert_eq!(driver.wait_interrupt(TIMEOUT), 1);
        for used in driver.wait_each_used(queue, &heads) {
            assert_eq!(used.len, 10);
        }
        for (number, (reply, expected)) in answers.iter().enumerate() {
            let reply = driver.machine.read(*reply, 10);
            assert_eq!((reply[0], reply[8]), *expected, "request {number}");
        }
        assert_eq!(
            (handle.requested(), handle.plugged()),
            (3 * BLOCK_SIZE, 3 * BLOCK_SIZE)
        );
        assert_eq!(driver.machine.read(start(0), 4), [0; 4]);
        assert_eq!(driver.machine.read(start(1), 4), b"mine");
        assert_eq!(ask(driver, queue, STATE, 1, 1), (ACK, 0));
    };
    check(&mut clone, &mut queue_there, &handle_there);
    assert_eq!(machine.read(start(0), 4), b"mine", "the other's block");
    driver.transport.resume().unwrap();
    check(&mut driver, &mut queue, &handle);
}

#[test]
fn requests_against_the_rules_change_nothing() {
    let machine = machine();
    let (device, handle) = mem(&machine);
    let mut driver = Driver::new(&machine, device);
    let mut queue = driver.start(UNPLUGGED_INACCESSIBLE, &[16]).remove(0);
    handle.set_requested(u64::MAX);
    assert_eq!(ask(&mut driver, &mut queue, PLUG, 4, 2), (ACK, 0));
    machine.write(BASE + 4 * BLOCK_SIZE, b"mine");
    let bad = [
        (PLUG, 0, 0),
        (PLUG, 3, 2),
        (PLUG, 5, 1),
        (PLUG, 15, 2),
        (PLUG, 16, 1),
        (PLUG, 0, u16::MAX),
        (UNPLUG, 3, 2),
        (UNPLUG, 5, 2),
        (UNPLUG, 0, 1),
        (STATE, 0, 17),
        (STATE, 0, 0),
        (4, 4, 2),
        (u16::MAX, 4, 2),
    ];
    for (kind, block, count) in bad {
        let answer = ask(&mut driver, &mut queue, kind, block, count);
        assert_eq!(answer.0, ERROR, "{kind} {block} {count}");
    }
    for address in [
        0,
        BASE - BLOCK_SIZE,
        BASE + 1,
        BASE + 4096,
        u64::MAX,
        u64::MAX - BLOCK_SIZE + 1,
    ] {
        for kind in [PLUG, UNPLUG, STATE] {
            let reply = driver.request(&mut queue, &[&request(kind, address, 1)], &[10]);
            assert_eq!(reply.buffers[0][0], ERROR, "{kind} {address:#x}");
        }
    }
    assert_eq!(handle.metrics().bad_requests.get(), 13 + 18);
    // Too short to be requests, or without room for an answer.
    for (readable, writable) in [(23, 10), (0, 10), (24, 9), (24, 0)] {
        let request = &request(UNPLUG_ALL, 0, 0)[..readable];
        let readable: &[&[u8]] = if request.is_empty() { &[] } else { &[request] };
        let writable: &[usize] = if writable == 0 { &[] } else { &[writable] };
        let reply = driver.request(&mut queue, readable, writable);
        assert_eq!(reply.len, 0);
    }
    // From and into memory that is not there.
    let hole = Machine::HOLE;
    queue.add(&[
        Descriptor::readable(hole, 24),
        Descriptor::writable(hole + 64, 10),
    ]);
    driver.kick(0);
    assert_eq!(driver.wait_used(&mut queue).unwrap().len, 0);
    assert_eq!(handle.plugged(), 2 * BLOCK_SIZE);
    assert_eq!(machine.read(BASE + 4 * BLOCK_SIZE, 4), b"mine");
    // The configuration is not the driver's to write.
    driver.write_config(48, &[9; 8]);
    assert_eq!(config(&mut driver)[6], BLOCKS * BLOCK_SIZE);
    assert!(!driver.health().is_failed());
}

#[test]
fn other_devices_use_plugged_memory() {
    let machine = machine();
    let (device, handle) = mem(&machine);
    let mut driver = Driver::new(&machine, device);
    let mut queue = driver.start(UNPLUGGED_INACCESSIBLE, &[16]).remove(0);
    handle.set_requested(BLOCK_SIZE);
    assert_eq!(ask(&mut driver, &mut queue, PLUG, 0, 1), (ACK, 0));
    let mut rng = Driver::new(&machine, Box::new(cloister_devices::rng::Rng::new()));
    let mut entropy = rng.start(0, &[16]).remove(0);
    entropy.add(&[Descriptor::writable(BASE, 4096)]);
    rng.kick(0);
    assert_eq!(rng.wait_used(&mut entropy).unwrap().len, 4096);
    let mut bytes = [0; 4096];
    machine.ram.read_slice(&mut bytes, GuestAddress(BASE)).unwrap();
    assert_ne!(bytes, [0; 4096]);
}

#[test]
fn a_region_is_made_of_whole_blocks() {
    let machine = machine();
    for (base, size) in [
        (BASE, 0),
        (BASE, 4096),
        (BASE + 4096, BLOCK_SIZE),
        (0u64.wrapping_sub(BLOCK_SIZE), 2 * BLOCK_SIZE),
    ] {
        assert!(
            Mem::new(Region { base, size }, machine.pool.clone()).is_err(),
            "{base:#x} {size:#x}"
        );
    }
    let _: Arc<GuestRam> = machine.ram.clone();
}
