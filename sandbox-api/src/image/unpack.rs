// SPDX-License-Identifier: Apache-2.0
//! Unpacks one layer of an image into an empty directory, in the form that overlayfs takes as a lower directory.
//!
//! The archive is hostile. Nothing here follows a path by string on the host: the parent of each entry is opened with
//! `openat2(RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)` below the layer's own root, so that a symbolic link of the layer
//! leads nowhere else, and the last component is only ever touched with the calls that do not follow links. An entry
//! that names `..` is refused. Counts, sizes and the memory for extended headers are limited.
//!
//! Whiteouts (OCI image specification, "Layer Filesystem Changeset") become what overlayfs understands
//! (Documentation/filesystems/overlayfs.rst): `.wh.NAME` a character device 0:0 called NAME, `.wh..wh..opq` the
//! attribute `trusted.overlay.opaque` of the directory. Attributes of overlayfs itself are never taken from an
//! archive: `trusted.overlay.redirect` would let a layer choose what it is merged with.
//!
//! A directory that an archive uses but does not list gets owner and mode of the same directory in the layers below,
//! as docker and containerd do.

use super::error::{Error, Result};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;
use std::cell::Cell;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;
use tar::EntryType;

/// Copies, and leaves holes where whole blocks are zeros: a layer says in a few bytes that a file has terabytes of them.
fn copy_sparse(from: &mut impl Read, to: &mut File) -> io::Result<()> {
    const BLOCK: usize = 4096;
    static ZEROS: [u8; BLOCK] = [0; BLOCK];
    let mut buffer = vec![0; 16 * BLOCK];
    let mut length = 0u64;
    loop {
        let mut filled = 0;
        while let Some(rest @ [_, ..]) = buffer.get_mut(filled..) {
            match from.read(rest) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        for block in buffer.get(..filled).unwrap_or_default().chunks(BLOCK) {
            if Some(block) != ZEROS.get(..block.len()) {
                to.write_all_at(block, length)?;
            }
            length = length.saturating_add(u64::try_from(block.len()).unwrap_or(0));
        }
        if filled < buffer.len() {
            return to.set_len(length);
        }
    }
}

/// Bounds of one layer. What real images need is far below.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Entries in the archive.
    pub entries: u64,
    /// Bytes of all files together.
    pub bytes: u64,
    /// Bytes of headers, long names and PAX records of one entry.
    pub header: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            entries: 4_000_000,
            bytes: 256 << 30,
            header: 1 << 20,
        }
    }
}

/// What an unpacked layer holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Unpacked {
    /// Entries read.
    pub entries: u64,
    /// Bytes in regular files.
    pub bytes: u64,
}

/// Unpacks `archive` (an uncompressed tar) below `root`; `parents` are the layers below it, topmost first.
///
/// # Errors
/// See the module; `root` is then half-filled and must be thrown away.
pub fn unpack(
    archive: impl Read,
    root: BorrowedFd<'_>,
    parents: &[OwnedFd],
    limits: Limits,
) -> Result<Unpacked> {
    let budget = Rc::new(Cell::new(u64::MAX));
    let reader = BudgetReader {
        inner: archive,
        budget: Rc::clone(&budget),
    };
    let mut unpacker = Unpacker {
        root,
        parents,
        parent: None,
        directories: Vec::new(),
        done: Unpacked::default(),
        limits,
    };
    let mut archive = tar::Archive::new(reader);
    let broken = |source| Error::EntryIo {
        entry: "(tar header)".into(),
        source,
    };
    let mut entries = archive.entries().map_err(broken)?;
    loop {
        // Between two entries only headers are read: the tar crate keeps long names and PAX records in memory.
        budget.set(limits.header);
        let Some(entry) = entries.next() else { break };
        let mut entry = entry.map_err(broken)?;
        budget.set(u64::MAX);
        unpacker.done.entries = unpacker.done.entries.saturating_add(1);
        if unpacker.done.entries > limits.entries {
            return Err(refused(&entry, format!("more than {} entries", limits.entries)));
        }
        unpacker.entry(&mut entry)?;
        // The rest of the data must not count as header of the next entry.
        io::copy(&mut entry, &mut io::sink()).map_err(|e| failed(&entry, e))?;
    }
    unpacker.finish()
}

