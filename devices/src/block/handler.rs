// SPDX-License-Identifier: Apache-2.0
//! The data side: lanes between queues and disk.
//!
//! ```text
//!  LaneState: lanes = 0, notifications on ──kick──▶ lanes >= 1, notifications off
//!                      ▲                                     │
//!                      └── the last lane found the queue ────┘
//!                          empty, or halted by quiesce
//! ```

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_queue::QueueState;

use super::BlockMetrics;
use super::device::{STATE_VERSION, WHAT};
use super::disk::Disk;
use super::request::{self, SERIAL_SIZE, Target};
use crate::state::{SavedState, StateError};
use crate::virtio::{ActiveDevice, ActiveQueue, Buffers, Chain, Health, QueueError};
use crate::worker_pool::WorkerPool;

/// Lanes per device, whatever its number of queues (but at least one per queue).
const LANES: usize = 4;
/// Requests that a lane serves before it lets others use its worker.
const LANE_BUDGET: usize = 16;

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

struct LaneState {
    queue: ActiveQueue,
    lanes: usize,
    /// Lanes end after the request they are at.
    halted: bool,
}

/// One queue and its lanes.
struct QueueLanes {
    state: Mutex<LaneState>,
    ended: Condvar,
    most: usize,
    shared: Arc<Shared>,
}

impl QueueLanes {
    fn lock(&self) -> MutexGuard<'_, LaneState> {
        // Whoever panicked failed the device; the numbers are still right.
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Starts a lane if there is room for one.
    fn start_lane(self: &Arc<Self>, state: &mut LaneState) {
        if state.halted || state.lanes >= self.most {
            return;
        }
        state.lanes += 1;
        let lane = Lane {
            queue: Arc::clone(self),
            counted: true,
        };
        self.shared.pool.submit(move || lane.run());
    }

    /// The next chain, if a lane is to go on.
    fn next(self: &Arc<Self>, state: &mut LaneState) -> Result<Option<Chain>, QueueError> {
        if state.halted || self.shared.health.is_failed() {
            return Ok(None);
        }
        state.queue.disable_notification()?;
        if let Some(chain) = state.queue.pop()? {
            // Perhaps there is more: another lane will see, and end at once if not.
            if state.lanes < self.most && state.queue.has_available()? {
                self.start_lane(state);
            }
            return Ok(Some(chain));
        }
        // The last lane turns notifications on, and looks once more. A guest that plays with the index has to notify.
        if state.lanes == 1 && state.queue.enable_notification()? {
            return state.queue.pop();
        }
        Ok(None)
    }
}

/// A job on the worker pool. However it ends, it is no longer counted.
struct Lane {
    queue: Arc<QueueLanes>,
    counted: bool,
}

impl Lane {
    fn run(mut self) {
        for _ in 0..LANE_BUDGET {
            match self.step() {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => return self.queue.shared.health.fail(error),
            }
        }
        // On at the end of the pool's queue, still counted.
        let pool = Arc::clone(&self.queue.shared.pool);
        pool.submit(move || self.run());
    }

    /// Serves a chain; `false` ends the lane.
    fn step(&mut self) -> Result<bool, QueueError> {
        let mut state = self.queue.lock();
        let Some(chain) = self.queue.next(&mut state)? else {
            // Under the same lock: the next lane to end must see whether it is the last.
            state.lanes -= 1;
            self.counted = false;
            self.queue.ended.notify_all();
            return Ok(false);
        };
        drop(state);
        let len = self.queue.shared.serve(&chain);
        let mut state = self.queue.lock();
        state.queue.complete(chain.head_index(), len)?;
        state.queue.signal()?;
        Ok(true)
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.queue
                .shared
                .health
                .fail("a request panicked (a bug in Cloister)");
        }
        if self.counted {
            self.queue.lock().lanes -= 1;
            self.queue.ended.notify_all();
        }
    }
}

pub(super) struct BlockHandler {
    queues: Vec<Option<Arc<QueueLanes>>>,
    shared: Arc<Shared>,
}

impl BlockHandler {
    pub(super) fn new(queues: Vec<Option<ActiveQueue>>, shared: Arc<Shared>) -> Self {
        let live = queues.iter().flatten().count().max(1);
        let lanes = |queue| {
            Arc::new(QueueLanes {
                state: Mutex::new(LaneState {
                    queue,
                    lanes: 0,
                    halted: false,
                }),
                ended: Condvar::new(),
                most: (LANES / live).max(1),
                shared: Arc::clone(&shared),
            })
        };
        Self {
            queues: queues.into_iter().map(|queue| queue.map(lanes)).collect(),
            shared,
        }
    }
}

impl MutEventSubscriber for BlockHandler {
    fn init(&mut self, ops: &mut EventOps) {
        for (number, queue) in (0..).zip(&self.queues) {
            let Some(queue) = queue else { continue };
            let mut state = queue.lock();
            let events = Events::with_data(state.queue.notification(), number, EventSet::IN);
            if let Err(error) = ops.add(events) {
                self.shared
                    .health
                    .fail(format_args!("cannot watch its queue: {error}"));
                return;
            }
            queue.start_lane(&mut state);
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps) {
        let number = usize::try_from(events.data()).unwrap_or(usize::MAX);
        if let Some(Some(queue)) = self.queues.get(number) {
            let mut state = queue.lock();
            state.queue.clear_notification();
            queue.start_lane(&mut state);
        }
    }
}

impl ActiveDevice for BlockHandler {
    fn quiesce(&mut self) {
        for queue in self.queues.iter().flatten() {
            queue.lock().halted = true;
        }
        for queue in self.queues.iter().flatten() {
            let mut state = queue.lock();
            while state.lanes > 0 {
                state = queue
                    .ended
                    .wait(state)
                    .unwrap_or_else(|poisoned| poisoned.into_inner());
            }
            state.halted = false;
            // What is left in the queue is taken up when the event loop comes here again.
            let _ = state.queue.notification().write(1);
        }
    }

    fn save(&self) -> Result<SavedState, StateError> {
        SavedState::encode(WHAT, STATE_VERSION, &())
    }

    fn queues(&self) -> Vec<Option<QueueState>> {
        self.queues
            .iter()
            .map(|queue| queue.as_ref().map(|queue| queue.lock().queue.state()))
            .collect()
    }
}
