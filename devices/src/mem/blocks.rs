// SPDX-License-Identifier: Apache-2.0
//! Which blocks are plugged: one bit each.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// The blocks of a region.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Blocks {
    count: usize,
    plugged: usize,
    bits: Vec<u64>,
}

/// What a range of blocks is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    Plugged,
    Unplugged,
    Mixed,
}

impl Blocks {
    /// `count` unplugged blocks.
    pub(super) fn new(count: usize) -> Self {
        Self {
            count,
            plugged: 0,
            bits: vec![0; count.div_ceil(64)],
        }
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    pub(super) fn plugged(&self) -> usize {
        self.plugged
    }

    /// Whether what was restored is what a region of `count` blocks can have.
    pub(super) fn is_sound(&self, count: usize) -> bool {
        let ones = self.bits.iter().map(|word| word.count_ones()).sum::<u32>();
        let beyond = (self.count..self.bits.len().saturating_mul(64)).any(|block| self.is_plugged(block));
        self.count == count
            && self.bits.len() == count.div_ceil(64)
            && usize::try_from(ones) == Ok(self.plugged)
            && !beyond
    }

    fn is_plugged(&self, block: usize) -> bool {
        self.bits
            .get(block / 64)
            .is_some_and(|word| word >> (block % 64) & 1 != 0)
    }

    /// What `range`, which is not empty and within the region, is.
    pub(super) fn find(&self, range: Range<usize>) -> Found {
        let first = self.is_plugged(range.start);
        match range.into_iter().all(|block| self.is_plugged(block) == first) {
            false => Found::Mixed,
            true if first => Found::Plugged,
            true => Found::Unplugged,
        }
    }

    /// Marks `range`, which is within the region.
    pub(super) fn set(&mut self, range: Range<usize>, plugged: bool) {
        for block in range {
            let Some(word) = self.bits.get_mut(block / 64) else {
                return;
            };
            let bit = 1 << (block % 64);
            match (*word & bit != 0, plugged) {
                (false, true) => self.plugged += 1,
                (true, false) => self.plugged -= 1,
                _ => continue,
            }
            *word ^= bit;
        }
    }

    /// The runs of plugged blocks, ascending.
    pub(super) fn runs(&self) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for block in (0..self.count).filter(|block| self.is_plugged(*block)) {
            match runs.last_mut() {
                Some(run) if run.end == block => run.end += 1,
                _ => runs.push(block..block + 1),
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_counted_once() {
        let mut blocks = Blocks::new(130);
        assert_eq!(blocks.find(0..130), Found::Unplugged);
        blocks.set(60..70, true);
        blocks.set(65..68, true);
        blocks.set(129..130, true);
        assert_eq!(blocks.plugged(), 11);
        assert_eq!(blocks.find(60..70), Found::Plugged);
        assert_eq!(blocks.find(59..61), Found::Mixed);
        assert_eq!(blocks.find(70..129), Found::Unplugged);
        assert_eq!(blocks.runs(), [60..70, 129..130]);
        blocks.set(0..65, false);
        assert_eq!((blocks.plugged(), blocks.runs()), (6, vec![65..70, 129..130]));
    }

    #[test]
    fn a_saved_state_that_contradicts_itself_is_found() {
        let mut sound = Blocks::new(70);
        sound.set(3..9, true);
        assert!(sound.is_sound(70));
        assert!(!sound.is_sound(71));
        let broken = |change: fn(&mut Blocks)| {
            let mut blocks = sound.clone();
            change(&mut blocks);
            blocks.is_sound(70)
        };
        assert!(!broken(|blocks| blocks.plugged = 7));
        assert!(!broken(|blocks| blocks.bits.push(0)));
        assert!(!broken(|blocks| blocks.bits.clear()));
        assert!(!broken(|blocks| {
            blocks.bits[1] |= 1 << 6;
            blocks.plugged += 1;
        }));
    }
}
