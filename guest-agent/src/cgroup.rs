// SPDX-License-Identifier: Apache-2.0
//! A container's cgroup (v2): members, signals, freezer, limits, statistics, out-of-memory events.
//!
//! The files are the kernel's (Documentation/admin-guide/cgroup-v2.rst). A file that is missing because its controller is
//! not there counts as nothing said: statistics leave the field at 0.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cloister_protocol::containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats, PidsStat,
};
use cloister_protocol::events::{TASK_OOM_EVENT_TOPIC, TaskOOM};
use cloister_protocol::protobuf::MessageField;
use rustix::fs::inotify;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::devices;
use crate::events::Publisher;
use crate::fd::register;
use crate::spec::has_swap;

/// Where the tree is mounted.
const ROOT: &str = "/sys/fs/cgroup";

/// The controllers of the tree.
pub fn controllers() -> Vec<String> {
    let text = fs::read_to_string(Path::new(ROOT).join("cgroup.controllers")).unwrap_or_default();
    text.split_ascii_whitespace().map(str::to_owned).collect()
}

/// One cgroup.
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// The cgroup at a path relative to the root of the tree.
    pub fn new(relative: &Path) -> Self {
        Self {
            path: Path::new(ROOT).join(relative),
        }
    }

    /// Lets its members use the devices that OCI rules allow, and no others.
    ///
    /// # Errors
    /// See [`devices::confine`].
    pub fn confine(&self, rules: &Value) -> io::Result<()> {
        devices::confine(&self.path, rules)
    }

    fn read(&self, file: &str) -> Option<String> {
        fs::read_to_string(self.path.join(file)).ok()
    }

    fn write(&self, file: &str, value: &str) -> io::Result<()> {
        fs::write(self.path.join(file), value)
            .map_err(|e| io::Error::new(e.kind(), format!("{value:?} to {file}: {e}")))
    }

    /// Pids of all members, those of cgroups below included.
    pub fn pids(&self) -> Vec<u32> {
        fn collect(dir: &Path, pids: &mut Vec<u32>) {
            if let Ok(text) = fs::read_to_string(dir.join("cgroup.procs")) {
                pids.extend(
                    text.lines()
                        .filter_map(|line| line.parse::<u32>().ok())
                        .filter(|pid| *pid != 0),
                );
            }
            let below = fs::read_dir(dir).into_iter().flatten().flatten();
            for entry in below.filter(|entry| entry.file_type().is_ok_and(|t| t.is_dir())) {
                collect(&entry.path(), pids);
            }
        }
        let mut pids = Vec::new();
        collect(&self.path, &mut pids);
        pids
    }

    /// Sends all members a signal.
    pub fn signal(&self, signal: Signal) {
        for pid in self.pids() {
            if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                // It may have ended since.
                let _ = kill_process(pid, signal);
            }
        }
    }

    /// Kills all members at once.
    pub fn kill(&self) {
        if self.path.join("cgroup.kill").exists() {
            if let Err(error) = self.write("cgroup.kill", "1") {
                log::error!("cgroup {}: {error}", self.path.display());
            }
        } else {
            self.signal(Signal::KILL);
        }
    }

    /// Freezes or thaws all members, and waits until it is done.
    ///
    /// # Errors
    /// As of write(2); TimedOut when it is not done within a second.
    pub async fn freeze(&self, frozen: bool) -> io::Result<()> {
        self.write("cgroup.freeze", if frozen { "1" } else { "0" })?;
        for _ in 0..200 {
            let events = self.read("cgroup.events").unwrap_or_default();
            if flat_keyed(&events).get("frozen").copied() == Some(u64::from(frozen)) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        if frozen {
            self.thaw();
        }
        Err(io::ErrorKind::TimedOut.into())
    }

    /// Thaws all members, and does not wait.
    pub fn thaw(&self) {
        if let Err(error) = self.write("cgroup.freeze", "0") {
            log::error!("cgroup {}: {error}", self.path.display());
        }
    }

    /// Removes it, and what is below it. Its members have been killed and may take a moment to be gone.
    pub async fn remove(&self) {
        fn remove(dir: &Path) -> io::Result<()> {
            for entry in fs::read_dir(dir)?.flatten() {
                if entry.file_type().is_ok_and(|t| t.is_dir()) {
                    remove(&entry.path())?;
                }
            }
            fs::remove_dir(dir)
        }
        let mut last = None;
        for _ in 0..100 {
            match remove(&self.path) {
                Ok(()) => return,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return,
                Err(error) => last = Some(error),
            }
            self.kill();
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        if let Some(error) = last {
            log::error!("cgroup {} was not removed: {error}", self.path.display());
        }
    }

    /// Sets limits. Those not given stay.
    ///
    /// # Errors
    /// As of write(2), with the file and the value.
    pub fn update(&self, resources: &Value) -> io::Result<()> {
        for (file, value) in limits(resources) {
            if file == "memory.swap.max" && !has_swap() {
                continue;
            }
            self.write(&file, &value)?;
        }
        Ok(())
    }

    /// Its statistics.
    pub fn metrics(&self) -> Metrics {
        let one = |file: &str| self.read(file).and_then(|text| limit(text.trim())).unwrap_or(0);
        let keyed = |file: &str| {
            self.read(file)
                .map(|text| flat_keyed_owned(&text))
                .unwrap_or_default()
        };
        let psi = |file: &str| {
            self.read(file)
                .and_then(|text| pressure(&text))
                .map_or_else(MessageField::none, MessageField::some)
        };
        let cpu = keyed("cpu.stat");
        let memory = keyed("memory.stat");
        let events = keyed("memory.events");
        let get = |map: &HashMap<String, u64>, key: &str| map.get(key).copied().unwrap_or(0);
        let c = |key: &str| get(&cpu, key);
        let m = |key: &str| get(&memory, key);
        let e = |key: &str| get(&events, key);
        Metrics {
            pids: MessageField::some(PidsStat {
                current: one("pids.current"),
                limit: one("pids.max"),
                ..Default::default()
            }),
            cpu: MessageField::some(CPUStat {
                usage_usec: c("usage_usec"),
                user_usec: c("user_usec"),
                system_usec: c("system_usec"),
                nr_periods: c("nr_periods"),
                nr_throttled: c("nr_throttled"),
                throttled_usec: c("throttled_usec"),
                nr_bursts: c("nr_bursts"),
                burst_usec: c("burst_usec"),
                psi: psi("cpu.pressure"),
                ..Default::default()
            }),
            memory: MessageField::some(MemoryStat {
                anon: m("anon"),
                file: m("file"),
                kernel_stack: m("kernel_stack"),
                slab: m("slab"),
                sock: m("sock"),
                shmem: m("shmem"),
                file_mapped: m("file_mapped"),
                file_dirty: m("file_dirty"),
                file_writeback: m("file_writeback"),
                anon_thp: m("anon_thp"),
                inactive_anon: m("inactive_anon"),
                active_anon: m("active_anon"),
                inactive_file: m("inactive_file"),
                active_file: m("active_file"),
                unevictable: m("unevictable"),
                slab_reclaimable: m("slab_reclaimable"),
                slab_unreclaimable: m("slab_unreclaimable"),
                pgfault: m("pgfault"),
                pgmajfault: m("pgmajfault"),
                workingset_refault: m("workingset_refault_anon").saturating_add(m("workingset_refault_file")),
                workingset_activate: m("workingset_activate_anon")
                    .saturating_add(m("workingset_activate_file")),
                workingset_nodereclaim: m("workingset_nodereclaim"),
                pgrefill: m("pgrefill"),
                pgscan: m("pgscan"),
                pgsteal: m("pgsteal"),
                pgactivate: m("pgactivate"),
                pgdeactivate: m("pgdeactivate"),
                pglazyfree: m("pglazyfree"),
                pglazyfreed: m("pglazyfreed"),
                thp_fault_alloc: m("thp_fault_alloc"),
                thp_collapse_alloc: m("thp_collapse_alloc"),
                usage: one("memory.current"),
                usage_limit: one("memory.max"),
                swap_usage: one("memory.swap.current"),
                swap_limit: one("memory.swap.max"),
                max_usage: one("memory.peak"),
                swap_max_usage: one("memory.swap.peak"),
                psi: psi("memory.pressure"),
                ..Default::default()
            }),
            io: MessageField::some(IOStat {
                usage: self
                    .read("io.stat")
                    .map(|text| io_entries(&text))
                    .unwrap_or_default(),
                psi: psi("io.pressure"),
                ..Default::default()
            }),
            hugetlb: self.hugetlb(),
            memory_events: MessageField::some(MemoryEvents {
                low: e("low"),
                high: e("high"),
                max: e("max"),
                oom: e("oom"),
                oom_kill: e("oom_kill"),
                oom_group_kill: e("oom_group_kill"),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn hugetlb(&self) -> Vec<HugeTlbStat> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.path).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let Some(size) = name
                .to_str()
                .and_then(|n| n.strip_prefix("hugetlb.")?.strip_suffix(".current"))
            else {
                continue;
            };
            if size.ends_with(".rsvd") {
                continue;
            }
            let one = |what: &str| {
                self.read(&format!("hugetlb.{size}.{what}"))
                    .and_then(|t| limit(t.trim()))
                    .unwrap_or(0)
            };
            let events = self.read(&format!("hugetlb.{size}.events")).unwrap_or_default();
            all.push(HugeTlbStat {
                current: one("current"),
                max: one("max"),
                pagesize: size.to_owned(),
                failcnt: flat_keyed(&events).get("max").copied().unwrap_or(0),
                ..Default::default()
            });
        }
        all
    }

    fn oom_kills(&self) -> u64 {
        self.read("memory.events")
            .map_or(0, |text| flat_keyed(&text).get("oom_kill").copied().unwrap_or(0))
    }
}

/// Tells of members of a cgroup that the kernel killed for want of memory.
pub struct OomReporter {
    cgroup: Cgroup,
    container: String,
    events: Publisher,
    /// How many were told of.
    told: AtomicU64,
}

impl OomReporter {
    /// Tells of those killed from now on, as long as the cgroup exists. None where nobody counts them.
    pub fn start(cgroup: &Cgroup, container: &str, events: Publisher) -> Option<Arc<Self>> {
        let cgroup = Cgroup {
            path: cgroup.path.clone(),
        };
        let file = cgroup.path.join("memory.events");
        if !file.exists() {
            return None;
        }
        let watch = watch(&file)
            .inspect_err(|error| {
                log::error!("container {container}: out-of-memory events will not be reported: {error}");
            })
            .ok()?;
        let told = AtomicU64::new(cgroup.oom_kills());
        let reporter = Arc::new(Self {
            cgroup,
            container: container.to_owned(),
            events,
            told,
        });
        tokio::spawn(follow_oom(Arc::clone(&reporter), watch));
        Some(reporter)
    }

    /// Publishes an event if the kernel killed any that were not told of. To be called before an exit is told, so that who
    /// hears of the exit knows its reason.
    pub fn report(&self) {
        let kills = self.cgroup.oom_kills();
        if self.told.fetch_max(kills, Ordering::Relaxed) < kills {
            self.events.publish(
                TASK_OOM_EVENT_TOPIC,
                &TaskOOM {
                    container_id: self.container.clone(),
                    ..Default::default()
                },
            );
        }
    }
}

fn watch(file: &Path) -> io::Result<AsyncFd<std::os::fd::OwnedFd>> {
    let fd = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    inotify::add_watch(
        &fd,
        file,
        inotify::WatchFlags::MODIFY | inotify::WatchFlags::DELETE_SELF,
    )?;
    register(fd, Interest::READABLE)
}

async fn follow_oom(reporter: Arc<OomReporter>, watch: AsyncFd<std::os::fd::OwnedFd>) {
    loop {
        let Ok(mut guard) = watch.readable().await else {
            return;
        };
        let mut buffer = [MaybeUninit::uninit(); 1024];
        let mut gone = false;
        let mut reader = inotify::Reader::new(watch.get_ref(), &mut buffer);
        loop {
            match reader.next() {
                Ok(event) => {
                    gone |= event
                        .events()
                        .intersects(inotify::ReadFlags::DELETE_SELF | inotify::ReadFlags::IGNORED);
                }
                Err(rustix::io::Errno::AGAIN) => break,
                Err(_) => return,
            }
        }
        guard.clear_ready();
        reporter.report();
        if gone {
            return;
        }
    }
}

/// A number or "max", which is the largest number.
fn limit(text: &str) -> Option<u64> {
    if text == "max" {
        Some(u64::MAX)
    } else {
        text.parse().ok()
    }
}

/// Lines "key number".
fn flat_keyed(text: &str) -> HashMap<&str, u64> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(k, v)| Some((k, v.trim().parse().ok()?)))
        .collect()
}

