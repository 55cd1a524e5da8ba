// SPDX-License-Identifier: Apache-2.0
//! The Task service of a running pod, called from another process.

use super::{Context, Failure, Outcome};
use crate::files::SocketPath;
use crate::pod::state::{Pods, Record, Status};
use cloister_protocol::task::{KillRequest, TaskClient, WaitRequest};
use cloister_protocol::ttrpc;
use cloister_protocol::ttrpc::asynchronous::Client;
use cloister_protocol::ttrpc::context::Context as Call;
use std::time::{Duration, Instant};

/// A runtime for one command.
pub fn runtime() -> Outcome<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?)
}

/// A container that must be running.
pub fn running(context: &Context, name: &str) -> Outcome<(Pods, Record)> {
    let pods = context.pods()?;
    let record = pods.find(name)?;
    if record.status != Status::Running {
        return Err(Failure::new(format!("container {} is not running", record.name)));
    }
    Ok((pods, record))
}

/// Connects to a pod's socket.
pub async fn connect(pods: &Pods, record: &Record) -> Outcome<TaskClient> {
    // Not ttrpc's own address parsing, which takes some characters of a path for its own.
    let failed = |e| Failure::new(format!("container {} does not answer: {e}", record.name));
    let socket = SocketPath::of(&pods.socket(&record.id)).map_err(failed)?;
    let stream = tokio::net::UnixStream::connect(socket.path())
        .await
        .map_err(failed)?;
    Ok(TaskClient::new(Client::new(
        ttrpc::asynchronous::transport::Socket::from(stream),
    )))
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
