// SPDX-License-Identifier: Apache-2.0
//! A queue whose chains are served on the worker pool, by jobs that take them off the queue themselves.
//!
//! ```text
//!  lanes = 0, notifications on ──kick──▶ lanes >= 1, notifications off
//!             ▲                                     │
//!             └── the last lane found the queue ────┘
//!                 empty, or halted by quiesce
//! ```
//!
//! A lane is a job that takes chains, one at a time, serves them and gives them back. One that finds more chains
//! starts another, up to a limit; after [`LANE_BUDGET`] chains it goes to the end of the pool's queue. So what a guest
//! has waiting lies in its own rings, never in the host's memory, and the pool is shared fairly between cells. Chains
//! come back in the order in which they are done.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use event_manager::{EventOps, EventSet, Events};
use virtio_queue::QueueState;

use crate::virtio::{ActiveQueue, Chain, Health, QueueError};
use crate::worker_pool::WorkerPool;

/// Chains that a lane serves before it lets others use its worker.
const LANE_BUDGET: usize = 16;

/// Serves one chain; returns how many bytes were written into it.
type Serve = dyn Fn(&Chain) -> u32 + Send + Sync;

struct LaneState {
    queue: ActiveQueue,
    lanes: usize,
    /// Lanes end after the chain they are at.
    halted: bool,
}

/// One queue and its lanes.
pub(crate) struct Lanes {
    state: Mutex<LaneState>,
    ended: Condvar,
    most: usize,
    pool: Arc<WorkerPool>,
    health: Arc<Health>,
    serve: Box<Serve>,
}

impl Lanes {
    /// Up to `most` lanes at a time from `queue` to `serve`.
    pub(crate) fn new(
        queue: ActiveQueue,
        most: usize,
        pool: Arc<WorkerPool>,
        health: Arc<Health>,
        serve: impl Fn(&Chain) -> u32 + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(LaneState {
                queue,
                lanes: 0,
                halted: false,
            }),
            ended: Condvar::new(),
            most: most.max(1),
            pool,
            health,
            serve: Box::new(serve),
        })
    }

    /// Has the event loop watch for notifications, under the number `data`, and serves what waits already.
    pub(crate) fn start(self: &Arc<Self>, data: u32, ops: &mut EventOps) {
        let mut state = self.lock();
        let events = Events::with_data(state.queue.notification(), data, EventSet::IN);
        match ops.add(events) {
            Ok(()) => self.start_lane(&mut state),
            Err(error) => self.health.fail(format_args!("cannot watch its queue: {error}")),
        }
    }

    /// The driver notified.
    pub(crate) fn notified(self: &Arc<Self>) {
        let mut state = self.lock();
        state.queue.clear_notification();
        self.start_lane(&mut state);
    }

    /// Waits until no chain is being served. What is left in the queue is taken up when the event loop comes here
    /// again.
    pub(crate) fn quiesce(&self) {
        let mut state = self.lock();
        state.halted = true;
        while state.lanes > 0 {
            state = self
                .ended
                .wait(state)
                .unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        state.halted = false;
        // EAGAIN: a notification is pending already.
        let _ = state.queue.notification().write(1);
    }

    /// Where the queue stands.
    pub(crate) fn state(&self) -> QueueState {
        self.lock().queue.state()
    }

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
        self.pool.submit(move || lane.run());
    }

    /// The next chain, if a lane is to go on.
    fn next(self: &Arc<Self>, state: &mut LaneState) -> Result<Option<Chain>, QueueError> {
        if state.halted || self.health.is_failed() {
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
    queue: Arc<Lanes>,
    counted: bool,
}

impl Lane {
    fn run(mut self) {
        for _ in 0..LANE_BUDGET {
            match self.step() {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => return self.queue.health.fail(error),
            }
        }
        // On at the end of the pool's queue, still counted.
        let pool = Arc::clone(&self.queue.pool);
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
        let len = (self.queue.serve)(&chain);
        let mut state = self.queue.lock();
        state.queue.complete(chain.head_index(), len)?;
        state.queue.signal()?;
        Ok(true)
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.queue.health.fail("a request panicked (a bug in Cloister)");
        }
        if self.counted {
            self.queue.lock().lanes -= 1;
            self.queue.ended.notify_all();
        }
    }
}
