// SPDX-License-Identifier: Apache-2.0
//! The daemon's configuration: one TOML file, each key optional.
//!
//! ```text
//!  bytes ─▶ text ─▶ TOML ─▶ Config, unknown keys and wrong values refused ─▶ checks of keys against each other
//! ```
//! What is wrong is told as `FILE:LINE: KEY: what, and what to do`. The file that [`DEFAULT_TEXT`] holds documents the
//! keys; tests keep it and this module together.

use super::quantity::{Bytes, Listen, MilliCpus, check_absolute};
use crate::cli::parse;
use crate::pod::size::{Size, Sizing};
use serde::de::{self, Deserializer};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the file is looked for.
pub const DEFAULT_PATH: &str = "/etc/cloister/config.toml";
/// A file that says what is so without one, with a comment on each key.
pub const DEFAULT_TEXT: &str = include_str!("config.toml");
/// The sandboxer that is always there.
pub const DEFAULT_SANDBOXER: &str = "cloister";
/// More is not a configuration.
const MAX_FILE: u64 = 1 << 20;
/// Most vCPUs of a VM.
const MAX_VCPUS: u8 = 32;
const HUGE_PAGE: u64 = 2 << 20;
/// Leaves a VM places for a dozen network cards.
const MAX_BLOCK_VOLUMES: u8 = 12;
/// Cells made ahead of a kind: likewise.
const MAX_POOL: u8 = 64;
/// Spare VMs of a kind: far more than pods that start within a moment.
const MAX_SPARE_VMS: u8 = 64;
/// More pods in one process than a node has.
const MAX_PODS_PER_WORKER: u16 = 1000;
/// What a worker takes of its pod's overhead for itself and for what the kernel keeps for its VM, in bytes: it is charged to
/// the pod's cgroup as the VM's RAM is, and the cgroup's limit is that of the containers and the overhead.
const OF_WORKER: u64 = 24 << 20;

/// What the daemon is told.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Folder of running pods' state; a tmpfs.
    #[serde(deserialize_with = "absolute")]
    pub state_dir: PathBuf,
    /// The unix socket containerd is told as the sandboxers' address.
    #[serde(deserialize_with = "absolute")]
    pub socket: PathBuf,
    /// containerd's own socket, where events are published.
    #[serde(deserialize_with = "absolute")]
    pub containerd_address: PathBuf,
    /// Logs.
    pub log: Log,
    /// Metrics.
    pub metrics: Metrics,
    /// Traces.
    pub tracing: Tracing,
    /// The sandboxers by name.
    pub sandboxer: BTreeMap<String, Profile>,
}

/// `[log]`.
#[derive(Clone, Debug, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// How much is said.
    pub level: Level,
    /// In which form.
    pub format: LogFormat,
}

/// Levels of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Level {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

impl From<Level> for log::LevelFilter {
    fn from(level: Level) -> Self {
        match level {
            Level::Error => Self::Error,
            Level::Warn => Self::Warn,
            Level::Info => Self::Info,
            Level::Debug => Self::Debug,
            Level::Trace => Self::Trace,
        }
    }
}

/// Forms of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// journald where stderr is its own, text otherwise.
    #[default]
    Auto,
    /// Lines on stderr.
    Text,
    /// One JSON object a line, on stderr.
    Json,
    /// journald's own protocol, with fields.
    Journald,
}

/// `[metrics]`.
#[derive(Clone, Debug, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Metrics {
    /// Where they are served; nowhere without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<Listen>,
}

/// `[tracing]`.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tracing {
    /// OTLP collector (HTTP, protobuf); no traces without it.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "endpoint")]
    pub otlp_endpoint: Option<String>,
    /// Share of pods whose start is traced.
    #[serde(deserialize_with = "ratio")]
    pub sample_ratio: f64,
}

