// SPDX-License-Identifier: Apache-2.0
//! What the host remembers of the pods that the command line started.
//!
//! ```text
//! <state>/pods/<id>/pod.json     the record, replaced as a whole      (state: /run/cloister, gone at boot)
//! <state>/pods/<id>/alive        locked by the process that hosts the VM, from before the record says so to its end
//! <state>/pods/<id>/restart      locked while a `restart` waits for the end: `--rm` does not remove it then
//! <state>/pods/<id>/task.sock    Task service, while it lives
//! <state>/pods/<id>/attach.sock  the container's streams, likewise
//! <state>/lock                   names are given, addresses taken and the dead buried under it
//! <root>/pods/<id>/upper, work   the container's writes                (root: /var/lib/cloister)
//! <root>/pods/<id>/container.log
//!
//! created ──▶ running ──▶ exited      the hosting process writes each step
//!    └───────────┴──────▶ exited      written by the next command that finds `alive` unlocked: the host process died
//!                         exited ──▶ created      `start`, by who takes `alive`
//! ```
//!
//! The kernel gives up the lock whatever kills the process, so nothing here trusts a process id.

use super::shelf::Shelf;
use crate::clock::{self, Millis};
use crate::files;
use crate::image::Digest;
use crate::net::NetRecord;
use crate::runtime::spec::Wishes;
use rustix::fs::FlockOperation;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Exit status of a container whose VM or host process died: as if killed.
pub const EXIT_KILLED: u32 = 137;

/// Longest time that `alive` may be locked by those who only look at it, or by a host that has written its last record.
const LOOKS: Duration = Duration::from_millis(200);
/// Pause between two attempts at it.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// The life of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Has a record, no process yet.
    Created,
    /// Its process runs.
    Running,
    /// It ended, or never started.
    Exited,
}

/// A port of the host that leads into the pod.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Publish {
    /// Address on the host.
    pub host_ip: std::net::IpAddr,
    /// Port on the host.
    pub host_port: u16,
    /// Port in the pod, TCP.
    pub container_port: u16,
}

/// `--net`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// Loopback only.
    None,
    /// A tap of its own, behind the host's addresses.
    Nat,
    /// An existing tap; addresses are the user's business.
    Tap(String),
}

/// All that the hosting process needs to know, plain data.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Plan {
    /// What the user asked of the container.
    pub wishes: Wishes,
    /// Processors of the VM.
    pub cpus: u8,
    /// Bytes of memory of the VM.
    pub memory: u64,
    /// Bytes of the DAX window, if there is to be one.
    #[serde(default)]
    pub dax: Option<u64>,
    /// Network.
    pub network: Network,
    /// Published ports.
    pub publish: Vec<Publish>,
    /// Host name of the pod.
    pub hostname: String,
    /// Guest kernel.
    pub kernel: PathBuf,
    /// Initramfs with the agent.
    pub initrd: PathBuf,
    /// More words for the kernel command line.
    pub kernel_args: Vec<String>,
    /// Longest time to the agent's ready message, in ms.
    pub init_timeout_ms: u64,
    /// Removed when it ends.
    pub auto_remove: bool,
    /// Keep stdin open.
    pub interactive: bool,
    /// Signal that asks it to stop.
    pub stop_signal: i32,
    /// A root directory in place of an image.
    pub rootfs: Option<PathBuf>,
    /// Store of the image.
    pub labels: BTreeMap<String, String>,
}

/// One pod with its one container.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Record {
    /// 64 hex digits.
    pub id: String,
    /// Unique among the records.
    pub name: String,
    /// The image as the user named it.
    pub image: String,
    /// Its id.
    pub image_id: Option<Digest>,
    /// Its layers, which must stay.
    pub layers: Vec<Digest>,
    /// The command that runs.
    pub command: Vec<String>,
    /// Plan.
    pub plan: Plan,
    /// Status.
    pub status: Status,
    /// The hosting process, for people; nothing relies on it.
    pub pid: Option<u32>,
    /// When.
    pub created: Millis,
    /// When the process was started.
    pub started: Option<Millis>,
    /// When it ended.
    pub finished: Option<Millis>,
    /// Exit status.
    pub exit_code: Option<u32>,
    /// Why it failed, if it was not the container's own doing.
    pub error: Option<String>,
    /// What the network left on the host.
    pub net: Option<NetRecord>,
    /// The container's id in its VM, of one that was restored: the original's.
    #[serde(default)]
    pub guest_id: Option<String>,
}

