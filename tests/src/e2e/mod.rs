// SPDX-License-Identifier: Apache-2.0
//! What the end-to-end tests share: [`Stage`] is a place on the host with a store and an image, where `cloister` is run
//! as a user would run it; [`Footprint`] and [`ProcessFootprint`] see what was left behind.
//!
//! `ci/e2e` runs these tests, as root, one at a time, where KVM can run Linux guests. The times in here only end what
//! hangs: an emulated host on a busy machine is a hundred times slower than hardware.

mod cpio;
mod footprint;
mod stage;

pub use cpio::archive;
pub use footprint::{Footprint, ProcessFootprint};
pub use stage::{Child, Output, Stage};

use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What hangs is given up after this long.
pub const PATIENCE: Duration = Duration::from_secs(600);

/// A file of the checkout that this runs in. Where it was compiled says nothing, for checkouts share what they compile
/// (`CARGO_TARGET_DIR`).
pub fn checkout(path: &str) -> PathBuf {
    let here = std::env::current_dir().unwrap();
    let root = here.ancestors().find(|folder| folder.join("Cargo.lock").exists());
    root.unwrap_or_else(|| panic!("{} is in no checkout", here.display()))
        .join(path)
}

/// A file of the guest side: `vmlinux`, `initramfs.cpio`.
pub fn guest_file(name: &str) -> PathBuf {
    let dir = std::env::var_os("CLOISTER_GUEST").map_or_else(|| checkout("target/guest"), PathBuf::from);
    let path = dir.join(name);
    assert!(path.exists(), "{} is missing: run make guest", path.display());
    path
}

/// KiB of the process's own memory; guest memory is shared and does not count.
pub fn anonymous_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// The number in a variable of the environment, for a test that can be made longer.
pub fn number_of(variable: &str, otherwise: u32) -> u32 {
    std::env::var(variable).map_or(otherwise, |text| {
        text.parse()
            .unwrap_or_else(|_| panic!("{variable}={text} is no number"))
    })
}

/// Waits until `found` answers something.
pub fn eventually<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = found() {
            return value;
        }
        assert!(start.elapsed() < PATIENCE, "never came: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
