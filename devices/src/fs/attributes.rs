// SPDX-License-Identifier: Apache-2.0
//! Attributes: the host's `statx` in the protocol's structures, GETATTR, STATX, SETATTR, STATFS.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid};
use rustix::io::Errno;
use rustix::path::DecInt;

use super::abi::{
    ATTR_DAX, ATTR_SUBMOUNT, Attr, AttrOut, EntryOut, GetattrIn, ROOT_ID, SetattrIn, StatfsOut, Statx,
    StatxIn, StatxOut, SxTime, fattr, init,
};
use super::credentials;
use super::dax;
use super::host;
use super::inode::Inode;
use super::root::CachePolicy;
use super::server::{Request, Server};

/// A device number as the protocol has it (Linux `new_encode_dev`).
pub fn encode_device(major: u32, minor: u32) -> u32 {
    minor & 0xff | (major & 0xfff) << 8 | (minor & !0xff) << 12
}

/// The device number that `encoded` stands for.
pub fn decode_device(encoded: u32) -> (u32, u32) {
    (
        (encoded & 0xf_ff00) >> 8,
        encoded & 0xff | (encoded >> 12) & 0xf_ff00,
    )
}

impl Server {
    fn attr(&self, inode: &Inode, stat: &rustix::fs::Statx) -> Attr {
        let options = &inode.attachment.options;
        // A mapping is worth its set-up from some size on; less than that is read in one or two requests.
        let dax = options.dax
            && options.cache != CachePolicy::Never
            && inode.kind == FileType::RegularFile
            && stat.stx_size >= dax::MIN_FILE
            && self.has(init::HAS_INODE_DAX);
        Attr {
            ino: self.root().guest_ino(host::device(stat), stat.stx_ino),
            size: stat.stx_size,
            blocks: stat.stx_blocks,
            atime: stat.stx_atime.tv_sec.cast_unsigned(),
            mtime: stat.stx_mtime.tv_sec.cast_unsigned(),
            ctime: stat.stx_ctime.tv_sec.cast_unsigned(),
            atimensec: stat.stx_atime.tv_nsec,
            mtimensec: stat.stx_mtime.tv_nsec,
            ctimensec: stat.stx_ctime.tv_nsec,
            mode: stat.stx_mode.into(),
            nlink: stat.stx_nlink,
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            rdev: encode_device(stat.stx_rdev_major, stat.stx_rdev_minor),
            blksize: stat.stx_blksize,
            flags: if dax { ATTR_DAX } else { 0 },
        }
    }

    fn root_attr(&self) -> Attr {
        let changes = self.root().changes();
        Attr {
            ino: ROOT_ID,
            mode: 0o040_755,
            nlink: 2,
            blksize: 4096,
            mtime: changes,
            ctime: changes,
            ..Attr::default()
        }
    }

    /// The reply that introduces a node. `parent` is the mount of the directory it was found in.
    pub(super) fn entry(&self, inode: &Inode, stat: &rustix::fs::Statx, parent: Option<u64>) -> EntryOut {
        let timeout = inode.attachment.options.cache.timeout();
        let mut attr = self.attr(inode, stat);
        if parent != Some(inode.key.mount_id)
            && inode.kind == FileType::Directory
            && self.has(init::SUBMOUNTS)
        {
            attr.flags |= ATTR_SUBMOUNT;
        }
        // A name in the root stands until it is detached. Then its node answers ESTALE, at which Linux looks the name
        // up again by itself (LOOKUP_REVAL).
        // A tree that changes as a whole (a ConfigMap) does so by its symbolic link: by the old one its files would be gone.
        let name_timeout = if parent.is_none() {
            CachePolicy::Always.timeout()
        } else if inode.kind == FileType::Symlink && timeout == CachePolicy::Auto.timeout() {
            Duration::ZERO
        } else {
            timeout
        };
        EntryOut {
            nodeid: inode.id,
            generation: 0,
            entry_valid: name_timeout.as_secs(),
            attr_valid: timeout.as_secs(),
            entry_valid_nsec: name_timeout.subsec_nanos(),
            attr_valid_nsec: timeout.subsec_nanos(),
            attr,
        }
    }

