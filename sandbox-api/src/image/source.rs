// SPDX-License-Identifier: Apache-2.0
//! What the IMAGE argument of a command means.

use super::error::{Error, Result, bad};
use std::path::{Path, PathBuf};

/// How files with images are called.
const ARCHIVES: [&str; 4] = [".tar", ".tar.gz", ".tgz", ".tar.zst"];

/// Where an image comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A name: of the store, else of a registry.
    Reference(String),
    /// `oci:DIR[:TAG]`: a folder in OCI image layout.
    Layout {
        /// The folder.
        dir: PathBuf,
        /// Which of its images; needed if there are several.
        tag: Option<String>,
    },
    /// `docker-archive:FILE`, `oci-archive:FILE`: a tar, perhaps compressed, of `docker save` or of an OCI layout.
    Archive {
        /// The file.
        file: PathBuf,
        /// Which of its images; needed if there are several.
        tag: Option<String>,
    },
    /// `dir:PATH`: a folder that is a root file system as it stands.
    Directory(PathBuf),
}

impl Source {
    /// Reads the argument. Paths (`/…`, `./…`, `../…`, and names of files that are there and end like archives') are looked at
    /// to find out what they are.
    ///
    /// # Errors
    /// A path that holds no image, or an empty text.
    pub fn parse(text: &str) -> Result<Self> {
        let split = |rest: &str| {
            // A tag has no slash; a path that exists as a whole is no "path:tag".
            match rest.rsplit_once(':') {
                Some((path, tag)) if !tag.is_empty() && !tag.contains('/') && !Path::new(rest).exists() => {
                    (PathBuf::from(path), Some(tag.to_owned()))
                }
                _ => (PathBuf::from(rest), None),
            }
        };
        if let Some(rest) = text.strip_prefix("oci:") {
            let (dir, tag) = split(rest);
            return Ok(Self::Layout { dir, tag });
        }
        if let Some(rest) = text
            .strip_prefix("docker-archive:")
            .or_else(|| text.strip_prefix("oci-archive:"))
        {
            let (file, tag) = split(rest);
            return Ok(Self::Archive { file, tag });
        }
        if let Some(rest) = text.strip_prefix("dir:") {
            return Ok(Self::Directory(PathBuf::from(rest)));
        }
        let is_archive = || ARCHIVES.iter().any(|end| text.ends_with(end)) && Path::new(text).is_file();
        if text.starts_with('/') || text.starts_with("./") || text.starts_with("../") || is_archive() {
            return Self::of_path(Path::new(text));
        }
        if text.is_empty() {
            return Err(bad("image", "the name is empty"));
        }
        Ok(Self::Reference(text.to_owned()))
    }

    fn of_path(path: &Path) -> Result<Self> {
        let io = |source| Error::Io {
            action: "open",
            path: path.to_owned(),
            source,
        };
        let metadata = path.metadata().map_err(io)?;
        if metadata.is_file() {
            return Ok(Self::Archive {
                file: path.to_owned(),
                tag: None,
            });
        }
        if !metadata.is_dir() {
            return Err(bad(
                path.display().to_string(),
                "neither an image archive nor a folder",
            ));
        }
        if path.join("oci-layout").exists() {
            return Ok(Self::Layout {
                dir: path.to_owned(),
                tag: None,
            });
        }
        Ok(Self::Directory(path.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments() {
        assert_eq!(
            Source::parse("busybox").unwrap(),
            Source::Reference("busybox".into())
        );
        assert_eq!(
            Source::parse("oci:/a/b:c").unwrap(),
            Source::Layout {
                dir: "/a/b".into(),
                tag: Some("c".into())
            }
        );
        assert_eq!(
            Source::parse("oci:b").unwrap(),
            Source::Layout {
                dir: "b".into(),
                tag: None
            }
        );
        assert_eq!(
            Source::parse("docker-archive:x.tar").unwrap(),
            Source::Archive {
                file: "x.tar".into(),
                tag: None
            }
        );
        assert_eq!(
            Source::parse("dir:/srv").unwrap(),
            Source::Directory("/srv".into())
        );
        assert_eq!(Source::parse("/").unwrap(), Source::Directory("/".into()));
        assert_eq!(
            Source::parse("/proc/self/exe").unwrap(),
            Source::Archive {
                file: "/proc/self/exe".into(),
                tag: None
            }
        );
        let error = Source::parse("/nonexistent/image.tar").unwrap_err();
        assert_eq!(error.to_string(), "cannot open /nonexistent/image.tar");
        // A file of that name makes it one.
        let name = format!("an-image-{}.tar", std::process::id());
        assert_eq!(Source::parse(&name).unwrap(), Source::Reference(name.clone()));
        std::fs::write(&name, "").unwrap();
        let found = Source::parse(&name);
        std::fs::remove_file(&name).unwrap();
        assert_eq!(
            found.unwrap(),
            Source::Archive {
                file: name.into(),
                tag: None
            }
        );
        assert!(Source::parse("/dev/null").is_err());
        assert!(Source::parse("").is_err());
    }
}
