// SPDX-License-Identifier: Apache-2.0
//! The files that a pod gives its containers: hosts, hostname, resolv.conf, shared memory.

use cloister_tests::cri::{Outcome, Pod, Runtime, api, script};
use serde_json::{Value, json};

/// DNS and the names of the pod.
pub async fn names(runtime: &Runtime) -> Outcome<Value> {
    let mut config = Pod::config(runtime);
    config.hostname = "a-name".into();
    let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
    config.dns_config = Some(api::DnsConfig {
        servers: words(&["10.0.0.10", "fd00::10"]),
        searches: words(&["e2e.svc.cluster.local", "cluster.local"]),
        options: words(&["ndots:5", "edns0"]),
    });
    let pod = Pod::run(runtime, config).await?;
    let text = "cat /etc/resolv.conf; hostname; cat /etc/hostname; echo $HOSTNAME; getent hosts localhost | awk '{ print $2 }'; \
        stat -c '%n %a %u:%g' /etc/resolv.conf /etc/hostname /etc/hosts; echo '# ours' >>/etc/hosts && echo written; \
        cat /proc/sys/kernel/hostname; uname -n";
    let first = pod.output(script(text)).await?;
    // Shared by the containers.
    let second = pod
        .output(script("tail -n 1 /etc/hosts; cat /etc/hostname"))
        .await?;
    pod.remove().await?;
    Ok(json!({ "first": first.good()?.lines().collect::<Vec<_>>(), "second": second }))
}

/// Without any DNS configuration, the node's.
pub async fn nodes_dns(runtime: &Runtime) -> Outcome<Value> {
    let shared = runtime.shared().await?;
    let output = shared.exec(&["cat", "/etc/resolv.conf"]).await?.good()?;
    Ok(json!(output == std::fs::read_to_string("/etc/resolv.conf")?))
}

/// /dev/shm and /dev/mqueue: what is the pod's.
pub async fn shared_memory(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let first = pod.start(script("echo shared >/dev/shm/file; df -k --output=fstype,size /dev/shm | tail -n 1; stat -c '%a' /dev/shm; ipcmk -M 1000 >/dev/null; echo ready; sleep infinity")).await?;
    first.says("ready").await?;
    let second = pod
        .output(script(
            "cat /dev/shm/file; ipcs -m | grep -c ' 1000 '; rm /dev/shm/file",
        ))
        .await?;
    let seen = json!({ "first": first.log()?, "second": second });
    first.stop(0).await?;
    first.remove().await?;
    Ok(seen)
}
