// SPDX-License-Identifier: Apache-2.0
//! Runs the agent and plays the host for it.
//!
//! Without a VM ([`Bed::new`]) it runs as an ordinary process in namespaces of its own (mount, pid, network, IPC, UTS), with a cgroup v2 tree
//! mounted where it looks for one. Unix sockets stand in for vsock. Needs root; says so and fails otherwise.
//!
//! With one ([`Bed::in_vm`]) it is PID 1 under QEMU, and vsock is the host kernel's.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use std::collections::HashMap;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cloister_protocol::events::{Envelope, Events, ForwardRequest, create_events};
use cloister_protocol::pod::{PodClient, Ready};
use cloister_protocol::protobuf::well_known_types::{any::Any, empty::Empty};
use cloister_protocol::protobuf::{Message, MessageField};
use cloister_protocol::stream::{HEADER_LEN, StreamId};
use cloister_protocol::task::{
    CreateTaskRequest, DeleteRequest, ExecProcessRequest, Mount, StartRequest, TaskClient, WaitRequest,
};
use cloister_protocol::ttrpc::asynchronous::{Client, Server, TtrpcContext};
use cloister_protocol::ttrpc::context::{Context, with_timeout};
use cloister_protocol::{EVENTS_PORT, PROCESS_TYPE_URL, SPEC_TYPE_URL, STREAM_PORT, ttrpc};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot};

/// Far more than anything here takes, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(280);

/// The context of every request.
pub fn ctx() -> Context {
    with_timeout(i64::try_from(PATIENCE.as_nanos()).unwrap())
}

/// `future`, or a failed test.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future)
        .await
        .unwrap_or_else(|_| panic!("{what}: nothing for {PATIENCE:?}"))
}

/// A connection of either kind.
pub trait Duplex: AsyncRead + AsyncWrite + Send {}
impl<T: AsyncRead + AsyncWrite + Send> Duplex for T {}
/// A stdio stream.
pub type Stream = Pin<Box<dyn Duplex>>;

type Waiting = Arc<Mutex<HashMap<StreamId, oneshot::Sender<Stream>>>>;

/// The host's Events service: what the agent publishes.
pub struct Sink(pub mpsc::UnboundedSender<Envelope>);

#[async_trait::async_trait]
impl Events for Sink {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        // The test may have ended.
        let _ = self.0.send(request.envelope.unwrap_or_default());
        Ok(Empty::new())
    }
}

/// An agent, its host, and a root file system with busybox.
pub struct Bed {
    /// Task service.
    pub task: TaskClient,
    /// Pod service.
    pub pod: PodClient,
    /// The agent's first message.
    pub ready: Ready,
    /// What the agent published.
    pub events: mpsc::UnboundedReceiver<Envelope>,
    /// Directory of all files of this bed.
    pub dir: tempfile::TempDir,
    waiting: Waiting,
    /// The agent, or its VM.
    pub agent: Child,
    root: PathBuf,
    next: u128,
    _server: Server,
}

impl Drop for Bed {
    fn drop(&mut self) {
        // The agent is PID 1 of a pid namespace: everything in it dies with it.
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}

/// Streams of one process, as its host has them.
#[derive(Default)]
pub struct Streams {
    /// Names to put into a request.
    pub names: [String; 3],
    receivers: [Option<oneshot::Receiver<Stream>>; 3],
}

impl Streams {
    /// The host's end of stream 0, 1 or 2, once the agent has dialled it.
    pub async fn take(&mut self, which: usize) -> Stream {
        let receiver = self.receivers[which]
            .take()
            .expect("the stream was asked for, and taken once");
        soon("stdio stream", receiver).await.expect("the agent dialled")
    }

    /// All bytes of an output.
    pub async fn read_all(&mut self, which: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut stream = self.take(which).await;
        soon("output", stream.read_to_end(&mut bytes)).await.unwrap();
        bytes
    }

