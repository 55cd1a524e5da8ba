// SPDX-License-Identifier: Apache-2.0
//! Reading directories: `getdents64` on the host's side, `fuse_dirent` records on the guest's.
//!
//! A handle keeps what it read from the host and did not yet give to the guest, so that a directory that is read
//! from the beginning to its end costs one `getdents64` per buffer and no seek.

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use zerocopy::IntoBytes;

use super::abi::{Dirent, EntryOut};
use super::host;
use super::message::Writer;

const BUFFER: usize = 32 << 10;

/// Where the reading of an open directory stands.
#[derive(Debug, Default)]
pub struct Listing {
    buffer: Vec<u8>,
    // Of `buffer`, what was not given out yet.
    start: usize,
    end: usize,
    // The offset (a cookie of the host's file system) of the entry at `start`.
    offset: u64,
    // Whether the descriptor stands where `buffer` ends.
    primed: bool,
}

/// One entry of a host directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// Inode number.
    pub ino: u64,
    /// Where the next entry is.
    pub next: u64,
    /// DT_REG and so on.
    pub kind: u8,
    /// Its name.
    pub name: &'a [u8],
}

impl Listing {
    /// Calls `visit` with each entry from `offset` on, until it answers `false` (the entry was not taken) or the
    /// directory ends.
    pub fn each(
        &mut self,
        directory: BorrowedFd<'_>,
        offset: u64,
        mut visit: impl FnMut(Entry<'_>) -> Result<bool, Errno>,
    ) -> Result<(), Errno> {
        if !self.primed || offset != self.offset {
            let at = i64::try_from(offset).map_err(|_| Errno::INVAL)?;
            self.primed = false;
            rustix::fs::seek(directory, SeekFrom::Start(at.cast_unsigned()))?;
            (self.start, self.end, self.offset, self.primed) = (0, 0, offset, true);
        }
        loop {
            while let Some((entry, length)) = parse(&self.buffer[self.start..self.end])? {
                if !visit(entry)? {
                    return Ok(());
                }
                self.offset = entry.next;
                self.start += length;
            }
            (self.start, self.end) = (0, 0);
            self.buffer.resize(BUFFER, 0);
            self.end = match getdents(directory, &mut self.buffer) {
                Ok(end) => end,
                Err(errno) => {
                    self.primed = false;
                    return Err(errno);
                }
            };
            if self.end == 0 {
                // An idle handle at its end needs no memory.
                self.buffer = Vec::new();
                return Ok(());
            }
        }
    }
}

fn getdents(directory: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<usize, Errno> {
    // SAFETY: the kernel writes at most `buffer.len()` bytes to `buffer`.
    let read = unsafe {
        libc::syscall(
            libc::SYS_getdents64,
            directory.as_raw_fd(),
            buffer.as_mut_ptr(),
            buffer.len(),
        )
    };
    usize::try_from(read).map_err(|_| host::last_errno())
}

/// The first `struct linux_dirent64` in `bytes`, and its length.
fn parse(bytes: &[u8]) -> Result<Option<(Entry<'_>, usize)>, Errno> {
    // d_ino, d_off, d_reclen, d_type; then the name and its NUL.
    const HEADER: usize = 8 + 8 + 2 + 1;
    if bytes.is_empty() {
        return Ok(None);
    }
    let field = |at: usize| -> Option<[u8; 8]> { bytes.get(at..at + 8)?.try_into().ok() };
    let ino = field(0).map(u64::from_ne_bytes).ok_or(Errno::IO)?;
    let next = field(8).map(u64::from_ne_bytes).ok_or(Errno::IO)?;
    let (Some(&low), Some(&high), Some(&kind)) = (bytes.get(16), bytes.get(17), bytes.get(18)) else {
        return Err(Errno::IO);
    };
    let length = usize::from(u16::from_ne_bytes([low, high]));
    let name = bytes.get(HEADER..length).ok_or(Errno::IO)?;
    let name = name.split(|byte| *byte == 0).next().unwrap_or(name);
    let entry = Entry {
        ino,
        next,
        kind,
        name,
    };
    Ok(Some((entry, length)))
}

/// A reply to READDIR or READDIRPLUS as it fills.
#[derive(Debug)]
pub struct Records<'a> {
    out: &'a Writer<'a>,
    limit: usize,
    used: usize,
}

impl<'a> Records<'a> {
    /// Records in the body of `out`, of at most `limit` bytes.
    pub fn new(out: &'a Writer<'a>, limit: usize) -> Self {
        Self { out, limit, used: 0 }
    }