fn flat_keyed_owned(text: &str) -> HashMap<String, u64> {
    flat_keyed(text)
        .into_iter()
        .map(|(k, v)| (k.to_owned(), v))
        .collect()
}

/// Lines "some avg10=0.00 avg60=0.00 avg300=0.00 total=0", and "full" likewise.
fn pressure(text: &str) -> Option<PSIStats> {
    let mut stats = PSIStats::default();
    let mut any = false;
    for line in text.lines() {
        let (kind, rest) = line.split_once(' ')?;
        let values: HashMap<&str, &str> = rest.split(' ').filter_map(|pair| pair.split_once('=')).collect();
        let average = |key: &str| values.get(key).and_then(|v| v.parse().ok()).unwrap_or(0.0);
        let data = MessageField::some(PSIData {
            avg10: average("avg10"),
            avg60: average("avg60"),
            avg300: average("avg300"),
            total: values.get("total").and_then(|v| v.parse().ok()).unwrap_or(0),
            ..Default::default()
        });
        match kind {
            "some" => stats.some = data,
            "full" => stats.full = data,
            _ => continue,
        }
        any = true;
    }
    any.then_some(stats)
}

/// Lines "major:minor rbytes=1 wbytes=2 rios=3 wios=4 ...".
fn io_entries(text: &str) -> Vec<IOEntry> {
    text.lines()
        .filter_map(|line| {
            let (device, rest) = line.split_once(' ')?;
            let (major, minor) = device.split_once(':')?;
            let values: HashMap<&str, u64> = rest
                .split(' ')
                .filter_map(|pair| pair.split_once('='))
                .filter_map(|(k, v)| Some((k, v.parse().ok()?)))
                .collect();
            let get = |key: &str| values.get(key).copied().unwrap_or(0);
            Some(IOEntry {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
                rbytes: get("rbytes"),
                wbytes: get("wbytes"),
                rios: get("rios"),
                wios: get("wios"),
                ..Default::default()
            })
        })
        .collect()
}

