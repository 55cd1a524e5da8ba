// SPDX-License-Identifier: Apache-2.0
//! The daemon's command line.
//!
//! Exit statuses are those of `cloister`: 0; 125 when the command line is wrong; 1 when something else is.

use super::config::{Config, ConfigError, DEFAULT_PATH, DEFAULT_TEXT, Level};
use clap::{CommandFactory, Parser, Subcommand};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Runs containerd's pods in virtual machines of their own.
#[derive(Debug, Parser)]
#[command(
    name = "cloisterd",
    version,
    about,
    max_term_width = 100,
    args_conflicts_with_subcommands = true
)]
pub struct Args {
    /// Configuration; the defaults hold where there is no /etc/cloister/config.toml
    #[arg(long, env = "CLOISTER_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// How much to say, instead of what the configuration tells
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<Level>,
    /// Something else than to run
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Host pods for a daemon, which alone starts this
    #[command(hide = true)]
    Worker {
        /// The worker's folder
        folder: PathBuf,
    },
    /// Show or check a configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print a script that completes commands in a shell
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// `cloisterd config`.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print a file with the defaults and what each key means
    Default,
    /// Say whether a file can be used; exits with 0 or 1
    Check {
        /// The file
        #[arg(default_value = DEFAULT_PATH, env = "CLOISTER_CONFIG")]
        file: PathBuf,
    },
    /// Print what holds: a file, completed with the defaults
    Dump {
        /// The file
        #[arg(default_value = DEFAULT_PATH, env = "CLOISTER_CONFIG")]
        file: PathBuf,
    },
}

/// What the process is to be.
#[derive(Debug)]
pub enum Asked {
    /// A daemon of this configuration.
    Daemon(Box<Config>),
    /// The worker with this folder.
    Worker(PathBuf),
}

/// What the command line asks for. What is neither a daemon nor a worker is done here, and gives an exit status.
///
/// # Errors
/// The exit status of a process that is to end.
pub fn asked() -> Result<Asked, ExitCode> {
    let args = Args::try_parse().map_err(|error| {
        let _ = error.print();
        ExitCode::from(if error.use_stderr() { 125 } else { 0 })
    })?;
    match act(args) {
        Ok(Some(asked)) => Ok(asked),
        Ok(None) => Err(ExitCode::SUCCESS),
        Err(Failure::Config(error)) => Err(failed(&error)),
        // A reader that left (`| head`).
        Err(Failure::Io(error)) if error.kind() == io::ErrorKind::BrokenPipe => Err(ExitCode::from(141)),
        Err(Failure::Io(error)) => Err(failed(&error)),
    }
}

fn failed(error: &dyn std::error::Error) -> ExitCode {
    eprintln!("cloisterd: {}", crate::error::chain(error));
    ExitCode::FAILURE
}

#[derive(Debug, thiserror::Error)]
#[error(transparent)]
enum Failure {
    Config(#[from] ConfigError),
    Io(#[from] io::Error),
}

fn act(args: Args) -> Result<Option<Asked>, Failure> {
    let command = match args.command {
        None => {
            let mut config = match &args.config {
                Some(path) => Config::load(path)?,
                None => Config::load_or_default(Path::new(DEFAULT_PATH))?,
            };
            config.check_files()?;
            config.log.level = args.log_level.unwrap_or(config.log.level);
            return Ok(Some(Asked::Daemon(Box::new(config))));
        }
        Some(Command::Worker { folder }) => return Ok(Some(Asked::Worker(folder))),
        Some(command) => command,
    };
    let text = match command {
        // Done above.
        Command::Worker { .. } => String::new(),
        Command::Config(ConfigCommand::Default) => DEFAULT_TEXT.to_owned(),
        Command::Config(ConfigCommand::Dump { file }) => load(&file)?.to_toml(),
        Command::Config(ConfigCommand::Check { file }) => {
            let config = load(&file)?;
            config.check_files()?;
            let names: Vec<&str> = config.sandboxer.keys().map(String::as_str).collect();
            let source = if file.exists() {
                file.display().to_string()
            } else {
                format!("there is no {}; the defaults", file.display())
            };
            format!("{source}: good; sandboxers: {}\n", names.join(", "))
        }
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Args::command(), "cloisterd", &mut script);
            String::from_utf8_lossy(&script).into_owned()
        }
    };
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(None)
}

/// The file that is named; where it is the usual one, it need not be there.
fn load(file: &Path) -> Result<Config, ConfigError> {
    if file == Path::new(DEFAULT_PATH) {
        Config::load_or_default(file)
    } else {
        Config::load(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Args::command().debug_assert();
        let args = Args::try_parse_from(["cloisterd", "--config", "/c", "--log-level", "debug"]).unwrap();
        assert_eq!(
            (args.config, args.log_level),
            (Some("/c".into()), Some(Level::Debug))
        );
        for wrong in [
            &["--log-level", "loud"][..],
            &["--config", "/c", "config", "default"],
            &["config"],
            &["run"],
        ] {
            let words = std::iter::once("cloisterd").chain(wrong.iter().copied());
            assert!(Args::try_parse_from(words).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_named_file_must_be_there() {
        let act_on = |words: &[&str]| {
            act(Args::try_parse_from(std::iter::once("cloisterd").chain(words.iter().copied())).unwrap())
        };
        for words in [
            &["--config", "/no/config.toml"][..],
            &["config", "check", "/no/config.toml"],
            &["config", "dump", "/no/config.toml"],
        ] {
            assert!(
                matches!(act_on(words), Err(Failure::Config(ConfigError::Read { .. }))),
                "{words:?}"
            );
        }
    }
}
