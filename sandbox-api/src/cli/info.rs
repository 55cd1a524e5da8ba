// SPDX-License-Identifier: Apache-2.0
//! `inspect`, `check`, `version`.

use super::{Context, Failure, Outcome, print, print_json};
use crate::clock;
use crate::host_check::{self, Verdict};
use crate::image::{Image, Store};
use crate::pod::state::{Network, Record, Status};
use serde_json::{Value, json};

pub fn inspect(context: &Context, names: &[String]) -> Outcome {
    let pods = context.pods()?;
    let store = context.store()?;
    let mut found = Vec::new();
    let mut missing = Vec::new();
    for name in names {
        if let Some(value) = super::pods::list::inspect(context, &pods, name)? {
            found.push(value);
            continue;
        }
        match pods.find(name) {
            Ok(record) => found.push(container(&record, pods.log(&record.id).display().to_string())),
            Err(crate::pod::state::Error::NotFound(_)) => match store.find(name) {
                Ok(image) => found.push(image_value(&store, &image)?),
                Err(_) => missing.push(format!("No such object: {name}")),
            },
            Err(error) => return Err(error.into()),
        }
    }
    print_json(&found)?;
    if missing.is_empty() {
        Ok(0)
    } else {
        Err(Failure::new(missing.join("\ncloister: ")))
    }
}

/// docker's names where docker has them.
fn container(record: &Record, log: String) -> Value {
    let plan = &record.plan;
    let time = |time: Option<clock::Millis>| time.map(clock::rfc3339);
    let mount = |volume: &crate::runtime::spec::Volume| json!({"Type": "bind", "Source": volume.source, "Destination": volume.target, "RW": !volume.read_only});
    let address = record.net.as_ref().map(|net| {
        let base = u32::from(net.subnet);
        let at = |offset: u32| std::net::Ipv4Addr::from(base.wrapping_add(offset)).to_string();
        json!({"IPAddress": at(2), "IPPrefixLen": 30, "Gateway": at(1), "HostInterface": net.tap})
    });
    let network = match &plan.network {
        Network::None => "none".to_owned(),
        Network::Nat => "nat".to_owned(),
        Network::Tap(name) => format!("tap={name}"),
    };
    json!({
        "Id": record.id,
        "Name": format!("/{}", record.name),
        "Created": clock::rfc3339(record.created),
        "Path": record.command.first(),
        "Args": record.command.get(1..).unwrap_or_default(),
        "State": {
            "Status": record.status,
            "Running": record.status == Status::Running,
            "Pid": record.pid.unwrap_or(0),
            "ExitCode": record.exit_code.unwrap_or(0),
            "Error": record.error.clone().unwrap_or_default(),
            "StartedAt": time(record.started),
            "FinishedAt": time(record.finished),
        },
        "Image": record.image_id.as_ref().map(ToString::to_string),
        "LogPath": log,
        "Mounts": plan.wishes.volumes.iter().map(mount).collect::<Vec<_>>(),
        "HostConfig": {
            "Memory": plan.memory,
            "NanoCpus": u64::from(plan.cpus).saturating_mul(1_000_000_000),
            "NetworkMode": network,
            "AutoRemove": plan.auto_remove,
            "ReadonlyRootfs": plan.wishes.read_only,
            "PortBindings": plan.publish,
        },
        "Config": {
            "Hostname": plan.hostname,
            "User": plan.wishes.user.clone().unwrap_or_default(),
            "Tty": plan.wishes.terminal,
            "OpenStdin": plan.interactive,
            "Env": plan.wishes.env,
            "WorkingDir": plan.wishes.workdir.clone().unwrap_or_default(),
            "Image": record.image,
            "Labels": plan.labels,
            "StopSignal": plan.stop_signal,
        },
        "NetworkSettings": address.unwrap_or_else(|| json!({})),
        "VirtualMachine": {"Kernel": plan.kernel, "Initrd": plan.initrd, "KernelArgs": plan.kernel_args, "Cpus": plan.cpus, "MemoryBytes": plan.memory},
    })
}

fn image_value(store: &Store, image: &Image) -> Outcome<Value> {
    let config = store.config(image)?;
    Ok(json!({
        "Id": image.id.to_string(),
        "RepoTags": image.references,
        "Digest": image.manifest.as_ref().map(ToString::to_string),
        "Created": image.created,
        "Architecture": config.architecture(),
        "Os": config.os(),
        "Size": image.size,
        "Config": config.config(),
        "RootFS": {"Type": "layers", "Layers": image.layers.iter().map(ToString::to_string).collect::<Vec<_>>()},
    }))
}

pub fn check(json: bool) -> Outcome {
    let findings = host_check::all();
    let failed = findings.iter().any(|finding| finding.verdict == Verdict::Failure);
    if json {
        print_json(&json!({"can_run": !failed, "findings": findings}))?;
    } else {
        let mut text = String::new();
        for finding in &findings {
            let mark = match finding.verdict {
                Verdict::Ok => "ok  ",
                Verdict::Warning => "warn",
                Verdict::Failure => "FAIL",
            };
            text.push_str(&format!("{mark}  {:<14}  {}\n", finding.name, finding.found));
            if let Some(remedy) = finding.remedy {
                text.push_str(&format!("{:22}{remedy}\n", ""));
            }
        }
        text.push_str(if failed {
            "This host cannot run cloister's virtual machines as it is.\n"
        } else {
            "This host can run cloister's virtual machines.\n"
        });
        print(&text)?;
    }
    Ok(u8::from(failed))
}

pub fn version(json: bool) -> Outcome {
    let version = env!("CARGO_PKG_VERSION");
    if json {
        print_json(&json!({"version": version, "protocol": cloister_protocol::PROTOCOL_VERSION}))?;
    } else {
        print(&format!(
            "cloister {version} (agent protocol {})\n",
            cloister_protocol::PROTOCOL_VERSION
        ))?;
    }
    Ok(0)
}
