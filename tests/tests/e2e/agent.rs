// SPDX-License-Identifier: Apache-2.0
//! The agent as PID 1 of a real VM (QEMU microvm, vhost-vsock): what a process in namespaces cannot show.
//!
//! Needs KVM, /dev/vhost-vsock and root: `ci/e2e` runs it where they are. CLOISTER_GUEST is the folder of the static agent
//! and the guest kernel (default: target/guest).
#[path = "../../../guest-agent/tests/harness/mod.rs"]
pub mod harness;

use cloister_protocol::pod::{
    ConfigureRequest, ContainerSpec, DnsFiles, InfoRequest, Interface, MountRequest, OnlineRequest,
    PowerOffRequest, Route, UnmountRequest,
};
use cloister_protocol::protobuf::{Message, MessageField};
use cloister_protocol::task::{
    CreateTaskRequest, KillRequest, Metrics, PauseRequest, StatsRequest, UpdateTaskRequest,
};
use cloister_protocol::{AGENT_PACKAGE, RESOURCES_TYPE_URL, pack, protobuf::well_known_types::any::Any};
use cloister_sandbox_api::pod::seccomp;
use cloister_tests::e2e::guest_file;
use harness::{Bed, Streams, ctx, soon};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

/// Hands a profile over as the daemon does.
fn with_profile(request: CreateTaskRequest, profile: &Value) -> CreateTaskRequest {
    let profile = serde_json::from_value(profile.clone()).unwrap();
    let spec = ContainerSpec {
        oci: request.options.value.clone(),
        seccomp: MessageField::some(seccomp::translate(&profile).unwrap()),
        ..Default::default()
    };
    CreateTaskRequest {
        options: MessageField::some(pack(AGENT_PACKAGE, &spec).unwrap()),
        ..request
    }
}

