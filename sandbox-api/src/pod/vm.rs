// SPDX-License-Identifier: Apache-2.0
//! A pod's VM with the services around it, from power-on to power-off: the one path that the command line and the daemon
//! share.
//!
//! ```text
//! start ──▶ booting ──ready──▶ agent answers ──configure, serve──▶ containers can be made ──shut_down──▶ (nothing)
//!   └─ or cloned ────▲
//!              └────────────────── the VM ends by itself: `Machine::dead` ──────────────────────▶ shut_down
//! ```

use super::agent::{Agent, EventsServer};
use super::guest::Guest;
use super::machine::{self, Machine, MachineConfig};
use super::members::Members;
use super::streams::Hub;
use super::task::TaskService;
use super::vigil::END_BECOMES_KNOWN;
use cloister_protocol::pod::{ConfigureRequest, PowerOffRequest, Ready, SetTimeRequest};
use cloister_protocol::ttrpc::asynchronous::Server;
use cloister_protocol::ttrpc::context::with_duration;
use cloister_protocol::{AGENT_PORT, EVENTS_PORT, STREAM_PORT, events::Envelope, ttrpc};
use cloister_vmm::{CellHost, StopReason};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};

/// Time for the agent to answer what is quick.
pub const QUICK: Duration = Duration::from_secs(30);
/// Bytes of randomness that an agent takes at once.
const MAX_ENTROPY: usize = 512;
/// By how much a guest's clock may be late from the start.
const CLOCK_ERROR: Duration = Duration::from_millis(500);
/// Time for the guest to power itself off.
const POWER_OFF: Duration = Duration::from_secs(5);

/// Why a pod's VM did not come to serve containers, or was lost.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The VM could not be made.
    #[error(transparent)]
    Machine(#[from] machine::Error),
    /// The VM ended by itself.
    #[error("the virtual machine ended {when}: {reason}\n{tail}")]
    Ended {
        /// "before its agent was ready", ...
        when: &'static str,
        /// Why.
        reason: String,
        /// Its last words.
        tail: String,
    },
    /// The agent did not come.
    #[error("the agent in the virtual machine was not ready after {seconds} s (the init timeout)\n{tail}")]
    NotReady {
        /// How long we waited.
        seconds: u64,
        /// The guest's last words.
        tail: String,
    },
    /// The agent refused.
    #[error("{what}: {message}")]
    Agent {
        /// The request.
        what: &'static str,
        /// Its answer.
        message: String,
    },
    /// Something of the host.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Words an error of the agent, or of the way to it.
pub fn agent_error(what: &'static str) -> impl FnOnce(ttrpc::Error) -> Error {
    move |error| {
        let message = match error {
            ttrpc::Error::RpcStatus(status) => status.message,
            other => other.to_string(),
        };
        Error::Agent { what, message }
    }
}

/// Words an error of the host's kernel.
pub fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { what, source }
}

/// See the module. Dropped without [`shut_down`](Self::shut_down) the VM is ended as it is.
pub struct PodVm {
    /// The VM.
    pub machine: Arc<Machine>,
    ready: watch::Receiver<Option<Ready>>,
    events: Option<EventsServer>,
    streams: Option<mpsc::Receiver<UnixStream>>,
    agent: Option<Agent>,
    server: Option<(Server, PathBuf)>,
    /// It has been told that it is a clone, if it is one.
    renewed: bool,
}

impl PodVm {
    /// Makes the VM and has it boot. To be called in a runtime.
    ///
    /// # Errors
    /// It cannot be made.
    pub async fn start(config: MachineConfig<'_>, cells: &CellHost) -> Result<Self, Error> {
        let machine = Machine::start(config, cells)?;
        let accepted = machine
            .listen(EVENTS_PORT)
            .map_err(io_error("listen to the agent"))?;
        let streams = machine
            .listen(STREAM_PORT)
            .map_err(io_error("listen to the agent"))?;
        let events = EventsServer::start(machine.cell().name(), accepted)
            .await
            .map_err(agent_error("serve the agent's events"))?;
        Ok(Self {
            machine,
            ready: events.ready.clone(),
            events: Some(events),
            streams: Some(streams),
            agent: None,
            server: None,
            renewed: false,
        })
    }