/// `[sandboxer.NAME]`: what the pods of one RuntimeClass get.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Profile {
    /// Guest kernel.
    #[serde(deserialize_with = "absolute")]
    pub kernel: PathBuf,
    /// Initramfs with the agent.
    #[serde(deserialize_with = "absolute")]
    pub initrd: PathBuf,
    /// More words for the kernel.
    #[serde(deserialize_with = "words")]
    pub kernel_args: Vec<String>,
    /// vCPUs of a pod without a CPU limit.
    pub default_vcpus: u8,
    /// vCPUs a pod can have.
    pub max_vcpus: u8,
    /// vCPUs a running pod can be brought to, if the host and `max_vcpus` have as many.
    pub resize_vcpus: u8,
    /// RAM of a pod without a memory limit.
    pub default_memory: Bytes,
    /// RAM a pod can have; the host's without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_memory: Option<Bytes>,
    /// What a VM takes beside its containers, as declared in the RuntimeClass.
    pub overhead: Overhead,
    /// Pages that back the RAM.
    pub huge_pages: HugePages,
    /// Raw block volumes that a pod can have at once.
    pub block_volumes: u8,
    /// Window through which guests map files of their containers' roots; 0 for none.
    pub dax_window: Bytes,
    /// Who shares a template to be cloned from.
    pub template: Trust,
    /// Cells cloned ahead for the next pods of each kind that was used last.
    pub template_pool: u8,
    /// VMs of the last pod's kind, with their images in memory, that are kept for the next ones that boot.
    pub spare_vms: u8,
    /// Pods that share a process of their own, a worker; 0: the daemon hosts them. See [`super::workers`].
    pub pods_per_worker: u16,
    /// Longest time a VM may take until its agent is ready.
    #[serde(with = "seconds")]
    pub init_timeout: Duration,
    /// Longest time an agent may leave a call unanswered, and then a ping: see [`crate::pod::vigil`] and [`super::watchdog`].
    #[serde(with = "seconds")]
    pub answer_timeout: Duration,
    /// After how much rest a guest gives back its caches; 0: never. See [`super::idle`].
    #[serde(with = "seconds")]
    pub idle_reclaim: Duration,
}

/// `overhead`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Overhead {
    /// Memory of guest kernel, agent and devices.
    pub memory: Bytes,
    /// CPU of devices.
    pub cpu: MilliCpus,
}

/// Pages that back guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum HugePages {
    /// Ordinary pages.
    No,
    /// Transparent huge pages.
    #[default]
    Transparent,
    /// Reserved huge pages, all of the RAM.
    Reserved,
}

/// Who shares a template: a VM that has booted once, from which pods are cloned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Trust {
    /// Nobody: each pod boots.
    None,
    /// The pods of one namespace of Kubernetes'.
    #[default]
    Namespace,
    /// All pods of the node.
    Node,
}

impl Trust {
    /// The name of those who share with a pod of this namespace.
    pub fn domain(self, namespace: &str) -> Option<String> {
        match self {
            Self::None => None,
            Self::Namespace => Some(format!("namespace {namespace}")),
            Self::Node => Some(crate::pod::template::NODE.to_owned()),
        }
    }
}

impl From<HugePages> for cloister_vmm::HugePages {
    fn from(pages: HugePages) -> Self {
        match pages {
            HugePages::No => Self::No,
            HugePages::Transparent => Self::Transparent,
            HugePages::Reserved => Self::Reserved,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: "/run/cloister".into(),
            socket: "/run/cloister/sandboxer.sock".into(),
            containerd_address: "/run/containerd/containerd.sock".into(),
            log: Log::default(),
            metrics: Metrics::default(),
            tracing: Tracing::default(),
            sandboxer: BTreeMap::from([(DEFAULT_SANDBOXER.to_owned(), Profile::default())]),
        }
    }
}

impl Default for Tracing {
    fn default() -> Self {
        Self {
            otlp_endpoint: None,
            sample_ratio: 1.0,
        }
    }
}

impl Default for Profile {
    fn default() -> Self {
        Self {
            kernel: guest_file("vmlinux"),
            initrd: guest_file("initramfs.cpio"),
            kernel_args: Vec::new(),
            default_vcpus: 1,
            max_vcpus: MAX_VCPUS,
            resize_vcpus: 8,
            default_memory: Bytes(256 << 20),
            max_memory: None,
            overhead: Overhead::default(),
            huge_pages: HugePages::default(),
            block_volumes: 4,
            dax_window: Bytes(0),
            template: Trust::default(),
            template_pool: 0,
            spare_vms: 0,
            pods_per_worker: 0,
            init_timeout: Duration::from_secs(60),
            answer_timeout: crate::pod::vigil::PATIENCE,
            idle_reclaim: Duration::from_secs(300),
        }
    }
}

