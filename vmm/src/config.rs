// SPDX-License-Identifier: Apache-2.0
//! What a cell is to be: plain data and open files, checked before anything is made.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use cloister_boot::x86_64::layout::{self, Layout};
use cloister_boot::x86_64::{Description, cpuid::MAX_VCPUS};
use cloister_devices::block::BlockConfig;
use cloister_devices::console::TerminalSize;
use cloister_devices::fs::{AttachOptions, FsConfig};
use cloister_devices::net::NetConfig;
use cloister_devices::virtio::VirtioDevice;
use cloister_devices::vsock::VsockConfig;

use crate::cell::SavedCell;
use crate::image::{Image, Shape};
use crate::memory::HUGE_PAGE;
use crate::x86_64::interrupt_chip::KERNEL_PINS;
use crate::x86_64::ioapic::MAX_PINS;

/// Longest name of a cell in bytes.
pub const MAX_NAME: usize = 64;

/// What every kernel of ours is told, whatever else: to keep to itself what is less than critical (each letter on a serial
/// port is two exits), how to end (see `stop`), and that its clock and its random numbers can be trusted. With one vCPU it
/// is not to take out its lock prefixes, which costs a switch of page tables for each. The RAM disk's memory is not to be
/// filled with a pattern and freed: `Cell::discard_initrd` gives it back to the host.
/// Only words that our kernel knows: it hands others to init as arguments.
pub const BASE_COMMAND_LINE: &str = "loglevel=3 reboot=t panic=-1 tsc=reliable random.trust_cpu=on noreplace-smp retain_initrd \
     dummy.numdummies=0";

/// What a kernel is told of a cell that has no serial port, so that it does not probe for one (13 exits). Words with a dot
/// in them are a driver's: a kernel without it forgets them.
pub const NO_SERIAL: &str = "8250.nr_uarts=0";

/// One virtual machine.
#[derive(Debug)]
pub struct CellConfig {
    /// Name in messages and thread names.
    pub name: String,
    /// Number of vCPUs that it starts with, 1 to 32.
    pub vcpus: u8,
    /// The most that it can be given while it runs, see [`crate::Cell::provide_vcpus`]; no more than `vcpus` if this is
    /// less. Each costs the guest some 200 KiB of its RAM, whether it is there or not.
    pub max_vcpus: u8,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// Pages that back the RAM.
    pub huge_pages: HugePages,
    /// Allow more RAM than the host has.
    pub overcommit: bool,
    /// Which interrupt chip.
    pub interrupt_chip: InterruptChip,
    /// What to run.
    pub boot: Boot,
    /// The serial port, if there is to be one.
    pub serial: Option<SerialConfig>,
    /// Virtio devices, in the order of their register pages and interrupts.
    pub devices: Vec<DeviceConfig>,
    /// Whether a failed device stops the cell. Otherwise its driver sees DEVICE_NEEDS_RESET and the cell goes on.
    pub stop_on_device_failure: bool,
}

/// Pages that back guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub enum HugePages {
    /// Ordinary pages.
    No,
    /// Transparent huge pages, from a tmpfs of the program's own where it may make one (CAP_SYS_ADMIN), otherwise
    /// where the host's setting `shmem_enabled` gives them. A guest then takes memory in steps of 2 MiB, and KVM maps
    /// it with a five-hundredth of the exits.
    #[default]
    Transparent,
    /// Reserved huge pages of 2 MiB (hugetlbfs): all of the RAM, or an error.
    Reserved,
}

/// Which interrupt chip a cell has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum InterruptChip {
    /// Split where KVM has it, KVM's full one otherwise.
    #[default]
    Auto,
    /// Split, or an error.
    Split,
    /// KVM's full one.
    Kernel,
}

/// What a cell starts with.
#[derive(Debug)]
pub enum Boot {
    /// A kernel.
    Kernel(KernelBoot),
    /// What `Cell::save` gave, with the RAM that belongs to it.
    Restore {
        /// Registers, interrupt chip and devices.
        saved: Box<SavedCell>,
        /// The memory file of the saved cell.
        memory: OwnedFd,
    },
    /// What an image holds: any number of cells, each with RAM of its own. The configuration must be like that of the
    /// cell that it was taken of ([`crate::image::Shape`]); CPUID is as it was there. A vsock device has its guest drop all
    /// connections. Before anything else runs in it the guest should be given fresh randomness and the time.
    Clone {
        /// The image.
        image: Arc<Image>,
    },
}

/// A kernel and what it is told.
#[derive(Debug)]
pub struct KernelBoot {
    /// The kernel image, a regular file. Read by position, so that cells can share one open file.
    pub kernel: File,
    /// The initial RAM disk.
    pub initrd: Option<File>,
    /// The command line; devices are added to it where `description` says so.
    pub command_line: String,
    /// How the kernel finds processors and devices.
    pub description: Description,
}

