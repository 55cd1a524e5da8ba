// SPDX-License-Identifier: Apache-2.0
//! A container of a pod.

use super::{Line, Outcome, Pod, Stream, TOOLS, api, ensure, eventually, log, pod};
use serde::Serialize;
use std::path::PathBuf;

/// A container that was made.
#[derive(Debug, Clone)]
pub struct Container {
    /// Its pod.
    pub pod: Pod,
    /// containerd's id of it.
    pub id: String,
    /// What it was made with.
    pub config: api::ContainerConfig,
}

/// What a process said, and how it ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Output {
    /// Exit code.
    pub code: i32,
    /// stdout.
    pub stdout: String,
    /// stderr.
    pub stderr: String,
}

impl Output {
    /// Its stdout, if it ended well.
    #[track_caller]
    pub fn good(self) -> Outcome<String> {
        ensure(self.code == 0, format_args!("{self:?}"))?;
        Ok(self.stdout)
    }
}

/// The configuration of a container of the image of tools that runs this.
pub fn args(command: &[&str]) -> api::ContainerConfig {
    let paths = |paths: &[&str]| paths.iter().map(|&path| path.to_owned()).collect();
    api::ContainerConfig {
        image: Some(api::ImageSpec {
            image: TOOLS.to_owned(),
            ..Default::default()
        }),
        command: command.iter().map(|&word| word.to_owned()).collect(),
        linux: Some(api::LinuxContainerConfig {
            resources: Some(api::LinuxContainerResources::default()),
            security_context: Some(Security {
                namespace_options: Some(pod::namespaces()),
                seccomp: Some(api::SecurityProfile::default()),
                // As kubelets have it.
                masked_paths: paths(&[
                    "/proc/asound",
                    "/proc/acpi",
                    "/proc/kcore",
                    "/proc/keys",
                    "/proc/latency_stats",
                    "/proc/timer_list",
                    "/proc/timer_stats",
                    "/proc/sched_debug",
                    "/proc/scsi",
                    "/sys/firmware",
                    "/sys/devices/virtual/powercap",
                ]),
                readonly_paths: paths(&[
                    "/proc/bus",
                    "/proc/fs",
                    "/proc/irq",
                    "/proc/sys",
                    "/proc/sysrq-trigger",
                ]),
                ..Default::default()
            }),
        }),
        ..Default::default()
    }
}

/// One that runs a script.
pub fn script(text: &str) -> api::ContainerConfig {
    args(&["sh", "-c", text])
}

/// What a container may do.
pub type Security = api::LinuxContainerSecurityContext;

/// That part of a configuration.
pub fn security(config: &mut api::ContainerConfig) -> &mut Security {
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default()
}

