// SPDX-License-Identifier: Apache-2.0
//! Telling a stuck thread from one that has to wait.
//!
//! The housekeeper looks at regular intervals at what a thread is in the middle of: a device's handler, an access to
//! a register. If that is the same at look after look, it is stuck, but for two reasons that are not its own: it may
//! be ready to run and get no processor, or wait within the kernel for the host's disks (a page of guest memory that
//! was swapped out). Linux knows both, in /proc/self/task/TID/schedstat (nanoseconds in the run queue, second number;
//! Documentation/scheduler/sched-stats.rst) and /proc/self/task/TID/stat (state D; proc_pid_stat(5)). They are read
//! only while something is under way at a look, so an idle cell costs nothing.
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
    /// Until it counts as stuck, with the time that it waited for the host's disks.
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

/// How a thread fares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Fare {
    /// Nanoseconds that it was ready to run without a processor, since its start.
    queued: u64,
    /// It sleeps and cannot be woken but by the host's devices.
    on_host: bool,
}

impl Fare {
    fn of(thread: i32) -> Option<Self> {
        let read = |what| std::fs::read_to_string(format!("/proc/self/task/{thread}/{what}")).ok();
        Self::parse(&read("schedstat")?, &read("stat")?)
    }

    fn parse(schedstat: &str, stat: &str) -> Option<Self> {
        let queued = schedstat.split_whitespace().nth(1)?.parse().ok()?;
        // The name, in parentheses, may hold anything.
        let (_, after) = stat.rsplit_once(')')?;
        let on_host = after.split_whitespace().next()? == "D";
        Some(Self { queued, on_host })
    }
}

/// What is known of one thread that is in the middle of something.
#[derive(Debug, Default)]
pub(crate) struct Suspicion {
    /// Which something.
    run: Option<u64>,
    looks: u32,
    looks_on_host: u32,
    queued: Option<u64>,
}

impl Suspicion {
    /// A look: the thread is in the middle of number `run`, or of nothing.
    pub(crate) fn look(
        &mut self,
        run: Option<u64>,
        thread: i32,
        interval: Duration,
        limits: &Limits,
    ) -> Verdict {
        if run.is_none() {
            *self = Self::default();
            return Verdict::Fine;
        }
        self.judge(run, Fare::of(thread), interval, limits)
    }

    fn judge(
        &mut self,
        run: Option<u64>,
        fare: Option<Fare>,
        interval: Duration,
        limits: &Limits,
    ) -> Verdict {
        let before = self.queued;
        let queued = fare.map(|fare| fare.queued);
        if run != self.run {
            *self = Self {
                run,
                queued,
                ..Self::default()
            };
            return Verdict::Fine;
        }
        self.queued = queued;
        // Without these numbers every look counts.
        let waited = before
            .zip(queued)
            .map_or(0, |(before, now)| now.saturating_sub(before));
        if u128::from(waited) > interval.as_nanos() / 2 {
            return Verdict::Fine;
        }
        if fare.is_some_and(|fare| fare.on_host) {
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
    const LIMITS: Limits = Limits {
        warn_after: Duration::from_millis(400),
        stuck_after: Duration::from_millis(600),
        stuck_on_host_after: Duration::from_secs(2),
    };

    fn fare(queued_ms: u64, on_host: bool) -> Option<Fare> {
        let queued = queued_ms * 1_000_000;
        Some(Fare { queued, on_host })
    }

    /// The verdicts of looks at the same run.
    fn verdicts(fares: &[Option<Fare>]) -> Vec<Verdict> {
        let mut suspicion = Suspicion::default();
        let judge = |&fare| suspicion.judge(Some(7), fare, INTERVAL, &LIMITS);
        fares.iter().map(judge).collect()
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
        assert_eq!(verdicts(&[fare(5, false); 4]), expected);
        assert_eq!(verdicts(&[None; 4]), expected);
        let mut suspicion = Suspicion::default();
        for run in 0..100 {
            let verdict = suspicion.judge(Some(run / 2), fare(0, false), INTERVAL, &LIMITS);
            assert_eq!(verdict, Verdict::Fine);
        }
    }

    #[test]
    fn who_waits_for_a_processor_is_not_stuck() {
        let starved: Vec<_> = (0..100).map(|n| fare(n * 150, false)).collect();
        assert!(verdicts(&starved).iter().all(|verdict| *verdict == Verdict::Fine));
        let hardly: Vec<_> = (0..4).map(|n| fare(n * 50, false)).collect();
        assert!(matches!(verdicts(&hardly)[3], Verdict::Stuck(_)));
    }

    #[test]
    fn who_waits_for_the_hosts_disks_has_longer() {
        let verdicts = verdicts(&[fare(0, true); 11]);
        assert!(
            verdicts[..10]
                .iter()
                .all(|verdict| !matches!(verdict, Verdict::Stuck(_)))
        );
        assert_eq!(verdicts[10], Verdict::Stuck(Duration::from_secs(2)));
    }

    #[test]
    fn what_linux_says_is_understood() {
        let stat = "17 (a) b (c)) D 1 17 17 0 -1";
        assert_eq!(
            Fare::parse("12 34 5\n", stat),
            Some(Fare {
                queued: 34,
                on_host: true
            })
        );
        let stat = "17 (D) S 1 17 17 0 -1";
        assert_eq!(
            Fare::parse("12 34 5\n", stat),
            Some(Fare {
                queued: 34,
                on_host: false
            })
        );
        assert_eq!(Fare::parse("", stat), None);
        assert_eq!(Fare::parse("12 34 5\n", "17"), None);
        let own = rustix::thread::gettid().as_raw_nonzero().get();
        assert!(Fare::of(own).is_some_and(|fare| !fare.on_host));
        assert_eq!(Fare::of(0), None);
    }
}
