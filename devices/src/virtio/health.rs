// SPDX-License-Identifier: Apache-2.0
//! Whether a device still works, and who hears of it when it stops.

use std::fmt::Display;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use super::Interrupt;
use crate::metrics::Counter;
use crate::rate_limit::RateLimit;

type Observer = Box<dyn Fn(&str, &str) + Send + Sync>;

/// One device's health. Shared by its control side, its data side and its requests under way.
///
/// ```text
///            complain(): the guest broke a rule that harms only itself; logged, rate-limited
///  working ──fail()──▶ failed ──reset by the driver──▶ working
///                        │
///                        └─ status shows DEVICE_NEEDS_RESET, no queue is served, the cell's observer is told
/// ```
pub struct Health {
    name: String,
    failed: AtomicBool,
    quiescing: AtomicBool,
    complaints: Counter,
    log: RateLimit,
    interrupt: OnceLock<Arc<Interrupt>>,
    observer: OnceLock<Observer>,
}

impl Health {
    /// A working device called `name` in messages (for example `cell 3 vsock`).
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            failed: AtomicBool::new(false),
            quiescing: AtomicBool::new(false),
            complaints: Counter::default(),
            log: RateLimit::new(),
            interrupt: OnceLock::new(),
            observer: OnceLock::new(),
        }
    }

    /// The device's name in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Who is told of failures: called with the device's name and the reason, on whatever thread met the failure.
    /// Only the first observer is kept.
    pub fn observe(&self, observer: impl Fn(&str, &str) + Send + Sync + 'static) {
        let _ = self.observer.set(Box::new(observer));
    }

    pub(super) fn set_interrupt(&self, interrupt: Arc<Interrupt>) {
        let _ = self.interrupt.set(interrupt);
    }

    /// Logs, rate-limited, that the guest broke a rule whose consequences are its own.
    pub fn complain(&self, what: impl Display) {
        self.complaints.increment();
        self.log.warn(&self.name, format_args!("{what}"));
    }

    /// How often the guest broke a rule, whether that was logged or not.
    pub fn complaints(&self) -> u64 {
        self.complaints.get()
    }

    /// Stops the device: sets DEVICE_NEEDS_RESET, interrupts the driver, tells the observer.
    pub fn fail(&self, why: impl Display) {
        if self.failed.swap(true, Ordering::AcqRel) {
            return;
        }
        let why = why.to_string();
        self.log.warn(&self.name, format_args!("stopped: {why}"));
        if let Some(interrupt) = self.interrupt.get() {
            interrupt.signal_config();
        }
        if let Some(observer) = self.observer.get() {
            observer(&self.name, &why);
        }
    }

    /// Whether the device has stopped.
    pub fn is_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Whether somebody waits for requests of the device that are under way, which may wait for the host's disks.
    pub fn is_quiescing(&self) -> bool {
        self.quiescing.load(Ordering::Acquire)
    }

    /// Does `wait`, which waits for requests that are under way.
    pub(super) fn quiescing<T>(&self, wait: impl FnOnce() -> T) -> T {
        self.quiescing.store(true, Ordering::Release);
        let result = wait();
        self.quiescing.store(false, Ordering::Release);
        result
    }

    /// The driver reset the device: it works again.
    pub(super) fn recover(&self) {
        self.failed.store(false, Ordering::Release);
    }
}

impl std::fmt::Debug for Health {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Health")
            .field("name", &self.name)
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}
