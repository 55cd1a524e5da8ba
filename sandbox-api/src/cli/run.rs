// SPDX-License-Identifier: Apache-2.0
//! `run`: from the flags to a record, and the process that hosts it: this one, or a background copy of the program.
//!
//! The background copy inherits two descriptors: as stdin the lock that says the pod is alive, as stdout a pipe on
//! which it says one line when the container runs, or why it does not.

use super::args::{PullPolicy, RunArgs};
use super::session::{self, Options};
use super::{Context, Failure, Outcome, client, containers, parse, print};
use crate::host_check;
use crate::ids;
use crate::image::{self, Image, Progress, PullOptions, Source, Store};
use crate::pod::host::{self, Attach, Moment};
use crate::pod::snapshot::Snapshot;
use crate::pod::state::{Alive, Plan, Pods, Record};
use crate::pod::terminal;
use crate::runtime::spec::{self, Security, Volume, Wishes};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

/// The hosting process waits for somebody to attach.
const ATTACHABLE: &str = "attachable\n";
/// The hosting process has nothing to say any more.
const READY: &str = "ready\n";

pub fn run(context: &Context, args: RunArgs) -> Outcome {
    let failed = |failure: Failure| {
        let code = if failure.code == 1 { 125 } else { failure.code };
        failure.with_code(code)
    };
    run_inner(context, args, false).map_err(failed)
}

/// `create`: as far as the record.
pub fn create(context: &Context, args: RunArgs) -> Outcome {
    run_inner(context, args, true)
}

fn run_inner(context: &Context, args: RunArgs, create: bool) -> Outcome {
    // What can be refused without doing anything, first.
    if let Some(name) = &args.name
        && !ids::is_valid_name(name)
    {
        return Err(Failure::new(format!(
            "Invalid container name ({name}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed"
        )));
    }
    let in_front = !args.detach && !create;
    if args.tty && args.interactive && in_front && !terminal::stdin_is_terminal() {
        return Err(Failure::new(
            "the input device is not a TTY (leave out -t, or give it one)",
        ));
    }
    if !args.publish.is_empty() && args.net != crate::pod::state::Network::Nat {
        return Err(Failure::new(
            "-p needs --net nat: without an address of its own the pod's ports cannot be published",
        ));
    }
    host_check::can_run().map_err(Failure::new)?;
    if !rustix::process::geteuid().is_root() {
        return Err(Failure::new(
            "root is needed to unpack and mount images; run cloister as root",
        ));
    }
    let kernel = kernel(args.kernel.as_ref())?;
    let initrd = initrd(args.initrd.as_ref())?;

    let store = context.store()?;
    // Until the record names the layers.
    let hold = store.hold()?;
    let chosen = choose(&store, &args)?;
    let wishes = wishes(&args, chosen.words)?;
    let config = match &chosen.image {
        Some(image) => store.config(image)?.config().clone().unwrap_or_default(),
        None => oci_spec::image::Config::default(),
    };
    let command = spec::command(&config, &wishes).map_err(Failure::new)?;

    let pods = context.pods()?;
    let id = ids::container_id();
    let plan = Plan {
        wishes,
        cpus: args.cpus,
        memory: args.memory,
        dax: args.dax,
        network: args.net,
        publish: args.publish,
        hostname: args
            .hostname
            .unwrap_or_else(|| id.get(..12).unwrap_or(&id).to_owned()),
        kernel,
        initrd,
        kernel_args: args.kernel_arg,
        init_timeout_ms: args.init_timeout.saturating_mul(1000),
        auto_remove: args.rm,
        interactive: args.interactive,
        stop_signal: args
            .stop_signal
            .unwrap_or_else(|| containers::stop_signal(config.stop_signal().as_deref())),
        rootfs: chosen.rootfs,
        labels: args.label.into_iter().collect(),
    };
    let record = Record {
        image: chosen.name,
        image_id: chosen.image.as_ref().map(|image| image.id.clone()),
        layers: chosen.image.map(|image| image.layers).unwrap_or_default(),
        command,
        ..Record::of(id, plan, (!create).then(std::process::id))
    };
    let (mut record, alive) = pods.reserve(record, args.name.as_deref())?;
    drop(hold);
    // Not before the name is known to be free: it makes folders.
    let prepared = prepare_volumes(&mut record.plan.wishes.volumes).and_then(|()| Ok(pods.save(&record)?));
    if let Err(failure) = prepared {
        pods.remove(&record.id)?;
        return Err(failure);
    }
    if create {
        drop(alive);
        print(&format!("{}\n", record.id))?;
        return Ok(0);
    }
    if args.detach {
        launch(context, &pods, &record, alive, Launch::default())?.ready()?;
        print(&format!("{}\n", record.id))?;
        return Ok(0);
    }
    // A terminal can be left: another process hosts the VM then.
    if args.tty && terminal::stdin_is_terminal() {
        let options = Options {
            stdin: record.plan.interactive,
            sig_proxy: true,
            keys: args.detach_keys,
        };
        return launch(context, &pods, &record, alive, AWAITED)?.attached(&pods, &record, options);
    }
    let own = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned();
    let attach = Attach {
        stdin: if record.plan.interactive {
            Some(own(io::stdin().as_fd())?)
        } else {
            None
        },
        stdout: Some(own(io::stdout().as_fd())?),
        stderr: Some(own(io::stderr().as_fd())?),
        awaited: false,
    };
    let code = host::host(&pods, &store, record, alive, attach, None, |_| ())?;
    Ok(u8::try_from(code).unwrap_or(125))
}

