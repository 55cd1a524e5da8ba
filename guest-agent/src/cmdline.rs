// SPDX-License-Identifier: Apache-2.0
//! The agent's keys on the kernel command line.

use cloister_protocol::cmdline::LOG;
use log::LevelFilter;

/// What the command line says to the agent.
#[derive(Debug, PartialEq, Eq)]
pub struct Options {
    /// Level of the log.
    pub log: LevelFilter,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            log: LevelFilter::Warn,
        }
    }
}

/// Reads the text of /proc/cmdline. Words that mean nothing are ignored; of a repeated key the last one counts.
pub fn parse(text: &str) -> Options {
    let mut options = Options::default();
    for word in text.split_ascii_whitespace() {
        if let Some(level) = word.strip_prefix(LOG).and_then(|value| value.parse().ok()) {
            options.log = level;
        }
    }
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_found_among_others() {
        let options = parse("console=hvc0 quiet cloister.log=debug root=x cloister.logs=off\n");
        assert_eq!(
            options,
            Options {
                log: LevelFilter::Debug,
            }
        );
    }

    #[test]
    fn nonsense_leaves_the_defaults() {
        assert_eq!(
            parse("cloister.log=loud cloister.=1 xcloister.log=off"),
            Options::default()
        );
        assert_eq!(parse(""), Options::default());
    }

    #[test]
    fn the_last_one_counts() {
        assert_eq!(parse("cloister.log=info cloister.log=off").log, LevelFilter::Off);
    }
}
