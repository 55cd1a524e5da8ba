// SPDX-License-Identifier: Apache-2.0
//! Packs what overlayfs wrote into an upper directory as a layer of an image: what [`super::unpack`] makes the same of.
//!
//! Overlayfs's own marks become whiteouts (OCI image specification, "Layer Filesystem Changeset"): a character device 0:0
//! the file `.wh.NAME`, the attribute `trusted.overlay.opaque` the file `.wh..wh..opq`. Files with several names keep
//! them. Sockets are left out: nobody listens to them in another place. Of extended attributes those go along that layers
//! can have. The tree is a container's: names are never followed, and its depth is limited.

use super::unpack::{DIRECTORY, ENCODED_XATTR, MAX_DEPTH, OPAQUE, XATTR, xattr_allowed};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, SeekFrom, Stat};
use rustix::io::Errno;
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use tar::{Builder, EntryType, Header};

/// Longest list of attributes' names, and longest attribute: what Linux has.
const MAX_XATTR: usize = 64 << 10;
/// Most pieces of a file between its holes: 21 are said in 512 bytes, of which an entry may have 1 MiB.
const MAX_PIECES: usize = 32 << 10;

/// Packs the tree below `root` into `archive`, a tar.
///
/// # Errors
/// A file cannot be read, the archive cannot be written, or the tree holds what a layer cannot say.
pub fn pack<W: Write>(root: BorrowedFd<'_>, archive: W) -> io::Result<W> {
    let mut packer = Packer {
        archive: Builder::new(archive),
        names: HashMap::new(),
    };
    let stat = rustix::fs::fstat(root)?;
    let path = format!("/proc/self/fd/{}/.", root.as_raw_fd());
    packer.attributes(Path::new(&path), &stat)?;
    packer.plain(&header(&stat, EntryType::Directory)?, Path::new("./"))?;
    packer.directory(root, Path::new(""), 0)?;
    packer.archive.into_inner()
}

struct Packer<W: Write> {
    archive: Builder<W>,
    /// Files that have more names, by device and inode number.
    names: HashMap<(u64, u64), PathBuf>,
}

fn header(stat: &Stat, kind: EntryType) -> io::Result<Header> {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(stat.st_mode & 0o7777);
    header.set_uid(stat.st_uid.into());
    header.set_gid(stat.st_gid.into());
    header.set_mtime(u64::try_from(stat.st_mtime).unwrap_or(0));
    header.set_size(0);
    if matches!(kind, EntryType::Char | EntryType::Block) {
        header.set_device_major(rustix::fs::major(stat.st_rdev))?;
        header.set_device_minor(rustix::fs::minor(stat.st_rdev))?;
    }
    Ok(header)
}

/// The time of the last change as PAX has it: a decimal number, below zero before 1970.
fn pax_time(stat: &Stat) -> String {
    let (seconds, nanos) = (i128::from(stat.st_mtime), i128::from(stat.st_mtime_nsec));
    let all = seconds * 1_000_000_000 + nanos;
    let sign = if all < 0 { "-" } else { "" };
    let all = all.unsigned_abs();
    format!("{sign}{}.{:09}", all / 1_000_000_000, all % 1_000_000_000)
}

/// Whether a file is packed without its holes: a guest makes those of any length at no cost. Of more pieces than the headers of one
/// entry say to [`super::unpack`] it is packed whole, if it is not much longer than what it takes on the disk.
fn without_holes(file: &File) -> io::Result<bool> {
    let data = file.metadata()?;
    let (mut at, mut pieces) = (0, 0);
    while pieces <= MAX_PIECES {
        let hole = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => rustix::fs::seek(file, SeekFrom::Hole(start))?,
            // Nothing but a hole is left, or this file system knows none.
            Err(Errno::NXIO | Errno::INVAL) => break,
            Err(error) => return Err(error.into()),
        };
        pieces += 1;
        at = hole;
    }
    rustix::fs::seek(file, SeekFrom::Start(0))?;
    if pieces > MAX_PIECES && data.len() / 2 > data.blocks().saturating_mul(512) {
        let why = format!("more than {MAX_PIECES} pieces between holes cannot be said in a layer");
        return Err(io::Error::new(io::ErrorKind::Unsupported, why));
    }
    Ok(pieces <= MAX_PIECES)
}

fn at(path: &Path) -> impl Fn(io::Error) -> io::Error {
    let path = path.display().to_string();
    move |error| io::Error::new(error.kind(), format!("{path}: {error}"))
}

