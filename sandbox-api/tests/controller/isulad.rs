// SPDX-License-Identifier: Apache-2.0
//! iSulad's calls in both of its dialects, as far as they go without a guest. The messages of the draft are written down here
//! once more: what the daemon takes for them is not to be its own word.

use super::{Bed, bed, code};
use containerd_client::services::v1::sandbox::*;
use containerd_client::types::Sandbox;
use k8s_cri::v1::{PodSandboxConfig, PodSandboxMetadata};
use prost::Message;
use prost_types::{Any, Timestamp};
use std::collections::HashMap;
use tonic::{Code, Request, Status};

/// Start, Platform, Wait, Shutdown; with the third field Stop (seconds) and Status (verbose).
#[derive(Clone, PartialEq, Message)]
struct Pod {
    #[prost(string, tag = "1")]
    sandboxer: String,
    #[prost(string, tag = "2")]
    sandbox_id: String,
    #[prost(uint32, tag = "3")]
    third: u32,
}

#[derive(Clone, PartialEq, Message)]
struct Create {
    #[prost(string, tag = "1")]
    sandboxer: String,
    #[prost(string, tag = "2")]
    sandbox_id: String,
    #[prost(message, optional, tag = "4")]
    options: Option<Any>,
    #[prost(string, tag = "5")]
    netns_path: String,
}

#[derive(Clone, PartialEq, Message)]
struct Prepare {
    #[prost(string, tag = "1")]
    sandboxer: String,
    #[prost(string, tag = "2")]
    sandbox_id: String,
    #[prost(string, tag = "3")]
    container_id: String,
    #[prost(string, tag = "4")]
    exec_id: String,
    #[prost(message, optional, tag = "5")]
    spec: Option<Any>,
}

#[derive(Clone, PartialEq, Message)]
struct Prepared {
    #[prost(string, tag = "1")]
    bundle: String,
}

#[derive(Clone, PartialEq, Message)]
struct State {
    #[prost(string, tag = "1")]
    sandbox_id: String,
    #[prost(uint32, tag = "2")]
    pid: u32,
    #[prost(string, tag = "3")]
    state: String,
    #[prost(string, tag = "4")]
    task_address: String,
    #[prost(map = "string, string", tag = "5")]
    info: HashMap<String, String>,
    #[prost(message, optional, tag = "6")]
    created_at: Option<Timestamp>,
    #[prost(message, optional, tag = "7")]
    exited_at: Option<Timestamp>,
}

#[derive(Clone, PartialEq, Message)]
struct Exit {
    #[prost(uint32, tag = "1")]
    exit_status: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
struct Nothing {}

fn json(text: &str) -> Option<Any> {
    Some(Any {
        type_url: String::new(),
        value: text.into(),
    })
}

impl Bed {
    /// A call as iSulad makes it, without metadata.
    pub(super) async fn call<Q, A>(&self, method: &str, request: Q) -> Result<A, Status>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let mut grpc = tonic::client::Grpc::new(self.channel.clone());
        grpc.ready().await.unwrap();
        let path = format!("/containerd.services.sandbox.v1.Controller/{method}");
        let codec = tonic_prost::ProstCodec::<Q, A>::default();
        grpc.unary(Request::new(request), path.parse().unwrap(), codec)
            .await
            .map(tonic::Response::into_inner)
    }

