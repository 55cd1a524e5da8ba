// SPDX-License-Identifier: Apache-2.0
//! What the daemon counts, in Prometheus's words.
//!
//! # Theory of operation
//!
//! What happens (a pod comes, a phase of its start ends, a call fails) is counted when it happens, by whoever does it. What
//! a VM counts by itself (exits, devices' bytes, memory) is read when somebody asks: each VM is watched through a
//! [`Watch`] while it lives, and when that is dropped the VM's last figures go into the sums of those that have gone, so that
//! no counter ever falls.
//!
//! What a label can say and is known beforehand shows as zero from the start: a family without a sample is left out of the
//! text, and `rate()` does not see the first step of a series that begins with it.
//!
//! ```text
//!  Metrics::watch ──▶ alive: read at each scrape ──drop(Watch)──▶ gone: added to the sums once
//! ```

use super::steps::{ERRORS, OPERATIONS};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, prometheus_text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Its media type.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A pod's state, as it is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PodState {
    /// Created, or starting.
    Created,
    /// Up.
    Ready,
    /// Its VM has ended; containerd still knows it.
    Stopped,
}

impl PodState {
    const ALL: [Self; 3] = [Self::Created, Self::Ready, Self::Stopped];

    fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Ready => "ready",
            Self::Stopped => "stopped",
        }
    }
}

/// What a container is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    /// A container.
    Container,
    /// Another process in one.
    Exec,
}

/// Threads that all pods share.
#[derive(Clone, Copy, Debug)]
pub struct SharedThreads {
    /// Event loops of devices.
    pub event_loops: usize,
    /// Workers for requests that block.
    pub workers: usize,
}

/// Whom a VM's figures belong to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, EncodeLabelSet)]
pub struct PodLabels {
    /// Sandbox id.
    pub id: String,
    /// Pod's name.
    pub pod: String,
    /// Pod's namespace.
    pub namespace: String,
}

/// Figures of VMs, summed up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Exits that reached this program, by reason.
    pub exits: BTreeMap<&'static str, u64>,
    /// Bytes, by device and counter.
    pub bytes: BTreeMap<(&'static str, &'static str), u64>,
    /// Other things, by device and counter.
    pub events: BTreeMap<(&'static str, &'static str), u64>,
}

impl Totals {
    fn add(&mut self, other: &Self) {
        for (key, value) in &other.exits {
            add(self.exits.entry(key).or_default(), *value);
        }
        for (mine, others) in [(&mut self.bytes, &other.bytes), (&mut self.events, &other.events)] {
            for (key, value) in others {
                add(mine.entry(*key).or_default(), *value);
            }
        }
    }
}

fn add(sum: &mut u64, value: u64) {
    *sum = sum.saturating_add(value);
}

/// A VM that is asked at each scrape. It answers at once.
pub trait Source: Send + Sync {
    /// What it has counted since it was made.
    fn totals(&self) -> Totals;
    /// Bytes of host memory that its RAM takes now.
    fn memory(&self) -> Option<u64>;
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    sandboxer: String,
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SandboxerLabel {
    sandboxer: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OperationLabels {
    operation: &'static str,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PhaseLabels {
    operation: &'static str,
    phase: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ErrorLabels {
    operation: &'static str,
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BuildLabels {
    version: &'static str,
    protocol: String,
}

type Histograms<S> = Family<S, Histogram, fn() -> Histogram>;

/// All of the daemon's metrics; clones are handles to the same ones.
#[derive(Clone)]
pub struct Metrics(Arc<Inner>);

struct Inner {
    registry: Registry,
    pods: Family<StateLabel, Gauge>,
    pods_started: Family<SandboxerLabel, Counter>,
    pods_cloned: Counter,
    pods_pooled: Counter,
    containers: Gauge,
    containers_started: Counter,
    execs: Gauge,
    execs_started: Counter,
    operations: Histograms<OperationLabels>,
    phases: Histograms<PhaseLabels>,
    errors: Family<ErrorLabels, Counter>,
    oom: Counter,
    watched: Arc<Watched>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("Metrics")
    }
}

/// 1 ms to 65 s.
fn histogram() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 17))
}

