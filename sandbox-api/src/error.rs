// SPDX-License-Identifier: Apache-2.0
//! How errors are told: one line, outer message first, each source once.

use std::error::Error;
use std::fmt::Display;
use std::io::{self, Write};

/// Prints a line on stderr. If nobody reads that any more, the work goes on.
pub fn tell(line: impl Display) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// The message of an error and of what caused it.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let said = cause.to_string();
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        source = cause.source();
    }
    text
}