    fn length(name: &[u8], plus: bool) -> usize {
        let header = size_of::<Dirent>() + if plus { size_of::<EntryOut>() } else { 0 };
        (header + name.len()).next_multiple_of(8)
    }

    /// Whether a record for `name` still fits.
    pub fn fits(&self, name: &[u8], plus: bool) -> bool {
        self.used + Self::length(name, plus) <= self.limit
    }

    /// Appends a record; `false` if it does not fit.
    pub fn push(
        &mut self,
        ino: u64,
        next: u64,
        kind: u8,
        name: &[u8],
        entry: Option<&EntryOut>,
    ) -> Result<bool, Errno> {
        if !self.fits(name, entry.is_some()) {
            return Ok(false);
        }
        let dirent = Dirent {
            ino,
            off: next,
            namelen: u32::try_from(name.len()).map_err(|_| Errno::NAMETOOLONG)?,
            r#type: kind.into(),
        };
        // The longest record there is, in one piece: one copy into guest memory.
        let mut record = [0u8; size_of::<EntryOut>() + size_of::<Dirent>() + 256];
        let mut at = 0;
        let mut put = |bytes: &[u8]| -> Result<(), Errno> {
            let place = record.get_mut(at..at + bytes.len()).ok_or(Errno::NAMETOOLONG)?;
            place.copy_from_slice(bytes);
            at += bytes.len();
            Ok(())
        };
        if let Some(entry) = entry {
            put(entry.as_bytes())?;
        }
        put(dirent.as_bytes())?;
        put(name)?;
        let length = Self::length(name, entry.is_some());
        let record = record.get(..length).ok_or(Errno::NAMETOOLONG)?;
        self.used += self.out.write_bytes(self.used, record)?;
        Ok(true)
    }

    /// Bytes of all records.
    pub fn used(&self) -> usize {
        self.used
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn damaged_records_are_errors() {
        let mut record = vec![0u8; 24];
        record[16] = 24;
        record[19..21].copy_from_slice(b"ab");
        let (entry, length) = parse(&record).unwrap().unwrap();
        assert_eq!((entry.name, length), (&b"ab"[..], 24));
        assert_eq!(parse(&record[..10]), Err(Errno::IO));
        record[16] = 200;
        assert_eq!(parse(&record), Err(Errno::IO));
        record[16] = 3;
        assert_eq!(parse(&record), Err(Errno::IO));
        assert_eq!(parse(&[]), Ok(None));
    }

    #[test]
    fn a_listing_resumes_after_an_entry_that_was_not_taken() {
        let directory = crate::fs::testing::TempDir::new();
        let mut expected: Vec<String> = (0..500).map(|n| format!("file-{n:03}")).collect();
        for name in &expected {
            std::fs::write(directory.path().join(name), name).unwrap();
        }
        let file = std::fs::File::open(directory.path()).unwrap();
        let mut listing = Listing::default();
        let (mut seen, mut offset) = (Vec::new(), 0);
        loop {
            let mut taken = 0;
            listing
                .each(file.as_fd(), offset, |entry| {
                    if taken == 7 {
                        return Ok(false);
                    }
                    taken += 1;
                    offset = entry.next;
                    seen.push(String::from_utf8(entry.name.to_vec()).unwrap());
                    Ok(true)
                })
                .unwrap();
            if taken == 0 {
                break;
            }
        }
        seen.retain(|name| name != "." && name != "..");
        seen.sort();
        expected.sort();
        assert_eq!(seen, expected);
        assert_eq!(
            listing.each(file.as_fd(), u64::MAX, |_| Ok(true)),
            Err(Errno::INVAL)
        );
    }
}