impl Default for Overhead {
    fn default() -> Self {
        Self {
            memory: Bytes(64 << 20),
            cpu: MilliCpus(100),
        }
    }
}

/// Bytes of RAM.
fn host_memory() -> u64 {
    let host = rustix::system::sysinfo();
    host.totalram.saturating_mul(host.mem_unit.into())
}

/// A file of the guest: beside the program where it was built, or installed.
fn guest_file(name: &str) -> PathBuf {
    let program = std::env::current_exe().ok();
    program
        .as_deref()
        .and_then(Path::parent)
        .and_then(|dir| dir.join("../guest").join(name).canonicalize().ok())
        .unwrap_or_else(|| Path::new("/usr/lib/cloister").join(name))
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("cannot read the configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Others than root could write what root's daemon does.
    #[error("{}: others than its owner can write this file: chmod go-w it", .0.display())]
    Writable(PathBuf),
    /// Something in it is wrong.
    #[error("{}:{line}: {message}", path.display())]
    Wrong {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What, and what to do.
        message: String,
    },
    /// A file that it names, or that is meant without it, is not there.
    #[error("[sandboxer.{sandboxer}] {key}: cannot open {}", path.display())]
    Missing {
        /// The profile.
        sandboxer: String,
        /// The key.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// It cannot be read, or something in it is wrong.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let failed = |source| ConfigError::Read {
            path: path.to_owned(),
            source,
        };
        let file = std::fs::File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(failed(io::Error::other("it is no regular file")));
        }
        if metadata.mode() & 0o022 != 0 {
            return Err(ConfigError::Writable(path.to_owned()));
        }
        let mut bytes = Vec::new();
        file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(failed)?;
        if bytes.len() as u64 > MAX_FILE {
            return Err(failed(io::Error::other("it is larger than 1 MiB")));
        }
        let text = String::from_utf8(bytes).map_err(|e| ConfigError::Wrong {
            path: path.to_owned(),
            line: line_at(e.as_bytes(), e.utf8_error().valid_up_to()),
            message: "this is not UTF-8".to_owned(),
        })?;
        Self::parse(&text, path)
    }

    /// The file if there is one, and the defaults otherwise.
    ///
    /// # Errors
    /// See [`Config::load`].
    pub fn load_or_default(path: &Path) -> Result<Self, ConfigError> {
        match Self::load(path) {
            Err(ConfigError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(Self::default())
            }
            result => result,
        }
    }

    /// Checks a text; `path` is for messages.
    ///
    /// # Errors
    /// [`ConfigError::Wrong`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let wrong = |at: usize, message| ConfigError::Wrong {
            path: path.to_owned(),
            line: line_at(text.as_bytes(), at),
            message,
        };
        let start = |error: &toml::de::Error| error.span().map_or(0, |span| span.start);
        let tree = toml::de::DeTable::parse(text).map_err(|e| wrong(start(&e), e.message().to_owned()))?;
        let mut config: Self = serde_path_to_error::deserialize(toml::Deserializer::from(tree.clone()))
            .map_err(|e| wrong(start(e.inner()), told(&e.path().to_string(), e.inner().message())))?;
        config.check().map_err(|problem| {
            wrong(
                position(tree.get_ref(), &problem.keys),
                format!("{}: {}", problem.keys.join("."), problem.message),
            )
        })?;
        config.sandboxer.entry(DEFAULT_SANDBOXER.to_owned()).or_default();
        Ok(config)
    }

    /// What no single value tells.
    fn check(&self) -> Result<(), Problem> {
        for (name, profile) in &self.sandboxer {
            let problem = |key: &str, message: String| {
                let keys = ["sandboxer", name, key];
                Err(Problem::new(
                    keys.into_iter().filter(|key| !key.is_empty()),
                    message,
                ))
            };
            if !is_dns_label(name) {
                return problem(
                    "",
                    "a sandboxer's name is 1 to 63 letters a to z, digits and hyphens, as a RuntimeClass's is".into(),
                );
            }
            profile.check().or_else(|(key, message)| problem(key, message))?;
        }
        Ok(())
    }

    /// Whether the files are there that each pod needs.
    ///
    /// # Errors
    /// [`ConfigError::Missing`].
    pub fn check_files(&self) -> Result<(), ConfigError> {
        for (name, profile) in &self.sandboxer {
            for (key, path) in [("kernel", &profile.kernel), ("initrd", &profile.initrd)] {
                std::fs::File::open(path).map_err(|source| ConfigError::Missing {
                    sandboxer: name.clone(),
                    key,
                    path: path.clone(),
                    source,
                })?;
            }
        }
        Ok(())
    }

    /// What the daemon's workers are told: they are asked for metrics by the daemon, and one that hosts a single pod has no use
    /// for what is made ahead for the next.
    #[must_use]
    pub fn for_workers(&self) -> Self {
        let mut config = self.clone();
        config.metrics.listen = None;
        for profile in config.sandboxer.values_mut() {
            if profile.pods_per_worker == 1 {
                profile.template_pool = 0;
                profile.spare_vms = 0;
            }
        }
        config
    }

    /// As a file.
    pub fn to_toml(&self) -> String {
        // Strings, numbers and tables of them have a form in TOML.
        toml::to_string(self).unwrap_or_default()
    }
}

