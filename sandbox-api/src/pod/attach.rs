// SPDX-License-Identifier: Apache-2.0
//! A terminal on a running container's streams, from another process.
//!
//! The hosting process listens on `attach.sock` in the pod's folder. What a client sends is input, if the container was
//! made with `-i`; the end of it ends nothing. What the container prints from then on comes in frames, and how it ended in
//! the last one:
//!
//! ```text
//! kind (1 byte)   length (4 bytes, big endian)   content
//! 1               n                              stdout
//! 2               n                              stderr
//! 3               4 + n                          exit status (4 bytes, big endian), why it was lost (UTF-8)
//! ```
//!
//! A client that does not read holds up the container, as its terminal would.

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex, mpsc, watch};
use tokio::task::JoinHandle;

use crate::files;

/// Largest content of a frame.
const MAX_CONTENT: usize = 64 << 10;
/// Pieces of input on their way.
const INPUT_QUEUE: usize = 4;

/// The name of the socket.
pub const SOCKET: &str = "attach.sock";

/// What comes from the hosting process.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame {
    /// stdout.
    Output(Vec<u8>),
    /// stderr.
    Error(Vec<u8>),
    /// The end.
    End {
        /// Exit status.
        status: u32,
        /// Empty if it ended by itself.
        message: String,
    },
}

