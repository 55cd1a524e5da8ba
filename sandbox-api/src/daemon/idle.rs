// SPDX-License-Identifier: Apache-2.0
//! Takes back from a pod that rests what its guest only caches.
//!
//! ```text
//!  used ──(vCPUs ran less than 1 % of `idle_reclaim`)──▶ guest drops its clean caches ──▶ given back
//!   ▲                                                                                       │
//!   └──────────────────────(vCPUs ran for WORTH since)──────────────────────────────────────┘
//! ```
//!
//! What a guest has read through virtio-fs is in the host's page cache as well, so a copy that nobody uses is memory for nothing. Pages
//! that processes have mapped, and what has not been written yet, stay. The guest's free pages are then gathered to whole
//! blocks, which its kernel reports to the balloon, and the host takes them back.
//!
//! Whether a pod rests the host sees by itself, from its vCPU threads' clocks: nobody wakes it to ask, and it is woken once for each rest.

use super::usage::vcpu_time;
use cloister_protocol::pod::{ConfigureRequest, PodClient};
use cloister_protocol::ttrpc::{self, context::with_duration};
use cloister_vmm::Cell;
use std::convert::Infallible;
use std::time::Duration;

/// Work of the vCPUs after which there may be caches again: more than the dropping of caches takes.
const WORTH: Duration = Duration::from_millis(300);
/// How long an agent may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Whether a VM rests whose vCPUs ran for `ran` during `period`.
fn rests(ran: Duration, period: Duration) -> bool {
    ran < period / 100
}

/// Does so while the pod lives, looking once in a `period`.
pub async fn give_back(cell: &Cell, agent: &PodClient, period: Duration) -> Infallible {
    let mut given_back = Duration::ZERO;
    let mut last = vcpu_time(cell);
    loop {
        tokio::time::sleep(period).await;
        let now = vcpu_time(cell);
        let ran = now.saturating_sub(std::mem::replace(&mut last, now));
        if !rests(ran, period) || now.saturating_sub(given_back) < WORTH {
            continue;
        }
        log::debug!("{} rests: it drops its caches", cell.name());
        if let Err(error) = drop_caches(agent).await {
            log::warn!("{}: cannot have its caches dropped: {error}", cell.name());
        }
        last = vcpu_time(cell);
        given_back = last;
    }
}

/// Page cache only: of inodes and names a guest has few. (Linux, Documentation/admin-guide/sysctl/vm.rst)
async fn drop_caches(agent: &PodClient) -> ttrpc::Result<()> {
    for sysctl in ["vm.drop_caches", "vm.compact_memory"] {
        let request = ConfigureRequest {
            sysctls: [(sysctl.to_owned(), "1".to_owned())].into(),
            ..Default::default()
        };
        agent.configure(with_duration(PATIENCE), &request).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hundredth_is_rest() {
        let minute = Duration::from_secs(60);
        assert!(rests(Duration::ZERO, minute) && rests(Duration::from_millis(599), minute));
        assert!(!rests(Duration::from_millis(600), minute));
    }
}
