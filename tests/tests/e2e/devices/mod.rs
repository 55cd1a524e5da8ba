// SPDX-License-Identifier: Apache-2.0
//! Our devices, and the ends of a VM, under Linux's own drivers: a VM whose init is a shell script that uses the device and says on the serial
//! console what it saw, while the test looks at the host's side.

mod guest;
mod loop_device;

use cloister_devices::balloon::{BalloonHandle, PAGE_SIZE};
use cloister_devices::block::{BlockConfig, BlockHandle, CacheMode, DiskKind};
use cloister_devices::console::TerminalSize;
use cloister_tests::e2e::{PATIENCE, ProcessFootprint, eventually};
use cloister_vmm::{DeviceConfig, DeviceHandle, StopReason};
use guest::{Guest, Init, host, with_libraries};
use loop_device::LoopDevice;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

const MIB: usize = 1 << 20;

/// A file that goes with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str, content: &[u8]) -> Self {
        // On tmpfs in the emulated host, which can punch holes.
        let path = PathBuf::from(format!("/run/e2e-{}-{name}", std::process::id()));
        fs::write(&path, content).unwrap();
        Self(path)
    }

    fn open(&self, writable: bool) -> File {
        File::options().read(true).write(writable).open(&self.0).unwrap()
    }

    fn allocated(&self) -> u64 {
        fs::metadata(&self.0).unwrap().blocks() * 512
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Bytes that differ from sector to sector.
fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len)
        .map(|at| u8::try_from((at / 512 * 7 + at % 13 + seed) % 251 + 1).unwrap())
        .collect()
}

fn disk(file: OwnedFd, kind: DiskKind, read_only: bool, serial: &str, queues: u16) -> DeviceConfig {
    DeviceConfig::Block(BlockConfig {
        fd: file,
        kind,
        read_only,
        cache: CacheMode::Writeback,
        serial: serial.to_owned(),
        queues,
    })
}

fn block_handle(guest: &Guest, at: usize) -> BlockHandle {
    match &guest.cell.devices()[at] {
        DeviceHandle::Block(handle) => handle.clone(),
        _ => panic!("device {at} is no disk"),
    }
}

