// SPDX-License-Identifier: Apache-2.0
//! `console`: what a pod's guest kernel says.

use super::target;
use super::{Context, Outcome};
use crate::cli::args::ConsoleArgs;
use crate::cli::table::printable;
use crate::cli::{Failure, print};
use std::io::{self, Write};

pub fn console(context: &Context, args: &ConsoleArgs) -> Outcome {
    let (known, pod) = target::pod(context, &args.pod)?;
    let Some(daemon) = &known.daemon else {
        return kept(context, &pod.id);
    };
    let path = format!("/pods/{}/console", pod.id);
    if !args.follow {
        let bytes = daemon.get(&path)?;
        if bytes.is_empty() {
            crate::error::tell(
                "cloister: the guest's kernel has said nothing; kernel_args = [\"loglevel=7\"] in the sandboxer has it say more",
            );
        }
        return show(&mut Lines::default(), &bytes, args.raw, true);
    }
    let mut lines = Lines::default();
    daemon.follow(&format!("{path}?follow"), |piece| {
        show(&mut lines, piece, args.raw, false).map(|_| true)
    })?;
    show(&mut lines, &[], args.raw, true)
}

/// What a daemon that does not run any more has kept of it.
fn kept(context: &Context, id: &str) -> Outcome {
    let path = context.state.join("sandboxes").join(id).join("console.txt");
    match std::fs::read(&path) {
        Ok(bytes) => show(&mut Lines::default(), &bytes, false, true),
        Err(_) => Err(Failure::new(
            "cloisterd is not running, and this pod's VM did not end by itself before: nothing is kept of its console",
        )),
    }
}

fn show(lines: &mut Lines, bytes: &[u8], raw: bool, end: bool) -> Outcome {
    if raw {
        let mut out = io::stdout().lock();
        out.write_all(bytes).and_then(|()| out.flush())?;
        return Ok(0);
    }
    let mut text = lines.take(bytes);
    if end {
        text.push_str(&lines.rest());
    }
    print(&text)?;
    Ok(0)
}

/// Makes lines fit for a terminal of what a guest chose to say. Holds one line of at most 4 KiB.
#[derive(Default)]
struct Lines(Vec<u8>);

impl Lines {
    const LONGEST: usize = 4096;

    fn take(&mut self, bytes: &[u8]) -> String {
        let mut text = String::new();
        for byte in bytes {
            if *byte == b'\n' || self.0.len() >= Self::LONGEST {
                text.push_str(&self.line());
            }
            if *byte != b'\n' {
                self.0.push(*byte);
            }
        }
        text
    }

    fn line(&mut self) -> String {
        let line = std::mem::take(&mut self.0);
        let line = String::from_utf8_lossy(&line);
        format!("{}\n", printable(line.trim_end_matches('\r')))
    }

    /// A last line without an end.
    fn rest(&mut self) -> String {
        if self.0.is_empty() {
            String::new()
        } else {
            self.line()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_cannot_write_to_the_terminal() {
        let mut lines = Lines::default();
        assert_eq!(lines.take(b"one\r\n\x1b[2Jtw"), "one\n");
        assert_eq!(lines.take("o\u{fc}\n".as_bytes()), "\\u{1b}[2Jtwo\u{fc}\n");
        assert_eq!(lines.take(b"\xff"), "");
        assert_eq!(lines.rest(), "\u{fffd}\n");
        assert_eq!(lines.rest(), "");
        let long = lines.take(&[b'x'; 10_000]);
        assert_eq!(long.lines().count(), 2);
    }
}
