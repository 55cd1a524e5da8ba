// SPDX-License-Identifier: Apache-2.0
//! The FUSE protocol's structures and numbers, version 7.41 (Linux `include/uapi/linux/fuse.h`).
//!
//! Structures are read from and written to guest memory as bytes; zerocopy's derives prove at compile time that they
//! have no padding and that every bit pattern is a value. Names are the protocol's own.
#![allow(
    missing_docs,
    reason = "names and meanings are the protocol's: include/uapi/linux/fuse.h"
)]

use zerocopy::{FromBytes, Immutable, IntoBytes};

pub const KERNEL_VERSION: u32 = 7;
pub const KERNEL_MINOR_VERSION: u32 = 41;
/// Oldest minor version served: `fuse_init_in` and all structures below have their present size since 7.36 or can be
/// told apart by length.
pub const MIN_KERNEL_MINOR_VERSION: u32 = 31;
pub const ROOT_ID: u64 = 1;

/// Defines a protocol structure.
macro_rules! wire {
    ($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
        #[repr(C)]
        pub struct $name { $(pub $field: $type),* }
    };
}

wire!(InHeader {
    len: u32,
    opcode: u32,
    unique: u64,
    nodeid: u64,
    uid: u32,
    gid: u32,
    pid: u32,
    total_extlen: u16,
    padding: u16
});
wire!(OutHeader {
    len: u32,
    error: i32,
    unique: u64
});
wire!(Attr {
    ino: u64,
    size: u64,
    blocks: u64,
    atime: u64,
    mtime: u64,
    ctime: u64,
    atimensec: u32,
    mtimensec: u32,
    ctimensec: u32,
    mode: u32,
    nlink: u32,
    uid: u32,
    gid: u32,
    rdev: u32,
    blksize: u32,
    flags: u32,
});
wire!(SxTime {
    sec: i64,
    nsec: u32,
    reserved: i32
});
wire!(Statx {
    mask: u32,
    blksize: u32,
    attributes: u64,
    nlink: u32,
    uid: u32,
    gid: u32,
    mode: u16,
    spare0: u16,
    ino: u64,
    size: u64,
    blocks: u64,
    attributes_mask: u64,
    atime: SxTime,
    btime: SxTime,
    ctime: SxTime,
    mtime: SxTime,
    rdev_major: u32,
    rdev_minor: u32,
    dev_major: u32,
    dev_minor: u32,
    spare2: [u64; 14],
});
wire!(StatfsOut {
    blocks: u64,
    bfree: u64,
    bavail: u64,
    files: u64,
    ffree: u64,
    bsize: u32,
    namelen: u32,
    frsize: u32,
    padding: u32,
    spare: [u32; 6],
});
wire!(FileLock {
    start: u64,
    end: u64,
    r#type: u32,
    pid: u32
});
wire!(EntryOut {
    nodeid: u64,
    generation: u64,
    entry_valid: u64,
    attr_valid: u64,
    entry_valid_nsec: u32,
    attr_valid_nsec: u32,
    attr: Attr,
});
wire!(ForgetIn { nlookup: u64 });
wire!(ForgetOne {
    nodeid: u64,
    nlookup: u64
});
wire!(BatchForgetIn {
    count: u32,
    dummy: u32
});
wire!(GetattrIn {
    getattr_flags: u32,
    dummy: u32,
    fh: u64
});
wire!(AttrOut {
    attr_valid: u64,
    attr_valid_nsec: u32,
    dummy: u32,
    attr: Attr
});
wire!(StatxIn {
    getattr_flags: u32,
    reserved: u32,
    fh: u64,
    sx_flags: u32,
    sx_mask: u32
});
wire!(StatxOut {
    attr_valid: u64,
    attr_valid_nsec: u32,
    flags: u32,
    spare: [u64; 2],
    stat: Statx
});
wire!(MknodIn {
    mode: u32,
    rdev: u32,
    umask: u32,
    padding: u32
});
wire!(MkdirIn {
    mode: u32,
    umask: u32
});
wire!(RenameIn { newdir: u64 });
wire!(Rename2In {
    newdir: u64,
    flags: u32,
    padding: u32
});
wire!(LinkIn { oldnodeid: u64 });
wire!(SetattrIn {
    valid: u32,
    padding: u32,
    fh: u64,
    size: u64,
    lock_owner: u64,
    atime: u64,
    mtime: u64,
    ctime: u64,
    atimensec: u32,
    mtimensec: u32,
    ctimensec: u32,
    mode: u32,
    unused4: u32,
    uid: u32,
    gid: u32,
    unused5: u32,
});
wire!(OpenIn {
    flags: u32,
    open_flags: u32
});
wire!(CreateIn {
    flags: u32,
    mode: u32,
    umask: u32,
    open_flags: u32
});
wire!(OpenOut {
    fh: u64,
    open_flags: u32,
    backing_id: i32
});
wire!(ReleaseIn {
    fh: u64,
    flags: u32,
    release_flags: u32,
    lock_owner: u64
});
wire!(FlushIn {
    fh: u64,
    unused: u32,
    padding: u32,
    lock_owner: u64
});
wire!(ReadIn {
    fh: u64,
    offset: u64,
    size: u32,
    read_flags: u32,
    lock_owner: u64,
    flags: u32,
    padding: u32
});
wire!(WriteIn {
    fh: u64,
    offset: u64,
    size: u32,
    write_flags: u32,
    lock_owner: u64,
    flags: u32,
    padding: u32
});
wire!(WriteOut {
    size: u32,
    padding: u32
});
wire!(FsyncIn {
    fh: u64,
    fsync_flags: u32,
    padding: u32
});
wire!(SetxattrIn {
    size: u32,
    flags: u32
});
wire!(SetxattrExtIn {
    size: u32,
    flags: u32,
    setxattr_flags: u32,
    padding: u32
});
wire!(GetxattrIn {
    size: u32,
    padding: u32
});
wire!(GetxattrOut {
    size: u32,
    padding: u32
});
wire!(LkIn {
    fh: u64,
    owner: u64,
    lk: FileLock,
    lk_flags: u32,
    padding: u32
});
wire!(LkOut { lk: FileLock });
wire!(InitIn {
    major: u32,
    minor: u32,
    max_readahead: u32,
    flags: u32
});
wire!(InitInExt {
    flags2: u32,
    unused: [u32; 11]
});
wire!(InitOut {
    major: u32,
    minor: u32,
    max_readahead: u32,
    flags: u32,
    max_background: u16,
    congestion_threshold: u16,
    max_write: u32,
    time_gran: u32,
    max_pages: u16,
    map_alignment: u16,
    flags2: u32,
    max_stack_depth: u32,
    unused: [u32; 6],
});
wire!(InterruptIn { unique: u64 });
wire!(FallocateIn {
    fh: u64,
    offset: u64,
    length: u64,
    mode: u32,
    padding: u32
});
wire!(Dirent {
    ino: u64,
    off: u64,
    namelen: u32,
    r#type: u32
});
wire!(LseekIn {
    fh: u64,
    offset: u64,
    whence: u32,
    padding: u32
});
wire!(LseekOut { offset: u64 });
wire!(CopyFileRangeIn {
    fh_in: u64,
    off_in: u64,
    nodeid_out: u64,
    fh_out: u64,
    off_out: u64,
    len: u64,
    flags: u64,
});
wire!(SetupmappingIn {
    fh: u64,
    foffset: u64,
    len: u64,
    flags: u64,
    moffset: u64
});
wire!(RemovemappingIn { count: u32 });
wire!(RemovemappingOne {
    moffset: u64,
    len: u64
});
wire!(ExtHeader {
    size: u32,
    r#type: u32
});

