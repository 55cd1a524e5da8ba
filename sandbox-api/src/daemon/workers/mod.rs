// SPDX-License-Identifier: Apache-2.0
//! Pods in processes of their own: workers, of which each hosts up to `pods_per_worker` pods of one sandboxer.
//!
//! # Theory of operation
//!
//! A KVM VM belongs to the process that made it. A worker is this very program, started anew ([`process`], [`host`]), that runs
//! the same [`Node`] for the pods it is given, and serves each pod's Task socket itself: containerd's connections to tasks never
//! pass through the daemon. The daemon keeps who has which pod, and hands requests of containerd on as they are ([`router`]).
//!
//! ```text
//!  containerd ── Controller ──▶ daemon: router ─┬─ its own pods
//!                                               ├─ controller.sock ──▶ worker ── VM, VM, ...
//!                                               └─ controller.sock ──▶ worker ── VM      ◀── task.sock ── containerd
//!             daemon ◀── /events?follow ── admin.sock of each worker: which pods have gone, and what operators are told
//! ```
//!
//! A worker ends with its last pod. One that ends otherwise takes its pods along: the daemon sees its process end, and takes the
//! pods' records over as those of pods that have ended. A daemon that ends leaves its workers running; the next one finds their
//! folders and the records of their pods, and goes on ([`Workers::adopt`]).

pub mod cgroup;
pub mod host;
pub mod process;
pub mod router;
mod templates;

use super::config::Config;
use super::event_log::{Event, Kind};
use super::exposition::Exposition;
use super::node::Node;
use super::{http_client, report, uds};
use crate::clock::{self, Millis};
use crate::ids;
use crate::sync::lock;
use http_body_util::BodyExt;
use process::{About, Process};
use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::{OnceCell, watch};
use tonic::transport::Channel;

/// Time for a worker's answer to an operator: it may have to ask its VMs, and a scraper has 10 s.
const PATIENCE: Duration = Duration::from_secs(5);
/// More is no answer of a worker's.
const MAX_ANSWER: usize = 64 << 20;
/// Longest line of events.
const MAX_LINE: usize = 64 << 10;
/// Before a stream of events that broke is opened again.
const PAUSE: Duration = Duration::from_secs(1);
/// How long the kernel may take to see that nobody is in a cgroup any more, in steps.
const CGROUP_TRIES: u32 = 40;

/// A worker, as the daemon knows it.
pub struct Worker {
    /// What it is for.
    pub about: About,
    dir: PathBuf,
    channel: Channel,
    /// Its process, once there is one.
    started: OnceCell<()>,
    pid: AtomicU32,
    /// It takes no more pods.
    closed: AtomicBool,
    /// How it ended.
    gone: watch::Sender<Option<String>>,
    /// The latest metrics that it told.
    metrics: Mutex<Exposition>,
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Worker").field(&self.about).finish()
    }
}

impl Worker {
    /// To be called in a runtime.
    fn new(dir: PathBuf, about: About, takes_pods: bool) -> Arc<Self> {
        Arc::new(Self {
            channel: uds::lazy_channel(&process::controller(&dir)),
            dir,
            about,
            started: OnceCell::new(),
            pid: AtomicU32::new(0),
            closed: AtomicBool::new(!takes_pods),
            gone: watch::channel(None).0,
            metrics: Mutex::default(),
        })
    }

    /// Where it answers operators.
    pub fn admin(&self) -> PathBuf {
        process::admin(&self.dir)
    }

    /// How it ended, if it does within `patience`.
    async fn ended(&self, patience: Duration) -> Option<String> {
        let mut gone = self.gone.subscribe();
        let ended = tokio::time::timeout(patience, gone.wait_for(Option::is_some)).await;
        ended.ok()?.ok()?.clone()
    }

    /// It takes no more pods.
    fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }

    /// An answer to an operator.
    async fn ask(&self, path: &str) -> io::Result<hyper::body::Bytes> {
        http_client::collect(&self.admin(), path, MAX_ANSWER, PATIENCE).await
    }

    /// What it counts; of one that does not answer, what it last told.
    async fn metrics(&self) -> Exposition {
        match self.ask("/metrics").await {
            Ok(text) => {
                let told = Exposition::parse(&String::from_utf8_lossy(&text));
                lock(&self.metrics).clone_from(&told);
                told
            }
            Err(error) => {
                log::debug!("worker {}: metrics: {error}", self.about.name);
                lock(&self.metrics).clone()
            }
        }
    }

    /// What it had counted when it ended: its own last word, or what it last told.
    fn last_metrics(&self) -> Exposition {
        match std::fs::read_to_string(process::metrics(&self.dir)) {
            Ok(text) => Exposition::parse(&text),
            Err(_) => lock(&self.metrics).clone(),
        }
    }
}

