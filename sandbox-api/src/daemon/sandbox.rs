// SPDX-License-Identifier: Apache-2.0
//! One pod of the daemon, from Create to Shutdown.
//!
//! ```text
//!  Create         Start             agent ready               Stop, or the VM ends          Shutdown
//! ───────▶ created ───▶ starting ───────────────▶ ready ───────────────────▶ stopping ──▶ stopped ───▶ gone
//!             │            ├──── it fails, Start is abandoned: all is undone ──────────────────────────▶ ▲
//!             │            └──── Stop ──────────────────────────────────────────▶ ▲           ▲
//!             └───────────────── Stop ────────────────────────────────────────────────────────┘
//! ```
//!
//! One task, spawned by Start, walks a pod through its life and undoes what it made on every way out; requests only ask
//! ([`Ask`]) and watch ([`Phase`]). So they can be concurrent, repeated and abandoned, and no lock is held across a boot.
//! The Task service outlives the VM: its State, Wait and Delete answer until Shutdown.

use super::config::Profile;
use super::event_log::{Event, EventLog, Kind};
use super::idle;
use super::metrics::{PodGauge, PodLabels, PodState, Process, ProcessGauge, Watch};
use super::node::Node;
use super::pod_plan::PodPlan;
use super::steps::{POD_START, StepTime, Steps};
use super::telemetry;
use super::usage;
use crate::clock::{self, Millis};
use crate::files;
use crate::net::cni::{self, PodNet};
use crate::net::{self, forward::Forwarder};
use crate::pod::machine::{self, Machine, MachineConfig, Origin, Room};
use crate::pod::pool::Ahead;
use crate::pod::resize::{self, Resizer};
use crate::pod::size::{Limits, Size, Sizing};
use crate::pod::state::EXIT_KILLED;
use crate::pod::task::{self, Running, TaskService};
use crate::pod::template;
use crate::pod::vm::{self, PodVm};
use crate::sync::lock;
use cloister_protocol::pod::ConfigureRequest;
use cloister_protocol::protobuf::MessageField;
use cloister_protocol::task::Metrics;
use cloister_vmm::Cell;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{Instrument, Span};

/// File of the [`Record`].
const RECORD: &str = "sandbox.json";
/// File of the last words of a VM that ended by itself.
const CONSOLE: &str = "console.txt";
/// What containerd sets in pods that it makes itself, unless it is told not to (`enable_unprivileged_ports`,
/// `enable_unprivileged_icmp`).
const UNPRIVILEGED: [(&str, &str); 2] = [
    ("net.ipv4.ip_unprivileged_port_start", "0"),
    ("net.ipv4.ping_group_range", "0 2147483647"),
];
/// Longest path of a unix socket that containerd can dial (`sun_path`, with its NUL).
const MAX_SOCKET_PATH: usize = 107;

/// Where a pod is in its life; see the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Known, nothing made.
    Created,
    /// Being made.
    Starting,
    /// Takes containers.
    Ready,
    /// Being taken apart.
    Stopping,
    /// Over; its tasks can still be asked about.
    Stopped,
    /// Not known any more.
    Gone,
}

/// What the pod's task is asked for; only ever raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Ask {
    Live,
    Stop,
    Remove,
}

/// How a pod ended.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Exit {
    /// 0 when it was asked to, 137 when its VM was lost.
    pub status: u32,
    /// When.
    pub at: Millis,
    /// Why, if nobody asked for it.
    pub reason: Option<String>,
}

/// What is kept of a pod in `sandbox.json`, replaced as a whole at each step.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Record {
    /// containerd's id.
    pub id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// The sandboxer whose profile it has.
    pub sandboxer: String,
    /// The worker that hosts it; none: the daemon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<String>,
    /// What its VM is to be.
    pub plan: PodPlan,
    /// Its network namespace; empty: none.
    pub netns: String,
    /// Phase.
    pub phase: Phase,
    /// When Create came.
    pub created: Millis,
    /// When its agent was ready.
    pub started: Option<Millis>,
    /// How it ended.
    pub exit: Option<Exit>,
    /// How long each step of its start took.
    #[serde(default)]
    pub steps: Vec<StepTime>,
}