/// The image, and the words that are its command.
struct Chosen {
    name: String,
    image: Option<Image>,
    rootfs: Option<PathBuf>,
    words: Vec<String>,
}

fn choose(store: &Store, args: &RunArgs) -> Outcome<Chosen> {
    let absolute = |path: &Path| {
        path.canonicalize()
            .and_then(|path| {
                if path.is_dir() {
                    Ok(path)
                } else {
                    Err(io::ErrorKind::NotADirectory.into())
                }
            })
            .map_err(|e| Failure::new(format!("cannot use {} as a root directory: {e}", path.display())))
    };
    if let Some(dir) = &args.rootfs {
        let rootfs = Some(absolute(dir)?);
        return Ok(Chosen {
            name: dir.display().to_string(),
            image: None,
            rootfs,
            words: args.words.clone(),
        });
    }
    let (name, words) = args
        .words
        .split_first()
        .ok_or_else(|| Failure::new("an image is needed"))?;
    let progress = Progress::for_stderr(args.quiet);
    let source = Source::parse(name)?;
    let image = match &source {
        Source::Directory(dir) => {
            let rootfs = Some(absolute(dir)?);
            return Ok(Chosen {
                name: name.clone(),
                image: None,
                rootfs,
                words: words.to_vec(),
            });
        }
        Source::Reference(reference) => match (store.find(reference), args.pull) {
            (Ok(image), PullPolicy::Missing | PullPolicy::Never) => image,
            (Err(image::Error::NotFound(_)), PullPolicy::Missing) | (_, PullPolicy::Always) => {
                if args.pull == PullPolicy::Missing && !args.quiet {
                    crate::error::tell(format_args!("Unable to find image '{reference}' locally"));
                }
                let options = PullOptions {
                    insecure: args.insecure,
                    ..PullOptions::default()
                };
                image::pull(store, reference, &options, &progress)?
            }
            (Err(error), _) => return Err(error.into()),
        },
        _ => image::import(store, &source, &progress)?,
    };
    Ok(Chosen {
        name: name.clone(),
        image: Some(image),
        rootfs: None,
        words: words.to_vec(),
    })
}

