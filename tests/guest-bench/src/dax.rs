// SPDX-License-Identifier: Apache-2.0
//! Reading a mapped file through the DAX window, against reading guest RAM.

use std::fs::File;
use std::io;

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use crate::{fs, report, timed};

const BYTES: usize = 32 << 20;
const PASSES: u32 = 8;

/// A mapping of [`BYTES`] bytes, unmapped when dropped.
struct Mapping(*mut core::ffi::c_void);

impl Mapping {
    fn file(file: &File) -> io::Result<Self> {
        // SAFETY: a fresh mapping at an address of the kernel's choice; nobody shrinks the file while it is mapped.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                BYTES,
                ProtFlags::READ,
                MapFlags::SHARED,
                file,
                0,
            )?
        };
        Ok(Self(start))
    }

    fn anonymous() -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), BYTES, protection, MapFlags::PRIVATE)? };
        // SAFETY: the mapping is BYTES long, writable, and ours alone.
        unsafe { std::ptr::write_bytes(start.cast::<u8>(), 1, BYTES) };
        Ok(Self(start))
    }

    /// The sum of all words.
    fn sum(&self) -> u64 {
        let mut sum = 0u64;
        for i in 0..BYTES / 8 {
            // SAFETY: i is within the mapping, which is readable and page-aligned. Volatile, as the file's pages
            // belong to the host too.
            sum = sum.wrapping_add(unsafe { self.0.cast::<u64>().add(i).read_volatile() });
        }
        sum
    }

    /// MiB per second over several passes, after one that faults the pages in.
    fn rate(&self) -> io::Result<f64> {
        std::hint::black_box(self.sum());
        let (seconds, _) = timed(|| Ok((0..PASSES).map(|_| self.sum()).fold(0u64, u64::wrapping_add)))?;
        let bytes = f64::from(u32::try_from(BYTES).unwrap_or(u32::MAX)) * f64::from(PASSES);
        Ok(bytes / 1_048_576.0 / seconds)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made by mmap with this length; no reference into it outlives self.
        let _ = unsafe { munmap(self.0, BYTES) };
    }
}

/// Runs the measurement.
pub fn run() -> io::Result<()> {
    let dir = fs::mounted(Some(c"dax=always"))?;
    let path = dir.join("dax");
    let bytes = vec![1; BYTES];
    std::fs::write(&path, bytes)?;
    {
        let mapped = Mapping::file(&File::open(&path)?)?;
        let ram = Mapping::anonymous()?;
        if mapped.sum() != ram.sum() {
            return Err(io::Error::other("the mapped file does not hold what was written"));
        }
        for _ in 0..3 {
            report("fs.dax_read", mapped.rate()?, "MiB/s");
            report("fs.ram_read", ram.rate()?, "MiB/s");
        }
    }
    std::fs::remove_file(path)?;
    rustix::mount::unmount("/mnt", rustix::mount::UnmountFlags::empty())?;
    Ok(())
}
