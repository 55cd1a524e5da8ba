// SPDX-License-Identifier: Apache-2.0
//! A VMM as a peer: a command that boots a guest whose agent then connects to the host.
//!
//! A guest's connections to the host's vsock ports come out in two places: of vhost-vsock at an AF_VSOCK socket, of VMMs with
//! a device of their own at a unix socket named after the device's and the port (`PATH_1025`), which is Firecracker's way and
//! has been taken over by others. Both are listened on.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process_group};

use super::Given;
use super::program::Program;
use crate::vsock_server;

/// The port on which an agent says that it is ready.
pub const READY_PORT: u32 = 1025;
/// A guest that has not come up after this long never will.
const PATIENCE: Duration = Duration::from_secs(180);

/// A kernel and its initramfs, which has the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestFiles {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
}

impl GuestFiles {
    /// Those that were given with a peer, which takes nothing else.
    ///
    /// # Errors
    /// One of the two is missing, or more was given.
    pub fn taken(given: &mut Given) -> io::Result<Option<Self>> {
        let files = match (given.take("kernel"), given.take("initrd")) {
            (None, None) => None,
            (Some(kernel), Some(initrd)) => Some(Self { kernel, initrd }),
            _ => return Err(given.error("kernel= and initrd= go together")),
        };
        given.all_taken()?;
        Ok(files)
    }
}

/// What to boot.
#[derive(Debug)]
pub struct Guest<'a> {
    /// Kernel and initramfs.
    pub files: &'a GuestFiles,
    /// Its memory in MiB.
    pub memory_mib: u32,
    /// The kernel's command line.
    pub cmdline: &'a str,
    /// Its vsock address.
    pub cid: u32,
}

/// A VMM.
pub trait Vmm {
    /// Part of figures' names: `boot.ready_vs_LABEL`.
    fn label(&self) -> &str;

    /// Whom figures name as the peer.
    fn title(&self) -> &str {
        self.version()
    }

    /// What it says of itself.
    fn version(&self) -> &str;

    /// What it boots, where that is not our kernel and initramfs. Our cell boots the same then.
    fn files(&self) -> Option<&GuestFiles> {
        None
    }

    /// The command that boots a guest of one vCPU without a console and goes on till it is killed. `folder` is for its files:
    /// the device's socket is [`vsock_socket`] of it.
    ///
    /// # Errors
    /// A file could not be written.
    fn command(&self, guest: &Guest<'_>, folder: &Path) -> io::Result<Command>;
}

/// A VMM that is a program which the user has: an adapter says what it is called with.
pub struct ProgramVmm {
    /// The program.
    pub program: Program,
    /// As [`Vmm::files`].
    pub files: Option<GuestFiles>,
    /// As [`Vmm::command`].
    pub command: fn(&Program, &Guest<'_>, &Path) -> io::Result<Command>,
}

impl Vmm for ProgramVmm {
    fn label(&self) -> &str {
        &self.program.label
    }

    fn version(&self) -> &str {
        &self.program.version
    }

    fn files(&self) -> Option<&GuestFiles> {
        self.files.as_ref()
    }

    fn command(&self, guest: &Guest<'_>, folder: &Path) -> io::Result<Command> {
        (self.command)(&self.program, guest, folder)
    }
}

/// The unix socket of the vsock device of a VMM that does not use vhost-vsock.
pub fn vsock_socket(folder: &Path) -> PathBuf {
    folder.join("vsock")
}

/// What was started for one boot; all of it ends with this.
struct Running {
    child: Child,
    folder: Folder,
}

/// Removed when dropped.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // A script may have started more.
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        let _ = self.child.wait();
    }
}

