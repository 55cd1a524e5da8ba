// SPDX-License-Identifier: Apache-2.0
//! Bringing a vCPU thread out of KVM_RUN, without a race.
//!
//! The kicker sets the vCPU's `immediate_exit` byte and then sends a signal. If the thread is inside KVM_RUN, the
//! signal ends it; if it is about to enter, KVM sees the byte and leaves at once. The thread clears the byte before it
//! looks at what is wanted of it, never after: whatever was wanted before the clearing is seen, whatever comes later
//! sets the byte again.
//!
//! The signal's handler does nothing. It is the one thing here that a process has only once, and belongs to no cell.

use kvm_ioctls::VcpuFd;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

/// The signal that ends KVM_RUN.
fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Installs the empty handler. Done by each `CellHost`; doing it again changes nothing.
pub(crate) fn install_handler() -> std::io::Result<()> {
    register_signal_handler(kick_signal(), ignore).map_err(|e| std::io::Error::from_raw_os_error(e.errno()))
}

struct Target {
    immediate_exit: *const AtomicU8,
    thread: libc::pthread_t,
}

// SAFETY: the pointer is only followed under the mutex that `Kick` keeps it in, while the vCPU's thread keeps the
// mapping alive (see `Attached`).
unsafe impl Send for Target {}

/// The handle by which other threads kick one vCPU. Does nothing while no thread runs the vCPU.
#[derive(Clone, Default)]
pub(crate) struct Kick {
    target: Arc<Mutex<Option<Target>>>,
}

impl Kick {
    /// Makes the vCPU leave KVM_RUN soon, or not enter it.
    pub(crate) fn kick(&self) {
        let target = self.target.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(target) = &*target {
            // SAFETY: `Attached` clears the target before the vCPU's mapping or thread goes away, under this mutex.
            unsafe {
                (*target.immediate_exit).store(1, Ordering::SeqCst);
                libc::pthread_kill(target.thread, kick_signal());
            }
        }
    }

    /// Makes the calling thread the one that kicks reach, for as long as the answer lives. `vcpu` must outlive it.
    pub(crate) fn attach(&self, vcpu: &mut VcpuFd) -> Attached {
        let immediate_exit: *mut u8 = &raw mut vcpu.get_kvm_run().immediate_exit;
        let immediate_exit = immediate_exit.cast::<AtomicU8>().cast_const();
        // SAFETY: no preconditions.
        let thread = unsafe { libc::pthread_self() };
        *self.target.lock().unwrap_or_else(PoisonError::into_inner) = Some(Target {
            immediate_exit,
            thread,
        });
        unblock_only_kick();
        Attached {
            kick: self.clone(),
            immediate_exit,
        }
    }
}

/// The vCPU thread's side of a [`Kick`].
pub(crate) struct Attached {
    kick: Kick,
    immediate_exit: *const AtomicU8,
}

impl Attached {
    /// Forgets earlier kicks. Look at what is wanted after this, not before.
    pub(crate) fn clear(&self) {
        self.set(0);
    }

    /// Makes the next KVM_RUN only finish the access that the last exit was for.
    pub(crate) fn set_immediate_exit(&self) {
        self.set(1);
    }

    fn set(&self, value: u8) {
        // SAFETY: the vCPU, and with it the mapping of kvm_run, outlives `self` as `attach` demands.
        unsafe { (*self.immediate_exit).store(value, Ordering::SeqCst) };
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        *self.kick.target.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Leaves the process's signals to its other threads: this one takes the kick, and what its own faults raise.
fn unblock_only_kick() {
    // SAFETY: the sets are initialised by sigfillset before they are read; all calls affect this thread only.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut set);
        for signal in [
            kick_signal(),
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGILL,
            libc::SIGFPE,
            libc::SIGTRAP,
        ] {
            libc::sigdelset(&raw mut set, signal);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
    }
}
