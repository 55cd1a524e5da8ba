// SPDX-License-Identifier: Apache-2.0
//! What all pods of a process, the daemon or a worker of it, share: the configuration, the host of their cells, the way to
//! containerd, and the table of pods, which a new daemon reads from what the one before it left in `<state_dir>/sandboxes`.
//! The daemon has its [`Workers`] as well, and takes over what is left of those that die.

use super::config::{Config, Profile};
use super::event_log::EventLog;
use super::events::Publisher;
use super::metrics::Metrics;
use super::pod_plan::PodPlan;
use super::sandbox::{self, Phase, Record, Sandbox};
use super::workers::{self, Worker, Workers};
use crate::clock;
use crate::files;
use crate::pod::shelf::Shelf;
use crate::pod::template::{SETTLE, Templates};
use cloister_vmm::{CellHost, SpareConfig};
use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{Notify, watch};

/// See the module.
pub struct Node {
    /// As configured.
    pub config: Config,
    /// Event loops and workers of all cells.
    pub cells: CellHost,
    /// What pods are cloned from.
    pub templates: Templates,
    /// The way to containerd's events.
    pub events: Publisher,
    /// What is counted.
    pub metrics: Metrics,
    /// What happens to pods.
    pub log: EventLog,
    /// Processes that host pods for this one; a worker has none.
    pub workers: Workers,
    /// The worker's name that this process is; none: it is the daemon.
    name: Option<String>,
    sandboxes: Mutex<HashMap<String, Arc<Sandbox>>>,
    /// A pod has come or gone.
    change: Arc<Notify>,
    /// A worker takes no more pods. Changed under the lock of the table.
    closed: watch::Sender<bool>,
}

/// Why a pod cannot be added.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The id becomes a folder's name.
    #[error("identifier {0:?} is not a valid one")]
    Id(String),
    /// There is one.
    #[error("sandbox {0}: already exists")]
    Exists(String),
    /// No such profile.
    #[error("sandboxer {asked:?} is not configured; there are: {known}")]
    Sandboxer {
        /// Asked for.
        asked: String,
        /// All names.
        known: String,
    },
    /// A worker has had its last pod.
    #[error("this worker ends")]
    Closed,
    /// Its folder.
    #[error(transparent)]
    Sandbox(#[from] sandbox::Error),
}

impl Node {
    /// Has spares made of this kind, in a moment: not while the pod that was just made has its containers started.
    pub fn keep_spares(&self, spares: SpareConfig) {
        let cells = self.cells.clone();
        tokio::spawn(async move {
            tokio::time::sleep(SETTLE).await;
            let made = tokio::task::spawn_blocking(move || {
                cells.keep_spares(spares)?;
                cells.refill_spares()
            });
            match made.await {
                Ok(Ok(made)) => log::debug!("{made} spare virtual machines were made"),
                Ok(Err(error)) => log::warn!("no spare virtual machines: {}", crate::error::chain(&error)),
                Err(error) => log::warn!("no spare virtual machines: {error}"),
            }
        });
    }

    fn empty(
        config: Config,
        cells: CellHost,
        events: Publisher,
        metrics: Metrics,
        workers: Workers,
        name: Option<String>,
    ) -> Self {
        let templates = match name {
            Some(_) => Templates::from_shelf(cells.clone(), Shelf::of_workers(&config.state_dir)),
            None => Templates::new(cells.clone()),
        };
        Self {
            workers,
            config,
            templates,
            cells,
            change: events.heard(),
            events,
            metrics,
            log: EventLog::default(),
            name,
            sandboxes: Mutex::default(),
            closed: watch::channel(false).0,
        }
    }

    /// A worker of this name, without pods.
    pub fn in_worker(
        config: Config,
        cells: CellHost,
        events: Publisher,
        metrics: Metrics,
        name: String,
    ) -> Arc<Self> {
        let none = Workers::new(&config, Path::new(""));
        Arc::new(Self::empty(config, cells, events, metrics, none, Some(name)))
    }

