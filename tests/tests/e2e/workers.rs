// SPDX-License-Identifier: Apache-2.0
//! Pods in workers: processes of their own, whose end is their pods' end and nobody else's, and which the daemon's end is not.

use cloister_tests::cri::{Container, End, Node, Outcome, Pod, Runtime, api, ensure, eventually, script};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// A pod with a container that counts aloud.
async fn talker(runtime: &Runtime) -> Outcome<Container> {
    let pod = Pod::run(runtime, Pod::config(runtime)).await?;
    let talker = pod
        .start(script(
            "i=0; while sleep 0.5; do i=$((i + 1)); echo line $i; done",
        ))
        .await?;
    talker.says("line 2").await?;
    Ok(talker)
}

/// What a pod's VM is only once.
async fn identity(container: &Container) -> Outcome<String> {
    let said = container
        .exec_script("cat /proc/sys/kernel/random/boot_id; cut -d' ' -f22 /proc/1/stat")
        .await?;
    said.good()
}

async fn goes_on(container: &Container) -> Outcome {
    let lines = container.log_lines()?.len();
    eventually("more lines in the log", async || {
        Ok((container.log_lines()?.len() > lines + 1).then_some(()))
    })
    .await
}

async fn is_over(container: &Container) -> Outcome {
    eventually("the end of a pod", async || {
        let state = container.pod.status().await?.state();
        Ok((state == api::PodSandboxState::SandboxNotready).then_some(()))
    })
    .await?;
    let status = container.ended().await?;
    // What containerd says of a task whose connection broke.
    ensure(
        status.exit_code == 255 && status.finished_at > 0,
        format_args!("{status:?}"),
    )
}

async fn is_ready(pod: &Pod) -> Outcome {
    let status = pod.status().await?;
    ensure(
        status.state() == api::PodSandboxState::SandboxReady,
        format_args!("{status:?}"),
    )
}

/// The process that hosts a pod.
pub fn worker_of(node: &Node, pod: &Pod) -> u32 {
    let about = node.admin("/daemon").unwrap();
    let workers = about["workers"].as_array().unwrap();
    let has = |worker: &&Value| {
        let pods = worker["pods"].as_array().unwrap();
        pods.iter().any(|id| id == pod.id.as_str())
    };
    let found = workers.iter().find(has).unwrap_or_else(|| panic!("{about}"));
    u32::try_from(found["pid"].as_u64().unwrap()).unwrap()
}

fn kill(pid: u32) {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
}

fn cgroup_of(pod: &Pod) -> PathBuf {
    let parent = &pod.config.linux.as_ref().unwrap().cgroup_parent;
    Path::new("/sys/fs/cgroup")
        .join(parent.strip_prefix('/').unwrap())
        .join(format!("cloister-{}", pod.id))
}

