// SPDX-License-Identifier: Apache-2.0
//! The host half of containerd's Task service for the containers of one VM.
//!
//! Create is done in two halves: here the root file system is mounted and shared into the VM with the volumes, the fifos
//! are opened and the specification rewritten; the agent does the rest. Most other calls are forwarded. Exits are kept
//! here: each process has a watcher that asks the agent to wait, lets the last output through, and only then tells those
//! who wait. When the VM dies every process is dead with it, and State, Wait and Delete answer from what is kept.
//!
//! ```text
//!            Create/Exec        Start          exit, output through          Delete
//! (nothing) ─────────────▶ created ──▶ running ─────────────────────▶ stopped ──▶ (nothing)
//!                              └──────────── VM dies ──────────────────▲ status 137
//! ```
//!
//! ttrpc drops a call whose connection breaks: what changes state runs in a task of its own.

use super::agent::Agent;
use super::devices::{self, Number};
use super::disks::{self, Disks};
use super::guest::{Guest, ShareOptions};
use super::members::Members;
use super::resize::{self, Resizer};
use super::rewrite::{self, Share};
use super::seccomp;
use super::size::{Limits, Size, Sizing};
use super::state::EXIT_KILLED;
use super::streaming::divert;
use super::streams::{Hub, Pumps, Stdio};
use super::vigil::Vigil;
use super::vm::QUICK;
use super::volumes::Volumes;
use crate::clock::{self, Millis};
use crate::files;
use crate::runtime::{image_mount, overlay};
use crate::sync::lock;
use async_trait::async_trait;
use cloister_protocol::protobuf::well_known_types::empty::Empty;
use cloister_protocol::protobuf::well_known_types::timestamp::Timestamp;
use cloister_protocol::protobuf::{EnumOrUnknown, Message as _, MessageField};
use cloister_protocol::task as api;
use cloister_protocol::ttrpc::asynchronous::transport::Listener;
use cloister_protocol::ttrpc::asynchronous::{Server, TtrpcContext};
use cloister_protocol::ttrpc::context::{Context, with_duration};
use cloister_protocol::ttrpc::{self, Code, Error};
use cloister_protocol::{ETC_DIR, METRICS_PACKAGE, SHARED_DIR, pack};
use futures_util::future::BoxFuture;
use oci_spec::runtime::{LinuxResources, Spec};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, SystemTime};
use tokio::sync::watch;

/// Largest config.json of a bundle.
const MAX_SPEC: u64 = 4 << 20;
/// How long output may be on its way after its process has ended.
const LAST_OUTPUT: Duration = Duration::from_secs(30);
/// The same when the VM is dead: what the device had buffered.
const LAST_OUTPUT_DEAD: Duration = Duration::from_secs(2);

type Result<T> = ttrpc::Result<T>;

/// How a process ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Exit {
    /// Exit status, or 128 + signal.
    pub status: u32,
    /// When.
    pub at: Timestamp,
}

/// A container to be made.
pub struct New {
    /// Its id.
    pub id: String,
    /// The folder of its configuration on the host, for State.
    pub bundle: String,
    /// Its specification, in the host's terms.
    pub spec: Spec,
    /// Its root file system.
    pub root: OwnedFd,
    /// Its streams.
    pub stdio: Stdio,
    /// Whether it gets a terminal.
    pub terminal: bool,
}

/// A process that runs, as whoever follows the pod's processes keeps it. It is dropped without a word where the service is.
pub trait Running: Send + Sync {
    /// It has ended, its output is through.
    fn ended(self: Box<Self>, exit: &Exit);
}

/// A container that runs in a copied VM already.
pub struct Adopted {
    /// Its id.
    pub id: String,
    /// The folder of its configuration on the host, for State.
    pub bundle: String,
    /// Its process in the guest.
    pub pid: u32,
    /// Its streams.
    pub stdio: Stdio,
    /// The names under which it has them.
    pub streams: [String; 3],
    /// Whether it has a terminal.
    pub terminal: bool,
}

/// Takes a snapshot of the pod into a file, with options in an encoding of its own.
type Checkpoint =
    Box<dyn Fn(PathBuf, Vec<u8>) -> BoxFuture<'static, std::result::Result<(), String>> + Send + Sync>;

/// Hears of a process that has started, by the ids of its container and, if it is not that itself, of the exec.
type Started = Box<dyn Fn(&str, &str) -> Box<dyn Running> + Send + Sync>;

/// A container, as it is told to operators.
#[derive(Clone, Debug, PartialEq)]
pub struct Listed {
    /// containerd's id of it.
    pub id: String,
    /// Kubernetes' name of it; empty if it has none.
    pub name: String,
    /// Its image, by name; empty if nobody said.
    pub image: String,
    /// The folder of its configuration on the host.
    pub bundle: String,
    /// Its process in the guest.
    pub pid: u32,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// When its process was started, ms since 1970.
    pub started: Option<Millis>,
    /// How it ended.
    pub exit: Option<Exit>,
    /// Further processes in it.
    pub execs: usize,
}

