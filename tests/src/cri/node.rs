// SPDX-License-Identifier: Apache-2.0
//! The daemons of the node, from their start to the last file they leave.

use super::{PATIENCE, Runtime, api, config, is_ours};
use crate::e2e::{Footprint, ProcessFootprint, checkout, eventually};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Instant;

/// containerd, cloisterd if it is wanted, and the folder they live in.
#[derive(Debug)]
pub struct Node {
    dir: PathBuf,
    handlers: Vec<&'static str>,
    daemons: Vec<Daemon>,
    tokio: tokio::runtime::Runtime,
}

#[derive(Debug)]
struct Daemon {
    name: &'static str,
    config: PathBuf,
    socket: PathBuf,
    log: PathBuf,
    process: Child,
}

/// A runtime handler that is neither runc nor ours.
#[derive(Debug, Clone)]
pub struct PeerHandler {
    /// Its part of containerd's configuration.
    pub containerd: String,
    /// A name under which containerd is to find a shim that does nothing.
    pub shim: Option<String>,
}

/// How a daemon is made to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// As an operator does it (SIGTERM).
    Asked,
    /// As a crash does it (SIGKILL).
    Killed,
}

/// What a containerd of this host has kept once it had all images: to unpack them takes half a minute in an emulated host.
const LOADED: &str = "/run/cri-e2e-images";

/// Runs it to its end, which must be a good one.
fn succeed(what: &str, command: &mut Command) {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{what}: {said}");
}

fn copy(from: &Path, to: &Path) {
    succeed("cp", Command::new("cp").arg("-a").args([from, to]));
}

