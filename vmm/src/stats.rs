// SPDX-License-Identifier: Apache-2.0
//! Counting exits: those that reach this program, and KVM's own statistics of all of them.
//!
//! KVM's come through KVM_GET_STATS_FD (Linux 5.14, Documentation/virt/kvm/api.rst 4.133): a header, descriptors with
//! names, and a block of 64-bit values. Reading them needs one more descriptor per vCPU, so they are opened on
//! demand and closed again.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

/// Exits of one vCPU that reached this program. Each has one writer, the vCPU's thread.
#[derive(Debug, Default)]
pub(crate) struct ExitCounters {
    pub(crate) io_in: AtomicU64,
    pub(crate) io_out: AtomicU64,
    pub(crate) mmio_read: AtomicU64,
    pub(crate) mmio_write: AtomicU64,
    pub(crate) interrupted: AtomicU64,
    pub(crate) eoi: AtomicU64,
    pub(crate) other: AtomicU64,
}

/// Adds one without a locked instruction: there is only one writer.
pub(crate) fn count(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
}

/// Exits of a cell that reached this program, all vCPUs together.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct CellStats {
    /// Reads of I/O ports.
    pub io_in: u64,
    /// Writes of I/O ports.
    pub io_out: u64,
    /// Reads of device registers.
    pub mmio_read: u64,
    /// Writes of device registers.
    pub mmio_write: u64,
    /// KVM_RUN ended by a signal: kicks.
    pub interrupted: u64,
    /// Ends of level-triggered interrupts (split interrupt chip).
    pub eoi: u64,
    /// Anything else.
    pub other: u64,
}

impl CellStats {
    pub(crate) fn add(&mut self, counters: &ExitCounters) {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        self.io_in += get(&counters.io_in);
        self.io_out += get(&counters.io_out);
        self.mmio_read += get(&counters.mmio_read);
        self.mmio_write += get(&counters.mmio_write);
        self.interrupted += get(&counters.interrupted);
        self.eoi += get(&counters.eoi);
        self.other += get(&counters.other);
    }

    /// All exits that reached this program.
    pub fn total(&self) -> u64 {
        self.io_in + self.io_out + self.mmio_read + self.mmio_write + self.interrupted + self.eoi + self.other
    }
}

/// One of KVM's statistics.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvmStat {
    /// KVM's name for it, for example `exits`.
    pub name: String,
    /// Its value (the sum, where KVM keeps several).
    pub value: u64,
}

/// KVM_GET_STATS_FD: `_IO(KVMIO, 0xce)`.
const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;
const HEADER_SIZE: usize = 24;
/// Bytes of a descriptor before its name.
const DESCRIPTOR_SIZE: usize = 16;

/// Reads all statistics of `fd`, a vCPU or a VM. On a vCPU it waits until the vCPU does not run.
pub(crate) fn read_kvm_stats(fd: &impl AsRawFd) -> std::io::Result<Vec<KvmStat>> {
    // SAFETY: the ioctl takes no argument and answers a new descriptor or -1.
    let stats = unsafe { libc::ioctl(fd.as_raw_fd(), KVM_GET_STATS_FD, 0) };
    if stats < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    let file = unsafe { File::from_raw_fd(stats) };
    let mut header = [0u8; HEADER_SIZE];
    file.read_exact_at(&mut header, 0)?;
    let [_, name_size, count, _, descriptors, data] = std::array::from_fn(|n| u32_at(&header, n * 4));
    // These come from the kernel; the bounds only keep a surprise from becoming a huge allocation.
    let step = DESCRIPTOR_SIZE.saturating_add(usize::try_from(name_size).unwrap_or(usize::MAX).min(256));
    let mut raw = vec![0u8; step * usize::try_from(count).unwrap_or(0).min(1024)];
    file.read_exact_at(&mut raw, u64::from(descriptors))?;
    let mut result = Vec::new();
    for descriptor in raw.chunks_exact(step) {
        let values = u16::from_le_bytes([descriptor[6], descriptor[7]]);
        let offset = u32_at(descriptor, 8);
        let name = &descriptor[DESCRIPTOR_SIZE..];
        let name = name.split(|b| *b == 0).next().unwrap_or_default();
        let mut value: u64 = 0;
        for n in 0..u64::from(values) {
            let mut bytes = [0u8; 8];
            file.read_exact_at(&mut bytes, u64::from(data) + u64::from(offset) + n * 8)?;
            value = value.wrapping_add(u64::from_ne_bytes(bytes));
        }
        result.push(KvmStat {
            name: String::from_utf8_lossy(name).into_owned(),
            value,
        });
    }
    Ok(result)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_ne_bytes)
}