/// The steps of an operation on a container, as whoever times them keeps them. Dropped, it was given up.
pub trait Timed: Send {
    /// The step before ends, and this one begins.
    fn next(&mut self, step: &'static str);
    /// All went well, or not: why.
    fn done(self: Box<Self>, failure: Option<&str>);
}

/// Nobody times it.
pub struct Untimed;

impl Timed for Untimed {
    fn next(&mut self, _: &'static str) {}
    fn done(self: Box<Self>, _: Option<&str>) {}
}

/// Begins to time an operation, by its name, on a container, as part of the trace of this header.
type Timing = Box<dyn Fn(&'static str, &str, Option<&str>) -> Box<dyn Timed> + Send + Sync>;

/// The host's and the guest's half of Create.
pub const CREATE: &str = "container_create";
/// Its steps: the specification and the root file system; what is shared and attached; the guest's half.
pub const CREATE_STEPS: [&str; 3] = ["root", "share", "guest"];
/// Start of a container, to its first process.
pub const START: &str = "container_start";
/// Its steps.
pub const START_STEPS: [&str; 1] = ["guest"];

/// See the module.
pub struct TaskService {
    guest: Arc<dyn Guest>,
    agent: Agent,
    hub: Arc<Hub>,
    /// Why the VM ended, once it has.
    dead: watch::Receiver<Option<String>>,
    vigil: Vigil,
    containers: Mutex<HashMap<String, Arc<Container>>>,
    /// The same for those who look at the agent's events.
    members: Arc<Members>,
    /// Root file systems of containers whose Create brings none, by id.
    prepared: Mutex<HashMap<String, Vec<api::Mount>>>,
    started: OnceLock<Started>,
    timing: OnceLock<Timing>,
    checkpoint: OnceLock<Checkpoint>,
    volumes: Volumes,
    disks: Disks,
    /// Of a VM whose size follows its containers' limits.
    resizer: OnceLock<Resizer>,
}

struct Container {
    name: String,
    image: String,
    bundle: String,
    shared: Mutex<Vec<String>>,
    /// Block devices of the host that it uses, and their numbers in the guest.
    disks: Mutex<BTreeMap<Number, Number>>,
    /// Whether it is in the pod's PID namespace.
    shares_pids: AtomicBool,
    /// By exec id; the container's own has the empty one.
    processes: Mutex<HashMap<String, Arc<Process>>>,
}

struct Process {
    pid: AtomicU32,
    names: [String; 3],
    /// As the agent knows them.
    streams: [String; 3],
    terminal: bool,
    pumps: Mutex<Option<Pumps>>,
    started: OnceLock<Millis>,
    exit: watch::Sender<Option<Exit>>,
    /// Held from its start to its end; its lock is held while it ends.
    running: Mutex<Option<Box<dyn Running>>>,
}

impl Container {
    fn listed(&self, id: String) -> Listed {
        let processes = lock(&self.processes);
        let own = processes.get("");
        Listed {
            id,
            name: self.name.clone(),
            image: self.image.clone(),
            bundle: self.bundle.clone(),
            pid: own.map_or(0, |own| own.pid.load(Ordering::Relaxed)),
            terminal: own.is_some_and(|own| own.terminal),
            started: own.and_then(|own| own.started.get().copied()),
            exit: own.and_then(|own| own.exit.borrow().clone()),
            execs: processes.keys().filter(|exec| !exec.is_empty()).count(),
        }
    }
}

fn status(code: Code, text: impl Into<String>) -> Error {
    Error::RpcStatus(ttrpc::get_status(code, text.into()))
}

fn unknown(what: &str, error: impl std::fmt::Display) -> Error {
    status(Code::UNKNOWN, format!("{what}: {error}"))
}

/// The time in the form of protobuf.
pub fn timestamp() -> Timestamp {
    Timestamp::from(SystemTime::now())
}

/// When a process ended, if the agent says that it did: the guest's clock is its own, and may be wrong.
fn by_our_clock(exited_at: &mut MessageField<Timestamp>, kept: Option<Exit>) {
    if exited_at.is_some() {
        *exited_at = MessageField::some(kept.map_or_else(timestamp, |exit| exit.at));
    }
}

fn no_deadline() -> Context {
    Context::default()
}

/// Runs `work` to its end, whatever becomes of the connection that asked for it.
async fn through<T: Send + 'static>(work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    tokio::spawn(work)
        .await
        .map_err(|e| unknown("the request was abandoned", e))?
}

/// Runs what looks at the host's file systems. One of them can be a server's that is gone, and the daemon's few threads are
/// all pods'.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| unknown("the request was abandoned", e))?
}

impl TaskService {
    /// A service for the containers of `guest`, whose agent is ready. `members` is kept as its events need it. `dead` becomes
    /// the reason when the VM ends. An agent that leaves calls unanswered for `patience` is asked whether it is there (see
    /// [`Vigil`]).
    pub fn new(
        guest: Arc<dyn Guest>,
        agent: Agent,
        hub: Arc<Hub>,
        members: Arc<Members>,
        dead: watch::Receiver<Option<String>>,
        patience: Duration,
    ) -> Arc<Self> {
        let disks = Disks::new(Arc::clone(&guest), agent.pod.clone(), disks::open);
        Arc::new(Self {
            volumes: Volumes::new(Arc::clone(&guest)),
            vigil: Vigil::new(Arc::clone(&guest), agent.pod.clone(), dead.clone(), patience),
            guest,
            agent,
            hub,
            dead,
            containers: Mutex::default(),
            members,
            prepared: Mutex::default(),
            started: OnceLock::new(),
            timing: OnceLock::new(),
            checkpoint: OnceLock::new(),
            disks,
            resizer: OnceLock::new(),
        })
    }

    /// A server of it, to be started, on a socket that is made for root alone. To be called in a runtime.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn server(self: &Arc<Self>, socket: &Path) -> std::io::Result<Server> {
        let listener = tokio::net::UnixListener::from_std(files::listen(socket)?)?;
        let served = Arc::new(Served(Arc::clone(self)));
        Ok(Server::new()
            .add_listener(Listener::new(divert(listener, Arc::clone(self.hub.desk()))))
            .register_service(cloister_protocol::create_task(served)))
    }

    /// Has `started` called for each process that starts from now on, with the ids of its container and, if it is not that
    /// itself, of the exec; what it answers hears of the process's end. Only the first call counts.
    pub fn follow_processes(&self, started: impl Fn(&str, &str) -> Box<dyn Running> + Send + Sync + 'static) {
        let _ = self.started.set(Box::new(started));
    }

