// SPDX-License-Identifier: Apache-2.0
//! Telling a stuck thread from one that has to wait.
//!
//! The housekeeper looks at regular intervals at what a thread is in the middle of: a device's handler, an access to
//! a register. If that is the same at look after look, it is stuck, but for reasons that are not its own:
//!
//! - It is ready to run and gets no processor. Linux knows for how long, but says so only once the wait is over; until
//!   then it shows by a thread that is ready (state R) and does not run. Such a look does not count.
//! - It waits within the kernel for the host's disks (a page of guest memory that was swapped out; state D), or the
//!   housekeeper comes late itself: then processors are short, or a hypervisor below takes them away, and who holds
//!   what the thread waits for may have none. Such looks count towards a longer limit.
//!
//! The numbers are those of /proc/self/task/TID/schedstat (nanoseconds on a processor and in the run queue;
//! Documentation/scheduler/sched-stats.rst) and /proc/self/task/TID/stat (proc_pid_stat(5)). They are read only while
//! something is under way at a look, so an idle cell costs nothing.
//!
//! Looks are counted, not a clock read: a process that was itself stopped for a while has seen nobody for so long.

use std::time::Duration;

/// How long something may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Until it is worth a warning.
    pub(crate) warn_after: Duration,
    /// Until it counts as stuck.
    pub(crate) stuck_after: Duration,
    /// Until it counts as stuck, with the time that it waited for the host.
    pub(crate) stuck_on_host_after: Duration,
}

/// What a look found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Fine,
    /// For so long now.
    Slow(Duration),
    /// For so long now.
    Stuck(Duration),
}

/// A look at threads: when it was, against when it should have been.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Look {
    /// From a look to the next.
    pub(crate) interval: Duration,
    /// By how much this one came later than that.
    pub(crate) late: Duration,
}

/// How a thread fares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Fare {
    /// Nanoseconds on a processor, since its start.
    ran: u64,
    /// Nanoseconds that it was ready to run without a processor, since its start; a wait is added when it is over.
    queued: u64,
    state: State,
}

/// What a thread is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// It runs, or would if it had a processor.
    Ready,
    /// It sleeps and cannot be woken but by the host's devices.
    OnHost,
    /// It waits for something else.
    Asleep,
}

impl Fare {
    fn of(thread: i32) -> Option<Self> {
        let read = |what| std::fs::read_to_string(format!("/proc/self/task/{thread}/{what}")).ok();
        Self::parse(&read("schedstat")?, &read("stat")?)
    }

    fn parse(schedstat: &str, stat: &str) -> Option<Self> {
        let mut numbers = schedstat.split_whitespace().map(|number| number.parse().ok());
        let (ran, queued) = (numbers.next()??, numbers.next()??);
        // The name, in parentheses, may hold anything.
        let (_, after) = stat.rsplit_once(')')?;
        let state = match after.split_whitespace().next()? {
            "R" => State::Ready,
            "D" => State::OnHost,
            _ => State::Asleep,
        };
        Some(Self { ran, queued, state })
    }

    /// Whether it had no processor for most of the time since `before`, though it could have used one.
    fn starved_since(&self, before: &Self, interval: Duration) -> bool {
        let most = |nanoseconds: u64| u128::from(nanoseconds) > interval.as_nanos() / 2;
        let queued = most(self.queued.saturating_sub(before.queued));
        let ran = most(self.ran.saturating_sub(before.ran));
        queued || (self.state == State::Ready && !ran)
    }
}

/// What is known of one thread that is in the middle of something.
#[derive(Debug, Default)]
pub(crate) struct Suspicion {
    /// Which something.
    run: Option<u64>,
    looks: u32,
    looks_on_host: u32,
    fare: Option<Fare>,
}

impl Suspicion {
    /// A look: the thread is in the middle of number `run`, or of nothing.
    pub(crate) fn look(&mut self, run: Option<u64>, thread: i32, look: Look, limits: &Limits) -> Verdict {
        if run.is_none() {
            *self = Self::default();
            return Verdict::Fine;
        }
        self.judge(run, Fare::of(thread), look, limits)
    }

    fn judge(&mut self, run: Option<u64>, fare: Option<Fare>, look: Look, limits: &Limits) -> Verdict {
        if run != self.run {
            *self = Self {
                run,
                fare,
                ..Self::default()
            };
            return Verdict::Fine;
        }
        let Look { interval, late } = look;
        let before = std::mem::replace(&mut self.fare, fare);
        // Without these numbers every look counts.
        if before
            .zip(fare)
            .is_some_and(|(before, now)| now.starved_since(&before, interval))
        {
            return Verdict::Fine;
        }
        if late > interval / 2 || fare.is_some_and(|fare| fare.state == State::OnHost) {
            self.looks_on_host = self.looks_on_host.saturating_add(1);
        } else {
            self.looks = self.looks.saturating_add(1);
        }
        let own = interval.saturating_mul(self.looks);
        let all = interval.saturating_mul(self.looks.saturating_add(self.looks_on_host));
        if own >= limits.stuck_after || all >= limits.stuck_on_host_after {
            Verdict::Stuck(all)
        } else if all >= limits.warn_after {
            Verdict::Slow(all)
        } else {
            Verdict::Fine
        }
    }

