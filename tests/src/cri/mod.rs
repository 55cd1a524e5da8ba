// SPDX-License-Identifier: Apache-2.0
//! A Kubernetes node without its kubelet: containerd as its users install it, with `runc` and `cloister` as runtime handlers
//! side by side, spoken to through CRI as a kubelet speaks to it.
//!
//! ```text
//!   test ── Runtime (one per handler) ── Pod ── Container ── Stream (exec, attach, port-forward)
//!                │ CRI, gRPC on a unix socket                   │ websocket on loopback
//!                ▼                                              ▼
//!   Node:   containerd ── containerd-shim-runc-v2 ── runc    containerd's streaming server
//!                └─────── cloisterd ── a VM per pod
//! ```
//!
//! [`Node`] has all of it in one folder, a file system in memory of its own, and ends it when dropped. What a kubelet does beside
//! CRI is done here: the pod's cgroup and its log folder, and the lists of paths to mask.

mod config;
mod container;
mod log;
mod node;
mod pod;
mod runtime;
mod stream;

pub use config::{BRIDGE, cni, containerd_with_runc};
pub use container::{Container, Output, Security, args, script, security};
pub use k8s_cri::v1 as api;
pub use log::Line;
pub use node::{End, Node, PeerHandler, containerd_bin};
pub use pod::Pod;
pub use runtime::{Runtime, code, k8s};
pub use stream::{PortForward, Stream, Streamed};

use std::time::Duration;

/// The handlers that a node can have. Pods of `cloister` boot, those of `cloister-clone` are cloned from a template, those of
/// `cloister-stream` too, with stdio through the Streaming service; those of `cloister-pool` take clones that were made ahead, those of
/// `cloister-idle` give back their caches after 4 s of rest, those of `cloister-worker` have a worker each, and two of
/// `cloister-workers` share one.
pub const HANDLERS: [&str; 9] = [
    "runc",
    "cloister",
    "cloister-clone",
    "cloister-stream",
    "cloister-pool",
    "cloister-idle",
    "cloister-worker",
    "cloister-workers",
    "cloister-worker-clone",
];

/// Snapshotters that a node's containerd has beside overlayfs: each handler has a variant for each (`cloister-native`).
pub const SNAPSHOTTERS: [&str; 3] = ["native", "blockfile", "erofs"];

/// Whether pods of this handler are Cloister's.
pub(crate) fn is_ours(handler: &str) -> bool {
    handler.starts_with("cloister")
}

/// An image of Debian's own tools.
pub const TOOLS: &str = "localhost/tools:latest";
/// One whose `USER` is `user` of its `/etc/passwd`, and whose stop signal is SIGUSR1.
pub const USER: &str = "localhost/user:latest";
/// One of a few files.
pub const VOLUME: &str = "localhost/volume:latest";

/// What hangs is given up after this long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(600);

/// Why a case could not be carried out.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// What a step of a case gave.
pub type Outcome<T = ()> = Result<T, Failure>;

/// Ends a case unless this holds.
#[track_caller]
pub fn ensure(condition: bool, otherwise: impl std::fmt::Display) -> Outcome {
    if condition {
        return Ok(());
    }
    let place = std::panic::Location::caller();
    Err(format!("{}:{}: {otherwise}", place.file(), place.line()).into())
}

/// Waits until `found` answers something.
pub async fn eventually<T>(what: &str, mut found: impl AsyncFnMut() -> Outcome<Option<T>>) -> Outcome<T> {
    let start = std::time::Instant::now();
    loop {
        if let Some(value) = found().await? {
            return Ok(value);
        }
        ensure(start.elapsed() < PATIENCE, format_args!("never came: {what}"))?;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
