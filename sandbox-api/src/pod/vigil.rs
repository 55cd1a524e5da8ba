// SPDX-License-Identifier: Apache-2.0
//! Notices an agent that does not respond any more, and gives its VM up.
//!
//! An idle pod is not asked for anything: a timer would wake it. Instead each call is watched. One that stays unanswered for
//! [`Vigil::patience`] has the agent asked for a sign of life; without one for as long again, or when the connection
//! breaks though the VM did not end, the VM is ended. Containers then are reported dead as after any other end of a VM.

use super::guest::Guest;
use cloister_protocol::pod::{PingRequest, PodClient};
use cloister_protocol::ttrpc::context::with_duration;
use cloister_protocol::ttrpc::{self, Code, Error};
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
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
                Ok(answer) => return answer,
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
