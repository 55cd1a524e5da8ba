// SPDX-License-Identifier: Apache-2.0
//! The life of containers.

use crate::mounts::mount;
use cloister_tests::cri::{
    Container, Outcome, Pod, Runtime, USER, api, args, code, ensure, eventually, k8s, script,
};
use containerd_client::services::v1::tasks_client::TasksClient;
use containerd_client::services::v1::{GetRequest, PauseTaskRequest, ResumeTaskRequest};
use containerd_client::types::v1::Status;
use futures_util::future::join;
use serde_json::{Value, json};
use std::time::Duration;

async fn listed(runtime: &Runtime, filter: api::ContainerFilter) -> Outcome<Vec<String>> {
    let request = api::ListContainersRequest { filter: Some(filter) };
    let list = runtime.cri().list_containers(request).await?.into_inner();
    Ok(list
        .containers
        .into_iter()
        .map(|container| container.id)
        .collect())
}

/// Seen of one that ended.
async fn end(container: &Container) -> Outcome<Value> {
    let status = container.ended().await?;
    let times = status.created_at > 0 && status.finished_at > status.created_at;
    Ok(json!([status.exit_code, status.reason, times]))
}

/// From its creation to its removal, each step twice.
pub async fn life(runtime: &Runtime) -> Outcome<Value> {
    let pod = runtime.shared().await?.pod.clone();
    let mut config = script("echo hello; trap 'echo bye; exit 7' TERM; sleep infinity & wait");
    let label = runtime.name("label");
    config.labels.insert("e2e/label".into(), label.clone());
    config.annotations.insert("e2e/annotation".into(), "kept".into());
    let container = pod.create(config).await?;
    let created = container.status().await?;
    let same = created.metadata == container.config.metadata
        && created.labels == container.config.labels
        && created.annotations == container.config.annotations
        && created.log_path == container.log_file().display().to_string();
    ensure(same, format_args!("{created:?}"))?;
    let early_exec = code(container.exec(&["true"]).await);
    container.start().await?;
    let again = code(container.start().await);
    container.says("hello").await?;
    let running = container.status().await?;
    for (what, filter) in [
        (
            "id",
            api::ContainerFilter {
                id: container.id.clone(),
                ..Default::default()
            },
        ),
        (
            "label",
            api::ContainerFilter {
                label_selector: [("e2e/label".to_owned(), label)].into(),
                ..Default::default()
            },
        ),
    ] {
        let found = listed(runtime, filter).await?;
        ensure(
            found == [container.id.as_str()],
            format_args!("listed by {what}: {found:?}"),
        )?;
    }
    let in_pod = |state: api::ContainerState| api::ContainerFilter {
        pod_sandbox_id: pod.id.clone(),
        state: Some(api::ContainerStateValue { state: state.into() }),
        ..Default::default()
    };
    let found = listed(runtime, in_pod(api::ContainerState::ContainerRunning)).await?;
    ensure(found.contains(&container.id), "listed as running")?;
    container.stop(30).await?;
    let stopped = container.status().await?;
    container.stop(30).await?;
    let found = listed(runtime, in_pod(api::ContainerState::ContainerExited)).await?;
    ensure(found.contains(&container.id), "listed as ended")?;
    let late = [
        code(container.exec(&["true"]).await),
        code(container.start().await),
    ];
    let log = container.log()?;
    container.remove().await?;
    container.remove().await?;
    Ok(json!({
        "created": created.state().as_str_name(),
        "exec when created": early_exec,
        "second start": again,
        "running": running.state().as_str_name(),
        "started": running.started_at > 0,
        "stopped": [stopped.state().as_str_name(), &stopped.exit_code.to_string(), &stopped.reason],
        "exec and start once ended": late,
        "log": log,
        "status once removed": code(container.status().await),
        "stop once removed": code(container.stop(1).await),
    }))
}

