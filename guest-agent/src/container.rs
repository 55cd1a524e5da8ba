// SPDX-License-Identifier: Apache-2.0
//! Containers: made, started, executed into, taken apart.
//!
//! On disk, below the run directory: `bundles/ID/` (config.json, the mount point rootfs, and a file per exec),
//! `containers/ID/` (libcontainer's state), `console/N` (sockets that take a terminal, for as long as it takes).

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs;
use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cloister_protocol::events::{
    TASK_CREATE_EVENT_TOPIC, TASK_DELETE_EVENT_TOPIC, TASK_EXEC_ADDED_EVENT_TOPIC,
    TASK_EXEC_STARTED_EVENT_TOPIC, TASK_START_EVENT_TOPIC, TaskCreate, TaskDelete, TaskExecAdded,
    TaskExecStarted, TaskIO, TaskStart,
};
use cloister_protocol::protobuf::MessageField;
use cloister_protocol::task::{CreateTaskRequest, ExecProcessRequest, Status};
use libcontainer::container::{Container as State, ContainerStatus};
use libcontainer::notify_socket::NOTIFY_FILE;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::Signal;
use serde_json::Value;

use crate::cgroup::{Cgroup, OomReporter};
use crate::error::{Result, already_exists, failed_precondition, not_found, unknown};
use crate::events::{Publisher, timestamp};
use crate::pidns::{self, SharedPidNs};
use crate::process::{GivenNames, Process};
use crate::reaper::{Exit, Reaper};
use crate::stdio::{Io, Names, nulls};
use crate::transport::Host;
use crate::{mount, seccomp, spawn, spec};

/// What everything in the agent shares.
pub struct Context {
    /// The way to the host.
    pub host: Host,
    /// Events to it.
    pub events: Publisher,
    /// Collector of dead processes.
    pub reaper: Reaper,
    /// Directory of the agent's state.
    pub run: PathBuf,
    /// This is PID 1 of a VM and may act on all of it.
    pub in_vm: bool,
    /// The containers there are.
    pub containers: Mutex<Containers>,
    /// The PID namespace that containers can share.
    pub pid_ns: SharedPidNs,
}

/// Table of containers.
#[derive(Default)]
pub struct Containers {
    table: HashMap<String, Arc<Container>>,
    /// Ids taken by a Create under way.
    creating: HashSet<String>,
}

/// One container.
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its first process.
    pub init: Arc<Process>,
    /// Its cgroup.
    pub cgroup: Cgroup,
    /// Tells of processes killed for want of memory.
    oom: Option<Arc<OomReporter>>,
    /// bundles/ID
    pub bundle: PathBuf,
    /// It has a seccomp profile.
    seccomp: bool,
    /// It has hooks of these kinds. (libcontainer runs the others.)
    poststart: bool,
    poststop: bool,
    /// Where its root file system was mounted, if the agent did that.
    rootfs: Option<PathBuf>,
    inner: Mutex<Inner>,
    /// Held by Start, Delete: one at a time.
    lifecycle: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Inner {
    execs: HashMap<String, Arc<Exec>>,
    paused: bool,
}

