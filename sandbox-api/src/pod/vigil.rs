// SPDX-License-Identifier: Apache-2.0
//! Notices an agent that does not respond any more, and gives its VM up.
//!
//! An idle pod is not asked for anything: a timer would wake it. Instead each call is watched. One that stays unanswered for
//! [`Vigil::patience`] has the agent asked for a sign of life; without one for as long again, or when the connection
//! breaks though the VM did not end, the VM is ended. So is one that looks as if it hung (see [`Vigil::ask`]), and gives no sign
//! of life for so long. Containers then are reported dead as after any other end of a VM.

use super::guest::Guest;
use cloister_protocol::pod::{PingRequest, PodClient};
use cloister_protocol::ttrpc::context::{Context, with_duration};
use cloister_protocol::ttrpc::{self, Code, Error};
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::watch;

/// How long an agent may leave a call unanswered where nobody says otherwise.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// A VM that ends takes its connections with it before its end is known.
pub const END_BECOMES_KNOWN: Duration = Duration::from_secs(2);

/// See the module.
pub struct Vigil {
    guest: Arc<dyn Guest>,
    agent: PodClient,
    /// Why the VM ended, once it has.
    dead: watch::Receiver<Option<String>>,
    patience: Duration,
    answers: AtomicU64,
}

impl Vigil {
    /// Over the agent of `guest`.
    pub fn new(
        guest: Arc<dyn Guest>,
        agent: PodClient,
        dead: watch::Receiver<Option<String>>,
        patience: Duration,
    ) -> Self {
        Self {
            guest,
            agent,
            dead,
            patience,
            answers: AtomicU64::new(0),
        }
    }

    /// How often the agent has answered.
    pub fn answers(&self) -> u64 {
        self.answers.load(Ordering::Relaxed)
    }

    fn note_answer(&self) {
        self.answers.fetch_add(1, Ordering::Relaxed);
    }

    /// Asks for a sign of life of a VM that may hang, though nobody needs anything of it.
    pub async fn ask(&self) {
        let request = PingRequest::new();
        loop {
            let ping = self.agent.ping(Context::default(), &request);
            match tokio::time::timeout(self.patience, ping).await {
                Ok(Err(error)) if !matches!(error, Error::RpcStatus(_)) => {
                    self.broken(&error).await;
                    return;
                }
                Ok(_) => return self.note_answer(),
                Err(_) if self.guest.stands_still() => {}
                Err(_) => {
                    let seconds = self.patience.as_secs();
                    return self.guest.give_up(format!(
                        "it hangs: a vCPU ran without a pause, and its agent left a ping unanswered for {seconds} s"
                    ));
                }
            }
        }
    }

    /// Waits for the answer to a call that an agent answers by itself, not when a process ends.
    ///
    /// # Errors
    /// What the agent says; Unavailable when it does not respond.
    pub async fn over<T>(&self, call: impl Future<Output = ttrpc::Result<T>>) -> ttrpc::Result<T> {
        let mut call = pin!(call);
        loop {
            match tokio::time::timeout(self.patience, &mut call).await {
                Ok(Err(error)) if !matches!(error, Error::RpcStatus(_)) => {
                    return Err(self.broken(&error).await);
                }
                Ok(answer) => {
                    self.note_answer();
                    return answer;
                }
                // Nobody can answer while a snapshot is taken.
                Err(_) if self.guest.stands_still() => {}
                Err(_) => {
                    let ping = self
                        .agent
                        .ping(with_duration(self.patience), &PingRequest::new())
                        .await;
                    if ping.is_err() && !self.guest.stands_still() {
                        let seconds = self.patience.as_secs();
                        self.guest.give_up(format!(
                            "its agent left a call and then a ping unanswered for {seconds} s each"
                        ));
                        return Err(unavailable("the agent in the virtual machine does not respond"));
                    }
                }
            }
        }
    }

    /// To be told of a call that failed though nobody answered, for its connection broke: without its agent a VM is of no
    /// use. Answers what to tell the caller.
    pub async fn broken(&self, error: &Error) -> Error {
        let mut dead = self.dead.clone();
        let known = dead.wait_for(Option::is_some);
        let why = match tokio::time::timeout(END_BECOMES_KNOWN, known).await {
            Ok(Ok(why)) => why.clone().unwrap_or_default(),
            _ => {
                let why = format!("the connection to its agent broke: {error}");
                self.guest.give_up(why.clone());
                why
            }
        };
        unavailable(&format!("the virtual machine has ended: {why}"))
    }
}

fn unavailable(text: &str) -> Error {
    Error::RpcStatus(ttrpc::get_status(Code::UNAVAILABLE, text))
}
