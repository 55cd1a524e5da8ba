// SPDX-License-Identifier: Apache-2.0
//! The data side: queues, and the workers that serve them.
//!
//! ```text
//!  worker, woken by the queue's notification
//!     │ enter: at most MAX_WORKERS per queue; later ones leave the work to those that are in
//!     ▼
//!  ┌▶ pop a chain ──none──▶ notifications on; still none ──▶ leave
//!  │    │ may it block? notifications on first, so that the next request wakes another worker;
//!  │    │               if one is waiting already, wake a worker for it
//!  │    ▼
//!  │  run the request (queue unlocked) ──waits for a lock──▶ parked: tried again when a lock is released here, and
//!  │    │                                                     every RETRY, as its holder may be elsewhere
//!  └── return the chain, interrupt the driver if it wants to know
//! ```
//!
//! A worker's entering and leaving and the queue's emptiness are all seen under the queue's lock: a chain that comes
//! after the last look finds notifications on and nobody in.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::io::Errno;
use virtio_queue::QueueState;
use vm_memory::Bytes;
use vmm_sys_util::timerfd::TimerFd;
use zerocopy::IntoBytes;

use super::abi::{InHeader, OutHeader};
use super::message::{Reader, Writer};
use super::server::{Outcome, Server};
use crate::virtio::{ActiveDevice, ActiveQueue, Buffers, Chain, Health, QueueError};
use crate::worker_pool::{Task, Watch, WorkerPool};

/// Workers that one queue may occupy at a time: fewer than a pool has, so that one guest alone never makes it grow.
const MAX_WORKERS: usize = 3;

/// Requests that a worker serves before it lets others use its thread.
const BUDGET: usize = 256;

/// How often a parked lock request is tried again.
const RETRY: Duration = Duration::from_millis(20);

/// Lock requests of one guest that may wait.
const MAX_PARKED: usize = 1024;

struct State {
    queue: ActiveQueue,
    /// Workers at this queue.
    workers: usize,
    /// No worker may enter, and those that are in take nothing more.
    closed: bool,
}

/// A request that waits for a lock.
struct Parked {
    chain: Chain,
    unique: u64,
    queue: Arc<FsQueue>,
}

/// What all queues of a device share.
pub(super) struct Common {
    pub server: Arc<Server>,
    pub health: Arc<Health>,
    parked: Mutex<Vec<Parked>>,
    parked_count: AtomicUsize,
    // The server's count of released locks that parked requests were last tried at.
    tried_at: AtomicU64,
    timer: Mutex<TimerFd>,
}

/// One queue.
pub(super) struct FsQueue {
    state: Mutex<State>,
    left: Condvar,
    common: Arc<Common>,
}

impl Common {
    fn parked(&self) -> MutexGuard<'_, Vec<Parked>> {
        self.parked
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn arm(&self) {
        let mut timer = self.timer.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Err(error) = timer.reset(RETRY, None) {
            self.health
                .fail(format_args!("cannot arm its lock timer: {error}"));
        }
    }

    /// Puts a request that waits aside.
    fn park(&self, parked: Parked) -> Result<(), QueueError> {
        let mut list = self.parked();
        if list.len() >= MAX_PARKED {
            drop(list);
            return parked.finish(Errno::NOLCK);
        }
        list.push(parked);
        self.parked_count.store(list.len(), Ordering::Release);
        let first = list.len() == 1;
        drop(list);
        self.server.metrics().lock_waits.increment();
        if first {
            self.arm();
        }
        Ok(())
    }

