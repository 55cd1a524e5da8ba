// SPDX-License-Identifier: Apache-2.0
//! Logging of what a guest can trigger.
//!
//! A guest that can make the host log at will fills its disk. Everything a guest (or an unprivileged client) can
//! provoke is logged through a [`RateLimit`]: a burst, then a fixed number of lines per interval, then one line that
//! says how many were left out.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// A token bucket over log lines: at most [`RateLimit::BURST`] lines per [`RateLimit::INTERVAL`].
#[derive(Debug, Default)]
pub struct RateLimit {
    window: Mutex<Window>,
}

#[derive(Debug, Default)]
struct Window {
    started: Option<Instant>,
    lines: u32,
    suppressed: u64,
}

impl RateLimit {
    /// Lines let through per interval.
    pub const BURST: u32 = 10;
    /// Length of the interval.
    pub const INTERVAL: Duration = Duration::from_secs(10);

    /// A limit with its whole burst left.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether a line may be logged now; if so, how many were suppressed since the last one that was.
    pub fn admit(&self) -> Option<u64> {
        self.admit_at(Instant::now())
    }

    fn admit_at(&self, now: Instant) -> Option<u64> {
        // A poisoned lock only means that another line's logging panicked: the counters are still good.
        let mut window = self
            .window
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        if window
            .started
            .is_none_or(|started| now.duration_since(started) >= Self::INTERVAL)
        {
            window.started = Some(now);
            window.lines = 0;
        }
        if window.lines < Self::BURST {
            window.lines += 1;
            Some(std::mem::take(&mut window.suppressed))
        } else {
            window.suppressed = window.suppressed.saturating_add(1);
            None
        }
    }

    /// Logs a warning about what the guest did, if the limit admits it.
    pub fn warn(&self, who: &str, what: std::fmt::Arguments<'_>) {
        match self.admit() {
            Some(0) => log::warn!("{who}: {what}"),
            Some(left_out) => log::warn!("{who}: {what} ({left_out} earlier messages left out)"),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_and_counted() {
        let limit = RateLimit::new();
        let start = Instant::now();
        let admitted = (0..1000).filter(|_| limit.admit_at(start).is_some()).count();
        assert_eq!(admitted, RateLimit::BURST as usize);
        let later = start + RateLimit::INTERVAL;
        assert_eq!(limit.admit_at(later), Some(1000 - u64::from(RateLimit::BURST)));
        assert_eq!(limit.admit_at(later), Some(0));
    }
}
