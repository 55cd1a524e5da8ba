// SPDX-License-Identifier: Apache-2.0
//! The memory balloon, driven well and badly.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::sync::Arc;

use cloister_devices::GuestRam;
use cloister_devices::balloon::{Balloon, BalloonHandle, BalloonMetrics};
use cloister_tests::driver::{Descriptor, Driver, Machine, TIMEOUT, VirtQueue};
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap, mmap::MmapRegion};

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const REPORT: usize = 2;
const REPORTING: u64 = 1 << 5;
const PAGE: u64 = 4096;

struct Fixture {
    device: Box<Balloon>,
    handle: BalloonHandle,
    metrics: Arc<BalloonMetrics>,
}

fn balloon(machine: &Machine) -> Fixture {
    let device = Box::new(Balloon::new(false, machine.pool.clone()));
    Fixture {
        handle: device.handle(),
        metrics: device.metrics().clone(),
        device,
    }
}

/// A machine whose RAM is a shared mapping of a memory file, as a cell's is.
fn machine_on_file(len: usize) -> (Machine, Arc<File>) {
    let fd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, len as u64).unwrap();
    let file = Arc::new(File::from(fd));
    let region = MmapRegion::from_file(FileOffset::from_arc(file.clone(), 0), len).unwrap();
    let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
    let ram = GuestRam::from_regions(vec![region]).unwrap();
    (Machine::with_ram(Arc::new(ram)), file)
}

fn numbers(pages: &[u32]) -> Vec<u8> {
    pages.iter().flat_map(|page| page.to_le_bytes()).collect()
}

#[test]
fn inflating_gives_memory_back_to_the_host() {
    for on_file in [false, true] {
        let (machine, file) = if on_file {
            let (machine, file) = machine_on_file(32 << 20);
            (machine, Some(file))
        } else {
            (Machine::new(), None)
        };
        let Fixture { device, metrics, .. } = balloon(&machine);
        let mut driver = Driver::new(&machine, device);
        let mut queues = driver.start_with_event_idx(0, &[16, 16]);
        let first = (16 << 20) / PAGE;
        machine.write(first * PAGE, &vec![7; 256 * 4096]);
        let pages: Vec<u32> = (0..128)
            .map(|n| u32::try_from(first + 2 * n).unwrap())
            .chain([u32::try_from(first + 255).unwrap()])
            .collect();
        driver.request(&mut queues[INFLATE], &[&numbers(&pages)], &[]);
        assert_eq!(metrics.inflated_pages.get(), 129);
        let is_freed = |page| page % 2 == 0 || page == 255;
        if let Some(file) = &file {
            // Before anything is read: that fills holes.
            for page in 0..256 {
                let offset = (first + page) * PAGE;
                let data = rustix::fs::seek(file, rustix::fs::SeekFrom::Data(offset));
                assert_eq!(data != Ok(offset), is_freed(page), "page {page}: {data:?}");
            }
        }
        for page in 0..256 {
            let value = if is_freed(page) { 0 } else { 7 };
            assert_eq!(
                machine.read((first + page) * PAGE, 4096),
                vec![value; 4096],
                "page {page}"
            );
        }
        driver.request(&mut queues[DEFLATE], &[&numbers(&pages)], &[]);
        assert_eq!(metrics.deflated_pages.get(), 129);
        machine.write(first * PAGE, b"in use again");
        assert_eq!(metrics.bad_requests.get(), 0);
    }
}

#[test]
fn reported_pages_are_freed() {
    let machine = Machine::new();
    let Fixture { device, metrics, .. } = balloon(&machine);
    let mut driver = Driver::new(&machine, device);
    let mut queues = driver.start(REPORTING, &[16, 16, 16]);
    let at = 16 << 20;
    machine.write(at, &vec![7; 1 << 20]);
    queues[REPORT].add_indirect(
        &machine,
        &[
            Descriptor::writable(at, 64 << 10),
            Descriptor::writable(at + (512 << 10), 512 << 10),
            // Crooked: only the whole pages in it.
            Descriptor::writable(at + (128 << 10) + 1, 8192),
        ],
    );
    driver.kick(2);
    assert_eq!(driver.wait_used(&mut queues[REPORT]).unwrap().len, 0);
    assert_eq!(metrics.reported_pages.get(), 16 + 128 + 1);
    let value = |at| machine.read(at, 1)[0];
    for (offset, expected) in [
        (0, 0),
        (63, 0),
        (64, 7),
        (128, 7),
        (132, 0),
        (136, 7),
        (511, 7),
        (512, 0),
        (1023, 0),
    ] {
        assert_eq!(value(at + (offset << 10)), expected, "{offset} KiB");
    }
}

#[test]
fn the_target_reaches_the_driver_and_its_answer_the_host() {
    let machine = Machine::new();
    let Fixture { device, handle, .. } = balloon(&machine);
    let mut driver = Driver::new(&machine, device);
    handle.set_target(100);
    driver.start(0, &[16, 16]);
    assert_eq!(driver.config::<8>(0), [100, 0, 0, 0, 0, 0, 0, 0]);
    handle.set_target(0x0102_0304);
    assert_eq!(driver.wait_interrupt(TIMEOUT), 2);
    assert_eq!(driver.config::<4>(0), [4, 3, 2, 1]);
    driver.write_config(4, &77u32.to_le_bytes());
    // The target is not the driver's to write, nor are halves of its own field.
    driver.write_config(0, &[9; 4]);
    driver.write_config(4, &[9; 2]);
    driver.write_config(4, &[9; 8]);
    assert_eq!((handle.target(), handle.actual()), (0x0102_0304, 77));
    let saved = driver.transport.save().unwrap();
    let Fixture { device, handle, .. } = balloon(&machine);
    let restored = Driver::restored(&machine, device, &saved).unwrap();
    assert_eq!((handle.target(), handle.actual()), (0x0102_0304, 77));
    drop(restored);
}

