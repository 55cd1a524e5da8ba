// SPDX-License-Identifier: Apache-2.0
//! Logs as CRI has them: `TIME STREAM TAG TEXT`, where the tag is P for a piece of a long line and F for what ends one.

use super::{Outcome, ensure};
use std::path::Path;

/// One line of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// When it was said, as RFC 3339 has it.
    pub time: String,
    /// `stdout` or `stderr`.
    pub stream: String,
    /// Whether more of the same line follows.
    pub partial: bool,
    /// What was said.
    pub text: String,
}

/// The lines of a file; one that is not there yet has none.
pub(super) fn read(file: &Path) -> Outcome<Vec<Line>> {
    let text = match std::fs::read(file) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        read => String::from_utf8_lossy(&read?).into_owned(),
    };
    // The last one may not be whole yet.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().map(parse).collect()
}

fn parse(line: &str) -> Outcome<Line> {
    let mut parts = line.splitn(4, ' ');
    let mut next = || parts.next().ok_or_else(|| format!("no line of a log: {line:?}"));
    let (time, stream, tag, text) = (next()?, next()?, next()?, next()?);
    ensure(
        time.len() >= 20 && time.as_bytes()[10] == b'T' && ["stdout", "stderr"].contains(&stream),
        format_args!("no line of a log: {line:?}"),
    )?;
    ensure(["P", "F"].contains(&tag), format_args!("unknown tag: {line:?}"))?;
    Ok(Line {
        time: time.to_owned(),
        stream: stream.to_owned(),
        partial: tag == "P",
        text: text.to_owned(),
    })
}
