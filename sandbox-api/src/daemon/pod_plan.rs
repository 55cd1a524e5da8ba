// SPDX-License-Identifier: Apache-2.0
//! What a pod's VM is to be, from what containerd says of the pod (CRI's `PodSandboxConfig`) and the sandboxer's profile.
//!
//! What a VM of its own cannot give is refused here by name, before anything is made.

use super::config::Profile;
use super::isulad::options;
use crate::net::dns;
use crate::pod::size::{Limits, Size, TooMuch};
use cloister_protocol::pod::DnsFiles;
use k8s_cri::v1::{DnsConfig, LinuxContainerResources, NamespaceMode, PodSandboxConfig};
use prost::Message;
use prost_types::Any;
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

/// Why a pod cannot be had, as the client's mistake or ours to name.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Refusal {
    /// Something of the host that a pod in a VM cannot share.
    #[error(
        "{0} is not supported: the pod has a virtual machine of its own; use another runtime class for it"
    )]
    Unsupported(&'static str),
    /// Not what containerd sends.
    #[error("the sandbox's options cannot be read: {0}")]
    Options(String),
    /// More than the profile allows.
    #[error(transparent)]
    TooMuch(#[from] TooMuch),
}

/// See the module. Plain data, kept in the pod's record.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PodPlan {
    /// Kubernetes' name of the pod; empty when it is not kubelet's.
    pub name: String,
    /// Its Kubernetes namespace.
    pub namespace: String,
    /// Its uid.
    pub uid: String,
    /// How often kubelet has tried before.
    pub attempt: u32,
    /// Host name.
    pub hostname: String,
    /// Text of resolv.conf; empty: the host's.
    pub resolv_conf: String,
    /// To be set in the guest.
    pub sysctls: BTreeMap<String, String>,
    /// vCPUs.
    pub cpus: u8,
    /// Bytes of RAM.
    pub memory: u64,
    /// Bytes of RAM that are not the containers', as declared in the RuntimeClass; none: the sandboxer's.
    #[serde(default)]
    pub overhead: Option<u64>,
    /// The pod's cgroup on the host.
    pub cgroup_parent: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
}

/// Reads what came as the sandbox's options; none at all is an empty configuration. iSulad's have no type, and are JSON or
/// protobuf.
///
/// # Errors
/// It is something else, or not well-formed.
pub fn read_options(options: Option<&Any>) -> Result<PodSandboxConfig, Refusal> {
    let Some(any) = options.filter(|any| !any.value.is_empty()) else {
        return Ok(PodSandboxConfig::default());
    };
    let url = any.type_url.rsplit('/').next().unwrap_or_default();
    match url {
        // A protobuf message cannot begin so.
        "" if any.value.starts_with(b"{") => {
            options::read(&any.value).map_err(|e| Refusal::Options(e.to_string()))
        }
        "runtime.v1.PodSandboxConfig" | "" => {
            PodSandboxConfig::decode(any.value.as_slice()).map_err(|e| Refusal::Options(e.to_string()))
        }
        other => Err(Refusal::Options(format!(
            "type {other:?} is not runtime.v1.PodSandboxConfig"
        ))),
    }
}

fn sorted(map: HashMap<String, String>) -> BTreeMap<String, String> {
    map.into_iter().collect()
}

impl PodPlan {
    /// What the pod is promised.
    pub fn size(&self) -> Size {
        Size {
            cpus: self.cpus,
            memory: self.memory,
        }
    }

    /// Makes the plan, or says by name what cannot be had.
    ///
    /// # Errors
    /// See [`Refusal`].
    pub fn new(config: PodSandboxConfig, profile: &Profile) -> Result<Self, Refusal> {
        let linux = config.linux.unwrap_or_default();
        let security = linux.security_context.unwrap_or_default();
        if let Some(namespaces) = &security.namespace_options {
            if namespaces.network() == NamespaceMode::Node {
                return Err(Refusal::Unsupported("hostNetwork"));
            }
            if namespaces.pid() == NamespaceMode::Node {
                return Err(Refusal::Unsupported("hostPID"));
            }
            if namespaces.ipc() == NamespaceMode::Node {
                return Err(Refusal::Unsupported("hostIPC"));
            }
            let user = namespaces.userns_options.as_ref();
            if user.is_some_and(|user| user.mode() == NamespaceMode::Pod) {
                return Err(Refusal::Unsupported("hostUsers: false"));
            }
        }
        let overhead = declared(linux.overhead.as_ref());
        let sizing = profile.sizing(overhead);
        let limits = limits(&linux.resources.unwrap_or_default());
        let Size { cpus, memory } = sizing.check(sizing.demand([limits]))?;
        let metadata = config.metadata.unwrap_or_default();
        Ok(Self {
            name: metadata.name,
            namespace: metadata.namespace,
            uid: metadata.uid,
            attempt: metadata.attempt,
            hostname: if config.hostname.is_empty() {
                host_name()
            } else {
                config.hostname
            },
            resolv_conf: resolv_conf(&config.dns_config.unwrap_or_default()),
            sysctls: sorted(linux.sysctls),
            cpus,
            memory,
            overhead,
            cgroup_parent: linux.cgroup_parent,
            labels: sorted(config.labels),
            annotations: sorted(config.annotations),
        })
    }

