// SPDX-License-Identifier: Apache-2.0
//! iSulad in containerd's place: its calls in both dialects, with a guest. It names no namespace, has a container's root file
//! system mounted itself, and speaks Task v2.

use cloister_protocol::task as api;
use cloister_protocol::ttrpc::asynchronous::Client;
use cloister_protocol::ttrpc::asynchronous::transport::Socket;
use cloister_protocol::ttrpc::proto::Request as Frame;
use cloister_protocol::{TASK_V2, ttrpc};
use cloister_sandbox_api::daemon::isulad::dialect::{
    DraftCreate, DraftPod, DraftStatus, DraftStop, PrepareRequest, PrepareResponse, PurgeRequest,
};
use cloister_tests::e2e::{eventually, guest_file};
use containerd_client::services::v1::sandbox::*;
use containerd_client::types::{Mount, Sandbox};
use hyper_util::rt::TokioIo;
use prost::Message;
use prost_types::Any;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

/// cloisterd without a containerd, and its folder.
struct Node {
    dir: PathBuf,
    daemon: Child,
    channel: Channel,
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        let _ = Command::new("umount").arg("-Rl").arg(&self.dir).status();
        let _ = fs::remove_dir(&self.dir);
    }
}

fn node() -> Node {
    let dir = PathBuf::from(format!("/run/isulad-{}", std::process::id()));
    fs::create_dir(&dir).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "mode=755", "e2e-isulad"])
        .arg(&dir)
        .status();
    assert!(mounted.unwrap().success());
    let config = dir.join("config.toml");
    let text = format!(
        "state_dir = \"{dir}/r\"\nsocket = \"{dir}/s.sock\"\ncontainerd_address = \"{dir}/none.sock\"\n[log]\nformat = \"text\"\n\
         level = \"debug\"\n[sandboxer.cloister]\nkernel = \"{kernel}\"\ninitrd = \"{initrd}\"\ninit_timeout = \"600s\"\n",
        dir = dir.display(),
        kernel = guest_file("vmlinux").display(),
        initrd = guest_file("initramfs.cpio").display(),
    );
    fs::write(&config, text).unwrap();
    let log = fs::File::create(dir.join("log")).unwrap();
    let daemon = Command::new("cloisterd")
        .arg("--config")
        .arg(&config)
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap();
    let socket = dir.join("s.sock");
    eventually("cloisterd", || {
        std::os::unix::net::UnixStream::connect(&socket).ok()
    });
    let connector = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
    });
    let channel = Endpoint::from_static("http://cloisterd").connect_with_connector_lazy(connector);
    Node { dir, daemon, channel }
}

impl Node {
    async fn call<Q, A>(&self, method: &str, request: Q) -> A
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let mut grpc = tonic::client::Grpc::new(self.channel.clone());
        grpc.ready().await.unwrap();
        let path = format!("/containerd.services.sandbox.v1.Controller/{method}");
        let codec = tonic_prost::ProstCodec::<Q, A>::default();
        let answer = grpc
            .unary(tonic::Request::new(request), path.parse().unwrap(), codec)
            .await;
        answer
            .unwrap_or_else(|status| {
                let log = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
                panic!("{method}: {status}\n{log}")
            })
            .into_inner()
    }

    /// A root file system, mounted as iSulad has it, with one program.
    fn root(&self, name: &str) -> PathBuf {
        let root = self.dir.join(name);
        fs::create_dir_all(root.join("bin")).unwrap();
        fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
        root
    }
}

/// A specification as iSulad generates it, shortened.
fn spec(root: &Path, text: &str) -> Value {
    json!({
        "ociVersion": "1.0.1",
        "root": {"path": root, "readonly": false},
        "process": {"terminal": false, "user": {"uid": 0, "gid": 0}, "cwd": "/", "env": ["PATH=/bin"],
            "args": ["/bin/busybox", "sh", "-c", text]},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]}],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}]},
    })
}

