// SPDX-License-Identifier: Apache-2.0
//! Mounts that exist only as a file descriptor.
//!
//! A container's root file system is an overlay of the image's layers and the pod's own upper directory. It is mounted
//! with `fsopen`/`fsmount` and never attached to a mount namespace: nobody on the host sees it, nothing must be
//! unmounted after a crash, and what goes to the virtio-fs device is the descriptor. Layers are named by
//! `/proc/self/fd/N`, so no path of the store appears in the options and none needs escaping.
//!
//! `fsconfig` takes strings of 255 bytes at most. For an image with more layers than fit, a short-lived thread with a
//! mount namespace of its own uses mount(2), whose options may fill a page, and takes the mount out as a descriptor.
//! containerd's paths are opened there and named by descriptors as well: those of some fifty layers fill more than a page.

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, OpenTreeFlags};
use rustix::thread::UnshareFlags;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Most bytes of a string that fsconfig(2) takes.
const FSCONFIG_MAX: usize = 255;
/// Most bytes of options that mount(2) takes: a page, with the zero at its end.
const MOUNT_MAX: usize = 4095;
const FD_PREFIX: &str = "/proc/self/fd/";

/// A mount could not be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot mount {what}{hint}")]
pub struct Error {
    what: String,
    hint: &'static str,
    #[source]
    source: io::Error,
}

impl Error {
    fn new(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        let hint = match source.raw_os_error() {
            Some(libc::EINVAL | libc::EOPNOTSUPP) => {
                " (an overlay's upper directory must be on ext4, xfs, btrfs or tmpfs, not on another overlay: choose a folder with --root)"
            }
            Some(libc::ENODEV) => " (this kernel has no overlayfs: modprobe overlay)",
            Some(libc::EPERM) => " (root is needed)",
            _ => "",
        };
        Self {
            what: what.into(),
            hint,
            source,
        }
    }
}

/// Where an overlay's writes go: two empty directories of one file system.
#[derive(Debug)]
pub struct Upper {
    /// Takes the changes.
    pub upper: OwnedFd,
    /// The overlay's own.
    pub work: OwnedFd,
}

/// Mounts `layers` (lowest first) under `upper`.
///
/// # Errors
/// No layer, no rights, or a file system below that cannot carry an overlay.
pub fn mount(layers: &[OwnedFd], upper: &Upper) -> Result<OwnedFd, Error> {
    let lower: Vec<String> = layers.iter().rev().map(|layer| fd_path(layer.as_fd())).collect();
    if lower.is_empty() {
        return Err(Error::new(
            "an overlay of no layers",
            io::Error::from(io::ErrorKind::InvalidInput),
        ));
    }
    mount_strings(
        &lower.join(":"),
        Some((&fd_path(upper.upper.as_fd()), &fd_path(upper.work.as_fd()))),
        &[],
    )
}

/// Mounts an overlay as containerd's snapshotter describes it: `lowerdir=`, `upperdir=`, `workdir=` and flags.
///
/// # Errors
/// As [`mount`]; also options without a lowerdir.
pub fn mount_options(options: &[String]) -> Result<OwnedFd, Error> {
    let find = |key: &str| options.iter().find_map(|option| option.strip_prefix(key));
    let missing = || {
        Error::new(
            "an overlay without lowerdir=",
            io::Error::from(io::ErrorKind::InvalidInput),
        )
    };
    let lower = find("lowerdir=").ok_or_else(missing)?;
    let upper = find("upperdir=").zip(find("workdir="));
    let others: Vec<&str> = options
        .iter()
        .map(String::as_str)
        .filter(|option| {
            !["lowerdir=", "upperdir=", "workdir="]
                .iter()
                .any(|key| option.starts_with(key))
        })
        .filter(|option| !matches!(*option, "rw" | "ro" | "rbind" | "bind"))
        .collect();
    mount_strings(lower, upper, &others)
}

fn mount_strings(lower: &str, upper: Option<(&str, &str)>, others: &[&str]) -> Result<OwnedFd, Error> {
    let fits = lower.len() <= FSCONFIG_MAX
        && upper.is_none_or(|(upper, work)| upper.len() <= FSCONFIG_MAX && work.len() <= FSCONFIG_MAX);
    if fits {
        let mount = || {
            let fs = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
            rustix::mount::fsconfig_set_string(&fs, "source", "cloister")?;
            rustix::mount::fsconfig_set_string(&fs, "lowerdir", lower)?;
            if let Some((upper, work)) = upper {
                rustix::mount::fsconfig_set_string(&fs, "upperdir", upper)?;
                rustix::mount::fsconfig_set_string(&fs, "workdir", work)?;
            }
            for option in others {
                match option.split_once('=') {
                    Some((key, value)) => rustix::mount::fsconfig_set_string(&fs, key, value)?,
                    None => rustix::mount::fsconfig_set_flag(&fs, *option)?,
                }
            }
            rustix::mount::fsconfig_create(&fs)?;
            let attributes = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
            rustix::mount::fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
        };
        return mount().map_err(|e: rustix::io::Errno| Error::new("the container's root file system", e));
    }
    let thread = std::thread::scope(|scope| {
        let mounting = || in_own_namespace(lower, upper, others);
        let spawned = std::thread::Builder::new()
            .name("overlay".into())
            .spawn_scoped(scope, mounting);
        spawned.and_then(|thread| {
            thread
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the mounting thread died")))
        })
    });
    thread.map_err(|e| Error::new("the container's root file system", e))
}

