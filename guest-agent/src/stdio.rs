// SPDX-License-Identifier: Apache-2.0
//! Standard streams of a process: between its pipes (or its terminal) and the host's connections.
//!
//! # Theory of operation
//!
//! Each stream is one task with one buffer of [`BUFFER`] bytes: nothing is queued beyond it, so a host that does not read
//! stops the task, the pipe fills, the process blocks.
//!
//! ```text
//! stdout:  copying ── end of file: all writers closed ─────────────┐
//!             │                                                    ▼
//!             └── finish() after the process is gone ─▶ what the pipe holds ─▶ shut down ─▶ wait for the host to close
//! ```
//!
//! A process may leave children that keep its pipe open. Deleting it waits [`LINGER`] for the end of file as containerd
//! does, and then takes what is in the pipe at that moment and ends the stream.
//!
//! When the host closes a connection early, output is read and thrown away: a process must not die of it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use cloister_protocol::STREAM_PORT;
use cloister_protocol::stream::StreamId;
use rustix::fs::{Mode, OFlags, open};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, Interest};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use crate::error::{Result, invalid_argument, unknown};
use crate::fd::Fd;
use crate::transport::{Conn, Host};

/// Bytes a stream's task holds.
const BUFFER: usize = 32 * 1024;
/// How long Delete waits for the end of the output.
const LINGER: Duration = Duration::from_secs(2);
/// How long stdin must be silent after CloseIO before it is closed: bytes sent before it travel on another connection.
const CLOSE_SILENCE: Duration = Duration::from_millis(100);

/// The streams a request names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Names {
    stdin: Option<StreamId>,
    stdout: Option<StreamId>,
    stderr: Option<StreamId>,
    /// stdin and stdout are a terminal's; there is no stderr.
    pub terminal: bool,
}

impl Names {
    /// Reads the names of a request; empty ones mean /dev/null.
    ///
    /// # Errors
    /// InvalidArgument.
    pub fn parse(stdin: &str, stdout: &str, stderr: &str, terminal: bool) -> Result<Self> {
        let parse = |name: &str| match name {
            "" => Ok(None),
            name => StreamId::from_name(name).map(Some).ok_or_else(|| {
                invalid_argument(format!(
                    "{name:?} is no stream: stream://<32 hex digits> is wanted"
                ))
            }),
        };
        let stderr = if terminal { None } else { parse(stderr)? };
        Ok(Self {
            stdin: parse(stdin)?,
            stdout: parse(stdout)?,
            stderr,
            terminal,
        })
    }

    /// Connects the streams to the host.
    ///
    /// # Errors
    /// Unknown, when the host does not take one.
    pub async fn connect(self, host: &Host) -> Result<Connections> {
        let (stdin, stdout, stderr) = tokio::try_join!(
            connect(host, self.stdin),
            connect(host, self.stdout),
            connect(host, self.stderr)
        )
        .map_err(|e| unknown(format!("the host does not take a stdio stream: {e}")))?;
        Ok(Connections {
            stdin,
            stdout,
            stderr,
        })
    }
}

async fn connect(host: &Host, id: Option<StreamId>) -> io::Result<Option<Conn>> {
    let Some(id) = id else { return Ok(None) };
    let mut conn = host.connect(STREAM_PORT).await?;
    conn.write_all(&id.header()).await?;
    Ok(Some(conn))
}

/// Streams connected to the host.
pub struct Connections {
    stdin: Option<Conn>,
    stdout: Option<Conn>,
    stderr: Option<Conn>,
}

/// The agent's ends of a process's pipes.
pub struct Pipes {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

fn null() -> io::Result<OwnedFd> {
    Ok(open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?)
}

/// stdio of a helper whose container gets a terminal.
///
/// # Errors
/// As of open(2).
pub fn nulls() -> io::Result<[OwnedFd; 3]> {
    Ok([null()?, null()?, null()?])
}

impl Connections {
    /// Makes pipes for the streams there are: the process's ends first, then ours.
    ///
    /// # Errors
    /// As of pipe2(2).
    pub fn pipes(&self) -> io::Result<([OwnedFd; 3], Pipes)> {
        let pair = |wanted: bool| {
            if wanted {
                pipe_with(PipeFlags::CLOEXEC).map(Some)
            } else {
                Ok(None)
            }
        };
        let (stdin_theirs, stdin) = match pair(self.stdin.is_some())? {
            Some((read, write)) => (read, Some(write)),
            None => (null()?, None),
        };
        let output = |wanted: bool| -> io::Result<(OwnedFd, Option<OwnedFd>)> {
            Ok(match pair(wanted)? {
                Some((read, write)) => (write, Some(read)),
                None => (null()?, None),
            })
        };
        let (stdout_theirs, stdout) = output(self.stdout.is_some())?;
        let (stderr_theirs, stderr) = output(self.stderr.is_some())?;
        Ok((
            [stdin_theirs, stdout_theirs, stderr_theirs],
            Pipes {
                stdin,
                stdout,
                stderr,
            },
        ))
    }

    /// Starts copying between the host and pipes.
    ///
    /// # Errors
    /// When a pipe cannot be polled.
    pub fn start(self, pipes: Pipes) -> io::Result<Io> {
        let mut io = Io::new(None);
        if let (Some(conn), Some(pipe)) = (self.stdin, pipes.stdin) {
            io.take_input(conn, Fd::new(pipe, Interest::WRITABLE)?);
        }
        for (conn, pipe) in [(self.stdout, pipes.stdout), (self.stderr, pipes.stderr)] {
            if let (Some(conn), Some(pipe)) = (conn, pipe) {
                io.give_output(conn, Fd::new(pipe, Interest::READABLE)?);
            }
        }
        Ok(io)
    }

