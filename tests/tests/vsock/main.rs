// SPDX-License-Identifier: Apache-2.0
//! The vsock device as a guest meets it, well-behaved and hostile.

#![allow(clippy::unwrap_used, reason = "tests")]

mod guest;
mod hostile;
mod unix_sockets;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use cloister_devices::vsock::{Vsock, VsockConfig, VsockHandle};
use cloister_tests::driver::{Descriptor, Driver, Machine, TIMEOUT, wait_until};
use guest::{GUEST_CID, Guest, NO_RECEIVE, NO_SEND, Packet, Stream, op};

const PORT: u32 = 1025;

fn device() -> (Box<Vsock>, VsockHandle) {
    device_with_cid(GUEST_CID)
}

fn device_with_cid(cid: u64) -> (Box<Vsock>, VsockHandle) {
    let (device, handle) = Vsock::new(VsockConfig::new(cid)).unwrap();
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

/// That the device sleeps: nothing wakes it while nothing happens.
fn assert_asleep(handle: &VsockHandle) {
    // What is under way comes to its end first. On a busy machine some of it may come late: a device that spins is
    // woken thousands of times in that while.
    let mut before = handle.metrics().wakeups;
    let rests = wait_until(|| {
        std::thread::sleep(Duration::from_millis(20));
        let now = handle.metrics().wakeups;
        std::mem::replace(&mut before, now) == now
    });
    assert!(rests, "the device does not come to rest");
    std::thread::sleep(Duration::from_millis(200));
    let woken = handle.metrics().wakeups - before;
    assert!(woken <= 40, "woken {woken} times with nothing to do");
}

/// An established connection: the guest's end and the host's.
fn connected(guest: &mut Guest<'_>, handle: &VsockHandle, guest_port: u32) -> (Stream, UnixStream) {
    let host = handle.connect(guest_port).unwrap();
    host.set_read_timeout(Some(TIMEOUT)).unwrap();
    (guest.accept_connection(guest_port), host)
}

/// Takes packets of `stream` until `done`.
fn take_until(guest: &mut Guest<'_>, stream: &mut Stream, done: impl Fn(&Stream) -> bool) {
    while !done(stream) {
        let packet = guest.receive();
        stream.handle(guest, packet);
    }
}

#[test]
fn half_close_by_the_guest_lets_the_host_go_on() {
    let machine = Machine::new();
    let (device, handle) = device();
    let mut guest = Guest::start(&machine, device);
    let (mut stream, mut host) = connected(&mut guest, &handle, 7);
    stream.send_some(&mut guest, b"last words");
    stream.shutdown(&mut guest, NO_SEND);
    let mut text = String::new();
    host.read_to_string(&mut text).unwrap();
    assert_eq!(text, "last words");
    host.write_all(b"the answer").unwrap();
    take_until(&mut guest, &mut stream, |stream| stream.received == b"the answer");
    drop(host);
    take_until(&mut guest, &mut stream, |stream| {
        stream.host_shutdown == NO_SEND | NO_RECEIVE
    });
    guest.send(&stream.packet(op::RST));
    guest.expect_silence();
    assert_asleep(&handle);
}

#[test]
fn half_close_by_the_host_lets_the_guest_go_on() {
    let machine = Machine::new();
    let (device, handle) = device();
    let mut guest = Guest::start(&machine, device);
    let (mut stream, mut host) = connected(&mut guest, &handle, 7);
    host.write_all(b"last words").unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    take_until(&mut guest, &mut stream, |stream| stream.host_shutdown == NO_SEND);
    assert_eq!(stream.received, b"last words");
    assert_asleep(&handle);
    stream.send_some(&mut guest, b"the answer");
    let mut answer = [0; 10];
    host.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"the answer");
    // Close in good order: RST comes when all is out.
    stream.shutdown(&mut guest, NO_SEND | NO_RECEIVE);
    take_until(&mut guest, &mut stream, |stream| stream.reset);
    assert_eq!(host.read(&mut answer).unwrap(), 0);
    assert_asleep(&handle);
}

