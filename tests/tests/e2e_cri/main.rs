// SPDX-License-Identifier: Apache-2.0
//! What Kubernetes asks of a runtime, asked of Cloister and of runc on the same node.
//!
//! A case is a function over a runtime handler that answers what it saw, as JSON. It runs on every handler at once, and what was
//! seen must be the same, but for what [`differences`] lists with a reason. What a case insists on by itself, it ensures for both.
//!
//! Without `CLOISTER_CRI_ALL=1` only the cases of [`FEW`] run, and not on pods that boot. `CLOISTER_CRI_HANDLERS=runc` runs it on
//! that one alone, to see whether a case is right; with `CLOISTER_CRI_PRINT=1` what was seen is shown.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod block_volumes;
mod containers;
mod differences;
mod exec;
mod files;
mod logs;
mod mounts;
mod namespaces;
mod network;
mod pods;
mod resources;
mod security;
mod size;
mod snapshotters;
mod stats;
mod streams;

use cloister_tests::cri::{HANDLERS, Node, Outcome, Runtime};
use futures_util::future::join_all;
use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::Value;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

type Run = for<'a> fn(&'a Runtime) -> Pin<Box<dyn Future<Output = Outcome<Value>> + 'a>>;

/// One thing to be seen on every handler.
struct Case {
    name: &'static str,
    run: Run,
}

macro_rules! cases {
    ($($module:ident { $($name:ident)* })*) => {
        &[$($(Case {
            name: concat!("cri::", stringify!($module), "::", stringify!($name)),
            run: |runtime| Box::pin($module::$name(runtime)),
        }),*),*]
    };
}

const CASES: &[Case] = cases! {
    pods { life ends_its_containers unknown sysctls at_once events }
    containers { life exit_codes that_cannot_start stop process surroundings root_is_its_own several restart first_process terminal paused removed_while_running }
    exec { output process timeout orphan at_once signals }
    streams { exec_pipes exec_terminal attach attach_terminal port_forward }
    logs { lines complete reopen }
    files { names nodes_dns shared_memory }
    mounts { writable_and_not live_updates shared_by_containers nested propagation termination_log image_volume file_operations }
    security { users capabilities restrictions seccomp privileged devices reported_user }
    namespaces { processes shared_processes in_common of_the_node }
    network { addresses reach between_pods host_port service dns }
    resources { given changed out_of_memory processes }
    size { follows_containers follows_the_pod }
    snapshotters { native blockfile erofs }
    block_volumes { written_and_read read_only not_there }
    stats { of_a_container of_a_pod listed }
};

/// What `make test` runs, a few of each kind, for it has little time. `make cri` runs all.
const FEW: &[&str] = &[
    "pods::life",
    "pods::unknown",
    "containers::life",
    "containers::process",
    "containers::terminal",
    "exec::output",
    "exec::timeout",
    "streams::exec_pipes",
    "streams::attach",
    "streams::port_forward",
    "logs::lines",
    "files::nodes_dns",
    "files::shared_memory",
    "mounts::live_updates",
    "mounts::nested",
    "security::restrictions",
    "security::devices",
];

/// What also runs on pods whose stdio goes through containerd's Streaming service in place of fifos.
const STREAMED: &[&str] = &[
    "::exec::",
    "::streams::",
    "::logs::",
    "containers::terminal",
    "containers::exit_codes",
];

/// The node and its handlers, started by the first case.
struct Bed {
    runtimes: Vec<Runtime>,
    node: Node,
}

impl Bed {
    fn start() -> Self {
        let usual = if is_all() {
            "runc,cloister,cloister-clone,cloister-stream"
        } else {
            "runc,cloister-clone,cloister-stream"
        };
        let wanted = std::env::var("CLOISTER_CRI_HANDLERS").unwrap_or_else(|_| usual.into());
        let handlers: Vec<&'static str> = HANDLERS
            .into_iter()
            .filter(|&handler| wanted.split(',').any(|name| name == handler))
            .collect();
        let begin = Instant::now();
        let node = Node::start_with_spares(&handlers);
        let runtimes = handlers.iter().map(|&handler| node.runtime(handler)).collect();
        eprintln!("node with {handlers:?} after {:.1?}", begin.elapsed());
        Self { runtimes, node }
    }

    fn run(&self, case: &Case) -> Result<(), Failed> {
        let runtimes = self.runtimes.iter().filter(|runtime| {
            runtime.handler() != "cloister-stream" || STREAMED.iter().any(|part| case.name.contains(part))
        });
        let seen = self.node.block_on(join_all(runtimes.map(async |runtime| {
            let begin = Instant::now();
            let seen = (case.run)(runtime).await;
            (runtime.handler(), seen, begin.elapsed())
        })));
        let times: Vec<String> = seen
            .iter()
            .map(|(handler, _, time)| format!("{handler} {time:.1?}"))
            .collect();
        eprintln!("{}: {}", case.name, times.join(", "));
        if std::env::var_os("CLOISTER_CRI_PRINT").is_some() {
            for (handler, seen, _) in &seen {
                eprintln!("{handler}: {seen:#?}");
            }
        }
        let failures: Vec<String> = seen
            .iter()
            .filter_map(|(handler, seen, _)| Some(format!("{handler}: {}", seen.as_ref().err()?)))
            .collect();
        if !failures.is_empty() {
            return Err(failures.join("\n").into());
        }
        let mut complaints = Vec::new();
        if let [("runc", Ok(runc), _), ours @ ..] = &seen[..] {
            for (handler, cloister, _) in ours {
                let compared = cloister
                    .as_ref()
                    .map(|cloister| differences::check(case.name, runc, cloister));
                if let Ok(Err(told)) = compared {
                    complaints.push(format!("{handler}: {told}"));
                }
            }
        }
        if complaints.is_empty() {
            Ok(())
        } else {
            Err(complaints.join("\n").into())
        }
    }

    /// Removes what is left, and ends the daemons.
    fn end(self, well: bool) -> bool {
        let mut cleared = true;
        for runtime in &self.runtimes {
            if let Err(error) = self.node.block_on(runtime.clear()) {
                eprintln!("pods of {} could not be removed: {error}", runtime.handler());
                cleared = false;
            }
        }
        if !(cleared && well) {
            eprintln!("{}", self.node.said());
        }
        cleared
    }
}

fn is_all() -> bool {
    std::env::var_os("CLOISTER_CRI_ALL").is_some()
}

fn main() {
    let mut arguments = Arguments::from_args();
    // One after the other: a case already runs on all handlers at once.
    arguments.test_threads = Some(1);
    let bed: Arc<OnceLock<Option<Bed>>> = Arc::new(OnceLock::new());
    let all = is_all();
    let wanted = CASES
        .iter()
        .filter(|case| all || FEW.iter().any(|few| case.name.ends_with(few)));
    let trials = wanted.map(|case| {
        let bed = Arc::clone(&bed);
        Trial::test(case.name, move || {
            // One that cannot start is not tried again for each case.
            let bed = bed.get_or_init(|| std::panic::catch_unwind(Bed::start).ok());
            bed.as_ref().ok_or("there is no node")?.run(case)
        })
    });
    let conclusion = libtest_mimic::run(&arguments, trials.collect());
    let bed = Arc::into_inner(bed).and_then(OnceLock::into_inner).flatten();
    let cleared = bed.is_none_or(|bed| bed.end(!conclusion.has_failed()));
    if !cleared {
        std::process::exit(1);
    }
    conclusion.exit();
}
