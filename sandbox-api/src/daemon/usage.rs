// SPDX-License-Identifier: Apache-2.0
//! What a pod uses, as containerd's cgroup v2 `Metrics`.
//!
//! The host's word counts for what the pod costs the host: processor time is that of the vCPU threads, memory is what the
//! VM's RAM takes, its limit the VM's size. All else is what the guest counts in its containers' cgroups, added up.

use crate::pod::task::TaskService;
use cloister_protocol::containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, MemoryEvents, MemoryStat, PidsStat,
};
use cloister_protocol::protobuf::MessageField;
use cloister_protocol::task::Metrics;
use cloister_vmm::Cell;
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

/// Adds fields of one message to another's.
macro_rules! add {
    ($into:expr, $from:expr, $($field:ident)*) => {
        $($into.$field = $into.$field.saturating_add($from.$field);)*
    };
}

/// Asks the host and the guest.
pub async fn of(cell: &Cell, service: &TaskService) -> Metrics {
    let mut all = sum(&service.container_metrics().await);
    let used = vcpu_time(cell).as_micros();
    all.cpu.mut_or_insert_default().usage_usec = u64::try_from(used).unwrap_or(u64::MAX);
    let memory = all.memory.mut_or_insert_default();
    memory.usage = cell.resident_ram().unwrap_or(0);
    if let Some(resizer) = service.resizer() {
        memory.usage_limit = resizer.size().await.memory;
    }
    all
}

/// For how long its vCPUs have run, with what the host does in their threads.
pub fn vcpu_time(cell: &Cell) -> Duration {
    let threads = cell.vcpu_threads().into_iter();
    let ran = threads.filter_map(|thread| Some(cpu_times(thread)?.ran));
    ran.fold(Duration::ZERO, Duration::saturating_add)
}

/// For how long each of its vCPUs' threads has run, or has waited for a processor to run on.
pub fn vcpus_wanted(cell: &Cell) -> HashMap<i32, Duration> {
    let threads = cell.vcpu_threads().into_iter();
    let wanted = |thread| {
        let times = cpu_times(thread)?;
        Some((thread, times.ran.saturating_add(times.queued)))
    };
    threads.filter_map(wanted).collect()
}

/// Of a thread of this process (Documentation/scheduler/sched-stats.rst).
struct CpuTimes {
    ran: Duration,
    /// Ready to run, without a processor.
    queued: Duration,
}

fn cpu_times(thread: i32) -> Option<CpuTimes> {
    let text = std::fs::read_to_string(format!("/proc/self/task/{thread}/schedstat")).ok()?;
    let mut numbers = text.split_ascii_whitespace();
    let mut next = || Some(Duration::from_nanos(numbers.next()?.parse().ok()?));
    Some(CpuTimes {
        ran: next()?,
        queued: next()?,
    })
}

/// What the containers' cgroups count, added up. Averages and limits have no sum, and are left out.
fn sum(containers: &[Metrics]) -> Metrics {
    let (mut pids, mut cpu) = (PidsStat::new(), CPUStat::new());
    let (mut memory, mut events) = (MemoryStat::new(), MemoryEvents::new());
    let mut disks: BTreeMap<(u64, u64), IOEntry> = BTreeMap::new();
    for one in containers {
        add!(pids, one.pids, current);
        add!(cpu, one.cpu, user_usec system_usec nr_periods nr_throttled throttled_usec nr_bursts burst_usec);
        add!(memory, one.memory, anon file kernel_stack slab sock shmem file_mapped file_dirty file_writeback anon_thp
            inactive_anon active_anon inactive_file active_file unevictable slab_reclaimable slab_unreclaimable pgfault
            pgmajfault workingset_refault workingset_activate workingset_nodereclaim pgrefill pgscan pgsteal pgactivate
            pgdeactivate pglazyfree pglazyfreed thp_fault_alloc thp_collapse_alloc swap_usage);
        add!(events, one.memory_events, low high max oom oom_kill oom_group_kill);
        for entry in &one.io.usage {
            let disk = disks.entry((entry.major, entry.minor)).or_default();
            (disk.major, disk.minor) = (entry.major, entry.minor);
            add!(disk, entry, rbytes wbytes rios wios);
        }
    }
    let mut all = Metrics::new();
    all.pids = MessageField::some(pids);
    all.cpu = MessageField::some(cpu);
    all.memory = MessageField::some(memory);
    all.memory_events = MessageField::some(events);
    all.io.mut_or_insert_default().usage = disks.into_values().collect();
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_are_added_up() {
        let one = |pids: u64, anon: u64, disk: u64| {
            let mut metrics = Metrics::new();
            metrics.pids.mut_or_insert_default().current = pids;
            metrics.memory.mut_or_insert_default().anon = anon;
            metrics.memory.mut_or_insert_default().usage = 1;
            metrics.io.mut_or_insert_default().usage.push(IOEntry {
                major: 254,
                minor: disk,
                rbytes: 10,
                ..Default::default()
            });
            metrics
        };
        let all = sum(&[one(1, 100, 0), one(2, u64::MAX, 16), one(3, 0, 0), Metrics::new()]);
        assert_eq!(
            (all.pids.current, all.memory.anon, all.memory.usage),
            (6, u64::MAX, 0)
        );
        let disks: Vec<_> = all
            .io
            .usage
            .iter()
            .map(|disk| (disk.minor, disk.rbytes))
            .collect();
        assert_eq!(disks, [(0, 20), (16, 10)]);
        assert!(sum(&[]).memory.is_some());
    }

    #[test]
    fn a_thread_has_run() {
        let own = rustix::thread::gettid().as_raw_nonzero().get();
        // The kernel adds up at its ticks and when another thread gets its turn.
        while cpu_times(own).unwrap().ran.is_zero() {
            std::thread::yield_now();
        }
        assert!(cpu_times(i32::MAX).is_none());
    }
}
