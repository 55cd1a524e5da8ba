// SPDX-License-Identifier: Apache-2.0
//! A fixed number of threads for requests that can block, shared by the devices of all cells.
//!
//! A file-system request can wait for a disk, so it must not run on an event loop. The pool runs jobs in the order
//! they were submitted. A job that panics is contained: the thread goes on, and the job's owner learns of it because
//! whatever the job was to complete is dropped.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    idle: usize,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Jobs run outside the lock, so the queue behind a poisoned lock is whole.
        self.queue.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// The pool. Dropping it runs what was submitted, then joins its threads.
pub struct WorkerPool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl WorkerPool {
    /// Starts `threads` threads (at least one).
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let mut pool = Self {
            shared: Arc::default(),
            threads: Vec::new(),
        };
        for index in 0..threads.max(1) {
            let shared = Arc::clone(&pool.shared);
            let thread = std::thread::Builder::new()
                .name(format!("worker-{index}"))
                .stack_size(256 << 10)
                .spawn(move || run(&shared))?;
            pool.threads.push(thread);
        }
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
            self.shared.wake.notify_one();
        }
    }
}

impl Drop for WorkerPool {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            // A job may hold the last reference to the pool: that thread ends by itself, right after this.
            if thread.thread().id() == std::thread::current().id() {
                continue;
            }
            // Jobs are contained, so the thread cannot have panicked.
            let _ = thread.join();
        }
    }
}

fn run(shared: &Shared) {
    let mut queue = shared.lock();
    loop {
        if let Some(job) = queue.jobs.pop_front() {
            drop(queue);
            if catch_unwind(AssertUnwindSafe(job)).is_err() {
                log::error!("a device's request panicked; its device has been told");
            }
            queue = shared.lock();
        } else if queue.closed {
            return;
        } else {
            queue.idle += 1;
            queue = shared
                .wake
                .wait(queue)
                .unwrap_or_else(|poisoned| poisoned.into_inner());
            queue.idle -= 1;
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
}