    /// Tries the parked requests again.
    fn retry(&self) -> Result<(), QueueError> {
        if self.parked_count.load(Ordering::Acquire) == 0 {
            return Ok(());
        }
        // Under the lock all along: lock calls do not wait, and whoever wants all parked requests gets all.
        let mut list = self.parked();
        self.tried_at.store(self.server.unlocks(), Ordering::Release);
        let mut result = Ok(());
        list.retain(|parked| {
            let len = match serve(&self.server, &parked.chain, |_| {}).0 {
                Served::Blocked(_) => return true,
                Served::Done(len) => len,
                // The guest has made another request of it.
                Served::Interrupt(_) => 0,
            };
            let done = parked.queue.complete(&parked.chain, len);
            if result.is_ok() {
                result = done;
            }
            false
        });
        self.parked_count.store(list.len(), Ordering::Release);
        let any = !list.is_empty();
        drop(list);
        if any {
            self.arm();
        }
        result
    }

    /// Ends the parked requests that `which` picks with EINTR.
    fn interrupt(&self, which: impl Fn(&Parked) -> bool) -> Result<(), QueueError> {
        let mut list = self.parked();
        let (ended, rest) = std::mem::take(&mut *list).into_iter().partition(which);
        *list = rest;
        self.parked_count.store(list.len(), Ordering::Release);
        drop(list);
        let ended: Vec<Parked> = ended;
        ended
            .into_iter()
            .try_for_each(|parked| parked.finish(Errno::INTR))
    }

    /// Whether a lock was released since parked requests were tried last.
    fn retry_is_due(&self) -> bool {
        self.parked_count.load(Ordering::Acquire) > 0
            && self.server.unlocks() != self.tried_at.load(Ordering::Acquire)
    }
}

impl Parked {
    /// Answers with an error.
    fn finish(self, errno: Errno) -> Result<(), QueueError> {
        let len = match Buffers::of(&self.chain) {
            Ok(buffers) => Writer::new(buffers.writable).finish(self.unique, Err(errno)),
            Err(_) => 0,
        };
        self.queue.complete(&self.chain, len)
    }
}

/// What came of a chain.
enum Served {
    Done(u32),
    Blocked(u64),
    Interrupt(u64),
}

/// Runs the request in `chain`. `before` sees its header first. What was wrong with it comes as a complaint.
fn serve(server: &Server, chain: &Chain, before: impl FnOnce(&InHeader)) -> (Served, Option<String>) {
    let buffers = match Buffers::of(chain) {
        Ok(buffers) => buffers,
        Err(error) => {
            server.malformed();
            return (refuse(chain), Some(error.to_string()));
        }
    };
    let mut reader = Reader::new(buffers.readable);
    let writer = Writer::new(buffers.writable);
    let Ok(header) = Server::header(&mut reader) else {
        server.malformed();
        let why = "a request is shorter than its header says".to_owned();
        return (Served::Done(writer.finish(0, Err(Errno::INVAL))), Some(why));
    };
    before(&header);
    match server.handle(header, reader, writer) {
        Outcome::Done { len } => (Served::Done(len), None),
        Outcome::Blocked { unique } => (Served::Blocked(unique), None),
        Outcome::Interrupt { unique } => (Served::Interrupt(unique), None),
        Outcome::Malformed => (
            Served::Done(0),
            Some(format!("request {} cannot be answered", header.opcode)),
        ),
    }
}

/// Answers a chain whose buffers are not all guest memory with EFAULT, if its header and the reply's are. Linux makes
/// such a request when a program passes memory of a DAX window to an unbuffered call.
fn refuse(chain: &Chain) -> Served {
    let ram = chain.memory();
    let mut request: Option<InHeader> = None;
    for descriptor in chain.clone() {
        let len = descriptor.len() as usize;
        if !descriptor.is_write_only() {
            if request.is_none() && len >= size_of::<InHeader>() {
                let mut header = InHeader::default();
                if ram.read_slice(header.as_mut_bytes(), descriptor.addr()).is_ok() {
                    request = Some(header);
                }
            }
            continue;
        }
        let Some(header) = request.filter(|_| len >= size_of::<OutHeader>()) else {
            break;
        };
        let reply = OutHeader {
            len: 16,
            error: -libc::EFAULT,
            unique: header.unique,
        };
        let written = ram.write_slice(reply.as_bytes(), descriptor.addr());
        return Served::Done(if written.is_ok() { reply.len } else { 0 });
    }
    Served::Done(0)
}

