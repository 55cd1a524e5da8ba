// SPDX-License-Identifier: Apache-2.0
//! The agent's keys on the kernel command line.

use cloister_protocol::cmdline::{LOG, READY};
use log::LevelFilter;

/// The kernel's word for keeping the initial RAM disk's memory.
pub const RETAIN_INITRD: &str = "retain_initrd";

/// What the command line says to the agent.
#[derive(Debug, PartialEq, Eq)]
pub struct Options {
    /// Level of the log.
    pub log: LevelFilter,
    /// Dial the host when ready, and send events.
    pub ready: bool,
    /// The kernel was told to keep the initial RAM disk's memory.
    pub retain_initrd: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            log: LevelFilter::Warn,
            ready: true,
            retain_initrd: false,
        }
    }
}

/// Reads the text of /proc/cmdline. Words that mean nothing are ignored; of a repeated key the last one counts.
pub fn parse(text: &str) -> Options {
    let mut options = Options::default();
    for word in text.split_ascii_whitespace() {
        if let Some(value) = word.strip_prefix(LOG) {
            if let Ok(level) = value.parse() {
                options.log = level;
            }
        } else if let Some(value) = word.strip_prefix(READY) {
            options.ready = value != "0";
        } else if word == RETAIN_INITRD {
            options.retain_initrd = true;
        }
    }
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_found_among_others() {
        let options = parse("console=hvc0 quiet cloister.log=debug root=x cloister.ready=0 retain_initrd\n");
        assert_eq!(
            options,
            Options {
                log: LevelFilter::Debug,
                ready: false,
                retain_initrd: true,
            }
        );
    }

    #[test]
    fn nonsense_leaves_the_defaults() {
        assert_eq!(
            parse("cloister.log=loud cloister.=1 xcloister.ready=0"),
            Options::default()
        );
        assert_eq!(parse(""), Options::default());
    }

    #[test]
    fn the_last_one_counts() {
        assert_eq!(parse("cloister.log=info cloister.log=off").log, LevelFilter::Off);
    }
}