/// Codes and reasons of containers that end by themselves.
pub async fn exit_codes(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let ends = [
        "exit 0",
        "exit 42",
        "kill -9 $$; sleep infinity",
        "kill -TERM $$; sleep infinity",
        "sh -c 'kill -SEGV $$'; exit $?",
    ];
    let mut seen = serde_json::Map::new();
    for text in ends {
        let container = pod.start(script(text)).await?;
        // PID 1 of a namespace takes no signal from itself.
        if text.ends_with("sleep infinity") {
            container.stop(1).await?;
        }
        seen.insert(text.to_owned(), end(&container).await?);
        container.remove().await?;
    }
    Ok(seen.into())
}

/// Those that cannot start.
pub async fn that_cannot_start(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let mut missing_user = args(&["true"]);
    cloister_tests::cri::security(&mut missing_user).run_as_username = "nobody-at-all".into();
    let mut no_folder = args(&["pwd"]);
    no_folder.working_dir = "/made/by/the/runtime".into();
    let mut file_as_folder = args(&["pwd"]);
    file_as_folder.working_dir = "/etc/passwd".into();
    let mut seen = serde_json::Map::new();
    for (what, config) in [
        ("no program", args(&["/no/such/program"])),
        ("not on the path", args(&["no-such-program"])),
        ("not a program", args(&["/etc/passwd"])),
        ("a folder", args(&["/etc"])),
        ("no user", missing_user),
        ("a missing working directory", no_folder),
        ("a file as working directory", file_as_folder),
    ] {
        let value = match pod.create(config).await {
            Err(_) => json!("not created"),
            Ok(container) => {
                let started = code(container.start().await);
                let end = end(&container).await?;
                container.remove().await?;
                json!([started, end])
            }
        };
        seen.insert(what.to_owned(), value);
    }
    Ok(seen.into())
}

/// The grace that a container has, and the signal it is told by.
pub async fn stop(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let deaf = pod
        .start(script("trap '' TERM; echo ready; while :; do sleep 1; done"))
        .await?;
    deaf.says("ready").await?;
    deaf.stop(1).await?;
    let at_once = pod
        .start(script("trap 'exit 0' TERM; echo ready; sleep infinity & wait"))
        .await?;
    at_once.says("ready").await?;
    at_once.stop(0).await?;
    // Its image wants another signal.
    let mut config =
        script("trap 'echo told; exit 0' USR1; trap 'exit 1' TERM; echo ready; while :; do sleep 0.2; done");
    config.image.get_or_insert_default().image = USER.to_owned();
    let other = pod.start(config).await?;
    other.says("ready").await?;
    other.stop(60).await?;
    let seen = json!({
        "deaf": end(&deaf).await?,
        "without grace": end(&at_once).await?,
        "signal of the image": end(&other).await?,
    });
    for container in [deaf, at_once, other] {
        container.remove().await?;
    }
    Ok(seen)
}

/// Command, arguments, environment and working directory, of the image and of the container.
pub async fn process(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let plain = pod
        .output(script(
            "pwd; echo $FROM_IMAGE $PATH; tr '\\0' ' ' </proc/1/cmdline; env | cut -d= -f1 | sort | xargs",
        ))
        .await?;
    let mut config = args(&["sh"]);
    config.args = [
        "-c",
        "pwd; echo \"$ONE|$FROM_IMAGE\"; echo $#",
        "name",
        "an argument",
    ]
    .map(str::to_owned)
    .into();
    config.working_dir = "/tmp".into();
    config.envs = [("ONE", "two words = $PATH"), ("FROM_IMAGE", "no")]
        .map(|(key, value)| api::KeyValue {
            key: key.into(),
            value: value.into(),
        })
        .into();
    let given = pod.output(config).await?;
    let images = pod.start(args(&[])).await?;
    images.says("command of the image").await?;
    images.stop(0).await?;
    images.remove().await?;
    Ok(json!({ "plain": plain, "given": given }))
}

