// SPDX-License-Identifier: Apache-2.0
//! The image store: a folder that many processes use at once and that no crash leaves half-done.
//!
//! ```text
//! <root>/                      0700: layers hold set-user-id programs that no user of the host may reach
//!   images.json                what is here, replaced by rename
//!   blobs/sha256/<hex>         manifests and configurations, verified
//!   layers/<diff id hex>/fs/   one unpacked layer, shared by every image and pod that uses it, never written again
//!   layers/<diff id hex>/layer.json
//!   tmp/<random>/              work under way; its owner holds a lock on it
//!   locks/{store,index,00..ff} flock files, never removed
//! ```
//!
//! Content appears under its final name only by `rename`, after it was verified and written to disk. A temporary folder
//! whose lock is free belongs to a dead process; the next user of the store removes it. `locks/xx` makes two pulls of one
//! layer do the work once. `locks/store` is held shared by whoever counts on layers that `images.json` does not name
//! yet, and exclusively by the collector, which otherwise lets it be until next time.

use super::digest::{Digest, HashReader};
use super::error::{Context, Error, Result, bad};
use super::unpack::{self, Limits, Unpacked};
use oci_spec::image::ImageConfiguration;
use rustix::fs::{CWD, FlockOperation, Mode, OFlags};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Largest manifest or index that is read, in bytes (the distribution specification's own bound).
pub const MAX_MANIFEST: u64 = 4 << 20;
/// Largest configuration that is read, in bytes.
pub const MAX_CONFIG: u64 = 8 << 20;
/// Most layers of one image: what one overlay mount takes (Linux, `OVL_MAX_STACK`).
pub const MAX_LAYERS: usize = 500;

/// One image of the store.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Image {
    /// Digest of the configuration, which docker calls the image id.
    pub id: Digest,
    /// Digest of the manifest, where the source had one.
    pub manifest: Option<Digest>,
    /// Names, in full (`docker.io/library/busybox:latest`); none for a dangling image.
    pub references: Vec<String>,
    /// Diff ids of the layers, lowest first.
    pub layers: Vec<Digest>,
    /// Bytes in the unpacked layers.
    pub size: u64,
    /// From the configuration, RFC 3339.
    pub created: Option<String>,
}

#[derive(Default, serde::Serialize, serde::Deserialize)]
struct Index {
    images: Vec<Image>,
}

/// A store in a folder.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
}

/// Keeps the collector away while it lives.
#[derive(Debug)]
pub struct Hold {
    _lock: File,
}

/// A temporary folder, removed when dropped and by anybody after its owner's death.
#[derive(Debug)]
pub(crate) struct Temp {
    path: PathBuf,
    _lock: OwnedFd,
}

impl Temp {
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        if let Err(error) = unpack::remove_tree(&self.path) {
            log::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

impl Store {
    /// Opens the store in `root`, made if absent, and removes what dead processes left there.
    ///
    /// # Errors
    /// The folder cannot be made or written.
    pub fn open(root: &Path) -> Result<Self> {
        for folder in ["", "blobs", "blobs/sha256", "layers", "tmp", "locks"] {
            let path = root.join(folder);
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&path)
                .at("create", &path)?;
        }
        let store = Self {
            root: root.to_owned(),
        };
        store.sweep()?;
        Ok(store)
    }

    /// The folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn lock(&self, name: &str, operation: FlockOperation) -> Result<Option<File>> {
        let path = self.root.join("locks").join(name);
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .at("open", &path)?;
        loop {
            match rustix::fs::flock(&file, operation) {
                Ok(()) => return Ok(Some(file)),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
                Err(e) => return Err(e).at("lock", &path),
            }
        }
    }

    fn wait_lock(&self, name: &str, operation: FlockOperation) -> Result<File> {
        self.lock(name, operation)?
            .ok_or_else(|| bad(format!("lock {name}"), "not granted"))
    }

    /// Keeps what is in the store from being collected until the hold is dropped.
    ///
    /// # Errors
    /// The lock file cannot be used.
    pub fn hold(&self) -> Result<Hold> {
        Ok(Hold {
            _lock: self.wait_lock("store", FlockOperation::LockShared)?,
        })
    }

