// SPDX-License-Identifier: Apache-2.0
//! Reading a file by position, straight into guest memory.
//!
//! Cells of one process (and of processes that inherited a descriptor) share the file offset of one open kernel
//! image. [`FileAt`] keeps an offset of its own and uses pread(2), so two loads never disturb each other.

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice};

/// An open file with a private offset.
#[derive(Debug)]
pub struct FileAt<'a> {
    file: &'a File,
    offset: u64,
    size: u64,
}

impl<'a> FileAt<'a> {
    /// Reads `file` from its beginning. Fails when its size cannot be told or it is not a regular file: a
    /// pipe cannot be read by position, and a directory is no kernel.
    pub fn new(file: &'a File) -> Result<Self> {
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(Error::new(ErrorKind::InvalidInput, "not a regular file"));
        }
        Ok(Self {
            file,
            offset: 0,
            size: metadata.len(),
        })
    }

    /// Size of the file in bytes when it was opened here.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Reads exactly `buf.len()` bytes at `offset` without moving the private offset.
    pub fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(buf, offset)
    }
}

impl Read for FileAt<'_> {
    fn read(&mut self, buf: &mut [u8]) -> Result<usize> {
        let n = self.file.read_at(buf, self.offset)?;
        self.offset = self.offset.saturating_add(n as u64);
        Ok(n)
    }
}

impl Seek for FileAt<'_> {
    fn seek(&mut self, position: SeekFrom) -> Result<u64> {
        let target = match position {
            SeekFrom::Start(n) => Some(n),
            SeekFrom::End(n) => self.size.checked_add_signed(n),
            SeekFrom::Current(n) => self.offset.checked_add_signed(n),
        };
        self.offset = target
            .filter(|&n| i64::try_from(n).is_ok())
            .ok_or_else(|| Error::new(ErrorKind::InvalidInput, "offset outside of what a file can have"))?;
        Ok(self.offset)
    }
}

impl ReadVolatile for FileAt<'_> {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<B>,
    ) -> std::result::Result<usize, VolatileMemoryError> {
        let offset = libc::off_t::try_from(self.offset)
            .map_err(|_| VolatileMemoryError::IOError(Error::from(ErrorKind::InvalidInput)))?;
        let guard = buf.ptr_guard_mut();
        // SAFETY: the guard keeps `buf.len()` bytes at its pointer mapped and writable for this block; the kernel
        // writes at most that many. Guest memory is volatile: nobody holds a Rust reference to it.
        let n = unsafe { libc::pread(self.file.as_raw_fd(), guard.as_ptr().cast(), buf.len(), offset) };
        let n = usize::try_from(n).map_err(|_| VolatileMemoryError::IOError(Error::last_os_error()))?;
        if n > 0 {
            buf.bitmap().mark_dirty(0, n);
        }
        self.offset = self.offset.saturating_add(n as u64);
        Ok(n)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::io::Write;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    /// An unnamed file holding `content`.
    pub(crate) fn memfd(content: &[u8]) -> File {
        let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(fd);
        file.write_all(content).unwrap();
        file
    }

    #[test]
    fn two_readers_do_not_share_an_offset() {
        let file = memfd(b"0123456789");
        let mut one = FileAt::new(&file).unwrap();
        let mut two = FileAt::new(&file).unwrap();
        let mut buf = [0; 4];
        one.read_exact(&mut buf).unwrap();
        assert_eq!(&buf, b"0123");
        two.read_exact(&mut buf).unwrap();
        assert_eq!(&buf, b"0123");
        two.seek(SeekFrom::End(-2)).unwrap();
        let mut rest = String::new();
        two.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "89");
    }

    #[test]
    fn reads_into_guest_memory_and_stops_at_the_end() {
        let file = memfd(b"hello");
        let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let mut reader = FileAt::new(&file).unwrap();
        mem.read_exact_volatile_from(GuestAddress(0x10), &mut reader, 5)
            .unwrap();
        let mut buf = [0; 5];
        mem.read_slice(&mut buf, GuestAddress(0x10)).unwrap();
        assert_eq!(&buf, b"hello");
        assert!(
            mem.read_exact_volatile_from(GuestAddress(0), &mut reader, 1)
                .is_err()
        );
    }

    #[test]
    fn offsets_outside_a_file_are_refused() {
        let file = memfd(b"x");
        let mut reader = FileAt::new(&file).unwrap();
        assert!(reader.seek(SeekFrom::Current(-1)).is_err());
        assert!(reader.seek(SeekFrom::Start(u64::MAX)).is_err());
    }

    #[test]
    fn a_pipe_or_directory_is_no_image() {
        let dir = File::open("/").unwrap();
        assert!(FileAt::new(&dir).is_err());
    }
}
