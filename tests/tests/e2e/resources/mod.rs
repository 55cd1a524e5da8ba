// SPDX-License-Identifier: Apache-2.0
//! What a pod has, and how it changes while it runs: processors, memory, disks, limits and what becomes of who exceeds
//! them, and what its containers share.

mod pod;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use cloister_devices::block::{BlockConfig, CacheMode, DiskKind};
use cloister_protocol::SHARED_PID_NS;
use cloister_protocol::events::TaskOOM;
use cloister_protocol::pod::{BlockRequest, BlockResponse, ConfigureRequest, InfoRequest, OnlineRequest};
use cloister_protocol::protobuf::Message as _;
use cloister_protocol::task::{Metrics, StatsRequest, UpdateTaskRequest};
use cloister_protocol::{RESOURCES_TYPE_URL, protobuf};
use cloister_tests::e2e::{PATIENCE, ProcessFootprint, eventually};
use cloister_vmm::{AttachError, Boot, CellConfig, CellHost, CellHostConfig, DeviceConfig, DeviceHandle};
use pod::{Pod, ctx};
use serde_json::json;

const MIB: u64 = 1 << 20;

fn host() -> CellHost {
    CellHost::new(CellHostConfig::default()).unwrap()
}

fn online(pod: &Pod, cpus: u32) -> u32 {
    let request = OnlineRequest {
        cpus,
        ..Default::default()
    };
    pod.wait(pod.pod.online(ctx(), &request)).unwrap().cpus
}

fn memory_total(pod: &Pod) -> u64 {
    pod.wait(pod.pod.info(ctx(), &InfoRequest::new()))
        .unwrap()
        .memory_total_bytes
}

#[test]
fn processors_come_and_go() {
    let host = host();
    let pod = Pod::start(&host, "cpus", |config| config.max_vcpus = 3);
    assert_eq!(pod.cell.vcpu_threads().len(), 1);
    assert_eq!(online(&pod, 0), 1);
    let sees = |id: &str, count: u32| {
        pod.check(
            id,
            &format!("test $($b grep -c ^processor /proc/cpuinfo) = {count}"),
            |_| {},
        );
    };
    sees("one", 1);
    // One by one: each is found without another one's help.
    assert_eq!(pod.cell.provide_vcpus(2).unwrap(), 2);
    assert_eq!(online(&pod, 2), 2);
    assert_eq!(pod.cell.provide_vcpus(3).unwrap(), 3);
    assert_eq!(online(&pod, 3), 3);
    sees("three", 3);
    assert_eq!(online(&pod, 1), 1);
    sees("one-again", 1);
    // What is offline costs nothing: the few are those of the looks themselves.
    let exits = || -> u64 {
        let stats = pod.cell.kvm_stats().unwrap();
        let last = stats.last().unwrap();
        last.iter()
            .filter(|stat| stat.name == "exits")
            .map(|stat| stat.value)
            .sum()
    };
    let before = exits();
    std::thread::sleep(Duration::from_secs(3));
    assert!(
        exits() - before < 10,
        "{} exits of a vCPU that is offline",
        exits() - before
    );
    assert_eq!(online(&pod, 2), 2);
    sees("two", 2);
    // More than there can be: what is there is the answer.
    assert_eq!(online(&pod, 9), 3);
    pod.stop();
}

/// A processor without work is not to be woken for work that a kernel makes for itself.
#[test]
fn a_container_that_rests_lets_the_processor_sleep() {
    let host = host();
    let pod = Pod::start(&host, "rests", |config| {
        let balloon = DeviceConfig::Balloon { deflate_on_oom: true };
        config.devices.extend([DeviceConfig::Rng, balloon]);
        if let Boot::Kernel(boot) = &mut config.boot {
            // Averages of pressure are asked for, and are work.
            boot.command_line = boot.command_line.replace("psi=1", "psi=0");
        }
    });
    let halts = || -> u64 {
        let stats = pod.cell.kvm_stats().unwrap();
        let halts = stats.iter().flatten().filter(|stat| stat.name == "halt_exits");
        halts.map(|stat| stat.value).sum()
    };
    pod.run("c", "exec $b sleep 100000", |_| {});
    // What the start has left to do.
    std::thread::sleep(Duration::from_secs(10));
    let before = halts();
    std::thread::sleep(Duration::from_secs(15));
    let woken = halts() - before;
    println!("woken {woken} times in 15 s");
    // Timers that wake each other once a second, with the ticks that follow, come to some 20.
    assert!(woken <= 8, "woken {woken} times in 15 s");
    pod.end("c");
    pod.stop();
}

