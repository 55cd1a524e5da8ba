// SPDX-License-Identifier: Apache-2.0
//! containerd's Streaming service on a pod's Task socket: stdio without fifos, as containerd 2.1 asks for with
//! `io_type = "streaming"` of a runtime handler.
//!
//! # Theory of operation
//!
//! containerd makes up a name for each stream and connects once per stream, before it asks the Task service for the
//! process whose stdio are `ttrpc+unix://SOCKET?streaming_id=NAME`. After a restart it connects again under the same
//! names. So the two meet at a [`Desk`]: connections that come first wait there, and so does a process's end that has
//! lost its connection.
//!
//! ```text
//! containerd                                 here
//! request  Streaming/Stream ───────────────▶          (`streaming.proto`)
//! data     Any(StreamInit { id }) ─────────▶
//!          ◀─────────────────────────────── data     Any(Empty): it is known now
//!          ── WindowUpdate ── Data ─────────          (`transfer/streaming.proto`), in either direction, until
//!          ◀──────────────────────────────▶ data     with the flag "remote closed"
//! ```
//!
//! Who receives says how many bytes may come: a slow reader holds up the writer, as with a fifo. What was sent to a
//! containerd that is killed before it has read it, 128 KiB at most, is lost.
//!
//! Frames are ttrpc's (its PROTOCOL.md): 10 bytes of header (length, stream id, type, flags) and the message. The crate
//! ttrpc does not serve these connections, for it gives each frame to a task of its own, and one may overtake another.
//! Which service a connection is for is seen from its first bytes, without taking them: containerd's client has a
//! connection for each stream.

use crate::sync::lock;
use cloister_protocol::protobuf::Message as _;
use cloister_protocol::ttrpc::proto::{
    FLAG_NO_DATA, FLAG_REMOTE_CLOSED, MESSAGE_HEADER_LENGTH as HEADER, MESSAGE_LENGTH_MAX, MESSAGE_TYPE_DATA,
    MESSAGE_TYPE_REQUEST, MESSAGE_TYPE_RESPONSE, MessageHeader,
};
use cloister_protocol::ttrpc::{self, Code};
use containerd_client::services::v1::StreamInit;
use containerd_client::types::transfer::{Data, WindowUpdate};
use prost::{Message as _, Name};
use prost_types::Any;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::RecvFlags;
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;

const SERVICE: &str = "containerd.services.streaming.v1.Streaming";
/// How a request to [`SERVICE`] begins behind its header: field 1, its length, the name.
const BEGIN: [u8; 2] = [0x0a, 42];
/// Bytes that a sender is allowed at a time, as containerd does.
const WINDOW: u16 = 32 << 10;
/// Most bytes of a stream in one message, as containerd does.
const PIECE: usize = 32 << 10;
/// For the first two messages, which a client sends at once.
const BEGIN_TIME: Duration = Duration::from_secs(10);
/// How long more input may be on its way after CloseIO.
const LAST_INPUT: Duration = Duration::from_secs(1);
/// How long a client that was lost may take to connect again, to be told of the end.
const COMES_AGAIN: Duration = Duration::from_secs(60);
/// Names that may wait at a time, and their length.
const MAX_WAITING: usize = 1024;
const MAX_NAME: usize = 256;

/// Where a pod's streams and the connections for them meet. See the module.
#[derive(Debug, Default)]
pub struct Desk {
    places: Mutex<HashMap<String, Place>>,
}

/// Who waits under a name.
#[derive(Debug)]
enum Place {
    Connection(Connection),
    Stream(oneshot::Sender<Connection>),
}

