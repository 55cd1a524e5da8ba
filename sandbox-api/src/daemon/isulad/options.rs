// SPDX-License-Identifier: Apache-2.0
//! CRI's `PodSandboxConfig` as JSON, in protobuf's own mapping: names in camelCase, 64-bit numbers as strings, enumerations by
//! name. Only what a [`PodPlan`](crate::daemon::pod_plan::PodPlan) is made of is read.

use k8s_cri::v1::{
    DnsConfig, LinuxContainerResources, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode,
    NamespaceOption, PodSandboxConfig, PodSandboxMetadata, UserNamespace,
};
use serde::{Deserialize, Deserializer, de};
use std::collections::HashMap;

/// Reads it.
///
/// # Errors
/// It is not well-formed.
pub fn read(json: &[u8]) -> serde_json::Result<PodSandboxConfig> {
    serde_json::from_slice::<Config>(json).map(PodSandboxConfig::from)
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Config {
    metadata: Metadata,
    hostname: String,
    #[serde(alias = "log_directory")]
    log_directory: String,
    #[serde(alias = "dns_config")]
    dns_config: Dns,
    labels: HashMap<String, String>,
    annotations: HashMap<String, String>,
    linux: Linux,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Metadata {
    name: String,
    uid: String,
    namespace: String,
    attempt: u32,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Dns {
    servers: Vec<String>,
    searches: Vec<String>,
    options: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Linux {
    #[serde(alias = "cgroup_parent")]
    cgroup_parent: String,
    #[serde(alias = "security_context")]
    security_context: Security,
    sysctls: HashMap<String, String>,
    overhead: Resources,
    resources: Resources,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Security {
    #[serde(alias = "namespace_options")]
    namespace_options: Namespaces,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Namespaces {
    #[serde(deserialize_with = "mode")]
    network: i32,
    #[serde(deserialize_with = "mode")]
    pid: i32,
    #[serde(deserialize_with = "mode")]
    ipc: i32,
    #[serde(alias = "userns_options")]
    userns_options: Option<User>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct User {
    #[serde(deserialize_with = "mode")]
    mode: i32,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Resources {
    #[serde(alias = "cpu_period", deserialize_with = "number")]
    cpu_period: i64,
    #[serde(alias = "cpu_quota", deserialize_with = "number")]
    cpu_quota: i64,
    #[serde(alias = "memory_limit_in_bytes", deserialize_with = "number")]
    memory_limit_in_bytes: i64,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum NameOrNumber {
    Number(i64),
    Name(String),
}

fn mode<'de, D: Deserializer<'de>>(from: D) -> Result<i32, D::Error> {
    match NameOrNumber::deserialize(from)? {
        NameOrNumber::Number(number) => i32::try_from(number).map_err(de::Error::custom),
        NameOrNumber::Name(name) => [
            ("POD", NamespaceMode::Pod),
            ("CONTAINER", NamespaceMode::Container),
            ("NODE", NamespaceMode::Node),
            ("TARGET", NamespaceMode::Target),
        ]
        .into_iter()
        .find(|(known, _)| *known == name)
        .map(|(_, mode)| mode.into())
        .ok_or_else(|| de::Error::custom(format!("{name:?} is no namespace mode"))),
    }
}

fn number<'de, D: Deserializer<'de>>(from: D) -> Result<i64, D::Error> {
    match NameOrNumber::deserialize(from)? {
        NameOrNumber::Number(number) => Ok(number),
        NameOrNumber::Name(digits) => digits.parse().map_err(de::Error::custom),
    }
}

impl From<Config> for PodSandboxConfig {
    fn from(config: Config) -> Self {
        let namespaces = config.linux.security_context.namespace_options;
        let security_context = LinuxSandboxSecurityContext {
            namespace_options: Some(NamespaceOption {
                network: namespaces.network,
                pid: namespaces.pid,
                ipc: namespaces.ipc,
                userns_options: namespaces.userns_options.map(|user| UserNamespace {
                    mode: user.mode,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        Self {
            metadata: Some(PodSandboxMetadata {
                name: config.metadata.name,
                uid: config.metadata.uid,
                namespace: config.metadata.namespace,
                attempt: config.metadata.attempt,
            }),
            hostname: config.hostname,
            log_directory: config.log_directory,
            dns_config: Some(DnsConfig {
                servers: config.dns_config.servers,
                searches: config.dns_config.searches,
                options: config.dns_config.options,
            }),
            labels: config.labels,
            annotations: config.annotations,
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: config.linux.cgroup_parent,
                security_context: Some(security_context),
                sysctls: config.linux.sysctls,
                overhead: Some(config.linux.overhead.into()),
                resources: Some(config.linux.resources.into()),
            }),
            ..Default::default()
        }
    }
}

impl From<Resources> for LinuxContainerResources {
    fn from(resources: Resources) -> Self {
        Self {
            cpu_period: resources.cpu_period,
            cpu_quota: resources.cpu_quota,
            memory_limit_in_bytes: resources.memory_limit_in_bytes,
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_protobuf_writes_it() {
        let json = br#"{"metadata":{"name":"web","uid":"u","namespace":"shop","attempt":2},"hostname":"web",
            "logDirectory":"/var/log/pods/x","dnsConfig":{"servers":["10.0.0.10"],"searches":["svc"],"options":["ndots:5"]},
            "portMappings":[{"containerPort":80}],"labels":{"a":"b"},"annotations":{"c":"d"},
            "linux":{"cgroupParent":"/kubepods/x","securityContext":{"namespaceOptions":{"pid":"CONTAINER","targetId":"x"},
            "privileged":true},"sysctls":{"net.core.somaxconn":"1"},"resources":{"cpuPeriod":"100000","cpuQuota":"250000",
            "memoryLimitInBytes":"104857600"}}}"#;
        let config = read(json).unwrap();
        let metadata = config.metadata.unwrap();
        assert_eq!(
            (
                metadata.name.as_str(),
                metadata.namespace.as_str(),
                metadata.attempt
            ),
            ("web", "shop", 2)
        );
        assert_eq!(config.dns_config.unwrap().searches, ["svc"]);
        assert_eq!(config.annotations["c"], "d");
        let linux = config.linux.unwrap();
        assert_eq!(linux.sysctls["net.core.somaxconn"], "1");
        let resources = linux.resources.unwrap();
        assert_eq!(
            (resources.cpu_quota, resources.memory_limit_in_bytes),
            (250_000, 104_857_600)
        );
        let namespaces = linux.security_context.unwrap().namespace_options.unwrap();
        assert_eq!(
            (namespaces.network(), namespaces.pid()),
            (NamespaceMode::Pod, NamespaceMode::Container)
        );
    }

    #[test]
    fn what_is_wrong_is_refused() {
        assert_eq!(read(b"{}").unwrap().hostname, "");
        for json in [
            &b"{"[..],
            br#"{"hostname":5}"#,
            br#"{"linux":{"securityContext":{"namespaceOptions":{"network":"MOON"}}}}"#,
            br#"{"linux":{"resources":{"cpuQuota":"many"}}}"#,
        ] {
            assert!(read(json).is_err(), "{}", String::from_utf8_lossy(json));
        }
    }
}
