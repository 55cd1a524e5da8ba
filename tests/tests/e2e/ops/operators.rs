// SPDX-License-Identifier: Apache-2.0
//! `cloister` on pods that containerd made, from the first look to a guest kernel that panics, and the daemon's end.

use super::listen;
use cloister_tests::cri::{Container, End, Node, Pod, Runtime, api, script, security};
use cloister_tests::e2e::eventually;
use serde_json::Value;
use std::io::Write;
use std::process::{Output, Stdio};

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[track_caller]
fn good(output: Output) -> String {
    assert!(output.status.success(), "{output:?}");
    text(&output.stdout)
}

#[track_caller]
fn json(output: Output) -> Value {
    let text = good(output);
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

#[track_caller]
fn refused(output: &Output, words: &[&str]) {
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    for word in words {
        assert!(said.contains(word), "{word} is not in {said}");
    }
}

/// A pod `web` with a container `app` that lives, and may write to all of its /proc.
async fn web(runtime: &Runtime) -> (Pod, Container) {
    let mut config = Pod::config(runtime);
    config
        .annotations
        .insert("note".into(), "annotated-secret".into());
    let pod = Pod::run(runtime, config).await.unwrap();
    let mut app = script("echo from-app; echo to-err >&2; trap 'exit 3' TERM; sleep infinity & wait");
    app.metadata = Some(api::ContainerMetadata {
        name: "app".into(),
        attempt: 0,
    });
    app.envs.push(api::KeyValue {
        key: "PASSWORD".into(),
        value: "given-secret".into(),
    });
    security(&mut app).readonly_paths.clear();
    let app = pod.start(app).await.unwrap();
    app.says("to-err").await.unwrap();
    (pod, app)
}

fn name(pod: &Pod) -> String {
    pod.config.metadata.as_ref().unwrap().name.clone()
}

#[test]
fn pods_of_containerd_are_seen_and_debugged() {
    let journal = listen::journald();
    let (collector, traces) = listen::collector();
    let format = if journal.is_some() { "journald" } else { "text" };
    let mut node = Node::start_with(&["cloister"], |config| {
        let config = config.replace("format = \"text\"", &format!("format = \"{format}\""));
        format!("{config}\n[tracing]\notlp_endpoint = \"{collector}\"\n")
    });
    let runtime = node.runtime("cloister");
    let (pod, app) = node.block_on(web(&runtime));
    let pod_name = name(&pod);
    let app_name = format!("{pod_name}/app");

    seen(&node, &pod, &app);
    run_in(&node, &pod, &app_name);
    // A container's end.
    let job = node.block_on(async {
        let mut job = script("exit 5");
        job.metadata = Some(api::ContainerMetadata {
            name: "job".into(),
            attempt: 0,
        });
        let job = pod.start(job).await.unwrap();
        job.ended().await.unwrap();
        job
    });
    let events = good(node.cloister(&["events", "--no-follow", "--json", &pod_name]));
    let events: Vec<Value> = events
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let kinds: Vec<&str> = events
        .iter()
        .map(|event| event["kind"].as_str().unwrap())
        .collect();
    assert_eq!(
        kinds,
        [
            "created",
            "started",
            "container-started",
            "container-started",
            "container-exited"
        ]
    );
    let last = events.last().unwrap();
    assert_eq!(
        (&last["container"], &last["exit_status"]),
        (&job.id.as_str().into(), &5.into())
    );
    refused(
        &node.cloister(&["stop", &pod_name]),
        &["made by containerd", "kubectl delete pod", "crictl stopp"],
    );
    refused(&node.cloister(&["rm", "-f", &app.id]), &["crictl rm"]);
    bundle(&node, &pod);

    // Its kernel is made to panic.
    let _ = node.cloister(&["exec", &app_name, "sh", "-c", "echo c >/proc/sysrq-trigger"]);
    let stopped = eventually("the end of the pod", || {
        let line = good(node.cloister(&["events", "--no-follow", "--json", &pod.id]));
        let mut events = line
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap());
        events.find(|event| event["kind"] == "stopped")
    });
    let message = stopped["message"].as_str().unwrap();
    assert!(message.contains("panic"), "{message}");
    let console = good(node.cloister(&["console", &pod.id]));
    assert!(
        console.contains("Kernel panic - not syncing: sysrq triggered crash"),
        "{console}"
    );
    // containerd removes the container when it hears of its end, a moment later.
    refused(&node.cloister(&["exec", &app_name, "true"]), &[&pod_name]);
    eventually("the end of the container", || {
        let list = json(node.cloister(&["ps", "--pods", "--all", "--json"]));
        list[0]["containers"].as_array().unwrap().is_empty().then_some(())
    });
    refused(
        &node.cloister(&["exec", &app_name, "true"]),
        &[&pod_name, "has stopped", "panic"],
    );
    let details = json(node.cloister(&["inspect", &pod.id]));
    assert_eq!(details[0]["exit"]["status"], 137, "{details}");
    node.block_on(async {
        assert_eq!(app.ended().await.unwrap().exit_code, 137);
        pod.remove().await.unwrap();
    });
    let list = json(node.cloister(&["ps", "--pods", "--all", "--json"]));
    assert_eq!(list.as_array().unwrap().len(), 0, "{list}");

    // What others heard meanwhile.
    // Spans go out in batches, whoever has ended by then.
    for span in [&["pod_start", pod_name.as_str()][..], &["network"], &["boot"]] {
        let words = [&["POST /v1/traces"][..], span].concat();
        eventually("the trace of the pod's start", || {
            traces.together(&words).then_some(())
        });
    }
    if let Some(journal) = journal {
        let fields = [
            "POD_ID",
            &pod.id,
            "POD_NAME",
            &pod_name,
            "POD_NAMESPACE",
            "PRIORITY",
        ];
        assert!(journal.together(&fields), "no line of the pod's came to journald");
        assert!(journal.together(&["SYSLOG_IDENTIFIER", "cloisterd", "listening on"]));
    }
    the_daemon_ends(&mut node, &runtime);
    drop(node);
    listen::journald_ends();
}

