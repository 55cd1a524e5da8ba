// SPDX-License-Identifier: Apache-2.0
//! What goes wrong on a node, and what Kubernetes is told of it.
//!
//! A case has one thing fail (a daemon, a guest, the network, the disk, the caller's patience), looks at what CRI says then, and
//! that the node's other pods go on. After each case the host and cloisterd hold what they held before.
//! `soak` does this to many pods in random order: `CLOISTER_SOAK=500` says to how many, `CLOISTER_SOAK_AT_ONCE=3` to how many
//! at any time. Without `CLOISTER_FAULTS_ALL=1` only the cases of [`AGREED`] run.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod crowd;
mod daemons;
mod guests;
mod host;

use cloister_tests::cri::{Container, Node, Outcome, Pod, Runtime, ensure, script};
use libtest_mimic::{Arguments, Failed, Trial};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// The node, and a pod of it that nothing is done to.
pub struct Bed {
    node: Node,
    runtime: Runtime,
    /// The same, of pods that are clones; where all cases run.
    clones: Option<Runtime>,
    bystander: Container,
}

type Case = (&'static str, fn(&mut Bed) -> Outcome);

const CASES: &[Case] = &[
    ("guest_panics", guests::guest_panics),
    ("agent_is_lost", guests::agent_is_lost),
    ("guest_is_out_of_memory", guests::guest_is_out_of_memory),
    ("container_floods_its_log", guests::container_floods_its_log),
    ("no_such_memory", host::no_such_memory),
    ("cni_fails_midway", host::cni_fails_midway),
    ("disk_is_full", host::disk_is_full),
    ("twenty_at_once", crowd::twenty_at_once),
    ("callers_give_up", crowd::callers_give_up),
    ("soak", crowd::soak),
    ("containerd_is_killed", daemons::containerd_is_killed),
    ("cloisterd_is_asked_to_end", daemons::cloisterd_is_asked_to_end),
    ("cloisterd_is_killed", daemons::cloisterd_is_killed),
];

/// What `make test` runs: cases that are quick, and were seen to pass each time but for what the emulator did to a guest.
/// `make faults` runs all.
const AGREED: &[&str] = &[
    "guest_panics",
    "agent_is_lost",
    "no_such_memory",
    "cni_fails_midway",
    "disk_is_full",
];

async fn bystander(runtime: &Runtime) -> Outcome<Container> {
    let pod = Pod::run(runtime, Pod::config(runtime)).await?;
    let container = pod
        .start(script("trap 'exit 0' TERM; sleep infinity & wait"))
        .await?;
    is_well(&container).await?;
    Ok(container)
}

async fn is_well(bystander: &Container) -> Outcome {
    let said = bystander.exec(&["echo", "still here"]).await?;
    ensure(said.stdout == "still here\n", format_args!("{said:?}"))
}

impl Bed {
    fn start(all: bool) -> Self {
        let names = ["cloister", "cloister-clone"];
        let node = Node::start(if all { &names } else { &names[..1] });
        let runtime = node.runtime("cloister");
        let clones = all.then(|| node.runtime("cloister-clone"));
        let bystander = node.block_on(async {
            for runtime in clones.iter().chain([&runtime]) {
                // The first pod leaves what is made once: the bridge, the files of its addresses, the template.
                let first = Pod::run(runtime, Pod::config(runtime)).await?;
                first.output(script("true")).await?.good()?;
                first.remove().await?;
            }
            bystander(&runtime).await
        });
        let bystander = bystander.unwrap_or_else(|error| panic!("{error}\n{}", node.said()));
        Self {
            node,
            runtime,
            clones,
            bystander,
        }
    }

    /// All kinds of pods that the node has.
    fn runtimes(&self) -> impl Iterator<Item = &Runtime> {
        self.clones.iter().chain([&self.runtime])
    }

    /// Carries a case out, and sees that nothing but the bystander is left.
    fn run(&mut self, name: &str, case: fn(&mut Self) -> Outcome) -> Outcome {
        let (host, daemon) = self.node.footprint();
        let pid = self.node.pid("cloisterd");
        let begin = Instant::now();
        case(self)?;
        eprintln!("{name}: {:.1?}", begin.elapsed());
        self.node.block_on(is_well(&self.bystander))?;
        if self.node.pid("cloisterd") == pid {
            host.assert_unchanged();
            daemon.assert_no_more();
        }
        Ok(())
    }

    /// Instead of the one that was removed.
    fn new_bystander(&mut self) -> Outcome {
        self.bystander = self.node.block_on(bystander(&self.runtime))?;
        Ok(())
    }
}

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let bed: Arc<Mutex<Option<Bed>>> = Arc::default();
    let all = std::env::var_os("CLOISTER_FAULTS_ALL").is_some();
    let wanted = CASES.iter().filter(|(name, _)| all || AGREED.contains(name));
    let trials = wanted.map(|&(name, case)| {
        let bed = Arc::clone(&bed);
        Trial::test(format!("faults::{name}"), move || {
            // A case that panics leaves the node as it is to the next one.
            let mut bed = bed.lock().unwrap_or_else(PoisonError::into_inner);
            let bed = bed.get_or_insert_with(|| Bed::start(all));
            bed.run(name, case).map_err(|error| {
                eprintln!("{}\n{name}: {error}", bed.node.said());
                Failed::from(error.to_string())
            })
        })
    });
    let conclusion = libtest_mimic::run(&arguments, trials.collect());
    if let Some(bed) = bed.lock().unwrap_or_else(PoisonError::into_inner).take() {
        let cleared = bed.node.block_on(async {
            for runtime in bed.runtimes() {
                runtime.clear().await?;
            }
            Outcome::Ok(())
        });
        if let Err(error) = cleared {
            eprintln!("pods could not be removed: {error}\n{}", bed.node.said());
            drop(bed);
            std::process::exit(1);
        }
    }
    conclusion.exit();
}
