// SPDX-License-Identifier: Apache-2.0
//! The network device, driven well and badly; on a pair of sockets, and on a tap in a network namespace of its own.
//!
//! The tests with a tap need root and /dev/net/tun, and fail without.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use cloister_devices::net::{Net, NetBackend, NetConfig, NetHandle, NetMetrics};
use cloister_tests::driver::{Descriptor, Driver, Machine, NoReply, TIMEOUT, VirtQueue, wait_until};
use cloister_tests::random::Random;
use cloister_tests::zoo::cable;

const CSUM: u64 = 1 << 0;
const GUEST_CSUM: u64 = 1 << 1;
const MTU: u64 = 1 << 3;
const MAC: u64 = 1 << 5;
const GUEST_TSO4: u64 = 1 << 7;
const HOST_TSO4: u64 = 1 << 11;
const MRG_RXBUF: u64 = 1 << 15;
const STATUS: u64 = 1 << 16;
const CTRL_VQ: u64 = 1 << 17;
const CTRL_RX: u64 = 1 << 18;
const CTRL_MAC_ADDR: u64 = 1 << 23;
const MQ: u64 = 1 << 22;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const HEADER: usize = 12;

struct Fixture {
    device: Box<Net>,
    host: OwnedFd,
    handle: NetHandle,
    metrics: Arc<NetMetrics>,
}

fn net() -> Fixture {
    let (end, host) = cable();
    let device = new(NetBackend::Socket(end));
    Fixture {
        host,
        handle: device.handle(),
        metrics: device.metrics().clone(),
        device,
    }
}

fn new(backend: NetBackend) -> Box<Net> {
    let config = NetConfig {
        backend,
        mac: [2, 0, 0, 1, 2, 3],
        mtu: Some(1400),
    };
    Box::new(Net::new(config).unwrap())
}

/// A frame of `len` bytes behind an empty header.
fn frame(len: usize, seed: u64) -> Vec<u8> {
    [vec![0; HEADER], Random::new(seed).bytes(len)].concat()
}

fn send(fd: impl AsFd, data: &[u8]) {
    assert_eq!(
        rustix::net::send(fd, data, rustix::net::SendFlags::empty()).unwrap(),
        data.len()
    );
}

fn receive(fd: impl AsFd) -> Vec<u8> {
    let mut data = vec![0; 70_000];
    let len = rustix::io::read(fd, &mut data).unwrap();
    data.truncate(len);
    data
}

/// Gives the device a receive buffer of these parts; returns where it is.
fn add_buffer(machine: &Machine, queue: &mut VirtQueue, lens: &[u32]) -> Vec<u64> {
    let mut addresses = Vec::new();
    let mut parts = Vec::new();
    for &len in lens {
        let address = machine.allocate(len as usize, 16);
        addresses.push(address);
        parts.push(Descriptor::writable(address, len));
    }
    queue.add(&parts);
    addresses
}

#[test]
fn frames_pass_both_ways() {
    let machine = Machine::new();
    let Fixture {
        device,
        host,
        metrics,
        ..
    } = net();
    let mut driver = Driver::new(&machine, device);
    assert_eq!(driver.config::<12>(0), [2, 0, 0, 1, 2, 3, 1, 0, 1, 0, 0x78, 0x05]);
    let mut queues = driver.start_with_event_idx(MAC | STATUS | MTU, &[16, 16]);
    let sent = frame(60, 1);
    // Cut anyhow.
    driver.request(
        &mut queues[TRANSMIT],
        &[&sent[..1], &sent[1..20], &sent[20..]],
        &[],
    );
    assert_eq!(receive(&host), sent);

    let buffer = add_buffer(&machine, &mut queues[RECEIVE], &[12, 1000, 600]);
    driver.kick(0);
    let arriving = frame(1300, 2);
    send(&host, &arriving);
    let used = driver.wait_used(&mut queues[RECEIVE]).unwrap();
    assert_eq!(used.len as usize, arriving.len());
    assert_eq!(
        machine.read(buffer[0], 12),
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0],
        "one buffer used"
    );
    assert_eq!(machine.read(buffer[1], 1000), arriving[12..1012]);
    assert_eq!(machine.read(buffer[2], 300), arriving[1012..]);
    assert_eq!(metrics.received_bytes.get(), 1300);
    assert_eq!(metrics.transmitted_bytes.get(), 60);
}

