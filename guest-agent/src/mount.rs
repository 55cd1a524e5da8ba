// SPDX-License-Identifier: Apache-2.0
//! Mounting outside containers: options as in mount(8) and OCI specs, and the pod's shared directory.

use std::fs;
use std::io;
use std::path::Path;

use cloister_protocol::{SHARED_DIR, SHARED_TAG};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind_recursive, mount_change, unmount,
};

/// Mount options, sorted into what the kernel wants where.
#[derive(Debug, PartialEq, Eq)]
pub struct Options {
    flags: MountFlags,
    propagation: MountPropagationFlags,
    bind: bool,
    recursive: bool,
    data: String,
}

/// Sorts options. Words that are no flag go to the file system, in their order.
pub fn parse_options<S: AsRef<str>>(words: &[S]) -> Options {
    let mut options = Options {
        flags: MountFlags::empty(),
        propagation: MountPropagationFlags::empty(),
        bind: false,
        recursive: false,
        data: String::new(),
    };
    for word in words {
        let word = word.as_ref();
        let (set, flag) = match word {
            "" | "defaults" => continue,
            "bind" => {
                options.bind = true;
                continue;
            }
            "rbind" => {
                options.bind = true;
                options.recursive = true;
                continue;
            }
            "private" | "rprivate" | "shared" | "rshared" | "slave" | "rslave" | "unbindable"
            | "runbindable" => {
                options.propagation = propagation(word);
                continue;
            }
            "ro" => (true, MountFlags::RDONLY),
            "rw" => (false, MountFlags::RDONLY),
            "nosuid" => (true, MountFlags::NOSUID),
            "suid" => (false, MountFlags::NOSUID),
            "nodev" => (true, MountFlags::NODEV),
            "dev" => (false, MountFlags::NODEV),
            "noexec" => (true, MountFlags::NOEXEC),
            "exec" => (false, MountFlags::NOEXEC),
            "sync" => (true, MountFlags::SYNCHRONOUS),
            "async" => (false, MountFlags::SYNCHRONOUS),
            "dirsync" => (true, MountFlags::DIRSYNC),
            "noatime" => (true, MountFlags::NOATIME),
            "atime" => (false, MountFlags::NOATIME),
            "nodiratime" => (true, MountFlags::NODIRATIME),
            "diratime" => (false, MountFlags::NODIRATIME),
            "relatime" => (true, MountFlags::RELATIME),
            "norelatime" => (false, MountFlags::RELATIME),
            "strictatime" => (true, MountFlags::STRICTATIME),
            "silent" => (true, MountFlags::SILENT),
            data => {
                if !options.data.is_empty() {
                    options.data.push(',');
                }
                options.data.push_str(data);
                continue;
            }
        };
        options.flags.set(flag, set);
    }
    options
}

fn propagation(word: &str) -> MountPropagationFlags {
    let (kind, recursive) = match word.strip_prefix('r') {
        Some(rest) => (rest, MountPropagationFlags::REC),
        None => (word, MountPropagationFlags::empty()),
    };
    recursive
        | match kind {
            "private" => MountPropagationFlags::PRIVATE,
            "shared" => MountPropagationFlags::SHARED,
            "slave" => MountPropagationFlags::DOWNSTREAM,
            _ => MountPropagationFlags::UNBINDABLE,
        }
}

/// Mounts `source` on `target`, which exists.
///
/// # Errors
/// As of mount(2). A half-done mount (bind, then failed to turn read-only) is undone.
pub fn mount_on(kind: &str, source: &str, target: &Path, words: &[impl AsRef<str>]) -> io::Result<()> {
    let options = parse_options(words);
    if options.bind || kind == "bind" {
        if options.recursive {
            mount_bind_recursive(source, target)?;
        } else {
            rustix::mount::mount_bind(source, target)?;
        }
        if !options.flags.is_empty() {
            // A bind takes over the source's flags; only a remount sets its own.
            rustix::mount::mount_remount(target, options.flags | MountFlags::BIND, "").inspect_err(|_| {
                let _ = unmount(target, UnmountFlags::DETACH);
            })?;
        }
    } else {
        let data = std::ffi::CString::new(options.data.as_str())?;
        mount(source, target, kind, options.flags, Some(data.as_c_str()))?;
    }
    if !options.propagation.is_empty() {
        mount_change(target, options.propagation).inspect_err(|_| {
            let _ = unmount(target, UnmountFlags::DETACH);
        })?;
    }
    Ok(())
}

