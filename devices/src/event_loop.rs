// SPDX-License-Identifier: Apache-2.0
//! The threads on which the data side of devices runs.
//!
//! One [`EventLoop`] is one thread around an event-manager (epoll). The process has a small fixed number of them,
//! whatever the number of cells. A device is added when its driver sets DRIVER_OK, and removed at reset or when its
//! cell stops.
//!
//! A device must never block or spin here, since others wait behind it: handlers take a bounded amount of work per
//! event and come back for the rest. A handler that panics is removed and its [`Health`] told. One that does not
//! return shows in [`EventLoop::busy`], which the VMM's watchdog reads; [`EventLoop::leave_behind`] then gives its
//! thread up:
//!
//! ```text
//!  thread 1: A B C D ── B does not return ──▶ leave_behind ──▶ thread 1: B      ends when B returns, runs nobody else
//!                                                              thread 2: A C D  each initialised anew, as after a pause
//! ```
//!
//! A handler runs under its own lock and asks under that lock whether its thread still has it. So whatever the old
//! thread was about to do, a handler never runs on it once the new one has begun to initialise it.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
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

/// A handler that runs at the moment.
#[derive(Clone, Debug)]
pub struct Busy {
    /// Number of this run: no other run of this event loop has the same.
    pub run: u64,
    /// For how long it has been running.
    pub elapsed: Duration,
    /// Whose it is.
    pub health: Arc<Health>,
    /// The thread's id, for /proc.
    pub thread: i32,
    member: u64,
}

struct Running {
    run: u64,
    since: Instant,
    member: u64,
    health: Arc<Health>,
}

/// What a thread and those who deal with it share.
#[derive(Default)]
struct Turn {
    running: Mutex<Option<Running>>,
    runs: std::sync::atomic::AtomicU64,
    /// Runs no handler any more, and ends.
    retired: AtomicBool,
    /// Its id, once it has started.
    thread: OnceLock<i32>,
}

impl Turn {
    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        self.running
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// A thread and the way to it.
struct Runner {
    endpoint: RemoteEndpoint<Guarded>,
    turn: Arc<Turn>,
    thread: JoinHandle<()>,
}

impl Runner {
    fn start(name: &str) -> Result<Self, EventLoopError> {
        let mut manager = EventManager::<Guarded>::new().map_err(EventLoopError::Epoll)?;
        let endpoint = manager.remote_endpoint();
        let turn = Arc::<Turn>::default();
        let own = Arc::clone(&turn);
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .stack_size(256 << 10)
            .spawn(move || {
                let _ = own.thread.set(rustix::thread::gettid().as_raw_nonzero().get());
                while !own.retired.load(Ordering::Acquire) {
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
            turn,
            thread,
        })
    }

    fn retire(&self) {
        self.turn.retired.store(true, Ordering::Release);
        // It is gone already, or will see it.
        let _ = self.endpoint.kick();
    }

    fn add(&self, number: u64, handler: &Handler, health: &Arc<Health>) -> Result<Place, EventLoopError> {
        let id = Arc::new(OnceLock::new());
        let set = Arc::clone(&id);
        let guarded = Guarded {
            member: number,
            handler: Arc::clone(handler),
            health: Arc::clone(health),
            turn: Arc::clone(&self.turn),
        };
        self.endpoint
            .fire(move |ops| {
                // Set exactly once, here.
                let _ = set.set(ops.add_subscriber(guarded));
            })
            .map_err(|_| EventLoopError::Gone)?;
        Ok(Place {
            endpoint: self.endpoint.clone(),
            id,
        })
    }
}

/// Where a handler is.
struct Place {
    endpoint: RemoteEndpoint<Guarded>,
    id: Arc<OnceLock<SubscriberId>>,
}

struct Member {
    handler: Handler,
    health: Arc<Health>,
    place: Place,
}

/// Somebody waits for a handler to be out of its loop.
#[derive(Default)]
struct Removal {
    done: Mutex<bool>,
    changed: Condvar,
}

impl Removal {
    fn finish(&self) {
        *self.done.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = true;
        self.changed.notify_all();
    }

