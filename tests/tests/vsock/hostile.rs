// SPDX-License-Identifier: Apache-2.0
//! Guests that break the rules. Each ends with a connection that works: the device goes on.

use std::io::{Read, Write};
use std::time::Duration;

use cloister_devices::vsock::VsockHandle;
use cloister_tests::driver::{Descriptor, Machine, wait_until};

use super::guest::{GUEST_CID, Guest, HOST_CID, NO_SEND, Packet, op};
use super::{LARGE, PORT, SMALL, assert_asleep, connected, device, fill, pattern};

/// Proof that the device works for those who keep the rules.
fn assert_usable(guest: &mut Guest<'_>, handle: &VsockHandle) {
    let (mut stream, mut host) = connected(guest, handle, 4_000_000);
    stream.send_some(guest, b"ping");
    let mut four = [0; 4];
    host.read_exact(&mut four).unwrap();
    assert_eq!(&four, b"ping");
    host.write_all(b"pong").unwrap();
    while stream.received != b"pong" {
        let packet = guest.receive();
        stream.handle(guest, packet);
    }
    guest.send(&stream.packet(op::RST));
    assert_eq!(host.read(&mut four).unwrap(), 0);
    assert_asleep(handle);
}

#[test]
fn credit_overrun_resets_the_connection() {
    for chunk in [SMALL, LARGE] {
        overrun(chunk);
    }
}

fn overrun(chunk: usize) {
    let machine = Machine::new();
    let (device, handle) = device();
    let mut guest = Guest::start(&machine, device);
    let (mut stream, _host) = connected(&mut guest, &handle, 7);
    let data: Vec<u8> = (0..8 << 20).map(|at| pattern(1, at)).collect();
    fill(&mut guest, &mut stream, &data, chunk);
    guest.send(&stream.packet(op::RW).with_payload(b"x"));
    guest.expect(op::RST, 7, stream.host_port);
    assert_usable(&mut guest, &handle);
}

#[test]
fn data_where_none_belongs_resets_the_connection() {
    let machine = Machine::new();
    let (device, handle) = device();
    let mut guest = Guest::start(&machine, device);
    // After its own end of stream.
    let (mut stream, _host) = connected(&mut guest, &handle, 7);
    stream.shutdown(&mut guest, NO_SEND);
    guest.send(&stream.packet(op::RW).with_payload(b"x"));
    guest.expect(op::RST, 7, stream.host_port);
    // Before it accepted.
    let _host = handle.connect(8).unwrap();
    let request = guest.receive();
    guest.send(&Packet::new(op::RW, 8, request.src_port).with_payload(b"x"));
    guest.expect(op::RST, 8, request.src_port);
    // Twice connected, a response to nothing, an operation that does not exist.
    for wrong in [op::REQUEST, op::RESPONSE, 0, 8, u16::MAX] {
        let (mut stream, mut host) = connected(&mut guest, &handle, 9);
        guest.send(&stream.packet(wrong));
        guest.expect(op::RST, 9, stream.host_port);
        assert_eq!(host.read(&mut [0]).unwrap(), 0);
    }
    assert_usable(&mut guest, &handle);
}

#[test]
fn headers_that_lie_are_dropped_or_reset() {
    let machine = Machine::new();
    let (device, handle) = device();
    let _listener = handle.listen(PORT).unwrap();
    let mut guest = Guest::start(&machine, device);
    let request = Packet::new(op::REQUEST, 5, PORT);
    let complaints = guest.driver.health().complaints();
    let liars = [
        Packet {
            src_cid: GUEST_CID + 1,
            ..request.clone()
        },
        Packet {
            src_cid: HOST_CID,
            ..request.clone()
        },
        Packet {
            dst_cid: GUEST_CID,
            ..request.clone()
        },
        Packet {
            dst_cid: u64::MAX,
            ..request.clone()
        },
        Packet {
            len: 1,
            ..request.clone()
        },
        Packet {
            len: u32::MAX,
            ..request.clone()
        },
        Packet {
            len: 65_537,
            ..request.clone().with_payload(&[0; 1000])
        },
    ];
    for liar in &liars {
        guest.send(liar);
    }
    let expected = complaints + liars.len() as u64;
    assert!(wait_until(|| guest.driver.health().complaints() >= expected));
    guest.expect_silence();
    for socket_type in [0, 2, 3, u16::MAX] {
        guest.send(&Packet {
            socket_type,
            ..request.clone()
        });
        let reset = guest.expect(op::RST, 5, PORT);
        assert_eq!(reset.socket_type, socket_type);
    }
    for op in (0..=u16::MAX).step_by(1009).chain(4..=9) {
        guest.send(&Packet::new(op, 5, PORT + 1));
        guest.expect(op::RST, 5, PORT + 1);
    }
    assert_usable(&mut guest, &handle);
}

