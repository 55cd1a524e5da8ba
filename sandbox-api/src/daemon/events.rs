// SPDX-License-Identifier: Apache-2.0
//! The agents' events (TaskOOM, TaskExit, ...) on their way to containerd, which needs TaskOOM to tell OOMKilled from an
//! ordinary end.
//!
//! One queue and one connection for all pods. containerd may be away: an event is tried again for a while, later ones wait
//! behind it, and those that the queue has no room for are dropped with a warning.

use super::isulad;
use super::metrics::Metrics;
use cloister_protocol::events::{Envelope, TASK_OOM_EVENT_TOPIC, TaskOOM};
use cloister_protocol::protobuf::Message as _;
use containerd_client::services::v1::ForwardRequest;
use containerd_client::services::v1::events_client::EventsClient;
use containerd_client::types;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;
use tonic::transport::Channel;

/// Events that wait for containerd.
const MAX_WAITING: usize = 1024;
/// How often one is tried.
const TRIES: u32 = 8;
/// Before the second try; doubled for each further one.
const PAUSE: Duration = Duration::from_millis(250);

/// See the module.
#[derive(Clone, Debug)]
pub struct Publisher {
    queue: mpsc::Sender<types::Envelope>,
}

impl Publisher {
    /// Publishes to the containerd that listens on `address`. To be called in a runtime.
    pub fn start(address: &Path) -> Self {
        let (queue, waiting) = mpsc::channel(MAX_WAITING);
        tokio::spawn(publish(address.to_owned(), waiting));
        Self { queue }
    }

    /// Passes on what comes from one pod, to containerd's `namespace`. `oom` is called with the id of each container that
    /// lost a process for want of memory, in the guest's words. For pods of iSulad there is no containerd to tell.
    pub fn follow(
        &self,
        namespace: &str,
        mut events: mpsc::Receiver<Envelope>,
        metrics: &Metrics,
        oom: impl Fn(&str) + Send + 'static,
    ) {
        let queue = self.queue.clone();
        let (namespace, metrics) = (namespace.to_owned(), metrics.clone());
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                if event.topic == TASK_OOM_EVENT_TOPIC {
                    metrics.oom();
                    oom(&container_of(&event));
                }
                if namespace == isulad::NAMESPACE {
                    continue;
                }
                if queue.try_send(envelope(&namespace, event)).is_err() {
                    log::warn!("an event was dropped: containerd does not take them");
                }
            }
        });
    }
}

/// Whom a TaskOOM is about, as far as that can be an id.
fn container_of(event: &Envelope) -> String {
    let oom = event
        .event
        .as_ref()
        .and_then(|event| TaskOOM::parse_from_bytes(&event.value).ok());
    let id = oom.map(|oom| oom.container_id).unwrap_or_default();
    id.chars().filter(char::is_ascii_graphic).take(128).collect()
}

/// The guest's payload is passed on as it is, of the topics and types that are its to send.
fn envelope(namespace: &str, event: Envelope) -> types::Envelope {
    let payload = event.event.into_option().unwrap_or_default();
    types::Envelope {
        timestamp: Some(SystemTime::now().into()),
        namespace: namespace.to_owned(),
        topic: event.topic,
        event: Some(prost_types::Any {
            type_url: payload.type_url,
            value: payload.value,
        }),
    }
}

async fn publish(address: PathBuf, mut waiting: mpsc::Receiver<types::Envelope>) {
    let mut client = None;
    while let Some(envelope) = waiting.recv().await {
        if !envelope.topic.starts_with("/tasks/") {
            log::debug!("an event of topic {:?} is not passed on", envelope.topic);
            continue;
        }
        let mut pause = PAUSE;
        for attempt in 1..=TRIES {
            match forward(&address, &mut client, envelope.clone()).await {
                Ok(()) => break,
                Err(error) => {
                    log::debug!("event {}: {error}", envelope.topic);
                    client = None;
                    if attempt == TRIES {
                        log::warn!("event {} was not taken by containerd: {error}", envelope.topic);
                    } else {
                        tokio::time::sleep(pause).await;
                        pause = pause.saturating_mul(2);
                    }
                }
            }
        }
    }
}

async fn forward(
    address: &Path,
    client: &mut Option<EventsClient<Channel>>,
    envelope: types::Envelope,
) -> Result<(), String> {
    if client.is_none() {
        let channel = crate::daemon::uds::channel(address)
            .await
            .map_err(|e| e.to_string())?;
        *client = Some(EventsClient::new(channel));
    }
    let Some(client) = client else { return Ok(()) };
    let request = ForwardRequest {
        envelope: Some(envelope),
    };
    client
        .forward(request)
        .await
        .map(|_| ())
        .map_err(|e| e.message().to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::metrics::tests::metrics;
    use super::*;

    #[tokio::test]
    async fn ooms_are_counted_and_all_is_passed_on() {
        let (queue, mut queued) = mpsc::channel(4);
        let (agent, events) = mpsc::channel(4);
        let metrics = metrics();
        let (oom, killed) = std::sync::mpsc::channel();
        Publisher { queue }.follow("k8s.io", events, &metrics, move |container| {
            oom.send(container.to_owned()).unwrap();
        });
        for topic in [TASK_OOM_EVENT_TOPIC, "/tasks/exit"] {
            let oom = TaskOOM {
                container_id: "c1\u{1b}[2J".into(),
                ..Default::default()
            };
            let event = Envelope {
                topic: topic.into(),
                event: cloister_protocol::pack(cloister_protocol::EVENTS_PACKAGE, &oom)
                    .ok()
                    .into(),
                ..Default::default()
            };
            agent.send(event).await.unwrap();
            let passed = queued.recv().await.unwrap();
            assert_eq!(
                (passed.topic.as_str(), passed.namespace.as_str()),
                (topic, "k8s.io")
            );
        }
        assert_eq!(killed.try_iter().collect::<Vec<_>>(), ["c1[2J"]);
        let text = metrics.encode();
        assert!(text.contains("cloister_oom_kills_total 1\n"), "{text}");
    }
}