/// `ps`, `inspect`, `logs`, `top`.
fn seen(node: &Node, pod: &Pod, app: &Container) {
    let pod_name = name(pod);
    let list = json(node.cloister(&["ps", "--pods", "--json"]));
    assert_eq!(list.as_array().unwrap().len(), 1, "{list}");
    let listed = &list[0];
    assert_eq!(listed["id"], pod.id.as_str());
    assert_eq!(
        (&listed["name"], &listed["namespace"], &listed["phase"]),
        (&pod_name.as_str().into(), &"e2e".into(), &"ready".into())
    );
    assert_eq!(
        (&listed["sandboxer"], &listed["vcpus"]),
        (&"cloister".into(), &1.into())
    );
    assert!(listed["memory_used"].as_u64().unwrap() > 1 << 20, "{listed}");
    assert_eq!(
        (&listed["containers"][0]["id"], &listed["containers"][0]["name"]),
        (&app.id.as_str().into(), &"app".into())
    );
    let table = good(node.cloister(&["ps"]));
    assert!(
        table.contains("Ready") && table.contains("1/1") && table.contains(&format!("e2e/{pod_name}")),
        "{table}"
    );

    let details = json(node.cloister(&["inspect", &pod.id[..12]]));
    let details = &details[0];
    let steps: Vec<&str> = details["steps"]
        .as_array()
        .unwrap()
        .iter()
        .map(|step| step["step"].as_str().unwrap())
        .collect();
    assert_eq!(
        steps,
        ["network", "create", "boot", "configure", "forward", "serve"]
    );
    assert!(details["counters"]["exits"]["mmio_write"].as_u64().unwrap() > 0);
    assert!(details["counters"]["bytes"]["fs"]["read"].as_u64().unwrap() > 0);
    assert!(
        details["threads"][0]["name"]
            .as_str()
            .unwrap()
            .ends_with(":vcpu0")
    );
    let container = json(node.cloister(&["inspect", &format!("e2e/{pod_name}/app")]));
    assert_eq!(container[0]["state"], "running");
    assert_eq!(container[0]["spec"]["process"]["args"][0], "sh");

    let logs = node.cloister(&["logs", &pod_name]);
    assert_eq!(
        (text(&logs.stdout).as_str(), text(&logs.stderr).as_str()),
        ("from-app\n", "to-err\n")
    );
    let stats = json(node.cloister(&["top", "--json", &pod_name]));
    assert_eq!(stats[0]["name"], format!("e2e/{pod_name}/app"));
    assert!(stats[0]["memory_bytes"].as_u64().unwrap() > 0 && stats[0]["pids"].as_u64().unwrap() >= 2);
    assert!(stats[0]["vm_bytes"].as_u64().unwrap() > 1 << 20, "{stats}");
    good(node.cloister(&["console", &pod.id]));
}

