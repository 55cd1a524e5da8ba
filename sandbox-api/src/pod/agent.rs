// SPDX-License-Identifier: Apache-2.0
//! The agent as the host sees it: it calls once to say that it is ready and then sends its events, and it is called for
//! everything else. What comes from it is the guest's word: of its events those that an agent of ours sends go on.

use super::task;
use cloister_protocol::containerd_shim_protos::protobuf::well_known_types::empty::Empty;
use cloister_protocol::events::{
    Envelope, Events, ForwardRequest, TASK_CREATE_EVENT_TOPIC, TASK_DELETE_EVENT_TOPIC,
    TASK_EXEC_ADDED_EVENT_TOPIC, TASK_EXEC_STARTED_EVENT_TOPIC, TASK_EXIT_EVENT_TOPIC, TASK_OOM_EVENT_TOPIC,
    TASK_PAUSED_EVENT_TOPIC, TASK_RESUMED_EVENT_TOPIC, TASK_START_EVENT_TOPIC, TaskOOM, create_events,
};
use cloister_protocol::pod::{PodClient, Ready};
use cloister_protocol::protobuf::Message as _;
use cloister_protocol::task::TaskClient;
use cloister_protocol::ttrpc::asynchronous::transport::{Listener, Socket};
use cloister_protocol::ttrpc::asynchronous::{Client, Server, TtrpcContext};
use cloister_protocol::{EVENTS_PACKAGE, READY_TOPIC, ttrpc};
use std::io;
use std::os::unix::net::UnixStream as StdStream;
use std::sync::Arc;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};

/// Events kept for a slow reader; beyond that they are dropped with a warning.
const MAX_EVENTS: usize = 256;
/// More than the largest of them has, a TaskCreate with its root's mounts.
const MAX_EVENT: usize = 64 << 10;
/// What an agent sends of containerd's events: the topic and the message that goes with it.
const TOPICS: [(&str, &str); 9] = [
    (TASK_CREATE_EVENT_TOPIC, "TaskCreate"),
    (TASK_START_EVENT_TOPIC, "TaskStart"),
    (TASK_OOM_EVENT_TOPIC, "TaskOOM"),
    (TASK_EXIT_EVENT_TOPIC, "TaskExit"),
    (TASK_DELETE_EVENT_TOPIC, "TaskDelete"),
    (TASK_EXEC_ADDED_EVENT_TOPIC, "TaskExecAdded"),
    (TASK_EXEC_STARTED_EVENT_TOPIC, "TaskExecStarted"),
    (TASK_PAUSED_EVENT_TOPIC, "TaskPaused"),
    (TASK_RESUMED_EVENT_TOPIC, "TaskResumed"),
];

/// Clients of the agent's services, over one connection.
#[derive(Clone)]
pub struct Agent {
    /// containerd's Task service.
    pub task: TaskClient,
    /// Our Pod service.
    pub pod: PodClient,
}

impl Agent {
    /// Over a stream to the agent's port. To be called in a runtime.
    ///
    /// # Errors
    /// The stream is of no use.
    pub fn over(stream: StdStream) -> io::Result<Self> {
        let client = Client::new(socket(stream)?);
        Ok(Self {
            task: TaskClient::new(client.clone()),
            pod: PodClient::new(client),
        })
    }
}

fn socket(stream: StdStream) -> io::Result<Socket> {
    stream.set_nonblocking(true)?;
    Ok(Socket::new(UnixStream::from_std(stream)?))
}

/// The host's Events service, for one VM.
pub struct EventsServer {
    server: Server,
    /// Becomes the agent's first message.
    pub ready: watch::Receiver<Option<Ready>>,
    /// All other events.
    pub events: mpsc::Receiver<Envelope>,
}

impl EventsServer {
    /// Serves the connections that come out of `accepted`.
    ///
    /// # Errors
    /// ttrpc's.
    pub async fn start(accepted: mpsc::Receiver<StdStream>) -> ttrpc::Result<Self> {
        let (ready_sender, ready) = watch::channel(None);
        let (event_sender, events) = mpsc::channel(MAX_EVENTS);
        let connections = futures_util::stream::unfold(accepted, |mut accepted| async move {
            let stream = accepted.recv().await?;
            let connected = stream
                .set_nonblocking(true)
                .and_then(|()| UnixStream::from_std(stream));
            Some((connected, accepted))
        });
        let service = Service {
            ready: ready_sender,
            events: event_sender,
        };
        let mut server = Server::new()
            .add_listener(Listener::new(connections))
            .register_service(create_events(Arc::new(service)));
        server.start().await?;
        Ok(Self {
            server,
            ready,
            events,
        })
    }

    /// Closes the connections.
    pub async fn stop(mut self) {
        // Not `shutdown`: it panics when the stream of connections has ended, as it does with the VM.
        self.server.disconnect().await;
    }
}

struct Service {
    ready: watch::Sender<Option<Ready>>,
    events: mpsc::Sender<Envelope>,
}