    async fn on<A: Message + Default + 'static>(&self, method: &str, id: &str) -> Result<A, Status> {
        let request = Pod {
            sandboxer: "cloister".into(),
            sandbox_id: id.into(),
            third: 1,
        };
        self.call(method, request).await
    }

    async fn create_draft(&self, id: &str, options: &str) -> Result<Nothing, Status> {
        let request = Create {
            sandboxer: "cloister".into(),
            sandbox_id: id.into(),
            options: json(options),
            netns_path: String::new(),
        };
        self.call("Create", request).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_draft_from_create_to_shutdown() {
    let bed = bed("draft").await;
    let config = r#"{"metadata":{"name":"web","namespace":"shop"},"linux":{"securityContext":{"namespaceOptions":{"pid":"CONTAINER"}}}}"#;
    bed.create_draft("a", config).await.unwrap();
    let state: State = bed.on("Status", "a").await.unwrap();
    assert_eq!(
        (
            state.sandbox_id.as_str(),
            state.state.as_str(),
            state.task_address.as_str()
        ),
        ("a", "SANDBOX_NOTREADY", "")
    );
    assert!(state.created_at.unwrap().seconds > 1_600_000_000 && state.exited_at.is_none());
    assert!(state.info["cloister"].contains("\"web\""));
    let prepare = |container: &str, exec: &str| Prepare {
        sandboxer: "cloister".into(),
        sandbox_id: "a".into(),
        container_id: container.into(),
        exec_id: exec.into(),
        spec: json("{}"),
    };
    let early = bed.call::<_, Prepared>("Prepare", prepare("c", "")).await;
    assert_eq!(code(early).0, Code::FailedPrecondition);
    let exec: Prepared = bed.call("Prepare", prepare("c", "e")).await.unwrap();
    assert_eq!(exec.bundle, "");
    bed.call::<_, Nothing>("Purge", prepare("c", "")).await.unwrap();
    bed.on::<Nothing>("Stop", "a").await.unwrap();
    assert_eq!(bed.on::<Exit>("Wait", "a").await.unwrap().exit_status, 0);
    bed.on::<Nothing>("Shutdown", "a").await.unwrap();
    assert_eq!(code(bed.on::<State>("Status", "a").await).0, Code::NotFound);
    assert_eq!(bed.left(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_isulad_asks_about_pods_that_are_gone() {
    let bed = bed("gone").await;
    // It ends and removes what did not start, too, and asks this whether a daemon is back.
    bed.on::<Nothing>("Stop", "none").await.unwrap();
    bed.on::<Nothing>("Shutdown", "none").await.unwrap();
    bed.on::<Nothing>("Platform", "none").await.unwrap();
    let purge = Prepare {
        sandboxer: "cloister".into(),
        sandbox_id: "none".into(),
        container_id: "c".into(),
        exec_id: String::new(),
        spec: json("{}"),
    };
    bed.call::<_, Nothing>("Purge", purge).await.unwrap();
    // For it the pod's end.
    assert_eq!(code(bed.on::<Exit>("Wait", "none").await).0, Code::NotFound);
    bed.create_draft("b", "{}").await.unwrap();
    let failed = code(bed.on::<Nothing>("Start", "b").await);
    assert!(failed.1.contains("virtual machine"), "{failed:?}");
    bed.on::<Nothing>("Shutdown", "b").await.unwrap();
    for (id, options, refused) in [
        ("c", "{", Code::InvalidArgument),
        ("../c", "{}", Code::InvalidArgument),
        (
            "c",
            r#"{"linux":{"securityContext":{"namespaceOptions":{"network":"NODE"}}}}"#,
            Code::Unimplemented,
        ),
    ] {
        assert_eq!(code(bed.create_draft(id, options).await).0, refused, "{options}");
    }
    assert_eq!(bed.left(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn isulad_from_2025_on_is_containerd_without_a_namespace() {
    let mut bed = bed("current").await;
    let config = PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: "web".into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let create = ControllerCreateRequest {
        sandbox_id: "a".into(),
        options: Some(Any {
            type_url: String::new(),
            value: config.encode_to_vec(),
        }),
        sandboxer: "cloister".into(),
        ..Default::default()
    };
    bed.client.create(Request::new(create)).await.unwrap();
    // containerd does not see it, nor it containerd's.
    assert_eq!(code(bed.status("a").await).0, Code::NotFound);
    let update = |field: &str, list: &str| ControllerUpdateRequest {
        sandbox_id: "a".into(),
        sandboxer: "cloister".into(),
        sandbox: Some(Sandbox {
            sandbox_id: "a".into(),
            extensions: HashMap::from([(
                "tasks".to_owned(),
                Any {
                    type_url: "github.com/containerd/containerd/Tasks".into(),
                    value: list.into(),
                },
            )]),
            ..Default::default()
        }),
        fields: vec![field.to_owned()],
    };
    let early = bed
        .client
        .update(Request::new(update("extensions.tasks", r#"{"tasks":[]}"#)))
        .await;
    assert_eq!(code(early).0, Code::FailedPrecondition);
    bed.client
        .update(Request::new(update("labels", "")))
        .await
        .unwrap();
    let status = ControllerStatusRequest {
        sandbox_id: "a".into(),
        sandboxer: "cloister".into(),
        verbose: true,
    };
    let status = bed
        .client
        .status(Request::new(status))
        .await
        .unwrap()
        .into_inner();
    assert!(status.info["cloister"].contains("\"isulad\""));
    let shutdown = ControllerShutdownRequest {
        sandbox_id: "a".into(),
        sandboxer: "cloister".into(),
    };
    bed.client.shutdown(Request::new(shutdown)).await.unwrap();
    assert_eq!(bed.left(), [""; 0]);
}