/// Fair tasks have their share beside one that never rests: each processor's "fair server" starts when the two meet.
#[test]
fn a_real_time_process_leaves_time_to_others() {
    let host = host();
    let pod = Pod::start(&host, "real-time", |_| {});
    pod.run("hog", "while :; do :; done", |spec| {
        spec["process"]["scheduler"] = json!({"policy": "SCHED_FIFO", "priority": 10});
    });
    // The agent is no real-time process.
    for _ in 0..3 {
        assert!(memory_total(&pod) > 0);
    }
    pod.end("hog");
    pod.stop();
}

#[test]
fn memory_comes_and_goes() {
    let host = host();
    let pod = Pod::start(&host, "memory", |config| {
        config.devices.push(DeviceConfig::Mem { max_mib: 1024 });
    });
    let mem = pod.device(|handle| match handle {
        DeviceHandle::Mem(mem) => Some(mem.clone()),
        _ => None,
    });
    let before = memory_total(&pod);
    assert!(before < 256 * MIB);
    assert_eq!(mem.set_requested(500 * MIB + 1), 502 * MIB);
    assert_eq!(mem.wait(PATIENCE), 502 * MIB);
    // The last block may still be on its way to the allocator.
    let total = eventually("memory in use", || {
        let total = memory_total(&pod);
        (total > before + 480 * MIB).then_some(total)
    });
    assert!(total < before + 520 * MIB);
    // More than it had before.
    pod.check("uses-it", "$b dd if=/dev/zero bs=1M count=400 of=/dev/shm/x", |spec| {
        spec["mounts"][3] = json!({"destination": "/dev/shm", "type": "tmpfs", "source": "tmpfs", "options": ["size=450m"]});
    });
    assert!(pod.cell.resident_ram().unwrap() > 400 * MIB);
    assert_eq!(mem.set_requested(0), 0);
    let left = mem.wait(Duration::from_secs(60));
    assert!(left <= 128 * MIB, "{} MiB were not given back", left / MIB);
    assert!(mem.metrics().bad_requests.get() == 0);
    eventually("memory given back", || {
        (pod.cell.resident_ram().unwrap() < 256 * MIB + left).then_some(())
    });
    // And once more.
    assert_eq!(mem.set_requested(256 * MIB), 256 * MIB);
    assert_eq!(mem.wait(PATIENCE), 256 * MIB);
    pod.check("still-works", "true", |_| {});
    pod.stop();
}

