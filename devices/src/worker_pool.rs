// SPDX-License-Identifier: Apache-2.0
//! Threads for requests that can block, shared by the devices of all cells.
//!
//! A file-system request can wait for a disk, so it must not run on an event loop. There are two ways in:
//!
//! - [`WorkerPool::submit`] queues a job, which runs as soon as a thread is free.
//! - [`WorkerPool::watch`] ties a [`Task`] to an eventfd: whenever it is signalled, an idle thread runs the task, with
//!   no other thread woken in between. A queue whose requests block is served so, one wake-up per request.
//!
//! All idle threads wait in one epoll, for the watched eventfds and for one of the pool's own, by which a submitted
//! job wakes a thread. The pool has a fixed number of threads as long as one of them is idle. When the last idle one
//! takes work on, another is started (up to [`WorkerPool::EXTRA`] more), so that requests that all wait for a slow
//! disk do not keep other cells' requests from running; it ends when it has had nothing to do for a second. What one
//! device may occupy is the device's to limit.
//!
//! A job or task that panics is contained: the thread goes on, and the job's owner learns of it because whatever the
//! job was to complete is dropped.

use std::collections::{HashMap, VecDeque};
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::thread::{JoinHandle, ThreadId};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::rate_limit::RateLimit;

type Job = Box<dyn FnOnce() + Send>;

/// What runs when a watched eventfd is signalled. It may run on several threads at once.
pub trait Task: Send + Sync {
    /// Does what there is to do.
    fn run(self: Arc<Self>);
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// Threads in epoll_wait, or about to be.
    idle: usize,
    threads: HashMap<ThreadId, JoinHandle<()>>,
    /// Threads started so far, for their names.
    started: usize,
    closed: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    epoll: Epoll,
    wake: EventFd,
    watched: RwLock<HashMap<u64, Arc<dyn Task>>>,
    /// Threads that stay.
    base: usize,
    complaints: RateLimit,
}

/// The pool's own eventfd among those watched.
const WAKE: u64 = 0;

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Jobs run outside the lock, so the queue behind a poisoned lock is whole.
        self.queue.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn wake(&self) {
        // Edge-triggered: each write is an event, whatever the count; at its maximum a wake-up is pending anyway.
        let _ = self.wake.write(1);
    }

    fn start_thread(self: &Arc<Self>, queue: &mut Queue) -> std::io::Result<()> {
        let shared = Arc::clone(self);
        let stays = queue.threads.len() < self.base;
        let thread = std::thread::Builder::new()
            .name(format!("worker-{}", queue.started))
            .stack_size(256 << 10)
            .spawn(move || run(&shared, stays))?;
        queue.started = queue.started.wrapping_add(1);
        queue.threads.insert(thread.thread().id(), thread);
        Ok(())
    }

    /// Called by a thread that takes work on: starts another if nobody is left to take the next.
    fn keep_one_idle(self: &Arc<Self>, queue: &mut Queue) {
        if queue.idle > 0 || queue.closed || queue.threads.len() >= self.base + WorkerPool::EXTRA {
            return;
        }
        if let Err(error) = self.start_thread(queue) {
            // The work is done all the same, only later.
            let what = format_args!("cannot start another thread: {error}");
            self.complaints.warn("worker pool", what);
        }
    }

    /// Waits for an event; `None` if a second went by.
    fn wait(&self, stays: bool) -> Option<u64> {
        const LINGER_MS: i32 = 1000;
        let mut events = [EpollEvent::default()];
        let timeout = if stays { -1 } else { LINGER_MS };
        match self.epoll.wait(timeout, &mut events) {
            Ok(0) => None,
            Ok(_) => Some(events[0].data()),
            // EINTR, and nothing else: look at the queue.
            Err(_) => Some(WAKE),
        }
    }

    fn listen(&self, eventfd: &EventFd, token: u64) -> std::io::Result<()> {
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token);
        self.epoll.ctl(ControlOperation::Add, eventfd.as_raw_fd(), event)
    }
}

