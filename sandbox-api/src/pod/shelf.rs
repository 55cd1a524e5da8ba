// SPDX-License-Identifier: Apache-2.0
//! Templates as files, for programs that host one pod each: `<state>/templates/<name>.image`, made by
//! `cloister template build` and used by every `cloister run` of the same kind.
//!
//! The name is a digest of the kind, so what has become stale (another kernel, another agent) is not found any more. On a
//! tmpfs, as the folder of state is, the file's pages are the page cache's and the template's at once, for all pods.
//!
//! Beside it, in `<name>.touched`, is what the first clone has touched until it was up: the next ones have it ready.
//!
//! And in `<name>.kind` is what it is a template of: a larger VM can be cloned from it, too, and grow.
//!
//! A daemon keeps a shelf for its workers, in `<state>/worker-templates`: one of them that has to boot a pod puts the kind there,
//! in `<name>.wish`, and the daemon the template. So a template's memory is there once, and is charged to the daemon.

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
const KIND: &str = "kind";
const WISH: &str = "wish";

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

    /// The one that a daemon with this folder of state keeps for its workers.
    pub fn of_workers(state: &Path) -> Self {
        Self {
            dir: state.join("worker-templates"),
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

    fn make_folder(&self) -> io::Result<()> {
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(&self.dir)
    }

    fn wish_for(&self, kind: &Kind) -> PathBuf {
        self.path(&Self::name(kind)).with_extension(WISH)
    }

    /// Asks who keeps the shelf for a template of this kind.
    ///
    /// # Errors
    /// As of the system calls for files.
    pub fn wish(&self, kind: &Kind) -> io::Result<()> {
        self.make_folder()?;
        crate::files::replace(&self.wish_for(kind), &serde_json::to_vec(kind)?)
    }

    /// What is asked for, each once: who takes it has to see to it. What cannot be read is removed, too.
    pub fn take_wishes(&self) -> Vec<Kind> {
        self.with_extension(WISH)
            .filter_map(|path| {
                let wish = std::fs::read(&path);
                let _ = std::fs::remove_file(&path);
                serde_json::from_slice(&wish.ok()?).ok()
            })
            .collect()
    }

    /// Removes the oldest templates, so that there are no more than `most`.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn keep(&self, most: usize) -> io::Result<()> {
        let mut all = Vec::new();
        for entry in std::fs::read_dir(&self.dir)? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == EXTENSION) {
                all.push((std::fs::metadata(&path)?.modified()?, path));
            }
        }
        all.sort();
        let excess = all.len().saturating_sub(most);
        for (_, path) in all.drain(..excess) {
            remove_with_notes(&path)?;
        }
        Ok(())
    }

    /// Removes all.
    ///
    /// # Errors
    /// The folder cannot be removed.
    pub fn clear(&self) -> io::Result<()> {
        match std::fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Puts a template here.
    ///
    /// # Errors
    /// As of the system calls for files.
    pub fn put(&self, kind: &Kind, image: &Image) -> io::Result<String> {
        self.make_folder()?;
        let name = Self::name(kind);
        let path = self.path(&name);
        image.copy_to(&path).map_err(io::Error::other)?;
        crate::files::replace(&path.with_extension(KIND), &serde_json::to_vec(kind)?)?;
        Ok(name)
    }

    /// What there are templates of.
    pub fn kinds(&self) -> Vec<Kind> {
        let read = |path: PathBuf| serde_json::from_slice(&std::fs::read(path).ok()?).ok();
        self.with_extension(KIND).filter_map(read).collect()
    }

    fn with_extension(&self, extension: &str) -> impl Iterator<Item = PathBuf> {
        let entries = std::fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let paths = entries.map(|entry| entry.path());
        paths.filter(move |path| path.extension().is_some_and(|e| e == extension))
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
        remove_with_notes(&self.path(name))
    }
}

/// What was noted of a template goes with it.
fn remove_with_notes(path: &Path) -> io::Result<()> {
    std::fs::remove_file(path)?;
    for note in [TOUCHED, KIND] {
        match std::fs::remove_file(path.with_extension(note)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn kind(domain: &str) -> Kind {
        serde_json::from_value(json!({
            "domain": domain, "kernel": "/k", "initrd": "/i", "files": [[1, 2, 3, 4, 5], [1, 3, 3, 4, 5]],
            "kernel_args": ["quiet"], "cpus": 1, "memory": 1 << 28, "huge_pages": "No", "dax": null, "cards": [1],
            "room": { "cpus": 2, "memory": 1 << 30, "disks": 0 },
        }))
        .unwrap()
    }

    #[test]
    fn what_is_wished_for_is_taken_once() {
        let state = std::env::temp_dir().join(format!("cloister-shelf-{}", crate::ids::random_hex(4)));
        let shelf = Shelf::of_workers(&state);
        assert!(shelf.take_wishes().is_empty(), "there is no folder");
        shelf.clear().unwrap();
        for domain in ["a", "b", "a"] {
            shelf.wish(&kind(domain)).unwrap();
        }
        std::fs::write(shelf.dir.join("x.wish"), "no kind").unwrap();
        let taken = shelf.take_wishes();
        assert!(taken.len() == 2 && taken.contains(&kind("a")) && taken.contains(&kind("b")));
        assert!(shelf.take_wishes().is_empty());
        assert_eq!(std::fs::read_dir(&shelf.dir).unwrap().count(), 0);
        shelf.clear().unwrap();
        assert!(!shelf.dir.exists());
        std::fs::remove_dir_all(&state).unwrap();
    }

    #[test]
    fn the_oldest_make_room() {
        let state = std::env::temp_dir().join(format!("cloister-shelf-{}", crate::ids::random_hex(4)));
        let shelf = Shelf::of(&state);
        shelf.make_folder().unwrap();
        for (age, name) in [(1, "c"), (3, "a"), (2, "b")] {
            let file = File::create(shelf.path(name)).unwrap();
            let then = std::time::SystemTime::now() - std::time::Duration::from_secs(age * 60);
            file.set_modified(then).unwrap();
        }
        std::fs::write(shelf.path("a").with_extension(TOUCHED), "").unwrap();
        shelf.keep(2).unwrap();
        assert!(!shelf.path("a").with_extension(TOUCHED).exists());
        assert_eq!(
            ["a", "b", "c"].map(|name| shelf.path(name).exists()),
            [false, true, true]
        );
        shelf.keep(5).unwrap();
        std::fs::remove_dir_all(&state).unwrap();
    }
}