    /// The daemon, with what was left behind: workers that go on with their pods, and pods that are over. `program` is
    /// cloisterd, to be started as a worker. To be called in a runtime.
    ///
    /// # Errors
    /// The state folder cannot be used.
    pub fn new(
        config: Config,
        cells: CellHost,
        events: Publisher,
        metrics: Metrics,
        program: &Path,
    ) -> io::Result<Arc<Self>> {
        let workers = Workers::new(&config, program);
        let node = Self::empty(config, cells, events, metrics, workers, None);
        let dir = node.dir();
        files::make_private_dir(&dir)?;
        // Of another kernel or agent, it may be. Clones live on without them.
        Shelf::of_workers(&node.config.state_dir).clear()?;
        let adopted = node.workers.adopt()?;
        for entry in std::fs::read_dir(&dir)? {
            node.take_over(entry?.path());
        }
        let node = Arc::new(node);
        for (worker, process) in adopted {
            tokio::spawn(workers::attend(Arc::clone(&node), worker, process));
        }
        Ok(node)
    }

    /// A folder from the time before this daemon: of a pod that goes on in its worker, or is over.
    fn take_over(&self, dir: PathBuf) {
        let record = match Record::read(&dir) {
            Ok(record) => record,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                log::warn!("{} is not a sandbox's, and is removed: {error}", dir.display());
                let _ = std::fs::remove_dir_all(&dir);
                return;
            }
            // The pod may go on in a worker, and its task.sock is in there.
            Err(error) => {
                log::error!(
                    "{} is left as it is, for its record cannot be read: {error}; remove it if no worker has a pod of this id",
                    dir.display()
                );
                return;
            }
        };
        let mut reason = "cloisterd was restarted";
        if let Some(worker) = &record.worker {
            if self.workers.claim(worker, &record.id, record.created) {
                log::info!("sandbox {} goes on in worker {worker}", record.id);
                return;
            }
            if workers::running(&self.config.state_dir, worker).is_some() {
                log::error!(
                    "sandbox {} is left as it is: its worker {worker} runs, and says nothing of itself",
                    record.id
                );
                return;
            }
            reason = "its worker ended, as did cloisterd";
        }
        let id = record.id.clone();
        if self.recover(dir, record, reason) {
            log::warn!("sandbox {id} is over: {reason}");
        } else {
            log::warn!("sandbox {id} had not come up, and is removed: {reason}");
        }
    }

    /// Keeps what is left of a pod for containerd to ask about, if it had come up: Create or Start that fails is not followed by
    /// Stop and Shutdown. Answers whether it had. It removes files.
    fn recover(&self, dir: PathBuf, record: Record, reason: &str) -> bool {
        let had_come_up = record.phase >= Phase::Ready;
        let sandbox = Sandbox::recover(dir, record, reason, self.log.clone(), |name| {
            (self.profile(name).unwrap_or_default(), self.metrics.pod(name))
        });
        if had_come_up {
            self.table().insert(sandbox.id(), sandbox);
        } else {
            sandbox.discard();
        }
        had_come_up
    }

    /// Takes over what is left of a worker's pods; `how` it ended. It removes files.
    pub fn recover_pods_of(&self, worker: &Arc<Worker>, how: &str) {
        for id in self.workers.pods_of(worker) {
            let dir = self.dir().join(&id);
            let Ok(record) = Record::read(&dir) else {
                // It was removed, or not made yet.
                let _ = std::fs::remove_dir_all(&dir);
                continue;
            };
            if self.recover(dir, record, &format!("its worker {how}")) {
                log::error!("sandbox {id}: its worker {how}");
            }
        }
    }

    /// Where pods' folders are.
    pub fn dir(&self) -> PathBuf {
        self.config.state_dir.join("sandboxes")
    }

    fn table(&self) -> MutexGuard<'_, HashMap<String, Arc<Sandbox>>> {
        self.sandboxes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn profile(&self, sandboxer: &str) -> Option<Profile> {
        self.config.sandboxer.get(sandboxer).cloned()
    }

    /// The profile of a sandboxer.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn sandboxer(&self, name: &str) -> Result<Profile, Error> {
        self.profile(name).ok_or_else(|| Error::Sandboxer {
            asked: name.to_owned(),
            known: self
                .config
                .sandboxer
                .keys()
                .cloned()
                .collect::<Vec<_>>()
                .join(", "),
        })
    }

    /// Makes a pod known.
    ///
    /// # Errors
    /// Its id is bad or taken, or its folder cannot be made.
    pub fn create(
        &self,
        namespace: &str,
        id: &str,
        sandboxer: &str,
        netns: &str,
        plan: PodPlan,
    ) -> Result<Arc<Sandbox>, Error> {
        let created = self.try_create(namespace, id, sandboxer, netns, plan);
        if created.is_err() {
            self.close_if_empty();
        }
        created
    }

    /// Whether this can be a pod's id: it becomes a folder's name.
    ///
    /// # Errors
    /// It cannot.
    pub fn check_id(id: &str) -> Result<(), Error> {
        let sound = (1..=128).contains(&id.len())
            && id
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
            && id.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        if sound {
            Ok(())
        } else {
            Err(Error::Id(id.to_owned()))
        }
    }

    fn try_create(
        &self,
        namespace: &str,
        id: &str,
        sandboxer: &str,
        netns: &str,
        plan: PodPlan,
    ) -> Result<Arc<Sandbox>, Error> {
        let profile = self.sandboxer(sandboxer)?;
        Self::check_id(id)?;
        let mut table = self.table();
        if *self.closed.borrow() {
            return Err(Error::Closed);
        }
        if table.contains_key(id) {
            return Err(Error::Exists(id.to_owned()));
        }
        let record = Record {
            id: id.to_owned(),
            namespace: namespace.to_owned(),
            sandboxer: sandboxer.to_owned(),
            worker: self.name.clone(),
            plan,
            netns: netns.to_owned(),
            phase: Phase::Created,
            created: clock::now(),
            started: None,
            exit: None,
            steps: Vec::new(),
        };
        let counted = self.metrics.pod(sandboxer);
        let log = self.log.clone();
        let sandbox = Sandbox::create(self.dir().join(id), profile, record, counted, log)?;
        table.insert(id.to_owned(), Arc::clone(&sandbox));
        self.change.notify_one();
        Ok(sandbox)
    }

    /// A pod, if it belongs to containerd's namespace.
    pub fn find(&self, namespace: &str, id: &str) -> Option<Arc<Sandbox>> {
        let found = self.table().get(id).cloned()?;
        (found.record().namespace == namespace).then_some(found)
    }

    /// Whether a pod of this id is this process's own.
    pub fn knows(&self, id: &str) -> bool {
        self.table().contains_key(id)
    }

    /// All pods of this process.
    pub fn all(&self) -> Vec<Arc<Sandbox>> {
        self.table().values().cloned().collect()
    }

    /// Takes a pod from the table.
    pub fn forget(&self, sandbox: &Arc<Sandbox>) {
        let id = sandbox.id();
        let mut table = self.table();
        // Another one may have the id by now.
        if table.get(&id).is_some_and(|known| Arc::ptr_eq(known, sandbox)) {
            table.remove(&id);
        }
        drop(table);
        self.change.notify_one();
        self.close_if_empty();
    }

    /// What is told when a pod comes or goes, and of all that happens in one. For one who waits.
    pub fn change(&self) -> Arc<Notify> {
        Arc::clone(&self.change)
    }

    /// A worker without pods takes no more.
    pub fn close_if_empty(&self) {
        let table = self.table();
        if self.name.is_some() && table.is_empty() {
            self.closed.send_replace(true);
        }
    }

    /// Waits until this worker takes no more pods, and has none.
    pub async fn emptied(&self) {
        // The sender is ours: it cannot be gone.
        let _ = self.closed.subscribe().wait_for(|closed| *closed).await;
    }

    /// The text for a scrape, of this process and its workers.
    pub async fn scrape(&self) -> String {
        let metrics = self.metrics.clone();
        // It may have to wait for VMs' locks.
        let own = tokio::task::spawn_blocking(move || metrics.encode()).await;
        self.workers.add_metrics(own.unwrap_or_default()).await
    }

    /// Ends all pods of this process, at its own end.
    pub async fn stop_all(&self) {
        let all = self.all();
        let pods = futures_util::future::join_all(all.iter().map(|sandbox| sandbox.stop()));
        tokio::join!(pods, self.templates.close());
    }
}

/// Held by the one daemon that uses a state folder.
#[derive(Debug)]
pub struct Only {
    _lock: std::fs::File,
}

impl Only {
    /// Takes the folder, which is made if it is not there.
    ///
    /// # Errors
    /// Another daemon has it, or it cannot be used.
    pub fn take(state_dir: &Path) -> io::Result<Self> {
        use std::io::{Read, Seek, Write};
        files::make_private_dir(state_dir)?;
        let mut file = std::fs::File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(state_dir.join("cloisterd.lock"))?;
        if rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err() {
            let mut pid = String::new();
            let _ = file.read_to_string(&mut pid);
            return Err(io::Error::other(format!(
                "another cloisterd (process {}) uses it",
                pid.trim()
            )));
        }
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{}", std::process::id())?;
        Ok(Self { _lock: file })
    }
}
