// SPDX-License-Identifier: Apache-2.0
//! The virtio console, driven well and badly.

#![allow(clippy::unwrap_used)]

use std::io::{PipeReader, PipeWriter, Read, Write};
use std::time::Duration;

use cloister_devices::console::{Console, ConsoleConfig, ConsoleHandle, TerminalSize};
use cloister_devices::output_tail::OutputTail;
use cloister_tests::driver::{Descriptor, Driver, Machine, NoReply, TIMEOUT, VirtQueue, wait_until};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const F_SIZE: u64 = 1;

struct Host {
    input: PipeWriter,
    output: PipeReader,
    tail: OutputTail,
    handle: ConsoleHandle,
}

fn console(size: Option<TerminalSize>) -> (Console, Host) {
    let (input_reader, input) = std::io::pipe().unwrap();
    let (output, output_writer) = std::io::pipe().unwrap();
    let tail = OutputTail::new();
    let console = Console::new(ConsoleConfig {
        input: Some(input_reader.into()),
        output: Some(output_writer.into()),
        tail: tail.clone(),
        size,
    })
    .unwrap();
    let handle = console.handle();
    let host = Host {
        input,
        output,
        tail,
        handle,
    };
    (console, host)
}

#[test]
fn output_and_input_pass() {
    let machine = Machine::new();
    let (device, mut host) = console(None);
    let mut driver = Driver::new(&machine, Box::new(device));
    let mut queues = driver.start(0, &[16, 16]);
    driver.request(&mut queues[TRANSMIT], &[b"hello, ", b"world"], &[]);
    let mut seen = [0; 12];
    host.output.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"hello, world");
    assert_eq!(host.tail.bytes(), b"hello, world");

    // Input that is there before the guest has a buffer for it, and input that comes after.
    host.input.write_all(b"early").unwrap();
    let buffer = machine.allocate(64, 16);
    queues[RECEIVE].add(&[
        Descriptor::writable(buffer, 3),
        Descriptor::writable(buffer + 3, 61),
    ]);
    driver.kick(0);
    let used = driver.wait_used(&mut queues[RECEIVE]).unwrap();
    assert_eq!(machine.read(buffer, used.len as usize), b"early");
    queues[RECEIVE].add(&[Descriptor::writable(buffer, 64)]);
    driver.kick(0);
    host.input.write_all(b"late").unwrap();
    let used = driver.wait_used(&mut queues[RECEIVE]).unwrap();
    assert_eq!(machine.read(buffer, used.len as usize), b"late");
}

#[test]
fn a_full_sink_holds_the_writer_back_and_loses_nothing() {
    let machine = Machine::new();
    let (device, mut host) = console(None);
    let metrics = device.metrics().clone();
    let mut driver = Driver::new(&machine, Box::new(device));
    let mut queues = driver.start_with_event_idx(0, &[16, 16]);
    // More than a pipe holds, in one chain.
    let text: Vec<u8> = (0..300_000u32).flat_map(|n| n.to_le_bytes()).collect();
    let address = machine.allocate(text.len(), 16);
    machine.write(address, &text);
    let len = u32::try_from(text.len()).unwrap();
    queues[TRANSMIT].add(&[Descriptor::readable(address, len)]);
    driver.kick(1);
    assert!(wait_until(|| metrics.sink_full.get() > 0));
    assert_eq!(
        driver.wait_used_for(&mut queues[TRANSMIT], Duration::ZERO),
        Err(NoReply::TimedOut)
    );
    let mut seen = vec![0; text.len()];
    host.output.read_exact(&mut seen).unwrap();
    driver.wait_used(&mut queues[TRANSMIT]).unwrap();
    assert!(seen == text);
    assert_eq!(host.tail.bytes(), text[text.len() - OutputTail::CAPACITY..]);
    assert_eq!(metrics.dropped_bytes.get(), 0);
}

#[test]
fn a_half_written_chain_goes_on_after_a_snapshot() {
    let machine = Machine::new();
    let (device, host) = console(None);
    let metrics = device.metrics().clone();
    let mut driver = Driver::new(&machine, Box::new(device));
    let mut queues = driver.start(0, &[16, 16]);
    let text: Vec<u8> = (0..100_000u32).flat_map(|n| n.to_le_bytes()).collect();
    let address = machine.allocate(text.len(), 16);
    machine.write(address, &text);
    queues[TRANSMIT].add(&[Descriptor::readable(address, u32::try_from(text.len()).unwrap())]);
    driver.kick(1);
    assert!(wait_until(|| metrics.sink_full.get() > 0));
    let saved = driver.transport.save().unwrap();
    drop(driver);
    let mut seen = Vec::new();
    let mut output = host.output;
    // Both ends of what the first console held are gone.
    output.read_to_end(&mut seen).unwrap();
    assert!(!seen.is_empty() && seen.len() < text.len());

    let (device, mut host) = console(None);
    let mut driver = Driver::restored(&machine, Box::new(device), &saved).unwrap();
    let mut rest = vec![0; text.len() - seen.len()];
    host.output.read_exact(&mut rest).unwrap();
    driver.wait_used(&mut queues[TRANSMIT]).unwrap();
    seen.extend(rest);
    assert!(seen == text);
}