#[tokio::test]
async fn a_pod_vm_from_boot_to_power_off() {
    let (agent, kernel) = (guest_file("cloister-agent"), guest_file("vmlinux"));
    let mut bed = Bed::in_vm(&agent, &kernel, 42).await;
    let none = Streams::default();
    println!(
        "ready: kernel {}, agent entered main at {} us, was ready {} us later",
        bed.ready.kernel,
        bed.ready.main_ns / 1000,
        (bed.ready.ready_ns - bed.ready.main_ns) / 1000
    );

    for step in &bed.ready.steps {
        println!("  {:>7} us  {}", (step.ns - bed.ready.main_ns) / 1000, step.name);
    }

    // The pod.
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    let configure = ConfigureRequest {
        hostname: "pod-1".into(),
        interfaces: vec![Interface {
            name: "lo".into(),
            mtu: 65536,
            addresses: vec!["10.9.8.7/32".into(), "fd00::7/128".into()],
            ..Default::default()
        }],
        routes: vec![
            Route {
                destination: "10.9.0.0/16".into(),
                interface: "lo".into(),
                ..Default::default()
            },
            Route {
                gateway: "10.9.1.1".into(),
                ..Default::default()
            },
        ],
        files: MessageField::some(DnsFiles {
            hosts: "127.0.0.1 localhost\n".into(),
            resolv_conf: "nameserver 10.9.1.1\n".into(),
            ..Default::default()
        }),
        sysctls: [("net.ipv4.ip_unprivileged_port_start".to_owned(), "0".to_owned())].into(),
        unix_time_ns: u64::try_from(now.as_nanos()).unwrap(),
        entropy: vec![7; 64],
        ..Default::default()
    };
    bed.pod.configure(ctx(), &configure).await.unwrap();
    // A second time changes nothing.
    bed.pod.configure(ctx(), &configure).await.unwrap();
    let info = bed.pod.info(ctx(), &InfoRequest::new()).await.unwrap();
    assert!(info.unix_time_ns >= configure.unix_time_ns);
    assert!(
        info.controllers.iter().any(|c| c == "memory"),
        "{:?}",
        info.controllers
    );
    println!(
        "agent RSS {} KiB, {} of {} KiB of memory available",
        info.agent_rss_bytes / 1024,
        info.memory_available_bytes / 1024,
        info.memory_total_bytes / 1024
    );
    assert_eq!(
        bed.pod
            .online(
                ctx(),
                &OnlineRequest {
                    cpus: 1,
                    ..Default::default()
                }
            )
            .await
            .unwrap()
            .cpus,
        1
    );
    let mount = MountRequest {
        type_: "tmpfs".into(),
        source: "tmpfs".into(),
        target: "/run/cloister/vol".into(),
        options: vec!["size=1m".into()],
        ..Default::default()
    };
    bed.pod.mount(ctx(), &mount).await.unwrap();
    let unmount = UnmountRequest {
        target: mount.target.clone(),
        ..Default::default()
    };
    bed.pod.unmount(ctx(), &unmount).await.unwrap();
    bed.pod.unmount(ctx(), &unmount).await.unwrap();

    // A container with limits, a profile, a bound file, network, and a root it has really moved to.
    let mut streams = bed.streams([false, true, true]);
    let script = "hostname 2>/dev/null; cat /proc/sys/kernel/hostname /etc/resolv.conf; cat /sys/fs/cgroup/memory.max; \
        cat /proc/self/mounts | head -1; chroot / true 2>&1; mkdir /tmp/no 2>&1; \
        mknod /tmp/kmsg c 1 11 && head -c 1 /tmp/kmsg 2>&1; mknod /tmp/zero c 1 5 && head -c 3 /tmp/zero | wc -c; echo done";
    let mut spec = bed.spec("c1", &["sh", "-c", script]);
    spec["linux"]["resources"] = json!({"memory": {"limit": 67_108_864, "swap": 67_108_864}, "cpu": {"shares": 512},
        "pids": {"limit": 100}, "devices": [{"allow": false, "access": "rwm"}]});
    spec["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({"type": "cgroup"}));
    for set in ["bounding", "effective", "permitted"] {
        let set = spec["process"]["capabilities"][set].as_array_mut().unwrap();
        set.push(json!("CAP_MKNOD"));
    }
    let profile = json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]});
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(
        json!({"destination": "/etc/resolv.conf", "type": "bind", "source": "/run/cloister/etc/resolv.conf",
        "options": ["rbind", "ro"]}),
    );
    mounts.push(json!({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]}));
    mounts.push(
        json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
        "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}),
    );
    let request = bed.create_request("c1", &spec, &streams, false);
    bed.task
        .create(ctx(), &with_profile(request, &profile))
        .await
        .unwrap();
    bed.start("c1", "").await.unwrap();
    assert_eq!(bed.wait("c1", "").await, 0);
    let text = streams.read_text(1).await;
    println!("{text}");
    assert!(text.contains("pod-1\nnameserver 10.9.1.1\n67108864\n"), "{text}");
    assert!(
        text.contains("Function not implemented"),
        "the seccomp profile did not hold: {text}"
    );
    // Devices may be made; which may be used is said by the rules.
    assert!(text.contains("/tmp/kmsg: Operation not permitted"), "{text}");
    assert!(text.ends_with("\n3\ndone\n"), "{text}");
    assert_eq!(streams.read_text(2).await, "");
    bed.delete("c1", "").await.unwrap();

    // An exec under the profile too, with and without "no new privileges".
    spec["process"]["args"] = json!(["sleep", "1000"]);
    let request = bed.create_request("c2", &spec, &none, false);
    bed.task
        .create(ctx(), &with_profile(request, &profile))
        .await
        .unwrap();
    bed.start("c2", "").await.unwrap();
    for (n, no_new_privileges) in [true, false].into_iter().enumerate() {
        let exec = format!("e{n}");
        let mut streams = bed.streams([false, true, false]);
        let mut process = harness::process(&["sh", "-c", "mkdir /tmp/no 2>&1; cat /proc/self/status"]);
        process["noNewPrivileges"] = json!(no_new_privileges);
        bed.exec_process("c2", &exec, &process, &streams, false)
            .await
            .unwrap();
        bed.start("c2", &exec).await.unwrap();
        let text = streams.read_text(1).await;
        assert!(text.contains("Function not implemented"), "{text}");
        // CHOWN, KILL, SETGID, SETUID and not SYS_ADMIN.
        assert!(text.contains("CapEff:\t00000000000000e1\n"), "{text}");
        bed.wait("c2", &exec).await;
        bed.delete("c2", &exec).await.unwrap();
    }

    // Limits change, statistics tell.
    let resources =
        serde_json::to_vec(&json!({"memory": {"limit": 33_554_432, "swap": 33_554_432}})).unwrap();
    let update = UpdateTaskRequest {
        id: "c2".into(),
        resources: MessageField::some(Any {
            type_url: RESOURCES_TYPE_URL.into(),
            value: resources,
            ..Default::default()
        }),
        ..Default::default()
    };
    bed.task.update(ctx(), &update).await.unwrap();
    let stats = bed
        .task
        .stats(
            ctx(),
            &StatsRequest {
                id: "c2".into(),
                ..Default::default()
            },
        )
        .await
        .unwrap();
    let metrics = Metrics::parse_from_bytes(&stats.stats.value).unwrap();
    assert_eq!(metrics.memory.usage_limit, 33_554_432);
    assert_eq!(metrics.pids.limit, 100);
    assert!(metrics.memory.usage > 0 && metrics.cpu.usage_usec > 0);

    // Too much memory: killed, and told.
    while bed.events.try_recv().is_ok() {}
    bed.exec(
        "c2",
        "hog",
        &[
            "sh",
            "-c",
            "x=$(head -c 200000000 /dev/zero | yes | head -c 200000000)",
        ],
        &none,
        false,
    )
    .await
    .unwrap();
    bed.start("c2", "hog").await.unwrap();
    bed.wait("c2", "hog").await;
    let mut topics = Vec::new();
    while !topics.iter().any(|t| t == "/tasks/oom") {
        topics.push(
            soon("out-of-memory event", bed.events.recv())
                .await
                .unwrap()
                .topic,
        );
    }

    // A terminal, frozen and killed.
    let mut streams = bed.streams([true, true, false]);
    bed.run("t", &["sh"], &streams, true).await;
    let mut stdin = streams.take(0).await;
    stdin.write_all(b"tty; echo over\n").await.unwrap();
    bed.task
        .pause(
            ctx(),
            &PauseRequest {
                id: "t".into(),
                ..Default::default()
            },
        )
        .await
        .unwrap();
    let kill = KillRequest {
        id: "t".into(),
        signal: 9,
        all: true,
        ..Default::default()
    };
    bed.task.kill(ctx(), &kill).await.unwrap();
    assert_eq!(bed.wait("t", "").await, 137);
    bed.delete("t", "").await.unwrap();

    // 8 MB through vsock, with the container still there when the power goes.
    let mut streams = bed.streams([false, true, false]);
    bed.exec(
        "c2",
        "flood",
        &["head", "-c", "8000000", "/dev/zero"],
        &streams,
        false,
    )
    .await
    .unwrap();
    bed.start("c2", "flood").await.unwrap();
    assert_eq!(streams.read_all(1).await.len(), 8_000_000);

    bed.pod.power_off(ctx(), &PowerOffRequest::new()).await.unwrap();
    let ended = tokio::task::spawn_blocking(move || bed.agent.wait());
    soon("end of the VM", ended).await.unwrap().unwrap();
}