#[test]
fn a_guest_that_does_not_receive_any_more_stops_the_host_writing() {
    let machine = Machine::new();
    let (device, handle) = device();
    let mut guest = Guest::start(&machine, device);
    let (mut stream, mut host) = connected(&mut guest, &handle, 7);
    stream.shutdown(&mut guest, NO_RECEIVE);
    assert!(wait_until(|| host
        .write(b"x")
        .is_err_and(|error| error.kind() == io::ErrorKind::BrokenPipe)));
    stream.send_some(&mut guest, b"still here");
    let mut answer = [0; 10];
    host.read_exact(&mut answer).unwrap();
    assert_asleep(&handle);
}

#[test]
fn a_host_that_does_not_read_any_more_stops_the_guest_writing() {
    let machine = Machine::new();
    let (device, handle) = device();
    let mut guest = Guest::start(&machine, device);
    let (mut stream, mut host) = connected(&mut guest, &handle, 7);
    host.shutdown(std::net::Shutdown::Read).unwrap();
    stream.send_some(&mut guest, b"for nobody");
    take_until(&mut guest, &mut stream, |stream| {
        stream.host_shutdown == NO_RECEIVE
    });
    host.write_all(b"still here").unwrap();
    take_until(&mut guest, &mut stream, |stream| stream.received == b"still here");
    assert_asleep(&handle);
}

#[test]
fn a_reset_ends_it_for_the_host() {
    let machine = Machine::new();
    let (device, handle) = device();
    let mut guest = Guest::start(&machine, device);
    let (mut stream, mut host) = connected(&mut guest, &handle, 7);
    stream.send_some(&mut guest, b"mid");
    guest.send(&stream.packet(op::RST));
    let mut text = String::new();
    host.read_to_string(&mut text).unwrap();
    assert_eq!(text, "mid");
    // The connection is unknown now.
    guest.send(&stream.packet(op::RW).with_payload(b"stream"));
    guest.expect(op::RST, 7, stream.host_port);
    guest.send(&stream.packet(op::RST));
    guest.expect_silence();
}

#[test]
fn what_the_guest_sent_before_it_closed_arrives_although_the_host_is_slow() {
    let machine = Machine::new();
    let (device, handle) = device();
    let mut guest = Guest::start(&machine, device);
    let (mut stream, mut host) = connected(&mut guest, &handle, 7);
    let data: Vec<u8> = (0..4 << 20).map(|at| pattern(3, at)).collect();
    let sent = fill(&mut guest, &mut stream, &data, SMALL);
    assert!(handle.metrics().host_stalls > 0, "nothing was buffered");
    stream.shutdown(&mut guest, NO_SEND | NO_RECEIVE);
    // As Linux does when it waited long enough.
    guest.send(&stream.packet(op::RST));
    // Its ports may be used again at once.
    let (mut again, mut other) = connected(&mut guest, &handle, 7);
    again.send_some(&mut guest, b"other");
    other.read_exact(&mut [0; 5]).unwrap();
    let mut received = Vec::new();
    host.read_to_end(&mut received).unwrap();
    assert!(received == data[..sent], "{} of {sent} bytes", received.len());
    assert_asleep(&handle);
}

/// Sends until the host takes no more: socket and credit are used up. Gives the number of bytes.
///
/// The host's socket has room for a whole credit of large packets. In small ones its overhead fills the buffer before,
/// and the device has to keep the rest.
fn fill(guest: &mut Guest<'_>, stream: &mut Stream, data: &[u8], chunk: usize) -> usize {
    let mut sent = 0;
    loop {
        sent += stream.send_some(guest, &data[sent..data.len().min(sent + chunk)]);
        assert!(sent < data.len(), "the host takes everything");
        if stream.credit() == 0 {
            match guest.receive_for(Duration::from_millis(100)) {
                Some(packet) => stream.handle(guest, packet),
                None => return sent,
            }
        }
    }
}

const SMALL: usize = 200;
const LARGE: usize = 64 << 10;

#[test]
fn a_host_that_does_not_read_stops_its_connection_only() {
    stalled_reader(LARGE);
}

#[test]
fn a_host_that_does_not_read_small_packets_stops_its_connection_only() {
    stalled_reader(SMALL);
}