    /// The files that every container of the pod sees, unless it brings its own.
    pub fn files(&self, addresses: &[IpAddr]) -> DnsFiles {
        let resolv_conf = if self.resolv_conf.is_empty() {
            dns::resolv_conf(&std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default()).0
        } else {
            self.resolv_conf.clone()
        };
        DnsFiles {
            hosts: dns::hosts(&self.hostname, addresses.first().copied()),
            // An empty one would not be written, and the containers' bind mounts would have no source.
            resolv_conf: if resolv_conf.is_empty() {
                "# no resolver\n".into()
            } else {
                resolv_conf
            },
            hostname: format!("{}\n", self.hostname),
            ..Default::default()
        }
    }
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

fn resolv_conf(dns: &DnsConfig) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.join(" ")));
    }
    for server in &dns.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.join(" ")));
    }
    text
}

/// What containerd has put into an Update's extensions, JSON under this name, when a pod is resized in place.
pub const UPDATED_RESOURCES: &str = "updated-resources";

/// Go's names; of CRI's `LinuxContainerResources`, what a VM is sized by.
#[derive(Default, serde::Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct UpdatedResources {
    overhead: Option<UpdatedLimits>,
    resources: Option<UpdatedLimits>,
}

#[derive(Default, serde::Deserialize)]
#[serde(default)]
struct UpdatedLimits {
    cpu_period: i64,
    cpu_quota: i64,
    cpu_shares: i64,
    memory_limit_in_bytes: i64,
    unified: Option<HashMap<String, String>>,
}

impl From<UpdatedLimits> for LinuxContainerResources {
    fn from(limits: UpdatedLimits) -> Self {
        Self {
            cpu_period: limits.cpu_period,
            cpu_quota: limits.cpu_quota,
            cpu_shares: limits.cpu_shares,
            memory_limit_in_bytes: limits.memory_limit_in_bytes,
            unified: limits.unified.unwrap_or_default(),
            ..Default::default()
        }
    }
}

/// Reads what a pod as a whole may use from now on, and its overhead; none if that is not said.
///
/// # Errors
/// It is not what containerd writes.
pub fn read_update(extension: &Any) -> Result<Option<(Limits, Option<u64>)>, Refusal> {
    let failed = |e: serde_json::Error| Refusal::Options(format!("{UPDATED_RESOURCES}: {e}"));
    let updated: UpdatedResources = serde_json::from_slice(&extension.value).map_err(failed)?;
    let overhead = updated.overhead.map(LinuxContainerResources::from);
    Ok(updated
        .resources
        .map(|resources| (limits(&resources.into()), declared(overhead.as_ref()))))
}

/// Of all containers together.
pub fn limits(resources: &LinuxContainerResources) -> Limits {
    Limits::new(
        resources.cpu_quota,
        resources.cpu_period,
        resources.memory_limit_in_bytes,
    )
    .requesting(resources.cpu_shares, &resources.unified)
}

