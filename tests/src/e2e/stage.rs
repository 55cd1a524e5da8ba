// SPDX-License-Identifier: Apache-2.0
//! A place to run `cloister` at.

use super::{PATIENCE, checkout, eventually, guest_file};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::thread::JoinHandle;
use std::time::Instant;

/// A file system in memory that holds an image store and the pods' state; layers cannot lie on the overlay that is the
/// emulated host's root, and nothing of a real host is touched. Goes away when dropped.
#[derive(Debug)]
pub struct Stage {
    dir: PathBuf,
}

/// How a command ended, and what it said.
#[derive(Debug)]
pub struct Output {
    /// Exit status; 128 and more for a signal.
    pub code: i32,
    /// stdout.
    pub stdout: String,
    /// stderr.
    pub stderr: String,
}

impl Output {
    /// Ends the test unless it ended so.
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{self:#?}");
        self
    }

    /// Ends the test unless `cloister run` refused, with a message of few words that names this.
    #[track_caller]
    pub fn expect_refusal(&self, names: &[&str]) {
        assert_eq!(self.code, 125, "{self:#?}");
        assert_eq!(self.stdout, "", "{self:#?}");
        for name in names {
            assert!(self.stderr.contains(name), "does not name {name:?}: {self:#?}");
        }
        assert!(!self.stderr.contains("panicked"), "{self:#?}");
    }
}

/// A command that runs.
#[derive(Debug)]
pub struct Child {
    inner: std::process::Child,
    /// Its stdin.
    pub stdin: Option<ChildStdin>,
    /// Its stdout; taken by who reads it.
    pub stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
}

fn collect(stream: Option<impl Read + Send + 'static>) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut stream) = stream {
            stream.read_to_end(&mut bytes).unwrap();
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

impl Child {
    /// Process id.
    pub fn pid(&self) -> u32 {
        self.inner.id()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.pid()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    /// Closes its stdin and waits for its end.
    pub fn finish(mut self) -> Output {
        drop(self.stdin.take());
        let stdout = collect(self.stdout.take());
        let stderr = collect(self.stderr.take());
        let status = self.end();
        Output {
            code: code(status),
            stdout: stdout.join().unwrap(),
            stderr: stderr.join().unwrap(),
        }
    }

    fn end(&mut self) -> ExitStatus {
        let start = Instant::now();
        eventually("the end of a command", || {
            if start.elapsed() > PATIENCE / 2 {
                let _ = self.inner.kill();
            }
            self.inner.try_wait().unwrap()
        })
    }
}

impl Drop for Child {
    /// A test that fails leaves no VM for the next one to trip over.
    fn drop(&mut self) {
        let _ = self.inner.kill();
        let _ = self.inner.wait();
    }
}

fn code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

impl Stage {
    /// An empty one of so many MiB.
    pub fn empty(name: &str, mib: u32) -> Self {
        let dir = Path::new("/run").join(format!("e2e-{}-{name}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("mode=700,size={mib}m"), "e2e"])
            .arg(&dir)
            .status();
        assert!(
            status.unwrap().success(),
            "tests of this kind need root: run ci/e2e"
        );
        Self { dir }
    }

    /// One with the image `localhost/busybox`.
    pub fn with_busybox(name: &str) -> Self {
        let stage = Self::empty(name, 1024);
        let archive = Self::busybox();
        stage.cloister(&["load", archive.to_str().unwrap()]).expect(0);
        // What is made once and stays is there before the first look.
        stage.cloister(&["ps"]).expect(0);
        stage
    }

    /// The same, where `cloister run` finds templates for its VMs with a network card and without: they start in a fraction of
    /// the time of a boot.
    pub fn with_templates(name: &str) -> Self {
        let stage = Self::with_busybox(name);
        symlink(templates(), stage.state().join("templates")).unwrap();
        stage
    }

    /// The archive of that image.
    pub fn busybox() -> PathBuf {
        let archive = checkout("target/images/busybox.tar");
        assert!(
            archive.exists(),
            "{} is missing: run tests/demo/prepare",
            archive.display()
        );
        archive
    }

    /// Changes its size.
    pub fn resize(&self, mib: u32) {
        let option = format!("remount,size={mib}m");
        let status = Command::new("mount")
            .args(["-o", &option])
            .arg(&self.dir)
            .status();
        assert!(status.unwrap().success());
    }

    /// `--root`.
    pub fn root(&self) -> PathBuf {
        self.dir.join("lib")
    }

    /// `--state`.
    pub fn state(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// A new file or folder beside store and state.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.dir.join("scratch").join(name)
    }

    fn environment(&self, command: &mut Command) {
        command
            .env("CLOISTER_ROOT", self.root())
            .env("CLOISTER_STATE", self.state())
            .env("CLOISTER_KERNEL", guest_file("vmlinux"))
            .env("CLOISTER_INITRD", guest_file("initramfs.cpio"));
        // nft is in sbin.
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    }

    /// Starts `cloister` with pipes.
    pub fn start(&self, args: &[&str]) -> Child {
        let mut command = Command::new("cloister");
        command.args(args);
        self.start_command(command)
    }

    /// Starts `cloister` with these arguments on a terminal of its own.
    pub fn on_a_terminal(&self, line: &str) -> Child {
        let mut command = Command::new("script");
        command
            .args(["-qec", &format!("exec cloister {line}"), "/dev/null"])
            .env("SHELL", "/bin/sh");
        self.start_command(command)
    }

    /// Starts any command so that a `cloister` in it finds its way.
    pub fn start_command(&self, mut command: Command) -> Child {
        self.environment(&mut command);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut inner = command.spawn().unwrap_or_else(|error| {
            panic!(
                "{:?}: {error} (make e2e puts cloister on PATH)",
                command.get_program()
            )
        });
        Child {
            stdin: inner.stdin.take(),
            stdout: inner.stdout.take(),
            stderr: inner.stderr.take(),
            inner,
        }
    }

    /// Runs `cloister` to its end, with nothing on its stdin.
    pub fn cloister(&self, args: &[&str]) -> Output {
        self.start(args).finish()
    }

    /// Runs `cloister` to its end with this on its stdin.
    pub fn cloister_with(&self, args: &[&str], input: &[u8]) -> Output {
        let mut child = self.start(args);
        // Far less than a pipe holds.
        child.stdin.as_mut().unwrap().write_all(input).unwrap();
        child.finish()
    }

    /// Runs `cloister` for its JSON.
    pub fn json(&self, args: &[&str]) -> serde_json::Value {
        let output = self.cloister(args).expect(0);
        serde_json::from_str(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:#?}"))
    }

    /// Makes a scratch folder.
    pub fn folder(&self, name: &str) -> PathBuf {
        let path = self.scratch(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// Makes a scratch file.
    pub fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.scratch(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        File::create(&path).unwrap().write_all(content).unwrap();
        path
    }
}

/// Templates that the first who asks has built. Their file system has no place any more: it is there as long as this process
/// has their folder open.
fn templates() -> PathBuf {
    static SHELF: OnceLock<File> = OnceLock::new();
    let folder = SHELF.get_or_init(|| {
        let stage = Stage::empty("templates", 256);
        for network in ["none", "nat"] {
            stage.cloister(&["template", "build", "--net", network]).expect(0);
        }
        File::open(stage.state().join("templates")).unwrap()
    });
    PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), folder.as_raw_fd()))
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.dir).status();
        let _ = fs::remove_dir(&self.dir);
    }
}