/// The serial port.
#[derive(Debug, Default)]
pub struct SerialConfig {
    /// Where its output goes; better not something that blocks. The last 16 KiB are kept in any case.
    pub output: Option<OwnedFd>,
}

/// A virtio device.
pub enum DeviceConfig {
    /// Entropy.
    Rng,
    /// A console (hvc0).
    Console {
        /// Where input comes from. Set to O_NONBLOCK.
        input: Option<OwnedFd>,
        /// Where output goes. Set to O_NONBLOCK.
        output: Option<OwnedFd>,
        /// The terminal's size, if it is one.
        size: Option<TerminalSize>,
    },
    /// A file system.
    Fs {
        /// Its settings.
        config: FsConfig,
        /// Size of its DAX window in bytes, a multiple of 2 MiB; none without one.
        dax_window: Option<u64>,
        /// What is attached from the beginning: name, what it is, how. A restored guest has files open there.
        attached: Vec<(String, OwnedFd, AttachOptions)>,
    },
    /// Sockets between guest and host.
    Vsock(VsockConfig),
    /// A network card.
    Net(NetConfig),
    /// A disk.
    Block(BlockConfig),
    /// A memory balloon, with free page reporting: what the guest does not use goes back to the host by itself.
    Balloon {
        /// The guest takes pages back before it kills processes for want of memory.
        deflate_on_oom: bool,
    },
    /// Nothing yet: a place for a disk that comes while the guest runs, see [`crate::Cell::attach_block`]. Costs a booting
    /// guest some exits, and one of the few interrupts.
    Slot,
    /// Memory that the guest can be given while it runs, and taken again.
    Mem {
        /// The most, in MiB; whole sections of 128 MiB are made of it.
        max_mib: u64,
    },
    /// Any other device, made by the caller.
    Custom {
        /// Name in messages.
        name: String,
        /// The device.
        device: Box<dyn VirtioDevice>,
    },
}

impl DeviceConfig {
    /// The device's name in messages.
    pub fn name(&self) -> &str {
        match self {
            Self::Rng => "rng",
            Self::Console { .. } => "console",
            Self::Fs { .. } => "fs",
            Self::Vsock(_) => "vsock",
            Self::Net(_) => "net",
            Self::Block(_) => "block",
            Self::Balloon { .. } => "balloon",
            Self::Slot => "slot",
            Self::Mem { .. } => "mem",
            Self::Custom { name, .. } => name,
        }
    }
}

impl std::fmt::Debug for DeviceConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// Number of vCPUs.
    #[error("{vcpus} vCPUs is not between 1 and {max}")]
    Vcpus {
        /// Asked for.
        vcpus: u8,
        /// The most that this program and this host's KVM allow.
        max: u8,
    },
    /// Memory size or windows.
    #[error(transparent)]
    Layout(#[from] layout::Error),
    /// Empty, too long, or with characters that are not printable.
    #[error("a cell's name has 1 to {MAX_NAME} printable ASCII characters without blanks")]
    Name,
    /// A DAX window of an odd size.
    #[error("a DAX window of {size} bytes is not a multiple of 2 MiB")]
    DaxWindow {
        /// Asked for, in bytes.
        size: u64,
    },
    /// Memory devices that cannot be.
    #[error("{why}")]
    Mem {
        /// What stands against it.
        why: &'static str,
    },
    /// More devices than interrupts.
    #[error("{found} virtio devices, at most {max} have interrupts")]
    TooManyDevices {
        /// Asked for.
        found: usize,
        /// The most.
        max: usize,
    },
}

impl CellConfig {
    /// A cell that boots `boot` with nothing but a serial port; fill in the rest.
    pub fn new(name: impl Into<String>, boot: Boot) -> Self {
        Self {
            name: name.into(),
            vcpus: 1,
            max_vcpus: 1,
            memory_mib: 256,
            huge_pages: HugePages::default(),
            overcommit: false,
            interrupt_chip: InterruptChip::Auto,
            boot,
            serial: Some(SerialConfig::default()),
            devices: Vec::new(),
            stop_on_device_failure: true,
        }
    }

    /// vCPUs that the guest can have.
    pub(crate) fn possible_vcpus(&self) -> u8 {
        self.vcpus.max(self.max_vcpus)
    }