#[test]
fn pages_in_flight_at_a_snapshot_are_given_back_once_by_each_copy() {
    let machine = Machine::new();
    let Fixture {
        device,
        metrics,
        handle,
    } = balloon(&machine);
    handle.set_target(8);
    let mut driver = Driver::new(&machine, device);
    let mut queues = driver.start_with_event_idx(REPORTING, &[16, 16, 16]);
    let first = (16 << 20) / PAGE;
    let page = |n: u64| u32::try_from(first + n).unwrap();
    machine.write(first * PAGE, &[7; 64 * 4096]);
    let send = |queue: &mut VirtQueue, pages: &[u32]| {
        let list = machine.allocate(4 * pages.len(), 16);
        machine.write(list, &numbers(pages));
        queue.add(&[Descriptor::readable(
            list,
            u32::try_from(4 * pages.len()).unwrap(),
        )])
    };
    driver.request(&mut queues[INFLATE], &[&numbers(&[page(0), page(1)])], &[]);
    driver.write_config(4, &2u32.to_le_bytes());

    driver.transport.pause();
    let inflating = [
        send(&mut queues[INFLATE], &[page(10), page(11)]),
        send(&mut queues[INFLATE], &[page(20)]),
    ];
    let deflating = [send(&mut queues[DEFLATE], &[page(0), page(1)])];
    let report = |n| Descriptor::writable((first + n) * PAGE, 4 * 4096);
    let reported = [queues[REPORT].add(&[report(30), report(40)])];
    for queue in 0..3 {
        driver.kick(queue);
    }
    let saved = driver.transport.save().unwrap();
    assert_eq!(metrics.inflated_pages.get(), 2);
    let copy = machine.copy();
    let mut queues_there: Vec<VirtQueue> = queues.iter().map(|queue| queue.in_copy(&copy)).collect();
    let there = balloon(&copy);
    let mut clone = Driver::restored(&copy, there.device, &saved).unwrap();
    let is_freed = |n| matches!(n, 0 | 1 | 10 | 11 | 20 | 30..34 | 40..44);
    let check = |driver: &mut Driver<'_>,
                 queues: &mut [VirtQueue],
                 (metrics, handle): (&BalloonMetrics, &BalloonHandle),
                 before: u64| {
        assert_eq!(driver.wait_interrupt(TIMEOUT), 1);
        driver.wait_each_used(&mut queues[INFLATE], &inflating);
        driver.wait_each_used(&mut queues[DEFLATE], &deflating);
        driver.wait_each_used(&mut queues[REPORT], &reported);
        assert_eq!(metrics.inflated_pages.get(), before + 3);
        assert_eq!(metrics.deflated_pages.get(), 2);
        assert_eq!(metrics.reported_pages.get(), 8);
        assert_eq!(metrics.bad_requests.get(), 0);
        assert_eq!((handle.target(), handle.actual()), (8, 2));
        for n in 0..64 {
            let value = if is_freed(n) { 0 } else { 7 };
            let content = driver.machine.read((first + n) * PAGE, 4096);
            assert!(content == [value; 4096], "page {n}");
        }
        let list = numbers(&[page(50)]);
        driver.request(&mut queues[INFLATE], &[&list], &[]);
        assert_eq!(driver.machine.read((first + 50) * PAGE, 1), [0]);
    };
    check(&mut clone, &mut queues_there, (&there.metrics, &there.handle), 0);
    // Nothing that the one gave back was the other's.
    assert_eq!(machine.read((first + 10) * PAGE, 1), [7]);
    driver.transport.resume().unwrap();
    check(&mut driver, &mut queues, (&metrics, &handle), 2);
}

#[test]
fn pages_that_are_not_there_are_complained_about() {
    let machine = Machine::new();
    let Fixture { device, metrics, .. } = balloon(&machine);
    let mut driver = Driver::new(&machine, device);
    let mut queues = driver.start(REPORTING, &[16, 16, 16]);
    let page = |address: u64| u32::try_from(address / PAGE).unwrap();
    machine.write(16 << 20, &[7; 4096]);
    let pages = [page(Machine::HOLE), u32::MAX, page(16 << 20), page(Machine::END)];
    driver.request(&mut queues[INFLATE], &[&numbers(&pages)], &[]);
    assert_eq!(metrics.bad_requests.get(), 3);
    assert_eq!(metrics.inflated_pages.get(), 1, "the good one");
    assert_eq!(machine.read(16 << 20, 4096), vec![0; 4096]);
    for (queue, bytes) in [
        (INFLATE, vec![0; 3]),
        (INFLATE, vec![]),
        (DEFLATE, vec![0; 5]),
        (INFLATE, vec![0; 4 * 4097]),
    ] {
        let before = metrics.bad_requests.get();
        driver.request(&mut queues[queue], &[&bytes], &[]);
        assert_eq!(metrics.bad_requests.get(), before + 1);
    }
    let before = metrics.bad_requests.get();
    driver.request(&mut queues[REPORT], &[&[0; 4096]], &[]);
    queues[REPORT].add(&[Descriptor::writable(Machine::HOLE - 4096, 8192)]);
    driver.kick(2);
    driver.wait_used(&mut queues[REPORT]).unwrap();
    assert_eq!(metrics.bad_requests.get(), before + 2);
    assert_eq!(metrics.reported_pages.get(), 0);
    assert!(!driver.health().is_failed());
}
