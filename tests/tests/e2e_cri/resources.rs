// SPDX-License-Identifier: Apache-2.0
//! Limits of containers: what they are given, what becomes of those that overstep, and their change.

use cloister_tests::cri::{Outcome, Pod, Runtime, api, args, script};
use serde_json::{Value, json};

const MIB: i64 = 1 << 20;

const LIMITS: &str = "cd /sys/fs/cgroup 2>/dev/null; for file in memory.max memory.swap.max cpu.max cpu.weight cpuset.cpus; do printf '%s ' $file; cat $file 2>/dev/null || echo; done";

fn limited(mut config: api::ContainerConfig, limits: api::LinuxContainerResources) -> api::ContainerConfig {
    config.linux.get_or_insert_default().resources = Some(limits);
    config
}

fn limits() -> api::LinuxContainerResources {
    api::LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 50_000,
        cpu_shares: 512,
        memory_limit_in_bytes: 64 * MIB,
        oom_score_adj: 500,
        ..Default::default()
    }
}

/// As given, seen in the container's own cgroup.
pub async fn given(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let text = format!(
        "{LIMITS}; cat /proc/self/oom_score_adj; cat /proc/self/cgroup; ls -d /sys/fs/cgroup/*/ 2>/dev/null | wc -l"
    );
    let set = pod.output(limited(script(&text), limits())).await?;
    let none = pod.output(script(LIMITS)).await?;
    let mut unified = limits();
    unified.unified = [
        ("memory.high".to_owned(), (32 * MIB).to_string()),
        ("pids.max".to_owned(), "77".to_owned()),
    ]
    .into();
    let unified = pod
        .output(limited(
            script("cat /sys/fs/cgroup/memory.high /sys/fs/cgroup/pids.max"),
            unified,
        ))
        .await?;
    Ok(
        json!({ "set": set.stdout.lines().collect::<Vec<_>>(), "none": none.stdout.lines().collect::<Vec<_>>(), "unified": unified }),
    )
}

/// Changed while it runs.
pub async fn changed(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let container = pod.start(limited(args(&["sleep", "infinity"]), limits())).await?;
    let mut seen = vec![container.exec_script(LIMITS).await?.stdout];
    for (memory, quota, shares) in [(96, 75_000, 1024), (48, 20_000, 2)] {
        let request = api::UpdateContainerResourcesRequest {
            container_id: container.id.clone(),
            linux: Some(api::LinuxContainerResources {
                memory_limit_in_bytes: memory * MIB,
                cpu_quota: quota,
                cpu_shares: shares,
                ..limits()
            }),
            ..Default::default()
        };
        runtime.cri().update_container_resources(request).await?;
        seen.push(container.exec_script(LIMITS).await?.stdout);
    }
    let status = container.status().await?;
    container.stop(0).await?;
    container.remove().await?;
    Ok(json!({ "seen": seen, "reported": status.resources.and_then(|resources| resources.linux) }))
}

/// Too much memory: the container is ended and says why; a process that was not the first is ended alone.
pub async fn out_of_memory(runtime: &Runtime) -> Outcome<Value> {
    let pod = Pod::run(runtime, Pod::config(runtime)).await?;
    let limits = api::LinuxContainerResources {
        memory_limit_in_bytes: 24 * MIB,
        memory_swap_limit_in_bytes: 24 * MIB,
        ..Default::default()
    };
    let glutton = pod
        .start(limited(args(&["tail", "/dev/zero"]), limits.clone()))
        .await?;
    let status = glutton.ended().await?;
    // The pod and other containers are none the worse for it.
    let neighbour = pod.output(script("echo fine")).await?;
    pod.remove().await?;
    Ok(json!({ "code": status.exit_code, "reason": status.reason, "neighbour": neighbour }))
}

/// More processes than allowed.
pub async fn processes(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let mut limits = limits();
    limits.unified = [("pids.max".to_owned(), "10".to_owned())].into();
    let text = "i=0; while [ $i -lt 20 ]; do sleep 5 & i=$((i + 1)); done 2>&1 | grep -q -i -e fork -e resource && echo refused; true";
    Ok(json!(
        pod.output(limited(args(&["bash", "-c", text]), limits)).await?
    ))
}
