// SPDX-License-Identifier: Apache-2.0
//! The data side: fills buffers.

use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_queue::QueueState;

use super::RngMetrics;
use crate::host_io;
use crate::virtio::{ActiveDevice, ActiveQueue, Buffers, Chain, Health, Outcome, QueueError};

/// Most bytes given per chain.
pub const MAX_REQUEST: usize = 4096;
/// Bytes given per turn on the event loop.
pub const BYTE_BUDGET: usize = 64 << 10;

pub(super) struct RngHandler {
    queue: ActiveQueue,
    health: Arc<Health>,
    metrics: Arc<RngMetrics>,
}

impl RngHandler {
    pub(super) fn new(queue: ActiveQueue, health: Arc<Health>, metrics: Arc<RngMetrics>) -> Self {
        Self {
            queue,
            health,
            metrics,
        }
    }

    fn serve(&mut self) -> Result<(), QueueError> {
        let mut budget = BYTE_BUDGET;
        let Self {
            queue,
            health,
            metrics,
        } = self;
        queue.serve(|chain| {
            if budget == 0 {
                return Outcome::Break;
            }
            let n = fill(chain, budget.min(MAX_REQUEST)).unwrap_or_else(|complaint| {
                metrics.failed_requests.increment();
                health.complain(complaint);
                0
            });
            metrics.bytes.add(n);
            // Also an empty request costs something.
            budget = budget.saturating_sub(n.max(64));
            Outcome::Done {
                // At most MAX_REQUEST.
                len: u32::try_from(n).unwrap_or(0),
            }
        })?;
        if budget == 0 {
            // Come back for the rest. EAGAIN: a notification is pending already.
            let _ = queue.notification().write(1);
        }
        Ok(())
    }

    fn run(&mut self) {
        if let Err(error) = self.serve() {
            self.health.fail(error);
        }
    }
}

/// Fills up to `most` bytes of the chain's writable part.
fn fill(chain: &Chain, most: usize) -> Result<usize, String> {
    let buffers = Buffers::of(chain).map_err(|error| error.to_string())?;
    if buffers.writable.is_empty() {
        return Err("a request for entropy without room for any".to_owned());
    }
    let mut filled = 0;
    for part in buffers.writable.range(0, most).parts() {
        let n =
            host_io::getrandom(part).map_err(|error| format!("the host has no entropy to give: {error}"))?;
        filled += n;
        if n < part.len() {
            break;
        }
    }
    Ok(filled)
}

impl MutEventSubscriber for RngHandler {
    fn init(&mut self, ops: &mut EventOps) {
        match ops.add(Events::new(self.queue.notification(), EventSet::IN)) {
            Ok(()) => self.run(),
            Err(error) => self.health.fail(format_args!("cannot watch its queue: {error}")),
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        self.queue.clear_notification();
        self.run();
    }
}

impl ActiveDevice for RngHandler {
    fn queues(&self) -> Vec<Option<QueueState>> {
        vec![Some(self.queue.state())]
    }
}