/// Runs on a thread of its own, which ends with its mount namespace.
fn in_own_namespace(lower: &str, upper: Option<(&str, &str)>, others: &[&str]) -> io::Result<OwnedFd> {
    // SAFETY: NEWNS and FS touch neither the file descriptor table nor anything a Rust library caches per thread; the
    // thread does nothing else and ends.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }?;
    let private = rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private)?;

    // The directories stay open until the mount is made.
    let (data, _opened) = data(lower, upper, others)?;
    // Any directory will do: the mount over it is seen by this thread only. One whose path the options do not use.
    let target = "/sys";
    let data = std::ffi::CString::new(data)?;
    rustix::mount::mount(
        "cloister",
        target,
        "overlay",
        MountFlags::NODEV | MountFlags::NOSUID,
        data.as_c_str(),
    )?;
    Ok(rustix::mount::open_tree(
        CWD,
        target,
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )?)
}

/// The options as mount(2) takes them, and the directories that they name by descriptors: paths of many layers would fill
/// more than a page.
fn data(lower: &str, upper: Option<(&str, &str)>, others: &[&str]) -> io::Result<(String, Vec<OwnedFd>)> {
    let mut opened = Vec::new();
    let mut here = |part: &str| -> io::Result<String> {
        let fd = open_here(part)?;
        let name = fd_path(fd.as_fd());
        opened.push(fd);
        Ok(name)
    };
    // What escapes colons, or has two of them before layers of another kind, is not taken apart.
    let lower = if lower.contains('\\') || lower.contains("::") {
        lower.to_owned()
    } else {
        let layers: io::Result<Vec<String>> = lower.split(':').map(&mut here).collect();
        layers?.join(":")
    };
    let mut data = format!("lowerdir={lower}");
    if let Some((upper, work)) = upper {
        data.push_str(&format!(",upperdir={},workdir={}", here(upper)?, here(work)?));
    }
    for option in others {
        data.push(',');
        data.push_str(option);
    }
    if data.len() > MOUNT_MAX {
        return Err(io::Error::new(
            io::ErrorKind::ArgumentListTooLong,
            "too many layers for one mount",
        ));
    }
    Ok((data, opened))
}

/// Opens a directory, given by its path or a descriptor, through this thread's mounts: an overlay takes those of its own
/// namespace only.
fn open_here(part: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    if !part.starts_with(FD_PREFIX) {
        return Ok(rustix::fs::openat(CWD, part, flags, Mode::empty())?);
    }
    let path = rustix::fs::readlinkat(CWD, part, Vec::new())?;
    let fd = rustix::fs::openat(CWD, path, flags | OFlags::NOFOLLOW, Mode::empty())?;
    let same = |a: &rustix::fs::Stat, b: &rustix::fs::Stat| a.st_dev == b.st_dev && a.st_ino == b.st_ino;
    if !same(&rustix::fs::fstat(&fd)?, &rustix::fs::stat(part)?) {
        return Err(io::Error::new(io::ErrorKind::NotFound, "a layer was moved away"));
    }
    Ok(fd)
}

fn fd_path(fd: BorrowedFd<'_>) -> String {
    format!("{FD_PREFIX}{}", fd.as_raw_fd())
}

