// SPDX-License-Identifier: Apache-2.0
//! The files that a snapshot is in: its own, that of the one on which it was taken, and so on. Each names the next by its
//! identity and by the name that its file had; it is taken from what the user gave, or from beside the one that names it.

use super::table::printable;
use super::{Failure, Outcome};
use cloister_vmm::image::{self, Base, Identity, MAX_CHAIN};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Opens a snapshot that the user names.
pub fn open(path: &Path) -> Outcome<File> {
    File::open(path).map_err(|e| Failure::new(format!("cannot open {}: {e}", path.display())))
}

fn identity_of(path: &Path, file: &File) -> Outcome<Identity> {
    image::identity_of(file).map_err(|e| {
        Failure::new(format!(
            "cannot use {}: {}",
            path.display(),
            crate::error::chain(&e)
        ))
    })
}

/// A file whose name came from a snapshot: it can be anything.
fn open_beside(path: &Path) -> io::Result<File> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no file"));
    }
    Ok(file)
}

/// The one that `base` means, in the folder of `of`.
fn beside(of: &Path, base: &Base) -> Outcome<(PathBuf, File)> {
    // The name is one of a file in a folder, or the image would not have been opened.
    let path = of.with_file_name(&base.name);
    let shown = printable(&path.display().to_string());
    let refuse = |why: String| {
        Failure::new(format!(
            "{} holds only what differs from its base {} ({}), {why}; name the right one with --base",
            of.display(),
            printable(&base.name),
            base.identity
        ))
    };
    let file = open_beside(&path).map_err(|e| refuse(format!("and {shown} cannot be opened: {e}")))?;
    let found = image::identity_of(&file)
        .map_err(|e| refuse(format!("and {shown} cannot be used: {}", crate::error::chain(&e))))?;
    if found != base.identity {
        return Err(refuse(format!("and {shown} is another one ({found})")));
    }
    Ok((path, file))
}

/// The snapshot in `first` and all that it stands on, among the `given` files or beside each other.
///
/// # Errors
/// One is missing or another one than it should be, there are too many, or one that was given is none of them.
pub fn chain(path: &Path, first: File, given: &[PathBuf]) -> Outcome<Vec<File>> {
    let mut others = Vec::new();
    for path in given {
        let file = open(path)?;
        let identity = identity_of(path, &file)?;
        others.push((path.clone(), file, identity));
    }
    let mut files = Vec::new();
    let (mut path, mut file) = (path.to_owned(), first);
    loop {
        let base = image::base_of(&file).map_err(|e| {
            Failure::new(format!(
                "cannot use {}: {}",
                path.display(),
                crate::error::chain(&e)
            ))
        })?;
        files.push(file);
        let Some(base) = base else { break };
        if files.len() >= MAX_CHAIN {
            return Err(Failure::new(crate::error::chain(&image::ImageError::TooDeep)));
        }
        let known = others
            .iter()
            .position(|(.., identity)| *identity == base.identity);
        (path, file) = match known {
            Some(at) => {
                let (path, file, _) = others.remove(at);
                (path, file)
            }
            None if others.is_empty() => beside(&path, &base)?,
            // What was given is meant to be needed.
            None => match beside(&path, &base) {
                Ok(found) => found,
                Err(failure) => {
                    let (other, _, identity) = &others[0];
                    return Err(Failure::new(format!(
                        "{} is not its base but another one ({identity}); {}",
                        other.display(),
                        failure.message
                    )));
                }
            },
        };
    }
    if let Some((other, _, identity)) = others.first() {
        return Err(Failure::new(format!(
            "{} ({identity}) is nothing that the snapshot stands on",
            other.display()
        )));
    }
    Ok(files)
}

/// Whether `path` is one of these files.
pub fn holds(files: &[File], path: &Path) -> bool {
    let id = |data: std::fs::Metadata| (data.dev(), data.ino());
    std::fs::metadata(path).is_ok_and(|data| {
        let own = id(data);
        files
            .iter()
            .any(|file| file.metadata().is_ok_and(|data| id(data) == own))
    })
}

/// The files as another process of ours can open them.
pub fn paths(files: &[File]) -> Vec<PathBuf> {
    let own = std::process::id();
    files
        .iter()
        .map(|file| PathBuf::from(format!("/proc/{own}/fd/{}", file.as_raw_fd())))
        .collect()
}
