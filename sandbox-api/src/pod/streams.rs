// SPDX-License-Identifier: Apache-2.0
//! The host's ends of the processes' stdio streams.
//!
//! The agent dials [`STREAM_PORT`](cloister_protocol::STREAM_PORT) once per stream and says its id in one line. An id
//! that nobody registered, or a line that does not come, closes the connection: the guest gains nothing by guessing 128
//! random bits, and unknown connections are few and short-lived.
//!
//! Bytes are copied through one fixed buffer per stream. A slow reader on the host stops the copying, hence vsock's
//! credit, hence the writer in the guest.

use super::attach::Clients;
use super::log::{Lines, Writer};
use super::streaming::{self, Desk, Remote};
use cloister_devices::rate_limit::RateLimit;
use cloister_protocol::stream::{HEADER_LEN, StreamId};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinHandle;

const BUFFER: usize = 32 << 10;
/// Time for the header line, which the agent sends at once.
const HEADER_TIME: Duration = Duration::from_secs(10);
/// Connections that may be without a header at a time.
const MAX_UNKNOWN: usize = 64;
/// How often a full fifo is looked at, whether its reader has removed it.
const FIFO_LOOK: Duration = Duration::from_secs(1);

/// Registered ids, waiting for their connection.
#[derive(Debug)]
pub struct Hub {
    desk: Arc<Desk>,
    waiting: Mutex<HashMap<StreamId, oneshot::Sender<UnixStream>>>,
    unknown: Arc<Semaphore>,
}

/// A registered stream. Dropped, the id is void.
#[derive(Debug)]
pub struct Expected {
    hub: Arc<Hub>,
    id: StreamId,
    connection: oneshot::Receiver<UnixStream>,
}

impl Hub {
    /// An empty hub.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            desk: Arc::default(),
            waiting: Mutex::default(),
            unknown: Arc::new(Semaphore::new(MAX_UNKNOWN)),
        })
    }

    /// Where containerd's connections for streams wait.
    pub fn desk(&self) -> &Arc<Desk> {
        &self.desk
    }

    /// Makes an id and waits for it.
    pub fn expect(self: &Arc<Self>) -> Expected {
        let mut bytes = [0; 16];
        crate::ids::fill(&mut bytes);
        self.expect_again(StreamId::from_random(bytes))
    }

    /// Waits for an id that a copied VM knows from where it was copied.
    fn expect_again(self: &Arc<Self>, id: StreamId) -> Expected {
        let (sender, connection) = oneshot::channel();
        self.lock().insert(id, sender);
        Expected {
            hub: Arc::clone(self),
            id,
            connection,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<StreamId, oneshot::Sender<UnixStream>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a connection of the guest. Returns at once.
    pub fn accepted(self: &Arc<Self>, stream: StdStream) {
        let Ok(permit) = Arc::clone(&self.unknown).try_acquire_owned() else {
            log::debug!("too many stream connections without a header");
            return;
        };
        let hub = Arc::clone(self);
        tokio::spawn(async move {
            let _permit = permit;
            if let Err(error) = hub.hand_over(stream).await {
                log::debug!("stream connection refused: {error}");
            }
        });
    }

    async fn hand_over(&self, stream: StdStream) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        let mut stream = UnixStream::from_std(stream)?;
        let mut header = [0; HEADER_LEN];
        tokio::time::timeout(HEADER_TIME, stream.read_exact(&mut header)).await??;
        let id = StreamId::from_header(&header).ok_or(io::ErrorKind::InvalidData)?;
        let sender = self.lock().remove(&id).ok_or(io::ErrorKind::NotFound)?;
        sender
            .send(stream)
            .map_err(|_| io::ErrorKind::NotConnected.into())
    }
}

impl Expected {
    /// What to write into the request to the agent.
    pub fn name(&self) -> String {
        self.id.name()
    }

    /// The connection; an error once the hub is gone.
    async fn connection(mut self) -> Option<UnixStream> {
        (&mut self.connection).await.ok()
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        self.hub.lock().remove(&self.id);
    }
}