    fn wait(&self) {
        let mut done = self.done.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        while !*done {
            done = self
                .changed
                .wait(done)
                .unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }
}

/// Finishes a removal whether its closure is run or dropped with the loop.
struct Finish(Arc<Removal>);

impl Drop for Finish {
    fn drop(&mut self) {
        self.0.finish();
    }
}

struct Inner {
    /// `None` only while dropping.
    runner: Option<Runner>,
    members: HashMap<u64, Member>,
    removals: HashMap<u64, Arc<Removal>>,
    next: u64,
}

struct Shared {
    name: String,
    inner: Mutex<Inner>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing panics half-way through a change.
        self.inner.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// One thread that runs device handlers.
pub struct EventLoop {
    shared: Arc<Shared>,
}

impl EventLoop {
    /// Starts the thread under `name` (at most 15 bytes show).
    pub fn new(name: &str) -> Result<Self, EventLoopError> {
        let inner = Inner {
            runner: Some(Runner::start(name)?),
            members: HashMap::new(),
            removals: HashMap::new(),
            next: 0,
        };
        Ok(Self {
            shared: Arc::new(Shared {
                name: name.to_owned(),
                inner: Mutex::new(inner),
            }),
        })
    }

    /// Adds a handler. Returns at once; the handler's `init` runs on the loop's thread.
    pub fn add(&self, handler: Handler, health: Arc<Health>) -> Result<Registration, EventLoopError> {
        let mut inner = self.shared.lock();
        let number = inner.next;
        inner.next += 1;
        let runner = inner.runner.as_ref().ok_or(EventLoopError::Gone)?;
        let place = runner.add(number, &handler, &health)?;
        let member = Member {
            handler,
            health,
            place,
        };
        inner.members.insert(number, member);
        Ok(Registration {
            shared: Arc::clone(&self.shared),
            number,
        })
    }

    /// The handler that is running now, if one is.
    pub fn busy(&self) -> Option<Busy> {
        let inner = self.shared.lock();
        let turn = &inner.runner.as_ref()?.turn;
        let running = turn.running();
        running.as_ref().map(|running| Busy {
            run: running.run,
            elapsed: running.since.elapsed(),
            health: Arc::clone(&running.health),
            thread: turn.thread.get().copied().unwrap_or(0),
            member: running.member,
        })
    }

