// SPDX-License-Identifier: Apache-2.0
//! The VMM on a real /dev/kvm with tiny bare-metal guests. Passes on hardware KVM and under kvm_pvm.
//!
//! All in one process and one after the other where descriptors and threads are counted.

// A test panics when something is not as it must be; helpers outside of #[test] functions too.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod clones;
mod devices;
mod guests;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cloister_boot::x86_64::Description;
use cloister_vmm::{
    Boot, Cell, CellConfig, CellHost, CellHostConfig, CellState, CreateError, DeviceConfig, HugePages,
    InterruptChip, KernelBoot, LifecycleError, SavedCell, SpareConfig, StopReason,
};
use devices::{Behaviour, TestDevice};
use vm_memory::{Bytes, GuestAddress};

/// Generous: the machines that run this are shared.
const PATIENCE: Option<Duration> = Some(Duration::from_secs(60));

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Tests count the process's threads and descriptors: never two at a time.
fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

fn host() -> CellHost {
    CellHost::new(CellHostConfig::default()).expect("these tests need /dev/kvm")
}

fn config(code: Vec<u8>) -> CellConfig {
    let boot = KernelBoot {
        kernel: guests::kernel(&code),
        initrd: None,
        command_line: String::new(),
        description: Description::MpTable,
    };
    let mut config = CellConfig::new("tiny", Boot::Kernel(boot));
    config.memory_mib = 4;
    config
}

fn run(host: &CellHost, config: CellConfig) -> (StopReason, Cell) {
    let cell = Cell::create(config, host).unwrap();
    cell.start().unwrap();
    let reason = cell.wait(PATIENCE).expect("the guest did not end");
    (reason, cell)
}

fn read_u32(cell: &Cell, address: u64) -> u32 {
    cell.ram().unwrap().read_obj(GuestAddress(address)).unwrap()
}

/// Waits until `done`, or fails.
fn eventually(what: &str, done: impl Fn() -> bool) {
    for _ in 0..6000 {
        if done() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("never happened: {what}");
}

/// Open descriptors of the process.
fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// The process's threads that are the VMM's: the test harness has some that come and go.
fn threads() -> usize {
    let starts = ["device-io-", "worker-", "housekeeper", "take-down"];
    vcpu_threads() + count_threads(|name| starts.iter().any(|start| name.starts_with(start)))
}

/// The threads of all vCPUs.
fn vcpu_threads() -> usize {
    count_threads(|name| name.contains(":vcpu"))
}

fn count_threads(ours: impl Fn(&str) -> bool) -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    // One that ends while it is looked at does not count.
    tasks
        .filter(|task| {
            std::fs::read_to_string(task.as_ref().unwrap().path().join("comm")).is_ok_and(|name| ours(&name))
        })
        .count()
}

#[test]
fn output_and_power_off() {
    let _alone = alone();
    let host = host();
    let (reason, cell) = run(&host, config(guests::hello()));
    assert_eq!(reason, StopReason::PowerOff);
    assert_eq!(cell.console_tail().bytes(), b"hello");
    assert_eq!(cell.stats().io_out, 6);
    assert_eq!(cell.state(), CellState::Stopped(StopReason::PowerOff));
}

#[test]
fn a_spare_runs_like_any_other() {
    let _alone = alone();
    let host = host();
    let kernel = guests::kernel(&guests::hello());
    let again = |kernel: &std::fs::File| {
        let mut config = config(Vec::new());
        config.boot = Boot::Kernel(KernelBoot {
            kernel: kernel.try_clone().unwrap(),
            initrd: None,
            command_line: String::new(),
            description: Description::MpTable,
        });
        config
    };
    let keep = |count| SpareConfig {
        kernel: kernel.try_clone().unwrap(),
        initrd: None,
        memory_mib: 4,
        pluggable_mib: 0,
        huge_pages: HugePages::default(),
        count,
    };
    host.keep_spares(keep(1)).unwrap();
    assert_eq!(host.refill_spares().unwrap(), 1);
    assert_eq!(host.refill_spares().unwrap(), 0);
    for spares_used in [1, 1, 1] {
        let (reason, cell) = run(&host, again(&kernel));
        assert_eq!(reason, StopReason::PowerOff);
        assert_eq!(cell.console_tail().bytes(), b"hello");
        assert_eq!(host.refill_spares().unwrap(), spares_used);
    }
    // Other memory, another kernel: not of this kind.
    let mut other = again(&kernel);
    other.memory_mib = 6;
    assert_eq!(run(&host, other).0, StopReason::PowerOff);
    assert_eq!(run(&host, config(guests::hello())).0, StopReason::PowerOff);
    assert_eq!(host.refill_spares().unwrap(), 0);
    // A cell's word about its pages, then none are kept any more.
    let cell = Cell::create(again(&kernel), &host).unwrap();
    cell.note_ready();
    assert_eq!(host.refill_spares().unwrap(), 1);
    host.keep_spares(keep(0)).unwrap();
    assert_eq!(host.refill_spares().unwrap(), 0);
}

