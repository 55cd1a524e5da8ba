// SPDX-License-Identifier: Apache-2.0
//! What a pod's VM is to be, from what containerd says of the pod (CRI's `PodSandboxConfig`) and the sandboxer's profile.
//!
//! What a VM of its own cannot give is refused here by name, before anything is made.

use super::config::Profile;
use super::isulad::options;
use crate::net::dns;
use cloister_protocol::pod::DnsFiles;
use k8s_cri::v1::{DnsConfig, LinuxContainerResources, NamespaceMode, PodSandboxConfig};
use prost::Message;
use prost_types::Any;
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

/// RAM comes in steps of a huge page.
const STEP: u64 = 2 << 20;
/// Least RAM of a VM: guest kernel and agent, and a little for a container.
const LEAST: u64 = 64 << 20;

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
    #[error("{what} of {asked} is more than the sandboxer's {key} of {most}")]
    TooMuch {
        /// "a memory limit", ...
        what: &'static str,
        /// What was asked for.
        asked: u64,
        /// The key of the configuration.
        key: &'static str,
        /// Its value.
        most: u64,
    },
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
        let resources = linux.resources.unwrap_or_default();
        let overhead = linux.overhead.unwrap_or_default();
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
            cpus: cpus(&resources, profile)?,
            memory: memory(&resources, &overhead, profile)?,
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

fn cpus(resources: &LinuxContainerResources, profile: &Profile) -> Result<u8, Refusal> {
    let (quota, period) = (resources.cpu_quota, resources.cpu_period);
    if quota <= 0 || period <= 0 {
        return Ok(profile.default_vcpus);
    }
    let asked = u64::try_from(quota)
        .unwrap_or(0)
        .div_ceil(u64::try_from(period).unwrap_or(1))
        .max(1);
    u8::try_from(asked)
        .ok()
        .filter(|cpus| *cpus <= profile.max_vcpus)
        .ok_or(Refusal::TooMuch {
            what: "a CPU limit",
            asked,
            key: "max_vcpus",
            most: profile.max_vcpus.into(),
        })
}

fn memory(
    resources: &LinuxContainerResources,
    overhead: &LinuxContainerResources,
    profile: &Profile,
) -> Result<u64, Refusal> {
    let positive = |bytes: i64| u64::try_from(bytes).ok().filter(|bytes| *bytes > 0);
    let Some(limit) = positive(resources.memory_limit_in_bytes) else {
        return Ok(profile.default_memory.0);
    };
    // The kernel and the agent are not the containers' to pay.
    let beside = positive(overhead.memory_limit_in_bytes).unwrap_or(profile.overhead.memory.0);
    let asked = limit
        .saturating_add(beside)
        .checked_next_multiple_of(STEP)
        .unwrap_or(u64::MAX)
        .max(LEAST);
    match profile.max_memory {
        Some(most) if asked > most.0 => Err(Refusal::TooMuch {
            what: "a memory limit",
            asked: limit,
            key: "max_memory",
            most: most.0,
        }),
        _ => Ok(asked),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_cri::v1::{
        LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceOption, PodSandboxMetadata,
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
        assert!(memory >= 100_000_000 + profile.overhead.memory.0 && memory.is_multiple_of(STEP));
        let error = PodPlan::new(resources(100_000_000, 0), &profile).unwrap_err();
        assert!(
            matches!(
                error,
                Refusal::TooMuch {
                    key: "max_vcpus",
                    asked: 1000,
                    ..
                }
            ),
            "{error}"
        );
        assert_eq!(plan(0, 1).memory.max(LEAST), plan(0, 1).memory);
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
        let options = NamespaceOption::default;
        assert!(
            refused(NamespaceOption {
                network: node,
                ..options()
            })
            .contains("hostNetwork")
        );
        assert!(
            refused(NamespaceOption {
                pid: node,
                ..options()
            })
            .contains("hostPID")
        );
        assert!(
            refused(NamespaceOption {
                ipc: node,
                ..options()
            })
            .contains("hostIPC")
        );
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