impl Profile {
    /// What pods are sized by, with the overhead that their RuntimeClass declares.
    pub fn sizing(&self, overhead: Option<u64>) -> Sizing {
        let of_worker = if self.pods_per_worker == 1 { OF_WORKER } else { 0 };
        Sizing {
            default: Size {
                cpus: self.default_vcpus,
                memory: self.default_memory.0,
            },
            most: Size {
                cpus: self.max_vcpus,
                memory: self.max_memory.map_or_else(host_memory, |most| most.0),
            },
            overhead: overhead
                .unwrap_or(self.overhead.memory.0)
                .saturating_sub(of_worker),
        }
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        let memory = self.default_memory;
        if !(1..=MAX_VCPUS).contains(&self.max_vcpus) {
            return Err((
                "max_vcpus",
                format!("{} is not between 1 and {MAX_VCPUS}", self.max_vcpus),
            ));
        }
        if !(1..=self.max_vcpus).contains(&self.default_vcpus) {
            return Err((
                "default_vcpus",
                format!(
                    "{} is not between 1 and max_vcpus, which is {}",
                    self.default_vcpus, self.max_vcpus
                ),
            ));
        }
        if !(1..=MAX_VCPUS).contains(&self.resize_vcpus) {
            return Err((
                "resize_vcpus",
                format!("{} is not between 1 and {MAX_VCPUS}", self.resize_vcpus),
            ));
        }
        if self.template_pool > MAX_POOL {
            return Err((
                "template_pool",
                format!("{} is more than {MAX_POOL}", self.template_pool),
            ));
        }
        if self.template_pool > 0 && self.template == Trust::None {
            return Err((
                "template_pool",
                "there are no templates to clone from: set template to \"namespace\" or \"node\"".to_owned(),
            ));
        }
        if self.spare_vms > MAX_SPARE_VMS {
            return Err((
                "spare_vms",
                format!("{} is more than {MAX_SPARE_VMS}", self.spare_vms),
            ));
        }
        if self.pods_per_worker > MAX_PODS_PER_WORKER {
            return Err((
                "pods_per_worker",
                format!("{} is more than {MAX_PODS_PER_WORKER}", self.pods_per_worker),
            ));
        }
        if self.block_volumes > MAX_BLOCK_VOLUMES {
            return Err((
                "block_volumes",
                format!("{} is more than {MAX_BLOCK_VOLUMES}", self.block_volumes),
            ));
        }
        if memory.0 < parse::MIN_MEMORY {
            return Err((
                "default_memory",
                format!(
                    "{memory} is too little: a VM needs {} at least",
                    Bytes(parse::MIN_MEMORY)
                ),
            ));
        }
        if let Some(most) = self.max_memory
            && most < memory
        {
            return Err((
                "max_memory",
                format!("{most} is less than default_memory, which is {memory}"),
            ));
        }
        if self.huge_pages == HugePages::Reserved && !memory.0.is_multiple_of(HUGE_PAGE) {
            return Err((
                "default_memory",
                format!("{memory} is no multiple of 2MiB, which reserved huge pages need"),
            ));
        }
        let window = self.dax_window;
        if !window.0.is_multiple_of(HUGE_PAGE) || window.0 > 1 << 40 {
            return Err((
                "dax_window",
                format!("{window} is no multiple of 2MiB up to 1TiB"),
            ));
        }
        for (key, timeout) in [
            ("init_timeout", self.init_timeout),
            ("answer_timeout", self.answer_timeout),
        ] {
            if !(1..=3600).contains(&timeout.as_secs()) {
                return Err((key, "it is not between 1s and 60m".to_owned()));
            }
        }
        Ok(())
    }
}