#[test]
fn a_frame_may_take_several_buffers_which_are_used_together() {
    let machine = Machine::new();
    let Fixture { device, host, .. } = net();
    let mut driver = Driver::new(&machine, device);
    let mut queues = driver.start(MRG_RXBUF, &[32, 16]);
    let mut buffers = Vec::new();
    for _ in 0..32 {
        buffers.extend(add_buffer(&machine, &mut queues[RECEIVE], &[200]));
    }
    driver.kick(0);
    let mut at = 0;
    for (len, seed) in [(1400, 1), (60, 2), (188, 3), (189, 4)] {
        let arriving = frame(len, seed);
        let before = queues[RECEIVE].used_index();
        send(&host, &arriving);
        let count = (len + HEADER).div_ceil(200);
        assert!(wait_until(|| queues[RECEIVE].used_index() != before));
        assert_eq!(
            usize::from(queues[RECEIVE].used_index().wrapping_sub(before)),
            count,
            "not all at once"
        );
        let mut seen = Vec::new();
        for number in 0..count {
            let used = queues[RECEIVE].take_used().unwrap();
            assert_eq!(used.head as usize, at);
            seen.extend(machine.read(buffers[at], used.len as usize));
            if number == 0 {
                assert_eq!(usize::from(seen[10]), count);
            }
            at += 1;
        }
        assert_eq!(seen[HEADER..], arriving[HEADER..]);
    }
}

/// CVE-2020-16843: frames without buffers must not keep the loop busy.
#[test]
fn a_guest_without_buffers_is_waited_for_without_spinning() {
    for features in [0, MRG_RXBUF] {
        let machine = Machine::new();
        let Fixture {
            device,
            host,
            metrics,
            ..
        } = net();
        let mut driver = Driver::new(&machine, device);
        let mut queues = driver.start_with_event_idx(features, &[64, 16]);
        for seed in 0..20 {
            send(&host, &frame(100, seed));
        }
        assert!(wait_until(|| metrics.starved.get() > 0));
        std::thread::sleep(Duration::from_millis(50));
        assert!(
            metrics.starved.get() <= 2,
            "spins: {} looks",
            metrics.starved.get()
        );
        // Everything waits for its buffer, in order.
        let mut buffers = Vec::new();
        for _ in 0..20 {
            buffers.push(add_buffer(&machine, &mut queues[RECEIVE], &[1600])[0]);
            driver.kick(0);
        }
        for (seed, buffer) in (0..).zip(buffers) {
            let used = driver.wait_used(&mut queues[RECEIVE]).unwrap();
            assert_eq!(used.len, 112);
            assert_eq!(machine.read(buffer + 12, 100), frame(100, seed)[12..]);
        }
    }
}

/// With mergeable buffers, less than a frame's worth of them is as good as none, unless the ring holds no more.
#[test]
fn too_few_mergeable_buffers_do_not_cut_a_frame() {
    let machine = Machine::new();
    let Fixture {
        device,
        host,
        metrics,
        ..
    } = net();
    let mut driver = Driver::new(&machine, device);
    let mut queues = driver.start_with_event_idx(MRG_RXBUF, &[4, 16]);
    send(&host, &frame(1000, 1));
    add_buffer(&machine, &mut queues[RECEIVE], &[600]);
    driver.kick(0);
    assert!(wait_until(|| metrics.starved.get() > 1));
    assert_eq!(queues[RECEIVE].used_index(), 0);
    for _ in 0..2 {
        add_buffer(&machine, &mut queues[RECEIVE], &[600]);
    }
    driver.kick(0);
    assert_eq!(driver.wait_used(&mut queues[RECEIVE]).unwrap().len, 600);
    assert_eq!(driver.wait_used(&mut queues[RECEIVE]).unwrap().len, 412);
    // A whole ring that is smaller than a frame.
    for _ in 0..3 {
        add_buffer(&machine, &mut queues[RECEIVE], &[100]);
    }
    driver.kick(0);
    send(&host, &frame(50, 2));
    assert_eq!(driver.wait_used(&mut queues[RECEIVE]).unwrap().len, 62);
}

#[test]
fn malformed_frames_are_dropped_and_counted() {
    let machine = Machine::new();
    let Fixture {
        device,
        host,
        metrics,
        ..
    } = net();
    let mut driver = Driver::new(&machine, device);
    let mut queues = driver.start(0, &[16, 16]);
    let mut checksum = frame(100, 1);
    checksum[0] = 1;
    let mut segmented = frame(100, 1);
    segmented[1] = 1;
    let huge = frame(66_000, 1);
    let bad: &[&[&[u8]]] = &[
        &[&[0; 11]],
        &[&[0; 12]],
        &[&frame(13, 1)],
        &[&checksum],
        &[&segmented],
        &[&huge],
    ];
    for readable in bad {
        driver.request(&mut queues[TRANSMIT], readable, &[]);
    }
    // A buffer for writing only.
    driver.request(&mut queues[TRANSMIT], &[], &[100]);
    assert_eq!(metrics.transmit_dropped.get(), bad.len() as u64 + 1);
    assert_eq!(metrics.transmitted_frames.get(), 0);
    let good = frame(14, 9);
    driver.request(&mut queues[TRANSMIT], &[&good], &[]);
    assert_eq!(receive(&host), good);

    // Bad receive buffers go back, and do not cost a frame.
    let scratch = machine.allocate(2048, 16);
    for parts in [
        &[Descriptor::writable(scratch, 12)][..],
        &[Descriptor::readable(scratch, 2000)],
        &[Descriptor::writable(Machine::HOLE, 2000)],
        &[Descriptor::writable(scratch, 2000)],
    ] {
        queues[RECEIVE].add(parts);
    }
    driver.kick(0);
    // Shorter than any frame.
    send(&host, &[0; 20]);
    send(&host, &frame(100, 3));
    for len in [0, 0, 0, 112] {
        assert_eq!(driver.wait_used(&mut queues[RECEIVE]).unwrap().len, len);
    }
    assert_eq!(metrics.receive_dropped.get(), 1);
}