/// The RuntimeClass's overhead, if it has one.
pub fn declared(overhead: Option<&LinuxContainerResources>) -> Option<u64> {
    let bytes = overhead?.memory_limit_in_bytes;
    u64::try_from(bytes).ok().filter(|bytes| *bytes > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_cri::v1::{
        LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceOption, PodSandboxMetadata,
        UserNamespace,
    };

    fn with_linux(linux: LinuxPodSandboxConfig) -> PodSandboxConfig {
        PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: "web".into(),
                ..Default::default()
            }),
            hostname: "web".into(),
            linux: Some(linux),
            ..Default::default()
        }
    }

    fn resources(cpu_quota: i64, memory: i64) -> PodSandboxConfig {
        with_linux(LinuxPodSandboxConfig {
            resources: Some(LinuxContainerResources {
                cpu_period: 100_000,
                cpu_quota,
                memory_limit_in_bytes: memory,
                ..Default::default()
            }),
            ..Default::default()
        })
    }

    #[test]
    fn sizes_follow_limits_and_overhead() {
        let profile = Profile::default();
        let plan = |quota, memory| PodPlan::new(resources(quota, memory), &profile).unwrap();
        assert_eq!(plan(0, 0).cpus, profile.default_vcpus);
        assert_eq!(plan(0, 0).memory, profile.default_memory.0);
        assert_eq!(plan(50_000, 0).cpus, 1);
        assert_eq!(plan(250_000, 0).cpus, 3);
        let memory = plan(0, 100_000_000).memory;
        assert!(memory >= 100_000_000 + profile.overhead.memory.0);
        let error = PodPlan::new(resources(100_000_000, 0), &profile).unwrap_err();
        assert!(
            matches!(
                error,
                Refusal::TooMuch(TooMuch {
                    key: "max_vcpus",
                    asked: 1000,
                    ..
                })
            ),
            "{error}"
        );
        assert!(plan(0, 1).memory >= profile.overhead.memory.0);
    }

    #[test]
    fn sizes_follow_requests_where_there_are_no_limits() {
        let profile = Profile::default();
        let plan = |cpu_quota, cpu_shares, memory_min: u64| {
            let mut config = resources(cpu_quota, 0);
            let said = config.linux.as_mut().and_then(|linux| linux.resources.as_mut());
            let said = said.unwrap();
            said.cpu_shares = cpu_shares;
            said.unified = HashMap::from([("memory.min".to_owned(), memory_min.to_string())]);
            PodPlan::new(config, &profile)
        };
        let plain = plan(0, 2, 0).unwrap();
        assert_eq!(
            (plain.cpus, plain.memory),
            (profile.default_vcpus, profile.default_memory.0)
        );
        let large = plan(0, 2560, 1 << 30).unwrap();
        assert_eq!(
            (large.cpus, large.memory),
            (3, (1 << 30) + profile.overhead.memory.0)
        );
        assert_eq!(plan(50_000, 2560, 0).unwrap().cpus, 1);
        assert!(matches!(plan(0, 262_144, 0), Err(Refusal::TooMuch(_))));
    }

    #[test]
    fn an_update_says_what_the_pod_may_use() {
        let read = |json: &str| {
            read_update(&Any {
                type_url: "io.containerd.cri.v1/UpdatedResources".into(),
                value: json.into(),
            })
        };
        let json = r#"{"Overhead":{"memory_limit_in_bytes":9},"Resources":{"cpu_period":100000,"cpu_quota":50000,
            "cpu_shares":2,"memory_limit_in_bytes":1234,"unified":{"a":"b"}}}"#;
        let said = Limits::new(50_000, 100_000, 1234).requesting(2, &HashMap::new());
        let expected = (said, Some(9));
        assert_eq!(read(json).unwrap(), Some(expected));
        assert_eq!(read(r#"{"Overhead":null,"Resources":null}"#).unwrap(), None);
        assert_eq!(
            read(r#"{"Resources":{}}"#).unwrap(),
            Some((Limits::default(), None))
        );
        assert!(matches!(read("protobuf"), Err(Refusal::Options(_))));
    }

    #[test]
    fn what_a_vm_cannot_give_is_named() {
        let refused = |options: NamespaceOption| {
            let linux = LinuxPodSandboxConfig {
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(options),
                    ..Default::default()
                }),
                ..Default::default()
            };
            PodPlan::new(with_linux(linux), &Profile::default())
                .unwrap_err()
                .to_string()
        };
        let node = NamespaceMode::Node.into();
        let network = NamespaceOption {
            network: node,
            ..Default::default()
        };
        let pid = NamespaceOption {
            pid: node,
            ..Default::default()
        };
        let ipc = NamespaceOption {
            ipc: node,
            ..Default::default()
        };
        let users = NamespaceOption {
            userns_options: Some(UserNamespace {
                mode: NamespaceMode::Pod.into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        for (options, name) in [
            (network, "hostNetwork"),
            (pid, "hostPID"),
            (ipc, "hostIPC"),
            (users, "hostUsers: false"),
        ] {
            let told = refused(options);
            assert!(told.starts_with(name), "{told}");
        }
    }

    #[test]
    fn options_are_containerds_or_refused() {
        assert_eq!(read_options(None).unwrap(), PodSandboxConfig::default());
        let config = resources(1, 2);
        let any = |type_url: &str| Any {
            type_url: type_url.into(),
            value: config.encode_to_vec(),
        };
        assert_eq!(
            read_options(Some(&any("runtime.v1.PodSandboxConfig"))).unwrap(),
            config
        );
        assert_eq!(read_options(Some(&any(""))).unwrap(), config);
        let json = |value: &str| Any {
            type_url: String::new(),
            value: value.into(),
        };
        assert_eq!(
            read_options(Some(&json(r#"{"hostname":"h"}"#))).unwrap().hostname,
            "h"
        );
        assert!(read_options(Some(&json("{"))).is_err());
        assert!(read_options(Some(&any("a.b/c.d"))).is_err());
        let garbage = Any {
            type_url: "runtime.v1.PodSandboxConfig".into(),
            value: vec![0xff; 9],
        };
        assert!(read_options(Some(&garbage)).is_err());
    }

    #[test]
    fn resolvers_are_the_pods_own() {
        let dns = DnsConfig {
            servers: vec!["10.0.0.10".into()],
            searches: vec!["a.svc".into(), "svc".into()],
            options: vec!["ndots:5".into()],
        };
        assert_eq!(
            resolv_conf(&dns),
            "search a.svc svc\nnameserver 10.0.0.10\noptions ndots:5\n"
        );
        assert_eq!(resolv_conf(&DnsConfig::default()), "");
    }
}
