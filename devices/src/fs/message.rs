// SPDX-License-Identifier: Apache-2.0
//! A request's bytes in guest memory: what the guest wrote ([`Reader`]) and the room it left for the answer
//! ([`Writer`]).
//!
//! Both are lists of volatile slices, made from a descriptor chain. Small things (headers, arguments, names) are
//! copied exactly once, so that what was checked is what is used. File data is never copied here: [`Reader::data`]
//! and [`Writer::data`] give the slices to `preadv` and `pwritev`.

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;
use vm_memory::{GuestAddress, GuestMemory, Permissions, VolatileSlice};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::abi::OutHeader;
use crate::GuestRam;
use crate::virtio::Chain;

/// Slices of guest memory that are read or written as one run of bytes.
#[derive(Clone, Debug, Default)]
pub struct Slices<'a> {
    slices: Vec<VolatileSlice<'a>>,
    len: usize,
}

impl<'a> Slices<'a> {
    /// Appends a slice.
    pub fn push(&mut self, slice: VolatileSlice<'a>) {
        // Lengths come from descriptors, whose sum virtio-queue bounds at 4 GiB.
        self.len = self.len.saturating_add(slice.len());
        self.slices.push(slice);
    }

    /// Bytes in all slices.
    pub fn len(&self) -> usize {
        self.len
    }

    /// The part from `offset` on, of at most `limit` bytes.
    fn part(&self, offset: usize, limit: usize) -> Self {
        let mut part = Self {
            slices: Vec::with_capacity(self.slices.len()),
            len: 0,
        };
        let mut skip = offset;
        for slice in &self.slices {
            if skip >= slice.len() {
                skip -= slice.len();
                continue;
            }
            let take = (slice.len() - skip).min(limit - part.len);
            if take == 0 {
                break;
            }
            // Within the slice by construction.
            if let Ok(slice) = slice.subslice(skip, take) {
                part.push(slice);
            }
            skip = 0;
        }
        part
    }

    fn copy_to(&self, offset: usize, mut bytes: &mut [u8]) -> usize {
        let wanted = bytes.len();
        let mut skip = offset;
        for slice in &self.slices {
            if bytes.is_empty() {
                break;
            }
            if skip >= slice.len() {
                skip -= slice.len();
                continue;
            }
            if let Ok(rest) = slice.offset(skip) {
                let copied = rest.copy_to(bytes);
                bytes = &mut bytes[copied..];
            }
            skip = 0;
        }
        wanted - bytes.len()
    }

    fn copy_from(&self, offset: usize, mut bytes: &[u8]) {
        let mut skip = offset;
        for slice in &self.slices {
            if bytes.is_empty() {
                break;
            }
            if skip >= slice.len() {
                skip -= slice.len();
                continue;
            }
            if let Ok(rest) = slice.offset(skip) {
                let copied = bytes.len().min(rest.len());
                rest.copy_from(&bytes[..copied]);
                bytes = &bytes[copied..];
            }
            skip = 0;
        }
    }

    /// `readv`-style input/output on these slices, as often as the host's limit of vectors requires.
    fn transfer(&self, mut io: impl FnMut(&[libc::iovec], u64) -> isize) -> Result<usize, Errno> {
        // UIO_MAXIOV.
        const VECTORS: usize = 1024;
        let vectors: Vec<libc::iovec> = self
            .slices
            .iter()
            .map(|slice| libc::iovec {
                // Guest RAM is mapped for good, there is nothing that the guard has to hold.
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            })
            .collect();
        let mut done = 0;
        for (vectors, slices) in vectors.chunks(VECTORS).zip(self.slices.chunks(VECTORS)) {
            let length: usize = slices.iter().map(VolatileSlice::len).sum();
            let moved = loop {
                let moved = io(vectors, done as u64);
                match usize::try_from(moved) {
                    Ok(moved) => break moved,
                    Err(_) => {
                        let error = std::io::Error::last_os_error();
                        match Errno::from_io_error(&error).unwrap_or(Errno::IO) {
                            Errno::INTR => {}
                            // What was moved before counts, as with read and write.
                            _ if done > 0 => return Ok(done),
                            errno => return Err(errno),
                        }
                    }
                }
            };
            done += moved;
            if moved < length {
                break;
            }
        }
        Ok(done)
    }

    /// Reads from `file` at `offset` straight into guest memory.
    pub fn read_from(&self, file: BorrowedFd<'_>, offset: u64) -> Result<usize, Errno> {
        let fd = file.as_raw_fd();
        self.transfer(|vectors, done| {
            let Some(at) = file_offset(offset, done) else {
                return set_einval();
            };
            let count = libc::c_int::try_from(vectors.len()).unwrap_or(0);
            // SAFETY: the vectors describe guest memory, which stays mapped while `self` borrows it and which no
            // Rust reference points to; `count` of them exist.
            unsafe { libc::preadv(fd, vectors.as_ptr(), count, at) }
        })
    }

