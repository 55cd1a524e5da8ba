// SPDX-License-Identifier: Apache-2.0
//! Throughput of a shared directory: the virtio-fs tag `cloister`, in its entry `bench`.
//!
//! Caches are dropped before what is to be read, so that each figure is the file system's and not the guest's page
//! cache's.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::mount::{MountFlags, mount};

use crate::{report, timed};

// Sizes that the slower of two VMMs gets through in seconds on an emulated host.
const FILE_BYTES: usize = 32 << 20;
const CHUNK: usize = 1 << 20;
const RANDOM_READS: usize = 500;
const SMALL_FILES: usize = 100;
/// Times that each measurement is made.
const PASSES: usize = 2;
const MIB: f64 = 1_048_576.0;

/// Mounts the shared directory once and gives the path of its entry `bench`.
pub fn mounted(options: Option<&std::ffi::CStr>) -> io::Result<&'static Path> {
    fs::create_dir_all("/mnt")?;
    mount("cloister", "/mnt", "virtiofs", MountFlags::empty(), options)?;
    Ok(Path::new("/mnt/bench"))
}

fn drop_caches() -> io::Result<()> {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3")
}

/// Runs the four measurements.
pub fn run() -> io::Result<()> {
    let dir = mounted(None)?;
    for _ in 0..PASSES {
        seq_write(dir)?;
        seq_read(dir)?;
        rand_4k(dir)?;
        small_files(dir)?;
    }
    fs::remove_file(dir.join("big"))?;
    rustix::mount::unmount("/mnt", rustix::mount::UnmountFlags::empty())?;
    Ok(())
}

fn megabytes() -> f64 {
    f64::from(u32::try_from(FILE_BYTES).unwrap_or(u32::MAX)) / MIB
}

fn seq_write(dir: &Path) -> io::Result<()> {
    let chunk: Vec<u8> = (0..CHUNK).map(|i| i.to_le_bytes()[0]).collect();
    let (seconds, ()) = timed(|| {
        let mut file = File::create(dir.join("big"))?;
        for _ in 0..FILE_BYTES / CHUNK {
            file.write_all(&chunk)?;
        }
        file.sync_all()
    })?;
    report("fs.seq_write", megabytes() / seconds, "MiB/s");
    Ok(())
}

fn seq_read(dir: &Path) -> io::Result<()> {
    drop_caches()?;
    let mut chunk = vec![0; CHUNK];
    let (seconds, total) = timed(|| {
        let mut file = File::open(dir.join("big"))?;
        let mut total = 0;
        loop {
            match file.read(&mut chunk)? {
                0 => return Ok(total),
                n => total += n,
            }
        }
    })?;
    if total != FILE_BYTES {
        return Err(io::Error::other(format!(
            "read {total} bytes back, wrote {FILE_BYTES}"
        )));
    }
    report("fs.seq_read", megabytes() / seconds, "MiB/s");
    Ok(())
}

/// A page-aligned buffer, as O_DIRECT wants it.
#[repr(align(4096))]
struct Page([u8; 4096]);

fn rand_4k(dir: &Path) -> io::Result<()> {
    drop_caches()?;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(dir.join("big"))?;
    let mut page = Box::new(Page([0; 4096]));
    let pages = u64::try_from(FILE_BYTES / 4096).unwrap_or(1);
    let mut random: u64 = 0x9e37_79b9_7f4a_7c15;
    let (seconds, ()) = timed(|| {
        for _ in 0..RANDOM_READS {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            file.read_exact_at(&mut page.0, random % pages * 4096)?;
        }
        Ok(())
    })?;
    report(
        "fs.rand_4k",
        f64::from(u32::try_from(RANDOM_READS).unwrap_or(u32::MAX)) / seconds,
        "op/s",
    );
    Ok(())
}

fn small_files(dir: &Path) -> io::Result<()> {
    let dir = dir.join("small");
    let (seconds, ()) = timed(|| {
        fs::create_dir(&dir)?;
        for i in 0..SMALL_FILES {
            fs::write(dir.join(i.to_string()), [7; 4096])?;
        }
        drop_caches()?;
        // All names first: what is removed while a directory is being read may hide what follows.
        let names: Vec<_> = fs::read_dir(&dir)?.collect::<Result<_, _>>()?;
        for entry in names {
            let path = entry.path();
            if fs::read(&path)?.len() != 4096 {
                return Err(io::Error::other(format!("{} is short", path.display())));
            }
            fs::remove_file(&path)?;
        }
        fs::remove_dir(&dir)
    })?;
    report(
        "fs.small_files",
        f64::from(u32::try_from(SMALL_FILES).unwrap_or(u32::MAX)) / seconds,
        "files/s",
    );
    Ok(())
}