/// Why a request to a pod fails.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its VM.
    #[error("sandbox {id}: {}", crate::error::chain(source))]
    Vm {
        /// The pod.
        id: String,
        /// Why.
        source: vm::Error,
    },
    /// Its network.
    #[error("sandbox {id}: {}", crate::error::chain(source))]
    Net {
        /// The pod.
        id: String,
        /// Why.
        source: net::Error,
    },
    /// Its files.
    #[error("sandbox {id}: cannot {what} {}: {source}", path.display())]
    Io {
        /// The pod.
        id: String,
        /// The verb.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Its size.
    #[error("sandbox {id}: {}", crate::error::chain(source))]
    Resize {
        /// The pod.
        id: String,
        /// Why.
        source: resize::Error,
    },
    /// The request does not go with the pod's phase.
    #[error("sandbox {id} is {phase}: it cannot be {verb}")]
    Phase {
        /// The pod.
        id: String,
        /// Its phase.
        phase: &'static str,
        /// What was asked.
        verb: &'static str,
    },
}

impl Record {
    /// The one in a pod's folder.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub fn read(dir: &Path) -> io::Result<Self> {
        Ok(serde_json::from_slice(&std::fs::read(dir.join(RECORD))?)?)
    }
}

impl Phase {
    /// As in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Gone => "gone",
        }
    }
}

/// See the module.
pub struct Sandbox {
    dir: PathBuf,
    profile: Profile,
    record: Mutex<Record>,
    phase: watch::Sender<Phase>,
    ask: watch::Sender<Ask>,
    service: OnceLock<Arc<TaskService>>,
    /// Its VM, once there is one and as long as there is.
    cell: OnceLock<Weak<Cell>>,
    /// A task walks it through its life.
    lives: AtomicBool,
    /// Why Start failed, for those who wait for it.
    failure: Mutex<Option<Arc<Error>>>,
    /// Its VM, as long as it is there.
    machine: OnceLock<Weak<Machine>>,
    counted: PodGauge,
    log: EventLog,
}

/// Asks for the pod's end when the Start that began its life is abandoned.
struct Abandoned<'a>(Option<&'a Sandbox>);

impl Drop for Abandoned<'_> {
    fn drop(&mut self) {
        if let Some(sandbox) = self.0 {
            log::info!("sandbox {}: its start was abandoned", sandbox.id());
            sandbox.ask(Ask::Remove);
        }
    }
}

