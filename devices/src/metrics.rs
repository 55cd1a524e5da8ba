// SPDX-License-Identifier: Apache-2.0
//! What devices count.
//!
//! Each device has a struct of [`Counter`]s, shared by an `Arc` between the device and whoever shows them.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows, and wraps at 2^64.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`.
    pub fn add(&self, n: usize) {
        // A usize fits on every host that has KVM.
        self.0
            .fetch_add(u64::try_from(n).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Adds one.
    pub fn increment(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// The number.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
