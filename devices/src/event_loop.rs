// SPDX-License-Identifier: Apache-2.0
//! The threads on which the data side of devices runs.
//!
//! One [`EventLoop`] is one thread around an event-manager (epoll). The process has a small fixed number of them,
//! whatever the number of cells. A device is added when its driver sets DRIVER_OK, and removed at reset or when its
//! cell stops.
//!
//! A device must never block or spin here, since others wait behind it: handlers take a bounded amount of work per
//! event and come back for the rest. A handler that panics is removed and its [`Health`] told; one that does not
//! return shows in [`EventLoop::busy`], which the cell's watchdog reads.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, RemoteEndpoint, SubscriberId};

use crate::virtio::Health;

/// What an event loop holds: a device's data side.
pub type Handler = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// Why an event loop could not be started or used.
#[derive(Debug, thiserror::Error)]
pub enum EventLoopError {
    /// epoll or eventfd could not be created (usually: out of file descriptors).
    #[error("cannot set up epoll for device I/O")]
    Epoll(#[source] event_manager::Error),
    /// The thread could not be started.
    #[error("cannot start the device I/O thread")]
    Thread(#[source] std::io::Error),
    /// The loop's thread is gone.
    #[error("the device I/O thread is gone")]
    Gone,
}

type Busy = Arc<Mutex<Option<(Instant, Arc<Health>)>>>;

/// One thread that runs device handlers.
pub struct EventLoop {
    endpoint: RemoteEndpoint<Guarded>,
    busy: Busy,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl EventLoop {
    /// Starts the thread under `name` (at most 15 bytes show).
    pub fn new(name: &str) -> Result<Self, EventLoopError> {
        let mut manager = EventManager::<Guarded>::new().map_err(EventLoopError::Epoll)?;
        let endpoint = manager.remote_endpoint();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .stack_size(256 << 10)
            .spawn(move || {
                while !stopped.load(Ordering::Acquire) {
                    if let Err(error) = manager.run() {
                        log::error!("device I/O thread: epoll failed: {error}");
                        // Not a device's doing, and nothing to be gained from spinning on it.
                        std::thread::sleep(Duration::from_millis(10));
                    }
                }
            })
            .map_err(EventLoopError::Thread)?;
        Ok(Self {
            endpoint,
            busy: Busy::default(),
            stop,
            thread: Some(thread),
        })
    }

    /// Adds a handler. Returns at once; the handler's `init` runs on the loop's thread.
    pub fn add(&self, handler: Handler, health: Arc<Health>) -> Result<Registration, EventLoopError> {
        let id = Arc::new(OnceLock::new());
        let set = Arc::clone(&id);
        let guarded = Guarded {
            handler,
            health,
            busy: Arc::clone(&self.busy),
        };
        self.endpoint
            .fire(move |ops| {
                // Set exactly once, here.
                let _ = set.set(ops.add_subscriber(guarded));
            })
            .map_err(|_| EventLoopError::Gone)?;
        Ok(Registration {
            endpoint: self.endpoint.clone(),
            id,
        })
    }

    /// The handler that is running now and for how long, if one is.
    pub fn busy(&self) -> Option<(Duration, Arc<Health>)> {
        let busy = self.busy.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        busy.as_ref()
            .map(|(since, health)| (since.elapsed(), Arc::clone(health)))
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let _ = self.endpoint.kick();
        if let Some(thread) = self.thread.take() {
            // Handlers are contained, so the thread cannot have panicked.
            let _ = thread.join();
        }
    }
}

/// A handler's place in an event loop. Dropping it takes the handler out and waits until it no longer runs.
///
/// Must not be dropped on the loop's own thread.
pub struct Registration {
    endpoint: RemoteEndpoint<Guarded>,
    id: Arc<OnceLock<SubscriberId>>,
}

impl Drop for Registration {
    fn drop(&mut self) {
        let id = Arc::clone(&self.id);
        // Closures run in the order they were sent: `add`'s has set the id by now. A loop that is gone has nothing
        // to take out.
        let _ = self
            .endpoint
            .call_blocking(move |ops| -> Result<(), event_manager::Error> {
                if let Some(id) = id.get() {
                    ops.remove_subscriber(*id)?;
                }
                Ok(())
            });
    }
}

/// A handler, and who to tell when it panics.
struct Guarded {
    handler: Handler,
    health: Arc<Health>,
    busy: Busy,
}

impl Guarded {
    fn run(&self, f: impl FnOnce(&mut (dyn MutEventSubscriber + Send))) -> Result<(), ()> {
        if self.health.is_failed() {
            return Err(());
        }
        *self.busy.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) =
            Some((Instant::now(), Arc::clone(&self.health)));
        let result = catch_unwind(AssertUnwindSafe(|| {
            // Poisoned means this handler panicked before; it has been failed then and is not run again.
            if let Ok(mut handler) = self.handler.lock() {
                f(&mut *handler);
            }
        }));
        *self.busy.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = None;
        result.map_err(|_| self.health.fail("its handler panicked (a bug in Cloister)"))
    }
}

impl MutEventSubscriber for Guarded {
    fn init(&mut self, ops: &mut EventOps) {
        // A failed handler registers nothing.
        let _ = self.run(|handler| handler.init(ops));
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if self.run(|handler| handler.process(events, ops)).is_err() {
            // Level-triggered: an event that nobody handles any more would spin the loop.
            let _ = ops.remove(events);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use event_manager::EventSet;
    use std::sync::mpsc;
    use vmm_sys_util::eventfd::EventFd;

    struct Counter {
        fd: EventFd,
        seen: mpsc::Sender<u64>,
    }

    impl MutEventSubscriber for Counter {
        fn init(&mut self, ops: &mut EventOps) {
            ops.add(Events::new(&self.fd, EventSet::IN)).unwrap();
        }
        fn process(&mut self, _: Events, _: &mut EventOps) {
            let n = self.fd.read().unwrap();
            assert!(n != 13, "expected by the test");
            self.seen.send(n).unwrap();
        }
    }

    #[test]
    fn a_panicking_handler_is_removed_and_the_others_go_on() {
        let event_loop = EventLoop::new("test-loop").unwrap();
        let add = || {
            let fd = EventFd::new(0).unwrap();
            let (sender, seen) = mpsc::channel();
            let health = Arc::new(Health::new("test"));
            let handler = Arc::new(Mutex::new(Counter {
                fd: fd.try_clone().unwrap(),
                seen: sender,
            }));
            let registration = event_loop.add(handler, Arc::clone(&health)).unwrap();
            (fd, seen, health, registration)
        };
        let good = add();
        let bad = add();
        bad.0.write(13).unwrap();
        good.0.write(1).unwrap();
        assert_eq!(good.1.recv().unwrap(), 1);
        for _ in 0..500 {
            if bad.2.is_failed() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(bad.2.is_failed());
        good.0.write(2).unwrap();
        assert_eq!(good.1.recv().unwrap(), 2);
        drop(good.3);
        good.0.write(3).unwrap();
        assert!(good.1.recv_timeout(Duration::from_millis(50)).is_err());
    }
}
