// SPDX-License-Identifier: Apache-2.0
//! What the kernel says of the daemon itself, under the names that Prometheus's own clients give it.

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use std::fmt;
use std::fs;

/// Reads /proc/self at each scrape.
#[derive(Debug)]
pub struct ProcessMetrics;

impl Collector for ProcessMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let mut gauge = |name, help, value: Option<u64>| match value {
            Some(value) => {
                let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
                gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)
            }
            None => Ok(()),
        };
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        let kib = |name| field(name).and_then(|kib| kib.checked_mul(1024));
        let open = fs::read_dir("/proc/self/fd")
            .ok()
            .map(|entries| entries.count() as u64);
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        // Resident memory without the guests' RAM, which is the daemon's only shared memory.
        let own = kib("RssAnon:")
            .zip(kib("RssFile:"))
            .map(|(anon, file)| anon.saturating_add(file));
        gauge("process_open_fds", "Open file descriptors of the daemon", open)?;
        gauge(
            "process_max_fds",
            "Most file descriptors the daemon may have",
            limit,
        )?;
        gauge(
            "process_threads",
            "Threads of the daemon, vCPUs included",
            field("Threads:"),
        )?;
        gauge(
            "process_resident_memory_bytes",
            "Resident memory of the daemon, guests' RAM included",
            kib("VmRSS:"),
        )?;
        gauge(
            "cloister_own_memory_bytes",
            "Resident memory of the daemon without guests' RAM",
            own,
        )?;
        let counter = ConstCounter::new(cpu_seconds());
        counter.encode(encoder.encode_descriptor(
            "process_cpu_seconds",
            "Processor time of the daemon, vCPUs included",
            None,
            counter.metric_type(),
        )?)
    }
}

/// User and system time of all threads.
fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let seconds = std::time::Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    );
    seconds.as_secs_f64()
}