/// Makes a pod's upper and work directories below `dir`; the upper one looks like the root of the lowest layer.
///
/// # Errors
/// The folder cannot be written.
pub fn make_upper(dir: &Path, like: Option<BorrowedFd<'_>>) -> io::Result<Upper> {
    let open = |name: &str| -> io::Result<(OwnedFd, bool)> {
        let path = dir.join(name);
        let is_new = match rustix::fs::mkdirat(CWD, &path, Mode::RWXU) {
            Ok(()) => true,
            Err(rustix::io::Errno::EXIST) => false,
            Err(e) => return Err(e.into()),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok((rustix::fs::openat(CWD, &path, flags, Mode::empty())?, is_new))
    };
    let (work, _) = open("work")?;
    let (upper, is_new) = open("upper")?;
    if !is_new {
        // What the container has made of it.
        return Ok(Upper { upper, work });
    }
    // The root of an overlay has the attributes of the upper directory, not of the layers.
    let (owner, mode) = match like {
        Some(layer) => {
            let stat = rustix::fs::fstat(layer)?;
            ((stat.st_uid, stat.st_gid), stat.st_mode & 0o7777)
        }
        None => ((0, 0), 0o755),
    };
    let ids = (
        rustix::fs::Uid::from_raw(owner.0),
        rustix::fs::Gid::from_raw(owner.1),
    );
    rustix::fs::fchown(&upper, Some(ids.0), Some(ids.1))?;
    rustix::fs::fchmod(&upper, Mode::from_raw_mode(mode))?;
    Ok(Upper { upper, work })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a tmpfs of its own mount namespace: /tmp may be an overlay, which takes no upper directory. Needs root.
    fn on_tmpfs(test: impl FnOnce(&Path) + Send + 'static) {
        std::thread::spawn(move || {
            // SAFETY: as in `in_own_namespace`; the thread ends with the test.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }.unwrap();
            let private =
                rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC;
            rustix::mount::mount_change("/", private).unwrap();
            rustix::mount::mount("test", "/mnt", "tmpfs", MountFlags::empty(), None).unwrap();
            test(Path::new("/mnt"));
        })
        .join()
        .unwrap();
    }

    fn layers(dir: &Path, count: usize) -> Vec<OwnedFd> {
        (0..count)
            .map(|number| {
                let layer = dir.join(format!("layer{number}"));
                std::fs::create_dir(&layer).unwrap();
                std::fs::write(layer.join("top"), number.to_string()).unwrap();
                std::fs::write(layer.join(format!("own{number}")), "").unwrap();
                std::fs::File::open(layer).unwrap().into()
            })
            .collect()
    }

    fn read(root: &OwnedFd, name: &str) -> String {
        std::fs::read_to_string(format!("{}/{name}", fd_path(root.as_fd()))).unwrap()
    }

    #[test]
    fn few_layers_and_many() {
        for count in [1, 3, 60] {
            on_tmpfs(move |dir| {
                let layers = layers(dir, count);
                let upper = make_upper(dir, layers.first().map(AsFd::as_fd)).unwrap();
                let root = mount(&layers, &upper).unwrap();
                drop((layers, upper));
                assert_eq!(read(&root, "top"), (count - 1).to_string());
                assert_eq!(read(&root, "own0"), "");
                std::fs::write(format!("{}/top", fd_path(root.as_fd())), "changed").unwrap();
                assert_eq!(std::fs::read_to_string(dir.join("upper/top")).unwrap(), "changed");
                assert_eq!(std::fs::read_to_string(dir.join("layer0/top")).unwrap(), "0");
            });
        }
    }

    #[test]
    fn options_as_containerd_gives_them() {
        on_tmpfs(|dir| {
            drop(layers(dir, 2));
            drop(make_upper(dir, None).unwrap());
            let path = |name: &str| dir.join(name).display().to_string();
            let lower = format!("lowerdir={}:{}", path("layer1"), path("layer0"));
            let options = [
                "index=off".into(),
                format!("workdir={}", path("work")),
                format!("upperdir={}", path("upper")),
                lower,
            ];
            let root = mount_options(&options).unwrap();
            assert_eq!(read(&root, "top"), "1");
            assert!(mount_options(&options[..3]).is_err());
        });
    }

    #[test]
    fn a_hundred_layers_with_long_paths() {
        on_tmpfs(|dir| {
            let store = dir.join("snapshots".repeat(8));
            std::fs::create_dir(&store).unwrap();
            drop(layers(&store, 100));
            drop(make_upper(dir, None).unwrap());
            let paths: Vec<String> = (0..100)
                .rev()
                .map(|number| store.join(format!("layer{number}")).display().to_string())
                .collect();
            let lower = paths.join(":");
            assert!(lower.len() > 2 * MOUNT_MAX);
            let options = [
                format!("workdir={}", dir.join("work").display()),
                format!("upperdir={}", dir.join("upper").display()),
                format!("lowerdir={lower}"),
            ];
            let root = mount_options(&options).unwrap();
            assert_eq!(
                (read(&root, "top"), read(&root, "own0")),
                ("99".into(), String::new())
            );
        });
    }

    #[test]
    fn failures_say_what_to_do() {
        let nothing = Upper {
            upper: std::fs::File::open("/proc").unwrap().into(),
            work: std::fs::File::open("/proc").unwrap().into(),
        };
        assert!(
            mount(&[], &nothing)
                .unwrap_err()
                .to_string()
                .contains("no layers")
        );
        let error = mount(&[std::fs::File::open("/").unwrap().into()], &nothing).unwrap_err();
        assert!(error.to_string().contains("--root"), "{error}");
    }
}