fn name_of<R: Read>(entry: &tar::Entry<'_, R>) -> String {
    String::from_utf8_lossy(&entry.path_bytes())
        .chars()
        .take(200)
        .collect()
}

fn refused<R: Read>(entry: &tar::Entry<'_, R>, why: impl Into<String>) -> Error {
    Error::Entry {
        entry: name_of(entry),
        why: why.into(),
    }
}

fn failed<R: Read>(entry: &tar::Entry<'_, R>, source: impl Into<io::Error>) -> Error {
    Error::EntryIo {
        entry: name_of(entry),
        source: source.into(),
    }
}

/// Fails when more was read than the budget set last allows.
struct BudgetReader<R> {
    inner: R,
    budget: Rc<Cell<u64>>,
}

impl<R: Read> Read for BudgetReader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.budget.get()).unwrap_or(usize::MAX);
        if left == 0 && !buf.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                "headers of one entry are too large",
            ));
        }
        let len = buf.len().min(left);
        let n = self.inner.read(&mut buf[..len])?;
        self.budget.set(self.budget.get().saturating_sub(n as u64));
        Ok(n)
    }
}

/// The metadata that is applied after an entry's content.
struct Attributes {
    uid: Uid,
    gid: Gid,
    mode: Mode,
    times: Timestamps,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

struct Unpacker<'a> {
    root: BorrowedFd<'a>,
    parents: &'a [OwnedFd],
    /// The directory of the entry before: most entries share it.
    parent: Option<(PathBuf, Rc<OwnedFd>)>,
    /// Directories get their times last, since each file in them changes these.
    directories: Vec<(PathBuf, Timestamps)>,
    done: Unpacked,
    limits: Limits,
}

/// Before the name of an extended attribute in a PAX record, and where its value is in base64: the tar crate does not read
/// one that has a newline in it.
pub(super) const XATTR: &str = "SCHILY.xattr.";
pub(super) const ENCODED_XATTR: &str = "CLOISTER.xattr-base64.";
pub(super) const OPAQUE: &str = "trusted.overlay.opaque";
pub(super) const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);
pub(super) const MAX_DEPTH: usize = 1024;

/// Opens a path below `root`, symbolic links resolved as if `root` were `/`.
pub(crate) fn open_in(root: impl AsFd, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    loop {
        match rustix::fs::openat2(
            root.as_fd(),
            path,
            flags | OFlags::CLOEXEC,
            Mode::empty(),
            resolve,
        ) {
            // A rename elsewhere in the tree raced with the walk.
            Err(Errno::AGAIN | Errno::INTR) => {}
            result => return result,
        }
    }
}