#[test]
fn disks() {
    let host = host();
    let before = ProcessFootprint::of_this();
    let image = Scratch::new("disk", &pattern(8 * MIB, 0));
    let fixed = Scratch::new("read-only", &pattern(MIB, 3));
    let backing = Scratch::new("loop", &pattern(8 * MIB, 5));
    let on_host = LoopDevice::new(&backing.open(true));
    // The second quarter of a disk becomes a copy of the first, one half by each processor; the third is discarded, the
    // fourth filled with zeroes.
    let script = r#"
        for disk in vda vdb vdc; do
            say $disk $(cat /sys/block/$disk/serial) $(cat /sys/block/$disk/size) $(cat /sys/block/$disk/ro) \
                $(ls /sys/block/$disk/mq | wc -l)
        done
        for disk in vda vdc; do
            for half in 0 1; do
                taskset $((half + 1)) dd if=/dev/$disk of=/dev/$disk bs=64k count=16 skip=$((half * 16)) \
                    seek=$((half * 16 + 32)) conv=notrunc,fsync 2>&1 | tail -n 1 &
            done
            wait
            /sbin/blkdiscard -o $((4 << 20)) -l $((2 << 20)) /dev/$disk && say discarded $disk
            /sbin/blkdiscard -z -o $((6 << 20)) -l $((2 << 20)) /dev/$disk && say zeroed $disk
            sync
        done
        dd if=/dev/zero of=/dev/vdb bs=4k count=1 conv=notrunc,fsync || say refused
        dd if=/dev/vdb of=/copy bs=64k && say sum $(sha256sum </copy)
    "#;
    let mut init = Init::new("disks", script);
    // Busybox has no -z.
    for (name, content) in with_libraries("/usr/sbin/blkdiscard") {
        init.add(name, content);
    }
    let loop_file = on_host.open();
    let guest = Guest::start(&host, &init, |config| {
        config.vcpus = 2;
        config.devices = vec![
            disk(
                image.open(true).into(),
                DiskKind::File,
                false,
                "first-0123456789abcd",
                2,
            ),
            disk(fixed.open(false).into(), DiskKind::File, true, "fixed", 1),
            disk(loop_file, DiskKind::BlockDevice, false, "loop", 2),
        ];
    });
    assert_eq!(guest.heard("vda"), "first-0123456789abcd 16384 0 2");
    assert_eq!(guest.heard("vdb"), "fixed 2048 1 1");
    assert_eq!(guest.heard("vdc"), "loop 16384 0 2");
    for what in ["discarded", "zeroed"] {
        // Twice, in this order: what is heard is the first that has not been heard.
        assert_eq!(guest.heard(what), "vda", "{what}");
    }
    let sum = guest.heard("sum");
    assert!(guest.has_said("refused"), "{}", guest.console());
    assert!(
        guest.has_said("discarded vdc") && guest.has_said("zeroed vdc"),
        "{}",
        guest.console()
    );
    for at in [0, 2] {
        let handle = block_handle(&guest, at);
        let metrics = handle.metrics();
        assert!(metrics.read_bytes.get() >= 2 * MIB as u64);
        assert!(metrics.written_bytes.get() >= 2 * MIB as u64);
        assert!(metrics.flushes.get() > 0 && metrics.discards.get() >= 2);
        assert_eq!(metrics.failed_requests.get(), 0, "disk {at}");
        assert_eq!(metrics.bad_chains.get(), 0);
    }
    assert_eq!(guest.ends(), StopReason::Reset);

    let written = fs::read(&fixed.0).unwrap();
    assert!(written == pattern(MIB, 3), "a read-only disk was written");
    let host_sum = std::process::Command::new("sha256sum")
        .arg(&fixed.0)
        .output()
        .unwrap();
    let host_sum = String::from_utf8(host_sum.stdout).unwrap();
    assert_eq!(sum.split(' ').next(), host_sum.split(' ').next());

    for (file, seed) in [(&image, 0), (&backing, 5)] {
        let content = fs::read(&file.0).unwrap();
        let original = pattern(8 * MIB, seed);
        assert!(
            content[..2 * MIB] == original[..2 * MIB],
            "what was read has changed"
        );
        assert!(
            content[2 * MIB..4 * MIB] == original[..2 * MIB],
            "what was written is not there"
        );
        assert!(content[4 * MIB..].iter().all(|&byte| byte == 0));
        // What was discarded takes no room on the host any more; zeroes may.
        assert!(file.allocated() <= 6 * MIB as u64, "{} bytes", file.allocated());
    }
    drop((guest, on_host));
    before.assert_no_more();
}

