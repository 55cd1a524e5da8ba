// SPDX-License-Identifier: Apache-2.0
//! A process of a container as the Task service sees it: the container's first one, or one executed in it.
//!
//! ```text
//! Created ──started()──▶ Running ──▶ Stopped ──(Delete)──▶ gone
//!    └──────── killed before it was started ───▶┘
//! ```
//! An exec has no process (pid 0) while Created; a container's init has: it waits to be let go.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cloister_protocol::events::{TASK_EXIT_EVENT_TOPIC, TaskExit};
use cloister_protocol::task::Status;
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::{oneshot, watch};

use crate::container::Context;
use crate::error::{Result, failed_precondition, not_found, unknown};
use crate::events::timestamp;
use crate::reaper::Exit;
use crate::stdio::{Io, Names};

/// Names of the streams as the client gave them, to be told back by State.
#[derive(Clone, Debug, Default)]
pub struct GivenNames {
    /// stdin
    pub stdin: String,
    /// stdout
    pub stdout: String,
    /// stderr
    pub stderr: String,
}

#[derive(Default)]
struct Inner {
    pid: i32,
    io: Option<Io>,
}

/// See the module.
pub struct Process {
    /// Id of the container.
    pub container: String,
    /// Id of the exec; empty for the container's first process.
    pub exec: String,
    /// The streams, parsed.
    pub names: Names,
    /// The streams, as given.
    pub given: GivenNames,
    inner: Mutex<Inner>,
    /// The client's Start has been answered (or never comes): only then may the exit be told.
    started: watch::Sender<bool>,
    exit: watch::Sender<Option<Exit>>,
}

impl Process {
    /// A process not started yet.
    pub fn new(container: &str, exec: &str, names: Names, given: GivenNames) -> Self {
        Self {
            container: container.to_owned(),
            exec: exec.to_owned(),
            names,
            given,
            inner: Mutex::default(),
            started: watch::channel(false).0,
            exit: watch::channel(None).0,
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its pid in the VM; 0 before there is one.
    pub fn pid(&self) -> i32 {
        self.inner().pid
    }

    /// The pid as messages have it.
    pub fn pid_u32(&self) -> u32 {
        u32::try_from(self.pid()).unwrap_or(0)
    }

    /// How it ended, if it did.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Whether Start has been done.
    pub fn is_started(&self) -> bool {
        *self.started.borrow()
    }

    /// Status, pausing left aside.
    pub fn status(&self) -> Status {
        if self.exit().is_some() {
            Status::STOPPED
        } else if self.is_started() {
            Status::RUNNING
        } else {
            Status::CREATED
        }
    }

    /// The process exists: remembers its pid and streams, and follows it to its end.
    pub fn attach(self: &Arc<Self>, context: &Arc<Context>, pid: i32, io: Io, exit: oneshot::Receiver<Exit>) {
        {
            let mut inner = self.inner();
            inner.pid = pid;
            inner.io = Some(io);
        }
        tokio::spawn(Arc::clone(self).follow(Arc::clone(context), exit));
    }

    /// The client knows that it runs.
    pub fn started(&self) {
        self.started.send_replace(true);
    }

    /// It could not be started: it has ended, without an exit event.
    pub fn failed(&self) {
        self.exit.send_replace(Some(Exit {
            status: 255,
            at: std::time::SystemTime::now(),
        }));
    }

    async fn follow(self: Arc<Self>, context: Arc<Context>, exit: oneshot::Receiver<Exit>) {
        let Ok(exit) = exit.await else { return };
        if let Some(io) = &mut self.inner().io {
            io.process_gone();
        }
        if self.exec.is_empty() {
            // Without a pid namespace of its own, a container's other processes outlive its first one.
            context.first_gone(&self.container);
        }
        self.exit.send_replace(Some(exit));
        let mut started = self.started.subscribe();
        if started.wait_for(|started| *started).await.is_err() {
            return;
        }
        context.events.publish(
            TASK_EXIT_EVENT_TOPIC,
            &TaskExit {
                container_id: self.container.clone(),
                id: if self.exec.is_empty() {
                    self.container.clone()
                } else {
                    self.exec.clone()
                },
                pid: self.pid_u32(),
                exit_status: exit.status,
                exited_at: timestamp(exit.at),
                ..Default::default()
            },
        );
    }

    /// Waits for its end.
    pub async fn wait(&self) -> Option<Exit> {
        let mut receiver = self.exit.subscribe();
        let exit = receiver.wait_for(Option::is_some).await.ok()?;
        *exit
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// NotFound once it has ended, FailedPrecondition while it has no process.
    pub fn kill(&self, signal: Signal) -> Result<()> {
        if self.exit().is_some() {
            return Err(not_found("process already finished"));
        }
        let Some(pid) = Pid::from_raw(self.pid()) else {
            return Err(failed_precondition("process not created"));
        };
        // Ours until the reaper collects it, so the pid cannot be another's.
        kill_process(pid, signal).map_err(|error| match error {
            rustix::io::Errno::SRCH => not_found("process already finished"),
            error => unknown(format!("kill of process {}: {error}", self.pid())),
        })
    }

    /// Has its streams stand still, or go on.
    pub fn hold_io(&self, held: bool) {
        if let Some(io) = &self.inner().io {
            io.hold(held);
        }
    }

    /// Has its streams dial the host again, which is another one.
    pub fn renew_io(&self) {
        if let Some(io) = &self.inner().io {
            io.renew();
        }
    }

    /// CloseIO of stdin.
    pub fn close_input(&self) {
        if let Some(io) = &self.inner().io {
            io.close_input();
        }
    }

    /// Sets the size of its terminal.
    ///
    /// # Errors
    /// FailedPrecondition while it has none.
    pub fn resize(&self, width: u16, height: u16) -> Result<()> {
        match &self.inner().io {
            Some(io) => io
                .resize(width, height)
                .map_err(|e| unknown(format!("resize of the terminal: {e}"))),
            None if self.exit().is_some() => Ok(()),
            None => Err(failed_precondition("process not created")),
        }
    }

    /// Ends its streams, see [`Io::finish`].
    pub async fn finish_io(&self) {
        let io = self.inner().io.take();
        if let Some(io) = io {
            io.finish().await;
        }
    }
}
