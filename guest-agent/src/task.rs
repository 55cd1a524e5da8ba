// SPDX-License-Identifier: Apache-2.0
//! containerd's Task service: requests to containers and back. Codes and words are those of containerd's runc shim.
//!
//! ttrpc drops a request's future when its connection breaks. What changes state therefore runs in a task of its own,
//! to its end.

use std::future::Future;
use std::sync::Arc;

use async_trait::async_trait;
use cloister_protocol::events::{TASK_PAUSED_EVENT_TOPIC, TASK_RESUMED_EVENT_TOPIC, TaskPaused, TaskResumed};
use cloister_protocol::protobuf::well_known_types::empty::Empty;
use cloister_protocol::protobuf::{EnumOrUnknown, MessageField};
use cloister_protocol::task::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest,
    StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, Task, UpdateTaskRequest,
    WaitRequest, WaitResponse,
};
use cloister_protocol::ttrpc::asynchronous::TtrpcContext;
use cloister_protocol::{METRICS_PACKAGE, pack};
use rustix::process::Signal;

use crate::container::Context;
use crate::error::{Result, invalid_argument, not_found, unimplemented, unknown};
use crate::events::timestamp;

/// See the module.
pub struct TaskService(Arc<Context>);

impl TaskService {
    /// A service for the containers of `context`.
    pub fn new(context: Arc<Context>) -> Self {
        Self(context)
    }

    /// Runs `work` to its end, whatever becomes of the connection.
    async fn through<T: Send + 'static>(work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
        tokio::spawn(work)
            .await
            .map_err(|e| unknown(format!("the request was abandoned: {e}")))?
    }
}

/// A signal by its number.
fn signal(number: u32) -> Result<Signal> {
    i32::try_from(number)
        .ok()
        .and_then(|number| {
            Signal::from_named_raw(number).or_else(|| {
                // SAFETY: real-time signals libc itself does not use; that is what the function asks for.
                (libc::SIGRTMIN()..=libc::SIGRTMAX())
                    .contains(&number)
                    .then(|| unsafe { Signal::from_raw_unchecked(number) })
            })
        })
        .ok_or_else(|| invalid_argument(format!("signal {number} does not exist")))
}

#[async_trait]
impl Task for TaskService {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> Result<CreateTaskResponse> {
        let context = Arc::clone(&self.0);
        let pid = Self::through(async move { context.create(request).await }).await?;
        Ok(CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> Result<StartResponse> {
        let context = Arc::clone(&self.0);
        let pid = Self::through(async move { context.start(&request.id, &request.exec_id).await }).await?;
        Ok(StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Result<DeleteResponse> {
        let context = Arc::clone(&self.0);
        let (pid, exit) =
            Self::through(async move { context.delete(&request.id, &request.exec_id).await }).await?;
        Ok(DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..Default::default()
        })
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> Result<StateResponse> {
        let container = self.0.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let status = if request.exec_id.is_empty() {
            container.status()
        } else {
            process.status()
        };
        let exit = process.exit();
        Ok(StateResponse {
            id: request.id,
            bundle: container.bundle.to_string_lossy().into_owned(),
            pid: process.pid_u32(),
            status: EnumOrUnknown::new(status),
            stdin: process.given.stdin.clone(),
            stdout: process.given.stdout.clone(),
            stderr: process.given.stderr.clone(),
            terminal: process.names.terminal,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map_or_else(MessageField::none, |exit| timestamp(exit.at)),
            exec_id: request.exec_id,
            ..Default::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> Result<PidsResponse> {
        let container = self.0.container(&request.id)?;
        let mut pids = container.cgroup.pids();
        if pids.is_empty() && container.init.exit().is_none() {
            pids.push(container.init.pid_u32());
        }
        let processes = pids
            .into_iter()
            .map(|pid| ProcessInfo {
                pid,
                ..Default::default()
            })
            .collect();
        Ok(PidsResponse {
            processes,
            ..Default::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> Result<Empty> {
        let container = self.0.container(&request.id)?;
        Self::through(async move { container.set_paused(true).await }).await?;
        let event = TaskPaused {
            container_id: request.id,
            ..Default::default()
        };
        self.0.events.publish(TASK_PAUSED_EVENT_TOPIC, &event);
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> Result<Empty> {
        let container = self.0.container(&request.id)?;
        Self::through(async move { container.set_paused(false).await }).await?;
        let event = TaskResumed {
            container_id: request.id,
            ..Default::default()
        };
        self.0.events.publish(TASK_RESUMED_EVENT_TOPIC, &event);
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> Result<Empty> {
        Err(unimplemented(
            "checkpoint of a container: take a snapshot of the pod instead",
        ))
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> Result<Empty> {
        let container = self.0.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let signal = signal(request.signal)?;
        if request.all && request.exec_id.is_empty() {
            if process.exit().is_some() && container.cgroup.pids().is_empty() {
                return Err(not_found("process already finished"));
            }
            if signal == Signal::KILL {
                container.cgroup.kill();
            } else {
                container.cgroup.signal(signal);
            }
        } else {
            process.kill(signal)?;
        }
        if signal == Signal::KILL {
            // A frozen process dies only once it is thawed.
            container.thaw();
        }
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> Result<Empty> {
        self.0.exec(request)?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Result<Empty> {
        let size = |n: u32| {
            u16::try_from(n)
                .map_err(|_| invalid_argument(format!("no terminal is {n} characters wide or high")))
        };
        let (width, height) = (size(request.width)?, size(request.height)?);
        self.0
            .container(&request.id)?
            .process(&request.exec_id)?
            .resize(width, height)?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> Result<Empty> {
        let process = self.0.container(&request.id)?.process(&request.exec_id)?;
        if request.stdin {
            process.close_input();
        }
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> Result<Empty> {
        let container = self.0.container(&request.id)?;
        let resources: serde_json::Value = serde_json::from_slice(&request.resources.get_or_default().value)
            .map_err(|e| invalid_argument(format!("the resources cannot be read: {e}")))?;
        container
            .cgroup
            .update(&resources)
            .map_err(|e| unknown(format!("update of container {}: {e}", container.id)))?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> Result<WaitResponse> {
        let process = self.0.container(&request.id)?.process(&request.exec_id)?;
        let exit = process
            .wait()
            .await
            .ok_or_else(|| not_found("process was deleted"))?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..Default::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> Result<StatsResponse> {
        let container = self.0.container(&request.id)?;
        let stats = pack(METRICS_PACKAGE, &container.cgroup.metrics())
            .map_err(|e| unknown(format!("stats of container {}: {e}", container.id)))?;
        Ok(StatsResponse {
            stats: MessageField::some(stats),
            ..Default::default()
        })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> Result<ConnectResponse> {
        let task_pid = self.0.container(&request.id)?.init.pid_u32();
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    /// There is no shim to end: the pod ends by Pod.PowerOff.
    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> Result<Empty> {
        Ok(Empty::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_by_number() {
        assert_eq!(signal(9).unwrap(), Signal::KILL);
        assert_eq!(signal(34).unwrap().as_raw(), 34);
        assert_eq!(signal(64).unwrap().as_raw(), 64);
        for bad in [0, 32, 65, u32::MAX] {
            assert!(signal(bad).is_err(), "{bad}");
        }
    }
}
