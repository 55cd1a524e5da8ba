// SPDX-License-Identifier: Apache-2.0
//! A node with cgroup v1, which `ci/e2e` runs this module on.

use super::workers::worker_of;
use cloister_tests::cri::{Node, Outcome, Pod, Runtime, api, ensure, eventually, script};
use std::fs;
use std::path::{Path, PathBuf};

/// The hierarchies in which a pod's use is counted.
const HIERARCHIES: [&str; 4] = ["cpu,cpuacct", "memory", "blkio", "pids"];

/// The cgroup of a pod's worker in a hierarchy.
fn cgroup_of(hierarchy: &str, pod: &Pod) -> PathBuf {
    let parent = &pod.config.linux.as_ref().unwrap().cgroup_parent;
    Path::new("/sys/fs/cgroup")
        .join(hierarchy)
        .join(parent.strip_prefix('/').unwrap())
        .join(format!("cloister-{}", pod.id))
}

/// A container of the pod runs and is counted, and the pod is.
async fn lives_and_is_counted(runtime: &Runtime) -> Outcome<Pod> {
    let pod = Pod::run(runtime, Pod::config(runtime)).await?;
    let said = pod.output(script("echo here")).await?.good()?;
    ensure(said == "here\n", &said)?;
    let container = pod
        .start(script(
            "head -c 20000000 /dev/zero >/dev/shm/kept; echo ready; sleep infinity",
        ))
        .await?;
    container.says("ready").await?;
    let stats = container.stats().await?;
    let used = stats
        .memory
        .and_then(|memory| memory.usage_bytes)
        .map_or(0, |bytes| bytes.value);
    ensure(used > 15_000_000, format_args!("{used}"))?;
    let request = api::PodSandboxStatsRequest {
        pod_sandbox_id: pod.id.clone(),
    };
    eventually("the pod's memory", async || {
        let answer = runtime
            .cri()
            .pod_sandbox_stats(request.clone())
            .await?
            .into_inner();
        let linux = answer.stats.and_then(|stats| stats.linux);
        let memory = linux
            .and_then(|linux| linux.memory)
            .and_then(|memory| memory.usage_bytes);
        Ok(memory.filter(|bytes| bytes.value > 15_000_000))
    })
    .await?;
    Ok(pod)
}

#[test]
fn pods_are_charged_to_their_cgroups() {
    assert!(
        Path::new("/sys/fs/cgroup/memory/cgroup.procs").exists(),
        "this is to run on a host with cgroup v1: see ci/e2e"
    );
    let mut node = Node::start(&["runc", "cloister", "cloister-worker"]);
    if let Err(error) = walk(&mut node) {
        panic!("{error}\n{}", node.said());
    }
}

fn walk(node: &mut Node) -> Outcome {
    for handler in ["runc", "cloister"] {
        let runtime = node.runtime(handler);
        node.block_on(async {
            let pod = Pod::run(&runtime, Pod::config(&runtime)).await?;
            pod.output(script("true")).await?.good()?;
            pod.remove().await
        })?;
    }
    let (host, daemon) = node.footprint();
    let runc = node.runtime("runc");
    node.block_on(async { lives_and_is_counted(&runc).await?.remove().await })?;

    let runtime = node.runtime("cloister-worker");
    let pod = node.block_on(lives_and_is_counted(&runtime))?;
    let pid = worker_of(node, &pod).to_string();
    for hierarchy in HIERARCHIES {
        let procs = fs::read_to_string(cgroup_of(hierarchy, &pod).join("cgroup.procs"))?;
        ensure(
            procs.lines().any(|line| line == pid),
            format_args!("{hierarchy}: {procs}"),
        )?;
    }
    let number = |hierarchy: &str, file: &str| -> Outcome<u64> {
        Ok(fs::read_to_string(cgroup_of(hierarchy, &pod).join(file))?
            .trim()
            .parse()?)
    };
    let memory = number("memory", "memory.usage_in_bytes")?;
    let cpu = number("cpu,cpuacct", "cpuacct.usage")?;
    eprintln!(
        "a pod in a worker, with cgroup v1: charged {} KiB, {} ms of CPU",
        memory >> 10,
        cpu / 1_000_000
    );
    ensure(
        memory > 20 << 20 && cpu > 100_000_000,
        format_args!("{memory} {cpu}"),
    )?;
    node.block_on(pod.remove())?;
    host.assert_unchanged();
    daemon.assert_no_more();
    Ok(())
}
