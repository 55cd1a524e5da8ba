// SPDX-License-Identifier: Apache-2.0
//! Notices a VM that hangs while nobody asks it anything.
//!
//! A pod that rests must not be woken to be asked. But a guest that hangs, in a loop of its kernel or with interrupts off, does
//! not rest: a vCPU of it wants a processor all the time, which the host sees from its threads' clocks. One that does so at
//! [`LOOKS`] looks in a row, and whose agent has answered nothing meanwhile, is asked for a sign of life (see [`crate::pod::vigil`]).
//! A pod that just works hard gives one, and is asked again no sooner than after as many looks.
//!
//! A guest whose vCPUs have all halted with interrupts off is seen by its cell.

use super::node::Node;
use super::usage;
use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tracing::Instrument;

/// From a look to the next.
const LOOK: Duration = Duration::from_secs(5);
/// Looks in a row at which a VM did nothing but run until it is asked.
const LOOKS: u32 = 2;

/// What is known of a VM.
#[derive(Debug, Default)]
struct Suspicion {
    /// For how long each vCPU's thread had wanted a processor at the last look.
    wanted: HashMap<i32, Duration>,
    /// How often its agent had answered by then.
    answers: u64,
    looks: u32,
}

impl Suspicion {
    /// A look, `interval` after the last one. Answers whether the VM is to be asked.
    fn look(&mut self, wanted: HashMap<i32, Duration>, answers: u64, interval: Duration) -> bool {
        let before = std::mem::replace(&mut self.wanted, wanted);
        let all_the_time = interval.saturating_sub(interval / 10);
        let runs_on = self.wanted.iter().any(|(thread, now)| {
            let before = before.get(thread);
            before.is_some_and(|before| now.saturating_sub(*before) >= all_the_time)
        });
        let answered = std::mem::replace(&mut self.answers, answers) != answers;
        self.looks = if runs_on && !answered {
            self.looks.saturating_add(1)
        } else {
            0
        };
        self.looks >= LOOKS
    }
}

/// A pod, from look to look.
#[derive(Default)]
struct Watched {
    suspicion: Suspicion,
    /// What asks it, given up when it is dropped.
    asking: JoinSet<()>,
}

/// Looks at all pods of this process.
pub async fn watch(node: Arc<Node>) -> Infallible {
    let mut watched: HashMap<String, Watched> = HashMap::new();
    let mut last = Instant::now();
    loop {
        tokio::time::sleep(LOOK).await;
        let now = Instant::now();
        let interval = now.saturating_duration_since(std::mem::replace(&mut last, now));
        // Pods that are gone are not taken over.
        let mut before = std::mem::take(&mut watched);
        for sandbox in node.all() {
            let Some((cell, service)) = sandbox.running() else {
                continue;
            };
            let id = sandbox.id();
            let mut pod = before.remove(&id).unwrap_or_default();
            let wanted = usage::vcpus_wanted(&cell);
            if !pod.suspicion.look(wanted, service.answers(), interval) {
                // It paused, or answered.
                pod.asking = JoinSet::new();
            } else if pod.asking.is_empty() {
                let service = Arc::clone(service);
                let ask = async move { service.ask().await };
                pod.asking.spawn(ask.instrument(sandbox.span()));
            }
            watched.insert(id, pod);
            // Each costs a read or two: others have their turn.
            tokio::task::yield_now().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks at vCPUs that have wanted a processor for so many milliseconds, and at an agent that has answered so often.
    fn asked(looks: &[(&[u64], u64)]) -> Vec<bool> {
        let mut suspicion = Suspicion::default();
        let look = |(wanted, answers): &(&[u64], u64)| {
            let wanted = (7..).zip(wanted.iter().map(|ms| Duration::from_millis(*ms)));
            suspicion.look(wanted.collect(), *answers, Duration::from_secs(5))
        };
        looks.iter().map(look).collect()
    }

    #[test]
    fn who_runs_on_and_says_nothing_is_asked() {
        // What was before the first look does not count.
        let hangs: [(&[u64], u64); 5] = [
            (&[9000], 3),
            (&[13_500], 3),
            (&[18_400], 3),
            (&[23_400], 3),
            (&[28_400], 4),
        ];
        assert_eq!(asked(&hangs), [false, false, true, true, false]);
        // One vCPU of two is enough.
        let one: [(&[u64], u64); 3] = [(&[0, 0], 0), (&[10, 5000], 0), (&[20, 10_000], 0)];
        assert_eq!(asked(&one), [false, false, true]);
    }

    #[test]
    fn who_rests_or_answers_is_not_asked() {
        let rests: [(&[u64], u64); 4] = [(&[100], 0); 4];
        assert_eq!(asked(&rests), [false; 4]);
        // Now and then it rests.
        let works: [(&[u64], u64); 5] = [
            (&[0], 0),
            (&[5000], 0),
            (&[9400], 0),
            (&[14_400], 0),
            (&[14_500], 0),
        ];
        assert_eq!(asked(&works), [false; 5]);
        // Somebody else asks it.
        let answers: [(&[u64], u64); 4] = [(&[0], 0), (&[5000], 1), (&[10_000], 1), (&[15_000], 2)];
        assert_eq!(asked(&answers), [false; 4]);
        // vCPUs that come are not known yet.
        let comes: [(&[u64], u64); 3] = [(&[], 0), (&[5000], 0), (&[5000, 5000], 0)];
        assert_eq!(asked(&comes), [false; 3]);
    }
}
