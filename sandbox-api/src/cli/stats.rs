// SPDX-License-Identifier: Apache-2.0
//! `stats`: what the containers' cgroups in the VMs say.

use super::args::StatsArgs;
use super::table::{binary_size, render};
use super::{Context, Failure, Outcome, client, print, print_json};
use crate::pod::state::{Pods, Record, Status};
use cloister_protocol::protobuf::Message as _;
use cloister_protocol::task::{Metrics, StatsRequest};
use cloister_protocol::ttrpc::context::with_duration;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

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
        let records = chosen(&pods, args)?;
        let lines = runtime.block_on(measure(&pods, &records));
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

fn chosen(pods: &Pods, args: &StatsArgs) -> Outcome<Vec<Record>> {
    if args.containers.is_empty() {
        let mut records = pods.list()?;
        records.retain(|record| record.status == Status::Running);
        return Ok(records);
    }
    let find = |name: &String| {
        let record = pods.find(name)?;
        if record.status == Status::Running {
            Ok(record)
        } else {
            Err(Failure::new(format!("container {name} is not running")))
        }
    };
    args.containers.iter().map(find).collect()
}

async fn sample(pods: &Pods, record: &Record) -> Outcome<Sample> {
    let task = client::connect(pods, record).await?;
    let request = StatsRequest {
        id: record.id.clone(),
        ..Default::default()
    };
    let response = task
        .stats(with_duration(Duration::from_secs(10)), &request)
        .await
        .map_err(client::said)?;
    let metrics = Metrics::parse_from_bytes(&response.stats.get_or_default().value).map_err(Failure::new)?;
    let limit = metrics.memory.usage_limit;
    Ok(Sample {
        at: Instant::now(),
        cpu_usec: metrics.cpu.usage_usec,
        memory: metrics.memory.usage,
        // No limit of its own: what the VM has.
        limit: if limit == 0 || limit > record.plan.memory {
            record.plan.memory
        } else {
            limit
        },
        pids: metrics.pids.current,
    })
}

async fn measure(pods: &Pods, records: &[Record]) -> Vec<Line> {
    let mut before = Vec::new();
    for record in records {
        before.push(sample(pods, record).await);
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut lines = Vec::new();
    for (record, before) in records.iter().zip(before) {
        match (before, sample(pods, record).await) {
            (Ok(before), Ok(now)) => lines.push(line(record, &before, &now)),
            // Ended in between.
            (Err(failure), _) | (_, Err(failure)) => log::info!("{}: {}", record.name, failure.message),
        }
    }
    lines
}

fn line(record: &Record, before: &Sample, now: &Sample) -> Line {
    let used = u128::from(now.cpu_usec.saturating_sub(before.cpu_usec));
    let passed = now.at.duration_since(before.at).as_micros().max(1);
    Line {
        id: record.id.clone(),
        name: record.name.clone(),
        cpu_hundredths: u64::try_from(used * 10_000 / passed).unwrap_or(u64::MAX),
        memory_bytes: now.memory,
        limit_bytes: now.limit,
        vm_bytes: record.pid.and_then(vm_memory),
        pids: now.pids,
    }
}

/// The guest's RAM is the only shared memory of the process that hosts it.
fn vm_memory(host: u32) -> Option<u64> {
    shared_memory(&std::fs::read_to_string(format!("/proc/{host}/status")).ok()?)
}

fn shared_memory(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("RssShmem:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
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
        let record = crate::pod::state::tests::record("0123456789abcdef");
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
        let mut line = line(&record, &before, &now);
        assert_eq!(line.vm_bytes, None);
        let status = "RssFile:\t 100 kB\nRssShmem:\t   49152 kB\nVmData: 5 kB\n";
        line.vm_bytes = shared_memory(status);
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
