// SPDX-License-Identifier: Apache-2.0
//! What is told of the use of resources.

use cloister_tests::cri::{Outcome, Pod, Runtime, api, ensure, eventually, script};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

fn value(field: Option<&api::UInt64Value>) -> u64 {
    field.map_or(0, |field| field.value)
}

/// Of a container that has used some of everything.
pub async fn of_a_container(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let mut config = script(
        "head -c 5000000 /dev/urandom >/written; head -c 20000000 /dev/zero >/dev/shm/kept; sync; i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done; echo ready; sleep infinity",
    );
    config.labels.insert("e2e/stats".into(), runtime.handler().into());
    config.annotations.insert("e2e/annotation".into(), "kept".into());
    let container = pod.start(config).await?;
    container.says("ready").await?;
    let stats = eventually("the writable layer", async || {
        let stats = container.stats().await?;
        let layer = stats.writable_layer.as_ref();
        Ok(layer
            .filter(|layer| value(layer.used_bytes.as_ref()) > 4 * MIB)
            .map(|_| stats.clone()))
    })
    .await?;
    let attributes = stats.attributes.clone().unwrap_or_default();
    ensure(
        attributes.id == container.id && attributes.metadata == container.config.metadata,
        format_args!("{stats:?}"),
    )?;
    ensure(
        attributes.labels == container.config.labels
            && attributes.annotations == container.config.annotations,
        format_args!("{stats:?}"),
    )?;
    let (cpu, memory) = (stats.cpu.unwrap_or_default(), stats.memory.unwrap_or_default());
    let layer = stats.writable_layer.clone().unwrap_or_default();
    let usage = value(cpu.usage_core_nano_seconds.as_ref());
    container
        .exec_script("i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done")
        .await?;
    let later = value(
        container
            .stats()
            .await?
            .cpu
            .unwrap_or_default()
            .usage_core_nano_seconds
            .as_ref(),
    );
    let request = api::ListContainerStatsRequest {
        filter: Some(api::ContainerStatsFilter {
            pod_sandbox_id: pod.id.clone(),
            label_selector: [("e2e/stats".to_owned(), runtime.handler().to_owned())].into(),
            ..Default::default()
        }),
    };
    let listed = runtime
        .cri()
        .list_container_stats(request)
        .await?
        .into_inner()
        .stats;
    ensure(
        listed.len() == 1 && listed[0].attributes == stats.attributes,
        format_args!("{listed:?}"),
    )?;
    container.stop(0).await?;
    container.remove().await?;
    Ok(json!({
        "cpu": [cpu.timestamp > 0, usage > 1_000_000, later > usage],
        // What lies in shared memory counts.
        "memory": [memory.timestamp > 0, value(memory.usage_bytes.as_ref()) > 15 * MIB, value(memory.usage_bytes.as_ref()) < 100 * MIB,
            value(memory.working_set_bytes.as_ref()) > 10 * MIB, value(memory.rss_bytes.as_ref()) > 0, value(memory.page_faults.as_ref()) > 0],
        "writable layer": [layer.timestamp > 0, value(layer.inodes_used.as_ref()) > 0, layer.fs_id.is_some()],
    }))
}