#[test]
fn a_full_cable_holds_the_guest_back_and_loses_nothing() {
    let machine = Machine::new();
    let Fixture {
        device,
        host,
        metrics,
        ..
    } = net();
    let mut driver = Driver::new(&machine, device);
    let mut queues = driver.start_with_event_idx(0, &[16, 256]);
    let address = machine.allocate(256 * 1412, 16);
    let mut sent = 0u64;
    while metrics.tap_full.get() == 0 {
        for _ in 0..200 {
            let data = frame(1400, sent);
            let at = address + sent % 256 * 1412;
            machine.write(at, &data);
            queues[TRANSMIT].add(&[Descriptor::readable(at, 1412)]);
            sent += 1;
        }
        driver.kick(1);
        let total = u16::try_from(sent).unwrap();
        assert!(wait_until(|| {
            metrics.tap_full.get() > 0 || queues[TRANSMIT].used_index() == total
        }));
    }
    for seed in 0..sent {
        assert_eq!(receive(&host)[HEADER..], frame(1400, seed)[HEADER..], "{seed}");
    }
    for _ in 0..sent {
        driver.wait_used(&mut queues[TRANSMIT]).unwrap();
    }
    assert_eq!(metrics.transmit_dropped.get(), 0);
}

#[test]
fn a_cable_that_is_cut_is_told_once() {
    let machine = Machine::new();
    let Fixture {
        device,
        host,
        metrics,
        ..
    } = net();
    let mut driver = Driver::new(&machine, device);
    let mut queues = driver.start(0, &[16, 16]);
    add_buffer(&machine, &mut queues[RECEIVE], &[2000]);
    driver.kick(0);
    drop(host);
    assert!(wait_until(|| driver.health().complaints() == 1));
    for _ in 0..5 {
        driver.request(&mut queues[TRANSMIT], &[&frame(60, 1)], &[]);
    }
    assert_eq!(metrics.transmit_dropped.get(), 5);
    assert_eq!(
        driver.wait_used_for(&mut queues[RECEIVE], Duration::from_millis(20)),
        Err(NoReply::TimedOut)
    );
    assert_eq!(driver.health().complaints(), 1);
    assert!(!driver.health().is_failed());
}

#[test]
fn the_link_goes_down_and_up() {
    let machine = Machine::new();
    let Fixture {
        device,
        handle,
        host: _host,
        ..
    } = net();
    let mut driver = Driver::new(&machine, device);
    driver.start(STATUS, &[16, 16]);
    handle.set_link(false);
    assert_eq!(driver.wait_interrupt(TIMEOUT), 2);
    assert_eq!(driver.config::<2>(6), [0, 0]);
    let saved = driver.transport.save().unwrap();
    handle.set_link(true);
    assert_eq!(driver.wait_interrupt(TIMEOUT), 2);
    assert_eq!(driver.config::<2>(6), [1, 0]);
    let Fixture { device, host, .. } = net();
    let restored = Driver::restored(&machine, device, &saved).unwrap();
    assert_eq!(restored.config::<2>(6), [0, 0]);
    drop(host);
}

/// Firecracker's #6031 and #5958: frames lost, or stuck, around a pause or a restore.
#[test]
fn frames_around_a_snapshot_arrive() {
    let machine = Machine::new();
    let (end, host) = cable();
    let device = new(NetBackend::Socket(end.try_clone().unwrap()));
    let mut driver = Driver::new(&machine, device);
    let mut queues = driver.start_with_event_idx(0, &[16, 16]);
    let first = add_buffer(&machine, &mut queues[RECEIVE], &[2000])[0];
    driver.kick(0);
    driver.transport.pause();
    send(&host, &frame(100, 1));
    let out = frame(60, 7);
    let out_address = machine.allocate(out.len(), 16);
    machine.write(out_address, &out);
    queues[TRANSMIT].add(&[Descriptor::readable(
        out_address,
        u32::try_from(out.len()).unwrap(),
    )]);
    driver.kick(1);
    let saved = driver.transport.save().unwrap();
    drop(driver);
    let device = new(NetBackend::Socket(end));
    let mut driver = Driver::restored(&machine, device, &saved).unwrap();
    assert_eq!(driver.wait_used(&mut queues[RECEIVE]).unwrap().len, 112);
    assert_eq!(machine.read(first + 12, 100), frame(100, 1)[12..]);
    driver.wait_used(&mut queues[TRANSMIT]).unwrap();
    assert_eq!(receive(&host), out);
}

/// Nothing has come, or is on its way.
fn assert_silent(host: impl AsFd) {
    std::thread::sleep(Duration::from_millis(30));
    let flags = rustix::net::RecvFlags::DONTWAIT;
    let received = rustix::net::recv(host, &mut [0u8; 2000][..], flags);
    assert_eq!(received.map(|(len, _)| len), Err(rustix::io::Errno::AGAIN));
}

