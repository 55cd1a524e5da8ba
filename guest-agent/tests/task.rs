// SPDX-License-Identifier: Apache-2.0
//! The Task service against containers with busybox, without a VM. See `harness`.
#![allow(clippy::unwrap_used)]

mod harness;

use cloister_protocol::SHARED_PID_NS;
use cloister_protocol::events::{TaskExit, TaskStart};
use cloister_protocol::pod::{InfoRequest, PingRequest};
use cloister_protocol::protobuf::Message;
use cloister_protocol::task::{
    CloseIORequest, KillRequest, Metrics, PauseRequest, PidsRequest, ResizePtyRequest, ResumeRequest,
    StateRequest, StatsRequest, Status,
};
use cloister_protocol::ttrpc::Code;
use harness::{Bed, code, ctx, feed, soon};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn state_request(id: &str, exec: &str) -> StateRequest {
    StateRequest {
        id: id.into(),
        exec_id: exec.into(),
        ..Default::default()
    }
}

fn kill_request(id: &str, exec: &str, signal: u32, all: bool) -> KillRequest {
    KillRequest {
        id: id.into(),
        exec_id: exec.into(),
        signal,
        all,
        ..Default::default()
    }
}

async fn status(bed: &Bed, id: &str, exec: &str) -> Status {
    bed.task
        .state(ctx(), &state_request(id, exec))
        .await
        .unwrap()
        .status
        .unwrap()
}

