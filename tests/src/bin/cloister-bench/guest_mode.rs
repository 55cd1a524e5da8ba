// SPDX-License-Identifier: Apache-2.0
//! What a vCPU does in guest mode: from KVM's trace point `kvm_entry` to `kvm_exit` of the same thread, in an instance of the
//! tracer's own, by the processor's time stamp counter. In a host that counts instructions one tick is one instruction, so the
//! sum is what the guest ran, and KVM's last steps into it and first ones out of it.
//!
//! The trace points take time themselves, part of it within: the sum is an upper bound, and other things are measured without.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

const TRACEFS: &str = "/sys/kernel/tracing";
/// Of each processor: some 60,000 events.
const BUFFER_KIB: &str = "8192";

/// A trace that is running.
#[derive(Debug)]
pub struct GuestMode {
    instance: PathBuf,
    mounted: bool,
}

impl GuestMode {
    /// Begins to trace all VMs of this host.
    pub fn start() -> io::Result<Self> {
        let mounted = !Path::new(TRACEFS).join("instances").exists();
        if mounted {
            mount("tracefs", TRACEFS, "tracefs", MountFlags::empty(), None)?;
        }
        let instance = Path::new(TRACEFS).join(format!("instances/bench-{}", std::process::id()));
        let trace = Self { instance, mounted };
        fs::create_dir(&trace.instance)
            .map_err(|error| io::Error::other(format!("{}: {error}", trace.instance.display())))?;
        trace.set("trace_clock", "x86-tsc")?;
        trace.set("buffer_size_kb", BUFFER_KIB)?;
        for event in ["kvm_entry", "kvm_exit"] {
            trace.set(&format!("events/kvm/{event}/enable"), "1")?;
        }
        Ok(trace)
    }

    fn set(&self, file: &str, value: &str) -> io::Result<()> {
        fs::write(self.instance.join(file), value)
    }

    /// Ticks of a thread in guest mode so far.
    pub fn ticks(&self, thread: u32) -> io::Result<u64> {
        let text = fs::read_to_string(self.instance.join("trace"))?;
        if !is_whole(&text) {
            return Err(io::Error::other(
                "the trace of KVM's entries and exits has lost its beginning",
            ));
        }
        let ticks = sum(&text).get(&thread).copied();
        ticks.ok_or_else(|| io::Error::other(format!("thread {thread} was not seen in guest mode")))
    }
}

/// Whether all that was written is in the trace, as its head says: `# entries-in-buffer/entries-written: 3/3   #P:2`.
fn is_whole(text: &str) -> bool {
    let head = text.lines().find_map(|line| line.split_once("entries-written:"));
    let counts = head.and_then(|(_, counts)| counts.split_whitespace().next()?.split_once('/'));
    counts.is_some_and(|(kept, written)| kept == written)
}

impl Drop for GuestMode {
    fn drop(&mut self) {
        // Events end with their instance.
        let _ = fs::remove_dir(&self.instance);
        if self.mounted {
            let _ = unmount(TRACEFS, UnmountFlags::empty());
        }
    }
}

/// The sums of a trace's text: lines of `COMM-TID [CPU] FLAGS TIME: EVENT: ...`.
fn sum(text: &str) -> HashMap<u32, u64> {
    let mut entered = HashMap::new();
    let mut ticks = HashMap::<u32, u64>::new();
    for line in text.lines() {
        let Some((thread, rest)) = line.split_once(" [") else {
            continue;
        };
        let Some(id) = thread
            .rsplit('-')
            .next()
            .and_then(|id| id.trim().parse::<u32>().ok())
        else {
            continue;
        };
        let mut words = rest.split_whitespace().skip(2);
        let Some(time) = words
            .next()
            .and_then(|time| time.trim_end_matches(':').parse::<u64>().ok())
        else {
            continue;
        };
        match words.next() {
            Some("kvm_entry:") => {
                entered.insert(id, time);
            }
            Some("kvm_exit:") => {
                if let Some(begin) = entered.remove(&id) {
                    *ticks.entry(id).or_default() += time.saturating_sub(begin);
                }
            }
            _ => {}
        }
    }
    ticks
}

#[cfg(test)]
mod tests {
    use super::{is_whole, sum};

    #[test]
    fn each_thread_has_its_own_sum() {
        let text = "# tracer: nop\n\
            pod-a-1:vcpu0-161     [000] d..1. 1000: kvm_entry: vcpu 0, rip 0x1\n\
            pod-b:vcpu0-7   [001] d..1. 1001: kvm_entry: vcpu 0, rip 0x1\n\
            pod-a-1:vcpu0-161     [000] ..... 1500: kvm_exit: vcpu 0 reason npf rip 0x1\n\
            pod-b:vcpu0-7   [001] ..... 1601: kvm_exit: vcpu 0 reason hlt rip 0x1\n\
            pod-b:vcpu0-7   [001] ..... 1602: kvm_exit: vcpu 0 reason hlt rip 0x1\n\
            pod-a-1:vcpu0-161     [000] d..1. 2000: kvm_entry: vcpu 0, rip 0x1\n\
            pod-a-1:vcpu0-161     [000] ..... 2010: kvm_exit: vcpu 0 reason npf rip 0x1\n";
        let ticks = sum(text);
        assert_eq!((ticks[&161], ticks[&7], ticks.len()), (510, 600, 2));
    }

    #[test]
    fn what_was_written_over_is_missed() {
        let head =
            |counts| format!("# tracer: nop\n#\n# entries-in-buffer/entries-written: {counts}   #P:2\n#\n");
        assert!(is_whole(&head("7/7")));
        assert!(!is_whole(&head("7/8")));
        assert!(!is_whole("# tracer: nop\n"));
    }
}