/// What a process finds open, and what it may use.
pub async fn surroundings(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let output = pod.output(script(
        "echo files $(ls /proc/self/fd); echo umask $(umask); echo oom_score_adj $(cat /proc/self/oom_score_adj); echo core $(ulimit -c); \
         echo stack $(ulimit -s); [ $(ulimit -n) -ge 1024 ] && echo enough files; awk '/^Sig(Blk|Ign)/ { print $1, substr($2, 9) }' /proc/self/status; \
         echo / $(ls -A /); for file in /dev/*; do echo $file $(readlink $file); done; \
         stat -c '%n %a %u:%g %t:%T' /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty; echo exe $(readlink /proc/self/exe)",
    )).await?;
    let mounts = pod.output(script(
        "awk '$3 != \"overlay\" && $2 != \"/\" { split($4, all, \",\"); kept = \"\"; for (i in all) if (all[i] ~ /^(rw|ro|nosuid|nodev|noexec|mode=.*|ptmxmode=.*|size=.*)$/) kept = kept \" \" all[i]; \
         n = split(kept, one, \" \"); asort(one); printf \"%s %s\", $2, $3; for (i = 1; i <= n; i++) printf \" %s\", one[i]; print \"\" }' /proc/mounts | sort",
    )).await?;
    let by_name = |text: String| -> Value {
        let named = |line: &str| match line.split_once(' ') {
            Some((name, what)) => (name.replace('/', "."), what.into()),
            None => (line.replace('/', "."), true.into()),
        };
        Value::Object(text.lines().map(named).collect())
    };
    Ok(json!({ "process": by_name(output.good()?), "mounts": by_name(mounts.good()?) }))
}

/// What is written to the root is seen by its container alone, and lost with it.
pub async fn root_is_its_own(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let text = "cat /etc/image-file; echo mine >/etc/image-file; mkdir -p /srv/a/b; mv /srv/a /srv/c; rm -r /usr/share/base-passwd; \
        ln -s c /srv/link; cat /etc/image-file; ls /srv; ls -d /usr/share/base-passwd 2>&1 >/dev/null";
    let first = pod.output(script(text)).await?;
    let second = pod.output(script(text)).await?;
    ensure(first == second, format_args!("{first:?}, then {second:?}"))?;
    Ok(json!(first))
}

/// Containers of a pod share its network and nothing else.
pub async fn several(runtime: &Runtime) -> Outcome<Value> {
    let pod = Pod::run(runtime, Pod::config(runtime)).await?;
    // As an init container.
    let init = pod.output(script("echo prepared")).await?;
    let server = pod
        .start(script(
            "touch /only-here; exec socat TCP-LISTEN:8000,fork,reuseaddr SYSTEM:'echo from the server'",
        ))
        .await?;
    let client = pod.start(script(
        "until socat -u TCP:127.0.0.1:8000 STDOUT 2>/dev/null; do sleep 0.2; done; [ -e /only-here ] || echo its own root; \
         pgrep socat >/dev/null || echo its own processes; sleep infinity",
    )).await?;
    client.says("its own processes").await?;
    let log = client.log()?;
    server.stop(0).await?;
    let one_left = client
        .exec_script("echo still there; hostname | cut -d- -f1")
        .await?;
    // In the place of the one that ended, as after a crash.
    let mut config = server.config.clone();
    let refused = pod.create(config.clone()).await.is_err();
    if let Some(metadata) = &mut config.metadata {
        metadata.attempt = 1;
    }
    config.log_path.clear();
    let successor = pod.start(config).await?;
    let back = client.exec_script("for i in 1 2 3 4 5 6 7 8 9; do socat -u TCP:127.0.0.1:8000 STDOUT 2>/dev/null && exit; sleep 0.3; done").await?;
    let status = successor.status().await?.state().as_str_name();
    pod.remove().await?;
    Ok(
        json!({ "init": init, "client": log, "one left": one_left, "same name": refused, "successor": [status, &back.stdout] }),
    )
}