impl Unpacker<'_> {
    fn entry<R: Read>(&mut self, entry: &mut tar::Entry<'_, R>) -> Result<()> {
        let kind = entry.header().entry_type();
        if matches!(kind, EntryType::XGlobalHeader) {
            return Ok(());
        }
        let path = clean(&entry.path_bytes()).map_err(|why| refused(entry, why))?;
        let attributes = attributes(entry)?;
        let Some(name) = path.file_name().map(OsStr::to_owned) else {
            // The layer's root itself.
            return match kind {
                EntryType::Directory => self
                    .directory_attributes(Path::new(""), attributes)
                    .map_err(|e| failed(entry, e)),
                _ => Err(refused(entry, "the root of a layer must be a directory")),
            };
        };
        let parent_path = path.parent().unwrap_or(Path::new("")).to_owned();
        let parent = self.parent(&parent_path).map_err(|e| failed(entry, e))?;
        let parent = parent.as_fd();
        if let Some(hidden) = name.as_bytes().strip_prefix(b".wh.") {
            return self
                .whiteout(parent, OsStr::from_bytes(hidden))
                .map_err(|e| failed(entry, e));
        }
        let existing = kind_of(parent, &name).map_err(|e| failed(entry, e))?;
        let mut opaque = false;
        if let Some((existing, device)) = existing {
            let keep = existing == FileType::Directory && kind == EntryType::Directory;
            if !keep {
                self.parent = None;
                opaque = existing == FileType::CharacterDevice && device == 0;
                remove(parent, &name).map_err(|e| failed(entry, e))?;
            }
        }
        match kind {
            EntryType::Directory => {
                match rustix::fs::mkdirat(parent, &*name, Mode::RWXU) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(e) => return Err(failed(entry, e)),
                }
                if opaque {
                    // A whiteout of the same layer: what lies below must not shine through.
                    let dir = rustix::fs::openat(parent, &*name, DIRECTORY, Mode::empty());
                    dir.and_then(|dir| rustix::fs::fsetxattr(dir, OPAQUE, b"y", XattrFlags::empty()))
                        .map_err(|e| failed(entry, e))?;
                }
                self.directory_attributes(&path, attributes)
                    .map_err(|e| failed(entry, e))
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                self.regular(parent, &name, entry, &attributes)
            }
            EntryType::Link => {
                let target = entry
                    .link_name_bytes()
                    .ok_or_else(|| refused(entry, "a hard link to nothing"))?;
                let target =
                    clean(&target).map_err(|why| refused(entry, format!("hard link target: {why}")))?;
                let Some(target_name) = target.file_name() else {
                    return Err(refused(entry, "a hard link to the root"));
                };
                let target_parent = open_in(
                    self.root,
                    target.parent().unwrap_or(Path::new("")),
                    OFlags::PATH | OFlags::DIRECTORY,
                )
                .map_err(|e| failed(entry, e))?;
                rustix::fs::linkat(&target_parent, target_name, parent, &*name, AtFlags::empty())
                    .map_err(|e| failed(entry, e))
            }
            EntryType::Symlink => {
                let target = entry
                    .link_name_bytes()
                    .ok_or_else(|| refused(entry, "a symbolic link to nothing"))?;
                // The target is stored as it is: it means something only inside the container.
                rustix::fs::symlinkat(OsStr::from_bytes(&target), parent, &*name)
                    .map_err(|e| failed(entry, e))?;
                set_attributes(parent, &name, &attributes, true).map_err(|e| failed(entry, e))
            }
            EntryType::Char | EntryType::Block | EntryType::Fifo => {
                let (file_type, device) = match kind {
                    EntryType::Fifo => (FileType::Fifo, 0),
                    _ => {
                        let header = entry.header();
                        let numbers = (header.device_major(), header.device_minor());
                        let (Ok(Some(major)), Ok(Some(minor))) = numbers else {
                            return Err(refused(entry, "a device without numbers"));
                        };
                        let kind = if kind == EntryType::Char {
                            FileType::CharacterDevice
                        } else {
                            FileType::BlockDevice
                        };
                        (kind, rustix::fs::makedev(major, minor))
                    }
                };
                rustix::fs::mknodat(parent, &*name, file_type, Mode::RUSR | Mode::WUSR, device)
                    .map_err(|e| failed(entry, e))?;
                set_attributes(parent, &name, &attributes, false).map_err(|e| failed(entry, e))
            }
            other => Err(refused(
                entry,
                format!("unknown type {:?}", char::from(other.as_byte())),
            )),
        }
    }

    fn regular<R: Read>(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &OsStr,
        entry: &mut tar::Entry<'_, R>,
        attributes: &Attributes,
    ) -> Result<()> {
        let total = self.done.bytes.saturating_add(entry.size());
        if total > self.limits.bytes {
            return Err(refused(
                entry,
                format!("the layer is larger than {} bytes", self.limits.bytes),
            ));
        }
        self.done.bytes = total;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file =
            rustix::fs::openat(parent, name, flags, Mode::RUSR | Mode::WUSR).map_err(|e| failed(entry, e))?;
        let mut file = File::from(file);
        copy_sparse(entry, &mut file).map_err(|e| failed(entry, e))?;
        let apply = || {
            rustix::fs::fchown(&file, Some(attributes.uid), Some(attributes.gid))?;
            // After chown, which clears the set-user-id bits.
            rustix::fs::fchmod(&file, attributes.mode)?;
            set_xattrs(file.as_fd(), &attributes.xattrs)?;
            rustix::fs::futimens(&file, &attributes.times)
        };
        apply().map_err(|e| failed(entry, e))
    }

    fn directory_attributes(&mut self, path: &Path, attributes: Attributes) -> rustix::io::Result<()> {
        let dir = open_in(self.root, path, DIRECTORY)?;
        rustix::fs::fchown(&dir, Some(attributes.uid), Some(attributes.gid))?;
        rustix::fs::fchmod(&dir, attributes.mode)?;
        set_xattrs(dir.as_fd(), &attributes.xattrs)?;
        self.directories.push((path.to_owned(), attributes.times));
        Ok(())
    }

    /// Opens the directory an entry lives in, made if the archive does not list it.
    fn parent(&mut self, path: &Path) -> io::Result<Rc<OwnedFd>> {
        if let Some((known, fd)) = &self.parent
            && known == path
        {
            return Ok(Rc::clone(fd));
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let fd = match open_in(self.root, path, flags) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => {
                let mut sofar = PathBuf::new();
                for component in path.components() {
                    sofar.push(component);
                    match open_in(self.root, &sofar, flags) {
                        Ok(_) => {}
                        Err(Errno::NOENT) => self.implied_directory(&sofar)?,
                        Err(e) => return Err(e.into()),
                    }
                }
                open_in(self.root, path, flags)?
            }
            Err(e) => return Err(e.into()),
        };
        let fd = Rc::new(fd);
        self.parent = Some((path.to_owned(), Rc::clone(&fd)));
        Ok(fd)
    }

    fn implied_directory(&self, path: &Path) -> rustix::io::Result<()> {
        let Some(name) = path.file_name() else {
            return Err(Errno::INVAL);
        };
        let parent = open_in(
            self.root,
            path.parent().unwrap_or(Path::new("")),
            OFlags::PATH | OFlags::DIRECTORY,
        )?;
        rustix::fs::mkdirat(&parent, name, Mode::RWXU)?;
        let below = self.parents.iter().find_map(|layer| {
            let dir = open_in(layer, path, OFlags::PATH | OFlags::DIRECTORY).ok()?;
            rustix::fs::fstat(dir).ok()
        });
        let (uid, gid, mode) = match below {
            Some(stat) => (
                stat.st_uid,
                stat.st_gid,
                Mode::from_raw_mode(stat.st_mode & 0o7777),
            ),
            None => (0, 0, Mode::from_raw_mode(0o755)),
        };
        let dir = rustix::fs::openat(&parent, name, DIRECTORY, Mode::empty())?;
        rustix::fs::fchown(&dir, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
        rustix::fs::fchmod(&dir, mode)
    }

    fn whiteout(&mut self, parent: BorrowedFd<'_>, hidden: &OsStr) -> io::Result<()> {
        match hidden.as_bytes() {
            b".wh..opq" => return Ok(set_opaque(parent)?),
            // Other names of this kind are AUFS' own bookkeeping.
            name if name.starts_with(b".wh.") => return Ok(()),
            b"" | b"." | b".." => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "a whiteout of nothing",
                ));
            }
            _ => {}
        }
        match kind_of(parent, hidden)? {
            // A whiteout hides what the layers below have; what this layer itself brings stays.
            Some((FileType::Directory, _)) => {
                let dir = rustix::fs::openat(
                    parent,
                    hidden,
                    OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                    Mode::empty(),
                )?;
                Ok(set_opaque(dir.as_fd())?)
            }
            Some(_) => Ok(()),
            None => Ok(rustix::fs::mknodat(
                parent,
                hidden,
                FileType::CharacterDevice,
                Mode::empty(),
                0,
            )?),
        }
    }

    fn finish(self) -> Result<Unpacked> {
        for (path, times) in self.directories.iter().rev() {
            // Gone or replaced by a later entry: nothing to set.
            if let Ok(dir) = open_in(self.root, path, DIRECTORY) {
                let set = rustix::fs::futimens(&dir, times);
                set.map_err(|e| Error::EntryIo {
                    entry: path.display().to_string(),
                    source: e.into(),
                })?;
            }
        }
        Ok(self.done)
    }
}