#[tokio::test]
async fn a_container_lives_and_dies_with_its_events() {
    let mut bed = Bed::new().await;
    let mut streams = bed.streams([false, true, true]);
    let request = bed.create_request(
        "c1",
        &bed.spec("c1", &["sh", "-c", "echo out; echo err >&2; exit 7"]),
        &streams,
        false,
    );
    let pid = bed.task.create(ctx(), &request).await.unwrap().pid;
    assert!(pid > 1);
    assert_eq!(status(&bed, "c1", "").await, Status::CREATED);
    assert_eq!(
        code(bed.task.create(ctx(), &request).await).0,
        Code::ALREADY_EXISTS
    );
    assert_eq!(bed.start("c1", "").await.unwrap(), pid);
    assert_eq!(bed.wait("c1", "").await, 7);
    assert_eq!(status(&bed, "c1", "").await, Status::STOPPED);
    assert_eq!(streams.read_text(1).await, "out\n");
    assert_eq!(streams.read_text(2).await, "err\n");
    let (kind, text) = code(bed.task.kill(ctx(), &kill_request("c1", "", 15, false)).await);
    assert_eq!(
        (kind, text.as_str()),
        (Code::NOT_FOUND, "process already finished: not found")
    );
    assert_eq!(bed.delete("c1", "").await.unwrap(), 7);
    assert_eq!(code(bed.delete("c1", "").await).0, Code::NOT_FOUND);

    bed.event("/tasks/create").await;
    let start = TaskStart::parse_from_bytes(&bed.event("/tasks/start").await.value).unwrap();
    assert_eq!(start.pid, pid);
    let exit = TaskExit::parse_from_bytes(&bed.event("/tasks/exit").await.value).unwrap();
    assert_eq!((exit.id.as_str(), exit.pid, exit.exit_status), ("c1", pid, 7));
    bed.event("/tasks/delete").await;
    let left: Vec<_> = ["bundles", "containers", "console"]
        .iter()
        .flat_map(|d| {
            std::fs::read_dir(bed.dir.path().join("run").join(d))
                .into_iter()
                .flatten()
                .flatten()
        })
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn fifty_megabytes_arrive_whole() {
    let mut bed = Bed::new().await;
    let mut streams = bed.streams([false, true, true]);
    let script = "head -c 52428800 /dev/urandom > /tmp/f; sha256sum /tmp/f >&2; cat /tmp/f";
    let spec = bed.spec("flood", &["sh", "-c", script]);
    bed.task
        .create(ctx(), &bed.create_request("flood", &spec, &streams, false))
        .await
        .unwrap();
    bed.start("flood", "").await.unwrap();
    let mut stdout = streams.take(1).await;
    let mut sum = Sha256::new();
    let mut buffer = vec![0; 65536];
    let mut total = 0;
    loop {
        let n = soon("flood", stdout.read(&mut buffer)).await.unwrap();
        if n == 0 {
            break;
        }
        sum.update(&buffer[..n]);
        total += n;
    }
    assert_eq!(total, 52_428_800);
    let expected = streams.read_text(2).await;
    let got: String = sum.finalize().iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(got, expected.split(' ').next().unwrap());
    assert_eq!(bed.wait("flood", "").await, 0);
    bed.delete("flood", "").await.unwrap();
}

#[tokio::test]
async fn the_last_bytes_outlive_the_process_and_the_delete() {
    let mut bed = Bed::new().await;
    let mut streams = bed.streams([false, true, false]);
    // Fills the pipe and more, while nobody reads.
    bed.run(
        "late",
        &["sh", "-c", "head -c 50000 /dev/zero; echo end"],
        &streams,
        false,
    )
    .await;
    assert_eq!(bed.wait("late", "").await, 0);
    bed.delete("late", "").await.unwrap();
    let bytes = streams.read_all(1).await;
    assert_eq!(bytes.len(), 50_004);
    assert!(bytes.ends_with(b"end\n"));
}

#[tokio::test]
async fn a_host_that_does_not_read_stops_the_writer() {
    let mut bed = Bed::new().await;
    let mut streams = bed.streams([false, true, true]);
    // Says how far it got, once per 64 KiB.
    let script = "i=0; while [ $i -lt 64 ]; do head -c 65536 /dev/zero; i=$((i+1)); echo $i >&2; done";
    bed.run("slow", &["sh", "-c", script], &streams, false).await;
    let mut stdout = streams.take(1).await;
    let mut stderr = streams.take(2).await;
    let mut progress = [0; 4096];
    let mut seen = String::new();
    // Wait until it stands still.
    while let Ok(Ok(n)) =
        tokio::time::timeout(std::time::Duration::from_secs(2), stderr.read(&mut progress)).await
    {
        assert!(n > 0, "the writer ended though nobody read: {seen}");
        seen.push_str(std::str::from_utf8(&progress[..n]).unwrap());
    }
    let chunks = seen.lines().count();
    assert!(
        chunks < 32,
        "{chunks} chunks of 64 KiB went somewhere though nobody read"
    );
    let mut rest = Vec::new();
    soon("output", stdout.read_to_end(&mut rest)).await.unwrap();
    assert_eq!(rest.len(), 64 * 65536);
    assert_eq!(bed.wait("slow", "").await, 0);
}

#[tokio::test]
async fn input_ends_when_the_host_ends_it() {
    let mut bed = Bed::new().await;
    let mut streams = bed.streams([true, true, false]);
    bed.run("cat", &["cat"], &streams, false).await;
    let stdin = streams.take(0).await;
    let data: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
    let feeding = data.clone();
    let feeder = tokio::spawn(async move { feed(stdin, &feeding).await });
    assert_eq!(streams.read_all(1).await, data);
    assert_eq!(bed.wait("cat", "").await, 0);
    soon("input", feeder).await.unwrap();
}

#[tokio::test]
async fn close_io_ends_the_input() {
    let mut bed = Bed::new().await;
    let mut streams = bed.streams([true, true, false]);
    bed.run("cat", &["cat"], &streams, false).await;
    let mut stdin = streams.take(0).await;
    stdin.write_all(b"all of it").await.unwrap();
    let request = CloseIORequest {
        id: "cat".into(),
        stdin: true,
        ..Default::default()
    };
    bed.task.close_io(ctx(), &request).await.unwrap();
    assert_eq!(streams.read_text(1).await, "all of it");
    assert_eq!(bed.wait("cat", "").await, 0);
    drop(stdin);
}

#[tokio::test]
async fn execs_have_streams_and_statuses_of_their_own() {
    let mut bed = Bed::new().await;
    let none = harness::Streams::default();
    bed.run("base", &["sleep", "1000"], &none, false).await;
    let mut streams = bed.streams([false, true, true]);
    bed.exec(
        "base",
        "e1",
        &["sh", "-c", "echo $$ in; cat /proc/1/comm; exit 3"],
        &streams,
        false,
    )
    .await
    .unwrap();
    assert_eq!(
        code(bed.exec("base", "e1", &["true"], &none, false).await).0,
        Code::ALREADY_EXISTS
    );
    assert_eq!(status(&bed, "base", "e1").await, Status::CREATED);
    bed.start("base", "e1").await.unwrap();
    assert_eq!(bed.wait("base", "e1").await, 3);
    let text = streams.read_text(1).await;
    assert!(text.contains("in\nsleep\n"), "{text}");
    assert_eq!(bed.delete("base", "e1").await.unwrap(), 3);
    assert_eq!(
        code(bed.task.state(ctx(), &state_request("base", "e1")).await).0,
        Code::NOT_FOUND
    );

    let pids = bed
        .task
        .pids(
            ctx(),
            &PidsRequest {
                id: "base".into(),
                ..Default::default()
            },
        )
        .await
        .unwrap();
    assert_eq!(pids.processes.len(), 1);

    bed.exec("base", "e2", &["sleep", "1000"], &none, false)
        .await
        .unwrap();
    bed.start("base", "e2").await.unwrap();
    assert_eq!(code(bed.delete("base", "e2").await).0, Code::FAILED_PRECONDITION);
    bed.task
        .kill(ctx(), &kill_request("base", "e2", 15, false))
        .await
        .unwrap();
    assert_eq!(bed.wait("base", "e2").await, 143);
    assert_eq!(bed.delete("base", "e2").await.unwrap(), 143);

    assert_eq!(code(bed.delete("base", "").await).0, Code::FAILED_PRECONDITION);
    bed.task
        .kill(ctx(), &kill_request("base", "", 9, true))
        .await
        .unwrap();
    assert_eq!(bed.wait("base", "").await, 137);
    assert_eq!(bed.delete("base", "").await.unwrap(), 137);
}

#[tokio::test]
async fn an_exec_whose_child_holds_the_pipe_can_be_deleted() {
    let mut bed = Bed::new().await;
    let none = harness::Streams::default();
    bed.run("base", &["sleep", "1000"], &none, false).await;
    let mut streams = bed.streams([false, true, false]);
    bed.exec(
        "base",
        "d",
        &["sh", "-c", "sleep 1000 & echo started"],
        &streams,
        false,
    )
    .await
    .unwrap();
    bed.start("base", "d").await.unwrap();
    assert_eq!(bed.wait("base", "d").await, 0);
    assert_eq!(bed.delete("base", "d").await.unwrap(), 0);
    assert_eq!(streams.read_text(1).await, "started\n");
}

#[tokio::test]
async fn commands_that_cannot_run_say_why() {
    let bed = Bed::new().await;
    let none = harness::Streams::default();
    for (args, wanted) in [
        (["no-such-command"], "executable file not found in $PATH"),
        (["/no/such/file"], "no such file or directory"),
        (["notexec"], "permission denied"),
        (["/etc"], "is a directory"),
    ] {
        let request = bed.create_request("bad", &bed.spec("bad", &args), &none, false);
        let (kind, text) = code(bed.task.create(ctx(), &request).await);
        assert_eq!(kind, Code::UNKNOWN);
        assert!(text.contains(wanted), "{text}");
        assert!(text.starts_with("OCI runtime create failed: "), "{text}");
        assert_eq!(code(bed.delete("bad", "").await).0, Code::NOT_FOUND);
    }
    bed.run("base", &["sleep", "1000"], &none, false).await;
    for (args, wanted) in [
        (["no-such-command"], "executable file not found in $PATH"),
        (["notexec"], "permission denied"),
    ] {
        bed.exec("base", "e", &args, &none, false).await.unwrap();
        let (_, text) = code(bed.start("base", "e").await);
        assert!(
            text.starts_with("OCI runtime exec failed: exec failed: ") && text.contains(wanted),
            "{text}"
        );
        bed.delete("base", "e").await.unwrap();
    }
}

#[tokio::test]
async fn a_failed_create_leaves_nothing_and_says_why() {
    let bed = Bed::new().await;
    let none = harness::Streams::default();
    let mut spec = bed.spec("bad", &["true"]);
    spec["mounts"].as_array_mut().unwrap().push(serde_json::json!(
        {"destination": "/data", "type": "bind", "source": "/no/such/volume", "options": ["rbind"]}));
    let (_, text) = code(
        bed.task
            .create(ctx(), &bed.create_request("bad", &spec, &none, false))
            .await,
    );
    assert!(text.contains("/no/such/volume"), "{text}");
    // The name is free again, and the next one works.
    bed.run("bad", &["true"], &none, false).await;
    assert_eq!(bed.wait("bad", "").await, 0);
    bed.delete("bad", "").await.unwrap();
}

#[tokio::test]
async fn a_terminal_is_one() {
    let mut bed = Bed::new().await;
    let mut streams = bed.streams([true, true, false]);
    bed.run("tty", &["sh"], &streams, true).await;
    let resize = ResizePtyRequest {
        id: "tty".into(),
        width: 123,
        height: 45,
        ..Default::default()
    };
    bed.task.resize_pty(ctx(), &resize).await.unwrap();
    let mut stdin = streams.take(0).await;
    stdin.write_all(b"tty; stty size; exit 5\n").await.unwrap();
    let text = streams.read_text(1).await;
    assert!(
        text.contains("/dev/pts/0\r\n") && text.contains("45 123\r\n"),
        "{text:?}"
    );
    assert_eq!(bed.wait("tty", "").await, 5);
    bed.delete("tty", "").await.unwrap();
}

#[tokio::test]
async fn an_exec_has_a_terminal_of_its_own() {
    let mut bed = Bed::new().await;
    let none = harness::Streams::default();
    bed.run("base", &["sleep", "1000"], &none, false).await;
    let mut streams = bed.streams([true, true, false]);
    bed.exec(
        "base",
        "t",
        &["sh", "-c", "tty; head -c 200000 /dev/zero; exit 4"],
        &streams,
        true,
    )
    .await
    .unwrap();
    bed.start("base", "t").await.unwrap();
    let bytes = streams.read_all(1).await;
    assert!(
        bytes.starts_with(b"/dev/pts/"),
        "{:?}",
        String::from_utf8_lossy(&bytes[..64])
    );
    assert_eq!(bytes.iter().filter(|b| **b == 0).count(), 200_000);
    assert_eq!(bed.wait("base", "t").await, 4);
}

#[tokio::test]
async fn pause_stops_and_resume_goes_on() {
    let mut bed = Bed::new().await;
    let mut streams = bed.streams([false, true, false]);
    bed.run(
        "p",
        &["sh", "-c", "while true; do echo x; sleep 0.05; done"],
        &streams,
        false,
    )
    .await;
    let mut stdout = streams.take(1).await;
    let mut buffer = [0; 4096];
    soon("first output", stdout.read(&mut buffer)).await.unwrap();
    bed.task
        .pause(
            ctx(),
            &PauseRequest {
                id: "p".into(),
                ..Default::default()
            },
        )
        .await
        .unwrap();
    assert_eq!(status(&bed, "p", "").await, Status::PAUSED);
    // What was written before is taken; then nothing comes.
    let quiet = std::time::Duration::from_millis(500);
    while let Ok(Ok(n)) = tokio::time::timeout(quiet, stdout.read(&mut buffer)).await {
        assert!(n > 0);
    }
    let none = harness::Streams::default();
    bed.exec("p", "e", &["true"], &none, false).await.unwrap();
    assert_eq!(code(bed.start("p", "e").await).0, Code::FAILED_PRECONDITION);
    bed.task
        .resume(
            ctx(),
            &ResumeRequest {
                id: "p".into(),
                ..Default::default()
            },
        )
        .await
        .unwrap();
    assert_eq!(status(&bed, "p", "").await, Status::RUNNING);
    soon("output after resume", stdout.read(&mut buffer))
        .await
        .unwrap();
    bed.task
        .pause(
            ctx(),
            &PauseRequest {
                id: "p".into(),
                ..Default::default()
            },
        )
        .await
        .unwrap();
    // A frozen container can be killed.
    bed.task
        .kill(ctx(), &kill_request("p", "", 9, true))
        .await
        .unwrap();
    assert_eq!(bed.wait("p", "").await, 137);
    bed.delete("p", "").await.unwrap();
}

/// The spec of a container whose PID namespace is the one at `path`.
fn spec_in(bed: &Bed, id: &str, args: &[&str], path: &str) -> serde_json::Value {
    let mut spec = bed.spec(id, args);
    spec["linux"]["namespaces"] =
        serde_json::json!([{"type": "pid", "path": path}, {"type": "mount"}, {"type": "ipc", "path": ""}]);
    spec
}

#[tokio::test]
async fn containers_share_the_pods_pid_namespace() {
    let mut bed = Bed::new().await;
    let none = harness::Streams::default();
    let spec = spec_in(&bed, "a", &["sleep", "1000"], SHARED_PID_NS);
    bed.task
        .create(ctx(), &bed.create_request("a", &spec, &none, false))
        .await
        .unwrap();
    bed.start("a", "").await.unwrap();
    // Sees the other container and the namespace's first process, leaves an orphan that dies, and no zombie stays.
    let script = "cat /proc/1/comm; grep -l sleep /proc/*/comm; (sleep 0.1 & echo $! >/tmp/orphan); sleep 1; \
        test -e /proc/$(cat /tmp/orphan) && echo zombie; kill -9 1; kill -0 1 && echo lives; ls /proc/1/root/; true";
    let mut streams = bed.streams([false, true, true]);
    let spec = spec_in(&bed, "b", &["sh", "-c", script], SHARED_PID_NS);
    bed.task
        .create(ctx(), &bed.create_request("b", &spec, &streams, false))
        .await
        .unwrap();
    let pid = bed.start("b", "").await.unwrap();
    assert!(pid > 1);
    assert_eq!(bed.wait("b", "").await, 0);
    let text = streams.read_text(1).await;
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.first(), Some(&"pause"), "{text}");
    assert!(
        lines
            .iter()
            .any(|line| line.starts_with("/proc/") && line.ends_with("/comm")),
        "{text}"
    );
    assert_eq!(lines.last(), Some(&"lives"), "{text}");
    let errors = streams.read_text(2).await;
    assert!(
        errors.contains("ermission denied"),
        "the first process's root is nobody's: {errors}"
    );
    bed.delete("b", "").await.unwrap();
    // The other one lives on, and an exec in it is in the same namespace.
    let mut streams = bed.streams([false, true, false]);
    bed.exec("a", "e", &["cat", "/proc/1/comm"], &streams, false)
        .await
        .unwrap();
    bed.start("a", "e").await.unwrap();
    assert_eq!(streams.read_text(1).await, "pause\n");
}

