// SPDX-License-Identifier: Apache-2.0
//! `cell.*`: what idle cells cost their process, beyond guest memory.

use std::fs;
use std::io::{self, Read};
use std::path::Path;
use std::time::Duration;

use cloister_vmm::{CellHost, CellHostConfig, HugePages};

use crate::Context;
use crate::ours::{Ours, chain, if_it_ended};
use crate::report::Figure;

const READY_PORT: u32 = 1025;
const SMAPS: &str = "/proc/self/smaps";
const COUNTS: [u32; 3] = [1, 10, 50];

/// KiB of a process's PSS, by its smaps.
#[derive(Clone, Copy, Default)]
pub struct Pss {
    /// Guests' memory.
    pub guest: u64,
    /// Pages of programs and other files: in the page cache once, and taken back from there first.
    pub files: u64,
    /// Heap and stacks.
    pub own: u64,
}

impl Pss {
    /// Reads a process's smaps.
    pub fn of(smaps: &Path) -> io::Result<Self> {
        let smaps = fs::read_to_string(smaps)?;
        let (mut pss, mut other) = (Self::default(), 0);
        let mut kind = &mut other;
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("Pss:") => *kind += words.next().and_then(|word| word.parse().ok()).unwrap_or(0),
                // A mapping's first line starts with its addresses; its sixth word is the file.
                Some(first) if first.contains('-') => {
                    kind = match words.nth(4) {
                        // Of a file of the VMM's own tmpfs there is but the inode's number.
                        Some(file) if file.starts_with("/memfd:") || file.starts_with("/#") => &mut pss.guest,
                        Some(file) if file.starts_with('/') => &mut pss.files,
                        _ => &mut pss.own,
                    };
                }
                _ => {}
            }
        }
        Ok(pss)
    }

    /// Without guests' memory.
    pub fn beyond_guests(self) -> u64 {
        self.files.saturating_add(self.own)
    }
}

fn threads() -> io::Result<usize> {
    Ok(fs::read_dir("/proc/self/task")?.count())
}

/// Measures.
pub fn run(context: &mut Context) -> io::Result<()> {
    let host = CellHost::new(CellHostConfig::default()).map_err(chain)?;
    // Twice, or the pages of the program that the first look was the first to use would be the cells'.
    Pss::of(Path::new(SMAPS))?;
    let empty = Pss::of(Path::new(SMAPS))?;
    let mut cells = Vec::new();
    for count in COUNTS {
        let mut waiting = Vec::new();
        for index in u32::try_from(cells.len()).unwrap_or(0)..count {
            let config = Ours {
                kernel: &context.kernel,
                initrd: &context.initrd,
                memory_mib: 128,
                cmdline: "",
                console: None,
                devices: Vec::new(),
                cid: 1000 + index,
                huge_pages: HugePages::No,
            };
            let (cell, vsock) = config.create(&host)?;
            let listener = vsock.listen(READY_PORT)?;
            cell.start().map_err(chain)?;
            waiting.push((cell, vsock, listener));
            // A few boots at a time: there are few processors.
            if waiting.len() == 4 {
                settle(&mut waiting, &mut cells)?;
            }
        }
        settle(&mut waiting, &mut cells)?;
        let now = Pss::of(Path::new(SMAPS))?;
        let kib = |value: u64| f64::from(u32::try_from(value).unwrap_or(u32::MAX));
        let per_cell = kib(now.beyond_guests().saturating_sub(empty.beyond_guests())) / f64::from(count);
        let conditions = format!(
            "1 vCPU, 128 MiB, vsock; PSS without guest pages, beyond the same process with no cell ({} KiB), per cell; {} KiB of the \
             cells' heap and stacks, {} of the program",
            empty.beyond_guests(),
            now.own.saturating_sub(empty.own),
            now.files.saturating_sub(empty.files),
        );
        context.report.add(Figure::ours(
            format!("cell.pss_kib.{count}"),
            per_cell,
            "KiB",
            "<= 512",
            conditions,
        ))?;
        let conditions = "PSS of the whole process without guest pages, divided by its cells".to_owned();
        let whole = kib(now.beyond_guests()) / f64::from(count);
        context.report.add(Figure::ours(
            format!("cell.process_pss_kib.{count}"),
            whole,
            "KiB",
            "",
            conditions,
        ))?;
        if count == 50 {
            let beyond = threads()?.saturating_sub(cells.len());
            let value = f64::from(u32::try_from(beyond).unwrap_or(u32::MAX));
            let conditions = "1 vCPU each".to_owned();
            let name = "cell.threads_beyond_vcpus.50".to_owned();
            context
                .report
                .add(Figure::ours(name, value, "threads", "<= 8", conditions))?;
        }
    }
    for ((cell, ..), _) in &cells {
        cell.stop();
    }
    for ((cell, ..), _) in &cells {
        cell.wait_taken_down(Some(Duration::from_secs(20)));
    }
    Ok(())
}

type Started = (
    cloister_vmm::Cell,
    cloister_devices::vsock::VsockHandle,
    cloister_devices::vsock::VsockListener,
);

/// Waits until all of `waiting` are ready.
fn settle(
    waiting: &mut Vec<Started>,
    cells: &mut Vec<(Started, std::os::unix::net::UnixStream)>,
) -> io::Result<()> {
    for started in waiting.drain(..) {
        let ready = || -> io::Result<_> {
            let (mut stream, _) = started.2.accept()?;
            stream.set_read_timeout(Some(Duration::from_secs(60)))?;
            stream.read_exact(&mut [0])?;
            Ok(stream)
        };
        let stream = ready().map_err(|error| if_it_ended(&started.0, error))?;
        cells.push((started, stream));
    }
    Ok(())
}
