// SPDX-License-Identifier: Apache-2.0
//! The Controller service as containerd calls it, without a guest: what is refused, what is idempotent, and that nothing
//! is left of a pod that could not be had.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod bad_input;
mod daemon;
mod isulad;
mod operators;
mod workers;

use cloister_sandbox_api::daemon::config::{Config, Profile};
use cloister_sandbox_api::daemon::events::Publisher;
use cloister_sandbox_api::daemon::metrics::{Metrics, SharedThreads};
use cloister_sandbox_api::daemon::node::{Node, Only};
use cloister_sandbox_api::daemon::workers::router::Router;
use cloister_sandbox_api::daemon::{admin, uds};
use containerd_client::services::v1::sandbox::controller_client::ControllerClient;
use containerd_client::services::v1::sandbox::*;
use k8s_cri::v1::{
    LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption, PodSandboxConfig,
    PodSandboxMetadata,
};
use prost::Message;
use std::path::{Path, PathBuf};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

struct Bed {
    dir: PathBuf,
    channel: Channel,
    client: ControllerClient<Channel>,
    server: tokio::task::JoinHandle<()>,
    operators: tokio::task::JoinHandle<()>,
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.server.abort();
        self.operators.abort();
        std::fs::remove_dir_all(&self.dir).unwrap();
    }
}

