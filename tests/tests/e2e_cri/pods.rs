// SPDX-License-Identifier: Apache-2.0
//! The life of pods.

use crate::mounts::mount;
use cloister_tests::cri::{Outcome, Pod, Runtime, api, args, code, ensure, eventually, script};
use serde_json::{Value, json};
use std::sync::{Arc, Mutex};
use tokio::task::JoinHandle;

async fn listed(runtime: &Runtime, filter: api::PodSandboxFilter) -> Outcome<Vec<String>> {
    let request = api::ListPodSandboxRequest { filter: Some(filter) };
    let pods = runtime.cri().list_pod_sandbox(request).await?.into_inner();
    Ok(pods.items.into_iter().map(|pod| pod.id).collect())
}

fn by_state(pod: &Pod, state: api::PodSandboxState) -> api::PodSandboxFilter {
    api::PodSandboxFilter {
        id: pod.id.clone(),
        state: Some(api::PodSandboxStateValue { state: state.into() }),
        ..Default::default()
    }
}

async fn status_code(pod: &Pod) -> String {
    let request = api::PodSandboxStatusRequest {
        pod_sandbox_id: pod.id.clone(),
        verbose: false,
    };
    code(pod.runtime.cri().pod_sandbox_status(request).await)
}

/// From its run to its removal, each step twice.
pub async fn life(runtime: &Runtime) -> Outcome<Value> {
    let mut config = Pod::config(runtime);
    let labels = [("e2e/label".to_owned(), runtime.name("label"))];
    config.labels.extend(labels.clone());
    config.annotations.insert("e2e/annotation".into(), "kept".into());
    let pod = Pod::run(runtime, config).await?;

    let status = pod.status().await?;
    let same = status.id == pod.id
        && status.metadata == pod.config.metadata
        && status.labels == pod.config.labels
        && status.annotations == pod.config.annotations
        && status.runtime_handler == runtime.handler()
        && status.created_at > 0;
    ensure(same, format_args!("{status:?}"))?;
    let network = status.network.clone().unwrap_or_default();
    let by_label = api::PodSandboxFilter {
        label_selector: labels.into(),
        ..Default::default()
    };
    ensure(
        listed(runtime, by_label.clone()).await? == [pod.id.as_str()],
        "listed by its label",
    )?;
    let ready = by_state(&pod, api::PodSandboxState::SandboxReady);
    ensure(
        listed(runtime, ready.clone()).await? == [pod.id.as_str()],
        "listed as ready",
    )?;
    let again = Pod::run(runtime, pod.config.clone()).await;
    ensure(again.is_err(), "a second pod of the same name")?;

    let output = pod.output(script("echo hello; echo oops >&2; exit 3")).await?;
    pod.stop().await?;
    let stopped = pod.status().await?;
    let late = pod.create(args(&["true"])).await.is_ok();
    pod.stop().await?;
    ensure(
        listed(runtime, ready).await?.is_empty(),
        "listed as ready once stopped",
    )?;
    let not_ready = by_state(&pod, api::PodSandboxState::SandboxNotready);
    ensure(
        listed(runtime, not_ready).await? == [pod.id.as_str()],
        "listed as not ready",
    )?;

    pod.remove().await?;
    let gone = status_code(&pod).await;
    pod.remove().await?;
    ensure(listed(runtime, by_label).await?.is_empty(), "listed once removed")?;
    // The name is free again.
    let successor = Pod::run(runtime, pod.config.clone()).await?;
    successor.remove().await?;
    Ok(json!({
        "state": status.state().as_str_name(),
        "linux": status.linux,
        "addresses": network.additional_ips.len() + usize::from(!network.ip.is_empty()),
        "output": output,
        "stopped": stopped.state().as_str_name(),
        "address kept": stopped.network.is_some_and(|network| !network.ip.is_empty()),
        "container in a stopped pod": late,
        "gone": gone,
    }))
}