impl Sandbox {
    /// A pod that is only known so far; its folder and record are made.
    ///
    /// # Errors
    /// The folder cannot be made, or its path is too long for a socket.
    pub fn create(
        dir: PathBuf,
        profile: Profile,
        record: Record,
        counted: PodGauge,
        log: EventLog,
    ) -> Result<Arc<Self>, Error> {
        let sandbox = Self::new(dir, profile, record, counted, log);
        let io = |what, path: &Path, source| Error::Io {
            id: sandbox.id(),
            what,
            path: path.to_owned(),
            source,
        };
        let socket = sandbox.socket();
        if socket.as_os_str().len() > MAX_SOCKET_PATH {
            let source = io::Error::other(format!(
                "longer than {MAX_SOCKET_PATH} bytes; choose a shorter state_dir"
            ));
            return Err(io("make the socket", &socket, source));
        }
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&sandbox.dir)
            .map_err(|e| io("make", &sandbox.dir, e))?;
        if let Err(source) = sandbox.save() {
            let error = io("write", &sandbox.record_path(), source);
            let _ = std::fs::remove_dir_all(&sandbox.dir);
            return Err(error);
        }
        sandbox.tell(Kind::Created, None);
        Ok(sandbox)
    }

    /// A pod that its process, a daemon before this one or a worker, left behind: its VM ended with that. `reason` says how.
    pub fn recover(
        dir: PathBuf,
        mut record: Record,
        reason: &str,
        log: EventLog,
        of: impl FnOnce(&str) -> (Profile, PodGauge),
    ) -> Arc<Self> {
        let is_lost = record.phase != Phase::Stopped;
        if is_lost {
            record.phase = Phase::Stopped;
            record.exit = Some(Exit {
                status: EXIT_KILLED,
                at: clock::now(),
                reason: Some(reason.to_owned()),
            });
        }
        if !record.netns.is_empty() {
            cni::disconnect_soon(Path::new(&record.netns));
        }
        let (profile, counted) = of(&record.sandboxer);
        counted.set(PodState::Stopped);
        let sandbox = Self::new(dir, profile, record, counted, log);
        let _ = std::fs::remove_file(sandbox.socket());
        // What the record says now, it will say of a daemon after this one.
        sandbox.save_or_warn();
        if is_lost {
            sandbox.tell(Kind::Stopped, Some(reason));
        }
        sandbox
    }

    fn new(dir: PathBuf, profile: Profile, record: Record, counted: PodGauge, log: EventLog) -> Arc<Self> {
        Arc::new(Self {
            dir,
            profile,
            phase: watch::channel(record.phase).0,
            ask: watch::channel(Ask::Live).0,
            record: Mutex::new(record),
            service: OnceLock::new(),
            cell: OnceLock::new(),
            lives: AtomicBool::new(false),
            failure: Mutex::default(),
            machine: OnceLock::new(),
            counted,
            log,
        })
    }

    /// containerd's id of it.
    pub fn id(&self) -> String {
        lock(&self.record).id.clone()
    }

    /// What is known of it.
    pub fn record(&self) -> Record {
        lock(&self.record).clone()
    }

    /// What its figures and logs are labelled with.
    pub fn labels(&self) -> PodLabels {
        let record = lock(&self.record);
        PodLabels {
            id: record.id.clone(),
            pod: record.plan.name.clone(),
            namespace: record.plan.namespace.clone(),
        }
    }

    /// What is done for it is done in this span, for log lines to name it.
    pub fn span(&self) -> Span {
        telemetry::pod_span(&self.labels())
    }

    /// Its phase.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Its VM, from the start until it is removed.
    pub fn machine(&self) -> Option<Arc<Machine>> {
        self.machine.get().and_then(Weak::upgrade)
    }

    /// What its VM has; of a pod without one, what it was promised.
    pub fn size(&self) -> Size {
        let service = self.service().filter(|_| self.phase() == Phase::Ready);
        let now = service
            .and_then(|service| service.resizer())
            .map(Resizer::known_size);
        now.unwrap_or_else(|| lock(&self.record).plan.size())
    }

    /// What its guest's kernel has said after the first `seen` bytes of that, and how many bytes it has said in all. Of a VM
    /// that ended by itself under a daemon before this one, what was kept.
    pub fn console(&self, seen: u64) -> (Vec<u8>, u64) {
        match self.machine() {
            Some(machine) => machine.cell().console_tail().since(seen),
            None => {
                let kept = std::fs::read(self.dir.join(CONSOLE)).unwrap_or_default();
                let length = kept.len() as u64;
                let skip = usize::try_from(seen.min(length)).unwrap_or(usize::MAX);
                (kept.get(skip..).unwrap_or_default().to_owned(), length)
            }
        }
    }

    /// Makes the folder of a container's configuration for a client that does not bring one, and answers it.
    ///
    /// # Errors
    /// The id is no file name, or the disk.
    pub fn make_bundle(&self, container: &str, spec: &[u8]) -> Result<PathBuf, Error> {
        let dir = self.bundle(container);
        let failed = |what, path: &Path, source| Error::Io {
            id: self.id(),
            what,
            path: path.to_owned(),
            source,
        };
        task::check_id(container)
            .map_err(|e| failed("name", &dir, io::Error::new(io::ErrorKind::InvalidInput, e)))?;
        std::fs::DirBuilder::new()
            .mode(0o700)
            .recursive(true)
            .create(&dir)
            .map_err(|e| failed("make", &dir, e))?;
        let config = dir.join("config.json");
        files::replace(&config, spec).map_err(|e| failed("write", &config, e))?;
        Ok(dir)
    }

    /// Removes it, if it is there.
    pub fn remove_bundle(&self, container: &str) {
        if task::check_id(container).is_ok() {
            let _ = std::fs::remove_dir_all(self.bundle(container));
        }
    }

    fn bundle(&self, container: &str) -> PathBuf {
        self.dir.join("bundles").join(container)
    }

    /// Something happens to it.
    fn tell(&self, kind: Kind, message: Option<&str>) {
        let event = Event::now(kind, &self.labels());
        self.log.add(match message {
            Some(message) => event.with_message(message),
            None => event,
        });
    }

    /// Its Task service, from ready on.
    pub fn service(&self) -> Option<&Arc<TaskService>> {
        self.service.get()
    }

    /// Where its Task service listens.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("task.sock")
    }

    fn record_path(&self) -> PathBuf {
        self.dir.join(RECORD)
    }

    fn save(&self) -> io::Result<()> {
        let json = serde_json::to_vec_pretty(&*lock(&self.record))?;
        files::replace(&self.record_path(), &json)
    }

    fn save_or_warn(&self) {
        if let Err(error) = self.save() {
            log::warn!("sandbox {}: cannot write its record: {error}", self.id());
        }
    }

    /// Goes to another phase: record and figures first, then those who wait.
    fn enter(&self, phase: Phase, note: impl FnOnce(&mut Record)) {
        match phase {
            Phase::Ready => self.counted.set(PodState::Ready),
            Phase::Stopped => self.counted.set(PodState::Stopped),
            _ => {}
        }
        {
            let mut record = lock(&self.record);
            record.phase = phase;
            note(&mut record);
        }
        if phase != Phase::Gone {
            self.save_or_warn();
        }
        self.phase.send_replace(phase);
    }

    fn ask(&self, ask: Ask) {
        self.ask.send_if_modified(|now| {
            let raised = ask > *now;
            *now = (*now).max(ask);
            raised
        });
    }

    async fn asked(&self, least: Ask) {
        let mut asks = self.ask.subscribe();
        // The sender is ours: it cannot be gone.
        let _ = asks.wait_for(|ask| *ask >= least).await;
    }

    async fn reached(&self, least: Phase) -> Phase {
        let mut phases = self.phase.subscribe();
        phases
            .wait_for(|phase| *phase >= least)
            .await
            .map_or(Phase::Gone, |phase| *phase)
    }

    /// Has it run; answers when its agent is ready. A repeated call waits for the same. `traceparent` is the caller's header
    /// of that name.
    ///
    /// # Errors
    /// It could not be had, and all is undone; or it is over already.
    pub async fn start(
        self: &Arc<Self>,
        node: &Arc<Node>,
        traceparent: Option<&str>,
    ) -> Result<(), Arc<Error>> {
        let begins = self.phase.send_if_modified(|phase| {
            let begins = *phase == Phase::Created;
            if begins {
                *phase = Phase::Starting;
            }
            begins
        });
        let mut abandoned = Abandoned(None);
        if begins {
            abandoned.0 = Some(self);
            self.lives.store(true, Ordering::Relaxed);
            let steps = Steps::new(&node.metrics, POD_START, &self.labels(), None, traceparent);
            let life = Arc::clone(self).live(Arc::clone(node), steps);
            tokio::spawn(life.instrument(self.span()));
        }
        let phase = self.reached(Phase::Ready).await;
        abandoned.0 = None;
        if phase == Phase::Ready {
            return Ok(());
        }
        // Whoever hears of the failure finds the network namespace and the files as they were.
        self.reached(Phase::Stopped).await;
        let failure = lock(&self.failure).clone();
        Err(failure.unwrap_or_else(|| self.wrong_phase("started")))
    }

    fn wrong_phase(&self, verb: &'static str) -> Arc<Error> {
        Arc::new(Error::Phase {
            id: self.id(),
            phase: self.phase().name(),
            verb,
        })
    }

    /// Ends its VM; answers when it has.
    pub async fn stop(&self) {
        // Nothing was made yet, and nothing will be.
        let never = self.phase.send_if_modified(|phase| {
            let never = *phase == Phase::Created;
            if never {
                *phase = Phase::Stopping;
            }
            never
        });
        if never {
            self.enter(Phase::Stopped, |record| record.exit = Some(asked_for()));
            self.tell(Kind::Stopped, None);
        }
        self.ask(Ask::Stop);
        self.reached(Phase::Stopped).await;
    }

    /// Ends what is left of it; answers when there is nothing.
    pub async fn remove(&self) {
        self.stop().await;
        self.ask(Ask::Remove);
        if !self.lives.load(Ordering::Relaxed) {
            self.forget();
        }
        self.reached(Phase::Gone).await;
    }

    /// Removes what is left of one that was recovered.
    pub fn discard(&self) {
        self.forget();
    }

    fn forget(&self) {
        if self.phase() == Phase::Gone {
            return;
        }
        if let Err(error) = std::fs::remove_dir_all(&self.dir)
            && error.kind() != io::ErrorKind::NotFound
        {
            log::warn!("cannot remove {}: {error}", self.dir.display());
        }
        self.enter(Phase::Gone, |_| ());
        self.tell(Kind::Removed, None);
    }

    /// The pod as a whole may use something else from now on, with `overhead` bytes beside its containers, as its RuntimeClass
    /// declares them.
    ///
    /// # Errors
    /// It has no VM, or that cannot be had; nothing is changed then.
    pub async fn resize(&self, limits: Limits, overhead: Option<u64>) -> Result<(), Arc<Error>> {
        let service = self.service.get().filter(|_| self.phase() == Phase::Ready);
        let Some(resizer) = service.and_then(|service| service.resizer()) else {
            return Err(self.wrong_phase("resized"));
        };
        let resized = resizer.change_pod(limits, self.of_vm(overhead)).await;
        resized.map_err(|source| {
            Arc::new(Error::Resize {
                id: self.id(),
                source,
            })
        })
    }

    /// What its VM has of a declared overhead: a worker has its part as it had at the start.
    fn of_vm(&self, overhead: Option<u64>) -> Option<u64> {
        overhead.map(|bytes| self.profile.sizing(Some(bytes)).overhead)
    }

    /// What it uses, as the host and its guest count it.
    ///
    /// # Errors
    /// It has no VM.
    pub async fn usage(&self) -> Result<Metrics, Arc<Error>> {
        match self.running() {
            Some((cell, service)) => Ok(usage::of(&cell, service).await),
            None => Err(self.wrong_phase("measured")),
        }
    }

    /// Its VM and its Task service, while it takes containers.
    pub fn running(&self) -> Option<(Arc<Cell>, &Arc<TaskService>)> {
        let cell = self.cell.get().and_then(Weak::upgrade);
        let service = self.service.get().filter(|_| self.phase() == Phase::Ready);
        cell.zip(service)
    }

    /// Waits for the end of the VM, or of a pod that never had one.
    pub async fn wait(&self) -> Exit {
        self.reached(Phase::Stopped).await;
        let exit = lock(&self.record).exit.clone();
        exit.unwrap_or_else(asked_for)
    }

    async fn live(self: Arc<Self>, node: Arc<Node>, mut steps: Steps) {
        let mut made = Made::default();
        let booted = tokio::select! {
            booted = self.boot(&node, &mut made, &mut steps) => booted,
            () = self.asked(Ask::Stop) => Err(Error::Phase {
                id: self.id(),
                phase: "asked to stop",
                verb: "started",
            }),
        };
        // What the agent refuses is the pod's own fault, and must not cost others their template.
        let came_up = match &booted {
            Ok(()) => Some(true),
            Err(Error::Vm { source, .. }) if !matches!(source, vm::Error::Agent { .. }) => Some(false),
            Err(_) => None,
        };
        if let (Some(kind), Some(up)) = (&made.template, came_up) {
            node.templates.came_up(kind, up);
        }
        let exit = match booted {
            Ok(()) => {
                let steps = steps.done();
                self.tell(Kind::Started, None);
                self.enter(Phase::Ready, |record| {
                    record.started = Some(clock::now());
                    record.steps = steps;
                });
                self.until_end(&mut made).await
            }
            Err(error) => {
                let told = crate::error::chain(&error);
                let stopped = matches!(error, Error::Phase { .. });
                steps.failed(if stopped { "cancelled" } else { "internal" }, &told);
                log::warn!("{told}");
                self.tell(Kind::StartFailed, Some(&told));
                *lock(&self.failure) = Some(Arc::new(error));
                // Create or Start that fails is not followed by Stop and Shutdown.
                if *self.ask.borrow() < Ask::Stop {
                    self.ask(Ask::Remove);
                }
                asked_for()
            }
        };
        self.enter(Phase::Stopping, |_| ());
        if exit.reason.is_some() {
            self.keep_console();
        }
        made.power_off().await;
        let reason = exit.reason.clone();
        self.enter(Phase::Stopped, |record| record.exit = Some(exit));
        self.tell(Kind::Stopped, reason.as_deref());
        self.asked(Ask::Remove).await;
        made.shut_down().await;
        // A worker ends with its last pod: nothing comes after the last line.
        self.forget();
        node.forget(&self);
    }

    /// Keeps the last words of a VM that ended by itself for a daemon after this one.
    fn keep_console(&self) {
        let (bytes, _) = self.console(0);
        if let Err(error) = files::replace(&self.dir.join(CONSOLE), &bytes) {
            log::warn!("sandbox {}: cannot keep its console: {error}", self.id());
        }
    }

    /// From nothing to an agent that takes containers.
    async fn boot(&self, node: &Node, made: &mut Made, steps: &mut Steps) -> Result<(), Error> {
        let record = self.record();
        let id = record.id.clone();
        let vm_error = |source| Error::Vm {
            id: id.clone(),
            source,
        };
        let net_error = |source| Error::Net {
            id: id.clone(),
            source,
        };
        let plan = &record.plan;
        let (mut nics, netns) = (Vec::new(), Path::new(&record.netns));
        if !record.netns.is_empty() {
            steps.next("network");
            let net = cni::connect(netns, plan.cpus.into()).await.map_err(net_error)?;
            nics = made.net.insert(net).take_cards();
        }
        let sizing = self.profile.sizing(plan.overhead);
        let room = self.room(&sizing);
        let mut config = MachineConfig {
            name: cell_name(&id),
            cpus: plan.cpus,
            memory: plan.memory,
            huge_pages: self.profile.huge_pages.into(),
            dax: Some(self.profile.dax_window.0).filter(|bytes| *bytes > 0),
            kernel: &self.profile.kernel,
            initrd: &self.profile.initrd,
            kernel_args: &self.profile.kernel_args,
            nics,
            room,
            origin: Origin::Boot,
        };
        let domain = self.profile.template.domain(&plan.namespace);
        let kind = domain.and_then(|domain| template::Kind::of(&config, &domain));
        steps.next("create");
        let pooled = kind
            .as_ref()
            .filter(|_| self.profile.template_pool > 0)
            .and_then(|kind| node.templates.take(kind));
        let (from_pool, mut spares) = (pooled.is_some(), None);
        if from_pool {
            made.template.clone_from(&kind);
        }
        // What it starts with.
        let mut start = plan.size();
        let vm = match pooled {
            Some(vm) => {
                log::debug!("sandbox {id}: takes cell {}", vm.machine.cell().name());
                let resumed = vm.machine.resume_with(config.nics);
                resumed.map_err(|error| vm_error(error.into()))?;
                vm
            }
            None => {
                if let Some(image) = kind.as_ref().and_then(|kind| node.templates.find(kind)) {
                    log::debug!("sandbox {id}: cloned from a template");
                    made.template.clone_from(&kind);
                    config.origin = Origin::Clone(image);
                } else if let Some((smaller, image)) =
                    kind.as_ref().and_then(|kind| node.templates.find_smaller(kind))
                {
                    start = smaller.start(&mut config);
                    log::debug!(
                        "sandbox {id}: cloned from a template of {} MiB and {} vCPUs, to grow",
                        start.memory >> 20,
                        start.cpus
                    );
                    made.template = Some(smaller);
                    config.origin = Origin::Clone(image);
                } else if self.profile.spare_vms > 0 {
                    spares = Some(machine::spares(&config, self.profile.spare_vms.into()));
                }
                PodVm::start(config, &node.cells).await.map_err(vm_error)?
            }
        };
        let cloned = !vm.machine.boots();
        let _ = self.machine.set(Arc::downgrade(&vm.machine));
        let cell = Arc::clone(vm.machine.cell());
        let _ = self.cell.set(Arc::downgrade(&cell));
        made.watch = Some(node.metrics.watch(self.labels(), cell));
        let vm = made.vm.insert(vm);
        steps.next("boot");
        vm.ready(self.profile.init_timeout).await.map_err(vm_error)?;
        steps.next("configure");
        // Beside the guest's work, and given up with this.
        let mut forward = JoinSet::new();
        if made.net.is_some() {
            let (netns, guest) = (netns.to_owned(), Arc::<Machine>::clone(&vm.machine));
            forward.spawn(async move { Forwarder::start(&netns, guest).await });
        }
        let configuration = self.configuration(plan, made.net.as_ref());
        vm.configure(&configuration).await.map_err(vm_error)?;
        if !forward.is_empty() {
            // What is left of it.
            steps.next("forward");
        }
        if let Some(started) = forward.join_next().await {
            let started = started.map_err(|e| net_error(net::Error::Io("forward ports".into(), e.into())))?;
            made.forwarder = Some(started.map_err(net_error)?);
        }
        steps.next("serve");
        let patience = self.profile.answer_timeout;
        let service = vm.serve(&self.socket(), patience).await.map_err(vm_error)?;
        let (metrics, log, pod) = (node.metrics.clone(), self.log.clone(), self.labels());
        // Nobody knows the socket yet.
        service.follow_processes(move |container, exec| {
            if !exec.is_empty() {
                return Box::new(metrics.process(Process::Exec));
            }
            log.add(Event::now(Kind::ContainerStarted, &pod).of_container(container));
            Box::new(Followed {
                _counted: metrics.process(Process::Container),
                log: log.clone(),
                pod: pod.clone(),
                id: container.to_owned(),
            })
        });
        let (metrics, pod) = (node.metrics.clone(), self.labels());
        service.follow_steps(move |operation, container, parent| {
            Box::new(Steps::new(&metrics, operation, &pod, Some(container), parent))
        });
        service.follow_limits(start, room.cpus, sizing);
        if let Some(resizer) = service.resizer().filter(|_| start != plan.size()) {
            steps.next("grow");
            if let Err(source) = resizer.promise(plan.size()).await {
                // Whoever tries again finds a template that need not grow.
                self.want_template(node, kind);
                return Err(Error::Resize { id, source });
            }
        }
        let _ = self.service.set(service);
        if let Some(events) = vm.events() {
            let (log, pod) = (self.log.clone(), self.labels());
            node.events
                .follow(&record.namespace, events, &node.metrics, move |container| {
                    log.add(Event::now(Kind::Oom, &pod).of_container(container));
                });
        }
        if cloned {
            node.metrics.cloned();
        }
        if from_pool {
            node.metrics.pooled();
        }
        match spares {
            Some(Ok(spares)) => node.keep_spares(spares),
            Some(Err(error)) => log::warn!("sandbox {id}: no spares of its kind: {error}"),
            None => {}
        }
        self.want_template(node, kind);
        Ok(())
    }

    /// Has a template made for the pods that are like it.
    fn want_template(&self, node: &Node, kind: Option<template::Kind>) {
        let Some(kind) = kind else { return };
        let ahead = Ahead {
            count: self.profile.template_pool.into(),
            configuration: ConfigureRequest {
                sysctls: unprivileged().collect(),
                ..Default::default()
            },
        };
        node.templates.want(kind, self.profile.init_timeout, ahead);
    }

    /// What its VM can be given while it runs.
    fn room(&self, sizing: &Sizing) -> Room {
        let host = std::thread::available_parallelism().map_or(1, usize::from);
        let cpus = self.profile.resize_vcpus.min(sizing.most.cpus);
        Room {
            cpus: cpus.min(u8::try_from(host).unwrap_or(u8::MAX)),
            memory: sizing.most.memory,
            disks: self.profile.block_volumes,
        }
    }

    fn configuration(&self, plan: &PodPlan, net: Option<&PodNet>) -> ConfigureRequest {
        let mut entropy = vec![0; 64];
        crate::ids::fill(&mut entropy);
        ConfigureRequest {
            hostname: plan.hostname.clone(),
            interfaces: net.map(|net| net.interfaces.clone()).unwrap_or_default(),
            routes: net.map(|net| net.routes.clone()).unwrap_or_default(),
            neighbors: net.map(|net| net.neighbors.clone()).unwrap_or_default(),
            files: MessageField::some(plan.files(&net.map(PodNet::addresses).unwrap_or_default())),
            sysctls: unprivileged().chain(plan.sysctls.clone()).collect(),
            entropy,
            ..Default::default()
        }
    }

    /// Waits for the end that somebody asks for, or the VM's own.
    async fn until_end(&self, made: &mut Made) -> Exit {
        let Some(vm) = &made.vm else {
            return asked_for();
        };
        let ended = vm.ended("by itself");
        let period = self.profile.idle_reclaim;
        let agent = vm.agent().ok().filter(|_| !period.is_zero()).cloned();
        let cell = Arc::clone(vm.machine.cell());
        let lean = async {
            match agent {
                Some(agent) => idle::give_back(&cell, &agent.pod, period).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.asked(Ask::Stop) => asked_for(),
            never = lean => match never {},
            error = ended => {
                let reason = error.to_string();
                log::error!("sandbox {}: {reason}", self.id());
                Exit { status: EXIT_KILLED, at: clock::now(), reason: Some(reason) }
            }
        }
    }
}

