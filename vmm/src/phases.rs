// SPDX-License-Identifier: Apache-2.0
//! What the making of a cell costs, part by part.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// One part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Phase {
    /// What was done.
    pub name: &'static str,
    /// CPU time that the calling thread took for it.
    pub cpu: Duration,
    /// Whether it is calls of KVM's and next to nothing else.
    pub is_kvm: bool,
}

/// Takes the times.
#[derive(Debug)]
pub(crate) struct Phases {
    last: Duration,
    done: Vec<Phase>,
}

fn now() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

impl Phases {
    pub(crate) fn begin() -> Self {
        Self {
            last: now(),
            done: Vec::new(),
        }
    }

    /// What was done since the last call was our own.
    pub(crate) fn ours(&mut self, name: &'static str) {
        self.add(name, false);
    }

    /// What was done since the last call was KVM's.
    pub(crate) fn kvm(&mut self, name: &'static str) {
        self.add(name, true);
    }

    fn add(&mut self, name: &'static str, is_kvm: bool) {
        let now = now();
        self.done.push(Phase {
            name,
            cpu: now.saturating_sub(self.last),
            is_kvm,
        });
        self.last = now;
    }

    pub(crate) fn all(&self) -> &[Phase] {
        &self.done
    }
}
