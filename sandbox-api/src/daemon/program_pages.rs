// SPDX-License-Identifier: Apache-2.0
//! Gives back the pages of the program that the start of pods has used, once no pod starts or ends.
//!
//! Most of what a daemon with few pods holds is its own program: the kernel maps up to 16 pages around each that is
//! touched. A daemon at rest needs a few of them. The others stay in the page cache for as long as the host has no better
//! use for that memory; while they are mapped it thinks that they are in use. A later start takes them from there, some
//! hundred page faults without I/O.

use rustix::mm::{Advice, madvise};
use std::convert::Infallible;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;

/// How long no pod starts or ends before the pages go.
const REST: Duration = Duration::from_secs(10);

/// Does so forever. `change` is told of each pod that starts or ends.
pub async fn keep_small(change: Arc<Notify>) -> Infallible {
    loop {
        while tokio::time::timeout(REST, change.notified()).await.is_ok() {}
        match give_back() {
            Ok(bytes) => log::debug!("nobody needs most of the program's {} KiB now", bytes >> 10),
            Err(error) => log::warn!("the program's pages stay in memory: {error}"),
        }
        change.notified().await;
    }
}

/// Of all code of the program, and only that: what was relocated cannot be read again from the file. Answers its length.
fn give_back() -> io::Result<usize> {
    let program = std::fs::read_link("/proc/self/exe")?;
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let mut given = 0_usize;
    for (start, length) in maps.lines().filter_map(|line| code(line, &program)) {
        let address = std::ptr::with_exposed_provenance_mut(start);
        // SAFETY: a private mapping of a file that has never been writable: the same bytes are read from it when they are needed
        // next. It lasts as long as the process.
        unsafe { madvise(address, length, Advice::LinuxDontNeed) }?;
        given = given.saturating_add(length);
    }
    Ok(given)
}

/// Start and length of a mapping of the program's code; none: it is another line of /proc/PID/maps. (proc_pid_maps(5))
fn code(line: &str, program: &Path) -> Option<(usize, usize)> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    if fields.next() != Some("r-xp") || Path::new(fields.nth(3)?) != program {
        return None;
    }
    let start = usize::from_str_radix(start, 16).ok()?;
    Some((start, usize::from_str_radix(end, 16).ok()?.checked_sub(start)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_code_of_the_program_is_meant() {
        let program = Path::new("/usr/bin/cloisterd");
        let line = |perms: &str, path: &str| format!("55d0c000-55d0f000 {perms} 00001000 fe:00 77   {path}");
        assert_eq!(
            code(&line("r-xp", "/usr/bin/cloisterd"), program),
            Some((0x55d0_c000, 0x3000))
        );
        for (perms, path) in [
            ("r--p", "/usr/bin/cloisterd"),
            ("rw-p", "/usr/bin/cloisterd"),
            ("r-xp", "/usr/lib/libc.so.6"),
            ("r-xp", ""),
        ] {
            assert_eq!(code(&line(perms, path), program), None, "{perms} {path}");
        }
    }

    #[test]
    fn the_program_goes_on() {
        assert!(give_back().unwrap() > 1 << 20);
        assert!(give_back().is_ok());
    }
}