#[test]
fn console_both_ways_and_its_size() {
    let host = host();
    let before = ProcessFootprint::of_this();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut ours_out = ours.try_clone().unwrap();
    let mut ours_in = ours;
    ours_in.set_read_timeout(Some(PATIENCE)).unwrap();
    let script = r#"
        exec 3<>/dev/hvc0
        stty -F /dev/hvc0 raw -echo
        say size $(stty -F /dev/hvc0 size)
        until [ "$(stty -F /dev/hvc0 size)" = "50 200" ]; do usleep 10000; done
        say resized $(stty -F /dev/hvc0 size)
        read -r line <&3
        echo "you said: $line" >&3
        # More than any buffer on the way, both ways.
        head -c 200000 <&3 >/received
        say sum $(sha256sum </received)
        cat /received >&3
        usleep 100000
    "#;
    let guest = Guest::start(&host, &Init::new("console", script), |config| {
        config.devices = vec![DeviceConfig::Console {
            input: Some(theirs.try_clone().unwrap().into()),
            output: Some(theirs.into()),
            size: Some(TerminalSize {
                columns: 132,
                rows: 43,
            }),
        }];
    });
    assert_eq!(guest.heard("size"), "43 132");
    let DeviceHandle::Console(console) = &guest.cell.devices()[0] else {
        panic!("no console")
    };
    console.resize(TerminalSize {
        columns: 200,
        rows: 50,
    });
    assert_eq!(guest.heard("resized"), "50 200");
    ours_out.write_all(b"hello\n").unwrap();
    let mut line = [0; 16];
    ours_in.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"you said: hello\n");
    let text: Vec<u8> = pattern(200_000, 1).iter().map(|byte| b'a' + byte % 26).collect();
    let sent = text.clone();
    let writer = std::thread::spawn(move || ours_out.write_all(&sent).unwrap());
    let mut back = vec![0; text.len()];
    ours_in.read_exact(&mut back).unwrap();
    writer.join().unwrap();
    assert!(
        back == text,
        "what came back differs; the guest has {}",
        guest.heard("sum")
    );
    assert_eq!(guest.ends(), StopReason::Reset);
    drop((guest, ours_in));
    before.assert_no_more();
}

/// The kernel's own words go through the virtio console when it is told so, the last ones before its end included.
#[test]
fn a_panic_on_the_virtio_console() {
    let host = host();
    let guest = Guest::start(&host, &Init::new("panic", ""), |config| {
        config.devices = vec![DeviceConfig::Console {
            input: None,
            output: None,
            size: None,
        }];
        config.serial = None;
        guest::command_line(config, "console=hvc0 rdinit=/nonexistent");
    });
    let StopReason::Panic { message } = guest.ends() else {
        panic!("no panic: {}", guest.console())
    };
    assert!(message.contains("Unable to mount root fs"), "{message}");
}

fn balloon_handle(guest: &Guest) -> &BalloonHandle {
    match &guest.cell.devices()[0] {
        DeviceHandle::Balloon(handle) => handle,
        _ => panic!("no balloon"),
    }
}

#[test]
fn memory_goes_back_to_the_host() {
    const FILLED: u64 = 64 << 20;
    let host = host();
    let before = ProcessFootprint::of_this();
    let script = r#"
        available() { awk '/^MemAvailable/ { print int($2 / 1024) }' /proc/meminfo; }
        mount -t tmpfs tmpfs /tmp
        dd if=/dev/zero of=/tmp/fill bs=1M count=64
        say filled
        read -r go
        rm /tmp/fill
        say freed
        read -r go
        # The balloon is full. What is being reported is not free for a moment.
        until [ $(available) -lt 140 ]; do usleep 10000; done
        say less $(available)
        read -r go
        # It is empty again, and what was given away can be used.
        # Up to an eighth of the RAM may lie in the allocator's per-processor lists.
        until [ $(available) -gt 180 ]; do usleep 10000; done
        say more $(available)
        yes | head -c $((40 << 20)) >/tmp/one
        cp /tmp/one /tmp/two
        cmp /tmp/one /tmp/two && say same
        read -r go
    "#;
    let guest = Guest::start(&host, &Init::new("balloon", script), |config| {
        config.memory_mib = 256;
        config.devices = vec![DeviceConfig::Balloon { deflate_on_oom: true }];
    });
    let resident = || guest.cell.resident_ram().unwrap();
    guest.heard("filled");
    let full = resident();
    assert!(full >= FILLED, "{full} bytes");

    // Free page reporting: nobody asks for it.
    guest.go();
    guest.heard("freed");
    eventually("the freed memory on the host", || {
        (resident() + FILLED * 3 / 4 <= full).then_some(())
    });
    let balloon = balloon_handle(&guest);
    assert!(balloon.metrics().reported_pages.get() * PAGE_SIZE >= FILLED / 2);
    println!(
        "resident: {} MiB full, {} MiB after free page reporting",
        full >> 20,
        resident() >> 20
    );

    let target = u32::try_from((100 << 20) / PAGE_SIZE).unwrap();
    balloon.set_target(target);
    eventually("a full balloon", || (balloon.actual() == target).then_some(()));
    guest.go();
    guest.heard("less");
    assert!(balloon.metrics().inflated_pages.get() >= u64::from(target));
    // What is in the balloon cannot be on the host.
    assert!(resident() <= (256 - 100) << 20, "{} bytes", resident());

    balloon.set_target(0);
    eventually("an empty balloon", || (balloon.actual() == 0).then_some(()));
    assert!(balloon.metrics().deflated_pages.get() >= u64::from(target));
    guest.go();
    guest.heard("more");
    guest.heard("same");
    assert!(resident() >= FILLED, "{} bytes", resident());
    assert_eq!(balloon.metrics().bad_requests.get(), 0);
    guest.go();
    assert_eq!(guest.ends(), StopReason::Reset);
    drop(guest);
    before.assert_no_more();
}

