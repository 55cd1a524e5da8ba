// SPDX-License-Identifier: Apache-2.0
//! A VM with a kernel and the agent, and a root file system with busybox in its initramfs: spoken to over ttrpc, as the
//! daemon does.

use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::Arc;

use crate::agent::harness::Sink;
use cloister_boot::x86_64::Description;
use cloister_devices::vsock::{Vsock, VsockConfig, VsockHandle, VsockListener};
use cloister_protocol::events::{Envelope, create_events};
use cloister_protocol::pod::PodClient;
use cloister_protocol::protobuf::MessageField;
use cloister_protocol::protobuf::well_known_types::any::Any;
use cloister_protocol::task::{
    CreateTaskRequest, DeleteRequest, KillRequest, StartRequest, TaskClient, WaitRequest,
};
use cloister_protocol::ttrpc::asynchronous::transport::{Listener, Socket};
use cloister_protocol::ttrpc::asynchronous::{Client, Server};
use cloister_protocol::ttrpc::context::{Context, with_timeout};
use cloister_protocol::{AGENT_PORT, EVENTS_PORT, SPEC_TYPE_URL};
use cloister_tests::e2e::{PATIENCE, archive, guest_file};
use cloister_vmm::config::BASE_COMMAND_LINE;
use cloister_vmm::{Boot, Cell, CellConfig, CellHost, DeviceConfig, DeviceHandle, KernelBoot};
use futures_util::StreamExt as _;
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

/// The context of every request.
pub fn ctx() -> Context {
    with_timeout(i64::try_from(PATIENCE.as_nanos()).unwrap())
}

/// See the module.
pub struct Pod {
    pub cell: Cell,
    pub task: TaskClient,
    pub pod: PodClient,
    pub runtime: Runtime,
    events: mpsc::UnboundedReceiver<Envelope>,
    _server: Server,
    _vsock: (VsockHandle, VsockListener),
}

/// The agent's initramfs with a container's root file system, /pod, in it.
fn initrd() -> PathBuf {
    let busybox = fs::read("/bin/busybox").expect("busybox-static is missing: run ci/setup");
    let mut files: Vec<(&str, &[u8])> = vec![("pod/bin/busybox", &busybox)];
    // The folders above them are what is wanted.
    files.extend(["pod/dev/x", "pod/proc/x", "pod/sys/x", "pod/tmp/x"].map(|name| (name, &b""[..])));
    let mut image = fs::read(guest_file("initramfs.cpio")).unwrap();
    image.extend(archive(&files));
    let path = std::env::temp_dir().join(format!("e2e-resources-{}.cpio", std::process::id()));
    fs::write(&path, image).unwrap();
    path
}

impl Pod {
    /// Boots one and waits until its agent is ready.
    pub fn start(host: &CellHost, name: &str, adapt: impl FnOnce(&mut CellConfig)) -> Self {
        let (vsock, handle) = Vsock::new(VsockConfig::new(3)).unwrap();
        let initrd = initrd();
        let boot = KernelBoot {
            kernel: File::open(guest_file("vmlinux")).unwrap(),
            initrd: Some(File::open(&initrd).unwrap()),
            command_line: format!("console=ttyS0 {BASE_COMMAND_LINE} psi=1"),
            description: Description::MpTable,
        };
        fs::remove_file(initrd).unwrap();
        let mut config = CellConfig::new(name, Boot::Kernel(boot));
        let device = Box::new(vsock);
        config.devices.push(DeviceConfig::Custom {
            name: "vsock".into(),
            device,
        });
        adapt(&mut config);
        let cell = Cell::create(config, host).unwrap();
        let listener = handle.listen(EVENTS_PORT).unwrap();
        cell.start().unwrap();
        let accepted = listener.accept();
        let (stream, _) = accepted.unwrap_or_else(|error| {
            panic!(
                "{error}: {}",
                String::from_utf8_lossy(&cell.console_tail().bytes())
            )
        });
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let (sender, mut events) = mpsc::unbounded_channel();
        let socket = |stream: std::os::unix::net::UnixStream| {
            stream.set_nonblocking(true)?;
            UnixStream::from_std(stream)
        };
        let (server, client) = runtime.block_on(async {
            let first = futures_util::stream::iter([socket(stream)]);
            let mut server = Server::new()
                .add_listener(Listener::new(first.chain(futures_util::stream::pending())))
                .register_service(create_events(Arc::new(Sink(sender))));
            server.start().await.unwrap();
            let ready = tokio::time::timeout(PATIENCE, events.recv())
                .await
                .unwrap()
                .unwrap();
            assert_eq!(ready.topic, cloister_protocol::READY_TOPIC);
            let agent = socket(handle.connect(AGENT_PORT).unwrap()).unwrap();
            (server, Client::new(Socket::new(agent)))
        });
        Self {
            cell,
            task: TaskClient::new(client.clone()),
            pod: PodClient::new(client),
            runtime,
            events,
            _server: server,
            _vsock: (handle, listener),
        }
    }