    /// Gives the thread up to `stuck` if that still runs, and has another thread run all other handlers. Answers
    /// whether it did so. The old thread ends when the handler returns.
    pub fn leave_behind(&self, stuck: &Busy) -> Result<bool, EventLoopError> {
        let mut inner = self.shared.lock();
        let Inner {
            runner,
            members,
            removals,
            ..
        } = &mut *inner;
        let Some(old) = runner.as_ref() else {
            return Ok(false);
        };
        // Held until the thread is retired: should the handler return now, it waits for this before it goes on.
        let running = old.turn.running();
        if running.as_ref().is_none_or(|running| running.run != stuck.run) {
            return Ok(false);
        }
        let new = Runner::start(&self.shared.name)?;
        old.turn.retired.store(true, Ordering::Release);
        drop(running);
        old.retire();
        for (number, member) in members.iter_mut().filter(|(number, _)| **number != stuck.member) {
            match new.add(*number, &member.handler, &member.health) {
                Ok(place) => member.place = place,
                // Not reached: its thread has just been started.
                Err(error) => member.health.fail(error),
            }
        }
        // Who waits for one of the others to be out of the old loop waits no longer: it does not run there any more.
        for (_, removal) in removals.extract_if(|number, _| *number != stuck.member) {
            removal.finish();
        }
        *runner = Some(new);
        Ok(true)
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        let runner = self.shared.lock().runner.take();
        if let Some(runner) = runner {
            runner.retire();
            // Handlers are contained, so the thread cannot have panicked.
            let _ = runner.thread.join();
        }
    }
}

/// A handler's place in an event loop. Dropping it takes the handler out and waits until it no longer runs.
///
/// Must not be dropped on the loop's own thread.
pub struct Registration {
    shared: Arc<Shared>,
    number: u64,
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut inner = self.shared.lock();
        // Inserted by `add`, removed only here.
        let Some(member) = inner.members.remove(&self.number) else {
            return;
        };
        let removal = Arc::<Removal>::default();
        inner.removals.insert(self.number, Arc::clone(&removal));
        drop(inner);
        let Place { endpoint, id } = member.place;
        let finish = Finish(Arc::clone(&removal));
        // Closures run in the order they were sent: `add`'s has set the id by now. A loop that is gone, or ends with
        // this in its queue, has nothing to take out and drops the closure.
        let _ = endpoint.fire(move |ops| {
            if let Some(id) = id.get() {
                let _ = ops.remove_subscriber(*id);
            }
            drop(finish);
        });
        removal.wait();
        self.shared.lock().removals.remove(&self.number);
    }
}

/// A handler on a thread, and who to tell when it panics.
struct Guarded {
    member: u64,
    handler: Handler,
    health: Arc<Health>,
    turn: Arc<Turn>,
}

impl Guarded {
    fn run(&self, f: impl FnOnce(&mut (dyn MutEventSubscriber + Send))) -> Result<(), ()> {
        if self.health.is_failed() {
            return Err(());
        }
        *self.turn.running() = Some(Running {
            run: self.turn.runs.fetch_add(1, Ordering::Relaxed),
            since: Instant::now(),
            member: self.member,
            health: Arc::clone(&self.health),
        });
        let result = catch_unwind(AssertUnwindSafe(|| {
            // Poisoned means this handler panicked before; it has been failed then and is not run again.
            if let Ok(mut handler) = self.handler.lock()
                // Under the handler's lock: see above.
                && !self.turn.retired.load(Ordering::Acquire)
            {
                f(&mut *handler);
            }
        }));
        *self.turn.running() = None;
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

    /// Does not return from a notification before it is released.
    struct Sleeper {
        fd: EventFd,
        release: mpsc::Receiver<()>,
        inside: mpsc::Sender<()>,
    }

    impl MutEventSubscriber for Sleeper {
        fn init(&mut self, ops: &mut EventOps) {
            ops.add(Events::new(&self.fd, EventSet::IN)).unwrap();
        }
        fn process(&mut self, _: Events, _: &mut EventOps) {
            self.fd.read().unwrap();
            self.inside.send(()).unwrap();
            let _ = self.release.recv();
        }
    }

    #[test]
    fn the_others_go_on_without_a_stuck_handler() {
        let event_loop = EventLoop::new("test-loop").unwrap();
        assert!(event_loop.busy().is_none());
        let counter = || {
            let fd = EventFd::new(0).unwrap();
            let (sender, seen) = mpsc::channel();
            let handler = Arc::new(Mutex::new(Counter {
                fd: fd.try_clone().unwrap(),
                seen: sender,
            }));
            let health = Arc::new(Health::new("counter"));
            (fd, seen, event_loop.add(handler, health).unwrap())
        };
        let leaves_while_stuck = counter();
        let stays = counter();
        let fd = EventFd::new(0).unwrap();
        let (release, released) = mpsc::channel();
        let (inside, entered) = mpsc::channel();
        let sleeper = Sleeper {
            fd: fd.try_clone().unwrap(),
            release: released,
            inside,
        };
        let health = Arc::new(Health::new("sleeper"));
        let sleeper = event_loop
            .add(Arc::new(Mutex::new(sleeper)), Arc::clone(&health))
            .unwrap();
        fd.write(1).unwrap();
        entered.recv().unwrap();
        let busy = event_loop.busy().unwrap();
        assert!(Arc::ptr_eq(&busy.health, &health) && busy.thread != 0);
        stays.0.write(1).unwrap();
        std::thread::scope(|scope| {
            // Comes to its end only because the thread is given up.
            let leaving = scope.spawn(|| drop(leaves_while_stuck.2));
            assert!(stays.1.recv_timeout(Duration::from_millis(50)).is_err());
            assert!(event_loop.leave_behind(&busy).unwrap());
            leaving.join().unwrap();
        });
        assert_eq!(stays.1.recv().unwrap(), 1);
        assert!(!event_loop.leave_behind(&busy).unwrap());
        stays.0.write(2).unwrap();
        assert_eq!(stays.1.recv().unwrap(), 2);
        // After the handler's return its old thread runs nothing any more.
        release.send(()).unwrap();
        drop(sleeper);
        fd.write(1).unwrap();
        assert!(entered.recv_timeout(Duration::from_millis(50)).is_err());
        stays.0.write(3).unwrap();
        assert_eq!(stays.1.recv().unwrap(), 3);
        drop(stays.2);
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
