// SPDX-License-Identifier: Apache-2.0
//! Collects every child that dies, and tells whoever waits for it.
//!
//! # Theory of operation
//!
//! All processes of the VM whose parent is gone become children of PID 1 (of the subreaper, in tests). One task waits
//! for all of them. A helper reports the pid of the process it leaves behind, and that process may be dead and reaped
//! before the report is read: while any [`Spawning`] guard lives, exits nobody waits for are therefore kept.
//!
//! ```text
//!   spawning() ── helper runs ── pid known ── watch(pid) ── guard dropped
//!                     exits of unknown pids kept ─┘              └─ the rest forgotten
//! ```

use std::collections::HashMap;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use rustix::process::{WaitOptions, wait};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// How and when a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Exit status, or 128 + the signal that killed it.
    pub status: u32,
    /// When it was collected.
    pub at: SystemTime,
}

#[derive(Default)]
struct State {
    watched: HashMap<i32, oneshot::Sender<Exit>>,
    kept: HashMap<i32, Exit>,
    spawning: usize,
}

/// Collector of dead children. Clones share it.
#[derive(Clone, Default)]
pub struct Reaper(Arc<Mutex<State>>);

/// While it lives, exits of unknown children are kept for [`Reaper::watch`].
pub struct Spawning(Reaper);

impl Drop for Spawning {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.spawning -= 1;
        if state.spawning == 0 {
            state.kept = HashMap::new();
        }
    }
}

impl Reaper {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be held from before a child is made until it is watched.
    pub fn spawning(&self) -> Spawning {
        self.state().spawning += 1;
        Spawning(self.clone())
    }

    /// The exit of child `pid`, which comes once.
    pub fn watch(&self, pid: i32) -> oneshot::Receiver<Exit> {
        let (sender, receiver) = oneshot::channel();
        let mut state = self.state();
        if let Some(exit) = state.kept.remove(&pid) {
            // The receiver is right here.
            let _ = sender.send(exit);
        } else {
            state.watched.insert(pid, sender);
        }
        receiver
    }

    fn record(&self, pid: i32, exit: Exit) {
        let mut state = self.state();
        if let Some(sender) = state.watched.remove(&pid) {
            // Who waited may have given up.
            let _ = sender.send(exit);
        } else if state.spawning > 0 {
            state.kept.insert(pid, exit);
        }
    }

    /// Collects all children that are dead now.
    pub fn reap(&self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            if let Some(status) = exit_status(status.as_raw()) {
                self.record(
                    pid.as_raw_nonzero().get(),
                    Exit {
                        status,
                        at: SystemTime::now(),
                    },
                );
            }
        }
    }

    /// Collects children for ever.
    ///
    /// # Errors
    /// When the SIGCHLD handler cannot be set up.
    pub fn start(&self) -> std::io::Result<()> {
        let mut children = signal(SignalKind::child())?;
        let reaper = self.clone();
        tokio::spawn(async move {
            loop {
                reaper.reap();
                if children.recv().await.is_none() {
                    break;
                }
            }
        });
        Ok(())
    }
}

/// The number a shell would show for a wait status; None if the child is not dead.
fn exit_status(raw: i32) -> Option<u32> {
    let status = ExitStatus::from_raw(raw);
    let number = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal))?;
    u32::try_from(number).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXIT: Exit = Exit {
        status: 3,
        at: SystemTime::UNIX_EPOCH,
    };

    #[test]
    fn statuses_are_those_of_a_shell() {
        for (raw, expected) in [
            (0x0300, Some(3)),
            (9, Some(137)),
            (0x8b, Some(139)),
            (0x137f, None),
        ] {
            assert_eq!(exit_status(raw), expected, "{raw:#x}");
        }
    }

    #[test]
    fn an_exit_before_the_watch_is_kept_while_spawning() {
        let reaper = Reaper::default();
        let guard = reaper.spawning();
        reaper.record(7, EXIT);
        reaper.record(8, EXIT);
        assert_eq!(reaper.watch(7).try_recv(), Ok(EXIT));
        drop(guard);
        assert!(reaper.state().kept.is_empty());
    }

    #[test]
    fn orphans_nobody_asked_for_are_forgotten() {
        let reaper = Reaper::default();
        reaper.record(7, EXIT);
        assert!(reaper.watch(7).try_recv().is_err());
        reaper.record(7, EXIT);
    }
}