fn wishes(args: &RunArgs, words: Vec<String>) -> Outcome<Wishes> {
    let own = |name: &str| std::env::var(name).ok();
    let mut env = Vec::new();
    for file in &args.env_file {
        let failed =
            |why: &dyn std::fmt::Display| Failure::new(format!("--env-file {}: {why}", file.display()));
        let content = std::fs::read_to_string(file).map_err(|e| failed(&e))?;
        env.extend(parse::env_file(&content, own).map_err(|e| failed(&e))?);
    }
    for text in &args.env {
        env.push(parse::env(text, own).map_err(Failure::new)?);
    }
    let mut wishes = Wishes {
        args: words,
        entrypoint: args.entrypoint.clone(),
        env,
        workdir: args.workdir.clone(),
        user: args.user.clone(),
        terminal: args.tty,
        read_only: args.read_only,
        tmpfs: args.tmpfs.clone(),
        volumes: args.volume.clone(),
        security: security(args),
    };
    for mount in &args.mount {
        match mount.clone() {
            parse::MountFlag::Bind(volume) => wishes.volumes.push(volume),
            parse::MountFlag::Tmpfs(path, options) => wishes.tmpfs.push((path, options)),
        }
    }
    let mut targets: Vec<&Path> = wishes
        .volumes
        .iter()
        .map(|v| v.target.as_path())
        .chain(wishes.tmpfs.iter().map(|(p, _)| p.as_path()))
        .collect();
    targets.sort_unstable();
    if let Some(pair) = targets.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Failure::new(format!(
            "Duplicate mount point: {}",
            pair[0].display()
        )));
    }
    Ok(wishes)
}

fn security(args: &RunArgs) -> Security {
    let mut security = Security {
        privileged: args.privileged,
        cap_add: args.cap_add.clone(),
        cap_drop: args.cap_drop.clone(),
        vm_processes: args.pid.is_some(),
        ..Security::default()
    };
    for option in &args.security_opt {
        match option {
            parse::SecurityFlag::Seccomp(choice) => security.seccomp = choice.clone(),
            parse::SecurityFlag::NoNewPrivileges(set) => security.no_new_privileges = *set,
            parse::SecurityFlag::Nothing => {}
        }
    }
    security
}

/// Makes the volumes' folders absolute, and those that do not exist, as docker does. If one cannot be had, none is made.
fn prepare_volumes(volumes: &mut [Volume]) -> Outcome<()> {
    let mut made = Vec::new();
    let prepared = volumes.iter_mut().try_for_each(|volume| {
        make_folder(&volume.source, &mut made)
            .and_then(|()| volume.source.canonicalize())
            .map(|source| volume.source = source)
            .map_err(|e| Failure::new(format!("cannot use volume {}: {e}", volume.source.display())))
    });
    if prepared.is_err() {
        for dir in made.iter().rev() {
            // One that is in use by now stays.
            let _ = std::fs::remove_dir(dir);
        }
    }
    prepared
}