#[test]
fn chains_that_are_none_are_returned_unused() {
    let machine = Machine::new();
    let (device, handle) = device();
    let mut guest = Guest::start(&machine, device);
    let header = machine.allocate(44, 16);
    machine.write(header, &Packet::new(op::REQUEST, 5, PORT).bytes());
    let wrong: &[&[Descriptor]] = &[
        &[Descriptor::readable(header, 43)],
        &[Descriptor::readable(header, 0)],
        &[Descriptor::writable(header, 44)],
        &[Descriptor::readable(Machine::END, 44)],
        &[Descriptor::readable(Machine::HOLE - 20, 44)],
        &[Descriptor::readable(u64::MAX - 10, 44)],
        &[Descriptor::readable(header, u32::MAX)],
        &[Descriptor::readable(header, 44), Descriptor::writable(header, 44)],
        &[Descriptor {
            flags: 1,
            next: 500,
            ..Descriptor::readable(header, 44)
        }],
    ];
    for parts in wrong {
        let head = guest.tx.add(parts);
        guest.driver.kick(1);
        let used = guest.driver.wait_used(&mut guest.tx).unwrap();
        assert_eq!((used.head, used.len), (head.into(), 0), "{parts:?}");
    }
    // One that refers to itself.
    guest.tx.write_descriptor(
        100,
        Descriptor {
            flags: 1,
            next: 100,
            ..Descriptor::readable(header, 44)
        },
    );
    guest.tx.push_available(100);
    guest.driver.kick(1);
    assert_eq!(guest.driver.wait_used(&mut guest.tx).unwrap().head, 100);
    guest.expect_silence();
    // A header in pieces of one byte is fine.
    let pieces: Vec<Descriptor> = (0..44).map(|at| Descriptor::readable(header + at, 1)).collect();
    guest.tx.add(&pieces);
    guest.driver.kick(1);
    guest.expect(op::RST, 5, PORT);
    assert_usable(&mut guest, &handle);
}

#[test]
fn useless_rx_buffers_are_returned_unused() {
    let machine = Machine::new();
    let (device, handle) = device();
    let mut driver = cloister_tests::driver::Driver::new(&machine, device);
    let mut queues = driver.start(1, &[128, 128, 8]);
    let buffer = machine.allocate(64, 16);
    let wrong = [
        Descriptor::writable(buffer, 43),
        Descriptor::readable(buffer, 64),
        Descriptor::writable(Machine::END - 20, 44),
    ];
    let heads: Vec<u16> = wrong.iter().map(|part| queues[0].add(&[*part])).collect();
    // Room for a header and one byte.
    let small = queues[0].add(&[Descriptor::writable(buffer, 45)]);
    let _host = handle.connect(7).unwrap();
    driver.kick(0);
    for head in heads {
        let used = driver.wait_used(&mut queues[0]).unwrap();
        assert_eq!((used.head, used.len), (head.into(), 0));
    }
    let used = driver.wait_used(&mut queues[0]).unwrap();
    assert_eq!((used.head, used.len), (small.into(), 44));
    assert_asleep(&handle);
}

