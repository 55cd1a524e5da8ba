// SPDX-License-Identifier: Apache-2.0
//! Pods of containerd: a node with runc and Cloister side by side, asked in turn for the same.

use std::io;
use std::time::{Duration, Instant};

use cloister_tests::cri::{Node, Outcome, Pod, Runtime, ensure, script};
use futures_util::future::join_all;

use crate::Context;
use crate::cells::pss_of;
use crate::report::{Figure, median};

/// Pods in turn.
const SERIAL: usize = 5;
/// Pods at once.
const AT_ONCE: usize = 20;
/// Pods whose management memory is looked at.
const IDLE: [usize; 3] = [1, 10, 50];
/// Bytes of a log, without containerd's prefixes.
const LOG: u32 = 20_000_000;
/// Bytes from one pod to another.
const STREAM: u32 = 50_000_000;
/// Requests of a few bytes from one pod to another, each after the answer to the one before.
const REQUESTS: u32 = 500;
/// The parts of a pod's start that cloisterd times (`cloister_phase_seconds`).
const PHASES: [&str; 6] = ["network", "create", "boot", "configure", "forward", "serve"];

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

/// Processes of a handler's pods beside their containers.
struct Management {
    /// Their memory in KiB, without guests'.
    kib: u64,
    /// That of guests.
    guest_kib: u64,
    /// How many they are.
    processes: usize,
}

fn management(handler: &str) -> io::Result<Management> {
    let names: &[&str] = match handler {
        "cloister" => &["cloisterd"],
        _ => &["containerd-shim", "pause", "catatonit"],
    };
    let mut found = Management {
        kib: 0,
        guest_kib: 0,
        processes: 0,
    };
    for entry in std::fs::read_dir("/proc")? {
        let path = entry?.path();
        let name = std::fs::read_to_string(path.join("comm")).unwrap_or_default();
        // The kernel keeps 15 bytes of a name.
        if names
            .iter()
            .any(|wanted| name.trim_end() == &wanted[..wanted.len().min(15)])
        {
            let (all, guest) = pss_of(&path.join("smaps"))?;
            found.kib += all.saturating_sub(guest);
            found.guest_kib += guest;
            found.processes += 1;
        }
    }
    Ok(found)
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
    where_time_goes(context, &node, of(&phases[1].all))?;
    at_once(context, &node, [&runc, &ours])?;
    streams(context, &node, [&runc, &ours])?;
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
        let empty = management(handler)?;
        let ours = handler == "cloister";
        let mut pods = Vec::new();
        for count in IDLE {
            while pods.len() < count {
                let made = node.block_on(pod(runtime, &mut Phases::default()));
                pods.push(made.map_err(failure)?);
            }
            std::thread::sleep(Duration::from_secs(2));
            let now = management(handler)?;
            let per_pod = |value: u64| {
                f64::from(u32::try_from(value).unwrap_or(u32::MAX))
                    / f64::from(u32::try_from(count).unwrap_or(1))
            };
            let what = if ours { "cloisterd" } else { "shims and pauses" };
            context.report.add(Figure {
                name: format!("cri.management_pss_kib.{handler}.{count}"),
                value: per_pod(now.kib),
                unit: "KiB/pod",
                peer: String::new(),
                conditions: format!(
                    "PSS of {what} without guest pages, divided by pods; {} KiB with none",
                    empty.kib
                ),
                goal: if ours { "<= 1024" } else { "" },
            })?;
            if ours {
                context.report.add(Figure {
                    name: format!("cri.total_pss_kib.{handler}.{count}"),
                    value: per_pod(now.kib + now.guest_kib),
                    unit: "KiB/pod",
                    peer: String::new(),
                    conditions: "the same with guest pages: kernel, agent and container".into(),
                    goal: "",
                })?;
            }
            if Some(&count) == IDLE.last() {
                let added = now.processes.saturating_sub(empty.processes);
                context.report.add(Figure {
                    name: format!("cri.processes_per_pod.{handler}"),
                    value: per_pod(u64::try_from(added).unwrap_or(u64::MAX)),
                    unit: "processes",
                    peer: String::new(),
                    conditions: "beside the containers' own".into(),
                    goal: if ours { "0" } else { "" },
                })?;
            }
        }
        for pod in pods {
            node.block_on(pod.remove()).map_err(failure)?;
        }
    }
    Ok(())
}

