// SPDX-License-Identifier: Apache-2.0
//! Commands run in a container to their end.

use cloister_tests::cri::{Outcome, Runtime, args, code, security};
use futures_util::future::join;
use serde_json::{Value, json};

/// What it says and how it ends.
pub async fn output(runtime: &Runtime) -> Outcome<Value> {
    let shared = runtime.shared().await?;
    let large = shared
        .exec_script("head -c 3000000 /dev/zero | tr '\\0' x; echo; echo err >&2")
        .await?;
    Ok(json!({
        "both": shared.exec_script("echo out; echo err >&2; exit 3").await?,
        "nothing": shared.exec(&["true"]).await?,
        "signal": shared.exec_script("kill -9 $$").await?.code,
        "large": [large.stdout.len(), large.stderr.len()],
        "stdin": shared.exec(&["cat"]).await?,
        "no program": code(shared.exec(&["/no/such/program"]).await),
        "not a program": code(shared.exec(&["/etc/passwd"]).await),
        "empty": code(shared.exec(&[]).await),
    }))
}

/// It is as the container's first process is.
pub async fn process(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let mut config = args(&["sleep", "infinity"]);
    config.working_dir = "/tmp".into();
    config.envs = [cloister_tests::cri::api::KeyValue {
        key: "ONE".into(),
        value: "two words".into(),
    }]
    .into();
    let security = security(&mut config);
    security.run_as_user = Some(cloister_tests::cri::api::Int64Value { value: 1000 });
    security.supplemental_groups = vec![2000];
    let container = pod.start(config).await?;
    let text = "pwd; echo \"$ONE\"; id -u; id -g; id -G; grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status; cat /proc/self/oom_score_adj; \
        readlink /proc/self/ns/pid | sed s/[0-9]/x/g; [ $(readlink /proc/self/ns/mnt) = $(readlink /proc/1/ns/mnt) ] && echo same mounts; \
        cat /proc/self/cgroup; ps -o pid=,comm= | awk '{ print $2 }' | sort | xargs; env | cut -d= -f1 | sort | xargs";
    let seen = container.exec_script(text).await?;
    container.stop(0).await?;
    container.remove().await?;
    Ok(json!(seen.good()?.lines().collect::<Vec<_>>()))
}

/// It is ended by a signal: its own, one that another process sends, one that its child gets.
pub async fn signals(runtime: &Runtime) -> Outcome<Value> {
    let shared = runtime.shared().await?;
    let mut seen = serde_json::Map::new();
    for signal in ["HUP", "INT", "ABRT", "KILL", "SEGV", "TERM", "USR1"] {
        let output = shared
            .exec_script(&format!("kill -{signal} $$; echo goes on"))
            .await?;
        seen.insert(signal.to_owned(), json!(output));
    }
    for (number, signal) in [(4323, "TERM"), (4324, "KILL")] {
        let sleep = format!("sleep {number}");
        // Not before it is there.
        let kill = format!("until pkill -{signal} -f -x '{sleep}'; do sleep 0.1; done");
        let (target, sender) = join(
            shared.exec(&["sleep", &number.to_string()]),
            shared.exec_script(&kill),
        )
        .await;
        seen.insert(format!("{signal} of another"), json!([target?, sender?]));
    }
    let handled = shared
        .exec_script("trap 'echo handled; exit 7' TERM; kill -TERM $$; sleep 1; echo goes on")
        .await?;
    let child = shared
        .exec_script("sh -c 'kill -KILL $$'; echo child $?; exec sh -c 'kill -TERM $$'")
        .await?;
    seen.insert("handled".into(), json!(handled));
    // A shell may say so on stderr, in its own words.
    seen.insert("child".into(), json!([child.code, child.stdout]));
    Ok(seen.into())
}

/// It is ended when its time is up, and the container lives on.
pub async fn timeout(runtime: &Runtime) -> Outcome<Value> {
    let shared = runtime.shared().await?;
    let answer = code(shared.exec_within(&["sleep", "4321"], 1).await);
    let rest = shared
        .exec_script("sleep 0.5; pgrep -f 'sleep 432[1]' || echo gone")
        .await?;
    let in_time = shared.exec_within(&["echo", "in time"], 60).await?;
    Ok(json!({ "answer": answer, "rest": rest.stdout, "in time": in_time }))
}

/// A child of it that goes on does not hold it up for ever.
pub async fn orphan(runtime: &Runtime) -> Outcome<Value> {
    let shared = runtime.shared().await?;
    let silent = shared
        .exec_script("(sleep 4322 </dev/null >/dev/null 2>&1 &); echo left")
        .await?;
    let child = shared
        .exec_script("pgrep -f 'sleep 432[2]' >/dev/null && echo goes on; pkill -f 'sleep 432[2]'")
        .await?;
    Ok(json!({ "silent": silent, "child": child }))
}

/// Many at once, each with its own output.
pub async fn at_once(runtime: &Runtime) -> Outcome<Value> {
    let shared = runtime.shared().await?;
    let numbers: Vec<String> = (0..12).map(|number| number.to_string()).collect();
    let execs = numbers
        .iter()
        .map(async |number| shared.exec(&["echo", number]).await);
    let mut outputs = Vec::new();
    for output in futures_util::future::join_all(execs).await {
        outputs.push(output?.good()?);
    }
    Ok(json!(outputs))
}