/// What runs in a pod ends with it, be it stopped or removed.
pub async fn ends_its_containers(runtime: &Runtime) -> Outcome<Value> {
    let pod = Pod::run(runtime, Pod::config(runtime)).await?;
    let (deaf, other, created) = (
        pod.start(args(&["sleep", "infinity"])).await?,
        pod.start(script("trap 'exit 4' TERM; sleep infinity & wait"))
            .await?,
        pod.create(args(&["true"])).await?,
    );
    pod.stop().await?;
    let mut seen = Vec::new();
    for container in [&deaf, &other, &created] {
        let status = container.status().await?;
        seen.push(json!([
            status.state().as_str_name(),
            status.exit_code,
            status.reason
        ]));
    }
    pod.remove().await?;
    let mut gone = Vec::new();
    for container in [&deaf, &other, &created] {
        gone.push(code(container.status().await));
    }
    // One that still runs when it is removed.
    let pod = Pod::run(runtime, Pod::config(runtime)).await?;
    let container = pod.start(args(&["sleep", "infinity"])).await?;
    let request = api::RemovePodSandboxRequest {
        pod_sandbox_id: pod.id.clone(),
    };
    let removed = code(runtime.cri().remove_pod_sandbox(request).await);
    let after = (code(container.status().await), status_code(&pod).await);
    pod.remove().await?;
    Ok(json!({ "stopped": seen, "gone": gone, "removed": removed, "after": after }))
}

/// What is asked of pods that are not there.
pub async fn unknown(runtime: &Runtime) -> Outcome<Value> {
    let id = "0".repeat(64);
    let pod_sandbox_id = id.clone();
    let stop = api::StopPodSandboxRequest { pod_sandbox_id };
    let pod_sandbox_id = id.clone();
    let remove = api::RemovePodSandboxRequest { pod_sandbox_id };
    let create = api::CreateContainerRequest {
        pod_sandbox_id: id.clone(),
        config: Some(args(&["true"])),
        sandbox_config: Some(Pod::config(runtime)),
    };
    let config = Pod::config(runtime);
    let run = api::RunPodSandboxRequest {
        config: Some(config),
        runtime_handler: "nowhere".to_owned(),
    };
    let pod_sandbox_id = id.clone();
    let stats = api::PodSandboxStatsRequest { pod_sandbox_id };
    Ok(json!({
        "stop": code(runtime.cri().stop_pod_sandbox(stop).await),
        "remove": code(runtime.cri().remove_pod_sandbox(remove).await),
        "create": code(runtime.cri().create_container(create).await),
        "handler": code(runtime.cri().run_pod_sandbox(run).await),
        "stats": code(runtime.cri().pod_sandbox_stats(stats).await),
    }))
}

/// Sysctls of the pod; and those that containerd sets for all, so that nobody needs rights for low ports and ping.
pub async fn sysctls(runtime: &Runtime) -> Outcome<Value> {
    let mut config = Pod::config(runtime);
    let wanted = [
        ("kernel.shm_rmid_forced", "1"),
        ("kernel.msgmax", "16384"),
        ("net.ipv4.ip_local_port_range", "40000 40100"),
        ("net.ipv4.tcp_syncookies", "0"),
        ("fs.mqueue.msg_max", "17"),
    ];
    let sysctls = wanted.map(|(name, value)| (name.to_owned(), value.to_owned()));
    config.linux.get_or_insert_default().sysctls = sysctls.into();
    let pod = Pod::run(runtime, config).await?;
    let text = "cd /proc/sys; cat kernel/shm_rmid_forced kernel/msgmax net/ipv4/ip_local_port_range net/ipv4/tcp_syncookies \
        fs/mqueue/msg_max net/ipv4/ip_unprivileged_port_start net/ipv4/ping_group_range";
    let output = pod.output(script(text)).await?;
    pod.remove().await?;
    // One that is of the node.
    let mut config = Pod::config(runtime);
    config.linux.get_or_insert_default().sysctls = [("vm.swappiness".to_owned(), "1".to_owned())].into();
    let refused = match Pod::run(runtime, config).await {
        Err(_) => "refused",
        Ok(pod) => {
            pod.remove().await?;
            "taken"
        }
    };
    Ok(json!({ "output": output.good()?.lines().collect::<Vec<_>>(), "of the node": refused }))
}

/// Several at once.
pub async fn at_once(runtime: &Runtime) -> Outcome<Value> {
    let lives = (0..4).map(async |number| -> Outcome<String> {
        let pod = Pod::run(runtime, Pod::config(runtime)).await?;
        let output = pod
            .output(script(&format!("hostname >/dev/null; echo {number}")))
            .await?;
        pod.remove().await?;
        output.good()
    });
    let outputs = futures_util::future::join_all(lives).await;
    let outputs: Outcome<Vec<String>> = outputs.into_iter().collect();
    Ok(json!(outputs?))
}

