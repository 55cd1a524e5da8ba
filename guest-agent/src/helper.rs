// SPDX-License-Identifier: Apache-2.0
//! The helper: a short-lived child of PID 1 in which libcontainer creates one container, or one process in it.
//!
//! ```text
//! cloister-agent --helper FD create STATE ID BUNDLE CONSOLE
//! cloister-agent --helper FD exec   STATE ID PROCESS CONSOLE
//! cloister-agent --helper FD hooks  STATE ID KIND -
//! cloister-agent --helper FD pidns  - - - -
//! ```
//!
//! FD is the control pipe (see [`crate::spawn`]), STATE libcontainer's state directory, BUNDLE a directory with
//! `config.json`, PROCESS a file with an OCI process, KIND poststart or poststop, CONSOLE a unix socket that takes the
//! terminal, or `-`. The stdio of the helper becomes that of the container. The process made is an orphan when the helper
//! exits. `pidns` makes the pod's PID namespace, see [`crate::pidns`].

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::container::{Container as State, ContainerStatus};
use libcontainer::oci_spec::runtime::Spec;
use libcontainer::syscall::syscall::SyscallType;

use crate::executor::AgentExecutor;
use crate::{error, log as logger, pidns, seccomp};

/// First argument of a helper.
pub const COMMAND: &str = "--helper";

/// Longest line on the control pipe: what the kernel writes at once.
const MAX_LINE: usize = 4096;

/// Writes one line to the control pipe.
pub fn say(mut control: &File, kind: char, text: &str) {
    let mut text = text.replace('\n', " ");
    logger::truncate(&mut text, MAX_LINE - 2);
    // With PID 1 gone there is nobody to tell.
    let _ = control.write_all(format!("{kind}{text}\n").as_bytes());
}

/// Life of a helper; the exit status says nothing the control pipe does not.
pub fn main(args: &[OsString]) -> i32 {
    let text = |i: usize| args.get(i).and_then(|a| a.to_str()).unwrap_or_default();
    let Ok(fd) = text(2).parse::<i32>() else { return 2 };
    if fd < 3 {
        return 2;
    }
    // SAFETY: PID 1 passed us this descriptor for that, and nothing else here uses it.
    let control = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let Ok(for_log) = control.try_clone() else {
        return 2;
    };
    logger::to_control(for_log, log::LevelFilter::Warn);
    match run(text(3), text(4), text(5), text(6), text(7), &control) {
        Ok(pid) => {
            say(&control, 'P', &pid.to_string());
            0
        }
        Err(text) => {
            say(&control, 'E', &text);
            1
        }
    }
}

/// Runs the hooks of a container that has been started, or has ended. Nothing is left behind: the pid is our own.
fn hooks(state: &str, id: &str, kind: &str) -> Result<i32, String> {
    let mut container = State::load(Path::new(state).join(id)).map_err(|e| error::chain(&e))?;
    let spec = Spec::load(container.bundle().join("config.json")).map_err(|e| error::chain(&e))?;
    let Some(hooks) = spec.hooks() else {
        return Err("the container has no hooks".to_owned());
    };
    let run = |hooks: &Vec<_>, state: &_| {
        libcontainer::hooks::run_hooks(Some(hooks), Some(state), None, None, None)
            .map_err(|e| error::chain(&e))
    };
    if kind == "poststart" {
        if let Some(hooks) = hooks.poststart() {
            run(hooks, &container.state)?;
        }
    } else {
        container.set_status(ContainerStatus::Stopped);
        // One that fails does not keep the others from running (OCI, runtime.md, lifecycle).
        let mut failure = Ok(());
        for hook in hooks.poststop().iter().flatten() {
            let ran = run(&vec![hook.clone()], &container.state);
            failure = failure.and(ran);
        }
        failure?;
    }
    i32::try_from(std::process::id()).map_err(|e| e.to_string())
}

fn run(
    command: &str,
    state: &str,
    id: &str,
    path: &str,
    console: &str,
    control: &File,
) -> Result<i32, String> {
    let explain = |e: libcontainer::error::LibcontainerError| error::chain(&e);
    if command == "hooks" {
        return hooks(state, id, path);
    }
    if command == "pidns" {
        return pidns::make();
    }
    let console = (console != "-").then(|| PathBuf::from(console));
    let first = command == "create";
    let seccomp = if first {
        seccomp::read(Path::new(path))
    } else {
        let state = State::load(Path::new(state).join(id)).map_err(|e| error::chain(&e))?;
        seccomp::read(state.bundle())
    };
    let seccomp = seccomp.map_err(|e| format!("seccomp profile: {e}"))?;
    let control = control.try_clone().map_err(|e| e.to_string())?;
    let executor = AgentExecutor::new(control, first, seccomp);
    let builder = ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_root_path(state)
        .and_then(ContainerBuilder::validate_id)
        .map_err(explain)?
        .with_console_socket(console)
        .with_executor(executor);
    let pid = match command {
        "create" => {
            let container = builder
                .as_init(path)
                .with_systemd(false)
                .with_detach(true)
                .build()
                .map_err(explain)?;
            container.pid().ok_or("the container has no process")?
        }
        "exec" => builder
            .as_tenant()
            .with_detach(true)
            .with_process(Some(path))
            .build()
            .map_err(explain)?,
        _ => return Err(format!("unknown helper command {command:?}")),
    };
    Ok(pid.as_raw())
}
