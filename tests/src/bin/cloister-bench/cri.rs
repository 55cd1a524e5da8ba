// SPDX-License-Identifier: Apache-2.0
//! Pods of containerd: a node with runc and Cloister side by side, asked in turn for the same.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use cloister_tests::cri::{Container, Node, Outcome, PeerHandler, Pod, Runtime, ensure, script};
use futures_util::future::join_all;

use crate::Context;
use crate::cells::Pss;
use crate::peers::Handler;
use crate::report::{Figure, median};

/// Pods in turn.
const SERIAL: usize = 5;
/// Between two turns: cells are made ahead.
const REST: Duration = Duration::from_secs(8);
/// Pods at once.
const AT_ONCE: usize = 20;
/// Pods whose management memory is looked at.
const IDLE: [usize; 3] = [1, 10, 50];
/// How many are looked at while they rest, after how long, and for how long.
const RESTING: usize = 10;
const SETTLED: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_secs(60);
/// Bytes of a log, without containerd's prefixes.
const LOG: u32 = 20_000_000;
/// Bytes from one pod to another.
const STREAM: u32 = 50_000_000;
/// Requests of a few bytes from one pod to another, each after the answer to the one before.
const REQUESTS: u32 = 500;
/// The parts of a pod's and its container's start that cloisterd times (`cloister_phase_seconds`), by operation.
const PHASES: [(&str, &str); 10] = [
    ("pod_start", "network"),
    ("pod_start", "create"),
    ("pod_start", "boot"),
    ("pod_start", "configure"),
    ("pod_start", "forward"),
    ("pod_start", "serve"),
    ("container_create", "root"),
    ("container_create", "share"),
    ("container_create", "guest"),
    ("container_start", "guest"),
];

/// Counters of cloisterd's, as its figures have them.
const CLONED: &str = "cloister_pods_cloned_total ";
const POOLED: &str = "cloister_pods_pooled_total ";

/// Where the time of a pod with one container goes.
#[derive(Default)]
pub struct Phases {
    run: Vec<f64>,
    create: Vec<f64>,
    start: Vec<f64>,
    all: Vec<f64>,
    exec: Vec<f64>,
}

/// As an error of files.
pub fn failure(error: Box<dyn std::error::Error + Send + Sync>) -> io::Error {
    io::Error::other(error)
}

fn millis(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

/// A pod with a container that stays, timed, and an exec in it.
pub async fn pod(runtime: &Runtime, phases: &mut Phases) -> Outcome<Pod> {
    let container = started(runtime, phases).await?;
    let then = Instant::now();
    container.exec(&["true"]).await?;
    phases.exec.push(millis(then));
    Ok(container.pod)
}

/// A pod with a container that stays, timed.
async fn started(runtime: &Runtime, phases: &mut Phases) -> Outcome<Container> {
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
    Ok(container)
}

/// Processes of a handler's pods beside their containers.
struct Management {
    /// Their memory in KiB, without guests'.
    kib: u64,
    /// Heaps and stacks of that; the rest are pages of programs.
    own_kib: u64,
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
        own_kib: 0,
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
            let pss = Pss::of(&path.join("smaps"))?;
            found.kib += pss.beyond_guests();
            found.own_kib += pss.own;
            found.guest_kib += pss.guest;
            found.processes += 1;
        }
    }
    Ok(found)
}