/// Where a process's output goes.
pub enum Output {
    /// Nowhere: the process gets /dev/null.
    Null,
    /// A fifo, as containerd makes them.
    Fifo(PathBuf),
    /// containerd's Streaming service, under this name.
    Stream(String),
    /// The container's log and perhaps a descriptor of the hosting process.
    Logged {
        /// The log, shared by stdout and stderr.
        log: Arc<Mutex<Writer>>,
        /// "stdout" or "stderr".
        stream: &'static str,
        /// Where the user sees it, too.
        copy: Option<OwnedFd>,
        /// And all who attach.
        clients: Arc<Clients>,
    },
}

/// Where a process's input comes from.
pub enum Input {
    /// Nowhere: the process gets /dev/null.
    Null,
    /// A fifo, as containerd makes them. CloseIO ends it.
    Fifo(PathBuf),
    /// containerd's Streaming service, under this name. CloseIO ends it.
    Stream(String),
    /// A descriptor of the hosting process; its end of file is the stream's.
    Descriptor(OwnedFd),
    /// Whoever attaches. The stream ends with the last sender.
    Channel(mpsc::Receiver<Vec<u8>>),
}

/// The three streams of a process.
pub struct Stdio {
    /// Input.
    pub stdin: Input,
    /// Output.
    pub stdout: Output,
    /// Errors; unused with a terminal.
    pub stderr: Output,
    /// The names as the client gave them, for State.
    pub names: [String; 3],
}

impl Stdio {
    /// The fifos or streams that a client of the Task service names.
    pub fn from_request(stdin: &str, stdout: &str, stderr: &str) -> io::Result<Self> {
        let stream = |name: &str| streaming::name(name).map(str::to_owned);
        let path = |name: &str| -> io::Result<Option<PathBuf>> {
            let path = name
                .strip_prefix("fifo://")
                .or_else(|| name.strip_prefix("file://"))
                .unwrap_or(name);
            match path {
                "" => Ok(None),
                path if path.starts_with('/') => Ok(Some(PathBuf::from(path))),
                other => Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!(
                        "stdio {other:?} is neither a fifo's path nor ttrpc+unix://SOCKET?streaming_id=NAME"
                    ),
                )),
            }
        };
        let output = |name: &str| -> io::Result<Output> {
            Ok(match stream(name) {
                Some(stream) => Output::Stream(stream),
                None => path(name)?.map_or(Output::Null, Output::Fifo),
            })
        };
        Ok(Self {
            stdin: match stream(stdin) {
                Some(stream) => Input::Stream(stream),
                None => path(stdin)?.map_or(Input::Null, Input::Fifo),
            },
            stdout: output(stdout)?,
            stderr: output(stderr)?,
            names: [stdin.to_owned(), stdout.to_owned(), stderr.to_owned()],
        })
    }
}

/// The running copies of one process's streams.
#[derive(Debug)]
pub struct Pumps {
    outputs: Vec<JoinHandle<()>>,
    input: Option<JoinHandle<()>>,
    /// Turns true when input ends by CloseIO.
    close_input: watch::Sender<bool>,
    /// Turns true when the process is gone and the agent will not connect any more.
    give_up: watch::Sender<bool>,
}

impl Pumps {
    /// Registers the streams, opens the fifos and answers what the agent is to be told for stdin, stdout, stderr.
    ///
    /// # Errors
    /// A fifo cannot be opened.
    pub fn start(hub: &Arc<Hub>, stdio: Stdio, terminal: bool) -> io::Result<(Self, [String; 3])> {
        Self::begin(hub, stdio, terminal, |_| Some(hub.expect()))
    }

    /// The same for a process that has its streams already, under these names. What it has none for is left out.
    ///
    /// # Errors
    /// A fifo cannot be opened.
    pub fn resume(hub: &Arc<Hub>, stdio: Stdio, terminal: bool, names: &[String; 3]) -> io::Result<Self> {
        let known = |at: usize| names.get(at).and_then(|name| StreamId::from_name(name));
        let expect = |at| known(at).map(|id| hub.expect_again(id));
        Self::begin(hub, stdio, terminal, expect).map(|(pumps, _)| pumps)
    }

