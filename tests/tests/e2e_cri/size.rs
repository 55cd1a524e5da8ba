// SPDX-License-Identifier: Apache-2.0
//! In-place resize: what a container can use follows its limits, up and down. With Cloister that takes a VM which grows and
//! shrinks; with runc the node is always large enough.

use cloister_protocol::protobuf::Message as _;
use cloister_sandbox_api::daemon::uds;
use cloister_tests::cri::{Container, Outcome, Pod, Runtime, api, args, ensure, eventually, k8s};
use containerd_client::services::v1::sandbox::controller_client::ControllerClient;
use containerd_client::services::v1::sandbox::{ControllerMetricsRequest, ControllerUpdateRequest};
use serde_json::{Value, json};

const MIB: i64 = 1 << 20;

fn limits(mib: i64, quota: i64) -> api::LinuxContainerResources {
    api::LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: quota,
        memory_limit_in_bytes: mib * MIB,
        ..Default::default()
    }
}

/// Processors and MiB of memory that a container sees.
async fn machine(container: &Container) -> Outcome<(u32, u64)> {
    let text = "nproc; awk '/^MemTotal/ { print int($2 / 1024) }' /proc/meminfo";
    let output = container.exec_script(text).await?.good()?;
    let mut lines = output.lines();
    let mut next = || lines.next().unwrap_or_default().to_owned();
    Ok((next().parse()?, next().parse()?))
}

/// So many MiB, kept in memory; how many bytes come out of it.
async fn fills(container: &Container, mib: i64) -> Outcome<String> {
    let text = format!("head -c {mib}M /dev/zero | tail -c {mib}M | wc -c");
    Ok(container.exec_script(&text).await?.stdout)
}

/// Waits until the VM is as small as it was, but for what the guest cannot let go of at once.
async fn shrinks(container: &Container, to: (u32, u64)) -> Outcome {
    eventually("a smaller VM", async || {
        let (cpus, mib) = machine(container).await?;
        Ok((cpus == to.0 && mib < to.1 + 130).then_some(()))
    })
    .await
}

/// A container's limits are raised and lowered while it runs.
pub async fn follows_containers(runtime: &Runtime) -> Outcome<Value> {
    let pod = Pod::run(runtime, Pod::config(runtime)).await?;
    let mut config = args(&["sleep", "infinity"]);
    config.linux.get_or_insert_default().resources = Some(limits(64, 50_000));
    let container = pod.start(config).await?;
    let is_vm = runtime.is_vm();
    let small = machine(&container).await?;
    let update = async |mib, quota| {
        let request = api::UpdateContainerResourcesRequest {
            container_id: container.id.clone(),
            linux: Some(limits(mib, quota)),
            ..Default::default()
        };
        runtime.cri().update_container_resources(request).await
    };
    let cgroup = async || -> Outcome<String> {
        let text = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max";
        container.exec_script(text).await?.good()
    };
    update(400, 200_000).await?;
    let large = machine(&container).await?;
    ensure(
        !is_vm || (large.0 == 2 && large.1 > small.1 + 180),
        format_args!("{small:?} became {large:?}"),
    )?;
    let mut seen = vec![json!([cgroup().await?, fills(&container, 300).await?])];
    update(64, 50_000).await?;
    seen.push(json!(cgroup().await?));
    if is_vm {
        shrinks(&container, small).await?;
    }
    // And once more.
    update(400, 150_000).await?;
    let again = machine(&container).await?;
    ensure(
        !is_vm || (again.0 == large.0 && again.1 > small.1 + 180),
        format_args!("{again:?}"),
    )?;
    seen.push(json!([cgroup().await?, fills(&container, 300).await?]));
    // A second container is room of its own.
    let mut config = args(&["sleep", "infinity"]);
    config.linux.get_or_insert_default().resources = Some(limits(300, 50_000));
    let second = pod.start(config).await?;
    let both = machine(&second).await?;
    ensure(
        !is_vm || both.1 > again.1 + 280,
        format_args!("{again:?} became {both:?}"),
    )?;
    seen.push(json!(fills(&second, 200).await?));
    second.stop(0).await?;
    second.remove().await?;
    if is_vm {
        shrinks(&container, again).await?;
        let refused = update(1 << 40, 0).await;
        ensure(refused.is_err(), "a VM of an exbibyte")?;
        ensure(cgroup().await?.starts_with("419430400\n"), cgroup().await?)?;
    }
    pod.remove().await?;
    Ok(json!(seen))
}

/// A pod's promise is changed as a whole, as containerd 2.3 tells its sandboxers; and what it is told of the pod's use.
/// Nothing of this reaches runc's pods.
pub async fn follows_the_pod(runtime: &Runtime) -> Outcome<Value> {
    let pod = Pod::run(runtime, Pod::config(runtime)).await?;
    let container = pod.start(args(&["sleep", "infinity"])).await?;
    if runtime.is_vm() {
        let mut controller = ControllerClient::new(uds::channel(&runtime.sandboxer()).await?);
        let small = machine(&container).await?;
        for (mib, quota) in [(500_i64, 200_000), (64, 50_000)] {
            let updated = json!({"Overhead": null, "Resources":
                {"cpu_period": 100_000, "cpu_quota": quota, "memory_limit_in_bytes": mib * MIB}});
            let extension = prost_types::Any {
                type_url: "io.containerd.cri.v1/UpdatedResources".into(),
                value: serde_json::to_vec(&updated)?,
            };
            let sandbox = containerd_client::types::Sandbox {
                sandbox_id: pod.id.clone(),
                extensions: [("updated-resources".to_owned(), extension)].into(),
                ..Default::default()
            };
            let request = ControllerUpdateRequest {
                sandbox_id: pod.id.clone(),
                sandbox: Some(sandbox),
                fields: vec!["extensions".into()],
                ..Default::default()
            };
            controller.update(k8s(request)).await?;
            if mib > 256 {
                let large = machine(&container).await?;
                ensure(
                    large.0 == 2 && large.1 > small.1 + 280,
                    format_args!("{small:?} became {large:?}"),
                )?;
            } else {
                shrinks(&container, small).await?;
            }
        }
        let request = ControllerMetricsRequest {
            sandbox_id: pod.id.clone(),
            ..Default::default()
        };
        let metrics = controller.metrics(k8s(request)).await?.into_inner().metrics;
        let data = metrics.and_then(|metrics| metrics.data).unwrap_or_default();
        ensure(
            data.type_url == "io.containerd.cgroups.v2.Metrics",
            &data.type_url,
        )?;
        let usage = cloister_protocol::task::Metrics::parse_from_bytes(&data.value)?;
        let memory = &usage.memory;
        let sound = usage.pids.current == 1
            && usage.cpu.usage_usec > 1000
            && memory.usage > 8 << 20
            && memory.usage_limit == 256 << 20
            && memory.anon > 0;
        ensure(sound, format_args!("{usage:?}"))?;
        // Requests without limits: two processors, and more than the default memory.
        let mut config = Pod::config(runtime);
        config.linux.get_or_insert_default().resources = Some(api::LinuxContainerResources {
            cpu_shares: 2048,
            unified: [("memory.min".to_owned(), (400 * MIB).to_string())].into(),
            ..Default::default()
        });
        let requesting = Pod::run(runtime, config).await?;
        let asked = machine(&requesting.start(args(&["sleep", "infinity"])).await?).await?;
        ensure(
            asked.0 == 2 && asked.1 > small.1 + 150,
            format_args!("{small:?}, with requests {asked:?}"),
        )?;
        requesting.remove().await?;
    }
    pod.remove().await?;
    Ok(Value::Null)
}