impl Desk {
    /// Takes a connection in. One that waits under the same name is given up: the client has connected again.
    fn offer(&self, name: String, connection: Connection) -> io::Result<()> {
        let mut places = lock(&self.places);
        // Those whose client has changed its mind.
        places.retain(|_, place| match place {
            Place::Connection(waiting) => !is_over(&waiting.socket),
            Place::Stream(stream) => !stream.is_closed(),
        });
        let connection = match places.remove(&name) {
            Some(Place::Stream(stream)) => match stream.send(connection) {
                Ok(()) => return Ok(()),
                Err(connection) => connection,
            },
            _ => connection,
        };
        if places.len() >= MAX_WAITING {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        places.insert(name, Place::Connection(connection));
        Ok(())
    }

    /// The connection that waits under a name.
    fn take(&self, name: &str) -> Option<Connection> {
        let mut places = lock(&self.places);
        match places.remove(name)? {
            Place::Connection(connection) => Some(connection),
            Place::Stream(_) => None,
        }
    }

    /// The connection under a name, once there is one.
    async fn connection(&self, name: &str) -> Connection {
        loop {
            let expected = {
                let mut places = lock(&self.places);
                match places.remove(name) {
                    Some(Place::Connection(connection)) => return connection,
                    _ => {
                        let (sender, receiver) = oneshot::channel();
                        places.insert(name.to_owned(), Place::Stream(sender));
                        receiver
                    }
                }
            };
            // Otherwise the name is used twice, and this was the first.
            if let Ok(connection) = expected.await {
                return connection;
            }
            tokio::time::sleep(BEGIN_TIME).await;
        }
    }
}

/// The name of the stream in the address of a process's stdio; None if it is not such an address.
pub fn name(address: &str) -> Option<&str> {
    let (place, name) = address.split_once("?streaming_id=")?;
    let is_ours = place.starts_with("ttrpc+unix://") && !name.is_empty() && name.len() <= MAX_NAME;
    is_ours.then_some(name)
}

/// The host's end of a process's stream.
#[derive(Debug)]
pub struct Remote {
    desk: Arc<Desk>,
    name: String,
    connection: Option<Connection>,
}

impl Remote {
    /// The stream of this name.
    pub fn new(desk: &Arc<Desk>, name: &str) -> Self {
        Self {
            desk: Arc::clone(desk),
            name: name.to_owned(),
            connection: None,
        }
    }

    async fn connected(&mut self) -> &mut Connection {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.desk.connection(&self.name).await,
        };
        self.connection.insert(connection)
    }

    /// Sends all of it, through as many connections as it takes.
    pub async fn write_all(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            match self.connected().await.send(bytes).await {
                Ok(sent) => bytes = bytes.get(sent..).unwrap_or_default(),
                Err(error) => self.lost(&error),
            }
        }
    }

    /// What came; never nothing. To be dropped at any time. With `is_last` what is on its way, and None after that.
    pub async fn read(&mut self, is_last: bool) -> Option<Vec<u8>> {
        loop {
            if is_last && self.connection.is_none() {
                return None;
            }
            let came = self.connected().await.receive();
            let came = if is_last {
                tokio::time::timeout(LAST_INPUT, came).await.ok()?
            } else {
                came.await
            };
            match came {
                Ok(Some(bytes)) => return Some(bytes),
                // Another one may come: the end of input is CloseIO's to say.
                Ok(None) => self.connection = None,
                Err(error) => self.lost(&error),
            }
        }
    }

    /// Says that this was all. Of a client that is not there, and comes after a restart, nobody waits for it.
    pub async fn end(mut self) {
        match self.connection.take().or_else(|| self.desk.take(&self.name)) {
            Some(connection) => connection.close().await,
            None => {
                let late = async move { self.desk.connection(&self.name).await.close().await };
                tokio::spawn(tokio::time::timeout(COMES_AGAIN, late));
            }
        }
    }

    fn lost(&mut self, error: &io::Error) {
        log::debug!("stream {}: its connection is lost: {error}", self.name);
        self.connection = None;
    }
}

/// One stream's connection.
#[derive(Debug)]
struct Connection {
    socket: UnixStream,
    /// ttrpc's number of the call.
    call: u32,
    /// What has been read and is not taken.
    read: Vec<u8>,
    /// Bytes that the client allows us.
    allowed: u64,
    /// Bytes that we have allowed the client.
    granted: usize,
}

struct Frame {
    header: MessageHeader,
    message: Vec<u8>,
}