    /// Waits for the agent's first word and connects to it.
    ///
    /// # Errors
    /// The VM ends first, or `patience` does.
    pub async fn ready(&mut self, patience: Duration) -> Result<Agent, Error> {
        if !self.machine.boots() {
            // A clone's agent has been ready all its life, and says so again once it is told that it is one.
            return self.dial();
        }
        let mut ready = self.ready.clone();
        tokio::select! {
            _ = ready.wait_for(Option::is_some) => {}
            error = self.ended("before its agent was ready") => return Err(error),
            () = tokio::time::sleep(patience) => {
                let tail = self.machine.last_words();
                return Err(Error::NotReady { seconds: patience.as_secs(), tail });
            }
        }
        // The command line of every VM has the word.
        let retained = ready
            .borrow()
            .as_ref()
            .is_some_and(|ready| ready.knows_retain_initrd);
        if retained {
            self.machine.discard_initrd();
        }
        self.dial()
    }

    fn dial(&mut self) -> Result<Agent, Error> {
        let stream = self.machine.connect(AGENT_PORT);
        let agent = stream
            .and_then(Agent::over)
            .map_err(io_error("connect to the agent"))?;
        Ok(self.agent.insert(agent).clone())
    }

    /// Gives the pod its identity, and the host's time. A clone gets an identity of its own whatever the request says:
    /// randomness, a way to the host.
    ///
    /// # Errors
    /// The agent is not ready, or refuses.
    pub async fn configure(&mut self, request: &ConfigureRequest) -> Result<(), Error> {
        let agent = self.agent()?.clone();
        let mut request = request.clone();
        if !self.machine.boots() {
            request.cloned = !self.renewed;
            for interface in &mut request.interfaces {
                interface.former_mac = self.machine.former_mac(&interface.mac).unwrap_or_default();
            }
            request.entropy.resize(MAX_ENTROPY, 0);
            crate::ids::fill(&mut request.entropy);
        }
        request.unix_time_ns = crate::clock::unix_ns();
        let asked = Instant::now();
        let when = "before its pod was configured";
        let answer = tokio::select! {
            answer = agent.pod.configure(with_duration(QUICK), &request) => answer,
            error = self.ended(when) => return Err(error),
        };
        match answer {
            Ok(_) => {}
            Err(error @ ttrpc::Error::RpcStatus(_)) => return Err(agent_error("configure the pod")(error)),
            // The connection of a VM that ends is reset just before its end is known, which says why.
            Err(error) => {
                let ended = tokio::time::timeout(END_BECOMES_KNOWN, self.ended(when)).await;
                return Err(ended.unwrap_or_else(|_| agent_error("configure the pod")(error)));
            }
        }
        self.renewed = true;
        self.machine.cell().note_ready();
        // On a busy host the time may have been old when it came to the guest.
        if asked.elapsed() > CLOCK_ERROR {
            let request = SetTimeRequest {
                unix_time_ns: crate::clock::unix_ns(),
                ..Default::default()
            };
            if let Err(error) = agent.pod.set_time(with_duration(QUICK), &request).await {
                log::warn!(
                    "{}: the guest's clock may be late: {error}",
                    self.machine.cell().name()
                );
            }
        }
        Ok(())
    }

    /// Serves the Task service on `socket`, made for root alone. The service outlives the VM. An agent that leaves calls
    /// unanswered for `patience` is asked whether it is there, and without it the VM is ended.
    ///
    /// # Errors
    /// The agent is not ready, or the socket cannot be made.
    pub async fn serve(&mut self, socket: &Path, patience: Duration) -> Result<Arc<TaskService>, Error> {
        let agent = self.agent()?.clone();
        let hub = Hub::new();
        if let Some(streams) = self.streams.take() {
            accept_streams(streams, &hub);
        }
        let guest: Arc<dyn Guest> = Arc::<Machine>::clone(&self.machine);
        let dead = reasons(self.machine.dead());
        let service = TaskService::new(guest, agent, hub, self.members(), dead, patience);
        let server = service.server(socket);
        let mut server = server.map_err(io_error("make the pod's task.sock"))?;
        server.start().await.map_err(agent_error("serve task.sock"))?;
        self.server = Some((server, socket.to_owned()));
        Ok(service)
    }