#[async_trait::async_trait]
impl Events for Service {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let Some(envelope) = request.envelope.into_option() else {
            return Ok(Empty::new());
        };
        if envelope.topic == READY_TOPIC {
            let ready = Ready::parse_from_bytes(&envelope.event.get_or_default().value).unwrap_or_default();
            self.ready.send_replace(Some(ready));
        } else if !is_of_agent(&envelope) {
            log::debug!("an event of the guest that is none of its agent's was dropped");
        } else if self.events.try_send(envelope).is_err() {
            log::debug!("an event of the guest was dropped");
        }
        Ok(Empty::new())
    }
}

/// Whether an agent of ours could have sent it: containerd refuses other topics, and its clients believe what they read.
fn is_of_agent(envelope: &Envelope) -> bool {
    let event = envelope.event.get_or_default();
    let topic = TOPICS.iter().find(|(topic, _)| *topic == envelope.topic);
    let fits = topic.is_some_and(|(_, name)| event.type_url == format!("{EVENTS_PACKAGE}.{name}"));
    // The id is the first field of all of these messages, and a TaskOOM's only one.
    let names_container = || {
        TaskOOM::parse_from_bytes(&event.value).is_ok_and(|event| task::check_id(&event.container_id).is_ok())
    };
    fits && event.value.len() <= MAX_EVENT && names_container()
}

#[cfg(test)]
mod tests {
    use super::*;
    use cloister_protocol::events::{EventsClient, TaskCreate, TaskExit};
    use cloister_protocol::protobuf::MessageField;
    use cloister_protocol::protobuf::well_known_types::any::Any;

    fn exit_of(container: &str) -> Any {
        let exit = TaskExit {
            container_id: container.into(),
            id: "e1".into(),
            exit_status: 137,
            ..Default::default()
        };
        cloister_protocol::pack(EVENTS_PACKAGE, &exit).unwrap()
    }

    #[test]
    fn a_guest_sends_its_agents_events_and_no_others() {
        let is_taken = |topic: &str, event| {
            is_of_agent(&Envelope {
                topic: topic.into(),
                event: MessageField::some(event),
                ..Default::default()
            })
        };
        assert!(is_taken("/tasks/exit", exit_of("c1")));
        for topic in [
            "/tasks/oom",
            "/tasks/",
            "/tasks/?",
            "/tasks/exit/",
            "/containers/delete",
            "tasks/exit",
            "",
        ] {
            assert!(!is_taken(topic, exit_of("c1")), "{topic:?}");
        }
        for id in ["", "../c1", "c1\u{1b}[2J", "c 1", &"x".repeat(129)] {
            assert!(!is_taken("/tasks/exit", exit_of(id)), "{id:?}");
        }
        let other = |type_url: &str, value: &[u8]| Any {
            type_url: type_url.into(),
            value: value.to_owned(),
            ..Default::default()
        };
        let of_c1 = exit_of("c1").value;
        assert!(!is_taken("/tasks/exit", other("", &of_c1)));
        assert!(!is_taken(
            "/tasks/exit",
            other("containerd.events.TaskOOM", &of_c1)
        ));
        assert!(!is_taken(
            "/tasks/exit",
            other("containerd.events.TaskExit", b"\xff")
        ));
        let create = |bundle: usize| {
            let create = TaskCreate {
                container_id: "c1".into(),
                bundle: "b".repeat(bundle),
                ..Default::default()
            };
            cloister_protocol::pack(EVENTS_PACKAGE, &create).unwrap()
        };
        assert!(is_taken("/tasks/create", create(4096)));
        assert!(!is_taken("/tasks/create", create(MAX_EVENT)));
    }

    #[tokio::test]
    async fn ready_and_events() {
        let (sender, accepted) = mpsc::channel(4);
        let mut server = EventsServer::start(accepted).await.unwrap();
        let (ours, theirs) = StdStream::pair().unwrap();
        sender.send(ours).await.unwrap();
        let client = EventsClient::new(Client::new(socket(theirs).unwrap()));
        let forward = |topic: &str, event| {
            let envelope = Envelope {
                topic: topic.into(),
                event: MessageField::some(event),
                ..Default::default()
            };
            let request = ForwardRequest {
                envelope: MessageField::some(envelope),
                ..Default::default()
            };
            let client = client.clone();
            async move {
                client
                    .forward(ttrpc::context::Context::default(), &request)
                    .await
                    .unwrap()
            }
        };
        let ready = Ready {
            version: "7".into(),
            ..Default::default()
        };
        forward(
            READY_TOPIC,
            cloister_protocol::pack(cloister_protocol::AGENT_PACKAGE, &ready).unwrap(),
        )
        .await;
        assert_eq!(server.ready.borrow().as_ref().unwrap().version, "7");
        forward("/tasks/", exit_of("c1")).await;
        forward("/tasks/exit", exit_of("c1")).await;
        assert_eq!(server.events.recv().await.unwrap().topic, "/tasks/exit");
        server.stop().await;
    }
}