    /// Checks all that can be checked without making anything, and answers the RAM's layout. `host_vcpus` is KVM's
    /// limit.
    pub(crate) fn validate(&self, host_vcpus: usize) -> Result<Layout, ConfigError> {
        let max = u8::try_from(host_vcpus).unwrap_or(u8::MAX).min(MAX_VCPUS);
        let possible = self.possible_vcpus();
        if self.vcpus == 0 || possible > max {
            return Err(ConfigError::Vcpus {
                vcpus: if self.vcpus == 0 { 0 } else { possible },
                max,
            });
        }
        let printable = self.name.bytes().all(|b| b.is_ascii_graphic());
        if !printable || self.name.is_empty() || self.name.len() > MAX_NAME {
            return Err(ConfigError::Name);
        }
        let pins = if self.interrupt_chip == InterruptChip::Kernel {
            KERNEL_PINS
        } else {
            MAX_PINS
        };
        let max = layout::virtio_mmio_gsis()
            .take_while(|gsi| *gsi < u32::from(pins))
            .count();
        if self.devices.len() > max {
            return Err(ConfigError::TooManyDevices {
                found: self.devices.len(),
                max,
            });
        }
        for device in &self.devices {
            if let DeviceConfig::Fs {
                dax_window: Some(size),
                ..
            } = device
                && (*size == 0 || !size.is_multiple_of(HUGE_PAGE))
            {
                return Err(ConfigError::DaxWindow { size: *size });
            }
        }
        let mut layout = Layout::new(self.memory_mib)?;
        if let Some(max_mib) = self.pluggable_mib() {
            let mems = self
                .devices
                .iter()
                .filter(|device| matches!(device, DeviceConfig::Mem { .. }));
            if mems.count() > 1 {
                return Err(ConfigError::Mem {
                    why: "a cell has one memory device",
                });
            }
            if self.huge_pages == HugePages::Reserved {
                return Err(ConfigError::Mem {
                    why: "reserved huge pages cannot be plugged: leave out the memory device, or take transparent ones",
                });
            }
            layout.add_pluggable(max_mib.saturating_mul(1 << 20))?;
        }
        Ok(layout)
    }

    /// What an image of it says.
    pub(crate) fn shape(&self) -> Shape {
        Shape {
            memory_mib: self.memory_mib,
            pluggable_mib: self.pluggable_mib().unwrap_or(0),
            max_vcpus: self.possible_vcpus(),
            serial: self.serial.is_some(),
            devices: self
                .devices
                .iter()
                .map(|device| device.name().to_owned())
                .collect(),
        }
    }

    /// What a memory device can plug, in MiB.
    pub(crate) fn pluggable_mib(&self) -> Option<u64> {
        self.devices.iter().find_map(|device| match device {
            DeviceConfig::Mem { max_mib } => Some(*max_mib),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> CellConfig {
        let boot = KernelBoot {
            kernel: File::open("/dev/null").unwrap(),
            initrd: None,
            command_line: String::new(),
            description: Description::MpTable,
        };
        CellConfig::new("c", Boot::Kernel(boot))
    }

    #[test]
    fn vcpus_names_sizes_and_devices_are_bounded() {
        assert!(config().validate(8).is_ok());
        for (vcpus, host, max) in [(0, 8, 8), (9, 8, 8), (33, 1000, 32), (255, 255, 32)] {
            let error = CellConfig { vcpus, ..config() }.validate(host).unwrap_err();
            assert_eq!(error, ConfigError::Vcpus { vcpus, max });
        }
        let max_vcpus = 9;
        let error = CellConfig {
            max_vcpus,
            ..config()
        }
        .validate(8)
        .unwrap_err();
        assert_eq!(error, ConfigError::Vcpus { vcpus: 9, max: 8 });
        for name in ["", "a b", "caf\u{e9}", "a\n", &"x".repeat(65)] {
            let error = CellConfig {
                name: name.to_owned(),
                ..config()
            }
            .validate(8)
            .unwrap_err();
            assert_eq!(error, ConfigError::Name, "{name:?}");
        }
        for memory_mib in [0, u64::MAX, (1 << 44) + 1] {
            let error = CellConfig {
                memory_mib,
                ..config()
            }
            .validate(8)
            .unwrap_err();
            assert!(matches!(error, ConfigError::Layout(_)));
        }
        let mem = || DeviceConfig::Mem { max_mib: 100 };
        let with = |devices| CellConfig { devices, ..config() };
        let layout = with(vec![DeviceConfig::Rng, mem()]).validate(8).unwrap();
        assert_eq!(layout.pluggable().map(|(_, size)| size), Some(128 << 20));
        let mut reserved = with(vec![mem()]);
        reserved.huge_pages = HugePages::Reserved;
        for bad in [with(vec![mem(), mem()]), reserved] {
            assert!(matches!(bad.validate(8), Err(ConfigError::Mem { .. })));
        }
        assert!(
            with(vec![DeviceConfig::Mem { max_mib: u64::MAX }])
                .validate(8)
                .is_err()
        );
        let devices = (0..30).map(|_| DeviceConfig::Rng).collect();
        let error = CellConfig { devices, ..config() }.validate(8).unwrap_err();
        assert_eq!(error, ConfigError::TooManyDevices { found: 30, max: 29 });
    }
}
