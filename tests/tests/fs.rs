// SPDX-License-Identifier: Apache-2.0
//! The file system device behind its registers and queues, driven well and badly.
#![allow(clippy::unwrap_used)]

use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use cloister_devices::fs::{AttachOptions, DaxPlacement, DaxWindow, Fs, FsConfig, FsHandle};
use cloister_devices::virtio::F_EVENT_IDX;
use cloister_tests::driver::{
    Descriptor, Driver, Machine, NoReply, TIMEOUT, VirtQueue, register, wait_until,
};

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const RELEASE: u32 = 18;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const SETLKW: u32 = 33;
const SETLK: u32 = 32;
const CREATE: u32 = 35;
const SETUPMAPPING: u32 = 48;

const POSIX_LOCKS: u32 = 1 << 1;
const MAP_ALIGNMENT: u32 = 1 << 26;

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

/// A chain in guest memory: its head, and where its reply will be.
fn publish(machine: &Machine, queue: &mut VirtQueue, message: &[u8], room: usize) -> (u16, u64) {
    let input = machine.allocate(message.len(), 8);
    machine.write(input, message);
    let mut parts = vec![Descriptor::readable(input, u32::try_from(message.len()).unwrap())];
    let output = machine.allocate(room, 8);
    if room > 0 {
        parts.push(Descriptor::writable(output, u32::try_from(room).unwrap()));
    }
    (queue.add(&parts), output)
}

/// The error in a reply.
fn error_at(machine: &Machine, reply: u64) -> i32 {
    i32::from_le_bytes(machine.read(reply + 4, 4).try_into().unwrap())
}

fn write_args(fh: u64, offset: u64, data: &[u8]) -> Vec<u8> {
    let mut args = fh.to_le_bytes().to_vec();
    args.extend(offset.to_le_bytes());
    args.extend(words(&[u32::try_from(data.len()).unwrap(), 0, 0, 0, 0, 0]));
    args.extend(data);
    args
}

/// Maps the first page of a node, to read and to write.
fn map_args(window_offset: u64) -> Vec<u8> {
    [u64::MAX, 0, 4096, 3, window_offset]
        .iter()
        .flat_map(|number| number.to_le_bytes())
        .collect()
}

/// The window as the guest sees it. The kernel looks, so that what is not there is an error and no signal.
fn window_bytes(window: &DaxWindow, offset: u64) -> [u8; 4] {
    let memory = std::fs::File::open("/proc/self/mem").unwrap();
    let mut bytes = [0; 4];
    memory
        .read_exact_at(&mut bytes, window.host_address() + offset)
        .unwrap();
    bytes
}

/// What the guest writes there.
fn write_window(window: &DaxWindow, offset: u64, bytes: &[u8]) {
    let memory = std::fs::File::options()
        .write(true)
        .open("/proc/self/mem")
        .unwrap();
    memory
        .write_all_at(bytes, window.host_address() + offset)
        .unwrap();
}

/// A folder with what the test below works on.
fn working_folder(name: &str) -> TempDir {
    let directory = TempDir::new(name);
    std::fs::write(directory.0.join("a"), vec![b'a'; 4096]).unwrap();
    std::fs::write(directory.0.join("b"), vec![b'b'; 4096]).unwrap();
    std::fs::write(directory.0.join("c"), "c").unwrap();
    directory
}

fn device_with_window(machine: &Machine, directory: &TempDir) -> (Box<Fs>, Arc<DaxWindow>) {
    let window = Arc::new(DaxWindow::new(4 << 20).unwrap());
    let dax = DaxPlacement {
        window: Arc::clone(&window),
        base: 0x40_0000_0000,
    };
    let fs = Fs::new(FsConfig::default(), machine.pool.clone(), Some(dax)).unwrap();
    let options = AttachOptions {
        dax: true,
        ..AttachOptions::default()
    };
    fs.handle().attach("d", &directory.fd(), options).unwrap();
    (Box::new(fs), window)
}