#[test]
fn frames_buffers_and_commands_in_flight_at_a_snapshot_are_used_once_by_each_copy() {
    const CONTROL: usize = 2;
    const OTHER: [u8; 6] = [2, 0, 0, 7, 7, 7];
    let machine = Machine::new();
    let Fixture { device, host, .. } = net();
    let mut driver = Driver::new(&machine, device);
    let features = MAC | STATUS | CTRL_VQ | CTRL_RX | CTRL_MAC_ADDR;
    let mut queues = driver.start_with_event_idx(features, &[16, 16, 16]);
    let to = |mac: [u8; 6], seed| {
        let mut frame = frame(100, seed);
        frame[HEADER..HEADER + 6].copy_from_slice(&mac);
        frame
    };
    // All stand somewhere else than at their beginning.
    add_buffer(&machine, &mut queues[RECEIVE], &[2000]);
    driver.kick(0);
    driver.request(&mut queues[TRANSMIT], &[&frame(60, 1)], &[]);
    assert_eq!(receive(&host), frame(60, 1));
    send(&host, &to([2, 0, 0, 1, 2, 3], 2));
    driver.wait_used(&mut queues[RECEIVE]).unwrap();
    // No frames to others, from here on.
    let reply = driver.request(&mut queues[CONTROL], &[&[0, 0], &[0]], &[1]);
    assert_eq!(reply.buffers[0], [0]);

    driver.transport.pause();
    let mut sent = Vec::new();
    for seed in 10..13 {
        let out = frame(60, seed);
        let address = machine.allocate(out.len(), 16);
        machine.write(address, &out);
        let len = u32::try_from(out.len()).unwrap();
        sent.push(queues[TRANSMIT].add(&[Descriptor::readable(address, len)]));
    }
    let buffers = [(); 3].map(|()| {
        let address = machine.allocate(2000, 16);
        (
            queues[RECEIVE].add(&[Descriptor::writable(address, 2000)]),
            address,
        )
    });
    // Another address, which the device knows only if it has taken this.
    let (command, ack) = (machine.allocate(8, 16), machine.allocate(1, 16));
    machine.write(command, &[&[1, 1], &OTHER[..]].concat());
    machine.write(ack, &[0xff]);
    let commands = [queues[CONTROL].add(&[Descriptor::readable(command, 8), Descriptor::writable(ack, 1)])];
    for queue in 0..3 {
        driver.kick(queue);
    }
    let saved = driver.transport.save().unwrap();
    let copy = machine.copy();
    let mut queues_there: Vec<VirtQueue> = queues.iter().map(|queue| queue.in_copy(&copy)).collect();
    let there = net();
    for host in [&host, &there.host] {
        assert_silent(host);
        // There before the device looks.
        send(host, &to(OTHER, 20));
        send(host, &to([2, 0, 0, 1, 2, 3], 21));
        send(host, &to(OTHER, 22));
    }
    let mut clone = Driver::restored(&copy, there.device, &saved).unwrap();
    driver.transport.resume().unwrap();
    let check = |driver: &mut Driver<'_>, queues: &mut [VirtQueue], host: &OwnedFd| {
        assert_eq!(driver.wait_interrupt(TIMEOUT), 1);
        driver.wait_each_used(&mut queues[TRANSMIT], &sent);
        for seed in 10..13 {
            assert_eq!(receive(host), frame(60, seed));
        }
        assert_silent(host);
        assert_eq!(driver.wait_each_used(&mut queues[CONTROL], &commands)[0].len, 1);
        assert_eq!(driver.machine.read(ack, 1), [0]);
        let [first, second, third] = buffers;
        let came = driver.wait_each_used(&mut queues[RECEIVE], &[first.0, second.0]);
        for ((_, address), (used, seed)) in [first, second].into_iter().zip(came.iter().zip([20, 22])) {
            assert_eq!(used.len, 112);
            assert_eq!(driver.machine.read(address + 12, 100), to(OTHER, seed)[12..]);
        }
        // What is left serves those that come later.
        send(host, &to(OTHER, 23));
        driver.wait_each_used(&mut queues[RECEIVE], &[third.0]);
        assert_eq!(driver.machine.read(third.1 + 12, 100), to(OTHER, 23)[12..]);
        driver.request(&mut queues[TRANSMIT], &[&frame(60, 30)], &[]);
        assert_eq!(receive(host), frame(60, 30));
        assert!(!driver.health().is_failed());
    };
    check(&mut driver, &mut queues, &host);
    check(&mut clone, &mut queues_there, &there.host);
}