impl Running {
    /// What it printed last.
    fn said(&self) -> String {
        let text = fs::read(self.folder.0.join("log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// Takes the agent's connection, wherever it comes.
    fn accept(
        &mut self,
        socket: &UnixListener,
        vhost: &io::Result<std::os::fd::OwnedFd>,
    ) -> io::Result<UnixStream> {
        let end = Instant::now() + PATIENCE;
        let moment = Timespec {
            tv_sec: 0,
            tv_nsec: 200_000_000,
        };
        while Instant::now() < end {
            let mut places = vec![PollFd::new(socket, PollFlags::IN)];
            places.extend(vhost.as_ref().ok().map(|vhost| PollFd::new(vhost, PollFlags::IN)));
            poll(&mut places, Some(&moment))?;
            let ready: Vec<bool> = places.iter().map(|place| !place.revents().is_empty()).collect();
            match (&ready[..], vhost) {
                ([true, ..], _) => return Ok(socket.accept()?.0),
                ([_, true], Ok(vhost)) => return vsock_server::accept(vhost),
                _ => {}
            }
            if let Some(status) = self.child.try_wait()? {
                return Err(io::Error::other(format!(
                    "ended ({status}) before its guest was ready:\n{}",
                    self.said()
                )));
            }
        }
        let no_vhost = vhost
            .as_ref()
            .err()
            .map(|error| format!(" (no AF_VSOCK: {error})"));
        Err(io::Error::other(format!(
            "its guest was not ready after {} s{}:\n{}",
            PATIENCE.as_secs(),
            no_vhost.unwrap_or_default(),
            self.said()
        )))
    }
}

/// Boots a guest until its agent says that it is ready, and ends it: seconds from the call, without what is there before a
/// start on any host (the folder, the listening sockets).
///
/// # Errors
/// It cannot be started, or does not get there; with what it printed.
pub fn seconds_to_ready(vmm: &dyn Vmm, guest: &Guest<'_>) -> io::Result<f64> {
    let name = format!("cloister-bench-{}-{}", std::process::id(), vmm.label());
    let folder = Folder(std::env::temp_dir().join(name));
    fs::create_dir(&folder.0)?;
    let mut socket = vsock_socket(&folder.0).into_os_string();
    socket.push(format!("_{READY_PORT}"));
    let socket = UnixListener::bind(socket)?;
    let vhost = vsock_server::listen(READY_PORT);
    let log = File::create(folder.0.join("log"))?;

    let start = Instant::now();
    let mut command = vmm.command(guest, &folder.0)?;
    let child = command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0)
        .spawn()
        .map_err(|error| io::Error::other(format!("{}: {error}", command.get_program().display())))?;
    let mut running = Running { child, folder };
    let mut stream = running
        .accept(&socket, &vhost)
        .map_err(|error| io::Error::other(format!("{}: {error}", vmm.label())))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.read_exact(&mut [0])?;
    Ok(start.elapsed().as_secs_f64())
}

/// For tests of adapters.
#[cfg(test)]
pub mod tests {
    use super::{Guest, GuestFiles, Vmm, seconds_to_ready};
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    /// A program in place of a VMM.
    pub fn fake(folder: &Path, name: &str, text: &str) -> PathBuf {
        let path = folder.join(name);
        fs::write(&path, format!("#!/bin/bash\n{text}")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    /// Shell that plays an agent which is ready: `$socket` is the device's.
    pub const READY: &str = r#"
exec python3 -c '
import socket, sys, time
agent = socket.socket(socket.AF_UNIX)
agent.connect(sys.argv[1] + "_1025")
agent.send(b"r")
time.sleep(60)' "$socket"
"#;

    /// Files of a guest that is not there.
    pub fn files() -> GuestFiles {
        GuestFiles {
            kernel: "/guest/vmlinux".into(),
            initrd: "/guest/initramfs.cpio".into(),
        }
    }

    /// A guest of them.
    pub fn guest(files: &GuestFiles) -> Guest<'_> {
        Guest {
            files,
            memory_mib: 256,
            cmdline: "panic=-1 quiet",
            cid: 77,
        }
    }

    /// A command's arguments.
    pub fn arguments(command: &Command) -> Vec<String> {
        let text = |word: &std::ffi::OsStr| word.to_string_lossy().into_owned();
        command.get_args().map(text).collect()
    }

    struct Says(PathBuf);

    impl Vmm for Says {
        fn label(&self) -> &str {
            "says"
        }
        fn version(&self) -> &str {
            "1"
        }
        fn command(&self, _: &Guest<'_>, _: &Path) -> std::io::Result<Command> {
            Ok(Command::new(&self.0))
        }
    }

    #[test]
    fn one_that_ends_early_is_said_with_what_it_printed() {
        let dir = tempfile::tempdir().unwrap();
        let vmm = Says(fake(dir.path(), "vmm", "echo no such device >&2; exit 3"));
        let files = files();
        let error = seconds_to_ready(&vmm, &guest(&files)).unwrap_err().to_string();
        for words in ["says: ended (exit status: 3)", "no such device"] {
            assert!(error.contains(words), "{error}");
        }
        let vmm = Says("/none/vmm".into());
        let error = seconds_to_ready(&vmm, &guest(&files)).unwrap_err().to_string();
        assert!(error.contains("/none/vmm: No such file"), "{error}");
    }
}
