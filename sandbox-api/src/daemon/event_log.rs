// SPDX-License-Identifier: Apache-2.0
//! What happens to pods, for `cloister events`: the latest of it is kept, and those who listen hear of what comes.
//!
//! It is told by the host, not by the guest, except for [`Kind::Oom`]: only the guest's kernel knows of that.

use super::metrics::PodLabels;
use crate::clock::{self, Millis};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::broadcast;

/// Events that are kept.
const KEPT: usize = 1024;
/// Events that a slow listener can be behind.
const BEHIND: usize = 256;
/// Longest message, in bytes.
const MAX_MESSAGE: usize = 4096;

/// What can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// containerd made the pod known.
    Created,
    /// Its VM runs and takes containers.
    Started,
    /// Its VM could not be had; the message says why.
    StartFailed,
    /// A container's process was started.
    ContainerStarted,
    /// A container's process ended.
    ContainerExited,
    /// The guest's kernel killed in a container for want of memory.
    Oom,
    /// Its VM has ended; the message says why, if nobody asked for it.
    Stopped,
    /// containerd does not know it any more.
    Removed,
}

impl Kind {
    /// As in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Started => "started",
            Self::StartFailed => "start-failed",
            Self::ContainerStarted => "container-started",
            Self::ContainerExited => "container-exited",
            Self::Oom => "oom",
            Self::Stopped => "stopped",
            Self::Removed => "removed",
        }
    }
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Event {
    /// When.
    pub at: Millis,
    /// What.
    pub kind: Kind,
    /// The pod's id.
    pub pod: String,
    /// Its name.
    pub name: String,
    /// Its Kubernetes namespace.
    pub namespace: String,
    /// The container's id, if it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// How it ended, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_status: Option<u32>,
    /// In words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

impl Event {
    /// Something that happens to a pod now.
    pub fn now(kind: Kind, pod: &PodLabels) -> Self {
        Self {
            at: clock::now(),
            kind,
            pod: pod.id.clone(),
            name: pod.pod.clone(),
            namespace: pod.namespace.clone(),
            container: None,
            exit_status: None,
            message: None,
        }
    }

    /// About a container of it.
    #[must_use]
    pub fn of_container(self, id: &str) -> Self {
        Self {
            container: Some(id.to_owned()),
            ..self
        }
    }

    /// That ended so.
    #[must_use]
    pub fn with_status(self, status: u32) -> Self {
        Self {
            exit_status: Some(status),
            ..self
        }
    }

    /// In words, cut to 4 KiB.
    #[must_use]
    pub fn with_message(self, message: &str) -> Self {
        let end = (0..=MAX_MESSAGE.min(message.len()))
            .rev()
            .find(|end| message.is_char_boundary(*end));
        Self {
            message: message.get(..end.unwrap_or(0)).map(str::to_owned),
            ..self
        }
    }
}

/// See the module. Clones are handles to the same one.
#[derive(Clone, Debug)]
pub struct EventLog {
    kept: Arc<Mutex<VecDeque<Event>>>,
    live: broadcast::Sender<Event>,
}

impl Default for EventLog {
    fn default() -> Self {
        Self {
            kept: Arc::default(),
            live: broadcast::channel(BEHIND).0,
        }
    }
}

impl EventLog {
    /// Keeps it and tells those who listen.
    pub fn add(&self, event: Event) {
        // A deque is whole behind a poisoned lock, too. What is sent under the lock is not in the answer of `listen`.
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= KEPT {
            kept.pop_front();
        }
        kept.push_back(event.clone());
        // Nobody need listen.
        let _ = self.live.send(event);
    }

    /// What is kept, oldest first, and a way to all that comes after it.
    pub fn listen(&self) -> (Vec<Event>, broadcast::Receiver<Event>) {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        (kept.iter().cloned().collect(), self.live.subscribe())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_latest_are_kept_and_the_next_are_told() {
        let log = EventLog::default();
        let pod = PodLabels {
            id: "a".into(),
            ..Default::default()
        };
        for number in 0..1500 {
            log.add(Event::now(Kind::ContainerExited, &pod).with_status(number));
        }
        let (kept, mut live) = log.listen();
        assert_eq!(kept.len(), KEPT);
        assert_eq!(kept.last().unwrap().exit_status, Some(1499));
        log.add(Event::now(Kind::Removed, &pod));
        assert_eq!(live.recv().await.unwrap().kind, Kind::Removed);
        for _ in 0..=BEHIND {
            log.add(Event::now(Kind::Oom, &pod));
        }
        assert!(
            live.recv().await.is_err(),
            "one that is too slow hears that it is"
        );
        assert_eq!(live.recv().await.unwrap().kind, Kind::Oom);
    }

    #[test]
    fn messages_are_cut_between_characters() {
        let event = Event::now(Kind::Stopped, &PodLabels::default());
        let long = "ü".repeat(MAX_MESSAGE);
        let cut = event.clone().with_message(&format!("x{long}")).message.unwrap();
        assert_eq!(cut.len(), MAX_MESSAGE - 1);
        assert_eq!(event.with_message("why").message.unwrap(), "why");
    }

    #[test]
    fn names_are_those_of_the_json() {
        for kind in [Kind::Created, Kind::StartFailed, Kind::ContainerExited, Kind::Oom] {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
        }
    }
}
