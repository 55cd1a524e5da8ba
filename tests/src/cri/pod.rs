// SPDX-License-Identifier: Apache-2.0
//! A pod, and what a kubelet keeps for it on the node.

use super::{Container, Outcome, Output, Runtime, api, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const CGROUPS: &str = "/sys/fs/cgroup";

/// A pod that was run. It stays until it is removed.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Its handler.
    pub runtime: Runtime,
    /// containerd's id of it.
    pub id: String,
    /// What it was made with.
    pub config: api::PodSandboxConfig,
}

impl Pod {
    /// The configuration of a pod that wants nothing special.
    pub fn config(runtime: &Runtime) -> api::PodSandboxConfig {
        let name = runtime.name("pod");
        api::PodSandboxConfig {
            hostname: name.clone(),
            log_directory: runtime.pods().join(&name).display().to_string(),
            metadata: Some(api::PodSandboxMetadata {
                uid: format!("uid-{name}"),
                namespace: "e2e".to_owned(),
                attempt: 0,
                name: name.clone(),
            }),
            linux: Some(api::LinuxPodSandboxConfig {
                cgroup_parent: format!("/cri-e2e/{name}"),
                security_context: Some(api::LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces()),
                    seccomp: Some(api::SecurityProfile::default()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// Runs it.
    pub async fn run(runtime: &Runtime, config: api::PodSandboxConfig) -> Outcome<Self> {
        make_cgroup(cgroup_parent(&config))?;
        fs::create_dir_all(&config.log_directory)?;
        let request = api::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: runtime.handler().to_owned(),
        };
        let answer = runtime.cri().run_pod_sandbox(request).await;
        if answer.is_err() {
            clear_node(&config).await?;
        }
        Ok(Self {
            runtime: runtime.clone(),
            id: answer?.into_inner().pod_sandbox_id,
            config,
        })
    }

    /// One that was listed.
    pub(super) fn of(runtime: &Runtime, pod: api::PodSandbox) -> Self {
        let mut config = Self::config(runtime);
        config.metadata = pod.metadata;
        let name = config
            .metadata
            .as_ref()
            .map_or_else(String::new, |metadata| metadata.name.clone());
        config.log_directory = runtime.pods().join(&name).display().to_string();
        if let Some(linux) = &mut config.linux {
            linux.cgroup_parent = format!("/cri-e2e/{name}");
        }
        Self {
            runtime: runtime.clone(),
            id: pod.id,
            config,
        }
    }

    /// Makes and starts a container.
    pub async fn start(&self, config: api::ContainerConfig) -> Outcome<Container> {
        let container = self.create(config).await?;
        container.start().await?;
        Ok(container)
    }

    /// Makes a container.
    pub async fn create(&self, config: api::ContainerConfig) -> Outcome<Container> {
        Container::create(self, config).await
    }

    /// Runs a container to its end, and removes it.
    pub async fn output(&self, config: api::ContainerConfig) -> Outcome<Output> {
        let container = self.start(config).await?;
        let code = container.ended().await?.exit_code;
        let output = Output {
            code,
            ..container.log()?
        };
        container.remove().await?;
        Ok(output)
    }

    /// How it is.
    pub async fn status(&self) -> Outcome<api::PodSandboxStatus> {
        let request = api::PodSandboxStatusRequest {
            pod_sandbox_id: self.id.clone(),
            verbose: false,
        };
        let answer = self.runtime.cri().pod_sandbox_status(request).await?;
        Ok(answer.into_inner().status.ok_or("no status")?)
    }

    /// Its address.
    pub async fn address(&self) -> Outcome<String> {
        Ok(self.status().await?.network.ok_or("no network")?.ip)
    }

    /// Stops it.
    pub async fn stop(&self) -> Outcome {
        let request = api::StopPodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
        };
        self.runtime.cri().stop_pod_sandbox(request).await?;
        Ok(())
    }

    /// Stops and removes it, and sees that its cgroup is free.
    pub async fn remove(&self) -> Outcome {
        self.stop().await?;
        let request = api::RemovePodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
        };
        self.runtime.cri().remove_pod_sandbox(request).await?;
        clear_node(&self.config).await
    }
}

/// What kubelets ask for.
pub(super) fn namespaces() -> api::NamespaceOption {
    api::NamespaceOption {
        pid: api::NamespaceMode::Container.into(),
        ..Default::default()
    }
}

fn cgroup_parent(config: &api::PodSandboxConfig) -> &Path {
    Path::new(
        config
            .linux
            .as_ref()
            .map_or("", |linux| linux.cgroup_parent.as_str()),
    )
}

/// Where a pod's cgroups are: one folder with cgroup v2, one for each hierarchy with v1. Of those, cpuset is left to runc, which
/// has to say there which processors are meant.
fn hierarchies() -> Outcome<Vec<PathBuf>> {
    let root = Path::new(CGROUPS);
    if root.join("cgroup.controllers").exists() {
        return Ok(vec![root.to_owned()]);
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(root)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// As kubelet does before it asks for a pod.
fn make_cgroup(parent: &Path) -> Outcome {
    for mut path in hierarchies()? {
        if path.ends_with("cpuset") {
            continue;
        }
        for part in parent.iter().skip(1) {
            path.push(part);
            if !path.exists() {
                fs::create_dir(&path)?;
            }
            let control = path.join("cgroup.subtree_control");
            if control.exists() {
                fs::write(control, "+cpuset +cpu +io +memory +pids")?;
            }
        }
    }
    Ok(())
}

/// Removes the logs and the cgroup; what is still in there was left behind.
async fn clear_node(config: &api::PodSandboxConfig) -> Outcome {
    if Path::new(&config.log_directory).exists() {
        fs::remove_dir_all(&config.log_directory)?;
    }
    let start = Instant::now();
    for hierarchy in hierarchies()? {
        let path = hierarchy.join(cgroup_parent(config).strip_prefix("/")?);
        while path.exists() {
            let removed = fs::remove_dir(&path);
            if removed.is_ok() {
                break;
            }
            // A VM may still be on its way out.
            let patience = Duration::from_secs(20);
            ensure(
                start.elapsed() < patience,
                format_args!("cgroup {} is not free: {removed:?}", path.display()),
            )?;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    Ok(())
}
