// SPDX-License-Identifier: Apache-2.0
//! Snapshots: a running pod of `cloister run` in one file, from which it goes on, once or many times.
//!
//! # Theory of operation
//!
//! ```text
//!  running ──Task.Pause──▶ container frozen, streams held ──Cell::pause──▶ image, layer, facts written ──▶ running
//!
//!  restored: layer unpacked, root mounted, image cloned ──▶ agent given randomness, time, network ──Task.Resume──▶ running
//! ```
//!
//! No process of the container runs between the two: none in a copy sees the random numbers of another one, and what it
//! printed before is with the original's reader, what it prints after with the copy's (the agent's `stdio`).
//!
//! # The file
//!
//! | from | |
//! | --- | --- |
//! | 0 | the image of the VM (`cloister_vmm::image`) |
//! | the page behind it | `CLOISPOD`, epoch (4 bytes), length of the facts (4), length of the layer (8), SHA-256 of both (32), zeroes |
//! | 64 bytes on | the facts: JSON |
//! | then | what the container has written to its root file system: a layer of an image, as a tar |
//!
//! A snapshot can be taken on another one, whose image is then the base of its own: of the VM's memory it holds what differs.
//! What the container has written is in each of them whole.
//!
//! Numbers are little-endian. A file is untrusted input: it may name folders and network devices of the host, which
//! whoever restores it has to agree to ([`Snapshot::wants`]).

use super::machine::Machine;
use super::state::{Network, Record};
use super::task::{self, TaskService};
use crate::image;
use cloister_protocol::stream::StreamId;
use cloister_vmm::image::{Image, ImageError, NewBase, WorkingSet};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

const MAGIC: &[u8; 8] = b"CLOISPOD";
/// Grows with every change of the layout or of [`Facts`].
const EPOCH: u32 = 1;
const PREFIX: u64 = 64;
const PAGE: u64 = 4096;
/// Longest facts.
const MAX_FACTS: u64 = 4 << 20;

/// Why there is no snapshot, or it cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The image of the VM.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// An image, and nothing behind it.
    #[error("this is the image of a virtual machine, not the snapshot of a pod")]
    NoPod,
    /// Written by another version of this program.
    #[error("the snapshot has epoch {found}, this program reads {EPOCH}: take it anew with this version")]
    Epoch {
        /// The file's.
        found: u32,
    },
    /// Bytes have changed, or are missing.
    #[error("the snapshot is damaged: {0}")]
    Damaged(&'static str),
    /// It says what cannot be.
    #[error("the snapshot is impossible: {0}")]
    Impossible(String),
    /// The agent, or the VM.
    #[error("cannot take a snapshot: {0}")]
    Pod(String),
    /// A file.
    #[error("cannot {what} the snapshot")]
    Io {
        /// The verb.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl From<io::Error> for Error {
    fn from(source: io::Error) -> Self {
        Self::Io { what: "open", source }
    }
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { what, source }
}

/// The network card of a pod, as its guest knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Card {
    /// Hardware address.
    pub mac: [u8; 6],
    /// "10.213.0.2/30"; none where addresses are the user's business.
    pub address: Option<String>,
}

/// What there is to know of a pod beside its VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Facts {
    /// Its record.
    pub record: Record,
    /// Its container's process in the guest.
    pub pid: u32,
    /// The names of that one's streams: stdin, stdout, stderr.
    pub streams: [String; 3],
    /// It had been paused by its user.
    pub paused: bool,
    /// Its network card.
    pub card: Option<Card>,
}

impl Facts {
    fn check(&self) -> Result<(), Error> {
        let impossible = |why: String| Err(Error::Impossible(why));
        let id = self.record.container_id();
        if task::check_id(id).is_err() || id.len() > 64 {
            return impossible(format!("{id:?} is no container's id"));
        }
        if let Some(name) = self
            .streams
            .iter()
            .find(|name| !name.is_empty() && StreamId::from_name(name).is_none())
        {
            return impossible(format!("{name:?} is no stream's name"));
        }
        if self.card.is_some() == (self.record.plan.network == Network::None) {
            return impossible("network and network card do not agree".to_owned());
        }
        Ok(())
    }
}

/// The other one on which a snapshot is taken: what goes with the request for it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct On {
    /// The files, as another process of ours can open them: the other one, its own base, and so on. None for a whole one.
    pub files: Vec<PathBuf>,
    /// What the first is called in its folder.
    pub name: String,
}