impl Record {
    /// Of a container that has not started; what [`Pods::reserve`] does not give it, such as its image, is the caller's to say.
    pub fn of(id: String, plan: Plan, pid: Option<u32>) -> Self {
        Self {
            id,
            name: String::new(),
            image: String::new(),
            image_id: None,
            layers: Vec::new(),
            command: Vec::new(),
            plan,
            status: Status::Created,
            pid,
            created: clock::now(),
            started: None,
            finished: None,
            exit_code: None,
            error: None,
            net: None,
            guest_id: None,
        }
    }

    /// The 12 digits that docker shows.
    pub fn short_id(&self) -> &str {
        self.id.get(..12).unwrap_or(&self.id)
    }

    /// The id by which the pod's Task service knows the container.
    pub fn container_id(&self) -> &str {
        self.guest_id.as_deref().unwrap_or(&self.id)
    }

    /// Some process should host it. One that `create` made waits for `start` instead.
    pub(crate) fn wants_host(&self) -> bool {
        match self.status {
            Status::Created => self.pid.is_some(),
            Status::Running => true,
            Status::Exited => false,
        }
    }
}

/// Failures with the pods' records.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// The verb.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// docker's words.
    #[error("No such container: {0}")]
    NotFound(String),
    /// Several ids start so.
    #[error("{wanted:?} means containers {first} and {second}: give more digits of the id")]
    Ambiguous {
        /// What was wanted.
        wanted: String,
        /// One of them.
        first: String,
        /// Another.
        second: String,
    },
    /// docker's words.
    #[error(
        "Conflict. The container name \"/{name}\" is already in use by container \"{id}\". You have to remove (or rename) that container to be able to reuse that name."
    )]
    Busy {
        /// The name.
        name: String,
        /// Who has it.
        id: String,
    },
}

/// Shorthand.
pub type Result<T> = std::result::Result<T, Error>;

trait At<T> {
    fn at(self, action: &'static str, path: &Path) -> Result<T>;
}

impl<T, E: Into<io::Error>> At<T> for std::result::Result<T, E> {
    fn at(self, action: &'static str, path: &Path) -> Result<T> {
        self.map_err(|source| Error::Io {
            action,
            path: path.to_owned(),
            source: source.into(),
        })
    }
}

/// The folders of all pods.
#[derive(Clone, Debug)]
pub struct Pods {
    state: PathBuf,
    root: PathBuf,
}

/// Held while names and addresses are chosen.
#[derive(Debug)]
pub struct Guard {
    _lock: File,
}

/// Held by the process that hosts a pod.
#[derive(Debug)]
pub struct Alive {
    _lock: File,
}

/// Held by who starts a pod again when it has ended.
#[derive(Debug)]
pub struct Restarting {
    _lock: File,
}

impl Alive {
    /// The lock as a descriptor, to be inherited by the process that goes on hosting.
    pub fn into_file(self) -> File {
        self._lock
    }

    /// The inherited lock.
    pub fn from_file(file: File) -> Self {
        Self { _lock: file }
    }
}

impl Pods {
    /// Uses (and makes) the folders.
    ///
    /// # Errors
    /// They cannot be made.
    pub fn open(state: &Path, root: &Path) -> Result<Self> {
        for path in [state.join("pods"), root.join("pods")] {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&path)
                .at("create", &path)?;
        }
        Ok(Self {
            state: state.to_owned(),
            root: root.to_owned(),
        })
    }

    /// What VMs are cloned from.
    pub fn templates(&self) -> Shelf {
        Shelf::of(&self.state)
    }

    /// The volatile folder of a pod.
    pub fn state_dir(&self, id: &str) -> PathBuf {
        self.state.join("pods").join(id)
    }

    /// The folder of a pod on the disk.
    pub fn data_dir(&self, id: &str) -> PathBuf {
        self.root.join("pods").join(id)
    }

    /// The Task service's socket.
    pub fn socket(&self, id: &str) -> PathBuf {
        self.state_dir(id).join("task.sock")
    }

    /// The container's log.
    pub fn log(&self, id: &str) -> PathBuf {
        self.data_dir(id).join("container.log")
    }

    /// Folder for what all pods share in `/run`.
    pub fn state_root(&self) -> &Path {
        &self.state
    }

