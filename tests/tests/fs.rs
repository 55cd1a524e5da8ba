// SPDX-License-Identifier: Apache-2.0
//! The file system device behind its registers and queues, driven well and badly.
#![allow(clippy::unwrap_used)]

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use cloister_devices::fs::{AttachOptions, DaxPlacement, DaxWindow, Fs, FsConfig, FsHandle};
use cloister_devices::virtio::F_EVENT_IDX;
use cloister_tests::driver::{Descriptor, Driver, Machine, NoReply, VirtQueue, register};

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const INIT: u32 = 26;
const SETLKW: u32 = 33;
const SETLK: u32 = 32;
const CREATE: u32 = 35;

const POSIX_LOCKS: u32 = 1 << 1;

/// The request queue.
const REQUEST: usize = 1;

struct TempDir(std::path::PathBuf);

impl TempDir {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("cloister-fs-device-{}-{name}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn fd(&self) -> OwnedFd {
        std::fs::File::open(&self.0).unwrap().into()
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn device(machine: &Machine, directory: &TempDir, config: FsConfig) -> (Box<Fs>, FsHandle) {
    let fs = Fs::new(config, machine.pool.clone(), None).unwrap();
    let handle = fs.handle();
    handle
        .attach("d", &directory.fd(), AttachOptions::default())
        .unwrap();
    (Box::new(fs), handle)
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn message(opcode: u32, unique: u64, node: u64, args: &[u8]) -> Vec<u8> {
    let len = u32::try_from(40 + args.len()).unwrap();
    let mut bytes = words(&[len, opcode]);
    bytes.extend(unique.to_le_bytes());
    bytes.extend(node.to_le_bytes());
    bytes.extend(words(&[0, 0, 1, 0]));
    bytes.extend(args);
    bytes
}

/// Sends a request; its error and the body of the reply.
fn call(driver: &mut Driver, queue: &mut VirtQueue, opcode: u32, node: u64, args: &[u8]) -> (i32, Vec<u8>) {
    let bytes = message(opcode, 5, node, args);
    let (header, rest) = bytes.split_at(40);
    let reply = driver.request(queue, &[header, rest], &[16, 4096]);
    let head = &reply.buffers[0];
    let len = u32::from_le_bytes(head[..4].try_into().unwrap());
    assert_eq!(len, reply.len);
    assert_eq!(head[8..16], 5u64.to_le_bytes());
    let error = i32::from_le_bytes(head[4..8].try_into().unwrap());
    (error, reply.buffers[1][..len as usize - 16].to_vec())
}

fn init(driver: &mut Driver, queue: &mut VirtQueue, features: u32) {
    let (error, _) = call(driver, queue, INIT, 0, &words(&[7, 38, 0, features]));
    assert_eq!(error, 0);
}

fn lookup(driver: &mut Driver, queue: &mut VirtQueue, parent: u64, name: &str) -> Result<u64, i32> {
    let (error, body) = call(driver, queue, LOOKUP, parent, format!("{name}\0").as_bytes());
    if error != 0 {
        return Err(error);
    }
    Ok(u64::from_le_bytes(body[..8].try_into().unwrap()))
}

fn open(driver: &mut Driver, queue: &mut VirtQueue, node: u64, flags: i32) -> u64 {
    let (error, body) = call(driver, queue, OPEN, node, &words(&[flags.cast_unsigned(), 0]));
    assert_eq!(error, 0);
    u64::from_le_bytes(body[..8].try_into().unwrap())
}

fn read_args(fh: u64, size: u32) -> Vec<u8> {
    let mut args = fh.to_le_bytes().to_vec();
    args.extend(0u64.to_le_bytes());
    args.extend(words(&[size, 0, 0, 0, 0, 0]));
    args
}

#[test]
fn the_registers_show_tag_queues_and_window() {
    let machine = Machine::new();
    let window = Arc::new(DaxWindow::new(4 << 20).unwrap());
    let dax = DaxPlacement {
        window,
        base: 0x40_0000_0000,
    };
    let config = FsConfig {
        tag: "shared".to_owned(),
        request_queues: 3,
        ..FsConfig::default()
    };
    let fs = Fs::new(config, machine.pool.clone(), Some(dax)).unwrap();
    let mut driver = Driver::new(&machine, Box::new(fs));
    assert_eq!(driver.read32(register::DEVICE_ID), 26);
    let config: [u8; 40] = driver.config(0);
    assert_eq!(&config[..8], b"shared\0\0");
    assert_eq!(config[36..], 3u32.to_le_bytes());
    driver.write32(register::SHM_SEL, 0);
    assert_eq!(driver.read32(register::SHM_LEN_LOW), 4 << 20);
    assert_eq!(driver.read32(register::SHM_BASE_HIGH), 0x40);
    driver.write32(register::SHM_SEL, 1);
    assert_eq!(driver.read32(register::SHM_LEN_LOW), u32::MAX);
    driver.write32(register::QUEUE_SEL, 4);
    assert_eq!(driver.read32(register::QUEUE_SIZE_MAX), 0);
    for tag in ["", "x\0", &"x".repeat(37)] {
        let config = FsConfig {
            tag: tag.to_owned(),
            ..FsConfig::default()
        };
        assert!(Fs::new(config, machine.pool.clone(), None).is_err());
    }
}

#[test]
fn a_file_is_read_through_the_queues() {
    let machine = Machine::new();
    let directory = TempDir::new("read");
    std::fs::write(directory.0.join("f"), "hello").unwrap();
    let (fs, handle) = device(&machine, &directory, FsConfig::default());
    let mut driver = Driver::new(&machine, fs);
    let mut queues = driver.start_with_event_idx(0, &[64, 64]);
    let [hiprio, queue] = &mut queues[..] else {
        panic!()
    };
    init(&mut driver, queue, 0);
    let root = lookup(&mut driver, queue, 1, "d").unwrap();
    let node = lookup(&mut driver, queue, root, "f").unwrap();
    let fh = open(&mut driver, queue, node, libc::O_RDONLY);
    let (error, data) = call(&mut driver, queue, READ, node, &read_args(fh, 4096));
    assert_eq!((error, &data[..]), (0, &b"hello"[..]));
    // FORGET comes on the other queue and has no reply.
    let forget = message(FORGET, 0, node, &1u64.to_le_bytes());
    assert_eq!(driver.request(hiprio, &[&forget], &[]).len, 0);
    assert_eq!(call(&mut driver, queue, GETATTR, node, &[0; 16]).0, -libc::ESTALE);
    // A reset ends the session: nothing is held for the guest any more.
    assert!(handle.metrics().descriptors > 0);
    driver.reset();
    assert_eq!(handle.metrics().descriptors, 0);
    let mut queues = driver.start(0, &[64, 64]);
    init(&mut driver, &mut queues[REQUEST], 0);
    lookup(&mut driver, &mut queues[REQUEST], 1, "d").unwrap();
    assert!(driver.failures().is_empty());
}

#[test]
fn many_requests_at_once_are_all_answered() {
    let machine = Machine::new();
    let directory = TempDir::new("many");
    std::fs::write(directory.0.join("f"), vec![b'x'; 64 << 10]).unwrap();
    for features in [0, F_EVENT_IDX] {
        let (fs, _) = device(&machine, &directory, FsConfig::default());
        let mut driver = Driver::new(&machine, fs);
        let mut queues = driver.start(features, &[64, 64]);
        let queue = &mut queues[REQUEST];
        init(&mut driver, queue, 0);
        let root = lookup(&mut driver, queue, 1, "d").unwrap();
        let node = lookup(&mut driver, queue, root, "f").unwrap();
        let fh = open(&mut driver, queue, node, libc::O_RDONLY);
        let request = message(READ, 9, node, &read_args(fh, 4096));
        let length = u32::try_from(request.len()).unwrap();
        let (input, output) = (machine.allocate(request.len(), 8), machine.allocate(16 + 4096, 8));
        machine.write(input, &request);
        let parts = [
            Descriptor::readable(input, length),
            Descriptor::writable(output, 16 + 4096),
        ];
        for round in 0..200 {
            for _ in 0..30 {
                queue.add(&parts);
                if round % 2 == 0 {
                    driver.kick(1);
                }
            }
            driver.kick(1);
            for _ in 0..30 {
                assert_eq!(driver.wait_used(queue).unwrap().len, 16 + 4096);
            }
        }
    }
}

#[test]
fn a_lock_that_waits_holds_up_nothing_and_is_granted_later() {
    let machine = Machine::new();
    let directory = TempDir::new("lock");
    let config = FsConfig {
        remote_locks: true,
        ..FsConfig::default()
    };
    let (fs, _) = device(&machine, &directory, config);
    let mut driver = Driver::new(&machine, fs);
    let mut queues = driver.start(0, &[64, 64]);
    let queue = &mut queues[REQUEST];
    init(&mut driver, queue, POSIX_LOCKS);
    let root = lookup(&mut driver, queue, 1, "d").unwrap();
    let mut create = words(&[libc::O_RDWR.cast_unsigned(), 0o644, 0, 0]);
    create.extend(b"f\0");
    let (error, body) = call(&mut driver, queue, CREATE, root, &create);
    assert_eq!(error, 0);
    let node = u64::from_le_bytes(body[..8].try_into().unwrap());
    let fh = u64::from_le_bytes(body[128..136].try_into().unwrap());
    let lock = |owner: u64, kind: i32| {
        let mut args = fh.to_le_bytes().to_vec();
        args.extend(owner.to_le_bytes());
        args.extend(0u64.to_le_bytes());
        args.extend(9u64.to_le_bytes());
        args.extend(words(&[kind.cast_unsigned(), 1, 0, 0]));
        args
    };
    assert_eq!(
        call(&mut driver, queue, SETLK, node, &lock(1, libc::F_WRLCK)).0,
        0
    );
    // More waiting locks than the pool has threads.
    let reply = machine.allocate(16, 8);
    for owner in 2..20 {
        let request = message(SETLKW, owner, node, &lock(owner, libc::F_RDLCK));
        let input = machine.allocate(request.len(), 8);
        machine.write(input, &request);
        let length = u32::try_from(request.len()).unwrap();
        queue.add(&[
            Descriptor::readable(input, length),
            Descriptor::writable(reply, 16),
        ]);
        driver.kick(1);
    }
    assert_eq!(call(&mut driver, queue, GETATTR, node, &[0; 16]).0, 0);
    // The holder lets go: the others get it. (The unlock's own answer is among these.)
    let request = message(SETLK, 99, node, &lock(1, libc::F_UNLCK));
    let input = machine.allocate(request.len(), 8);
    machine.write(input, &request);
    let length = u32::try_from(request.len()).unwrap();
    queue.add(&[
        Descriptor::readable(input, length),
        Descriptor::writable(reply, 16),
    ]);
    driver.kick(1);
    for _ in 0..19 {
        assert_eq!(driver.wait_used(queue).unwrap().len, 16);
    }
    // A program of the host holds it: granted when it goes.
    let file = std::fs::File::options()
        .write(true)
        .open(directory.0.join("f"))
        .unwrap();
    for owner in 2..20 {
        assert_eq!(
            call(&mut driver, queue, SETLK, node, &lock(owner, libc::F_UNLCK)).0,
            0
        );
    }
    rustix::fs::fcntl_lock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
    let request = message(SETLKW, 7, node, &lock(1, libc::F_WRLCK));
    machine.write(input, &request);
    queue.add(&[
        Descriptor::readable(input, length),
        Descriptor::writable(reply, 16),
    ]);
    driver.kick(1);
    assert_eq!(
        driver.wait_used_for(queue, Duration::from_millis(100)),
        Err(NoReply::TimedOut)
    );
    drop(file);
    driver.wait_used(queue).unwrap();
    assert_eq!(machine.read(reply, 16)[4..8], [0; 4]);
}

#[test]
fn broken_chains_and_requests_stay_the_guests_problem() {
    let machine = Machine::new();
    let directory = TempDir::new("broken");
    let (fs, handle) = device(&machine, &directory, FsConfig::default());
    let mut driver = Driver::new(&machine, fs);
    let mut queues = driver.start(0, &[64, 64]);
    let queue = &mut queues[REQUEST];
    init(&mut driver, queue, 0);
    let request = message(GETATTR, 3, 1, &[0; 16]);
    let length = u32::try_from(request.len()).unwrap();
    let (input, output) = (machine.allocate(256, 8), machine.allocate(256, 8));
    machine.write(input, &request);
    let outside = Machine::END;
    let good = Descriptor::readable(input, length);
    for parts in [
        vec![Descriptor::readable(input, 8)],
        vec![good],
        vec![Descriptor::writable(output, 256)],
        vec![Descriptor::writable(output, 256), good],
        vec![
            Descriptor::readable(outside, length),
            Descriptor::writable(output, 256),
        ],
        vec![good, Descriptor::writable(u64::MAX - 7, 256)],
        vec![good, Descriptor::writable(output, 15)],
        vec![Descriptor::readable(input, 0), Descriptor::writable(output, 0)],
    ] {
        queue.add(&parts);
        driver.kick(1);
        let used = driver.wait_used(queue).unwrap();
        assert!(used.len <= 256, "{parts:?} {used:?}");
    }
    // A buffer that is no guest RAM (a DAX window's, say), with a header and a reply that are: EFAULT.
    machine.write(output, &[0; 16]);
    queue.add(&[
        good,
        Descriptor::writable(output, 16),
        Descriptor::writable(outside, 4096),
    ]);
    driver.kick(1);
    assert_eq!(driver.wait_used(queue).unwrap().len, 16);
    let error = i32::from_le_bytes(machine.read(output + 4, 4).try_into().unwrap());
    assert_eq!(error, -libc::EFAULT);
    assert!(handle.metrics().malformed > 0);
    assert!(driver.failures().is_empty());
    // It still works.
    lookup(&mut driver, queue, 1, "d").unwrap();
}

#[test]
fn a_paused_device_answers_after_it_resumed_and_a_restored_one_goes_on() {
    let machine = Machine::new();
    let directory = TempDir::new("pause");
    std::fs::write(directory.0.join("f"), "hello").unwrap();
    let (fs, _) = device(&machine, &directory, FsConfig::default());
    let mut driver = Driver::new(&machine, fs);
    let mut queues = driver.start(0, &[64, 64]);
    let queue = &mut queues[REQUEST];
    init(&mut driver, queue, 0);
    let root = lookup(&mut driver, queue, 1, "d").unwrap();
    let node = lookup(&mut driver, queue, root, "f").unwrap();
    let fh = open(&mut driver, queue, node, libc::O_RDONLY);

    driver.transport.pause();
    let request = message(GETATTR, 3, node, &[0; 16]);
    let length = u32::try_from(request.len()).unwrap();
    let (input, output) = (machine.allocate(256, 8), machine.allocate(256, 8));
    machine.write(input, &request);
    queue.add(&[
        Descriptor::readable(input, length),
        Descriptor::writable(output, 256),
    ]);
    driver.kick(1);
    let nothing = driver.wait_used_for(queue, Duration::from_millis(50));
    assert_eq!(nothing, Err(NoReply::TimedOut));
    let saved = driver.transport.save().unwrap();
    // Saving gave the device no leave to go on.
    let nothing = driver.wait_used_for(queue, Duration::from_millis(50));
    assert_eq!(nothing, Err(NoReply::TimedOut));
    let mut copy = queue.clone();
    driver.transport.resume().unwrap();
    assert_eq!(driver.wait_used(queue).unwrap().len, 16 + 104);
    drop(driver);

    // The same guest memory, as it was: the request is in the ring still.
    let used = queue.layout.used + 2;
    machine.write(used, &copy.used_index().wrapping_sub(1).to_le_bytes());
    let (fs, _) = device(&machine, &directory, FsConfig::default());
    let mut driver = Driver::restored(&machine, fs, &saved).unwrap();
    assert_eq!(driver.wait_used(&mut copy).unwrap().len, 16 + 104);
    let (error, data) = call(&mut driver, &mut copy, READ, node, &read_args(fh, 4096));
    assert_eq!((error, &data[..]), (0, &b"hello"[..]));
}