/// Extension type FUSE_EXT_GROUPS: `nr_groups` and then that many group ids.
pub const EXT_GROUPS: u32 = 32;

/// Bits of `fuse_setattr_in.valid`.
pub mod fattr {
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const FH: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
    pub const KILL_SUIDGID: u32 = 1 << 11;
}

/// Flags of a reply to OPEN.
pub mod fopen {
    pub const DIRECT_IO: u32 = 1 << 0;
    pub const KEEP_CACHE: u32 = 1 << 1;
    pub const CACHE_DIR: u32 = 1 << 3;
    pub const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
}

/// Features negotiated by INIT (`flags` and, shifted by 32, `flags2`).
pub mod init {
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const POSIX_LOCKS: u64 = 1 << 1;
    pub const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const DONT_MASK: u64 = 1 << 6;
    pub const FLOCK_LOCKS: u64 = 1 << 10;
    pub const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    pub const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const WRITEBACK_CACHE: u64 = 1 << 16;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const POSIX_ACL: u64 = 1 << 20;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const CACHE_SYMLINKS: u64 = 1 << 23;
    pub const MAP_ALIGNMENT: u64 = 1 << 26;
    pub const SUBMOUNTS: u64 = 1 << 27;
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub const SETXATTR_EXT: u64 = 1 << 29;
    pub const INIT_EXT: u64 = 1 << 30;
    pub const HAS_INODE_DAX: u64 = 1 << 33;
    pub const CREATE_SUPP_GROUP: u64 = 1 << 34;
}

