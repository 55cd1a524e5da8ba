// SPDX-License-Identifier: Apache-2.0
//! What the tests of this folder share: a directory that removes itself, and a driver of requests without a guest.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::io::Errno;
use vm_memory::VolatileSlice;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::abi::{InHeader, InitIn, InitInExt, InitOut, Opcode, OutHeader};
use super::config::FsConfig;
use super::message::{Reader, Writer};
use super::root::AttachOptions;
use super::server::{Outcome, Server};
use crate::virtio::Slices;

/// A new directory under the system's temporary one, removed with everything in it when dropped.
#[derive(Debug)]
pub struct TempDir(PathBuf);

impl TempDir {
    /// Makes one.
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("cloister-fs-{}-{count}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// An open descriptor of it.
    pub fn fd(&self) -> OwnedFd {
        std::fs::File::open(&self.0).unwrap().into()
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A server and a guest that sends it bytes.
#[derive(Debug)]
pub struct Driver {
    pub server: Arc<Server>,
    pub uid: u32,
    pub gid: u32,
}

/// `bytes` in odd pieces, as a guest may have them, but no more than a host call takes.
fn pieces(bytes: &mut [u8]) -> Slices<'_> {
    let size = 1013.max(bytes.len() / 1000);
    let pieces = bytes.chunks_mut(size).map(VolatileSlice::from);
    pieces.collect::<Vec<_>>().into()
}

/// All features that a Linux client offers.
pub const LINUX: u64 = 0x1ff_77ff_fffb;

impl Driver {
    /// A server that answered INIT.
    pub fn new(config: FsConfig) -> Self {
        Self::with_server(Server::new(config, None).unwrap())
    }

    /// The same on a server that is there already.
    pub fn with_server(server: Server) -> Self {
        let driver = Self::uninitialised(server);
        driver.init(LINUX).unwrap();
        driver
    }

    /// On a server that has had its INIT in another life, or has none.
    pub fn uninitialised(server: Server) -> Self {
        Self {
            server: Arc::new(server),
            uid: 0,
            gid: 0,
        }
    }

    /// A server with `directory` attached as `d`; the node of `d` as well.
    pub fn attached(directory: &TempDir, options: AttachOptions) -> (Self, u64) {
        let driver = Self::new(FsConfig::default());
        driver.server.attach("d", &directory.fd(), options).unwrap();
        let node = driver.lookup(1, "d").unwrap();
        (driver, node)
    }

    pub fn init(&self, features: u64) -> Result<InitOut, Errno> {
        let half = |value: u64| u32::try_from(value & 0xffff_ffff).unwrap();
        let args = InitIn {
            major: 7,
            minor: 41,
            max_readahead: 1 << 17,
            flags: half(features),
        };
        let extended = InitInExt {
            flags2: half(features >> 32),
            ..InitInExt::default()
        };
        self.ask(Opcode::Init, 0, &[args.as_bytes(), extended.as_bytes()])
    }

    /// Sends raw bytes with room for `room` bytes of reply; what came back.
    pub fn raw(&self, mut bytes: Vec<u8>, room: usize) -> (Outcome, Vec<u8>) {
        let mut reply = vec![0xa5; room];
        let (input, output) = (pieces(&mut bytes), pieces(&mut reply));
        let (mut reader, writer) = (Reader::new(input), Writer::new(output));
        let outcome = match Server::header(&mut reader) {
            Ok(header) => self.server.handle(header, reader, writer),
            Err(_) => Outcome::Malformed,
        };
        if let Outcome::Done { len } = outcome {
            assert!(len as usize <= room, "reply longer than its room");
            assert!(
                reply[len as usize..].iter().all(|byte| *byte == 0xa5),
                "bytes beyond the reply"
            );
            reply.truncate(len as usize);
        }
        (outcome, reply)
    }

    /// A request's bytes.
    pub fn request(&self, opcode: u32, nodeid: u64, args: &[&[u8]]) -> Vec<u8> {
        let args: Vec<u8> = args.concat();
        let header = InHeader {
            len: u32::try_from(size_of::<InHeader>() + args.len()).unwrap(),
            opcode,
            unique: 77,
            nodeid,
            uid: self.uid,
            gid: self.gid,
            pid: 1,
            total_extlen: 0,
            padding: 0,
        };
        [header.as_bytes(), &args].concat()
    }

    /// Sends a request; the reply's body.
    pub fn call(&self, opcode: Opcode, nodeid: u64, args: &[&[u8]]) -> Result<Vec<u8>, Errno> {
        self.call_with_room(opcode, nodeid, args, 1 << 17)
    }

    pub fn call_with_room(
        &self,
        opcode: Opcode,
        nodeid: u64,
        args: &[&[u8]],
        room: usize,
    ) -> Result<Vec<u8>, Errno> {
        let (outcome, reply) = self.raw(self.request(opcode as u32, nodeid, args), room);
        if outcome == (Outcome::Blocked { unique: 77 }) {
            return Err(Errno::AGAIN);
        }
        let Outcome::Done { len } = outcome else {
            panic!("{opcode:?}: {outcome:?}");
        };
        let (header, body) = OutHeader::read_from_prefix(&reply).unwrap();
        assert_eq!((header.unique, header.len), (77, len));
        match header.error {
            0 => Ok(body.to_vec()),
            error => Err(Errno::from_raw_os_error(-error)),
        }
    }

    /// Sends a request whose reply begins with `T`.
    pub fn ask<T: FromBytes>(&self, opcode: Opcode, nodeid: u64, args: &[&[u8]]) -> Result<T, Errno> {
        let body = self.call(opcode, nodeid, args)?;
        Ok(T::read_from_prefix(&body).unwrap().0)
    }

    pub fn lookup(&self, parent: u64, name: &str) -> Result<u64, Errno> {
        let entry: super::abi::EntryOut = self.ask(Opcode::Lookup, parent, &[name.as_bytes(), b"\0"])?;
        Ok(entry.nodeid)
    }

    /// Sends a structure and a name.
    pub fn named<A: IntoBytes + Immutable>(
        &self,
        opcode: Opcode,
        nodeid: u64,
        args: &A,
        name: &str,
    ) -> Result<Vec<u8>, Errno> {
        self.call(opcode, nodeid, &[args.as_bytes(), name.as_bytes(), b"\0"])
    }
}