/// Task v2 on a pod's socket.
struct Task(Client);

impl Task {
    async fn connect(address: &str, scheme: &str) -> Self {
        let path = address
            .strip_prefix(scheme)
            .unwrap_or_else(|| panic!("{address} does not begin with {scheme}"));
        Self(Client::new(Socket::from(
            UnixStream::connect(path).await.unwrap(),
        )))
    }

    async fn call<A: cloister_protocol::protobuf::Message>(
        &self,
        method: &str,
        request: &impl cloister_protocol::protobuf::Message,
    ) -> ttrpc::Result<A> {
        let frame = Frame {
            service: TASK_V2.into(),
            method: method.into(),
            payload: request.write_to_bytes().unwrap(),
            ..Default::default()
        };
        let answer = self.0.request(frame).await?;
        Ok(A::parse_from_bytes(&answer.payload).unwrap())
    }

    /// A container from Create to Delete: its exit status.
    async fn run(&self, id: &str, bundle: &str) -> u32 {
        let create = api::CreateTaskRequest {
            id: id.into(),
            bundle: bundle.into(),
            ..Default::default()
        };
        let made: api::CreateTaskResponse = self.call("Create", &create).await.unwrap();
        assert!(made.pid > 0);
        let start = api::StartRequest {
            id: id.into(),
            ..Default::default()
        };
        let _: api::StartResponse = self.call("Start", &start).await.unwrap();
        let wait = api::WaitRequest {
            id: id.into(),
            ..Default::default()
        };
        let ended: api::WaitResponse = self.call("Wait", &wait).await.unwrap();
        let delete = api::DeleteRequest {
            id: id.into(),
            ..Default::default()
        };
        let deleted: api::DeleteResponse = self.call("Delete", &delete).await.unwrap();
        assert_eq!(deleted.exit_status, ended.exit_status);
        ended.exit_status
    }
}