/// Name of a pod's cell, of which its threads' names are made.
fn cell_name(id: &str) -> String {
    format!("pod-{}", id.get(..12).unwrap_or(id))
}

/// A container's process that runs.
struct Followed {
    _counted: ProcessGauge,
    log: EventLog,
    pod: PodLabels,
    id: String,
}

impl Running for Followed {
    fn ended(self: Box<Self>, exit: &task::Exit) {
        let event = Event::now(Kind::ContainerExited, &self.pod);
        self.log
            .add(event.of_container(&self.id).with_status(exit.status));
    }
}

impl Running for ProcessGauge {
    fn ended(self: Box<Self>, _: &task::Exit) {}
}

fn unprivileged() -> impl Iterator<Item = (String, String)> {
    let owned = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
    UNPRIVILEGED.into_iter().map(owned)
}

fn asked_for() -> Exit {
    Exit {
        status: 0,
        at: clock::now(),
        reason: None,
    }
}

/// What was made for a pod, in order.
#[derive(Default)]
struct Made {
    /// Has the VM's figures read.
    watch: Option<Watch>,
    net: Option<PodNet>,
    vm: Option<PodVm>,
    /// Of whose template the VM is a clone.
    template: Option<template::Kind>,
    forwarder: Option<Forwarder>,
}