/// The pool. Dropping it runs what was submitted, then joins its threads.
pub struct WorkerPool {
    shared: Arc<Shared>,
}

impl WorkerPool {
    /// Threads beyond the fixed number that may exist while all others are busy.
    pub const EXTRA: usize = 28;

    /// Starts `threads` threads (at least one).
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let epoll = Epoll::new()?;
        let wake = EventFd::new(EFD_NONBLOCK)?;
        let base = threads.max(1);
        let pool = Self {
            shared: Arc::new(Shared {
                queue: Mutex::default(),
                epoll,
                wake,
                watched: RwLock::default(),
                base,
                complaints: RateLimit::new(),
            }),
        };
        pool.shared.listen(&pool.shared.wake, WAKE)?;
        let mut queue = pool.shared.lock();
        for _ in 0..base {
            pool.shared.start_thread(&mut queue)?;
        }
        drop(queue);
        Ok(pool)
    }

    /// Queues `job`; it runs as soon as a thread is free.
    pub fn submit(&self, job: impl FnOnce() + Send + 'static) {
        let mut queue = self.shared.lock();
        queue.jobs.push_back(Box::new(job));
        // A thread that is awake already takes the job without a system call from here.
        let wake = queue.idle > 0;
        drop(queue);
        if wake {
            self.shared.wake();
        }
    }

    /// Runs `task` whenever `eventfd` is signalled, until the result is dropped. The count is left alone: each signal
    /// runs the task (signals that nobody took yet count once), on another thread if it is running already.
    pub fn watch(&self, eventfd: &EventFd, task: Arc<dyn Task>) -> std::io::Result<Watch> {
        // A descriptor of its own: the same eventfd may be watched elsewhere.
        let eventfd = eventfd.try_clone()?;
        let token = next_token();
        self.shared
            .watched
            .write()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .insert(token, task);
        let watch = Watch {
            shared: Arc::clone(&self.shared),
            token,
            eventfd,
        };
        // If this fails, dropping `watch` takes the task out again.
        self.shared.listen(&watch.eventfd, token)?;
        Ok(watch)
    }
}

/// Numbers for watches, never used twice.
fn next_token() -> u64 {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(WAKE + 1);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

/// A watched eventfd. After dropping it the task is not started any more; it may still be running.
pub struct Watch {
    shared: Arc<Shared>,
    token: u64,
    eventfd: EventFd,
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Fails only if it was not added.
        let _ = self.shared.epoll.ctl(
            ControlOperation::Delete,
            self.eventfd.as_raw_fd(),
            EpollEvent::default(),
        );
        self.shared
            .watched
            .write()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .remove(&self.token);
    }
}

impl Drop for WorkerPool {
    fn drop(&mut self) {
        let mut queue = self.shared.lock();
        queue.closed = true;
        let threads = std::mem::take(&mut queue.threads);
        drop(queue);
        // Each thread that ends wakes the next.
        self.shared.wake();
        for (id, thread) in threads {
            // A job may hold the last reference to the pool: that thread ends by itself, right after this.
            if id == std::thread::current().id() {
                continue;
            }
            // Jobs are contained, so the thread cannot have panicked.
            let _ = thread.join();
        }
    }
}

fn contained(work: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(work)).is_err() {
        log::error!("a device's request panicked; its device has been told");
    }
}