#[test]
fn disks_come_and_go() {
    let host = host();
    // What is made once is there afterwards.
    Pod::start(&host, "first", |_| {}).stop();
    let bare = ProcessFootprint::of_this();
    let pod = Pod::start(&host, "disks", |config| {
        config.devices.extend([DeviceConfig::Slot, DeviceConfig::Slot]);
    });
    let disk = |text: &[u8], mib: u64| {
        let file = File::from(rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(mib * MIB).unwrap();
        file.write_all_at(text, 0).unwrap();
        file
    };
    let attach = |file: &File, read_only| {
        let config = BlockConfig {
            fd: file.try_clone().unwrap().into(),
            kind: DiskKind::File,
            read_only,
            cache: CacheMode::default(),
            serial: String::new(),
            queues: 1,
        };
        pod.cell.attach_block(config)
    };
    let slot_of = |slot: usize| u32::try_from(slot).unwrap();
    let tell = |slot: usize| {
        let slot = slot_of(slot);
        let request = BlockRequest {
            slot,
            ..Default::default()
        };
        pod.wait(pod.pod.attach_block(ctx(), &request))
    };
    let untell = |slot: usize| {
        let slot = slot_of(slot);
        let request = BlockRequest {
            slot,
            ..Default::default()
        };
        pod.wait(pod.pod.detach_block(ctx(), &request))
    };
    assert!(tell(1).is_err(), "nothing is there yet");
    let (first, second) = (disk(b"first disk", 8), disk(b"second disk", 16));
    let (slot, _) = attach(&first, false).unwrap();
    let found = tell(slot).unwrap();
    assert_eq!((slot, found.size_bytes), (1, 8 * MIB));
    let with = |found: &BlockResponse, access: &str| {
        let (major, minor) = (found.major, found.minor);
        let rules = json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "b", "major": major, "minor": minor, "access": access},
        ]);
        let device =
            json!({"path": "/dev/volume", "type": "b", "major": major, "minor": minor, "fileMode": 0o600});
        move |spec: &mut serde_json::Value| {
            spec["linux"]["devices"] = json!([device]);
            spec["linux"]["resources"]["devices"] = rules;
        }
    };
    let script = "$b head -c 10 /dev/volume | $b grep -q 'first disk' && \
        echo from the guest | $b dd of=/dev/volume bs=512 seek=4 conv=fsync";
    pod.check("first", script, with(&found, "rwm"));
    let mut text = [0; 14];
    first.read_exact_at(&mut text, 4 * 512).unwrap();
    assert_eq!(&text, b"from the guest");

    let (other, _) = attach(&second, true).unwrap();
    let read_only = tell(other).unwrap();
    assert_eq!((other, read_only.size_bytes), (2, 16 * MIB));
    let script = "$b head -c 11 /dev/volume | $b grep -q 'second disk' && \
        ! echo x | $b dd of=/dev/volume bs=512 conv=fsync";
    pod.check("second", script, with(&read_only, "rwm"));
    assert!(matches!(attach(&second, true), Err(AttachError::NoneFree)));

    untell(slot).unwrap();
    pod.cell.detach_block(slot).unwrap();
    assert!(matches!(
        pod.cell.detach_block(slot),
        Err(AttachError::NotAttached { slot: 1 })
    ));
    assert!(tell(slot).is_err(), "it is gone");
    assert!(pod.cell.detach_block(0).is_err(), "that is no slot");
    let (again, _) = attach(&second, false).unwrap();
    assert_eq!((again, tell(again).unwrap().size_bytes), (1, 16 * MIB));
    // Taken away without a word: the guest's requests fail, and it goes on.
    pod.cell.detach_block(again).unwrap();
    pod.check("lives", "true", |_| {});
    pod.stop();
    drop((first, second));
    bare.assert_no_more();
}

/// What a VM may be given later costs its boot little: exits, and memory that the guest takes.
#[test]
fn room_costs_little() {
    let host = host();
    let boot = |name: &str, adapt: fn(&mut CellConfig)| {
        let pod = Pod::start(&host, name, adapt);
        let exits = pod.cell.stats();
        let memory = memory_total(&pod);
        pod.stop();
        (
            exits.mmio_read + exits.mmio_write + exits.io_in + exits.io_out,
            memory,
        )
    };
    let plain = boot("plain", |_| {});
    let cost = |name: &str, adapt| {
        let (exits, memory) = boot(name, adapt);
        let cost = (
            exits.saturating_sub(plain.0),
            plain.1.saturating_sub(memory) >> 10,
        );
        eprintln!("{name}: {} exits, {} KiB", cost.0, cost.1);
        cost
    };
    let slots = cost("four-slots", |config| {
        config.devices.extend((0..4).map(|_| DeviceConfig::Slot));
    });
    let mem = cost("memory-device", |config| {
        config.devices.push(DeviceConfig::Mem { max_mib: 16 << 10 });
    });
    let vcpus = cost("seven-more-vcpus", |config| config.max_vcpus = 8);
    assert!(slots.0 < 400 && slots.1 < 1024, "{slots:?}");
    assert!(mem.0 < 600 && mem.1 < 1024, "{mem:?}");
    assert!(vcpus.0 < 400 && vcpus.1 < 7 * 512, "{vcpus:?}");
}