impl Metrics {
    /// All of them, at zero; `sandboxers` are those that there can be pods of.
    pub fn new<'a>(threads: SharedThreads, sandboxers: impl IntoIterator<Item = &'a str>) -> Self {
        let mut registry = Registry::default();
        let pods = Family::<StateLabel, Gauge>::default();
        let pods_started = Family::<SandboxerLabel, Counter>::default();
        let (containers, execs) = (Gauge::default(), Gauge::default());
        let [pods_cloned, pods_pooled, containers_started, execs_started, oom] =
            [(); 5].map(|()| Counter::default());
        let operations: Histograms<OperationLabels> = Family::new_with_constructor(histogram);
        let phases: Histograms<PhaseLabels> = Family::new_with_constructor(histogram);
        let errors = Family::<ErrorLabels, Counter>::default();
        let watched = Arc::new(Watched::default());
        let count = |n: usize| ConstGauge::new(i64::try_from(n).unwrap_or(i64::MAX));

        registry.register(
            "cloister_build",
            "The daemon's version, and that of its protocol with agents",
            Info::new(BuildLabels {
                version: env!("CARGO_PKG_VERSION"),
                protocol: cloister_protocol::PROTOCOL_VERSION.to_string(),
            }),
        );
        registry.register(
            "cloister_pods",
            "Pods that containerd knows, by sandboxer and state",
            pods.clone(),
        );
        registry.register("cloister_pods_started", "Pods that came up", pods_started.clone());
        registry.register(
            "cloister_pods_cloned",
            "Pods of those whose virtual machine was cloned from a template",
            pods_cloned.clone(),
        );
        registry.register(
            "cloister_pods_pooled",
            "Pods of those whose virtual machine was made ahead",
            pods_pooled.clone(),
        );
        registry.register("cloister_containers", "Containers that run", containers.clone());
        registry.register(
            "cloister_containers_started",
            "Containers that were started",
            containers_started.clone(),
        );
        registry.register(
            "cloister_execs",
            "Further processes in containers that run",
            execs.clone(),
        );
        registry.register(
            "cloister_execs_started",
            "Further processes in containers that were started",
            execs_started.clone(),
        );
        registry.register(
            "cloister_operation_seconds",
            "Time of calls from containerd, by what they ask for and how they ended",
            operations.clone(),
        );
        registry.register(
            "cloister_phase_seconds",
            "Time of the parts of an operation, one after the other",
            phases.clone(),
        );
        registry.register(
            "cloister_errors",
            "Calls that failed, by what they ask for and the code that was answered",
            errors.clone(),
        );
        registry.register(
            "cloister_oom_kills",
            "Containers in which the guest's kernel killed for want of memory",
            oom.clone(),
        );
        registry.register(
            "cloister_event_loops",
            "Threads for the data side of all pods' devices",
            count(threads.event_loops),
        );
        registry.register(
            "cloister_workers",
            "Threads for all pods' requests that block",
            count(threads.workers),
        );
        registry.register_collector(Box::new(Arc::clone(&watched)));
        registry.register_collector(Box::new(super::process_metrics::ProcessMetrics));
        let metrics = Self(Arc::new(Inner {
            registry,
            pods,
            pods_started,
            pods_cloned,
            pods_pooled,
            containers,
            containers_started,
            execs,
            execs_started,
            operations,
            phases,
            errors,
            oom,
            watched,
        }));
        for sandboxer in sandboxers {
            for state in PodState::ALL {
                metrics.pods(sandboxer, state);
            }
            metrics.pods_started(sandboxer);
        }
        for (operation, steps) in OPERATIONS {
            for outcome in ["ok", "error"] {
                metrics.operations(operation, outcome);
            }
            for phase in steps {
                metrics.phases(operation, phase);
            }
            for kind in ERRORS {
                metrics.errors(operation, kind);
            }
        }
        metrics
    }

    /// Counts a pod of a sandboxer, in [`PodState::Created`] at first, until the answer is dropped.
    pub fn pod(&self, sandboxer: &str) -> PodGauge {
        self.pods(sandboxer, PodState::Created).inc();
        PodGauge {
            metrics: self.clone(),
            sandboxer: sandboxer.to_owned(),
            state: Mutex::new(PodState::Created),
        }
    }

    fn pods(&self, sandboxer: &str, state: PodState) -> Gauge {
        self.0.pods.get_or_create_owned(&StateLabel {
            sandboxer: sandboxer.to_owned(),
            state: state.name(),
        })
    }

    fn pods_started(&self, sandboxer: &str) -> Counter {
        self.0.pods_started.get_or_create_owned(&SandboxerLabel {
            sandboxer: sandboxer.to_owned(),
        })
    }

    fn operations(&self, operation: &'static str, outcome: &'static str) -> Histogram {
        self.0
            .operations
            .get_or_create_owned(&OperationLabels { operation, outcome })
    }

    fn phases(&self, operation: &'static str, phase: &'static str) -> Histogram {
        self.0
            .phases
            .get_or_create_owned(&PhaseLabels { operation, phase })
    }

    fn errors(&self, operation: &'static str, kind: &'static str) -> Counter {
        self.0
            .errors
            .get_or_create_owned(&ErrorLabels { operation, kind })
    }

    /// Counts a process that runs, until the answer is dropped.
    pub fn process(&self, kind: Process) -> ProcessGauge {
        let (gauge, started) = match kind {
            Process::Container => (&self.0.containers, &self.0.containers_started),
            Process::Exec => (&self.0.execs, &self.0.execs_started),
        };
        started.inc();
        gauge.inc();
        ProcessGauge(gauge.clone())
    }

    /// A call of containerd's has ended: with the name of a gRPC code, if it failed.
    pub fn operation(&self, operation: &'static str, took: Duration, error: Option<&'static str>) {
        let outcome = if error.is_some() { "error" } else { "ok" };
        self.operations(operation, outcome).observe(took.as_secs_f64());
        if let Some(kind) = error {
            self.errors(operation, kind).inc();
        }
    }

    /// A part of an operation has ended.
    pub fn phase(&self, operation: &'static str, phase: &'static str, took: Duration) {
        self.phases(operation, phase).observe(took.as_secs_f64());
    }

    /// A pod came up as a clone.
    pub fn cloned(&self) {
        self.0.pods_cloned.inc();
    }

    /// Its VM was made ahead.
    pub fn pooled(&self) {
        self.0.pods_pooled.inc();
    }

    /// A container lost a process for want of memory.
    pub fn oom(&self) {
        self.0.oom.inc();
    }

    /// Reads a VM's figures at each scrape, until the answer is dropped.
    pub fn watch(&self, labels: PodLabels, source: Arc<dyn Source>) -> Watch {
        let watched = Arc::clone(&self.0.watched);
        let mut inner = watched.lock();
        let key = inner.next;
        inner.next = inner.next.wrapping_add(1);
        inner.alive.insert(key, (labels, source));
        drop(inner);
        Watch { watched, key }
    }

    /// The text for a scrape. It asks each VM.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail, and no metric of ours does.
        let _ = prometheus_text::encode(&mut text, &self.0.registry);
        text
    }
}