    /// Locks names and addresses.
    ///
    /// # Errors
    /// The lock file cannot be used.
    pub fn lock(&self) -> Result<Guard> {
        let path = self.state.join("lock");
        let file = open_lock(&path)?;
        loop {
            match rustix::fs::flock(&file, FlockOperation::LockExclusive) {
                Ok(()) => return Ok(Guard { _lock: file }),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e).at("lock", &path),
            }
        }
    }

    /// All records, newest first. One that cannot be read is skipped with a warning.
    ///
    /// # Errors
    /// The folder cannot be listed.
    pub fn list(&self) -> Result<Vec<Record>> {
        let dir = self.state.join("pods");
        let mut records = Vec::new();
        for entry in fs::read_dir(&dir).at("list", &dir)? {
            let entry = entry.at("list", &dir)?;
            match self.load(&entry.file_name().to_string_lossy()) {
                Ok(record) => records.push(record),
                Err(Error::NotFound(_)) => {}
                Err(error) => log::warn!("{error}"),
            }
        }
        records.sort_by(|a, b| b.created.cmp(&a.created).then_with(|| a.id.cmp(&b.id)));
        Ok(records)
    }

    /// The record of an id.
    ///
    /// # Errors
    /// None there, or unreadable.
    pub fn load(&self, id: &str) -> Result<Record> {
        let path = self.state_dir(id).join("pod.json");
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(Error::NotFound(id.to_owned())),
            Err(e) => return Err(e).at("read", &path),
        };
        serde_json::from_slice(&bytes)
            .map_err(io::Error::from)
            .at("read", &path)
    }

    /// Writes a record.
    ///
    /// # Errors
    /// The disk.
    pub fn save(&self, record: &Record) -> Result<()> {
        let path = self.state_dir(&record.id).join("pod.json");
        let bytes = serde_json::to_vec_pretty(record)
            .map_err(io::Error::from)
            .at("write", &path)?;
        files::replace(&path, &bytes).at("write", &path)
    }

    /// Finds a container by name, id or start of an id.
    ///
    /// # Errors
    /// None or several.
    pub fn find(&self, wanted: &str) -> Result<Record> {
        let records = self.list()?;
        let name = wanted.strip_prefix('/').unwrap_or(wanted);
        if let Some(record) = records
            .iter()
            .find(|record| record.name == name || record.id == name)
        {
            return Ok(record.clone());
        }
        let mut matching = records
            .into_iter()
            .filter(|record| !name.is_empty() && record.id.starts_with(name));
        match (matching.next(), matching.next()) {
            (Some(record), None) => Ok(record),
            (Some(first), Some(second)) => Err(Error::Ambiguous {
                wanted: wanted.to_owned(),
                first: first.short_id().to_owned(),
                second: second.short_id().to_owned(),
            }),
            (None, _) => Err(Error::NotFound(wanted.to_owned())),
        }
    }

    /// Gives the record its place and name, and takes its `alive` lock. `name` is None for a made-up one.
    ///
    /// # Errors
    /// The name is taken.
    pub fn reserve(&self, mut record: Record, name: Option<&str>) -> Result<(Record, Alive)> {
        let _guard = self.lock()?;
        let taken = self.list()?;
        let holder = |name: &str| taken.iter().find(|other| other.name == name);
        record.name = match name {
            Some(name) => match holder(name) {
                Some(other) => {
                    return Err(Error::Busy {
                        name: name.to_owned(),
                        id: other.id.clone(),
                    });
                }
                None => name.to_owned(),
            },
            None => {
                let mut made = crate::ids::name();
                while holder(&made).is_some() {
                    made = format!("{}_{}", crate::ids::name(), crate::ids::random_hex(2));
                }
                made
            }
        };
        for dir in [self.state_dir(&record.id), self.data_dir(&record.id)] {
            fs::DirBuilder::new()
                .mode(0o700)
                .create(&dir)
                .at("create", &dir)?;
        }
        // A new file has no other holder.
        let alive = self
            .try_alive(&record.id)?
            .ok_or_else(|| Error::NotFound(record.id.clone()))?;
        self.save(&record)?;
        Ok((record, alive))
    }

    /// Makes a container that has ended, or was never started, ready to be hosted by this process. None if some process
    /// hosts it.
    ///
    /// # Errors
    /// It is gone, or the disk.
    pub fn revive(&self, id: &str) -> Result<Option<(Record, Alive)>> {
        let deadline = Instant::now() + LOOKS;
        loop {
            let guard = self.lock()?;
            let record = self.load(id)?;
            if let Some(alive) = self.try_alive(id)? {
                return self.revived(record, alive).map(Some);
            }
            drop(guard);
            // Whoever waits for its end, such as `logs -f`, locks `alive` for a moment to look.
            if record.status == Status::Running || Instant::now() >= deadline {
                return Ok(None);
            }
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    fn revived(&self, mut record: Record, alive: Alive) -> Result<(Record, Alive)> {
        record.status = Status::Created;
        record.pid = Some(std::process::id());
        record.started = None;
        record.finished = None;
        record.exit_code = None;
        record.error = None;
        // It boots.
        record.guest_id = None;
        self.save(&record)?;
        Ok((record, alive))
    }

    /// Takes the `alive` lock, unless a living process has it.
    ///
    /// # Errors
    /// The lock file cannot be used.
    pub fn try_alive(&self, id: &str) -> Result<Option<Alive>> {
        let path = self.state_dir(id).join("alive");
        let file = open_lock(&path)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Alive { _lock: file })),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(e) => Err(e).at("lock", &path),
        }
    }

    /// Keeps a pod from being removed when it ends.
    ///
    /// # Errors
    /// The lock file cannot be used.
    pub fn restarting(&self, id: &str) -> Result<Restarting> {
        let path = self.state_dir(id).join("restart");
        let file = open_lock(&path)?;
        // Never waits for long: only who removes the pod takes it otherwise, for a moment.
        rustix::io::retry_on_intr(|| rustix::fs::flock(&file, FlockOperation::LockShared))
            .at("lock", &path)?;
        Ok(Restarting { _lock: file })
    }

    /// Removes a pod that has ended, if it is to be and nobody starts it again.
    ///
    /// # Errors
    /// The disk.
    pub fn remove_ended(&self, record: &Record) -> Result<()> {
        let is_restarted = File::open(self.state_dir(&record.id).join("restart")).is_ok_and(|file| {
            let locked = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
            locked == Err(rustix::io::Errno::WOULDBLOCK)
        });
        if record.plan.auto_remove && !is_restarted {
            self.remove(&record.id)?;
        }
        Ok(())
    }

    /// Whether a living process hosts the pod.
    pub fn is_hosted(&self, id: &str) -> bool {
        let path = self.state_dir(id).join("alive");
        let Ok(file) = File::open(&path) else { return false };
        matches!(
            rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared),
            Err(rustix::io::Errno::WOULDBLOCK)
        )
    }

    /// Records whose hosting process died without a word, with the lock that makes the caller their undertaker.
    ///
    /// # Errors
    /// The folder cannot be listed.
    pub fn dead(&self) -> Result<Vec<(Record, Alive)>> {
        let mut dead = Vec::new();
        for record in self.list()? {
            if !record.wants_host() {
                continue;
            }
            if let Some(alive) = self.try_alive(&record.id)? {
                // Between list and lock its host may have finished properly.
                match self.load(&record.id) {
                    Ok(record) if record.wants_host() => dead.push((record, alive)),
                    _ => {}
                }
            }
        }
        Ok(dead)
    }

    /// Marks a pod of [`Pods::dead`] as ended.
    ///
    /// # Errors
    /// The disk.
    pub fn bury(&self, record: &mut Record) -> Result<()> {
        record.status = Status::Exited;
        record.finished = Some(clock::now());
        record.exit_code = Some(EXIT_KILLED);
        record.error = Some("the process that hosted the VM was killed".to_owned());
        record.pid = None;
        let _ = fs::remove_file(self.socket(&record.id));
        self.save(record)
    }

    /// Removes all traces of a pod that is not hosted.
    ///
    /// # Errors
    /// The disk.
    pub fn remove(&self, id: &str) -> Result<()> {
        let data = self.data_dir(id);
        crate::image::remove_tree(&data).at("remove", &data)?;
        // The record last: what is left of a removal cut short is still listed and can be removed again.
        let state = self.state_dir(id);
        crate::image::remove_tree(&state).at("remove", &state)
    }
}

