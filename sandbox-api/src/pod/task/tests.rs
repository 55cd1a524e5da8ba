// SPDX-License-Identifier: Apache-2.0
//! The host half against an agent that is made of channels.

use super::*;
use crate::pod::streams::{Input, Output};
use cloister_protocol::RESOURCES_TYPE_URL;
use cloister_protocol::pod::{
    BlockRequest, BlockResponse, OnlineRequest, OnlineResponse, PingRequest, PingResponse, Pod, create_pod,
};
use cloister_protocol::protobuf::well_known_types::any::Any;
use cloister_protocol::stream::StreamId;
use cloister_protocol::ttrpc::asynchronous::transport::Listener;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicBool;
use tokio::sync::mpsc;

/// Plays the VM: connections to the agent, the shared directory.
pub(super) struct FakeGuest {
    dial: mpsc::Sender<UnixStream>,
    pub(super) attached: Mutex<HashMap<String, bool>>,
    given_up: Mutex<Option<String>>,
    vcpus: Mutex<u8>,
    pluggable: u64,
    plugged: Mutex<u64>,
    /// Whether they are read-only, by slot.
    disks: Mutex<HashMap<u32, bool>>,
}

impl Guest for FakeGuest {
    fn connect(&self, port: u32) -> std::io::Result<UnixStream> {
        assert_eq!(port, cloister_protocol::AGENT_PORT);
        let (ours, theirs) = UnixStream::pair()?;
        self.dial.try_send(theirs).map_err(std::io::Error::other)?;
        Ok(ours)
    }
    fn attach(&self, name: &str, _: OwnedFd, options: ShareOptions) -> std::io::Result<()> {
        lock(&self.attached).insert(name.to_owned(), options.read_only);
        Ok(())
    }
    fn detach(&self, name: &str) -> std::io::Result<()> {
        lock(&self.attached)
            .remove(name)
            .map(|_| ())
            .ok_or_else(|| std::io::ErrorKind::NotFound.into())
    }
    fn give_up(&self, why: String) {
        lock(&self.given_up).get_or_insert(why);
    }
    fn memory_used(&self) -> Option<u64> {
        Some(26 << 20)
    }
    fn provide_vcpus(&self, count: u8) -> std::io::Result<u8> {
        let mut vcpus = lock(&self.vcpus);
        *vcpus = count.max(*vcpus);
        Ok(*vcpus)
    }
    fn request_memory(&self, bytes: u64) -> u64 {
        let bytes = bytes.min(self.pluggable);
        *lock(&self.plugged) = bytes;
        bytes
    }
    fn wait_memory(&self, _: Duration) -> u64 {
        *lock(&self.plugged)
    }
    fn attach_disk(&self, _: OwnedFd, read_only: bool) -> std::io::Result<u32> {
        let mut disks = lock(&self.disks);
        let slot = (5..7).find(|slot| !disks.contains_key(slot));
        let slot = slot.ok_or_else(|| std::io::Error::other("no slot"))?;
        disks.insert(slot, read_only);
        Ok(slot)
    }
    fn detach_disk(&self, slot: u32) -> std::io::Result<()> {
        let taken = lock(&self.disks).remove(&slot);
        taken
            .map(|_| ())
            .ok_or_else(|| std::io::ErrorKind::NotFound.into())
    }
}

/// Plays the agent: notes what it is asked, and ends processes when told.
#[derive(Default)]
pub(super) struct FakeAgent {
    pub(super) created: Mutex<Vec<api::CreateTaskRequest>>,
    execs: Mutex<Vec<api::ExecProcessRequest>>,
    exit: watch::Sender<Option<u32>>,
    /// Answers nothing but Wait any more; not even a ping if so.
    silent: AtomicBool,
    deaf: AtomicBool,
    updated: Mutex<Vec<api::UpdateTaskRequest>>,
    /// What the Pod service was asked for, in words.
    asked: Mutex<Vec<String>>,
}