    pub(super) fn getattr(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        // Kernels before 7.9 sent no body; ours is always there, but what it says (use this handle) makes no
        // difference: node and handle refer to one inode.
        let _: GetattrIn = request.read()?;
        if request.header.nodeid == ROOT_ID {
            return request.reply(&AttrOut {
                attr_valid: CachePolicy::Auto.timeout().as_secs(),
                attr: self.root_attr(),
                ..AttrOut::default()
            });
        }
        let inode = self.inodes().get(request.header.nodeid)?;
        self.reply_attr(request, &inode)
    }

    fn reply_attr(&self, request: &Request<'_>, inode: &Inode) -> Result<usize, Errno> {
        let stat = host::stat(inode.fd(self.proc())?.as_fd())?;
        let timeout = inode.attachment.options.cache.timeout();
        request.reply(&AttrOut {
            attr_valid: timeout.as_secs(),
            attr_valid_nsec: timeout.subsec_nanos(),
            dummy: 0,
            attr: self.attr(inode, &stat),
        })
    }

    pub(super) fn statx(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        if !self.config().birth_time {
            return Err(Errno::NOSYS);
        }
        let _: StatxIn = request.read()?;
        // STATX_BASIC_STATS, and STATX_BTIME where the host has it.
        const BASIC: u32 = 0x7ff;
        const BTIME: u32 = 0x800;
        if request.header.nodeid == ROOT_ID {
            let attr = self.root_attr();
            let changes = SxTime {
                sec: attr.mtime.cast_signed(),
                ..SxTime::default()
            };
            let stat = Statx {
                mask: BASIC,
                blksize: attr.blksize,
                nlink: attr.nlink,
                mode: 0o040_755,
                ino: attr.ino,
                ctime: changes,
                mtime: changes,
                ..Statx::default()
            };
            return request.reply(&StatxOut {
                stat,
                ..StatxOut::default()
            });
        }
        let inode = self.inodes().get(request.header.nodeid)?;
        let stat = host::stat(inode.fd(self.proc())?.as_fd())?;
        let timeout = inode.attachment.options.cache.timeout();
        let time = |time: &rustix::fs::StatxTimestamp| SxTime {
            sec: time.tv_sec,
            nsec: time.tv_nsec,
            reserved: 0,
        };
        request.reply(&StatxOut {
            attr_valid: timeout.as_secs(),
            attr_valid_nsec: timeout.subsec_nanos(),
            flags: 0,
            spare: [0; 2],
            stat: Statx {
                mask: stat.stx_mask & (BASIC | BTIME),
                blksize: stat.stx_blksize,
                attributes: 0,
                nlink: stat.stx_nlink,
                uid: stat.stx_uid,
                gid: stat.stx_gid,
                mode: stat.stx_mode,
                spare0: 0,
                ino: self.root().guest_ino(host::device(&stat), stat.stx_ino),
                size: stat.stx_size,
                blocks: stat.stx_blocks,
                attributes_mask: 0,
                atime: time(&stat.stx_atime),
                btime: time(&stat.stx_btime),
                ctime: time(&stat.stx_ctime),
                mtime: time(&stat.stx_mtime),
                rdev_major: stat.stx_rdev_major,
                rdev_minor: stat.stx_rdev_minor,
                // The host's devices mean nothing in the guest.
                dev_major: 0,
                dev_minor: 0,
                spare2: [0; 14],
            },
        })
    }