/// The parts of a pod's start, from the daemon's own figures: means over the pods in turn.
fn where_time_goes(context: &mut Context, node: &Node, whole: f64) -> io::Result<()> {
    let text = node.metrics()?;
    let value = |what: &str, phase: &str| -> io::Result<f64> {
        let line = text
            .lines()
            .filter(|line| line.starts_with(&format!("cloister_phase_seconds_{what}{{")))
            .find(|line| {
                line.contains("operation=\"pod_start\"") && line.contains(&format!("phase=\"{phase}\""))
            });
        let number = line.and_then(|line| line.rsplit(' ').next()?.parse().ok());
        number.ok_or_else(|| io::Error::other(format!("the daemon's metrics have no phase {phase}")))
    };
    let mut own = 0.0;
    for phase in PHASES {
        let millis = value("sum", phase)? / value("count", phase)? * 1000.0;
        if phase != "boot" {
            own += millis;
        }
        context.report.add(Figure {
            name: format!("cri.phase_ms.{phase}"),
            value: millis,
            unit: "ms",
            peer: String::new(),
            conditions: "mean over the pods in turn, part of RunPodSandbox".into(),
            goal: "",
        })?;
    }
    context.report.add(Figure {
        name: "cri.own_overhead".into(),
        value: own / whole,
        unit: "ratio",
        peer: format!("{own:.0} of {whole:.0} ms"),
        conditions: "cloisterd's parts of RunPodSandbox but for the guest's boot, of pod and container start"
            .into(),
        goal: "<= 0.10",
    })
}

/// Logs, and the network between two pods of a handler.
fn streams(context: &mut Context, node: &Node, runtimes: [&Runtime; 2]) -> io::Result<()> {
    let mut seen = [[0.0; 3]; 2];
    for (runtime, seen) in runtimes.into_iter().zip(&mut seen) {
        *seen = node.block_on(rates(runtime)).map_err(failure)?;
    }
    let figures = [
        (
            "log_throughput",
            "MB/s",
            format!("{LOG} bytes in lines of 100 through containerd's log"),
        ),
        (
            "net_throughput",
            "MB/s",
            format!("{STREAM} bytes by TCP from pod to pod"),
        ),
        (
            "net_requests",
            "requests/s",
            format!("{REQUESTS} requests by TCP, one after the other, pod to pod"),
        ),
    ];
    for (at, (name, unit, conditions)) in figures.into_iter().enumerate() {
        let [runc, ours] = [seen[0][at], seen[1][at]];
        context.report.add(Figure {
            name: format!("cri.{name}_vs_runc"),
            value: ours / runc,
            unit: "ratio",
            peer: format!("runc {runc:.1}, cloister {ours:.1} {unit}"),
            conditions,
            goal: "",
        })?;
    }
    Ok(())
}

/// Log and network of pods of one handler: MB/s, MB/s, requests/s.
async fn rates(runtime: &Runtime) -> Outcome<[f64; 3]> {
    let [server, client] = [
        Pod::run(runtime, Pod::config(runtime)).await?,
        Pod::run(runtime, Pod::config(runtime)).await?,
    ];
    let begin = Instant::now();
    let talker = client
        .start(script(&format!(
            "head -c {LOG} /dev/zero | tr '\\0' x | fold -w 99"
        )))
        .await?;
    talker.ended().await?;
    let log = f64::from(LOG) / 1000.0 / millis(begin);
    talker.remove().await?;

    let address = server.address().await?;
    let text = format!(
        "socat TCP-LISTEN:9000,fork,reuseaddr SYSTEM:'head -c {STREAM} /dev/zero' & \
         socat TCP-LISTEN:9001,fork,reuseaddr,nodelay EXEC:cat & \
         until [ $(ss -Hltn | grep -c ':900[01] ') -ge 2 ]; do sleep 0.1; done; echo ready; wait"
    );
    server.start(script(&text)).await?.says("ready").await?;
    let idle = client.start(script("exec sleep infinity")).await?;
    let begin = Instant::now();
    let got = idle
        .exec_script(&format!("socat -u TCP:{address}:9000 STDOUT | wc -c"))
        .await?
        .good()?;
    let stream = f64::from(STREAM) / 1000.0 / millis(begin);
    ensure(got.trim() == STREAM.to_string(), &got)?;
    let asking = format!(
        "exec 3<>/dev/tcp/{address}/9001; begin=${{EPOCHREALTIME/./}}; \
         for ((i = 0; i < {REQUESTS}; i++)); do echo request >&3; read -r -u 3 answer; done; echo $((${{EPOCHREALTIME/./}} - begin))"
    );
    let micros: f64 = idle
        .exec(&["bash", "-c", &asking])
        .await?
        .good()?
        .trim()
        .parse()?;
    server.remove().await?;
    client.remove().await?;
    Ok([log, stream, f64::from(REQUESTS) * 1e6 / micros])
}