/// A node, and its handlers.
fn node<const N: usize>(handlers: [&'static str; N]) -> (Node, [Runtime; N]) {
    let node = Node::start_with_spares(&handlers);
    let runtimes = handlers.map(|handler| node.runtime(handler));
    (node, runtimes)
}

/// What pods are compared: of runc, ours that boot, ours that are clones, ours whose clones were made ahead, and of the peers that the user has given.
pub struct Contest {
    /// The node.
    pub node: Node,
    /// The handlers, in that order.
    pub runtimes: Vec<Runtime>,
    /// Whom ours are compared with: which of `runtimes`, and its version.
    pub peers: Vec<(usize, String)>,
}

/// Ours, from the second handler of a contest on: the beginning of their figures' names, and the handler.
pub const OURS: [(&str, &str); 3] = [
    ("", "cloister"),
    ("clone_", "cloister-clone"),
    ("pool_", "cloister-pool"),
];
/// Which of a contest's handlers clones.
const CLONES: usize = 2;
/// Which of them takes clones that were made ahead.
const POOLS: usize = 3;

/// Ours by their place among a contest's handlers.
pub fn ours() -> impl Iterator<Item = (&'static str, usize)> {
    OURS.into_iter().zip(1..).map(|((how, _), at)| (how, at))
}

impl Contest {
    /// Starts the node.
    pub fn start(peers: &[Handler]) -> Self {
        let mut handlers = vec!["runc"];
        handlers.extend(OURS.map(|(_, handler)| handler));
        let mut versions = vec![(0, version_of_runc())];
        for peer in peers {
            versions.push((handlers.len(), peer.version().to_owned()));
            // Handlers' names live as long as tests do.
            handlers.push(peer.label().to_owned().leak());
        }
        let peers: Vec<PeerHandler> = peers
            .iter()
            .map(|peer| PeerHandler {
                containerd: peer.containerd_config(),
                shim: peer.shim(),
            })
            .collect();
        let node = Node::start_with_peers(&handlers, &peers);
        let runtimes = handlers.iter().map(|handler| node.runtime(handler)).collect();
        Self {
            node,
            runtimes,
            peers: versions,
        }
    }

    /// Has what is done once done: the first pod of each handler pays for it, and has a template built, too.
    pub fn warm(&self) -> io::Result<()> {
        for runtime in &self.runtimes {
            self.node
                .block_on(async { pod(runtime, &mut Phases::default()).await?.remove().await })
                .map_err(failure)?;
        }
        until_counted(&self.node, &self.runtimes[CLONES], CLONED)?;
        until_counted(&self.node, &self.runtimes[POOLS], POOLED)
    }

    /// The name of a peer's handler, and what conditions say of it.
    pub fn peer(&self, at: usize, version: &str) -> (&'static str, String) {
        let name = self.runtimes[at].handler();
        (
            name,
            format!("peer: {}", if version.is_empty() { name } else { version }),
        )
    }
}

fn version_of_runc() -> String {
    let output = std::process::Command::new("runc").arg("--version").output();
    let said = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    said.ok()
        .and_then(|said| said.lines().next().map(str::to_owned))
        .unwrap_or_default()
}

/// What a pod and its container take until they are there, and an exec: of runc and other peers, one that boots, a clone, and a clone
/// that was made ahead.
pub fn start(context: &mut Context) -> io::Result<()> {
    let contest = Contest::start(&context.peers.handlers);
    let (node, runtimes) = (&contest.node, &contest.runtimes);
    let mut phases: Vec<Phases> = runtimes.iter().map(|_| Phases::default()).collect();
    let mut parts = vec![[0.0; PHASES.len()]; runtimes.len()];
    contest.warm()?;
    for _ in 0..SERIAL {
        // A cell is made in the place of the one that was taken.
        std::thread::sleep(REST);
        for ((runtime, phases), parts) in runtimes.iter().zip(&mut phases).zip(&mut parts) {
            let before = phase_seconds(node)?;
            node.block_on(async { pod(runtime, phases).await?.remove().await })
                .map_err(failure)?;
            let after = phase_seconds(node)?;
            for (part, (after, before)) in parts.iter_mut().zip(after.into_iter().zip(before)) {
                *part += after - before;
            }
        }
    }
    let pooled = counted(node, POOLED)?;
    if pooled <= SERIAL as u64 {
        return Err(io::Error::other(format!(
            "only {pooled} pods took cells that were made ahead"
        )));
    }
    let of = |times: &[f64]| median(times);
    for (at, version) in &contest.peers {
        let (peer, version) = contest.peer(*at, version);
        let conditions = format!("medians of {SERIAL}, in turn, bridge network, image unpacked; {version}");
        for (name, get) in [
            ("run_pod_sandbox", (|p| &p.run) as fn(&Phases) -> &Vec<f64>),
            ("create_container", |p| &p.create),
            ("start_container", |p| &p.start),
            ("pod_container_start", |p| &p.all),
            ("exec", |p| &p.exec),
        ] {
            let their = of(get(&phases[*at]));
            for (how, ours) in ours().map(|(how, at)| (how, of(get(&phases[at])))) {
                context.report.add(Figure {
                    name: format!("cri.{how}{name}_vs_{peer}"),
                    value: ours / their,
                    unit: "ratio",
                    peer: format!("{peer} {their:.0} ms, cloister {ours:.0} ms"),
                    conditions: conditions.clone(),
                    goal: if (how, name, peer) == ("clone_", "pod_container_start", "runc") {
                        "<= 1.5"
                    } else {
                        ""
                    },
                })?;
            }
        }
    }
    for (how, at) in ours() {
        where_time_goes(context, how, parts[at], of(&phases[at].all))?;
    }
    Ok(())
}

/// The value of a counter.
fn counted(node: &Node, line: &str) -> io::Result<u64> {
    let text = node.metrics()?;
    let count = text.lines().find_map(|found| found.strip_prefix(line));
    Ok(count.and_then(|count| count.parse().ok()).unwrap_or(0))
}

/// Makes pods until one is counted, as a clone for one: the first of a kind has the template built, when it has come up.
fn until_counted(node: &Node, runtime: &Runtime, line: &str) -> io::Result<()> {
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(300) {
        std::thread::sleep(Duration::from_secs(5));
        node.block_on(async { pod(runtime, &mut Phases::default()).await?.remove().await })
            .map_err(failure)?;
        if counted(node, line)? > 0 {
            return Ok(());
        }
    }
    Err(io::Error::other(format!("no pod within 300 s for {line}")))
}

/// Pods that are all asked for at once.
pub fn at_once(context: &mut Context) -> io::Result<()> {
    let contest = Contest::start(&context.peers.handlers);
    contest.warm()?;
    let node = &contest.node;
    let mut took = Vec::new();
    for runtime in &contest.runtimes {
        let times = node.block_on(all_at_once(runtime)).map_err(failure)?;
        took.push(times);
    }
    for (at, version) in &contest.peers {
        let (peer, version) = contest.peer(*at, version);
        for (name, until, get) in [
            (
                "at_once",
                "until all containers have been started",
                (|times| times.started) as fn(&AtOnce) -> f64,
            ),
            (
                "at_once_and_exec",
                "until each has answered an exec, too",
                |times| times.answered,
            ),
        ] {
            let their = get(&took[*at]);
            for (how, ours) in ours().map(|(how, at)| (how, get(&took[at]))) {
                context.report.add(Figure {
                    name: format!("cri.{how}pod_container_start_{AT_ONCE}_{name}_vs_{peer}"),
                    value: ours / their,
                    unit: "ratio",
                    peer: format!("{peer} {their:.0} ms, cloister {ours:.0} ms"),
                    conditions: format!("{until}; {version}"),
                    goal: if name == "at_once" && peer == "runc" && !how.is_empty() {
                        "<= 1.5"
                    } else {
                        ""
                    },
                })?;
            }
        }
    }
    Ok(())
}

/// Milliseconds from the request for the first pod on.
struct AtOnce {
    /// Until the last container was started.
    started: f64,
    /// Until each has answered an exec as well.
    answered: f64,
}

async fn all_at_once(runtime: &Runtime) -> Outcome<AtOnce> {
    let begin = Instant::now();
    let made = join_all((0..AT_ONCE).map(async |_| started(runtime, &mut Phases::default()).await)).await;
    let started = millis(begin);
    let containers = made.into_iter().collect::<Outcome<Vec<Container>>>()?;
    let answers = join_all(
        containers
            .iter()
            .map(async |container| container.exec(&["true"]).await),
    )
    .await;
    let answered = millis(begin);
    for answer in answers {
        answer?;
    }
    for container in &containers {
        container.pod.remove().await?;
    }
    Ok(AtOnce { started, answered })
}

/// Management memory and processes of pods that do nothing.
pub fn idle(context: &mut Context) -> io::Result<()> {
    let (node, runtimes) = node(["runc", "cloister"]);
    // Ours first: containerd is slow with many pods of the other.
    for runtime in runtimes.iter().rev() {
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
            let busy = management(handler)?;
            // cloisterd gives back its program's pages ten seconds after the last start.
            std::thread::sleep(Duration::from_secs(15));
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
                    "PSS of {what} without guest pages, divided by pods, 17 s after the last start; {:.0} of it heap and stacks; 2 s after the start \
                     {:.0} and {:.0}; {} KiB in all with none",
                    per_pod(now.own_kib),
                    per_pod(busy.kib),
                    per_pod(busy.own_kib),
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

/// What KVM has counted of all VMs of the host until now: exits, and how many of these were halts.
fn kvm_counts() -> io::Result<[u64; 2]> {
    let folder = Path::new("/sys/kernel/debug");
    if !folder.join("kvm").exists() {
        let nothing = rustix::mount::MountFlags::empty();
        rustix::mount::mount("debugfs", folder, "debugfs", nothing, None)?;
    }
    let count = |name: &str| -> io::Result<u64> {
        let text = std::fs::read_to_string(folder.join("kvm").join(name))?;
        text.trim().parse().map_err(io::Error::other)
    };
    Ok([count("exits")?, count("halt_exits")?])
}

/// How often pods are woken whose containers sleep. Needs a host without other VMs.
pub fn rest(context: &mut Context) -> io::Result<()> {
    // No spare one, either.
    let node = Node::start(&["cloister"]);
    let runtime = node.runtime("cloister");
    let pods: Vec<Pod> = (0..RESTING)
        .map(|_| node.block_on(pod(&runtime, &mut Phases::default())))
        .collect::<Outcome<_>>()
        .map_err(failure)?;
    std::thread::sleep(SETTLED);
    let before = kvm_counts()?;
    std::thread::sleep(LOOK);
    let after = kvm_counts()?;
    let minutes = LOOK.as_secs_f64() / 60.0 * f64::from(u32::try_from(RESTING).unwrap_or(1));
    let names = [
        ("cri.rest_exits_per_minute", "< 20"),
        ("cri.rest_halts_per_minute", ""),
    ];
    for (((name, goal), before), after) in names.into_iter().zip(before).zip(after) {
        let count = u32::try_from(after.saturating_sub(before)).unwrap_or(u32::MAX);
        context.report.add(Figure::ours(
            name,
            f64::from(count) / minutes,
            "exits",
            goal,
            format!(
                "KVM's count, mean of {RESTING} pods with a bridge network and a container that sleeps, {} s after the last \
                 one's start, for {} s",
                SETTLED.as_secs(),
                LOOK.as_secs()
            ),
        ))?;
    }
    for pod in pods {
        node.block_on(pod.remove()).map_err(failure)?;
    }
    Ok(())
}

/// Seconds that the daemon has spent in each part of starts until now, by its own figures.
fn phase_seconds(node: &Node) -> io::Result<[f64; PHASES.len()]> {
    let text = node.metrics()?;
    Ok(PHASES.map(|(operation, phase)| {
        let ours = |line: &&str| {
            line.starts_with("cloister_phase_seconds_sum{")
                && line.contains(&format!("operation=\"{operation}\""))
                && line.contains(&format!("phase=\"{phase}\""))
        };
        // One that has not been there yet is not listed.
        let numbers = text
            .lines()
            .filter(ours)
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        numbers.sum()
    }))
}

/// The parts of a pod's and its container's start: means over the pods in turn.
fn where_time_goes(
    context: &mut Context,
    how: &str,
    parts: [f64; PHASES.len()],
    whole: f64,
) -> io::Result<()> {
    let mut own = 0.0;
    for ((operation, phase), seconds) in PHASES.into_iter().zip(parts) {
        let millis = seconds * 1000.0 / f64::from(u32::try_from(SERIAL).unwrap_or(1));
        // What the guest does for its container runc does as well.
        if !["boot", "guest"].contains(&phase) {
            own += millis;
        }
        let (name, call) = match operation {
            "pod_start" => (phase.to_owned(), "RunPodSandbox"),
            _ => (format!("{operation}_{phase}"), "StartContainer"),
        };
        context.report.add(Figure::ours(
            format!("cri.{how}phase_ms.{name}"),
            millis,
            "ms",
            "",
            format!("mean over the pods in turn, part of {call}"),
        ))?;
    }
    context.report.add(Figure {
        name: format!("cri.{how}own_overhead"),
        value: own / whole,
        unit: "ratio",
        peer: format!("{own:.0} of {whole:.0} ms"),
        conditions: "cloisterd's parts but for the guest's boot and its half of containers, of pod and container start"
            .into(),
        goal: if how.is_empty() { "<= 0.10" } else { "" },
    })
}

/// Logs, and the network between two pods of a handler.
pub fn streams(context: &mut Context) -> io::Result<()> {
    let (node, runtimes) = node(["runc", "cloister"]);
    let mut seen = [[0.0; 3]; 2];
    for (runtime, seen) in runtimes.iter().zip(&mut seen) {
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
