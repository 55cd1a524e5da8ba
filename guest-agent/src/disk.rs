// SPDX-License-Identifier: Apache-2.0
//! Disks that come while the pod runs.
//!
//! The kernel has a platform device `virtio-mmio.N` for each of the machine's register pages, and looked at each of them
//! once. Those that were empty then it left alone. Bound to the driver by hand, one is looked at again; the device in it
//! is there when the write returns.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The driver of register pages.
const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
/// What sizes in sysfs are counted in.
const SECTOR: u64 = 512;

/// A disk as the kernel knows it.
#[derive(Debug, PartialEq, Eq)]
pub struct Disk {
    /// Path in /dev.
    pub path: String,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Bytes.
    pub size: u64,
}

fn bound(slot: u32) -> PathBuf {
    Path::new(DRIVER).join(format!("virtio-mmio.{slot}"))
}

/// Has the kernel look at a slot again.
///
/// # Errors
/// There is no such slot, or nothing in it.
fn bind(slot: u32) -> io::Result<()> {
    if bound(slot).exists() {
        return Ok(());
    }
    fs::write(Path::new(DRIVER).join("bind"), format!("virtio-mmio.{slot}"))
}

/// Has the kernel take notice of the disk in a slot. Says again which it is if it has already.
///
/// # Errors
/// There is no such slot, no disk in it, or something that is no disk.
pub fn attach(slot: u32) -> io::Result<Disk> {
    bind(slot)?;
    find(&bound(slot))
}

/// Has the kernel let go of it. One that it does not know is no error.
///
/// # Errors
/// As of write(2).
pub fn detach(slot: u32) -> io::Result<()> {
    if !bound(slot).exists() {
        return Ok(());
    }
    // What is no disk is not ours to take away.
    find(&bound(slot))?;
    fs::write(Path::new(DRIVER).join("unbind"), format!("virtio-mmio.{slot}"))
}

/// The first entry of a folder whose name starts so.
fn below(dir: &Path, prefix: &str) -> io::Result<PathBuf> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry
            .file_name()
            .as_encoded_bytes()
            .starts_with(prefix.as_bytes())
        {
            return Ok(entry.path());
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

/// The disk of a platform device: `virtioM/block/NAME` below it.
fn find(device: &Path) -> io::Result<Disk> {
    let disk = below(&below(device, "virtio")?.join("block"), "")?;
    let dev = fs::read_to_string(disk.join("dev"))?;
    let size = fs::read_to_string(disk.join("size"))?;
    let (major, minor) = dev.trim().split_once(':').unwrap_or_default();
    let number = |text: &str| text.trim().parse::<u64>().map_err(io::Error::other);
    let part = |text: &str| number(text).map(|n| u32::try_from(n).unwrap_or(u32::MAX));
    Ok(Disk {
        path: format!("/dev/{}", disk.file_name().unwrap_or_default().display()),
        major: part(major)?,
        minor: part(minor)?,
        size: number(&size)?.saturating_mul(SECTOR),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_found_below_its_register_page() {
        let dir = std::env::temp_dir().join(format!("cloister-disk-{}", std::process::id()));
        let disk = dir.join("virtio7/block/vdc");
        fs::create_dir_all(&disk).unwrap();
        assert!(find(&dir).is_err());
        fs::write(disk.join("dev"), "254:32\n").unwrap();
        fs::write(disk.join("size"), "2048\n").unwrap();
        let expected = Disk {
            path: "/dev/vdc".into(),
            major: 254,
            minor: 32,
            size: 1 << 20,
        };
        assert_eq!(find(&dir).unwrap(), expected);
        fs::remove_dir_all(dir.join("virtio7/block")).unwrap();
        assert_eq!(find(&dir).unwrap_err().kind(), io::ErrorKind::NotFound);
        fs::remove_dir_all(dir).unwrap();
    }
}