    /// Has the creation and the start of containers timed. Only the first call counts.
    pub fn follow_steps(
        &self,
        timing: impl Fn(&'static str, &str, Option<&str>) -> Box<dyn Timed> + Send + Sync + 'static,
    ) {
        let _ = self.timing.set(Box::new(timing));
    }

    fn timed(&self, operation: &'static str, id: &str, parent: Option<&str>) -> Box<dyn Timed> {
        match self.timing.get() {
            Some(timing) => timing(operation, id, parent),
            None => Box::new(Untimed),
        }
    }

    /// Has snapshots of the pod be taken by `checkpoint`. Only the first call counts.
    pub fn follow_checkpoints(
        &self,
        checkpoint: impl Fn(PathBuf, Vec<u8>) -> BoxFuture<'static, std::result::Result<(), String>>
        + Send
        + Sync
        + 'static,
    ) {
        let _ = self.checkpoint.set(Box::new(checkpoint));
    }

    /// Has a container that is created without a root file system get this one.
    pub fn prepare(&self, id: &str, root: Vec<api::Mount>) {
        lock(&self.prepared).insert(id.to_owned(), root);
    }

    /// Forgets it.
    pub fn purge(&self, id: &str) {
        lock(&self.prepared).remove(id);
    }

    /// The same for all containers at once; others than these are forgotten.
    pub fn prepare_only(&self, roots: HashMap<String, Vec<api::Mount>>) {
        *lock(&self.prepared) = roots;
    }

    /// All containers, by id.
    pub fn list(&self) -> Vec<Listed> {
        let containers = lock(&self.containers).clone();
        let mut listed: Vec<Listed> = containers
            .into_iter()
            .map(|(id, container)| container.listed(id))
            .collect();
        listed.sort_by(|a, b| a.id.cmp(&b.id));
        listed
    }

    /// Has the VM, which has started with `start` and can have `possible` vCPUs, follow the limits of its containers from now
    /// on. Only the first call counts.
    pub fn follow_limits(&self, start: Size, possible: u8, sizing: Sizing) {
        let (guest, pod) = (Arc::clone(&self.guest), self.agent.pod.clone());
        let _ = self
            .resizer
            .set(Resizer::new(guest, pod, start, possible, sizing));
    }

    /// What the VM's size follows, if it follows anything.
    pub fn resizer(&self) -> Option<&Resizer> {
        self.resizer.get()
    }

    /// How often the agent has answered a call.
    pub fn answers(&self) -> u64 {
        self.vigil.answers()
    }

    /// Asks the agent for a sign of life (see [`Vigil::ask`]).
    pub async fn ask(&self) {
        self.vigil.ask().await;
    }

    fn container(&self, id: &str) -> Result<Arc<Container>> {
        lock(&self.containers)
            .get(id)
            .cloned()
            .ok_or_else(|| status(Code::NOT_FOUND, format!("container {id}: not found")))
    }

    fn process(&self, id: &str, exec: &str) -> Result<Arc<Process>> {
        let container = self.container(id)?;
        let found = lock(&container.processes).get(exec).cloned();
        found.ok_or_else(|| {
            status(
                Code::NOT_FOUND,
                format!("process {exec} of container {id}: not found"),
            )
        })
    }

    fn forget(&self, id: &str) {
        let mut containers = lock(&self.containers);
        containers.remove(id);
        self.members.leave(id, "");
    }

    fn is_dead(&self) -> bool {
        self.dead.borrow().is_some()
    }

    async fn create_task(
        self: &Arc<Self>,
        request: api::CreateTaskRequest,
        steps: &mut dyn Timed,
    ) -> Result<u32> {
        if !request.checkpoint.is_empty() {
            return Err(status(
                Code::UNIMPLEMENTED,
                "restoring a checkpoint is not supported",
            ));
        }
        steps.next("root");
        let (request, spec, root) = blocking(move || {
            let spec = read_spec(&request.bundle)?;
            let root = mount_root(&request)?;
            Ok((request, spec, root))
        })
        .await?;
        let stdio = Stdio::from_request(&request.stdin, &request.stdout, &request.stderr)
            .map_err(|e| status(Code::INVALID_ARGUMENT, e.to_string()))?;
        let new = New {
            id: request.id,
            bundle: request.bundle,
            spec,
            root,
            stdio,
            terminal: request.terminal,
        };
        self.create_container(new, steps).await
    }

    /// The host half of Create, then the guest's. Answers the pid in the guest.
    ///
    /// # Errors
    /// AlreadyExists, InvalidArgument, or what the agent says; nothing is then left.
    pub async fn create_container(self: &Arc<Self>, new: New, steps: &mut dyn Timed) -> Result<u32> {
        check_id(&new.id)?;
        let annotation = |key| {
            let annotations = new.spec.annotations().as_ref();
            annotations
                .and_then(|all| all.get(key))
                .cloned()
                .unwrap_or_default()
        };
        let container = Arc::new(Container {
            name: annotation("io.kubernetes.cri.container-name"),
            image: annotation("io.kubernetes.cri.image-name"),
            bundle: new.bundle.clone(),
            shared: Mutex::default(),
            disks: Mutex::default(),
            shares_pids: AtomicBool::default(),
            processes: Mutex::default(),
        });
        {
            let mut containers = lock(&self.containers);
            if containers.contains_key(&new.id) {
                return Err(status(
                    Code::ALREADY_EXISTS,
                    format!("container {}: already exists", new.id),
                ));
            }
            containers.insert(new.id.clone(), Arc::clone(&container));
            self.members.enter(&new.id, "");
        }
        let id = new.id.clone();
        let result = self.create_in(&container, new, steps).await;
        if result.is_err() {
            self.forget(&id);
            self.part_with(&id, &container).await;
        }
        result
    }

    async fn create_in(
        self: &Arc<Self>,
        container: &Arc<Container>,
        new: New,
        steps: &mut dyn Timed,
    ) -> Result<u32> {
        steps.next("share");
        let New {
            id,
            bundle,
            mut spec,
            root,
            stdio,
            terminal,
        } = new;
        let (to_rewrite, targets) = (id.clone(), self.pid_targets());
        let (mut spec, shares, seccomp) = blocking(move || {
            let invalid = |e| status(Code::INVALID_ARGUMENT, e);
            let shares = rewrite::for_guest(&mut spec, &to_rewrite, &targets).map_err(invalid)?;
            let seccomp = seccomp::take(&mut spec).map_err(invalid)?;
            Ok((spec, shares, seccomp))
        })
        .await?;
        container
            .shares_pids
            .store(rewrite::shares_pids(&spec), Ordering::Relaxed);
        if let Some(resizer) = self.resizer.get() {
            resizer.enter(&id, Limits::of_spec(&spec)).await;
        }
        self.attach_disks(container, &mut spec).await?;
        let read_only = spec
            .root()
            .as_ref()
            .is_some_and(|root| root.readonly() == Some(true));
        let root_name = rewrite::root_name(&id);
        let root_mount = api::Mount {
            type_: "bind".into(),
            source: format!("{SHARED_DIR}/{root_name}"),
            options: vec!["rbind".into(), if read_only { "ro" } else { "rw" }.into()],
            ..Default::default()
        };
        let (service, sharing) = (Arc::clone(self), Arc::clone(container));
        let spec = blocking(move || {
            prepare_root(root.as_fd(), &spec, &shares);
            let options = ShareOptions {
                read_only,
                ..ShareOptions::default()
            };
            service.share(&sharing, &root_name, root, options)?;
            service.share_volumes(&sharing, &mut spec, &shares)?;
            Ok(spec)
        })
        .await?;
        let names = stdio.names.clone();
        let (pumps, streams) = Pumps::start(&self.hub, stdio, terminal).map_err(|e| unknown("stdio", e))?;
        let [stdin, stdout, stderr] = streams.clone();
        let options =
            seccomp::options(&spec, seccomp.as_deref()).map_err(|e| unknown("the specification", e))?;
        let request = api::CreateTaskRequest {
            id: id.clone(),
            bundle,
            rootfs: vec![root_mount],
            terminal,
            stdin,
            stdout,
            stderr,
            options: MessageField::some(options),
            ..Default::default()
        };
        steps.next("guest");
        let response = self
            .vigil
            .over(self.agent.task.create(no_deadline(), &request))
            .await?;
        let process = self.watch(container, &id, "", names, streams, terminal, pumps);
        process.pid.store(response.pid, Ordering::Relaxed);
        let guest = Arc::clone(&self.guest);
        tokio::task::spawn_blocking(move || guest.note_container());
        Ok(response.pid)
    }

    /// Processes whose PID namespaces a further container can ask for: all containers', unless they share the pod's.
    fn pid_targets(&self) -> Vec<u32> {
        let containers = lock(&self.containers);
        let mut all = containers.values();
        if all.any(|container| container.shares_pids.load(Ordering::Relaxed)) {
            return Vec::new();
        }
        let pid = |container: &Arc<Container>| {
            let processes = lock(&container.processes);
            processes
                .get("")
                .map(|process| process.pid.load(Ordering::Relaxed))
        };
        containers.values().filter_map(pid).collect()
    }

    /// Takes a container on that runs in the VM already, which is a copy.
    ///
    /// # Errors
    /// InvalidArgument, or its streams cannot be opened.
    pub fn adopt(self: &Arc<Self>, adopted: Adopted) -> Result<()> {
        let Adopted {
            id,
            bundle,
            pid,
            stdio,
            streams,
            terminal,
        } = adopted;
        check_id(&id)?;
        let container = Arc::new(Container {
            name: String::new(),
            image: String::new(),
            bundle,
            // Attached with the VM, for as long as it lives.
            shared: Mutex::default(),
            disks: Mutex::default(),
            shares_pids: AtomicBool::default(),
            processes: Mutex::default(),
        });
        let names = stdio.names.clone();
        let pumps = Pumps::resume(&self.hub, stdio, terminal, &streams).map_err(|e| unknown("stdio", e))?;
        let process = self.watch(&container, &id, "", names, streams, terminal, pumps);
        process.pid.store(pid, Ordering::Relaxed);
        let _ = process.started.set(clock::now());
        self.members.enter(&id, "");
        lock(&self.containers).insert(id, container);
        Ok(())
    }

    /// The process of a container in the guest, and the names of its streams there: what [`Self::adopt`] needs.
    ///
    /// # Errors
    /// NotFound.
    pub fn known_to_guest(&self, id: &str) -> Result<(u32, [String; 3])> {
        let process = self.process(id, "")?;
        Ok((process.pid.load(Ordering::Relaxed), process.streams.clone()))
    }

    /// Whether a container is paused.
    ///
    /// # Errors
    /// What the agent says.
    pub async fn is_paused(&self, id: &str) -> Result<bool> {
        let request = api::StateRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let state = self
            .vigil
            .over(self.agent.task.state(no_deadline(), &request))
            .await?;
        Ok(state.status == EnumOrUnknown::new(api::Status::PAUSED))
    }

    /// Pauses a container, its streams included, or has it go on.
    ///
    /// # Errors
    /// What the agent says.
    pub async fn set_paused(&self, id: &str, paused: bool) -> Result<()> {
        let id = id.to_owned();
        if paused {
            let request = api::PauseRequest {
                id,
                ..Default::default()
            };
            let call = self.agent.task.pause(no_deadline(), &request);
            self.vigil.over(call).await.map(drop)
        } else {
            let request = api::ResumeRequest {
                id,
                ..Default::default()
            };
            let call = self.agent.task.resume(no_deadline(), &request);
            self.vigil.over(call).await.map(drop)
        }
    }

    /// Answers the name under which the container has it: another one's, if that has the same.
    fn share(
        &self,
        container: &Container,
        name: &str,
        tree: OwnedFd,
        options: ShareOptions,
    ) -> Result<String> {
        let name = self
            .volumes
            .attach(name, tree, options)
            .map_err(|e| unknown(&format!("share {name} with the VM"), e))?;
        lock(&container.shared).push(name.clone());
        Ok(name)
    }

    /// Shares what the specification mounts of the host's, and has it mounted by the names that come of it.
    fn share_volumes(&self, container: &Container, spec: &mut Spec, shares: &[Share]) -> Result<()> {
        for share in shares {
            let opened = open_share(share)?;
            let options = ShareOptions {
                read_only: share.read_only,
                follows_mounts: share.follows_mounts,
            };
            let name = self.share(container, &share.name, opened, options)?;
            rewrite::rename(spec, &share.name, &name);
        }
        Ok(())
    }

    /// Brings the block devices of the host that a specification names into the VM, and gives them their numbers there.
    async fn attach_disks(&self, container: &Container, spec: &mut Spec) -> Result<()> {
        for (number, writable) in devices::wanted(spec, disks::path) {
            let attached = self.disks.attach(number, writable).await;
            let guests = attached.map_err(|e| status(Code::UNKNOWN, crate::error::chain(&e)))?;
            lock(&container.disks).insert(number, guests);
        }
        devices::rewrite(spec, &lock(&container.disks));
        Ok(())
    }

    /// Takes from the VM what a container had that is gone.
    async fn part_with(self: &Arc<Self>, id: &str, container: &Container) {
        let shared = std::mem::take(&mut *lock(&container.shared));
        let service = Arc::clone(self);
        let released = blocking(move || {
            for name in shared {
                if let Err(error) = service.volumes.release(&name) {
                    log::warn!("cannot take {name} from the VM: {error}");
                }
            }
            Ok(())
        });
        if let Err(error) = released.await {
            log::warn!("container {id}: its volumes stay with the VM: {error}");
        }
        let disks = std::mem::take(&mut *lock(&container.disks));
        for number in disks.into_keys() {
            self.disks.release(number, !self.is_dead()).await;
        }
        if let Some(resizer) = self.resizer.get() {
            resizer.leave(id);
            if !self.is_dead() {
                resizer.settle().await;
            }
        }
    }

    /// Changes the limits of a container, and with them the VM's size.
    ///
    /// # Errors
    /// The VM cannot have so much, or what the agent says.
    pub async fn update_container(&self, mut request: api::UpdateTaskRequest) -> Result<Empty> {
        let container = self.container(&request.id)?;
        let given = request.resources.mut_or_insert_default();
        let mut resources: LinuxResources = serde_json::from_slice(&given.value)
            .map_err(|e| status(Code::INVALID_ARGUMENT, format!("the resources: {e}")))?;
        rewrite::resources(&mut resources, &lock(&container.disks));
        given.value = serde_json::to_vec(&resources).map_err(|e| unknown("the resources", e))?;
        let Some(resizer) = self.resizer.get() else {
            return self
                .vigil
                .over(self.agent.task.update(no_deadline(), &request))
                .await;
        };
        let before = resizer
            .change(&request.id, |limits| limits.updated(&resources))
            .await
            .map_err(|e| {
                let code = match e {
                    resize::Error::TooMuch(_) => Code::OUT_OF_RANGE,
                    _ => Code::UNAVAILABLE,
                };
                status(
                    code,
                    format!("container {}: {}", request.id, crate::error::chain(&e)),
                )
            })?;
        let answer = self
            .vigil
            .over(self.agent.task.update(no_deadline(), &request))
            .await;
        match answer {
            Ok(_) => resizer.settle().await,
            Err(_) => resizer.restore(&request.id, before).await,
        }
        answer
    }

    /// Keeps a process and follows it to its end.
    #[expect(clippy::too_many_arguments, reason = "all that there is to know of a process")]
    fn watch(
        self: &Arc<Self>,
        container: &Arc<Container>,
        id: &str,
        exec: &str,
        names: [String; 3],
        streams: [String; 3],
        terminal: bool,
        pumps: Pumps,
    ) -> Arc<Process> {
        let (exit, _) = watch::channel(None);
        let process = Arc::new(Process {
            pid: AtomicU32::new(0),
            names,
            streams,
            terminal,
            pumps: Mutex::new(Some(pumps)),
            started: OnceLock::new(),
            exit,
            running: Mutex::default(),
        });
        lock(&container.processes).insert(exec.to_owned(), Arc::clone(&process));
        let watched = Arc::clone(&process);
        let service = Arc::clone(self);
        let request = api::WaitRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            ..Default::default()
        };
        tokio::spawn(async move {
            let mut dead = service.dead.clone();
            let waited = tokio::select! {
                waited = service.agent.task.wait(no_deadline(), &request) => Some(waited),
                _ = dead.wait_for(Option::is_some) => None,
            };
            if let Some(Err(error)) = &waited
                && !matches!(error, Error::RpcStatus(_))
            {
                service.vigil.broken(error).await;
            }
            let (status, patience) = match waited {
                Some(Ok(response)) => (response.exit_status, LAST_OUTPUT),
                // The VM died.
                Some(Err(_)) | None => (EXIT_KILLED, LAST_OUTPUT_DEAD),
            };
            // The guest's clock may be behind when the container was made.
            let exit = Exit {
                status,
                at: timestamp(),
            };
            let pumps = lock(&process.pumps).take();
            if let Some(pumps) = pumps {
                pumps.finish(patience).await;
            }
            let mut running = lock(&process.running);
            if let Some(running) = running.take() {
                running.ended(&exit);
            }
            process.exit.send_replace(Some(exit));
        });
        watched
    }