    /// The handle of the device that `found` takes.
    pub fn device<T>(&self, found: impl Fn(&DeviceHandle) -> Option<T>) -> T {
        self.cell.devices().iter().find_map(found).unwrap()
    }

    /// Waits for an answer.
    pub fn wait<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    /// The next event.
    pub fn event(&mut self) -> Envelope {
        let next = async { tokio::time::timeout(PATIENCE, self.events.recv()).await };
        self.runtime
            .block_on(next)
            .expect("no event")
            .expect("no events any more")
    }

    /// Creates and starts a container. Returns its pid.
    pub fn run(&self, id: &str, script: &str, change: impl FnOnce(&mut Value)) -> u32 {
        let mut spec = spec(id, script);
        change(&mut spec);
        let request = CreateTaskRequest {
            id: id.into(),
            options: MessageField::some(Any {
                type_url: SPEC_TYPE_URL.into(),
                value: serde_json::to_vec(&spec).unwrap(),
                ..Default::default()
            }),
            ..Default::default()
        };
        self.wait(self.task.create(ctx(), &request)).unwrap();
        let request = StartRequest {
            id: id.into(),
            ..Default::default()
        };
        self.wait(self.task.start(ctx(), &request)).unwrap().pid
    }

    /// Waits for a container's end; answers its exit status.
    pub fn exit(&self, id: &str) -> u32 {
        let request = WaitRequest {
            id: id.into(),
            ..Default::default()
        };
        self.wait(self.task.wait(ctx(), &request)).unwrap().exit_status
    }

    /// Deletes a container that has ended.
    pub fn delete(&self, id: &str) {
        let request = DeleteRequest {
            id: id.into(),
            ..Default::default()
        };
        self.wait(self.task.delete(ctx(), &request)).unwrap();
    }

    /// Kills and deletes a container.
    pub fn end(&self, id: &str) {
        let request = KillRequest {
            id: id.into(),
            signal: 9,
            all: true,
            ..Default::default()
        };
        self.wait(self.task.kill(ctx(), &request)).unwrap();
        self.exit(id);
        self.delete(id);
    }

    /// Runs a script in a container to its end, which has to be a good one.
    #[track_caller]
    pub fn check(&self, id: &str, script: &str, change: impl FnOnce(&mut Value)) {
        self.run(id, script, change);
        assert_eq!(self.exit(id), 0, "{script}");
        self.delete(id);
    }

    /// Stops the VM and waits until nothing is left of it.
    pub fn stop(self) {
        self.cell.stop();
        self.cell.wait(Some(PATIENCE)).expect("does not end");
        assert!(self.cell.wait_taken_down(Some(PATIENCE)));
    }
}

fn spec(id: &str, script: &str) -> Value {
    let capabilities = ["CAP_CHOWN", "CAP_KILL"];
    json!({
        "ociVersion": "1.1.0",
        "process": {
            "user": {"uid": 0, "gid": 0},
            // Applets by the shell's own means: there are no links in this root file system.
            "args": ["/bin/busybox", "sh", "-c", format!("b=/bin/busybox; {script}")],
            "env": ["PATH=/bin"],
            "cwd": "/",
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            "noNewPrivileges": true,
        },
        "root": {"path": "/pod"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
            {"destination": "/dev/shm", "type": "bind", "source": "/run/cloister/shm", "options": ["rbind"]},
        ],
        "linux": {
            "cgroupsPath": format!("/kubepods/pod/{id}"),
            "namespaces": [{"type": "pid"}, {"type": "mount"}],
            "resources": {},
        },
    })
}
