// SPDX-License-Identifier: Apache-2.0
//! Pods of containerd: a node with runc and Cloister side by side, asked in turn for the same.

use std::io;
use std::time::{Duration, Instant};

use cloister_tests::cri::{Node, Outcome, Pod, Runtime, script};
use futures_util::future::join_all;

use crate::Context;
use crate::cells::pss_of;
use crate::report::{Figure, median};

/// Pods in turn.
const SERIAL: usize = 5;
/// Pods at once.
const AT_ONCE: usize = 8;
/// Pods whose management memory is looked at.
const IDLE: [usize; 2] = [1, 10];

/// Where the time of a pod with one container goes.
#[derive(Default)]
struct Phases {
    run: Vec<f64>,
    create: Vec<f64>,
    start: Vec<f64>,
    all: Vec<f64>,
    exec: Vec<f64>,
}

fn failure(error: Box<dyn std::error::Error + Send + Sync>) -> io::Error {
    io::Error::other(error)
}

fn millis(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

/// A pod with a container that stays, timed.
async fn pod(runtime: &Runtime, phases: &mut Phases) -> Outcome<Pod> {
    let begin = Instant::now();
    let pod = Pod::run(runtime, Pod::config(runtime)).await?;
    phases.run.push(millis(begin));
    let then = Instant::now();
    let container = pod.create(script("exec sleep infinity")).await?;
    phases.create.push(millis(then));
    let then = Instant::now();
    container.start().await?;
    phases.start.push(millis(then));
    phases.all.push(millis(begin));
    let then = Instant::now();
    container.exec(&["true"]).await?;
    phases.exec.push(millis(then));
    Ok(pod)
}

/// Processes of `handler`'s pods beside their containers: their memory in KiB, and how many they are.
fn management(handler: &str) -> io::Result<(u64, usize)> {
    let names: &[&str] = match handler {
        "cloister" => &["cloisterd"],
        _ => &["containerd-shim", "pause", "catatonit"],
    };
    let (mut kib, mut count) = (0, 0);
    for entry in std::fs::read_dir("/proc")? {
        let path = entry?.path();
        let name = std::fs::read_to_string(path.join("comm")).unwrap_or_default();
        // The kernel keeps 15 bytes of a name.
        if names
            .iter()
            .any(|wanted| name.trim_end() == &wanted[..wanted.len().min(15)])
        {
            let (all, guest) = pss_of(&path.join("smaps"))?;
            kib += all.saturating_sub(guest);
            count += 1;
        }
    }
    Ok((kib, count))
}

/// `cri.*`.
pub fn run(context: &mut Context) -> io::Result<()> {
    let node = Node::start(&["runc", "cloister"]);
    let [runc, ours] = ["runc", "cloister"].map(|handler| node.runtime(handler));
    let mut phases = [Phases::default(), Phases::default()];
    // The first pod of each pays for what is done once.
    for _ in 0..=SERIAL {
        for (runtime, phases) in [&runc, &ours].into_iter().zip(&mut phases) {
            node.block_on(async { pod(runtime, phases).await?.remove().await })
                .map_err(failure)?;
        }
    }
    let of = |times: &[f64]| median(&times[1..]);
    let conditions = format!("medians of {SERIAL}, in turn, bridge network, image unpacked");
    for (name, get) in [
        ("run_pod_sandbox", (|p| &p.run) as fn(&Phases) -> &Vec<f64>),
        ("create_container", |p| &p.create),
        ("start_container", |p| &p.start),
        ("pod_container_start", |p| &p.all),
        ("exec", |p| &p.exec),
    ] {
        let [runc, ours] = [of(get(&phases[0])), of(get(&phases[1]))];
        context.report.add(Figure {
            name: format!("cri.{name}_vs_runc"),
            value: ours / runc,
            unit: "ratio",
            peer: format!("runc {runc:.0} ms, cloister {ours:.0} ms"),
            conditions: conditions.clone(),
            goal: "",
        })?;
    }
    at_once(context, &node, [&runc, &ours])?;
    idle(context, &node, [&runc, &ours])
}

fn at_once(context: &mut Context, node: &Node, runtimes: [&Runtime; 2]) -> io::Result<()> {
    let mut took = [0.0; 2];
    for (runtime, took) in runtimes.into_iter().zip(&mut took) {
        let pods = node.block_on(async {
            let begin = Instant::now();
            let pods =
                join_all((0..AT_ONCE).map(|_| async { pod(runtime, &mut Phases::default()).await })).await;
            *took = millis(begin);
            pods
        });
        for pod in pods {
            node.block_on(pod.map_err(failure)?.remove()).map_err(failure)?;
        }
    }
    context.report.add(Figure {
        name: format!("cri.pod_container_start_{AT_ONCE}_at_once_vs_runc"),
        value: took[1] / took[0],
        unit: "ratio",
        peer: format!("runc {:.0} ms, cloister {:.0} ms", took[0], took[1]),
        conditions: "until the last one's container has answered an exec".into(),
        goal: "",
    })
}

/// Management memory and processes of pods that do nothing.
fn idle(context: &mut Context, node: &Node, runtimes: [&Runtime; 2]) -> io::Result<()> {
    for runtime in runtimes {
        let handler = runtime.handler();
        let (empty, daemons) = management(handler)?;
        let mut pods = Vec::new();
        for count in IDLE {
            while pods.len() < count {
                let made = node.block_on(pod(runtime, &mut Phases::default()));
                pods.push(made.map_err(failure)?);
            }
            std::thread::sleep(Duration::from_secs(2));
            let (kib, processes) = management(handler)?;
            let per_pod = |value: u64| {
                f64::from(u32::try_from(value).unwrap_or(u32::MAX))
                    / f64::from(u32::try_from(count).unwrap_or(1))
            };
            context.report.add(Figure {
                name: format!("cri.management_pss_kib.{handler}.{count}"),
                value: per_pod(kib),
                unit: "KiB/pod",
                peer: String::new(),
                conditions: format!(
                    "PSS of {} without guest pages, divided by pods; {empty} KiB with none",
                    if handler == "cloister" {
                        "cloisterd"
                    } else {
                        "shims and pauses"
                    }
                ),
                goal: if handler == "cloister" { "<= 1024" } else { "" },
            })?;
            if Some(&count) == IDLE.last() {
                context.report.add(Figure {
                    name: format!("cri.processes_per_pod.{handler}"),
                    value: per_pod(u64::try_from(processes - daemons).unwrap_or(u64::MAX)),
                    unit: "processes",
                    peer: String::new(),
                    conditions: "beside the containers' own".into(),
                    goal: if handler == "cloister" { "0" } else { "" },
                })?;
            }
        }
        for pod in pods {
            node.block_on(pod.remove()).map_err(failure)?;
        }
    }
    Ok(())
}