fn untyped(value: impl Into<Vec<u8>>) -> Option<Any> {
    Some(Any {
        type_url: String::new(),
        value: value.into(),
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn isulad_runs_containers_in_both_dialects() {
    let node = node();
    draft(&node).await;
    current(&node).await;
    let left: Vec<_> = node.dir.join("r/sandboxes").read_dir().unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

async fn draft(node: &Node) {
    let pod = || DraftPod {
        sandboxer: "cloister".into(),
        sandbox_id: "draft".into(),
    };
    let create = DraftCreate {
        sandboxer: "cloister".into(),
        sandbox_id: "draft".into(),
        options: untyped(r#"{"metadata":{"name":"d","namespace":"n"},"hostname":"from-json"}"#),
        ..Default::default()
    };
    let _: ControllerCreateResponse = node.call("Create", create).await;
    let started: ControllerStartResponse = node.call("Start", pod()).await;
    let status: DraftStatus = node.call("Status", pod()).await;
    assert_eq!(
        (status.state.as_str(), status.task_address.as_str()),
        ("SANDBOX_READY", started.address.as_str())
    );
    let root = node.root("root-draft");
    let text = "busybox hostname >/name; exit 7";
    let prepare = PrepareRequest {
        sandbox_id: "draft".into(),
        container_id: "c1".into(),
        sandboxer: "cloister".into(),
        spec: untyped(spec(&root, text).to_string()),
        rootfs: vec![Mount {
            r#type: "bind".into(),
            source: root.display().to_string(),
            ..Default::default()
        }],
        ..Default::default()
    };
    let prepared: PrepareResponse = node.call("Prepare", prepare).await;
    let task = Task::connect(&started.address, "unix://").await;
    assert_eq!(task.run("c1", &prepared.bundle).await, 7);
    assert_eq!(fs::read_to_string(root.join("name")).unwrap(), "from-json\n");
    let purge = PurgeRequest {
        sandboxer: "cloister".into(),
        sandbox_id: "draft".into(),
        container_id: "c1".into(),
        ..Default::default()
    };
    let _: PrepareResponse = node.call("Purge", purge).await;
    assert!(!Path::new(&prepared.bundle).exists());
    let stop = DraftStop {
        sandboxer: "cloister".into(),
        sandbox_id: "draft".into(),
        timeout_secs: 10,
    };
    let _: ControllerStopResponse = node.call("Stop", stop).await;
    let ended: ControllerWaitResponse = node.call("Wait", pod()).await;
    assert_eq!(ended.exit_status, 0);
    let _: ControllerShutdownResponse = node.call("Shutdown", pod()).await;
}

async fn current(node: &Node) {
    let (sandbox_id, sandboxer) = ("current".to_owned(), "cloister".to_owned());
    let config = k8s_cri::v1::PodSandboxConfig {
        hostname: "from-protobuf".into(),
        ..Default::default()
    };
    let create = ControllerCreateRequest {
        sandbox_id: sandbox_id.clone(),
        sandboxer: sandboxer.clone(),
        options: untyped(config.encode_to_vec()),
        ..Default::default()
    };
    let _: ControllerCreateResponse = node.call("Create", create).await;
    let start = ControllerStartRequest {
        sandbox_id: sandbox_id.clone(),
        sandboxer: sandboxer.clone(),
    };
    let started: ControllerStartResponse = node.call("Start", start).await;
    let root = node.root("root-current");
    let spec = spec(&root, "busybox hostname >/name; exit 9");
    // Its own bundle, without a root file system in it.
    let bundle = node.dir.join("bundle");
    fs::create_dir(&bundle).unwrap();
    fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
    let update = |tasks: Value| ControllerUpdateRequest {
        sandbox_id: sandbox_id.clone(),
        sandboxer: sandboxer.clone(),
        fields: vec!["extensions.tasks".into()],
        sandbox: Some(Sandbox {
            sandbox_id: sandbox_id.clone(),
            extensions: HashMap::from([(
                "tasks".to_owned(),
                Any {
                    type_url: "github.com/containerd/containerd/Tasks".into(),
                    value: json!({ "tasks": tasks }).to_string().into_bytes(),
                },
            )]),
            ..Default::default()
        }),
    };
    let list = json!([{"task_id": "c1", "spec": spec, "rootfs": [{"type": "bind", "source": root}],
        "stdin": "", "stdout": "", "stderr": ""}]);
    let _: ControllerUpdateResponse = node.call("Update", update(list)).await;
    let task = Task::connect(&started.address, "ttrpc+unix://").await;
    assert_eq!(task.run("c1", bundle.to_str().unwrap()).await, 9);
    assert_eq!(fs::read_to_string(root.join("name")).unwrap(), "from-protobuf\n");
    let _: ControllerUpdateResponse = node.call("Update", update(json!([]))).await;
    // Now it would have no root.
    let create = api::CreateTaskRequest {
        id: "c1".into(),
        bundle: bundle.display().to_string(),
        ..Default::default()
    };
    let refused = task.call::<api::CreateTaskResponse>("Create", &create).await;
    assert!(
        refused
            .as_ref()
            .is_err_and(|error| error.to_string().contains("root file system")),
        "{refused:?}"
    );
    let stop = ControllerStopRequest {
        sandbox_id: sandbox_id.clone(),
        sandboxer: sandboxer.clone(),
        timeout_secs: 10,
    };
    let _: ControllerStopResponse = node.call("Stop", stop).await;
    let wait = ControllerWaitRequest {
        sandbox_id: sandbox_id.clone(),
        sandboxer: sandboxer.clone(),
    };
    let ended: ControllerWaitResponse = node.call("Wait", wait).await;
    assert_eq!(ended.exit_status, 0);
    let shutdown = ControllerShutdownRequest {
        sandbox_id,
        sandboxer,
    };
    let _: ControllerShutdownResponse = node.call("Shutdown", shutdown).await;
}
