// SPDX-License-Identifier: Apache-2.0
//! The daemons of the node, from their start to the last file they leave.

use super::{PATIENCE, Runtime, config};
use crate::e2e::{checkout, eventually};
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
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
    log: PathBuf,
    process: Child,
}

impl Node {
    /// Starts the daemons that these handlers need.
    pub fn start(handlers: &[&'static str]) -> Self {
        Self::start_with(handlers, |config| config)
    }

    /// Starts them, cloisterd with its configuration changed.
    pub fn start_with(handlers: &[&'static str], cloisterd: impl FnOnce(String) -> String) -> Self {
        // Sockets of pods lie in it, and their paths may not be long.
        let dir = Path::new("/run").join(format!("cri-{}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        // Shared, for mounts that travel between containers and the node.
        for options in [
            &["-t", "tmpfs", "-o", "mode=755", "e2e-cri"][..],
            &["--make-rshared"],
        ] {
            let status = Command::new("mount").args(options).arg(&dir).status().unwrap();
            assert!(status.success(), "tests of this kind need root: run ci/e2e");
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
        // containerd looks for a program of this name, and after a restart runs it to clean up.
        let stub = node.path("bin/containerd-shim-cloister-v1");
        fs::write(&stub, "#!/bin/sh\nexit 0\n").unwrap();
        fs::set_permissions(&stub, fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(node.path("cni/10-cri-e2e.conflist"), config::cni(&node.dir)).unwrap();

        if handlers.contains(&"cloister") {
            let config = cloisterd(config::cloisterd(&node.dir));
            fs::write(node.path("cloister/config.toml"), config).unwrap();
            node.start_cloisterd();
        }
        let file = node.path("containerd.toml");
        fs::write(&file, config::containerd(&node.dir)).unwrap();
        let mut command = node.command("containerd");
        command.arg("--config").arg(file);
        node.spawn("containerd", command, "containerd.sock");
        node.load_images();
        node
    }

    /// Starts cloisterd, again after [`end`](Self::end).
    pub fn start_cloisterd(&mut self) {
        let mut command = self.command("cloisterd");
        command.arg("--config").arg(self.path("cloister/config.toml"));
        self.spawn("cloisterd", command, "cloister/sandboxer.sock");
    }

    /// Ends a daemon as an operator does, and answers how it ended.
    pub fn end(&mut self, name: &str) -> ExitStatus {
        let at = self.daemons.iter().position(|daemon| daemon.name == name);
        let mut daemon = self.daemons.remove(at.unwrap());
        daemon.stop();
        daemon.process.wait().unwrap()
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

    /// Starts a daemon and waits until its socket answers.
    fn spawn(&mut self, name: &'static str, mut command: Command, socket: &str) {
        let begin = Instant::now();
        let log = self.path(&format!("{name}.log"));
        let output = File::create(&log).unwrap();
        let process = command
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap();
        let mut daemon = Daemon { name, log, process };
        let socket = self.path(socket);
        eventually(name, || {
            let ended = daemon.process.try_wait().unwrap();
            assert!(ended.is_none(), "{name} ended: {ended:?}\n{}", daemon.tail(40));
            UnixStream::connect(&socket).ok()
        });
        eprintln!("{name} answers after {:.1?}", begin.elapsed());
        self.daemons.push(daemon);
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
            let output = self
                .command("ctr")
                .arg("--address")
                .arg(self.path("containerd.sock"))
                .args(["--namespace", "k8s.io", "images", "import", "--local=true"])
                .arg(archive)
                .output()
                .unwrap();
            assert!(
                output.status.success(),
                "image {name}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
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

    /// What the daemons said last.
    pub fn said(&self) -> String {
        let tails = self.daemons.iter();
        tails
            .map(|daemon| format!("--- {}\n{}\n", daemon.name, daemon.tail(60)))
            .collect()
    }
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

impl Daemon {
    fn tail(&self, count: usize) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(count)..].join("\n")
    }

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
        let _ = Command::new("ip")
            .args(["link", "delete", config::BRIDGE])
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .stderr(Stdio::null())
            .status();
        let _ = Command::new("umount").arg("-Rl").arg(&self.dir).status();
        let _ = fs::remove_dir(&self.dir);
    }
}