impl FsQueue {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Whoever panicked failed the device; the counts are still right.
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn complete(&self, chain: &Chain, len: u32) -> Result<(), QueueError> {
        let mut state = self.lock();
        state.queue.complete(chain.head_index(), len)?;
        state.queue.signal()
    }

    /// The next chain; `None` if there is none (then notifications are on) or none may be taken.
    fn next(&self, state: &mut State) -> Result<Option<Chain>, QueueError> {
        if state.closed || self.common.health.is_failed() {
            return Ok(None);
        }
        state.queue.disable_notification()?;
        let mut chain = state.queue.pop()?;
        if chain.is_none() && state.queue.enable_notification()? {
            // Once more and no further: a guest that plays with the index has to notify.
            chain = state.queue.pop()?;
        }
        Ok(chain)
    }

    /// Before a request that may block: the next one must not wait for this one to end.
    fn let_others_in(&self) -> Result<(), QueueError> {
        let mut state = self.lock();
        if state.queue.enable_notification()? && state.workers < MAX_WORKERS {
            // EAGAIN: a notification is pending.
            let _ = state.queue.notification().write(1);
        }
        Ok(())
    }

    /// Serves chains until there is none, or the budget is spent.
    fn work(self: &Arc<Self>, worker: &mut Worker<'_>) -> Result<(), QueueError> {
        let mut budget = BUDGET;
        let mut state = self.lock();
        loop {
            let Some(chain) = self.next(&mut state)? else {
                worker.leave(&mut state);
                return Ok(());
            };
            drop(state);
            let mut entered = Ok(());
            let (served, complaint) = serve(&self.common.server, &chain, |header| {
                if Server::may_block(header.opcode) {
                    entered = self.let_others_in();
                }
            });
            entered?;
            if let Some(complaint) = complaint {
                self.common.health.complain(complaint);
            }
            match served {
                Served::Done(len) => self.complete(&chain, len)?,
                Served::Blocked(unique) => self.common.park(Parked {
                    chain,
                    unique,
                    queue: Arc::clone(self),
                })?,
                Served::Interrupt(unique) => {
                    self.complete(&chain, 0)?;
                    self.common.interrupt(|parked| parked.unique == unique)?;
                }
            }
            if self.common.retry_is_due() {
                self.common.retry()?;
            }
            state = self.lock();
            budget -= 1;
            if budget == 0 {
                worker.leave(&mut state);
                let _ = state.queue.notification().write(1);
                return Ok(());
            }
        }
    }
}

/// A worker at a queue, from entering to leaving, however it leaves.
struct Worker<'a> {
    queue: &'a Arc<FsQueue>,
    counted: bool,
}

impl<'a> Worker<'a> {
    fn enter(queue: &'a Arc<FsQueue>) -> Option<Self> {
        let mut state = queue.lock();
        if state.closed || state.workers >= MAX_WORKERS {
            return None;
        }
        state.workers += 1;
        Some(Self { queue, counted: true })
    }

    /// Under the lock under which it saw that there is nothing to do.
    fn leave(&mut self, state: &mut State) {
        self.counted = false;
        state.workers -= 1;
        self.queue.left.notify_all();
    }
}

impl Drop for Worker<'_> {
    fn drop(&mut self) {
        if self.counted {
            let queue = self.queue;
            self.leave(&mut queue.lock());
        }
    }
}

impl Task for FsQueue {
    fn run(self: Arc<Self>) {
        let Some(mut worker) = Worker::enter(&self) else {
            return;
        };
        let failure = match catch_unwind(AssertUnwindSafe(|| self.work(&mut worker))) {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "a request panicked (a bug in Cloister)".to_owned(),
        };
        self.common.health.fail(failure);
    }
}

/// The data side of a file system device.
pub(super) struct FsHandler {
    queues: Vec<Option<Arc<FsQueue>>>,
    watches: Vec<Watch>,
    pool: Arc<WorkerPool>,
    common: Arc<Common>,
}

