// SPDX-License-Identifier: Apache-2.0
//! The last words of a guest: what it wrote to its consoles most recently, kept for the report of its end.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

/// A bounded ring of console output. Clones share the ring; serial port and virtio console of a cell write to one.
#[derive(Clone, Debug, Default)]
pub struct OutputTail {
    ring: Arc<Mutex<VecDeque<u8>>>,
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
        let bytes = &bytes[bytes.len().saturating_sub(Self::CAPACITY)..];
        // A deque is whole behind a poisoned lock, too.
        let mut ring = self.ring.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let excess = (ring.len() + bytes.len()).saturating_sub(Self::CAPACITY);
        ring.drain(..excess);
        ring.extend(bytes);
    }

    /// What is kept, oldest first. The guest chose these bytes: escape them before they reach a terminal.
    pub fn bytes(&self) -> Vec<u8> {
        let ring = self.ring.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        ring.iter().copied().collect()
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
}