impl Made {
    /// Ends the VM and what carries its traffic.
    async fn power_off(&mut self) {
        self.forwarder = None;
        if let Some(off) = self.vm.as_ref().map(PodVm::power_off) {
            off.await;
        }
        if let Some(net) = self.net.take()
            && let Err(error) = net.disconnect().await
        {
            log::warn!("{}", crate::error::chain(&error));
        }
    }

    /// Ends the services that outlive the VM.
    async fn shut_down(self) {
        // While the VM can still be asked.
        drop(self.watch);
        if let Some(vm) = self.vm {
            vm.shut_down().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::metrics::tests::metrics;
    use super::*;
    use rustix::mount::{MountFlags, MountPropagationFlags};
    use rustix::thread::UnshareFlags;

    fn sandbox(profile: Profile) -> Arc<Sandbox> {
        let record = Record {
            id: "a".into(),
            namespace: "k8s.io".into(),
            sandboxer: "cloister".into(),
            worker: None,
            plan: PodPlan::new(k8s_cri::v1::PodSandboxConfig::default(), &profile).unwrap(),
            netns: String::new(),
            phase: Phase::Created,
            created: 0,
            started: None,
            exit: None,
            steps: Vec::new(),
        };
        let counted = metrics().pod(&record.sandboxer);
        Sandbox::new("/nowhere".into(), profile, record, counted, EventLog::default())
    }

    /// On a file system that has room for a folder and no file in it. Needs root.
    #[test]
    fn without_a_record_there_is_no_folder() {
        let full = || {
            // SAFETY: nothing of this thread, which ends with the test, is another's.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }.unwrap();
            let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            rustix::mount::mount_change("/", private).unwrap();
            rustix::mount::mount("test", "/mnt", "tmpfs", MountFlags::empty(), c"nr_inodes=2").unwrap();
            let profile = Profile::default();
            let record = sandbox(profile.clone()).record();
            let counted = metrics().pod(&record.sandboxer);
            let created = Sandbox::create("/mnt/a".into(), profile, record, counted, EventLog::default());
            let told = created.err().unwrap();
            assert!(
                told.to_string()
                    .starts_with("sandbox a: cannot write /mnt/a/sandbox.json: "),
                "{told}"
            );
            let code = tonic::Status::from(&told).code();
            assert_eq!(code, tonic::Code::ResourceExhausted);
            assert_eq!(std::fs::read_dir("/mnt").unwrap().count(), 0);
        };
        std::thread::spawn(full).join().unwrap();
    }

    #[tokio::test]
    async fn a_worker_keeps_its_part_of_an_overhead_that_an_update_declares() {
        let of_vm = |pods_per_worker, declared| {
            let profile = Profile {
                pods_per_worker,
                ..Profile::default()
            };
            sandbox(profile).of_vm(declared)
        };
        assert_eq!(of_vm(0, Some(64 << 20)), Some(64 << 20));
        assert_eq!(of_vm(1, Some(64 << 20)), Some(40 << 20));
        assert_eq!(of_vm(1, None), None);
    }
}
