// SPDX-License-Identifier: Apache-2.0
//! Locks of which every change is complete in itself, so that a thread that panicked left nothing half done behind one.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks, whoever has panicked with the lock before.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