    /// All text of an output.
    pub async fn read_text(&mut self, which: usize) -> String {
        String::from_utf8(self.read_all(which).await).unwrap()
    }
}

fn busybox_root(root: &Path) {
    for dir in ["bin", "dev", "proc", "sys", "tmp", "etc", "root"] {
        std::fs::create_dir_all(root.join(dir)).unwrap();
    }
    std::fs::copy("/bin/busybox", root.join("bin/busybox"))
        .expect("/bin/busybox (Debian: busybox-static) is needed for this test");
    for name in [
        "sh",
        "echo",
        "cat",
        "sleep",
        "true",
        "head",
        "sha256sum",
        "stty",
        "tty",
        "id",
        "env",
        "kill",
        "yes",
        "dd",
        "grep",
        "ls",
        "tail",
        "test",
    ] {
        symlink("busybox", root.join("bin").join(name)).unwrap();
    }
    std::fs::write(root.join("bin/notexec"), "x").unwrap();
    std::fs::write(
        root.join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n",
    )
    .unwrap();
}

/// What is there before the agent is ready.
struct Parts {
    dir: tempfile::TempDir,
    root: PathBuf,
    waiting: Waiting,
    agent: Child,
    server: Server,
    events: mpsc::UnboundedReceiver<Envelope>,
}

impl Parts {
    async fn connect(mut self, address: &str) -> Bed {
        let ready = soon("ready message", self.events.recv())
            .await
            .expect("the agent is ready");
        assert_eq!(ready.topic, cloister_protocol::READY_TOPIC);
        let ready = Ready::parse_from_bytes(&ready.event.value).unwrap();
        let client = Client::connect(address).await.unwrap();
        Bed {
            task: TaskClient::new(client.clone()),
            pod: PodClient::new(client),
            ready,
            events: self.events,
            dir: self.dir,
            waiting: self.waiting,
            agent: self.agent,
            root: self.root,
            next: 1,
            _server: self.server,
        }
    }
}

impl Bed {
    /// Starts an agent and waits until it is ready.
    pub async fn new() -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "this test makes containers: run it as root"
        );
        let dir = tempfile::Builder::new().prefix("cl").tempdir_in("/tmp").unwrap();
        let path = |name: &str| dir.path().join(name);
        busybox_root(&path("root"));
        std::fs::create_dir(path("host")).unwrap();

        let (sender, events) = mpsc::unbounded_channel();
        let mut server = Server::new()
            .bind(&format!(
                "unix://{}",
                path(&format!("host/{EVENTS_PORT}.sock")).display()
            ))
            .unwrap()
            .register_service(create_events(Arc::new(Sink(sender))));
        server.start().await.unwrap();
        let waiting = Waiting::default();
        let listener = UnixListener::bind(path(&format!("host/{STREAM_PORT}.sock"))).unwrap();
        tokio::spawn(accept(listener, Arc::clone(&waiting)));

