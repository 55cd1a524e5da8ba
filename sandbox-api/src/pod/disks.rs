// SPDX-License-Identifier: Apache-2.0
//! Block devices of the host in a pod's VM: raw block volumes.
//!
//! ```text
//!            first container           guest told, has a number            last container is gone
//! (nothing) ───────────────▶ in a slot ──────────────────▶ in use ─────────────────────────▶ (nothing)
//! ```
//! The containers of a pod that use the same device share one disk of the VM: with two, each would have a cache of its own.

use super::devices::Number;
use super::guest::Guest;
use super::vm::QUICK;
use cloister_protocol::pod::{BlockRequest, PodClient};
use cloister_protocol::ttrpc::{self, context::with_duration};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where the kernel has devices by number, and udev and devtmpfs by name.
const SYS: &str = "/sys/dev/block";
const DEV: &str = "/dev";

/// Why a device is not in the VM.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such device on the host.
    #[error("cannot open the block device {}:{}", .number.0, .number.1)]
    Open {
        /// On the host.
        number: Number,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another container of the pod has it so.
    #[error(
        "the block device {}:{} is read-only for another container of the pod, and cannot be writable for this one",
        .0.0, .0.1
    )]
    ReadOnly(Number),
    /// The VM.
    #[error("cannot attach the block device {}:{} to the virtual machine", .number.0, .number.1)]
    Attach {
        /// On the host.
        number: Number,
        /// Why: no slot is free, for one.
        #[source]
        source: io::Error,
    },
    /// The agent.
    #[error("the guest does not take the block device {}:{}: {source}", .number.0, .number.1)]
    Agent {
        /// On the host.
        number: Number,
        /// Its answer.
        source: ttrpc::Error,
    },
}

struct Disk {
    slot: u32,
    read_only: bool,
    /// In the guest.
    number: Number,
    users: usize,
}

/// Opens a block device of the host by its number, for writing if true.
pub type Opener = fn(Number, bool) -> io::Result<OwnedFd>;

/// See the module.
pub struct Disks {
    guest: Arc<dyn Guest>,
    pod: PodClient,
    open: Opener,
    /// By number on the host. Held while one comes or goes.
    table: tokio::sync::Mutex<HashMap<Number, Disk>>,
}

impl Disks {
    /// None yet. They will be opened with `open`.
    pub fn new(guest: Arc<dyn Guest>, pod: PodClient, open: Opener) -> Self {
        Self {
            guest,
            pod,
            open,
            table: tokio::sync::Mutex::default(),
        }
    }

    /// A container uses a device. Answers its number in the guest.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn attach(&self, number: Number, writable: bool) -> Result<Number, Error> {
        let mut table = self.table.lock().await;
        if let Some(disk) = table.get_mut(&number) {
            if writable && disk.read_only {
                return Err(Error::ReadOnly(number));
            }
            disk.users = disk.users.saturating_add(1);
            return Ok(disk.number);
        }
        let open = self.open;
        // It can be a server's that is gone.
        let opened = tokio::task::spawn_blocking(move || open(number, writable)).await;
        let opened = opened
            .unwrap_or_else(|e| Err(io::Error::other(e)))
            .map_err(|source| Error::Open { number, source })?;
        let slot = self
            .guest
            .attach_disk(opened, !writable)
            .map_err(|source| Error::Attach { number, source })?;
        let request = BlockRequest {
            slot,
            ..Default::default()
        };
        let answer = self.pod.attach_block(with_duration(QUICK), &request).await;
        let disk = match answer {
            Ok(disk) => disk,
            Err(source) => {
                self.take(number, slot).await;
                return Err(Error::Agent { number, source });
            }
        };
        let disk = Disk {
            slot,
            read_only: !writable,
            number: (disk.major, disk.minor),
            users: 1,
        };
        Ok(table.entry(number).or_insert(disk).number)
    }

    /// A container does not use a device any more. Once none does, the host has it closed when this returns. `lives`: the VM
    /// can still be asked to let go of it.
    pub async fn release(&self, number: Number, lives: bool) {
        let mut table = self.table.lock().await;
        let Some(disk) = table.get_mut(&number) else {
            return;
        };
        disk.users = disk.users.saturating_sub(1);
        if disk.users > 0 {
            return;
        }
        let slot = disk.slot;
        table.remove(&number);
        if lives {
            let request = BlockRequest {
                slot,
                ..Default::default()
            };
            // It is taken from a guest that holds on to it, too.
            if let Err(error) = self.pod.detach_block(with_duration(QUICK), &request).await {
                log::warn!(
                    "the guest does not let go of block device {}:{}: {error}",
                    number.0,
                    number.1
                );
            }
        }
        self.take(number, slot).await;
    }

    async fn take(&self, number: Number, slot: u32) {
        let guest = Arc::clone(&self.guest);
        let taken = tokio::task::spawn_blocking(move || guest.detach_disk(slot)).await;
        if let Err(error) = taken.unwrap_or_else(|e| Err(io::Error::other(e))) {
            // With the VM everything in it is gone.
            log::debug!("block device {}:{}: {error}", number.0, number.1);
        }
    }
}

/// The name that the host has for a block device, below /dev.
fn name(number: Number) -> Option<PathBuf> {
    let file = format!("{SYS}/{}:{}/uevent", number.0, number.1);
    let text = std::fs::read_to_string(file).ok()?;
    let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME="))?;
    Some(name.into())
}

/// The path that the host has for a block device.
pub fn path(number: Number) -> Option<PathBuf> {
    Some(Path::new(DEV).join(name(number)?))
}

/// Opens a block device by its number, for writing if `writable`.
///
/// # Errors
/// There is none of that number in the host's /dev, or as of open(2).
pub fn open(number: Number, writable: bool) -> io::Result<OwnedFd> {
    let name = name(number).ok_or(io::ErrorKind::NotFound)?;
    let dev = rustix::fs::openat(
        CWD,
        DEV,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let access = if writable { OFlags::RDWR } else { OFlags::RDONLY };
    let flags = access | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let confined = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let disk = rustix::fs::openat2(dev, name, flags, Mode::empty(), confined)?;
    let stat = rustix::fs::fstat(&disk)?;
    let found = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
    if FileType::from_raw_mode(stat.st_mode) != FileType::BlockDevice || found != number {
        return Err(io::Error::other(
            "the host's /dev has something else of that name",
        ));
    }
    Ok(disk)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_is_not_opened() {
        // Majors above 4095 there are none.
        let error = open((5000, 0), false).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert_eq!(path((5000, 0)), None);
    }
}