    /// `expect` answers for stdin, stdout, stderr by their numbers.
    fn begin(
        hub: &Hub,
        stdio: Stdio,
        terminal: bool,
        expect: impl Fn(usize) -> Option<Expected>,
    ) -> io::Result<(Self, [String; 3])> {
        let (close_input, _) = watch::channel(false);
        let (give_up, _) = watch::channel(false);
        let mut names = [String::new(), String::new(), String::new()];
        let mut pumps = Self {
            outputs: Vec::new(),
            input: None,
            close_input,
            give_up,
        };
        let stderr = if terminal { Output::Null } else { stdio.stderr };
        for (output, name) in [stdio.stdout, stderr].into_iter().zip([1, 2]) {
            let sink = match output {
                Output::Null => continue,
                // Read-write: opening never waits for the reader, and a reader that restarts breaks nothing.
                Output::Fifo(path) => Sink::Fifo(Fifo::open(&path)?),
                Output::Stream(name) => Sink::Stream(Remote::new(&hub.desk, &name)),
                Output::Logged {
                    log,
                    stream,
                    copy,
                    clients,
                } => Sink::Logged {
                    log,
                    stream,
                    clients,
                    lines: Lines::default(),
                    complaints: RateLimit::new(),
                    copy: copy.map(|fd| tokio::fs::File::from_std(fd.into())),
                },
            };
            let Some(expected) = expect(name) else { continue };
            names[name] = expected.name();
            pumps.outputs.push(tokio::spawn(pump_output(
                expected,
                sink,
                pumps.give_up.subscribe(),
            )));
        }
        let source = match stdio.stdin {
            Input::Null => None,
            Input::Fifo(path) => Some(open_input_fifo(&path)?),
            Input::Stream(name) => Some(Source::Stream(Remote::new(&hub.desk, &name))),
            Input::Descriptor(fd) => Some(Source::Descriptor(fd)),
            Input::Channel(receiver) => Some(Source::Channel(receiver)),
        };
        if let Some(source) = source
            && let Some(expected) = expect(0)
        {
            names[0] = expected.name();
            let close = pumps.close_input.subscribe();
            pumps.input = Some(tokio::spawn(pump_input(
                expected,
                source,
                close,
                pumps.give_up.subscribe(),
            )));
        }
        Ok((pumps, names))
    }

    /// Ends the input once what the client has written is through.
    pub fn close_input(&self) {
        self.close_input.send_replace(true);
    }

    /// Waits until all output has arrived. To be called after the process has ended: `patience` bounds the wait for an
    /// agent that died with its streams open.
    pub async fn finish(mut self, patience: Duration) {
        if let Some(input) = self.input.take() {
            input.abort();
        }
        // Streams the agent never connected have nothing to say; connected ones end by themselves.
        self.give_up.send_replace(true);
        let outputs = std::mem::take(&mut self.outputs);
        let aborts: Vec<_> = outputs.iter().map(JoinHandle::abort_handle).collect();
        let all = async {
            for output in outputs {
                let _ = output.await;
            }
        };
        if tokio::time::timeout(patience, all).await.is_err() {
            log::debug!("a stream did not end with its process");
            aborts.iter().for_each(tokio::task::AbortHandle::abort);
        }
    }
}

impl Drop for Pumps {
    fn drop(&mut self) {
        for task in self.outputs.iter().chain(&self.input) {
            task.abort();
        }
    }
}

/// A fifo for output. Its reader may come and go while it has a name. Once it has none, nobody can come any more: it is
/// over with the last reader.
struct Fifo {
    sender: pipe::Sender,
    /// The sender reads, too.
    both_ends: bool,
}

impl Fifo {
    fn open(path: &Path) -> io::Result<Self> {
        let sender = pipe::OpenOptions::new().read_write(true).open_sender(path)?;
        Ok(Self {
            sender,
            both_ends: true,
        })
    }