fn stalled_reader(chunk: usize) {
    let machine = Machine::new();
    let (device, handle) = device();
    let mut guest = Guest::start(&machine, device);
    let (mut stalled, mut slow) = connected(&mut guest, &handle, 7);
    let data: Vec<u8> = (0..8 << 20).map(|at| pattern(1, at)).collect();
    let mut sent = fill(&mut guest, &mut stalled, &data, chunk);
    assert_eq!(handle.metrics().host_stalls > 0, chunk == SMALL);
    assert_asleep(&handle);

    let (mut other, mut fast) = connected(&mut guest, &handle, 8);
    for _ in 0..100 {
        other.send_some(&mut guest, b"ping");
        fast.read_exact(&mut [0; 4]).unwrap();
        fast.write_all(b"pong").unwrap();
        let goal = other.received.len() + 4;
        take_until(&mut guest, &mut other, |other| other.received.len() == goal);
    }
    assert_eq!(guest.tx_in_flight(), 0, "packets must not wait in the queue");

    let reader = std::thread::spawn(move || {
        let mut received = Vec::new();
        slow.read_to_end(&mut received).unwrap();
        received
    });
    while sent < data.len() {
        sent += stalled.send_some(&mut guest, &data[sent..data.len().min(sent + chunk)]);
        if stalled.credit() == 0 {
            let packet = guest.receive();
            stalled.handle(&mut guest, packet);
        }
    }
    stalled.shutdown(&mut guest, NO_SEND);
    assert!(reader.join().unwrap() == data);
}

