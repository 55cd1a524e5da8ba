// SPDX-License-Identifier: Apache-2.0
//! A request's bytes in guest memory: what the guest wrote ([`Reader`]) and the room it left for the answer
//! ([`Writer`]).
//!
//! Both are lists of volatile slices, made from a descriptor chain. Small things (headers, arguments, names) are
//! copied exactly once, so that what was checked is what is used. File data is never copied here: [`Reader::data`]
//! and [`Writer::data`] give the slices to `preadv` and `pwritev`.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::abi::OutHeader;
use crate::host_io;
use crate::virtio::Slices;

/// Bytes copied from `slices` at `offset` to `bytes`; as many as there are.
fn copy_to(slices: &Slices<'_>, offset: usize, mut bytes: &mut [u8]) -> usize {
    let wanted = bytes.len();
    let mut skip = offset;
    for part in slices.parts() {
        if bytes.is_empty() {
            break;
        }
        if skip >= part.len() {
            skip -= part.len();
            continue;
        }
        if let Ok(rest) = part.offset(skip) {
            let copied = rest.copy_to(bytes);
            bytes = bytes.get_mut(copied..).unwrap_or_default();
        }
        skip = 0;
    }
    wanted - bytes.len()
}

/// Reads from `file` at `offset` straight into guest memory.
pub fn read_file(file: BorrowedFd<'_>, offset: u64, into: &Slices<'_>) -> Result<usize, Errno> {
    let offset = i64::try_from(offset).map_err(|_| Errno::INVAL)?;
    host_io::preadv(file, into.parts(), offset).map_err(|error| errno(&error))
}

/// Writes guest memory straight to `file` at `offset`.
pub fn write_file(file: BorrowedFd<'_>, offset: u64, from: &Slices<'_>) -> Result<usize, Errno> {
    let offset = i64::try_from(offset).map_err(|_| Errno::INVAL)?;
    host_io::pwritev(file, from.parts(), offset).map_err(|error| errno(&error))
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

/// What the guest wrote, from the first byte that was not read yet.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    slices: Slices<'a>,
    at: usize,
    end: usize,
}

impl<'a> Reader<'a> {
    /// All of `slices`.
    pub fn new(slices: Slices<'a>) -> Self {
        let end = slices.len();
        Self { slices, at: 0, end }
    }

    /// Bytes not read yet.
    pub fn remaining(&self) -> usize {
        self.end - self.at
    }

    /// Bytes read so far.
    pub fn position(&self) -> usize {
        self.at
    }

    /// Cuts off what lies beyond `len` bytes from the beginning; `false` if there is less than that.
    pub fn truncate(&mut self, len: usize) -> bool {
        let fits = len <= self.end && len >= self.at;
        if fits {
            self.end = len;
        }
        fits
    }

    /// Reads a structure.
    pub fn read<T: FromBytes + IntoBytes>(&mut self) -> Result<T, Errno> {
        let mut value = T::new_zeroed();
        let bytes = value.as_mut_bytes();
        if bytes.len() > self.remaining() {
            return Err(Errno::INVAL);
        }
        self.at += copy_to(&self.slices, self.at, bytes);
        Ok(value)
    }

    /// Reads `len` bytes.
    pub fn read_bytes(&mut self, len: usize) -> Result<Vec<u8>, Errno> {
        if len > self.remaining() {
            return Err(Errno::INVAL);
        }
        let mut bytes = vec![0; len];
        self.at += copy_to(&self.slices, self.at, &mut bytes);
        Ok(bytes)
    }

    /// The next `len` bytes as slices, for `pwritev`.
    pub fn data(&mut self, len: usize) -> Result<Slices<'a>, Errno> {
        if len > self.remaining() {
            return Err(Errno::INVAL);
        }
        let data = self.slices.range(self.at, len);
        self.at += len;
        Ok(data)
    }
}

/// Room for a reply. Its header is written last.
#[derive(Clone, Debug)]
pub struct Writer<'a> {
    slices: Slices<'a>,
}