#[tokio::test]
async fn a_container_joins_the_pid_namespace_of_another() {
    let mut bed = Bed::new().await;
    let none = harness::Streams::default();
    let spec = bed.spec("target", &["sleep", "1000"]);
    bed.task
        .create(ctx(), &bed.create_request("target", &spec, &none, false))
        .await
        .unwrap();
    let pid = bed.start("target", "").await.unwrap();
    let mut streams = bed.streams([false, true, false]);
    let path = format!("/proc/{pid}/ns/pid");
    let spec = spec_in(&bed, "debugger", &["cat", "/proc/1/comm"], &path);
    bed.task
        .create(ctx(), &bed.create_request("debugger", &spec, &streams, false))
        .await
        .unwrap();
    bed.start("debugger", "").await.unwrap();
    assert_eq!(bed.wait("debugger", "").await, 0);
    assert_eq!(streams.read_text(1).await, "sleep\n");
    bed.delete("debugger", "").await.unwrap();
    assert_eq!(status(&bed, "target", "").await, Status::RUNNING);
}

#[tokio::test]
async fn stats_and_pod_answers() {
    let bed = Bed::new().await;
    let none = harness::Streams::default();
    bed.run("s", &["sleep", "1000"], &none, false).await;
    let stats = bed
        .task
        .stats(
            ctx(),
            &StatsRequest {
                id: "s".into(),
                ..Default::default()
            },
        )
        .await
        .unwrap();
    assert_eq!(stats.stats.type_url, "io.containerd.cgroups.v2.Metrics");
    let metrics = Metrics::parse_from_bytes(&stats.stats.value).unwrap();
    assert!(metrics.cpu.usage_usec > 0);
    let ping = PingRequest {
        payload: b"hello".to_vec(),
        ..Default::default()
    };
    assert_eq!(bed.pod.ping(ctx(), &ping).await.unwrap().payload, b"hello");
    let info = bed.pod.info(ctx(), &InfoRequest::new()).await.unwrap();
    assert_eq!(info.containers, ["s"]);
    assert!(info.cpus > 0 && info.memory_total_bytes > 0 && info.agent_rss_bytes > 0);
}