impl FakeAgent {
    async fn unless(&self, silent: &AtomicBool) {
        while silent.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

struct FakePod(Arc<FakeAgent>);

#[async_trait]
impl Pod for FakePod {
    async fn ping(&self, _: &TtrpcContext, request: PingRequest) -> Result<PingResponse> {
        self.0.unless(&self.0.deaf).await;
        Ok(PingResponse {
            payload: request.payload,
            ..Default::default()
        })
    }
    async fn online(&self, _: &TtrpcContext, request: OnlineRequest) -> Result<OnlineResponse> {
        lock(&self.0.asked).push(format!("online {}", request.cpus));
        Ok(OnlineResponse {
            cpus: request.cpus,
            ..Default::default()
        })
    }
    async fn attach_block(&self, _: &TtrpcContext, request: BlockRequest) -> Result<BlockResponse> {
        lock(&self.0.asked).push(format!("attach {}", request.slot));
        Ok(BlockResponse {
            major: 254,
            minor: request.slot * 16,
            ..Default::default()
        })
    }
    async fn detach_block(&self, _: &TtrpcContext, request: BlockRequest) -> Result<BlockResponse> {
        lock(&self.0.asked).push(format!("detach {}", request.slot));
        Err(status(Code::UNKNOWN, "it is in use"))
    }
}

struct FakeServed(Arc<FakeAgent>);

#[async_trait]
impl api::Task for FakeServed {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> Result<api::CreateTaskResponse> {
        if request.id == "refused" {
            return Err(status(Code::UNKNOWN, "OCI runtime create failed: no"));
        }
        let pid = match request.id.as_str() {
            "like-us" => std::process::id(),
            _ => 42,
        };
        lock(&self.0.created).push(request);
        Ok(api::CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }
    async fn exec(&self, _: &TtrpcContext, request: api::ExecProcessRequest) -> Result<Empty> {
        lock(&self.0.execs).push(request);
        Ok(Empty::new())
    }
    async fn update(&self, _: &TtrpcContext, request: api::UpdateTaskRequest) -> Result<Empty> {
        lock(&self.0.asked).push("update".into());
        if request.annotations.contains_key("refuse") {
            return Err(status(Code::UNKNOWN, "no"));
        }
        lock(&self.0.updated).push(request);
        Ok(Empty::new())
    }
    async fn start(&self, _: &TtrpcContext, _: api::StartRequest) -> Result<api::StartResponse> {
        Ok(api::StartResponse {
            pid: 42,
            ..Default::default()
        })
    }
    async fn state(&self, _: &TtrpcContext, request: api::StateRequest) -> Result<api::StateResponse> {
        self.0.unless(&self.0.silent).await;
        let status = EnumOrUnknown::new(api::Status::RUNNING);
        Ok(api::StateResponse {
            id: request.id,
            bundle: "guest's".into(),
            pid: 42,
            status,
            ..Default::default()
        })
    }
    async fn wait(&self, _: &TtrpcContext, _: api::WaitRequest) -> Result<api::WaitResponse> {
        let mut exit = self.0.exit.subscribe();
        let status = exit.wait_for(Option::is_some).await.unwrap().unwrap();
        Ok(api::WaitResponse {
            exit_status: status,
            // The guest's clock is wrong.
            exited_at: MessageField::some(Timestamp::default()),
            ..Default::default()
        })
    }
    async fn delete(&self, _: &TtrpcContext, _: api::DeleteRequest) -> Result<api::DeleteResponse> {
        Ok(api::DeleteResponse {
            exit_status: 3,
            exited_at: MessageField::some(Timestamp::default()),
            ..Default::default()
        })
    }
    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> Result<Empty> {
        self.0.exit.send_replace(Some(128 + request.signal));
        Ok(Empty::new())
    }
}

pub(super) struct Bed {
    pub(super) service: Arc<TaskService>,
    pub(super) agent: Arc<FakeAgent>,
    pub(super) guest: Arc<FakeGuest>,
    hub: Arc<Hub>,
    die: watch::Sender<Option<String>>,
    server: ttrpc::asynchronous::Server,
}

pub(super) async fn bed() -> Bed {
    patient_bed(crate::pod::vigil::PATIENCE).await
}

async fn patient_bed(patience: Duration) -> Bed {
    let (dial, dialled) = mpsc::channel(8);
    let guest = Arc::new(FakeGuest {
        dial,
        attached: Mutex::default(),
        given_up: Mutex::default(),
        vcpus: Mutex::new(1),
        pluggable: 1 << 30,
        plugged: Mutex::default(),
        disks: Mutex::default(),
    });
    let agent = Arc::new(FakeAgent::default());
    let connections =
        futures_util::stream::unfold(dialled, |mut dialled: mpsc::Receiver<UnixStream>| async move {
            let stream = dialled.recv().await?;
            stream.set_nonblocking(true).unwrap();
            Some((tokio::net::UnixStream::from_std(stream), dialled))
        });
    let mut server = ttrpc::asynchronous::Server::new()
        .add_listener(Listener::new(connections))
        .register_service(cloister_protocol::create_task(Arc::new(FakeServed(Arc::clone(
            &agent,
        )))))
        .register_service(create_pod(Arc::new(FakePod(Arc::clone(&agent)))));
    server.start().await.unwrap();
    let hub = Hub::new();
    let (die, dead) = watch::channel(None);
    let client = Agent::over(guest.connect(cloister_protocol::AGENT_PORT).unwrap()).unwrap();
    let as_guest: Arc<dyn Guest> = Arc::<FakeGuest>::clone(&guest);
    let service = TaskService::new(as_guest, client, Arc::clone(&hub), Arc::default(), dead, patience);
    Bed {
        service,
        agent,
        guest,
        hub,
        die,
        server,
    }
}

fn spec() -> Spec {
    serde_json::from_str(
        r#"{"ociVersion":"1.2.0","root":{"path":"rootfs","readonly":true},"process":{"user":{"uid":0,"gid":0},"cwd":"/work/dir","args":["a"]},
        "mounts":[{"destination":"/mnt/file","type":"bind","source":"/etc/passwd","options":["bind","ro"]},
                  {"destination":"/mnt/null","type":"bind","source":"/dev/null","options":["bind"]}],"linux":{}}"#,
    )
    .unwrap()
}

pub(super) struct Root(pub(super) PathBuf);
impl Root {
    pub(super) fn new() -> Self {
        let path = std::env::temp_dir().join(format!("cloister-root-{}", crate::ids::random_hex(6)));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }
    fn open(&self) -> OwnedFd {
        std::fs::File::open(&self.0).unwrap().into()
    }
}
impl Drop for Root {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

fn new(id: &str, root: &Root, stdout: Output) -> New {
    let stdio = Stdio {
        stdin: Input::Null,
        stdout,
        stderr: Output::Null,
        names: Default::default(),
    };
    New {
        id: id.into(),
        bundle: "/b".into(),
        spec: spec(),
        root: root.open(),
        stdio,
        terminal: false,
    }
}

#[tokio::test]
async fn life_of_a_container() {
    let bed = bed().await;
    let root = Root::new();
    let log_path = root.0.join("log");
    let log = Arc::new(Mutex::new(crate::pod::log::Writer::open(&log_path).unwrap()));
    let output = Output::Logged {
        clients: Default::default(),
        log,
        stream: "stdout",
        copy: None,
    };
    assert_eq!(
        bed.service
            .create_container(new("c1", &root, output), &mut Untimed)
            .await
            .unwrap(),
        42
    );
    // Mount points and working directory were made, and the root is attached read-only.
    assert!(root.0.join("work/dir").is_dir());
    assert!(root.0.join("mnt/file").is_file() && root.0.join("mnt/null").is_file());
    assert_eq!(
        *lock(&bed.guest.attached),
        HashMap::from([("rootfs-c1".to_owned(), true), ("vol-0-c1".to_owned(), true)])
    );
    assert!(bed.service.members.has("c1", "") && !bed.service.members.has("c2", ""));
    let created = lock(&bed.agent.created)[0].clone();
    assert_eq!(created.rootfs[0].source, "/run/cloister/shared/rootfs-c1");
    assert_eq!((created.stdin.as_str(), created.stderr.as_str()), ("", ""));
    let sent: Spec = serde_json::from_slice(&created.options.value).unwrap();
    assert_eq!(sent.mounts().as_ref().unwrap().len(), 6);
    let again = bed
        .service
        .create_container(new("c1", &root, Output::Null), &mut Untimed)
        .await
        .unwrap_err();
    assert!(again.to_string().contains("already exists"), "{again}");

    let served = Served(Arc::clone(&bed.service));
    let context = TtrpcContext {
        mh: Default::default(),
        metadata: HashMap::new(),
        timeout_nano: 0,
        connection_data: Default::default(),
    };
    let state = api::StateRequest {
        id: "c1".into(),
        ..Default::default()
    };
    assert_eq!(
        api::Task::state(&served, &context, state.clone())
            .await
            .unwrap()
            .bundle,
        "/b"
    );

    // The process ends while its output is on its way: Wait answers after the last byte.
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs
        .write_all(&StreamId::from_name(&created.stdout).unwrap().header())
        .unwrap();
    bed.hub.accepted(ours);
    let service = Arc::clone(&bed.service);
    let waiter = tokio::spawn(async move { service.wait_process("c1", "").await });
    bed.service.kill_process("c1", "", 15, false).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!waiter.is_finished());
    theirs.write_all(b"last words").unwrap();
    drop(theirs);
    let exit = waiter.await.unwrap().unwrap();
    assert_eq!(exit.status, 143);
    // By the host's clock, here and below.
    assert!(timestamp().seconds - exit.at.seconds < 60, "{}", exit.at);
    assert!(std::fs::read_to_string(&log_path).unwrap().contains("last words"));

    let delete = api::DeleteRequest {
        id: "c1".into(),
        ..Default::default()
    };
    let deleted = api::Task::delete(&served, &context, delete).await.unwrap();
    assert_eq!(
        (deleted.exit_status, deleted.exited_at),
        (3, MessageField::some(exit.at))
    );
    assert!(lock(&bed.guest.attached).is_empty());
    assert!(api::Task::state(&served, &context, state).await.is_err());
}

#[tokio::test]
async fn a_refused_container_leaves_nothing() {
    let bed = bed().await;
    let root = Root::new();
    let error = bed
        .service
        .create_container(new("refused", &root, Output::Null), &mut Untimed)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("OCI runtime create failed"), "{error}");
    assert!(lock(&bed.guest.attached).is_empty());
    assert!(lock(&bed.service.containers).is_empty());
    for id in ["", "../x", "a/b", "-a", &"x".repeat(200)] {
        assert!(
            bed.service
                .create_container(new(id, &root, Output::Null), &mut Untimed)
                .await
                .is_err(),
            "{id}"
        );
    }
}

/// Whether other work of the runtime goes on while `work` waits for the host's files.
async fn others_go_on(bed: &Bed, work: impl Future<Output = ()> + Send + 'static) -> bool {
    let (held, is_held) = std::sync::mpsc::channel();
    let (go_on, may_go_on) = std::sync::mpsc::channel();
    let guest = Arc::clone(&bed.guest);
    let holder = std::thread::spawn(move || {
        let _attached = lock(&guest.attached);
        held.send(()).unwrap();
        may_go_on.recv_timeout(Duration::from_secs(5)).is_ok()
    });
    is_held.recv().unwrap();
    let work = tokio::spawn(work);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let waits = !work.is_finished();
    // Nobody listens any more if the runtime stood still.
    let _ = go_on.send(());
    work.await.unwrap();
    waits && holder.join().unwrap()
}

#[tokio::test]
async fn files_of_the_host_that_hang_hold_up_nobody_else() {
    let bed = bed().await;
    let root = Root::new();
    let (service, container) = (Arc::clone(&bed.service), new("c1", &root, Output::Null));
    let create = async move {
        service.create_container(container, &mut Untimed).await.unwrap();
    };
    assert!(others_go_on(&bed, create).await);
    let service = Arc::clone(&bed.service);
    let delete = async move {
        let request = api::DeleteRequest {
            id: "c1".into(),
            ..Default::default()
        };
        service.delete_container(request).await.unwrap();
    };
    assert!(others_go_on(&bed, delete).await);
    assert!(lock(&bed.guest.attached).is_empty());
}

/// The PID namespace that the guest is told for the second of two containers; for both, containerd names our process, or for
/// the first none at all.
async fn pid_namespace_of_second(shares: bool) -> String {
    let bed = bed().await;
    let root = Root::new();
    let own = serde_json::json!([{"type": "pid"}]);
    let named = serde_json::json!([{"type": "pid", "path": format!("/proc/{}/ns/pid", std::process::id())}]);
    for (id, namespaces) in [
        ("like-us", if shares { &named } else { &own }),
        ("second", &named),
    ] {
        let mut new = new(id, &root, Output::Null);
        let mut linux = new.spec.linux().clone().unwrap();
        linux.set_namespaces(Some(serde_json::from_value(namespaces.clone()).unwrap()));
        new.spec.set_linux(Some(linux));
        bed.service.create_container(new, &mut Untimed).await.unwrap();
    }
    let sent: serde_json::Value = serde_json::from_slice(&lock(&bed.agent.created)[1].options.value).unwrap();
    sent["linux"]["namespaces"][0]["path"]
        .as_str()
        .unwrap()
        .to_owned()
}

#[tokio::test]
async fn a_target_whose_process_has_our_number_is_not_the_pod() {
    let own = format!("/proc/{}/ns/pid", std::process::id());
    assert_eq!(pid_namespace_of_second(false).await, own);
    assert_eq!(
        pid_namespace_of_second(true).await,
        cloister_protocol::SHARED_PID_NS
    );
}

#[tokio::test]
async fn answers_after_the_vm_died() {
    let bed = bed().await;
    let root = Root::new();
    bed.service
        .create_container(new("c1", &root, Output::Null), &mut Untimed)
        .await
        .unwrap();
    let exec = api::ExecProcessRequest {
        id: "c1".into(),
        exec_id: "e1".into(),
        ..Default::default()
    };
    bed.service.exec_process(exec.clone()).await.unwrap();
    assert!(bed.service.exec_process(exec).await.is_err());
    assert!(bed.service.members.has("c1", "e1") && !bed.service.members.has("c1", "e2"));
    bed.die.send_replace(Some("triple fault".into()));
    for exec in ["", "e1"] {
        assert_eq!(
            bed.service.wait_process("c1", exec).await.unwrap().status,
            EXIT_KILLED
        );
    }
    let gone = bed.service.kill_process("c1", "", 9, true).await.unwrap_err();
    assert!(gone.to_string().contains("already finished"), "{gone}");
    let served = Served(Arc::clone(&bed.service));
    let context = TtrpcContext {
        mh: Default::default(),
        metadata: HashMap::new(),
        timeout_nano: 0,
        connection_data: Default::default(),
    };
    let state = api::Task::state(
        &served,
        &context,
        api::StateRequest {
            id: "c1".into(),
            ..Default::default()
        },
    );
    assert_eq!(state.await.unwrap().status.enum_value(), Ok(api::Status::STOPPED));
    for exec in ["e1", ""] {
        let delete = api::DeleteRequest {
            id: "c1".into(),
            exec_id: exec.into(),
            ..Default::default()
        };
        assert_eq!(
            api::Task::delete(&served, &context, delete)
                .await
                .unwrap()
                .exit_status,
            EXIT_KILLED
        );
    }
    assert!(lock(&bed.guest.attached).is_empty());
}

#[test]
fn mount_points_stay_in_the_root() {
    let root = Root::new();
    std::os::unix::fs::symlink("/", root.0.join("up")).unwrap();
    std::os::unix::fs::symlink("../../../../..", root.0.join("far")).unwrap();
    let name = format!("cloister-escape-{}", crate::ids::random_hex(6));
    for path in [
        format!("/up/{name}"),
        format!("/far/{name}/x"),
        format!("/../{name}"),
    ] {
        let _ = make_in(root.open().as_fd(), Path::new(&path), true);
    }
    assert!(root.0.join(&name).is_dir());
    assert!(!Path::new("/").join(&name).exists());
}

/// Who runs, and how those who ran ended.
#[derive(Clone, Default)]
struct Followed {
    running: Arc<Mutex<Vec<String>>>,
    ended: Arc<Mutex<Vec<(String, u32)>>>,
}

struct One(Followed, String);

impl Running for One {
    fn ended(self: Box<Self>, exit: &Exit) {
        lock(&self.0.running).retain(|name| *name != self.1);
        lock(&self.0.ended).push((self.1, exit.status));
    }
}

#[tokio::test]
async fn processes_are_followed_while_they_run() {
    let bed = bed().await;
    let root = Root::new();
    let followed = Followed::default();
    let of_service = followed.clone();
    bed.service.follow_processes(move |container, exec| {
        let name = format!("{container}/{exec}");
        lock(&of_service.running).push(name.clone());
        Box::new(One(of_service.clone(), name))
    });
    let running = || lock(&followed.running).clone();
    bed.service
        .create_container(new("c1", &root, Output::Null), &mut Untimed)
        .await
        .unwrap();
    assert_eq!(running(), [""; 0]);
    let listed = bed.service.list();
    assert_eq!((listed[0].id.as_str(), listed[0].started), ("c1", None));
    bed.service.start_process("c1", "").await.unwrap();
    assert_eq!(running(), ["c1/"]);
    let exec = api::ExecProcessRequest {
        id: "c1".into(),
        exec_id: "e1".into(),
        ..Default::default()
    };
    bed.service.exec_process(exec).await.unwrap();
    bed.service.start_process("c1", "e1").await.unwrap();
    assert_eq!(running(), ["c1/", "c1/e1"]);
    let listed = bed.service.list();
    assert_eq!((listed.len(), listed[0].execs, &listed[0].exit), (1, 1, &None));
    assert!(listed[0].started.is_some());
    bed.service.kill_process("c1", "", 9, false).await.unwrap();
    for exec in ["", "e1"] {
        bed.service.wait_process("c1", exec).await.unwrap();
    }
    assert_eq!(running(), [""; 0]);
    let mut ended = lock(&followed.ended).clone();
    ended.sort();
    assert_eq!(ended, [("c1/".to_owned(), 137), ("c1/e1".to_owned(), 137)]);
    assert_eq!(bed.service.list()[0].exit.as_ref().unwrap().status, 137);
    // The answer to a start can come after the end.
    bed.service.start_process("c1", "").await.unwrap();
    assert_eq!(running(), [""; 0]);
}

fn state_request(id: &str) -> api::StateRequest {
    api::StateRequest {
        id: id.into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_slow_agent_that_answers_a_ping_keeps_its_vm() {
    let bed = patient_bed(Duration::from_millis(30)).await;
    let root = Root::new();
    bed.service
        .create_container(new("a", &root, Output::Null), &mut Untimed)
        .await
        .unwrap();
    bed.agent.silent.store(true, Ordering::Relaxed);
    let served = Served(Arc::clone(&bed.service));
    let context = TtrpcContext::default();
    let (answer, ()) = tokio::join!(api::Task::state(&served, &context, state_request("a")), async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        bed.agent.silent.store(false, Ordering::Relaxed);
    });
    assert_eq!(answer.unwrap().pid, 42);
    assert_eq!(*lock(&bed.guest.given_up), None);
}

#[tokio::test]
async fn an_agent_that_does_not_answer_loses_its_vm() {
    let bed = patient_bed(Duration::from_millis(30)).await;
    let root = Root::new();
    bed.service
        .create_container(new("a", &root, Output::Null), &mut Untimed)
        .await
        .unwrap();
    bed.agent.silent.store(true, Ordering::Relaxed);
    bed.agent.deaf.store(true, Ordering::Relaxed);
    let served = Served(Arc::clone(&bed.service));
    let answer = api::Task::state(&served, &TtrpcContext::default(), state_request("a")).await;
    let text = answer.unwrap_err().to_string();
    assert!(text.contains("does not respond"), "{text}");
    let why = lock(&bed.guest.given_up).clone().unwrap();
    assert!(why.contains("ping"), "{why}");
}

#[tokio::test]
async fn who_looks_as_if_it_hung_and_gives_no_sign_of_life_loses_its_vm() {
    let bed = patient_bed(Duration::from_millis(300)).await;
    bed.service.ask().await;
    assert_eq!(bed.service.answers(), 1);
    assert_eq!(*lock(&bed.guest.given_up), None);
    bed.agent.deaf.store(true, Ordering::Relaxed);
    bed.service.ask().await;
    assert_eq!(bed.service.answers(), 1);
    let why = lock(&bed.guest.given_up).clone().unwrap();
    assert!(why.contains("hangs"), "{why}");
}

#[tokio::test]
async fn a_broken_connection_to_the_agent_loses_its_vm() {
    let mut bed = bed().await;
    let root = Root::new();
    bed.service
        .create_container(new("a", &root, Output::Null), &mut Untimed)
        .await
        .unwrap();
    bed.server.disconnect().await;
    let exit = bed.service.wait_process("a", "").await.unwrap();
    assert_eq!(exit.status, EXIT_KILLED);
    let why = lock(&bed.guest.given_up).clone().unwrap();
    assert!(why.contains("broke"), "{why}");
}

#[tokio::test]
async fn containers_with_the_same_volume_have_it_once() {
    let bed = bed().await;
    let root = Root::new();
    let volume = Root::new();
    let mounts = |options: &[&str]| {
        let mount = serde_json::json!([{"destination": "/v", "type": "bind", "source": volume.0, "options": options}]);
        Some(serde_json::from_value(mount).unwrap())
    };
    for (id, options) in [("a", &["bind"][..]), ("b", &["bind"]), ("c", &["bind", "ro"])] {
        let mut new = new(id, &root, Output::Null);
        new.spec.set_mounts(mounts(options));
        bed.service.create_container(new, &mut Untimed).await.unwrap();
    }
    let sources: Vec<String> = lock(&bed.agent.created)
        .iter()
        .map(|request| {
            let spec: Spec = serde_json::from_slice(&request.options.value).unwrap();
            let mounts = spec.mounts().clone().unwrap();
            let mount = mounts
                .iter()
                .find(|mount| mount.destination() == Path::new("/v"))
                .unwrap();
            mount.source().as_ref().unwrap().display().to_string()
        })
        .collect();
    assert_eq!(sources[0], sources[1]);
    assert_ne!(sources[0], sources[2], "what is read-only is another thing");
    let name = sources[0].strip_prefix(SHARED_DIR).unwrap()[1..].to_owned();
    for (id, left) in [("a", true), ("c", true), ("b", false)] {
        let request = api::DeleteRequest {
            id: id.into(),
            ..Default::default()
        };
        bed.service.delete_container(request).await.unwrap();
        assert_eq!(lock(&bed.guest.attached).contains_key(&name), left, "{id}");
    }
}

const MIB: u64 = 1 << 20;

fn limited(id: &str, root: &Root, mib: i64, quota: i64) -> New {
    let mut new = new(id, root, Output::Null);
    let resources =
        serde_json::json!({"memory": {"limit": mib << 20}, "cpu": {"quota": quota, "period": 100_000}});
    let mut linux = new.spec.linux().clone().unwrap();
    linux.set_resources(Some(serde_json::from_value(resources).unwrap()));
    new.spec.set_linux(Some(linux));
    new
}

fn update(id: &str, json: &serde_json::Value) -> api::UpdateTaskRequest {
    api::UpdateTaskRequest {
        id: id.into(),
        resources: MessageField::some(Any {
            type_url: RESOURCES_TYPE_URL.into(),
            value: serde_json::to_vec(json).unwrap(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A bed whose VM has booted with a processor and 256 MiB, and can have four and 1 GiB more.
async fn resizable() -> Bed {
    let bed = bed().await;
    let booted = Size {
        cpus: 1,
        memory: 256 * MIB,
    };
    let sizing = Sizing {
        default: booted,
        most: Size {
            cpus: 8,
            memory: 2048 * MIB,
        },
        overhead: 64 * MIB,
    };
    bed.service.follow_limits(booted, 4, sizing);
    bed
}

impl Bed {
    /// vCPUs that were made, MiB that were plugged, and what the guest was asked since the last time.
    fn seen(&self) -> (u8, u64, Vec<String>) {
        let asked = std::mem::take(&mut *lock(&self.agent.asked));
        (*lock(&self.guest.vcpus), *lock(&self.guest.plugged) / MIB, asked)
    }
}

#[tokio::test]
async fn a_vm_follows_the_limits_of_its_containers() {
    let bed = resizable().await;
    let root = Root::new();
    let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
    // It has room for one that is small, and for one without limits.
    bed.service
        .create_container(limited("a", &root, 64, 50_000), &mut Untimed)
        .await
        .unwrap();
    assert_eq!(bed.seen(), (1, 0, words(&[])));
    bed.service
        .create_container(limited("b", &root, 256, 100_000), &mut Untimed)
        .await
        .unwrap();
    // 64 + 256 + 64 of overhead.
    assert_eq!(bed.seen(), (2, 128, words(&["online 2"])));
    // Larger: first the VM, then the cgroup.
    let json =
        serde_json::json!({"memory": {"limit": 512 * MIB}, "cpu": {"quota": 250_000, "period": 100_000}});
    bed.service.update_container(update("b", &json)).await.unwrap();
    assert_eq!(bed.seen(), (3, 384, words(&["online 3", "update"])));
    assert_eq!(lock(&bed.agent.updated).len(), 1);
    // Smaller: the other way round.
    let json = serde_json::json!({"memory": {"limit": 128 * MIB}, "cpu": {"quota": 150_000}});
    bed.service.update_container(update("b", &json)).await.unwrap();
    assert_eq!(bed.seen(), (3, 0, words(&["update", "online 2"])));
    // The guest refuses: as it was.
    let json = serde_json::json!({"memory": {"limit": 512 * MIB}, "cpu": {"quota": 400_000}});
    let mut refused = update("b", &json);
    refused.annotations.insert("refuse".into(), String::new());
    bed.service.update_container(refused).await.unwrap_err();
    // More processors than it can have are not asked for.
    assert_eq!(bed.seen(), (4, 0, words(&["online 4", "update", "online 2"])));
    // With the last one that needs it, what it needed goes.
    let delete = api::DeleteRequest {
        id: "b".into(),
        ..Default::default()
    };
    bed.service.delete_container(delete).await.unwrap();
    assert_eq!(bed.seen(), (4, 0, words(&["online 1"])));
    assert_eq!(bed.service.resizer().unwrap().size().await.memory, 256 * MIB);
}

#[tokio::test]
async fn an_update_names_nothing_of_the_hosts() {
    let bed = bed().await;
    let root = Root::new();
    bed.service
        .create_container(new("a", &root, Output::Null), &mut Untimed)
        .await
        .unwrap();
    let json = serde_json::json!({"cpu": {"shares": 512, "cpus": "62-63", "mems": "1"},
        "blockIO": {"throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1}]}});
    bed.service.update_container(update("a", &json)).await.unwrap();
    let sent = lock(&bed.agent.updated)[0].resources.value.clone();
    let sent: serde_json::Value = serde_json::from_slice(&sent).unwrap();
    let expected = serde_json::json!({"cpu": {"shares": 512}, "blockIO": {"throttleReadBpsDevice": []}});
    assert_eq!(sent, expected);
}

#[tokio::test]
async fn what_a_vm_cannot_become_is_refused_and_changes_nothing() {
    let bed = resizable().await;
    let root = Root::new();
    // It starts all the same, in what there is.
    bed.service
        .create_container(limited("huge", &root, 100_000, 900_000), &mut Untimed)
        .await
        .unwrap();
    bed.seen();
    let more = serde_json::json!({"memory": {"limit": 100_001 * MIB}});
    let error = bed
        .service
        .update_container(update("huge", &more))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("max_memory"), "{error}");
    // Something else about it can be changed.
    let other = serde_json::json!({"memory": {"limit": 100_000 * MIB}, "cpu": {"shares": 512}});
    bed.service
        .update_container(update("huge", &other))
        .await
        .unwrap();
    assert_eq!(lock(&bed.agent.updated).len(), 1);
    let less = serde_json::json!({"memory": {"limit": 512 * MIB}});
    bed.service.update_container(update("huge", &less)).await.unwrap();
    assert_eq!(bed.seen().1, 320);
    // More than can be plugged, though the sandboxer would allow it.
    let json = serde_json::json!({"memory": {"limit": 1500 * MIB}});
    let error = bed
        .service
        .update_container(update("huge", &json))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("not 1371537408"), "{error}");
    assert_eq!(bed.seen().1, 320, "what it had it keeps");
    for bad in ["", r#"{"memory":{"limit":"x"}}"#] {
        let mut request = update("huge", &json);
        request.resources.mut_or_insert_default().value = bad.into();
        let error = bed.service.update_container(request).await.unwrap_err();
        assert!(error.to_string().contains("the resources"), "{error}");
    }
    let error = bed
        .service
        .update_container(update("none", &json))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("not found"), "{error}");
}

#[tokio::test]
async fn a_pod_as_a_whole_is_resized() {
    let bed = resizable().await;
    let resizer = bed.service.resizer().unwrap();
    let size = |cpus, mib| Size {
        cpus,
        memory: mib * MIB,
    };
    let limits = |quota, mib: i64| Limits::new(quota, 100_000, mib << 20);
    resizer.change_pod(limits(200_000, 512), None).await.unwrap();
    assert_eq!(resizer.size().await, size(2, 576));
    // Its RuntimeClass has another overhead.
    resizer.change_pod(limits(200_000, 512), Some(MIB)).await.unwrap();
    assert_eq!(resizer.size().await, size(2, 514));
    resizer.change_pod(limits(900_000, 512), None).await.unwrap_err();
    assert_eq!(resizer.size().await, size(2, 514));
    resizer.change_pod(limits(10, 1), None).await.unwrap();
    assert_eq!(resizer.size().await, size(1, 256), "no less than it booted with");
}

#[tokio::test]
async fn a_disk_comes_with_its_first_container_and_goes_with_its_last() {
    let bed = bed().await;
    let guest: Arc<dyn Guest> = Arc::<FakeGuest>::clone(&bed.guest);
    let disks = Disks::new(guest, bed.service.agent.pod.clone(), |number, _| match number {
        (7, 9) => Err(std::io::ErrorKind::NotFound.into()),
        _ => Ok(std::fs::File::open("/dev/null")?.into()),
    });
    assert_eq!(disks.attach((7, 0), false).await.unwrap(), (254, 80));
    assert_eq!(disks.attach((7, 0), false).await.unwrap(), (254, 80));
    let error = disks.attach((7, 0), true).await.unwrap_err();
    assert!(error.to_string().contains("read-only"), "{error}");
    assert_eq!(disks.attach((7, 1), true).await.unwrap(), (254, 96));
    assert_eq!(*lock(&bed.guest.disks), HashMap::from([(5, true), (6, false)]));
    let error = disks.attach((7, 2), true).await.unwrap_err();
    assert!(crate::error::chain(&error).contains("no slot"), "{error}");
    let error = disks.attach((7, 9), true).await.unwrap_err();
    assert!(error.to_string().contains("7:9"), "{error}");
    disks.release((7, 0), true).await;
    assert_eq!(lock(&bed.guest.disks).len(), 2);
    // A guest that holds on to it loses it all the same.
    disks.release((7, 0), true).await;
    disks.release((7, 0), true).await;
    assert_eq!(*lock(&bed.guest.disks), HashMap::from([(6, false)]));
    // A VM that is dead is not asked.
    disks.release((7, 1), false).await;
    assert!(lock(&bed.guest.disks).is_empty());
    assert_eq!(bed.seen().2, ["attach 5", "attach 6", "detach 5"]);
}

#[tokio::test]
async fn a_device_that_the_host_does_not_have_is_named() {
    let bed = bed().await;
    let root = Root::new();
    let mut new = new("c1", &root, Output::Null);
    let linux = serde_json::json!({"devices": [{"path": "/dev/volume", "type": "b", "major": 5000, "minor": 1}],
        "resources": {"devices": [{"allow": true, "type": "b", "major": 5000, "minor": 1, "access": "rwm"}]}});
    new.spec.set_linux(Some(serde_json::from_value(linux).unwrap()));
    let error = bed.service.create_container(new, &mut Untimed).await.unwrap_err();
    assert!(error.to_string().contains("block device 5000:1"), "{error}");
    assert!(lock(&bed.service.containers).is_empty() && lock(&bed.agent.created).is_empty());
}

#[tokio::test]
async fn without_an_id_stats_are_the_vms() {
    let bed = bed().await;
    let served = Served(Arc::clone(&bed.service));
    let request = api::StatsRequest::default();
    let answer = api::Task::stats(&served, &TtrpcContext::default(), request)
        .await
        .unwrap();
    let metrics = api::Metrics::parse_from_bytes(&answer.stats.value).unwrap();
    assert_eq!(metrics.memory.usage, 26 << 20);
}

struct Recorder(Arc<Mutex<Vec<String>>>, String);
impl Timed for Recorder {
    fn next(&mut self, step: &'static str) {
        self.1 += &format!(" {step}");
    }
    fn done(self: Box<Self>, failure: Option<&str>) {
        let outcome = failure.map_or("ok", |_| "failed");
        lock(&self.0).push(format!("{} {outcome}", self.1));
    }
}

#[tokio::test]
async fn what_is_done_to_containers_is_timed_as_part_of_the_callers_trace() {
    let bed = bed().await;
    let timed = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&timed);
    bed.service.follow_steps(move |operation, id, parent| {
        let begin = format!("{} {operation} {id}:", parent.unwrap_or("-"));
        Box::new(Recorder(Arc::clone(&kept), begin))
    });
    let served = Served(Arc::clone(&bed.service));
    let bundle = Root::new();
    std::fs::create_dir(bundle.0.join("rootfs")).unwrap();
    let config = serde_json::to_vec(&spec()).unwrap();
    std::fs::write(bundle.0.join("config.json"), config).unwrap();
    let context = TtrpcContext {
        metadata: HashMap::from([("traceparent".to_owned(), vec!["trace".to_owned()])]),
        ..Default::default()
    };
    let mut request = api::CreateTaskRequest {
        id: "c1".into(),
        bundle: bundle.0.to_str().unwrap().into(),
        ..Default::default()
    };
    api::Task::create(&served, &context, request.clone())
        .await
        .unwrap();
    let start = api::StartRequest {
        id: "c1".into(),
        ..Default::default()
    };
    api::Task::start(&served, &TtrpcContext::default(), start)
        .await
        .unwrap();
    request.bundle = "/nowhere".into();
    request.id = "c2".into();
    api::Task::create(&served, &context, request).await.unwrap_err();
    let expected = [
        "trace container_create c1: root share guest ok",
        "- container_start c1: guest ok",
        "trace container_create c2: root failed",
    ];
    assert_eq!(*lock(&timed), expected);
}
