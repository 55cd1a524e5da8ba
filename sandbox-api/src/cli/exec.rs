// SPDX-License-Identifier: Apache-2.0
//! `exec`: another process in a running container, its streams through fifos, as containerd does it.

use super::args::ExecArgs;
use super::client::Place;
use super::pods::target::{self, Target};
use super::session::{InputEnd, copy_input, say_detached};
use super::{Context, Failure, Outcome, client, parse};
use crate::daemon::report::{Container, Pod};
use crate::daemon::sandbox::Phase;
use crate::ids;
use crate::pod::host::SIGNALS;
use crate::pod::state::{Pods, Record, Status};
use crate::pod::terminal;
use crate::runtime::{spec, user};
use cloister_protocol::PROCESS_TYPE_URL;
use cloister_protocol::protobuf::MessageField;
use cloister_protocol::protobuf::well_known_types::any::Any;
use cloister_protocol::task::{
    CloseIORequest, DeleteRequest, ExecProcessRequest, KillRequest, ResizePtyRequest, StartRequest,
    TaskClient, WaitRequest,
};
use cloister_protocol::ttrpc::context::Context as Call;
use oci_spec::runtime::{Process, Spec};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

pub fn exec(context: &Context, args: &ExecArgs) -> Outcome {
    let (container, command) = args
        .words
        .split_first()
        .ok_or_else(|| Failure::new("a container is needed"))?;
    if args.tty && args.interactive && !args.detach && !terminal::stdin_is_terminal() {
        return Err(Failure::new(
            "the input device is not a TTY (leave out -t, or give it one)",
        ));
    }
    let pods = context.pods()?;
    let (place, process) = match target::find(context, &pods, container)? {
        Some(Target::Own(record)) => {
            if record.status != Status::Running {
                return Err(Failure::new(format!("container {} is not running", record.name)));
            }
            let spec = client::read_spec(&pods.state_dir(&record.id))?;
            let lookup = |text: &str| lookup(context, &pods, &record, text);
            (Place::own(&pods, &record), process(&spec, args, command, lookup)?)
        }
        Some(Target::Pod(pod)) => of_pod(&pod, &target::only_container(&pod)?, args, command)?,
        Some(Target::Container(pod, container)) => of_pod(&pod, &container, args, command)?,
        None => return Err(target::not_found(context, container)),
    };
    let runtime = client::runtime()?;
    let code = runtime.block_on(run(&place, args, process));
    // A thread may wait for the user's next key; the process's end is its own.
    runtime.shutdown_background();
    code
}

/// In a container of containerd's. Its root file system is containerd's to mount and the daemon's to serve: a user's name
/// cannot be looked up there.
fn of_pod(
    pod: &Pod,
    container: &Container,
    args: &ExecArgs,
    command: &[String],
) -> Outcome<(Place, Process)> {
    // The ends of containers are told a moment after their VM's.
    if container.state() != "running" || pod.phase != Phase::Ready {
        return Err(Failure::new(format!(
            "container {} is not running",
            target::container_name(pod, container)
        )));
    }
    let spec = client::read_spec(&container.bundle)?;
    let lookup = |text: &str| {
        numbers(text).ok_or_else(|| {
            Failure::new(format!(
                "{text:?} is not UID or UID:GID in numbers, which is what containerd's containers take here"
            ))
            .with_code(126)
        })
    };
    Ok((
        Place::of_pod(pod, container),
        process(&spec, args, command, lookup)?,
    ))
}

/// `UID[:GID]`.
fn numbers(text: &str) -> Option<user::User> {
    let (uid, gid) = text.split_once(':').unwrap_or((text, "0"));
    Some(user::User {
        uid: uid.parse().ok()?,
        gid: gid.parse().ok()?,
        groups: Vec::new(),
        home: "/".to_owned(),
    })
}

