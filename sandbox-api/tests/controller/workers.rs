// SPDX-License-Identifier: Apache-2.0
//! Pods in workers: real processes of cloisterd, whose guests' kernel is no kernel.

use super::*;
use cloister_sandbox_api::daemon::http_client;
use cloister_sandbox_api::daemon::report;
use rustix::process::{Pid, Signal, kill_process};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);

fn of_worker(id: &str, sandboxer: &str) -> ControllerCreateRequest {
    ControllerCreateRequest {
        sandboxer: sandboxer.into(),
        ..creation(id, &config(NamespaceMode::Pod))
    }
}

async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let begin = std::time::Instant::now();
    while !is_so().await {
        assert!(begin.elapsed() < PATIENCE, "never came: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn wait(mut client: ControllerClient<Channel>, id: &str) -> u32 {
    let request = ControllerWaitRequest {
        sandbox_id: id.into(),
        ..Default::default()
    };
    client.wait(k8s(request)).await.unwrap().into_inner().exit_status
}

impl Bed {
    async fn get(&self, path: &str) -> String {
        let socket = admin::socket(&self.dir.join("state"));
        let answer = http_client::collect(&socket, path, 1 << 20, PATIENCE)
            .await
            .unwrap();
        String::from_utf8(answer.to_vec()).unwrap()
    }

    async fn workers(&self) -> Vec<report::Worker> {
        let about: report::Daemon = serde_json::from_str(&self.get("/daemon").await).unwrap();
        about.workers
    }

    /// The process that has a pod.
    async fn worker_of(&self, id: &str) -> u32 {
        let workers = self.workers().await;
        let found = workers
            .iter()
            .find(|worker| worker.pods.iter().any(|pod| pod == id));
        found.unwrap().pid
    }

    async fn kill(&self, pid: u32) {
        let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        kill_process(pid, Signal::KILL).unwrap();
    }

    pub(super) async fn without_workers(&self) {
        eventually("the end of the workers", async || self.workers().await.is_empty()).await;
        let left = std::fs::read_dir(self.dir.join("state/workers")).unwrap().count();
        assert_eq!(left, 0);
        assert_eq!(self.left(), [""; 0]);
    }

    async fn wait(&self, id: &str) -> u32 {
        wait(self.client.clone(), id).await
    }

    /// The record says that the pod was up, as far as a daemon is to know.
    fn pretend_ready(&self, id: &str) {
        let record = self.dir.join(format!("state/sandboxes/{id}/sandbox.json"));
        let text = std::fs::read_to_string(&record).unwrap();
        assert!(text.contains("\"created\","), "{text}");
        std::fs::write(&record, text.replace("\"created\",", "\"ready\",")).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_in_a_worker_from_create_to_shutdown() {
    let mut bed = bed("worker").await;
    bed.create(of_worker("a", "worker")).await.unwrap();
    bed.create(of_worker("own", "cloister")).await.unwrap();
    for id in ["a", "own"] {
        for sandboxer in ["worker", "cloister"] {
            let again = bed.create(of_worker(id, sandboxer)).await;
            assert_eq!(code(again).0, Code::AlreadyExists, "{id} {sandboxer}");
        }
    }
    assert_eq!(bed.workers().await.len(), 1);
    assert_ne!(bed.worker_of("a").await, std::process::id());
    let status = bed.status("a").await.unwrap();
    assert_eq!(status.state, "SANDBOX_NOTREADY");
    assert_eq!(status.pid, bed.worker_of("a").await);
    let elsewhere = in_namespace(
        ControllerStatusRequest {
            sandbox_id: "a".into(),
            ..Default::default()
        },
        "default",
    );
    assert_eq!(code(bed.client.status(elsewhere).await).0, Code::NotFound);

    // What operators see.
    let pods: Vec<report::Pod> = serde_json::from_str(&bed.get("/pods").await).unwrap();
    let ids: Vec<&str> = pods.iter().map(|pod| pod.id.as_str()).collect();
    assert_eq!(ids, ["a", "own"]);
    assert_ne!(pods[0].process, pods[1].process);
    let details: report::Details = serde_json::from_str(&bed.get("/pods/a").await).unwrap();
    assert_eq!(details.pod.process, Some(bed.worker_of("a").await));
    assert_eq!(bed.get("/pods/a/console").await, "");
    let created = "cloister_pods{sandboxer=\"worker\",state=\"created\"} 1\n";
    assert!(bed.get("/metrics").await.contains(created));
    eventually("the pod's event", async || {
        bed.get("/events")
            .await
            .lines()
            .any(|line| line.contains("\"a\""))
    })
    .await;

    bed.stop("a").await.unwrap();
    assert_eq!(bed.wait("a").await, 0);
    assert_eq!(code(bed.start("a").await).0, Code::FailedPrecondition);
    for id in ["a", "own"] {
        bed.shutdown(id).await.unwrap();
        assert_eq!(code(bed.status(id).await).0, Code::NotFound);
    }
    bed.without_workers().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_fails_in_a_worker_leaves_nothing_but_its_count() {
    let mut bed = bed("wfail").await;
    bed.create(of_worker("a", "worker")).await.unwrap();
    let (_, message) = code(bed.start("a").await);
    assert!(
        message.contains("sandbox a") && message.contains("virtual machine"),
        "{message}"
    );
    bed.without_workers().await;
    assert_eq!(code(bed.status("a").await).0, Code::NotFound);
    let text = bed.get("/metrics").await;
    let failed = "cloister_operation_seconds_count{operation=\"pod_start\",outcome=\"error\"} 1\n";
    assert!(text.contains(failed), "{text}");
    assert_eq!(
        text.matches("# TYPE cloister_operation_seconds histogram")
            .count(),
        1
    );
    // What cannot be had does not cost a worker.
    let host = ControllerCreateRequest {
        sandboxer: "worker".into(),
        ..creation("b", &config(NamespaceMode::Node))
    };
    assert_eq!(code(bed.create(host).await).0, Code::Unimplemented);
    assert_eq!(
        code(bed.create(of_worker("../b", "worker")).await).0,
        Code::InvalidArgument
    );
    bed.without_workers().await;
    bed.create(of_worker("a", "worker")).await.unwrap();
    bed.shutdown("a").await.unwrap();
    bed.without_workers().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_killed_takes_its_pods_and_no_others() {
    let mut bed = bed("wkill").await;
    for id in ["a", "b", "c"] {
        bed.create(of_worker(id, "workers")).await.unwrap();
    }
    let (first, second) = (bed.worker_of("a").await, bed.worker_of("c").await);
    assert_eq!(bed.worker_of("b").await, first);
    assert_ne!(first, second);
    bed.pretend_ready("a");
    let waited = tokio::spawn(wait(bed.client.clone(), "a"));
    tokio::time::sleep(Duration::from_millis(100)).await;
    bed.kill(first).await;
    assert_eq!(waited.await.unwrap(), 137);
    let status = bed.status("a").await.unwrap();
    assert_eq!(status.state, "SANDBOX_NOTREADY");
    assert!(
        status.info["cloister"].contains("killed by signal 9"),
        "{status:?}"
    );
    // Nobody was told that it could be had.
    assert_eq!(code(bed.status("b").await).0, Code::NotFound);
    assert_eq!(bed.status("c").await.unwrap().pid, second);
    let stopped = bed.get("/events").await;
    let stopped = stopped
        .lines()
        .find(|line| line.contains("\"stopped\""))
        .unwrap()
        .to_owned();
    assert!(stopped.contains("its worker was killed by signal 9"), "{stopped}");
    bed.stop("a").await.unwrap();
    for id in ["a", "c"] {
        bed.shutdown(id).await.unwrap();
    }
    bed.without_workers().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_outlive_their_daemon() {
    let dir = dir("wagain");
    let mut first = serve(dir.clone()).await;
    for (id, sandboxer) in [
        ("a", "worker"),
        ("b", "workers"),
        ("own", "cloister"),
        ("lost", "worker"),
    ] {
        first.create(of_worker(id, sandboxer)).await.unwrap();
    }
    let pids = [first.worker_of("a").await, first.worker_of("b").await];
    let lost = first.worker_of("lost").await;
    for id in ["lost", "own"] {
        first.pretend_ready(id);
    }
    first.server.abort();
    first.operators.abort();
    let record = std::fs::read(dir.join("state/sandboxes/lost/sandbox.json")).unwrap();
    let folder = dir.join("state/workers");
    let name = serde_json::from_slice::<serde_json::Value>(&record).unwrap()["worker"].clone();
    let its = folder.join(name.as_str().unwrap());
    // A worker that died while there was no daemon; the one before is in this process, and takes it for its own.
    first.kill(lost).await;
    eventually("the end of a worker", async || !its.exists()).await;
    std::fs::write(dir.join("state/sandboxes/lost/sandbox.json"), record).unwrap();

    let mut second = serve(dir.clone()).await;
    assert_eq!(second.workers().await.len(), 2);
    assert_eq!([second.worker_of("a").await, second.worker_of("b").await], pids);
    assert_eq!(second.status("a").await.unwrap().pid, pids[0]);
    assert_eq!(second.status("b").await.unwrap().pid, pids[1]);
    assert_eq!(second.wait("own").await, 137);
    assert_eq!(second.wait("lost").await, 137);
    let again = second.create(of_worker("a", "worker")).await;
    assert_eq!(code(again).0, Code::AlreadyExists);
    // What happened before is known.
    eventually("events of the time before", async || {
        second
            .get("/events")
            .await
            .lines()
            .filter(|line| line.contains("\"created\""))
            .count()
            == 2
    })
    .await;
    // The second place in the worker that has one.
    second.create(of_worker("c", "workers")).await.unwrap();
    assert_eq!(second.worker_of("c").await, pids[1]);
    for id in ["a", "b", "c", "own", "lost"] {
        second.shutdown(id).await.unwrap();
    }
    second.without_workers().await;
    std::mem::forget(first);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_of_another_version_keeps_its_pods_and_gets_no_more() {
    let dir = dir("wother");
    let mut first = serve(dir.clone()).await;
    first.create(of_worker("a", "workers")).await.unwrap();
    let pid = first.worker_of("a").await;
    first.server.abort();
    first.operators.abort();
    let entry = std::fs::read_dir(dir.join("state/workers"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    let about = entry.path().join("worker.json");
    let text = std::fs::read_to_string(&about).unwrap();
    std::fs::write(&about, text.replace("\"protocol\": 1", "\"protocol\": 99")).unwrap();
    let mut second = serve(dir.clone()).await;
    assert_eq!(second.status("a").await.unwrap().pid, pid);
    second.create(of_worker("b", "workers")).await.unwrap();
    assert_ne!(second.worker_of("b").await, pid);
    for id in ["a", "b"] {
        second.shutdown(id).await.unwrap();
    }
    second.without_workers().await;
    std::mem::forget(first);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_at_once() {
    let bed = bed("wmany").await;
    let life = async |id: String, sandboxer: &str| {
        let mut client = bed.client.clone();
        client.create(k8s(of_worker(&id, sandboxer))).await.unwrap();
        let request = ControllerShutdownRequest {
            sandbox_id: id,
            ..Default::default()
        };
        client.shutdown(k8s(request)).await.unwrap();
    };
    // Places of workers that have just had their last pod are asked for as well.
    let lives = (0..12).map(async |number| {
        for turn in 0..4 {
            let sandboxer = if number % 3 == 0 { "worker" } else { "workers" };
            life(format!("pod-{number}-{turn}"), sandboxer).await;
        }
    });
    futures_util::future::join_all(lives).await;
    bed.without_workers().await;
}

#[test]
fn nobody_starts_a_worker_by_hand() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_cloisterd"))
        .args(["worker", "/tmp"])
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("started by cloisterd alone"), "{said}");
}