fn dir(name: &str) -> PathBuf {
    let dir = PathBuf::from(format!("/tmp/ctl-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

/// A daemon whose guest kernel is no kernel: every Start fails, on every host.
async fn bed(name: &str) -> Bed {
    let dir = dir(name);
    serve(dir).await
}

async fn serve(dir: PathBuf) -> Bed {
    let kernel = dir.join("kernel");
    std::fs::write(&kernel, "no kernel").unwrap();
    let mut config = Config {
        state_dir: dir.join("state"),
        socket: dir.join("s.sock"),
        ..Config::default()
    };
    for (name, pods_per_worker) in [("worker", 1), ("workers", 2)] {
        let profile = Profile {
            pods_per_worker,
            ..Profile::default()
        };
        config.sandboxer.insert(name.to_owned(), profile);
    }
    for profile in config.sandboxer.values_mut() {
        profile.kernel.clone_from(&kernel);
        profile.initrd.clone_from(&kernel);
    }
    let cells = cloister_vmm::CellHost::new(cloister_vmm::CellHostConfig::default()).unwrap();
    let events = Publisher::start(&dir.join("no-containerd.sock"));
    let listener = uds::listen(&config.socket).unwrap();
    let socket = config.socket.clone();
    let threads = SharedThreads {
        event_loops: 1,
        workers: 1,
    };
    let metrics = Metrics::new(threads, []);
    let admin_socket = admin::socket(&config.state_dir);
    let program = Path::new(env!("CARGO_BIN_EXE_cloisterd"));
    let node = Node::new(config, cells, events, metrics, program).unwrap();
    let admin_listener = uds::listen(&admin_socket).unwrap();
    let operators = tokio::spawn(admin::serve(admin_listener, std::sync::Arc::clone(&node)));
    let server = tokio::spawn(async move {
        tonic::transport::Server::builder()
            .add_service(Router::new(node))
            .serve_with_incoming(UnixListenerStream::new(listener))
            .await
            .unwrap();
    });
    let channel = uds::channel(&socket).await.unwrap();
    Bed {
        dir,
        client: ControllerClient::new(channel.clone()),
        channel,
        server,
        operators,
    }
}

fn in_namespace<T>(message: T, namespace: &str) -> Request<T> {
    let mut request = Request::new(message);
    request
        .metadata_mut()
        .insert("containerd-namespace", namespace.parse().unwrap());
    request
}

fn k8s<T>(message: T) -> Request<T> {
    in_namespace(message, "k8s.io")
}

fn config(network: NamespaceMode) -> PodSandboxConfig {
    let security = LinuxSandboxSecurityContext {
        namespace_options: Some(NamespaceOption {
            network: network.into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: "web".into(),
            ..Default::default()
        }),
        linux: Some(LinuxPodSandboxConfig {
            security_context: Some(security),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn creation(id: &str, config: &PodSandboxConfig) -> ControllerCreateRequest {
    ControllerCreateRequest {
        sandbox_id: id.into(),
        options: Some(prost_types::Any {
            type_url: "runtime.v1.PodSandboxConfig".into(),
            value: config.encode_to_vec(),
        }),
        sandboxer: "cloister".into(),
        ..Default::default()
    }
}

fn code<T: std::fmt::Debug>(answer: Result<T, Status>) -> (Code, String) {
    let status = answer.unwrap_err();
    (status.code(), status.message().to_owned())
}

impl Bed {
    async fn create(&mut self, request: ControllerCreateRequest) -> Result<(), Status> {
        self.client.create(k8s(request)).await.map(|_| ())
    }

    async fn status(&mut self, id: &str) -> Result<ControllerStatusResponse, Status> {
        let request = ControllerStatusRequest {
            sandbox_id: id.into(),
            verbose: true,
            ..Default::default()
        };
        self.client
            .status(k8s(request))
            .await
            .map(tonic::Response::into_inner)
    }

    async fn start(&mut self, id: &str) -> Result<(), Status> {
        let request = ControllerStartRequest {
            sandbox_id: id.into(),
            ..Default::default()
        };
        self.client.start(k8s(request)).await.map(|_| ())
    }

    async fn stop(&mut self, id: &str) -> Result<(), Status> {
        let request = ControllerStopRequest {
            sandbox_id: id.into(),
            ..Default::default()
        };
        self.client.stop(k8s(request)).await.map(|_| ())
    }

    async fn shutdown(&mut self, id: &str) -> Result<(), Status> {
        let request = ControllerShutdownRequest {
            sandbox_id: id.into(),
            ..Default::default()
        };
        self.client.shutdown(k8s(request)).await.map(|_| ())
    }

    fn left(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir.join("state/sandboxes")).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_told_apart_and_make_nothing() {
    let mut bed = bed("bad").await;
    let pod = config(NamespaceMode::Pod);
    let unnamed = bed.client.create(in_namespace(creation("a", &pod), "")).await;
    assert_eq!(code(unnamed).0, Code::InvalidArgument);
    let long = "x".repeat(129);
    for id in ["", "../a", "a/b", ".", long.as_str()] {
        assert_eq!(
            code(bed.create(creation(id, &pod)).await).0,
            Code::InvalidArgument,
            "{id:?}"
        );
    }
    let other = ControllerCreateRequest {
        sandboxer: "other".into(),
        ..creation("a", &pod)
    };
    let (refused, message) = code(bed.create(other).await);
    assert!(
        refused == Code::InvalidArgument && message.contains("\"other\"") && message.contains("cloister")
    );
    let host = creation("a", &config(NamespaceMode::Node));
    let (refused, message) = code(bed.create(host).await);
    assert!(
        refused == Code::Unimplemented && message.contains("hostNetwork"),
        "{message}"
    );
    let garbage = ControllerCreateRequest {
        options: Some(prost_types::Any {
            type_url: "runtime.v1.PodSandboxConfig".into(),
            value: vec![0xff; 32],
        }),
        ..creation("a", &pod)
    };
    assert_eq!(code(bed.create(garbage).await).0, Code::InvalidArgument);
    assert_eq!(code(bed.status("a").await).0, Code::NotFound);
    assert_eq!(code(bed.start("a").await).0, Code::NotFound);
    assert_eq!(code(bed.stop("a").await).0, Code::NotFound);
    assert_eq!(code(bed.shutdown("a").await).0, Code::NotFound);
    assert_eq!(bed.left(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_never_starts_can_be_stopped_and_removed() {
    let mut bed = bed("never").await;
    let pod = config(NamespaceMode::Pod);
    bed.create(creation("a", &pod)).await.unwrap();
    assert_eq!(code(bed.create(creation("a", &pod)).await).0, Code::AlreadyExists);
    let status = bed.status("a").await.unwrap();
    assert_eq!(
        (status.state.as_str(), status.address.as_str()),
        ("SANDBOX_NOTREADY", "")
    );
    assert!(status.info["cloister"].contains("\"web\""));
    // Another of containerd's namespaces does not see it.
    let request = ControllerStatusRequest {
        sandbox_id: "a".into(),
        ..Default::default()
    };
    let elsewhere = bed.client.status(in_namespace(request, "default")).await;
    assert_eq!(code(elsewhere).0, Code::NotFound);
    bed.stop("a").await.unwrap();
    bed.stop("a").await.unwrap();
    assert_eq!(code(bed.start("a").await).0, Code::FailedPrecondition);
    let wait = ControllerWaitRequest {
        sandbox_id: "a".into(),
        ..Default::default()
    };
    assert_eq!(
        bed.client.wait(k8s(wait)).await.unwrap().into_inner().exit_status,
        0
    );
    bed.shutdown("a").await.unwrap();
    assert_eq!(code(bed.status("a").await).0, Code::NotFound);
    assert_eq!(bed.left(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_fails_leaves_nothing() {
    let mut bed = bed("fail").await;
    let pod = config(NamespaceMode::Pod);
    bed.create(creation("a", &pod)).await.unwrap();
    let (_, message) = code(bed.start("a").await);
    assert!(
        message.contains("sandbox a") && message.contains("virtual machine"),
        "{message}"
    );
    // Nobody calls Stop or Shutdown after that: it goes by itself, and the same id can be had again.
    for _ in 0..200 {
        if bed.status("a").await.is_err() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert_eq!(code(bed.status("a").await).0, Code::NotFound);
    assert_eq!(bed.left(), [""; 0]);
    bed.create(creation("a", &pod)).await.unwrap();
    bed.shutdown("a").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_daemon_knows_the_pods_of_the_one_before() {
    let dir = dir("again");
    let old = dir.join("state/sandboxes/old");
    std::fs::create_dir_all(&old).unwrap();
    std::fs::create_dir_all(dir.join("state/sandboxes/junk")).unwrap();
    let mut first = serve(dir.clone()).await;
    assert_eq!(first.left(), ["old"; 0], "what is no pod's is removed");
    for id in ["b", "half"] {
        first
            .create(creation(id, &config(NamespaceMode::Pod)))
            .await
            .unwrap();
    }
    first.server.abort();
    let record = dir.join("state/sandboxes/b/sandbox.json");
    let text = std::fs::read_to_string(&record).unwrap();
    std::fs::write(&record, text.replace("\"created\",", "\"ready\",")).unwrap();
    std::fs::write(dir.join("state/sandboxes/b/task.sock"), "").unwrap();
    let unread = dir.join("state/sandboxes/unread");
    std::fs::create_dir(&unread).unwrap();
    std::fs::write(unread.join("sandbox.json"), "{").unwrap();
    let mut second = serve(dir.clone()).await;
    assert_eq!(second.status("b").await.unwrap().state, "SANDBOX_NOTREADY");
    assert!(!dir.join("state/sandboxes/b/task.sock").exists());
    let wait = ControllerWaitRequest {
        sandbox_id: "b".into(),
        ..Default::default()
    };
    assert_eq!(
        second
            .client
            .wait(k8s(wait))
            .await
            .unwrap()
            .into_inner()
            .exit_status,
        137
    );
    // Whoever called Create or Start was not told that it could be had, and does not come back.
    assert_eq!(code(second.status("half").await).0, Code::NotFound);
    second.stop("b").await.unwrap();
    second.shutdown("b").await.unwrap();
    assert_eq!(second.left(), ["unread"], "it may be a pod's that goes on");
    std::mem::forget(first);
}

#[test]
fn one_daemon_per_state_folder() {
    let dir = dir("only");
    let only = Only::take(&dir).unwrap();
    let refused = Only::take(&dir).unwrap_err().to_string();
    assert!(refused.contains(&std::process::id().to_string()), "{refused}");
    drop(only);
    Only::take(Path::new(&dir)).unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
}