/// What a pod needs of the worker that is to host it.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Its sandboxer.
    pub sandboxer: String,
    /// Pods in a worker of that.
    pub pods: u16,
    /// Where its process is to be.
    pub cgroup: Option<process::Cgroup>,
}

/// A pod's place.
struct Place {
    worker: Arc<Worker>,
    since: Millis,
}

#[derive(Default)]
struct Table {
    pods: HashMap<String, Place>,
    workers: Vec<Arc<Worker>>,
}

/// The daemon's workers; see the module.
pub struct Workers {
    dir: PathBuf,
    program: PathBuf,
    /// What they are started with.
    config: String,
    table: Mutex<Table>,
    /// What those have counted that have ended.
    gone: Mutex<Exposition>,
    /// Held by who builds templates for them.
    building: tokio::sync::Mutex<()>,
}

impl std::fmt::Debug for Workers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Workers").field(&self.dir).finish()
    }
}

/// The folder of all workers' folders, by the one name by which a worker is known.
pub fn folder(state_dir: &Path) -> PathBuf {
    let real = state_dir.canonicalize();
    real.as_deref().unwrap_or(state_dir).join("workers")
}

/// Where the worker of this name answers operators, if it runs. For one who is not its daemon.
pub fn running(state_dir: &Path, name: &str) -> Option<PathBuf> {
    let dir = folder(state_dir).join(name);
    // A name of ours has no separators.
    let runs = !name.contains('/') && process::find(&dir).is_some();
    runs.then(|| process::admin(&dir))
}

