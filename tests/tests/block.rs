// SPDX-License-Identifier: Apache-2.0
//! The block device, driven well and badly.
#![allow(clippy::unwrap_used)]

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use cloister_devices::block::{Block, BlockConfig, BlockHandle, BlockMetrics, CacheMode, DiskKind};
use cloister_tests::driver::{Descriptor, Driver, Machine, TIMEOUT, VirtQueue};
use cloister_tests::random::Random;
use cloister_tests::zoo::disk_image;

const RO: u64 = 1 << 5;
const FLUSH: u64 = 1 << 9;
const CONFIG_WCE: u64 = 1 << 11;
const MQ: u64 = 1 << 12;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH_REQUEST: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const SECTORS: u64 = 128;

struct Fixture {
    device: Box<Block>,
    image: OwnedFd,
    handle: BlockHandle,
    metrics: Arc<BlockMetrics>,
}

fn block(machine: &Machine, adapt: impl FnOnce(&mut BlockConfig)) -> Fixture {
    let image = disk_image(SECTORS);
    let mut config = BlockConfig {
        fd: image.try_clone().unwrap(),
        kind: DiskKind::File,
        read_only: false,
        cache: CacheMode::Writeback,
        serial: "serial-0123456789abc".to_owned(),
        queues: 1,
    };
    adapt(&mut config);
    let device = Box::new(Block::new(config, machine.pool.clone()).unwrap());
    Fixture {
        image,
        handle: device.handle(),
        metrics: device.metrics().clone(),
        device,
    }
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut header = vec![0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

fn write(driver: &mut Driver, queue: &mut VirtQueue, sector: u64, data: &[u8]) -> u8 {
    let reply = driver.request(queue, &[&header(OUT, sector), data], &[1]);
    assert_eq!(reply.len, 1);
    reply.buffers[0][0]
}

fn read(driver: &mut Driver, queue: &mut VirtQueue, sector: u64, len: usize) -> (u8, Vec<u8>) {
    let mut reply = driver.request(queue, &[&header(IN, sector)], &[len, 1]);
    let status = reply.buffers.pop().unwrap()[0];
    (status, reply.buffers.pop().unwrap())
}

fn request(driver: &mut Driver, queue: &mut VirtQueue, kind: u32, sector: u64, data: &[u8]) -> u8 {
    driver
        .request(queue, &[&header(kind, sector), data], &[1])
        .buffers[0][0]
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [
        &sector.to_le_bytes()[..],
        &sectors.to_le_bytes(),
        &flags.to_le_bytes(),
    ]
    .concat()
}

fn contents(image: impl AsFd) -> Vec<u8> {
    let mut data = vec![0; usize::try_from(SECTORS * 512).unwrap()];
    assert_eq!(rustix::io::pread(image, &mut data, 0).unwrap(), data.len());
    data
}

#[test]
fn what_is_written_is_read_and_lies_in_the_file() {
    let machine = Machine::new();
    let Fixture {
        device,
        image,
        metrics,
        ..
    } = block(&machine, |_| {});
    let mut driver = Driver::new(&machine, device);
    assert_eq!(driver.config::<8>(0), SECTORS.to_le_bytes());
    let mut queues = driver.start_with_event_idx(FLUSH, &[128]);
    let queue = &mut queues[0];
    let data = Random::new(1).bytes(8 * 512);
    assert_eq!(write(&mut driver, queue, 3, &data), OK);
    assert_eq!(request(&mut driver, queue, FLUSH_REQUEST, 0, &[]), OK);
    assert_eq!(read(&mut driver, queue, 3, 8 * 512), (OK, data.clone()));
    assert_eq!(read(&mut driver, queue, 0, 512), (OK, vec![0; 512]));
    assert_eq!(contents(image)[3 * 512..11 * 512], data);
    assert_eq!(metrics.flushes.get(), 1);
    assert_eq!(metrics.read_bytes.get(), 9 * 512);
}

/// The framing is the driver's choice (section 2.7.4).
#[test]
fn requests_cut_anyhow_are_understood() {
    let machine = Machine::new();
    let Fixture { device, .. } = block(&machine, |_| {});
    let mut driver = Driver::new(&machine, device);
    let mut queues = driver.start(FLUSH, &[128]);
    let data = Random::new(2).bytes(1024);
    let head = header(OUT, 5);
    let reply = driver.request(
        &mut queues[0],
        &[
            &head[..1],
            &head[1..9],
            &[&head[9..], &data[..100]].concat(),
            &data[100..],
        ],
        &[1],
    );
    assert_eq!(reply.buffers[0], [OK]);
    let head = header(IN, 5);
    let reply = driver.request(&mut queues[0], &[&head[..8], &head[8..]], &[1, 1000, 24]);
    assert_eq!(reply.len, 1025);
    let all = reply.buffers.concat();
    assert_eq!(all[..1024], data);
    assert_eq!(all[1024], OK);
}

#[test]
fn requests_beyond_the_disk_are_refused() {
    let machine = Machine::new();
    let Fixture { device, image, .. } = block(&machine, |_| {});
    let mut driver = Driver::new(&machine, device);
    let mut queues = driver.start(FLUSH, &[128]);
    let queue = &mut queues[0];
    for sector in [
        SECTORS,
        SECTORS - 1,
        u64::MAX,
        u64::MAX / 512,
        u64::MAX / 512 + 1,
        1 << 55,
    ] {
        assert_eq!(write(&mut driver, queue, sector, &[1; 1024]), IOERR, "{sector}");
        let (status, data) = read(&mut driver, queue, sector, 1024);
        assert_eq!(status, IOERR);
        assert_eq!(data, vec![0xa5; 1024], "the buffer was touched");
    }
    for len in [1, 511, 513] {
        assert_eq!(write(&mut driver, queue, 0, &vec![1; len]), IOERR);
        assert_eq!(read(&mut driver, queue, 0, len).0, IOERR);
    }
    assert_eq!(contents(image), vec![0; 512 * 128]);
    // Shortened behind our back: an error, not silence.
    assert!(!driver.health().is_failed());
}

#[test]
fn a_file_that_was_cut_on_the_host_is_an_error() {
    let machine = Machine::new();
    let Fixture { device, image, .. } = block(&machine, |_| {});
    let mut driver = Driver::new(&machine, device);
    let mut queues = driver.start(FLUSH, &[128]);
    rustix::fs::ftruncate(&image, 1024).unwrap();
    assert_eq!(read(&mut driver, &mut queues[0], 0, 1024).0, OK);
    assert_eq!(read(&mut driver, &mut queues[0], 1, 1024).0, IOERR);
}

#[test]
fn read_only_is_enforced_here() {
    let machine = Machine::new();
    // The descriptor itself could write.
    let Fixture { device, image, .. } = block(&machine, |config| config.read_only = true);
    let mut driver = Driver::new(&machine, device);
    assert_ne!(driver.offered() & RO, 0);
    // A driver that ignores the feature.
    let mut queues = driver.start(FLUSH, &[128]);
    let queue = &mut queues[0];
    assert_eq!(write(&mut driver, queue, 0, &[1; 512]), IOERR);
    for kind in [DISCARD, WRITE_ZEROES] {
        assert_eq!(request(&mut driver, queue, kind, 0, &range(0, 1, 0)), IOERR);
    }
    assert_eq!(request(&mut driver, queue, FLUSH_REQUEST, 0, &[]), OK);
    assert_eq!(read(&mut driver, queue, 0, 512).0, OK);
    assert_eq!(contents(image), vec![0; 512 * 128]);
}

#[test]
fn discard_and_write_zeroes_make_holes() {
    let machine = Machine::new();
    let Fixture { device, image, .. } = block(&machine, |_| {});
    let mut driver = Driver::new(&machine, device);
    let mut queues = driver.start(FLUSH, &[128]);
    let queue = &mut queues[0];
    let blocks = |image: &OwnedFd| rustix::fs::fstat(image).unwrap().st_blocks;
    assert_eq!(write(&mut driver, queue, 0, &[0xff; 128 * 512]), OK);
    let full = blocks(&image);
    let two = [range(8, 8, 0), range(32, 16, 0)].concat();
    assert_eq!(request(&mut driver, queue, DISCARD, 0, &two), OK);
    assert!(blocks(&image) < full);
    assert_eq!(request(&mut driver, queue, WRITE_ZEROES, 0, &range(64, 8, 1)), OK);
    // tmpfs has no ZERO_RANGE: written by hand there.
    assert_eq!(
        request(&mut driver, queue, WRITE_ZEROES, 0, &range(127, 1, 0)),
        OK
    );
    let data = contents(&image);
    for (sector, bytes) in data.chunks(512).enumerate() {
        let zero = matches!(sector, 8..16 | 32..48 | 64..72 | 127);
        assert_eq!(bytes, [if zero { 0 } else { 0xff }; 512], "sector {sector}");
    }
    for (kind, ranges, status) in [
        (DISCARD, range(0, 1, 1), UNSUPP),
        (DISCARD, range(0, 1, 2), UNSUPP),
        (WRITE_ZEROES, range(0, 1, 2), UNSUPP),
        (DISCARD, range(127, 2, 0), IOERR),
        (DISCARD, range(u64::MAX, u32::MAX, 0), IOERR),
        (WRITE_ZEROES, range(u64::MAX / 512, 1, 0), IOERR),
        (DISCARD, vec![], IOERR),
        (DISCARD, vec![0; 15], IOERR),
        (DISCARD, vec![0; 16 * 17], IOERR),
        (WRITE_ZEROES, vec![0; 32], IOERR),
    ] {
        assert_eq!(
            request(&mut driver, queue, kind, 0, &ranges),
            status,
            "{kind} {ranges:?}"
        );
    }
    assert_eq!(contents(&image), data);
}

#[test]
fn the_serial_number_and_unknown_requests() {
    let machine = Machine::new();
    let Fixture { device, .. } = block(&machine, |_| {});
    let mut driver = Driver::new(&machine, device);
    let mut queues = driver.start(FLUSH, &[128]);
    let reply = driver.request(&mut queues[0], &[&header(GET_ID, 0)], &[20, 1]);
    assert_eq!(reply.buffers[0], b"serial-0123456789abc");
    assert_eq!(reply.len, 21);
    for kind in [2, 3, 5, 14, 0x100, u32::MAX] {
        assert_eq!(request(&mut driver, &mut queues[0], kind, 0, &[]), UNSUPP);
    }
}

#[test]
fn chains_that_are_no_request_come_back_empty() {
    let machine = Machine::new();
    let Fixture { device, metrics, .. } = block(&machine, |_| {});
    let mut driver = Driver::new(&machine, device);
    let mut queues = driver.start(FLUSH, &[128]);
    let head = header(OUT, 0);
    for (readable, writable) in [
        (&[&head[..]][..], &[][..]),
        (&[&head[..15]], &[1]),
        (&[], &[512, 1]),
        (&[&head[..]], &[0]),
    ] {
        assert_eq!(driver.request(&mut queues[0], readable, writable).len, 0);
    }
    assert_eq!(metrics.bad_chains.get(), 4);
}

#[test]
fn the_cache_mode_is_the_drivers_within_the_hosts() {
    let machine = Machine::new();
    let Fixture { device, .. } = block(&machine, |_| {});
    let mut driver = Driver::new(&machine, device);
    assert_eq!(driver.config::<1>(32), [1]);
    // Not negotiated: not changed.
    driver.start(FLUSH, &[128]);
    driver.write_config(32, &[0]);
    assert_eq!(driver.config::<1>(32), [1]);
    let mut queues = driver.start(FLUSH | CONFIG_WCE, &[128]);
    driver.write_config(32, &[7]);
    driver.write_config(32, &[0, 0]);
    driver.write_config(31, &[0]);
    driver.write_config(0, &[0]);
    assert_eq!(driver.config::<1>(32), [1]);
    driver.write_config(32, &[0]);
    assert_eq!(driver.config::<1>(32), [0]);
    assert_eq!(write(&mut driver, &mut queues[0], 0, &[1; 512]), OK);
    // Kept in a snapshot, forgotten at reset.
    let saved = driver.transport.save().unwrap();
    driver.reset();
    assert_eq!(driver.config::<1>(32), [1]);
    let Fixture { device, .. } = block(&machine, |_| {});
    let restored = Driver::restored(&machine, device, &saved).unwrap();
    assert_eq!(restored.config::<1>(32), [0]);
    // A host that wants write-through offers no choice.
    let Fixture { device, .. } = block(&machine, |config| config.cache = CacheMode::Writethrough);
    let mut driver = Driver::new(&machine, device);
    assert_eq!(driver.offered() & CONFIG_WCE, 0);
    assert_eq!(driver.config::<1>(32), [0]);
}

#[test]
fn many_requests_on_many_queues() {
    let machine = Machine::new();
    let Fixture { device, image, .. } = block(&machine, |config| config.queues = 4);
    let mut driver = Driver::new(&machine, device);
    assert_eq!(driver.config::<2>(34), [4, 0]);
    let mut queues = driver.start_with_event_idx(FLUSH | MQ, &[256, 256, 256, 256]);
    let data = Random::new(3).bytes(512 * 128);
    let status = machine.allocate(1024, 16);
    machine.write(status, &[0xff; 1024]);
    let mut sent = [0; 4];
    for round in 0..4 {
        for (sector, bytes) in data.chunks(512).enumerate() {
            let queue = (sector + round) % 4;
            let address = machine.allocate(16 + 512, 16);
            machine.write(address, &[&header(OUT, sector as u64), bytes].concat());
            queues[queue].add(&[
                Descriptor::readable(address, 16 + 512),
                Descriptor::writable(status + (round * 128 + sector) as u64, 1),
            ]);
            sent[queue] += 1;
            if sector % 7 == 0 {
                driver.kick(u32::try_from(queue).unwrap());
            }
        }
        for (index, queue) in queues.iter_mut().enumerate() {
            driver.kick(u32::try_from(index).unwrap());
            for _ in 0..sent[index] {
                assert_eq!(driver.wait_used(queue).unwrap().len, 1);
            }
            sent[index] = 0;
        }
    }
    assert_eq!(machine.read(status, 512), vec![OK; 512]);
    assert_eq!(contents(image), data);
}

/// Requests under way at a snapshot are either done or still in the ring: none is lost, none is half done.
#[test]
fn a_snapshot_in_the_middle_loses_nothing() {
    let machine = Machine::new();
    let Fixture {
        mut device, image, ..
    } = block(&machine, |_| {});
    let data = Random::new(4).bytes(512 * 128);
    let status = machine.allocate(128, 16);
    machine.write(status, &[0xff; 128]);
    let mut driver = Driver::new(&machine, device);
    let mut queues = driver.start(FLUSH, &[256]);
    for (sector, bytes) in data.chunks(512).enumerate() {
        let address = machine.allocate(16 + 512, 16);
        machine.write(address, &[&header(OUT, sector as u64), bytes].concat());
        queues[0].add(&[
            Descriptor::readable(address, 16 + 512),
            Descriptor::writable(status + sector as u64, 1),
        ]);
    }
    driver.kick(0);
    let mut restores = 0;
    while queues[0].used_index() != 128 {
        driver.transport.pause();
        let saved = driver.transport.save().unwrap();
        drop(driver);
        let config = BlockConfig {
            fd: image.try_clone().unwrap(),
            kind: DiskKind::File,
            read_only: false,
            cache: CacheMode::Writeback,
            serial: String::new(),
            queues: 1,
        };
        device = Box::new(Block::new(config, machine.pool.clone()).unwrap());
        driver = Driver::restored(&machine, device, &saved).unwrap();
        restores += 1;
        assert!(restores < 10_000, "no progress");
    }
    assert_eq!(machine.read(status, 128), vec![OK; 128]);
    assert_eq!(contents(image), data);
}

#[test]
fn a_disk_that_grows_says_so() {
    let machine = Machine::new();
    let Fixture {
        device,
        image,
        handle,
        ..
    } = block(&machine, |_| {});
    let mut driver = Driver::new(&machine, device);
    let mut queues = driver.start(FLUSH, &[128]);
    assert_eq!(handle.refresh_capacity().unwrap(), SECTORS * 512);
    assert_eq!(read(&mut driver, &mut queues[0], SECTORS, 512).0, IOERR);
    rustix::fs::ftruncate(&image, (SECTORS + 8) * 512).unwrap();
    assert_eq!(handle.refresh_capacity().unwrap(), (SECTORS + 8) * 512);
    assert_eq!(driver.wait_interrupt(TIMEOUT) & 2, 2);
    assert_eq!(driver.config::<8>(0), (SECTORS + 8).to_le_bytes());
    assert_eq!(read(&mut driver, &mut queues[0], SECTORS, 512).0, OK);
}

#[test]
fn a_state_of_another_disk_is_refused() {
    let machine = Machine::new();
    let Fixture { device, .. } = block(&machine, |_| {});
    let mut driver = Driver::new(&machine, device);
    driver.start(FLUSH, &[128]);
    let saved = driver.transport.save().unwrap();
    for adapt in [
        (|config| config.read_only = true) as fn(&mut BlockConfig),
        |config| config.fd = disk_image(SECTORS + 1),
        |config| config.queues = 2,
    ] {
        let Fixture { device, .. } = block(&machine, adapt);
        assert!(Driver::restored(&machine, device, &saved).is_err());
    }
}