/// What is wrong with a key that is right by itself.
struct Problem {
    keys: Vec<String>,
    message: String,
}

impl Problem {
    fn new<'a>(keys: impl IntoIterator<Item = &'a str>, message: impl Into<String>) -> Self {
        Self {
            keys: keys.into_iter().map(str::to_owned).collect(),
            message: message.into(),
        }
    }
}

/// Where a key stands, or the innermost table around it.
fn position(table: &toml::de::DeTable<'_>, keys: &[String]) -> usize {
    let mut at = 0;
    let mut table = Some(table);
    for key in keys {
        let Some((key, value)) = table.and_then(|table| table.get_key_value(key.as_str())) else {
            break;
        };
        at = key.span().start;
        table = value.get_ref().as_table();
    }
    at
}

fn line_at(bytes: &[u8], at: usize) -> usize {
    let before = bytes.get(..at).unwrap_or(bytes);
    1 + before.iter().filter(|b| **b == b'\n').count()
}

/// serde's words in ours: ``unknown field `memmory`, expected one of `kernel`, `initrd` ``.
fn told(path: &str, message: &str) -> String {
    let mut quoted = message.split('`').skip(1).step_by(2);
    let unknown_key = message.starts_with("unknown field");
    if !unknown_key && !message.starts_with("unknown variant") {
        return format!("{path}: {}", message.trim_end());
    }
    let unknown = quoted.next().unwrap_or_default();
    let known: Vec<&str> = quoted.collect();
    // "memmory" may be default_memory: the parts of a name count, too.
    let distance = |known: &&str| {
        let whole = strsim::damerau_levenshtein(unknown, known);
        let parts = known
            .split('_')
            .map(|part| strsim::damerau_levenshtein(unknown, part));
        parts.min().unwrap_or(whole).min(whole)
    };
    let least = known.iter().map(distance).min().unwrap_or(usize::MAX);
    let hint = if least <= unknown.len().div_ceil(3) {
        let meant: Vec<String> = known
            .iter()
            .filter(|known| distance(known) == least)
            .map(|known| format!("\"{known}\""))
            .collect();
        format!("did you mean {}?", meant.join(" or "))
    } else {
        format!("there are {}", known.join(", "))
    };
    if unknown_key {
        let table = path.strip_suffix(unknown).unwrap_or(path).trim_end_matches('.');
        let place = if table.is_empty() {
            "at the top".to_owned()
        } else {
            format!("in [{table}]")
        };
        format!("unknown key \"{unknown}\" {place}; {hint}")
    } else {
        format!("{path}: unknown value \"{unknown}\"; {hint}")
    }
}

/// A label of a DNS name, as Kubernetes wants RuntimeClasses named.
fn is_dns_label(name: &str) -> bool {
    let good = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (1..=63).contains(&name.len()) && name.bytes().all(good) && !name.starts_with('-') && !name.ends_with('-')
}

fn absolute<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
    let path = PathBuf::deserialize(from)?;
    check_absolute(&path).map_err(de::Error::custom)?;
    Ok(path)
}

