// SPDX-License-Identifier: Apache-2.0
//! The interrupt line of one virtio-mmio device.
//!
//! Section 4.2.2: one line per device, with the reason in InterruptStatus until the driver writes InterruptACK. The
//! line is an eventfd that KVM turns into an edge on the device's GSI (irqfd), so raising it is one `write`.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// InterruptStatus bit 0: a used buffer was added to a queue.
pub(super) const USED_BUFFER: u32 = 1;
/// InterruptStatus bit 1: the configuration changed (or the device needs a reset).
pub(super) const CONFIG_CHANGE: u32 = 2;

/// Raises a device's interrupt.
#[derive(Debug)]
pub struct Interrupt {
    line: EventFd,
    status: AtomicU32,
    config_generation: AtomicU32,
}

impl Interrupt {
    /// A line that nothing listens to yet.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            line: EventFd::new(EFD_NONBLOCK)?,
            status: AtomicU32::new(0),
            config_generation: AtomicU32::new(0),
        })
    }

    /// The eventfd to register as irqfd.
    pub fn line(&self) -> &EventFd {
        &self.line
    }

    /// Tells the driver that a queue has used buffers. Callers check first whether it wants to know
    /// ([`super::ActiveQueue::signal`]).
    pub fn signal_used(&self) {
        self.raise(USED_BUFFER);
    }

    /// Tells the driver that the configuration space changed.
    pub fn signal_config(&self) {
        self.config_generation.fetch_add(1, Ordering::AcqRel);
        self.raise(CONFIG_CHANGE);
    }

    fn raise(&self, reason: u32) {
        self.status.fetch_or(reason, Ordering::SeqCst);
        // EAGAIN means that the counter is at its maximum: the line is as raised as it can be.
        let _ = self.line.write(1);
    }

    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    pub(super) fn acknowledge(&self, reasons: u32) {
        self.status.fetch_and(!reasons, Ordering::SeqCst);
    }

    pub(super) fn config_generation(&self) -> u32 {
        self.config_generation.load(Ordering::Acquire)
    }

    /// Sets what a snapshot saved; raises the line if something was pending, since an edge may have been lost.
    pub(super) fn restore(&self, status: u32, config_generation: u32) {
        self.config_generation.store(config_generation, Ordering::Release);
        if status & (USED_BUFFER | CONFIG_CHANGE) != 0 {
            self.raise(status & (USED_BUFFER | CONFIG_CHANGE));
        }
    }
}

/// A configuration that the host can change while a driver may be looking: it tells the driver, if there is one.
#[derive(Debug, Default)]
pub struct ConfigSignal {
    interrupt: Mutex<Option<Arc<Interrupt>>>,
}

impl ConfigSignal {
    /// The driver that is to be told from now on, at activation; none after a reset.
    pub fn connect(&self, interrupt: Option<Arc<Interrupt>>) {
        *self.interrupt.lock().unwrap_or_else(PoisonError::into_inner) = interrupt;
    }

    /// The configuration is another one now.
    pub fn changed(&self) {
        if let Some(interrupt) = &*self.interrupt.lock().unwrap_or_else(PoisonError::into_inner) {
            interrupt.signal_config();
        }
    }
}
