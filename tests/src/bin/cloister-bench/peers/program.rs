// SPDX-License-Identifier: Apache-2.0
//! A peer's program: that it is what the user says it is, and its version.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::Given;

/// A program that was looked at.
#[derive(Debug)]
pub struct Program {
    /// Part of figures' names.
    pub label: String,
    /// Where it is.
    pub path: PathBuf,
    /// The first line of what it says to `--version`.
    pub version: String,
}

impl Program {
    /// The one that was given, which is to say `word` when it is asked for its version.
    ///
    /// # Errors
    /// It is no program, does not answer, or is another one.
    pub fn of(given: &Given, label: &str, word: &str) -> io::Result<Self> {
        let is_program = given
            .path
            .metadata()
            .is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0);
        if !is_program {
            return Err(given.error("not a program"));
        }
        let output = Command::new(&given.path)
            .arg("--version")
            .stdin(Stdio::null())
            .output()
            .map_err(|error| given.error(error))?;
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        let first = said.lines().find(|line| !line.trim().is_empty());
        let first = first.unwrap_or_default().trim();
        if !output.status.success() {
            return Err(given.error(format_args!("--version: {}: {first}", output.status)));
        }
        if !said.to_lowercase().contains(word) {
            return Err(given.error(format_args!("does not say that it is {word}: {first}")));
        }
        Ok(Self {
            label: label.to_owned(),
            path: given.path.clone(),
            version: first.to_owned(),
        })
    }

    /// One that names itself by its file's name.
    ///
    /// # Errors
    /// As [`Self::of`].
    pub fn named_by_file(given: &Given) -> io::Result<Self> {
        let name = given.path.file_stem().unwrap_or_default().to_string_lossy();
        let label: String = name
            .chars()
            .map(|c| {
                if c.is_ascii_alphanumeric() {
                    c.to_ascii_lowercase()
                } else {
                    '_'
                }
            })
            .collect();
        Self::of(given, &label, "")
    }
}
