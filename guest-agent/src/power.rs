// SPDX-License-Identifier: Apache-2.0
//! The end of the machine.

use std::path::Path;
use std::time::Duration;

use rustix::fs::sync;
use rustix::process::{WaitId, WaitIdOptions, waitid};
use rustix::system::{RebootCommand, reboot};

/// How long killed processes get to be gone before the disks are synced all the same.
const GRACE: Duration = Duration::from_millis(500);

/// Kills every process but this one, and waits until they are gone.
///
/// In a VM that is every process there is; elsewhere it would be every process of the machine, so never call it there.
pub async fn kill_everything() {
    // kill(-1, ...): rustix has no name for "all".
    // SAFETY: takes no pointers.
    unsafe { libc::kill(-1, libc::SIGKILL) };
    let started = std::time::Instant::now();
    while started.elapsed() < GRACE && has_children() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn has_children() -> bool {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    waitid(WaitId::All, options).is_ok()
}

/// Syncs and turns the machine off, or restarts it.
///
/// A machine without ACPI has no switch: power-off would stop its processors and leave the VM standing. It restarts
/// instead, and the VMM, which knows what it asked for, takes the reset for the end.
pub fn down(restart: bool) -> ! {
    sync();
    let command = if restart || !Path::new("/sys/firmware/acpi").exists() {
        RebootCommand::Restart
    } else {
        RebootCommand::PowerOff
    };
    let error = reboot(command);
    log::error!("the machine does not go down: {error:?}");
    // The death of PID 1 is a kernel panic, which restarts the machine.
    std::process::abort()
}