#[test]
fn output_and_buffers_in_flight_at_a_snapshot_are_used_once_by_each_copy() {
    let machine = Machine::new();
    let (device, host) = console(None);
    let mut driver = Driver::new(&machine, Box::new(device));
    let mut queues = driver.start_with_event_idx(0, &[16, 16]);
    driver.request(&mut queues[TRANSMIT], &[b"before "], &[]);
    driver.transport.pause();
    let mut sent = Vec::new();
    for text in ["one ", "two"] {
        let address = machine.allocate(text.len(), 16);
        machine.write(address, text.as_bytes());
        let len = u32::try_from(text.len()).unwrap();
        sent.push(queues[TRANSMIT].add(&[Descriptor::readable(address, len)]));
    }
    let input = machine.allocate(128, 16);
    let buffers = [0, 64].map(|at| queues[RECEIVE].add(&[Descriptor::writable(input + at, 64)]));
    driver.kick(0);
    driver.kick(1);
    let saved = driver.transport.save().unwrap();
    let copy = machine.copy();
    let mut queues_there: Vec<VirtQueue> = queues.iter().map(|queue| queue.in_copy(&copy)).collect();
    let (device, host_there) = console(None);
    let mut clone = Driver::restored(&copy, Box::new(device), &saved).unwrap();
    driver.transport.resume().unwrap();
    let check = |driver: &mut Driver<'_>, queues: &mut [VirtQueue], mut host: Host, before| {
        assert_eq!(driver.wait_interrupt(TIMEOUT), 1);
        driver.wait_each_used(&mut queues[TRANSMIT], &sent);
        for (head, (at, text)) in buffers.iter().zip([(0, "first"), (64, "second")]) {
            host.input.write_all(text.as_bytes()).unwrap();
            let used = driver.wait_each_used(&mut queues[RECEIVE], &[*head]);
            let len = usize::try_from(used[0].len).unwrap();
            assert_eq!(driver.machine.read(input + at, len), text.as_bytes());
        }
        driver.request(&mut queues[TRANSMIT], &[b", three"], &[]);
        let expected = format!("{before}one two, three");
        let mut seen = vec![0; expected.len()];
        host.output.read_exact(&mut seen).unwrap();
        assert_eq!(String::from_utf8(seen).unwrap(), expected);
        assert_eq!(host.tail.bytes(), expected.as_bytes(), "and no more");
    };
    check(&mut driver, &mut queues, host, "before ");
    check(&mut clone, &mut queues_there, host_there, "");
}

#[test]
fn a_sink_that_is_gone_does_not_stop_the_guest() {
    let machine = Machine::new();
    let (device, host) = console(None);
    let metrics = device.metrics().clone();
    let mut driver = Driver::new(&machine, Box::new(device));
    let mut queues = driver.start(0, &[16, 16]);
    let Host { output, tail, .. } = host;
    drop(output);
    driver.request(&mut queues[TRANSMIT], &[b"lost "], &[]);
    driver.request(&mut queues[TRANSMIT], &[b"words"], &[]);
    assert_eq!(tail.bytes(), b"lost words");
    assert_eq!(metrics.dropped_bytes.get(), 10);
    assert_eq!(driver.health().complaints(), 1, "the sink's end is told once");
}

#[test]
fn a_new_size_reaches_the_driver() {
    let machine = Machine::new();
    let size = TerminalSize {
        columns: 80,
        rows: 25,
    };
    let (device, host) = console(Some(size));
    let mut driver = Driver::new(&machine, Box::new(device));
    assert_eq!(driver.config::<8>(0), [80, 0, 25, 0, 1, 0, 0, 0]);
    driver.start(F_SIZE, &[16, 16]);
    let generation = driver.read32(0xfc);
    host.handle.resize(TerminalSize {
        columns: 132,
        rows: 50,
    });
    assert_eq!(driver.wait_interrupt(TIMEOUT), 2);
    assert_ne!(driver.read32(0xfc), generation);
    assert_eq!(driver.config::<4>(0), [132, 0, 50, 0]);
}

#[test]
fn bad_chains_come_back_and_good_ones_still_pass() {
    let machine = Machine::new();
    let (device, mut host) = console(None);
    let mut driver = Driver::new(&machine, Box::new(device));
    let mut queues = driver.start(0, &[16, 16]);
    let buffer = machine.allocate(64, 16);
    host.input.write_all(b"x").unwrap();
    for parts in [
        &[Descriptor::readable(buffer, 64)][..],
        &[Descriptor::writable(Machine::HOLE - 8, 64)],
        &[Descriptor::writable(buffer, 0)],
        &[Descriptor::writable(buffer, 8), Descriptor::readable(buffer, 8)],
    ] {
        queues[RECEIVE].add(parts);
        driver.kick(0);
        assert_eq!(driver.wait_used(&mut queues[RECEIVE]).unwrap().len, 0);
    }
    queues[RECEIVE].add(&[Descriptor::writable(buffer, 64)]);
    driver.kick(0);
    assert_eq!(driver.wait_used(&mut queues[RECEIVE]).unwrap().len, 1);
    queues[TRANSMIT].add(&[Descriptor::readable(u64::MAX - 3, 64)]);
    driver.kick(1);
    driver.wait_used(&mut queues[TRANSMIT]).unwrap();
    assert_eq!(driver.health().complaints(), 5);
}

#[test]
fn input_that_ends_is_not_looked_at_again() {
    let machine = Machine::new();
    let (device, host) = console(None);
    let mut driver = Driver::new(&machine, Box::new(device));
    let mut queues = driver.start(0, &[16, 16]);
    drop(host.input);
    let buffer = machine.allocate(64, 16);
    queues[RECEIVE].add(&[Descriptor::writable(buffer, 64)]);
    driver.kick(0);
    assert_eq!(
        driver.wait_used_for(&mut queues[RECEIVE], Duration::from_millis(50)),
        Err(NoReply::TimedOut)
    );
    assert!(!driver.health().is_failed());
    driver.request(&mut queues[TRANSMIT], &[b"still here"], &[]);
    assert_eq!(host.tail.bytes(), b"still here");
}
