// SPDX-License-Identifier: Apache-2.0
//! What the agent in a pod VM and the daemon on the host say to each other, and where.
//!
//! # Theory of operation
//!
//! Everything travels over vsock. These ports are in use:
//!
//! | port | listens | speaks |
//! | --- | --- | --- |
//! | [`AGENT_PORT`] | agent | ttrpc server: [`task`] under two service names, and our own [`pod`] service |
//! | [`EVENTS_PORT`] | host | ttrpc server: containerd's Events service ([`events`]); the agent dials it once at start |
//! | [`STREAM_PORT`] | host | raw bytes: one connection per stdio stream of a process, see [`stream`] |
//! | [`FORWARD_PORT`] | agent | raw bytes: one connection per TCP connection that is carried into the VM, see [`forward`] |
//!
//! The agent listens before it dials. Its first event has topic [`READY_TOPIC`] and carries [`pod::Ready`]: from then on
//! every request is answered. Messages are containerd's own wherever containerd has them (crate
//! `containerd-shim-protos`, re-exported here so that both sides use one version).
//!
//! Host and guest both link it. Nothing here does I/O but [`bpf`], which both need for something of their own.

use std::collections::HashMap;
use std::sync::Arc;

pub use {containerd_shim_protos, protobuf, ttrpc};

pub mod bpf;
pub mod forward;
pub mod stream;

/// vsock port on which the agent serves ttrpc.
pub const AGENT_PORT: u32 = 1024;
/// vsock port of the host's Events service; the agent dials it when it starts.
pub const EVENTS_PORT: u32 = 1025;
/// vsock port of the host that takes stdio streams; the agent dials it once per stream.
pub const STREAM_PORT: u32 = 1026;
/// vsock port on which the agent takes connections for programs in the pod.
pub const FORWARD_PORT: u32 = 1027;
/// Context id of the host on every vsock (`VMADDR_CID_HOST`).
pub const HOST_CID: u32 = 2;

/// Version of this protocol, raised when a change is not compatible.
pub const PROTOCOL_VERSION: u32 = 2;

/// virtio-fs tag of the device that carries everything shared with the pod.
pub const SHARED_TAG: &str = "cloister";
/// Where the agent mounts [`SHARED_TAG`]. Mounted before the first request that may need it is served.
pub const SHARED_DIR: &str = "/run/cloister/shared";
/// Directory of the DNS files [`pod::ConfigureRequest`] carries: `hosts`, `resolv.conf`, `hostname`.
pub const ETC_DIR: &str = "/run/cloister/etc";
/// The tmpfs that containers of a pod have in common as /dev/shm; its size is in [`pod::ConfigureRequest`].
pub const SHM_DIR: &str = "/run/cloister/shm";
/// Path of the PID namespace that containers of a pod share: what a spec names as its PID namespace's path. The agent
/// makes the namespace for the first spec that does.
pub const SHARED_PID_NS: &str = "/run/cloister/ns/pid";

/// Topic of the first event an agent sends; the payload is [`pod::Ready`].
pub const READY_TOPIC: &str = "/cloister/agent/ready";
/// Namespace of the envelopes the agent sends: the daemon puts containerd's own in its place.
pub const EVENT_NAMESPACE: &str = "cloister";

/// `type_url` of the OCI runtime spec (JSON) in `CreateTaskRequest.options`, as containerd's typeurl names it.
pub const SPEC_TYPE_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";
/// `type_url` of [`pod::ContainerSpec`] there: the specification of a container with a seccomp profile.
pub const CONTAINER_SPEC_TYPE_URL: &str = "cloister.agent.v1.ContainerSpec";
/// `type_url` of the OCI process (JSON) in `ExecProcessRequest.spec`.
pub const PROCESS_TYPE_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
/// `type_url` of the Linux resources (JSON) in `UpdateTaskRequest.resources`.
pub const RESOURCES_TYPE_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// Prefix of the key the agent looks for on the kernel command line.
pub mod cmdline {
    /// Level of the agent's log: `error`, `warn`, `info`, `debug`, `trace` or `off`; `warn` when absent.
    pub const LOG: &str = "cloister.log=";
}

