// SPDX-License-Identifier: Apache-2.0
//! What is on the host, and in a process, to be compared before and after.

use super::{PATIENCE, Stage};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Each thing with the number of its kind.
type Things = BTreeMap<String, usize>;

/// The host's processes, mounts, network devices, cgroups, nft tables, and the files of running pods.
pub struct Footprint<'a> {
    look: Box<dyn Fn() -> Things + 'a>,
    things: Things,
}

impl std::fmt::Debug for Footprint<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Footprint").field(&self.things).finish()
    }
}

impl<'a> Footprint<'a> {
    /// Looks.
    pub fn of_host(stage: &'a Stage) -> Self {
        Self::of(move || {
            let mut things = host_things();
            // Locks and the folders themselves are made once and stay.
            let is_pods = |path: &Path| {
                path.file_name()
                    .is_none_or(|name| name != "lock" && name != "pods")
            };
            tree(&mut things, "state", &stage.state(), &is_pods);
            tree(&mut things, "data", &stage.root().join("pods"), &|_| true);
            tree(&mut things, "unfinished", &stage.root().join("tmp"), &|_| true);
            things
        })
    }

    /// Looks at the host and at all files in these folders.
    pub fn of_host_and(folders: Vec<PathBuf>) -> Self {
        Self::of(move || {
            let mut things = host_things();
            for folder in &folders {
                tree(&mut things, "file", folder, &|_| true);
            }
            things
        })
    }

    fn of(look: impl Fn() -> Things + 'a) -> Self {
        Self {
            things: look(),
            look: Box::new(look),
        }
    }

    /// Ends the test unless all is as it was. The last processes may still be on their way out.
    pub fn assert_unchanged(&self) {
        assert_becomes(&self.things, &self.look, usize::eq);
    }
}

/// A process's descriptors, threads and mappings of files in memory.
#[derive(Debug)]
pub struct ProcessFootprint {
    pid: u32,
    things: Things,
}

impl ProcessFootprint {
    /// Looks at this process, once nothing changes any more: what was just stopped may still be on its way out.
    pub fn of_this() -> Self {
        Self::of(std::process::id())
    }

    /// Looks at another one, likewise.
    pub fn of(pid: u32) -> Self {
        let mut things = process_things(pid);
        loop {
            std::thread::sleep(Duration::from_millis(200));
            let now = process_things(pid);
            if now == things {
                return Self { pid, things };
            }
            things = now;
        }
    }

    /// Ends the test if there is more of anything. Less is no fault: tokio's threads for blocking work, and a daemon's connections,
    /// come and go.
    pub fn assert_no_more(&self) {
        assert_becomes(&self.things, || process_things(self.pid), usize::le);
    }
}

/// `goes(now, before)` says whether a number of things goes with what there was.
fn assert_becomes(before: &Things, look: impl Fn() -> Things, goes: impl Fn(&usize, &usize) -> bool) {
    let start = Instant::now();
    loop {
        let now = look();
        let kinds: BTreeSet<&String> = before.keys().chain(now.keys()).collect();
        let count = |things: &Things, kind: &String| things.get(kind).copied().unwrap_or_default();
        if kinds
            .into_iter()
            .all(|kind| goes(&count(&now, kind), &count(before, kind)))
        {
            return;
        }
        if start.elapsed() > PATIENCE / 8 {
            let only = |these: &Things, those: &Things| -> Vec<String> {
                let differs = |(thing, count): (&String, &usize)| {
                    (those.get(thing) != Some(count)).then(|| format!("{count} x {thing}"))
                };
                these.iter().filter_map(differs).collect()
            };
            panic!(
                "left behind: {:#?}\nwhere there was: {:#?}",
                only(&now, before),
                only(before, &now)
            );
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn add(things: &mut Things, thing: String) {
    *things.entry(thing).or_default() += 1;
}

fn host_things() -> Things {
    let mut things = Things::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        if entry.file_name().to_string_lossy().parse::<u32>().is_err() {
            continue;
        }
        // Threads of the kernel have no command line; they come and go. A process may end while we look.
        let Ok(command) = fs::read(entry.path().join("cmdline")) else {
            continue;
        };
        let zombie = fs::read_to_string(entry.path().join("stat")).is_ok_and(|stat| stat.contains(") Z "));
        if !command.is_empty() || zombie {
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            let zombie = if zombie { ", a zombie" } else { "" };
            add(&mut things, format!("process {command}{zombie}"));
        }
    }
    for line in fs::read_to_string("/proc/self/mountinfo").unwrap().lines() {
        let words: Vec<&str> = line.split(' ').collect();
        add(&mut things, format!("mount {} at {}", words[3], words[4]));
    }
    for entry in fs::read_dir("/sys/class/net").unwrap().flatten() {
        let name = entry.file_name();
        add(&mut things, format!("network device {}", name.to_string_lossy()));
    }
    tree(&mut things, "cgroup", Path::new("/sys/fs/cgroup"), &|path| {
        path.is_dir()
    });
    // nft is where sbin is; without it nothing could have made a table.
    let nft = Command::new("nft")
        .args(["list", "tables"])
        .env("PATH", "/usr/sbin:/sbin:/usr/bin")
        .output();
    if let Ok(output) = nft {
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            add(&mut things, format!("nft {line}"));
        }
    }
    let forward = fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap_or_default();
    add(&mut things, format!("ip_forward {}", forward.trim()));
    things
}

/// Adds what is in a folder, all the way down. What is not counted is not looked into, but for folders of files that count.
fn tree(things: &mut Things, kind: &str, dir: &Path, counts: &dyn Fn(&Path) -> bool) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if counts(&path) {
            add(things, format!("{kind} {}", path.display()));
        }
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            tree(things, kind, &path, counts);
        }
    }
}

fn process_things(pid: u32) -> Things {
    let process = Path::new("/proc").join(pid.to_string());
    let mut things = Things::new();
    for entry in fs::read_dir(process.join("fd")).unwrap().flatten() {
        // Sockets and pipes are told apart by number; their kind is enough.
        if let Ok(target) = fs::read_link(entry.path()) {
            let target = target.to_string_lossy().into_owned();
            let kind = target.split(":[").next().unwrap_or_default().to_owned();
            // This very listing; and templates are kept for the next pod of their kind.
            if !kind.starts_with("/proc/") && !kind.contains("memfd:cloister-image") {
                add(&mut things, format!("descriptor of {kind}"));
            }
        }
    }
    for entry in fs::read_dir(process.join("task")).unwrap().flatten() {
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        // This one comes and goes: it may still be on its way out after the last cell.
        if name.trim() != "take-down" {
            add(&mut things, format!("thread {}", name.trim()));
        }
    }
    for line in fs::read_to_string(process.join("maps")).unwrap().lines() {
        // Files without a name: memory of guests.
        if line.contains("memfd:") || line.ends_with("(deleted)") {
            let name = line.split_whitespace().nth(5).unwrap_or_default();
            add(&mut things, format!("mapping of {name}"));
        }
    }
    things
}
