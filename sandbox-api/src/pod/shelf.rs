// SPDX-License-Identifier: Apache-2.0
//! Templates as files, for programs that host one pod each: `<state>/templates/<name>.image`, made by
//! `cloister template build` and used by every `cloister run` of the same kind.
//!
//! The name is a digest of the kind, so what has become stale (another kernel, another agent) is not found any more. On a
//! tmpfs, as the folder of state is, the file's pages are the page cache's and the template's at once, for all pods.
//!
//! Beside it, in `<name>.touched`, is what the first clone has touched until it was up: the next ones have it ready.

use super::template::Kind;
use crate::image::hex;
use cloister_vmm::CellHost;
use cloister_vmm::image::{Image, WorkingSet};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const EXTENSION: &str = "image";
const TOUCHED: &str = "touched";

/// The folder of templates.
#[derive(Clone, Debug)]
pub struct Shelf {
    dir: PathBuf,
}

/// A template on the shelf.
#[derive(Debug)]
pub struct Shelved {
    /// What it is called.
    pub name: String,
    /// What it holds, or why it is of no use.
    pub image: Result<Arc<Image>, cloister_vmm::image::ImageError>,
}

impl Shelf {
    /// The shelf in this folder of state, whether it is there or not.
    pub fn of(state: &Path) -> Self {
        Self {
            dir: state.join("templates"),
        }
    }

    /// What a template of this kind is called.
    pub fn name(kind: &Kind) -> String {
        let version = env!("CARGO_PKG_VERSION");
        let digest = Sha256::digest(format!("{version} {kind:?}"));
        hex(&digest[..8])
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name).with_extension(EXTENSION)
    }

    fn open(path: &Path) -> io::Result<File> {
        File::options()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)
    }

    /// The template of this kind, if there is one that this host can clone.
    pub fn find(&self, kind: &Kind, cells: &CellHost) -> Option<Arc<Image>> {
        let file = Self::open(&self.path(&Self::name(kind))).ok()?;
        let usable = Image::open(file)
            .map_err(|error| crate::error::chain(&error))
            .and_then(|image| match cells.can_run(&image) {
                Ok(()) => Ok(image),
                Err(error) => Err(crate::error::chain(&error)),
            });
        let image = usable
            .inspect_err(|error| log::warn!("this pod boots: its template is of no use: {error}"))
            .ok()?;
        // One of a template that was here before is passed over, and replaced.
        if let Ok(set) = WorkingSet::load(&self.touched(kind)) {
            image.expect(set);
        }
        Some(image)
    }

    fn touched(&self, kind: &Kind) -> PathBuf {
        self.path(&Self::name(kind)).with_extension(TOUCHED)
    }

    /// Notes what the first clone of a template has touched.
    pub fn note(&self, kind: &Kind, set: &WorkingSet) {
        if let Err(error) = set.store(&self.touched(kind)) {
            log::warn!(
                "later clones start as slowly as this one: {}",
                crate::error::chain(&error)
            );
        }
    }

    /// Puts a template here.
    ///
    /// # Errors
    /// As of the system calls for files.
    pub fn put(&self, kind: &Kind, image: &Image) -> io::Result<String> {
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(&self.dir)?;
        let name = Self::name(kind);
        image.copy_to(&self.path(&name)).map_err(io::Error::other)?;
        Ok(name)
    }

    /// All that there are.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn all(&self) -> io::Result<Vec<Shelved>> {
        let entries = match std::fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut all = Vec::new();
        for entry in entries {
            let path = entry?.path();
            let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
            let (Some(name), true) = (stem, path.extension().is_some_and(|e| e == EXTENSION)) else {
                continue;
            };
            let failed = |source| cloister_vmm::image::ImageError::Io { what: "open", source };
            let image = Self::open(&path).map_err(failed).and_then(Image::open);
            all.push(Shelved { name, image });
        }
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    /// Takes one away. Its clones live on.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(io::ErrorKind::NotFound.into());
        }
        std::fs::remove_file(self.path(name))?;
        match std::fs::remove_file(self.path(name).with_extension(TOUCHED)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}
