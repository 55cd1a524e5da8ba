// SPDX-License-Identifier: Apache-2.0
//! What the daemon tells operators of itself and its pods: plain data, JSON on the [`admin`](super::admin) socket.

use super::node::Node;
use super::sandbox::{Exit, Phase, Record, Sandbox};
use super::steps::StepTime;
use crate::clock::Millis;
use crate::pod::task;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

/// The daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Daemon {
    /// Its version.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// containerd's socket.
    pub containerd_address: PathBuf,
    /// Its workers.
    #[serde(default)]
    pub workers: Vec<Worker>,
}

/// A process that hosts pods for the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Worker {
    /// Its name.
    pub name: String,
    /// Its process; 0 before there is one.
    pub pid: u32,
    /// The sandboxer that its pods are of.
    pub sandboxer: String,
    /// Its pods' ids.
    pub pods: Vec<String>,
    /// Pods that it hosts at most.
    pub room: u16,
}

impl Daemon {
    /// This process.
    pub fn new(node: &Node) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            containerd_address: node.config.containerd_address.clone(),
            workers: node.workers.list(),
        }
    }
}

/// A container of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// containerd's id.
    pub id: String,
    /// Kubernetes' name; empty if it has none.
    pub name: String,
    /// Its image's name; empty if nobody said.
    pub image: String,
    /// Folder of its config.json.
    pub bundle: PathBuf,
    /// Its process in the guest.
    pub pid: u32,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// When its process was started.
    pub started: Option<Millis>,
    /// Its exit status, once it has ended.
    pub exit_status: Option<u32>,
    /// When it ended.
    pub ended: Option<Millis>,
    /// Further processes in it.
    pub execs: usize,
}

impl From<task::Listed> for Container {
    fn from(listed: task::Listed) -> Self {
        let ended = listed.exit.as_ref().map(|exit| {
            let millis = i64::from(exit.at.nanos / 1_000_000);
            exit.at.seconds.saturating_mul(1000).saturating_add(millis)
        });
        Self {
            id: listed.id,
            name: listed.name,
            image: listed.image,
            bundle: listed.bundle.into(),
            pid: listed.pid,
            terminal: listed.terminal,
            started: listed.started,
            exit_status: listed.exit.map(|exit| exit.status),
            ended,
            execs: listed.execs,
        }
    }
}

impl Container {
    /// In a word.
    pub fn state(&self) -> &'static str {
        match (self.started, self.exit_status) {
            (_, Some(_)) => "exited",
            (Some(_), None) => "running",
            (None, None) => "created",
        }
    }
}

/// A pod, in few words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// containerd's id.
    pub id: String,
    /// Kubernetes' name; empty if it has none.
    pub name: String,
    /// Its Kubernetes namespace.
    pub namespace: String,
    /// containerd's namespace.
    pub containerd_namespace: String,
    /// The sandboxer whose profile it has.
    pub sandboxer: String,
    /// Phase.
    pub phase: Phase,
    /// When containerd made it known.
    pub created: Millis,
    /// When its agent was ready.
    pub started: Option<Millis>,
    /// How it ended.
    pub exit: Option<Exit>,
    /// vCPUs of its VM: now while it lives, else what was promised.
    pub vcpus: u8,
    /// Bytes of RAM of its VM, likewise.
    pub memory: u64,
    /// Bytes of host memory that this takes now, while the VM lives.
    pub memory_used: Option<u64>,
    /// Its containers.
    pub containers: Vec<Container>,
    /// Where its Task service listens.
    pub task_socket: PathBuf,
    /// The process that hosts it, if that was asked.
    #[serde(default)]
    pub process: Option<u32>,
}

impl Pod {
    /// What its record says.
    pub fn from_record(record: &Record, task_socket: PathBuf) -> Self {
        Self {
            id: record.id.clone(),
            name: record.plan.name.clone(),
            namespace: record.plan.namespace.clone(),
            containerd_namespace: record.namespace.clone(),
            sandboxer: record.sandboxer.clone(),
            phase: record.phase,
            created: record.created,
            started: record.started,
            exit: record.exit.clone(),
            vcpus: record.plan.cpus,
            memory: record.plan.memory,
            memory_used: None,
            containers: Vec::new(),
            task_socket,
            process: None,
        }
    }

    /// What the record in its folder says.
    ///
    /// # Errors
    /// There is none.
    pub fn read(dir: &Path) -> io::Result<Self> {
        Ok(Self::from_record(&Record::read(dir)?, dir.join("task.sock")))
    }

    /// What is so now. It asks the VM, which may have to wait for a lock.
    pub fn new(sandbox: &Sandbox) -> Self {
        let containers = sandbox.service().map(|service| service.list());
        let size = sandbox.size();
        Self {
            process: Some(std::process::id()),
            phase: sandbox.phase(),
            vcpus: size.cpus,
            memory: size.memory,
            memory_used: sandbox
                .machine()
                .filter(|machine| machine.dead().borrow().is_none())
                .and_then(|machine| machine.cell().resident_ram()),
            containers: containers
                .unwrap_or_default()
                .into_iter()
                .map(Container::from)
                .collect(),
            ..Self::from_record(&sandbox.record(), sandbox.socket())
        }
    }

