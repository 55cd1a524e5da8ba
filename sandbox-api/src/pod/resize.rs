// SPDX-License-Identifier: Apache-2.0
//! A pod's VM follows what its containers may use.
//!
//! It has what the pod as a whole was promised, or what its containers' limits and requests add up to if that is more
//! ([`Sizing`]); never less than it started with, never more than the sandboxer allows. It grows before the guest's cgroups
//! allow more, and shrinks after they allow less:
//!
//! ```text
//!  change() ──▶ larger? vCPUs made and set online, memory plugged ──▶ the cgroup's limits ──▶ settle() ──▶ smaller?
//! ```
//!
//! Memory that the guest cannot let go of stays plugged; it goes on trying.

use super::guest::Guest;
use super::size::{Demand, Limits, Size, Sizing, TooMuch};
use super::vm::QUICK;
use crate::sync::lock;
use cloister_protocol::pod::{OnlineRequest, PodClient};
use cloister_protocol::ttrpc::{self, context::with_duration};
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tracing::Span;

/// Time for a guest to take memory, which is milliseconds for one that does.
const PATIENCE: Duration = Duration::from_secs(20);

/// Why a VM did not become larger.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The sandboxer allows less.
    #[error(transparent)]
    TooMuch(#[from] TooMuch),
    /// Memory that the guest does not take.
    #[error(
        "the guest has taken {plugged} of the {wanted} bytes of memory that it was given (does its kernel have virtio-mem?)"
    )]
    Memory {
        /// Beyond what it started with.
        wanted: u64,
        /// What came of it.
        plugged: u64,
    },
    /// Memory that there is no room for.
    #[error(
        "the virtual machine can be given {possible} bytes of memory while it runs, not {wanted} (reserved huge pages cannot be given)"
    )]
    Room {
        /// Beyond what it started with.
        wanted: u64,
        /// What can be asked for.
        possible: u64,
    },
    /// The host's kernel refused.
    #[error("cannot make the virtual machine larger")]
    Host(#[source] io::Error),
    /// The agent.
    #[error("cannot set processors online: {0}")]
    Agent(ttrpc::Error),
}

/// Who needs something.
#[derive(Default)]
struct Wanted {
    /// The pod as a whole.
    pod: Demand,
    containers: HashMap<String, Limits>,
}

/// See the module.
pub struct Resizer {
    guest: Arc<dyn Guest>,
    pod: PodClient,
    start: Size,
    /// vCPUs that it can have. More are of no use to a limit, which holds all the same.
    possible: u8,
    sizing: Sizing,
    wanted: Mutex<Wanted>,
    /// What the VM has. Held while that changes.
    now: tokio::sync::Mutex<Size>,
    /// The same when it last changed, for those who do not wait.
    known: Mutex<Size>,
    /// Whoever asks, it is about this pod.
    span: Span,
}

impl Resizer {
    /// For a VM that has started with `start`, and can have `possible` vCPUs. What is logged is so in the span that this is
    /// called in.
    pub fn new(guest: Arc<dyn Guest>, pod: PodClient, start: Size, possible: u8, sizing: Sizing) -> Self {
        Self {
            guest,
            pod,
            start,
            possible: possible.max(start.cpus),
            sizing,
            wanted: Mutex::default(),
            now: tokio::sync::Mutex::new(start),
            known: Mutex::new(start),
            span: Span::current(),
        }
    }