/// What containerd tells as it happens, of all pods of the node.
struct Events {
    seen: Arc<Mutex<Vec<api::ContainerEventResponse>>>,
    reader: JoinHandle<Result<(), tonic::Status>>,
}

impl Events {
    async fn listen(runtime: &Runtime) -> Outcome<Self> {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (mut cri, all) = (runtime.cri(), Arc::clone(&seen));
        // Read all the time: who listens and does not read holds containerd up.
        let reader = tokio::spawn(async move {
            let answer = cri.get_container_events(api::GetEventsRequest {}).await?;
            let mut stream = answer.into_inner();
            while let Some(event) = stream.message().await? {
                all.lock().unwrap().push(event);
            }
            Ok(())
        });
        let events = Self { seen, reader };
        // The answer comes with the first event: nothing else says that containerd knows of us.
        let pod = &runtime.shared().await?.pod;
        eventually("a first event", async || {
            pod.create(args(&["true"])).await?.remove().await?;
            Ok((!events.so_far()?.is_empty()).then_some(()))
        })
        .await?;
        Ok(events)
    }

    fn so_far(&self) -> Outcome<Vec<api::ContainerEventResponse>> {
        ensure(!self.reader.is_finished(), "containerd tells no more events")?;
        Ok(self.seen.lock().unwrap().clone())
    }

    /// Waits until a container, or a pod by its own id, has come so far.
    async fn until(&self, id: &str, kind: api::ContainerEventType) -> Outcome {
        eventually(kind.as_str_name(), async || {
            let found = self
                .so_far()?
                .iter()
                .any(|event| event.container_id == id && event.container_event_type() == kind);
            Ok(found.then_some(()))
        })
        .await
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// The events of a pod's whole life, as a kubelet listens to them (`EventedPLEG`), with what they say of pod and containers.
pub async fn events(runtime: &Runtime) -> Outcome<Value> {
    use api::ContainerEventType::{ContainerDeletedEvent as Deleted, ContainerStoppedEvent as Stopped};
    let events = Events::listen(runtime).await?;
    let pod = Pod::run(runtime, Pod::config(runtime)).await?;
    let dir = runtime.folder("events")?;
    let start = async |name: &str, text: &str| {
        let mut config = script(text);
        config.mounts = vec![mount(&dir, "/work")];
        config.metadata = Some(api::ContainerMetadata {
            name: name.to_owned(),
            attempt: 0,
        });
        pod.start(config).await
    };
    let stopped = start("stopped", "trap 'exit 7' TERM; echo ready; sleep infinity & wait").await?;
    stopped.says("ready").await?;
    let ends = start("ends", "until [ -e /work/end ]; do sleep 0.1; done; exit 3").await?;
    std::fs::write(dir.join("end"), "")?;
    // Each step waits for the one before it: these events may come later than the answers.
    events.until(&ends.id, Stopped).await?;
    stopped.stop(300).await?;
    events.until(&stopped.id, Stopped).await?;
    stopped.remove().await?;
    pod.stop().await?;
    events.until(&pod.id, Stopped).await?;
    // With the container that is still there.
    pod.remove().await?;
    events.until(&pod.id, Deleted).await?;
    let mut seen = Vec::new();
    for event in events.so_far()? {
        let whose = [("pod", &pod.id), ("stopped", &stopped.id), ("ends", &ends.id)];
        let whose = whose.into_iter().find(|(_, id)| **id == event.container_id);
        let Some((whose, _)) = whose else { continue };
        let status = event.pod_sandbox_status.as_ref();
        ensure(
            event.created_at > 0 && status.is_none_or(|status| status.id == pod.id),
            format_args!("{event:?}"),
        )?;
        let mut containers: Vec<String> = event
            .containers_statuses
            .iter()
            .map(|status| {
                let name = status.metadata.as_ref().map_or("", |metadata| &metadata.name);
                format!(
                    "{name} {} {} {}",
                    status.state().as_str_name(),
                    status.exit_code,
                    status.reason
                )
            })
            .collect();
        containers.sort();
        let kind = event.container_event_type().as_str_name();
        let state = status.map(|status| status.state().as_str_name());
        seen.push(json!([whose, kind, state, containers]));
    }
    Ok(json!(seen))
}