    /// Starts a container or exec. Answers the pid in the guest.
    ///
    /// # Errors
    /// What the agent says.
    pub async fn start_process(&self, id: &str, exec: &str) -> Result<u32> {
        let process = self.process(id, exec)?;
        let request = api::StartRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            ..Default::default()
        };
        let pid = self
            .vigil
            .over(self.agent.task.start(no_deadline(), &request))
            .await?
            .pid;
        process.pid.store(pid, Ordering::Relaxed);
        let _ = process.started.set(clock::now());
        if let Some(started) = self.started.get() {
            let mut kept = lock(&process.running);
            let running = started(id, exec);
            // It may have ended already.
            let exit = process.exit.borrow().clone();
            match exit {
                Some(exit) => running.ended(&exit),
                None => *kept = Some(running),
            }
        }
        Ok(pid)
    }

    /// Waits for the end of a process and its output.
    ///
    /// # Errors
    /// NotFound.
    pub async fn wait_process(&self, id: &str, exec: &str) -> Result<Exit> {
        let mut exit = self.process(id, exec)?.exit.subscribe();
        let ended = exit
            .wait_for(Option::is_some)
            .await
            .map_err(|e| unknown("wait", e))?;
        ended.clone().ok_or_else(|| status(Code::UNKNOWN, "wait"))
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// NotFound when the process has ended, and what the agent says.
    pub async fn kill_process(&self, id: &str, exec: &str, signal: u32, all: bool) -> Result<()> {
        self.process(id, exec)?;
        if self.is_dead() {
            return Err(status(Code::NOT_FOUND, "process already finished: not found"));
        }
        let request = api::KillRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            signal,
            all,
            ..Default::default()
        };
        self.vigil
            .over(self.agent.task.kill(no_deadline(), &request))
            .await
            .map(|_| ())
    }

    /// Sets the size of a process's terminal, in characters.
    ///
    /// # Errors
    /// What the agent says.
    pub async fn resize(&self, id: &str, exec: &str, width: u16, height: u16) -> Result<()> {
        let request = api::ResizePtyRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            width: width.into(),
            height: height.into(),
            ..Default::default()
        };
        let resized = self.agent.task.resize_pty(no_deadline(), &request);
        self.vigil.over(resized).await.map(|_| ())
    }

    async fn exec_process(self: &Arc<Self>, mut request: api::ExecProcessRequest) -> Result<Empty> {
        let container = self.container(&request.id)?;
        check_id(&request.exec_id)?;
        if lock(&container.processes).contains_key(&request.exec_id) {
            return Err(status(
                Code::ALREADY_EXISTS,
                format!("exec {}: already exists", request.exec_id),
            ));
        }
        let stdio = Stdio::from_request(&request.stdin, &request.stdout, &request.stderr)
            .map_err(|e| status(Code::INVALID_ARGUMENT, e.to_string()))?;
        let names = stdio.names.clone();
        let (pumps, streams) =
            Pumps::start(&self.hub, stdio, request.terminal).map_err(|e| unknown("stdio", e))?;
        [request.stdin, request.stdout, request.stderr] = streams.clone();
        self.members.enter(&request.id, &request.exec_id);
        let answer = self
            .vigil
            .over(self.agent.task.exec(no_deadline(), &request))
            .await;
        let response = answer.inspect_err(|_| self.members.leave(&request.id, &request.exec_id))?;
        self.watch(
            &container,
            &request.id,
            &request.exec_id,
            names,
            streams,
            request.terminal,
            pumps,
        );
        Ok(response)
    }

    /// What each container's cgroup in the guest counts. One that is gone meanwhile is left out.
    pub async fn container_metrics(&self) -> Vec<api::Metrics> {
        let ids: Vec<String> = lock(&self.containers).keys().cloned().collect();
        let asked = ids.into_iter().map(|id| async move {
            let request = api::StatsRequest {
                id,
                ..Default::default()
            };
            let answer = self.agent.task.stats(with_duration(QUICK), &request).await;
            let answer = answer.ok()?;
            api::Metrics::parse_from_bytes(&answer.stats.get_or_default().value).ok()
        });
        let answers = futures_util::future::join_all(asked).await;
        answers.into_iter().flatten().collect()
    }

    /// What the VM takes on the host: its memory, and nothing else.
    async fn vm_stats(&self) -> Result<api::StatsResponse> {
        let guest = Arc::clone(&self.guest);
        // Page tables are read, of as much RAM as there is.
        let used = tokio::task::spawn_blocking(move || guest.memory_used()).await;
        let used = used.map_err(|e| unknown("the VM's memory", e))?;
        let mut metrics = api::Metrics::new();
        metrics.memory.mut_or_insert_default().usage =
            used.ok_or_else(|| status(Code::FAILED_PRECONDITION, "the VM is gone"))?;
        let stats = pack(METRICS_PACKAGE, &metrics).map_err(|e| unknown("the VM's memory", e))?;
        Ok(api::StatsResponse {
            stats: MessageField::some(stats),
            ..Default::default()
        })
    }

    /// Deletes the container, for its host.
    ///
    /// # Errors
    /// What the agent says.
    pub async fn delete_container(
        self: &Arc<Self>,
        request: api::DeleteRequest,
    ) -> Result<api::DeleteResponse> {
        self.delete_process(request).await
    }

    async fn delete_process(self: &Arc<Self>, request: api::DeleteRequest) -> Result<api::DeleteResponse> {
        let container = self.container(&request.id)?;
        let process = self.process(&request.id, &request.exec_id)?;
        let kept = process.exit.borrow().clone();
        let response = if self.is_dead() {
            // The watcher may be at the last output still.
            let exit = match kept {
                Some(exit) => exit,
                None => self.wait_process(&request.id, &request.exec_id).await?,
            };
            api::DeleteResponse {
                exit_status: exit.status,
                exited_at: MessageField::some(exit.at),
                ..Default::default()
            }
        } else {
            let mut response = self
                .vigil
                .over(self.agent.task.delete(no_deadline(), &request))
                .await?;
            by_our_clock(&mut response.exited_at, kept);
            response
        };
        if request.exec_id.is_empty() {
            self.part_with(&request.id, &container).await;
            self.forget(&request.id);
        } else {
            lock(&container.processes).remove(&request.exec_id);
            self.members.leave(&request.id, &request.exec_id);
        }
        Ok(response)
    }
}

