// SPDX-License-Identifier: Apache-2.0
//! `debug-bundle`: what is known of a pod, in one archive that can be handed on.
//!
//! Each part is bounded, so that a guest or a long-lived daemon cannot fill the disk through it. What containers were
//! given (environments, arguments, annotations) is left out: it may be secret.

use super::target;
use super::{Context, Daemon, Outcome};
use crate::cli::args::DebugBundleArgs;
use crate::cli::{Failure, print};
use crate::clock;
use crate::daemon::event_log::Event;
use crate::daemon::report::Pod;
use crate::host_check;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Most bytes of a part; more is cut off at its beginning, where it is oldest.
const MAX_PART: usize = 1 << 20;

pub fn bundle(context: &Context, args: &DebugBundleArgs) -> Outcome {
    let (known, pod) = target::pod(context, &args.pod)?;
    let mut parts = Parts {
        folder: format!("cloister-debug-{}", pod.short_id()),
        list: Vec::new(),
        missing: Vec::new(),
    };
    let pid = match &known.daemon {
        Some(daemon) => {
            parts.of_daemon(daemon, &pod)?;
            let about: Value = serde_json::from_slice(&daemon.get("/daemon")?)?;
            about.get("pid").and_then(Value::as_u64)
        }
        None => {
            parts.of_record(context, &pod)?;
            None
        }
    };
    parts.of_host(pod.process.map(u64::from).or(pid));
    let archive = parts.archive()?;
    let path = match &args.output {
        Some(path) if path == Path::new("-") => {
            let mut out = io::stdout().lock();
            out.write_all(&archive).and_then(|()| out.flush())?;
            return Ok(0);
        }
        Some(path) => path.clone(),
        None => PathBuf::from(format!("{}-{}.tar.gz", parts.folder, clock::now() / 1000)),
    };
    // New, and for its owner alone: it names what runs on the node.
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .map_err(|e| Failure::new(format!("cannot make {}: {e}", path.display())))?;
    file.write_all(&archive)
        .map_err(|e| Failure::new(format!("cannot write {}: {e}", path.display())))?;
    print(&format!("{}\n", path.display()))?;
    Ok(0)
}

/// The files of an archive.
struct Parts {
    folder: String,
    list: Vec<(&'static str, Vec<u8>)>,
    /// What could not be had, and why.
    missing: Vec<String>,
}

impl Parts {
    fn add(&mut self, name: &'static str, mut bytes: Vec<u8>) {
        let excess = bytes.len().saturating_sub(MAX_PART);
        if excess > 0 {
            bytes.drain(..excess);
            self.missing.push(format!("{name}: its first {excess} bytes"));
        }
        self.list.push((name, bytes));
    }

    fn ask(&mut self, name: &'static str, daemon: &Daemon, path: &str, keep: impl Fn(Vec<u8>) -> Vec<u8>) {
        match daemon.get(path) {
            Ok(bytes) => self.add(name, keep(bytes)),
            Err(failure) => self.missing.push(format!("{name}: {}", failure.message)),
        }
    }

    fn of_daemon(&mut self, daemon: &Daemon, pod: &Pod) -> Outcome<()> {
        let details = serde_json::to_value(daemon.details(&pod.id)?)?;
        self.add(
            "pod.json",
            serde_json::to_vec_pretty(&without_annotations(details))?,
        );
        let console = format!("/pods/{}/console", pod.id);
        self.ask("console.txt", daemon, &console, |bytes| bytes);
        let vm = format!("/pods/{}/vm", pod.id);
        self.ask("vm.json", daemon, &vm, |bytes| bytes);
        self.ask("events.jsonl", daemon, "/events", |bytes| of_pod(&bytes, &pod.id));
        self.ask("config.toml", daemon, "/config", |bytes| bytes);
        self.ask("metrics.txt", daemon, "/metrics", |bytes| of_one(&bytes, &pod.id));
        Ok(())
    }

    fn of_record(&mut self, context: &Context, pod: &Pod) -> Outcome<()> {
        self.missing.push(
            "config.toml, events.jsonl, metrics.txt, counters, threads: cloisterd is not running".into(),
        );
        self.add("pod.json", serde_json::to_vec_pretty(pod)?);
        let path = context.state.join("sandboxes").join(&pod.id).join("console.txt");
        match std::fs::read(&path) {
            Ok(bytes) => self.add("console.txt", bytes),
            Err(e) => self.missing.push(format!("console.txt: {e}")),
        }
        Ok(())
    }