/// The container's own process, changed as asked.
fn process(
    spec: &Spec,
    args: &ExecArgs,
    command: &[String],
    lookup: impl FnOnce(&str) -> Outcome<user::User>,
) -> Outcome<Process> {
    let mut process = spec
        .process()
        .clone()
        .ok_or_else(|| Failure::new("the container has no process"))?;
    process.set_args(Some(command.to_vec()));
    process.set_terminal(Some(args.tty));
    let own = |name: &str| std::env::var(name).ok();
    let mut added = Vec::new();
    if args.tty {
        added.push("TERM=xterm".to_owned());
    }
    for text in &args.env {
        added.push(parse::env(text, own).map_err(Failure::new)?);
    }
    let env = process.env().clone().unwrap_or_default();
    process.set_env(Some(spec::environment(env.iter().chain(&added))));
    if let Some(dir) = &args.workdir {
        if !dir.starts_with('/') {
            return Err(Failure::new(format!("Cwd must be an absolute path, not {dir:?}")).with_code(126));
        }
        process.set_cwd(PathBuf::from(dir));
    }
    if let Some(text) = &args.user {
        let user = lookup(text)?;
        let mut oci = process.user().clone();
        oci.set_uid(user.uid);
        oci.set_gid(user.gid);
        oci.set_additional_gids(Some(user.groups));
        process.set_user(oci);
        if user.uid != 0
            && let Some(mut capabilities) = process.capabilities().clone()
        {
            capabilities.set_effective(Some(Default::default()));
            capabilities.set_permitted(Some(Default::default()));
            process.set_capabilities(Some(capabilities));
        }
    }
    Ok(process)
}