impl On {
    /// For the wire.
    ///
    /// # Errors
    /// It cannot be encoded.
    pub fn encode(&self) -> io::Result<Vec<u8>> {
        Ok(serde_json::to_vec(self)?)
    }

    fn decode(bytes: &[u8]) -> Result<Self, Error> {
        if bytes.is_empty() {
            return Ok(Self::default());
        }
        serde_json::from_slice(bytes).map_err(|e| Error::Pod(format!("its base: {e}")))
    }

    /// The image to write on.
    fn open(&self) -> Result<Option<Arc<Image>>, Error> {
        if self.files.is_empty() {
            return Ok(None);
        }
        let files: io::Result<Vec<File>> = self.files.iter().map(File::open).collect();
        Ok(Some(Image::open_chain(
            files.map_err(io_error("open the base of"))?,
        )?))
    }
}

/// What takes snapshots of a pod.
pub struct Taker {
    /// Its VM.
    pub machine: Arc<Machine>,
    /// Its containers, which outlive this no more than the VM.
    pub service: Weak<TaskService>,
    /// Its record.
    pub record: Record,
    /// The folder of its container's writes.
    pub upper: PathBuf,
    /// Its network card.
    pub card: Option<Card>,
    /// One at a time.
    pub one: tokio::sync::Mutex<()>,
}

impl Taker {
    /// Writes a snapshot into the empty file at `path`, on the one that `on` (an encoded [`On`]) names if it names one. The
    /// pod stands still meanwhile, and goes on whatever comes of it.
    ///
    /// # Errors
    /// See [`Error`]; the file is then of no use.
    pub async fn take(self: &Arc<Self>, path: PathBuf, on: Vec<u8>) -> Result<(), Error> {
        let _one = self.one.lock().await;
        let on = On::decode(&on)?;
        let service = self
            .service
            .upgrade()
            .ok_or_else(|| Error::Pod("it has ended".to_owned()))?;
        let id = self.record.container_id();
        let said = |error| Error::Pod(super::vm::agent_error("ask its agent")(error).to_string());
        let file = File::options()
            .read(true)
            .write(true)
            .open(path)
            .map_err(io_error("open"))?;
        let base = on.open()?;
        if let Some(base) = &base {
            self.machine.cell().check_base(base)?;
        }
        let (pid, streams) = service.known_to_guest(id).map_err(said)?;
        let paused = service.is_paused(id).await.map_err(said)?;
        // Nothing may return early from here on to where it is resumed.
        if !paused {
            service.set_paused(id, true).await.map_err(said)?;
        }
        let facts = Facts {
            record: self.record.clone(),
            pid,
            streams,
            paused,
            card: self.card.clone(),
        };
        let own = Arc::clone(self);
        let written = tokio::task::spawn_blocking(move || {
            let base = base.as_ref().map(|image| NewBase {
                image,
                name: &on.name,
            });
            own.write(&file, &facts, base)
        });
        let written = written.await;
        let written = written
            .map_err(|e| Error::Pod(e.to_string()))
            .and_then(|written| written);
        if !paused {
            let resumed = service.set_paused(id, false).await.map_err(said);
            written.and(resumed)
        } else {
            written
        }
    }

    fn write(&self, file: &File, facts: &Facts, base: Option<NewBase<'_>>) -> Result<(), Error> {
        let cell = self.machine.cell();
        cell.pause().map_err(|e| Error::Pod(crate::error::chain(&e)))?;
        let written = self.write_paused(file, facts, base);
        // One that has ended meanwhile says so by itself.
        if let Err(error) = cell.resume() {
            log::debug!("after the snapshot: {error}");
        }
        written
    }

    fn write_paused(&self, file: &File, facts: &Facts, base: Option<NewBase<'_>>) -> Result<(), Error> {
        // They are in the image by name, and in the layer.
        let _kept = self
            .machine
            .keep_deleted()
            .map_err(io_error("keep the container's deleted files for"))?;
        let cell = self.machine.cell();
        let image = match base {
            None => cell.write_image(file),
            Some(base) => cell.write_image_on(file, base),
        };
        let image = image.map_err(|e| Error::Pod(crate::error::chain(&e)))?;
        write_pod(file, image.file_bytes, facts, &self.upper)
    }
}