impl Workers {
    /// None yet. `program` is cloisterd.
    pub fn new(config: &Config, program: &Path) -> Self {
        Self {
            dir: folder(&config.state_dir),
            program: program.to_owned(),
            config: config.for_workers().to_toml(),
            table: Mutex::default(),
            gone: Mutex::default(),
            building: tokio::sync::Mutex::default(),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        lock(&self.table)
    }

    /// All that there are.
    pub fn all(&self) -> Vec<Arc<Worker>> {
        self.table().workers.clone()
    }

    /// The one that has a pod.
    pub fn of(&self, pod: &str) -> Option<Arc<Worker>> {
        self.table().pods.get(pod).map(|place| Arc::clone(&place.worker))
    }

    /// The ids of a worker's pods.
    pub fn pods_of(&self, worker: &Arc<Worker>) -> Vec<String> {
        let table = self.table();
        let its = table
            .pods
            .iter()
            .filter(|(_, place)| Arc::ptr_eq(&place.worker, worker));
        its.map(|(id, _)| id.clone()).collect()
    }

    /// Finds the workers of a daemon before this one, and clears away what those have left that have ended. To be called
    /// once, in a runtime, before there are pods.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn adopt(&self) -> io::Result<Vec<(Arc<Worker>, Process)>> {
        let entries = match std::fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let dir = entry?.path();
            let about = About::read(&dir);
            let Some(started) = process::find(&dir) else {
                clear_away(&dir, about.as_ref().ok());
                continue;
            };
            let about = match about {
                Ok(about) => about,
                Err(error) => {
                    log::error!(
                        "{}: a worker that runs and says nothing of itself: {error}",
                        dir.display()
                    );
                    continue;
                }
            };
            let process = Process::watch(started)?;
            let speaks = about.protocol == process::PROTOCOL;
            if !speaks {
                log::error!(
                    "worker {} (process {}) is of another version of cloisterd, {} instead of {}: it keeps its pods and gets no more; what is told of them may be incomplete until they are made anew",
                    about.name,
                    process.id(),
                    about.protocol,
                    process::PROTOCOL
                );
            }
            // One that was configured otherwise keeps its pods.
            let is_current =
                std::fs::read_to_string(process::config(&dir)).is_ok_and(|text| text == self.config);
            let worker = Worker::new(dir, about, speaks && is_current);
            worker.pid.store(process.id(), Ordering::Relaxed);
            let _ = worker.started.set(());
            self.table().workers.push(Arc::clone(&worker));
            found.push((worker, process));
        }
        Ok(found)
    }

    /// The worker of this name has this pod, as the pod's record says. False if there is no such worker.
    pub fn claim(&self, name: &str, pod: &str, since: Millis) -> bool {
        let mut table = self.table();
        let Some(worker) = table.workers.iter().find(|worker| worker.about.name == name) else {
            return false;
        };
        let worker = Arc::clone(worker);
        table.pods.insert(pod.to_owned(), Place { worker, since });
        true
    }

    /// The worker that is to have a pod: the one that has it (then false), or one with room, unless it has to be a `fresh`
    /// one. What is new is not started yet. To be called in a runtime.
    fn place(&self, pod: &str, wanted: &Wanted, fresh: bool) -> (Arc<Worker>, bool) {
        let mut table = self.table();
        if let Some(place) = table.pods.get(pod) {
            return (Arc::clone(&place.worker), false);
        }
        let has_room = |worker: &&Arc<Worker>| {
            let its = table
                .pods
                .values()
                .filter(|place| Arc::ptr_eq(&place.worker, worker));
            worker.about.sandboxer == wanted.sandboxer
                && worker.about.pods > 1
                && !worker.closed.load(Ordering::Relaxed)
                && its.count() < usize::from(worker.about.pods)
        };
        let found = table.workers.iter().find(has_room).cloned();
        let worker = found.filter(|_| !fresh).unwrap_or_else(|| {
            let name = ids::random_hex(4);
            let about = About {
                protocol: process::PROTOCOL,
                name: name.clone(),
                sandboxer: wanted.sandboxer.clone(),
                pods: wanted.pods,
                cgroup: wanted.cgroup.clone(),
            };
            Worker::new(self.dir.join(name), about, true)
        });
        if !table.workers.iter().any(|known| Arc::ptr_eq(known, &worker)) {
            table.workers.push(Arc::clone(&worker));
        }
        let place = Place {
            worker: Arc::clone(&worker),
            since: clock::now(),
        };
        table.pods.insert(pod.to_owned(), place);
        (worker, true)
    }

    /// The pod is not there, or not any more, as was so at this time.
    fn forget_pod(&self, pod: &str, worker: &Arc<Worker>, at: Millis) {
        let mut table = self.table();
        let is_it = |place: &Place| Arc::ptr_eq(&place.worker, worker) && place.since <= at;
        if table.pods.get(pod).is_some_and(is_it) {
            table.pods.remove(pod);
        }
    }

    /// Has its process started, unless it has been.
    async fn start(&self, node: &Arc<Node>, worker: &Arc<Worker>) -> io::Result<()> {
        let begin = || async {
            let (program, config) = (self.program.clone(), self.config.clone());
            let (dir, about) = (worker.dir.clone(), worker.about.clone());
            let started =
                tokio::task::spawn_blocking(move || process::start(&program, &dir, &about, &config))
                    .await
                    .map_err(io::Error::other)??;
            let process = Process::watch(started)?;
            worker.pid.store(process.id(), Ordering::Relaxed);
            log::debug!("worker {}: process {}", worker.about.name, process.id());
            tokio::spawn(attend(Arc::clone(node), Arc::clone(worker), process));
            Ok::<(), io::Error>(())
        };
        let started = worker.started.get_or_try_init(begin).await.copied();
        if started.is_err() {
            self.forget(worker);
        }
        started
    }

    fn forget(&self, worker: &Arc<Worker>) {
        let mut table = self.table();
        table.pods.retain(|_, place| !Arc::ptr_eq(&place.worker, worker));
        table.workers.retain(|known| !Arc::ptr_eq(known, worker));
    }

    /// What is told of all workers' pods.
    pub async fn reports(&self, sandboxes: &Path) -> Vec<report::Pod> {
        let workers = self.all();
        let asked: Vec<_> = workers
            .iter()
            .map(|worker| self.report(worker, sandboxes))
            .collect();
        futures_util::future::join_all(asked)
            .await
            .into_iter()
            .flatten()
            .collect()
    }

    async fn report(&self, worker: &Arc<Worker>, sandboxes: &Path) -> Vec<report::Pod> {
        let told = worker.ask("/pods").await;
        match told.and_then(|json| Ok(serde_json::from_slice::<Vec<report::Pod>>(&json)?)) {
            Ok(pods) => pods,
            Err(error) => {
                log::debug!("worker {}: pods: {error}", worker.about.name);
                let dirs = self.pods_of(worker).into_iter().map(|id| sandboxes.join(id));
                dirs.filter_map(|dir| report::Pod::read(&dir).ok()).collect()
            }
        }
    }

    /// What is told of the workers themselves.
    pub fn list(&self) -> Vec<report::Worker> {
        let of = |worker: &Arc<Worker>| report::Worker {
            name: worker.about.name.clone(),
            pid: worker.pid.load(Ordering::Relaxed),
            sandboxer: worker.about.sandboxer.clone(),
            pods: self.pods_of(worker),
            room: worker.about.pods,
        };
        self.all().iter().map(of).collect()
    }

    /// Adds what workers count, and have counted, to the daemon's own metrics.
    pub async fn add_metrics(&self, own: String) -> String {
        let workers = self.all();
        let gone = lock(&self.gone).clone();
        if workers.is_empty() && gone.is_empty() {
            return own;
        }
        let asked: Vec<_> = workers.iter().map(|worker| worker.metrics()).collect();
        let told = futures_util::future::join_all(asked).await;
        let mut sum = Exposition::parse(&own);
        sum.add(&gone);
        for one in &told {
            sum.add(one);
        }
        sum.text()
    }
}

