// SPDX-License-Identifier: Apache-2.0
//! The life of a pod in the process that hosts it: [`start`] is the straight line from a record to a running process,
//! [`restore`] the one from a snapshot, [`run`] follows it to its end, and whatever was made is undone on every way out.

use super::attach;
use super::guest::ShareOptions;
use super::log::Writer;
use super::machine::{MachineConfig, Origin, Room, Shared};
use super::rewrite;
use super::shelf::Shelf;
use super::snapshot::{self, Card, Snapshot, Taker};
use super::state::{self, Alive, Network, Pods, Record, Status};
use super::streams::{Input, Output, Stdio};
use super::task::{self, Adopted, New, TaskService, Untimed};
use super::template::{self, Kind};
use super::terminal;
use super::vigil;
use super::vm::{self, PodVm, QUICK, agent_error};
use crate::clock;
use crate::image::{self, Store};
use crate::net::{self, dns, mac_text, nat, publish, tap};
use crate::runtime::{overlay, spec, user};
use cloister_devices::net::{NetBackend, NetConfig};
use cloister_protocol::pod::{ConfigureRequest, DnsFiles, Interface, Route};
use cloister_protocol::protobuf::MessageField;
use cloister_protocol::task::DeleteRequest;
use cloister_vmm::{CellHost, CellHostConfig, HugePages, StopReason};
use oci_spec::runtime::Spec;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

/// Time for those who are attached to hear of the end.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Signals that are passed on to a container's process: docker's, which are all but SIGCHLD, SIGPIPE, SIGURG and those that
/// cannot be caught. Of these SIGILL, SIGTRAP, SIGBUS, SIGFPE, SIGSEGV and SIGSYS are left out, which tell of faults of
/// our own, SIGTTIN and SIGTTOU, which would come again and again, SIGWINCH, which resizes the terminal, and the real-time
/// ones, of which the VMM has one.
pub const SIGNALS: [i32; 17] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGABRT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGTERM,
    libc::SIGSTKFLT,
    libc::SIGCONT,
    libc::SIGTSTP,
    libc::SIGXCPU,
    libc::SIGXFSZ,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGIO,
    libc::SIGPWR,
];
/// So many SIGINT or SIGTERM and the VM is ended, whatever the container thinks of it.
const IMPATIENCE: u32 = 3;