/// A pod that is counted.
#[derive(Debug)]
pub struct PodGauge {
    metrics: Metrics,
    sandboxer: String,
    state: Mutex<PodState>,
}

impl PodGauge {
    /// It is in this state now.
    pub fn set(&self, state: PodState) {
        let mut now = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if *now == state {
            return;
        }
        self.metrics.pods(&self.sandboxer, *now).dec();
        self.metrics.pods(&self.sandboxer, state).inc();
        *now = state;
        if state == PodState::Ready {
            self.metrics.pods_started(&self.sandboxer).inc();
        }
    }
}

impl Drop for PodGauge {
    fn drop(&mut self) {
        let state = *self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.metrics.pods(&self.sandboxer, state).dec();
    }
}

/// A process that is counted.
#[derive(Debug)]
pub struct ProcessGauge(Gauge);

impl Drop for ProcessGauge {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// A VM whose figures are read.
pub struct Watch {
    watched: Arc<Watched>,
    key: u64,
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut inner = self.watched.lock();
        if let Some((_, source)) = inner.alive.remove(&self.key) {
            let totals = source.totals();
            inner.gone.add(&totals);
        }
    }
}

#[derive(Default)]
struct Watched(Mutex<WatchedInner>);

#[derive(Default)]
struct WatchedInner {
    next: u64,
    alive: BTreeMap<u64, (PodLabels, Arc<dyn Source>)>,
    gone: Totals,
}

