// SPDX-License-Identifier: Apache-2.0
//! The agent as the host sees it: it calls once to say that it is ready and then sends its events, and it is called for
//! everything else. What comes from it is the guest's word: of its events those go on that an agent of ours sends, about what
//! this pod has.

use super::members::Members;
use super::task;
use cloister_devices::rate_limit::RateLimit;
use cloister_protocol::containerd_shim_protos::protobuf::well_known_types::empty::Empty;
use cloister_protocol::events::{
    Envelope, Events, ForwardRequest, TASK_CREATE_EVENT_TOPIC, TASK_DELETE_EVENT_TOPIC,
    TASK_EXEC_ADDED_EVENT_TOPIC, TASK_EXEC_STARTED_EVENT_TOPIC, TASK_EXIT_EVENT_TOPIC, TASK_OOM_EVENT_TOPIC,
    TASK_PAUSED_EVENT_TOPIC, TASK_RESUMED_EVENT_TOPIC, TASK_START_EVENT_TOPIC, TaskDelete, TaskExecAdded,
    TaskExecStarted, TaskExit, TaskOOM, create_events,
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
    /// Whom they may be about.
    pub members: Arc<Members>,
}

impl EventsServer {
    /// Serves the connections that come out of `accepted`, of the VM called `name`.
    ///
    /// # Errors
    /// ttrpc's.
    pub async fn start(name: &str, accepted: mpsc::Receiver<StdStream>) -> ttrpc::Result<Self> {
        let (ready_sender, ready) = watch::channel(None);
        let (event_sender, events) = mpsc::channel(MAX_EVENTS);
        let connections = futures_util::stream::unfold(accepted, |mut accepted| async move {
            let stream = accepted.recv().await?;
            let connected = stream
                .set_nonblocking(true)
                .and_then(|()| UnixStream::from_std(stream));
            Some((connected, accepted))
        });
        let members = Arc::<Members>::default();
        let service = Service {
            name: name.to_owned(),
            ready: ready_sender,
            events: event_sender,
            members: Arc::clone(&members),
            complaints: RateLimit::new(),
        };
        let mut server = Server::new()
            .add_listener(Listener::new(connections))
            .register_service(create_events(Arc::new(service)));
        server.start().await?;
        Ok(Self {
            server,
            ready,
            events,
            members,
        })
    }

    /// Closes the connections.
    pub async fn stop(mut self) {
        // Not `shutdown`: it panics when the stream of connections has ended, as it does with the VM.
        self.server.disconnect().await;
    }
}

struct Service {
    name: String,
    ready: watch::Sender<Option<Ready>>,
    events: mpsc::Sender<Envelope>,
    members: Arc<Members>,
    complaints: RateLimit,
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
            return Ok(Empty::new());
        }
        let Some((container, exec)) = subject(&envelope) else {
            log::debug!("an event of the guest that is none of its agent's was dropped");
            return Ok(Empty::new());
        };
        // containerd takes its word, whichever pod the container is of.
        if !self.members.has(&container, &exec) {
            let what = format_args!(
                "event {} was dropped: the pod has no container {container:?} with a process {exec:?}",
                envelope.topic
            );
            self.complaints.warn(&self.name, what);
        } else if self.events.try_send(envelope).is_err() {
            log::debug!("an event of the guest was dropped");
        }
        Ok(Empty::new())
    }
}

/// The container that an event is about, and the exec, empty if it is the container itself. None if no agent of ours could
/// have sent it: containerd refuses other topics, and its clients believe what they read.
fn subject(envelope: &Envelope) -> Option<(String, String)> {
    let event = envelope.event.get_or_default();
    let value = &event.value;
    let (_, name) = TOPICS.iter().find(|(topic, _)| *topic == envelope.topic)?;
    if event.type_url != format!("{EVENTS_PACKAGE}.{name}") || value.len() > MAX_EVENT {
        return None;
    }
    // The id is the first field of all of these messages, and a TaskOOM's only one.
    let container = TaskOOM::parse_from_bytes(value).ok()?.container_id;
    let process = match *name {
        "TaskExit" => TaskExit::parse_from_bytes(value).ok()?.id,
        "TaskDelete" => TaskDelete::parse_from_bytes(value).ok()?.id,
        "TaskExecAdded" => TaskExecAdded::parse_from_bytes(value).ok()?.exec_id,
        "TaskExecStarted" => TaskExecStarted::parse_from_bytes(value).ok()?.exec_id,
        _ => String::new(),
    };
    // A container's own process has its name, or none.
    let exec = if process == container {
        String::new()
    } else {
        process
    };
    let sound = |id: &str| task::check_id(id).is_ok();
    (sound(&container) && (exec.is_empty() || sound(&exec))).then_some((container, exec))
}

#[cfg(test)]
mod tests {
    use super::*;
    use cloister_protocol::events::{EventsClient, TaskCreate};
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
        let about = |topic: &str, event| {
            subject(&Envelope {
                topic: topic.into(),
                event: MessageField::some(event),
                ..Default::default()
            })
        };
        let is_taken = |topic: &str, event| about(topic, event).is_some();
        let told = |container: &str, exec: &str| Some((container.to_owned(), exec.to_owned()));
        assert_eq!(about("/tasks/exit", exit_of("c1")), told("c1", "e1"));
        assert_eq!(about("/tasks/exit", exit_of("e1")), told("e1", ""));
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
        let mut server = EventsServer::start("pod", accepted).await.unwrap();
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
        server.members.enter("c1", "");
        let oom_of = |container: &str| {
            let oom = TaskOOM {
                container_id: container.into(),
                ..Default::default()
            };
            cloister_protocol::pack(EVENTS_PACKAGE, &oom).unwrap()
        };
        // Of another pod: the container, or the process, whose name is a container's as well as an exec's.
        forward("/tasks/oom", oom_of("c2")).await;
        forward("/tasks/exit", exit_of("c2")).await;
        forward("/tasks/exit", exit_of("c1")).await;
        forward("/tasks/", exit_of("c1")).await;
        server.members.enter("c1", "e1");
        forward("/tasks/exit", exit_of("c1")).await;
        forward("/tasks/oom", oom_of("c1")).await;
        let mut next = async || subject(&server.events.recv().await.unwrap()).unwrap();
        assert_eq!(next().await, ("c1".to_owned(), "e1".to_owned()));
        assert_eq!(next().await, ("c1".to_owned(), String::new()));
        server.stop().await;
    }
}