    /// Starts copying between the host and the master side of a terminal.
    ///
    /// # Errors
    /// When the terminal cannot be polled.
    pub fn start_terminal(self, master: OwnedFd) -> io::Result<Io> {
        let mut io = Io::new(Some(master.try_clone()?));
        if let Some(conn) = self.stdin {
            io.take_input(conn, Fd::new(master.try_clone()?, Interest::WRITABLE)?);
        }
        let output = Fd::new(master, Interest::READABLE)?;
        match self.stdout {
            Some(conn) => io.give_output(conn, output),
            // Somebody has to read, or the process blocks.
            None => io.outputs.push(tokio::spawn(discard(output))),
        }
        Ok(io)
    }
}

/// The running streams of a process.
pub struct Io {
    master: Option<OwnedFd>,
    input: Option<JoinHandle<()>>,
    close_input: Arc<Notify>,
    outputs: Vec<JoinHandle<()>>,
    finish: watch::Sender<bool>,
}

impl Io {
    fn new(master: Option<OwnedFd>) -> Self {
        let (finish, _) = watch::channel(false);
        Self {
            master,
            input: None,
            close_input: Arc::default(),
            outputs: Vec::new(),
            finish,
        }
    }

    fn take_input(&mut self, from: Conn, to: Fd) {
        self.input = Some(tokio::spawn(copy_input(from, to, Arc::clone(&self.close_input))));
    }

    fn give_output(&mut self, to: Conn, from: Fd) {
        self.outputs
            .push(tokio::spawn(copy_output(from, to, self.finish.subscribe())));
    }

    /// CloseIO: no more input will come.
    pub fn close_input(&self) {
        self.close_input.notify_one();
    }

    /// Sets the size of the terminal, in characters. Without a terminal nothing happens.
    ///
    /// # Errors
    /// As of TIOCSWINSZ.
    pub fn resize(&self, width: u16, height: u16) -> io::Result<()> {
        if let Some(master) = &self.master {
            tcsetwinsize(
                master,
                Winsize {
                    ws_row: height,
                    ws_col: width,
                    ws_xpixel: 0,
                    ws_ypixel: 0,
                },
            )?;
        }
        Ok(())
    }

    /// The process is dead: nobody reads its input.
    pub fn process_gone(&mut self) {
        if let Some(input) = self.input.take() {
            input.abort();
        }
    }

    /// Waits for the end of the output, not longer than [`LINGER`]; then ends it with what is there. The last bytes may
    /// still be on their way to a slow host when this returns: the tasks go on until the host has them.
    pub async fn finish(mut self) {
        self.process_gone();
        let finish = self.finish;
        let all = async {
            for output in &mut self.outputs {
                // A task that was cancelled has ended as well.
                let _ = output.await;
            }
        };
        if tokio::time::timeout(LINGER, all).await.is_err() {
            finish.send_replace(true);
        }
    }
}

async fn copy_input(mut from: Conn, mut to: Fd, close: Arc<Notify>) {
    let mut buffer = vec![0; BUFFER];
    let mut closing = false;
    loop {
        let got = tokio::select! {
            biased;
            got = from.read(&mut buffer) => got,
            () = close.notified(), if !closing => {
                closing = true;
                continue;
            }
            () = tokio::time::sleep(CLOSE_SILENCE), if closing => break,
        };
        match got {
            Ok(0) | Err(_) => break,
            Ok(n) => {
                if to.write_all(&buffer[..n]).await.is_err() {
                    break;
                }
            }
        }
    }
}

async fn copy_output(mut from: Fd, mut to: Conn, mut finish: watch::Receiver<bool>) {
    let mut buffer = vec![0; BUFFER];
    // Bytes to take yet, once told to finish.
    let mut left: Option<usize> = None;
    while left != Some(0) {
        let room = left.unwrap_or(BUFFER).min(BUFFER);
        let got = tokio::select! {
            biased;
            got = from.read(&mut buffer[..room]) => got,
            // The sender dropped counts as told.
            _ = finish.wait_for(|told| *told), if left.is_none() => {
                left = Some(from.waiting());
                continue;
            }
        };
        let n = match got {
            Ok(0) | Err(_) => break,
            Ok(n) => n,
        };
        left = left.map(|left| left - n);
        if to.write_all(&buffer[..n]).await.is_err() {
            discard(from).await;
            return;
        }
    }
    drop(from);
    if to.shutdown().await.is_ok() {
        // Hold the connection until the host has read all and closes: a close of ours may turn into a reset, and
        // that may overtake bytes the host has buffered.
        while !matches!(to.read(&mut buffer[..64]).await, Ok(0) | Err(_)) {}
    }
}

async fn discard(mut from: impl AsyncRead + Unpin) {
    let mut buffer = vec![0; 4096];
    while !matches!(from.read(&mut buffer).await, Ok(0) | Err(_)) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "stream://00112233445566778899aabbccddeeff";

    #[test]
    fn names_are_checked() {
        let names = Names::parse(ID, "", ID, false).unwrap();
        assert!(names.stdin.is_some() && names.stdout.is_none() && names.stderr.is_some());
        assert!(Names::parse("", "/run/fifo", "", false).is_err());
    }

    #[test]
    fn a_terminal_has_no_stderr() {
        assert_eq!(Names::parse(ID, ID, ID, true).unwrap().stderr, None);
        assert_eq!(Names::parse("", "", "nonsense", true).unwrap().stderr, None);
    }
}
