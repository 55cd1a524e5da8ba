// SPDX-License-Identifier: Apache-2.0
//! What one file system device counts.

use crate::metrics::Counter;

/// Counters, each growing from the device's creation on.
#[derive(Debug, Default)]
pub struct Metrics {
    pub(super) requests: Counter,
    pub(super) errors: Counter,
    pub(super) malformed: Counter,
    pub(super) bytes_read: Counter,
    pub(super) bytes_written: Counter,
    pub(super) lock_waits: Counter,
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
    pub(super) fn snapshot(&self) -> MetricsSnapshot {
        MetricsSnapshot {
            requests: self.requests.get(),
            errors: self.errors.get(),
            malformed: self.malformed.get(),
            bytes_read: self.bytes_read.get(),
            bytes_written: self.bytes_written.get(),
            lock_waits: self.lock_waits.get(),
            nodes: 0,
            descriptors: 0,
        }
    }
}