impl Watched {
    fn lock(&self) -> std::sync::MutexGuard<'_, WatchedInner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Watched {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("Watched")
    }
}

impl Collector for Watched {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let (totals, memory) = {
            let inner = self.lock();
            let mut totals = inner.gone.clone();
            let mut memory = Vec::new();
            for (labels, source) in inner.alive.values() {
                totals.add(&source.totals());
                if let Some(bytes) = source.memory() {
                    memory.push((labels.clone(), bytes));
                }
            }
            (totals, memory)
        };
        let mut family = encoder.encode_descriptor(
            "cloister_vm_exits",
            "Exits of virtual machines that reached the daemon, by reason",
            None,
            MetricType::Counter,
        )?;
        for (reason, value) in &totals.exits {
            let labels = [("reason", *reason)];
            ConstCounter::new(*value).encode(family.encode_family(&labels)?)?;
        }
        for (name, help, values) in [
            (
                "cloister_device_bytes",
                "Bytes through devices of virtual machines",
                &totals.bytes,
            ),
            (
                "cloister_device_events",
                "What devices of virtual machines count beside bytes",
                &totals.events,
            ),
        ] {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for ((device, counter), value) in values {
                let labels = [("device", *device), ("counter", *counter)];
                ConstCounter::new(*value).encode(family.encode_family(&labels)?)?;
            }
        }
        let mut family = encoder.encode_descriptor(
            "cloister_pod_memory_bytes",
            "Host memory that a virtual machine's RAM takes",
            None,
            MetricType::Gauge,
        )?;
        for (labels, bytes) in &memory {
            let value = i64::try_from(*bytes).unwrap_or(i64::MAX);
            family.encode_family(labels)?.encode_gauge(&value)?;
        }
        let all: u64 = memory
            .iter()
            .fold(0, |sum, (_, bytes)| sum.saturating_add(*bytes));
        let family = encoder.encode_descriptor(
            "cloister_guest_memory_bytes",
            "Host memory that all virtual machines' RAM takes",
            None,
            MetricType::Gauge,
        )?;
        ConstGauge::new(i64::try_from(all).unwrap_or(i64::MAX)).encode(family)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub fn metrics() -> Metrics {
        let threads = SharedThreads {
            event_loops: 2,
            workers: 3,
        };
        Metrics::new(threads, ["cloister", "big"])
    }

    /// The value of a series, written as in a scrape.
    fn value(text: &str, series: &str) -> Option<f64> {
        let line = text.lines().find_map(|line| line.strip_prefix(series))?;
        line.trim().parse().ok()
    }

    struct Fake(u64);

    impl Source for Fake {
        fn totals(&self) -> Totals {
            Totals {
                exits: BTreeMap::from([("mmio_write", self.0)]),
                bytes: BTreeMap::from([(("net", "received"), self.0)]),
                events: BTreeMap::new(),
            }
        }

        fn memory(&self) -> Option<u64> {
            Some(self.0 << 20)
        }
    }