/// Makes `target`: an empty file if a plain file is to be bound there, else a directory.
///
/// # Errors
/// As of mkdir(2) and open(2).
pub fn make_target(kind: &str, source: &str, target: &Path, words: &[impl AsRef<str>]) -> io::Result<()> {
    if target.exists() {
        return Ok(());
    }
    let bind = kind == "bind" || words.iter().any(|w| matches!(w.as_ref(), "bind" | "rbind"));
    if bind && !fs::metadata(source)?.is_dir() {
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::File::create(target)?;
        return Ok(());
    }
    fs::create_dir_all(target)
}

/// Whether two paths lie on different mounts: `dir` is a mount point below its parent.
fn is_mounted(dir: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let device = |path: &Path| fs::metadata(path).map(|m| m.dev()).ok();
    match (device(dir), dir.parent().and_then(device)) {
        (Some(own), Some(parent)) => own != parent,
        _ => false,
    }
}

/// Mounts the virtio-fs device with all that is shared with the pod, unless it is mounted.
///
/// # Errors
/// As of mount(2): EINVAL when the VM has no such device.
pub fn shared() -> io::Result<()> {
    let dir = Path::new(SHARED_DIR);
    if is_mounted(dir) {
        return Ok(());
    }
    fs::create_dir_all(dir)?;
    // Containers have their roots from it: set-user-ID programs and device nodes in them work, as far as the container's rules
    // for devices and privileges let them.
    mount_on("virtiofs", SHARED_TAG, dir, &[] as &[&str])
}

/// Undoes every mount on `target`, the last first. What is in use goes once its users are gone.
pub fn unmount_all(target: &Path) {
    while unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_ok() {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_and_data_are_told_apart() {
        let options = parse_options(&["ro", "lowerdir=/a:/b", "nosuid", "upperdir=/c", "index=off"]);
        assert_eq!(options.flags, MountFlags::RDONLY | MountFlags::NOSUID);
        assert_eq!(options.data, "lowerdir=/a:/b,upperdir=/c,index=off");
        assert!(!options.bind);
    }

    #[test]
    fn the_last_of_opposites_counts() {
        assert_eq!(parse_options(&["ro", "noexec", "rw"]).flags, MountFlags::NOEXEC);
    }

    #[test]
    fn binds_and_propagation() {
        let options = parse_options(&["rbind", "rprivate", "defaults"]);
        assert!(options.bind && options.recursive);
        assert_eq!(
            options.propagation,
            MountPropagationFlags::PRIVATE | MountPropagationFlags::REC
        );
        assert_eq!(options.data, "");
        assert_eq!(
            parse_options(&["slave"]).propagation,
            MountPropagationFlags::DOWNSTREAM
        );
    }

    #[test]
    fn targets_are_made_after_their_sources() {
        let dir = std::env::temp_dir().join(format!("cloister-mount-{}", std::process::id()));
        let file = dir.join("source");
        fs::create_dir_all(&dir).unwrap();
        fs::write(&file, "x").unwrap();
        let target = dir.join("a/b");
        make_target("bind", file.to_str().unwrap(), &target, &["ro"]).unwrap();
        assert!(target.is_file());
        make_target("tmpfs", "tmpfs", &dir.join("d"), &["ro"]).unwrap();
        assert!(dir.join("d").is_dir());
        fs::remove_dir_all(dir).unwrap();
    }
}