impl<W: Write> Packer<W> {
    fn plain(&mut self, header: &Header, path: &Path) -> io::Result<()> {
        self.archive.append_data(&mut header.clone(), path, io::empty())
    }

    fn directory(&mut self, dir: BorrowedFd<'_>, path: &Path, depth: usize) -> io::Result<()> {
        if depth > MAX_DEPTH {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{} is too deep", path.display()),
            ));
        }
        let mut names: Vec<OsString> = Vec::new();
        for entry in Dir::read_from(dir)? {
            let name = entry?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                names.push(OsString::from_vec(name));
            }
        }
        names.sort_unstable();
        for name in names {
            let path = path.join(&name);
            self.entry(dir, &name, &path, depth).map_err(at(&path))?;
        }
        Ok(())
    }

    fn entry(&mut self, dir: BorrowedFd<'_>, name: &OsStr, path: &Path, depth: usize) -> io::Result<()> {
        let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::CharacterDevice && stat.st_rdev == 0 {
            return self.whiteout(path, name);
        }
        if kind == FileType::Socket {
            return Ok(());
        }
        if kind != FileType::Directory && stat.st_nlink > 1 {
            let file = (stat.st_dev, stat.st_ino);
            if let Some(first) = self.names.get(&file) {
                let mut header = header(&stat, EntryType::Link)?;
                return self.archive.append_link(&mut header, path, first);
            }
            self.names.insert(file, path.to_owned());
        }
        // The last component is not followed: the calls for attributes are those for links.
        let own = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name);
        let is_opaque = self.attributes(&own, &stat)?;
        match kind {
            FileType::Directory => {
                let opened = rustix::fs::openat(dir, name, DIRECTORY, Mode::empty())?;
                self.plain(&header(&stat, EntryType::Directory)?, path)?;
                if is_opaque {
                    self.whiteout(&path.join(".wh..wh..opq"), OsStr::new(".wh..opq"))?;
                }
                self.directory(opened.as_fd(), path, depth + 1)
            }
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let mut file = File::from(rustix::fs::openat(dir, name, flags, Mode::empty())?);
                self.archive.sparse(without_holes(&file)?);
                // Nobody writes to it: the VM stands still.
                self.archive.append_file(path, &mut file)
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(dir, name, Vec::new())?;
                let mut header = header(&stat, EntryType::Symlink)?;
                let target = OsStr::from_bytes(target.as_bytes());
                self.archive.append_link(&mut header, path, target)
            }
            FileType::CharacterDevice => self.plain(&header(&stat, EntryType::Char)?, path),
            FileType::BlockDevice => self.plain(&header(&stat, EntryType::Block)?, path),
            FileType::Fifo => self.plain(&header(&stat, EntryType::Fifo)?, path),
            _ => Err(io::Error::other("a file of unknown type")),
        }
    }

    /// `path` is that of the file that is hidden, or of the mark itself.
    fn whiteout(&mut self, path: &Path, hidden: &OsStr) -> io::Result<()> {
        let mut name = OsString::from(".wh.");
        name.push(hidden);
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0);
        header.set_size(0);
        self.plain(&header, &path.with_file_name(name))
    }

    /// Says the attributes of the next entry; answers whether overlayfs hides what is below it.
    fn attributes(&mut self, path: &Path, stat: &Stat) -> io::Result<bool> {
        let mut list = vec![0; MAX_XATTR];
        let length = match rustix::fs::llistxattr(path, &mut list[..]) {
            Ok(length) => length,
            Err(Errno::OPNOTSUPP) => 0,
            Err(error) => return Err(error.into()),
        };
        let names = list.get(..length).unwrap_or_default();
        let mut is_opaque = false;
        // The header has but whole seconds.
        let mut said: Vec<(String, Vec<u8>)> = vec![("mtime".into(), pax_time(stat).into_bytes())];
        for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
            let Ok(name) = std::str::from_utf8(name) else {
                continue;
            };
            if matches!(name, "trusted.overlay.redirect" | "trusted.overlay.metacopy") {
                return Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    format!(
                        "overlayfs's {name} cannot be said in a layer: load overlay without redirect_dir and metacopy"
                    ),
                ));
            }
            let is_mark = name == OPAQUE;
            if !is_mark && !xattr_allowed(name) {
                continue;
            }
            let mut value = vec![0; MAX_XATTR];
            let length = rustix::fs::lgetxattr(path, name, &mut value[..])?;
            value.truncate(length);
            if is_mark {
                is_opaque = value == b"y";
            } else {
                said.push(if value.contains(&b'\n') {
                    let encoded = BASE64_STANDARD.encode(value);
                    (format!("{ENCODED_XATTR}{name}"), encoded.into_bytes())
                } else {
                    (format!("{XATTR}{name}"), value)
                });
            }
        }
        let said = said.iter().map(|(name, value)| (name.as_str(), value.as_slice()));
        self.archive.append_pax_extensions(said)?;
        Ok(is_opaque)
    }
}

