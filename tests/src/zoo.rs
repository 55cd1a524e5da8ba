// SPDX-License-Identifier: Apache-2.0
//! One of each device, for tests that treat all of them alike.
//!
//! A device added to `cloister-devices` is added here, and so gets the whole of `tests/hostile_transport.rs`. Only the
//! place without a device is not here, as it has no queue: `tests/hostile_random.rs` has it.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use cloister_devices::balloon::Balloon;
use cloister_devices::block::{Block, BlockConfig, CacheMode, DiskKind};
use cloister_devices::console::{Console, ConsoleConfig, TerminalSize};
use cloister_devices::fs::{DaxPlacement, DaxWindow, Fs, FsConfig};
use cloister_devices::mem::{Mem, Region};
use cloister_devices::net::{Net, NetBackend, NetConfig};
use cloister_devices::rng::Rng;
use cloister_devices::virtio::VirtioDevice;
use cloister_devices::vsock::{Vsock, VsockConfig};

use crate::driver::Machine;

/// A kind of device.
#[derive(Clone, Copy)]
pub struct Specimen {
    /// For messages.
    pub name: &'static str,
    /// Makes one; a second one made alike can take over the first one's saved state.
    pub make: fn(&Machine) -> Animal,
    /// A queue whose chains the device looks at as soon as they arrive.
    pub busy_queue: u32,
}

/// A device, and what must live as long as it does: the other ends of its descriptors.
pub struct Animal {
    /// The device.
    pub device: Box<dyn VirtioDevice>,
    /// Kept open.
    pub keep: Vec<OwnedFd>,
}

/// All kinds.
pub const ALL: &[Specimen] = &[
    Specimen {
        name: "rng",
        make: rng,
        busy_queue: 0,
    },
    Specimen {
        name: "console",
        make: console,
        busy_queue: 1,
    },
    Specimen {
        name: "block",
        make: block,
        busy_queue: 0,
    },
    Specimen {
        name: "balloon",
        make: balloon,
        busy_queue: 0,
    },
    Specimen {
        name: "mem",
        make: mem,
        busy_queue: 0,
    },
    Specimen {
        name: "net",
        make: net,
        busy_queue: 1,
    },
    Specimen {
        name: "vsock",
        make: vsock,
        busy_queue: 1,
    },
    Specimen {
        name: "fs",
        make: fs,
        busy_queue: 1,
    },
    Specimen {
        name: "fs with a window",
        make: fs_with_window,
        busy_queue: 1,
    },
];

fn rng(_: &Machine) -> Animal {
    Animal {
        device: Box::new(Rng::new()),
        keep: Vec::new(),
    }
}

fn console(_: &Machine) -> Animal {
    let (input, input_end) = std::io::pipe().unwrap();
    // Never full: floods are part of the tests.
    let output = std::fs::File::options().write(true).open("/dev/null").unwrap();
    let device = Console::new(ConsoleConfig {
        input: Some(input.into()),
        output: Some(output.into()),
        size: Some(TerminalSize {
            columns: 80,
            rows: 24,
        }),
        ..ConsoleConfig::default()
    })
    .unwrap();
    Animal {
        device: Box::new(device),
        keep: vec![input_end.into()],
    }
}

/// An empty disk of `sectors` sectors in memory.
pub fn disk_image(sectors: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, sectors * 512).unwrap();
    fd
}

fn block(machine: &Machine) -> Animal {
    let config = BlockConfig {
        fd: disk_image(64),
        kind: DiskKind::File,
        read_only: false,
        cache: CacheMode::Writeback,
        serial: "zoo".to_owned(),
        queues: 2,
    };
    Animal {
        device: Box::new(Block::new(config, machine.pool.clone()).unwrap()),
        keep: Vec::new(),
    }
}

fn vsock(_: &Machine) -> Animal {
    let (device, _handle) = Vsock::new(VsockConfig::new(3)).unwrap();
    Animal {
        device: Box::new(device),
        keep: Vec::new(),
    }
}

fn fs(machine: &Machine) -> Animal {
    // Nothing is attached: `tests/fs.rs` does that.
    let device = Fs::new(FsConfig::default(), machine.pool.clone(), None).unwrap();
    Animal {
        device: Box::new(device),
        keep: Vec::new(),
    }
}

fn fs_with_window(machine: &Machine) -> Animal {
    let dax = DaxPlacement {
        window: Arc::new(DaxWindow::new(4 << 20).unwrap()),
        base: 0x40_0000_0000,
    };
    let config = FsConfig {
        // Another than that of the one without: neither takes the other's saved state.
        tag: "window".to_owned(),
        ..FsConfig::default()
    };
    let device = Fs::new(config, machine.pool.clone(), Some(dax)).unwrap();
    Animal {
        device: Box::new(device),
        keep: Vec::new(),
    }
}

/// A pair of sockets that pass whole frames, as taps do.
pub fn cable() -> (OwnedFd, OwnedFd) {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    let flags = SocketFlags::CLOEXEC;
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
}

fn net(_: &Machine) -> Animal {
    let (end, other_end) = cable();
    let config = NetConfig {
        backend: NetBackend::Socket(end),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: Some(1500),
    };
    Animal {
        device: Box::new(Net::new(config).unwrap()),
        keep: vec![other_end],
    }
}

fn balloon(machine: &Machine) -> Animal {
    Animal {
        device: Box::new(Balloon::new(true, machine.pool.clone())),
        keep: Vec::new(),
    }
}

fn mem(machine: &Machine) -> Animal {
    // RAM that is there already; the device has no other notion of it.
    let region = Region {
        base: Machine::HIGH,
        size: Machine::END - Machine::HIGH,
    };
    let device = Mem::new(region, machine.pool.clone()).unwrap();
    device.handle().set_requested(u64::MAX);
    Animal {
        device: Box::new(device),
        keep: Vec::new(),
    }
}