/// cpu.weight (1 to 10000) for cgroup v1 shares (2 to 262144), as the OCI runtime spec has it converted.
fn cpu_weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142
}

fn number_or_max(number: i64) -> String {
    u64::try_from(number).map_or_else(|_| "max".to_owned(), |n| n.to_string())
}

/// Files to write, in order, for the limits an Update names (OCI `LinuxResources` as JSON).
fn limits(resources: &Value) -> Vec<(String, String)> {
    let mut files = Vec::new();
    let mut put = |file: &str, value: String| files.push((file.to_owned(), value));
    // 0 means "not given" in the messages of CRI, and so does "" below.
    let number = |path: &str| {
        resources
            .pointer(path)
            .and_then(Value::as_i64)
            .filter(|n| *n != 0)
    };
    let text = |path: &str| {
        resources
            .pointer(path)
            .and_then(Value::as_str)
            .filter(|s| !s.is_empty())
    };
    let max = number("/memory/limit");
    if let Some(swap) = number("/memory/swap") {
        // OCI counts memory and swap together, the kernel swap alone.
        let alone = match max {
            Some(max) if swap > 0 && max > 0 => swap.saturating_sub(max).max(0),
            _ => swap,
        };
        put("memory.swap.max", number_or_max(alone));
    }
    if let Some(max) = max {
        put("memory.max", number_or_max(max));
    }
    if let Some(low) = number("/memory/reservation") {
        put("memory.low", number_or_max(low));
    }
    if let Some(shares) = number("/cpu/shares").and_then(|n| u64::try_from(n).ok()) {
        put("cpu.weight", cpu_weight(shares).to_string());
    }
    match (number("/cpu/quota"), number("/cpu/period")) {
        (Some(quota), Some(period)) => put("cpu.max", format!("{} {period}", number_or_max(quota))),
        (Some(quota), None) => put("cpu.max", number_or_max(quota)),
        (None, Some(period)) => put("cpu.max", format!("max {period}")),
        (None, None) => {}
    }
    if let Some(cpus) = text("/cpu/cpus") {
        put("cpuset.cpus", cpus.to_owned());
    }
    if let Some(mems) = text("/cpu/mems") {
        put("cpuset.mems", mems.to_owned());
    }
    if let Some(pids) = number("/pids/limit") {
        put("pids.max", number_or_max(pids));
    }
    for (file, value) in resources
        .get("unified")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
    {
        if let Some(value) = value.as_str().filter(|_| is_control_file(file)) {
            put(file, value.to_owned());
        }
    }
    files
}