#[cfg(test)]
mod tests {
    use super::super::unpack::{Limits, unpack};
    use super::*;
    use rustix::fs::{CWD, Timespec, Timestamps, XattrFlags};
    use std::fs;
    use std::os::unix::fs::{FileExt, FileTypeExt, PermissionsExt};
    use std::os::unix::net::UnixListener;

    /// What was packed, unpacked again. Needs root, as whiteouts are devices.
    fn round_trip(make: impl FnOnce(&Path), look: impl FnOnce(&Path)) {
        let dir = std::env::temp_dir().join(format!("cloister-pack-{}", crate::ids::random_hex(8)));
        let (from, to) = (dir.join("from"), dir.join("to"));
        for path in [&from, &to] {
            fs::create_dir_all(path).unwrap();
        }
        make(&from);
        let root = File::open(&from).unwrap();
        let archive = pack(root.as_fd(), Vec::new()).unwrap();
        let root = File::open(&to).unwrap();
        unpack(&archive[..], root.as_fd(), &[], Limits::default()).unwrap();
        look(&to);
        fs::remove_dir_all(dir).unwrap();
    }

    fn mark(path: &Path, name: &str, value: &[u8]) {
        rustix::fs::setxattr(path, name, value, XattrFlags::empty()).unwrap();
    }

    fn marked(path: &Path, name: &str) -> Option<Vec<u8>> {
        let mut value = vec![0; 100];
        let length = rustix::fs::getxattr(path, name, &mut value[..]).ok()?;
        value.truncate(length);
        Some(value)
    }

    /// Of files: seconds and nanoseconds of their last changes.
    const TIMES: [(&str, i64, i64); 5] = [
        ("d/file", 1_795_000_000, 123_456_789),
        ("link", 1_795_000_001, 1),
        ("fifo", 1_795_000_002, 999_999_999),
        // Before 1970, where a file system has such times.
        ("d", -2, 250_000_000),
        ("sparse", 0, 0),
    ];

