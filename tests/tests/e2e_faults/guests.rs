// SPDX-License-Identifier: Apache-2.0
//! A guest that ends, or might as well.

use super::Bed;
use cloister_tests::cri::{
    Container, Outcome, Pod, Runtime, api, args, ensure, eventually, script, security,
};

fn privileged(config: &mut api::ContainerConfig) {
    security(config).privileged = true;
}

async fn victim(runtime: &Runtime) -> Outcome<(Pod, Container)> {
    let mut config = Pod::config(runtime);
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().privileged = true;
    let pod = Pod::run(runtime, config).await?;
    let witness = pod.start(script("echo before; sleep infinity")).await?;
    witness.says("before").await?;
    Ok((pod, witness))
}

/// What Kubernetes is to see of a pod whose VM was lost.
async fn is_lost(pod: &Pod, witness: &Container) -> Outcome {
    eventually("the end of a pod", async || {
        let status = pod.status().await?;
        Ok((status.state() == api::PodSandboxState::SandboxNotready).then_some(()))
    })
    .await?;
    let status = witness.ended().await?;
    ensure(
        status.exit_code == 137 && status.finished_at > 0,
        format_args!("{status:?}"),
    )?;
    // What it wrote before is not lost with it.
    let log = witness.log()?;
    ensure(log.stdout == "before\n", format_args!("{log:?}"))?;
    let late = witness.exec(&["true"]).await;
    ensure(late.is_err(), format_args!("exec in a lost pod: {late:?}"))?;
    // containerd makes a container there, but it does not start.
    let late = pod.start(args(&["true"])).await;
    ensure(late.is_err(), "a container in a lost pod")?;
    pod.remove().await
}

/// Its kernel panics.
pub fn guest_panics(bed: &mut Bed) -> Outcome {
    bed.node.block_on(async {
        let (pod, witness) = victim(&bed.runtime).await?;
        let mut config = script("echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger");
        privileged(&mut config);
        let culprit = pod.start(config).await?;
        let status = culprit.ended().await?;
        ensure(status.exit_code == 137, format_args!("{status:?}"))?;
        is_lost(&pod, &witness).await
    })
}

/// Its agent cannot be reached any more, though its vCPUs run: the vsock device is taken from its driver.
pub fn agent_is_lost(bed: &mut Bed) -> Outcome {
    bed.node.block_on(async {
        let (pod, witness) = victim(&bed.runtime).await?;
        let mut config = script(
            "cd /sys/bus/virtio/drivers/vmw_vsock_virtio_transport; for device in virtio*; do echo $device >unbind; done; sleep infinity",
        );
        privileged(&mut config);
        pod.start(config).await?;
        is_lost(&pod, &witness).await
    })
}

/// All memory of the VM is wanted at once: the container that wants it ends, not the pod.
pub fn guest_is_out_of_memory(bed: &mut Bed) -> Outcome {
    bed.node.block_on(async {
        let pod = Pod::run(&bed.runtime, Pod::config(&bed.runtime)).await?;
        let witness = pod.start(args(&["sleep", "infinity"])).await?;
        // A buffer of nearly all of its memory: more than is free, and less than the kernel refuses at once.
        let culprit = pod
            .start(script(
                "exec dd if=/dev/zero of=/dev/null count=1 bs=$(awk '/MemTotal/ { print int($2 * 0.96) }' /proc/meminfo)k",
            ))
            .await?;
        let status = culprit.ended().await?;
        ensure(
            status.exit_code == 137 && status.reason == "OOMKilled",
            format_args!("{status:?}"),
        )?;
        let said = witness.exec(&["echo", "unharmed"]).await?;
        ensure(said.stdout == "unharmed\n", format_args!("{said:?}"))?;
        pod.remove().await
    })
}

/// A container writes as fast as it can: its log grows, and nothing else is hurt.
pub fn container_floods_its_log(bed: &mut Bed) -> Outcome {
    bed.node.block_on(async {
        let pod = Pod::run(&bed.runtime, Pod::config(&bed.runtime)).await?;
        let witness = pod.start(args(&["sleep", "infinity"])).await?;
        let culprit = pod.start(args(&["yes"])).await?;
        let start = std::time::Instant::now();
        while start.elapsed() < std::time::Duration::from_secs(20) {
            let said = witness.exec(&["echo", "unharmed"]).await?;
            ensure(said.stdout == "unharmed\n", format_args!("{said:?}"))?;
        }
        culprit.stop(0).await?;
        let written = std::fs::metadata(culprit.log_file())?.len();
        eprintln!("the flooded log has {written} bytes");
        ensure(written > 1 << 20, written)?;
        pod.remove().await
    })
}