/// Files and a folder are open, one is mapped, and requests of all sorts are under way when the file system is put away. Its
/// copies stand on folders of their own, as those of containers do.
#[test]
fn copies_of_a_busy_file_system_answer_what_was_in_flight_and_share_nothing() {
    let machine = Machine::new();
    let folder = working_folder("busy");
    let (fs, window) = device_with_window(&machine, &folder);
    let mut driver = Driver::new(&machine, fs);
    let mut queues = driver.start_with_event_idx(0, &[64, 64]);
    let (node_a, node_b, node_c, fh_a, fh_b, listing, root);
    {
        let queue = &mut queues[REQUEST];
        init(&mut driver, queue, MAP_ALIGNMENT);
        root = lookup(&mut driver, queue, 1, "d").unwrap();
        node_a = lookup(&mut driver, queue, root, "a").unwrap();
        node_b = lookup(&mut driver, queue, root, "b").unwrap();
        node_c = lookup(&mut driver, queue, root, "c").unwrap();
        fh_a = open(&mut driver, queue, node_a, libc::O_RDWR);
        fh_b = open(&mut driver, queue, node_b, libc::O_RDWR);
        let (error, body) = call(&mut driver, queue, OPENDIR, root, &words(&[0, 0]));
        assert_eq!(error, 0);
        listing = u64::from_le_bytes(body[..8].try_into().unwrap());
        assert_eq!(call(&mut driver, queue, SETUPMAPPING, node_a, &map_args(0)).0, 0);
    }
    assert_eq!(&window_bytes(&window, 0), b"aaaa");

    driver.transport.pause();
    let mut create = words(&[libc::O_RDWR.cast_unsigned(), 0o644, 0, 0]);
    create.extend(b"new\0");
    let requests = [
        (READ, node_a, read_args(fh_a, 16)),
        (WRITE, node_b, write_args(fh_b, 0, b"sent")),
        (CREATE, root, create),
        (SETUPMAPPING, node_b, map_args(4096)),
        (GETATTR, node_a, vec![0; 16]),
    ];
    let published: Vec<_> = requests
        .iter()
        .zip(100..)
        .map(|((opcode, node, args), unique)| {
            let message = message(*opcode, unique, *node, args);
            publish(&machine, &mut queues[REQUEST], &message, 16 + 256)
        })
        .collect();
    let (heads, replies): (Vec<u16>, Vec<u64>) = published.into_iter().unzip();
    let forget = message(FORGET, 0, node_c, &1u64.to_le_bytes());
    let (forgets, _) = publish(&machine, &mut queues[0], &forget, 0);
    driver.kick(0);
    driver.kick(1);
    let saved = driver.transport.save().unwrap();

    let check = |driver: &mut Driver<'_>,
                 queues: &mut [VirtQueue],
                 folder: &TempDir,
                 window: &DaxWindow,
                 own: &[u8; 4]| {
        let content = |name: &str| std::fs::read(folder.0.join(name)).unwrap();
        let [hiprio, queue] = queues else { panic!() };
        assert_eq!(driver.wait_interrupt(TIMEOUT), 1);
        let used = driver.wait_each_used(queue, &heads);
        driver.wait_each_used(hiprio, &[forgets]);
        let machine = driver.machine;
        for ((used, reply), unique) in used.iter().zip(&replies).zip(100u64..) {
            let header = machine.read(*reply, 16);
            assert_eq!(header[..4], used.len.to_le_bytes());
            assert_eq!(header[4..8], [0; 4], "request {unique}");
            assert_eq!(header[8..], unique.to_le_bytes());
        }
        assert_eq!(machine.read(replies[0] + 16, 16), [b'a'; 16]);
        assert_eq!(&content("b")[..5], b"sentb");
        assert!(content("new").is_empty());
        assert_eq!(call(driver, queue, GETATTR, node_c, &[0; 16]).0, -libc::ESTALE);
        // Its files, by the handles that were open and by the one that was asked for; read, written and mapped.
        let created = machine.read(replies[2] + 16, 136);
        let number = |at: usize| u64::from_le_bytes(created[at..at + 8].try_into().unwrap());
        for (node, fh) in [(node_a, fh_a), (number(0), number(128))] {
            assert_eq!(call(driver, queue, WRITE, node, &write_args(fh, 0, own)).0, 0);
            let (error, data) = call(driver, queue, READ, node, &read_args(fh, 4));
            assert_eq!((error, &data[..]), (0, &own[..]));
        }
        assert_eq!(
            (&content("a")[..5], &content("new")[..]),
            (&[own, &b"a"[..]].concat()[..], &own[..])
        );
        assert_eq!(&window_bytes(window, 0), own);
        assert_eq!(&window_bytes(window, 4096), b"sent");
        write_window(window, 4096, own);
        assert_eq!(&content("b")[..5], [own, &b"b"[..]].concat());
        let (error, names) = call(driver, queue, READDIR, root, &read_args(listing, 4000));
        assert_eq!(error, 0);
        for name in [&b"a\0"[..], b"b\0", b"c\0", b"new\0"] {
            assert!(names.windows(name.len()).any(|part| part == name), "{names:?}");
        }
        // Closed here: the others still have theirs.
        let mut release = fh_b.to_le_bytes().to_vec();
        release.extend([0; 16]);
        assert_eq!(call(driver, queue, RELEASE, node_b, &release).0, 0);
        assert_eq!(
            call(driver, queue, READ, node_b, &read_args(fh_b, 4)).0,
            -libc::EBADF
        );
        let next = open(driver, queue, node_b, libc::O_RDONLY);
        assert!(next > number(128), "a number is used again");
        assert!(driver.failures().is_empty());
    };
    for own in [b"one1", b"two2"] {
        let there = machine.copy();
        let copy = working_folder(std::str::from_utf8(own).unwrap());
        let (fs, window) = device_with_window(&there, &copy);
        let mut queues: Vec<VirtQueue> = queues.iter().map(|queue| queue.in_copy(&there)).collect();
        let mut clone = Driver::restored(&there, fs, &saved).unwrap();
        check(&mut clone, &mut queues, &copy, &window, own);
    }
    // Nothing of all that is the template's, which goes on, too.
    let content = |name: &str| std::fs::read(folder.0.join(name));
    assert!(content("a").unwrap() == [b'a'; 4096] && content("b").unwrap() == [b'b'; 4096]);
    assert!(content("new").is_err());
    assert_eq!(&window_bytes(&window, 0), b"aaaa");
    driver.transport.resume().unwrap();
    check(&mut driver, &mut queues, &folder, &window, b"orig");
}

