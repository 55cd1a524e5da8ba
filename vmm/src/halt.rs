// SPDX-License-Identifier: Apache-2.0
//! Noticing a guest whose vCPUs have all halted with interrupts disabled: nothing will wake them any more.
//!
//! With local APICs in the kernel a HLT is no exit: the vCPU's thread sleeps in KVM_RUN, like that of any idle guest,
//! and KVM_GET_MP_STATE waits until it comes out. So a vCPU has to be kicked to be asked, which must not happen to idle
//! guests all the time. The housekeeper therefore looks at a few cells at a time, in turn, however many there are, and
//! first at something that disturbs nobody: how often the vCPUs' threads have been put on a processor (third number of
//! /proc/self/task/TID/schedstat).
//!
//! ```text
//!  awake ──a second without any thread of the cell running──▶ asked ──one can be woken──▶ idle ──one has run──▶ awake
//!                                                              │ ▲
//!                                                         none │ │ once more: one may have woken another and halted
//!                                                              ▼ │ before it was asked itself
//!                                                            twice none: the cell ends
//! ```
//!
//! So a guest that sleeps for longer than a second is kicked once per sleep, one that sleeps for less never. With n cells in the
//! process it takes about 1.5 s, or n / 20 s if that is more. A vCPU can be woken if it runs, has interrupts
//! enabled, or has an NMI pending; one that was never started cannot. A guest that means to be woken by an NMI from a
//! device is taken for halted, too. Where the host has no schedstat (CONFIG_SCHED_INFO) nothing is noticed.

use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED};
use kvm_ioctls::VcpuFd;

use crate::cell::Shared;

/// Cells looked at per look.
pub(crate) const CELLS_PER_LOOK: usize = 4;
/// Looks without a sign of life until the vCPUs are asked.
const QUIET_LOOKS: u64 = 5;
/// Interrupt enable flag of RFLAGS.
const RFLAGS_IF: u64 = 1 << 9;

/// What a vCPU said when it was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Answer {
    /// Not yet.
    None = 0,
    /// It runs, or something can wake it.
    Alive = 1,
    /// Nothing but another vCPU can wake it.
    Halted = 2,
}

impl From<u8> for Answer {
    fn from(value: u8) -> Self {
        match value {
            1 => Self::Alive,
            2 => Self::Halted,
            _ => Self::None,
        }
    }
}

/// Asks a vCPU, on its own thread.
pub(crate) fn ask(fd: &VcpuFd) -> Answer {
    let halted = || {
        Some(match fd.get_mp_state().ok()?.mp_state {
            KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => true,
            KVM_MP_STATE_HALTED => {
                let nmi = fd.get_vcpu_events().ok()?.nmi;
                fd.get_regs().ok()?.rflags & RFLAGS_IF == 0 && nmi.injected == 0 && nmi.pending == 0
            }
            _ => false,
        })
    };
    if halted() == Some(true) {
        Answer::Halted
    } else {
        Answer::Alive
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Its threads ran at this look or later.
    Awake(u64),
    /// They have been asked. So many times before, all have said that they halted.
    Asked(u32),
    /// They sleep, and something can wake them.
    Idle,
}

/// What is known of one cell.
#[derive(Debug)]
pub(crate) struct HaltWatch {
    stage: Stage,
    /// How often each thread has run.
    runs: Vec<u64>,
}

/// What to do about a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Nothing,
    Ask,
    End,
}

impl HaltWatch {
    pub(crate) fn new() -> Self {
        Self {
            stage: Stage::Awake(0),
            runs: Vec::new(),
        }
    }

    /// Look number `look` at this cell.
    pub(crate) fn look(&mut self, cell: &Shared, look: u64) {
        let Some(threads) = cell.running_threads() else {
            // Not running: another time.
            *self = Self::new();
            self.stage = Stage::Awake(look);
            return;
        };
        let runs = threads.iter().map(|&thread| times_run(thread)).collect();
        match self.next(look, runs, || cell.halt_answers()) {
            Next::Nothing => {}
            Next::Ask => cell.ask_halted(),
            Next::End => cell.all_halted(),
        }
    }

    fn next(&mut self, look: u64, runs: Option<Vec<u64>>, answers: impl FnOnce() -> Vec<Answer>) -> Next {
        let Some(runs) = runs else { return Next::Nothing };
        if let Stage::Asked(times) = self.stage {
            let answers = answers();
            if answers.contains(&Answer::Alive) {
                // Being asked made them run.
                self.runs = runs;
                self.stage = Stage::Idle;
            } else if !answers.contains(&Answer::None) {
                self.stage = Stage::Asked(times + 1);
                return if times == 0 { Next::Ask } else { Next::End };
            }
            return Next::Nothing;
        }
        if runs != self.runs {
            self.runs = runs;
            self.stage = Stage::Awake(look);
            return Next::Nothing;
        }
        match self.stage {
            Stage::Awake(since) if look.saturating_sub(since) >= QUIET_LOOKS => {
                self.stage = Stage::Asked(0);
                Next::Ask
            }
            _ => Next::Nothing,
        }
    }
}

/// How often a thread of this process has been put on a processor.
fn times_run(thread: i32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/self/task/{thread}/schedstat")).ok()?;
    text.split_whitespace().nth(2)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HALTED: [Answer; 2] = [Answer::Halted; 2];

    fn unasked() -> Vec<Answer> {
        panic!("nobody was asked")
    }

    /// A cell of two vCPUs that have not run since look 1, up to the question.
    fn asked() -> HaltWatch {
        let mut watch = HaltWatch::new();
        let runs = || Some(vec![5, 6]);
        for look in 1..=5 {
            assert_eq!(watch.next(look, runs(), unasked), Next::Nothing);
        }
        assert_eq!(watch.next(6, runs(), unasked), Next::Ask);
        watch
    }

    #[test]
    fn all_halted_twice_is_the_end() {
        let mut watch = asked();
        let runs = || Some(vec![6, 7]);
        assert_eq!(
            watch.next(7, runs(), || vec![Answer::Halted, Answer::None]),
            Next::Nothing
        );
        assert_eq!(watch.next(8, runs(), || HALTED.to_vec()), Next::Ask);
        assert_eq!(watch.next(9, runs(), || HALTED.to_vec()), Next::End);
    }

    #[test]
    fn who_can_be_woken_is_asked_once_per_sleep() {
        let mut watch = asked();
        let answers = || vec![Answer::Halted, Answer::Alive];
        assert_eq!(watch.next(7, Some(vec![6, 7]), answers), Next::Nothing);
        for look in 8..100 {
            assert_eq!(watch.next(look, Some(vec![6, 7]), unasked), Next::Nothing);
        }
        assert_eq!(watch.next(100, Some(vec![6, 8]), unasked), Next::Nothing);
        assert_eq!(watch.next(104, Some(vec![6, 8]), unasked), Next::Nothing);
        assert_eq!(watch.next(105, Some(vec![6, 8]), unasked), Next::Ask);
    }

    #[test]
    fn who_runs_is_never_asked() {
        let mut watch = HaltWatch::new();
        for look in 1..100 {
            assert_eq!(watch.next(look, Some(vec![look / 4, 1]), unasked), Next::Nothing);
            assert_eq!(watch.next(look, None, unasked), Next::Nothing);
        }
    }

    #[test]
    fn a_thread_that_runs_is_seen_to() {
        let own = rustix::thread::gettid().as_raw_nonzero().get();
        let before = times_run(own).expect("this host has no schedstat");
        for _ in 0..10 {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert!(times_run(own).unwrap() > before);
        assert_eq!(times_run(0), None);
    }
}