impl Connection {
    fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            call: 0,
            read: Vec::new(),
            allowed: 0,
            granted: 0,
        }
    }

    /// The next frame. To be dropped at any time: what is read of one is kept.
    async fn frame(&mut self) -> io::Result<Frame> {
        loop {
            if let Some(frame) = self.take()? {
                return Ok(frame);
            }
            if self.socket.read_buf(&mut self.read).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    fn take(&mut self) -> io::Result<Option<Frame>> {
        let Some(header) = self.read.first_chunk::<HEADER>().map(MessageHeader::from) else {
            return Ok(None);
        };
        let length = usize::try_from(header.length).unwrap_or(usize::MAX);
        if length > MESSAGE_LENGTH_MAX {
            return Err(invalid("a message of more than 4 MiB"));
        }
        let end = HEADER.saturating_add(length);
        let Some(message) = self.read.get(HEADER..end) else {
            return Ok(None);
        };
        let frame = Frame {
            header,
            message: message.to_vec(),
        };
        self.read.drain(..end);
        Ok(Some(frame))
    }

    async fn write(&mut self, kind: u8, flags: u8, message: &[u8]) -> io::Result<()> {
        let mut frame = Vec::<u8>::from(MessageHeader {
            length: u32::try_from(message.len()).map_err(io::Error::other)?,
            stream_id: self.call,
            type_: kind,
            flags,
        });
        frame.extend(message);
        self.socket.write_all(&frame).await
    }

    /// The next object of the stream; None when the client has closed it.
    async fn object(&mut self) -> io::Result<Option<Any>> {
        let frame = self.frame().await?;
        if frame.header.type_ != MESSAGE_TYPE_DATA || frame.header.stream_id != self.call {
            return Err(invalid("a frame that is not of the stream"));
        }
        if frame.header.flags & FLAG_REMOTE_CLOSED != 0 {
            return Ok(None);
        }
        Any::decode(&*frame.message).map(Some).map_err(io::Error::other)
    }

    async fn put<M: prost::Message + Name>(&mut self, message: &M) -> io::Result<()> {
        let any = Any {
            type_url: M::full_name(),
            value: message.encode_to_vec(),
        };
        self.write(MESSAGE_TYPE_DATA, 0, &any.encode_to_vec()).await
    }

    /// Says that nothing more comes, and waits until the client has read all and closes its side: containerd drops what it has not
    /// read by the time that it hears of a process's end.
    async fn close(mut self) {
        if self
            .write(MESSAGE_TYPE_DATA, FLAG_REMOTE_CLOSED | FLAG_NO_DATA, &[])
            .await
            .is_ok()
        {
            while let Ok(Some(_)) = self.object().await {}
        }
    }

    /// Sends some of the bytes, and says how many.
    async fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        while self.allowed == 0 {
            let object = self.object().await?.ok_or(io::ErrorKind::BrokenPipe)?;
            let update = unpacked::<WindowUpdate>(&object)?;
            self.allowed = u64::try_from(update.update).unwrap_or(0);
        }
        let most = usize::try_from(self.allowed).unwrap_or(PIECE).min(PIECE);
        let piece = bytes.get(..most).unwrap_or(bytes);
        let data = Data { data: piece.to_vec() };
        self.put(&data).await?;
        self.allowed = self
            .allowed
            .saturating_sub(u64::try_from(piece.len()).unwrap_or(u64::MAX));
        Ok(piece.len())
    }

    /// Bytes of the client's; None at their end. To be dropped at any time.
    async fn receive(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            if self.granted < usize::from(WINDOW) {
                // First: if it is sent in part and then given up, which takes a full socket, the stream is over anyway.
                self.granted = self.granted.saturating_add(usize::from(WINDOW));
                let update = WindowUpdate {
                    update: i32::from(WINDOW),
                };
                self.put(&update).await?;
            }
            let Some(object) = self.object().await? else {
                return Ok(None);
            };
            let data = unpacked::<Data>(&object)?.data;
            self.granted = self
                .granted
                .checked_sub(data.len())
                .ok_or_else(|| invalid("more bytes than were allowed"))?;
            if !data.is_empty() {
                return Ok(Some(data));
            }
        }
    }

    /// The first messages: the stream's name.
    async fn begin(&mut self) -> io::Result<String> {
        let frame = self.frame().await?;
        self.call = frame.header.stream_id;
        let request = ttrpc::proto::Request::parse_from_bytes(&frame.message).map_err(io::Error::other)?;
        if frame.header.type_ != MESSAGE_TYPE_REQUEST || request.method != "Stream" {
            let told = format!("{} method", request.method);
            self.refuse(Code::UNIMPLEMENTED, &told).await?;
            return Err(invalid("another method"));
        }
        let first = self.object().await?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let name = unpacked::<StreamInit>(&first)?.id;
        if name.is_empty() || name.len() > MAX_NAME {
            self.refuse(Code::INVALID_ARGUMENT, "the stream's id is empty or too long")
                .await?;
            return Err(invalid("the stream's id"));
        }
        self.put(&()).await?;
        Ok(name)
    }

    async fn refuse(&mut self, code: Code, told: &str) -> io::Result<()> {
        let mut response = ttrpc::proto::Response::new();
        response.set_status(ttrpc::get_status(code, told));
        let response = response.write_to_bytes().map_err(io::Error::other)?;
        self.write(MESSAGE_TYPE_RESPONSE, 0, &response).await
    }
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// What is packed as containerd's typeurl does it, with or without a host before the name.
fn unpacked<M: prost::Message + Name + Default>(any: &Any) -> io::Result<M> {
    if any.type_url.rsplit('/').next() != Some(M::full_name().as_str()) {
        return Err(invalid("an object of another kind"));
    }
    M::decode(&*any.value).map_err(io::Error::other)
}