    async fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.sender.try_write(bytes) {
                Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if self.both_ends && rustix::fs::fstat(&self.sender)?.st_nlink == 0 {
                        self.stop_reading()?;
                    } else {
                        // What is wrong with it, the next write says.
                        let _ = tokio::time::timeout(FIFO_LOOK, self.sender.writable()).await;
                    }
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// The same fifo for writing only: without a reader it is broken.
    fn stop_reading(&mut self) -> io::Result<()> {
        let path = format!("/proc/self/fd/{}", self.sender.as_fd().as_raw_fd());
        self.sender = pipe::OpenOptions::new().open_sender(path)?;
        self.both_ends = false;
        Ok(())
    }
}

enum Sink {
    /// What has no reader any more is discarded, and the process goes on.
    Nowhere,
    Fifo(Fifo),
    Stream(Remote),
    Logged {
        log: Arc<Mutex<Writer>>,
        stream: &'static str,
        lines: Lines,
        complaints: RateLimit,
        copy: Option<tokio::fs::File>,
        clients: Arc<Clients>,
    },
}

impl Sink {
    async fn write(&mut self, bytes: &[u8]) {
        match self {
            Self::Nowhere => {}
            Self::Stream(stream) => stream.write_all(bytes).await,
            Self::Fifo(fifo) => {
                if let Err(error) = fifo.write_all(bytes).await {
                    log::debug!("output has nowhere to go: {error}");
                    *self = Self::Nowhere;
                }
            }
            Self::Logged {
                log,
                stream,
                lines,
                complaints,
                copy,
                clients,
            } => {
                let logged = log
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .write(stream, lines, bytes);
                if let Err(error) = logged {
                    complaints.warn(
                        stream,
                        format_args!(
                            "the container's log cannot be written, and lacks what it prints: {error}"
                        ),
                    );
                }
                if let Some(file) = copy {
                    let written = match file.write_all(bytes).await {
                        Ok(()) => file.flush().await,
                        failed => failed,
                    };
                    if written.is_err() {
                        // The reader went away (`| head`): the container goes on.
                        *copy = None;
                    }
                }
                clients.output(stream, bytes).await;
            }
        }
    }

    async fn finish(self) {
        match self {
            Self::Nowhere | Self::Fifo(_) => {}
            Self::Stream(stream) => stream.end().await,
            Self::Logged {
                log,
                stream,
                mut lines,
                ..
            } => {
                let _ = log
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .flush(stream, &mut lines);
            }
        }
    }
}

/// The connection of an expected stream, unless the process ends before the agent dials.
async fn connected(expected: Expected, mut give_up: watch::Receiver<bool>) -> Option<UnixStream> {
    tokio::select! {
        biased;
        connection = expected.connection() => connection,
        _ = async {
            let _ = give_up.wait_for(|given_up| *given_up).await;
            // A connection made just before may still be on its way through the hub.
            tokio::time::sleep(Duration::from_millis(500)).await;
        } => None,
    }
}

async fn pump_output(expected: Expected, mut sink: Sink, give_up: watch::Receiver<bool>) {
    let Some(mut stream) = connected(expected, give_up).await else {
        return;
    };
    let mut buffer = vec![0; BUFFER];
    loop {
        match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(n) => sink.write(buffer.get(..n).unwrap_or_default()).await,
        }
    }
    sink.finish().await;
}

enum Source {
    Fifo {
        receiver: pipe::Receiver,
        keep_open: pipe::Sender,
    },
    Stream(Remote),
    Descriptor(OwnedFd),
    Channel(mpsc::Receiver<Vec<u8>>),
}

fn open_input_fifo(path: &Path) -> io::Result<Source> {
    // A writer of our own keeps the end of one client from being the end of input: that is CloseIO's to say.
    let keep_open = pipe::OpenOptions::new().read_write(true).open_sender(path)?;
    let receiver = pipe::OpenOptions::new().open_receiver(path)?;
    Ok(Source::Fifo { receiver, keep_open })
}