/// What snapshotters of block devices and images hand over: mounted on the host, and gone with its last descriptor.
#[test]
fn disks_and_images_are_mounted_as_descriptors() {
    use cloister_sandbox_api::runtime::image_mount;
    use std::process::Command;
    let dir = std::env::temp_dir().join(format!("e2e-images-{}", std::process::id()));
    let tree = dir.join("tree");
    std::fs::create_dir_all(&tree).unwrap();
    std::fs::write(tree.join("file"), "from an image").unwrap();
    let run = |program: &str, args: &[&str]| {
        let mut command = Command::new(program);
        command.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin").args(args);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{program}: {output:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    let path = |name: &str| dir.join(name).display().to_string();
    let file = File::create(path("ext4")).unwrap();
    file.set_len(32 * MIB).unwrap();
    run("mkfs.ext4", &["-q", "-d", &path("tree"), &path("ext4")]);
    run("mkfs.erofs", &["--quiet", &path("erofs"), &path("tree")]);
    let loops = || run("losetup", &["--all"]);
    let before = loops();
    let options = |options: &[&str]| {
        options
            .iter()
            .map(|&option| option.to_owned())
            .collect::<Vec<_>>()
    };
    let mount = |kind: &str, source: &str, given: &[&str]| {
        image_mount::mount(kind, std::path::Path::new(source), &options(given))
    };
    let at = |root: &std::os::fd::OwnedFd, name: &str| {
        use std::os::fd::AsRawFd;
        format!("/proc/self/fd/{}/{name}", root.as_raw_fd())
    };
    let root = mount("ext4", &path("ext4"), &["loop", "rw", "noatime"]).unwrap();
    assert_eq!(
        std::fs::read_to_string(at(&root, "file")).unwrap(),
        "from an image"
    );
    std::fs::write(at(&root, "new"), "written").unwrap();
    drop(root);
    // On a device, this time, and not to be changed.
    let device = run("losetup", &["--find", "--show", &path("ext4")]);
    let root = mount("ext4", &device, &["ro"]).unwrap();
    assert_eq!(std::fs::read_to_string(at(&root, "new")).unwrap(), "written");
    assert!(std::fs::write(at(&root, "more"), "").is_err());
    drop(root);
    run("losetup", &["--detach", &device]);
    let root = mount("erofs", &path("erofs"), &["loop"]).unwrap();
    assert_eq!(
        std::fs::read_to_string(at(&root, "file")).unwrap(),
        "from an image"
    );
    drop(root);
    assert!(mount("ext4", &path("erofs"), &["loop"]).is_err());
    assert!(mount("ext4", &path("ext4"), &["loop", "no-such-option"]).is_err());
    eventually("loop devices gone", || (loops() == before).then_some(()));
    std::fs::remove_dir_all(dir).unwrap();
}

fn metrics(pod: &Pod, id: &str) -> Metrics {
    let request = StatsRequest {
        id: id.into(),
        ..Default::default()
    };
    let stats = pod.wait(pod.task.stats(ctx(), &request)).unwrap();
    Metrics::parse_from_bytes(&stats.stats.value).unwrap()
}

#[test]
fn limits_hold_and_can_be_changed() {
    let host = host();
    let mut pod = Pod::start(&host, "limits", |_| {});
    pod.run("oom", "$b head -c 100000000 /dev/zero | $b tail", |spec| {
        spec["linux"]["resources"] =
            json!({"memory": {"limit": 16 * MIB}, "unified": {"memory.oom.group": "1"}});
    });
    assert_eq!(pod.exit("oom"), 137);
    assert!(metrics(&pod, "oom").memory_events.oom_kill > 0);
    let mut topics = Vec::new();
    while topics.last().is_none_or(|topic| topic != "/tasks/exit") {
        let event = pod.event();
        if event.topic == "/tasks/oom" {
            let oom = TaskOOM::parse_from_bytes(&event.event.value).unwrap();
            assert_eq!(oom.container_id, "oom");
        }
        topics.push(event.topic);
    }
    // One for each time that the kernel was seen to kill.
    topics.dedup();
    // The reason before the end that it explains.
    assert_eq!(
        topics,
        ["/tasks/create", "/tasks/start", "/tasks/oom", "/tasks/exit"]
    );
    pod.delete("oom");

    let script = "$b dd if=/dev/zero of=/tmp/x bs=1M count=8 && while $b sleep 1; do :; done";
    pod.run("c", script, |spec| {
        spec["linux"]["resources"] = json!({"memory": {"limit": 64 * MIB}, "cpu": {"quota": 20000, "period": 100000},
            "pids": {"limit": 20}});
    });
    let before = metrics(&pod, "c");
    assert_eq!((before.memory.usage_limit, before.pids.limit), (64 * MIB, 20));
    assert!(before.memory.usage > 0 && before.cpu.usage_usec > 0 && before.pids.current >= 1);
    assert!(before.cpu.psi.is_some() && before.memory.psi.is_some(), "psi=1");
    let update = UpdateTaskRequest {
        id: "c".into(),
        resources: protobuf::MessageField::some(protobuf::well_known_types::any::Any {
            type_url: RESOURCES_TYPE_URL.into(),
            value: serde_json::to_vec(
                &json!({"memory": {"limit": 96 * MIB}, "cpu": {"quota": 50000, "period": 100000,
                "shares": 512}}),
            )
            .unwrap(),
            ..Default::default()
        }),
        ..Default::default()
    };
    pod.wait(pod.task.update(ctx(), &update)).unwrap();
    assert_eq!(metrics(&pod, "c").memory.usage_limit, 96 * MIB);
    pod.end("c");
    pod.stop();
}

#[test]
fn containers_share_what_their_specs_say() {
    let host = host();
    let pod = Pod::start(&host, "sharing", |_| {});
    let sysctls = [
        ("net.ipv4.ip_unprivileged_port_start", "0"),
        ("kernel.shm_rmid_forced", "1"),
        ("kernel.shmmni", "1234"),
    ];
    let configure = ConfigureRequest {
        hostname: "pod-1".into(),
        sysctls: sysctls.map(|(key, value)| (key.into(), value.into())).into(),
        shm_bytes: 8 * MIB,
        ..Default::default()
    };
    pod.wait(pod.pod.configure(ctx(), &configure)).unwrap();
    let namespaces = |namespaces: serde_json::Value| {
        move |spec: &mut serde_json::Value| spec["linux"]["namespaces"] = namespaces
    };
    let shared = json!([{"type": "pid", "path": SHARED_PID_NS}, {"type": "mount"}]);
    let first = pod.run(
        "a",
        "echo text >/dev/shm/note; while $b sleep 1; do :; done",
        namespaces(shared.clone()),
    );
    eventually("a process", || {
        let script = "test $($b cat /proc/1/comm) = pause && test -s /dev/shm/note && \
            $b grep -q '[s]leep' /proc/[0-9]*/cmdline && test $($b hostname) = pod-1";
        pod.run("b", script, namespaces(shared.clone()));
        let found = pod.exit("b") == 0;
        pod.delete("b");
        found.then_some(())
    });
    let values = "test $($b cat /proc/sys/net/ipv4/ip_unprivileged_port_start) = 0 && \
        test $($b cat /proc/sys/kernel/shmmni) = 1234 && test $($b cat /proc/sys/kernel/shm_rmid_forced) = 1 && \
        $b df -k /dev/shm | $b grep -q ' 8192 '";
    pod.check("values", values, |_| {});
    // An IPC namespace of its own has the kernel's values.
    let own = json!([{"type": "ipc"}, {"type": "pid"}, {"type": "mount"}]);
    pod.check(
        "own",
        "test $($b cat /proc/sys/kernel/shmmni) = 4096 && test $$ = 1",
        namespaces(own),
    );
    // What a debugger's container does: the target's processes, by the number that the host knows.
    let target = json!([{"type": "pid", "path": format!("/proc/{first}/ns/pid")}, {"type": "mount"}]);
    pod.check("debug", "test $($b cat /proc/1/comm) = pause", namespaces(target));
    pod.end("a");
    pod.check(
        "alone",
        "! $b grep -q '[s]leep' /proc/[0-9]*/cmdline",
        namespaces(shared),
    );
    pod.stop();
}
