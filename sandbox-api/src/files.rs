// SPDX-License-Identifier: Apache-2.0
//! Small files that other processes read while they change, and sockets wherever they lie, which admit root alone.

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// Connections that may wait to be accepted; the kernel takes less where its own limit is (`net.core.somaxconn`).
const BACKLOG: i32 = 1024;

/// Replaces a file as a whole: a reader sees the old bytes or the new ones, also after a crash.
///
/// # Errors
/// The new file cannot be written; the old one is then still there.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}", crate::ids::random_hex(4)));
    let new = path.with_file_name(name);
    let write = || {
        let mut file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, path)
    };
    let result = write();
    if result.is_err() {
        let _ = fs::remove_file(&new);
    }
    result
}

/// Makes a folder, and those above it, for root alone. What is there stays as it is.
///
/// # Errors
/// It cannot be made, or is something else.
pub fn make_private_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Listens on a unix socket that is made for root alone, for a runtime to take: its calls do not block.
///
/// # Errors
/// Something is there, or the socket cannot be made.
pub fn listen(socket: &Path) -> io::Result<UnixListener> {
    let short = SocketPath::of(socket)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let listener = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // bind(2) makes the file with the mode of the socket, less the umask: there is no moment at which others may connect.
    rustix::fs::fchmod(&listener, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&listener, &SocketAddrUnix::new(short.path())?)?;
    rustix::net::listen(&listener, BACKLOG)?;
    Ok(listener.into())
}

/// A path of a unix socket that fits into a socket address (108 bytes), however deep its directory lies. Good for bind(2)
/// and connect(2) in this process while it lives.
#[derive(Debug)]
pub struct SocketPath {
    short: PathBuf,
    _directory: File,
}

impl SocketPath {
    /// The short path of `socket`, which need not be there.
    ///
    /// # Errors
    /// Its directory cannot be opened.
    pub fn of(socket: &Path) -> io::Result<Self> {
        let (Some(parent), Some(name)) = (socket.parent(), socket.file_name()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let directory = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY | libc::O_PATH)
            .open(parent)?;
        let short = Path::new("/proc/self/fd")
            .join(directory.as_raw_fd().to_string())
            .join(name);
        Ok(Self {
            short,
            _directory: directory,
        })
    }

    /// The path.
    pub fn path(&self) -> &Path {
        &self.short
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_socket_lies_as_deep_as_one_likes() {
        let directory = std::env::temp_dir().join(format!("cloister-socket-{}", std::process::id()));
        let deep = directory.join("d".repeat(100)).join("e".repeat(100));
        std::fs::create_dir_all(&deep).unwrap();
        let socket = deep.join("a.sock");
        assert!(std::os::unix::net::UnixListener::bind(&socket).is_err());
        let listener = listen(&socket).unwrap();
        listener.set_nonblocking(false).unwrap();
        let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "root alone may connect");
        assert_eq!(listen(&socket).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        std::os::unix::net::UnixStream::connect(SocketPath::of(&socket).unwrap().path()).unwrap();
        listener.accept().unwrap();
        assert!(SocketPath::of(Path::new("/")).is_err());
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