impl Node {
    /// Starts the daemons that these handlers need, with a spare for pods that boot.
    pub fn start_with_spares(handlers: &[&'static str]) -> Self {
        Self::start_with_peers(handlers, &[])
    }

    /// The same, with handlers beside those that a node of tests has; they are among `handlers`, too.
    pub fn start_with_peers(handlers: &[&'static str], peers: &[PeerHandler]) -> Self {
        Self::start_all(handlers, peers, |config| {
            config.replace("[sandboxer.cloister]\n", "[sandboxer.cloister]\nspare_vms = 1\n")
        })
    }

    /// Starts the daemons that these handlers need.
    pub fn start(handlers: &[&'static str]) -> Self {
        Self::start_with(handlers, |config| config)
    }

    /// Starts them, cloisterd with its configuration changed.
    pub fn start_with(handlers: &[&'static str], cloisterd: impl FnOnce(String) -> String) -> Self {
        Self::start_all(handlers, &[], cloisterd)
    }

    fn start_all(
        handlers: &[&'static str],
        peers: &[PeerHandler],
        cloisterd: impl FnOnce(String) -> String,
    ) -> Self {
        // Sockets of pods lie in it, and their paths may not be long.
        let dir = Path::new("/run").join(format!("cri-{}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        // Shared, for mounts that travel between containers and the node.
        for options in [
            &["-t", "tmpfs", "-o", "mode=755", "e2e-cri"][..],
            &["--make-rshared"],
        ] {
            let mut mount = Command::new("mount");
            succeed(
                "tests of this kind need root, run ci/e2e",
                mount.args(options).arg(&dir),
            );
        }
        let mut node = Self {
            dir,
            handlers: handlers.to_vec(),
            daemons: Vec::new(),
            tokio: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap(),
        };
        for folder in ["bin", "cni", "cloister", "ipam", "pods", "opt"] {
            fs::create_dir(node.path(folder)).unwrap();
        }
        // containerd asks a program of this name what the runtime can do, and after a restart runs it to clean up.
        let shims = peers.iter().filter_map(|peer| peer.shim.as_deref());
        for shim in shims.chain(["containerd-shim-cloister-v1"]) {
            std::os::unix::fs::symlink(program("cloister"), node.path("bin").join(shim)).unwrap();
        }
        fs::write(node.path("cni/10-cri-e2e.conflist"), config::cni(&node.dir)).unwrap();

        if handlers.iter().any(|&handler| is_ours(handler)) {
            let config = cloisterd(config::cloisterd(&node.dir));
            fs::write(node.path("cloister/config.toml"), config).unwrap();
            node.spawn(
                "cloisterd",
                node.path("cloister/config.toml"),
                "cloister/sandboxer.sock",
            );
        }
        node.prepare_snapshotters();
        let file = node.path("containerd.toml");
        let more: String = peers.iter().map(|peer| peer.containerd.as_str()).collect();
        fs::write(&file, config::containerd(&node.dir) + &more).unwrap();
        let (store, loaded) = (node.path("containerd"), Path::new(LOADED));
        let is_loaded = loaded.exists();
        if is_loaded {
            copy(loaded, &store);
        }
        node.spawn("containerd", file, "containerd.sock");
        if !is_loaded {
            node.load_images();
            // Not as it runs: it may collect its garbage.
            node.end("containerd", End::Asked);
            let partial = loaded.with_extension("new");
            copy(&store, &partial);
            fs::rename(partial, loaded).unwrap();
            node.start_again("containerd");
        }
        node
    }

    /// Runs `cloister` with the daemon's folders.
    pub fn cloister(&self, args: &[&str]) -> Output {
        self.cloister_command(args).output().unwrap()
    }

    /// The command for that.
    pub fn cloister_command(&self, args: &[&str]) -> Command {
        let mut command = self.command("cloister");
        command
            .arg("--state")
            .arg(self.path("r"))
            .arg("--root")
            .arg(self.path("lib"))
            .args(args)
            .current_dir(&self.dir)
            .stdin(Stdio::null());
        command
    }

    /// The folder of all that.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A program of the node: containerd's own, ours, and those it calls.
    fn command(&self, program: &str) -> Command {
        let path = [
            self.path("bin").display().to_string(),
            containerd_bin().display().to_string(),
            std::env::var("PATH").unwrap_or_default(),
            "/usr/sbin:/sbin".to_owned(),
        ];
        let mut command = Command::new("env");
        command.arg(format!("PATH={}", path.join(":"))).arg(program);
        command
    }

    /// Starts a daemon for the first time.
    fn spawn(&mut self, name: &'static str, config: PathBuf, socket: &str) {
        let log = self.path(&format!("{name}.log"));
        let socket = self.path(socket);
        let process = self.run(name, &config, &log, &socket);
        self.daemons.push(Daemon {
            name,
            config,
            socket,
            log,
            process,
        });
    }

    /// Starts a daemon and waits until its socket answers.
    fn run(&self, name: &str, config: &Path, log: &Path, socket: &Path) -> Child {
        let begin = Instant::now();
        let output = File::options().create(true).append(true).open(log).unwrap();
        let mut process = self
            .command(name)
            .arg("--config")
            .arg(config)
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap();
        eventually(name, || {
            let ended = process.try_wait().unwrap();
            assert!(ended.is_none(), "{name} ended: {ended:?}\n{}", tail(log, 40));
            UnixStream::connect(socket).ok()
        });
        // It listens before CRI is ready.
        if name == "containerd" {
            eventually("CRI", || {
                let status = self.block_on(async {
                    let mut cri = Runtime::new(&self.dir, "runc", &[]).cri();
                    cri.status(api::StatusRequest::default()).await
                });
                status.ok()
            });
        }
        eprintln!("{name} answers after {:.1?}", begin.elapsed());
        process
    }

    fn daemon(&mut self, name: &str) -> &mut Daemon {
        let mut daemons = self.daemons.iter_mut();
        daemons.find(|daemon| daemon.name == name).unwrap()
    }

    /// Ends a daemon, for [`Node::start_again`], and answers how it ended.
    pub fn end(&mut self, name: &str, how: End) -> ExitStatus {
        let daemon = self.daemon(name);
        match how {
            End::Asked => daemon.stop(),
            End::Killed => daemon.process.kill().unwrap(),
        }
        daemon.process.wait().unwrap()
    }

    /// Starts a daemon that was ended.
    pub fn start_again(&mut self, name: &str) {
        let daemon = self.daemon(name);
        let (config, log, socket) = (daemon.config.clone(), daemon.log.clone(), daemon.socket.clone());
        // `env` becomes the daemon, and its socket may still lie there.
        let process = self.run(name, &config, &log, &socket);
        self.daemon(name).process = process;
    }

    /// The process of a daemon.
    pub fn pid(&mut self, name: &str) -> u32 {
        self.daemon(name).process.id()
    }

    /// What pods of Cloister could leave on the host, and in cloisterd.
    pub fn footprint(&mut self) -> (Footprint<'static>, ProcessFootprint) {
        let daemon = ProcessFootprint::of(self.pid("cloisterd"));
        let folders = ["r/sandboxes", "r/workers", "ipam/cri-e2e", "pods"];
        let folders = folders.map(|folder| self.path(folder)).into();
        (Footprint::of_host_and(folders), daemon)
    }

    /// What the configuration says of snapshotters is there.
    fn prepare_snapshotters(&self) {
        // containerd does not load it, but looks whether it is there.
        let _ = Command::new("modprobe").arg("erofs").status();
        let scratch = self.path("scratch.ext4");
        File::create(&scratch).unwrap().set_len(16 << 20).unwrap();
        let mut mkfs = self.command("mkfs.ext4");
        succeed("mkfs.ext4", mkfs.args(["-q", "-O", "^has_journal"]).arg(&scratch));
    }

    fn load_images(&self) {
        for name in ["pause", "tools", "user", "volume"] {
            let archive = checkout(&format!("target/images/{name}.tar"));
            assert!(
                archive.exists(),
                "{} is missing: run tests/demo/prepare",
                archive.display()
            );
            let begin = Instant::now();
            let mut ctr = self.command("ctr");
            ctr.arg("--address")
                .arg(self.path("containerd.sock"))
                .args(["--namespace", "k8s.io", "images", "import", "--local=true"])
                .arg(archive);
            succeed(&format!("image {name}"), &mut ctr);
            eprintln!("image {name} loaded after {:.1?}", begin.elapsed());
        }
    }

    /// CRI for pods of a handler.
    pub fn runtime(&self, handler: &'static str) -> Runtime {
        self.block_on(async { Runtime::new(&self.dir, handler, &self.handlers) })
    }

    /// Carries out something that needs CRI.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.tokio.block_on(future)
    }

    /// cloisterd's metrics, as Prometheus would get them.
    ///
    /// # Errors
    /// cloisterd does not answer.
    pub fn metrics(&self) -> std::io::Result<String> {
        get(&self.path("metrics.sock"), "/metrics")
    }

    /// What cloisterd tells operators.
    ///
    /// # Errors
    /// cloisterd does not answer, or not with JSON.
    pub fn admin(&self, path: &str) -> std::io::Result<serde_json::Value> {
        let answer = get(&self.path("r/admin.sock"), path)?;
        let body = answer.split_once("\r\n\r\n").unwrap_or_default().1;
        Ok(serde_json::from_str(body)?)
    }

    /// What the daemons said last.
    pub fn said(&self) -> String {
        let tails = self.daemons.iter();
        tails
            .map(|daemon| format!("--- {}\n{}\n", daemon.name, tail(&daemon.log, 60)))
            .collect()
    }
}

/// Head and body of an answer.
fn get(socket: &Path, path: &str) -> std::io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    // HTTP/1.0, so that the body comes as one.
    write!(stream, "GET {path} HTTP/1.0\r\nHost: cloisterd\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// A program of ours, as PATH has it.
fn program(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|folder| folder.join(name))
        .find(|file| file.exists())
        .unwrap_or_else(|| panic!("{name} is not in PATH: run make build"))
}

/// Where containerd and its tools are.
pub fn containerd_bin() -> PathBuf {
    let cache = std::env::var_os("CLOISTER_CACHE").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/cloister"),
        PathBuf::from,
    );
    let bin = cache.join("containerd/usr/bin");
    assert!(
        bin.join("containerd").exists(),
        "{} is missing: run ci/setup",
        bin.display()
    );
    bin
}

fn tail(log: &Path, count: usize) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

impl Daemon {
    /// As an operator ends it; by force if that takes too long.
    fn stop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.process);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let start = Instant::now();
        while start.elapsed() < PATIENCE / 6 {
            if self.process.try_wait().is_ok_and(|ended| ended.is_some()) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for daemon in self.daemons.iter_mut().rev() {
            daemon.stop();
        }
        // Workers outlive their daemon; there are some where a test failed.
        for worker in fs::read_dir(self.path("r/workers"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let pid = fs::read_to_string(worker.path().join("pid")).unwrap_or_default();
            if let Some(pid) = pid.parse().ok().and_then(rustix::process::Pid::from_raw) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
        let _ = Command::new("ip")
            .args(["link", "delete", config::BRIDGE])
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .stderr(Stdio::null())
            .status();
        let _ = Command::new("umount").arg("-Rl").arg(&self.dir).status();
        let _ = fs::remove_dir(&self.dir);
    }
}