/// A file from some place on, and the sum of what was written.
struct Summed<'a> {
    file: &'a File,
    at: u64,
    sum: Sha256,
}

impl Write for Summed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write_at(bytes, self.at)?;
        self.sum.update(bytes.get(..written).unwrap_or_default());
        self.at = self.at.saturating_add(u64::try_from(written).unwrap_or(u64::MAX));
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes what comes behind an image that ends at `image_end`: the facts, and the layer of what is in the folder `upper`.
///
/// # Errors
/// The folder cannot be read, or the disk is full.
pub fn write_pod(file: &File, image_end: u64, facts: &Facts, upper: &Path) -> Result<(), Error> {
    let start = image_end.next_multiple_of(PAGE);
    let json = serde_json::to_vec(facts).map_err(|e| io_error("write")(e.into()))?;
    let facts_len = u32::try_from(json.len()).map_err(|e| io_error("write")(io::Error::other(e)))?;
    let mut to = Summed {
        file,
        at: start.saturating_add(PREFIX),
        sum: Sha256::new(),
    };
    to.write_all(&json).map_err(io_error("write"))?;
    let layer_start = to.at;
    let upper = File::open(upper).map_err(io_error("read the container's files for"))?;
    let to =
        image::pack(upper.as_fd(), io::BufWriter::with_capacity(1 << 20, to)).map_err(io_error("write"))?;
    let to = to.into_inner().map_err(|e| io_error("write")(e.into_error()))?;
    let mut prefix = MAGIC.to_vec();
    prefix.extend(EPOCH.to_le_bytes());
    prefix.extend(facts_len.to_le_bytes());
    prefix.extend(to.at.saturating_sub(layer_start).to_le_bytes());
    prefix.extend(to.sum.finalize());
    prefix.resize(usize::try_from(PREFIX).unwrap_or(0), 0);
    file.write_all_at(&prefix, start).map_err(io_error("write"))
}

/// An open snapshot.
pub struct Snapshot {
    /// Its VM.
    pub image: Arc<Image>,
    /// What else there is to know.
    pub facts: Facts,
    /// The file that says what its copies touch first, or is to say it once the first one has.
    pub prefetch: Option<PathBuf>,
    file: File,
    layer_start: u64,
    layer_len: u64,
}

/// Until when a copy's touches are its first ones, once it goes on.
const FIRST: Duration = Duration::from_secs(1);

/// Has clones of `image` begin with what the file at `path` says. Answers whether there is nothing to be used, and so something
/// to be noted.
pub fn prefetch(image: &Image, path: &Path) -> bool {
    match WorkingSet::load(path) {
        Ok(set) => {
            let (written, read) = set.bytes();
            if image.expect(set) {
                log::info!("{} KiB are copied ahead, {} KiB read", written >> 10, read >> 10);
                return false;
            }
            log::info!("{} is of another snapshot and is replaced", path.display());
        }
        Err(ImageError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
        Err(error) => log::warn!("{}: {}", path.display(), crate::error::chain(&error)),
    }
    true
}

/// Notes in the file at `path` what the clone has touched, once it has run for a while.
pub fn note_touched(machine: &Arc<Machine>, path: PathBuf) {
    let machine = Arc::downgrade(machine);
    tokio::spawn(async move {
        tokio::time::sleep(FIRST).await;
        let Some(machine) = machine.upgrade() else { return };
        let noted = tokio::task::spawn_blocking(move || {
            let Some(set) = machine.cell().working_set() else {
                return;
            };
            if let Err(error) = set.store(&path) {
                log::warn!("{}: {}", path.display(), crate::error::chain(&error));
            }
        });
        // A panic is told by the runtime.
        let _ = noted.await;
    });
}

/// Part of a file.
struct Part<'a> {
    file: &'a File,
    at: u64,
    left: u64,
}

impl Read for Part<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let count = self
            .file
            .read_at(buffer.get_mut(..most).unwrap_or_default(), self.at)?;
        let counted = u64::try_from(count).unwrap_or(0);
        self.at = self.at.saturating_add(counted);
        self.left = self.left.saturating_sub(counted);
        Ok(count)
    }
}