async fn pump_input(
    expected: Expected,
    source: Source,
    mut close: watch::Receiver<bool>,
    give_up: watch::Receiver<bool>,
) {
    let Some(mut stream) = connected(expected, give_up).await else {
        return;
    };
    match source {
        Source::Fifo {
            mut receiver,
            keep_open,
        } => {
            let mut keep_open = Some(keep_open);
            let mut buffer = vec![0; BUFFER];
            loop {
                let n = tokio::select! {
                    n = receiver.read(&mut buffer) => n,
                    _ = close.wait_for(|closed| *closed), if keep_open.is_some() => {
                        keep_open = None;
                        continue;
                    }
                };
                match n {
                    Ok(0) | Err(_) => break,
                    Ok(n) => {
                        if stream
                            .write_all(buffer.get(..n).unwrap_or_default())
                            .await
                            .is_err()
                        {
                            return;
                        }
                    }
                }
            }
            let _ = stream.shutdown().await;
        }
        Source::Stream(mut remote) => {
            let mut is_last = false;
            loop {
                let piece = tokio::select! {
                    piece = remote.read(is_last) => piece,
                    _ = close.wait_for(|closed| *closed), if !is_last => {
                        is_last = true;
                        continue;
                    }
                };
                let Some(piece) = piece else { break };
                if stream.write_all(&piece).await.is_err() {
                    return;
                }
            }
            let _ = stream.shutdown().await;
        }
        Source::Channel(mut pieces) => {
            while let Some(piece) = pieces.recv().await {
                if stream.write_all(&piece).await.is_err() {
                    return;
                }
            }
            let _ = stream.shutdown().await;
        }
        Source::Descriptor(fd) => {
            // A thread of its own: a terminal cannot be made non-blocking without others noticing, and a read that waits
            // for the user must not hold up the end of the program.
            let Ok(stream) = stream.into_std() else { return };
            if stream.set_nonblocking(false).is_err() {
                return;
            }
            let copy = move || {
                let mut from = std::fs::File::from(fd);
                let mut to = &stream;
                let mut buffer = vec![0; BUFFER];
                loop {
                    match io::Read::read(&mut from, &mut buffer) {
                        Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                        Ok(0) | Err(_) => break,
                        Ok(n) => {
                            if io::Write::write_all(&mut to, buffer.get(..n).unwrap_or_default()).is_err() {
                                return;
                            }
                        }
                    }
                }
                let _ = stream.shutdown(std::net::Shutdown::Write);
            };
            let _ = std::thread::Builder::new().name("stdin".into()).spawn(copy);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn dial(hub: &Arc<Hub>, name: &str) -> StdStream {
        let id = StreamId::from_name(name).unwrap();
        let (ours, theirs) = StdStream::pair().unwrap();
        (&theirs).write_all(&id.header()).unwrap();
        hub.accepted(ours);
        theirs
    }

    fn fifo() -> PathBuf {
        let path = std::env::temp_dir().join(format!("cloister-fifo-{}", crate::ids::random_hex(6)));
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        path
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    }

    /// Sends more than a fifo holds (so its reader has come before it ends), and sees it arrive.
    async fn all_arrives(guest: StdStream, pumps: Pumps, fifo: &Path, reader: JoinHandle<Vec<u8>>) {
        let payload = vec![b'x'; 300_000];
        let sent = payload.clone();
        tokio::task::spawn_blocking(move || (&guest).write_all(&sent).unwrap())
            .await
            .unwrap();
        pumps.finish(Duration::from_secs(10)).await;
        assert_eq!(reader.await.unwrap(), payload);
        std::fs::remove_file(fifo).unwrap();
    }

    #[test]
    fn output_to_a_fifo_ends_with_the_stream() {
        runtime().block_on(async {
            let hub = Hub::new();
            let path = fifo();
            let reader_path = path.clone();
            let stdio = Stdio::from_request("", path.to_str().unwrap(), "").unwrap();
            let (pumps, names) = Pumps::start(&hub, stdio, false).unwrap();
            assert_eq!((names[0].as_str(), names[2].as_str()), ("", ""));
            let reader = tokio::task::spawn_blocking(move || std::fs::read(reader_path).unwrap());
            let guest = dial(&hub, &names[1]);
            all_arrives(guest, pumps, &path, reader).await;
        });
    }

    #[test]
    fn output_goes_on_when_the_reader_has_left_and_removed_its_fifo() {
        runtime().block_on(async {
            let hub = Hub::new();
            let path = fifo();
            let stdio = Stdio::from_request("", path.to_str().unwrap(), "").unwrap();
            let (pumps, names) = Pumps::start(&hub, stdio, false).unwrap();
            let guest = dial(&hub, &names[1]);
            std::fs::remove_file(&path).unwrap();
            let sent = tokio::task::spawn_blocking(move || (&guest).write_all(&vec![b'x'; 2 << 20]).is_ok());
            let sent = tokio::time::timeout(Duration::from_secs(10), sent).await;
            // Dropped first: the thread that writes would be waited for.
            pumps.finish(Duration::from_secs(1)).await;
            assert!(sent.expect("the process waits for nobody").unwrap());
        });
    }

    #[test]
    fn a_reader_of_a_fifo_without_a_name_gets_all() {
        runtime().block_on(async {
            let hub = Hub::new();
            let path = fifo();
            let stdio = Stdio::from_request("", path.to_str().unwrap(), "").unwrap();
            let (pumps, names) = Pumps::start(&hub, stdio, false).unwrap();
            let mut from = std::fs::File::open(&path).unwrap();
            std::fs::remove_file(&path).unwrap();
            let reader = tokio::task::spawn_blocking(move || {
                // Later than the fifo is full.
                std::thread::sleep(Duration::from_millis(200));
                let mut bytes = Vec::new();
                from.read_to_end(&mut bytes).unwrap();
                bytes.len()
            });
            let guest = dial(&hub, &names[1]);
            tokio::task::spawn_blocking(move || (&guest).write_all(&vec![b'x'; 300_000]).unwrap())
                .await
                .unwrap();
            pumps.finish(Duration::from_secs(10)).await;
            assert_eq!(reader.await.unwrap(), 300_000);
        });
    }

    #[test]
    fn input_survives_a_client_and_ends_by_close_io() {
        runtime().block_on(async {
            let hub = Hub::new();
            let path = fifo();
            let stdio = Stdio::from_request(path.to_str().unwrap(), "", "").unwrap();
            let (pumps, names) = Pumps::start(&hub, stdio, true).unwrap();
            let mut guest = dial(&hub, &names[0]);
            let writer_path = path.clone();
            tokio::task::spawn_blocking(move || {
                std::fs::File::options()
                    .write(true)
                    .open(&writer_path)
                    .unwrap()
                    .write_all(b"one ")
                    .unwrap();
                std::fs::File::options()
                    .write(true)
                    .open(&writer_path)
                    .unwrap()
                    .write_all(b"two")
                    .unwrap();
            })
            .await
            .unwrap();
            pumps.close_input();
            let read = tokio::task::spawn_blocking(move || {
                let mut text = String::new();
                guest.read_to_string(&mut text).unwrap();
                text
            });
            assert_eq!(read.await.unwrap(), "one two");
            pumps.finish(Duration::from_secs(1)).await;
            std::fs::remove_file(path).unwrap();
        });
    }

    #[test]
    fn a_copied_process_comes_under_the_names_that_it_had() {
        runtime().block_on(async {
            let hub = Hub::new();
            let path = fifo();
            let reader_path = path.clone();
            let text = path.to_str().unwrap();
            let stdio = Stdio::from_request(text, text, text).unwrap();
            let names = [
                String::new(),
                StreamId::from_random([7; 16]).name(),
                String::new(),
            ];
            let pumps = Pumps::resume(&hub, stdio, false, &names).unwrap();
            // It has no others, so none is waited for.
            assert_eq!(hub.lock().len(), 1);
            let reader = tokio::task::spawn_blocking(move || std::fs::read(reader_path).unwrap());
            let guest = dial(&hub, &names[1]);
            all_arrives(guest, pumps, &path, reader).await;
        });
    }

    #[test]
    fn unknown_ids_and_silence_are_refused() {
        runtime().block_on(async {
            let hub = Hub::new();
            let stranger = dial(&hub, &StreamId::from_random([7; 16]).name());
            let read = tokio::task::spawn_blocking(move || (&stranger).read(&mut [0; 1]).unwrap());
            assert_eq!(read.await.unwrap(), 0);
            let (ours, theirs) = StdStream::pair().unwrap();
            (&theirs)
                .write_all(b"not a header, but long enough to be one\n")
                .unwrap();
            hub.accepted(ours);
            let read = tokio::task::spawn_blocking(move || (&theirs).read(&mut [0; 1]).is_ok_and(|n| n > 0));
            assert!(!read.await.unwrap());
            // An id is good once.
            let expected = hub.expect();
            let name = expected.name();
            drop(expected);
            assert!(hub.lock().is_empty());
            assert!(StreamId::from_name(&name).is_some());
        });
    }

    #[test]
    fn a_flood_of_silent_connections_is_bounded() {
        runtime().block_on(async {
            let hub = Hub::new();
            let mut silent = Vec::new();
            for _ in 0..MAX_UNKNOWN + 10 {
                let (ours, theirs) = StdStream::pair().unwrap();
                hub.accepted(ours);
                silent.push(theirs);
            }
            let refused = silent.pop().unwrap();
            assert_eq!((&refused).read(&mut [0; 1]).unwrap(), 0);
        });
    }

    #[test]
    fn names_that_are_no_fifos() {
        assert!(Stdio::from_request("relative", "", "").is_err());
        assert!(Stdio::from_request("binary:///x", "", "").is_err());
        let stdio = Stdio::from_request("", "/nonexistent/fifo", "").unwrap();
        runtime().block_on(async {
            assert!(Pumps::start(&Hub::new(), stdio, false).is_err());
        });
    }
}