struct Exec {
    process: Arc<Process>,
    /// The file with the OCI process.
    file: PathBuf,
    console_size: Option<(u16, u16)>,
    lifecycle: tokio::sync::Mutex<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn text(path: &Path) -> &OsStr {
    path.as_os_str()
}

/// A unix socket on which libcontainer hands over the master side of a terminal.
struct Console {
    listener: UnixListener,
    path: PathBuf,
}

impl Console {
    fn new(run: &Path) -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let dir = run.join("console");
        fs::create_dir_all(&dir)?;
        let path = dir.join(NEXT.fetch_add(1, Ordering::Relaxed).to_string());
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, path })
    }

    /// Takes the terminal; the helper has ended, so it has been sent.
    fn take(&self) -> io::Result<OwnedFd> {
        let (conn, _) = self.listener.accept()?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut name = [0; 64];
        recvmsg(
            &conn,
            &mut [IoSliceMut::new(&mut name)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        control
            .drain()
            .find_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
                _ => None,
            })
            .ok_or_else(|| io::Error::other("no descriptor came with the terminal's name"))
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Runs a helper for a process, with its streams; `args` without the console.
async fn launch(
    context: &Arc<Context>,
    process: &Arc<Process>,
    args: &[&OsStr],
    console_size: Option<(u16, u16)>,
) -> Result<()> {
    let connections = process.names.connect(&context.host).await?;
    let io_error = |what: &str, e: io::Error| unknown(format!("{what}: {e}"));
    let io: Io;
    let (pid, _guard) = if process.names.terminal {
        let console = Console::new(&context.run).map_err(|e| io_error("console socket", e))?;
        let stdio = nulls().map_err(|e| io_error("stdio", e))?;
        let args: Vec<_> = args.iter().copied().chain([text(&console.path)]).collect();
        let spawned = spawn::run(&context.reaper, &args, stdio).await.map_err(unknown)?;
        let master = console
            .take()
            .map_err(|e| io_error("the terminal did not arrive", e))?;
        io = connections
            .start_terminal(master)
            .map_err(|e| io_error("terminal", e))?;
        if let Some((width, height)) = console_size {
            io.resize(width, height)
                .map_err(|e| io_error("size of the terminal", e))?;
        }
        spawned
    } else {
        let (stdio, pipes) = connections.pipes().map_err(|e| io_error("stdio pipes", e))?;
        let args: Vec<_> = args.iter().copied().chain([OsStr::new("-")]).collect();
        let spawned = spawn::run(&context.reaper, &args, stdio).await.map_err(unknown)?;
        io = connections.start(pipes).map_err(|e| io_error("stdio pipes", e))?;
        spawned
    };
    let exit = context.reaper.watch(pid);
    process.attach(context, pid, io, exit);
    Ok(())
}

impl Context {
    fn state_dir(&self) -> PathBuf {
        self.run.join("containers")
    }

    /// The container of that id.
    ///
    /// # Errors
    /// NotFound, worded as containerd's shim does.
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        lock(&self.containers)
            .table
            .get(id)
            .cloned()
            .ok_or_else(|| not_found("container not created"))
    }

    /// Ids of all containers, sorted.
    pub fn container_ids(&self) -> Vec<String> {
        let mut ids: Vec<_> = lock(&self.containers).table.keys().cloned().collect();
        ids.sort_unstable();
        ids
    }

    /// All containers.
    pub fn all(&self) -> Vec<Arc<Container>> {
        lock(&self.containers).table.values().cloned().collect()
    }

    /// A container's first process is gone: kills what is left, and tells if it died for want of memory.
    pub fn first_gone(&self, id: &str) {
        if let Ok(container) = self.container(id) {
            container.cgroup.kill();
            if let Some(oom) = &container.oom {
                oom.report();
            }
        }
    }

    /// Create: everything up to a first process that waits to be let go. Returns its pid.
    ///
    /// # Errors
    /// InvalidArgument, AlreadyExists, or Unknown with libcontainer's reason; nothing is left behind then.
    pub async fn create(self: &Arc<Self>, request: CreateTaskRequest) -> Result<u32> {
        let id = request.id.as_str();
        spec::check_id(id)?;
        {
            let mut containers = lock(&self.containers);
            if containers.table.contains_key(id) || !containers.creating.insert(id.to_owned()) {
                return Err(already_exists(format!("container {id}")));
            }
        }
        let made = self.create_reserved(&request).await;
        let mut containers = lock(&self.containers);
        containers.creating.remove(id);
        let container = made?;
        containers.table.insert(id.to_owned(), Arc::clone(&container));
        drop(containers);
        let pid = container.init.pid_u32();
        self.events.publish(
            TASK_CREATE_EVENT_TOPIC,
            &TaskCreate {
                container_id: request.id,
                bundle: request.bundle,
                rootfs: request.rootfs,
                io: MessageField::some(TaskIO {
                    stdin: request.stdin,
                    stdout: request.stdout,
                    stderr: request.stderr,
                    terminal: request.terminal,
                    ..Default::default()
                }),
                checkpoint: request.checkpoint,
                pid,
                ..Default::default()
            },
        );
        Ok(pid)
    }

    async fn create_reserved(self: &Arc<Self>, request: &CreateTaskRequest) -> Result<Arc<Container>> {
        let id = request.id.as_str();
        if !request.checkpoint.is_empty() || !request.parent_checkpoint.is_empty() {
            return Err(crate::error::unimplemented(
                "restoring a container from a checkpoint",
            ));
        }
        let names = Names::parse(&request.stdin, &request.stdout, &request.stderr, request.terminal)?;
        let bundle = self.run.join("bundles").join(id);
        let rootfs = (!request.rootfs.is_empty()).then(|| bundle.join("rootfs"));
        let mut prepared = spec::prepare(
            id,
            request.options.get_or_default(),
            request.terminal,
            rootfs.as_deref(),
        )?;
        if pidns::asked_for(&mut prepared.json, &pidns::file(&self.run)) {
            self.pid_ns
                .ensure(&self.reaper, &self.run)
                .await
                .map_err(|e| unknown(format!("OCI runtime create failed: {e}")))?;
        }
        if self.in_vm
            && let Err(error) = mount::shared()
        {
            log::warn!("the shared directory is not there: {error}");
        }
        let result = self
            .create_in(request, names, prepared, &bundle, rootfs.clone())
            .await;
        if result.is_err() {
            remove_files(&bundle, rootfs.as_deref(), &self.state_dir().join(id));
        }
        result
    }

    async fn create_in(
        self: &Arc<Self>,
        request: &CreateTaskRequest,
        names: Names,
        prepared: spec::Prepared,
        bundle: &Path,
        rootfs: Option<PathBuf>,
    ) -> Result<Arc<Container>> {
        let id = request.id.as_str();
        fs::create_dir_all(bundle).map_err(|e| unknown(format!("bundle of container {id}: {e}")))?;
        if let Some(rootfs) = &rootfs {
            fs::create_dir_all(rootfs).map_err(|e| unknown(format!("bundle of container {id}: {e}")))?;
            for entry in &request.rootfs {
                mount::mount_on(&entry.type_, &entry.source, rootfs, &entry.options).map_err(|e| {
                    unknown(format!(
                        "rootfs of container {id}: mount {} {}: {e}",
                        entry.type_, entry.source
                    ))
                })?;
            }
        }
        fs::write(bundle.join("config.json"), prepared.json.to_string())
            .map_err(|e| unknown(format!("spec of container {id}: {e}")))?;
        if let Some(profile) = &prepared.seccomp {
            seccomp::write(bundle, profile)
                .map_err(|e| unknown(format!("seccomp profile of container {id}: {e}")))?;
        }
        let state = self.state_dir();
        fs::create_dir_all(&state).map_err(|e| unknown(format!("state directory: {e}")))?;

        let given = GivenNames {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
        };
        let init = Arc::new(Process::new(id, "", names, given));
        let args = [OsStr::new("create"), text(&state), OsStr::new(id), text(bundle)];
        launch(self, &init, &args, prepared.console_size)
            .await
            .map_err(|e| prefix("OCI runtime create failed", e))?;
        let cgroup = Cgroup::new(&prepared.cgroup);
        // The process waits to be let go: nothing of the container has run.
        let rules = prepared.json.pointer("/linux/resources/devices");
        if self.in_vm
            && let Err(error) = cgroup.confine(rules.unwrap_or(&Value::Null))
        {
            let _ = init.kill(Signal::KILL);
            init.started();
            let _ = init.wait().await;
            init.finish_io().await;
            cgroup.remove().await;
            return Err(unknown(format!(
                "OCI runtime create failed: devices of container {id}: {error}"
            )));
        }
        let has = |hooks: &str| {
            let hooks = prepared.json.pointer(hooks).and_then(Value::as_array);
            hooks.is_some_and(|hooks| !hooks.is_empty())
        };
        let oom = OomReporter::start(&cgroup, id, self.events.clone());
        Ok(Arc::new(Container {
            id: id.to_owned(),
            init,
            cgroup,
            oom,
            poststart: has("/hooks/poststart"),
            poststop: has("/hooks/poststop"),
            bundle: bundle.to_owned(),
            seccomp: prepared.seccomp.is_some(),
            rootfs,
            inner: Mutex::default(),
            lifecycle: tokio::sync::Mutex::default(),
        }))
    }

    /// Start of a container or exec. Returns the pid.
    ///
    /// # Errors
    /// NotFound, FailedPrecondition, Unknown.
    pub async fn start(self: &Arc<Self>, id: &str, exec: &str) -> Result<u32> {
        let container = self.container(id)?;
        if exec.is_empty() {
            self.start_init(&container).await
        } else {
            self.start_exec(&container, exec).await
        }
    }

    async fn start_init(self: &Arc<Self>, container: &Container) -> Result<u32> {
        let _one = container.lifecycle.lock().await;
        let init = &container.init;
        if init.exit().is_some() {
            return Err(failed_precondition("cannot start a container that has stopped"));
        }
        if init.is_started() {
            return Err(failed_precondition("cannot start an already running container"));
        }
        let id = &container.id;
        let state = self.state_dir().join(id);
        let fail = |e: String| unknown(format!("OCI runtime start failed: {e}"));
        let mut saved = State::load(state.clone()).map_err(|e| fail(crate::error::chain(&e)))?;
        // The state first: an exec may follow at once.
        saved
            .set_status(ContainerStatus::Running)
            .save()
            .map_err(|e| fail(crate::error::chain(&e)))?;
        let_go(&state).map_err(|e| fail(format!("the container's first process does not listen: {e}")))?;
        if container.poststart
            && let Err(error) = self.run_hooks(container, "poststart").await
        {
            // OCI, runtime.md, lifecycle: the container is stopped.
            container.cgroup.kill();
            init.started();
            return Err(fail(error));
        }
        let pid = init.pid_u32();
        let event = TaskStart {
            container_id: id.clone(),
            pid,
            ..Default::default()
        };
        self.events.publish(TASK_START_EVENT_TOPIC, &event);
        init.started();
        Ok(pid)
    }

    /// Runs the hooks of one kind, in the VM's own namespaces.
    async fn run_hooks(&self, container: &Container, kind: &str) -> std::result::Result<(), String> {
        let state = self.state_dir();
        let args = [
            OsStr::new("hooks"),
            text(&state),
            OsStr::new(&container.id),
            OsStr::new(kind),
            OsStr::new("-"),
        ];
        let stdio = nulls().map_err(|e| format!("{kind} hooks: {e}"))?;
        let ran = spawn::run(&self.reaper, &args, stdio).await;
        ran.map(|_| ()).map_err(|e| format!("{kind} hooks: {e}"))
    }

    async fn start_exec(self: &Arc<Self>, container: &Container, exec_id: &str) -> Result<u32> {
        let exec = container.exec(exec_id)?;
        let _one = exec.lifecycle.lock().await;
        let process = &exec.process;
        if process.is_started() || process.pid() != 0 {
            return Err(failed_precondition("cannot start an already running process"));
        }
        match container.status() {
            Status::RUNNING => {}
            Status::PAUSED => return Err(failed_precondition("cannot exec in a paused container")),
            Status::CREATED => return Err(failed_precondition("cannot exec in a created container")),
            _ => return Err(failed_precondition("cannot exec in a stopped container")),
        }
        let state = self.state_dir();
        let args = [
            OsStr::new("exec"),
            text(&state),
            OsStr::new(&container.id),
            text(&exec.file),
        ];
        if let Err(error) = launch(self, process, &args, exec.console_size).await {
            process.failed();
            return Err(prefix("OCI runtime exec failed: exec failed", error));
        }
        let pid = process.pid_u32();
        self.events.publish(
            TASK_EXEC_STARTED_EVENT_TOPIC,
            &TaskExecStarted {
                container_id: container.id.clone(),
                exec_id: exec_id.to_owned(),
                pid,
                ..Default::default()
            },
        );
        process.started();
        Ok(pid)
    }

    /// Exec: takes note of a process to be started.
    ///
    /// # Errors
    /// NotFound, AlreadyExists, InvalidArgument.
    pub fn exec(&self, request: ExecProcessRequest) -> Result<()> {
        let container = self.container(&request.id)?;
        spec::check_id(&request.exec_id)?;
        let names = Names::parse(&request.stdin, &request.stdout, &request.stderr, request.terminal)?;
        let (process, console_size) =
            spec::prepare_exec(request.spec.get_or_default(), request.terminal, container.seccomp)?;
        if container.init.exit().is_some() {
            return Err(failed_precondition("cannot exec in a stopped container"));
        }
        let mut inner = lock(&container.inner);
        if inner.execs.contains_key(&request.exec_id) {
            return Err(already_exists(format!("id {}", request.exec_id)));
        }
        let file = container.bundle.join(format!("exec-{}.json", request.exec_id));
        fs::write(&file, process.to_string())
            .map_err(|e| unknown(format!("OCI process of exec {}: {e}", request.exec_id)))?;
        let given = GivenNames {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        let process = Arc::new(Process::new(&request.id, &request.exec_id, names, given));
        let exec = Exec {
            process,
            file,
            console_size,
            lifecycle: tokio::sync::Mutex::default(),
        };
        inner.execs.insert(request.exec_id.clone(), Arc::new(exec));
        drop(inner);
        self.events.publish(
            TASK_EXEC_ADDED_EVENT_TOPIC,
            &TaskExecAdded {
                container_id: request.id,
                exec_id: request.exec_id,
                ..Default::default()
            },
        );
        Ok(())
    }

    /// Delete of a container or exec that has ended, or was never started. Returns pid and exit.
    ///
    /// # Errors
    /// NotFound; FailedPrecondition while it runs.
    pub async fn delete(self: &Arc<Self>, id: &str, exec: &str) -> Result<(u32, Exit)> {
        let container = self.container(id)?;
        if exec.is_empty() {
            self.delete_container(&container).await
        } else {
            self.delete_exec(&container, exec).await
        }
    }

    async fn delete_exec(&self, container: &Container, exec_id: &str) -> Result<(u32, Exit)> {
        let exec = container.exec(exec_id)?;
        let _one = exec.lifecycle.lock().await;
        let process = &exec.process;
        let exit = match process.exit() {
            Some(exit) => exit,
            None if process.pid() == 0 => {
                // Nobody waits for what will never be.
                process.failed();
                Exit {
                    status: 0,
                    at: std::time::SystemTime::now(),
                }
            }
            None => return Err(failed_precondition("cannot delete a running process")),
        };
        process.finish_io().await;
        lock(&container.inner).execs.remove(exec_id);
        let _ = fs::remove_file(&exec.file);
        Ok((process.pid_u32(), exit))
    }

    async fn delete_container(self: &Arc<Self>, container: &Arc<Container>) -> Result<(u32, Exit)> {
        let _one = container.lifecycle.lock().await;
        // Somebody else may have deleted it while we waited.
        self.container(&container.id)?;
        let init = &container.init;
        let exit = match init.exit() {
            Some(exit) => exit,
            None if !init.is_started() => {
                // Created, never started.
                let _ = init.kill(Signal::KILL);
                // Its exit may be told, though it never ran.
                init.started();
                init.wait()
                    .await
                    .ok_or_else(|| unknown("the container's first process was lost"))?
            }
            None => return Err(failed_precondition("cannot delete a running process")),
        };
        container.cgroup.kill();
        init.finish_io().await;
        let execs: Vec<_> = lock(&container.inner)
            .execs
            .drain()
            .map(|(_, exec)| exec)
            .collect();
        for exec in execs {
            exec.process.finish_io().await;
        }
        container.cgroup.remove().await;
        if container.poststop
            && let Err(error) = self.run_hooks(container, "poststop").await
        {
            log::warn!("container {}: {error}", container.id);
        }
        remove_files(
            &container.bundle,
            container.rootfs.as_deref(),
            &self.state_dir().join(&container.id),
        );
        lock(&self.containers).table.remove(&container.id);
        self.events.publish(
            TASK_DELETE_EVENT_TOPIC,
            &TaskDelete {
                container_id: container.id.clone(),
                pid: init.pid_u32(),
                exit_status: exit.status,
                exited_at: timestamp(exit.at),
                ..Default::default()
            },
        );
        Ok((init.pid_u32(), exit))
    }
}

fn prefix(text: &str, error: cloister_protocol::ttrpc::Error) -> cloister_protocol::ttrpc::Error {
    use cloister_protocol::ttrpc::Error;
    match error {
        Error::RpcStatus(mut status) => {
            status.message = format!("{text}: {}", status.message());
            Error::RpcStatus(status)
        }
        error => error,
    }
}

/// Tells a container's first process to go on.
fn let_go(state: &Path) -> io::Result<()> {
    // By descriptor: the path may be longer than a socket address takes.
    let dir = fs::File::open(state)?;
    let path = format!(
        "/proc/self/fd/{}/{NOTIFY_FILE}",
        std::os::fd::AsRawFd::as_raw_fd(&dir)
    );
    UnixStream::connect(path)?.write_all(b"start container")
}

fn remove_files(bundle: &Path, rootfs: Option<&Path>, state: &Path) {
    if let Some(rootfs) = rootfs {
        mount::unmount_all(rootfs);
        // Not recursive: were it mounted still, the container's files would go.
        let _ = fs::remove_dir(rootfs);
    }
    for dir in [bundle, state] {
        let still_mounted = rootfs.is_some_and(|rootfs| rootfs.starts_with(dir) && rootfs.exists());
        if still_mounted {
            log::error!("{} is still mounted", dir.display());
        } else if let Err(error) = fs::remove_dir_all(dir)
            && error.kind() != io::ErrorKind::NotFound
        {
            log::error!("{} was not removed: {error}", dir.display());
        }
    }
}

impl Container {
    fn exec(&self, id: &str) -> Result<Arc<Exec>> {
        lock(&self.inner)
            .execs
            .get(id)
            .cloned()
            .ok_or_else(|| not_found(format!("process does not exist {id}")))
    }

    /// The process of an exec, or the first one if `exec` is empty.
    ///
    /// # Errors
    /// NotFound.
    pub fn process(&self, exec: &str) -> Result<Arc<Process>> {
        if exec.is_empty() {
            Ok(Arc::clone(&self.init))
        } else {
            Ok(Arc::clone(&self.exec(exec)?.process))
        }
    }

    /// Its status, pausing included.
    pub fn status(&self) -> Status {
        match self.init.status() {
            Status::RUNNING if lock(&self.inner).paused => Status::PAUSED,
            status => status,
        }
    }

    /// Freezes or thaws it.
    ///
    /// # Errors
    /// FailedPrecondition unless it runs; Unknown when the kernel does not do it.
    pub async fn set_paused(&self, paused: bool) -> Result<()> {
        let _one = self.lifecycle.lock().await;
        match (self.status(), paused) {
            (Status::RUNNING, true) | (Status::PAUSED, false) => {}
            (Status::PAUSED, true) => return Err(failed_precondition("container is already paused")),
            (Status::RUNNING, false) => return Err(failed_precondition("container not paused")),
            _ => return Err(failed_precondition("container not running")),
        }
        self.cgroup
            .freeze(paused)
            .await
            .map_err(|e| unknown(format!("cgroup.freeze: {e}")))?;
        lock(&self.inner).paused = paused;
        // A running process may need its streams to get where it can be frozen.
        self.each_process(|process| process.hold_io(paused));
        Ok(())
    }

    fn each_process(&self, act: impl Fn(&Process)) {
        act(&self.init);
        lock(&self.inner)
            .execs
            .values()
            .for_each(|exec| act(&exec.process));
    }

    /// Has its streams dial the host again: the VM is a copy with a host of its own.
    pub fn renew_io(&self) {
        self.each_process(Process::renew_io);
    }

    /// Thaws it without asking, so that it can die.
    pub fn thaw(&self) {
        if std::mem::take(&mut lock(&self.inner).paused) {
            self.cgroup.thaw();
            self.each_process(|process| process.hold_io(false));
        }
    }
}