#[tokio::test]
async fn a_created_container_can_be_deleted() {
    let bed = Bed::new().await;
    let none = harness::Streams::default();
    let request = bed.create_request("c", &bed.spec("c", &["true"]), &none, false);
    bed.task.create(ctx(), &request).await.unwrap();
    assert_eq!(bed.delete("c", "").await.unwrap(), 137);
    assert_eq!(
        code(bed.task.state(ctx(), &state_request("c", "")).await).0,
        Code::NOT_FOUND
    );
}

#[tokio::test]
async fn hooks_run_each_at_its_moment() {
    let mut bed = Bed::new().await;
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    // Each says its name, and what it was told of the container.
    let hook = |name: &str, end: &str| {
        let script = format!(
            "sed 's/.*\"status\": *\"\\([a-z]*\\)\".*/{name} \\1/' >>{}; echo >>{0}; {end}",
            log.display()
        );
        serde_json::json!({"path": "/bin/sh", "args": ["sh", "-c", script]})
    };
    // It is there still when poststart looks.
    let mut spec = bed.spec("c1", &["sh", "-c", "cat /tmp/hook; sleep 2"]);
    spec["hooks"] = serde_json::json!({
        "prestart": [hook("prestart", "true")],
        "createRuntime": [hook("createRuntime", "true")],
        "createContainer": [hook("createContainer", "true")],
        // In the container.
        "startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", "echo startContainer >/tmp/hook"]}],
        "poststart": [hook("poststart", "true")],
        // A failure keeps nothing from going on.
        "poststop": [hook("poststop", "exit 1"), hook("poststop", "true")],
    });
    let mut streams = bed.streams([false, true, false]);
    let lines = || -> Vec<String> {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        text.split_whitespace().map(str::to_owned).collect()
    };
    bed.task
        .create(ctx(), &bed.create_request("c1", &spec, &streams, false))
        .await
        .unwrap();
    let mut expected = vec![
        "prestart",
        "creating",
        "createRuntime",
        "creating",
        "createContainer",
        "creating",
    ];
    assert_eq!(lines(), expected);
    bed.start("c1", "").await.unwrap();
    expected.extend(["poststart", "running"]);
    assert_eq!(lines(), expected);
    assert_eq!(bed.wait("c1", "").await, 0);
    assert_eq!(streams.read_text(1).await, "startContainer\n");
    assert_eq!(lines(), expected);
    bed.delete("c1", "").await.unwrap();
    expected.extend(["poststop", "stopped", "poststop", "stopped"]);
    assert_eq!(lines(), expected);

    // One that fails after the start ends the container.
    let mut spec = bed.spec("c2", &["sleep", "1000"]);
    spec["hooks"] = serde_json::json!({"poststart": [hook("poststart", "exit 3")]});
    let streams = bed.streams([false, false, false]);
    bed.task
        .create(ctx(), &bed.create_request("c2", &spec, &streams, false))
        .await
        .unwrap();
    let (kind, text) = code(bed.start("c2", "").await);
    assert_eq!(kind, Code::UNKNOWN);
    assert!(text.contains("poststart") && text.contains('3'), "{text}");
    assert_eq!(bed.wait("c2", "").await, 137);
    bed.delete("c2", "").await.unwrap();
}

