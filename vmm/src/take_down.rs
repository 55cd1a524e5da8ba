// SPDX-License-Identifier: Apache-2.0
//! Taking stopped cells apart, off everybody's way: closing a VM costs about 14 ms.
//!
//! One thread does it, one cell after the other, and ends when there is no more to do. A cell with a stuck handler
//! makes it wait until that returns; another thread then takes on the cells behind it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::cell::{Machine, Shared};

/// Looks without a cell done until another thread is started.
const PATIENCE: u32 = 3;

#[derive(Default)]
struct Waiting {
    cells: VecDeque<(Arc<Shared>, Box<Machine>)>,
    threads: usize,
    /// Cells done so far.
    done: u64,
}

/// The cells that wait for it, and the threads that do it.
#[derive(Default)]
pub(crate) struct TakeDown {
    waiting: Arc<Mutex<Waiting>>,
    threads: Vec<JoinHandle<()>>,
    /// Cells done at the last look, and looks since with the same.
    seen: (u64, u32),
}

fn lock(waiting: &Mutex<Waiting>) -> MutexGuard<'_, Waiting> {
    // Cells are taken apart outside of the lock.
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

impl TakeDown {
    /// Takes this cell apart, soon.
    pub(crate) fn add(&mut self, cell: Arc<Shared>, machine: Box<Machine>) {
        let mut waiting = lock(&self.waiting);
        waiting.cells.push_back((cell, machine));
        let idle = waiting.threads == 0;
        drop(waiting);
        if idle {
            self.start_thread();
        }
    }

    /// Whether all is done.
    pub(crate) fn is_idle(&self) -> bool {
        let waiting = lock(&self.waiting);
        waiting.threads == 0 && waiting.cells.is_empty()
    }

    /// A regular look: nobody waits for long behind a cell that does not come apart.
    pub(crate) fn look(&mut self) {
        let waiting = lock(&self.waiting);
        let (done, looks) = self.seen;
        if waiting.cells.is_empty() || waiting.done != done {
            self.seen = (waiting.done, 0);
            return;
        }
        drop(waiting);
        self.seen = (done, looks + 1);
        if looks + 1 >= PATIENCE {
            self.seen = (done, 0);
            self.start_thread();
        }
    }

    fn start_thread(&mut self) {
        self.threads.retain(|thread| !thread.is_finished());
        lock(&self.waiting).threads += 1;
        let waiting = Arc::clone(&self.waiting);
        let spawned = std::thread::Builder::new()
            .name("take-down".to_owned())
            .stack_size(256 << 10)
            .spawn(move || take_down(&waiting));
        match spawned {
            Ok(thread) => self.threads.push(thread),
            Err(error) => {
                log::error!("cannot start a thread that frees stopped cells: {error}");
                take_down(&self.waiting);
            }
        }
    }

    /// Waits for the threads.
    pub(crate) fn finish(self) {
        for thread in self.threads {
            // It runs no code of devices but their removal, and does not panic.
            let _ = thread.join();
        }
    }
}

fn take_down(waiting: &Mutex<Waiting>) {
    loop {
        let mut all = lock(waiting);
        let Some((cell, machine)) = all.cells.pop_front() else {
            all.threads -= 1;
            return;
        };
        drop(all);
        machine.take_down(&cell);
        drop(cell);
        lock(waiting).done += 1;
    }
}
