// SPDX-License-Identifier: Apache-2.0
//! The agents' events (TaskOOM, TaskExit, ...) on their way to containerd, which needs TaskOOM to tell OOMKilled from an
//! ordinary end.
//!
//! One queue and one connection for all pods. containerd may be away: an event is tried again for a while, later ones wait
//! behind it. What containerd refuses is not tried again. A pod has a part of the queue: one that says too much has its own
//! events dropped (by [`EventsServer`](crate::pod::agent::EventsServer)), and no other's. Those that the queue has no room
//! for are dropped with a warning.

use super::isulad;
use super::metrics::Metrics;
use cloister_protocol::events::{Envelope, TASK_OOM_EVENT_TOPIC, TaskOOM};
use cloister_protocol::protobuf::Message as _;
use containerd_client::services::v1::ForwardRequest;
use containerd_client::services::v1::events_client::EventsClient;
use containerd_client::types;
use std::error::Error as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};
use tonic::transport::Channel;
use tonic::{Code, Status};
use tracing::Instrument;

/// Events that wait for containerd.
const MAX_WAITING: usize = 1024;
/// Of these, those of one pod.
const MAX_OF_POD: usize = 64;
/// How often one is tried.
const TRIES: u32 = 8;
/// Before the second try; doubled for each further one.
const PAUSE: Duration = Duration::from_millis(250);

/// An event that waits, in one of its pod's places.
#[derive(Debug)]
struct Waiting {
    envelope: types::Envelope,
    _place: OwnedSemaphorePermit,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Publisher {
    queue: mpsc::Sender<Waiting>,
    heard: Arc<Notify>,
}

impl Publisher {
    /// Publishes to the containerd that listens on `address`. To be called in a runtime.
    pub fn start(address: &Path) -> Self {
        let (queue, waiting) = mpsc::channel(MAX_WAITING);
        tokio::spawn(publish(address.to_owned(), waiting));
        let heard = Arc::default();
        Self { queue, heard }
    }

    /// What is told of each event: something happens in a pod. For one who waits.
    pub fn heard(&self) -> Arc<Notify> {
        Arc::clone(&self.heard)
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
        let Self { queue, heard } = self.clone();
        let (namespace, metrics) = (namespace.to_owned(), metrics.clone());
        let places = Arc::new(Semaphore::new(MAX_OF_POD));
        let pass_on = async move {
            while let Some(event) = events.recv().await {
                heard.notify_one();
                if event.topic == TASK_OOM_EVENT_TOPIC {
                    metrics.oom();
                    oom(&container_of(&event));
                }
                if namespace == isulad::NAMESPACE {
                    continue;
                }
                // The semaphore is never closed.
                let Ok(place) = Arc::clone(&places).acquire_owned().await else {
                    return;
                };
                let waiting = Waiting {
                    envelope: envelope(&namespace, event),
                    _place: place,
                };
                if queue.try_send(waiting).is_err() {
                    log::warn!("an event was dropped: containerd does not take them");
                }
            }
        };
        tokio::spawn(pass_on.in_current_span());
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

/// The guest's payload is passed on as it is: topic, type and size have been looked at when it came.
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

async fn publish(address: PathBuf, mut queue: mpsc::Receiver<Waiting>) {
    let mut client = None;
    while let Some(waiting) = queue.recv().await {
        let envelope = &waiting.envelope;
        let mut pause = PAUSE;
        for attempt in 1..=TRIES {
            let Err(error) = forward(&address, &mut client, envelope.clone()).await else {
                break;
            };
            let why = error.message();
            log::debug!("event {}: {why}", envelope.topic);
            if !is_away(&error) || attempt == TRIES {
                log::warn!("event {} was not taken by containerd: {why}", envelope.topic);
                break;
            }
            client = None;
            tokio::time::sleep(pause).await;
            pause = pause.saturating_mul(2);
        }
    }
}

/// Whether containerd was not reached: what it answers itself has no source.
fn is_away(error: &Status) -> bool {
    error.code() == Code::Unavailable || error.source().is_some()
}

async fn forward(
    address: &Path,
    client: &mut Option<EventsClient<Channel>>,
    envelope: types::Envelope,
) -> Result<(), Status> {
    if client.is_none() {
        let channel = crate::daemon::uds::channel(address)
            .await
            .map_err(|e| Status::unavailable(crate::error::chain(&e)))?;
        *client = Some(EventsClient::new(channel));
    }
    let Some(client) = client else { return Ok(()) };
    let request = ForwardRequest {
        envelope: Some(envelope),
    };
    client.forward(request).await.map(|_| ())
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
        let heard = Arc::default();
        Publisher { queue, heard }.follow("k8s.io", events, &metrics, move |container| {
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
            let passed = queued.recv().await.unwrap().envelope;
            assert_eq!(
                (passed.topic.as_str(), passed.namespace.as_str()),
                (topic, "k8s.io")
            );
        }
        assert_eq!(killed.try_iter().collect::<Vec<_>>(), ["c1[2J"]);
        let text = metrics.encode();
        assert!(text.contains("cloister_oom_kills_total 1\n"), "{text}");
    }

    #[tokio::test]
    async fn a_pod_that_says_too_much_leaves_room_for_others() {
        let (queue, mut queued) = mpsc::channel(MAX_WAITING);
        let heard = Arc::default();
        let publisher = Publisher { queue, heard };
        let event = |topic: &str| Envelope {
            topic: topic.into(),
            ..Default::default()
        };
        let (loud, events) = mpsc::channel(2 * MAX_WAITING);
        publisher.follow("k8s.io", events, &metrics(), |_| ());
        for _ in 0..2 * MAX_WAITING {
            loud.send(event("/tasks/start")).await.unwrap();
        }
        while queued.len() < MAX_OF_POD {
            tokio::task::yield_now().await;
        }
        let (other, events) = mpsc::channel(1);
        publisher.follow("k8s.io", events, &metrics(), |_| ());
        other.send(event("/tasks/exit")).await.unwrap();
        let mut before = 0;
        while queued.recv().await.unwrap().envelope.topic != "/tasks/exit" {
            before += 1;
        }
        assert!(before <= 2 * MAX_OF_POD, "{before}");
    }

    #[tokio::test]
    async fn what_containerd_refuses_is_not_tried_again() {
        assert!(!is_away(&Status::invalid_argument("invalid topic")));
        assert!(!is_away(&Status::unknown("exchange")));
        assert!(is_away(&Status::unavailable("it ends")));
        let broken = std::io::Error::from(std::io::ErrorKind::BrokenPipe);
        assert!(is_away(&Status::from_error(Box::new(broken))));
        let nobody = forward(
            Path::new("/nobody/listens"),
            &mut None,
            types::Envelope::default(),
        )
        .await;
        assert!(is_away(&nobody.unwrap_err()));
    }
}
