// SPDX-License-Identifier: Apache-2.0
//! `stats`: what the containers' cgroups in the VMs say.

use super::args::StatsArgs;
use super::client::Place;
use super::pods::Known;
use super::pods::target::{self, Target};
use super::table::{binary_size, render};
use super::{Context, Failure, Outcome, client, print, print_json};
use crate::daemon::report::{Container, Pod};
use crate::pod::state::{self, Pods, Record, Status};
use cloister_protocol::protobuf::Message as _;
use cloister_protocol::task::{Metrics, StatsRequest};
use cloister_protocol::ttrpc::context::with_duration;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// A container that runs.
struct Subject {
    place: Place,
    /// RAM of its VM.
    vm_size: u64,
}

impl Subject {
    fn own(pods: &Pods, record: &Record) -> Self {
        Self {
            place: Place::own(pods, record),
            vm_size: record.plan.memory,
        }
    }

    fn of_pod(pod: &Pod, container: &Container) -> Self {
        Self {
            place: Place::of_pod(pod, container),
            vm_size: pod.memory,
        }
    }
}

/// One look at one container.
struct Sample {
    at: Instant,
    cpu_usec: u64,
    memory: u64,
    limit: u64,
    pids: u64,
}

#[derive(serde::Serialize)]
struct Line {
    id: String,
    name: String,
    /// Of one processor, in hundredths of a percent.
    cpu_hundredths: u64,
    memory_bytes: u64,
    limit_bytes: u64,
    /// Host memory that the VM's RAM takes: what the guest has used and not given back through its balloon.
    vm_bytes: Option<u64>,
    pids: u64,
}

pub fn stats(context: &Context, args: &StatsArgs) -> Outcome {
    let pods = context.pods()?;
    let runtime = client::runtime()?;
    let is_terminal = std::io::stdout().is_terminal();
    loop {
        let subjects = chosen(context, &pods, args)?;
        let lines = runtime.block_on(measure(&subjects));
        if args.json {
            print_json(&lines)?;
            return Ok(0);
        }
        let clear = if is_terminal && !args.no_stream {
            "\x1b[H\x1b[2J"
        } else {
            ""
        };
        print(&format!("{clear}{}", table(&lines)))?;
        if args.no_stream {
            return Ok(0);
        }
    }
}

fn chosen(context: &Context, pods: &Pods, args: &StatsArgs) -> Outcome<Vec<Subject>> {
    if args.containers.is_empty() {
        let own = pods.list()?;
        let running = own.iter().filter(|record| record.status == Status::Running);
        let mut subjects: Vec<Subject> = running.map(|record| Subject::own(pods, record)).collect();
        for pod in Known::pods(context)?.pods {
            subjects.extend(of_pod(&pod));
        }
        return Ok(subjects);
    }
    let mut subjects = Vec::new();
    for name in &args.containers {
        let of_this = match target::find(context, pods, name)? {
            Some(Target::Own(record)) if record.status == Status::Running => {
                vec![Subject::own(pods, &record)]
            }
            Some(Target::Container(pod, container)) if container.state() == "running" => {
                vec![Subject::of_pod(&pod, &container)]
            }
            Some(Target::Pod(pod)) => of_pod(&pod),
            Some(_) => return Err(Failure::new(format!("container {name} is not running"))),
            None => return Err(state::Error::NotFound(name.clone()).into()),
        };
        subjects.extend(of_this);
    }
    Ok(subjects)
}

/// The running containers of a pod.
fn of_pod(pod: &Pod) -> Vec<Subject> {
    let running = pod.containers.iter().filter(|one| one.state() == "running");
    running.map(|container| Subject::of_pod(pod, container)).collect()
}

async fn sample(subject: &Subject) -> Outcome<Sample> {
    let metrics = ask(&subject.place, &subject.place.id).await?;
    let limit = metrics.memory.usage_limit;
    Ok(Sample {
        at: Instant::now(),
        cpu_usec: metrics.cpu.usage_usec,
        memory: metrics.memory.usage,
        // No limit of its own: what the VM has.
        limit: if limit == 0 || limit > subject.vm_size {
            subject.vm_size
        } else {
            limit
        },
        pids: metrics.pids.current,
    })
}

