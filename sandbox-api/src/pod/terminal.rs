// SPDX-License-Identifier: Apache-2.0
//! The user's terminal: raw while a container has it, and as it was afterwards.

use rustix::termios::{OptionalActions, Termios, Winsize, isatty, tcgetattr, tcgetwinsize, tcsetattr};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// A terminal in raw mode; dropped, it is as before.
#[derive(Debug)]
pub struct Raw {
    terminal: OwnedFd,
    before: Termios,
}

impl Raw {
    /// Makes stdin's terminal raw.
    ///
    /// # Errors
    /// stdin is no terminal.
    pub fn stdin() -> io::Result<Self> {
        let terminal = io::stdin().as_fd().try_clone_to_owned()?;
        let before = tcgetattr(&terminal)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&terminal, OptionalActions::Now, &raw)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(&self.terminal, OptionalActions::Now, &self.before);
    }
}

/// Width and height of the terminal on stdout or stdin, in characters.
pub fn size() -> Option<(u16, u16)> {
    let ask = |fd: std::os::fd::BorrowedFd<'_>| {
        tcgetwinsize(fd)
            .ok()
            .filter(|size: &Winsize| size.ws_col > 0 && size.ws_row > 0)
    };
    let size = ask(io::stdout().as_fd()).or_else(|| ask(io::stdin().as_fd()))?;
    Some((size.ws_col, size.ws_row))
}

/// Whether stdin is a terminal.
pub fn stdin_is_terminal() -> bool {
    isatty(io::stdin())
}
