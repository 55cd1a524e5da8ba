// SPDX-License-Identifier: Apache-2.0
//! Root file systems that a snapshotter has on a block device or in an image file (devmapper, blockfile, erofs).
//!
//! They are mounted on the host, as a descriptor that no mount namespace sees ([`super::overlay`] says why), and shared like
//! any other tree: the guest reads and writes files. It never gets to the blocks, so that the host's kernel does not have to
//! trust what it finds there later.

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

/// File systems of disks that are mounted.
pub const TYPES: [&str; 4] = ["btrfs", "erofs", "ext4", "xfs"];

// linux/loop.h
const LOOP_CONFIGURE: libc::Ioctl = 0x4c0a;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4c82;
const LO_FLAGS_READ_ONLY: u32 = 1;
/// The device lets go of its file when nobody has it open or mounted any more.
const LO_FLAGS_AUTOCLEAR: u32 = 4;

/// Another process may take the device that was free.
const TRIES: u32 = 32;

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// Mounts the file system of a kind that lies on `source`, a block device or an image file.
///
/// # Errors
/// `source` is neither, has no such file system, or an option is unknown to it; InvalidInput for a kind that is not one of
/// [`TYPES`].
pub fn mount(kind: &str, source: &Path, options: &[String]) -> io::Result<OwnedFd> {
    if !TYPES.contains(&kind) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let read_only = kind == "erofs" || options.iter().any(|option| option == "ro");
    let access = if read_only { OFlags::RDONLY } else { OFlags::RDWR };
    let opened = rustix::fs::openat(CWD, source, access | OFlags::CLOEXEC, Mode::empty())?;
    let opened = File::from(opened);
    let found = opened.metadata()?.file_type();
    let device = if found.is_block_device() {
        opened
    } else if found.is_file() {
        loop_device(&opened, read_only)?
    } else {
        return Err(io::Error::other("it is neither a block device nor a file"));
    };
    // The device stays open until the mount holds it.
    let path = rustix::fs::readlinkat(CWD, format!("/proc/self/fd/{}", device.as_raw_fd()), Vec::new())?;
    let mounted = || -> rustix::io::Result<OwnedFd> {
        let fs = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
        rustix::mount::fsconfig_set_string(&fs, "source", path.as_c_str())?;
        if read_only {
            rustix::mount::fsconfig_set_flag(&fs, "ro")?;
        }
        let mut attributes = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
        for option in options {
            match option.split_once('=') {
                _ if matches!(option.as_str(), "loop" | "ro" | "rw") => {}
                Some((key, value)) => rustix::mount::fsconfig_set_string(&fs, key, value)?,
                None => match attribute(option) {
                    Some(attribute) => attributes |= attribute,
                    None => rustix::mount::fsconfig_set_flag(&fs, option.as_str())?,
                },
            }
        }
        rustix::mount::fsconfig_create(&fs)?;
        rustix::mount::fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
    };
    Ok(mounted()?)
}

/// What is the mount's, not the file system's: mount(8), "filesystem-independent mount options".
fn attribute(option: &str) -> Option<MountAttrFlags> {
    Some(match option {
        "noatime" => MountAttrFlags::MOUNT_ATTR_NOATIME,
        "nodiratime" => MountAttrFlags::MOUNT_ATTR_NODIRATIME,
        "strictatime" => MountAttrFlags::MOUNT_ATTR_STRICTATIME,
        "noexec" => MountAttrFlags::MOUNT_ATTR_NOEXEC,
        // So it is anyway; and set-user-ID and device nodes are nothing to the host.
        "defaults" | "relatime" | "nodev" | "nosuid" | "exec" => MountAttrFlags::empty(),
        _ => return None,
    })
}

/// A block device for an image, as long as it is open or mounted.
fn loop_device(image: &File, read_only: bool) -> io::Result<File> {
    let control = File::options().read(true).write(true).open("/dev/loop-control")?;
    let fd = u32::try_from(image.as_raw_fd()).map_err(io::Error::other)?;
    let config = LoopConfig {
        fd,
        block_size: 0,
        info: LoopInfo {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            sizelimit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: LO_FLAGS_AUTOCLEAR | if read_only { LO_FLAGS_READ_ONLY } else { 0 },
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        },
        reserved: [0; 8],
    };
    for _ in 0..TRIES {
        // SAFETY: takes no argument; answers a number.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        let device = File::options()
            .read(true)
            .write(!read_only)
            .open(format!("/dev/loop{number}"))?;
        // SAFETY: reads a `struct loop_config`, which `config` is.
        let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
        if result == 0 {
            return Ok(device);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(Errno::BUSY.raw_os_error()) {
            return Err(error);
        }
    }
    Err(io::Error::other("every free loop device was taken by others"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_the_kernels() {
        assert_eq!(std::mem::size_of::<LoopInfo>(), 232);
        assert_eq!(std::mem::size_of::<LoopConfig>(), 304);
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        let error = |kind: &str, source: &str| mount(kind, Path::new(source), &[]).unwrap_err();
        assert_eq!(error("proc", "/proc").kind(), io::ErrorKind::InvalidInput);
        assert_eq!(error("ext4", "/no/such/disk").kind(), io::ErrorKind::NotFound);
        assert!(error("erofs", "/dev/null").to_string().contains("neither"));
    }
}
