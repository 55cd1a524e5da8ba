// SPDX-License-Identifier: Apache-2.0
//! The agent: PID 1 of a pod VM.
//!
//! # Theory of operation
//!
//! One static binary plays three parts, told apart by how it is started:
//!
//! - **PID 1** ([`boot`], then [`serve`]): listens on vsock, tells the host it is ready, serves containerd's Task service
//!   and our Pod service, reaps every orphan of the VM.
//! - **helper** ([`helper`]): a short-lived child PID 1 re-executes for each container and exec. libcontainer forks and
//!   enters namespaces in-process, which must not happen in a process that serves requests. The helper leaves the
//!   container's process behind as an orphan, which PID 1 then owns. State between the two lives on disk in
//!   `/run/cloister` (a tmpfs).
//! - **plain process** (`--listen unix:PATH --host unix:DIR --run DIR`): the same services without a VM, for tests.
//!
//! Everything in PID 1 runs on one thread: a tokio runtime of the current-thread kind.
//!
//! ```text
//!  host ── vsock 1024 ──▶ ttrpc server ─▶ task::TaskService ─▶ container ─▶ spawn ─▶ helper ─▶ libcontainer
//!                                      └▶ pod::PodService                    ▲
//!  host ◀─ vsock 1025 ─── events::Publisher ◀── exits ──────── reaper ◀──────┘ orphans
//!  host ◀─ vsock 1026 ─── stdio: one connection per stream ◀─▶ pipe or pty ◀─▶ process
//!  host ── vsock 1027 ──▶ forward: one connection per TCP connection ─▶ loopback ─▶ process
//! ```
//!
//! What the host sends is trusted; what containers do is not. The agent never parses anything a container wrote, and
//! never follows a path inside a container's root file system: libcontainer does, with openat2.
#![cfg_attr(not(test), no_main)]

mod boot;
mod cgroup;
mod cmdline;
mod container;
mod devices;
mod disk;
mod error;
mod events;
mod executor;
mod fd;
mod forward;
mod helper;
mod log;
mod mount;
mod net;
mod passwd;
mod pidns;
mod pod;
mod power;
mod process;
mod reaper;
mod seccomp;
mod serve;
mod spawn;
mod spec;
mod stdio;
mod task;
mod transport;

use std::ffi::{CStr, OsString, c_char, c_int};
use std::os::unix::ffi::OsStringExt;

/// Entry point, called by the C library.
///
/// Rust's own start code would open /dev/null and abort when the kernel gave PID 1 no console; here nothing is needed
/// before [`boot`] has made /dev.
#[cfg_attr(not(test), unsafe(no_mangle))]
#[cfg_attr(test, allow(dead_code))]
extern "C" fn main(argc: c_int, argv: *const *const c_char) -> c_int {
    let argc = usize::try_from(argc).unwrap_or(0);
    let args: Vec<OsString> = (0..argc)
        .map(|i| {
            // SAFETY: the C library passes argc valid, NUL-terminated strings which live as long as the process.
            let arg = unsafe { CStr::from_ptr(*argv.add(i)) };
            OsString::from_vec(arg.to_bytes().to_vec())
        })
        .collect();
    // SAFETY: no other thread exists; ignoring a signal touches no memory.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    if args.get(1).is_some_and(|a| a == helper::COMMAND) {
        return helper::main(&args);
    }
    let timeline = boot::Timeline::begin();
    // The kernel passes on the words of its command line that it does not know; options of ours start with dashes.
    let options = args
        .iter()
        .skip(1)
        .any(|a| a.as_encoded_bytes().starts_with(b"--"));
    if std::process::id() == 1 && !options {
        boot::main(timeline)
    } else {
        serve::main_as_process(&args, timeline)
    }
}