    #[test]
    fn what_overlayfs_wrote_comes_back() {
        let long = "n".repeat(200);
        round_trip(
            |dir| {
                fs::set_permissions(dir, fs::Permissions::from_mode(0o751)).unwrap();
                fs::create_dir_all(dir.join("d").join(&long)).unwrap();
                fs::write(dir.join("d/file"), vec![7; 100_000]).unwrap();
                fs::set_permissions(dir.join("d/file"), fs::Permissions::from_mode(0o4750)).unwrap();
                std::os::unix::fs::chown(dir.join("d/file"), Some(7), Some(3_000_000)).unwrap();
                fs::set_permissions(dir.join("d/file"), fs::Permissions::from_mode(0o4750)).unwrap();
                fs::hard_link(dir.join("d/file"), dir.join("z")).unwrap();
                fs::write(dir.join("d").join(&long).join(&long), "deep").unwrap();
                std::os::unix::fs::symlink("/nowhere", dir.join("link")).unwrap();
                let mode = Mode::RUSR | Mode::WUSR;
                rustix::fs::mknodat(CWD, dir.join("gone"), FileType::CharacterDevice, mode, 0).unwrap();
                rustix::fs::mknodat(CWD, dir.join("fifo"), FileType::Fifo, mode, 0).unwrap();
                mark(&dir.join("d"), OPAQUE, b"y");
                mark(&dir.join("d"), "trusted.overlay.origin", b"x");
                mark(&dir.join("d/file"), "user.note", b"\0\n=binary");
                mark(&dir.join("d/file"), "user.plain", b"a=b");
                UnixListener::bind(dir.join("socket")).unwrap();
                let sparse = File::create(dir.join("sparse")).unwrap();
                sparse.write_all_at(b"far", 1 << 28).unwrap();
                sparse.set_len(1 << 29).unwrap();
                for (name, seconds, nanos) in TIMES {
                    let time = Timespec {
                        tv_sec: seconds,
                        tv_nsec: nanos,
                    };
                    let times = Timestamps {
                        last_access: time,
                        last_modification: time,
                    };
                    rustix::fs::utimensat(CWD, dir.join(name), &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
                }
            },
            |dir| {
                let data = |name: &str| fs::symlink_metadata(dir.join(name)).unwrap();
                assert_eq!(fs::metadata(dir).unwrap().mode() & 0o7777, 0o751);
                let file = data("d/file");
                assert_eq!((file.len(), file.mode() & 0o7777), (100_000, 0o4750));
                assert_eq!((file.uid(), file.gid(), file.nlink()), (7, 3_000_000, 2));
                assert_eq!(file.ino(), data("z").ino());
                let deep = dir.join("d").join(&long).join(&long);
                assert_eq!(fs::read_to_string(deep).unwrap(), "deep");
                assert_eq!(fs::read_link(dir.join("link")).unwrap(), Path::new("/nowhere"));
                for (name, seconds, nanos) in TIMES {
                    let data = data(name);
                    assert_eq!((data.mtime(), data.mtime_nsec()), (seconds, nanos), "{name}");
                }
                let gone = data("gone");
                assert!(gone.file_type().is_char_device() && gone.rdev() == 0);
                assert!(data("fifo").file_type().is_fifo());
                assert_eq!(marked(&dir.join("d"), OPAQUE).unwrap(), b"y");
                assert_eq!(marked(&dir.join("d"), "trusted.overlay.origin"), None);
                assert_eq!(marked(&dir.join("d/file"), "user.note").unwrap(), b"\0\n=binary");
                assert_eq!(marked(&dir.join("d/file"), "user.plain").unwrap(), b"a=b");
                assert!(!dir.join("socket").exists());
                let sparse = File::open(dir.join("sparse")).unwrap();
                let mut far = [0; 3];
                sparse.read_exact_at(&mut far, 1 << 28).unwrap();
                let data = sparse.metadata().unwrap();
                assert_eq!((&far, data.len()), (b"far", 1 << 29));
                assert!(data.blocks() < 1 << 10, "its holes are holes");
            },
        );
    }

    #[test]
    fn files_of_many_pieces_come_back() {
        const STEP: u64 = 8192;
        // The last one that is packed without its holes, and the first one that is packed with them.
        let files = [("most", MAX_PIECES as u64), ("more", MAX_PIECES as u64 + 1)];
        round_trip(
            |dir| {
                for (name, pieces) in files {
                    let file = File::create_new(dir.join(name)).unwrap();
                    (0..pieces).for_each(|at| file.write_all_at(b"x", at * STEP).unwrap());
                    let file = File::open(dir.join(name)).unwrap();
                    assert_eq!(without_holes(&file).unwrap(), name == "most");
                }
            },
            |dir| {
                for (name, pieces) in files {
                    let file = File::open(dir.join(name)).unwrap();
                    assert_eq!(file.metadata().unwrap().len(), (pieces - 1) * STEP + 1);
                    for at in 0..pieces {
                        let mut byte = [0];
                        file.read_exact_at(&mut byte, at * STEP).unwrap();
                        assert_eq!(byte, *b"x");
                    }
                }
            },
        );
    }

    #[test]
    fn what_a_layer_cannot_say_is_refused() {
        let dir = std::env::temp_dir().join(format!("cloister-pack-{}", crate::ids::random_hex(8)));
        fs::create_dir_all(dir.join("moved")).unwrap();
        mark(&dir.join("moved"), "trusted.overlay.redirect", b"/old");
        let root = File::open(&dir).unwrap();
        let error = pack(root.as_fd(), Vec::new()).unwrap_err();
        assert!(error.to_string().contains("moved: overlayfs's"), "{error}");
        fs::remove_dir(dir.join("moved")).unwrap();
        let file = File::create(dir.join("pieces")).unwrap();
        (0..=MAX_PIECES as u64).for_each(|at| file.write_all_at(b"x", at * (1 << 20)).unwrap());
        let error = pack(root.as_fd(), Vec::new()).unwrap_err();
        assert!(error.to_string().contains("pieces: more than"), "{error}");
        fs::remove_dir_all(dir).unwrap();
    }
}