fn set_opaque(dir: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let dir = rustix::fs::openat(dir, ".", DIRECTORY, Mode::empty())?;
    rustix::fs::fsetxattr(dir, OPAQUE, b"y", XattrFlags::empty())
}

/// The path of an entry without `.` and leading `/`.
fn clean(bytes: &[u8]) -> std::result::Result<PathBuf, &'static str> {
    if bytes.len() > 4096 {
        return Err("a path longer than 4096 bytes");
    }
    if bytes.contains(&0) {
        return Err("a path with a zero byte");
    }
    let mut path = PathBuf::new();
    let mut depth = 0_usize;
    for component in Path::new(OsStr::from_bytes(bytes)).components() {
        match component {
            Component::Normal(name) if name.len() > 255 => return Err("a name longer than 255 bytes"),
            Component::Normal(name) => path.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return Err("a path with \"..\" leaves the layer"),
        }
        depth = depth.saturating_add(1);
        if depth > MAX_DEPTH {
            return Err("a path nested too deeply");
        }
    }
    Ok(path)
}

fn kind_of(parent: BorrowedFd<'_>, name: &OsStr) -> rustix::io::Result<Option<(FileType, u64)>> {
    match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some((FileType::from_raw_mode(stat.st_mode), stat.st_rdev))),
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Removes a file or a whole tree, by descriptor, never following a link.
pub(crate) fn remove(parent: BorrowedFd<'_>, name: &OsStr) -> io::Result<()> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(e) => return Err(e.into()),
    }
    // Not recursive in our own frames: a hostile tree may be deep. Each turn goes down or deletes.
    let mut stack = vec![(
        rustix::fs::openat(parent, name, DIRECTORY, Mode::empty())?,
        name.to_owned(),
    )];
    while let Some((dir, _)) = stack.last() {
        let mut deeper = None;
        let listing = rustix::fs::Dir::read_from(dir)?;
        for child in listing {
            let child = child?;
            let child_name = OsStr::from_bytes(child.file_name().to_bytes());
            if matches!(child_name.as_bytes(), b"." | b"..") {
                continue;
            }
            match rustix::fs::unlinkat(dir, child_name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(Errno::ISDIR | Errno::PERM) => {
                    match rustix::fs::unlinkat(dir, child_name, AtFlags::REMOVEDIR) {
                        Ok(()) => {}
                        Err(Errno::NOTEMPTY | Errno::EXIST) => {
                            let fd = rustix::fs::openat(dir, child_name, DIRECTORY, Mode::empty())?;
                            deeper = Some((fd, child_name.to_owned()));
                            break;
                        }
                        Err(e) => return Err(e.into()),
                    }
                }
                Err(e) => return Err(e.into()),
            }
        }
        if let Some(next) = deeper {
            if stack.len() > 4 * MAX_DEPTH {
                return Err(io::Error::other("directories nested too deeply"));
            }
            stack.push(next);
            continue;
        }
        let Some((_, done)) = stack.pop() else { break };
        let above = stack.last().map_or(parent, |(fd, _)| fd.as_fd());
        rustix::fs::unlinkat(above, &*done, AtFlags::REMOVEDIR)?;
    }
    Ok(())
}

