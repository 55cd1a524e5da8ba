// SPDX-License-Identifier: Apache-2.0
//! Events to the host: "ready" first, then containerd's task events.
//!
//! One task owns the connection and sends one event at a time, in order. When the connection breaks (the daemon was
//! restarted), or is known to be gone (this VM is a clone), it dials again, says "ready" again and goes on. A host that does not listen costs a bounded queue; what
//! does not fit is dropped and counted in the log.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use cloister_protocol::events::{Envelope, EventsClient, ForwardRequest};
use cloister_protocol::protobuf::well_known_types::any::Any;
use cloister_protocol::protobuf::well_known_types::timestamp::Timestamp;
use cloister_protocol::protobuf::{Message, MessageField};
use cloister_protocol::ttrpc::asynchronous::transport::Socket;
use cloister_protocol::ttrpc::proto::{Code, Message as Frame, MessageHeader, Request, Response};
use cloister_protocol::ttrpc::{asynchronous::Client, context};
use cloister_protocol::{
    AGENT_PACKAGE, EVENT_NAMESPACE, EVENTS_PACKAGE, EVENTS_PORT, READY_TOPIC, pack, pod,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{Notify, mpsc, oneshot};

use crate::boot::{Timeline, boottime_ns};
use crate::transport::{Conn, Dial, Host};

/// Events that may wait for the host.
const QUEUE: usize = 1024;
/// Pause between attempts to reach the host.
const RETRY: Duration = Duration::from_millis(500);
/// Number of a ttrpc client's first request.
const FIRST_STREAM: u32 = 1;
/// How long the host may take for one event, in nanoseconds.
const TIMEOUT: i64 = 10_000_000_000;

/// Queue to the host. Clones share it.
#[derive(Clone)]
pub struct Publisher(mpsc::Sender<Envelope>, Arc<Notify>);

/// A time as protobuf has it; before 1970 counts as 1970.
pub fn timestamp(at: SystemTime) -> MessageField<Timestamp> {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    MessageField::some(Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
        ..Default::default()
    })
}

fn envelope(topic: &str, event: Any) -> Envelope {
    Envelope {
        timestamp: timestamp(SystemTime::now()),
        namespace: EVENT_NAMESPACE.to_owned(),
        topic: topic.to_owned(),
        event: MessageField::some(event),
        ..Default::default()
    }
}

impl Publisher {
    /// Starts to send. `dial` is the connection already begun, if one is. The receiver tells when "ready" has been said, or
    /// that it could not be said yet.
    pub fn start(host: Host, dial: Option<Dial>, timeline: Timeline) -> (Self, oneshot::Receiver<()>) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let (saying, said) = oneshot::channel();
        let renewed = Arc::<Notify>::default();
        tokio::spawn(send_all(
            host,
            dial,
            receiver,
            timeline,
            saying,
            Arc::clone(&renewed),
        ));
        (Self(sender, renewed), said)
    }

    /// Has it dial again.
    pub fn renew(&self) {
        self.1.notify_one();
    }

    /// Queues one of containerd's events.
    pub fn publish<M: Message>(&self, topic: &str, event: &M) {
        match pack(EVENTS_PACKAGE, event) {
            Ok(event) => {
                if self.0.try_send(envelope(topic, event)).is_err() {
                    log::error!("event {topic} was dropped: the host takes none");
                }
            }
            Err(error) => log::error!("event {topic} cannot be encoded: {error}"),
        }
    }
}

fn ready(timeline: &Timeline) -> pod::Ready {
    pod::Ready {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        protocol: cloister_protocol::PROTOCOL_VERSION,
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        main_ns: timeline.started,
        ready_ns: boottime_ns(),
        steps: timeline.steps.clone(),
        knows_retain_initrd: !std::env::args_os().any(|word| word == "retain_initrd"),
        ..Default::default()
    }
}

fn ready_request(timeline: &Timeline) -> cloister_protocol::protobuf::Result<ForwardRequest> {
    let event = pack(AGENT_PACKAGE, &ready(timeline))?;
    Ok(ForwardRequest {
        envelope: MessageField::some(envelope(READY_TOPIC, event)),
        ..Default::default()
    })
}

/// Says "ready" on a connection that is being made: the host can go on while the runtime starts. It is the frame that a
/// ttrpc client would send as its first; [`send_all`] takes the answer. If it cannot be said now, it will be later.
pub fn say_ready(dial: &mut Dial, timeline: &Timeline) {
    let frame = ready_request(timeline).and_then(|request| {
        let request = Request {
            service: "containerd.services.events.ttrpc.v1.Events".to_owned(),
            method: "Forward".to_owned(),
            timeout_nano: TIMEOUT,
            payload: request.write_to_bytes()?,
            ..Default::default()
        };
        let payload = request.write_to_bytes()?;
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let mut frame = Vec::from(MessageHeader::new_request(FIRST_STREAM, length));
        frame.extend_from_slice(&payload);
        Ok(frame)
    });
    let said = frame.map_err(io::Error::other).and_then(|frame| dial.say(&frame));
    if let Err(error) = said {
        log::warn!("the host was not told at once: {error}");
    }
}