/// Asks for the metrics of a container; without an id, of the VM on the host.
async fn ask(place: &Place, id: &str) -> Outcome<Metrics> {
    let request = StatsRequest {
        id: id.to_owned(),
        ..Default::default()
    };
    let task = place.connect().await?;
    let response = task
        .stats(with_duration(Duration::from_secs(10)), &request)
        .await
        .map_err(client::said)?;
    Metrics::parse_from_bytes(&response.stats.get_or_default().value).map_err(Failure::new)
}

async fn measure(subjects: &[Subject]) -> Vec<Line> {
    let mut before = Vec::new();
    for subject in subjects {
        before.push(sample(subject).await);
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut lines = Vec::new();
    for (subject, before) in subjects.iter().zip(before) {
        match (before, sample(subject).await) {
            (Ok(before), Ok(now)) => {
                // A VM of an older version does not say.
                let vm = ask(&subject.place, "").await.ok();
                lines.push(line(subject, &before, &now, vm.map(|vm| vm.memory.usage)));
            }
            // Ended in between.
            (Err(failure), _) | (_, Err(failure)) => {
                log::info!("{}: {}", subject.place.name, failure.message);
            }
        }
    }
    lines
}

fn line(subject: &Subject, before: &Sample, now: &Sample, vm_bytes: Option<u64>) -> Line {
    let used = u128::from(now.cpu_usec.saturating_sub(before.cpu_usec));
    let passed = now.at.duration_since(before.at).as_micros().max(1);
    Line {
        id: subject.place.id.clone(),
        name: subject.place.name.clone(),
        cpu_hundredths: u64::try_from(used * 10_000 / passed).unwrap_or(u64::MAX),
        memory_bytes: now.memory,
        limit_bytes: now.limit,
        vm_bytes,
        pids: now.pids,
    }
}

fn hundredths(value: u64) -> String {
    format!("{}.{:02}%", value / 100, value % 100)
}

fn table(lines: &[Line]) -> String {
    let rows: Vec<Vec<String>> = lines
        .iter()
        .map(|line| {
            let share = u128::from(line.memory_bytes) * 10_000 / u128::from(line.limit_bytes.max(1));
            vec![
                line.id.get(..12).unwrap_or(&line.id).to_owned(),
                line.name.clone(),
                hundredths(line.cpu_hundredths),
                format!(
                    "{} / {}",
                    binary_size(line.memory_bytes),
                    binary_size(line.limit_bytes)
                ),
                hundredths(u64::try_from(share).unwrap_or(u64::MAX)),
                line.vm_bytes.map_or_else(|| "-".to_owned(), binary_size),
                line.pids.to_string(),
            ]
        })
        .collect();
    render(
        &[
            "CONTAINER ID",
            "NAME",
            "CPU %",
            "MEM USAGE / LIMIT",
            "MEM %",
            "VM RAM",
            "PIDS",
        ],
        &rows,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares() {
        let subject = Subject {
            place: Place {
                id: "0123456789abcdef".into(),
                name: "web".into(),
                socket: "/s".into(),
                dir: "/d".into(),
            },
            vm_size: 512 << 20,
        };
        let at = Instant::now();
        let before = Sample {
            at,
            cpu_usec: 1_000_000,
            memory: 0,
            limit: 1,
            pids: 1,
        };
        let now = Sample {
            at: at + Duration::from_secs(2),
            cpu_usec: 2_500_000,
            memory: 64 << 20,
            limit: 256 << 20,
            pids: 3,
        };
        let line = line(&subject, &before, &now, Some(48 << 20));
        assert_eq!(line.cpu_hundredths, 7500);
        let text = table(&[line]);
        assert!(
            text.contains("0123456789ab") && text.contains("75.00%") && text.contains("25.00%"),
            "{text}"
        );
        assert!(
            text.contains("64.0MiB / 256MiB") && text.contains("48.0MiB"),
            "{text}"
        );
    }
}
