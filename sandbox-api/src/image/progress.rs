// SPDX-License-Identifier: Apache-2.0
//! Progress on stderr: bars on a terminal, docker's one-line messages elsewhere, nothing if asked to be quiet.

use crate::error::tell;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, Read};

/// How to show it.
#[derive(Clone)]
pub enum Progress {
    /// Not at all.
    Quiet,
    /// One line per event.
    Lines,
    /// A bar per layer.
    Bars(MultiProgress),
}

impl Progress {
    /// What suits stderr.
    #[must_use]
    pub fn for_stderr(quiet: bool) -> Self {
        if quiet {
            Self::Quiet
        } else if std::io::stderr().is_terminal() {
            Self::Bars(MultiProgress::with_draw_target(ProgressDrawTarget::stderr()))
        } else {
            Self::Lines
        }
    }

    /// A line that stays.
    pub fn say(&self, line: &str) {
        match self {
            Self::Quiet => {}
            Self::Lines => tell(line),
            Self::Bars(bars) => {
                let _ = bars.println(line);
            }
        }
    }

    pub(crate) fn layer(&self, id: &str, size: u64) -> Bar {
        let bar = match self {
            Self::Bars(bars) => {
                let bar = bars.add(ProgressBar::new(size));
                let template = if size > 0 {
                    "{prefix}: {msg:<18} [{bar:25}] {bytes}/{total_bytes}"
                } else {
                    "{prefix}: {msg:<18} {bytes}"
                };
                if let Ok(style) = ProgressStyle::with_template(template) {
                    bar.set_style(style.progress_chars("=> "));
                }
                bar.set_prefix(id.to_owned());
                bar
            }
            _ => ProgressBar::hidden(),
        };
        Bar {
            id: id.to_owned(),
            bar,
            lines: matches!(self, Self::Lines),
        }
    }
}

/// Progress of one layer.
#[derive(Clone)]
pub(crate) struct Bar {
    id: String,
    bar: ProgressBar,
    lines: bool,
}

impl Bar {
    fn say(&self, what: &'static str) {
        self.bar.set_message(what);
        if self.lines {
            tell(format_args!("{}: {what}", self.id));
        }
    }

    pub fn downloading(&self) {
        self.bar.set_position(0);
        self.say("Pulling fs layer");
    }

    pub fn downloaded(&self) {
        self.say("Download complete");
    }

    pub fn unpacking(&self) {
        self.bar.set_position(0);
        self.bar.set_message("Extracting");
    }

    pub fn exists(&self) {
        self.say("Already exists");
    }

    pub fn done(&self) {
        if self.bar.message() != "Already exists" {
            self.say("Pull complete");
        }
        self.bar.finish();
    }

    pub fn add(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    /// Counts what is read.
    pub fn wrap<R: Read>(&self, inner: R) -> impl Read + use<R> {
        Counted {
            inner,
            bar: self.bar.clone(),
        }
    }
}

struct Counted<R> {
    inner: R,
    bar: ProgressBar,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.bar.inc(n as u64);
        Ok(n)
    }
}
