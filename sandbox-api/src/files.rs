// SPDX-License-Identifier: Apache-2.0
//! Small files that other processes read while they change.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Replaces a file as a whole: a reader sees the old bytes or the new ones, also after a crash.
///
/// # Errors
/// The new file cannot be written; the old one is then still there.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}", crate::ids::random_hex(4)));
    let new = path.with_file_name(name);
    let write = || {
        let mut file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, path)
    };
    let result = write();
    if result.is_err() {
        let _ = fs::remove_file(&new);
    }
    result
}