#[test]
fn an_unplugged_card_drops_what_is_sent_and_goes_on_once_it_is_plugged_in() {
    let machine = Machine::new();
    let device = new(NetBackend::Unplugged { pairs: 1 });
    let (handle, metrics) = (device.handle(), device.metrics().clone());
    let mut driver = Driver::new(&machine, device);
    let mut queues = driver.start_with_event_idx(MAC | STATUS, &[16, 16]);
    add_buffer(&machine, &mut queues[RECEIVE], &[2000]);
    driver.kick(0);
    driver.request(&mut queues[TRANSMIT], &[&frame(60, 1)], &[]);
    assert_eq!(metrics.transmit_dropped.get(), 1);
    assert_eq!(driver.health().complaints(), 0);
    driver.transport.pause();
    let saved = driver.transport.save().unwrap();
    drop(driver);

    let (end, host) = cable();
    let device = new(NetBackend::Socket(end)).in_place_of(&handle);
    let mut driver = Driver::restored(&machine, Box::new(device), &saved).unwrap();
    driver.request(&mut queues[TRANSMIT], &[&frame(60, 2)], &[]);
    assert_eq!(receive(&host), frame(60, 2));
    send(&host, &frame(100, 3));
    assert_eq!(driver.wait_used(&mut queues[RECEIVE]).unwrap().len, 112);
    // The handle to the first is one to the second.
    assert_eq!(handle.metrics().transmitted_frames.get(), 1);
    handle.set_link(false);
    assert_eq!(driver.config::<2>(6), [0, 0]);
}

mod tap {
    //! On a real tap.

    use super::*;
    use std::ffi::CString;
    use std::os::fd::{AsRawFd, FromRawFd};

    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    const FLAGS: u16 = 0x2 | 0x1000 | 0x4000;
    const MULTI_QUEUE: u16 = 0x100;

    fn check(result: libc::c_int, what: &str) -> libc::c_int {
        assert!(
            result >= 0,
            "{what} (needs root and /dev/net/tun): {}",
            std::io::Error::last_os_error()
        );
        result
    }

    /// Runs `test` on a thread in a new network namespace.
    fn in_netns(test: impl FnOnce() + Send + 'static) {
        std::thread::spawn(move || {
            // SAFETY: takes no pointers; affects this thread only.
            check(unsafe { libc::unshare(libc::CLONE_NEWNET) }, "unshare");
            test();
        })
        .join()
        .unwrap();
    }

    /// An ifreq with this name and flags.
    fn request(flags: u16) -> [u8; 40] {
        let mut request = [0; 40];
        request[..4].copy_from_slice(b"tap0");
        request[16..18].copy_from_slice(&flags.to_le_bytes());
        request
    }

