// SPDX-License-Identifier: Apache-2.0
//! Containers in pods that have no image: their root file system, /pod, comes with the initramfs.

use std::fs::{self, File};
use std::io::Write;

use cloister_protocol::SPEC_TYPE_URL;
use cloister_protocol::protobuf::MessageField;
use cloister_protocol::protobuf::well_known_types::any::Any;
use cloister_protocol::task::{CreateTaskRequest, Mount, StartRequest};
use cloister_protocol::ttrpc::context::with_duration;
use cloister_sandbox_api::pod::agent::Agent;
use cloister_tests::e2e::{PATIENCE, archive, guest_file};
use serde_json::{Value, json};

/// The agent's initramfs with a root file system for containers: busybox under the names of these `programs`, empty folders,
/// and other files.
pub fn pod_initramfs(programs: &[&str], folders: &[&str], files: &[(&str, &[u8])]) -> File {
    let busybox = fs::read("/bin/busybox").expect("busybox-static is missing: run ci/setup");
    let mut image = fs::read(guest_file("initramfs.cpio")).expect("guest_file has found it");
    image.resize(image.len().next_multiple_of(4), 0);
    let script: &[u8] = b"#!/bin/busybox sh\nexec /bin/busybox \"${0##*/}\" \"$@\"\n";
    let mut entries: Vec<(String, &[u8])> = vec![("pod/bin/busybox".into(), &busybox)];
    entries.extend(programs.iter().map(|name| (format!("pod/bin/{name}"), script)));
    entries.extend(folders.iter().map(|name| (format!("pod/{name}/.keep"), &b""[..])));
    entries.extend(files.iter().map(|(name, data)| (format!("pod/{name}"), *data)));
    let entries: Vec<(&str, &[u8])> = entries
        .iter()
        .map(|(name, data)| (name.as_str(), *data))
        .collect();
    image.extend(archive(&entries));
    let file = rustix::fs::memfd_create("initramfs", rustix::fs::MemfdFlags::CLOEXEC);
    let mut file = File::from(file.expect("memfd_create"));
    file.write_all(&image).expect("memory for the initramfs");
    file
}

/// A container that runs a shell script in /pod.
#[derive(Debug)]
pub struct Script<'a> {
    /// Its id.
    pub id: &'a str,
    /// What it runs.
    pub script: &'a str,
    /// What it may do.
    pub capabilities: &'a [&'a str],
    /// Mounts beside /proc and /dev, as in a specification.
    pub mounts: Vec<Value>,
}

impl Script<'_> {
    /// Makes and starts it.
    pub async fn start(&self, agent: &Agent) {
        let capabilities = self.capabilities;
        let mut mounts = vec![
            json!({"destination": "/proc", "type": "proc", "source": "proc"}),
            json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]}),
        ];
        mounts.extend(self.mounts.iter().cloned());
        let spec = json!({
            "ociVersion": "1.1.0",
            "process": {
                "user": {"uid": 0, "gid": 0},
                "args": ["/bin/sh", "-c", self.script],
                "env": ["PATH=/bin"],
                "cwd": "/",
                "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            },
            "root": {"path": "rootfs"},
            "mounts": mounts,
            "linux": {
                "cgroupsPath": format!("/pod/{}", self.id),
                "namespaces": [{"type": "pid"}, {"type": "mount"}],
            },
        });
        let request = CreateTaskRequest {
            id: self.id.to_owned(),
            bundle: "/ignored".into(),
            rootfs: vec![Mount {
                type_: "bind".into(),
                source: "/pod".into(),
                options: vec!["rbind".into(), "rw".into()],
                ..Default::default()
            }],
            options: MessageField::some(Any {
                type_url: SPEC_TYPE_URL.into(),
                value: spec.to_string().into_bytes(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let created = agent.task.create(with_duration(PATIENCE), &request).await;
        created.expect("the container is created");
        let request = StartRequest {
            id: self.id.to_owned(),
            ..Default::default()
        };
        let started = agent.task.start(with_duration(PATIENCE), &request).await;
        started.expect("the container is started");
    }
}
