// SPDX-License-Identifier: Apache-2.0
//! `cloisterd`: the daemon that containerd uses as a sandboxer.

pub mod args;
pub mod config;
pub mod controller;
pub mod quantity;

use std::process::ExitCode;

/// Runs the daemon.
pub fn main() -> ExitCode {
    ExitCode::FAILURE
}
