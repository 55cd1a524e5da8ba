// SPDX-License-Identifier: Apache-2.0
//! The data side: lanes between queues and disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_queue::QueueState;

use super::BlockMetrics;
use super::disk::Disk;
use super::request::{self, SERIAL_SIZE, Target};
use crate::lanes::Lanes;
use crate::virtio::{ActiveDevice, ActiveQueue, Buffers, Chain, Health};
use crate::worker_pool::WorkerPool;

/// Lanes per device, whatever its number of queues (but at least one per queue).
const LANES: usize = 4;

/// What all lanes of a device need.
pub(super) struct Shared {
    pub disk: Arc<Disk>,
    pub serial: [u8; SERIAL_SIZE],
    pub always_write_through: bool,
    pub cache_is_chosen: bool,
    pub writeback: Arc<AtomicBool>,
    pub pool: Arc<WorkerPool>,
    pub health: Arc<Health>,
    pub metrics: Arc<BlockMetrics>,
}

impl Shared {
    fn target(&self) -> Target<'_> {
        let chosen = self.cache_is_chosen && !self.writeback.load(Ordering::Acquire);
        Target {
            disk: &self.disk,
            serial: &self.serial,
            write_through: self.always_write_through || chosen,
            health: &self.health,
            metrics: &self.metrics,
        }
    }

    /// Serves one chain; returns how many bytes were written into it.
    fn serve(&self, chain: &Chain) -> u32 {
        let complaint = match Buffers::of(chain) {
            Ok(buffers) => match request::serve(&buffers, &self.target()) {
                Ok(len) => return len,
                Err(error) => error.to_string(),
            },
            Err(error) => error.to_string(),
        };
        self.metrics.bad_chains.increment();
        self.health.complain(complaint);
        0
    }
}

pub(super) struct BlockHandler {
    queues: Vec<Option<Arc<Lanes>>>,
}

impl BlockHandler {
    pub(super) fn new(queues: Vec<Option<ActiveQueue>>, shared: &Arc<Shared>) -> Self {
        let most = LANES / queues.iter().flatten().count().max(1);
        let lanes = |queue| {
            let serving = Arc::clone(shared);
            let (pool, health) = (Arc::clone(&shared.pool), Arc::clone(&shared.health));
            Lanes::new(queue, most, pool, health, move |chain| serving.serve(chain))
        };
        Self {
            queues: queues.into_iter().map(|queue| queue.map(lanes)).collect(),
        }
    }
}

impl MutEventSubscriber for BlockHandler {
    fn init(&mut self, ops: &mut EventOps) {
        for (number, queue) in (0..).zip(&self.queues) {
            if let Some(queue) = queue {
                queue.start(number, ops);
            }
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps) {
        let number = usize::try_from(events.data()).unwrap_or(usize::MAX);
        if let Some(Some(queue)) = self.queues.get(number) {
            queue.notified();
        }
    }
}

impl ActiveDevice for BlockHandler {
    fn quiesce(&mut self) {
        for queue in self.queues.iter().flatten() {
            queue.quiesce();
        }
    }

    fn queues(&self) -> Vec<Option<QueueState>> {
        self.queues
            .iter()
            .map(|queue| queue.as_ref().map(|queue| queue.state()))
            .collect()
    }
}