/// Why a container did not come to run, or was lost.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its image.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// Its root directory.
    #[error("cannot use {what} as the container's root")]
    Root {
        /// The folder.
        what: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its record.
    #[error(transparent)]
    State(#[from] state::Error),
    /// Its root file system.
    #[error(transparent)]
    Overlay(#[from] overlay::Error),
    /// Its user.
    #[error(transparent)]
    User(#[from] user::Error),
    /// Its specification.
    #[error(transparent)]
    Spec(#[from] spec::Error),
    /// Its network.
    #[error(transparent)]
    Net(#[from] net::Error),
    /// The host's hypervisor.
    #[error(transparent)]
    Host(#[from] cloister_vmm::HostError),
    /// Its VM, or the agent in it.
    #[error(transparent)]
    Vm(#[from] vm::Error),
    /// What it is restored from.
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
    /// A signal came first.
    #[error("interrupted by signal {0}")]
    Interrupted(i32),
    /// Something of the host.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// docker's exit status for it.
    pub fn exit_code(&self) -> u8 {
        match self {
            // The words of the runtime in the guest, which are docker's.
            Self::Vm(vm::Error::Agent { message, .. })
                if message.contains("exec: ") && message.contains("permission denied") =>
            {
                126
            }
            Self::Vm(vm::Error::Agent { message, .. }) if message.contains("executable file not found") => {
                127
            }
            Self::Vm(vm::Error::Agent { message, .. })
                if message.contains("exec: ") && message.contains("no such file") =>
            {
                127
            }
            Self::Vm(vm::Error::Agent { message, .. }) if message.contains("is a directory") => 126,
            Self::Interrupted(signal) => u8::try_from(signal.saturating_add(128)).unwrap_or(125),
            _ => 125,
        }
    }
}

/// Words an error of the host's kernel.
pub fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { what, source }
}

/// The hosting process's own streams, as far as the container gets them.
#[derive(Debug, Default)]
pub struct Attach {
    /// `-i`.
    pub stdin: Option<OwnedFd>,
    /// In the foreground.
    pub stdout: Option<OwnedFd>,
    /// In the foreground without a terminal.
    pub stderr: Option<OwnedFd>,
    /// The container does not start before somebody has attached.
    pub awaited: bool,
}

/// What the starter of a pod is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// The VM runs, and `attach.sock` is there.
    Attachable,
    /// The container's process runs.
    Started,
}

/// What was made, in order; [`Pod::undo`] takes it apart in the reverse one.
struct Pod<'a> {
    pods: &'a Pods,
    record: Record,
    made_net: bool,
    card: Option<Card>,
    vm: Option<PodVm>,
    service: Option<Arc<TaskService>>,
    attach: Option<attach::Server>,
    relays: Option<publish::Relays>,
}

/// Hosts a pod from its record, and from the `snapshot` if there is one, to its end, and leaves the record ended, or
/// nothing with `--rm`. `tell` is called at each [`Moment`]. Answers the exit status of the container.
///
/// # Errors
/// Why it could not run, or was lost.
pub fn host(
    pods: &Pods,
    store: &Store,
    record: Record,
    alive: Alive,
    attach: Attach,
    snapshot: Option<Snapshot>,
    tell: impl Fn(Moment),
) -> Result<u32, Error> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("pod")
        .enable_all()
        .build()
        .map_err(io_error("start a runtime"))?;
    let mut pod = Pod {
        pods,
        record,
        made_net: false,
        card: None,
        vm: None,
        service: None,
        attach: None,
        relays: None,
    };
    let (result, clients) = runtime.block_on(async {
        let result = run(&mut pod, store, attach, snapshot, tell).await;
        let clients = pod.attach.as_ref().map(|attach| Arc::clone(&attach.clients));
        pod.undo().await;
        (result, clients)
    });
    let record = &mut pod.record;
    record.status = Status::Exited;
    record.finished = Some(clock::now());
    record.pid = None;
    match &result {
        Ok(code) => record.exit_code = Some(*code),
        Err(error) => {
            record.exit_code = Some(u32::from(error.exit_code()));
            record.error = Some(crate::error::chain(error));
        }
    }
    let saved = pods.save(record).and_then(|()| pods.remove_ended(record));
    drop(alive);
    if let Some(clients) = clients {
        let (status, message) = match &result {
            Ok(code) => (*code, String::new()),
            Err(error) => (u32::from(error.exit_code()), crate::error::chain(error)),
        };
        // Those who do not read are not waited for.
        let told = async { tokio::time::timeout(LAST_WORDS, clients.end(status, &message)).await };
        let _ = runtime.block_on(told);
    }
    // A thread that waits for the user's next key must not hold up the end.
    runtime.shutdown_timeout(Duration::from_millis(100));
    saved?;
    result
}

async fn run(
    pod: &mut Pod<'_>,
    store: &Store,
    attach: Attach,
    snapshot: Option<Snapshot>,
    tell: impl Fn(Moment),
) -> Result<u32, Error> {
    let mut signals = signals().map_err(io_error("listen to signals"))?;
    let (interrupt, interrupted) = watch::channel(None);
    let id = pod.record.container_id().to_owned();
    let is_attached = attach.stdout.is_some();
    {
        let starting = async {
            match &snapshot {
                None => start(&mut *pod, store, attach, interrupted, &tell).await,
                Some(snapshot) => restore(&mut *pod, store, snapshot, interrupted, &tell).await,
            }
        };
        tokio::pin!(starting);
        loop {
            tokio::select! {
                result = &mut starting => break result?,
                Some(number) = signals.recv() => {
                    if matches!(number, libc::SIGHUP | libc::SIGINT | libc::SIGQUIT | libc::SIGTERM) {
                        interrupt.send_replace(Some(number));
                    }
                }
            }
        }
    }
    // Its copies have been made of it: it is not needed any more.
    drop(snapshot);
    let (Some(service), Some(machine)) = (
        pod.service.clone(),
        pod.vm.as_ref().map(|vm| Arc::clone(&vm.machine)),
    ) else {
        return Err(Error::Io {
            what: "keep the pod",
            source: io::ErrorKind::NotFound.into(),
        });
    };
    let taker = Arc::new(Taker {
        machine: Arc::clone(&machine),
        service: Arc::downgrade(&service),
        record: pod.record.clone(),
        upper: pod.pods.data_dir(&pod.record.id).join("upper"),
        card: pod.card.clone(),
        one: tokio::sync::Mutex::default(),
    });
    service.follow_checkpoints(move |path, on| {
        let taker = Arc::clone(&taker);
        let take = async move { taker.take(path, on).await.map_err(|e| crate::error::chain(&e)) };
        Box::pin(take)
    });
    tell(Moment::Started);

    let raw = (pod.record.plan.wishes.terminal && is_attached && terminal::stdin_is_terminal())
        .then(terminal::Raw::stdin)
        .transpose()
        .map_err(io_error("make the terminal raw"))?;
    let exit = {
        let waiting = service.wait_process(&id, "");
        tokio::pin!(waiting);
        let mut window = signal(SignalKind::window_change()).map_err(io_error("listen to signals"))?;
        if is_attached && pod.record.plan.wishes.terminal {
            resize(&service, &id).await;
        }
        let mut impatience = 0_u32;
        loop {
            tokio::select! {
                exit = &mut waiting => break exit.map_err(agent_error("wait for the container"))?,
                _ = window.recv() => resize(&service, &id).await,
                Some(number) = signals.recv() => {
                    if matches!(number, libc::SIGINT | libc::SIGTERM) {
                        impatience += 1;
                    }
                    if impatience >= IMPATIENCE && is_attached {
                        crate::error::tell(format_args!(
                            "got {IMPATIENCE} SIGTERM/SIGINTs, forcefully exiting"
                        ));
                        machine.stop();
                    } else if let Ok(number) = u32::try_from(number) {
                        let service = Arc::clone(&service);
                        let id = id.clone();
                        tokio::spawn(async move {
                            if let Err(error) = service.kill_process(&id, "", number, false).await {
                                log::debug!("signal {number}: {error}");
                            }
                        });
                    }
                }
            }
        }
    };
    drop(raw);
    let ended = machine.dead().borrow().clone();
    match ended {
        // The container was alive when its VM ended.
        Some(reason) if exit.status == state::EXIT_KILLED && reason != StopReason::Requested => {
            Err(vm::Error::Ended {
                when: "under its container",
                reason: vm::why(&reason),
                tail: machine.last_words(),
            }
            .into())
        }
        _ => Ok(exit.status),
    }
}

async fn resize(service: &TaskService, id: &str) {
    if let Some((width, height)) = terminal::size()
        && let Err(error) = service.resize(id, "", width, height).await
    {
        log::debug!("resize: {error}");
    }
}

fn signals() -> io::Result<mpsc::Receiver<i32>> {
    let (sender, receiver) = mpsc::channel(16);
    for number in SIGNALS {
        let mut stream = signal(SignalKind::from_raw(number))?;
        let sender = sender.clone();
        tokio::spawn(
            async move { while stream.recv().await.is_some() && sender.send(number).await.is_ok() {} },
        );
    }
    Ok(receiver)
}

fn check(interrupted: &watch::Receiver<Option<i32>>) -> Result<(), Error> {
    interrupted
        .borrow()
        .map_or(Ok(()), |signal| Err(Error::Interrupted(signal)))
}

/// From a record to a running process.
async fn start(
    pod: &mut Pod<'_>,
    store: &Store,
    attach: Attach,
    mut interrupted: watch::Receiver<Option<i32>>,
    tell: &impl Fn(Moment),
) -> Result<(), Error> {
    let plan = pod.record.plan.clone();
    let id = pod.record.id.clone();
    let (root, spec) = root(pod, store, None)?;
    check(&interrupted)?;

    // The network of the pod.
    let network = connect(pod, &plan.network, None).await?;
    check(&interrupted)?;

    // The virtual machine, up to its agent's first word.
    let cells = CellHost::new(CellHostConfig::default())?;
    let mut config = machine_config(&pod.record, network.nics, Origin::Boot);
    // Of a template whose first clone this is.
    let mut to_note = None;
    if let Some(kind) = Kind::of(&config, template::NODE)
        && let Some(image) = pod.pods.templates().find(&kind, &cells)
    {
        log::info!(
            "the virtual machine is cloned from template {}",
            Shelf::name(&kind)
        );
        if image.working_set().is_none() {
            to_note = Some(kind);
        }
        config.origin = Origin::Clone(image);
    }
    let vm = pod.vm.insert(PodVm::start(config, &cells).await?);
    tokio::select! {
        ready = vm.ready(Duration::from_millis(plan.init_timeout_ms)) => { ready?; }
        signal = interrupted.wait_for(Option::is_some) => {
            return Err(Error::Interrupted(signal.ok().and_then(|signal| *signal).unwrap_or(libc::SIGTERM)));
        }
    }
    vm.configure(&network.configure.into_request(&plan.hostname))
        .await?;

    // The container.
    let machine = Arc::clone(&vm.machine);
    let service = vm.serve(&pod.pods.socket(&id), vigil::PATIENCE).await?;
    pod.service = Some(Arc::clone(&service));
    let bundle = pod.pods.state_dir(&id);
    let socket = bundle.join(attach::SOCKET);
    // Input that is a descriptor's is that one's alone.
    let shared_input = plan.interactive && attach.stdin.is_none();
    let mut attached =
        attach::Server::start(&socket, shared_input).map_err(io_error("make the pod's attach.sock"))?;
    let awaited = attach.awaited;
    let stdio =
        stdio(pod.pods, &pod.record, attach, &mut attached).map_err(io_error("open the container's log"))?;
    let mut first = attached.attached.clone();
    pod.attach = Some(attached);
    tell(Moment::Attachable);
    if awaited {
        tokio::select! {
            _ = tokio::time::timeout(QUICK, first.wait_for(|attached| *attached)) => {}
            _ = interrupted.wait_for(Option::is_some) => {}
        }
    }
    check(&interrupted)?;
    let new = New {
        id: id.clone(),
        bundle: bundle.display().to_string(),
        spec,
        root,
        stdio,
        terminal: plan.wishes.terminal,
    };
    let create = async {
        service
            .create_container(new, &mut Untimed)
            .await
            .map_err(agent_error("failed to create the container"))?;
        if let Some(kind) = to_note {
            let shelf = pod.pods.templates();
            tokio::task::spawn_blocking(move || {
                machine.cell().working_set().map(|set| shelf.note(&kind, &set))
            });
        }
        if let Some(address) = network.address {
            pod.relays = Some(publish::start(&plan.publish, address).await?);
        }
        service
            .start_process(&id, "")
            .await
            .map_err(agent_error("failed to start the container"))?;
        Ok::<(), Error>(())
    };
    let ended = async {
        match &pod.vm {
            Some(vm) => vm.ended("before its container ran").await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        created = create => created?,
        error = ended => return Err(error.into()),
    }
    note_running(pod)
}

/// From a snapshot to a running process: the one that was saved goes on.
async fn restore(
    pod: &mut Pod<'_>,
    store: &Store,
    snapshot: &Snapshot,
    mut interrupted: watch::Receiver<Option<i32>>,
    tell: &impl Fn(Moment),
) -> Result<(), Error> {
    let plan = pod.record.plan.clone();
    let id = pod.record.id.clone();
    let guest_id = pod.record.container_id().to_owned();
    let facts = &snapshot.facts;

    // All that the guest has open is there before its devices are.
    let (root, mut spec) = root(pod, store, Some(snapshot))?;
    let shares = rewrite::for_guest(&mut spec, &guest_id, &[]).map_err(snapshot::Error::Impossible)?;
    let read_only = spec.root().as_ref().and_then(|root| root.readonly()) == Some(true);
    let mut shared = vec![Shared {
        name: rewrite::root_name(&guest_id),
        tree: root,
        options: ShareOptions {
            read_only,
            ..ShareOptions::default()
        },
    }];
    for share in shares {
        shared.push(Shared {
            tree: task::open_share(&share).map_err(agent_error("share a volume"))?,
            options: ShareOptions {
                read_only: share.read_only,
                follows_mounts: share.follows_mounts,
            },
            name: share.name,
        });
    }
    check(&interrupted)?;
    let network = connect(pod, &plan.network, facts.card.as_ref()).await?;
    check(&interrupted)?;

    let cells = CellHost::new(CellHostConfig::default())?;
    let to_note = snapshot
        .prefetch
        .clone()
        .filter(|path| snapshot::prefetch(&snapshot.image, path));
    let origin = Origin::Restore(Arc::clone(&snapshot.image), Arc::new(shared));
    let config = machine_config(&pod.record, network.nics, origin);
    let vm = pod.vm.insert(PodVm::start(config, &cells).await?);
    vm.ready(QUICK).await?;
    let service = vm.serve(&pod.pods.socket(&id), vigil::PATIENCE).await?;
    pod.service = Some(Arc::clone(&service));

    // The container is frozen until all this is done.
    let bundle = pod.pods.state_dir(&id);
    let mut attached = attach::Server::start(&bundle.join(attach::SOCKET), plan.interactive)
        .map_err(io_error("make the pod's attach.sock"))?;
    let stdio = stdio(pod.pods, &pod.record, Attach::default(), &mut attached)
        .map_err(io_error("open the container's log"))?;
    pod.attach = Some(attached);
    let adopted = Adopted {
        id: guest_id.clone(),
        bundle: bundle.display().to_string(),
        pid: facts.pid,
        stdio,
        streams: facts.streams.clone(),
        terminal: plan.wishes.terminal,
    };
    service
        .adopt(adopted)
        .map_err(agent_error("take the container on"))?;
    tell(Moment::Attachable);
    let configure = network.configure.into_request(&plan.hostname);
    let go_on = async {
        vm.configure(&configure).await?;
        if let Some(address) = network.address {
            pod.relays = Some(publish::start(&plan.publish, address).await?);
        }
        if !facts.paused {
            service
                .set_paused(&guest_id, false)
                .await
                .map_err(agent_error("have the container go on"))?;
        }
        Ok::<(), Error>(())
    };
    tokio::select! {
        gone_on = go_on => gone_on?,
        signal = interrupted.wait_for(Option::is_some) => {
            return Err(Error::Interrupted(signal.ok().and_then(|signal| *signal).unwrap_or(libc::SIGTERM)));
        }
    }
    if let Some(path) = to_note {
        snapshot::note_touched(&vm.machine, path);
    }
    note_running(pod)
}

/// The record says that the container runs.
fn note_running(pod: &mut Pod<'_>) -> Result<(), Error> {
    pod.record.status = Status::Running;
    pod.record.started = Some(clock::now());
    pod.record.pid = Some(std::process::id());
    Ok(pod.pods.save(&pod.record)?)
}

/// The VM of a record.
fn machine_config(record: &Record, nics: Vec<NetConfig>, origin: Origin) -> MachineConfig<'_> {
    let plan = &record.plan;
    MachineConfig {
        name: format!("pod-{}", record.short_id()),
        cpus: plan.cpus,
        memory: plan.memory,
        huge_pages: HugePages::default(),
        dax: plan.dax,
        kernel: &plan.kernel,
        initrd: &plan.initrd,
        kernel_args: &plan.kernel_args,
        nics,
        room: Room::default(),
        origin,
    }
}

/// The container's root file system, with what a snapshot has of it, and its specification.
fn root(pod: &Pod<'_>, store: &Store, snapshot: Option<&Snapshot>) -> Result<(OwnedFd, Spec), Error> {
    let plan = &pod.record.plan;
    let id = &pod.record.id;
    let hold = store.hold()?;
    let data = pod.pods.data_dir(id);
    let layers = match &plan.rootfs {
        Some(dir) => vec![open_root(dir)?],
        None => store.layer_roots(&pod.record.layers)?,
    };
    let upper =
        overlay::make_upper(&data, layers.first().map(AsFd::as_fd)).map_err(|source| Error::Root {
            what: data.display().to_string(),
            source,
        })?;
    if let Some(snapshot) = snapshot {
        snapshot.unpack(upper.upper.as_fd())?;
    }
    let root = overlay::mount(&layers, &upper)?;
    drop((layers, upper));
    let image_config = image_config(store, &pod.record)?;
    let user_text = plan
        .wishes
        .user
        .clone()
        .or_else(|| image_config.user().clone())
        .unwrap_or_default();
    let user = user::resolve(root.as_fd(), &user_text)?;
    let spec = spec::build(
        &image_config,
        &plan.wishes,
        &user,
        &plan.hostname,
        pod.record.container_id(),
    )?;
    let bundle = pod.pods.state_dir(id);
    let json = serde_json::to_vec_pretty(&spec).unwrap_or_default();
    crate::files::replace(&bundle.join("config.json"), &json)
        .map_err(io_error("write the container's config.json"))?;
    drop(hold);
    Ok((root, spec))
}

fn open_root(dir: &Path) -> Result<OwnedFd, Error> {
    use rustix::fs::{CWD, Mode, OFlags};
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(CWD, dir, flags, Mode::empty()).map_err(|e| Error::Root {
        what: dir.display().to_string(),
        source: e.into(),
    })
}

/// The part of the image's configuration that concerns a container; an empty one for a plain folder.
pub fn image_config(store: &Store, record: &Record) -> Result<oci_spec::image::Config, Error> {
    let Some(id) = &record.image_id else {
        return Ok(oci_spec::image::Config::default());
    };
    let image = store.find(&id.to_string())?;
    Ok(store.config(&image)?.config().clone().unwrap_or_default())
}

/// What the pod is told about its network.
#[derive(Default)]
struct Configure {
    interface: Option<Interface>,
    route: Option<Route>,
    address: Option<IpAddr>,
    resolv_conf: String,
}

impl Configure {
    fn into_request(self, hostname: &str) -> ConfigureRequest {
        let mut entropy = vec![0; 64];
        crate::ids::fill(&mut entropy);
        let files = DnsFiles {
            hosts: dns::hosts(hostname, self.address),
            // An empty one would not be written, and the container's bind mount would have no source.
            resolv_conf: if self.resolv_conf.is_empty() {
                "# no resolver\n".into()
            } else {
                self.resolv_conf
            },
            hostname: format!("{hostname}\n"),
            ..Default::default()
        };
        ConfigureRequest {
            hostname: hostname.to_owned(),
            interfaces: self.interface.into_iter().collect(),
            routes: self.route.into_iter().collect(),
            files: MessageField::some(files),
            entropy,
            ..Default::default()
        }
    }
}

#[derive(Default)]
struct Connected {
    nics: Vec<NetConfig>,
    address: Option<IpAddr>,
    configure: Configure,
}

/// Makes the network. A guest that was restored keeps the hardware address that it `had`, and gives up the other one.
async fn connect(pod: &mut Pod<'_>, network: &Network, had: Option<&Card>) -> Result<Connected, Error> {
    let former_addresses: Vec<String> = had.and_then(|card| card.address.clone()).into_iter().collect();
    match network {
        Network::None => Ok(Connected::default()),
        Network::Tap(name) => {
            let mut mac = [0x02, 0xc1, 0, 0, 0, 0];
            crate::ids::fill(&mut mac[2..]);
            let mac = had.map_or(mac, |card| card.mac);
            pod.card = Some(Card { mac, address: None });
            let interface = Interface {
                mac: mac_text(&mac),
                name: "eth0".into(),
                former_addresses,
                ..Default::default()
            };
            Ok(Connected {
                nics: vec![nic(tap::open_existing(name)?, mac)],
                address: None,
                configure: Configure {
                    interface: Some(interface),
                    resolv_conf: host_resolvers(),
                    ..Configure::default()
                },
            })
        }
        Network::Nat => {
            let guard = pod.pods.lock()?;
            let made = nat::create(pod.pods, &pod.record.id).await?;
            pod.record.net = Some(made.record.clone());
            pod.made_net = true;
            pod.pods.save(&pod.record)?;
            drop(guard);
            let mac = had.map_or(made.mac, |card| card.mac);
            let own_address = format!("{}/30", made.address);
            pod.card = Some(Card {
                mac,
                address: Some(own_address.clone()),
            });
            let interface = Interface {
                mac: mac_text(&mac),
                name: "eth0".into(),
                addresses: vec![own_address],
                former_addresses,
                ..Default::default()
            };
            let route = Route {
                destination: "0.0.0.0/0".into(),
                gateway: made.gateway.to_string(),
                interface: "eth0".into(),
                ..Default::default()
            };
            let address: Ipv4Addr = made.address;
            Ok(Connected {
                nics: vec![nic(made.tap, mac)],
                address: Some(address.into()),
                configure: Configure {
                    interface: Some(interface),
                    route: Some(route),
                    address: Some(address.into()),
                    resolv_conf: host_resolvers(),
                },
            })
        }
    }
}

fn nic(tap: OwnedFd, mac: [u8; 6]) -> NetConfig {
    NetConfig {
        backend: NetBackend::Tap(vec![tap]),
        mac,
        mtu: None,
    }
}

fn host_resolvers() -> String {
    let (text, dropped) = dns::resolv_conf(&std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default());
    if !dropped.is_empty() {
        log::info!(
            "resolvers on the host's loopback are of no use in the pod: {}",
            dropped.join(", ")
        );
    }
    text
}

fn stdio(pods: &Pods, record: &Record, attach: Attach, clients: &mut attach::Server) -> io::Result<Stdio> {
    let log = Arc::new(Mutex::new(Writer::open(&pods.log(&record.id))?));
    let output = |stream, copy| Output::Logged {
        log: Arc::clone(&log),
        stream,
        copy,
        clients: Arc::clone(&clients.clients),
    };
    let stdin = match (attach.stdin, clients.input.take()) {
        (Some(fd), _) => Input::Descriptor(fd),
        (None, Some(pieces)) => Input::Channel(pieces),
        (None, None) => Input::Null,
    };
    Ok(Stdio {
        stdin,
        stdout: output("stdout", attach.stdout),
        stderr: output("stderr", attach.stderr),
        names: Default::default(),
    })
}

impl Pod<'_> {
    /// Takes apart what was made.
    async fn undo(&mut self) {
        self.relays = None;
        let id = self.record.container_id().to_owned();
        if let Some(service) = self.service.take() {
            let dead = self
                .vm
                .as_ref()
                .is_some_and(|vm| vm.machine.dead().borrow().is_some());
            if !dead {
                let request = DeleteRequest {
                    id,
                    ..Default::default()
                };
                let deleted = tokio::time::timeout(QUICK, service.delete_container(request)).await;
                log::debug!("deleted: {deleted:?}");
            }
        }
        if let Some(vm) = self.vm.take() {
            vm.shut_down().await;
        }
        self.attach = None;
        if self.made_net {
            remove_net(self.pods, &mut self.record);
        }
    }
}

/// Removes what a pod's network left on the host.
fn remove_net(pods: &Pods, record: &mut Record) {
    let Some(net) = record.net.take() else { return };
    let removed = || -> Result<(), Error> {
        let _guard = pods.lock()?;
        let others = pods
            .list()?
            .iter()
            .any(|other| other.id != record.id && other.net.is_some());
        nat::remove(pods, &net, others)?;
        Ok(())
    };
    if let Err(error) = removed() {
        log::warn!("{}", crate::error::chain(&error));
        // Tried again by whoever comes next.
        record.net = Some(net);
    }
}

/// Buries the pods whose hosting process was killed: records them as ended and removes what it left on the host.
///
/// # Errors
/// The records cannot be read or written.
pub fn reap(pods: &Pods) -> Result<(), state::Error> {
    for (mut record, alive) in pods.dead()? {
        // Just reserved, and about to be hosted: `reserve` holds the lock, so this one is really dead.
        remove_net(pods, &mut record);
        pods.bury(&mut record)?;
        pods.remove_ended(&record)?;
        drop(alive);
    }
    Ok(())
}
