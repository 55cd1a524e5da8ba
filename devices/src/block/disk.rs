// SPDX-License-Identifier: Apache-2.0
//! The host's side of a disk: a descriptor and what may be done with it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, FileType, OFlags};

use super::SECTOR_SIZE;
use crate::host_io;
use crate::virtio::Slices;

/// What a disk is on the host. Stated by whoever asks for the disk, checked against the descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskKind {
    /// A regular file with the disk's raw contents.
    File,
    /// A block device.
    BlockDevice,
}

/// When a write is reported as done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// When it is in the host's page cache; the driver flushes when it needs more.
    #[default]
    Writeback,
    /// When it is on stable storage.
    Writethrough,
}

/// How a disk is made.
#[derive(Debug)]
pub struct BlockConfig {
    /// The file or device, opened by the caller: for reading and writing unless `read_only`, without O_APPEND.
    pub fd: OwnedFd,
    /// What `fd` is.
    pub kind: DiskKind,
    /// Refuse whatever changes the disk.
    pub read_only: bool,
    /// When a write is done.
    pub cache: CacheMode,
    /// Serial number, at most 20 bytes; what /dev/disk/by-id shows in the guest.
    pub serial: String,
    /// Number of queues, 1 to 16; usually 1, or one per vCPU.
    pub queues: u16,
}

/// Why a disk cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// A system call on the descriptor failed.
    #[error("cannot {what} of the disk")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: io::Error,
    },
    /// It is something else than was said.
    #[error("the disk was announced as {announced:?} but is a {found:?}: name the right kind")]
    Kind {
        /// From the configuration.
        announced: DiskKind,
        /// From the descriptor.
        found: FileType,
    },
    /// The descriptor does not allow what the configuration asks for.
    #[error("the disk is opened {found}: open it {wanted}")]
    Access {
        /// How it is open.
        found: &'static str,
        /// How it should be.
        wanted: &'static str,
    },
    /// The size is not a whole number of sectors.
    #[error("the disk has {0} bytes, not a multiple of 512: pad it (truncate --size=%512)")]
    Size(u64),
    /// The serial number is too long.
    #[error("serial number {0:?} is longer than 20 bytes")]
    Serial(String),
    /// No such number of queues.
    #[error("{0} queues asked for, 1 to 16 are possible")]
    Queues(u16),
}

