// SPDX-License-Identifier: Apache-2.0
//! The `cloister` command.
//!
//! Exit statuses: 0; a container's own; 125 when the command line is wrong or a container could not be had, 126 and 127
//! when its command could not be executed or found (docker's); 1 when another command failed.

pub mod args;
mod client;
mod containers;
mod exec;
mod images;
mod info;
mod install;
mod install_files;
pub mod parse;
mod pods;
mod run;
mod session;
mod shim;
mod snapshot;
mod snapshot_files;
mod start;
mod stats;
pub mod table;
mod template;

use crate::error::tell;
use crate::image::{self, Store};
use crate::pod::{host, state};
use args::{Cli, Command};
use clap::{CommandFactory, Parser};
use std::fmt::Display;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

/// A message for the user, and the exit status.
#[derive(Debug)]
pub struct Failure {
    code: u8,
    message: String,
}

impl Failure {
    fn new(message: impl Display) -> Self {
        Self {
            code: 1,
            message: message.to_string(),
        }
    }

    fn with_code(self, code: u8) -> Self {
        Self { code, ..self }
    }
}

type Outcome<T = u8> = Result<T, Failure>;

macro_rules! failures {
    ($($error:ty),*) => {$(
        impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                Self::new(crate::error::chain(&error))
            }
        }
    )*};
}
failures!(
    image::Error,
    state::Error,
    io::Error,
    serde_json::Error,
    crate::runtime::user::Error,
    crate::pod::snapshot::Error
);

impl From<host::Error> for Failure {
    fn from(error: host::Error) -> Self {
        Self {
            code: error.exit_code(),
            message: crate::error::chain(&error),
        }
    }
}

/// The folders every command works with.
pub struct Context {
    root: PathBuf,
    state: PathBuf,
}

impl Context {
    fn store(&self) -> Outcome<Store> {
        Ok(Store::open(&self.root)?)
    }

    /// The pods' records, the dead among them buried.
    fn pods(&self) -> Outcome<state::Pods> {
        let pods = state::Pods::open(&self.state, &self.root)?;
        host::reap(&pods)?;
        Ok(pods)
    }
}

/// Runs the command line.
pub fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args_os()
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    if let Some(code) = shim::answer(&arguments) {
        return code;
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 125 } else { 0 });
        }
    };
    env_logger::Builder::new()
        .filter_level(cli.log_level)
        // What these say at warn and below is for their developers.
        .filter_module("ttrpc", cli.log_level.min(log::LevelFilter::Error))
        .format(|out, record| {
            writeln!(
                out,
                "cloister: {}: {}",
                record.level().as_str().to_lowercase(),
                record.args()
            )
        })
        .init();
    let context = Context {
        root: cli.root,
        state: cli.state,
    };
    match dispatch(&context, cli.command) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            complain(&failure);
            ExitCode::from(failure.code)
        }
    }
}

fn dispatch(context: &Context, command: Command) -> Outcome {
    match command {
        Command::Run(args) => run::run(context, *args),
        Command::HostPod {
            id,
            awaited,
            snapshot,
            prefetch,
        } => run::host_pod(context, &id, awaited, &snapshot, prefetch),
        Command::Create(args) => run::create(context, *args),
        Command::Start(args) => start::start(context, &args),
        Command::Restart(args) => each(&args.containers, |name| start::restart(context, name, &args)),
        Command::Attach(args) => start::attach(context, &args),
        Command::Ps(args) => containers::ps(context, &args),
        Command::Exec(args) => exec::exec(context, &args),
        Command::Logs(args) => containers::logs(context, &args),
        Command::Stop(args) => each(&args.containers, |name| {
            containers::stop(context, name, args.time, args.signal)?;
            print(&format!("{name}\n"))
        }),
        Command::Kill(args) => each(&args.containers, |name| {
            containers::kill(context, name, args.signal)
        }),
        Command::Rm(args) => each(&args.containers, |name| containers::rm(context, name, args.force)),
        Command::Wait(args) => each(&args.names, |name| containers::wait(context, name)),
        Command::Inspect(args) => info::inspect(context, &args.names),
        Command::Stats(args) => stats::stats(context, &args),
        Command::Console(args) => pods::console::console(context, &args),
        Command::Events(args) => pods::events::events(context, &args),
        Command::DebugBundle(args) => pods::bundle::bundle(context, &args),
        Command::Images(args) => images::list(context, &args),
        Command::Rmi(args) => each(&args.images, |name| images::remove(context, name, args.force)),
        Command::Pull(args) => images::pull(context, &args),
        Command::Load(args) => images::load(context, &args),
        Command::Template(args) => template::template(context, args),
        Command::Snapshot(args) => snapshot::snapshot(context, &args),
        Command::Restore(args) => snapshot::restore(context, args),
        Command::Fork(args) => snapshot::fork(context, &args),
        Command::Check(args) => info::check(args.json),
        Command::Install(args) => install::install(&args),
        Command::Uninstall(args) => install::uninstall(&args),
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "cloister", &mut script);
            print(&String::from_utf8_lossy(&script))?;
            Ok(0)
        }
        Command::Version(args) => info::version(args.json),
    }
}

fn complain(failure: &Failure) {
    if !failure.message.is_empty() {
        tell(format_args!("cloister: {}", failure.message.trim_end()));
    }
}

/// Does something to each of several things; one failure does not keep it from the others.
fn each(names: &[String], mut act: impl FnMut(&str) -> Outcome<()>) -> Outcome {
    let mut code = 0;
    for name in names {
        if let Err(failure) = act(name) {
            complain(&failure);
            code = failure.code;
        }
    }
    Ok(code)
}

/// Prints to stdout; a reader that left (`| head`) is no error worth a message.
fn print(text: &str) -> Outcome<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Err(Failure {
            code: 141,
            message: String::new(),
        }),
        result => Ok(result?),
    }
}

fn print_json(value: &impl serde::Serialize) -> Outcome<()> {
    print(&format!("{}\n", serde_json::to_string_pretty(value)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn completion_for_every_shell() {
        use clap::ValueEnum;
        for shell in clap_complete::Shell::value_variants() {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "cloister", &mut script);
            assert!(String::from_utf8(script).unwrap().contains("run"), "{shell}");
        }
    }

    #[test]
    fn each_goes_on_after_a_failure() {
        let mut seen = Vec::new();
        let names = ["a".to_owned(), "b".to_owned()];
        let code = each(&names, |name| {
            seen.push(name.to_owned());
            if name == "a" {
                Err(Failure::new("no"))
            } else {
                Ok(())
            }
        });
        assert_eq!((code.unwrap(), seen.len()), (1, 2));
    }
}
