// SPDX-License-Identifier: Apache-2.0
//! The last words of a guest: what it wrote to its consoles most recently, kept for the report of its end.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A bounded ring of console output. Clones share the ring; serial port and virtio console of a cell write to one.
#[derive(Clone, Debug, Default)]
pub struct OutputTail {
    ring: Arc<Mutex<Ring>>,
}

#[derive(Debug, Default)]
struct Ring {
    kept: VecDeque<u8>,
    /// Bytes that ever came.
    written: u64,
}

impl OutputTail {
    /// Bytes kept. Memory is only taken as output comes.
    pub const CAPACITY: usize = 16 << 10;

    /// An empty ring.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds output, forgetting the oldest where it does not fit.
    pub fn push(&self, bytes: &[u8]) {
        let mut ring = self.lock();
        ring.written = ring.written.saturating_add(bytes.len() as u64);
        let bytes = &bytes[bytes.len().saturating_sub(Self::CAPACITY)..];
        let excess = (ring.kept.len() + bytes.len()).saturating_sub(Self::CAPACITY);
        ring.kept.drain(..excess);
        ring.kept.extend(bytes);
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        // A ring is whole behind a poisoned lock, too.
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is kept, oldest first. The guest chose these bytes: escape them before they reach a terminal.
    pub fn bytes(&self) -> Vec<u8> {
        self.lock().kept.iter().copied().collect()
    }

    /// What is kept of the output that came after the first `seen` bytes, and how many have come in all: for those who
    /// follow. What they were too slow for is left out.
    pub fn since(&self, seen: u64) -> (Vec<u8>, u64) {
        let ring = self.lock();
        let new = ring.written.saturating_sub(seen);
        let skip = ring
            .kept
            .len()
            .saturating_sub(usize::try_from(new).unwrap_or(usize::MAX));
        (ring.kept.iter().skip(skip).copied().collect(), ring.written)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_bytes_are_kept() {
        let tail = OutputTail::new();
        tail.push(b"first");
        assert_eq!(tail.bytes(), b"first");
        tail.push(&[b'x'; OutputTail::CAPACITY - 2]);
        tail.push(b"y");
        assert_eq!(tail.bytes().len(), OutputTail::CAPACITY);
        assert_eq!(&tail.bytes()[..2], b"tx");
        tail.push(&[b'z'; 3 * OutputTail::CAPACITY]);
        assert_eq!(tail.bytes(), [b'z'; OutputTail::CAPACITY]);
    }
    #[test]
    fn followers_see_each_byte_once_or_never() {
        let tail = OutputTail::new();
        assert_eq!(tail.since(0), (Vec::new(), 0));
        tail.push(b"one");
        let (bytes, seen) = tail.since(0);
        assert_eq!((bytes.as_slice(), seen), (&b"one"[..], 3));
        tail.push(b"two");
        assert_eq!(tail.since(seen), (b"two".to_vec(), 6));
        assert_eq!(tail.since(6).0, b"");
        // Of another cell, or made up.
        assert_eq!(tail.since(100).0, b"");
        tail.push(&[b'z'; 2 * OutputTail::CAPACITY]);
        assert_eq!(tail.since(6).0.len(), OutputTail::CAPACITY);
    }
}
