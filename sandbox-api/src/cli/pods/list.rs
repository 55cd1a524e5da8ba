// SPDX-License-Identifier: Apache-2.0
//! `ps` and `inspect` of pods.

use super::target::{self, Target};
use super::{Context, Daemon, Known, Outcome};
use crate::cli::args::PsArgs;
use crate::cli::table::{binary_size, render};
use crate::cli::{client, print, print_json};
use crate::clock::{self, Millis};
use crate::daemon::report::{Container, Pod};
use crate::daemon::sandbox::Phase;
use serde_json::{Value, json};

/// The pods that `ps` is asked for, newest first.
pub fn chosen(context: &Context, args: &PsArgs) -> Outcome<Vec<Pod>> {
    let known = Known::pods(context)?;
    let mut pods = known.pods;
    if known.daemon.is_none() && !pods.is_empty() {
        crate::error::tell("cloister: cloisterd is not running: its pods ended with it");
    }
    if !args.all {
        pods.retain(|pod| pod.phase != Phase::Stopped);
    }
    pods.reverse();
    Ok(pods)
}

/// `ps --pods`.
pub fn ps(context: &Context, args: &PsArgs) -> Outcome {
    let pods = chosen(context, args)?;
    if args.json {
        print_json(&pods)?;
    } else if args.quiet {
        let ids: String = pods.iter().map(|pod| format!("{}\n", id(pod, args))).collect();
        print(&ids)?;
    } else {
        print(&table(&pods, args, clock::now()))?;
    }
    Ok(0)
}

fn id<'a>(pod: &'a Pod, args: &PsArgs) -> &'a str {
    if args.no_trunc { &pod.id } else { pod.short_id() }
}

fn state(pod: &Pod, now: Millis) -> String {
    let ago = |at: Millis| clock::human(now.saturating_sub(at));
    match (pod.phase, &pod.exit) {
        (Phase::Ready, _) => format!("Ready {}", ago(pod.started.unwrap_or(now))),
        (Phase::Stopped, Some(exit)) => format!("Stopped ({}) {} ago", exit.status, ago(exit.at)),
        (Phase::Created, _) => "Created".to_owned(),
        (Phase::Starting, _) => "Starting".to_owned(),
        (Phase::Stopping, _) => "Stopping".to_owned(),
        (Phase::Stopped, None) => "Stopped".to_owned(),
        (Phase::Gone, _) => "Gone".to_owned(),
    }
}

/// As `ps` shows them.
pub fn table(pods: &[Pod], args: &PsArgs, now: Millis) -> String {
    let rows: Vec<Vec<String>> = pods
        .iter()
        .map(|pod| {
            let running = pod
                .containers
                .iter()
                .filter(|one| one.state() == "running")
                .count();
            let used = pod.memory_used.map_or_else(|| "-".to_owned(), binary_size);
            vec![
                id(pod, args).to_owned(),
                target::pod_name(pod),
                pod.sandboxer.clone(),
                state(pod, now),
                format!("{running}/{}", pod.containers.len()),
                clock::human(now.saturating_sub(pod.created)),
                pod.vcpus.to_string(),
                format!("{used} / {}", binary_size(pod.memory)),
            ]
        })
        .collect();
    render(
        &[
            "POD ID",
            "POD",
            "SANDBOXER",
            "STATE",
            "RUNNING",
            "AGE",
            "VCPUS",
            "MEMORY",
        ],
        &rows,
    )
}

/// All that is known of a pod or a container of one, for `inspect`.
pub fn inspect(context: &Context, pods: &crate::pod::state::Pods, name: &str) -> Outcome<Option<Value>> {
    let found = match target::find(context, pods, name)? {
        Some(Target::Pod(pod)) => pod_value(Known::pods(context)?.daemon.as_ref(), &pod)?,
        Some(Target::Container(pod, container)) => {
            let mut value = serde_json::to_value(&*container)?;
            if let Some(fields) = value.as_object_mut() {
                fields.insert("state".into(), container.state().into());
                fields.insert("pod".into(), serde_json::to_value(&*pod)?);
                fields.insert("spec".into(), spec_value(&container));
            }
            value
        }
        Some(Target::Own(_)) | None => return Ok(None),
    };
    Ok(Some(found))
}

fn pod_value(daemon: Option<&Daemon>, pod: &Pod) -> Outcome<Value> {
    match daemon {
        Some(daemon) => Ok(serde_json::to_value(daemon.details(&pod.id)?)?),
        None => Ok(serde_json::to_value(pod)?),
    }
}

/// What containerd wrote for the container, or why that cannot be had.
fn spec_value(container: &Container) -> Value {
    match client::read_spec(&container.bundle) {
        Ok(spec) => serde_json::to_value(spec).unwrap_or_default(),
        Err(failure) => json!({ "error": failure.message }),
    }
}

#[cfg(test)]
mod tests {
    use super::super::target::tests::{container, pod};
    use super::*;
    use crate::daemon::sandbox::Exit;

    #[test]
    fn a_line_a_pod() {
        let mut exited = container("d", "job");
        exited.exit_status = Some(1);
        let mut first = pod("0123456789abcdef", "web", vec![container("c", "app"), exited]);
        let mut second = pod("ffff456789abcdef", "", vec![]);
        second.namespace = String::new();
        second.phase = Phase::Stopped;
        second.memory_used = None;
        second.exit = Some(Exit {
            status: 137,
            at: 60_000,
            reason: Some("the agent died".into()),
        });
        first.started = Some(50_000);
        let args = PsArgs {
            all: true,
            quiet: false,
            no_trunc: false,
            json: false,
            pods: true,
        };
        let text = table(&[first, second], &args, 120_000);
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| {
                line.split("   ")
                    .map(str::trim)
                    .filter(|cell| !cell.is_empty())
                    .collect()
            })
            .collect();
        assert_eq!(
            lines[1],
            [
                "0123456789ab",
                "shop/web",
                "cloister",
                "Ready About a minute",
                "1/2",
                "2 minutes",
                "2",
                "64.0MiB / 256MiB"
            ]
        );
        assert_eq!(lines[2][1], "ffff456789ab");
        assert_eq!(lines[2][3], "Stopped (137) About a minute ago");
        assert_eq!(lines[2][7], "- / 256MiB");
    }
}
