// SPDX-License-Identifier: Apache-2.0
//! Bytes from the guest that the host's socket had no room for.

use crate::virtio::Slices;

/// A first-in first-out buffer. It is bounded by its owner, through the credit it gives the guest; it holds no
/// memory while it is empty.
#[derive(Default)]
pub(super) struct Backlog {
    bytes: Vec<u8>,
    start: usize,
}

impl Backlog {
    pub fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    pub fn is_empty(&self) -> bool {
        self.start == self.bytes.len()
    }

    /// Appends `slices` without their first `skip` bytes.
    pub fn push(&mut self, slices: &Slices<'_>, skip: usize) {
        // Consumed bytes go before the buffer grows, so that it never exceeds twice what it holds.
        if self.start >= self.len() {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        let end = self.bytes.len();
        self.bytes.resize(end + slices.len().saturating_sub(skip), 0);
        slices.read(skip, &mut self.bytes[end..]);
    }

    /// What comes next.
    pub fn front(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    /// Drops the first `count` bytes, at most all.
    pub fn consume(&mut self, count: usize) {
        self.start = (self.start + count).min(self.bytes.len());
        if self.is_empty() {
            *self = Self::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::VolatileSlice;

    #[test]
    fn bytes_come_out_in_order_and_memory_is_given_back() {
        let mut text: Vec<u8> = (0..=255).collect();
        let expected_text = text.clone();
        let (first, second) = text.split_at_mut(100);
        let slices = Slices::from(vec![VolatileSlice::from(first), VolatileSlice::from(second)]);
        let mut backlog = Backlog::default();
        let (mut out, mut expected) = (Vec::new(), Vec::new());
        for skip in [0, 99, 100, 101, 255, 256] {
            backlog.push(&slices, skip);
            expected.extend_from_slice(&expected_text[skip..]);
            let some = backlog.len() / 2;
            out.extend_from_slice(&backlog.front()[..some]);
            backlog.consume(some);
        }
        out.extend_from_slice(backlog.front());
        assert_eq!(out, expected);
        backlog.consume(usize::MAX >> 1);
        assert!(backlog.is_empty());
        assert_eq!(backlog.bytes.capacity(), 0);
    }
}