    /// Whom the agent's events may be about. Who asks it for a container without [`serve`](Self::serve) enters that before.
    pub fn members(&self) -> Arc<Members> {
        let events = self.events.as_ref();
        events
            .map(|events| Arc::clone(&events.members))
            .unwrap_or_default()
    }

    /// The agent's events, but for the first; once.
    pub fn events(&mut self) -> Option<mpsc::Receiver<Envelope>> {
        let events = &mut self.events.as_mut()?.events;
        Some(std::mem::replace(events, mpsc::channel(1).1))
    }

    /// Resolves when the VM has ended.
    pub fn ended(&self, when: &'static str) -> impl Future<Output = Error> + Send + use<> {
        let machine = Arc::clone(&self.machine);
        async move {
            let mut dead = machine.dead();
            let reason = dead.wait_for(Option::is_some).await;
            let reason = reason
                .ok()
                .and_then(|reason| reason.as_ref().map(why))
                .unwrap_or_default();
            Error::Ended {
                when,
                reason,
                tail: machine.last_words(),
            }
        }
    }

    /// The agent, once it is ready.
    ///
    /// # Errors
    /// It is not.
    pub fn agent(&self) -> Result<&Agent, Error> {
        self.agent.as_ref().ok_or_else(|| Error::Io {
            what: "speak with the agent",
            source: io::ErrorKind::NotConnected.into(),
        })
    }

    /// Powers the VM off, politely first, and waits until its threads, descriptors and memory are gone. The Task service
    /// still answers for what was.
    pub fn power_off(&self) -> impl Future<Output = ()> + Send + use<> {
        let machine = Arc::clone(&self.machine);
        let agent = self.agent.clone();
        async move {
            if let Some(agent) = agent {
                let mut dead = machine.dead();
                let off = async {
                    if dead.borrow().is_none() {
                        let _ = agent
                            .pod
                            .power_off(with_duration(POWER_OFF), &PowerOffRequest::new())
                            .await;
                        let _ = dead.wait_for(Option::is_some).await;
                    }
                };
                if tokio::time::timeout(POWER_OFF, off).await.is_err() {
                    log::warn!("the guest did not power off in time");
                }
            }
            machine.stop();
            machine.taken_down().await;
        }
    }

    /// The end of a VM in which nothing of a pod's has run: it is not asked.
    pub async fn discard(mut self) {
        self.agent = None;
        self.shut_down().await;
    }

    /// [`power_off`](Self::power_off), and the end of the services.
    pub async fn shut_down(mut self) {
        self.power_off().await;
        if let Some((mut server, socket)) = self.server.take() {
            let _ = server.shutdown().await;
            let _ = std::fs::remove_file(socket);
        }
        if let Some(events) = self.events.take() {
            events.stop().await;
        }
    }
}

impl Drop for PodVm {
    fn drop(&mut self) {
        self.machine.stop();
        if let Some((_, socket)) = self.server.take() {
            let _ = std::fs::remove_file(socket);
        }
    }
}

fn accept_streams(mut streams: mpsc::Receiver<UnixStream>, hub: &Arc<Hub>) {
    let hub = Arc::clone(hub);
    tokio::spawn(async move {
        while let Some(stream) = streams.recv().await {
            hub.accepted(stream);
        }
    });
}

/// Why a VM ended, in the words of who runs pods: the guest's PID 1 is the agent.
pub fn why(reason: &StopReason) -> String {
    match reason {
        StopReason::Panic { message } if message.contains("Attempted to kill init") => {
            format!("the agent died: {reason}")
        }
        reason => reason.to_string(),
    }
}

fn reasons(mut dead: watch::Receiver<Option<StopReason>>) -> watch::Receiver<Option<String>> {
    let (sender, receiver) = watch::channel(None);
    tokio::spawn(async move {
        let reason = dead
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|reason| reason.as_ref().map(why));
        sender.send_replace(Some(reason.unwrap_or_default()));
    });
    receiver
}
