// SPDX-License-Identifier: Apache-2.0
//! Namespaces that containers have to themselves, share in the pod, or would share with the node.

use cloister_tests::cri::{Outcome, Pod, Runtime, api, args, script, security};
use serde_json::{Value, json};

fn pod_config(runtime: &Runtime, change: impl FnOnce(&mut api::NamespaceOption)) -> api::PodSandboxConfig {
    let mut config = Pod::config(runtime);
    let linux = config.linux.get_or_insert_default();
    let context = linux.security_context.get_or_insert_default();
    let options = context.namespace_options.get_or_insert_default();
    change(options);
    if options.network() == api::NamespaceMode::Node {
        // The node's own.
        config.hostname.clear();
    }
    config
}

fn with(
    mut config: api::ContainerConfig,
    change: impl FnOnce(&mut api::NamespaceOption),
) -> api::ContainerConfig {
    change(security(&mut config).namespace_options.get_or_insert_default());
    config
}

/// Processes: each container's own, and those of another one for a debugger.
pub async fn processes(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let first = pod.start(args(&["sleep", "4001"])).await?;
    let text = "ps -o pid=,args= | awk '{ print $1, $2 }' | grep -v -e ps -e awk -e grep; pgrep -fx 'sleep 4001' | xargs";
    let own = pod.output(script(text)).await?;
    let target = with(
        script(
            "pgrep -fx 'sleep 4001' | xargs; echo $(($$ > 1)); tr '\\0' ' ' </proc/1/cmdline; ls /proc/1/root/etc/image-file; kill -KILL 1 && sleep 1",
        ),
        |options| {
            options.pid = api::NamespaceMode::Target.into();
            options.target_id = first.id.clone();
        },
    );
    let target = pod.output(target).await?;
    let status = first.status().await?;
    first.stop(0).await?;
    first.remove().await?;
    Ok(json!({ "own": own, "target": target, "target's": status.state().as_str_name() }))
}

/// One process namespace for the pod.
pub async fn shared_processes(runtime: &Runtime) -> Outcome<Value> {
    let share = |options: &mut api::NamespaceOption| options.pid = api::NamespaceMode::Pod.into();
    let pod = Pod::run(runtime, pod_config(runtime, share)).await?;
    let first = pod
        .start(with(
            script("trap 'echo told; exit 3' USR1; echo ready; sleep 4002 & wait"),
            share,
        ))
        .await?;
    first.says("ready").await?;
    let second = with(
        script(
            "echo $(($$ > 1)); pgrep -f 'sleep 400[2]' | wc -l; pkill -USR1 -f '^sh -c trap' && echo sent; cat /proc/1/comm",
        ),
        share,
    );
    let second = pod.output(second).await?;
    let code = first.ended().await?.exit_code;
    let log = first.log()?;
    // What ends does not take the others with it.
    let third = pod
        .output(with(script("sleep 4003 >/dev/null 2>&1 & echo left"), share))
        .await?;
    let fourth = pod
        .output(with(script("pgrep -f 'sleep 400[3]' | wc -l"), share))
        .await?;
    let status = pod.status().await?;
    pod.remove().await?;
    Ok(
        json!({ "second": second, "first": [&log.stdout, &code.to_string()], "third": third, "fourth": fourth, "state": status.state().as_str_name(), "linux": status.linux }),
    )
}

/// Which of the namespaces two containers of a pod have in common.
pub async fn in_common(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let names = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];
    let text = "for name in cgroup ipc mnt net pid time user uts; do readlink /proc/self/ns/$name; done";
    let (one, two) = (
        pod.output(script(text)).await?.good()?,
        pod.output(script(text)).await?.good()?,
    );
    let mut seen = serde_json::Map::new();
    for (name, (one, two)) in names.iter().zip(one.lines().zip(two.lines())) {
        seen.insert((*name).to_owned(), json!(one == two));
    }
    // A container that ended may leave its number to the next one.
    for name in ["cgroup", "mnt", "pid"] {
        seen.remove(name);
    }
    Ok(seen.into())
}

/// The node's: what a pod in a VM cannot have.
pub async fn of_the_node(runtime: &Runtime) -> Outcome<Value> {
    let node = api::NamespaceMode::Node.into();
    type Change = fn(&mut api::NamespaceOption, i32);
    let changes: [(&str, Change); 3] = [
        ("network", |options, node| options.network = node),
        ("processes", |options, node| options.pid = node),
        ("ipc", |options, node| options.ipc = node),
    ];
    let mut seen = serde_json::Map::new();
    for (name, change) in changes {
        let value = match Pod::run(runtime, pod_config(runtime, |options| change(options, node))).await {
            Err(error) => {
                // Whoever reads it must see why.
                let said = error.to_string();
                json!(if said.contains("host") || said.contains("node") {
                    "refused"
                } else {
                    &said
                })
            }
            Ok(pod) => {
                let output = pod
                    .output(with(args(&["true"]), |options| change(options, node)))
                    .await;
                pod.remove().await?;
                json!(output.is_ok_and(|output| output.code == 0))
            }
        };
        seen.insert(name.to_owned(), value);
    }
    Ok(seen.into())
}