/// Takes the connections for streams to the desk, and lets the others through, until those are not wanted any more.
pub fn divert(
    listener: UnixListener,
    desk: Arc<Desk>,
) -> impl Stream<Item = io::Result<UnixStream>> + Send + 'static {
    let (others, through) = mpsc::channel(16);
    tokio::spawn(async move {
        let mut new = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((socket, _)) => {
                        new.spawn(sort(socket, others.clone(), Arc::clone(&desk)));
                    }
                    Err(error) => {
                        log::warn!("no connection to a pod's socket can be taken: {error}");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                },
                Some(_) = new.join_next() => {}
                () = others.closed() => break,
            }
        }
    });
    ReceiverStream::new(through)
}

async fn sort(socket: UnixStream, others: mpsc::Sender<io::Result<UnixStream>>, desk: Arc<Desk>) {
    // What does not say in time what it is for, others may have.
    let found = tokio::time::timeout(BEGIN_TIME, is_stream(&socket)).await;
    match found.unwrap_or(Ok(false)) {
        Ok(true) => {
            let mut connection = Connection::new(socket);
            let begun = tokio::time::timeout(BEGIN_TIME, connection.begin()).await;
            let offered = begun
                .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
                .and_then(|name| desk.offer(name, connection));
            if let Err(error) = offered {
                log::debug!("a stream's connection is refused: {error}");
            }
        }
        Ok(false) => {
            let _ = others.send(Ok(socket)).await;
        }
        Err(error) => log::debug!("a connection broke: {error}"),
    }
}

/// Whether the first request, of which nothing is taken, is one to [`SERVICE`].
async fn is_stream(socket: &UnixStream) -> io::Result<bool> {
    let mut first = [0; HEADER + BEGIN.len() + SERVICE.len()];
    loop {
        let peek = || Ok(rustix::net::recv(socket, &mut first, RecvFlags::PEEK)?);
        let (_, count) = socket.async_io(Interest::READABLE, peek).await?;
        if count < first.len()
            && may_become_stream(first.get(..count).unwrap_or_default())
            && !is_over(socket)
        {
            // Clients write a request in one go: this is as good as never.
            tokio::time::sleep(Duration::from_millis(10)).await;
        } else {
            return Ok(count == first.len() && may_become_stream(&first));
        }
    }
}

/// Whether a request that begins so can be one to [`SERVICE`].
fn may_become_stream(begin: &[u8]) -> bool {
    let (length, name) = (begin.first_chunk(), begin.get(HEADER..).unwrap_or_default());
    let least = BEGIN.len().saturating_add(SERVICE.len());
    let is_long_enough = length.is_none_or(|length| {
        usize::try_from(u32::from_be_bytes(*length)).is_ok_and(|length| length >= least)
    });
    let expected = BEGIN.iter().chain(SERVICE.as_bytes());
    is_long_enough && name.iter().zip(expected).all(|(a, b)| a == b)
}

/// Whether the client has left.
fn is_over(socket: &UnixStream) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::RDHUP)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests;
