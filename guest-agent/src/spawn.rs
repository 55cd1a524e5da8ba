// SPDX-License-Identifier: Apache-2.0
//! Starting helpers, and what they report.
//!
//! A helper ([`crate::helper`]) gets the container's stdio as its own, and the write side of a control pipe. On the pipe
//! come lines, each written at once:
//!
//! | first byte | rest of the line |
//! | --- | --- |
//! | `P` | pid of the process left behind: success |
//! | `E` | error: failure |
//! | `X` | why the program cannot be run; comes before `E` |
//! | `e` `w` `i` `d` | log record |
//!
//! The process left behind holds the pipe until it executes its program, and logs to it if that fails.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::{AsyncBufReadExt, BufReader, Interest, Lines};

use crate::fd::Fd;
use crate::helper;
use crate::reaper::{Reaper, Spawning};

/// How long to look for what a dead helper wrote. A child of it may hold the pipe, so there may be no end of file.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// What a helper said so far.
#[derive(Default, Debug)]
struct Report {
    pid: Option<i32>,
    error: Option<String>,
    reason: Option<String>,
    first_log: Option<String>,
}

impl Report {
    /// Takes one line.
    fn take(&mut self, line: &str) {
        let Some(kind) = line.chars().next().filter(char::is_ascii) else {
            return;
        };
        let rest = &line[1..];
        match kind {
            'P' => self.pid = rest.parse().ok().filter(|pid| *pid > 0),
            'E' => self.error = Some(rest.to_owned()),
            'X' => self.reason = Some(rest.to_owned()),
            'e' => {
                // The first error is the innermost: libcontainer logs on the way up, and loses causes on the way.
                if self.first_log.is_none() {
                    self.first_log = Some(rest.to_owned());
                }
                log::debug!("helper: {rest}");
            }
            'w' => log::debug!("helper: {rest}"),
            _ => log::trace!("helper: {rest}"),
        }
    }

    fn done(&self) -> bool {
        self.pid.is_some() || self.error.is_some()
    }

    /// The text for the client.
    fn failure(self) -> String {
        if let Some(reason) = self.reason {
            return format!("unable to start container process: {reason}");
        }
        match (self.error, self.first_log) {
            (Some(error), Some(log)) if !error.contains(&log) => format!("{error}: {log}"),
            (Some(error), _) => error,
            (None, Some(log)) => format!("the helper died: {log}"),
            (None, None) => "the helper died without a word".to_owned(),
        }
    }
}

/// Runs a helper with `args` and the three stdio descriptors. Returns the pid of the process it left behind, with the
/// guard that keeps the process's exit until somebody watches it.
///
/// # Errors
/// A text for the client: the helper did not start, or failed.
pub async fn run(reaper: &Reaper, args: &[&OsStr], stdio: [OwnedFd; 3]) -> Result<(i32, Spawning), String> {
    let guard = reaper.spawning();
    let (child, pipe) = start(args, stdio).map_err(|e| format!("cannot start a helper process: {e}"))?;
    let mut dead = reaper.watch(child);
    let pipe =
        Fd::new(pipe, Interest::READABLE).map_err(|e| format!("cannot watch a helper process: {e}"))?;
    let mut lines = BufReader::with_capacity(1024, pipe).lines();
    let mut report = Report::default();
    while !report.done() {
        tokio::select! {
            biased;
            line = lines.next_line() => match line {
                Ok(Some(line)) => report.take(&line),
                Ok(None) | Err(_) => break,
            },
            _ = &mut dead => {
                // What it said last may not have been seen yet.
                while !report.done()
                    && let Ok(Ok(Some(line))) = tokio::time::timeout(LAST_WORDS, lines.next_line()).await
                {
                    report.take(&line);
                }
                break;
            }
        }
    }
    match report.pid {
        Some(pid) => {
            tokio::spawn(log_rest(lines));
            Ok((pid, guard))
        }
        None => Err(report.failure()),
    }
}

fn start(args: &[&OsStr], stdio: [OwnedFd; 3]) -> io::Result<(i32, OwnedFd)> {
    let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
    // One thread: nothing else can fork between this and spawn.
    fcntl_setfd(&theirs, FdFlags::empty())?;
    let [stdin, stdout, stderr] = stdio;
    let child = Command::new("/proc/self/exe")
        .arg0("cloister-agent")
        .arg(helper::COMMAND)
        .arg(theirs.as_raw_fd().to_string())
        .args(args)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(stdin))
        .stdout(Stdio::from(stdout))
        .stderr(Stdio::from(stderr))
        .spawn()?;
    let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
    Ok((pid, ours))
}

/// Logs what the process left behind has to say until it executes its program.
async fn log_rest(mut lines: Lines<BufReader<Fd>>) {
    while let Ok(Some(line)) = lines.next_line().await {
        if line.starts_with(['e', 'X']) {
            log::warn!("container: {}", line.get(1..).unwrap_or_default());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(lines: &[&str]) -> Report {
        let mut report = Report::default();
        for line in lines {
            report.take(line);
        }
        report
    }

    #[test]
    fn a_pid_is_success() {
        let report = report(&["wodd", "P42"]);
        assert!(report.done());
        assert_eq!(report.pid, Some(42));
    }

    #[test]
    fn pids_that_are_none_are_no_success() {
        for line in ["P", "P0", "P-1", "Px", "P99999999999", "", "ä"] {
            assert_eq!(report(&[line]).pid, None, "{line}");
        }
    }

    #[test]
    fn the_reason_goes_before_all_else() {
        let text = report(&["eroot cause", "Xexec: \"x\": permission denied", "Efailed"]).failure();
        assert_eq!(
            text,
            "unable to start container process: exec: \"x\": permission denied"
        );
    }

    #[test]
    fn the_first_log_record_explains_the_error() {
        assert_eq!(
            report(&["efirst", "esecond", "Efailed"]).failure(),
            "failed: first"
        );
        assert_eq!(report(&["efirst", "Efailed: first"]).failure(), "failed: first");
        assert_eq!(report(&["efirst"]).failure(), "the helper died: first");
        assert!(report(&[]).failure().contains("without a word"));
    }
}
