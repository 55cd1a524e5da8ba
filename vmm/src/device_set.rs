// SPDX-License-Identifier: Apache-2.0
//! Making a cell's virtio devices and connecting them to KVM.
//!
//! Each device gets a register page, a GSI, an irqfd for its interrupt, and one ioeventfd per queue on the page's
//! QueueNotify register (virtio 1.3, 4.2.2, offset 0x50) that matches the queue's number: neither interrupts nor
//! notifications pass through a vCPU thread, but for those of a queue that drivers wait for
//! ([`VirtioDevice::queue_served_at_once`]).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cloister_boot::x86_64::MmioDevice;
use cloister_boot::x86_64::layout::{Layout, VIRTIO_MMIO_BASE, VIRTIO_MMIO_SIZE, virtio_mmio_gsis};
use cloister_devices::GuestRam;
use cloister_devices::balloon::{Balloon, BalloonHandle};
use cloister_devices::block::{Block, BlockHandle};
use cloister_devices::console::{Console, ConsoleConfig, ConsoleHandle};
use cloister_devices::event_loop::EventLoop;
use cloister_devices::fs::{DaxPlacement, DaxWindow, Fs, FsHandle};
use cloister_devices::mem::{Mem, MemHandle, Region};
use cloister_devices::net::{Net, NetHandle};
use cloister_devices::output_tail::OutputTail;
use cloister_devices::rng::Rng;
use cloister_devices::virtio::{Empty, Health, MmioTransport, VirtioDevice};
use cloister_devices::vsock::{Vsock, VsockHandle};
use cloister_devices::worker_pool::WorkerPool;
use kvm_ioctls::{IoEventAddress, VmFd};

use crate::bus::BusDevice;
use crate::config::DeviceConfig;
use crate::error::CreateError;

/// QueueNotify.
const QUEUE_NOTIFY: u64 = 0x50;
/// InterruptStatus.
const INTERRUPT_STATUS: u64 = 0x60;

/// The control side of a device, for the host's use while the cell runs. By position as in the configuration.
#[derive(Clone)]
#[non_exhaustive]
pub enum DeviceHandle {
    /// A console.
    Console(ConsoleHandle),
    /// A file system: what is attached to it.
    Fs(FsHandle),
    /// Sockets: connections both ways.
    Vsock(VsockHandle),
    /// A network card.
    Net(NetHandle),
    /// A disk.
    Block(BlockHandle),
    /// A memory balloon: its target, and what it gave back.
    Balloon(BalloonHandle),
    /// Memory to plug: how much there should be, and how much there is.
    Mem(MemHandle),
    /// A device without one.
    None,
}

/// Told when a device fails: its name and why.
pub(crate) type OnFailure = Box<dyn Fn(&str, &str) + Send + Sync>;

/// A virtio device in its place.
pub(crate) struct Placed {
    pub(crate) name: String,
    pub(crate) address: MmioDevice,
    pub(crate) transport: Arc<RegisterPage>,
    pub(crate) handle: DeviceHandle,
    pub(crate) window: Option<DaxPlacement>,
    pub(crate) health: Arc<Health>,
    /// A place for disks that come and go.
    pub(crate) is_slot: bool,
}

/// A device's register page on the bus.
pub(crate) struct RegisterPage(Mutex<MmioTransport>);

impl RegisterPage {
    pub(crate) fn lock(&self) -> MutexGuard<'_, MmioTransport> {
        // A device that panicked on a vCPU thread has stopped its cell; what follows only takes it down.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts another device here. Answers the one that was.
    pub(crate) fn replace(&self, transport: MmioTransport) -> MmioTransport {
        std::mem::replace(&mut *self.lock(), transport)
    }
}

impl BusDevice for RegisterPage {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.lock().read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.lock().write(offset, data);
    }
}

impl Placed {
    /// Whether the device has an interrupt reason that the driver has not acknowledged.
    pub(crate) fn asserted(page: &RegisterPage) -> bool {
        let mut status = [0; 4];
        page.lock().read(INTERRUPT_STATUS, &mut status);
        status != [0; 4]
    }
}

/// A transport's interrupt and notifications, and KVM.
pub(crate) trait Connect {
    /// Registers them.
    fn connect(&self, vm: &VmFd, address: &MmioDevice) -> Result<(), CreateError>;
    /// Undoes it.
    fn disconnect(&self, vm: &VmFd, address: &MmioDevice);
}

impl Connect for MmioTransport {
    fn connect(&self, vm: &VmFd, address: &MmioDevice) -> Result<(), CreateError> {
        let kvm = |what| move |source| CreateError::Kvm { what, source };
        vm.register_irqfd(self.interrupt().line(), address.gsi)
            .map_err(kvm("KVM_IRQFD"))?;
        let notify = IoEventAddress::Mmio(address.base + QUEUE_NOTIFY);
        for (queue, notification) in self.ioeventfds() {
            vm.register_ioevent(notification, &notify, queue)
                .map_err(kvm("KVM_IOEVENTFD"))?;
        }
        Ok(())
    }