    /// Whatever it waited for was somebody else's fault, and is over.
    pub(crate) fn forget(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_millis(200);
    const IN_TIME: Look = Look {
        interval: INTERVAL,
        late: Duration::from_millis(20),
    };
    const LIMITS: Limits = Limits {
        warn_after: Duration::from_millis(400),
        stuck_after: Duration::from_millis(600),
        stuck_on_host_after: Duration::from_secs(2),
    };

    fn fare(ran_ms: u64, queued_ms: u64, state: State) -> Option<Fare> {
        let (ran, queued) = (ran_ms * 1_000_000, queued_ms * 1_000_000);
        Some(Fare { ran, queued, state })
    }

    /// The verdicts of looks at the same run.
    fn verdicts(look: Look, fares: &[Option<Fare>]) -> Vec<Verdict> {
        let mut suspicion = Suspicion::default();
        let judge = |&fare| suspicion.judge(Some(7), fare, look, &LIMITS);
        fares.iter().map(judge).collect()
    }

    fn stuck_at(verdicts: &[Verdict]) -> Option<usize> {
        verdicts
            .iter()
            .position(|verdict| matches!(verdict, Verdict::Stuck(_)))
    }

    #[test]
    fn the_same_run_again_and_again_is_stuck() {
        let (slow, stuck) = (Duration::from_millis(400), Duration::from_millis(600));
        let expected = [
            Verdict::Fine,
            Verdict::Fine,
            Verdict::Slow(slow),
            Verdict::Stuck(stuck),
        ];
        assert_eq!(verdicts(IN_TIME, &[fare(5, 5, State::Asleep); 4]), expected);
        assert_eq!(verdicts(IN_TIME, &[None; 4]), expected);
        let spins = [0, 200, 380, 550].map(|ran| fare(ran, 0, State::Ready));
        assert_eq!(verdicts(IN_TIME, &spins), expected);
        let mut suspicion = Suspicion::default();
        for run in 0..100 {
            let verdict = suspicion.judge(Some(run / 2), fare(0, 0, State::Asleep), IN_TIME, &LIMITS);
            assert_eq!(verdict, Verdict::Fine);
        }
    }

    #[test]
    fn who_waits_for_a_processor_is_not_stuck() {
        let fine = |fares: &[Option<Fare>]| {
            let verdicts = verdicts(IN_TIME, fares);
            assert!(verdicts.iter().all(|verdict| *verdict == Verdict::Fine));
        };
        // Now and then it had one.
        let starved: Vec<_> = (0..100).map(|n| fare(n, n * 150, State::Asleep)).collect();
        fine(&starved);
        // It never had, and so Linux has not yet added the time up.
        fine(&[fare(3, 4, State::Ready); 100]);
        let hardly: Vec<_> = (0..4).map(|n| fare(0, n * 50, State::Asleep)).collect();
        assert_eq!(stuck_at(&verdicts(IN_TIME, &hardly)), Some(3));
    }

    #[test]
    fn who_waits_for_the_host_has_longer() {
        let disks = verdicts(IN_TIME, &[fare(0, 0, State::OnHost); 11]);
        assert_eq!(stuck_at(&disks), Some(10));
        assert_eq!(disks[10], Verdict::Stuck(Duration::from_secs(2)));
        let late = Look {
            late: Duration::from_millis(101),
            ..IN_TIME
        };
        let short_of_processors = verdicts(late, &[fare(0, 0, State::Asleep); 11]);
        assert_eq!(stuck_at(&short_of_processors), Some(10));
    }

    #[test]
    fn what_linux_says_is_understood() {
        let parsed = |letter| Fare::parse("12 34 5\n", &format!("17 (a) b (c)) {letter} 1 17 17 0 -1"));
        let told = |state| {
            Some(Fare {
                ran: 12,
                queued: 34,
                state,
            })
        };
        assert_eq!(parsed("R"), told(State::Ready));
        assert_eq!(parsed("D"), told(State::OnHost));
        assert_eq!(parsed("S"), told(State::Asleep));
        assert_eq!(Fare::parse("12 34 5\n", "17 (D) S 1"), told(State::Asleep));
        assert_eq!(Fare::parse("", "17 (D) S 1"), None);
        assert_eq!(Fare::parse("12 34 5\n", "17"), None);
        let own = rustix::thread::gettid().as_raw_nonzero().get();
        assert_eq!(Fare::of(own).map(|fare| fare.state), Some(State::Ready));
        assert_eq!(Fare::of(0), None);
    }
}