/// The user files of a running container: its own, else those of its topmost layer that has some. The overlay itself is
/// known to the hosting process only.
fn lookup(context: &Context, pods: &Pods, record: &Record, text: &str) -> Outcome<user::User> {
    let open = |path: &Path| {
        rustix::fs::openat(
            CWD,
            path,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
    };
    let mut roots: Vec<OwnedFd> = open(&pods.data_dir(&record.id).join("upper"))
        .into_iter()
        .collect();
    match &record.plan.rootfs {
        Some(dir) => roots.extend(open(dir)),
        None => roots.extend(context.store()?.layer_roots(&record.layers)?.into_iter().rev()),
    }
    let has_passwd =
        |root: &&OwnedFd| crate::image::open_in(root.as_fd(), Path::new("etc/passwd"), OFlags::PATH).is_ok();
    let root = roots
        .iter()
        .find(has_passwd)
        .or(roots.first())
        .ok_or_else(|| Failure::new("no root file system"))?;
    Ok(user::resolve(root.as_fd(), text)?)
}

/// A private folder of fifos; dropped, it is gone.
struct Fifos(PathBuf);

impl Fifos {
    fn new(place: &Place, exec: &str) -> io::Result<Self> {
        let dir = place.dir.join(format!("exec-{exec}"));
        rustix::fs::mkdirat(CWD, &dir, Mode::RWXU)?;
        let fifos = Self(dir);
        for name in ["stdin", "stdout", "stderr"] {
            rustix::fs::mknodat(
                CWD,
                fifos.0.join(name),
                FileType::Fifo,
                Mode::RUSR | Mode::WUSR,
                0,
            )?;
        }
        Ok(fifos)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Both ends, the reading one first, so that opening waits for nobody.
    fn open(&self, name: &str) -> io::Result<(File, File)> {
        let path = self.path(name);
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let reader = File::from(rustix::fs::openat(CWD, &path, flags, Mode::empty())?);
        let writer = File::options().write(true).open(&path)?;
        rustix::io::ioctl_fionbio(&reader, false)?;
        Ok((reader, writer))
    }
}

impl Drop for Fifos {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Copies on a thread; the receiver hears of the end.
fn copy_on_thread(
    name: &str,
    open_from: impl FnOnce() -> io::Result<File> + Send + 'static,
    open_to: impl FnOnce() -> io::Result<File> + Send + 'static,
) -> io::Result<oneshot::Receiver<()>> {
    let (sender, receiver) = oneshot::channel();
    let copy = move || {
        let copied = (|| {
            let (mut from, mut to) = (open_from()?, open_to()?);
            let mut buffer = vec![0; 32 << 10];
            loop {
                match from.read(&mut buffer) {
                    Ok(0) => return Ok(()),
                    Ok(n) => to.write_all(buffer.get(..n).unwrap_or_default())?,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => return Err(e),
                }
            }
        })();
        if let Err(error) = copied {
            log::debug!("stream: {error}");
        }
        let _ = sender.send(());
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(copy)?;
    Ok(receiver)
}

async fn run(place: &Place, args: &ExecArgs, process: Process) -> Outcome {
    let task = place.connect().await?;
    let exec_id = ids::random_hex(16);
    let fifos = Fifos::new(place, &exec_id)?;
    let attached = !args.detach;
    let name = |wanted: bool, name: &str| {
        if wanted {
            fifos.path(name).display().to_string()
        } else {
            String::new()
        }
    };
    let request = ExecProcessRequest {
        id: place.id.clone(),
        exec_id: exec_id.clone(),
        terminal: args.tty,
        stdin: name(attached && args.interactive, "stdin"),
        stdout: name(attached, "stdout"),
        stderr: name(attached && !args.tty, "stderr"),
        spec: MessageField::some(Any {
            type_url: PROCESS_TYPE_URL.into(),
            value: serde_json::to_vec(&process)?,
            ..Default::default()
        }),
        ..Default::default()
    };
    let mut ends = Vec::new();
    let mut stdin_end = None;
    let stdin = (attached && args.interactive)
        .then(|| fifos.open("stdin"))
        .transpose()?;
    if attached {
        for (name, out) in [
            ("stdout", io::stdout().as_fd().try_clone_to_owned()?),
            ("stderr", io::stderr().as_fd().try_clone_to_owned()?),
        ] {
            if name == "stderr" && args.tty {
                continue;
            }
            // Ours is the last writer only until the service has its own.
            let (reader, writer) = fifos.open(name)?;
            ends.push((
                copy_on_thread(name, move || Ok(reader), move || Ok(File::from(out)))?,
                writer,
            ));
        }
    }
    // Before the process can print anything: what is typed behind its prompt is not for the line discipline any more, which
    // would keep ctrl-q, for one.
    let raw = (attached && args.tty && terminal::stdin_is_terminal())
        .then(terminal::Raw::stdin)
        .transpose()?;
    let started = start(&task, &request).await;
    // From here on the service's are the only writers, and nobody else is to come: without their names the fifos are over
    // when we are, however that comes.
    drop(fifos);
    let ends: Vec<oneshot::Receiver<()>> = ends.into_iter().map(|(end, _writer)| end).collect();
    started?;
    if args.detach {
        // Nobody will ask for it; the container's end takes it along.
        return Ok(0);
    }
    if let Some((_reader, to)) = stdin {
        let keys = args.tty.then(|| args.detach_keys.clone());
        stdin_end = Some(copy_input(keys, move || Ok(to))?);
    }
    let code = match follow(&task, &place.id, &exec_id, args.tty, stdin_end).await {
        Ok(Some(code)) => Ok(code),
        Ok(None) => {
            drop(raw);
            say_detached();
            // It goes on; the container's end takes it along.
            return Ok(0);
        }
        Err(failure) => Err(failure),
    };
    for end in ends {
        let _ = end.await;
    }
    drop(raw);
    let delete = DeleteRequest {
        id: place.id.clone(),
        exec_id,
        ..Default::default()
    };
    let _ = task.delete(Call::default(), &delete).await;
    code
}

async fn start(task: &TaskClient, request: &ExecProcessRequest) -> Outcome<()> {
    let failed = |error| {
        let failure = client::said(error);
        let code = match &failure.message {
            text if text.contains("executable file not found") || text.contains("no such file") => 127,
            text if text.contains("permission denied") || text.contains("is a directory") => 126,
            _ => 125,
        };
        failure.with_code(code)
    };
    task.exec(Call::default(), request).await.map_err(failed)?;
    let start = StartRequest {
        id: request.id.clone(),
        exec_id: request.exec_id.clone(),
        ..Default::default()
    };
    let started = task.start(Call::default(), &start).await.map_err(failed);
    if started.is_err() {
        let delete = DeleteRequest {
            id: request.id.clone(),
            exec_id: request.exec_id.clone(),
            ..Default::default()
        };
        let _ = task.delete(Call::default(), &delete).await;
    }
    started.map(|_| ())
}

/// Tells a process's terminal the size of ours.
pub(super) async fn resize(task: &TaskClient, id: &str, exec_id: &str) {
    if let Some((width, height)) = terminal::size() {
        let request = ResizePtyRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            width: width.into(),
            height: height.into(),
            ..Default::default()
        };
        let _ = task.resize_pty(Call::default(), &request).await;
    }
}

/// Listens to the signals that are passed on.
pub(super) fn signals() -> io::Result<Vec<(i32, Signal)>> {
    SIGNALS
        .into_iter()
        .map(|number| Ok((number, signal(SignalKind::from_raw(number))?)))
        .collect()
}

/// The next of them; never, if there are none to listen to.
pub(super) async fn next_signal(signals: &mut Option<Vec<(i32, Signal)>>) -> i32 {
    std::future::poll_fn(|context| {
        for (number, signal) in signals.iter_mut().flatten() {
            if signal.poll_recv(context).is_ready() {
                return std::task::Poll::Ready(*number);
            }
        }
        std::task::Poll::Pending
    })
    .await
}

/// Waits for the process; signals and window sizes go to it, the end of our stdin to its stdin. None if the user detached.
async fn follow(
    task: &TaskClient,
    id: &str,
    exec_id: &str,
    tty: bool,
    stdin_end: Option<oneshot::Receiver<InputEnd>>,
) -> Outcome<Option<u8>> {
    let request = WaitRequest {
        id: id.to_owned(),
        exec_id: exec_id.to_owned(),
        ..Default::default()
    };
    let wait = task.wait(Call::default(), &request);
    tokio::pin!(wait);
    let mut window = signal(SignalKind::window_change())?;
    let mut signals = Some(signals()?);
    let stdin_end = async move {
        match stdin_end {
            Some(end) => end.await.unwrap_or(InputEnd::Closed),
            None => std::future::pending().await,
        }
    };
    tokio::pin!(stdin_end);
    let mut stdin_open = true;
    if tty {
        resize(task, id, exec_id).await;
    }
    loop {
        let signal = tokio::select! {
            response = &mut wait => {
                let status = response.map_err(client::said)?.exit_status;
                return Ok(Some(u8::try_from(status).unwrap_or(125)));
            }
            how = &mut stdin_end, if stdin_open => {
                stdin_open = false;
                if how == InputEnd::Detached {
                    return Ok(None);
                }
                let close = CloseIORequest { id: id.to_owned(), exec_id: exec_id.to_owned(), stdin: true, ..Default::default() };
                let _ = task.close_io(Call::default(), &close).await;
                continue;
            }
            _ = window.recv(), if tty => {
                resize(task, id, exec_id).await;
                continue;
            }
            number = next_signal(&mut signals) => number,
        };
        let kill = KillRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            signal: u32::try_from(signal).unwrap_or(15),
            ..Default::default()
        };
        let _ = task.kill(Call::default(), &kill).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_that_is_passed_on_can_be_listened_to() {
        let runtime = client::runtime().unwrap();
        let _entered = runtime.enter();
        let numbers: Vec<i32> = signals().unwrap().into_iter().map(|(number, _)| number).collect();
        assert_eq!(numbers, SIGNALS);
    }

    #[test]
    fn users_by_number() {
        let user = numbers("7:8").unwrap();
        assert_eq!((user.uid, user.gid), (7, 8));
        assert_eq!(numbers("7").map(|user| user.gid), Some(0));
        for text in ["", "me", "7:", "7:me", "-1", "7:8:9", "4294967296"] {
            assert_eq!(numbers(text), None, "{text}");
        }
    }
}