#[test]
fn spares_are_kept_of_four_kinds_and_made_once() {
    let _alone = alone();
    let host = host();
    let kernel = guests::kernel(&guests::hello());
    let keep = |memory_mib| {
        host.keep_spares(SpareConfig {
            kernel: kernel.try_clone().unwrap(),
            initrd: None,
            memory_mib,
            pluggable_mib: 0,
            huge_pages: HugePages::default(),
            count: 2,
        })
        .unwrap();
    };
    // Said by several at once, as when pods start at once.
    let made: usize = std::thread::scope(|scope| {
        let refill = || {
            keep(4);
            host.refill_spares().unwrap()
        };
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(refill)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert_eq!(made, 2);
    // The fifth kind takes the first one's place, and the first one has to be made anew.
    for memory_mib in [6, 8, 10, 12] {
        keep(memory_mib);
        assert_eq!(host.refill_spares().unwrap(), 2, "{memory_mib} MiB");
    }
    keep(12);
    assert_eq!(host.refill_spares().unwrap(), 0);
    keep(4);
    assert_eq!(host.refill_spares().unwrap(), 2);
}

#[test]
fn both_interrupt_chips_and_all_kinds_of_pages() {
    let _alone = alone();
    let host = host();
    for interrupt_chip in [InterruptChip::Split, InterruptChip::Kernel] {
        let (reason, _) = run(
            &host,
            CellConfig {
                interrupt_chip,
                ..config(guests::hello())
            },
        );
        assert_eq!(reason, StopReason::PowerOff, "{interrupt_chip:?}");
    }
    let (reason, _) = run(
        &host,
        CellConfig {
            huge_pages: HugePages::No,
            ..config(guests::hello())
        },
    );
    assert_eq!(reason, StopReason::PowerOff);
}

#[test]
fn resets_are_told_from_faults() {
    let _alone = alone();
    let host = host();
    assert_eq!(run(&host, config(guests::keyboard_reset())).0, StopReason::Reset);
    assert_eq!(run(&host, config(guests::port_reset())).0, StopReason::Reset);
    assert_eq!(
        run(&host, config(guests::triple_fault())).0,
        StopReason::TripleFault { vcpu: 0 }
    );
    assert_eq!(
        run(&host, config(guests::panic())).0,
        StopReason::Panic {
            message: "tiny".to_owned()
        }
    );
}

#[test]
fn an_internal_error_of_kvm_names_the_place() {
    let _alone = alone();
    let (reason, _) = run(&host(), config(guests::jump_into_the_hole()));
    match reason {
        StopReason::InternalError {
            vcpu: 0,
            suberror: 1,
            rip,
            ..
        } => assert_eq!(rip, 0xe000_0000),
        other => panic!("{other:?}"),
    }
}

#[test]
fn nothing_reads_as_ones() {
    let _alone = alone();
    let host = host();
    let cell = Cell::create(config(guests::nothing_there()), &host).unwrap();
    let ram = cell.ram().unwrap();
    cell.start().unwrap();
    assert_eq!(cell.wait(PATIENCE), Some(StopReason::PowerOff));
    for address in [0x20_0000, 0x20_0004] {
        assert_eq!(ram.read_obj::<u32>(GuestAddress(address)).unwrap(), u32::MAX);
    }
}

#[test]
fn a_register_page_answers() {
    let _alone = alone();
    let mut config = config(guests::virtio_magic());
    config.devices.push(DeviceConfig::Rng);
    let (reason, cell) = run(&host(), config);
    assert_eq!(reason, StopReason::PowerOff);
    // "virt", and device type 4.
    assert_eq!(cell.console_tail().bytes(), b"virt4");
}

#[test]
fn a_notification_reaches_the_device_and_its_interrupt_the_guest() {
    let _alone = alone();
    let host = host();
    for interrupt_chip in [InterruptChip::Split, InterruptChip::Kernel] {
        let mut config = config(guests::notify_and_wait());
        config.interrupt_chip = interrupt_chip;
        let (device, seen) = TestDevice::boxed(Behaviour::Interrupt);
        config.devices.push(DeviceConfig::Custom {
            name: "test".to_owned(),
            device,
        });
        let (reason, cell) = run(&host, config);
        assert_eq!(reason, StopReason::PowerOff, "{interrupt_chip:?}");
        assert_eq!(cell.console_tail().bytes(), b"i");
        assert_eq!(seen.notifications(), 1);
    }
}

#[test]
fn a_panicking_device_stops_its_cell_and_no_other() {
    let _alone = alone();
    let host = host();
    let other = Cell::create(config(guests::counter()), &host).unwrap();
    other.start().unwrap();
    let mut config = config(guests::notify_and_wait());
    let (device, _) = TestDevice::boxed(Behaviour::Panic);
    config.devices.push(DeviceConfig::Custom {
        name: "bad".to_owned(),
        device,
    });
    let cell = Cell::create(config, &host).unwrap();
    // A failing device interrupts its driver, which would power off.
    cell.ram()
        .unwrap()
        .write_obj(1u32, GuestAddress(0x20_0000))
        .unwrap();
    cell.start().unwrap();
    let reason = cell.wait(PATIENCE).unwrap();
    match reason {
        StopReason::DeviceFailed { device, why } => {
            assert!(
                device.contains("bad") && why.contains("panicked"),
                "{device}: {why}"
            );
        }
        other => panic!("{other:?}"),
    }
    let before = read_u32(&other, 0x20_0000);
    eventually("the other cell goes on", || read_u32(&other, 0x20_0000) != before);
    assert_eq!(other.state(), CellState::Running);
}

#[test]
fn a_stuck_device_stops_its_cell() {
    let _alone = alone();
    let host = host();
    let mut config = config(guests::notify_and_wait());
    let (device, seen) = TestDevice::boxed(Behaviour::Stuck);
    config.devices.push(DeviceConfig::Custom {
        name: "slow".to_owned(),
        device,
    });
    let cell = Cell::create(config, &host).unwrap();
    // A failing device interrupts its driver, which would power off.
    cell.ram()
        .unwrap()
        .write_obj(1u32, GuestAddress(0x20_0000))
        .unwrap();
    cell.start().unwrap();
    let reason = cell.wait(PATIENCE);
    seen.release();
    let reason = reason.unwrap();
    assert!(
        matches!(&reason, StopReason::DeviceFailed { device, why } if device.contains("slow") && why.contains("not returned")),
        "{reason:?}"
    );
    assert!(cell.wait_taken_down(PATIENCE));
}

fn custom(name: &str, behaviour: Behaviour) -> (DeviceConfig, std::sync::Arc<devices::Seen>) {
    let (device, seen) = TestDevice::boxed(behaviour);
    let name = name.to_owned();
    (DeviceConfig::Custom { name, device }, seen)
}

#[test]
fn a_stuck_device_takes_no_other_cell_along() {
    let _alone = alone();
    let shared = CellHostConfig {
        // All cells on one.
        event_loops: 1,
        ..CellHostConfig::default()
    };
    let host = CellHost::new(shared).expect("these tests need /dev/kvm");
    let busy_cell = || {
        let mut config = config(guests::notify_for_ever());
        let (device, seen) = custom("good", Behaviour::Interrupt);
        config.devices.push(device);
        let cell = Cell::create(config, &host).unwrap();
        cell.start().unwrap();
        (cell, seen)
    };
    let goes_on = |seen: &devices::Seen| {
        let before = seen.notifications();
        eventually("the other cell's I/O goes on", || {
            seen.notifications() > before + 100
        });
    };
    let (other, others) = busy_cell();
    goes_on(&others);
    let mut config = config(guests::notify_for_ever());
    let (device, seen) = custom("stuck", Behaviour::Stuck);
    config.devices.push(device);
    let cell = Cell::create(config, &host).unwrap();
    cell.start().unwrap();
    let reason = cell.wait(PATIENCE).expect("nobody noticed");
    assert!(
        matches!(&reason, StopReason::DeviceFailed { device, why } if device.contains("stuck") && why.contains("not returned")),
        "{reason:?}"
    );
    // The handler is still in there.
    assert_eq!(seen.notifications(), 1);
    goes_on(&others);
    assert_eq!(other.state(), CellState::Running);
    // New cells come to the same loop, and old ones leave it.
    let (third, thirds) = busy_cell();
    goes_on(&thirds);
    other.stop();
    assert_eq!(other.wait(PATIENCE), Some(StopReason::Requested));
    assert!(
        other.wait_taken_down(PATIENCE),
        "waits for somebody else's device"
    );
    third.pause().unwrap();
    third.resume().unwrap();
    goes_on(&thirds);
    seen.release();
    assert!(cell.wait_taken_down(PATIENCE));
    // Its old thread has gone, too: what is there is what there was.
    drop((cell, other));
    eventually("the left thread ends", || threads() == 1 + 3 + 1 + 1);
}

#[test]
fn a_vcpu_stuck_in_a_device_stops_its_cell() {
    let _alone = alone();
    let host = host();
    let mut config = config(guests::notify_and_wait());
    let (device, seen) = TestDevice::boxed(Behaviour::StuckAtActivation);
    config.devices.push(DeviceConfig::Custom {
        name: "slow".to_owned(),
        device,
    });
    let cell = Cell::create(config, &host).unwrap();
    cell.start().unwrap();
    // Its thread cannot end before the device lets go of it, but the cell has stopped.
    let reason = cell.wait(PATIENCE).expect("nobody noticed");
    assert!(
        matches!(&reason, StopReason::DeviceFailed { why, .. } if why.contains("not returned")),
        "{reason:?}"
    );
    assert_eq!(seen.activations(), 1);
    seen.release();
    assert!(cell.wait_taken_down(PATIENCE));
}

#[test]
fn pause_and_resume_as_often_as_one_likes() {
    let _alone = alone();
    let host = host();
    for code in [guests::counter(), guests::port_counter()] {
        let cell = Cell::create(config(code), &host).unwrap();
        cell.start().unwrap();
        for _ in 0..100 {
            let before = read_u32(&cell, 0x20_0000);
            eventually("the guest counts", || read_u32(&cell, 0x20_0000) != before);
            cell.pause().unwrap();
            assert_eq!(cell.state(), CellState::Paused);
            let stopped = read_u32(&cell, 0x20_0000);
            std::thread::sleep(Duration::from_millis(1));
            assert_eq!(read_u32(&cell, 0x20_0000), stopped);
            cell.resume().unwrap();
        }
        // No kick is lost even when nothing else happens between two calls.
        for _ in 0..500 {
            cell.pause().unwrap();
            cell.resume().unwrap();
        }
        cell.stop();
        assert_eq!(cell.wait(PATIENCE), Some(StopReason::Requested));
    }
}

#[test]
fn a_guest_that_halted_for_good_is_noticed_and_an_idle_one_is_left_alone() {
    let _alone = alone();
    let host = host();
    let start = |code| {
        // Three that are never started.
        let cell = CellConfig {
            vcpus: 4,
            ..config(code)
        };
        let cell = Cell::create(cell, &host).unwrap();
        cell.start().unwrap();
        cell
    };
    let idle = start(guests::idle());
    for _ in 0..2 {
        let halted = start(guests::halt());
        assert_eq!(halted.wait(PATIENCE), Some(StopReason::AllHalted));
        assert!(halted.wait_taken_down(PATIENCE));
    }
    assert_eq!(idle.state(), CellState::Running);
    // It was asked once, not over and over.
    assert!(idle.stats().interrupted <= 8, "{:?}", idle.stats());
    // A cell that is paused runs no guest that could have halted; resumed it can be looked at again.
    let paused = start(guests::halt());
    paused.pause().unwrap();
    let other = start(guests::halt());
    assert_eq!(other.wait(PATIENCE), Some(StopReason::AllHalted));
    assert_eq!(paused.state(), CellState::Paused);
    paused.resume().unwrap();
    assert_eq!(paused.wait(PATIENCE), Some(StopReason::AllHalted));
    idle.stop();
    assert_eq!(idle.wait(PATIENCE), Some(StopReason::Requested));
}

#[test]
fn an_idle_guest_can_be_paused_and_stopped() {
    let _alone = alone();
    let host = host();
    let cell = Cell::create(
        CellConfig {
            vcpus: 4,
            ..config(guests::idle())
        },
        &host,
    )
    .unwrap();
    cell.start().unwrap();
    cell.pause().unwrap();
    cell.resume().unwrap();
    assert_eq!(cell.kvm_stats().unwrap().len(), 4);
    let report = cell.report().unwrap();
    assert_eq!(report.vcpus.len(), 4);
    assert!(
        report
            .vcpus
            .iter()
            .all(|vcpu| vcpu.rip.is_some() && vcpu.pending.is_empty())
    );
    assert!(report.devices.is_empty());
    cell.stop();
    assert_eq!(cell.wait(PATIENCE), Some(StopReason::Requested));
}

#[test]
fn other_vcpus_start_when_the_guest_asks() {
    let _alone = alone();
    let host = host();
    for vcpus in [2u8, 8] {
        let cell = Cell::create(
            CellConfig {
                vcpus,
                ..config(guests::start_others())
            },
            &host,
        )
        .unwrap();
        cell.ram()
            .unwrap()
            .write_obj(u32::from(vcpus) - 1, GuestAddress(0x20_0004))
            .unwrap();
        cell.start().unwrap();
        assert_eq!(cell.wait(PATIENCE), Some(StopReason::PowerOff), "{vcpus} vCPUs");
    }
}

#[test]
fn vcpus_are_made_while_the_guest_runs() {
    let _alone = alone();
    let host = host();
    for interrupt_chip in [InterruptChip::Split, InterruptChip::Kernel] {
        let mut config = config(guests::start_others_later());
        (config.max_vcpus, config.interrupt_chip) = (4, interrupt_chip);
        let cell = Cell::create(config, &host).unwrap();
        let ram = cell.ram().unwrap();
        let set = |address, value: u32| ram.write_obj(value, GuestAddress(address)).unwrap();
        set(0x20_0004, 3);
        assert_eq!(cell.provide_vcpus(2).unwrap(), 2);
        cell.start().unwrap();
        eventually("two vCPUs run", || cell.vcpu_threads().len() == 2);
        cell.pause().unwrap();
        assert_eq!(cell.provide_vcpus(3).unwrap(), 3);
        cell.resume().unwrap();
        // No more than there can be, and never fewer than there are.
        assert_eq!(cell.provide_vcpus(200).unwrap(), 4);
        assert_eq!(cell.provide_vcpus(1).unwrap(), 4);
        eventually("four vCPUs run", || cell.vcpu_threads().len() == 4);
        assert_eq!(vcpu_threads(), 4);
        cell.pause().unwrap();
        cell.save().unwrap();
        cell.resume().unwrap();
        set(0x20_0008, 1);
        assert_eq!(cell.wait(PATIENCE), Some(StopReason::PowerOff));
        assert!(matches!(cell.provide_vcpus(4), Ok(4)));
        drop(ram);
        assert!(cell.wait_taken_down(PATIENCE));
        assert_eq!(vcpu_threads(), 0);
    }
    let mut config = config(guests::counter());
    config.max_vcpus = 2;
    let cell = Cell::create(config, &host).unwrap();
    cell.stop();
    assert!(matches!(cell.provide_vcpus(2), Err(LifecycleError::State { .. })));
}

#[test]
fn one_cell_dies_and_the_other_goes_on() {
    let _alone = alone();
    let host = host();
    let good = Cell::create(config(guests::counter()), &host).unwrap();
    good.start().unwrap();
    for code in [
        guests::triple_fault(),
        guests::jump_into_the_hole(),
        guests::port_reset(),
    ] {
        let (_, bad) = run(&host, config(code));
        assert!(bad.wait_taken_down(PATIENCE));
        let before = read_u32(&good, 0x20_0000);
        eventually("the good cell goes on", || read_u32(&good, 0x20_0000) != before);
    }
    assert_eq!(good.state(), CellState::Running);
}

#[test]
fn a_saved_cell_goes_on_in_a_new_vm() {
    let _alone = alone();
    let host = host();
    for interrupt_chip in [InterruptChip::Split, InterruptChip::Kernel] {
        for code in [guests::counter(), guests::port_counter()] {
            let mut first = config(code);
            first.interrupt_chip = interrupt_chip;
            first.devices.push(DeviceConfig::Rng);
            let cell = Cell::create(first, &host).unwrap();
            cell.start().unwrap();
            eventually("the guest counts", || read_u32(&cell, 0x20_0000) > 100);
            cell.pause().unwrap();
            let saved = postcard::to_stdvec(&cell.save().unwrap()).unwrap();
            let count = read_u32(&cell, 0x20_0000);
            let memory = cell.memory_file().unwrap();
            cell.stop();
            assert!(cell.wait_taken_down(PATIENCE));

            let saved: SavedCell = postcard::from_bytes(&saved).unwrap();
            let boot = Boot::Restore {
                saved: Box::new(saved),
                memory,
            };
            let mut second = CellConfig::new("again", boot);
            second.interrupt_chip = interrupt_chip;
            second.memory_mib = 4;
            second.devices.push(DeviceConfig::Rng);
            let cell = Cell::create(second, &host).unwrap();
            assert_eq!(read_u32(&cell, 0x20_0000), count);
            cell.start().unwrap();
            eventually("it goes on from there", || {
                read_u32(&cell, 0x20_0000) > count + 100
            });
        }
    }
}

#[test]
fn a_saved_cell_fits_only_a_like_one() {
    let _alone = alone();
    let host = host();
    let cell = Cell::create(config(guests::counter()), &host).unwrap();
    let saved = cell.save().unwrap();
    for (vcpus, devices, memory_mib) in [(2, 0, 4), (1, 1, 4), (1, 0, 8)] {
        let memory = cell.memory_file().unwrap();
        let boot = Boot::Restore {
            saved: Box::new(saved.clone()),
            memory,
        };
        let mut other = CellConfig::new("other", boot);
        other.vcpus = vcpus;
        other.memory_mib = memory_mib;
        other.devices.extend((0..devices).map(|_| DeviceConfig::Rng));
        let error = Cell::create(other, &host).err().expect("it must not fit");
        assert!(matches!(error, CreateError::Shape { .. }), "{error:?}");
    }
}

#[test]
fn calls_that_do_not_fit_the_state_change_nothing() {
    let _alone = alone();
    let host = host();
    let refused =
        |result: Result<(), LifecycleError>| assert!(matches!(result, Err(LifecycleError::State { .. })));
    let cell = Cell::create(config(guests::counter()), &host).unwrap();
    refused(cell.pause());
    refused(cell.resume());
    assert_eq!(cell.state(), CellState::Created);
    cell.start().unwrap();
    refused(cell.start());
    refused(cell.resume());
    refused(cell.save().map(drop));
    cell.pause().unwrap();
    refused(cell.pause());
    refused(cell.start());
    cell.stop();
    cell.stop();
    assert_eq!(cell.wait(PATIENCE), Some(StopReason::Requested));
    refused(cell.start());
    refused(cell.pause());
    refused(cell.resume());
    refused(cell.save().map(drop));
    let never_started = Cell::create(config(guests::counter()), &host).unwrap();
    never_started.stop();
    assert_eq!(never_started.wait(PATIENCE), Some(StopReason::Requested));
    assert!(never_started.wait_taken_down(PATIENCE));
}

#[test]
fn the_stopped_event_becomes_readable() {
    let _alone = alone();
    let host = host();
    let cell = Cell::create(config(guests::counter()), &host).unwrap();
    let readable = |milliseconds: i64| {
        let mut fds = [rustix::event::PollFd::new(&cell, rustix::event::PollFlags::IN)];
        let timeout = rustix::event::Timespec {
            tv_sec: milliseconds / 1000,
            tv_nsec: milliseconds % 1000 * 1_000_000,
        };
        rustix::event::poll(&mut fds, Some(&timeout)).unwrap() == 1
    };
    cell.start().unwrap();
    assert!(!readable(0));
    cell.stop();
    assert!(readable(60_000));
}

#[test]
fn nothing_is_left_of_stopped_cells() {
    let _alone = alone();
    // What the runtime and the first use of a host make once, is made now.
    drop(run(&host(), config(guests::hello())));
    assert_eq!(threads(), 0);
    let fds = descriptors();
    {
        let host = host();
        let mut cells = Vec::new();
        for n in 0..8 {
            let code = if n % 2 == 0 {
                guests::counter()
            } else {
                guests::hello()
            };
            let mut config = config(code);
            config.vcpus = 2;
            config.devices.push(DeviceConfig::Rng);
            let cell = Cell::create(config, &host).unwrap();
            cell.start().unwrap();
            cells.push(cell);
        }
        eventually("the short ones end", || {
            cells
                .iter()
                .skip(1)
                .step_by(2)
                .all(|cell| matches!(cell.state(), CellState::Stopped(_)))
        });
        for cell in &cells {
            cell.stop();
        }
        for cell in &cells {
            assert!(cell.wait_taken_down(PATIENCE));
        }
        // Only the handles are left, with one eventfd each; no thread but the host's own.
        // Two event loops, three workers, one housekeeper: for all cells together.
        eventually("the thread that took them down ends", || threads() == 6);
        drop(cells);
    }
    assert_eq!(threads(), 0);
    assert_eq!(descriptors(), fds);
    assert!(
        !std::fs::read_to_string("/proc/self/maps")
            .unwrap()
            .contains("cloister-ram")
    );
}

#[test]
fn dropping_a_running_cell_stops_it() {
    let _alone = alone();
    let host = host();
    let cell = Cell::create(config(guests::counter()), &host).unwrap();
    cell.start().unwrap();
    drop(cell);
    drop(host);
    assert_eq!(threads(), 0);
}

#[test]
fn bad_configurations_are_refused_before_anything_is_made() {
    let _alone = alone();
    let host = host();
    // What the host makes with its first cell, it keeps.
    let first = Cell::create(config(guests::halt()), &host).unwrap();
    first.stop();
    assert!(first.wait_taken_down(PATIENCE));
    drop(first);
    // The housekeeper lets go of the last of it a moment later.
    let mut fds = descriptors();
    loop {
        std::thread::sleep(Duration::from_millis(100));
        match descriptors() {
            now if now == fds => break,
            now => fds = now,
        }
    }
    let refused = |config: CellConfig| {
        let error = Cell::create(config, &host).err().expect("it must be refused");
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        text
    };
    let text = refused(CellConfig {
        vcpus: 0,
        ..config(guests::halt())
    });
    assert!(text.contains("0 vCPUs"), "{text}");
    let text = refused(CellConfig {
        memory_mib: u64::MAX,
        ..config(guests::halt())
    });
    assert!(text.contains("18446744073709551615 MiB"), "{text}");
    let text = refused(CellConfig {
        memory_mib: 1024 * 1024,
        ..config(guests::halt())
    });
    assert!(text.contains("the host has"), "{text}");
    let text = refused(CellConfig {
        memory_mib: 1,
        ..config(guests::halt())
    });
    assert!(text.contains("outside of RAM"), "{text}");
    let mut not_a_kernel = config(guests::halt());
    not_a_kernel.boot = Boot::Kernel(KernelBoot {
        kernel: std::fs::File::open("/proc/self/exe").unwrap(),
        initrd: None,
        command_line: String::new(),
        description: Description::MpTable,
    });
    let text = refused(not_a_kernel);
    assert!(text.contains("kernel"), "{text}");
    assert_eq!(descriptors(), fds);
}

#[test]
fn memory_beyond_4_gib_is_there() {
    let _alone = alone();
    let mut config = config(guests::hello());
    config.memory_mib = 64 * 1024;
    config.overcommit = true;
    let host = host();
    let cell = Cell::create(config, &host).unwrap();
    let end = (1u64 << 32) + (64 << 30) - 0xd000_0000;
    cell.ram().unwrap().write_obj(7u8, GuestAddress(end - 1)).unwrap();
    assert!(cell.ram().unwrap().write_obj(7u8, GuestAddress(end)).is_err());
    cell.start().unwrap();
    assert_eq!(cell.wait(PATIENCE), Some(StopReason::PowerOff));
}
