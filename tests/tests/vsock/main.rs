// SPDX-License-Identifier: Apache-2.0
//! The vsock device as a guest meets it, well-behaved and hostile.

mod guest;

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use cloister_devices::vsock::{Vsock, VsockConfig, VsockHandle};
use cloister_tests::driver::{Driver, Machine, wait_until};
use guest::{GUEST_CID, Guest, NO_RECEIVE, NO_SEND, Packet, Stream, op};

const PORT: u32 = 1025;

fn device() -> (Box<Vsock>, VsockHandle) {
    let (device, handle) = Vsock::new(VsockConfig::new(GUEST_CID)).unwrap();
    (Box::new(device), handle)
}

/// Bytes that do not repeat with any power of two.
fn pattern(seed: u64, at: usize) -> u8 {
    let x = (at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(seed);
    (x >> 32).to_le_bytes()[0] ^ (at % 251).to_le_bytes()[0]
}

fn checksum(data: &[u8], state: u64) -> u64 {
    data.iter().fold(state, |state, &byte| {
        (state ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[test]
fn the_guest_reads_its_cid() {
    let machine = Machine::new();
    let (device, _handle) = device();
    let driver = Driver::new(&machine, device);
    assert_eq!(u64::from_le_bytes(driver.config(0)), GUEST_CID);
    assert_eq!(driver.config::<4>(8), [0; 4]);
    for cid in [0, 1, 2, u64::from(u32::MAX), u64::MAX] {
        assert!(Vsock::new(VsockConfig::new(cid)).is_err(), "CID {cid}");
    }
}

/// The host's end echoes; the guest sends `total` bytes and takes them back, always within credit.
fn echo(guest: &mut Guest<'_>, mut stream: Stream, host: UnixStream, total: usize) {
    let echo = std::thread::spawn(move || {
        let (mut reader, mut writer) = (&host, &host);
        let mut buffer = vec![0; 128 << 10];
        loop {
            match reader.read(&mut buffer).unwrap() {
                0 => break host.shutdown(std::net::Shutdown::Write).unwrap(),
                n => writer.write_all(&buffer[..n]).unwrap(),
            }
        }
        // Open until here: the guest closes.
        assert_eq!(reader.read(&mut buffer).unwrap(), 0);
    });
    let block: Vec<u8> = (0..1 << 20).map(|at| pattern(7, at)).collect();
    let (mut sent, mut received, mut sent_sum, mut received_sum) = (0, 0, 0, 0);
    let mut done_sending = false;
    while received < total || stream.host_shutdown & NO_SEND == 0 {
        assert!(!stream.reset);
        if sent < total && stream.credit() > 0 {
            let from = sent % block.len();
            let data = &block[from..block.len().min(from + total - sent)];
            let n = stream.send_some(guest, data);
            sent_sum = checksum(&data[..n], sent_sum);
            sent += n;
        } else if sent == total && !done_sending {
            stream.shutdown(guest, NO_SEND);
            done_sending = true;
        } else {
            let packet = guest.receive();
            stream.handle(guest, packet);
        }
        while let Some(packet) = guest.receive_for(Duration::ZERO) {
            stream.handle(guest, packet);
        }
        received_sum = checksum(&stream.received, received_sum);
        received += stream.received.len();
        stream.received.clear();
    }
    assert_eq!((received, received_sum), (total, sent_sum));
    stream.shutdown(guest, NO_SEND | NO_RECEIVE);
    loop {
        let packet = guest.receive();
        if packet.op == op::RST {
            break;
        }
        stream.handle(guest, packet);
    }
    echo.join().unwrap();
}

const MEGABYTES: usize = 100 << 20;

#[test]
fn a_hundred_megabytes_go_to_the_host_and_back() {
    let machine = Machine::new();
    let (device, handle) = device();
    let listener = handle.listen(PORT).unwrap();
    let mut guest = Guest::start(&machine, device);
    let stream = guest.connect(5000, PORT);
    let (host, port) = listener.accept().unwrap();
    assert_eq!(port, 5000);
    echo(&mut guest, stream, host, MEGABYTES);
    let metrics = handle.metrics();
    assert!(metrics.tx_bytes == MEGABYTES as u64 && metrics.rx_bytes == MEGABYTES as u64);
    println!("{metrics:#?}");
}

#[test]
fn it_works_without_event_idx_too() {
    let machine = Machine::new();
    let (device, handle) = device();
    let mut guest = Guest::start_with(&machine, device, false);
    let host = handle.connect(1024).unwrap();
    let stream = guest.accept_connection(1024);
    assert!(stream.host_port >= 1 << 30);
    echo(&mut guest, stream, host, 10 << 20);
}

#[test]
fn a_connection_asked_for_before_the_driver_is_ready_waits_for_it() {
    let machine = Machine::new();
    let (device, handle) = device();
    let mut host = handle.connect(1024).unwrap();
    host.write_all(b"early").unwrap();
    let mut guest = Guest::start(&machine, device);
    let mut stream = guest.accept_connection(1024);
    let packet = guest.receive();
    stream.handle(&mut guest, packet);
    assert_eq!(stream.received, b"early");
}
