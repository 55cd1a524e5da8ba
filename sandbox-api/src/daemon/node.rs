// SPDX-License-Identifier: Apache-2.0
//! What all pods of the daemon share: the configuration, the host of their cells, the way to containerd, and the table of
//! pods, which a new daemon reads from what the one before it left in `<state_dir>/sandboxes`.

use super::config::{Config, Profile};
use super::event_log::EventLog;
use super::events::Publisher;
use super::metrics::Metrics;
use super::pod_plan::PodPlan;
use super::sandbox::{self, Phase, Record, Sandbox};
use crate::clock;
use crate::pod::template::{SETTLE, Templates};
use cloister_vmm::{CellHost, SpareConfig};
use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
    sandboxes: Mutex<HashMap<String, Arc<Sandbox>>>,
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

    /// Finds the pods that were left behind, all of them over.
    ///
    /// # Errors
    /// The state folder cannot be used.
    pub fn new(
        config: Config,
        cells: CellHost,
        events: Publisher,
        metrics: Metrics,
    ) -> io::Result<Arc<Self>> {
        let node = Self {
            config,
            templates: Templates::new(cells.clone()),
            cells,
            events,
            metrics,
            log: EventLog::default(),
            sandboxes: Mutex::default(),
        };
        let dir = node.dir();
        std::fs::create_dir_all(&dir)?;
        for entry in std::fs::read_dir(&dir)? {
            let path = entry?.path();
            match Sandbox::recover(path.clone(), node.log.clone(), |name| {
                (node.profile(name).unwrap_or_default(), node.metrics.pod(name))
            }) {
                Ok(sandbox) => {
                    log::warn!("sandbox {} ended with the daemon before this one", sandbox.id());
                    node.table().insert(sandbox.id(), sandbox);
                }
                Err(error) => {
                    log::warn!("{} is not a sandbox's, and is removed: {error}", path.display());
                    let _ = std::fs::remove_dir_all(&path);
                }
            }
        }
        Ok(Arc::new(node))
    }

    fn dir(&self) -> PathBuf {
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
        let profile = self.sandboxer(sandboxer)?;
        let sound = (1..=128).contains(&id.len())
            && id
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
            && id.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        if !sound {
            return Err(Error::Id(id.to_owned()));
        }
        let mut table = self.table();
        if table.contains_key(id) {
            return Err(Error::Exists(id.to_owned()));
        }
        let record = Record {
            id: id.to_owned(),
            namespace: namespace.to_owned(),
            sandboxer: sandboxer.to_owned(),
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
        Ok(sandbox)
    }

    /// A pod, if it belongs to containerd's namespace.
    pub fn find(&self, namespace: &str, id: &str) -> Option<Arc<Sandbox>> {
        let found = self.table().get(id).cloned()?;
        (found.record().namespace == namespace).then_some(found)
    }

    /// All pods.
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
    }

    /// Ends all pods, at the daemon's own end.
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
        std::fs::create_dir_all(state_dir)?;
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
