// SPDX-License-Identifier: Apache-2.0
//! A file that is there whole or not at all: nameless until it is finished, then put in the place of what was there.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;

/// See the module.
pub struct NewFile {
    dir: OwnedFd,
    name: OsString,
    /// Its name meanwhile.
    temporary: OsString,
    file: File,
    /// It is in the folder by its temporary name.
    is_named: bool,
}

impl NewFile {
    /// A file that nobody but its owner can read, to become `path`.
    pub fn create(path: &Path) -> io::Result<Self> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::openat(CWD, parent.unwrap_or(Path::new(".")), flags, Mode::empty())?;
        let mut temporary = OsString::from(".");
        temporary.push(&name);
        temporary.push(format!(".{}", std::process::id()));
        let mode = Mode::RUSR | Mode::WUSR;
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let (file, is_named) = match rustix::fs::openat(&dir, ".", flags | OFlags::TMPFILE, mode) {
            Ok(file) => (file, false),
            // Not every file system has nameless files.
            Err(Errno::OPNOTSUPP | Errno::ISDIR) => {
                let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
                (rustix::fs::openat(&dir, &temporary, flags, mode)?, true)
            }
            Err(error) => return Err(error.into()),
        };
        Ok(Self {
            dir,
            name,
            temporary,
            file: file.into(),
            is_named,
        })
    }

    /// What to write to.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Gives it its name, once all of it is on the disk; then that is, too.
    pub fn finish(mut self) -> io::Result<()> {
        self.file.sync_all()?;
        if !self.is_named {
            let own = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            match rustix::fs::linkat(CWD, &own, &self.dir, &self.temporary, AtFlags::SYMLINK_FOLLOW) {
                // Of a process of the same number that was killed here.
                Err(Errno::EXIST) => {
                    rustix::fs::unlinkat(&self.dir, &self.temporary, AtFlags::empty())?;
                    rustix::fs::linkat(CWD, &own, &self.dir, &self.temporary, AtFlags::SYMLINK_FOLLOW)?;
                }
                linked => linked?,
            }
            self.is_named = true;
        }
        rustix::fs::renameat(&self.dir, &self.temporary, &self.dir, &self.name)?;
        self.is_named = false;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::openat(&self.dir, ".", flags, Mode::empty()) {
            Ok(dir) => rustix::fs::fsync(dir)?,
            // Who may write into a folder need not be allowed to read it.
            Err(Errno::ACCESS) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if self.is_named {
            // There is nothing to be done about one that cannot be removed.
            let _ = rustix::fs::unlinkat(&self.dir, &self.temporary, AtFlags::empty());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::path::PathBuf;

    fn folder(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("cloister-new-file-{name}-{}", std::process::id()));
        std::fs::create_dir(&dir).unwrap();
        dir
    }

    fn names(dir: &Path) -> Vec<OsString> {
        let mut names: Vec<_> = std::fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn it_takes_the_place_of_another_when_it_is_whole() {
        let dir = folder("whole");
        let path = dir.join("image");
        for content in ["one", "two"] {
            let new = NewFile::create(&path).unwrap();
            new.file().write_all(content.as_bytes()).unwrap();
            let before = std::fs::read_to_string(&path).unwrap_or_default();
            assert_ne!(before, content);
            new.finish().unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), content);
            assert_eq!(names(&dir), ["image"]);
        }
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn what_is_not_finished_was_never_there() {
        let dir = folder("dropped");
        let new = NewFile::create(&dir.join("image")).unwrap();
        new.file().write_all(b"half").unwrap();
        drop(new);
        assert!(names(&dir).is_empty());
        assert!(NewFile::create(&dir.join("no/such/folder")).is_err());
        assert!(NewFile::create(Path::new("/")).is_err());
        std::fs::remove_dir_all(dir).unwrap();
    }
}
