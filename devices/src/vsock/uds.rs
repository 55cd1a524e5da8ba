// SPDX-License-Identifier: Apache-2.0
//! Unix sockets as ways in and out of a guest, by Firecracker's convention.
//!
//! A client of the socket at `<path>` writes `CONNECT <port>\n`; once the guest has accepted it reads `OK <host
//! port>\n`, and from then on the socket is the connection. If the guest refuses it reads end of file. A connection of
//! the guest to host port `<port>` goes to the unix socket `<path>_<port>`, if there is one.
//!
//! The directory is opened once; the sockets in it are reached through that descriptor.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType};

/// The socket that a cell listens at for the host's clients.
pub(super) struct UdsPath {
    directory: OwnedFd,
    name: OsString,
    pub listener: UnixListener,
}

impl UdsPath {
    /// Creates the socket at `path`, which must not exist.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let name = path
            .file_name()
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not the path of a socket"))?
            .to_owned();
        let parent = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(parent, flags, Mode::empty())?;
        let listener = UnixListener::bind(in_directory(&directory, &name))?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            directory,
            name,
            listener,
        })
    }

    /// Connects to the socket of the host's program that listens for the guest at `port`. Never blocks: a full
    /// backlog refuses.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut name = self.name.clone();
        name.push(format!("_{port}"));
        let address = SocketAddrUnix::new(in_directory(&self.directory, &name))?;
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        rustix::net::connect(&socket, &address)?;
        Ok(UnixStream::from(socket))
    }
}

impl Drop for UdsPath {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = rustix::fs::unlinkat(&self.directory, &self.name, AtFlags::empty());
    }
}

/// A path that is short enough for a socket address and does not depend on what its directories are called by now.
fn in_directory(directory: &OwnedFd, name: &OsStr) -> std::path::PathBuf {
    Path::new("/proc/self/fd")
        .join(directory.as_raw_fd().to_string())
        .join(name)
}

/// A client that has not said yet where it wants to go.
pub(super) struct Handshake {
    pub stream: UnixStream,
    line: Vec<u8>,
}

/// Longest line: `CONNECT 4294967295\n`.
const LONGEST_LINE: usize = 19;

/// How far a client's line is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    Incomplete,
    Connect(u32),
    /// Not our protocol, or gone: close.
    Invalid,
}

impl Handshake {
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            line: Vec::new(),
        }
    }

    /// Takes what the client sent up to the end of the line, and nothing beyond.
    pub fn advance(&mut self) -> Line {
        let mut peeked = [0; LONGEST_LINE];
        let room = LONGEST_LINE - self.line.len();
        let flags = RecvFlags::DONTWAIT;
        let count = match rustix::net::recv(&self.stream, &mut peeked[..room], flags | RecvFlags::PEEK) {
            Ok((0, _)) => return Line::Invalid,
            Ok((count, _)) => count,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Line::Incomplete,
            Err(_) => return Line::Invalid,
        };
        let end = peeked[..count].iter().position(|&byte| byte == b'\n');
        let taken = end.map_or(count, |end| end + 1);
        let mut bytes = [0; LONGEST_LINE];
        match rustix::net::recv(&self.stream, &mut bytes[..taken], flags) {
            Ok((count, _)) if count == taken => self.line.extend_from_slice(&bytes[..taken]),
            _ => return Line::Invalid,
        }
        match end {
            Some(_) => parse(&self.line).map_or(Line::Invalid, Line::Connect),
            None if self.line.len() < LONGEST_LINE => Line::Incomplete,
            None => Line::Invalid,
        }
    }
}

/// The port in `CONNECT <port>\n`.
fn parse(line: &[u8]) -> Option<u32> {
    let port = line.strip_prefix(b"CONNECT ")?.strip_suffix(b"\n")?;
    // `parse` alone would take a sign.
    if !port.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(port).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn only_the_convention_is_understood() {
        assert_eq!(parse(b"CONNECT 1024\n"), Some(1024));
        assert_eq!(parse(b"CONNECT 4294967295\n"), Some(u32::MAX));
        for line in [
            &b"CONNECT 4294967296\n"[..],
            b"CONNECT +1\n",
            b"CONNECT -1\n",
            b"CONNECT \n",
            b"CONNECT 1\r\n",
            b"connect 1\n",
            b"CONNECT  1\n",
            b"GET / HTTP/1\n",
        ] {
            assert_eq!(parse(line), None, "{line:?}");
        }
    }

    #[test]
    fn a_line_in_pieces_leaves_what_follows_it() {
        let (mut client, server) = UnixStream::pair().unwrap();
        server.set_nonblocking(true).unwrap();
        let mut handshake = Handshake::new(server);
        assert_eq!(handshake.advance(), Line::Incomplete);
        client.write_all(b"CONN").unwrap();
        assert_eq!(handshake.advance(), Line::Incomplete);
        client.write_all(b"ECT 77\nhello").unwrap();
        assert_eq!(handshake.advance(), Line::Connect(77));
        let mut rest = [0; 5];
        handshake.stream.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"hello");
    }

    #[test]
    fn endless_lines_and_silence_are_cut() {
        let (mut client, server) = UnixStream::pair().unwrap();
        let mut handshake = Handshake::new(server);
        client.write_all(&[b'1'; LONGEST_LINE]).unwrap();
        assert_eq!(handshake.advance(), Line::Invalid);
        let (client, server) = UnixStream::pair().unwrap();
        drop(client);
        assert_eq!(Handshake::new(server).advance(), Line::Invalid);
    }
}
