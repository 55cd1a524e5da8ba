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
//!
//! While a container is paused its streams are held: no byte is taken from a pipe, none given to a connection. So the VM
//! can be copied then: what a stream has given away has reached the host before the answer to Pause, and what it has not
//! is in the copy. There ([`Io::renew`]) each stream dials its host under its old name before it goes on; one that is
//! not known there is treated as closed.

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

/// What the streams of a process are told.
#[derive(Clone, Copy, Debug, Default)]
struct Told {
    /// The process is gone: end with what is there.
    finish: bool,
    /// Stand still.
    held: bool,
    /// How often the host has become another one.
    hosts: u32,
}

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

async fn connect(host: &Host, id: Option<StreamId>) -> io::Result<Option<Line>> {
    match id {
        Some(id) => Line::dial(host.clone(), id).await.map(Some),
        None => Ok(None),
    }
}

/// A stream's connection, and how it was made.
struct Line {
    conn: Conn,
    host: Host,
    id: StreamId,
}

impl Line {
    async fn dial(host: Host, id: StreamId) -> io::Result<Self> {
        let mut conn = host.connect(STREAM_PORT).await?;
        conn.write_all(&id.header()).await?;
        Ok(Self { conn, host, id })
    }
}

/// What a stream hears of its process.
struct Hearing {
    told: watch::Receiver<Told>,
    /// The host that its connection goes to.
    host: u32,
    /// Nothing more will be said.
    ended: bool,
}

impl Hearing {
    fn new(told: &watch::Sender<Told>) -> Self {
        let told = told.subscribe();
        let host = told.borrow().hosts;
        Self {
            told,
            host,
            ended: false,
        }
    }

    /// Waits until the stream may go on, over a new connection if the host is another one.
    async fn may_go_on(&mut self, line: &mut Line) -> io::Result<()> {
        // The sender dropped is the end of the process.
        let _ = self.told.wait_for(|told| !told.held).await;
        let hosts = self.told.borrow_and_update().hosts;
        if hosts != self.host {
            self.host = hosts;
            *line = Line::dial(line.host.clone(), line.id).await?;
        }
        Ok(())
    }

    /// Something has been said, or nothing more will be; the latter once.
    async fn changed(&mut self) {
        if self.ended {
            std::future::pending::<()>().await;
        }
        self.ended = self.told.changed().await.is_err();
    }

    fn is_finishing(&self) -> bool {
        self.ended || self.told.borrow().finish
    }
}

/// Streams connected to the host.
pub struct Connections {
    stdin: Option<Line>,
    stdout: Option<Line>,
    stderr: Option<Line>,
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
    told: watch::Sender<Told>,
}

impl Io {
    fn new(master: Option<OwnedFd>) -> Self {
        Self {
            master,
            input: None,
            close_input: Arc::default(),
            outputs: Vec::new(),
            told: watch::Sender::default(),
        }
    }

    fn take_input(&mut self, from: Line, to: Fd) {
        let hearing = Hearing::new(&self.told);
        let close = Arc::clone(&self.close_input);
        self.input = Some(tokio::spawn(copy_input(from, to, close, hearing)));
    }

    fn give_output(&mut self, to: Line, from: Fd) {
        let hearing = Hearing::new(&self.told);
        self.outputs.push(tokio::spawn(copy_output(from, to, hearing)));
    }

    /// Has the streams stand still, or go on.
    pub fn hold(&self, held: bool) {
        self.told.send_modify(|told| told.held = held);
    }

    /// The host is another one from now on.
    pub fn renew(&self) {
        self.told
            .send_modify(|told| told.hosts = told.hosts.wrapping_add(1));
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
        let all = async {
            for output in &mut self.outputs {
                // A task that was cancelled has ended as well.
                let _ = output.await;
            }
        };
        if tokio::time::timeout(LINGER, all).await.is_err() {
            self.told.send_modify(|told| told.finish = true);
        }
    }
}

async fn copy_input(mut from: Line, mut to: Fd, close: Arc<Notify>, mut hearing: Hearing) {
    let mut buffer = vec![0; BUFFER];
    // A connection that breaks is no end of input: a copy of the VM gets another one.
    let (mut closing, mut broken) = (false, false);
    loop {
        let got = tokio::select! {
            biased;
            () = hearing.changed() => {
                broken = hearing.may_go_on(&mut from).await.is_err();
                continue;
            }
            got = from.conn.read(&mut buffer), if !broken => got,
            () = close.notified(), if !closing => {
                closing = true;
                continue;
            }
            () = tokio::time::sleep(CLOSE_SILENCE), if closing => break,
        };
        match got {
            Ok(0) => break,
            Err(_) => broken = true,
            Ok(n) => {
                if to.write_all(&buffer[..n]).await.is_err() {
                    break;
                }
            }
        }
    }
}

async fn copy_output(mut from: Fd, mut to: Line, mut hearing: Hearing) {
    if give_all(&mut from, &mut to, &mut hearing).await.is_err() {
        discard(from).await;
        return;
    }
    drop(from);
    if to.conn.shutdown().await.is_ok() {
        // Hold the connection until the host has read all and closes: a close of ours may turn into a reset, and
        // that may overtake bytes the host has buffered.
        while !matches!(to.conn.read(&mut [0; 64]).await, Ok(0) | Err(_)) {}
    }
}

/// Copies to the end of the output; an error when the host takes no more.
async fn give_all(from: &mut Fd, to: &mut Line, hearing: &mut Hearing) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    // Bytes to take yet, once told to finish.
    let mut left: Option<usize> = None;
    while left != Some(0) {
        if left.is_none() && hearing.is_finishing() {
            left = Some(from.waiting());
            continue;
        }
        let room = left.unwrap_or(BUFFER).min(BUFFER);
        let got = tokio::select! {
            biased;
            () = hearing.changed() => {
                hearing.may_go_on(to).await?;
                continue;
            }
            got = from.read(&mut buffer[..room]) => got,
        };
        let n = match got {
            Ok(0) | Err(_) => break,
            Ok(n) => n,
        };
        left = left.map(|left| left - n);
        let mut rest = &buffer[..n];
        while !rest.is_empty() {
            tokio::select! {
                biased;
                () = hearing.changed() => hearing.may_go_on(to).await?,
                written = to.conn.write(rest) => match written? {
                    0 => return Err(io::ErrorKind::WriteZero.into()),
                    n => rest = &rest[n..],
                },
            }
        }
    }
    Ok(())
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