    pub(super) fn setattr(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        let args: SetattrIn = request.read()?;
        request.need_room(size_of::<AttrOut>())?;
        let inode = self.inode(request.header.nodeid)?;
        inode.check_writable()?;
        let node_fd = inode.fd(self.proc())?;
        let fd = node_fd.as_fd();
        if args.valid & fattr::MODE != 0 {
            if inode.kind == FileType::Symlink {
                return Err(Errno::OPNOTSUPP);
            }
            let mode = Mode::from_raw_mode(args.mode & 0o7777);
            rustix::fs::chmodat(self.proc().dir(), DecInt::from_fd(fd), mode, AtFlags::empty())?;
        }
        if args.valid & (fattr::UID | fattr::GID) != 0 {
            let id = |bit: u32, id: u32| match (args.valid & bit != 0, id) {
                (false, _) => Ok(None),
                // -1 would mean "leave it" to the host.
                (true, u32::MAX) => Err(Errno::INVAL),
                (true, id) => Ok(Some(id)),
            };
            let owner = id(fattr::UID, args.uid)?.map(Uid::from_raw);
            let group = id(fattr::GID, args.gid)?.map(Gid::from_raw);
            rustix::fs::chownat(
                fd,
                c"",
                owner,
                group,
                AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW,
            )?;
        }
        if args.valid & fattr::SIZE != 0 {
            self.set_size(request.header.nodeid, &inode, &args)?;
        }
        if args.valid & (fattr::ATIME | fattr::MTIME) != 0 {
            let time = |set: u32, now: u32, sec: u64, nsec: u32| -> Result<Timespec, Errno> {
                let special = |tv_nsec| Timespec { tv_sec: 0, tv_nsec };
                if args.valid & set == 0 {
                    return Ok(special(UTIME_OMIT));
                }
                if args.valid & now != 0 {
                    return Ok(special(UTIME_NOW));
                }
                if nsec >= 1_000_000_000 {
                    return Err(Errno::INVAL);
                }
                Ok(Timespec {
                    tv_sec: sec.cast_signed(),
                    tv_nsec: nsec.into(),
                })
            };
            let times = Timestamps {
                last_access: time(fattr::ATIME, fattr::ATIME_NOW, args.atime, args.atimensec)?,
                last_modification: time(fattr::MTIME, fattr::MTIME_NOW, args.mtime, args.mtimensec)?,
            };
            rustix::fs::utimensat(self.proc().dir(), DecInt::from_fd(fd), &times, AtFlags::empty())?;
        }
        self.reply_attr(request, &inode)
    }

    fn set_size(&self, nodeid: u64, inode: &Arc<Inode>, args: &SetattrIn) -> Result<(), Errno> {
        if inode.kind != FileType::RegularFile {
            return Err(Errno::INVAL);
        }
        i64::try_from(args.size).map_err(|_| Errno::FBIG)?;
        let truncate = || {
            if args.valid & fattr::FH != 0 {
                let handle = self.handles().get(nodeid, args.fh)?;
                return rustix::fs::ftruncate(handle.file(), args.size);
            }
            rustix::fs::ftruncate(self.open_file(inode, OFlags::WRONLY, false)?, args.size)
        };
        if args.valid & fattr::KILL_SUIDGID != 0 {
            credentials::without_fsetid(truncate)
        } else {
            truncate()
        }
    }

    pub(super) fn statfs(&self, request: &mut Request<'_>) -> Result<usize, Errno> {
        if request.header.nodeid == ROOT_ID {
            return request.reply(&StatfsOut {
                bsize: 4096,
                frsize: 4096,
                namelen: 255,
                ..StatfsOut::default()
            });
        }
        let inode = self.inodes().get(request.header.nodeid)?;
        let stat = rustix::fs::fstatvfs(inode.fd(self.proc())?)?;
        let small = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        request.reply(&StatfsOut {
            blocks: stat.f_blocks,
            bfree: stat.f_bfree,
            bavail: stat.f_bavail,
            files: stat.f_files,
            ffree: stat.f_ffree,
            bsize: small(stat.f_bsize),
            namelen: small(stat.f_namemax),
            frsize: small(stat.f_frsize),
            padding: 0,
            spare: [0; 6],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_round_trip() {
        for (major, minor) in [(0, 0), (1, 3), (0xfff, 0xf_ffff), (8, 0x1_0001)] {
            assert_eq!(decode_device(encode_device(major, minor)), (major, minor));
        }
    }
}