    /// Writes guest memory straight to `file` at `offset`.
    pub fn write_to(&self, file: BorrowedFd<'_>, offset: u64) -> Result<usize, Errno> {
        let fd = file.as_raw_fd();
        self.transfer(|vectors, done| {
            let Some(at) = file_offset(offset, done) else {
                return set_einval();
            };
            let count = libc::c_int::try_from(vectors.len()).unwrap_or(0);
            // SAFETY: as in `read_from`; the host only reads the memory here.
            unsafe { libc::pwritev(fd, vectors.as_ptr(), count, at) }
        })
    }
}

fn file_offset(offset: u64, done: u64) -> Option<i64> {
    offset.checked_add(done).and_then(|at| i64::try_from(at).ok())
}

fn set_einval() -> isize {
    // SAFETY: errno is this thread's own.
    unsafe { *libc::__errno_location() = libc::EINVAL };
    -1
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
        self.at += self.slices.copy_to(self.at, bytes);
        Ok(value)
    }

    /// Reads `len` bytes.
    pub fn read_bytes(&mut self, len: usize) -> Result<Vec<u8>, Errno> {
        if len > self.remaining() {
            return Err(Errno::INVAL);
        }
        let mut bytes = vec![0; len];
        self.at += self.slices.copy_to(self.at, &mut bytes);
        Ok(bytes)
    }

    /// The next `len` bytes as slices, for `pwritev`.
    pub fn data(&mut self, len: usize) -> Result<Slices<'a>, Errno> {
        if len > self.remaining() {
            return Err(Errno::INVAL);
        }
        let data = self.slices.part(self.at, len);
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
        self.slices.copy_from(size_of::<OutHeader>() + offset, bytes);
        Ok(bytes.len())
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
        Ok(self.slices.part(size_of::<OutHeader>(), len))
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
        self.slices.copy_from(0, header.as_bytes());
        len
    }
}

/// The two halves of a descriptor chain. `None` if a descriptor lies outside of guest RAM.
pub fn split_chain<'a>(ram: &'a GuestRam, chain: &Chain) -> Option<(Reader<'a>, Writer<'a>)> {
    let mut readable = Slices::default();
    let mut writable = Slices::default();
    // Descriptors that continue one another become one slice: fewer vectors for the host to walk.
    let mut pending: Option<(bool, u64, usize)> = None;
    let mut flush = |run: Option<(bool, u64, usize)>| -> Option<()> {
        if let Some((write, address, len)) = run {
            let (list, access) = if write {
                (&mut writable, Permissions::Write)
            } else {
                (&mut readable, Permissions::Read)
            };
            for slice in ram.get_slices(GuestAddress(address), len, access).ok()? {
                list.push(slice.ok()?);
            }
        }
        Some(())
    };
    for descriptor in chain.clone() {
        let (write, address) = (descriptor.is_write_only(), descriptor.addr().0);
        let len = descriptor.len() as usize;
        match &mut pending {
            Some((direction, start, length))
                if *direction == write && start.checked_add(*length as u64) == Some(address) =>
            {
                *length = length.checked_add(len)?;
            }
            _ => flush(pending.replace((write, address, len)))?,
        }
    }
    flush(pending)?;
    Some((Reader::new(readable), Writer::new(writable)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_and_copies_respect_slice_borders() {
        let mut a = [1u8, 2, 3];
        let mut b = [4u8, 5];
        let mut c = [6u8];
        let mut slices = Slices::default();
        for bytes in [&mut a[..], &mut b[..], &mut c[..]] {
            slices.push(VolatileSlice::from(bytes));
        }
        let mut reader = Reader::new(slices.clone());
        assert_eq!(reader.read::<[u8; 2]>().unwrap(), [1, 2]);
        assert_eq!(reader.read_bytes(3).unwrap(), [3, 4, 5]);
        assert_eq!(reader.read::<u16>().unwrap_err(), Errno::INVAL);
        let part = slices.part(1, 4);
        let mut bytes = [0; 8];
        assert_eq!(part.copy_to(0, &mut bytes), 4);
        assert_eq!(bytes[..4], [2, 3, 4, 5]);
        assert_eq!(slices.part(9, 4).len(), 0);
        assert_eq!(slices.part(0, usize::MAX).len(), 6);
    }

    #[test]
    fn a_reply_never_exceeds_its_room() {
        let mut room = [0u8; 20];
        let mut slices = Slices::default();
        slices.push(VolatileSlice::from(&mut room[..]));
        let writer = Writer::new(slices);
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
        let mut slices = Slices::default();
        slices.push(VolatileSlice::from(&mut room[..]));
        assert_eq!(Writer::new(slices).finish(1, Err(Errno::IO)), 0);
        assert_eq!(room, [0; 15]);
    }
}