/// Writes until the socket is full; gives the number of bytes.
fn fill_socket(mut host: &UnixStream) -> usize {
    host.set_nonblocking(true).unwrap();
    let mut written = 0;
    let mut full = 0;
    // Full for good: the device moves bytes on until the guest's credit is used up.
    while full < 50 {
        match host.write(&[b'h'; 4096]) {
            Ok(n) => written += n,
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                full += 1;
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
    host.set_nonblocking(false).unwrap();
    written
}

#[test]
fn a_guest_without_credit_is_waited_for_without_spinning() {
    let machine = Machine::new();
    let (device, handle) = device();
    let mut guest = Guest::start(&machine, device);
    let host = handle.connect(7).unwrap();
    let request = guest.expect(op::REQUEST, 7, 1 << 30);
    let accept = Packet {
        buf_alloc: 10_000,
        ..Packet::new(op::RESPONSE, 7, request.src_port)
    };
    guest.send(&accept);
    let written = fill_socket(&host);
    let (mut received, mut asked) = (0, 0);
    while received < 10_000 || asked == 0 {
        let packet = guest.receive();
        match packet.op {
            op::RW => received += packet.payload.len(),
            op::CREDIT_REQUEST => asked += 1,
            other => panic!("{other}"),
        }
    }
    guest.expect_silence();
    assert_eq!((received, asked), (10_000, 1));
    assert_asleep(&handle);
    // The classic: a hang-up is reported whatever one waits for.
    drop(host);
    assert_asleep(&handle);
    // A lie about what was read gives no more than the buffer, or nothing.
    for fwd_cnt in [u32::MAX, 10_001, 1 << 31] {
        let lie = Packet {
            buf_alloc: 10_000,
            fwd_cnt,
            ..Packet::new(op::CREDIT_UPDATE, 7, request.src_port)
        };
        guest.send(&lie);
        guest.expect_silence();
    }
    let mut fwd_cnt = 10_000;
    loop {
        let update = Packet {
            buf_alloc: 10_000,
            fwd_cnt,
            ..Packet::new(op::CREDIT_UPDATE, 7, request.src_port)
        };
        guest.send(&update);
        let packet = guest.receive();
        match packet.op {
            op::RW => {
                received += packet.payload.len();
                fwd_cnt += packet.len;
            }
            op::SHUTDOWN => break assert_eq!(packet.flags, NO_SEND | NO_RECEIVE),
            op::CREDIT_REQUEST => {}
            other => panic!("{other}"),
        }
    }
    assert_eq!(received, written, "what the host wrote before it closed arrives");
}

#[test]
fn two_thousand_connections_live_side_by_side() {
    const COUNT: u32 = 2_000;
    raise_descriptor_limit(u64::from(COUNT) * 2 + 500);
    let machine = Machine::new();
    let (device, handle) = device();
    let mut guest = Guest::start(&machine, device);
    let mut ends = Vec::new();
    let mut streams = Vec::new();
    for port in 0..COUNT {
        ends.push(handle.connect(port).unwrap());
        streams.push(guest.accept_connection(port));
    }
    let mut credit_given = 0;
    for (stream, end) in streams.iter_mut().zip(&mut ends) {
        credit_given += stream.credit();
        stream.send_some(&mut guest, &stream.guest_port.to_le_bytes());
        let mut port = [0; 4];
        end.read_exact(&mut port).unwrap();
        assert_eq!(u32::from_le_bytes(port), stream.guest_port);
        end.write_all(&port).unwrap();
    }
    assert!(
        credit_given <= 64 << 20,
        "the host promised {credit_given} bytes of buffers"
    );
    let mut arrived = 0;
    while arrived < COUNT {
        let packet = guest.receive();
        assert_eq!(packet.payload, packet.dst_port.to_le_bytes());
        arrived += 1;
    }
    assert_asleep(&handle);
    drop(ends);
    let mut closed = 0;
    while closed < COUNT {
        let packet = guest.receive();
        assert_eq!((packet.op, packet.flags), (op::SHUTDOWN, NO_SEND | NO_RECEIVE));
        guest.send(&Packet::new(op::RST, packet.dst_port, packet.src_port));
        closed += 1;
    }
    assert_asleep(&handle);
}

fn raise_descriptor_limit(wanted: u64) {
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current = limit
        .maximum
        .map(|maximum| maximum.min(1 << 16))
        .or(Some(1 << 16));
    assert!(
        limit.current.is_some_and(|current| current >= wanted),
        "this test needs {wanted} file descriptors: raise the hard limit (ulimit -Hn)"
    );
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
}

#[test]
fn refused_timed_out_and_gone_are_told_apart() {
    let machine = Machine::new();
    let (device, handle) = device();
    let connect = |timeout| {
        let handle = handle.clone();
        std::thread::spawn(move || handle.connect_timeout(9, timeout).map_err(|error| error.kind()))
    };
    // Not even a driver.
    let nobody = connect(Duration::from_millis(50)).join().unwrap();
    assert_eq!(nobody.unwrap_err(), io::ErrorKind::TimedOut);

    let mut guest = Guest::start(&machine, device);
    let stale = guest.receive();
    guest.send(&Packet::new(op::RST, 9, stale.src_port));
    let refused = connect(TIMEOUT);
    let request = guest.receive();
    assert_eq!(request.op, op::REQUEST);
    guest.send(&Packet::new(op::RST, 9, request.src_port));
    assert_eq!(
        refused.join().unwrap().unwrap_err(),
        io::ErrorKind::ConnectionRefused
    );

    let accepted = connect(TIMEOUT);
    let mut stream = guest.accept_connection(9);
    let mut host = accepted.join().unwrap().unwrap();
    stream.send_some(&mut guest, b"ok");
    host.read_exact(&mut [0; 2]).unwrap();

    // Never answered: RST after a while, and the slot is free again.
    let silent = connect(Duration::from_millis(50));
    let request = guest.receive();
    assert_eq!(request.op, op::REQUEST);
    assert_eq!(silent.join().unwrap().unwrap_err(), io::ErrorKind::TimedOut);
    guest.expect(op::RST, 9, request.src_port);

    drop(guest);
    assert_eq!(
        host.read(&mut [0]).unwrap(),
        0,
        "the connection went with the device"
    );
    let error = handle.connect(9).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotConnected);
    assert_eq!(handle.listen(9).unwrap_err().kind(), io::ErrorKind::NotConnected);
}

#[test]
fn listeners_come_and_go() {
    let machine = Machine::new();
    let (device, handle) = device();
    let mut guest = Guest::start(&machine, device);
    guest.send(&Packet::new(op::REQUEST, 5, PORT));
    guest.expect(op::RST, 5, PORT);
    let listener = handle.listen(PORT).unwrap();
    assert_eq!(handle.listen(PORT).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    listener.set_nonblocking(true).unwrap();
    assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    let _stream = guest.connect(5, PORT);
    let (_host, port) = listener.accept().unwrap();
    assert_eq!(port, 5);
    drop(listener);
    guest.send(&Packet::new(op::REQUEST, 6, PORT));
    guest.expect(op::RST, 6, PORT);
    // The port is free for another one.
    let listener = handle.listen(PORT).unwrap();
    let _stream = guest.connect(7, PORT);
    assert_eq!(listener.accept().unwrap().1, 7);
    // Nobody accepts: the backlog ends somewhere.
    let refused = (100..2_000).any(|port| {
        guest.send(&Packet::new(op::REQUEST, port, PORT));
        guest.receive().op == op::RST
    });
    assert!(refused, "endless backlog");
    // With the device the listener ends.
    drop(guest);
    let end = std::iter::repeat_with(|| listener.accept()).find_map(Result::err);
    assert_eq!(end.unwrap().kind(), io::ErrorKind::NotConnected);
}

#[test]
fn a_restored_guest_is_told_and_starts_anew() {
    let machine = Machine::new();
    let (device, handle) = device();
    let mut guest = Guest::start(&machine, device);
    let event_buffer = machine.allocate(4, 4);
    machine.write(event_buffer, &[0xff; 4]);
    let event_head = guest.event.add(&[Descriptor::writable(event_buffer, 4)]);
    guest.driver.kick(2);
    let (mut stream, _host) = connected(&mut guest, &handle, 7);
    guest.expect_silence();
    assert!(guest.event.take_used().is_none());
    // In a tx queue that nobody serves, as it were: it is in the snapshot.
    let saved = guest.driver.transport.save().unwrap();

    let (device, handle) = device_with_cid(GUEST_CID);
    let listener = handle.listen(PORT).unwrap();
    let early = handle.connect(9).unwrap();
    let driver = Driver::restored(&machine, device, &saved).unwrap();
    let mut guest = guest.move_to(driver);
    let used = guest.driver.wait_used(&mut guest.event).unwrap();
    assert_eq!((used.head, used.len), (event_head.into(), 4));
    assert_eq!(machine.read(event_buffer, 4), [0; 4], "TRANSPORT_RESET");
    // Old connections are unknown, new ones work, and no host port is used again.
    guest.send(&stream.packet(op::RW).with_payload(b"stale"));
    guest.expect(op::RST, 7, stream.host_port);
    let _stream = guest.connect(8, PORT);
    let _accepted = listener.accept().unwrap();
    // The host's own only come when the driver has dropped what it had, however long that takes: it would drop them, too.
    // It is reminded.
    let interrupts = || handle.metrics().interrupts;
    let before = interrupts();
    while interrupts() < before + 2 {
        guest.expect_silence();
    }
    guest.event.add(&[Descriptor::writable(event_buffer, 4)]);
    guest.driver.kick(2);
    let _accepted_early = guest.accept_connection(9);
    let (again, _host) = connected(&mut guest, &handle, 7);
    assert_ne!(again.host_port, stream.host_port);
    assert_asleep(&handle);
    drop(early);
}

#[test]
fn packets_in_flight_at_a_snapshot_are_used_once_by_the_original_and_refused_to_a_copy() {
    let machine = Machine::new();
    let (device, handle) = device();
    let listener = handle.listen(PORT).unwrap();
    let mut guest = Guest::start(&machine, device);
    let event_buffer = machine.allocate(4, 4);
    machine.write(event_buffer, &[0xff; 4]);
    let event = guest.event.add(&[Descriptor::writable(event_buffer, 4)]);
    let (mut stream, mut host) = connected(&mut guest, &handle, 7);
    // One that the guest has half closed, and one that it has not answered yet.
    let (mut half, mut half_host) = connected(&mut guest, &handle, 8);
    half.shutdown(&mut guest, NO_SEND);
    assert_eq!(half_host.read(&mut [0]).unwrap(), 0);
    let mut asked = handle.connect(9).unwrap();
    asked.set_read_timeout(Some(TIMEOUT)).unwrap();
    let request = guest.receive();
    assert_eq!((request.op, request.dst_port), (op::REQUEST, 9));

    guest.driver.transport.pause();
    stream.send_some(&mut guest, b"from the guest");
    guest.send(&Packet::new(op::RESPONSE, 9, request.src_port));
    guest.send(&Packet::new(op::REQUEST, 20, PORT));
    host.write_all(b"from the host").unwrap();
    half_host.write_all(b"the answer").unwrap();
    asked.write_all(b"first").unwrap();
    let saved = guest.driver.transport.save().unwrap();
    let copy = machine.copy();

    // The copy knows none of its connections, and is told so; what it asks for is new.
    let (device, handle_there) = device_with_cid(GUEST_CID);
    let listener_there = handle_there.listen(PORT).unwrap();
    let driver = Driver::restored(&copy, device, &saved).unwrap();
    let mut clone = guest.copy(driver);
    assert_eq!(clone.driver.wait_interrupt(TIMEOUT), 1);
    let mut came: Vec<_> = (0..3)
        .map(|_| clone.receive())
        .map(|p| (p.dst_port, p.op))
        .collect();
    came.sort_unstable();
    assert_eq!(came, [(7, op::RST), (9, op::RST), (20, op::RESPONSE)]);
    let _accepted = listener_there.accept().unwrap();
    clone.expect_silence();
    let used = clone.driver.wait_used(&mut clone.event).unwrap();
    assert_eq!((used.head, used.len), (event.into(), 4));
    assert_eq!(copy.read(event_buffer, 4), [0; 4], "TRANSPORT_RESET");
    clone.event.add(&[Descriptor::writable(event_buffer, 4)]);
    clone.driver.kick(2);
    let (mut again, mut other) = connected(&mut clone, &handle_there, 7);
    again.send_some(&mut clone, b"anew");
    let mut text = [0; 4];
    other.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"anew");
    clone.assert_nothing_lost();

    // The original has noticed nothing.
    guest.driver.transport.resume().unwrap();
    let mut late = Stream::new(9, request.src_port, &request);
    let mut answered = 0;
    let mut deadline = TIMEOUT;
    while let Some(packet) = guest.receive_for(deadline) {
        match packet.dst_port {
            7 => stream.handle(&mut guest, packet),
            8 => half.handle(&mut guest, packet),
            9 => late.handle(&mut guest, packet),
            _ => {
                assert_eq!((packet.dst_port, packet.op), (20, op::RESPONSE));
                answered += 1;
            }
        }
        if !stream.received.is_empty() && !half.received.is_empty() && !late.received.is_empty() {
            // Does any of it come again?
            deadline = Duration::from_millis(30);
        }
    }
    assert_eq!(stream.received, b"from the host");
    assert_eq!(half.received, b"the answer");
    assert_eq!(late.received, b"first");
    assert_eq!(answered, 1);
    let _accepted = listener.accept().unwrap();
    stream.send_some(&mut guest, b", again");
    let mut text = [0; 21];
    host.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"from the guest, again");
    late.send_some(&mut guest, b"late");
    let mut text = [0; 4];
    asked.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"late");
    assert_eq!(guest.event.used_index(), 0, "no TRANSPORT_RESET");
    guest.assert_nothing_lost();
    assert_asleep(&handle);
}

#[test]
fn more_connections_than_allowed_are_refused() {
    let machine = Machine::new();
    let config = VsockConfig {
        max_connections: 3,
        ..VsockConfig::new(GUEST_CID)
    };
    let (device, handle) = Vsock::new(config).unwrap();
    let listener = handle.listen(PORT).unwrap();
    let mut guest = Guest::start(&machine, Box::new(device));
    let mut streams: Vec<Stream> = (0..3).map(|port| guest.connect(port, PORT)).collect();
    guest.send(&Packet::new(op::REQUEST, 3, PORT));
    guest.expect(op::RST, 3, PORT);
    let mut refused = handle.connect(9).unwrap();
    assert_eq!(refused.read(&mut [0]).unwrap(), 0);
    guest.send(&streams[0].packet(op::RST));
    guest.connect(4, PORT);
    drop(listener);
}