/// Looks after a worker until it has ended, and then after what it left.
pub(super) async fn attend(node: Arc<Node>, worker: Arc<Worker>, process: Process) {
    let how = tokio::select! {
        how = process.ended() => how,
        () = listen(&node, &worker) => return,
    };
    worker.close();
    let (of, its) = (Arc::clone(&node), Arc::clone(&worker));
    let told = how.clone();
    let buried = tokio::task::spawn_blocking(move || {
        of.recover_pods_of(&its, &told);
        lock(&of.workers.gone).add(&its.last_metrics().counted());
        clear_away(&its.dir, Some(&its.about));
    });
    if let Err(error) = buried.await {
        log::error!("worker {}: {error}", worker.about.name);
    }
    node.workers.forget(&worker);
    worker.gone.send_replace(Some(how));
}

/// Removes what a worker that has ended left: its cgroup and its folder.
fn clear_away(dir: &Path, about: Option<&About>) {
    if let Some(cgroup) = about.and_then(|about| about.cgroup.as_ref()) {
        let mut tries = 0;
        while let Err(error) = cgroup::remove(&cgroup.parent, &cgroup.name) {
            tries += 1;
            if tries == CGROUP_TRIES {
                log::warn!(
                    "cannot remove the cgroup {} in {}: {error}",
                    cgroup.name,
                    cgroup.parent.display()
                );
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    if let Err(error) = std::fs::remove_dir_all(dir)
        && error.kind() != io::ErrorKind::NotFound
    {
        log::warn!("cannot remove {}: {error}", dir.display());
    }
}

/// Hears what happens to a worker's pods; has no end.
async fn listen(node: &Arc<Node>, worker: &Arc<Worker>) {
    let mut heard = Millis::MIN;
    loop {
        // What is kept is told again at the beginning of each stream.
        let known = heard;
        let followed = follow(worker, |event: Event| {
            if event.at > known {
                heard = heard.max(event.at);
                node.heard(worker, event);
            }
        });
        if let Err(error) = followed.await {
            log::debug!("worker {}: events: {error}", worker.about.name);
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn follow(worker: &Worker, mut each: impl FnMut(Event)) -> io::Result<()> {
    let answer = http_client::get(&worker.admin(), "/events?follow", PATIENCE).await?;
    let mut body = answer.into_body();
    let mut text = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(io::Error::other)?;
        let Some(piece) = frame.data_ref() else { continue };
        text.extend_from_slice(piece);
        while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = text.drain(..=end).collect();
            each(serde_json::from_slice(&line)?);
        }
        if text.len() > MAX_LINE {
            return Err(io::Error::other("a line without an end"));
        }
    }
    Ok(())
}

impl Node {
    /// What happened to a pod of a worker.
    fn heard(self: &Arc<Self>, worker: &Arc<Worker>, event: Event) {
        match event.kind {
            Kind::Started | Kind::StartFailed => {
                tokio::spawn(templates::build_what_is_asked_for(Arc::clone(self)));
            }
            // It may have been asked for by a daemon before this one.
            Kind::Created if self.workers.of(&event.pod).is_none() => {
                self.workers.claim(&worker.about.name, &event.pod, event.at);
            }
            Kind::Removed => self.workers.forget_pod(&event.pod, worker, event.at),
            _ => {}
        }
        self.log.add(event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workers() -> Workers {
        let config = Config {
            state_dir: "/nowhere".into(),
            ..Config::default()
        };
        Workers::new(&config, Path::new("/nowhere/cloisterd"))
    }

    fn wanted(sandboxer: &str, pods: u16) -> Wanted {
        Wanted {
            sandboxer: sandboxer.to_owned(),
            pods,
            cgroup: None,
        }
    }

    #[tokio::test]
    async fn pods_are_placed_where_there_is_room() {
        let workers = workers();
        let (first, is_new) = workers.place("a", &wanted("few", 2), false);
        assert!(is_new);
        let (again, is_new) = workers.place("a", &wanted("few", 2), false);
        assert!(Arc::ptr_eq(&first, &again) && !is_new, "a pod has one place");
        let (second, _) = workers.place("b", &wanted("few", 2), false);
        assert!(Arc::ptr_eq(&first, &second));
        let (third, _) = workers.place("c", &wanted("few", 2), false);
        assert!(!Arc::ptr_eq(&first, &third), "the first is full");
        let (other, _) = workers.place("d", &wanted("others", 2), false);
        assert!(!Arc::ptr_eq(&third, &other), "a worker is of one sandboxer");
        let (fresh, _) = workers.place("e", &wanted("few", 2), true);
        assert!(!Arc::ptr_eq(&third, &fresh));
        for id in ["x", "y"] {
            workers.place(id, &wanted("one", 1), false);
        }
        assert!(!Arc::ptr_eq(&workers.of("x").unwrap(), &workers.of("y").unwrap()));

        // A place that is left is taken again, unless its worker is on its way out.
        workers.forget_pod("b", &first, Millis::MAX);
        assert!(Arc::ptr_eq(
            &workers.place("f", &wanted("few", 2), false).0,
            &first
        ));
        workers.forget_pod("f", &first, Millis::MAX);
        first.close();
        assert!(!Arc::ptr_eq(
            &workers.place("g", &wanted("few", 2), false).0,
            &first
        ));

        workers.forget(&first);
        assert!(workers.of("a").is_none() && workers.pods_of(&first).is_empty());
        assert_eq!(workers.pods_of(&other), ["d"]);
    }

    #[tokio::test]
    async fn what_was_heard_late_does_not_take_a_place_that_is_new() {
        let workers = workers();
        let (worker, _) = workers.place("a", &wanted("few", 2), false);
        let name = &worker.about.name;
        assert!(workers.claim(name, "b", 100) && !workers.claim("nobody", "c", 100));
        workers.forget_pod("b", &worker, 99);
        assert!(workers.of("b").is_some());
        workers.forget_pod("b", &worker, 100);
        assert!(workers.of("b").is_none() && workers.of("c").is_none());
    }

    #[tokio::test]
    async fn how_a_worker_ended_is_waited_for_only_so_long() {
        let workers = workers();
        let (worker, _) = workers.place("a", &wanted("one", 1), false);
        assert_eq!(worker.ended(Duration::from_millis(1)).await, None);
        worker.gone.send_replace(Some("was killed by signal 9".into()));
        let how = worker.ended(Duration::from_secs(60)).await;
        assert_eq!(how.as_deref(), Some("was killed by signal 9"));
    }

    #[tokio::test]
    async fn what_workers_left_is_cleared_away() {
        let dir = std::env::temp_dir().join(format!("cloister-workers-{}", ids::random_hex(4)));
        let config = Config {
            state_dir: dir.clone(),
            ..Config::default()
        };
        let workers = Workers::new(&config, Path::new("/nowhere/cloisterd"));
        assert!(workers.adopt().unwrap().is_empty(), "there is no folder");
        let left = folder(&dir).join("dead");
        std::fs::create_dir_all(&left).unwrap();
        // It has this process's number, which is no worker.
        process::sign(&left).unwrap();
        assert!(running(&dir, "dead").is_none() && running(&dir, "../x").is_none());
        assert!(workers.adopt().unwrap().is_empty());
        assert!(!left.exists());
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
