// SPDX-License-Identifier: Apache-2.0
//! Our cells, in this process.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use cloister_boot::x86_64::Description;
use cloister_devices::vsock::{Vsock, VsockConfig, VsockHandle};
use cloister_vmm::config::BASE_COMMAND_LINE;
use cloister_vmm::{
    Boot, Cell, CellConfig, CellHost, DeviceConfig, HugePages, KernelBoot, SerialConfig, StopReason,
};

/// What to run: the same as [`crate::peers::Guest`] and [`crate::peers::qemu::Qemu`] describe for peers.
pub struct Ours<'a> {
    /// vmlinux.
    pub kernel: &'a Path,
    /// The initramfs.
    pub initrd: &'a Path,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// More of the kernel command line.
    pub cmdline: &'a str,
    /// Where the serial console goes, if there is one.
    pub console: Option<OwnedFd>,
    /// Devices beside vsock.
    pub devices: Vec<DeviceConfig>,
    /// Its vsock address.
    pub cid: u32,
    /// Pages that back its memory.
    pub huge_pages: HugePages,
}

impl Ours<'_> {
    /// Makes the cell. The clock of a boot benchmark starts before this call.
    pub fn create(self, host: &CellHost) -> io::Result<(Cell, VsockHandle)> {
        let (vsock, handle) = Vsock::new(VsockConfig::new(self.cid.into())).map_err(io::Error::other)?;
        let console = if self.console.is_some() {
            "console=ttyS0 "
        } else {
            ""
        };
        let kernel = File::open(self.kernel)?;
        let description = Description::of(&kernel);
        let boot = KernelBoot {
            kernel,
            initrd: Some(File::open(self.initrd)?),
            command_line: format!("{console}{BASE_COMMAND_LINE} {}", self.cmdline),
            description,
        };
        let mut config = CellConfig::new(format!("bench-{}", self.cid), Boot::Kernel(boot));
        config.memory_mib = self.memory_mib.into();
        config.serial = self.console.map(|output| SerialConfig { output: Some(output) });
        config.huge_pages = self.huge_pages;
        config.devices = self.devices;
        let device = Box::new(vsock);
        config.devices.push(DeviceConfig::Custom {
            name: "vsock".into(),
            device,
        });
        let cell = Cell::create(config, host).map_err(chain)?;
        Ok((cell, handle))
    }
}

/// An error with its sources, as one error.
pub fn chain(error: impl std::error::Error) -> io::Error {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    io::Error::other(text)
}

/// Why the cell ended, if it did; otherwise the error that a caller saw.
pub fn if_it_ended(cell: &Cell, error: io::Error) -> io::Error {
    cell.wait(Some(Duration::from_secs(1)))
        .map_or(error, |reason| ended(cell, &reason))
}

fn ended(cell: &Cell, reason: &StopReason) -> io::Error {
    io::Error::other(format!("{} ended: {reason}", cell.name()))
}

/// Waits until the guest has ended by itself.
pub fn wait(cell: &Cell, seconds: u64) -> io::Result<()> {
    match cell.wait(Some(Duration::from_secs(seconds))) {
        // guest-bench ends with a reboot.
        Some(StopReason::Reset) => Ok(()),
        Some(reason) => Err(ended(cell, &reason)),
        None => {
            cell.stop();
            Err(io::Error::other(format!(
                "{} did not end in {seconds} s",
                cell.name()
            )))
        }
    }
}
