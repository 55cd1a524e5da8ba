// SPDX-License-Identifier: Apache-2.0
//! What one file system device counts.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters, each growing from the device's creation on.
#[derive(Debug, Default)]
pub struct Metrics {
    pub(super) requests: AtomicU64,
    pub(super) errors: AtomicU64,
    pub(super) malformed: AtomicU64,
    pub(super) bytes_read: AtomicU64,
    pub(super) bytes_written: AtomicU64,
    pub(super) lock_waits: AtomicU64,
}

/// The counters at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MetricsSnapshot {
    /// Requests answered or taken.
    pub requests: u64,
    /// Requests answered with an error (ENOENT and the like included).
    pub errors: u64,
    /// Requests that broke the protocol.
    pub malformed: u64,
    /// Bytes of file data read by the guest through requests.
    pub bytes_read: u64,
    /// Bytes of file data written by the guest through requests.
    pub bytes_written: u64,
    /// Lock requests that had to wait.
    pub lock_waits: u64,
    /// Nodes that the guest knows now.
    pub nodes: u64,
    /// Host descriptors held for nodes and open files now.
    pub descriptors: u64,
}

impl Metrics {
    pub(super) fn count(counter: &AtomicU64, by: usize) {
        counter.fetch_add(by as u64, Ordering::Relaxed);
    }

    pub(super) fn snapshot(&self) -> MetricsSnapshot {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        MetricsSnapshot {
            requests: get(&self.requests),
            errors: get(&self.errors),
            malformed: get(&self.malformed),
            bytes_read: get(&self.bytes_read),
            bytes_written: get(&self.bytes_written),
            lock_waits: get(&self.lock_waits),
            nodes: 0,
            descriptors: 0,
        }
    }
}