impl<'a> Writer<'a> {
    /// All of `slices`.
    pub fn new(slices: Slices<'a>) -> Self {
        Self { slices }
    }

    /// Room for a reply's body, in bytes; `None` if not even a header fits.
    pub fn room(&self) -> Option<usize> {
        self.slices.len().checked_sub(size_of::<OutHeader>())
    }

    /// Writes `bytes` at `offset` of the body.
    pub fn write_bytes(&self, offset: usize, bytes: &[u8]) -> Result<usize, Errno> {
        let end = offset.checked_add(bytes.len()).ok_or(Errno::INVAL)?;
        if self.room().is_none_or(|room| end > room) {
            return Err(Errno::INVAL);
        }
        Ok(self.slices.write(size_of::<OutHeader>() + offset, bytes))
    }

    /// Writes a structure at `offset` of the body.
    pub fn write<T: IntoBytes + Immutable>(&self, offset: usize, value: &T) -> Result<usize, Errno> {
        self.write_bytes(offset, value.as_bytes())
    }

    /// The body's first `len` bytes as slices, for `preadv`.
    pub fn data(&self, len: usize) -> Result<Slices<'a>, Errno> {
        if self.room().is_none_or(|room| len > room) {
            return Err(Errno::INVAL);
        }
        Ok(self.slices.range(size_of::<OutHeader>(), len))
    }

    /// Writes the header and so finishes the reply; returns the bytes of both. Zero if there is no room at all.
    pub fn finish(&self, unique: u64, result: Result<usize, Errno>) -> u32 {
        if self.room().is_none() {
            return 0;
        }
        let (body, error) = match result {
            Ok(body) => (body, 0),
            Err(errno) => (0, -errno.raw_os_error()),
        };
        // A body is bounded by the chain, and a chain by 4 GiB.
        let len = u32::try_from(size_of::<OutHeader>().saturating_add(body)).unwrap_or(u32::MAX);
        let header = OutHeader { len, error, unique };
        self.slices.write(0, header.as_bytes());
        len
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::VolatileSlice;

    fn slices<'a>(parts: impl IntoIterator<Item = &'a mut [u8]>) -> Slices<'a> {
        parts
            .into_iter()
            .map(VolatileSlice::from)
            .collect::<Vec<_>>()
            .into()
    }

    #[test]
    fn reading_crosses_slice_borders_and_stops_at_the_end() {
        let (mut a, mut b, mut c) = ([1u8, 2, 3], [4u8, 5], [6u8]);
        let mut reader = Reader::new(slices([&mut a[..], &mut b[..], &mut c[..]]));
        assert_eq!(reader.read::<[u8; 2]>().unwrap(), [1, 2]);
        assert_eq!(reader.read_bytes(3).unwrap(), [3, 4, 5]);
        assert_eq!(reader.read::<u16>().unwrap_err(), Errno::INVAL);
        assert_eq!(reader.data(2).unwrap_err(), Errno::INVAL);
        assert_eq!(reader.data(1).unwrap().len(), 1);
        assert_eq!(reader.remaining(), 0);
        assert!(!reader.clone().truncate(7));
        assert!(!reader.truncate(5));
    }

    #[test]
    fn a_reply_never_exceeds_its_room() {
        let mut room = [0u8; 20];
        let writer = Writer::new(slices([&mut room[..]]));
        assert_eq!(writer.room(), Some(4));
        assert_eq!(writer.write(0, &7u64), Err(Errno::INVAL));
        assert_eq!(writer.write(1, &7u32), Err(Errno::INVAL));
        assert_eq!(writer.write(usize::MAX, &7u32), Err(Errno::INVAL));
        assert!(writer.data(5).is_err());
        assert_eq!(writer.write(0, &7u32), Ok(4));
        assert_eq!(writer.finish(9, Ok(4)), 20);
        assert_eq!(room[..16], [20, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn no_room_for_a_header_is_no_reply() {
        let mut room = [0u8; 15];
        assert_eq!(Writer::new(slices([&mut room[..]])).finish(1, Err(Errno::IO)), 0);
        assert_eq!(room, [0; 15]);
    }
}