/// Ids become names in the shared directory and file names in the guest.
///
/// # Errors
/// This one cannot.
pub fn check_id(id: &str) -> Result<()> {
    let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.' | b'+');
    let sound = (1..=128).contains(&id.len())
        && id.bytes().all(good)
        && id.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    if sound {
        Ok(())
    } else {
        Err(status(
            Code::INVALID_ARGUMENT,
            format!("identifier {id:?} is not a valid one"),
        ))
    }
}

/// Opens what is to be shared.
///
/// # Errors
/// It is not there.
pub fn open_share(share: &Share) -> Result<OwnedFd> {
    // The device takes its own clone of the mount, read-only if it is to be.
    rustix::fs::openat(CWD, &share.source, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(|e| {
        unknown(
            &format!("volume {}", share.source.display()),
            std::io::Error::from(e),
        )
    })
}

/// Makes the working directory and the mount points that the root file system lacks: a read-only one is attached so, and
/// nobody could make them later. What cannot be made is left to the runtime in the guest to complain about.
fn prepare_root(root: BorrowedFd<'_>, spec: &Spec, shares: &[Share]) {
    let mut wanted: Vec<(PathBuf, bool)> = Vec::new();
    if let Some(process) = spec.process() {
        wanted.push((process.cwd().clone(), true));
    }
    for mount in spec.mounts().iter().flatten() {
        let share = shares.iter().find(|share| {
            mount
                .source()
                .as_ref()
                .is_some_and(|source| *source == Path::new(SHARED_DIR).join(&share.name))
        });
        let is_dir = match share {
            Some(share) => share.source.is_dir(),
            // Of the guest's: the pod's DNS files, and device nodes.
            None => !mount.source().as_ref().is_some_and(|source| {
                source.starts_with(ETC_DIR) || source.parent() == Some(Path::new("/dev"))
            }),
        };
        wanted.push((mount.destination().clone(), is_dir));
    }
    for (path, is_dir) in wanted {
        if let Err(error) = make_in(root, &path, is_dir) {
            log::debug!("cannot make {} in the container's root: {error}", path.display());
        }
    }
}

/// Makes a directory, or an empty file in its directory, below `root`, symbolic links resolved inside it.
fn make_in(root: BorrowedFd<'_>, path: &Path, is_dir: bool) -> rustix::io::Result<()> {
    let mut made = PathBuf::new();
    let parts: Vec<_> = path
        .components()
        .filter(|c| matches!(c, std::path::Component::Normal(_)))
        .collect();
    for (index, part) in parts.iter().enumerate() {
        let parent = crate::image::open_in(root, &made, OFlags::PATH | OFlags::DIRECTORY)?;
        made.push(part);
        match crate::image::open_in(root, &made, OFlags::PATH) {
            Ok(_) => continue,
            Err(Errno::NOENT) => {}
            Err(e) => return Err(e),
        }
        let last = index + 1 == parts.len();
        if is_dir || !last {
            rustix::fs::mkdirat(&parent, part.as_os_str(), Mode::from_raw_mode(0o755))?;
            // mkdir's mode goes through the umask.
            rustix::fs::chmodat(
                &parent,
                part.as_os_str(),
                Mode::from_raw_mode(0o755),
                rustix::fs::AtFlags::empty(),
            )?;
        } else {
            rustix::fs::mknodat(
                &parent,
                part.as_os_str(),
                FileType::RegularFile,
                Mode::from_raw_mode(0o644),
                0,
            )?;
        }
    }
    Ok(())
}

/// The root file system as containerd describes it: one mount, not yet made. A bundle's own is no symbolic link.
fn mount_root(request: &api::CreateTaskRequest) -> Result<OwnedFd> {
    let open = |path: &Path, links: OFlags| {
        let what = format!("root file system {}", path.display());
        if !path.is_absolute() {
            return Err(status(
                Code::INVALID_ARGUMENT,
                format!("{what}: not an absolute path"),
            ));
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | links;
        rustix::fs::openat(CWD, path, flags, Mode::empty()).map_err(|e| match e {
            Errno::NOTDIR | Errno::LOOP => status(Code::INVALID_ARGUMENT, format!("{what}: not a directory")),
            e => unknown(&what, std::io::Error::from(e)),
        })
    };
    match request.rootfs.as_slice() {
        [] => open(&Path::new(&request.bundle).join("rootfs"), OFlags::NOFOLLOW),
        [mount] if mount.type_ == "overlay" => overlay::mount_options(&mount.options)
            .map_err(|e| unknown("root file system", crate::error::chain(&e))),
        [mount] if mount.type_ == "bind" => open(Path::new(&mount.source), OFlags::empty()),
        [mount] if image_mount::TYPES.contains(&mount.type_.as_str()) => {
            image_mount::mount(&mount.type_, Path::new(&mount.source), &mount.options).map_err(|e| {
                unknown(
                    &format!("root file system {} on {}", mount.type_, mount.source),
                    e,
                )
            })
        }
        [mount] => Err(status(
            Code::UNIMPLEMENTED,
            format!("a root file system of type {:?} is not supported", mount.type_),
        )),
        _ => Err(status(
            Code::UNIMPLEMENTED,
            "a root file system of several mounts is not supported",
        )),
    }
}

/// Reads a bundle's config.json; neither the bundle nor the file may be a symbolic link, nor may the way to it go back.
fn read_spec(bundle: &str) -> Result<Spec> {
    use std::io::Read;
    let path = Path::new(bundle);
    let what = path.join("config.json").display().to_string();
    if !path.is_absolute() || path.components().any(|c| c == std::path::Component::ParentDir) {
        return Err(status(
            Code::INVALID_ARGUMENT,
            format!("bundle {bundle:?} is not an absolute path without \"..\""),
        ));
    }
    let not_a_bundle = || {
        status(
            Code::INVALID_ARGUMENT,
            format!("{what}: a bundle is a directory with a regular file config.json, not symbolic links"),
        )
    };
    let failed = |e: Errno| match e {
        Errno::NOENT => status(Code::NOT_FOUND, format!("{what}: {e}")),
        // ENXIO: it is a socket.
        Errno::LOOP | Errno::NOTDIR | Errno::NXIO => not_a_bundle(),
        // A zero in it, or too many bytes.
        Errno::INVAL | Errno::NAMETOOLONG => status(
            Code::INVALID_ARGUMENT,
            format!("bundle {bundle:?} is not a path: {e}"),
        ),
        e => unknown(&what, std::io::Error::from(e)),
    };
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let dir = rustix::fs::openat(CWD, path, flags | OFlags::DIRECTORY, Mode::empty()).map_err(failed)?;
    let file =
        rustix::fs::openat(&dir, "config.json", flags | OFlags::NONBLOCK, Mode::empty()).map_err(failed)?;
    // A fifo's writer, or a device, would be waited for.
    let kind = rustix::fs::fstat(&file).map_err(failed)?.st_mode;
    if FileType::from_raw_mode(kind) != FileType::RegularFile {
        return Err(not_a_bundle());
    }
    let mut bytes = Vec::new();
    std::fs::File::from(file)
        .take(MAX_SPEC + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| unknown(&what, e))?;
    if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > MAX_SPEC {
        return Err(status(
            Code::RESOURCE_EXHAUSTED,
            format!("{what} is larger than {MAX_SPEC} bytes"),
        ));
    }
    serde_json::from_slice(&bytes).map_err(|e| status(Code::INVALID_ARGUMENT, format!("{what}: {e}")))
}

fn failure<T>(result: &Result<T>) -> Option<String> {
    result.as_ref().err().map(ToString::to_string)
}

/// The trace that a caller tells of.
fn trace(context: &TtrpcContext) -> Option<String> {
    context.metadata.get("traceparent")?.first().cloned()
}

/// The service as ttrpc serves it.
pub struct Served(pub Arc<TaskService>);

#[async_trait]
impl api::Task for Served {
    async fn create(
        &self,
        context: &TtrpcContext,
        mut request: api::CreateTaskRequest,
    ) -> Result<api::CreateTaskResponse> {
        let service = Arc::clone(&self.0);
        let parent = trace(context);
        if request.rootfs.is_empty() {
            request.rootfs = lock(&service.prepared)
                .get(&request.id)
                .cloned()
                .unwrap_or_default();
        }
        let work = async move {
            let mut steps = service.timed(CREATE, &request.id, parent.as_deref());
            let created = service.create_task(request, &mut *steps).await;
            steps.done(failure(&created).as_deref());
            created
        };
        Ok(api::CreateTaskResponse {
            pid: through(work).await?,
            ..Default::default()
        })
    }

    async fn start(&self, context: &TtrpcContext, request: api::StartRequest) -> Result<api::StartResponse> {
        let service = Arc::clone(&self.0);
        let parent = trace(context);
        let work = async move {
            if !request.exec_id.is_empty() {
                return service.start_process(&request.id, &request.exec_id).await;
            }
            let mut steps = service.timed(START, &request.id, parent.as_deref());
            steps.next("guest");
            let started = service.start_process(&request.id, "").await;
            steps.done(failure(&started).as_deref());
            started
        };
        Ok(api::StartResponse {
            pid: through(work).await?,
            ..Default::default()
        })
    }

    async fn state(&self, _: &TtrpcContext, request: api::StateRequest) -> Result<api::StateResponse> {
        let container = self.0.container(&request.id)?;
        let process = self.0.process(&request.id, &request.exec_id)?;
        let kept = process.exit.borrow().clone();
        let mut response = match kept {
            Some(exit) if self.0.is_dead() => api::StateResponse {
                id: request.id.clone(),
                exec_id: request.exec_id.clone(),
                pid: process.pid.load(Ordering::Relaxed),
                status: EnumOrUnknown::new(api::Status::STOPPED),
                exit_status: exit.status,
                exited_at: MessageField::some(exit.at),
                ..Default::default()
            },
            kept => {
                let asked = self.0.agent.task.state(no_deadline(), &request);
                let mut response = self.0.vigil.over(asked).await?;
                by_our_clock(&mut response.exited_at, kept);
                response
            }
        };
        response.bundle.clone_from(&container.bundle);
        [response.stdin, response.stdout, response.stderr] = process.names.clone();
        response.terminal = process.terminal;
        Ok(response)
    }

    async fn delete(&self, _: &TtrpcContext, request: api::DeleteRequest) -> Result<api::DeleteResponse> {
        let service = Arc::clone(&self.0);
        through(async move { service.delete_process(request).await }).await
    }

    async fn wait(&self, _: &TtrpcContext, request: api::WaitRequest) -> Result<api::WaitResponse> {
        let exit = self.0.wait_process(&request.id, &request.exec_id).await?;
        Ok(api::WaitResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(exit.at),
            ..Default::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> Result<Empty> {
        self.0
            .kill_process(&request.id, &request.exec_id, request.signal, request.all)
            .await?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: api::ExecProcessRequest) -> Result<Empty> {
        let service = Arc::clone(&self.0);
        through(async move { service.exec_process(request).await }).await
    }

    async fn close_io(&self, _: &TtrpcContext, request: api::CloseIORequest) -> Result<Empty> {
        let process = self.0.process(&request.id, &request.exec_id)?;
        if request.stdin
            && let Some(pumps) = lock(&process.pumps).as_ref()
        {
            pumps.close_input();
        }
        Ok(Empty::new())
    }

    async fn connect(&self, _: &TtrpcContext, request: api::ConnectRequest) -> Result<api::ConnectResponse> {
        let process = self.0.process(&request.id, "")?;
        let mut response = if self.0.is_dead() {
            api::ConnectResponse {
                task_pid: process.pid.load(Ordering::Relaxed),
                version: "3".into(),
                ..Default::default()
            }
        } else {
            self.0
                .vigil
                .over(self.0.agent.task.connect(no_deadline(), &request))
                .await?
        };
        response.shim_pid = std::process::id();
        Ok(response)
    }

    async fn pids(&self, _: &TtrpcContext, request: api::PidsRequest) -> Result<api::PidsResponse> {
        let process = self.0.process(&request.id, "")?;
        if self.0.is_dead() || process.exit.borrow().is_some() {
            // A containerd that was restarted takes an empty list for a task that never was, also of one that has ended.
            let info = api::ProcessInfo {
                pid: process.pid.load(Ordering::Relaxed),
                ..Default::default()
            };
            return Ok(api::PidsResponse {
                processes: vec![info],
                ..Default::default()
            });
        }
        self.0
            .vigil
            .over(self.0.agent.task.pids(no_deadline(), &request))
            .await
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: api::ResizePtyRequest) -> Result<Empty> {
        self.0
            .vigil
            .over(self.0.agent.task.resize_pty(no_deadline(), &request))
            .await
    }

    async fn pause(&self, _: &TtrpcContext, request: api::PauseRequest) -> Result<Empty> {
        self.0
            .vigil
            .over(self.0.agent.task.pause(no_deadline(), &request))
            .await
    }

    async fn resume(&self, _: &TtrpcContext, request: api::ResumeRequest) -> Result<Empty> {
        self.0
            .vigil
            .over(self.0.agent.task.resume(no_deadline(), &request))
            .await
    }

    async fn update(&self, _: &TtrpcContext, request: api::UpdateTaskRequest) -> Result<Empty> {
        let service = Arc::clone(&self.0);
        through(async move { service.update_container(request).await }).await
    }

    /// Without an id of what the VM takes on the host, for our own `stats`; containerd does not ask so.
    async fn stats(&self, _: &TtrpcContext, request: api::StatsRequest) -> Result<api::StatsResponse> {
        if request.id.is_empty() {
            return self.0.vm_stats().await;
        }
        self.0
            .vigil
            .over(self.0.agent.task.stats(no_deadline(), &request))
            .await
    }

    async fn checkpoint(&self, _: &TtrpcContext, request: api::CheckpointTaskRequest) -> Result<Empty> {
        self.0.container(&request.id)?;
        let service = Arc::clone(&self.0);
        let work = async move {
            let Some(checkpoint) = service.checkpoint.get() else {
                return Err(status(Code::UNIMPLEMENTED, "checkpoint is not supported"));
            };
            let options = request.options.into_option().map(|any| any.value);
            checkpoint(PathBuf::from(request.path), options.unwrap_or_default())
                .await
                .map_err(|why| status(Code::UNKNOWN, why))
        };
        through(work).await?;
        Ok(Empty::new())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: api::ShutdownRequest) -> Result<Empty> {
        // The VM ends with its pod, not with a container's service.
        Ok(Empty::new())
    }
}

#[cfg(test)]
mod bad_input_tests;
#[cfg(test)]
mod tests;