pub const LK_FLOCK: u32 = 1 << 0;
pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;
pub const FSYNC_FDATASYNC: u32 = 1 << 0;
pub const ATTR_SUBMOUNT: u32 = 1 << 0;
pub const ATTR_DAX: u32 = 1 << 1;
pub const OPEN_KILL_SUIDGID: u32 = 1 << 0;
pub const SETXATTR_ACL_KILL_SGID: u32 = 1 << 0;
pub const SETUPMAPPING_FLAG_WRITE: u64 = 1 << 0;
pub const SETUPMAPPING_FLAG_READ: u64 = 1 << 1;

/// Request numbers.
macro_rules! opcodes {
    ($($name:ident = $number:literal),* $(,)?) => {
        /// A request's number.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub enum Opcode { $($name = $number),* }

        impl Opcode {
            /// Every opcode there is.
            #[cfg(test)]
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The opcode with this number.
            pub fn new(number: u32) -> Option<Self> {
                match number { $($number => Some(Self::$name),)* _ => None }
            }
        }
    };
}

opcodes! {
    Lookup = 1, Forget = 2, Getattr = 3, Setattr = 4, Readlink = 5, Symlink = 6, Mknod = 8, Mkdir = 9, Unlink = 10,
    Rmdir = 11, Rename = 12, Link = 13, Open = 14, Read = 15, Write = 16, Statfs = 17, Release = 18, Fsync = 20,
    Setxattr = 21, Getxattr = 22, Listxattr = 23, Removexattr = 24, Flush = 25, Init = 26, Opendir = 27,
    Readdir = 28, Releasedir = 29, Fsyncdir = 30, Getlk = 31, Setlk = 32, Setlkw = 33, Access = 34, Create = 35,
    Interrupt = 36, Bmap = 37, Destroy = 38, Ioctl = 39, Poll = 40, NotifyReply = 41, BatchForget = 42,
    Fallocate = 43, Readdirplus = 44, Rename2 = 45, Lseek = 46, CopyFileRange = 47, Setupmapping = 48,
    Removemapping = 49, Syncfs = 50, Tmpfile = 51, Statx = 52,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_the_protocols() {
        let sizes = [
            (size_of::<InHeader>(), 40),
            (size_of::<OutHeader>(), 16),
            (size_of::<Attr>(), 88),
            (size_of::<EntryOut>(), 128),
            (size_of::<AttrOut>(), 104),
            (size_of::<Statx>(), 256),
            (size_of::<StatxOut>(), 288),
            (size_of::<SetattrIn>(), 88),
            (size_of::<WriteIn>(), 40),
            (size_of::<InitIn>() + size_of::<InitInExt>(), 64),
            (size_of::<InitOut>(), 64),
            (size_of::<StatfsOut>(), 80),
            (size_of::<Dirent>(), 24),
            (size_of::<LkIn>(), 48),
            (size_of::<CopyFileRangeIn>(), 56),
        ];
        for (index, (ours, theirs)) in sizes.into_iter().enumerate() {
            assert_eq!(ours, theirs, "structure {index}");
        }
    }

    #[test]
    fn opcodes_round_trip() {
        for opcode in Opcode::ALL {
            assert_eq!(Opcode::new(*opcode as u32), Some(*opcode));
        }
        assert_eq!(Opcode::new(7), None);
        assert_eq!(Opcode::new(u32::MAX), None);
    }
}