/// Removes a tree by path, as [`remove`] does; an absent one is fine.
pub(crate) fn remove_tree(path: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a removable path",
        ));
    };
    match rustix::fs::openat(
        CWD,
        parent,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    ) {
        Ok(parent) => remove(parent.as_fd(), name),
        Err(Errno::NOENT) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

fn attributes<R: Read>(entry: &mut tar::Entry<'_, R>) -> Result<Attributes> {
    let header = entry.header();
    // An empty field is 0 to every other reader of archives.
    let empty = |field: &[u8]| field.iter().all(|b| matches!(b, 0 | b' '));
    let old = header.as_old();
    let id = |value: io::Result<u64>, what: &str| -> Result<u32> {
        let value = value.map_err(|e| failed(entry, e))?;
        // -1 means "leave as it is" to chown.
        u32::try_from(value)
            .ok()
            .filter(|id| *id != u32::MAX)
            .ok_or_else(|| refused(entry, format!("{what} {value} is too large")))
    };
    let mut uid = if empty(&old.uid) {
        0
    } else {
        id(header.uid(), "uid")?
    };
    let mut gid = if empty(&old.gid) {
        0
    } else {
        id(header.gid(), "gid")?
    };
    let mode = if empty(&old.mode) {
        0
    } else {
        header.mode().map_err(|e| failed(entry, e))?
    };
    let mut mtime = Timespec {
        tv_sec: i64::try_from(header.mtime().unwrap_or(0)).unwrap_or(0),
        tv_nsec: 0,
    };
    let mut xattrs = Vec::new();
    let mut too_large = None;
    if let Some(records) = entry.pax_extensions().ok().flatten() {
        for record in records {
            let Ok(record) = record else { continue };
            let value = record.value_bytes();
            match record.key() {
                Ok("uid" | "gid") => {
                    let number = record
                        .value()
                        .ok()
                        .and_then(|text| text.parse::<u32>().ok())
                        .filter(|id| *id != u32::MAX);
                    match number {
                        Some(id) if record.key() == Ok("uid") => uid = id,
                        Some(id) => gid = id,
                        None => too_large = Some("an owner that is no 32-bit number"),
                    }
                }
                Ok("mtime") => {
                    if let Some(time) = record.value().ok().and_then(parse_time) {
                        mtime = time;
                    }
                }
                Ok(key) => {
                    let encoded = key.strip_prefix(ENCODED_XATTR);
                    if let Some(name) = encoded.or_else(|| key.strip_prefix(XATTR)) {
                        if !xattr_allowed(name) {
                            continue;
                        }
                        let decoded;
                        let value = match encoded {
                            None => value,
                            Some(_) => {
                                let Ok(bytes) = BASE64_STANDARD.decode(value) else {
                                    continue;
                                };
                                decoded = bytes;
                                &decoded[..]
                            }
                        };
                        if value.len() > 65536 || name.len() > 255 || xattrs.len() >= 128 {
                            too_large = Some("extended attributes beyond what Linux stores");
                            continue;
                        }
                        xattrs.push((name.as_bytes().to_vec(), value.to_vec()));
                    }
                }
                Err(_) => {}
            }
        }
    }
    if let Some(why) = too_large {
        return Err(refused(entry, why));
    }
    Ok(Attributes {
        uid: Uid::from_raw(uid),
        gid: Gid::from_raw(gid),
        mode: Mode::from_raw_mode(mode & 0o7777),
        times: Timestamps {
            last_access: mtime,
            last_modification: mtime,
        },
        xattrs,
    })
}

/// Capabilities and the users' own attributes; nothing that steers the host's file systems or security modules.
pub(super) fn xattr_allowed(name: &str) -> bool {
    name == "security.capability" || (name.starts_with("user.") && !name.starts_with("user.overlay."))
}

/// A PAX time: decimal seconds with an optional fraction and sign.
fn parse_time(text: &str) -> Option<Timespec> {
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let mut tv_sec: i64 = seconds.parse().ok()?;
    let digits: String = fraction.chars().take(9).collect();
    if !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let mut tv_nsec: i64 = format!("{digits:0<9}").parse().ok()?;
    if seconds.starts_with('-') && tv_nsec > 0 {
        tv_sec = tv_sec.checked_sub(1)?;
        tv_nsec = 1_000_000_000_i64.checked_sub(tv_nsec)?;
    }
    Some(Timespec { tv_sec, tv_nsec })
}

fn set_xattrs(fd: BorrowedFd<'_>, xattrs: &[(Vec<u8>, Vec<u8>)]) -> rustix::io::Result<()> {
    for (name, value) in xattrs {
        match rustix::fs::fsetxattr(fd, &name[..], value, XattrFlags::empty()) {
            // The store's file system keeps no attributes of users (tmpfs of older kernels); capabilities must work.
            Err(Errno::NOTSUP) if name.starts_with(b"user.") => {}
            result => result?,
        }
    }
    Ok(())
}

fn set_attributes(
    parent: BorrowedFd<'_>,
    name: &OsStr,
    attributes: &Attributes,
    symlink: bool,
) -> rustix::io::Result<()> {
    rustix::fs::chownat(
        parent,
        name,
        Some(attributes.uid),
        Some(attributes.gid),
        AtFlags::SYMLINK_NOFOLLOW,
    )?;
    if !symlink {
        rustix::fs::chmodat(parent, name, attributes.mode, AtFlags::empty())?;
    }
    rustix::fs::utimensat(parent, name, &attributes.times, AtFlags::SYMLINK_NOFOLLOW)
}

#[cfg(test)]
mod tests;
