// SPDX-License-Identifier: Apache-2.0
//! The PID namespace that containers of the pod share, when their specs ask for it, and its first process.
//!
//! A spec asks by naming [`SHARED_PID_NS`] as the path of its PID namespace. The first one that does has the namespace
//! made: a helper ([`crate::helper`]) leaves its first process behind, and the namespace file is bound to that path. The
//! process adopts orphans and has the kernel forget them when they die. Containers see it and may trace it, so
//! there is nothing to be had from it: no user, no capability, no file.
//!
//! ```text
//!  none ──first Create that asks──▶ made ──its first process is killed──▶ none (whoever was in it is dead)
//! ```

use std::ffi::{CString, OsStr};
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use cloister_protocol::SHARED_PID_NS;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};
use rustix::process::{Gid, Uid, chdir, pivot_root};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use serde_json::Value;
use tokio::sync::oneshot;

use crate::reaper::{Exit, Reaper};
use crate::{spawn, stdio};

/// User and group of the first process: nobody's, as that of Kubernetes' pause container.
const NOBODY: u32 = 65535;
/// Its name for who looks at it from a container.
const NAME: &std::ffi::CStr = c"pause";

/// The namespace, if it has been made: the exit of its first process.
#[derive(Default)]
pub struct SharedPidNs(tokio::sync::Mutex<Option<oneshot::Receiver<Exit>>>);

/// Puts `file` where a spec (JSON) asks for the shared namespace; false if it does not.
pub fn asked_for(spec: &mut Value, file: &Path) -> bool {
    let namespaces = spec
        .pointer_mut("/linux/namespaces")
        .and_then(Value::as_array_mut);
    let shared = namespaces
        .into_iter()
        .flatten()
        .find(|ns| ns["type"] == "pid" && ns["path"] == SHARED_PID_NS);
    match shared {
        Some(namespace) => {
            namespace["path"] = file.to_string_lossy().into();
            true
        }
        None => false,
    }
}

/// Where the namespace file is bound, `run` being the directory of the agent's state.
pub fn file(run: &Path) -> PathBuf {
    run.join("ns/pid")
}

impl SharedPidNs {
    /// Makes the namespace, unless it is there.
    ///
    /// # Errors
    /// A text for the client.
    pub async fn ensure(&self, reaper: &Reaper, run: &Path) -> Result<(), String> {
        let mut init = self.0.lock().await;
        if let Some(exit) = &mut *init
            && exit.try_recv() == Err(oneshot::error::TryRecvError::Empty)
        {
            return Ok(());
        }
        let failed = |e: io::Error| format!("the pod's PID namespace: {e}");
        let nulls = stdio::nulls().map_err(failed)?;
        let none = OsStr::new("-");
        let args = [OsStr::new("pidns"), none, none, none, none];
        let (pid, _guard) = spawn::run(reaper, &args, nulls).await?;
        let exit = reaper.watch(pid);
        bind(pid, &file(run)).map_err(failed)?;
        *init = Some(exit);
        Ok(())
    }
}

/// Binds the PID namespace of process `pid` to `file`.
fn bind(pid: i32, file: &Path) -> io::Result<()> {
    if let Some(dir) = file.parent() {
        fs::create_dir_all(dir)?;
    }
    fs::OpenOptions::new().create(true).append(true).open(file)?;
    // One whose first process was killed.
    let _ = unmount(file, UnmountFlags::DETACH);
    Ok(mount_bind(format!("/proc/{pid}/ns/pid"), file)?)
}

/// Makes the namespace, in a helper. Returns the pid of its first process, or does not return: then this is that process.
///
/// # Errors
/// A text for the client.
pub fn make() -> Result<i32, String> {
    let (ready, said) = io::pipe().map_err(|e| format!("cannot create a pipe: {e}"))?;
    // SAFETY: no descriptor table is unshared; the helper has one thread.
    unsafe { unshare_unsafe(UnshareFlags::NEWPID) }
        .map_err(|e| format!("cannot make a PID namespace: {e}"))?;
    // SAFETY: the helper has one thread, so the child may do what it likes.
    match unsafe { libc::fork() } {
        -1 => Err(format!("cannot fork: {}", io::Error::last_os_error())),
        0 => {
            drop(ready);
            be_first(said)
        }
        pid => {
            drop(said);
            // The end of the pipe comes when it has given up what it had; words before it say why it could not.
            let words = io::read_to_string(ready).unwrap_or_else(|error| error.to_string());
            if words.is_empty() {
                return Ok(pid);
            }
            Err(format!(
                "the first process of a PID namespace did not start: {words}"
            ))
        }
    }
}

/// Life of the namespace's first process.
fn be_first(mut said: io::PipeWriter) -> ! {
    if let Err(error) = give_up_everything() {
        let _ = write!(said, "{error}");
        // SAFETY: has no preconditions.
        unsafe { libc::_exit(1) };
    }
    // Standard streams, the pipes to the helper's parent and to the helper.
    // SAFETY: nothing here uses a descriptor from here on; `said` is among them and is never dropped.
    unsafe { libc::close_range(0, u32::MAX, 0) };
    std::mem::forget(said);
    loop {
        // SAFETY: has no preconditions. No signal has a handler, and those from within the namespace do not come through.
        unsafe { libc::pause() };
    }
}

fn give_up_everything() -> io::Result<()> {
    // Children that nobody waits for are forgotten when they die (signal(7), SIGCHLD ignored).
    // SAFETY: one thread; sets no handler.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    rustix::thread::set_name(NAME)?;
    rustix::process::setsid()?;
    // After everything else of the pod. Takes CAP_SYS_RESOURCE, which only a test has not.
    let _ = fs::write("/proc/self/oom_score_adj", "-998");
    // A root without a file, and without anything below it.
    // SAFETY: no descriptor table is unshared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
    rustix::mount::mount_change(
        "/",
        rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC,
    )?;
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let data = CString::new("size=4k,mode=0555")?;
    mount("tmpfs", "/tmp", "tmpfs", flags, Some(data.as_c_str()))?;
    chdir("/tmp")?;
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    chdir("/")?;
    // Whatever it may be made to execute, it gets no rights by that.
    rustix::thread::set_no_new_privs(true)?;
    rustix::thread::set_thread_groups(&[])?;
    let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    rustix::thread::set_thread_res_gid(group, group, group)?;
    // Takes the capabilities along (capabilities(7)).
    rustix::thread::set_thread_res_uid(user, user, user)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_the_agreed_path_asks_for_the_shared_namespace() {
        let spec =
            |path: &str| json!({"linux": {"namespaces": [{"type": "mount"}, {"type": "pid", "path": path}]}});
        let mut shared = spec(SHARED_PID_NS);
        assert!(asked_for(&mut shared, Path::new("/x/ns/pid")));
        assert_eq!(shared["linux"]["namespaces"][1]["path"], "/x/ns/pid");
        for mut other in [
            spec("/proc/7/ns/pid"),
            json!({}),
            json!({"linux": {"namespaces": 1}}),
            json!({"linux": {"namespaces": [1, {"type": "ipc", "path": SHARED_PID_NS}]}}),
        ] {
            assert!(!asked_for(&mut other, Path::new("/x")), "{other}");
        }
    }
}