/// Makes a folder and those above it, and tells what it `made`.
fn make_folder(path: &Path, made: &mut Vec<PathBuf>) -> io::Result<()> {
    let missing: Vec<&Path> = path.ancestors().take_while(|path| !path.exists()).collect();
    for dir in missing
        .into_iter()
        .rev()
        .filter(|dir| !dir.as_os_str().is_empty())
    {
        match std::fs::create_dir(dir) {
            Ok(()) => made.push(dir.to_owned()),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// The guest kernel.
pub fn kernel(given: Option<&PathBuf>) -> Outcome<PathBuf> {
    guest_file(given, "guest kernel", "vmlinux", "--kernel")
}

/// The initramfs with the agent.
pub fn initrd(given: Option<&PathBuf>) -> Outcome<PathBuf> {
    guest_file(given, "initramfs", "initramfs.cpio", "--initrd")
}

/// A file of the guest: by flag or environment, beside the program, or installed.
fn guest_file(given: Option<&PathBuf>, what: &str, name: &str, flag: &str) -> Outcome<PathBuf> {
    let missing = |path: &Path| {
        Failure::new(format!(
            "there is no {what} at {}: build it with `make guest`, or name one with {flag}",
            path.display()
        ))
    };
    if let Some(path) = given {
        return path.canonicalize().map_err(|_| missing(path));
    }
    let program = std::env::current_exe().ok();
    let beside = program
        .as_deref()
        .and_then(Path::parent)
        .map(|dir| dir.join("../guest").join(name));
    let installed = Path::new("/usr/lib/cloister").join(name);
    let candidates = beside.into_iter().chain([installed.clone()]);
    candidates
        .into_iter()
        .find_map(|path| path.canonicalize().ok())
        .ok_or_else(|| missing(&installed))
}

/// A hosting process that has just been started.
pub struct Launched {
    child: std::process::Child,
    log: PathBuf,
}

/// How a pod is launched.
#[derive(Clone, Copy, Debug, Default)]
pub struct Launch<'a> {
    /// It waits for somebody to attach before its container starts.
    pub awaited: bool,
    /// It goes on from the snapshot in the first of these files, which was taken on that in the second, and so on.
    pub snapshot: &'a [PathBuf],
    /// Where it is noted which memory it touches first, or made ready what is noted there.
    pub prefetch: Option<&'a Path>,
}

/// For who attaches at once.
pub const AWAITED: Launch<'static> = Launch {
    awaited: true,
    snapshot: &[],
    prefetch: None,
};

/// Starts a process in the background that hosts the pod.
pub fn launch(
    context: &Context,
    pods: &Pods,
    record: &Record,
    alive: Alive,
    how: Launch<'_>,
) -> Outcome<Launched> {
    let log_path = pods.data_dir(&record.id).join("host.log");
    let log = File::options()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(&log_path)?;
    let program = std::env::current_exe()?;
    let level = log::max_level().as_str().to_lowercase();
    let child = Command::new(program)
        .arg("--root")
        .arg(context.root.canonicalize()?)
        .arg("--state")
        .arg(context.state.canonicalize()?)
        .args(["--log-level", &level, "host-pod", &record.id])
        .args(how.awaited.then_some("--awaited"))
        .args(
            how.snapshot
                .iter()
                .flat_map(|file| [Path::new("--snapshot"), file.as_path()]),
        )
        .args(
            how.prefetch
                .iter()
                .flat_map(|file| [Path::new("--prefetch"), *file]),
        )
        .current_dir("/")
        .stdin(Stdio::from(alive.into_file()))
        .stdout(Stdio::piped())
        .stderr(Stdio::from(log))
        .spawn()?;
    Ok(Launched { child, log: log_path })
}

impl Launched {
    /// Waits until the container runs.
    pub fn ready(mut self) -> Outcome<()> {
        let mut said = String::new();
        if let Some(pipe) = &mut self.child.stdout {
            pipe.read_to_string(&mut said)?;
        }
        // Nobody waits for it to be attached to.
        self.check(said.strip_prefix(ATTACHABLE).unwrap_or(&said))
    }

    /// Attaches before the container starts, and stays to its end, or until the user leaves.
    pub fn attached(mut self, pods: &Pods, record: &Record, options: Options) -> Outcome {
        let (said, stream) = self.attach(pods, record)?;
        self.check(&said)?;
        let stream = stream.ok_or_else(|| Failure::new("the container was not attached to"))?;
        session::attached(pods, record, &stream, options)
    }

    /// What the hosting process said at last, and the connection it asked for. It is told of signals meanwhile.
    fn attach(
        &mut self,
        pods: &Pods,
        record: &Record,
    ) -> Outcome<(String, Option<std::os::unix::net::UnixStream>)> {
        use tokio::io::{AsyncBufReadExt, AsyncReadExt};
        let Some(pipe) = self.child.stdout.take() else {
            return Ok((String::new(), None));
        };
        let host = i32::try_from(self.child.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        client::runtime()?.block_on(async {
            let pipe = tokio::net::unix::pipe::Receiver::from_owned_fd(OwnedFd::from(pipe))?;
            let mut pipe = tokio::io::BufReader::new(pipe);
            let mut signals = Some(super::exec::signals()?);
            let listen = async {
                let (mut said, mut stream) = (String::new(), None);
                pipe.read_line(&mut said).await?;
                if said == ATTACHABLE {
                    stream = Some(session::connect(pods, record)?);
                    said.clear();
                }
                pipe.read_to_string(&mut said).await?;
                Ok((said, stream))
            };
            tokio::pin!(listen);
            loop {
                tokio::select! {
                    heard = &mut listen => return heard,
                    number = super::exec::next_signal(&mut signals) => {
                        // Our own child, which we have not waited for: the number is still its.
                        if let (Some(host), Some(signal)) = (host, rustix::process::Signal::from_named_raw(number)) {
                            let _ = rustix::process::kill_process(host, signal);
                        }
                    }
                }
            }
        })
    }

    fn check(&mut self, said: &str) -> Outcome<()> {
        if said == READY {
            return Ok(());
        }
        let status = self.child.wait()?;
        let message = if said.is_empty() {
            format!("the hosting process ended: {status}; see {}", self.log.display())
        } else {
            said.to_owned()
        };
        let code = status.code().and_then(|code| u8::try_from(code).ok());
        Err(Failure::new(message.trim_end()).with_code(code.unwrap_or(125)))
    }
}

/// The background copy.
pub fn host_pod(
    context: &Context,
    id: &str,
    awaited: bool,
    snapshot: &[PathBuf],
    prefetch: Option<PathBuf>,
) -> Outcome {
    let alive = Alive::from_file(File::from(io::stdin().as_fd().try_clone_to_owned()?));
    // Its end is what the parent waits for.
    let report = Mutex::new(Some(File::from(io::stdout().as_fd().try_clone_to_owned()?)));
    let tell = |report: &Mutex<Option<File>>, text: &str| {
        if let Some(mut pipe) = report.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = pipe.write_all(text.as_bytes());
        }
    };
    let null = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null).map_err(io::Error::from)?;
    rustix::stdio::dup2_stdout(&null).map_err(io::Error::from)?;
    // Out of the terminal's session: its Ctrl-C and its end are not for us.
    let _ = rustix::process::setsid();

    let pods = Pods::open(&context.state, &context.root)?;
    let store = context.store()?;
    let mut record = pods.load(id)?;
    record.pid = Some(std::process::id());
    pods.save(&record)?;
    let attach = Attach {
        awaited,
        ..Attach::default()
    };
    let at = |moment| match moment {
        Moment::Attachable => {
            let report = report.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(mut pipe) = report.as_ref() {
                let _ = pipe.write_all(ATTACHABLE.as_bytes());
            }
        }
        Moment::Started => tell(&report, READY),
    };
    // Whoever launched this has looked at all of it.
    let open = || -> Result<Option<Snapshot>, host::Error> {
        if snapshot.is_empty() {
            return Ok(None);
        }
        let files: io::Result<Vec<File>> = snapshot.iter().map(File::open).collect();
        let files = files.map_err(host::io_error("open the snapshot"))?;
        let mut opened = Snapshot::open(&files, false)?;
        opened.prefetch = prefetch;
        Ok(Some(opened))
    };
    let result = open().and_then(|snapshot| host::host(&pods, &store, record, alive, attach, snapshot, at));
    match result {
        Ok(code) => Ok(u8::try_from(code).unwrap_or(125)),
        Err(error) => {
            let message = crate::error::chain(&error);
            tell(&report, &message);
            log::error!("{message}");
            Ok(error.exit_code())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_volumes_are_made_all_or_none() {
        let dir = std::env::temp_dir().join(format!("cloister-volumes-{}", ids::random_hex(6)));
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join("file"), "").unwrap();
        let volume = |source: &str| Volume {
            source: dir.join(source),
            target: "/x".into(),
            read_only: false,
        };
        let mut bad = [volume("new/deep"), volume("file"), volume("file/below")];
        let message = prepare_volumes(&mut bad).unwrap_err().message;
        assert!(message.contains("file/below"), "{message}");
        assert!(!dir.join("new").exists() && dir.join("file").exists());
        let mut good = [volume("new/../new/deep"), volume("file")];
        prepare_volumes(&mut good).unwrap();
        assert_eq!(good[0].source, dir.canonicalize().unwrap().join("new/deep"));
        std::fs::remove_dir_all(dir).unwrap();
    }
}