    fn open(flags: u16) -> OwnedFd {
        let fd = OwnedFd::from(
            std::fs::File::options()
                .read(true)
                .write(true)
                .open("/dev/net/tun")
                .expect("/dev/net/tun is needed"),
        );
        let mut request = request(flags);
        // SAFETY: the request is an ifreq of 40 bytes, good for the call.
        check(
            unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) },
            "TUNSETIFF",
        );
        fd
    }

    /// A packet socket on tap0, whose packets come with virtio_net headers (of 10 bytes), with the interface up.
    fn packet_socket() -> OwnedFd {
        const ETH_P_ALL: u16 = 0x0003;
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: takes no pointers.
        let fd = check(
            unsafe { libc::socket(libc::AF_PACKET, kind, i32::from(ETH_P_ALL.to_be())) },
            "AF_PACKET",
        );
        // SAFETY: just opened, owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut up = request(u16::try_from(libc::IFF_UP).unwrap());
        // SAFETY: an ifreq, good for the call.
        check(
            unsafe { libc::ioctl(fd.as_raw_fd(), libc::SIOCSIFFLAGS, up.as_mut_ptr()) },
            "SIOCSIFFLAGS",
        );
        const PACKET_VNET_HDR: libc::c_int = 15;
        let one: libc::c_int = 1;
        // SAFETY: an int and its size.
        check(
            unsafe {
                libc::setsockopt(
                    fd.as_raw_fd(),
                    libc::SOL_PACKET,
                    PACKET_VNET_HDR,
                    (&raw const one).cast(),
                    4,
                )
            },
            "PACKET_VNET_HDR",
        );
        let name = CString::new("tap0").unwrap();
        // SAFETY: all zeroes is a sockaddr_ll; the name is a C string.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
        address.sll_protocol = ETH_P_ALL.to_be();
        // SAFETY: a C string.
        address.sll_ifindex = i32::try_from(unsafe { libc::if_nametoindex(name.as_ptr()) }).unwrap();
        let len = u32::try_from(size_of::<libc::sockaddr_ll>()).unwrap();
        // SAFETY: a sockaddr_ll and its size.
        check(
            unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len) },
            "bind",
        );
        fd
    }

    /// An IPv4 TCP segment of `payload` bytes with proper IP header, addressed to nobody in particular, and the offsets
    /// for a partial checksum.
    fn tcp(payload: usize) -> Vec<u8> {
        let mut packet = vec![0; 14 + 20 + 20 + payload];
        packet[..6].copy_from_slice(&[2, 0, 0, 1, 2, 3]);
        packet[6..12].copy_from_slice(&[2, 0, 0, 9, 9, 9]);
        packet[12..14].copy_from_slice(&[8, 0]);
        let len = u16::try_from(40 + payload).unwrap();
        let ip = &mut packet[14..34];
        ip[0] = 0x45;
        ip[2..4].copy_from_slice(&len.to_be_bytes());
        ip[8] = 64;
        ip[9] = 6;
        ip[12..16].copy_from_slice(&[10, 0, 0, 1]);
        ip[16..20].copy_from_slice(&[10, 0, 0, 2]);
        let mut sum: u32 = ip
            .chunks(2)
            .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
            .sum();
        sum = (sum & 0xffff) + (sum >> 16);
        let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        // Data offset 5, ACK.
        packet[46] = 0x50;
        packet[47] = 0x10;
        packet
    }

    /// NEEDS_CSUM, TCPv4 segmentation into `size` bytes each.
    fn gso_header(size: u16, len: usize) -> Vec<u8> {
        let mut header = vec![0; len];
        header[0] = 1;
        header[1] = 1;
        header[2..4].copy_from_slice(&54u16.to_le_bytes());
        header[4..6].copy_from_slice(&size.to_le_bytes());
        header[6..8].copy_from_slice(&34u16.to_le_bytes());
        header[8..10].copy_from_slice(&16u16.to_le_bytes());
        header
    }

    /// What arrives on the packet socket that is ours: packets of the kernel (IPv6 of a fresh interface) are left out.
    fn receive_ours(socket: &OwnedFd) -> Vec<u8> {
        loop {
            let packet = receive(socket);
            if packet[10 + 6..10 + 12] == [2, 0, 0, 9, 9, 9] {
                return packet;
            }
        }
    }

    /// Frames to the guest, without those of the kernel.
    fn wait_ours(driver: &mut Driver, queue: &mut VirtQueue, buffers: &[u64]) -> Vec<u8> {
        loop {
            let used = driver.wait_used(queue).unwrap();
            let at = buffers[usize::try_from(used.head).unwrap()];
            let frame = driver.machine.read(at, used.len as usize);
            if frame[HEADER + 6..HEADER + 12] == [2, 0, 0, 9, 9, 9] {
                return frame;
            }
        }
    }

    #[test]
    fn segmentation_is_offloaded_both_ways_as_negotiated() {
        in_netns(|| {
            let machine = Machine::new();
            let device = new(NetBackend::Tap(vec![open(FLAGS)]));
            let socket = packet_socket();
            let mut driver = Driver::new(&machine, device);
            let all = CSUM | GUEST_CSUM | GUEST_TSO4 | HOST_TSO4;
            assert_eq!(driver.offered() & all, all);
            let payload = 8000;
            for big in [true, false] {
                let features = MRG_RXBUF | if big { all } else { 0 };
                let mut queues = driver.start_with_event_idx(features, &[64, 16]);
                let mut buffers = Vec::new();
                for _ in 0..64 {
                    buffers.extend(add_buffer(&machine, &mut queues[RECEIVE], &[10_000]));
                }
                driver.kick(0);
                // Host to guest: one big frame that the guest cuts, or the kernel's pieces.
                send(&socket, &[gso_header(1000, 10), tcp(payload)].concat());
                let first = wait_ours(&mut driver, &mut queues[RECEIVE], &buffers);
                if big {
                    assert_eq!(first.len(), HEADER + 54 + payload);
                    assert_eq!(first[..10], gso_header(1000, 10));
                } else {
                    assert_eq!(first.len(), HEADER + 54 + 1000);
                    assert_eq!(first[..10], [0; 10]);
                    for _ in 1..8 {
                        let piece = wait_ours(&mut driver, &mut queues[RECEIVE], &buffers);
                        assert_eq!(piece.len(), HEADER + 54 + 1000);
                    }
                }
                // Guest to host: taken, or refused as not negotiated.
                let dropped = driver.health().complaints();
                driver.request(
                    &mut queues[TRANSMIT],
                    &[&gso_header(1000, 12), &tcp(payload)],
                    &[],
                );
                if big {
                    loop {
                        // The packet socket sees its own packets go by as well.
                        let seen = receive_ours(&socket);
                        if seen.len() == 10 + 54 + payload {
                            break;
                        }
                    }
                    assert_eq!(driver.health().complaints(), dropped);
                } else {
                    assert_eq!(driver.health().complaints(), dropped + 1);
                }
            }
        });
    }

    #[test]
    fn queue_pairs_are_turned_on_by_the_control_queue() {
        in_netns(|| {
            let machine = Machine::new();
            let flags = FLAGS | MULTI_QUEUE;
            let device = new(NetBackend::Tap(vec![open(flags), open(flags), open(flags)]));
            let _socket = packet_socket();
            let mut driver = Driver::new(&machine, device);
            assert_eq!(driver.config::<2>(8), [3, 0]);
            let sizes = [16; 7];
            let mut queues = driver.start(CTRL_VQ | MQ, &sizes);
            let mut command = |driver: &mut Driver, command: &[u8]| {
                driver.request(&mut queues[6], &[&command[..2], &command[2..]], &[1])
            };
            for pairs in [3, 1, 2, 3] {
                assert_eq!(command(&mut driver, &[4, 0, pairs, 0]).buffers[0], [0]);
            }
            for bad in [
                &[4, 0, 0, 0][..],
                &[4, 0, 4, 0],
                &[4, 0, 0, 1],
                &[4, 1, 1, 0],
                &[0, 0, 1],
                &[4, 0, 1],
                &[4, 0, 1, 0, 0],
                &[0xff, 0xff],
            ] {
                assert_eq!(command(&mut driver, bad).buffers[0], [1], "{bad:?}");
            }
            let saved = driver.transport.save().unwrap();
            driver.reset();
            driver.transport.restore(&saved).unwrap();
            // All pairs transmit.
            for pair in 0..3 {
                driver.request(&mut queues[2 * pair + 1], &[&frame(60, 1)], &[]);
            }
            // Without MQ the control queue is the third one.
            let mut queues = driver.start(CTRL_VQ, &[16, 16, 16]);
            let reply = driver.request(&mut queues[2], &[&[4, 0, 1, 0]], &[1]);
            assert_eq!(reply.buffers[0], [0]);
            assert!(!driver.health().is_failed());
        });
    }

    #[test]
    fn commands_are_answered_when_their_notification_returns() {
        in_netns(|| {
            let machine = Machine::new();
            let mut driver = Driver::new(&machine, new(NetBackend::Tap(vec![open(FLAGS)])));
            let mut queues = driver.start(CTRL_VQ | CTRL_RX, &[16, 16, 16]);
            let past_the_vcpu: Vec<u32> = driver.transport.ioeventfds().map(|(queue, _)| queue).collect();
            assert_eq!(past_the_vcpu, [0, 1]);
            let (command, answer) = (machine.allocate(3, 16), machine.allocate(1, 16));
            machine.write(command, &[0, 0, 1]);
            let parts = [Descriptor::readable(command, 3), Descriptor::writable(answer, 1)];
            // But while the device is at something else: it leaves the command to that.
            let at_once = wait_until(|| {
                queues[2].add(&parts);
                driver.kick(2);
                if let Some(used) = queues[2].take_used() {
                    return used.len == 1;
                }
                driver.wait_used(&mut queues[2]).unwrap();
                false
            });
            assert!(at_once);
            // A paused device leaves everything as it is until it goes on.
            driver.transport.pause();
            queues[2].add(&parts);
            driver.kick(2);
            assert!(queues[2].take_used().is_none());
            driver.transport.resume().unwrap();
            assert_eq!(driver.wait_used(&mut queues[2]).unwrap().len, 1);
            assert!(!driver.health().is_failed());
        });
    }

    #[test]
    fn an_unplugged_card_is_plugged_into_a_tap_of_as_many_queues() {
        in_netns(|| {
            let machine = Machine::new();
            let features = CTRL_VQ | MQ | MRG_RXBUF | CSUM | GUEST_CSUM | GUEST_TSO4 | HOST_TSO4;
            let mut driver = Driver::new(&machine, new(NetBackend::Unplugged { pairs: 2 }));
            assert_eq!(driver.offered() & features, features);
            let mut queues = driver.start(features, &[16; 5]);
            let reply = driver.request(&mut queues[4], &[&[4, 0], &[2, 0]], &[1]);
            assert_eq!(reply.buffers[0], [0]);
            driver.transport.pause();
            let saved = driver.transport.save().unwrap();
            drop(driver);
            let one = new(NetBackend::Tap(vec![open(FLAGS)]));
            let refused = Driver::restored(&machine, one, &saved).err().unwrap().to_string();
            assert!(refused.contains("other queues"), "{refused}");
            let flags = FLAGS | MULTI_QUEUE;
            let tap = NetBackend::Tap(vec![open(flags), open(flags)]);
            let _socket = packet_socket();
            let device = new(tap);
            let metrics = device.metrics().clone();
            let mut driver = Driver::restored(&machine, device, &saved).unwrap();
            for pair in 0..2 {
                driver.request(&mut queues[2 * pair + 1], &[&frame(60, 1)], &[]);
            }
            assert_eq!(metrics.transmitted_frames.get(), 2);
            assert!(!driver.health().is_failed());
        });
    }

    #[test]
    fn what_the_driver_does_not_want_is_dropped() {
        in_netns(|| {
            const OWN: [u8; 6] = [2, 0, 0, 1, 2, 3];
            const OTHER: [u8; 6] = [2, 0, 0, 7, 7, 7];
            const GROUP: [u8; 6] = [0x33, 0x33, 0, 0, 0, 0x16];
            const BROADCAST: [u8; 6] = [0xff; 6];
            let machine = Machine::new();
            let features = CTRL_VQ | CTRL_RX | CTRL_MAC_ADDR | MRG_RXBUF;
            let sizes = [64, 16, 16];
            let mut driver = Driver::new(&machine, new(NetBackend::Tap(vec![open(FLAGS)])));
            let socket = packet_socket();
            let mut queues = driver.start(features, &sizes);
            let mut buffers = Vec::new();
            for _ in 0..64 {
                buffers.extend(add_buffer(&machine, &mut queues[RECEIVE], &[2000]));
            }
            driver.kick(0);
            // A frame to each, and one to all that says that the others have come, or not.
            let come = |driver: &mut Driver, queue: &mut VirtQueue| -> Vec<[u8; 6]> {
                for (number, to) in [OWN, OTHER, GROUP, BROADCAST].into_iter().enumerate() {
                    let mut frame = tcp(number);
                    frame[..6].copy_from_slice(&to);
                    send(&socket, &[vec![0; 10], frame].concat());
                }
                let mut seen = Vec::new();
                while seen.last() != Some(&BROADCAST) {
                    let frame = wait_ours(driver, queue, &buffers);
                    seen.push(frame[HEADER..HEADER + 6].try_into().unwrap());
                }
                seen
            };
            let command = |driver: &mut Driver, queue: &mut VirtQueue, command: &[u8]| {
                driver
                    .request(queue, &[&command[..2], &command[2..]], &[1])
                    .buffers[0][0]
            };
            let table = |unicast: &[[u8; 6]], multicast: &[[u8; 6]]| {
                let part = |macs: &[[u8; 6]]| {
                    [
                        &u32::try_from(macs.len()).unwrap().to_le_bytes(),
                        macs.as_flattened(),
                    ]
                    .concat()
                };
                [vec![1, 0], part(unicast), part(multicast)].concat()
            };
            let [receive, _, control] = &mut queues[..] else {
                unreachable!()
            };
            assert_eq!(come(&mut driver, receive), [OWN, OTHER, GROUP, BROADCAST]);
            assert_eq!(command(&mut driver, control, &[0, 0, 0]), 0);
            assert_eq!(come(&mut driver, receive), [OWN, BROADCAST]);
            assert_eq!(command(&mut driver, control, &[0, 1, 1]), 0);
            assert_eq!(come(&mut driver, receive), [OWN, GROUP, BROADCAST]);
            assert_eq!(command(&mut driver, control, &[0, 1, 0]), 0);
            assert_eq!(command(&mut driver, control, &table(&[OTHER], &[GROUP])), 0);
            assert_eq!(come(&mut driver, receive), [OWN, OTHER, GROUP, BROADCAST]);
            // Longer than anything that is kept: all of their kind.
            assert_eq!(command(&mut driver, control, &table(&[OTHER; 100], &[])), 0);
            assert_eq!(come(&mut driver, receive), [OWN, OTHER, BROADCAST]);
            assert_eq!(command(&mut driver, control, &table(&[], &[GROUP; 100])), 0);
            assert_eq!(come(&mut driver, receive), [OWN, GROUP, BROADCAST]);
            let mut short = table(&[], &[GROUP; 2]);
            short.pop();
            let mut huge = table(&[], &[]);
            huge[2..6].copy_from_slice(&u32::MAX.to_le_bytes());
            for bad in [
                &short[..],
                &huge,
                &[1, 0],
                &[1, 0, 0, 0, 0],
                &[0, 0, 1, 0],
                &[1, 1, 2, 0, 0, 7, 7],
            ] {
                assert_eq!(command(&mut driver, control, bad), 1, "{bad:?}");
            }
            assert_eq!(command(&mut driver, control, &table(&[], &[])), 0);
            assert_eq!(command(&mut driver, control, &[&[1, 1], &OTHER[..]].concat()), 0);
            assert_eq!(come(&mut driver, receive), [OTHER, BROADCAST]);
            // What was said goes along into a snapshot.
            driver.transport.pause();
            let saved = driver.transport.save().unwrap();
            drop(driver);
            let mut driver =
                Driver::restored(&machine, new(NetBackend::Tap(vec![open(FLAGS)])), &saved).unwrap();
            let socket_again = packet_socket();
            let again = |driver: &mut Driver, queue: &mut VirtQueue, to: [u8; 6]| {
                let mut frame = tcp(0);
                frame[..6].copy_from_slice(&to);
                send(&socket_again, &[vec![0; 10], frame].concat());
                if to != BROADCAST {
                    return Vec::new();
                }
                let frame = wait_ours(driver, queue, &buffers);
                frame[HEADER..HEADER + 6].to_vec()
            };
            again(&mut driver, receive, OWN);
            assert_eq!(
                again(&mut driver, receive, BROADCAST),
                BROADCAST,
                "the one to another came"
            );
            assert!(!driver.health().is_failed());
        });
    }

    #[test]
    fn what_is_no_proper_tap_is_refused() {
        in_netns(|| {
            let refused = |fds| {
                let config = NetConfig {
                    backend: NetBackend::Tap(fds),
                    mac: [2; 6],
                    mtu: None,
                };
                Net::new(config).err().unwrap().to_string()
            };
            assert!(refused(vec![]).contains("0 queue pairs"));
            assert!(refused(vec![cable().0]).contains("cannot read the flags"));
            let without_header = vec![open(FLAGS & !0x4000)];
            assert!(refused(without_header).contains("IFF_VNET_HDR"));
        });
    }
}
