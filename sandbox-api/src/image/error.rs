// SPDX-License-Identifier: Apache-2.0
//! What can go wrong with an image, said so that the reader knows what to do.

use std::io;
use std::path::{Path, PathBuf};

/// An image that could not be read, stored or removed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the store or of the source failed.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// The verb, as in "cannot open".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The source is not an image, or uses what we do not support.
    #[error("{what}: {why}")]
    Bad {
        /// The file or reference.
        what: String,
        /// The reason and, where there is one, the remedy.
        why: String,
    },
    /// Content differs from the digest it was asked by.
    #[error(
        "{what} does not match its digest (expected {expected}, got {actual}): the image is corrupt or was tampered with"
    )]
    Digest {
        /// Which blob or layer.
        what: String,
        /// The digest in the manifest or configuration.
        expected: String,
        /// The digest of what was read.
        actual: String,
    },
    /// One entry of a layer cannot be unpacked.
    #[error("layer entry {entry:?}: {why}")]
    Entry {
        /// The entry's path as in the archive.
        entry: String,
        /// Why it is refused.
        why: String,
    },
    /// The kernel refused an operation on an entry.
    #[error("layer entry {entry:?}")]
    EntryIo {
        /// The entry's path as in the archive.
        entry: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Nothing of that name is in the store.
    #[error("No such image: {0}")]
    NotFound(String),
    /// The image is needed by a container.
    #[error(
        "conflict: unable to remove image {image}: container {container} is using it (remove the container first)"
    )]
    InUse {
        /// As the user named it.
        image: String,
        /// The container's short id.
        container: String,
    },
    /// A registry refused or failed.
    #[error("{reference}: {why}")]
    Registry {
        /// The image asked for.
        reference: String,
        /// What the registry said, with the remedy.
        why: String,
    },
}

/// Shorthand of this module's results.
pub type Result<T> = std::result::Result<T, Error>;

/// Adds the file and the verb to an I/O error.
pub(crate) trait Context<T> {
    fn at(self, action: &'static str, path: impl AsRef<Path>) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn at(self, action: &'static str, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|source| Error::Io {
            action,
            path: path.as_ref().to_path_buf(),
            source: source.into(),
        })
    }
}

pub(crate) fn bad(what: impl Into<String>, why: impl Into<String>) -> Error {
    Error::Bad {
        what: what.into(),
        why: why.into(),
    }
}