/// A request that the device has taken and could not answer yet.
#[test]
fn a_lock_that_waits_at_a_snapshot_is_interrupted_once() {
    let machine = Machine::new();
    let directory = TempDir::new("waits");
    std::fs::write(directory.0.join("f"), "").unwrap();
    let config = || FsConfig {
        remote_locks: true,
        ..FsConfig::default()
    };
    let (fs, handle) = device(&machine, &directory, config());
    let mut driver = Driver::new(&machine, fs);
    let mut queues = driver.start(0, &[64, 64]);
    let queue = &mut queues[REQUEST];
    init(&mut driver, queue, POSIX_LOCKS);
    let root = lookup(&mut driver, queue, 1, "d").unwrap();
    let node = lookup(&mut driver, queue, root, "f").unwrap();
    let fh = open(&mut driver, queue, node, libc::O_RDWR);
    let holder = std::fs::File::options()
        .write(true)
        .open(directory.0.join("f"))
        .unwrap();
    rustix::fs::fcntl_lock(&holder, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
    let lock: Vec<u8> = [
        &fh.to_le_bytes()[..],
        &7u64.to_le_bytes(),
        &0u64.to_le_bytes(),
        &9u64.to_le_bytes(),
        &words(&[libc::F_WRLCK.cast_unsigned(), 1, 0, 0]),
    ]
    .concat();
    while driver.wait_interrupt(Duration::from_millis(10)) != 0 {}
    let (head, reply) = publish(&machine, queue, &message(SETLKW, 3, node, &lock), 16);
    driver.kick(1);
    assert!(wait_until(|| handle.metrics().lock_waits > 0));
    driver.transport.pause();
    let saved = driver.transport.save().unwrap();
    // The answer is in the snapshot, and so is its interrupt, which nobody has taken.
    let copy = machine.copy();
    let mut queue_there = queue.in_copy(&copy);
    let (fs, _) = device(&copy, &directory, config());
    let mut clone = Driver::restored(&copy, fs, &saved).unwrap();
    driver.transport.resume().unwrap();
    let check = |driver: &mut Driver<'_>, queue: &mut VirtQueue| {
        assert_eq!(driver.wait_interrupt(TIMEOUT), 1);
        assert_eq!(driver.wait_each_used(queue, &[head])[0].len, 16);
        assert_eq!(error_at(driver.machine, reply), -libc::EINTR);
    };
    check(&mut driver, queue);
    check(&mut clone, &mut queue_there);
    // As its driver does, one asks again.
    let (head, reply) = publish(&copy, &mut queue_there, &message(SETLKW, 4, node, &lock), 16);
    clone.kick(1);
    drop(holder);
    clone.wait_each_used(&mut queue_there, &[head]);
    assert_eq!(error_at(&copy, reply), 0);
}
