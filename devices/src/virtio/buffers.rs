// SPDX-License-Identifier: Apache-2.0
//! The buffers of a descriptor chain as guest memory slices.
//!
//! virtio-queue's iterator bounds a chain by the size of its table and ends quietly where the chain is broken.
//! [`Buffers::of`] walks the whole chain once, up front, and refuses one that loops or breaks off, leaves guest
//! memory, puts a readable descriptor behind a writable one (virtio 1.3, section 2.7.4.2), or has more parts than one
//! host call takes. What it returns was read from the guest once and cannot change any more; the bytes behind it can.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestMemory, Permissions, VolatileSlice};

use super::Chain;
use crate::GuestRam;
use crate::host_io::MAX_SLICES;

/// Why a chain cannot be used. It is the driver's fault; the chain goes back with length 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// It loops, refers to a descriptor that does not exist, or exceeds 4 GiB.
    #[error("descriptor chain {head} is broken")]
    Broken {
        /// Its head.
        head: u16,
    },
    /// A buffer is not in guest memory.
    #[error("descriptor chain {head} has a buffer outside of guest memory at {address:#x}, {len} bytes")]
    Address {
        /// The chain's head.
        head: u16,
        /// Guest physical address of the buffer.
        address: u64,
        /// Its length.
        len: u32,
    },
    /// A readable descriptor follows a writable one.
    #[error("descriptor chain {head} has a readable descriptor behind a writable one")]
    Order {
        /// The chain's head.
        head: u16,
    },
    /// It has more parts than Cloister takes.
    #[error("descriptor chain {head} has more than {MAX_SLICES} parts")]
    TooLong {
        /// The chain's head.
        head: u16,
    },
}

/// A sequence of guest memory slices, used as if it were contiguous.
#[derive(Clone, Debug, Default)]
pub struct Slices<'a> {
    parts: Vec<VolatileSlice<'a>>,
    len: usize,
}

impl<'a> Slices<'a> {
    pub(crate) fn push(&mut self, slice: VolatileSlice<'a>) {
        // A chain holds less than 4 GiB: no overflow on a 64-bit host.
        self.len = self.len.saturating_add(slice.len());
        self.parts.push(slice);
    }

    /// Appends `other`.
    pub fn append(&mut self, other: Slices<'a>) {
        other.parts.into_iter().for_each(|part| self.push(part));
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no byte in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The parts, in order; at most [`MAX_SLICES`].
    pub fn parts(&self) -> &[VolatileSlice<'a>] {
        &self.parts
    }

    /// The `len` bytes from `offset`; fewer where they end before that.
    pub fn range(&self, mut offset: usize, mut len: usize) -> Slices<'a> {
        let mut range = Slices::default();
        for part in &self.parts {
            if len == 0 {
                break;
            }
            if offset >= part.len() {
                offset -= part.len();
                continue;
            }
            let take = len.min(part.len() - offset);
            // In bounds by the two lines above.
            if let Ok(slice) = part.subslice(offset, take) {
                range.push(slice);
            }
            offset = 0;
            len -= take;
        }
        range
    }

    /// Copies bytes from `offset` into `data`; returns how many there were.
    pub fn read(&self, offset: usize, data: &mut [u8]) -> usize {
        let mut done = 0;
        for part in self.range(offset, data.len()).parts {
            let Some(rest) = data.get_mut(done..) else { break };
            done += part.copy_to(rest);
        }
        done
    }

    /// Copies `data` to `offset`; returns how many bytes had room.
    pub fn write(&self, offset: usize, data: &[u8]) -> usize {
        let mut done = 0;
        for part in self.range(offset, data.len()).parts {
            let Some(rest) = data.get(done..) else { break };
            // The slice is in bounds of itself, and nothing else can fail.
            done += part.write(rest, 0).unwrap_or(0);
        }
        done
    }

    /// Zeroes the `len` bytes from `offset`, as far as there are any.
    pub fn zero(&self, offset: usize, len: usize) {
        const ZEROES: [u8; 4096] = [0; 4096];
        for part in self.range(offset, len).parts {
            let mut done = 0;
            while done < part.len() {
                let n = ZEROES.len().min(part.len() - done);
                // In bounds by the line above.
                if part.write_slice(&ZEROES[..n], done).is_err() {
                    break;
                }
                done += n;
            }
        }
    }
}

impl<'a> From<Vec<VolatileSlice<'a>>> for Slices<'a> {
    fn from(parts: Vec<VolatileSlice<'a>>) -> Self {
        let len = parts.iter().map(VolatileSlice::len).sum();
        Self { parts, len }
    }
}

/// A chain's buffers.
#[derive(Clone, Debug, Default)]
pub struct Buffers<'a> {
    /// What the driver wrote for the device.
    pub readable: Slices<'a>,
    /// Where the device may write.
    pub writable: Slices<'a>,
}

impl<'a> Buffers<'a> {
    /// Walks `chain` and checks it.
    pub fn of(chain: &'a Chain) -> Result<Self, ChainError> {
        Self::in_ram(chain.memory(), chain)
    }

    /// As [`Buffers::of`], for a caller that does not keep the chain. `ram` is what the chain's queue lives in.
    pub fn in_ram(ram: &'a GuestRam, chain: &Chain) -> Result<Self, ChainError> {
        let head = chain.head_index();
        let mut buffers = Self::default();
        let mut last: Option<Descriptor> = None;
        let mut descriptors = 0;
        for descriptor in chain.clone() {
            descriptors += 1;
            if descriptors > MAX_SLICES {
                return Err(ChainError::TooLong { head });
            }
            let write = descriptor.is_write_only();
            if !write && last.is_some_and(|last| last.is_write_only()) {
                return Err(ChainError::Order { head });
            }
            last = Some(descriptor);
            let outside = ChainError::Address {
                head,
                address: descriptor.addr().0,
                len: descriptor.len(),
            };
            let (list, access) = if write {
                (&mut buffers.writable, Permissions::Write)
            } else {
                (&mut buffers.readable, Permissions::Read)
            };
            let len = usize::try_from(descriptor.len()).map_err(|_| outside)?;
            let slices = ram
                .get_slices(descriptor.addr(), len, access)
                .map_err(|_| outside)?;
            for slice in slices {
                list.push(slice.map_err(|_| outside)?);
                if list.parts.len() > MAX_SLICES {
                    return Err(ChainError::TooLong { head });
                }
            }
        }
        // The iterator ends before a descriptor that cannot be had; the one before it still announces it.
        match last {
            Some(last) if !last.has_next() => Ok(buffers),
            _ => Err(ChainError::Broken { head }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_cross_parts_and_stop_at_the_end() {
        let mut memory = *b"abcdefghij";
        let slice = VolatileSlice::from(&mut memory[..]);
        let mut slices = Slices::default();
        for (offset, len) in [(0, 3), (5, 0), (5, 5)] {
            slices.push(slice.subslice(offset, len).unwrap());
        }
        assert_eq!(slices.len(), 8);
        let mut data = [0; 4];
        assert_eq!(slices.read(2, &mut data), 4);
        assert_eq!(&data, b"cfgh");
        assert_eq!(slices.read(6, &mut data), 2);
        assert_eq!(&data[..2], b"ij");
        assert_eq!(slices.read(8, &mut data), 0);
        assert_eq!(slices.write(1, b"BCFG!"), 5);
        slices.zero(6, 100);
        assert_eq!(slices.range(usize::MAX, usize::MAX).len(), 0);
        assert_eq!(&memory, b"aBCdeFG!\0\0");
    }
}