/// Takes the answer to [`say_ready`]; false when the connection is no good.
async fn said_ready(conn: &mut Conn) -> bool {
    let limit = Duration::from_nanos(TIMEOUT.unsigned_abs());
    match tokio::time::timeout(limit, Frame::<Response>::read_from(conn)).await {
        Ok(Ok(frame)) => {
            if let Some(status) = frame
                .payload
                .status
                .as_ref()
                .filter(|status| status.code() != Code::OK)
            {
                log::warn!("the host refuses event {READY_TOPIC}: {}", status.message());
            }
            true
        }
        Ok(Err(error)) => {
            log::warn!("event {READY_TOPIC} was not answered: {error}");
            false
        }
        Err(_) => {
            log::warn!("event {READY_TOPIC} was not answered");
            false
        }
    }
}

/// Connects until it succeeds.
async fn connect(host: &Host) -> Conn {
    let mut told = false;
    loop {
        match host.connect(EVENTS_PORT).await {
            Ok(conn) => return conn,
            Err(error) => {
                if !std::mem::replace(&mut told, true) {
                    log::warn!("the host does not take events (port {EVENTS_PORT}): {error}");
                }
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// A connection that tells of its first written bytes (by dropping the sender).
struct Telling {
    conn: Conn,
    saying: Option<oneshot::Sender<()>>,
}

impl AsyncRead for Telling {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.conn.as_mut().poll_read(cx, buf)
    }
}

impl AsyncWrite for Telling {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = self.conn.as_mut().poll_write(cx, buf);
        if result.is_ready() {
            self.saying = None;
        }
        result
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.conn.as_mut().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.conn.as_mut().poll_shutdown(cx)
    }
}

async fn send_all(
    host: Host,
    dial: Option<Dial>,
    mut queue: mpsc::Receiver<Envelope>,
    mut timeline: Timeline,
    saying: oneshot::Sender<()>,
    renewed: Arc<Notify>,
) {
    let mut saying = Some(saying);
    let (mut first, mut told) = (None, false);
    if let Some(dial) = dial {
        told = dial.said();
        if told {
            saying = None;
        }
        match dial.finish().await {
            Ok(mut conn) => {
                timeline.step("connected");
                if !told || said_ready(&mut conn).await {
                    first = Some(conn);
                }
            }
            Err(error) => log::warn!("the host does not take events yet (port {EVENTS_PORT}): {error}"),
        }
    }
    // An event the host has not confirmed.
    let mut pending: Option<Envelope> = None;
    'dial: loop {
        let conn = match first.take() {
            Some(conn) => conn,
            None => {
                (saying, told) = (None, false);
                connect(&host).await
            }
        };
        let conn = Telling {
            conn,
            saying: saying.take(),
        };
        let client = EventsClient::new(Client::new(Socket::new(conn)));
        let Ok(request) = ready_request(&timeline) else {
            return;
        };
        let told = std::mem::take(&mut told);
        if told || forward(&client, request).await {
            loop {
                let next = match pending.take() {
                    Some(event) => event,
                    None => tokio::select! {
                        event = queue.recv() => match event {
                            Some(event) => event,
                            None => return,
                        },
                        () = renewed.notified() => continue 'dial,
                    },
                };
                let request = ForwardRequest {
                    envelope: MessageField::some(next.clone()),
                    ..Default::default()
                };
                if !forward(&client, request).await {
                    pending = Some(next);
                    break;
                }
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Sends one event; false when the connection is no good. An event the host refuses is gone: it would refuse it again.
async fn forward(client: &EventsClient, request: ForwardRequest) -> bool {
    use cloister_protocol::ttrpc::Error;
    let topic = &request.envelope.topic;
    match client.forward(context::with_timeout(TIMEOUT), &request).await {
        Ok(_) => true,
        Err(Error::RpcStatus(status)) => {
            log::warn!("the host refuses event {topic}: {}", status.message());
            true
        }
        Err(error) => {
            log::warn!("event {topic} was not sent: {error}");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_kept_to_the_nanosecond() {
        let at = SystemTime::UNIX_EPOCH + Duration::new(1_700_000_000, 123_456_789);
        let stamp = timestamp(at);
        assert_eq!((stamp.seconds, stamp.nanos), (1_700_000_000, 123_456_789));
        let before = timestamp(SystemTime::UNIX_EPOCH - Duration::from_secs(1));
        assert_eq!((before.seconds, before.nanos), (0, 0));
    }
}