/// As kubelets start the containers of a pod, one after the other, and again those that fail; what they have in common is a volume.
pub async fn restart(runtime: &Runtime) -> Outcome<Value> {
    let pod = Pod::run(runtime, Pod::config(runtime)).await?;
    let dir = runtime.folder("restart")?;
    std::fs::write(dir.join("steps"), "")?;
    let named = |name: &str, attempt: u32, mut config: api::ContainerConfig| {
        config.metadata = Some(api::ContainerMetadata {
            name: name.to_owned(),
            attempt,
        });
        config.mounts = vec![mount(&dir, "/work")];
        config
    };
    let step = |name: &str, attempt: u32| {
        let text = format!(
            "cat /work/steps; echo {name} begins >>/work/steps; sleep 0.5; echo {name} ends >>/work/steps"
        );
        named(name, attempt, script(&text))
    };
    let mut seen = Vec::new();
    // Init containers: none begins before the one before it has ended.
    for name in ["init-1", "init-2"] {
        seen.push(json!(pod.output(step(name, 0)).await?));
    }
    // One that never starts is in nobody's way, not even in its own once it is mended.
    let broken = pod
        .create(named("broken", 0, args(&["/no/such/program"])))
        .await?;
    seen.push(json!([code(broken.start().await), end(&broken).await?]));
    seen.push(json!(pod.output(step("other", 0)).await?));
    broken.remove().await?;
    seen.push(json!(pod.output(step("broken", 1)).await?));
    // One that fails, and is removed before the next attempt.
    for attempt in 0..3 {
        let text = format!(
            "[ -e /mark ] || echo a new root; touch /mark; tail -n 1 /work/steps; echo attempt {attempt} >>/work/steps; exit 3"
        );
        let container = pod.start(named("worker", attempt, script(&text))).await?;
        let end = end(&container).await?;
        container.remove().await?;
        // Its log is there for who asks why.
        seen.push(json!([end, container.log()?]));
    }
    let steps = std::fs::read_to_string(dir.join("steps"))?;
    pod.remove().await?;
    Ok(json!({ "seen": seen, "steps": steps }))
}

/// The end of a container's first process ends the others.
pub async fn first_process(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let container = pod
        .start(script(
            "(trap '' TERM HUP; sleep 1000) & (sleep 1000 &) ; sleep 1; echo reaped; exit 9",
        ))
        .await?;
    let end = end(&container).await?;
    let log = container.log()?;
    container.remove().await?;
    // Orphans go to it.
    let orphan = pod
        .output(script(
            "sh -c 'sleep 0.5 & exec true'; sleep 1; ps -o stat= -C sleep | cut -c1 | sort | xargs",
        ))
        .await?;
    Ok(json!({ "end": end, "log": log, "orphan": orphan }))
}

/// A terminal for the first process.
pub async fn terminal(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let mut config = script(
        "tty; test -t 0 && test -t 1 && test -t 2 && echo all; echo error >&2; stty -a | grep -o -E -- '-?(onlcr|isig|echo) '; stat -c '%a %G' $(tty)",
    );
    config.tty = true;
    Ok(json!(pod.output(config).await?))
}

/// Paused and resumed by containerd's own clients (`ctr task pause`), for CRI knows nothing of it; and killed while paused.
pub async fn paused(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let container = pod
        .start(script("i=0; while :; do i=$((i + 1)); echo $i; sleep 0.1; done"))
        .await?;
    let mut tasks = TasksClient::new(runtime.containerd());
    let container_id = container.id.clone();
    let pause = PauseTaskRequest {
        container_id: container_id.clone(),
    };
    let resume = ResumeTaskRequest { container_id };
    let mut seen = serde_json::Map::new();
    for turn in ["first", "second"] {
        goes_on(&container).await?;
        let running = task_status(&container).await?;
        let paused = code(tasks.pause(k8s(pause.clone())).await);
        let status = task_status(&container).await?;
        let in_cri = container.status().await?.state().as_str_name();
        stands_still(&container).await?;
        let resumed = code(tasks.resume(k8s(resume.clone())).await);
        let after = task_status(&container).await?;
        seen.insert(
            turn.to_owned(),
            json!([running, paused, status, in_cri, resumed, after]),
        );
    }
    goes_on(&container).await?;
    // Not paused twice, nor resumed without having been.
    let again = [
        tasks.resume(k8s(resume.clone())).await.is_ok(),
        tasks.pause(k8s(pause.clone())).await.is_ok(),
        tasks.pause(k8s(pause.clone())).await.is_ok(),
    ];
    container.stop(0).await?;
    let said = container.log()?.stdout;
    let is_whole = said
        .lines()
        .zip(1..)
        .all(|(line, number)| line == number.to_string());
    ensure(is_whole, format_args!("lines are missing: {said}"))?;
    seen.insert("again".into(), json!(again));
    seen.insert("killed".into(), end(&container).await?);
    container.remove().await?;
    Ok(seen.into())
}