fn endpoint<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    let text = String::deserialize(from)?;
    let url: Result<http::Uri, _> = text.parse();
    match url {
        Ok(url) if url.scheme_str() == Some("http") && url.host().is_some() => Ok(Some(text)),
        _ => Err(de::Error::custom(format!(
            "{text:?} is not an address such as http://127.0.0.1:4318; for https, run a collector on this node"
        ))),
    }
}

fn ratio<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    let ratio = f64::deserialize(from)?;
    if (0.0..=1.0).contains(&ratio) {
        Ok(ratio)
    } else {
        Err(de::Error::custom(format!("{ratio} is not between 0 and 1")))
    }
}

fn words<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    let words = Vec::<String>::deserialize(from)?;
    match words
        .iter()
        .find(|word| word.is_empty() || !word.bytes().all(|b| b.is_ascii_graphic()))
    {
        Some(word) => Err(de::Error::custom(format!(
            "{word:?} is not one word of ASCII letters"
        ))),
        None => Ok(words),
    }
}

mod seconds {
    use super::{Duration, parse};
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(from)?;
        parse::seconds(&text)
            .map(Duration::from_secs)
            .map_err(de::Error::custom)
    }

    pub fn serialize<S: Serializer>(duration: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{}s", duration.as_secs()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("config.toml")).map_err(|e| e.to_string())
    }

    #[test]
    fn the_documented_defaults_are_the_defaults() {
        assert_eq!(parsed(""), Ok(Config::default()));
        // The files of the guest may lie beside the test's program.
        let mut default = Config::default();
        for profile in default.sandboxer.values_mut() {
            profile.kernel = "/usr/lib/cloister/vmlinux".into();
            profile.initrd = "/usr/lib/cloister/initramfs.cpio".into();
        }
        assert_eq!(parsed(DEFAULT_TEXT), Ok(default.clone()));
        assert_eq!(parsed(&default.to_toml()), Ok(default));
    }

    #[test]
    fn every_key_is_documented() {
        // With what is commented out because it is off by default.
        let text: String = DEFAULT_TEXT
            .lines()
            .map(|line| {
                format!(
                    "{}\n",
                    line.strip_prefix('#')
                        .filter(|l| !l.starts_with(' '))
                        .unwrap_or(line)
                )
            })
            .collect();
        let config = parsed(&text).unwrap();
        let table: toml::Table = config.to_toml().parse().unwrap();
        let mut keys = Vec::new();
        let mut tables = vec![&table];
        while let Some(table) = tables.pop() {
            keys.extend(table.keys().cloned());
            tables.extend(table.values().filter_map(toml::Value::as_table));
        }
        for key in ["listen", "otlp_endpoint", "max_memory", "memory", "cpu"] {
            assert!(keys.iter().any(|known| known == key), "{key} is not in {keys:?}");
        }
        let documentation = include_str!("../../../docs/configuration.md");
        for key in keys {
            assert!(text.contains(&key), "config.toml lacks {key}");
            assert!(documentation.contains(&key), "docs/configuration.md lacks {key}");
        }
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        for (text, message) in [
            (
                "\n[sandboxer.cloister]\nmemmory = 1\ndefault_memory = 1\n",
                "config.toml:3: unknown key \"memmory\" in [sandboxer.cloister]; did you mean \"default_memory\" or \"max_memory\"?",
            ),
            (
                "stat_dir = '/x'",
                "config.toml:1: unknown key \"stat_dir\" at the top; did you mean \"state_dir\"?",
            ),
            (
                "\n\n[metrix]\n",
                "config.toml:3: unknown key \"metrix\" at the top; did you mean \"metrics\"?",
            ),
            (
                "[log]\nlevel = 'dbug'",
                "config.toml:2: log.level: unknown value \"dbug\"; did you mean \"debug\"?",
            ),
            (
                "[log]\nformat = 'xml'",
                "config.toml:2: log.format: unknown value \"xml\"; there are auto, text, json, journald",
            ),
            ("[log]\nlevel = 5", "config.toml:2: log.level: "),
            ("a = 1\na = 2\n", "config.toml:2: duplicate key"),
            ("[log\n", "config.toml:1: "),
            ("x", "config.toml:1: "),
            (
                "\nsocket = 'run/x.sock'",
                "config.toml:2: socket: \"run/x.sock\" is not an absolute path",
            ),
            (
                "\nsocket = '/a/../b'",
                "config.toml:2: socket: \"/a/../b\" is not an absolute path",
            ),
            ("\nsocket = \"/a\\u0000\"", "config.toml:2: socket: "),
            (
                "[metrics]\nlisten = 'localhost'",
                "config.toml:2: metrics.listen: \"localhost\" is neither",
            ),
            (
                "[metrics]\nlisten = 9464",
                "config.toml:2: metrics.listen: \"9464\" is neither",
            ),
            (
                "[tracing]\notlp_endpoint = 'https://x'",
                "config.toml:2: tracing.otlp_endpoint: \"https://x\" is not",
            ),
            (
                "[tracing]\nsample_ratio = 1.5",
                "config.toml:2: tracing.sample_ratio: 1.5 is not",
            ),
            (
                "[sandboxer.Big]\n",
                "config.toml:1: sandboxer.Big: a sandboxer's name",
            ),
            (
                "\n[sandboxer.a]\ndefault_memory = '1MiB'",
                "config.toml:3: sandboxer.a.default_memory: 1MiB is too little",
            ),
            (
                "[sandboxer.a]\ndefault_memory = '1x'",
                "config.toml:2: sandboxer.a.default_memory: unknown unit",
            ),
            (
                "[sandboxer.a]\ndefault_memory = -1",
                "config.toml:2: sandboxer.a.default_memory: ",
            ),
            (
                "[sandboxer.a]\ndefault_memory = []",
                "config.toml:2: sandboxer.a.default_memory: invalid type: sequence, expected a size such as \"256MiB\"",
            ),
            (
                "[sandboxer.a]\ndefault_memory='1GiB'\nmax_memory = '512m'",
                "config.toml:3: sandboxer.a.max_memory: 512MiB is less than default_memory, which is 1GiB",
            ),
            (
                "[sandboxer.a]\nmax_memory = '65m'",
                "config.toml:2: sandboxer.a.max_memory: 65MiB is less",
            ),
            (
                "[sandboxer.a]\ndefault_vcpus = 3\nmax_vcpus = 2",
                "config.toml:2: sandboxer.a.default_vcpus: 3 is not between 1 and max_vcpus, which is 2",
            ),
            (
                "[sandboxer.a]\nmax_vcpus = 33",
                "config.toml:2: sandboxer.a.max_vcpus: 33 is not",
            ),
            (
                "[sandboxer.a]\nmax_vcpus = 300",
                "config.toml:2: sandboxer.a.max_vcpus: ",
            ),
            (
                "[sandboxer.a]\nhuge_pages='reserved'\ndefault_memory = '129MiB'",
                "config.toml:3: sandboxer.a.default_memory: 129MiB is no multiple",
            ),
            (
                "[sandboxer.a]\ndax_window = '3MiB'",
                "config.toml:2: sandboxer.a.dax_window: ",
            ),
            (
                "[sandboxer.a]\ntemplate_pool = 2\ntemplate = 'none'",
                "config.toml:2: sandboxer.a.template_pool: there are no templates",
            ),
            (
                "[sandboxer.a]\ntemplate = 'node'\ntemplate_pool = 65",
                "config.toml:3: sandboxer.a.template_pool: 65 is more than 64",
            ),
            (
                "[sandboxer.a]\ninit_timeout = '0s'",
                "config.toml:2: sandboxer.a.init_timeout: ",
            ),
            (
                "[sandboxer.a]\nanswer_timeout = '2h'",
                "config.toml:2: sandboxer.a.answer_timeout: ",
            ),
            (
                "[sandboxer.a]\nidle_reclaim = '1441m'",
                "config.toml:2: sandboxer.a.idle_reclaim: ",
            ),
            (
                "[sandboxer.a]\nkernel_args = ['a b']",
                "config.toml:2: sandboxer.a.kernel_args: \"a b\" is not one word",
            ),
            (
                "[sandboxer.a.overhead]\ncpu = 'x'",
                "config.toml:2: sandboxer.a.overhead.cpu: ",
            ),
            (
                "[sandboxer.a]\n\npods_per_worker = 1001",
                "config.toml:3: sandboxer.a.pods_per_worker: 1001 is more than 1000",
            ),
            (
                "[sandboxer.a]\npods_per_worker = -1",
                "config.toml:2: sandboxer.a.pods_per_worker: ",
            ),
            ("sandboxer = 5", "config.toml:1: sandboxer: "),
        ] {
            let told = parsed(text).unwrap_err();
            assert!(
                told.starts_with(message),
                "{text:?} is told as\n{told:?}, not\n{message:?}"
            );
            assert!(!told.contains('\n'), "{told:?}");
        }
    }

    #[test]
    fn several_sandboxers() {
        let config =
            parsed("[sandboxer.big]\ndefault_memory = '2GiB'\noverhead = { memory = '100m', cpu = 0.5 }\n")
                .unwrap();
        assert_eq!(config.sandboxer.keys().collect::<Vec<_>>(), ["big", "cloister"]);
        let big = config.sandboxer.get("big").unwrap();
        assert_eq!(big.default_memory, Bytes(2 << 30));
        assert_eq!(
            (big.overhead.memory, big.overhead.cpu),
            (Bytes(100 << 20), MilliCpus(500))
        );
        assert_eq!(parsed(&config.to_toml()), Ok(config));
    }

    #[test]
    fn a_worker_takes_its_part_of_the_overhead() {
        let overhead = |pods_per_worker, declared| {
            let profile = Profile {
                pods_per_worker,
                ..Profile::default()
            };
            profile.sizing(declared).overhead >> 20
        };
        assert_eq!([0, 1, 2].map(|pods| overhead(pods, None)), [64, 40, 64]);
        assert_eq!(overhead(1, Some(100 << 20)), 76);
        assert_eq!(overhead(1, Some(1)), 0);
    }

    #[test]
    fn workers_make_nothing_ahead_for_pods_that_they_do_not_get() {
        let config = parsed(
            "[metrics]\nlisten = '127.0.0.1:9464'\n[sandboxer.one]\npods_per_worker = 1\ntemplate = 'node'\ntemplate_pool = 1\nspare_vms = 2\n[sandboxer.few]\npods_per_worker = 5\ntemplate = 'node'\n",
        )
        .unwrap();
        let told = config.for_workers();
        assert_eq!(told.metrics.listen, None);
        let one = &told.sandboxer["one"];
        assert_eq!(
            (one.template, one.template_pool, one.spare_vms),
            (Trust::Node, 0, 0)
        );
        assert_eq!(told.sandboxer["few"].template, Trust::Node);
        assert_eq!(parsed(&told.to_toml()), Ok(told));
    }

    #[test]
    fn files() {
        use std::os::unix::fs::PermissionsExt;
        let directory = std::env::temp_dir().join(format!("cloister-config-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join("config.toml");
        assert!(matches!(Config::load(&path), Err(ConfigError::Read { .. })));
        assert_eq!(Config::load_or_default(&path).unwrap(), Config::default());
        std::fs::write(&path, b"# a\n# \xff\n").unwrap();
        let told = Config::load(&path).unwrap_err().to_string();
        assert!(told.ends_with("config.toml:2: this is not UTF-8"), "{told}");
        std::fs::write(&path, "[sandboxer.cloister]\nkernel = '/no/vmlinux'\n").unwrap();
        let told = Config::load(&path)
            .unwrap()
            .check_files()
            .unwrap_err()
            .to_string();
        assert_eq!(told, "[sandboxer.cloister] kernel: cannot open /no/vmlinux");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
        assert!(matches!(
            Config::load_or_default(&path),
            Err(ConfigError::Writable(_))
        ));
        std::fs::write(&path, vec![b'#'; 2 << 20]).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(crate::error::chain(&Config::load(&path).unwrap_err()).contains("larger"));
        assert!(Config::load(&directory).is_err());
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