/// Our own Pod service: messages, the `Pod` trait for servers, `PodClient`, `create_pod`.
pub mod pod {
    #![allow(missing_docs, warnings, clippy::all, clippy::pedantic, clippy::unwrap_used)]
    // The generated service names its messages `super::pod::...`.
    mod pod {
        include!(concat!(env!("OUT_DIR"), "/pod.rs"));
    }
    mod service {
        use super::pod;
        include!(concat!(env!("OUT_DIR"), "/pod_ttrpc.rs"));
    }
    pub use pod::*;
    pub use service::{Pod, PodClient, create_pod};
}

/// containerd's Task service: messages, the async `Task` trait, `TaskClient` (which speaks v3).
pub mod task {
    pub use containerd_shim_protos::api::*;
    pub use containerd_shim_protos::cgroups_v2::metrics::Metrics;
    pub use containerd_shim_protos::shim_async::{Task, TaskClient};
    pub use containerd_shim_protos::types::mount::Mount;
    pub use containerd_shim_protos::types::task::{ProcessInfo, Status};
}

/// containerd's Events service and the task events sent through it.
pub mod events {
    pub use containerd_shim_protos::events::task::*;
    pub use containerd_shim_protos::shim::event::Envelope;
    pub use containerd_shim_protos::shim::events::ForwardRequest;
    pub use containerd_shim_protos::shim_async::{Events, EventsClient, create_events};
    pub use containerd_shim_protos::topics::*;
}

/// Full name of the Task service containerd 2 speaks.
pub const TASK_V3: &str = "containerd.task.v3.Task";
/// Full name of the Task service of containerd 1 and iSulad: the same messages.
pub const TASK_V2: &str = "containerd.task.v2.Task";

/// The table of `service` for `Server::register_service`, under both [`TASK_V3`] and [`TASK_V2`].
pub fn create_task(
    service: Arc<dyn task::Task + Send + Sync>,
) -> HashMap<String, ttrpc::asynchronous::Service> {
    let mut table = HashMap::with_capacity(2);
    for name in [TASK_V3, TASK_V2] {
        let one = containerd_shim_protos::shim_async::create_task(Arc::clone(&service));
        table.extend(one.into_values().map(|methods| (name.to_owned(), methods)));
    }
    table
}

/// Package of containerd's event messages, for [`pack`].
pub const EVENTS_PACKAGE: &str = "containerd.events";
/// Package of our own messages, for [`pack`].
pub const AGENT_PACKAGE: &str = "cloister.agent.v1";
/// Package of the cgroup v2 metrics, for [`pack`].
pub const METRICS_PACKAGE: &str = "io.containerd.cgroups.v2";

/// Packs a message as `google.protobuf.Any` the way containerd's typeurl does: `package.Name`, no host before it.
///
/// The package is given, not looked up: a look-up would parse the descriptors of the whole file when the agent starts.
///
/// # Errors
/// Only when the message cannot be encoded, which protobuf reserves to messages over 2 GiB.
pub fn pack<M: protobuf::Message>(
    package: &str,
    message: &M,
) -> protobuf::Result<protobuf::well_known_types::any::Any> {
    Ok(protobuf::well_known_types::any::Any {
        type_url: format!("{package}.{}", M::NAME),
        value: message.write_to_bytes()?,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nothing;
    #[async_trait::async_trait]
    impl task::Task for Nothing {}

    #[test]
    fn task_is_registered_under_both_names() {
        let table = create_task(Arc::new(Nothing));
        let mut names: Vec<_> = table.keys().map(String::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, [TASK_V2, TASK_V3]);
        assert!(table[TASK_V2].methods.contains_key("Create"));
        assert_eq!(table[TASK_V2].methods.len(), table[TASK_V3].methods.len());
    }

    fn full_name<M: protobuf::MessageFull>() -> String {
        M::descriptor().full_name().to_owned()
    }

    #[test]
    fn packed_messages_carry_their_full_names() {
        assert_eq!(CONTAINER_SPEC_TYPE_URL, full_name::<pod::ContainerSpec>());
        let any = pack(
            AGENT_PACKAGE,
            &pod::Ready {
                version: "1".into(),
                ..Default::default()
            },
        )
        .unwrap();
        assert_eq!(any.type_url, full_name::<pod::Ready>());
        let exit = pack(EVENTS_PACKAGE, &events::TaskExit::default()).unwrap();
        assert_eq!(exit.type_url, full_name::<events::TaskExit>());
        let metrics = pack(METRICS_PACKAGE, &task::Metrics::default()).unwrap();
        assert_eq!(metrics.type_url, full_name::<task::Metrics>());
    }
}
