// SPDX-License-Identifier: Apache-2.0
//! Blobs of an OCI layout folder, or of an archive of one, or of `docker save`.
//!
//! An archive is indexed in one pass and its members are then read where they lie; a compressed one is first written to
//! a temporary file of the store. Members are found by their names in that index only: nothing is unpacked.

use super::digest::Digest;
use super::error::{Context, Error, Result, bad};
use super::store::{Store, Temp};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// Most members of an archive that are looked at.
const MAX_MEMBERS: usize = 100_000;

/// Files by name, of a folder or an archive.
pub(crate) enum Files {
    Folder(PathBuf),
    Archive {
        path: PathBuf,
        file: Arc<File>,
        members: HashMap<PathBuf, Member>,
        _temp: Option<Temp>,
    },
}

pub(crate) enum Member {
    Data { offset: u64, len: u64 },
    Link(PathBuf),
}

/// The plain archive of one that cannot be read where it lies: one that is compressed, or comes from a pipe.
fn to_copy(file: &mut File) -> io::Result<Option<Box<dyn Read>>> {
    let mut head = Vec::new();
    file.by_ref().take(4).read_to_end(&mut head)?;
    let is_pipe = file.seek(SeekFrom::Start(0)).is_err();
    let gone = if is_pipe { head.clone() } else { Vec::new() };
    let whole = io::Cursor::new(gone).chain(file.try_clone()?);
    Ok(match head.as_slice() {
        [0x1f, 0x8b, ..] => Some(Box::new(flate2::read::MultiGzDecoder::new(whole))),
        [0x28, 0xb5, 0x2f, 0xfd] => Some(Box::new(zstd::Decoder::new(whole)?)),
        _ if is_pipe => Some(Box::new(whole)),
        _ => None,
    })
}

impl Files {
    pub fn folder(dir: &Path) -> Self {
        Self::Folder(dir.to_owned())
    }

    pub fn archive(store: &Store, path: &Path) -> Result<Self> {
        let mut file = File::open(path).at("open", path)?;
        let mut temp = None;
        if let Some(plain) = to_copy(&mut file).at("read", path)? {
            let folder = store.temp()?;
            let copy = folder.path().join("archive.tar");
            let mut out = File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .open(&copy)
                .at("create", &copy)?;
            // A bomb ends at a size no archive of images has.
            let copied = io::copy(&mut plain.take(512 << 30), &mut out);
            copied.map_err(|e| bad(path.display().to_string(), format!("cannot be unpacked: {e}")))?;
            out.seek(SeekFrom::Start(0)).at("read", &copy)?;
            file = out;
            temp = Some(folder);
        }
        let mut members = HashMap::new();
        let not_tar = |e: io::Error| bad(path.display().to_string(), format!("not an image archive: {e}"));
        {
            let mut archive = tar::Archive::new(&file);
            for entry in archive.entries_with_seek().map_err(not_tar)? {
                let entry = entry.map_err(not_tar)?;
                if members.len() >= MAX_MEMBERS {
                    return Err(bad(
                        path.display().to_string(),
                        "too many files for an image archive",
                    ));
                }
                let Some(name) = plain_path(&entry.path().map_err(not_tar)?) else {
                    continue;
                };
                let member = match entry.header().entry_type() {
                    tar::EntryType::Regular | tar::EntryType::Continuous => Member::Data {
                        offset: entry.raw_file_position(),
                        len: entry.size(),
                    },
                    kind @ (tar::EntryType::Symlink | tar::EntryType::Link) => {
                        let Ok(Some(target)) = entry.link_name() else {
                            continue;
                        };
                        // `docker save` of old links a layer shared by two images: ../<id>/layer.tar
                        let target = match kind {
                            tar::EntryType::Symlink => name.parent().unwrap_or(Path::new("")).join(&target),
                            _ => target.into_owned(),
                        };
                        match plain_path(&target) {
                            Some(target) => Member::Link(target),
                            None => continue,
                        }
                    }
                    _ => continue,
                };
                members.insert(name, member);
            }
        }
        Ok(Self::Archive {
            path: path.to_owned(),
            file: Arc::new(file),
            members,
            _temp: temp,
        })
    }

    /// The folder or archive, for messages.
    pub fn describe(&self) -> String {
        match self {
            Self::Folder(path) | Self::Archive { path, .. } => path.display().to_string(),
        }
    }

