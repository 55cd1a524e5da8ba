// SPDX-License-Identifier: Apache-2.0
//! The node's daemons end and come back.

use super::Bed;
use cloister_tests::cri::{Container, End, Outcome, Pod, Runtime, api, ensure, eventually, script};
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A pod with a container that goes on, and one that ends with 7 when told through a volume.
struct Scene {
    pod: Pod,
    talker: Container,
    waiter: Container,
    volume: PathBuf,
}

async fn scene(runtime: &Runtime) -> Outcome<Scene> {
    let volume = runtime.folder("signals")?;
    let pod = Pod::run(runtime, Pod::config(runtime)).await?;
    let talker = pod
        .start(script(
            "i=0; while sleep 0.5; do i=$((i + 1)); echo line $i; done",
        ))
        .await?;
    let mut config =
        script("until [ -e /signals/go ]; do sleep 0.2; done; echo last words; touch /signals/went; exit 7");
    config.mounts = vec![api::Mount {
        host_path: volume.display().to_string(),
        container_path: "/signals".into(),
        ..Default::default()
    }];
    let waiter = pod.start(config).await?;
    talker.says("line 2").await?;
    Ok(Scene {
        pod,
        talker,
        waiter,
        volume,
    })
}

fn wait_for(path: &std::path::Path) -> Outcome {
    let start = Instant::now();
    while !path.exists() {
        ensure(
            start.elapsed() < Duration::from_secs(120),
            format_args!("{} never came", path.display()),
        )?;
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// containerd crashes: pods go on without it, and it learns what happened meanwhile.
pub fn containerd_is_killed(bed: &mut Bed) -> Outcome {
    let Scene {
        pod,
        talker,
        waiter,
        volume,
    } = bed.node.block_on(scene(&bed.runtime))?;
    bed.node.end("containerd", End::Killed);
    fs::write(volume.join("go"), "")?;
    wait_for(&volume.join("went"))?;
    // What it says now goes with its fifo, as under runc: nobody reads that, and it ends.
    std::thread::sleep(Duration::from_secs(1));
    bed.node.start_again("containerd");
    bed.node.block_on(async {
        let status = eventually("containerd's memory", async || Ok(pod.status().await.ok())).await?;
        ensure(
            status.state() == api::PodSandboxState::SandboxReady,
            format_args!("{status:?}"),
        )?;
        let ended = waiter.ended().await?;
        ensure(
            ended.exit_code == 7 && ended.reason == "Error",
            format_args!("{ended:?}"),
        )?;
        let status = talker.status().await?;
        ensure(
            status.state() == api::ContainerState::ContainerRunning,
            format_args!("{status:?}"),
        )?;
        // Exec, logs, and new containers as before.
        let said = talker.exec(&["echo", "here"]).await?;
        ensure(said.stdout == "here\n", format_args!("{said:?}"))?;
        let lines = talker.log_lines()?.len();
        eventually("more lines in the log", async || {
            Ok((talker.log_lines()?.len() > lines + 2).then_some(()))
        })
        .await?;
        pod.output(script("true")).await?.good()?;
        pod.remove().await
    })
}

async fn is_over(pod: &Pod, containers: [&Container; 2]) -> Outcome {
    eventually("the end of a pod", async || {
        // While cloisterd is away, and until containerd dials it again, there is no answer.
        let state = pod.status().await.map(|status| status.state());
        Ok(state
            .is_ok_and(|state| state == api::PodSandboxState::SandboxNotready)
            .then_some(()))
    })
    .await?;
    for container in containers {
        let status = container.ended().await?;
        ensure(status.exit_code != 0, format_args!("{status:?}"))?;
    }
    Ok(())
}

fn ends(bed: &mut Bed, how: End) -> Outcome {
    bed.node.block_on(bed.bystander.pod.remove())?;
    let (host, _) = bed.node.footprint();
    let Scene {
        pod, talker, waiter, ..
    } = bed.node.block_on(scene(&bed.runtime))?;
    bed.node.end("cloisterd", how);
    let lines = talker.log_lines()?;
    bed.node.start_again("cloisterd");
    bed.node.block_on(async {
        is_over(&pod, [&talker, &waiter]).await?;
        // Complete up to the end: each line once, in order.
        for (number, line) in lines.iter().enumerate() {
            let expected = format!("line {}", number + 1);
            ensure(
                line.text == expected,
                format_args!("{line:?} instead of {expected}"),
            )?;
        }
        pod.remove().await
    })?;
    host.assert_unchanged();
    bed.new_bystander()
}

/// cloisterd is stopped and started, as by an upgrade.
pub fn cloisterd_is_asked_to_end(bed: &mut Bed) -> Outcome {
    ends(bed, End::Asked)
}

/// cloisterd crashes.
pub fn cloisterd_is_killed(bed: &mut Bed) -> Outcome {
    ends(bed, End::Killed)
}