/// `exec` with pipes and with a terminal.
fn run_in(node: &Node, pod: &Pod, app_name: &str) {
    let shown = node.cloister(&[
        "exec",
        app_name,
        "sh",
        "-c",
        "echo $PASSWORD; pwd; echo e >&2; exit 7",
    ]);
    assert_eq!(shown.status.code(), Some(7), "{shown:?}");
    assert_eq!(
        (text(&shown.stdout).as_str(), text(&shown.stderr).as_str()),
        ("given-secret\n/home\n", "e\n")
    );
    let mut child = node
        .cloister_command(&[
            "exec",
            "-i",
            "-e",
            "A=b",
            "-u",
            "7:8",
            &pod.id,
            "sh",
            "-c",
            "cat; echo $A; id -u; id -g",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"typed\n").unwrap();
    assert_eq!(good(child.wait_with_output().unwrap()), "typed\nb\n7\n8\n");
    // A terminal on both sides: script(1) has one for us.
    let dir = node.dir().display();
    let line = format!(
        "cloister --state {dir}/r --root {dir}/lib exec -it {app_name} sh -c 'tty; until stty size | grep \"33 99\"; do sleep 0.2; done; read word; echo got $word'"
    );
    let mut child = std::process::Command::new("script")
        .args(["-qec", &format!("stty rows 33 cols 99; {line}"), "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut keyboard = child.stdin.take().unwrap();
    keyboard.write_all(b"key\n").unwrap();
    let shown = child.wait_with_output().unwrap();
    drop(keyboard);
    let said = text(&shown.stdout);
    for words in ["/dev/pts/", "33 99", "got key"] {
        assert!(said.contains(words), "{words} is not in {said}");
    }
    let unknown = node.cloister(&["exec", app_name, "no-such-program"]);
    assert_eq!(unknown.status.code(), Some(127), "{unknown:?}");
    assert!(
        node.dir()
            .join("r/sandboxes")
            .join(&pod.id)
            .read_dir()
            .unwrap()
            .all(|entry| {
                let name = entry.unwrap().file_name();
                !name.to_string_lossy().starts_with("exec-")
            }),
        "fifos are left"
    );
}

/// `debug-bundle`, with nothing secret in it.
fn bundle(node: &Node, pod: &Pod) {
    good(node.cloister(&["debug-bundle", &pod.id, "-o", "bundle.tar.gz"]));
    let unpacked = std::process::Command::new("tar")
        .args(["-xzf", "bundle.tar.gz"])
        .current_dir(node.dir())
        .status();
    assert!(unpacked.unwrap().success());
    let dir = node.dir().join(format!("cloister-debug-{}", &pod.id[..12]));
    let read = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert!(read("pod.json").contains("\"boot\"") && read("pod.json").contains(":vcpu0"));
    assert!(read("events.jsonl").contains("container-exited"));
    assert!(read("metrics.txt").contains("cloister_pod_memory_bytes"));
    assert!(read("config.toml").contains("[sandboxer.cloister]"));
    assert!(read("host.txt").contains("Threads:"));
    for entry in dir.read_dir().unwrap() {
        let path = entry.unwrap().path();
        let content = text(&std::fs::read(&path).unwrap());
        for secret in ["annotated-secret", "given-secret"] {
            assert!(!content.contains(secret), "{} has a secret", path.display());
        }
    }
}

/// SIGTERM with a pod: it ends, everybody hears of it, and the next daemon knows.
fn the_daemon_ends(node: &mut Node, runtime: &Runtime) {
    let (pod, app) = node.block_on(web(runtime));
    let status = node.end("cloisterd", End::Asked);
    assert_eq!(status.code(), Some(0), "{status:?}");
    node.block_on(async {
        assert_eq!(app.ended().await.unwrap().exit_code, 137);
        let log = app.log().unwrap();
        assert_eq!(
            (log.stdout.as_str(), log.stderr.as_str()),
            ("from-app\n", "to-err\n")
        );
    });
    assert!(!node.dir().join("r/admin.sock").exists());
    assert!(!node.dir().join("cloister/sandboxer.sock").exists());
    let output = node.cloister(&["ps", "--pods", "--all"]);
    assert!(
        text(&output.stderr).contains("cloisterd is not running"),
        "{output:?}"
    );
    assert!(text(&output.stdout).contains("Stopped"), "{output:?}");
    refused(
        &node.cloister(&["exec", &pod.id, "true"]),
        &["has stopped: cloisterd is not running"],
    );
    node.start_again("cloisterd");
    let list = json(node.cloister(&["ps", "--pods", "--all", "--json"]));
    assert_eq!(list[0]["phase"], "stopped", "{list}");
    node.block_on(async {
        let not_ready = async || {
            // containerd may not have dialled the daemon again yet.
            let state = pod.status().await.ok().map(|status| status.state());
            Ok((state == Some(api::PodSandboxState::SandboxNotready)).then_some(()))
        };
        cloister_tests::cri::eventually("the pod is not ready", not_ready)
            .await
            .unwrap();
        pod.remove().await.unwrap();
    });
    assert_eq!(
        node.dir().join("r/sandboxes").read_dir().unwrap().count(),
        0,
        "something is left of the pod"
    );
}