    fn of_host(&mut self, daemon: Option<u64>) {
        let mut files = vec![
            ("meminfo", "/proc/meminfo".to_owned()),
            ("loadavg", "/proc/loadavg".to_owned()),
            ("version", "/proc/version".to_owned()),
        ];
        if let Some(pid) = daemon {
            for name in ["status", "limits", "cgroup"] {
                files.push((name, format!("/proc/{pid}/{name}")));
            }
        }
        let mut text = String::new();
        for (name, path) in files {
            let content = std::fs::read_to_string(&path).unwrap_or_else(|e| format!("{e}\n"));
            text.push_str(&format!("== {name} ({path})\n{content}\n"));
        }
        self.add("host.txt", text.into_bytes());
        let findings = serde_json::to_vec_pretty(&host_check::all()).unwrap_or_default();
        self.add("check.json", findings);
    }

    fn archive(&mut self) -> io::Result<Vec<u8>> {
        let about = json!({
            "cloister": env!("CARGO_PKG_VERSION"),
            "made": clock::rfc3339(clock::now()),
            "missing": self.missing,
            "left_out": "environments, arguments and annotations of containers, passwords of addresses",
        });
        let about = ("about.json", serde_json::to_vec_pretty(&about)?);
        let mut archive = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::default()));
        for (name, bytes) in std::iter::once(&about).chain(&self.list) {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o600);
            header.set_mtime(u64::try_from(clock::now() / 1000).unwrap_or(0));
            let path = format!("{}/{name}", self.folder);
            archive.append_data(&mut header, path, bytes.as_slice())?;
        }
        archive.into_inner()?.finish()
    }
}

/// The pod without the values of its annotations, which are whatever its author wrote there.
fn without_annotations(mut details: Value) -> Value {
    if let Some(annotations) = details
        .pointer_mut("/record/plan/annotations")
        .and_then(Value::as_object_mut)
    {
        for value in annotations.values_mut() {
            *value = "(left out)".into();
        }
    }
    details
}

/// The events of one pod.
fn of_pod(lines: &[u8], id: &str) -> Vec<u8> {
    let is_its = |line: &&[u8]| serde_json::from_slice::<Event>(line).is_ok_and(|event| event.pod == id);
    let its = lines.split_inclusive(|byte| *byte == b'\n').filter(is_its);
    its.flatten().copied().collect()
}

/// The metrics of the daemon, and those of one pod: not the others'.
fn of_one(text: &[u8], id: &str) -> Vec<u8> {
    let own = format!("{{id=\"{id}\"");
    let text = String::from_utf8_lossy(text);
    let lines = text
        .lines()
        .filter(|line| !line.contains("{id=\"") || line.contains(&own));
    lines
        .map(|line| format!("{line}\n"))
        .collect::<String>()
        .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::event_log::Kind;
    use crate::daemon::metrics::PodLabels;
    use std::io::Read;

    #[test]
    fn parts_are_bounded_and_said_to_be() {
        let mut parts = Parts {
            folder: "f".into(),
            list: Vec::new(),
            missing: Vec::new(),
        };
        parts.add("console.txt", vec![b'x'; MAX_PART + 5]);
        parts.of_host(Some(u64::from(std::process::id())));
        let archive = parts.archive().unwrap();
        let mut read = tar::Archive::new(flate2::read::GzDecoder::new(archive.as_slice()));
        let mut names = Vec::new();
        for entry in read.entries().unwrap() {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().display().to_string();
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            match name.as_str() {
                "f/about.json" => assert!(text.contains("console.txt: its first 5 bytes"), "{text}"),
                "f/console.txt" => assert_eq!(text.len(), MAX_PART),
                "f/host.txt" => assert!(text.contains("Threads:") && text.contains("MemTotal:"), "{text}"),
                _ => {}
            }
            names.push(name);
        }
        assert_eq!(
            names,
            ["f/about.json", "f/console.txt", "f/host.txt", "f/check.json"]
        );
    }

    #[test]
    fn only_what_is_the_pods() {
        let event = |id: &str| {
            let pod = PodLabels {
                id: id.into(),
                ..Default::default()
            };
            let mut line = serde_json::to_vec(&Event::now(Kind::Started, &pod)).unwrap();
            line.push(b'\n');
            line
        };
        let lines = [event("a"), event("b"), event("a")].concat();
        assert_eq!(of_pod(&lines, "a").len(), 2 * event("a").len());
        let metrics = b"x 1\nm{id=\"a\",pod=\"p\"} 2\nm{id=\"b\",pod=\"q\"} 3\n";
        assert_eq!(of_one(metrics, "a"), b"x 1\nm{id=\"a\",pod=\"p\"} 2\n");
        let details = json!({"record": {"plan": {"annotations": {"k": "secret"}}}});
        assert!(!without_annotations(details).to_string().contains("secret"));
    }
}