/// A value of a file of `key value` lines.
fn field(file: &Path, key: &str) -> u64 {
    let text = fs::read_to_string(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// What the pod takes is charged to its cgroup, and its process is there.
fn is_charged(pod: &Pod, pid: u32) {
    if !Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        eprintln!("no cgroup v2 here: charges were not looked at");
        return;
    }
    let cgroup = cgroup_of(pod);
    // KVM has a thread of the kernel there as well.
    let inside = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap();
    assert!(inside.lines().any(|line| line == pid.to_string()), "{inside}");
    let memory: u64 = fs::read_to_string(cgroup.join("memory.current"))
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let guest = field(&cgroup.join("memory.stat"), "shmem ");
    let cpu = field(&cgroup.join("cpu.stat"), "usage_usec ");
    let pss = |name| {
        field(
            &Path::new("/proc").join(pid.to_string()).join("smaps_rollup"),
            name,
        )
    };
    eprintln!(
        "a pod in a worker of its own: charged {} KiB, of it {} KiB shared memory (the guest's RAM), {} ms of CPU; the process: PSS {} KiB = anonymous {} + files {} + shared memory {}",
        memory >> 10,
        guest >> 10,
        cpu / 1000,
        pss("Pss:"),
        pss("Pss_Anon:"),
        pss("Pss_File:"),
        pss("Pss_Shmem:"),
    );
    assert!(guest > 20 << 20 && memory > guest, "{memory} {guest}");
    assert!(cpu > 100_000, "{cpu}");
}

/// A pod whose containers want all that they may have, under the limit that a kubelet sets for them and the overhead.
async fn fits_its_limit(runtime: &Runtime) -> Outcome {
    const LIMIT: i64 = 128 << 20;
    const OVERHEAD: i64 = 64 << 20;
    let memory = |bytes| {
        Some(api::LinuxContainerResources {
            memory_limit_in_bytes: bytes,
            ..Default::default()
        })
    };
    let mut config = Pod::config(runtime);
    if let Some(linux) = &mut config.linux {
        linux.resources = memory(LIMIT);
        linux.overhead = memory(OVERHEAD);
    }
    let pod = Pod::run(runtime, config).await?;
    let parent = cgroup_of(&pod);
    let parent = parent.parent().unwrap();
    let limited = fs::write(parent.join("memory.max"), (LIMIT + OVERHEAD).to_string());
    ensure(limited.is_ok() || !parent.exists(), format_args!("{limited:?}"))?;
    // All of the VM's memory: what is read stays in the guest's page cache as well.
    let mut config = script(
        "find /usr -xdev -type f -size +100k -exec cat {} + | head -c 60000000 >/dev/null; dd if=/dev/zero of=/dev/null count=1 bs=100M",
    );
    if let Some(linux) = &mut config.linux {
        linux.resources = memory(LIMIT);
    }
    pod.output(config).await?.good()?;
    is_ready(&pod).await?;
    if parent.exists() {
        let peak = fs::read_to_string(parent.join("memory.peak")).unwrap_or_default();
        let events = fs::read_to_string(parent.join("memory.events"))?;
        eprintln!(
            "a pod of 128 MiB and 64 MiB of overhead: at most {} bytes; {events:?}",
            peak.trim()
        );
        ensure(events.contains("oom_kill 0\n"), &events)?;
    }
    pod.remove().await
}

/// What operators and Prometheus see.
fn is_seen(node: &Node, talker: &Container) {
    let id = &talker.pod.id;
    let pods = node.admin("/pods").unwrap();
    let listed = pods
        .as_array()
        .unwrap()
        .iter()
        .find(|pod| pod["id"] == id.as_str());
    let listed = listed.unwrap_or_else(|| panic!("{pods}"));
    assert_eq!(listed["phase"], "ready");
    assert_eq!(listed["containers"][0]["id"], talker.id.as_str());
    assert!(listed["memory_used"].as_u64().unwrap() > 1 << 20, "{listed}");
    for args in [
        &["inspect", id][..],
        &["ps"],
        &["top", "--no-stream", id],
        &["exec", &talker.id, "true"],
        &["logs", &talker.id],
        &["console", id],
        &["events", "--no-follow", id],
    ] {
        let output = node.cloister(args);
        assert!(
            output.status.success() && (matches!(args[0], "exec" | "console") || !output.stdout.is_empty()),
            "{args:?}: {output:?}"
        );
    }
    let text = node.metrics().unwrap();
    let ready = "cloister_pods{sandboxer=\"cloister-worker\",state=\"ready\"} ";
    let ready = text.lines().find_map(|line| line.strip_prefix(ready)).unwrap();
    assert!(ready.parse::<f64>().unwrap() >= 1.0, "{text}");
    assert!(
        text.contains(&format!("cloister_pod_memory_bytes{{id=\"{id}\"")),
        "{text}"
    );
    let mut types: Vec<&str> = text.lines().filter(|line| line.starts_with("# TYPE")).collect();
    let all = types.len();
    types.sort_unstable();
    types.dedup();
    assert_eq!(types.len(), all, "a family is there once: {text}");
}

fn walk(node: &mut Node) -> Outcome {
    let (one, two) = (node.runtime("cloister-worker"), node.runtime("cloister-workers"));
    let begin = Instant::now();
    let step = |what: &str| eprintln!("{what}: {:.1?}", begin.elapsed());
    // The first pod leaves what is made once: the bridge, the files of its addresses.
    node.block_on(async {
        let first = Pod::run(&one, Pod::config(&one)).await?;
        first.output(script("true")).await?.good()?;
        first.remove().await
    })?;
    step("a first pod");
    let (host, _) = node.footprint();

    let [first, second] = node.block_on(async {
        Ok::<_, cloister_tests::cri::Failure>([talker(&one).await?, talker(&one).await?])
    })?;
    let pids = [worker_of(node, &first.pod), worker_of(node, &second.pod)];
    ensure(pids[0] != pids[1], "a worker each")?;
    step("two pods");
    let before = node.block_on(identity(&first))?;
    let stats = node.block_on(first.stats())?;
    ensure(
        stats.memory.is_some_and(|memory| memory.usage_bytes.is_some()),
        "no statistics",
    )?;
    is_charged(&first.pod, pids[0]);
    is_seen(node, &first);
    step("charged and seen");

    // The daemon crashes: nothing happens to them, not even for those who ask meanwhile.
    node.end("cloisterd", End::Killed);
    node.block_on(async {
        let said = first.exec(&["echo", "without a daemon"]).await?;
        ensure(said.stdout == "without a daemon\n", format_args!("{said:?}"))?;
        goes_on(&first).await
    })?;
    let output = node.cloister(&["exec", &first.id, "echo", "the same"]);
    ensure(output.stdout == b"the same\n", format_args!("{output:?}"))?;
    node.start_again("cloisterd");
    ensure(worker_of(node, &first.pod) == pids[0], "it is found again")?;
    node.block_on(async {
        // containerd dials it again.
        eventually("an answer", async || Ok(first.pod.status().await.ok())).await?;
        for pod in [&first.pod, &second.pod] {
            is_ready(pod).await?;
        }
        ensure(identity(&first).await? == before, "another VM")?;
        goes_on(&first).await?;
        first.pod.output(script("true")).await?.good()
    })?;
    is_seen(node, &first);
    step("the daemon was killed");

    // It is asked to end, as by an upgrade.
    node.end("cloisterd", End::Asked);
    node.start_again("cloisterd");
    node.block_on(async {
        eventually("an answer", async || Ok(first.pod.status().await.ok())).await?;
        is_ready(&first.pod).await?;
        ensure(identity(&first).await? == before, "another VM")
    })?;
    let (_, daemon) = node.footprint();
    step("the daemon was restarted");

    // A worker crashes.
    kill(pids[0]);
    node.block_on(async {
        is_over(&first).await?;
        is_ready(&second.pod).await?;
        goes_on(&second).await?;
        first.pod.remove().await?;
        second.pod.remove().await
    })?;
    step("a worker was killed");
    host.assert_unchanged();
    daemon.assert_no_more();

    // Two in a worker, and one that finds no room.
    let three = node.block_on(async {
        let mut three = Vec::new();
        for _ in 0..3 {
            three.push(talker(&two).await?);
        }
        Ok::<_, cloister_tests::cri::Failure>(three)
    })?;
    let pids: Vec<u32> = three.iter().map(|talker| worker_of(node, &talker.pod)).collect();
    ensure(pids[0] == pids[1] && pids[1] != pids[2], format_args!("{pids:?}"))?;
    node.block_on(async {
        three[0].pod.remove().await?;
        goes_on(&three[1]).await
    })?;
    kill(pids[2]);
    node.block_on(async {
        is_over(&three[2]).await?;
        goes_on(&three[1]).await?;
        three[1].pod.remove().await?;
        three[2].pod.remove().await
    })?;
    step("pods that share a worker");
    host.assert_unchanged();
    node.block_on(fits_its_limit(&one))?;
    step("a pod with a limit");
    host.assert_unchanged();
    Ok(())
}

mod faults {
    use super::{Node, walk};

    #[test]
    #[ignore = "a few minutes long: part of `make faults`; tests/controller of sandbox-api has the same without guests"]
    fn pods_outlive_the_daemon_and_end_with_their_own_worker_alone() {
        let mut node = Node::start(&["cloister-worker", "cloister-workers"]);
        walk(&mut node).unwrap_or_else(|error| panic!("{error}\n{}", node.said()));
    }
}