    fn wanted(&self) -> MutexGuard<'_, Wanted> {
        lock(&self.wanted)
    }

    fn warn(&self, what: &std::fmt::Arguments<'_>) {
        self.span.in_scope(|| log::warn!("{what}"));
    }

    fn demand(&self, wanted: &Wanted) -> Demand {
        self.sizing
            .demand(wanted.containers.values().copied())
            .max(wanted.pod)
            .max(self.start.into())
    }

    fn target(&self) -> Size {
        let size = self.sizing.clamp(self.demand(&self.wanted()));
        Size {
            cpus: size.cpus.min(self.possible),
            ..size
        }
    }

    /// What the VM has.
    pub async fn size(&self) -> Size {
        *self.now.lock().await
    }

    /// What it had when that last changed: while it changes, what it had before.
    pub fn known_size(&self) -> Size {
        *lock(&self.known)
    }

    /// A container comes: the VM becomes large enough for it. If it cannot, the container has to do with what there is, as it
    /// would on a machine that is too small for it.
    pub async fn enter(&self, container: &str, limits: Limits) {
        let demand = {
            let mut wanted = self.wanted();
            wanted.containers.insert(container.to_owned(), limits);
            self.demand(&wanted)
        };
        if let Err(error) = self.sizing.check(demand) {
            self.warn(&format_args!(
                "container {container}: the VM does not become large enough: {error}"
            ));
        }
        if let Err(error) = self.grow().await {
            let why = crate::error::chain(&error);
            self.warn(&format_args!(
                "container {container}: the VM does not become large enough: {why}"
            ));
        }
    }

    /// A container is gone. [`settle`](Self::settle) makes use of it.
    pub fn leave(&self, container: &str) {
        self.wanted().containers.remove(container);
    }

    /// A container is about to get other limits; the VM becomes large enough for them. Answers those that it had.
    ///
    /// # Errors
    /// They need more than before, and it cannot be had; nothing is changed then.
    pub async fn change(
        &self,
        container: &str,
        change: impl FnOnce(Limits) -> Limits,
    ) -> Result<Limits, Error> {
        let (before, rises) = {
            let mut wanted = self.wanted();
            let before = wanted.containers.get(container).copied().unwrap_or_default();
            let old = self.demand(&wanted);
            wanted.containers.insert(container.to_owned(), change(before));
            let new = self.demand(&wanted);
            if let Err(error) = self.check_rise(old, new) {
                wanted.containers.insert(container.to_owned(), before);
                return Err(error);
            }
            (before, new.max(old) != old)
        };
        match self.grow().await {
            Err(error) if rises => {
                self.restore(container, before).await;
                Err(error)
            }
            Err(error) => {
                let why = crate::error::chain(&error);
                self.warn(&format_args!(
                    "container {container}: the VM is too small as before: {why}"
                ));
                Ok(before)
            }
            Ok(()) => Ok(before),
        }
    }

    /// Undoes a [`change`](Self::change).
    pub async fn restore(&self, container: &str, limits: Limits) {
        if let Some(now) = self.wanted().containers.get_mut(container) {
            *now = limits;
        }
        self.settle().await;
    }

    /// The pod as a whole is promised something else, on top of which `overhead` bytes are for kernel and agent.
    ///
    /// # Errors
    /// It cannot be had; nothing is changed then.
    pub async fn change_pod(&self, limits: Limits, overhead: Option<u64>) -> Result<(), Error> {
        let overhead = overhead.unwrap_or(self.sizing.overhead);
        let sizing = Sizing {
            overhead,
            ..self.sizing
        };
        let before = {
            let mut wanted = self.wanted();
            let old = self.demand(&wanted);
            let before = std::mem::replace(&mut wanted.pod, sizing.demand([limits]));
            if let Err(error) = self.check_rise(old, self.demand(&wanted)) {
                wanted.pod = before;
                return Err(error);
            }
            before
        };
        let grown = self.grow().await;
        if grown.is_err() {
            self.wanted().pod = before;
        }
        self.settle().await;
        grown
    }

    /// The pod as a whole is promised this size, which the VM was not started with.
    ///
    /// # Errors
    /// It cannot be had.
    pub async fn promise(&self, size: Size) -> Result<(), Error> {
        self.wanted().pod = size.into();
        self.grow().await
    }

    /// Whether more is asked for, and more than there may be. What was too much before does not stand against a change that
    /// does not add to it.
    fn check_rise(&self, old: Demand, new: Demand) -> Result<(), Error> {
        let rise = Demand {
            cpus: if new.cpus > old.cpus { new.cpus } else { 0 },
            memory: if new.memory > old.memory { new.memory } else { 0 },
        };
        self.sizing.check(rise)?;
        Ok(())
    }

    async fn grow(&self) -> Result<(), Error> {
        let mut now = self.now.lock().await;
        let grown = self.grow_from(&mut now).await;
        *lock(&self.known) = *now;
        grown
    }

    async fn grow_from(&self, now: &mut Size) -> Result<(), Error> {
        let target = self.target();
        if target.cpus > now.cpus {
            let guest = Arc::clone(&self.guest);
            blocking(move || guest.provide_vcpus(target.cpus))
                .await
                .map_err(Error::Host)?;
            now.cpus = self.online(target.cpus).await?;
            // The limit holds all the same, and on fewer processors it is still a limit.
            if now.cpus < target.cpus {
                self.warn(&format_args!(
                    "the virtual machine has {} of {} processors online",
                    now.cpus, target.cpus
                ));
            }
        }
        if target.memory > now.memory {
            let wanted = target.memory.saturating_sub(self.start.memory);
            let possible = self.guest.request_memory(wanted);
            let taken = if possible < wanted {
                Err(Error::Room { wanted, possible })
            } else {
                let guest = Arc::clone(&self.guest);
                match blocking(move || Ok(guest.wait_memory(PATIENCE))).await {
                    Ok(plugged) if plugged < wanted => Err(Error::Memory { wanted, plugged }),
                    Ok(_) => Ok(()),
                    Err(error) => Err(Error::Host(error)),
                }
            };
            if taken.is_err() {
                let before = now.memory.saturating_sub(self.start.memory);
                self.guest.request_memory(before);
                return taken;
            }
            now.memory = target.memory;
        }
        Ok(())
    }

    /// The VM becomes as small as it can.
    pub async fn settle(&self) {
        let mut now = self.now.lock().await;
        let target = self.target();
        if target.cpus < now.cpus {
            match self.online(target.cpus).await {
                Ok(online) => now.cpus = online,
                Err(error) => {
                    self.warn(&format_args!("the VM keeps {} processors: {error}", now.cpus));
                }
            }
        }
        if target.memory < now.memory {
            self.guest
                .request_memory(target.memory.saturating_sub(self.start.memory));
            now.memory = target.memory;
        }
        *lock(&self.known) = *now;
    }

    /// Has the guest set so many vCPUs online. Answers how many are.
    async fn online(&self, cpus: u8) -> Result<u8, Error> {
        let request = OnlineRequest {
            cpus: cpus.into(),
            ..Default::default()
        };
        let answer = self.pod.online(with_duration(QUICK), &request).await;
        let answer = answer.map_err(Error::Agent)?;
        // The guest's word: more than there are is none.
        Ok(u8::try_from(answer.cpus).unwrap_or(u8::MAX).min(self.possible))
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(io::Error::other)?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::agent::Agent;
    use crate::pod::guest::ShareOptions;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;

    const MIB: u64 = 1 << 20;

    /// Takes memory when it is told to.
    struct Slow(Mutex<mpsc::Receiver<u64>>);

    impl Guest for Slow {
        fn connect(&self, _: u32) -> io::Result<UnixStream> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn attach(&self, _: &str, _: OwnedFd, _: ShareOptions) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn detach(&self, _: &str) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn give_up(&self, _: String) {}
        fn memory_used(&self) -> Option<u64> {
            None
        }
        fn provide_vcpus(&self, count: u8) -> io::Result<u8> {
            Ok(count)
        }
        fn request_memory(&self, bytes: u64) -> u64 {
            bytes
        }
        fn wait_memory(&self, _: Duration) -> u64 {
            lock(&self.0).recv().unwrap()
        }
        fn attach_disk(&self, _: OwnedFd, _: bool) -> io::Result<u32> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn detach_disk(&self, _: u32) -> io::Result<()> {
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    fn size(mib: u64) -> Size {
        Size {
            cpus: 1,
            memory: mib * MIB,
        }
    }

    /// Of a VM that has started with 256 MiB. To be called in a runtime.
    fn resizer(taken: mpsc::Receiver<u64>) -> Resizer {
        let guest: Arc<dyn Guest> = Arc::new(Slow(Mutex::new(taken)));
        let sizing = Sizing {
            default: size(256),
            most: size(4096),
            overhead: 64 * MIB,
        };
        let (ours, _) = UnixStream::pair().unwrap();
        Resizer::new(guest, Agent::over(ours).unwrap().pod, size(256), 1, sizing)
    }

    #[tokio::test]
    async fn the_size_is_known_while_it_changes() {
        let (take, taken) = mpsc::channel();
        let resizer = Arc::new(resizer(taken));
        let growing = Arc::clone(&resizer);
        let limits = Limits::new(100_000, 100_000, 448 << 20);
        let grown = tokio::spawn(async move { growing.change_pod(limits, None).await });
        while resizer.now.try_lock().is_ok() {
            tokio::task::yield_now().await;
        }
        assert_eq!(resizer.known_size(), size(256));
        take.send(256 * MIB).unwrap();
        grown.await.unwrap().unwrap();
        assert_eq!(resizer.known_size(), size(512));
        resizer.change_pod(Limits::default(), None).await.unwrap();
        assert_eq!(resizer.known_size(), size(256));
    }

    #[tokio::test]
    async fn what_it_says_is_said_of_its_pod() {
        let _default = tracing::subscriber::set_default(tracing_subscriber::registry());
        let pod = tracing::info_span!("pod");
        let resizer = pod.in_scope(|| resizer(mpsc::channel().1));
        assert!(pod.id().is_some());
        assert_eq!(resizer.span.id(), pod.id());
    }
}
