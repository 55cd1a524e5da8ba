// SPDX-License-Identifier: Apache-2.0
//! `start`, `restart`, `attach`.

use super::args::{AttachArgs, RestartArgs, StartArgs};
use super::pods::target::{self, Verb};
use super::session::{self, Options};
use super::{Context, Failure, Outcome, containers, each, print, run};
use crate::host_check;
use crate::pod::state::{Alive, Pods, Record, Status};
use crate::pod::terminal;

/// Hosts a container again; None if it runs.
fn revive(context: &Context, name: &str) -> Outcome<(Pods, Record, Option<Alive>)> {
    let pods = context.pods()?;
    let record = target::own(context, &pods, name, Verb::Start)?;
    if record.status == Status::Running {
        return Ok((pods, record, None));
    }
    host_check::can_run().map_err(Failure::new)?;
    Ok(match pods.revive(&record.id)? {
        Some((record, alive)) => (pods, record, Some(alive)),
        None => {
            let record = pods.load(&record.id)?;
            if !record.wants_host() {
                return Err(Failure::new(format!(
                    "container {name} is in the hands of another command: start it again in a moment"
                )));
            }
            (pods, record, None)
        }
    })
}

pub fn start(context: &Context, args: &StartArgs) -> Outcome {
    let attach = args.attach || args.interactive;
    match args.containers.as_slice() {
        [name] if attach => start_attached(context, name, args),
        _ if attach => Err(Failure::new(
            "you cannot start and attach multiple containers at once",
        )),
        names => each(names, |name| {
            let (pods, record, alive) = revive(context, name)?;
            if let Some(alive) = alive {
                run::launch(context, &pods, &record, alive, run::Launch::default())?
                    .ready()
                    .map_err(failed)?;
            }
            print(&format!("{name}\n"))
        }),
    }
}

/// docker's exit status of a start that failed.
fn failed(failure: Failure) -> Failure {
    failure.with_code(1)
}

fn start_attached(context: &Context, name: &str, args: &StartArgs) -> Outcome {
    let (pods, record, alive) = revive(context, name)?;
    let options = Options {
        stdin: args.interactive && record.plan.interactive,
        sig_proxy: true,
        keys: args.detach_keys.clone(),
    };
    check_terminal(&record, options.stdin)?;
    match alive {
        Some(alive) => run::launch(context, &pods, &record, alive, run::AWAITED)?
            .attached(&pods, &record, options)
            .map_err(|failure| {
                if failure.code == 125 {
                    failed(failure)
                } else {
                    failure
                }
            }),
        None => {
            let stream = session::connect(&pods, &record)?;
            session::attached(&pods, &record, &stream, options)
        }
    }
}

pub fn restart(context: &Context, name: &str, args: &RestartArgs) -> Outcome<()> {
    let pods = context.pods()?;
    let record = target::own(context, &pods, name, Verb::Start)?;
    let restarting = pods.restarting(&record.id)?;
    containers::stop(context, name, args.time, args.signal)?;
    let (pods, record, alive) = revive(context, name)?;
    drop(restarting);
    if let Some(alive) = alive {
        run::launch(context, &pods, &record, alive, run::Launch::default())?
            .ready()
            .map_err(failed)?;
    }
    print(&format!("{name}\n"))
}

pub fn attach(context: &Context, args: &AttachArgs) -> Outcome {
    let pods = context.pods()?;
    let record = target::own(context, &pods, &args.container, Verb::Attach)?;
    if record.status != Status::Running {
        return Err(Failure::new(
            "You cannot attach to a stopped container, start it first",
        ));
    }
    let options = Options {
        stdin: !args.no_stdin && record.plan.interactive,
        sig_proxy: args.sig_proxy,
        keys: args.detach_keys.clone(),
    };
    check_terminal(&record, options.stdin)?;
    let stream = session::connect(&pods, &record)?;
    session::attached(&pods, &record, &stream, options)
}

fn check_terminal(record: &Record, stdin: bool) -> Outcome<()> {
    if stdin && record.plan.wishes.terminal && !terminal::stdin_is_terminal() {
        return Err(Failure::new("the input device is not a TTY"));
    }
    Ok(())
}
