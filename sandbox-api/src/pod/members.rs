// SPDX-License-Identifier: Apache-2.0
//! Whom a pod's agent may speak of in its events: the containers and processes that it was asked to make.
//!
//! Events have a connection of their own: one can come before the answer to the call that made its process, and after the
//! answer to the call that removed it. So a process is known before the agent is asked for it, and for a while after it is
//! gone.

use crate::sync::lock;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Mutex;

/// Processes that are gone and still known.
const FORMER: usize = 128;

/// See the module. An exec id that is empty stands for the container itself.
#[derive(Debug, Default)]
pub struct Members(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    /// Execs by container.
    present: HashMap<String, HashSet<String>>,
    /// Container and exec, the last one gone at the end.
    former: VecDeque<(String, String)>,
}

impl Members {
    /// The agent is about to be asked for this one. An exec is in a container that is there.
    pub fn enter(&self, container: &str, exec: &str) {
        let mut known = lock(&self.0);
        if exec.is_empty() {
            known.present.entry(container.to_owned()).or_default();
        } else if let Some(execs) = known.present.get_mut(container) {
            execs.insert(exec.to_owned());
        }
    }

    /// This one is gone, a container with all its execs.
    pub fn leave(&self, container: &str, exec: &str) {
        let mut known = lock(&self.0);
        let gone: Vec<String> = if exec.is_empty() {
            let execs = known.present.remove(container);
            let itself = execs.is_some().then(String::new);
            execs.into_iter().flatten().chain(itself).collect()
        } else {
            let execs = known.present.get_mut(container);
            execs.and_then(|execs| execs.take(exec)).into_iter().collect()
        };
        let gone = gone.into_iter().map(|exec| (container.to_owned(), exec));
        known.former.extend(gone);
        let too_many = known.former.len().saturating_sub(FORMER);
        known.former.drain(..too_many);
    }

    /// Whether the pod has this one, or had it lately.
    pub fn has(&self, container: &str, exec: &str) -> bool {
        let known = lock(&self.0);
        let execs = known.present.get(container);
        execs.is_some_and(|execs| exec.is_empty() || execs.contains(exec))
            || known.former.iter().any(|(c, e)| c == container && e == exec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_gone_is_known_for_a_while() {
        let members = Members::default();
        members.enter("c1", "e1");
        assert!(!members.has("c1", "") && !members.has("c1", "e1"));
        members.enter("c1", "");
        members.enter("c1", "e1");
        members.enter("c1", "e2");
        assert!(members.has("c1", "") && members.has("c1", "e1"));
        assert!(!members.has("c1", "e") && !members.has("c", "") && !members.has("c2", "e1"));
        members.leave("c1", "e1");
        members.leave("c1", "");
        members.leave("never", "");
        members.leave("never", "e1");
        assert!(members.has("c1", "") && members.has("c1", "e1") && members.has("c1", "e2"));
        assert!(!members.has("never", "") && !members.has("never", "e1"));
        // One that is there is not forgotten with those of its name that were.
        members.enter("c2", "");
        members.enter("c2", "probe");
        for _ in 0..2 * FORMER {
            members.enter("c2", "again");
            members.leave("c2", "again");
        }
        assert!(!members.has("c1", "") && !members.has("c1", "e1"));
        assert!(members.has("c2", "probe") && members.has("c2", "again"));
        assert_eq!(lock(&members.0).former.len(), FORMER);
    }
}
