// SPDX-License-Identifier: Apache-2.0
//! The agent as the host sees it: it calls once to say that it is ready and then sends its events, and it is called for
//! everything else.

use cloister_protocol::containerd_shim_protos::protobuf::well_known_types::empty::Empty;
use cloister_protocol::events::{Envelope, Events, ForwardRequest, create_events};
use cloister_protocol::pod::{PodClient, Ready};
use cloister_protocol::protobuf::Message as _;
use cloister_protocol::task::TaskClient;
use cloister_protocol::ttrpc::asynchronous::transport::{Listener, Socket};
use cloister_protocol::ttrpc::asynchronous::{Client, Server, TtrpcContext};
use cloister_protocol::{READY_TOPIC, ttrpc};
use std::io;
use std::os::unix::net::UnixStream as StdStream;
use std::sync::Arc;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};

/// Events kept for a slow reader; beyond that they are dropped with a warning.
const MAX_EVENTS: usize = 256;

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
        } else if self.events.try_send(envelope).is_err() {
            log::debug!("an event of the guest was dropped");
        }
        Ok(Empty::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cloister_protocol::events::EventsClient;
    use cloister_protocol::protobuf::MessageField;

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
        forward("/tasks/exit", Default::default()).await;
        assert_eq!(server.events.recv().await.unwrap().topic, "/tasks/exit");
        server.stop().await;
    }
}
