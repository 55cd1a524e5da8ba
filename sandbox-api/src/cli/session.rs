// SPDX-License-Identifier: Apache-2.0
//! The user's side of a process's streams: keys that detach, and a container attached to.

use super::{Failure, Outcome, client, exec};
use crate::files::SocketPath;
use crate::pod::attach::{self, Frame};
use crate::pod::detach_keys::{Keys, Scanner};
use crate::pod::state::{Pods, Record};
use crate::pod::terminal;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// How the copying of input ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputEnd {
    /// There is no more, or nobody takes it.
    Closed,
    /// The user has typed the keys.
    Detached,
}

/// Copies our stdin on a thread; `keys` end it. The receiver hears of the end.
pub fn copy_input(
    keys: Option<Keys>,
    open_to: impl FnOnce() -> io::Result<File> + Send + 'static,
) -> io::Result<oneshot::Receiver<InputEnd>> {
    let mut from = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let (sender, receiver) = oneshot::channel();
    let copy = move || {
        let copied = open_to().and_then(|mut to| copy(&mut from, &mut to, keys));
        if let Err(error) = &copied {
            log::debug!("stdin: {error}");
        }
        let _ = sender.send(copied.unwrap_or(InputEnd::Closed));
    };
    std::thread::Builder::new().name("stdin".into()).spawn(copy)?;
    Ok(receiver)
}

fn copy(from: &mut impl Read, to: &mut impl Write, keys: Option<Keys>) -> io::Result<InputEnd> {
    let mut scanner = keys.map(Scanner::new);
    let mut buffer = vec![0; 32 << 10];
    loop {
        let count = match from.read(&mut buffer) {
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        let read = buffer.get(..count).unwrap_or_default();
        let Some(scanner) = &mut scanner else {
            if count == 0 {
                return Ok(InputEnd::Closed);
            }
            to.write_all(read)?;
            continue;
        };
        if count == 0 {
            to.write_all(scanner.rest())?;
            return Ok(InputEnd::Closed);
        }
        let mut out = Vec::with_capacity(count);
        let detached = scanner.take(read, &mut out);
        to.write_all(&out)?;
        if detached {
            return Ok(InputEnd::Detached);
        }
    }
}

/// What docker says when the keys were typed.
pub fn say_detached() {
    crate::error::tell("read escape sequence");
}

/// How to attach.
#[derive(Clone, Debug)]
pub struct Options {
    /// Pass our stdin on.
    pub stdin: bool,
    /// Pass signals on.
    pub sig_proxy: bool,
    /// What detaches.
    pub keys: Keys,
}

/// Connects to a running container's streams.
pub fn connect(pods: &Pods, record: &Record) -> Outcome<UnixStream> {
    SocketPath::of(&pods.state_dir(&record.id).join(attach::SOCKET))
        .and_then(|socket| UnixStream::connect(socket.path()))
        .map_err(|e| Failure::new(format!("cannot attach to container {}: {e}", record.name)))
}

/// Stays attached to the container's end, or until the keys. Answers its exit status; 0 if detached.
pub fn attached(pods: &Pods, record: &Record, stream: &UnixStream, options: Options) -> Outcome {
    let runtime = client::runtime()?;
    let result = runtime.block_on(follow(pods, record, stream, options));
    // A thread may wait for the user's next key.
    runtime.shutdown_background();
    result
}

async fn follow(pods: &Pods, record: &Record, stream: &UnixStream, options: Options) -> Outcome {
    let tty = record.plan.wishes.terminal;
    let task = client::connect(pods, record).await?;
    // Raw before the first key is read, and before anything is printed that a key may be typed behind.
    let raw = (tty && options.stdin && terminal::stdin_is_terminal())
        .then(terminal::Raw::stdin)
        .transpose()?;
    let (sender, mut end) = oneshot::channel();
    let mut from = io::BufReader::new(stream.try_clone()?);
    let output = move || {
        let _ = sender.send(print_frames(&mut from));
    };
    std::thread::Builder::new().name("stdout".into()).spawn(output)?;
    let mut input = None;
    if options.stdin {
        let to = File::from(std::os::fd::OwnedFd::from(stream.try_clone()?));
        input = Some(copy_input(tty.then_some(options.keys), move || Ok(to))?);
    }
    let mut input_end = Box::pin(async move {
        match input {
            Some(input) => input.await.unwrap_or(InputEnd::Closed),
            None => std::future::pending().await,
        }
    });
    let mut input_open = true;
    let mut window = signal(SignalKind::window_change())?;
    let mut signals = options.sig_proxy.then(exec::signals).transpose()?;
    if tty {
        exec::resize(&task, record.container_id(), "").await;
    }
    loop {
        let number = tokio::select! {
            ended = &mut end => {
                drop(raw);
                let ended = ended.unwrap_or(Ok(None)).unwrap_or(None);
                let (status, message) = ended.ok_or_else(|| {
                    Failure::new(format!("the process that hosts container {} went away", record.name)).with_code(125)
                })?;
                let code = u8::try_from(status).unwrap_or(125);
                return if message.is_empty() { Ok(code) } else { Err(Failure::new(message).with_code(code)) };
            }
            how = &mut input_end, if input_open => {
                input_open = false;
                if how == InputEnd::Detached {
                    drop(raw);
                    say_detached();
                    return Ok(0);
                }
                continue;
            }
            _ = window.recv(), if tty => {
                exec::resize(&task, record.container_id(), "").await;
                continue;
            }
            number = exec::next_signal(&mut signals) => number,
        };
        if tty && number == libc::SIGHUP {
            // The terminal is gone; the container is not.
            return Ok(129);
        }
        let _ = client::kill(&task, record.container_id(), number, false).await;
    }
}

/// Prints what comes, up to the end: its status, and why the container was lost.
fn print_frames(from: &mut impl Read) -> io::Result<Option<(u32, String)>> {
    // Who reads us may go; the container's end is still to be waited for.
    let (mut out, mut err) = (io::stdout(), io::stderr());
    loop {
        match Frame::read(from)? {
            Some(Frame::Output(bytes)) => drop(out.write_all(&bytes).and_then(|()| out.flush())),
            Some(Frame::Error(bytes)) => drop(err.write_all(&bytes)),
            Some(Frame::End { status, message }) => return Ok(Some((status, message))),
            None => return Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_up_to_the_keys() {
        let run = |input: &[u8], keys: Option<&str>| {
            let mut out = Vec::new();
            let keys = keys.map(|keys| Keys::parse(keys).unwrap());
            let end = copy(&mut { input }, &mut out, keys).unwrap();
            (out, end)
        };
        assert_eq!(
            run(b"ab\x10\x11cd", None),
            (b"ab\x10\x11cd".to_vec(), InputEnd::Closed)
        );
        assert_eq!(
            run(b"ab\x10\x11cd", Some("")),
            (b"ab".to_vec(), InputEnd::Detached)
        );
        assert_eq!(run(b"ab\x10", Some("")), (b"ab\x10".to_vec(), InputEnd::Closed));
        assert_eq!(run(b"abc", Some("b")), (b"a".to_vec(), InputEnd::Detached));
    }
}