/// What containerd's task service says of one.
async fn task_status(container: &Container) -> Outcome<&'static str> {
    let mut tasks = TasksClient::new(container.pod.runtime.containerd());
    // It gives the runtime two seconds to say so, which can be too few on an emulated node.
    eventually("the status of a task", async || {
        let request = GetRequest {
            container_id: container.id.clone(),
            ..Default::default()
        };
        let answer = tasks.get(k8s(request)).await?.into_inner();
        let status = answer.process.unwrap_or_default().status();
        Ok((status != Status::Unknown).then_some(status.as_str_name()))
    })
    .await
}

/// Waits until it has said more.
async fn goes_on(container: &Container) -> Outcome {
    let before = container.log_lines()?.len();
    eventually("a line more", async || {
        Ok((container.log_lines()?.len() > before).then_some(()))
    })
    .await
}

/// Waits until it says nothing more: what it said may still have been on the way.
async fn stands_still(container: &Container) -> Outcome {
    eventually("the last line", async || {
        let before = container.log_lines()?.len();
        tokio::time::sleep(Duration::from_secs(2)).await;
        Ok((container.log_lines()?.len() == before).then_some(()))
    })
    .await
}

/// Stopped and removed by force while they run, and while they are in their grace.
pub async fn removed_while_running(runtime: &Runtime) -> Outcome<Value> {
    let pod = Pod::run(runtime, Pod::config(runtime)).await?;
    let dir = runtime.folder("beat")?;
    let deaf = async || -> Outcome<Container> {
        let mut config =
            script("trap '' TERM; while :; do echo beat >>/work/beat; echo ready; sleep 0.1; done");
        config.mounts = vec![mount(&dir, "/work")];
        let container = pod.start(config).await?;
        container.says("ready").await?;
        Ok(container)
    };
    let beats = || std::fs::metadata(dir.join("beat")).map(|file| file.len());
    let soon = || tokio::time::sleep(Duration::from_secs(1));
    let mut seen = serde_json::Map::new();

    let removed = deaf().await?;
    let code_of_removal = code(removed.remove().await);
    let last = beats()?;
    soon().await;
    seen.insert(
        "removed".into(),
        json!([code_of_removal, code(removed.status().await), beats()? == last]),
    );
    // What it does on SIGTERM takes longer than it may, or not.
    for (what, seconds, grace) in [("too slow", 600, 1), ("in time", 1, 300)] {
        let text = format!("trap 'sleep {seconds}; exit 7' TERM; echo ready; while :; do sleep 0.1; done");
        let container = pod.start(script(&text)).await?;
        container.says("ready").await?;
        container.stop(grace).await?;
        seen.insert(what.to_owned(), end(&container).await?);
    }
    // Whoever is in haste does not wait for one who is not.
    let container = deaf().await?;
    let (slow, fast) = join(container.stop(300), async {
        soon().await;
        container.stop(0).await
    })
    .await;
    seen.insert(
        "in haste".into(),
        json!([code(slow), code(fast), end(&container).await?]),
    );
    let container = deaf().await?;
    let (slow, removed) = join(container.stop(300), async {
        soon().await;
        container.remove().await
    })
    .await;
    // The first may find it gone.
    ensure(
        slow.is_ok() || code(slow.clone()) == "NotFound",
        format_args!("{slow:?}"),
    )?;
    seen.insert(
        "removed in its grace".into(),
        json!([code(removed), code(container.status().await)]),
    );
    let container = deaf().await?;
    let (slow, stopped) = join(container.stop(300), async {
        soon().await;
        pod.stop().await
    })
    .await;
    stopped?;
    let last = beats()?;
    soon().await;
    seen.insert(
        "pod stopped in its grace".into(),
        json!([code(slow), end(&container).await?, beats()? == last]),
    );
    pod.remove().await?;
    Ok(seen.into())
}
