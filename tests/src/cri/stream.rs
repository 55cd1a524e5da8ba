// SPDX-License-Identifier: Apache-2.0
//! The streams of exec, attach and port-forward: a websocket whose messages begin with the number of a channel.
//!
//! ```text
//!   exec, attach                           port-forward, of the first port
//!   0  stdin                               0  its bytes, both ways
//!   1  stdout                              1  what went wrong, in words
//!   2  stderr                              each begins with the port's number, little-endian
//!   3  how it ended, a JSON Status
//!   4  window size, JSON
//! ```
//!
//! containerd 2.1 speaks version 4 of the protocol, in which a client ends its stdin only by hanging up.

use super::{Outcome, PATIENCE, Pod, api, ensure};
use futures_util::{SinkExt, StreamExt};
use serde::Serialize;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
const RESIZE: u8 = 4;
const PROTOCOL: HeaderValue = HeaderValue::from_static("v4.channel.k8s.io");

/// The streams of a process.
#[derive(Debug)]
pub struct Stream {
    channels: Channels,
    said: Streamed,
}

/// What came through the streams of a process.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Streamed {
    /// stdout, or all that a terminal shows.
    pub stdout: String,
    /// stderr.
    pub stderr: String,
    /// How it ended: `Success`, or the exit code.
    pub end: String,
}

#[derive(Debug)]
struct Channels(WebSocketStream<TcpStream>);

impl Channels {
    async fn open(url: &str) -> Outcome<Self> {
        let url = url.replacen("http://", "ws://", 1);
        let mut request = url.as_str().into_client_request()?;
        request.headers_mut().insert("sec-websocket-protocol", PROTOCOL);
        let address = request
            .uri()
            .authority()
            .ok_or("a URL without a host")?
            .to_string();
        let socket = TcpStream::connect(address).await?;
        let (socket, _) = tokio_tungstenite::client_async(request, socket).await?;
        Ok(Self(socket))
    }

    async fn send(&mut self, channel: u8, bytes: &[u8]) -> Outcome {
        let message = [&[channel], bytes].concat();
        Ok(self.0.send(Message::binary(message)).await?)
    }

    /// The next message; none at the end.
    async fn next(&mut self) -> Outcome<Option<(u8, Vec<u8>)>> {
        loop {
            let next = tokio::time::timeout(PATIENCE, self.0.next());
            let next = next.await.map_err(|_| "nothing comes through a stream")?;
            match next {
                Some(Ok(Message::Binary(bytes))) => {
                    let (&channel, text) = bytes.split_first().ok_or("an empty message")?;
                    return Ok(Some((channel, text.to_vec())));
                }
                Some(Ok(Message::Close(_))) | None => return Ok(None),
                // It need not say good-bye.
                Some(Err(_)) => return Ok(None),
                Some(Ok(_)) => {}
            }
        }
    }
}

impl Stream {
    pub(super) async fn open(url: &str) -> Outcome<Self> {
        Ok(Self {
            channels: Channels::open(url).await?,
            said: Streamed::default(),
        })
    }

    /// To its stdin.
    pub async fn send(&mut self, text: &str) -> Outcome {
        self.channels.send(STDIN, text.as_bytes()).await
    }

    /// Changes the size of its terminal.
    pub async fn resize(&mut self, columns: u16, rows: u16) -> Outcome {
        let size = format!(r#"{{"Width":{columns},"Height":{rows}}}"#);
        self.channels.send(RESIZE, size.as_bytes()).await
    }

    async fn step(&mut self) -> Outcome<bool> {
        let Some((channel, bytes)) = self.channels.next().await? else {
            return Ok(false);
        };
        let text = String::from_utf8_lossy(&bytes);
        match channel {
            STDOUT => self.said.stdout.push_str(&text),
            STDERR => self.said.stderr.push_str(&text),
            STATUS => self.said.end.push_str(&text),
            _ => return Err(format!("a message of channel {channel}: {text:?}").into()),
        }
        Ok(true)
    }

    /// Reads until its stdout has this in it, and answers all of it.
    pub async fn until(&mut self, text: &str) -> Outcome<&str> {
        while !self.said.stdout.contains(text) {
            let more = self.step().await?;
            ensure(
                more,
                format_args!("the end came before {text:?}: {:?}", self.said),
            )?;
        }
        Ok(&self.said.stdout)
    }

    /// Reads to the end.
    pub async fn end(mut self) -> Outcome<Streamed> {
        while self.step().await? {}
        if !self.said.end.is_empty() {
            let status: Value = serde_json::from_str(&self.said.end)?;
            let code = status["details"]["causes"][0]["message"].as_str();
            let end = code.or(status["status"].as_str());
            self.said.end = end.ok_or("a status without an end")?.to_owned();
        }
        Ok(self.said)
    }
}

/// A connection to a port of a pod.
#[derive(Debug)]
pub struct PortForward {
    channels: Channels,
    port: u16,
}

impl PortForward {
    const DATA: u8 = 0;
    const ERROR: u8 = 1;

    /// Opens one.
    pub async fn open(pod: &Pod, port: u16) -> Outcome<Self> {
        let request = api::PortForwardRequest {
            pod_sandbox_id: pod.id.clone(),
            port: vec![port.into()],
        };
        let answer = pod.runtime.cri().port_forward(request).await?.into_inner();
        let url = format!("{}?port={port}", answer.url);
        Ok(Self {
            channels: Channels::open(&url).await?,
            port,
        })
    }

    /// To the port.
    pub async fn send(&mut self, bytes: &[u8]) -> Outcome {
        self.channels.send(Self::DATA, bytes).await
    }

    /// Reads so many bytes, or to the end: what came, and what went wrong.
    pub async fn read(&mut self, limit: usize) -> Outcome<(Vec<u8>, String)> {
        let (mut data, mut error) = (Vec::new(), Vec::new());
        let mut begun = [false; 2];
        while data.len() < limit && error.is_empty() {
            let Some((channel, mut bytes)) = self.channels.next().await? else {
                break;
            };
            let begun = begun.get_mut(usize::from(channel)).ok_or("an unknown channel")?;
            if !std::mem::replace(begun, true) && bytes.starts_with(&self.port.to_le_bytes()) {
                bytes.drain(..2);
            }
            match channel {
                Self::ERROR => error.extend(bytes),
                _ => data.extend(bytes),
            }
        }
        Ok((data, String::from_utf8_lossy(&error).into_owned()))
    }
}