impl Frame {
    /// Reads a frame; None at a proper end of the stream.
    ///
    /// # Errors
    /// The connection, or what comes is no frame.
    pub fn read(from: &mut impl Read) -> io::Result<Option<Self>> {
        let mut kind = [0];
        loop {
            match from.read(&mut kind) {
                Ok(0) => return Ok(None),
                Ok(_) => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        let mut length = [0; 4];
        from.read_exact(&mut length)?;
        let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
        if length > MAX_CONTENT {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut content = vec![0; length];
        from.read_exact(&mut content)?;
        match kind {
            [1] => Ok(Some(Self::Output(content))),
            [2] => Ok(Some(Self::Error(content))),
            [3] => {
                let (status, message) = content.split_first_chunk().ok_or(io::ErrorKind::InvalidData)?;
                Ok(Some(Self::End {
                    status: u32::from_be_bytes(*status),
                    message: String::from_utf8_lossy(message).into_owned(),
                }))
            }
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

fn frame(kind: u8, content: &[u8]) -> Vec<u8> {
    let content = content.get(..MAX_CONTENT).unwrap_or(content);
    let mut frame = vec![kind];
    frame.extend(u32::try_from(content.len()).unwrap_or(0).to_be_bytes());
    frame.extend_from_slice(content);
    frame
}

/// The clients of one container.
#[derive(Debug, Default)]
pub struct Clients(Mutex<Vec<OwnedWriteHalf>>);

impl Clients {
    /// Sends output to all; `stream` is "stdout" or "stderr".
    pub async fn output(&self, stream: &str, bytes: &[u8]) {
        let mut clients = self.0.lock().await;
        if clients.is_empty() {
            return;
        }
        for piece in bytes.chunks(MAX_CONTENT) {
            send(
                &mut clients,
                &frame(if stream == "stderr" { 2 } else { 1 }, piece),
            )
            .await;
        }
    }

    /// Tells all how it ended, and lets them go.
    pub async fn end(&self, status: u32, message: &str) {
        let mut clients = self.0.lock().await;
        let content = [&status.to_be_bytes()[..], message.as_bytes()].concat();
        send(&mut clients, &frame(3, &content)).await;
        clients.clear();
    }
}

async fn send(clients: &mut Vec<OwnedWriteHalf>, frame: &[u8]) {
    let mut kept = Vec::with_capacity(clients.len());
    for mut client in clients.drain(..) {
        // One that went away is no loss to the container.
        if client.write_all(frame).await.is_ok() {
            kept.push(client);
        }
    }
    *clients = kept;
}

/// Serves `attach.sock`. Dropped, the socket is gone.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    /// The clients there are.
    pub clients: Arc<Clients>,
    /// Input of theirs, for a container with `-i`.
    pub input: Option<mpsc::Receiver<Vec<u8>>>,
    /// Turns true when the first has come.
    pub attached: watch::Receiver<bool>,
    accepting: JoinHandle<()>,
}

impl Server {
    /// Listens. To be called in a runtime.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn start(path: &Path, interactive: bool) -> io::Result<Self> {
        let listener = UnixListener::from_std(files::listen(path)?)?;
        let clients = Arc::new(Clients::default());
        let (sender, receiver) = mpsc::channel(INPUT_QUEUE);
        let (tell, attached) = watch::channel(false);
        let input = interactive.then_some(receiver);
        let accepting = tokio::spawn({
            let clients = Arc::clone(&clients);
            async move {
                loop {
                    match listener.accept().await {
                        Ok((stream, _)) => {
                            let (read, write) = stream.into_split();
                            clients.0.lock().await.push(write);
                            tokio::spawn(take_input(read, sender.clone()));
                            tell.send_replace(true);
                        }
                        Err(error) => {
                            log::warn!("attach: {error}");
                            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                        }
                    }
                }
            }
        });
        Ok(Self {
            path: path.to_owned(),
            clients,
            input,
            attached,
            accepting,
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.accepting.abort();
        let _ = std::fs::remove_file(&self.path);
    }
}

async fn take_input(mut from: OwnedReadHalf, to: mpsc::Sender<Vec<u8>>) {
    let mut buffer = vec![0; 4 << 10];
    loop {
        match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(n) => {
                let piece = buffer.get(..n).unwrap_or_default().to_vec();
                if to.send(piece).await.is_err() {
                    // Without `-i` it goes nowhere, as with docker.
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    #[test]
    fn clients_see_output_and_the_end() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let path = std::env::temp_dir().join(format!("cloister-attach-{}", crate::ids::random_hex(6)));
        let mut server = runtime.block_on(async { Server::start(&path, true) }).unwrap();
        // Nobody listens yet.
        runtime.block_on(server.clients.output("stdout", b"lost"));
        let mut one = UnixStream::connect(&path).unwrap();
        let gone = UnixStream::connect(&path).unwrap();
        one.write_all(b"typed").unwrap();
        runtime.block_on(async {
            assert_eq!(server.input.as_mut().unwrap().recv().await.unwrap(), b"typed");
            server.attached.wait_for(|attached| *attached).await.unwrap();
            while server.clients.0.lock().await.len() < 2 {
                tokio::task::yield_now().await;
            }
        });
        drop(gone);
        let long = vec![b'x'; MAX_CONTENT + 1];
        let clients = Arc::clone(&server.clients);
        let sending = runtime.spawn({
            let long = long.clone();
            async move {
                clients.output("stdout", &long).await;
                clients.output("stderr", b"oops").await;
                clients.end(7, "why").await;
            }
        });
        let mut read = || Frame::read(&mut one).unwrap();
        assert_eq!(read(), Some(Frame::Output(long[..MAX_CONTENT].to_vec())));
        assert_eq!(read(), Some(Frame::Output(b"x".to_vec())));
        assert_eq!(read(), Some(Frame::Error(b"oops".to_vec())));
        let message = "why".to_owned();
        assert_eq!(read(), Some(Frame::End { status: 7, message }));
        runtime.block_on(sending).unwrap();
        drop(server);
        assert!(!path.exists());
    }

    #[test]
    fn what_is_no_frame() {
        for wrong in [
            &b"\x04\0\0\0\0"[..],
            b"\x03\0\0\0\x03abc",
            b"\x01\xff\0\0\0",
            b"\x01\0\0\0\x02a",
        ] {
            assert!(Frame::read(&mut &wrong[..]).is_err(), "{wrong:?}");
        }
        assert_eq!(Frame::read(&mut &b""[..]).unwrap(), None);
    }
}