    /// The 12 digits that docker shows.
    pub fn short_id(&self) -> &str {
        self.id.get(..12).unwrap_or(&self.id)
    }
}

/// What a VM has counted since it was made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Exits that reached the daemon, by reason.
    pub exits: BTreeMap<String, u64>,
    /// Bytes through devices, by device and counter.
    pub bytes: BTreeMap<String, BTreeMap<String, u64>>,
    /// Other things of devices, by device and counter.
    pub events: BTreeMap<String, BTreeMap<String, u64>>,
}

impl From<super::metrics::Totals> for Counters {
    fn from(totals: super::metrics::Totals) -> Self {
        let nested = |flat: BTreeMap<(&'static str, &'static str), u64>| {
            let mut nested = BTreeMap::<String, BTreeMap<String, u64>>::new();
            for ((device, counter), value) in flat {
                let of_device = nested.entry(device.to_owned()).or_default();
                of_device.insert(counter.to_owned(), value);
            }
            nested
        };
        Self {
            exits: totals
                .exits
                .into_iter()
                .map(|(reason, value)| (reason.to_owned(), value))
                .collect(),
            bytes: nested(totals.bytes),
            events: nested(totals.events),
        }
    }
}

/// A thread of the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Thread {
    /// Its id.
    pub tid: u32,
    /// Its name: `pod-` and four digits of the pod's id, then the vCPU.
    pub name: String,
    /// As in proc(5): R, S, D, ...
    pub state: String,
    /// CPU time it has taken.
    pub cpu_millis: u64,
}

/// All that is known of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Details {
    /// In few words.
    #[serde(flatten)]
    pub pod: Pod,
    /// What was asked for.
    pub record: Record,
    /// How long each step of its start took.
    pub steps: Vec<StepTime>,
    /// What its VM has counted, while it lives.
    pub counters: Option<Counters>,
    /// Its vCPUs' threads.
    pub threads: Vec<Thread>,
}

impl Details {
    /// What is so now.
    pub fn new(sandbox: &Sandbox) -> Self {
        let record = sandbox.record();
        let machine = sandbox.machine();
        let counters = machine
            .as_ref()
            .map(|machine| super::metrics::Source::totals(&**machine.cell()).into());
        Self {
            pod: Pod::new(sandbox),
            steps: record.steps.clone(),
            record,
            counters,
            threads: machine.map_or_else(Vec::new, |machine| {
                let prefix: String = machine.cell().name().chars().take(8).collect();
                threads(&format!("{prefix}:"))
            }),
        }
    }
}

/// Ticks a second of proc(5)'s times, which never change on the processors we know (asm/param.h).
const USER_HZ: u64 = 100;

/// Threads of this process whose names begin so.
fn threads(prefix: &str) -> Vec<Thread> {
    let Ok(entries) = std::fs::read_dir("/proc/self/task") else {
        return Vec::new();
    };
    let mut threads: Vec<Thread> = entries
        .flatten()
        .filter_map(|entry| {
            let tid = entry.file_name().to_str()?.parse().ok()?;
            thread(tid, &std::fs::read_to_string(entry.path().join("stat")).ok()?)
        })
        .filter(|thread| thread.name.starts_with(prefix))
        .collect();
    threads.sort_by(|a, b| a.name.cmp(&b.name).then(a.tid.cmp(&b.tid)));
    threads
}

/// Reads a `stat` of proc(5). A name can have blanks and parentheses in it.
fn thread(tid: u32, stat: &str) -> Option<Thread> {
    let (head, fields) = stat.rsplit_once(')')?;
    let name = head.split_once('(')?.1.to_owned();
    let fields: Vec<&str> = fields.split_whitespace().collect();
    // Fields 14 and 15 of all, the first after the name being the third.
    let ticks = |field: usize| fields.get(field).and_then(|ticks| ticks.parse::<u64>().ok());
    let ticks = ticks(11)?.saturating_add(ticks(12)?);
    Some(Thread {
        tid,
        name,
        state: (*fields.first()?).to_owned(),
        cpu_millis: ticks.saturating_mul(1000 / USER_HZ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_read_as_the_kernel_writes_them() {
        let stat = "77 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 300 50 0 0 20 0 9 0 100 0 0";
        let read = thread(77, stat).unwrap();
        assert_eq!((read.name.as_str(), read.state.as_str()), ("a) b (c", "S"));
        assert_eq!(read.cpu_millis, 3500);
        for cut in ["", "77 (a)", "77 (a) S 1 2", "77 a S 1"] {
            assert_eq!(thread(77, cut), None, "{cut}");
        }
        let named = std::thread::Builder::new().name("pod-t3st:vcpu0".into());
        let (send, receive) = std::sync::mpsc::channel::<()>();
        let running = named
            .spawn(move || {
                let _ = receive.recv();
            })
            .unwrap();
        // A thread gives itself its name.
        while threads("pod-t3st:").is_empty() {
            std::thread::yield_now();
        }
        assert_eq!(threads("pod-t3st:").len(), 1);
        drop(send);
        running.join().unwrap();
    }
}
