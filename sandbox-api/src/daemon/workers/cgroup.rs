// SPDX-License-Identifier: Apache-2.0
//! A cgroup of a worker's own below its pod's, so that what the pod takes is charged to it: cgroup v2 keeps all threads of a
//! process in one memory domain, and both versions charge a page to who touches it first.
//!
//! The parent is the caller's word, and is reached by descriptor, below a hierarchy's root and through no link.
//!
//! In v2, controllers that are not on in the parent's children are turned on where that is allowed; where it is not, the
//! kernel charges the parent, which comes to the same for the pod. In v1 (and its hybrid with v2) each of [`V1_HIERARCHIES`] that
//! is mounted and knows the parent gets the cgroup; in those that do not, the worker stays where cloisterd is.

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

/// Where cgroup v2 is mounted, or below which the hierarchies of v1 are.
const ROOT: &str = "/sys/fs/cgroup";
/// cgroup v2's, of statfs(2).
const CGROUP2_SUPER_MAGIC: i64 = 0x6367_7270;
/// That of cgroup v1.
const CGROUP_SUPER_MAGIC: i64 = 0x0027_e0eb;
/// What a pod's use is counted by in v1. Where two are one hierarchy (`cpu,cpuacct`), their names are links to it.
const V1_HIERARCHIES: [&str; 5] = ["cpu", "cpuacct", "memory", "blkio", "pids"];
/// What a pod's use is counted by in v2.
const CONTROLLERS: [&str; 4] = ["+cpu", "+memory", "+io", "+pids"];
/// Longest name of a file.
const MAX_NAME: usize = 255;

/// The path below the hierarchy's root of what CRI calls a pod's cgroup parent: a path, or, as with systemd, a slice whose name
/// holds those of the slices around it (`a-b.slice` lies in `a.slice`). None if it is neither, or empty.
pub fn path_of(parent: &str) -> Option<PathBuf> {
    let base = parent.rsplit('/').next().unwrap_or_default();
    if let Some(name) = base.strip_suffix(".slice") {
        // systemd.slice(5): `-.slice` is the root.
        if name == "-" {
            return None;
        }
        let mut path = PathBuf::new();
        let mut prefix = String::new();
        for part in name.split('-') {
            if part.is_empty() {
                return None;
            }
            prefix.push_str(part);
            path.push(format!("{prefix}.slice"));
            prefix.push('-');
        }
        return sound(path);
    }
    let mut path = PathBuf::new();
    for part in Path::new(parent).components() {
        match part {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) => path.push(name),
            Component::ParentDir | Component::Prefix(_) => return None,
        }
    }
    sound(path)
}

fn sound(path: PathBuf) -> Option<PathBuf> {
    let fits = path.iter().all(|name| name.len() <= MAX_NAME);
    (fits && !path.as_os_str().is_empty()).then_some(path)
}

/// Puts this process into the cgroup `name` below `parent` (see [`path_of`]), which is made if it is not there.
///
/// # Errors
/// There are no cgroups, or no such parent, or it does not admit us.
pub fn enter(parent: &Path, name: &str) -> io::Result<()> {
    let mut found = false;
    for root in hierarchies()? {
        let parent = match below(&root.dir, parent) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        };
        found = true;
        if root.unified {
            for controller in CONTROLLERS {
                // Those that are not to be had are charged further up.
                let _ = write(&parent, "cgroup.subtree_control", controller);
            }
        }
        match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
            Err(error) if error != rustix::io::Errno::EXIST => return Err(error.into()),
            _ => {}
        }
        let own = below(&parent, Path::new(name))?;
        write(&own, "cgroup.procs", "0")?;
    }
    if found {
        Ok(())
    } else {
        Err(io::ErrorKind::NotFound.into())
    }
}

/// Removes it; one that is not there is no error.
///
/// # Errors
/// It cannot be removed: somebody is in it.
pub fn remove(parent: &Path, name: &str) -> io::Result<()> {
    for root in hierarchies()? {
        let removed = below(&root.dir, parent)
            .and_then(|parent| Ok(rustix::fs::unlinkat(&parent, name, AtFlags::REMOVEDIR)?));
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// The root of a hierarchy that counts what a pod uses.
struct Hierarchy {
    dir: OwnedFd,
    /// It is that of cgroup v2.
    unified: bool,
}

fn hierarchies() -> io::Result<Vec<Hierarchy>> {
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, ROOT, flags, Mode::empty())?;
    if rustix::fs::fstatfs(&root)?.f_type == CGROUP2_SUPER_MAGIC {
        return Ok(vec![Hierarchy {
            dir: root,
            unified: true,
        }]);
    }
    let mut found = Vec::new();
    for name in V1_HIERARCHIES {
        let Ok(dir) = rustix::fs::openat(&root, name, flags, Mode::empty()) else {
            continue;
        };
        if rustix::fs::fstatfs(&dir)?.f_type == CGROUP_SUPER_MAGIC {
            found.push(Hierarchy { dir, unified: false });
        }
    }
    if found.is_empty() {
        return Err(io::Error::other(format!("no cgroup is mounted at {ROOT}")));
    }
    Ok(found)
}

fn below(dir: &OwnedFd, path: &Path) -> io::Result<OwnedFd> {
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat2(dir, path, flags, Mode::empty(), how)?)
}

fn write(dir: &OwnedFd, file: &str, word: &str) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = rustix::fs::openat(dir, file, flags, Mode::empty())?;
    // The kernel takes a write here as a whole or not at all.
    rustix::io::write(&file, word.as_bytes())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_of_both_drivers() {
        let path = |parent| path_of(parent).map(|path| path.display().to_string());
        for (parent, expected) in [
            ("/kubepods/burstable/pod1", Some("kubepods/burstable/pod1")),
            ("kubepods//./pod1/", Some("kubepods/pod1")),
            (
                "kubepods-burstable-pod1_2.slice",
                Some("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice"),
            ),
            // As containerd does: the name says it all.
            (
                "/kubepods.slice/kubepods-a.slice",
                Some("kubepods.slice/kubepods-a.slice"),
            ),
            ("a.slice", Some("a.slice")),
            ("", None),
            ("/", None),
            ("/a/../../b", None),
            ("-.slice", None),
            (".slice", None),
            ("a--b.slice", None),
            ("-a.slice", None),
            ("a-.slice", None),
        ] {
            assert_eq!(path(parent).as_deref(), expected, "{parent:?}");
        }
        assert_eq!(path_of(&"x".repeat(300)), None);
        assert_eq!(path_of(&format!("{}.slice", "x".repeat(300))), None);
    }

    #[test]
    fn what_is_not_there_is_refused_and_need_not_be_removed() {
        let nowhere = Path::new("cloister-no-such-cgroup/pod");
        assert!(enter(nowhere, "x").is_err());
        // On a host without cgroups that is said instead.
        let removed = remove(nowhere, "x").map_err(|error| error.to_string());
        assert!(removed.is_ok() || removed.is_err_and(|told| told.contains("no cgroup")));
        assert!(enter(Path::new("../tmp"), "x").is_err());
    }
}