#[tokio::test]
async fn unknown_names_and_bad_requests() {
    let bed = Bed::new().await;
    let none = harness::Streams::default();
    assert_eq!(code(bed.start("nobody", "").await).0, Code::NOT_FOUND);
    assert_eq!(
        code(bed.exec("nobody", "e", &["true"], &none, false).await).0,
        Code::NOT_FOUND
    );
    for id in ["../x", "", "a/b"] {
        let request = bed.create_request(id, &bed.spec("x", &["true"]), &none, false);
        assert_eq!(
            code(bed.task.create(ctx(), &request).await).0,
            Code::INVALID_ARGUMENT,
            "{id}"
        );
    }
    let mut request = bed.create_request("x", &bed.spec("x", &["true"]), &none, false);
    request.stdout = "/run/fifo".into();
    assert_eq!(
        code(bed.task.create(ctx(), &request).await).0,
        Code::INVALID_ARGUMENT
    );
    bed.run("x", &["sleep", "1000"], &none, false).await;
    assert_eq!(
        code(bed.task.kill(ctx(), &kill_request("x", "", 99, false)).await).0,
        Code::INVALID_ARGUMENT
    );
    assert_eq!(code(bed.start("x", "").await).0, Code::FAILED_PRECONDITION);
    assert_eq!(code(bed.start("x", "e").await).0, Code::NOT_FOUND);
}