#[test]
fn a_flood_of_requests_that_never_takes_the_answers_waits_in_its_own_queue() {
    let machine = Machine::new();
    let (device, handle) = device();
    let mut driver = cloister_tests::driver::Driver::new(&machine, device);
    let mut queues = driver.start_with_event_idx(1, &[128, 128, 8]);
    let header = machine.allocate(44, 16);
    machine.write(header, &Packet::new(op::REQUEST, 5, PORT).bytes());
    // No rx buffers at all.
    let mut returned = 0u32;
    let mut in_flight = 0u32;
    for _ in 0..2_000 {
        queues[1].add(&[Descriptor::readable(header, 44)]);
        driver.kick(1);
        in_flight += 1;
        while queues[1].take_used().is_some() {
            returned += 1;
            in_flight -= 1;
        }
        if in_flight == 128 {
            if driver
                .wait_used_for(&mut queues[1], Duration::from_millis(100))
                .is_err()
            {
                break;
            }
            returned += 1;
            in_flight -= 1;
        }
    }
    assert_eq!(in_flight, 128, "the device must stop at some point");
    assert!(returned <= 300, "{returned} resets are kept in memory");
    assert_asleep(&handle);
    // Once it takes them, everything goes on.
    let mut guest = Guest::with_queues(driver, queues);
    for _ in 0..returned + in_flight {
        guest.expect(op::RST, 5, PORT);
    }
    assert!(wait_until(|| guest.tx.used_index() == guest.tx.available_index()));
    // Those were not of its own tx buffers.
    while guest.tx.take_used().is_some() {}
    assert_usable(&mut guest, &handle);
}

#[test]
fn an_empty_rx_queue_is_waited_for_without_spinning() {
    let machine = Machine::new();
    let (device, handle) = device();
    let mut driver = cloister_tests::driver::Driver::new(&machine, device);
    let queues = driver.start_with_event_idx(1, &[128, 128, 8]);
    let mut hosts: Vec<_> = (0..20).map(|port| handle.connect(port).unwrap()).collect();
    for host in &mut hosts {
        host.write_all(b"waiting").unwrap();
    }
    assert_asleep(&handle);
    let mut guest = Guest::with_queues(driver, queues);
    for port in 0..20 {
        let request = guest.receive();
        assert_eq!((request.op, request.dst_port), (op::REQUEST, port));
    }
    for (port, host_port) in (0..20).zip(1 << 30..) {
        guest.send(&Packet::new(op::RESPONSE, port, host_port));
        let packet = guest.expect(op::RW, port, host_port);
        assert_eq!(packet.payload, b"waiting");
    }
    assert_usable(&mut guest, &handle);
}

#[test]
fn random_packets_do_no_harm() {
    let machine = Machine::new();
    let (device, handle) = device();
    let _listener = handle.listen(PORT).unwrap();
    let mut guest = Guest::start(&machine, device);
    let mut state = 0x1234_5678_9abc_def0u64;
    let mut random = |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let mut hosts = Vec::new();
    for _ in 0..20_000 {
        let mut packet = Packet::new(
            u16::try_from(random(9)).unwrap(),
            u32::try_from(random(4)).unwrap(),
            [PORT, 1 << 30, (1 << 30) + 1, 77][usize::try_from(random(4)).unwrap()],
        );
        packet.buf_alloc = u32::try_from(random(1 << 32)).unwrap() >> random(32);
        packet.fwd_cnt = u32::try_from(random(1 << 32)).unwrap() >> random(32);
        packet.flags = u32::try_from(random(5)).unwrap();
        let length = usize::try_from(random(300)).unwrap();
        packet = packet.with_payload(&vec![0x55; length]);
        if random(20) == 0 {
            packet.len = u32::try_from(random(1 << 32)).unwrap() >> random(32);
        }
        guest.send(&packet);
        if random(50) == 0 {
            let mut host = handle.connect(u32::try_from(random(4)).unwrap()).unwrap();
            let _ = host.write(&[1; 1000]);
            hosts.push(host);
            if hosts.len() > 20 {
                hosts.swap_remove(usize::try_from(random(20)).unwrap());
            }
        }
        while guest.receive_for(Duration::ZERO).is_some() {}
    }
    drop(hosts);
    // What is left of its connections ends with the driver's reset.
    guest.driver.reset();
    assert!(guest.driver.failures().is_empty());
    let mut queues = guest.driver.start_with_event_idx(1, &[128, 128, 8]);
    let Guest { driver, .. } = guest;
    let _ = &mut queues;
    let mut guest = Guest::with_queues(driver, queues);
    assert_usable(&mut guest, &handle);
}