        let socket = path("agent.sock");
        let script = "umount -R /sys/fs/cgroup; mount -t cgroup2 cgroup2 /sys/fs/cgroup && exec \"$@\"";
        let agent = Command::new("unshare")
            .args([
                "--mount",
                "--pid",
                "--net",
                "--ipc",
                "--uts",
                "--fork",
                "--kill-child",
                "--mount-proc",
            ])
            .args(["--propagation", "private", "sh", "-c", script, "sh"])
            // Not set where only VMs are booted, tests/tests/e2e/agent.rs.
            .arg(option_env!("CARGO_BIN_EXE_cloister-agent").unwrap_or("cloister-agent"))
            .args(["--listen", &format!("unix:{}", socket.display())])
            .args(["--host", &format!("unix:{}", path("host").display())])
            .args(["--run", &path("run").display().to_string()])
            .stdin(Stdio::null())
            .spawn()
            .expect("unshare (util-linux) is needed for this test");
        let address = format!("unix://{}", socket.display());
        let root = path("root");
        Parts {
            dir,
            root,
            waiting,
            agent,
            server,
            events,
        }
        .connect(&address)
        .await
    }

    /// Boots a VM under QEMU whose PID 1 is the agent, and waits until it is ready. `agent` is a static build of it,
    /// `kernel` a guest kernel. /busybox in the guest is a container's root file system.
    pub async fn in_vm(agent: &Path, kernel: &Path, cid: u32) -> Self {
        let dir = tempfile::Builder::new().prefix("cl").tempdir_in("/tmp").unwrap();
        let path = |name: &str| dir.path().join(name);
        busybox_root(&path("initramfs/busybox"));
        for name in ["dev", "proc", "sys", "run", "tmp"] {
            std::fs::create_dir_all(path("initramfs").join(name)).unwrap();
        }
        std::fs::copy(agent, path("initramfs/init")).unwrap();
        let script = "cd \"$1\" && mknod dev/console c 5 1 && find . | cpio --quiet -o -H newc > \"$2\"";
        let made = Command::new("sh")
            .args(["-c", script, "sh"])
            .args([path("initramfs"), path("initramfs.cpio")])
            .status()
            .unwrap();
        assert!(
            made.success(),
            "cpio and the right to make devices are needed for this test"
        );

        let (sender, events) = mpsc::unbounded_channel();
        let mut server = Server::new()
            .bind(&format!("vsock://-1:{EVENTS_PORT}"))
            .expect("vsock and the module vhost_vsock are needed for this test")
            .register_service(create_events(Arc::new(Sink(sender))));
        server.start().await.unwrap();
        let waiting = Waiting::default();
        let any = tokio_vsock::VsockAddr::new(tokio_vsock::VMADDR_CID_ANY, STREAM_PORT);
        let listener = tokio_vsock::VsockListener::bind(any).unwrap();
        let streams = Arc::clone(&waiting);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                hand_over(Box::pin(stream), &streams).await;
            }
        });
        let agent = Command::new("qemu-system-x86_64")
            .args([
                "-M",
                "microvm,acpi=off,pit=off,pic=off,rtc=off,auto-kernel-cmdline=on,isa-serial=on",
                "-bios",
                "qboot.rom",
                "-accel",
                "kvm",
                "-cpu",
                "host",
                "-m",
                "512",
                "-smp",
                "1",
            ])
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
                "-serial",
                "stdio",
            ])
            .arg("-kernel")
            .arg(kernel)
            .arg("-initrd")
            .arg(path("initramfs.cpio"))
            .args([
                "-append",
                "console=ttyS0 quiet reboot=t panic=-1 cloister.log=info",
            ])
            .args(["-device", &format!("vhost-vsock-device,guest-cid={cid}")])
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-system-x86_64 is needed for this test");
        let root = PathBuf::from("/busybox");
        let address = format!("vsock://{cid}:{}", cloister_protocol::AGENT_PORT);
        Parts {
            dir,
            root,
            waiting,
            agent,
            server,
            events,
        }
        .connect(&address)
        .await
    }

    /// The container root file system, as the agent sees it.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Streams for a process; those wanted get names.
    pub fn streams(&mut self, wanted: [bool; 3]) -> Streams {
        let mut streams = Streams::default();
        for (i, _) in wanted.iter().enumerate().filter(|(_, wanted)| **wanted) {
            let id = StreamId::from_random(self.next.to_be_bytes());
            self.next += 1;
            let (sender, receiver) = oneshot::channel();
            self.waiting.lock().unwrap().insert(id, sender);
            streams.names[i] = id.name();
            streams.receivers[i] = Some(receiver);
        }
        streams
    }

    /// The spec of a container that runs `args`.
    pub fn spec(&self, id: &str, args: &[&str]) -> Value {
        json!({
            "ociVersion": "1.1.0",
            "process": process(args),
            "root": {"path": "rootfs"},
            "hostname": "ignored",
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            ],
            "linux": {
                "cgroupsPath": format!("/cloister-test-{}/{id}", std::process::id()),
                "namespaces": [{"type": "pid"}, {"type": "mount"}],
                "resources": {},
                "maskedPaths": ["/proc/kcore"],
                "readonlyPaths": ["/proc/sys"],
            },
        })
    }

    /// The request that creates the container.
    pub fn create_request(
        &self,
        id: &str,
        spec: &Value,
        streams: &Streams,
        terminal: bool,
    ) -> CreateTaskRequest {
        let [stdin, stdout, stderr] = streams.names.clone();
        CreateTaskRequest {
            id: id.into(),
            bundle: "/ignored".into(),
            rootfs: vec![Mount {
                type_: "bind".into(),
                source: self.root().display().to_string(),
                options: vec!["rbind".into(), "rw".into()],
                ..Default::default()
            }],
            terminal,
            stdin,
            stdout,
            stderr,
            options: any(SPEC_TYPE_URL, spec),
            ..Default::default()
        }
    }

    /// Creates and starts a container.
    pub async fn run(&self, id: &str, args: &[&str], streams: &Streams, terminal: bool) {
        let request = self.create_request(id, &self.spec(id, args), streams, terminal);
        self.task.create(ctx(), &request).await.unwrap();
        self.start(id, "").await.unwrap();
    }

    /// Starts a container or exec.
    pub async fn start(&self, id: &str, exec: &str) -> ttrpc::Result<u32> {
        let request = StartRequest {
            id: id.into(),
            exec_id: exec.into(),
            ..Default::default()
        };
        Ok(self.task.start(ctx(), &request).await?.pid)
    }

    /// Adds an exec.
    pub async fn exec(
        &self,
        id: &str,
        exec: &str,
        args: &[&str],
        streams: &Streams,
        terminal: bool,
    ) -> ttrpc::Result<()> {
        self.exec_process(id, exec, &process(args), streams, terminal)
            .await
    }

    /// Adds an exec of an OCI process.
    pub async fn exec_process(
        &self,
        id: &str,
        exec: &str,
        process: &Value,
        streams: &Streams,
        terminal: bool,
    ) -> ttrpc::Result<()> {
        let [stdin, stdout, stderr] = streams.names.clone();
        let request = ExecProcessRequest {
            id: id.into(),
            exec_id: exec.into(),
            terminal,
            stdin,
            stdout,
            stderr,
            spec: any(PROCESS_TYPE_URL, process),
            ..Default::default()
        };
        self.task.exec(ctx(), &request).await.map(drop)
    }

    /// Exit status of a container or exec.
    pub async fn wait(&self, id: &str, exec: &str) -> u32 {
        let request = WaitRequest {
            id: id.into(),
            exec_id: exec.into(),
            ..Default::default()
        };
        let response = self.task.wait(ctx(), &request).await.unwrap();
        assert!(response.exited_at.seconds > 0);
        response.exit_status
    }

    /// Deletes a container or exec.
    pub async fn delete(&self, id: &str, exec: &str) -> ttrpc::Result<u32> {
        let request = DeleteRequest {
            id: id.into(),
            exec_id: exec.into(),
            ..Default::default()
        };
        Ok(self.task.delete(ctx(), &request).await?.exit_status)
    }

    /// The next event, which has to have this topic.
    pub async fn event(&mut self, topic: &str) -> Any {
        let event = soon(topic, self.events.recv()).await.unwrap();
        assert_eq!(event.topic, topic);
        event.event.unwrap_or_default()
    }
}