    /// Removes the temporary folders of dead processes.
    fn sweep(&self) -> Result<()> {
        let tmp = self.root.join("tmp");
        for entry in fs::read_dir(&tmp).at("list", &tmp)? {
            let path = entry.at("list", &tmp)?.path();
            // Its owner holds the lock from before the folder gets a name here.
            let Ok(dir) = open_dir(&path) else { continue };
            if rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive).is_ok() {
                unpack::remove_tree(&path).at("remove", &path)?;
            }
        }
        Ok(())
    }

    pub(crate) fn temp(&self) -> Result<Temp> {
        loop {
            let path = self.root.join("tmp").join(crate::ids::random_hex(8));
            match fs::DirBuilder::new().mode(0o700).create(&path) {
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => continue,
                made => made.at("create", &path)?,
            }
            // Between mkdir and flock a sweeper may take it for a dead one; then it is gone, and we try again.
            let Ok(lock) = open_dir(&path) else { continue };
            if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() && path.exists() {
                return Ok(Temp { path, _lock: lock });
            }
        }
    }

    fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs/sha256").join(digest.hex())
    }

    fn layer_path(&self, diff_id: &Digest) -> PathBuf {
        self.root.join("layers").join(diff_id.hex())
    }

    /// Stores a small blob whose digest was checked.
    pub(crate) fn put_blob(&self, digest: &Digest, bytes: &[u8]) -> Result<()> {
        let path = self.blob_path(digest);
        if path.exists() {
            return Ok(());
        }
        let temp = self.temp()?;
        let new = temp.path().join("blob");
        let mut file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&new)
            .at("create", &new)?;
        file.write_all(bytes).at("write", &new)?;
        file.sync_all().at("write", &new)?;
        fs::rename(&new, &path).at("create", &path)?;
        sync_dir(&self.root.join("blobs/sha256"))
    }

    /// Reads a blob and checks it once more: a disk may fail.
    pub(crate) fn blob(&self, digest: &Digest) -> Result<Vec<u8>> {
        let path = self.blob_path(digest);
        let file = File::open(&path).at("open", &path)?;
        let mut bytes = Vec::new();
        file.take(MAX_CONFIG).read_to_end(&mut bytes).at("read", &path)?;
        let actual = Digest::of(&bytes);
        if actual != *digest {
            return Err(Error::Digest {
                what: path.display().to_string(),
                expected: digest.to_string(),
                actual: actual.to_string(),
            });
        }
        Ok(bytes)
    }

    /// The configuration of an image.
    ///
    /// # Errors
    /// The blob is missing or damaged.
    pub fn config(&self, image: &Image) -> Result<ImageConfiguration> {
        parse_config(&image.id.to_string(), &self.blob(&image.id)?)
    }

    /// Whether the layer is unpacked.
    pub(crate) fn has_layer(&self, diff_id: &Digest) -> bool {
        self.layer_path(diff_id).exists()
    }

    /// Unpacks a layer unless it is here. `open` gives the blob as it came, `blob` is its digest, `below` the diff ids of
    /// the layers below it, lowest first.
    pub(crate) fn ensure_layer(
        &self,
        diff_id: &Digest,
        blob: Option<&Digest>,
        below: &[Digest],
        open: impl FnOnce() -> Result<Box<dyn Read>>,
    ) -> Result<Unpacked> {
        let _lock = self.wait_lock(diff_id.bucket(), FlockOperation::LockExclusive)?;
        let path = self.layer_path(diff_id);
        if path.exists() {
            return self.layer_facts(diff_id);
        }
        let mut parents = Vec::new();
        for parent in below.iter().rev() {
            let parent = self.layer_path(parent).join("fs");
            parents.push(open_dir(&parent).at("open", &parent)?);
        }
        let temp = self.temp()?;
        let new = temp.path().join("layer");
        let root = new.join("fs");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&root)
            .at("create", &root)?;
        fs::set_permissions(&root, std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .at("create", &root)?;
        let root_fd = open_dir(&root).at("open", &root)?;

        let what = format!("layer {}", diff_id.short());
        let mut compressed = HashReader::new(open()?);
        let mut plain = HashReader::new(decompress(&mut compressed, &what)?);
        let unpacked = unpack::unpack(&mut plain, root_fd.as_fd(), &parents, Limits::default())
            .and_then(|facts| plain.verify(&what, diff_id).map(|_| facts));
        // A damaged blob is the better explanation of whatever went wrong in it.
        if let Some(blob) = blob {
            compressed.verify(&format!("blob of {what}"), blob)?;
        }
        let facts = unpacked?;

        let facts_path = new.join("layer.json");
        fs::write(&facts_path, serde_json::to_vec(&facts).unwrap_or_default()).at("write", &facts_path)?;
        rustix::fs::syncfs(&root_fd).at("write", &root)?;
        fs::rename(&new, &path).at("create", &path)?;
        sync_dir(&self.root.join("layers"))?;
        Ok(facts)
    }

    fn layer_facts(&self, diff_id: &Digest) -> Result<Unpacked> {
        let path = self.layer_path(diff_id).join("layer.json");
        let bytes = fs::read(&path).at("read", &path)?;
        serde_json::from_slice(&bytes).map_err(|e| bad(path.display().to_string(), e.to_string()))
    }

    /// The root folders of an image's layers, lowest first.
    ///
    /// # Errors
    /// A layer is missing.
    pub fn layer_roots(&self, layers: &[Digest]) -> Result<Vec<OwnedFd>> {
        let open = |layer: &Digest| {
            let path = self.layer_path(layer).join("fs");
            open_dir(&path).at("open", &path)
        };
        layers.iter().map(open).collect()
    }

    fn read_index(&self) -> Result<Index> {
        let path = self.root.join("images.json");
        match fs::read(&path) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map_err(|e| bad(path.display().to_string(), e.to_string()))
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Index::default()),
            Err(e) => Err(e).at("read", &path),
        }
    }

    fn write_index(&self, index: &Index) -> Result<()> {
        let path = self.root.join("images.json");
        let bytes = serde_json::to_vec_pretty(index).map_err(|e| bad("images.json", e.to_string()))?;
        crate::files::replace(&path, &bytes).at("write", &path)
    }

    /// All images.
    ///
    /// # Errors
    /// `images.json` cannot be read.
    pub fn images(&self) -> Result<Vec<Image>> {
        Ok(self.read_index()?.images)
    }

    /// Records an image; names it has now are taken from the image that had them, as docker does.
    pub(crate) fn record(&self, mut image: Image) -> Result<Image> {
        let _lock = self.wait_lock("index", FlockOperation::LockExclusive)?;
        let mut index = self.read_index()?;
        for other in &mut index.images {
            other.references.retain(|name| !image.references.contains(name));
        }
        if let Some(position) = index.images.iter().position(|other| other.id == image.id) {
            let old = index.images.remove(position);
            for name in old.references {
                image.references.push(name);
            }
            image.manifest = image.manifest.or(old.manifest);
        }
        index.images.insert(0, image.clone());
        self.write_index(&index)?;
        Ok(image)
    }

    /// Finds an image by name (as docker abbreviates names), id or unambiguous prefix of an id.
    ///
    /// # Errors
    /// Nothing of that name, or several.
    pub fn find(&self, name: &str) -> Result<Image> {
        let images = self.images()?;
        if let Ok(full) = super::reference::normalize(name)
            && let Some(image) = images.iter().find(|image| image.references.contains(&full))
        {
            return Ok(image.clone());
        }
        let hex = name.strip_prefix("sha256:").unwrap_or(name);
        if hex.len() < 3 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(Error::NotFound(name.to_owned()));
        }
        let mut matches = images.into_iter().filter(|image| {
            image.id.hex().starts_with(hex) || image.manifest.as_ref().is_some_and(|m| m.hex() == hex)
        });
        match (matches.next(), matches.next()) {
            (Some(image), None) => Ok(image),
            (Some(_), Some(_)) => Err(bad(
                name,
                "more than one image id starts like this; give more digits",
            )),
            (None, _) => Err(Error::NotFound(name.to_owned())),
        }
    }

    /// Removes a name, and the image with its last name. `user` tells which container needs an image. Returns what
    /// happened, in docker's words (`Untagged: …`, `Deleted: …`).
    ///
    /// # Errors
    /// Unknown, or needed by a container and not `force`.
    pub fn remove(
        &self,
        name: &str,
        force: bool,
        user: &dyn Fn(&Image) -> Option<String>,
    ) -> Result<Vec<String>> {
        let mut told = Vec::new();
        {
            let _lock = self.wait_lock("index", FlockOperation::LockExclusive)?;
            let found = self.find(name)?;
            let mut index = self.read_index()?;
            let Some(image) = index.images.iter_mut().find(|image| image.id == found.id) else {
                return Err(Error::NotFound(name.to_owned()));
            };
            let by_name = super::reference::normalize(name)
                .ok()
                .filter(|full| image.references.contains(full));
            if by_name.is_none() && image.references.len() > 1 && !force {
                return Err(bad(
                    name,
                    "the image has several names; remove each of them, or use --force",
                ));
            }
            let last = by_name.is_none() || image.references.len() <= 1;
            if last && let Some(container) = user(image) {
                return Err(Error::InUse {
                    image: name.to_owned(),
                    container,
                });
            }
            for reference in &image.references {
                if by_name.as_ref().is_none_or(|name| name == reference) {
                    told.push(format!("Untagged: {}", super::reference::familiar(reference)));
                }
            }
            image
                .references
                .retain(|reference| by_name.as_ref().is_some_and(|name| name != reference));
            if last {
                told.push(format!("Deleted: {}", image.id));
                index.images.retain(|image| image.id != found.id);
            }
            self.write_index(&index)?;
        }
        self.collect()?;
        Ok(told)
    }

    /// Removes blobs and layers that no image names. Does nothing while somebody holds the store.
    fn collect(&self) -> Result<()> {
        let Some(_lock) = self.lock("store", FlockOperation::NonBlockingLockExclusive)? else {
            return Ok(());
        };
        let images = self.images()?;
        let layers: BTreeSet<&str> = images
            .iter()
            .flat_map(|image| image.layers.iter().map(Digest::hex))
            .collect();
        let blobs: BTreeSet<&str> = images
            .iter()
            .flat_map(|image| {
                std::iter::once(&image.id)
                    .chain(image.manifest.as_ref())
                    .map(Digest::hex)
            })
            .collect();
        for (folder, keep) in [("layers", layers), ("blobs/sha256", blobs)] {
            let folder = self.root.join(folder);
            for entry in fs::read_dir(&folder).at("list", &folder)? {
                let entry = entry.at("list", &folder)?;
                if entry.file_name().to_str().is_some_and(|name| keep.contains(name)) {
                    continue;
                }
                // Out of sight first, so that a crash midway leaves no half layer under its name.
                let temp = self.temp()?;
                fs::rename(entry.path(), temp.path().join("old")).at("remove", entry.path())?;
            }
        }
        Ok(())
    }
}

