// SPDX-License-Identifier: Apache-2.0
//! Logging: to the kernel's log in the VM, to stderr elsewhere, to the control pipe in a helper.
//!
//! The kernel's log reaches the console the VMM records. Each record is one write, so records never mix. Userspace
//! writes to /dev/kmsg are rate-limited by the kernel itself, so that nothing a container does can flood the console.

use std::fs::File;
use std::io::{self, Write};
use std::sync::OnceLock;

use log::{Level, LevelFilter, Log, Metadata, Record};

/// Longest record, in bytes: the kernel refuses longer ones (LOG_LINE_MAX less the prefix).
const MAX_RECORD: usize = 900;

enum Sink {
    /// /dev/kmsg
    Kernel(File),
    /// Standard error.
    Stderr,
    /// A helper's control pipe, see [`crate::spawn`].
    Control(File),
}

struct Logger(Sink);

static LOGGER: OnceLock<Logger> = OnceLock::new();

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let mut text = record.args().to_string().replace('\n', " ");
        truncate(&mut text, MAX_RECORD);
        // A log that cannot be written has nowhere to complain.
        let _ = match &self.0 {
            Sink::Kernel(file) => {
                let mut file = file;
                file.write_all(format!("<{}>cloister-agent: {text}\n", priority(record.level())).as_bytes())
            }
            Sink::Stderr => writeln!(io::stderr(), "cloister-agent: {}: {text}", record.level()),
            Sink::Control(file) => {
                let mut file = file;
                file.write_all(format!("{}{text}\n", control_mark(record.level())).as_bytes())
            }
        };
    }

    fn flush(&self) {}
}

/// Cuts `text` to at most `max` bytes, between characters.
pub fn truncate(text: &mut String, max: usize) {
    if text.len() > max {
        let mut end = max;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
    }
}

/// syslog priority, facility user.
fn priority(level: Level) -> u8 {
    let severity = match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    };
    8 + severity
}

/// First byte of a log line on a control pipe.
fn control_mark(level: Level) -> char {
    match level {
        Level::Error => 'e',
        Level::Warn => 'w',
        Level::Info => 'i',
        Level::Debug | Level::Trace => 'd',
    }
}

fn install(sink: Sink, level: LevelFilter) {
    let logger = LOGGER.get_or_init(|| Logger(sink));
    // Fails only when a logger is set already, which is the one of the first call.
    let _ = log::set_logger(logger);
    log::set_max_level(level);
}

/// Logs to the kernel (to stderr if there is no /dev/kmsg); panics too.
pub fn to_kernel(level: LevelFilter) {
    let sink = match File::options().write(true).open("/dev/kmsg") {
        Ok(file) => Sink::Kernel(file),
        Err(_) => Sink::Stderr,
    };
    install(sink, level);
    std::panic::set_hook(Box::new(|info| log::error!("panic: {info}")));
}

/// Logs to stderr.
pub fn to_stderr(level: LevelFilter) {
    install(Sink::Stderr, level);
}

/// Logs to a helper's control pipe; panics too.
pub fn to_control(pipe: File, level: LevelFilter) {
    install(Sink::Control(pipe), level);
    std::panic::set_hook(Box::new(|info| log::error!("panic: {info}")));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn truncates_between_characters() {
        let mut text = "aäöü".to_owned();
        truncate(&mut text, 4);
        assert_eq!(text, "aä");
        truncate(&mut text, 100);
        assert_eq!(text, "aä");
    }

    #[test]
    fn priorities_are_of_facility_user() {
        assert_eq!(priority(Level::Error), 11);
        assert_eq!(priority(Level::Debug), 15);
    }
}