/// An OCI process.
pub fn process(args: &[&str]) -> Value {
    let caps = ["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID"];
    json!({
        "user": {"uid": 0, "gid": 0},
        "args": args,
        "env": ["PATH=/bin", "TERM=xterm"],
        "cwd": "/",
        "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
        "noNewPrivileges": true,
    })
}

fn any(type_url: &str, value: &Value) -> MessageField<Any> {
    let value = serde_json::to_vec(value).unwrap();
    MessageField::some(Any {
        type_url: type_url.into(),
        value,
        ..Default::default()
    })
}

async fn accept(listener: UnixListener, waiting: Waiting) {
    while let Ok((stream, _)) = listener.accept().await {
        hand_over(Box::pin(stream), &waiting).await;
    }
}

/// Reads the header of a stream and gives it to who asked for it.
async fn hand_over(mut stream: Stream, waiting: &Waiting) {
    let mut header = [0; HEADER_LEN];
    stream.read_exact(&mut header).await.unwrap();
    let id = StreamId::from_header(&header).expect("a header of 32 hex digits and a newline");
    let sender = waiting
        .lock()
        .unwrap()
        .remove(&id)
        .expect("a stream that was asked for, once");
    // The test may not care for it.
    let _ = sender.send(stream);
}

/// The status code of a failed request.
pub fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (ttrpc::Code, String) {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message().to_owned()),
        other => panic!("a status was expected, not {other:?}"),
    }
}

/// Writes all and ends the input.
pub async fn feed(mut stream: Stream, bytes: &[u8]) {
    stream.write_all(bytes).await.unwrap();
    stream.shutdown().await.unwrap();
    // Kept open by the agent until it has read all; nothing comes back.
    let mut rest = [0; 1];
    let _ = stream.read(&mut rest).await;
}