    /// Opens a file; None if there is none of that name.
    pub fn open(&self, name: &Path) -> Result<Option<Box<dyn Read>>> {
        match self {
            Self::Folder(dir) => {
                let Some(name) = plain_path(name) else {
                    return Err(bad(name.display().to_string(), "leaves the image's folder"));
                };
                let path = dir.join(name);
                match File::open(&path) {
                    Ok(file) => Ok(Some(Box::new(file))),
                    Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
                    Err(e) => Err(e).at("open", &path),
                }
            }
            Self::Archive { file, members, .. } => {
                let mut name = plain_path(name);
                for _ in 0..8 {
                    match name.as_ref().and_then(|name| members.get(name)) {
                        Some(Member::Data { offset, len }) => {
                            let region = Region {
                                file: Arc::clone(file),
                                at: *offset,
                                left: *len,
                            };
                            return Ok(Some(Box::new(region)));
                        }
                        Some(Member::Link(target)) => name = Some(target.clone()),
                        None => return Ok(None),
                    }
                }
                Ok(None)
            }
        }
    }

    /// Reads a small file.
    pub fn read(&self, name: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
        let Some(reader) = self.open(name)? else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        reader
            .take(limit.saturating_add(1))
            .read_to_end(&mut bytes)
            .at("read", name)?;
        if bytes.len() as u64 > limit {
            return Err(bad(
                name.display().to_string(),
                format!("larger than {limit} bytes"),
            ));
        }
        Ok(Some(bytes))
    }

    /// Opens a blob of an OCI layout.
    pub fn open_blob(&self, digest: &Digest) -> Result<Box<dyn Read>> {
        self.open(&blob_name(digest))?.ok_or_else(|| self.missing(digest))
    }

    /// Reads and checks a small blob of an OCI layout.
    pub fn read_blob(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>> {
        let bytes = self
            .read(&blob_name(digest), limit)?
            .ok_or_else(|| self.missing(digest))?;
        let actual = Digest::of(&bytes);
        if actual != *digest {
            return Err(Error::Digest {
                what: format!("a blob of {}", self.describe()),
                expected: digest.to_string(),
                actual: actual.to_string(),
            });
        }
        Ok(bytes)
    }

    fn missing(&self, digest: &Digest) -> Error {
        bad(
            self.describe(),
            format!("blob {digest} is missing: the image is incomplete"),
        )
    }
}

fn blob_name(digest: &Digest) -> PathBuf {
    Path::new("blobs/sha256").join(digest.hex())
}

/// A relative path without `.`, its `..` resolved; None if it leaves the archive.
fn plain_path(path: &Path) -> Option<PathBuf> {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => plain.push(name),
            Component::CurDir => {}
            Component::ParentDir => {
                if !plain.pop() {
                    return None;
                }
            }
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(plain)
}

/// A part of a file, read without moving the file's own position.
struct Region {
    file: Arc<File>,
    at: u64,
    left: u64,
}

impl Read for Region {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = buf.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let n = self.file.read_at(&mut buf[..len], self.at)?;
        if n == 0 && len > 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the archive ends too early",
            ));
        }
        self.at = self.at.saturating_add(n as u64);
        self.left = self.left.saturating_sub(n as u64);
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_inside() {
        assert_eq!(plain_path(Path::new("./a/../b")), Some("b".into()));
        assert_eq!(plain_path(Path::new("a/../../b")), None);
        assert_eq!(plain_path(Path::new("/a")), None);
    }

    #[test]
    fn an_archive_from_a_pipe_is_unpacked() {
        use std::io::Write;
        let tar = [b"ustar ".repeat(20_000), b"end".to_vec()].concat();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&tar).unwrap();
        let zstd = zstd::encode_all(tar.as_slice(), 1).unwrap();
        for sent in [tar.clone(), gzip.finish().unwrap(), zstd] {
            let (from, mut to) = io::pipe().unwrap();
            let writer = std::thread::spawn(move || to.write_all(&sent).unwrap());
            let mut file = File::from(std::os::fd::OwnedFd::from(from));
            let mut got = Vec::new();
            to_copy(&mut file)
                .unwrap()
                .unwrap()
                .read_to_end(&mut got)
                .unwrap();
            assert!(got == tar);
            writer.join().unwrap();
        }
    }
}
