// SPDX-License-Identifier: Apache-2.0
//! A worker's process: started with its sockets as standard input and output, found again by what lies in its folder, and
//! watched through a descriptor, whoever its parent is.
//!
//! ```text
//!  <state_dir>/workers/<name>/   root's alone
//!    worker.json       About: what it is for             written by the daemon
//!    config.toml       the daemon's, for workers         written by the daemon
//!    controller.sock   containerd's Controller           made by the daemon, served by the worker
//!    admin.sock        as the daemon's                   made by the daemon, served by the worker
//!    pid               its process                       written by the worker
//!    metrics           its last metrics                  written by the worker when it ends by itself
//! ```

use crate::files;
use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Version of what daemon and worker expect of each other: files, sockets, records, reports. containerd's own messages do not
/// depend on it.
pub const PROTOCOL: u32 = 1;
/// Name of the program, and of its subcommand.
const WORDS: [&str; 2] = ["cloisterd", "worker"];

/// What a worker is for.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct About {
    /// [`PROTOCOL`] of who started it.
    pub protocol: u32,
    /// Its name, and its folder's.
    pub name: String,
    /// The sandboxer that its pods are of.
    pub sandboxer: String,
    /// Pods that it hosts at most.
    pub pods: u16,
    /// Where it puts itself.
    pub cgroup: Option<Cgroup>,
}

/// A cgroup, by the path of its parent below the hierarchy's root and its name there.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Cgroup {
    /// See [`super::cgroup::path_of`].
    pub parent: PathBuf,
    /// Name.
    pub name: String,
}

impl About {
    /// Reads the one in a worker's folder.
    ///
    /// # Errors
    /// It is not there, or something else.
    pub fn read(dir: &Path) -> io::Result<Self> {
        Ok(serde_json::from_slice(&std::fs::read(dir.join("worker.json"))?)?)
    }
}

/// Its configuration.
pub fn config(dir: &Path) -> PathBuf {
    dir.join("config.toml")
}

/// Where it answers containerd's requests.
pub fn controller(dir: &Path) -> PathBuf {
    dir.join("controller.sock")
}

/// Where it answers operators' requests.
pub fn admin(dir: &Path) -> PathBuf {
    dir.join("admin.sock")
}

/// Its last metrics.
pub fn metrics(dir: &Path) -> PathBuf {
    dir.join("metrics")
}

fn pid_file(dir: &Path) -> PathBuf {
    dir.join("pid")
}

/// Says which process it is; to be called by itself.
///
/// # Errors
/// The folder cannot be written to.
pub fn sign(dir: &Path) -> io::Result<()> {
    files::replace(&pid_file(dir), std::process::id().to_string().as_bytes())
}

/// A worker's process that runs, or has ended.
#[derive(Debug)]
pub struct Process {
    pid: Pid,
    descriptor: AsyncFd<OwnedFd>,
}

/// A worker that is not watched yet.
#[derive(Debug)]
pub struct Started {
    pid: Pid,
    descriptor: OwnedFd,
}

/// Makes the folder and starts the process. It can be asked at once: requests wait until it listens. Its session is its own,
/// and nothing of the daemon's but the log is open in it.
///
/// # Errors
/// One of these cannot be made, in which folder the error says; nothing is left then.
pub fn start(program: &Path, dir: &Path, about: &About, configuration: &str) -> io::Result<Started> {
    try_start(program, dir, about, configuration).map_err(|error| {
        let _ = std::fs::remove_dir_all(dir);
        io::Error::new(error.kind(), format!("{}: {error}", dir.display()))
    })
}

fn try_start(program: &Path, dir: &Path, about: &About, configuration: &str) -> io::Result<Started> {
    files::make_private_dir(dir)?;
    files::replace(&config(dir), configuration.as_bytes())?;
    files::replace(&dir.join("worker.json"), &serde_json::to_vec_pretty(about)?)?;
    let listen = |path: PathBuf| files::listen(&path).map(|socket| Stdio::from(OwnedFd::from(socket)));
    // This does not copy the daemon's page tables (posix_spawn).
    let child = Command::new(program)
        .arg0(WORDS[0])
        .arg(WORDS[1])
        .arg(dir)
        .current_dir("/")
        .env_remove("NOTIFY_SOCKET")
        .stdin(listen(controller(dir))?)
        .stdout(listen(admin(dir))?)
        .spawn()?;
    let pid = Pid::from_child(&child);
    // It is not waited for yet, so the number is its own.
    let descriptor = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    Ok(Started { pid, descriptor })
}

/// The process of the worker in this folder, if it runs.
pub fn find(dir: &Path) -> Option<Started> {
    let text = std::fs::read_to_string(pid_file(dir)).ok()?;
    let number = text.trim().parse::<i32>().ok().filter(|number| *number > 0)?;
    let pid = Pid::from_raw(number)?;
    let descriptor = rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()?;
    // Another process may have the number by now; from here on the descriptor tells them apart.
    let words = std::fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).ok()?;
    let folder = dir.as_os_str().as_encoded_bytes();
    let expected = [WORDS[0].as_bytes(), WORDS[1].as_bytes(), folder].map(|word| [word, b"\0"].concat());
    (words == expected.concat()).then_some(Started { pid, descriptor })
}

impl Process {
    /// Watches it. To be called in a runtime.
    ///
    /// # Errors
    /// The runtime cannot.
    pub fn watch(started: Started) -> io::Result<Self> {
        let Started { pid, descriptor } = started;
        // SAFETY: the descriptor is open, its owner goes along, and nothing replaces it.
        let descriptor = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE)? };
        Ok(Self { pid, descriptor })
    }

    /// Its id.
    pub fn id(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Waits for its end, with all of its memory and descriptors, and answers how it came.
    pub async fn ended(&self) -> String {
        // An error would be the runtime's end.
        let _ = self.descriptor.readable().await;
        let how = WaitId::PidFd(self.descriptor.get_ref().as_fd());
        match rustix::process::waitid(how, WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
            Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
                (_, Some(signal)) => format!("was killed by signal {signal}"),
                (Some(code), None) => format!("exited with {code}"),
                (None, None) => "ended".to_owned(),
            },
            // It was a daemon's before this one.
            _ => "ended".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_else_is_taken_for_a_worker() {
        let dir = std::env::temp_dir().join(format!("cloister-worker-{}", crate::ids::random_hex(4)));
        std::fs::create_dir(&dir).unwrap();
        assert!(find(&dir).is_none());
        for text in ["", "x", "-1", "0", "999999999"] {
            std::fs::write(pid_file(&dir), text).unwrap();
            assert!(find(&dir).is_none(), "{text:?}");
        }
        // This process runs, and is no worker.
        sign(&dir).unwrap();
        assert!(find(&dir).is_none());
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[tokio::test]
    #[expect(clippy::zombie_processes, reason = "it is waited for by its descriptor")]
    async fn how_a_process_ended_is_told() {
        for (script, expected) in [
            ("exit 3", "exited with 3"),
            ("kill -9 $$", "was killed by signal 9"),
        ] {
            let child = Command::new("sh").args(["-c", script]).spawn().unwrap();
            let pid = Pid::from_child(&child);
            let descriptor = rustix::process::pidfd_open(pid, PidfdFlags::empty()).unwrap();
            let process = Process::watch(Started { pid, descriptor }).unwrap();
            assert_eq!(process.id(), child.id());
            assert_eq!(process.ended().await, expected);
        }
    }
}