impl FsHandler {
    pub(super) fn new(
        queues: Vec<Option<ActiveQueue>>,
        server: Arc<Server>,
        health: Arc<Health>,
        pool: Arc<WorkerPool>,
    ) -> std::io::Result<Self> {
        let common = Arc::new(Common {
            tried_at: AtomicU64::new(server.unlocks()),
            server,
            health,
            parked: Mutex::default(),
            parked_count: AtomicUsize::new(0),
            timer: Mutex::new(TimerFd::new()?),
        });
        let shared = |queue| {
            Arc::new(FsQueue {
                state: Mutex::new(State {
                    queue,
                    workers: 0,
                    // Until the event loop has it.
                    closed: true,
                }),
                left: Condvar::new(),
                common: Arc::clone(&common),
            })
        };
        Ok(Self {
            queues: queues.into_iter().map(|queue| queue.map(shared)).collect(),
            watches: Vec::new(),
            pool,
            common,
        })
    }

    /// Lets workers in, and has them look at what is in the queues already.
    fn open(&self) {
        for queue in self.live() {
            let mut state = queue.lock();
            if state.closed {
                state.closed = false;
                let _ = state.queue.notification().write(1);
            }
        }
    }

    /// Lets no worker in any more, and waits for those that are.
    fn close(&self) {
        for queue in self.live() {
            queue.lock().closed = true;
        }
        for queue in self.live() {
            let mut state = queue.lock();
            while state.workers > 0 {
                state = queue
                    .left
                    .wait(state)
                    .unwrap_or_else(|poisoned| poisoned.into_inner());
            }
        }
    }

    fn live(&self) -> impl Iterator<Item = &Arc<FsQueue>> {
        self.queues.iter().flatten()
    }
}

impl MutEventSubscriber for FsHandler {
    fn init(&mut self, ops: &mut EventOps) {
        // Only the lock timer is the event loop's; the queues' notifications wake workers.
        let timer = self
            .common
            .timer
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Err(error) = ops.add(Events::new(&*timer, EventSet::IN)) {
            self.common
                .health
                .fail(format_args!("cannot watch its lock timer: {error}"));
            return;
        }
        drop(timer);
        // The first time only; when a paused device comes back they are there.
        if self.watches.is_empty() {
            for queue in self.queues.iter().flatten() {
                let state = queue.lock();
                let task: Arc<dyn Task> = Arc::clone(queue) as _;
                match self.pool.watch(state.queue.notification(), task) {
                    Ok(watch) => self.watches.push(watch),
                    Err(error) => {
                        self.common
                            .health
                            .fail(format_args!("cannot watch its queue: {error}"));
                        return;
                    }
                }
            }
        }
        self.open();
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        let mut timer = self
            .common
            .timer
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        // Armed once: there is one expiry to take.
        let _ = timer.wait();
        drop(timer);
        // Quiesced without leaving the event loop.
        self.open();
        // Lock calls do not wait, but they are system calls on files: a worker's work.
        let common = Arc::clone(&self.common);
        self.pool.submit(move || {
            if let Err(error) = common.retry() {
                common.health.fail(error);
            }
        });
    }
}

impl ActiveDevice for FsHandler {
    /// Ends lock requests that wait with EINTR; what is in the rings and not begun stays there. A device that is still
    /// on its event loop goes on from there; one that was taken off goes on when it comes back.
    fn quiesce(&mut self) {
        self.close();
        if let Err(error) = self.common.interrupt(|_| true) {
            self.common.health.fail(error);
        }
        self.common.arm();
    }

    fn queues(&self) -> Vec<Option<QueueState>> {
        self.queues
            .iter()
            .map(|queue| queue.as_ref().map(|queue| queue.lock().queue.state()))
            .collect()
    }
}

impl Drop for FsHandler {
    fn drop(&mut self) {
        self.watches.clear();
        self.close();
        // Parked requests hold their queue, and so would keep guest memory.
        self.common.parked().clear();
    }
}
