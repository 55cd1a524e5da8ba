// SPDX-License-Identifier: Apache-2.0
//! `cri.sandboxes_per_second_and_core.*`: how fast a node starts pods when it is asked for several at a time.
//!
//! A pod counts when its container has started. All stay until the last is there, as they do on a node that fills up; what it
//! takes to end them is not looked at.

use std::io;
use std::time::Instant;

use cloister_tests::cri::{Outcome, Pod, Runtime, script};
use futures_util::{StreamExt as _, stream};

use crate::Context;
use crate::cri::{Contest, failure, ours};
use crate::report::Figure;

/// Pods of each handler.
const PODS: u32 = 12;
/// Pods that are being started at any time, per processor.
const IN_FLIGHT: usize = 2;

async fn started(runtime: &Runtime) -> Outcome<Pod> {
    let pod = Pod::run(runtime, Pod::config(runtime)).await?;
    pod.start(script("exec sleep infinity")).await?;
    Ok(pod)
}

/// Measures.
pub fn run(context: &mut Context) -> io::Result<()> {
    let contest = Contest::start(&context.peers.handlers);
    let node = &contest.node;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut rates = Vec::new();
    contest.warm()?;
    for runtime in &contest.runtimes {
        let (pods, seconds) = node.block_on(async {
            let begin = Instant::now();
            let pods: Vec<Outcome<Pod>> = stream::iter(0..PODS)
                .map(|_| started(runtime))
                .buffer_unordered(IN_FLIGHT * cores)
                .collect()
                .await;
            (pods, begin.elapsed().as_secs_f64())
        });
        for pod in pods {
            node.block_on(pod.map_err(failure)?.remove()).map_err(failure)?;
        }
        let cores = f64::from(u32::try_from(cores).unwrap_or(1));
        rates.push(f64::from(PODS) / seconds / cores);
        context.report.add(Figure::ours(
            format!(
                "cri.sandboxes_per_second_and_core.{}",
                runtime.handler().replace('-', "_")
            ),
            f64::from(PODS) / seconds / cores,
            "pods/s/core",
            "",
            format!("{PODS} pods with a container, {IN_FLIGHT} a processor being started at any time, none removed before the last"),
        ))?;
    }
    for (at, version) in &contest.peers {
        let (peer, version) = contest.peer(*at, version);
        for (how, ours) in ours() {
            context.report.add(Figure {
                name: format!("cri.{how}sandboxes_per_second_and_core_vs_{peer}"),
                value: rates[ours] / rates[*at],
                unit: "ratio",
                peer: peer.to_owned(),
                conditions: format!("more is better; {version}"),
                goal: "",
            })?;
        }
    }
    Ok(())
}