impl Snapshot {
    /// Opens the one in the first of these files, which was taken on that in the second, and so on. Their RAM is checked,
    /// too, where `whole` says so.
    ///
    /// # Errors
    /// It is none, or damaged; or another one is not its base.
    pub fn open(files: &[File], whole: bool) -> Result<Self, Error> {
        let copies: io::Result<Vec<File>> = files.iter().map(File::try_clone).collect();
        let copies = copies.map_err(io_error("open"))?;
        let image = Image::open_chain(copies)?;
        let file = files
            .first()
            .ok_or(Error::NoPod)?
            .try_clone()
            .map_err(io_error("open"))?;
        let start = image.file_len().next_multiple_of(PAGE);
        let len = file.metadata().map_err(io_error("read"))?.len();
        let mut prefix = [0; 64];
        if len <= start || file.read_exact_at(&mut prefix, start).is_err() || !prefix.starts_with(MAGIC) {
            return Err(Error::NoPod);
        }
        let number = |at: usize| {
            let bytes = prefix.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(0, u32::from_le_bytes)
        };
        if number(8) != EPOCH {
            return Err(Error::Epoch { found: number(8) });
        }
        let facts_len = u64::from(number(12));
        let layer_len = u64::from(number(16)) | u64::from(number(20)) << 32;
        let facts_start = start.saturating_add(PREFIX);
        let layer_start = facts_start.saturating_add(facts_len);
        if facts_len > MAX_FACTS || layer_start.checked_add(layer_len).is_none_or(|end| end > len) {
            return Err(Error::Damaged("its end is missing"));
        }
        let mut json = vec![0; usize::try_from(facts_len).unwrap_or(0)];
        file.read_exact_at(&mut json, facts_start)
            .map_err(io_error("read"))?;
        let mut sum = Sha256::new();
        sum.update(&json);
        let mut rest = Part {
            file: &file,
            at: layer_start,
            left: layer_len,
        };
        let mut buffer = vec![0; 1 << 20];
        loop {
            let count = rest.read(&mut buffer).map_err(io_error("read"))?;
            if count == 0 {
                break;
            }
            sum.update(buffer.get(..count).unwrap_or_default());
        }
        if prefix.get(24..56) != Some(sum.finalize().as_slice()) {
            return Err(Error::Damaged("the checksum of its files is another"));
        }
        if whole {
            image.verify()?;
        }
        let facts: Facts = serde_json::from_slice(&json).map_err(|e| Error::Impossible(e.to_string()))?;
        facts.check()?;
        Ok(Self {
            image,
            facts,
            prefetch: None,
            file,
            layer_start,
            layer_len,
        })
    }

    /// What of the host it would use: folders, and a network device. Whoever restores it has to agree.
    pub fn wants(&self) -> Vec<String> {
        let plan = &self.facts.record.plan;
        let folders = plan.wishes.volumes.iter().map(|volume| &volume.source);
        let folders = folders.chain(&plan.rootfs).map(|path| path.display().to_string());
        folders.collect()
    }

    /// Unpacks what the container has written into `upper`, which is empty.
    ///
    /// # Errors
    /// The layer is no good, or the disk is full.
    pub fn unpack(&self, upper: BorrowedFd<'_>) -> Result<(), image::Error> {
        let layer = Part {
            file: &self.file,
            at: self.layer_start,
            left: self.layer_len,
        };
        let layer = io::BufReader::with_capacity(1 << 20, layer);
        image::unpack(layer, upper, &[], image::Limits::default()).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::state::tests::record;

    fn facts() -> Facts {
        let mut record = record(&"ab".repeat(32));
        record.plan.network = Network::None;
        Facts {
            record,
            pid: 7,
            streams: Default::default(),
            paused: false,
            card: None,
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        assert!(facts().check().is_ok());
        let mut bad = facts();
        bad.record.guest_id = Some("../x".into());
        assert!(matches!(bad.check(), Err(Error::Impossible(_))));
        let mut bad = facts();
        bad.streams[1] = "stream://x".into();
        assert!(matches!(bad.check(), Err(Error::Impossible(_))));
        let mut bad = facts();
        bad.record.plan.network = Network::Nat;
        assert!(matches!(bad.check(), Err(Error::Impossible(_))));
    }

    #[test]
    fn no_image_is_no_snapshot() {
        let mut file = File::from(rustix::fs::memfd_create("t", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.write_all(&[7; 10_000]).unwrap();
        let error = Snapshot::open(&[file], true).err().unwrap();
        assert!(matches!(error, Error::Image(ImageError::NotAnImage)), "{error}");
    }
}