#[test]
fn entropy() {
    let host = host();
    let script = r#"
        say source $(cat /sys/class/misc/hw_random/rng_current)
        for n in 1 2; do say bytes $(head -c 5000 /dev/hwrng | sha256sum); done
        head -c 5000 /dev/hwrng | wc -c | { read -r count; say count $count; }
    "#;
    let guest = Guest::start(&host, &Init::new("rng", script), |config| {
        config.devices = vec![DeviceConfig::Rng];
    });
    assert_eq!(guest.heard("source"), "virtio_rng.0");
    assert_eq!(guest.heard("count"), "5000");
    assert_ne!(guest.heard("bytes"), guest.heard("bytes"));
    assert_eq!(guest.ends(), StopReason::Reset);
}

/// A kernel that halts says so to nobody but its console, and all processors stop; an idle one looks much the same.
#[test]
fn a_kernel_that_halts_is_told_from_an_idle_one() {
    let host = host();
    let two = |config: &mut cloister_vmm::CellConfig| config.vcpus = 2;
    let idle = Guest::start(&host, &Init::new("idle", "say ready\nread -r go\n"), two);
    idle.heard("ready");
    for _ in 0..3 {
        let halts = Guest::start(&host, &Init::new("halts", "halt -f\nsay not\n"), two);
        assert_eq!(halts.ends(), StopReason::AllHalted, "{}", halts.console());
        assert!(halts.console().contains("System halted"), "{}", halts.console());
    }
    println!(
        "the idle guest was kicked {} times",
        idle.cell.stats().interrupted
    );
    idle.go();
    idle.heard("end");
    assert_eq!(idle.ends(), StopReason::Reset);
}

/// A disk's size is what the host says it is, while the guest runs.
#[test]
fn a_disk_grows() {
    let host = host();
    let image = Scratch::new("grows", &pattern(MIB, 0));
    let script = r#"
        say size $(cat /sys/block/vda/size)
        until [ "$(cat /sys/block/vda/size)" = 4096 ]; do usleep 10000; done
        dd if=/dev/vda of=/dev/vda bs=4k count=1 seek=511 conv=notrunc,fsync && say written
    "#;
    let guest = Guest::start(&host, &Init::new("grows", script), |config| {
        config.devices = vec![disk(image.open(true).into(), DiskKind::File, false, "", 1)];
    });
    assert_eq!(guest.heard("size"), "2048");
    let file = image.open(true);
    file.set_len(2 * MIB as u64).unwrap();
    assert_eq!(
        block_handle(&guest, 0).refresh_capacity().unwrap(),
        2 * MIB as u64
    );
    guest.heard("written");
    assert_eq!(guest.ends(), StopReason::Reset);
    let mut last = vec![0; 4096];
    file.read_exact_at(&mut last, 2 * MIB as u64 - 4096).unwrap();
    assert!(last == pattern(4096, 0));
}