    #[test]
    fn every_metric_has_a_type_and_help() {
        let metrics = metrics();
        let _pod = metrics.pod("cloister");
        metrics.operation("RunPod", Duration::from_millis(3), Some("not_found"));
        metrics.phase("RunPod", "boot", Duration::from_millis(3));
        let text = metrics.encode();
        let mut names = 0;
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let name = rest.split(' ').next().unwrap();
                let help = text
                    .lines()
                    .find_map(|l| l.strip_prefix(&format!("# HELP {name} ")));
                assert!(help.is_some_and(|help| help.len() > 10), "{name}");
                names += 1;
            }
        }
        assert!(names >= 20, "{text}");
    }

    #[test]
    fn pods_are_in_one_state_and_go() {
        let metrics = metrics();
        let count = |state: &str| {
            let series = format!("cloister_pods{{sandboxer=\"big\",state=\"{state}\"}}");
            value(&metrics.encode(), &series)
        };
        assert_eq!((count("created"), count("ready")), (Some(0.0), Some(0.0)));
        let pod = metrics.pod("big");
        assert_eq!((count("created"), count("ready")), (Some(1.0), Some(0.0)));
        pod.set(PodState::Ready);
        pod.set(PodState::Ready);
        assert_eq!((count("created"), count("ready")), (Some(0.0), Some(1.0)));
        assert_eq!(
            value(
                &metrics.encode(),
                "cloister_pods_started_total{sandboxer=\"big\"}"
            ),
            Some(1.0)
        );
        drop(pod);
        assert_eq!(
            (count("created"), count("ready"), count("stopped")),
            (Some(0.0), Some(0.0), Some(0.0))
        );
    }

    #[test]
    fn processes_and_errors() {
        let metrics = metrics();
        let container = metrics.process(Process::Container);
        let exec = metrics.process(Process::Exec);
        drop(metrics.process(Process::Exec));
        metrics.oom();
        metrics.operation("Start", Duration::from_secs(1), None);
        metrics.operation("Start", Duration::from_secs(1), Some("internal"));
        let text = metrics.encode();
        for (series, expected) in [
            ("cloister_containers ", 1.0),
            ("cloister_execs ", 1.0),
            ("cloister_execs_started_total ", 2.0),
            ("cloister_oom_kills_total ", 1.0),
            (
                "cloister_errors_total{operation=\"Start\",kind=\"internal\"}",
                1.0,
            ),
            (
                "cloister_operation_seconds_count{operation=\"Start\",outcome=\"ok\"}",
                1.0,
            ),
            ("cloister_event_loops ", 2.0),
        ] {
            assert_eq!(value(&text, series), Some(expected), "{series}\n{text}");
        }
        drop((container, exec));
        assert_eq!(value(&metrics.encode(), "cloister_containers "), Some(0.0));
    }

    #[test]
    fn counters_do_not_fall_when_a_vm_goes() {
        let metrics = metrics();
        let labels = |id: &str| PodLabels {
            id: id.into(),
            pod: "p\"1".into(),
            namespace: "default".into(),
        };
        let first = metrics.watch(labels("a"), Arc::new(Fake(5)));
        let second = metrics.watch(labels("b"), Arc::new(Fake(7)));
        let exits = || {
            value(
                &metrics.encode(),
                "cloister_vm_exits_total{reason=\"mmio_write\"}",
            )
        };
        assert_eq!(exits(), Some(12.0));
        let memory = |id| {
            value(
                &metrics.encode(),
                &format!("cloister_pod_memory_bytes{{id=\"{id}\",pod=\"p\\\"1\",namespace=\"default\"}}"),
            )
        };
        assert_eq!((memory("a"), memory("b")), (Some(5_242_880.0), Some(7_340_032.0)));
        assert_eq!(
            value(&metrics.encode(), "cloister_guest_memory_bytes"),
            Some(12_582_912.0)
        );
        drop(first);
        assert_eq!((exits(), memory("a")), (Some(12.0), None));
        drop(second);
        assert_eq!(exits(), Some(12.0));
        assert_eq!(
            value(
                &metrics.encode(),
                "cloister_device_bytes_total{device=\"net\",counter=\"received\"}"
            ),
            Some(12.0)
        );
    }

    #[test]
    fn the_dashboard_names_what_there_is() {
        let dashboard: serde_json::Value =
            serde_json::from_str(include_str!("../../../docs/grafana/cloister.json")).unwrap();
        let text = metrics().encode();
        let exists = |name: &str| {
            let base = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|end| name.strip_suffix(end));
            [Some(name), base, name.strip_suffix("_total")]
                .into_iter()
                .flatten()
                .any(|name| {
                    text.contains(&format!("# TYPE {name} "))
                        || text.contains(&format!("# TYPE {name}_total "))
                })
        };
        let mut queries = 0;
        for panel in dashboard["panels"].as_array().unwrap() {
            for target in panel["targets"].as_array().into_iter().flatten() {
                let query = target["expr"].as_str().unwrap();
                let names = query
                    .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
                    .filter(|word| word.starts_with("cloister_") || word.starts_with("process_"));
                for name in names {
                    assert!(exists(name), "{query}: there is no {name} in\n{text}");
                    queries += 1;
                }
            }
        }
        assert!(queries >= 10);
        let documentation = include_str!("../../../docs/observability.md");
        for line in text.lines() {
            if let Some(name) = line
                .strip_prefix("# TYPE ")
                .and_then(|rest| rest.split(' ').next())
            {
                assert!(documentation.contains(name), "docs/observability.md lacks {name}");
            }
        }
    }
}