pub(crate) fn parse_config(what: &str, bytes: &[u8]) -> Result<ImageConfiguration> {
    serde_json::from_slice(bytes).map_err(|e| bad(what, format!("not an image configuration: {e}")))
}

/// Undoes gzip or zstd, told by the first bytes: media types lie.
fn decompress<'a>(mut reader: impl Read + 'a, what: &str) -> Result<Box<dyn Read + 'a>> {
    let mut magic = [0_u8; 4];
    let mut have = 0;
    while have < magic.len() {
        match reader.read(&mut magic[have..]) {
            Ok(0) => break,
            Ok(n) => have += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(bad(what, format!("cannot be read: {e}"))),
        }
    }
    let head = std::io::Cursor::new(magic[..have].to_vec());
    let reader = head.chain(reader);
    Ok(match magic {
        [0x1f, 0x8b, ..] => Box::new(flate2::read::MultiGzDecoder::new(reader)),
        [0x28, 0xb5, 0x2f, 0xfd] => {
            let mut decoder = zstd::Decoder::new(reader).map_err(|e| bad(what, e.to_string()))?;
            // 128 MiB: what `zstd` itself accepts without being asked.
            decoder.window_log_max(27).map_err(|e| bad(what, e.to_string()))?;
            Box::new(decoder)
        }
        [b'B', b'Z', b'h', _] => return Err(bad(what, "compressed with bzip2, which is not supported")),
        [0xfd, b'7', b'z', b'X'] => return Err(bad(what, "compressed with xz, which is not supported")),
        _ => Box::new(reader),
    })
}

fn open_dir(path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    rustix::fs::openat(CWD, path, flags, Mode::empty())
}

fn sync_dir(path: &Path) -> Result<()> {
    let dir = open_dir(path).at("open", path)?;
    rustix::fs::fsync(dir).at("write", path)
}
