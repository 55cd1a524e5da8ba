// SPDX-License-Identifier: Apache-2.0
//! The Task service of a running pod, called from another process.

use super::pods::target::{self, Verb};
use super::{Context, Failure, Outcome};
use crate::daemon::report;
use crate::files::SocketPath;
use crate::pod::state::{Pods, Record, Status};
use cloister_protocol::task::{KillRequest, TaskClient, WaitRequest};
use cloister_protocol::ttrpc;
use cloister_protocol::ttrpc::asynchronous::Client;
use cloister_protocol::ttrpc::context::Context as Call;
use oci_spec::runtime::Spec;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// More is no specification.
const MAX_SPEC: u64 = 4 << 20;

/// Where a container's processes are asked for.
#[derive(Clone, Debug)]
pub struct Place {
    /// The container's id.
    pub id: String,
    /// In messages.
    pub name: String,
    /// The Task service's socket.
    pub socket: PathBuf,
    /// A folder for what is needed for a while.
    pub dir: PathBuf,
}

impl Place {
    /// Of a container of `cloister run`.
    pub fn own(pods: &Pods, record: &Record) -> Self {
        Self {
            id: record.container_id().to_owned(),
            name: record.name.clone(),
            socket: pods.socket(&record.id),
            dir: pods.state_dir(&record.id),
        }
    }

    /// Of a container of a pod that containerd made.
    pub fn of_pod(pod: &report::Pod, container: &report::Container) -> Self {
        Self {
            id: container.id.clone(),
            name: super::pods::target::container_name(pod, container),
            socket: pod.task_socket.clone(),
            dir: pod.task_socket.parent().unwrap_or(Path::new("/")).to_owned(),
        }
    }

    /// Connects to its pod's socket.
    pub async fn connect(&self) -> Outcome<TaskClient> {
        // Not ttrpc's own address parsing, which takes some characters of a path for its own.
        let failed = |e| Failure::new(format!("container {} does not answer: {e}", self.name));
        let socket = SocketPath::of(&self.socket).map_err(failed)?;
        let stream = tokio::net::UnixStream::connect(socket.path())
            .await
            .map_err(failed)?;
        Ok(TaskClient::new(Client::new(
            ttrpc::asynchronous::transport::Socket::from(stream),
        )))
    }
}

/// Reads the specification in a container's folder.
pub fn read_spec(dir: &Path) -> Outcome<Spec> {
    let path = dir.join("config.json");
    let failed = |e| Failure::new(format!("cannot read {}: {e}", path.display()));
    let mut bytes = Vec::new();
    std::fs::File::open(&path)
        .and_then(|file| file.take(MAX_SPEC).read_to_end(&mut bytes))
        .map_err(failed)?;
    serde_json::from_slice(&bytes).map_err(|e| failed(e.into()))
}

/// A runtime for one command.
pub fn runtime() -> Outcome<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?)
}

/// A container of `cloister run` that must be running; containerd's are refused.
pub fn running(context: &Context, name: &str, verb: Verb) -> Outcome<(Pods, Record)> {
    let pods = context.pods()?;
    let record = target::own(context, &pods, name, verb)?;
    if record.status != Status::Running {
        return Err(Failure::new(format!("container {} is not running", record.name)));
    }
    Ok((pods, record))
}

/// Connects to a pod's socket.
pub async fn connect(pods: &Pods, record: &Record) -> Outcome<TaskClient> {
    Place::own(pods, record).connect().await
}

/// What the service said, without ttrpc's own words.
pub fn said(error: ttrpc::Error) -> Failure {
    match error {
        ttrpc::Error::RpcStatus(status) => Failure::new(status.message),
        other => Failure::new(other),
    }
}

/// Sends a signal to a container's process.
pub async fn kill(task: &TaskClient, id: &str, signal: i32, all: bool) -> Outcome<()> {
    let signal = u32::try_from(signal).map_err(Failure::new)?;
    let request = KillRequest {
        id: id.to_owned(),
        signal,
        all,
        ..Default::default()
    };
    task.kill(Call::default(), &request)
        .await
        .map(|_| ())
        .map_err(said)
}

/// Waits for a container's process to end; Ok(false) if it has not in time.
pub async fn wait_exit(task: &TaskClient, id: &str, limit: Duration) -> Outcome<bool> {
    let request = WaitRequest {
        id: id.to_owned(),
        ..Default::default()
    };
    let waited = tokio::time::timeout(limit, task.wait(Call::default(), &request)).await;
    // A broken connection is an end, too.
    Ok(waited.is_ok())
}

/// Waits until the hosting process has recorded the end; None if the record is gone (`--rm`).
pub fn wait_ended(pods: &Pods, id: &str, limit: Option<Duration>) -> Outcome<Option<Record>> {
    let begin = Instant::now();
    loop {
        let hosted = pods.is_hosted(id);
        match pods.load(id) {
            Ok(record) if record.status == Status::Exited && !hosted => return Ok(Some(record)),
            Ok(_) if !hosted => crate::pod::host::reap(pods)?,
            Ok(_) => {}
            Err(crate::pod::state::Error::NotFound(_)) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        if limit.is_some_and(|limit| begin.elapsed() > limit) {
            return Err(Failure::new(format!(
                "container {} did not end in time",
                id.get(..12).unwrap_or(id)
            )));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