fn open_lock(path: &Path) -> Result<File> {
    File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .at("open", path)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn record(id: &str) -> Record {
        let plan = Plan {
            wishes: Wishes::default(),
            cpus: 1,
            memory: 1 << 28,
            dax: None,
            network: Network::Tap("tap0".into()),
            publish: Vec::new(),
            hostname: "h".into(),
            kernel: "/k".into(),
            initrd: "/i".into(),
            kernel_args: Vec::new(),
            init_timeout_ms: 1000,
            auto_remove: false,
            interactive: false,
            stop_signal: 15,
            rootfs: None,
            labels: BTreeMap::new(),
        };
        Record {
            image: "img".into(),
            command: vec!["sh".into()],
            ..Record::of(id.to_owned(), plan, None)
        }
    }

    struct Bed(PathBuf, Pods);

    fn bed() -> Bed {
        let dir = std::env::temp_dir().join(format!("cloister-pods-{}", crate::ids::random_hex(6)));
        let pods = Pods::open(&dir.join("run"), &dir.join("lib")).unwrap();
        Bed(dir, pods)
    }

    impl Drop for Bed {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    #[test]
    fn names_are_unique_and_ids_abbreviate() {
        let bed = bed();
        let pods = &bed.1;
        let a = format!("aa{}", "0".repeat(62));
        let b = format!("ab{}", "0".repeat(62));
        let (first, _alive) = pods.reserve(record(&a), Some("web")).unwrap();
        let busy = pods.reserve(record(&b), Some("web")).unwrap_err();
        assert!(
            busy.to_string()
                .contains(&format!("already in use by container \"{a}\"")),
            "{busy}"
        );
        assert!(!pods.state_dir(&b).exists());
        let (second, _alive) = pods.reserve(record(&b), None).unwrap();
        assert_eq!(pods.find("web").unwrap(), first);
        assert_eq!(pods.find("ab").unwrap(), second);
        assert_eq!(pods.find(&second.name).unwrap(), second);
        assert!(matches!(pods.find("a"), Err(Error::Ambiguous { .. })));
        assert!(matches!(pods.find("zz"), Err(Error::NotFound(_))));
        assert!(matches!(pods.find(""), Err(Error::NotFound(_))));
        pods.remove(&a).unwrap();
        assert!(!pods.state_dir(&a).exists() && !pods.data_dir(&a).exists());
        pods.reserve(record(&a), Some("web")).unwrap();
    }

    #[test]
    fn the_ended_can_be_started_again() {
        let bed = bed();
        let pods = &bed.1;
        // Made and not started: nobody misses its host.
        let (_, alive) = pods.reserve(record("aa"), Some("one")).unwrap();
        assert!(pods.revive("aa").unwrap().is_none());
        drop(alive);
        assert!(pods.dead().unwrap().is_empty());
        let (mut first, alive) = pods.revive("aa").unwrap().unwrap();
        assert_eq!(
            (first.status, first.pid),
            (Status::Created, Some(std::process::id()))
        );
        first.status = Status::Exited;
        first.exit_code = Some(3);
        pods.save(&first).unwrap();
        drop(alive);
        let (second, alive) = pods.revive("aa").unwrap().unwrap();
        assert_eq!((second.status, second.exit_code), (Status::Created, None));
        drop(alive);
        // Its host died before it said a word.
        assert_eq!(pods.dead().unwrap().len(), 1);
        assert!(matches!(pods.revive("zz"), Err(Error::NotFound(_))));
    }

    #[test]
    fn who_only_looks_keeps_none_from_being_started() {
        let bed = bed();
        let pods = &bed.1;
        let (_, alive) = pods.reserve(record("aa"), Some("one")).unwrap();
        drop(alive);
        let looker = File::open(pods.state_dir("aa").join("alive")).unwrap();
        rustix::fs::flock(&looker, FlockOperation::NonBlockingLockShared).unwrap();
        let looking = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(30));
            drop(looker);
        });
        assert!(pods.revive("aa").unwrap().is_some());
        looking.join().unwrap();
    }

    #[test]
    fn what_is_restarted_is_not_removed_when_it_ends() {
        let bed = bed();
        let pods = &bed.1;
        let mut wanted = record("aa");
        wanted.plan.auto_remove = true;
        let (record, _alive) = pods.reserve(wanted, Some("one")).unwrap();
        let (first, second) = (pods.restarting("aa").unwrap(), pods.restarting("aa").unwrap());
        drop(first);
        pods.remove_ended(&record).unwrap();
        assert!(pods.load("aa").is_ok());
        drop(second);
        pods.remove_ended(&record).unwrap();
        assert!(matches!(pods.load("aa"), Err(Error::NotFound(_))));
    }

    #[test]
    fn the_dead_are_told_by_their_lock() {
        let bed = bed();
        let pods = &bed.1;
        let (mut record, alive) = pods.reserve(record("aa"), Some("one")).unwrap();
        record.status = Status::Running;
        pods.save(&record).unwrap();
        assert!(pods.is_hosted("aa"));
        assert!(pods.dead().unwrap().is_empty());
        drop(alive);
        assert!(!pods.is_hosted("aa"));
        let (mut dead, _undertaker) = pods.dead().unwrap().remove(0);
        pods.bury(&mut dead).unwrap();
        let buried = pods.load("aa").unwrap();
        assert_eq!((buried.status, buried.exit_code), (Status::Exited, Some(137)));
        assert!(pods.dead().unwrap().is_empty());
    }
}