impl Container {
    pub(super) async fn create(pod: &Pod, mut config: api::ContainerConfig) -> Outcome<Self> {
        if config.metadata.is_none() {
            config.metadata = Some(api::ContainerMetadata {
                name: pod.runtime.name("container"),
                attempt: 0,
            });
        }
        if config.log_path.is_empty() {
            let metadata = config.metadata.clone().unwrap_or_default();
            config.log_path = format!("{}_{}.log", metadata.name, metadata.attempt);
        }
        let request = api::CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config.clone()),
            sandbox_config: Some(pod.config.clone()),
        };
        let answer = pod.runtime.cri().create_container(request).await?;
        Ok(Self {
            pod: pod.clone(),
            id: answer.into_inner().container_id,
            config,
        })
    }

    /// Starts it.
    pub async fn start(&self) -> Result<(), tonic::Status> {
        let request = api::StartContainerRequest {
            container_id: self.id.clone(),
        };
        self.pod.runtime.cri().start_container(request).await?;
        Ok(())
    }

    /// Stops it, by force after so many seconds.
    pub async fn stop(&self, timeout: i64) -> Result<(), tonic::Status> {
        let request = api::StopContainerRequest {
            container_id: self.id.clone(),
            timeout,
        };
        self.pod.runtime.cri().stop_container(request).await?;
        Ok(())
    }

    /// Removes it.
    pub async fn remove(&self) -> Result<(), tonic::Status> {
        let request = api::RemoveContainerRequest {
            container_id: self.id.clone(),
        };
        self.pod.runtime.cri().remove_container(request).await?;
        Ok(())
    }

    /// How it is.
    pub async fn status(&self) -> Result<api::ContainerStatus, tonic::Status> {
        let request = api::ContainerStatusRequest {
            container_id: self.id.clone(),
            verbose: false,
        };
        let answer = self.pod.runtime.cri().container_status(request).await?;
        Ok(answer.into_inner().status.unwrap_or_default())
    }

    /// Waits for its end.
    pub async fn ended(&self) -> Outcome<api::ContainerStatus> {
        eventually("the end of a container", async || {
            let status = self.status().await?;
            Ok((status.state() == api::ContainerState::ContainerExited).then_some(status))
        })
        .await
    }

    /// Runs a command in it.
    pub async fn exec(&self, command: &[&str]) -> Result<Output, tonic::Status> {
        self.exec_within(command, 0).await
    }

    /// Runs a script in it.
    pub async fn exec_script(&self, text: &str) -> Result<Output, tonic::Status> {
        self.exec(&["sh", "-c", text]).await
    }

    /// Runs a command in it, for so many seconds at most.
    pub async fn exec_within(&self, command: &[&str], timeout: i64) -> Result<Output, tonic::Status> {
        let request = api::ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            timeout,
        };
        let answer = self.pod.runtime.cri().exec_sync(request).await?.into_inner();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Output {
            code: answer.exit_code,
            stdout: text(&answer.stdout),
            stderr: text(&answer.stderr),
        })
    }

    /// Runs a command in it, with streams.
    pub async fn exec_stream(&self, command: &[&str], stdin: bool, tty: bool) -> Outcome<Stream> {
        let request = api::ExecRequest {
            container_id: self.id.clone(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            tty,
            stdin,
            stdout: true,
            stderr: !tty,
        };
        let answer = self.pod.runtime.cri().exec(request).await?.into_inner();
        Stream::open(&answer.url).await
    }

    /// Attaches to its process.
    pub async fn attach(&self) -> Outcome<Stream> {
        let request = api::AttachRequest {
            container_id: self.id.clone(),
            stdin: self.config.stdin,
            tty: self.config.tty,
            stdout: true,
            stderr: !self.config.tty,
        };
        let answer = self.pod.runtime.cri().attach(request).await?.into_inner();
        Stream::open(&answer.url).await
    }

    /// Where its log is.
    pub fn log_file(&self) -> PathBuf {
        PathBuf::from(&self.pod.config.log_directory).join(&self.config.log_path)
    }

    /// The lines of its log.
    pub fn log_lines(&self) -> Outcome<Vec<Line>> {
        log::read(&self.log_file())
    }

    /// What it said so far.
    pub fn log(&self) -> Outcome<Output> {
        let mut output = Output::default();
        for line in self.log_lines()? {
            let stream = match line.stream.as_str() {
                "stdout" => &mut output.stdout,
                _ => &mut output.stderr,
            };
            stream.push_str(&line.text);
            if !line.partial {
                stream.push('\n');
            }
        }
        Ok(output)
    }

    /// Waits until its log has this in it.
    pub async fn says(&self, text: &str) -> Outcome {
        eventually(text, async || {
            let output = self.log()?;
            Ok((output.stdout.contains(text) || output.stderr.contains(text)).then_some(()))
        })
        .await
    }

    /// What it uses.
    pub async fn stats(&self) -> Outcome<api::ContainerStats> {
        let request = api::ContainerStatsRequest {
            container_id: self.id.clone(),
        };
        let answer = self.pod.runtime.cri().container_stats(request).await?;
        Ok(answer.into_inner().stats.ok_or("no statistics")?)
    }
}