/// A file name of a controller, and not a path.
fn is_control_file(name: &str) -> bool {
    name.contains('.') && !name.contains('/') && !name.starts_with('.') && CString::new(name).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(json: &str) -> Vec<(String, String)> {
        limits(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn limits_of_an_update() {
        assert_eq!(
            pairs(
                r#"{"memory":{"limit":33554432,"swap":67108864},"cpu":{"shares":1024,"quota":50000,"period":100000},
                "pids":{"limit":100}}"#
            ),
            [
                ("memory.swap.max", "33554432"),
                ("memory.max", "33554432"),
                ("cpu.weight", "39"),
                ("cpu.max", "50000 100000"),
                ("pids.max", "100")
            ]
            .map(|(f, v)| (f.to_owned(), v.to_owned()))
        );
    }

    #[test]
    fn what_is_not_given_stays() {
        assert!(pairs("{}").is_empty());
        assert!(
            pairs(r#"{"memory":{"limit":0},"cpu":{"shares":0,"quota":0,"period":0,"cpus":""}}"#).is_empty()
        );
    }

    #[test]
    fn minus_one_means_no_limit() {
        assert_eq!(
            pairs(r#"{"memory":{"limit":-1},"cpu":{"quota":-1}}"#),
            [("memory.max", "max"), ("cpu.max", "max")].map(|(f, v)| (f.to_owned(), v.to_owned()))
        );
    }

    #[test]
    fn unified_names_files_of_this_cgroup_only() {
        assert_eq!(
            pairs(
                r#"{"unified":{"memory.high":"1G","../../cgroup.procs":"1","/etc/passwd":"x","cgroup":"y"}}"#
            ),
            [("memory.high".to_owned(), "1G".to_owned())]
        );
    }

    #[test]
    fn shares_become_weights() {
        assert_eq!(
            [0, 2, 1024, 262_144, u64::MAX].map(cpu_weight),
            [1, 1, 39, 10_000, 10_000]
        );
    }

    #[test]
    fn files_of_the_kernel_are_read() {
        assert_eq!(flat_keyed("usage_usec 5\nuser_usec 3\nbad\nworse x\n").len(), 2);
        assert_eq!(limit("max"), Some(u64::MAX));
        assert_eq!(limit("x"), None);
        let io = io_entries("8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n8:16\nx:y rbytes=1\n");
        assert_eq!(io.len(), 1);
        assert_eq!((io[0].major, io[0].rbytes, io[0].wios), (8, 1, 4));
        let psi = pressure("some avg10=1.50 avg60=0.00 avg300=0.25 total=77\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n").unwrap();
        assert!((psi.some.avg10 - 1.5).abs() < f64::EPSILON);
        assert_eq!((psi.some.total, psi.full.total), (77, 7));
        assert!(pressure("").is_none());
    }
}