/// Why a request on a disk failed.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Beyond the end, not whole sectors, or against read-only.
    #[error("{0}")]
    Refused(&'static str),
    /// The host cannot do this with this file.
    #[error("not supported by the host's file system or device")]
    Unsupported,
    /// The host failed.
    #[error(transparent)]
    Host(#[from] io::Error),
}

impl From<rustix::io::Errno> for DiskError {
    fn from(errno: rustix::io::Errno) -> Self {
        use rustix::io::Errno;
        match errno {
            // Different file systems and drivers have different ways to say so.
            Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS => Self::Unsupported,
            errno => Self::Host(errno.into()),
        }
    }
}

/// An open disk.
#[derive(Debug)]
pub struct Disk {
    fd: OwnedFd,
    kind: DiskKind,
    read_only: bool,
    block_size: u32,
    /// In sectors.
    capacity: AtomicU64,
    /// A write-back failed: its pages are lost, and only the first fdatasync was told.
    lost_writes: AtomicBool,
}

fn host(what: &'static str) -> impl Fn(rustix::io::Errno) -> BlockError {
    move |errno| BlockError::Host {
        what,
        source: errno.into(),
    }
}

impl Disk {
    pub(super) fn new(fd: OwnedFd, kind: DiskKind, read_only: bool) -> Result<Self, BlockError> {
        let stat = rustix::fs::fstat(&fd).map_err(host("read the attributes"))?;
        let found = FileType::from_raw_mode(stat.st_mode);
        let wanted = match kind {
            DiskKind::File => FileType::RegularFile,
            DiskKind::BlockDevice => FileType::BlockDevice,
        };
        if found != wanted {
            return Err(BlockError::Kind {
                announced: kind,
                found,
            });
        }
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(host("read the flags"))?;
        let access = |found, wanted| Err(BlockError::Access { found, wanted });
        if flags.contains(OFlags::PATH) {
            return access("with O_PATH", "for reading");
        }
        // pwrite would append, whatever the offset.
        if flags.contains(OFlags::APPEND) {
            return access("for appending", "without O_APPEND");
        }
        match flags & OFlags::ACCMODE {
            OFlags::WRONLY => return access("for writing only", "for reading, too"),
            OFlags::RDONLY if !read_only => {
                return access("for reading only", "for writing, or attach it read-only");
            }
            _ => {}
        }
        let block_size = match kind {
            DiskKind::File => 512,
            DiskKind::BlockDevice => rustix::fs::ioctl_blksszget(&fd).map_err(host("read the block size"))?,
        };
        let disk = Self {
            fd,
            kind,
            read_only,
            block_size,
            capacity: AtomicU64::new(0),
            lost_writes: AtomicBool::new(false),
        };
        disk.refresh_capacity()?;
        Ok(disk)
    }

    /// Looks how big the disk is now; in sectors.
    pub(super) fn refresh_capacity(&self) -> Result<u64, BlockError> {
        // Works for block devices, too. The file offset is not used otherwise.
        let bytes =
            rustix::fs::seek(&self.fd, rustix::fs::SeekFrom::End(0)).map_err(host("find out the size"))?;
        if !bytes.is_multiple_of(SECTOR_SIZE) {
            return Err(BlockError::Size(bytes));
        }
        let sectors = bytes / SECTOR_SIZE;
        self.capacity.store(sectors, Ordering::Release);
        Ok(sectors)
    }

    /// Size in sectors of 512 bytes.
    pub fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Acquire)
    }

    /// Bytes per logical block.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Whether changes are refused.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The byte offset of `len` bytes from `sector` on, if they are whole sectors within the disk.
    fn offset(&self, sector: u64, len: u64) -> Result<u64, DiskError> {
        if !len.is_multiple_of(SECTOR_SIZE) {
            return Err(DiskError::Refused("not whole sectors"));
        }
        match sector.checked_add(len / SECTOR_SIZE) {
            // No overflow: the disk's size in bytes came from the kernel as a 63-bit number.
            Some(end) if end <= self.capacity() => Ok(sector * SECTOR_SIZE),
            _ => Err(DiskError::Refused("beyond the end of the disk")),
        }
    }

    /// `offset` as the kernel takes it.
    fn host_offset(offset: u64) -> Result<libc::off64_t, DiskError> {
        offset
            .try_into()
            .map_err(|_| DiskError::Refused("beyond the end of the disk"))
    }

    fn writable(&self) -> Result<(), DiskError> {
        if self.read_only {
            return Err(DiskError::Refused("the disk is read-only"));
        }
        Ok(())
    }

    /// Fills `data` from `sector` on.
    pub(super) fn read(&self, sector: u64, data: &Slices<'_>) -> Result<(), DiskError> {
        let start = self.offset(sector, data.len() as u64)?;
        let mut done = 0;
        while done < data.len() {
            let rest = data.range(done, data.len());
            let offset = Self::host_offset(start + done as u64)?;
            match host_io::preadv(self.fd(), rest.parts(), offset)? {
                0 => return Err(DiskError::Refused("the file has become shorter on the host")),
                n => done += n,
            }
        }
        Ok(())
    }

    /// Writes `data` from `sector` on.
    pub(super) fn write(&self, sector: u64, data: &Slices<'_>) -> Result<(), DiskError> {
        self.writable()?;
        let start = self.offset(sector, data.len() as u64)?;
        let mut done = 0;
        while done < data.len() {
            let rest = data.range(done, data.len());
            let offset = Self::host_offset(start + done as u64)?;
            match host_io::pwritev(self.fd(), rest.parts(), offset)? {
                0 => return Err(DiskError::Refused("the host writes nothing")),
                n => done += n,
            }
        }
        Ok(())
    }

    /// Brings all that was written to stable storage.
    pub(super) fn flush(&self) -> Result<(), DiskError> {
        if self.read_only {
            return Ok(());
        }
        let result = rustix::fs::fdatasync(&self.fd);
        if result.is_err() {
            self.lost_writes.store(true, Ordering::Release);
        }
        result?;
        if self.lost_writes.load(Ordering::Acquire) {
            return Err(DiskError::Refused("an earlier write was lost by the host"));
        }
        Ok(())
    }

    /// Gives the `sectors` from `sector` on back to the host; what they read as is undefined.
    pub(super) fn discard(&self, sector: u64, sectors: u32) -> Result<(), DiskError> {
        self.writable()?;
        let len = u64::from(sectors) * SECTOR_SIZE;
        let offset = self.offset(sector, len)?;
        if len == 0 {
            return Ok(());
        }
        match self.kind {
            DiskKind::File => self.punch_hole(offset, len),
            DiskKind::BlockDevice => self.block_ioctl(BLKDISCARD, offset, len),
        }
    }

    /// Makes the `sectors` from `sector` on read as zeroes, giving them back to the host if `unmap`.
    pub(super) fn write_zeroes(&self, sector: u64, sectors: u32, unmap: bool) -> Result<(), DiskError> {
        self.writable()?;
        let len = u64::from(sectors) * SECTOR_SIZE;
        let offset = self.offset(sector, len)?;
        if len == 0 {
            return Ok(());
        }
        let result = match self.kind {
            DiskKind::File if unmap => self.punch_hole(offset, len),
            DiskKind::File => {
                let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(&self.fd, flags, offset, len).map_err(DiskError::from)
            }
            DiskKind::BlockDevice => self.block_ioctl(BLKZEROOUT, offset, len),
        };
        match result {
            Err(DiskError::Unsupported) => self.write_zeroes_by_hand(offset, len),
            result => result,
        }
    }

    fn punch_hole(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.fd, flags, offset, len)?)
    }

    fn write_zeroes_by_hand(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        const ZEROES: [u8; 16 << 10] = [0; 16 << 10];
        let mut done = 0;
        while done < len {
            let n = usize::try_from(len - done)
                .unwrap_or(usize::MAX)
                .min(ZEROES.len());
            match rustix::io::pwrite(&self.fd, &ZEROES[..n], offset + done) {
                Ok(0) => return Err(DiskError::Refused("the host writes nothing")),
                Ok(n) => done += n as u64,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    fn block_ioctl(&self, request: libc::c_ulong, offset: u64, len: u64) -> Result<(), DiskError> {
        let range = [offset, len];
        // SAFETY: both requests read two u64 from the pointer, which is valid for the call.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), request as _, range.as_ptr()) };
        if result < 0 {
            let errno = rustix::io::Errno::from_io_error(&io::Error::last_os_error());
            return Err(errno.unwrap_or(rustix::io::Errno::IO).into());
        }
        Ok(())
    }
}

// <linux/fs.h>: _IO(0x12, 119) and _IO(0x12, 127).
const BLKDISCARD: libc::c_ulong = 0x1277;
const BLKZEROOUT: libc::c_ulong = 0x127f;

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::MemfdFlags;

    fn memfd(len: u64) -> OwnedFd {
        let fd = rustix::fs::memfd_create("disk", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, len).unwrap();
        fd
    }

    #[test]
    fn the_kind_is_checked_and_never_inferred() {
        let announced = DiskKind::BlockDevice;
        assert!(matches!(
            Disk::new(memfd(512), announced, false),
            Err(BlockError::Kind { .. })
        ));
        let directory = OwnedFd::from(std::fs::File::open("/").unwrap());
        for kind in [DiskKind::File, DiskKind::BlockDevice] {
            let directory = directory.try_clone().unwrap();
            assert!(matches!(
                Disk::new(directory, kind, true),
                Err(BlockError::Kind { .. })
            ));
        }
    }

    #[test]
    fn the_descriptor_must_allow_what_is_asked() {
        let open = |flags: OFlags| {
            let fd = memfd(512);
            let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
            rustix::fs::open(path, flags, rustix::fs::Mode::empty()).unwrap()
        };
        let new = |flags, read_only| Disk::new(open(flags), DiskKind::File, read_only);
        assert!(new(OFlags::RDWR, false).is_ok());
        assert!(new(OFlags::RDWR, true).is_ok());
        assert!(new(OFlags::RDONLY, true).is_ok());
        for (flags, read_only) in [
            (OFlags::RDONLY, false),
            (OFlags::WRONLY, false),
            (OFlags::RDWR | OFlags::APPEND, false),
            (OFlags::PATH, true),
        ] {
            let error = new(flags, read_only).unwrap_err();
            assert!(matches!(error, BlockError::Access { .. }), "{error}");
        }
        assert!(matches!(
            Disk::new(memfd(1000), DiskKind::File, false),
            Err(BlockError::Size(1000))
        ));
    }

    #[test]
    fn sector_arithmetic_is_checked() {
        let disk = Disk::new(memfd(8 * 512), DiskKind::File, false).unwrap();
        assert_eq!(disk.offset(7, 512).unwrap(), 7 * 512);
        assert_eq!(disk.offset(8, 0).unwrap(), 8 * 512);
        for (sector, len) in [
            (8, 512),
            (7, 1024),
            (0, 513),
            (u64::MAX, 512),
            (u64::MAX / 512, 512),
            (0, u64::MAX - 511),
            (9, 0),
        ] {
            assert!(disk.offset(sector, len).is_err(), "{sector} {len}");
        }
    }

    #[test]
    fn a_lost_write_is_never_forgotten() {
        let disk = Disk::new(memfd(512), DiskKind::File, false).unwrap();
        disk.flush().unwrap();
        disk.lost_writes.store(true, Ordering::Release);
        assert!(disk.flush().is_err());
        assert!(disk.flush().is_err());
    }

    #[test]
    fn zeroes_by_hand_end_where_they_should() {
        let disk = Disk::new(memfd(100 * 512), DiskKind::File, false).unwrap();
        rustix::io::pwrite(&disk.fd, &[0xff; 51_200], 0).unwrap();
        disk.write_zeroes_by_hand(512, 98 * 512).unwrap();
        let mut data = vec![1; 51_200];
        rustix::io::pread(&disk.fd, &mut data, 0).unwrap();
        assert_eq!(data[..512], [0xff; 512]);
        assert_eq!(data[512..99 * 512], [0; 98 * 512]);
        assert_eq!(data[99 * 512..], [0xff; 512]);
    }
}