/// Which containers and pods a list has, and of which containers it tells what they use.
pub async fn listed(runtime: &Runtime) -> Outcome<Value> {
    let pod = Pod::run(runtime, Pod::config(runtime)).await?;
    let mut ids = Vec::new();
    for name in ["first", "second", "ended", "created"] {
        let mut config = script(if name == "ended" {
            "exit 0"
        } else {
            "sleep infinity"
        });
        config.metadata = Some(api::ContainerMetadata {
            name: name.into(),
            attempt: 0,
        });
        let container = pod.create(config).await?;
        if name != "created" {
            container.start().await?;
        }
        if name == "ended" {
            container.ended().await?;
        }
        ids.push(container.id);
    }
    let containers = async |id: &str, pod: &str| -> Outcome<Vec<(String, bool)>> {
        let request = api::ListContainerStatsRequest {
            filter: Some(api::ContainerStatsFilter {
                id: id.into(),
                pod_sandbox_id: pod.into(),
                ..Default::default()
            }),
        };
        let stats = runtime
            .cri()
            .list_container_stats(request)
            .await?
            .into_inner()
            .stats;
        let named =
            |stats: api::ContainerStats| Some((stats.attributes?.metadata?.name, stats.cpu.is_some()));
        let mut names: Vec<_> = stats.into_iter().filter_map(named).collect();
        names.sort();
        Ok(names)
    };
    let request = api::ListPodSandboxStatsRequest {
        filter: Some(api::PodSandboxStatsFilter {
            id: pod.id.clone(),
            ..Default::default()
        }),
    };
    let pods = runtime
        .cri()
        .list_pod_sandbox_stats(request)
        .await?
        .into_inner()
        .stats;
    let pods: Vec<_> = pods
        .into_iter()
        .map(|stats| stats.attributes.unwrap_or_default().id == pod.id)
        .collect();
    let mut seen = json!({
        "of the pod": containers("", &pod.id).await?,
        "by id": containers(&ids[0], "").await?,
        "by both": containers(&ids[1], &pod.id).await?,
        "of another pod": containers(&ids[0], &runtime.shared().await?.pod.id).await?,
        "ended": containers(&ids[2], "").await?,
        "unknown": containers("nothing", "").await?,
        "pods": pods,
    });
    pod.stop().await?;
    seen["once stopped"] = json!(containers("", &pod.id).await?);
    pod.remove().await?;
    Ok(seen)
}

/// Of a pod, with its network.
pub async fn of_a_pod(runtime: &Runtime) -> Outcome<Value> {
    let mut config = Pod::config(runtime);
    config.labels.insert("e2e/stats".into(), runtime.name("label"));
    config.annotations.insert("e2e/annotation".into(), "kept".into());
    let pod = Pod::run(runtime, config).await?;
    let container = pod.start(script("head -c 20000000 /dev/zero >/dev/shm/kept; i=0; while [ $i -lt 30000 ]; do i=$((i + 1)); done; \
        socat TCP-LISTEN:8500,fork,reuseaddr SYSTEM:'head -c 200000 /dev/zero' & until ss -Hltn | grep -q 8500; do sleep 0.1; done; echo ready; wait")).await?;
    container.says("ready").await?;
    let address = format!("{}:8500", pod.address().await?);
    let received = std::io::copy(&mut std::net::TcpStream::connect(address)?, &mut std::io::sink())?;
    let request = api::PodSandboxStatsRequest {
        pod_sandbox_id: pod.id.clone(),
    };
    let stats = runtime
        .cri()
        .pod_sandbox_stats(request)
        .await?
        .into_inner()
        .stats
        .ok_or("no statistics")?;
    let attributes = stats.attributes.clone().unwrap_or_default();
    ensure(
        attributes.id == pod.id && attributes.metadata == pod.config.metadata,
        format_args!("{stats:?}"),
    )?;
    ensure(
        attributes.labels == pod.config.labels && attributes.annotations == pod.config.annotations,
        format_args!("{stats:?}"),
    )?;
    let linux = stats.linux.clone().unwrap_or_default();
    let (cpu, memory) = (linux.cpu.unwrap_or_default(), linux.memory.unwrap_or_default());
    let network = linux
        .network
        .clone()
        .unwrap_or_default()
        .default_interface
        .unwrap_or_default();
    let request = api::ListPodSandboxStatsRequest {
        filter: Some(api::PodSandboxStatsFilter {
            label_selector: pod.config.labels.clone(),
            ..Default::default()
        }),
    };
    let listed = runtime
        .cri()
        .list_pod_sandbox_stats(request)
        .await?
        .into_inner()
        .stats;
    ensure(
        listed.len() == 1 && listed[0].attributes == stats.attributes,
        format_args!("{listed:?}"),
    )?;
    pod.remove().await?;
    Ok(json!({
        "received": received,
        "cpu": [cpu.timestamp > 0, value(cpu.usage_core_nano_seconds.as_ref()) > 1_000_000],
        "memory": [value(memory.usage_bytes.as_ref()) > 15 * MIB, value(memory.working_set_bytes.as_ref()) > 10 * MIB],
        "network": [&network.name, &(value(network.rx_bytes.as_ref()) > 1000).to_string(), &(value(network.tx_bytes.as_ref()) > 200_000).to_string()],
        "processes": linux.process.is_some_and(|process| value(process.process_count.as_ref()) > 0),
        "containers": linux.containers.len(),
    }))
}