    fn disconnect(&self, vm: &VmFd, address: &MmioDevice) {
        // What was not registered cannot be unregistered; KVM forgets both when the eventfds are closed, anyway.
        let _ = vm.unregister_irqfd(self.interrupt().line(), address.gsi);
        let notify = IoEventAddress::Mmio(address.base + QUEUE_NOTIFY);
        for (queue, notification) in self.ioeventfds() {
            let _ = vm.unregister_ioevent(notification, &notify, queue);
        }
    }
}

/// What devices are made with.
pub(crate) struct Surroundings<'a> {
    pub(crate) cell: &'a str,
    pub(crate) ram: &'a Arc<GuestRam>,
    pub(crate) event_loop: &'a Arc<EventLoop>,
    pub(crate) tail: &'a OutputTail,
    pub(crate) workers: &'a Arc<WorkerPool>,
    /// Told when a device fails: its name and why.
    pub(crate) on_failure: &'a dyn Fn() -> OnFailure,
}

/// Makes `configs` in order. Shared-memory windows get their guest addresses from `layout`.
pub(crate) fn make(
    configs: Vec<DeviceConfig>,
    around: &Surroundings,
    layout: &mut Layout,
) -> Result<Vec<Placed>, CreateError> {
    let mut placed = Vec::new();
    let places = (VIRTIO_MMIO_BASE..).step_by(usize::try_from(VIRTIO_MMIO_SIZE).unwrap_or(1));
    for ((config, base), gsi) in configs.into_iter().zip(places).zip(virtio_mmio_gsis()) {
        let name = config.name().to_owned();
        let is_slot = matches!(config, DeviceConfig::Slot);
        let (device, handle, window) =
            make_one(config, around, layout).map_err(|source| CreateError::Device {
                device: name.clone(),
                source,
            })?;
        let health = Arc::new(Health::new(format!("{} {name}", around.cell)));
        health.observe((around.on_failure)());
        let ram = Arc::clone(around.ram);
        let transport = MmioTransport::new(device, ram, Arc::clone(around.event_loop), Arc::clone(&health))
            .map_err(|source| CreateError::Transport {
            device: name.clone(),
            source,
        })?;
        placed.push(Placed {
            name,
            address: MmioDevice {
                base,
                size: VIRTIO_MMIO_SIZE,
                gsi,
            },
            transport: Arc::new(RegisterPage(Mutex::new(transport))),
            handle,
            window,
            health,
            is_slot,
        });
    }
    Ok(placed)
}

type Made = (Box<dyn VirtioDevice>, DeviceHandle, Option<DaxPlacement>);

fn make_one(
    config: DeviceConfig,
    around: &Surroundings,
    layout: &mut Layout,
) -> Result<Made, Box<dyn std::error::Error + Send + Sync>> {
    Ok(match config {
        DeviceConfig::Rng => (Box::new(Rng::new()), DeviceHandle::None, None),
        DeviceConfig::Console { input, output, size } => {
            let tail = around.tail.clone();
            let console = Console::new(ConsoleConfig {
                input,
                output,
                tail,
                size,
            })?;
            let handle = DeviceHandle::Console(console.handle());
            (Box::new(console), handle, None)
        }
        DeviceConfig::Fs {
            config,
            dax_window,
            attached,
        } => {
            let window = match dax_window {
                None => None,
                Some(size) => {
                    let window = Arc::new(DaxWindow::new(size)?);
                    Some(DaxPlacement {
                        window,
                        base: layout.add_window(size)?,
                    })
                }
            };
            let fs = Fs::new(config, Arc::clone(around.workers), window.clone())?;
            let handle = fs.handle();
            for (name, tree, options) in &attached {
                handle.attach(name, tree, *options)?;
            }
            (Box::new(fs), DeviceHandle::Fs(handle), window)
        }
        DeviceConfig::Vsock(config) => {
            let (vsock, handle) = Vsock::new(config)?;
            (Box::new(vsock), DeviceHandle::Vsock(handle), None)
        }
        DeviceConfig::Net(config) => {
            let net = Net::new(config)?;
            let handle = DeviceHandle::Net(net.handle());
            (Box::new(net), handle, None)
        }
        DeviceConfig::Block(config) => {
            let block = Block::new(config, Arc::clone(around.workers))?;
            let handle = DeviceHandle::Block(block.handle());
            (Box::new(block), handle, None)
        }
        DeviceConfig::Balloon { deflate_on_oom } => {
            let balloon = Balloon::new(deflate_on_oom, Arc::clone(around.workers));
            let handle = DeviceHandle::Balloon(balloon.handle());
            (Box::new(balloon), handle, None)
        }
        DeviceConfig::Slot => (Box::new(Empty), DeviceHandle::None, None),
        DeviceConfig::Mem { .. } => {
            let (base, size) = layout.pluggable().unwrap_or_default();
            let mem = Mem::new(Region { base, size }, Arc::clone(around.workers))?;
            let handle = DeviceHandle::Mem(mem.handle());
            (Box::new(mem), handle, None)
        }
        DeviceConfig::Custom { device, .. } => (device, DeviceHandle::None, None),
    })
}