fn run(shared: &Arc<Shared>, stays: bool) {
    let mut queue = shared.lock();
    loop {
        if let Some(job) = queue.jobs.pop_front() {
            shared.keep_one_idle(&mut queue);
            drop(queue);
            contained(job);
            queue = shared.lock();
            continue;
        }
        if queue.closed {
            drop(queue);
            shared.wake();
            return;
        }
        queue.idle += 1;
        drop(queue);
        let event = shared.wait(stays);
        queue = shared.lock();
        queue.idle -= 1;
        match event {
            Some(WAKE) => {}
            None if queue.jobs.is_empty() && !queue.closed => {
                // Nobody joins it any more.
                queue.threads.remove(&std::thread::current().id());
                return;
            }
            None => {}
            Some(token) => {
                shared.keep_one_idle(&mut queue);
                drop(queue);
                let task = shared
                    .watched
                    .read()
                    .unwrap_or_else(|poisoned| poisoned.into_inner())
                    .get(&token)
                    .cloned();
                if let Some(task) = task {
                    contained(|| task.run());
                }
                queue = shared.lock();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_job_may_drop_the_pool() {
        let pool = std::sync::Arc::new(WorkerPool::new(2).unwrap());
        let (sender, receiver) = mpsc::channel();
        let last = std::sync::Arc::clone(&pool);
        let (go, wait) = mpsc::channel::<()>();
        pool.submit(move || {
            wait.recv().unwrap();
            drop(last);
            sender.send(()).unwrap();
        });
        drop(pool);
        go.send(()).unwrap();
        receiver.recv().unwrap();
    }

    #[test]
    fn every_job_runs_even_after_one_panicked() {
        let pool = WorkerPool::new(2).unwrap();
        let (sender, receiver) = mpsc::channel();
        pool.submit(|| panic!("expected by the test"));
        for n in 0..100 {
            let sender = sender.clone();
            pool.submit(move || sender.send(n).unwrap());
        }
        drop(pool);
        drop(sender);
        let mut seen: Vec<i32> = receiver.iter().collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..100).collect::<Vec<_>>());
    }

    struct Recorder {
        sender: mpsc::Sender<ThreadId>,
        go: Mutex<mpsc::Receiver<()>>,
    }

    impl Task for Recorder {
        fn run(self: Arc<Self>) {
            self.sender.send(std::thread::current().id()).unwrap();
            let _ = self.go.lock().unwrap().recv();
        }
    }

    fn recorder() -> (Arc<Recorder>, mpsc::Receiver<ThreadId>, mpsc::Sender<()>) {
        let (sender, receiver) = mpsc::channel();
        let (release, go) = mpsc::channel();
        let go = Mutex::new(go);
        (Arc::new(Recorder { sender, go }), receiver, release)
    }

    #[test]
    fn tasks_that_block_do_not_keep_others_from_running() {
        let pool = WorkerPool::new(1).unwrap();
        let fd = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut blocked = Vec::new();
        for _ in 0..5 {
            let (task, runs, release) = recorder();
            let fd = EventFd::new(EFD_NONBLOCK).unwrap();
            let watch = pool.watch(&fd, task).unwrap();
            fd.write(1).unwrap();
            runs.recv().unwrap();
            blocked.push((watch, release, fd));
        }
        let (task, runs, release) = recorder();
        let watch = pool.watch(&fd, task).unwrap();
        for _ in 0..3 {
            fd.write(1).unwrap();
            runs.recv().unwrap();
            release.send(()).unwrap();
        }
        let (sender, receiver) = mpsc::channel();
        pool.submit(move || sender.send(()).unwrap());
        receiver.recv().unwrap();
        // A watch that is gone runs nothing.
        drop(watch);
        fd.write(1).unwrap();
        drop(blocked);
        drop(pool);
        assert!(runs.try_recv().is_err());
    }

    #[test]
    fn extra_threads_go_when_they_are_idle() {
        let pool = WorkerPool::new(2).unwrap();
        let (release, go) = mpsc::channel::<()>();
        let go = Arc::new(Mutex::new(go));
        for _ in 0..6 {
            let go = Arc::clone(&go);
            pool.submit(move || {
                let _ = go.lock().unwrap().recv();
            });
        }
        let threads = || pool.shared.lock().threads.len();
        let until = |what: &dyn Fn() -> bool| {
            for _ in 0..2000 {
                if what() {
                    return true;
                }
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            false
        };
        assert!(until(&|| threads() > 2));
        drop(release);
        assert!(until(&|| threads() == 2));
    }
}
