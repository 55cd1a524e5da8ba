// SPDX-License-Identifier: Apache-2.0
//! Disks that come and go while a cell runs.
//!
//! A kernel without ACPI finds the devices that its command line names, when it boots, and no others later. So places
//! are kept: [`crate::DeviceConfig::Slot`] is a register page with device id 0, of which a driver takes no notice. A disk
//! is put there, and the guest is told to look once more (Linux: the page's platform device is bound to the driver).
//!
//! ```text
//!  empty ──attach_block()──▶ a disk, unknown to the guest ──guest binds──▶ in use
//!    ▲                                                                       │
//!    └──detach_block()── not in use any more ◀──────────guest unbinds────────┘
//! ```
//!
//! A guest that does not unbind finds an empty page under its driver, and its own requests undone.

use std::sync::Arc;

use cloister_boot::x86_64::MmioDevice;
use cloister_devices::GuestRam;
use cloister_devices::block::{Block, BlockConfig, BlockHandle};
use cloister_devices::event_loop::EventLoop;
use cloister_devices::virtio::{DeviceType, Empty, Health, MmioTransport, VirtioDevice};
use kvm_ioctls::VmFd;

use super::{Cell, on_failure};
use crate::device_set::{Connect as _, RegisterPage};
use crate::error::AttachError;

/// What is needed to fill a slot.
struct Slot {
    page: Arc<RegisterPage>,
    address: MmioDevice,
    vm: Arc<VmFd>,
    ram: Arc<GuestRam>,
    event_loop: Arc<EventLoop>,
}

impl Slot {
    fn transport(
        &self,
        device: Box<dyn VirtioDevice>,
        health: Arc<Health>,
    ) -> Result<MmioTransport, AttachError> {
        let (ram, event_loop) = (Arc::clone(&self.ram), Arc::clone(&self.event_loop));
        MmioTransport::new(device, ram, event_loop, health).map_err(AttachError::Transport)
    }
}

impl Cell {
    /// Puts a disk into a free slot. Answers which (the position in the configuration's devices, which is the number of the
    /// guest's platform device `virtio-mmio.N`, too) and the way to the disk. The guest has to be told.
    pub fn attach_block(&self, config: BlockConfig) -> Result<(usize, BlockHandle), AttachError> {
        let _one = self.lifecycle();
        let position = self
            .slots()?
            .into_iter()
            .find(|(_, page)| page.lock().device_type() == DeviceType::Empty)
            .map(|(position, _)| position)
            .ok_or(AttachError::NoneFree)?;
        let slot = self.slot(position)?;
        let block = Block::new(config, Arc::clone(&self.host.workers)).map_err(AttachError::Disk)?;
        let handle = block.handle();
        let health = Arc::new(Health::new(format!("{} block{position}", self.shared.name)));
        health.observe(on_failure(&self.shared));
        let transport = slot.transport(Box::new(block), Arc::clone(&health))?;
        transport.connect(&slot.vm, &slot.address)?;
        self.shared.health().push(health);
        drop(slot.page.replace(transport));
        Ok((position, handle))
    }

    /// Takes the disk out of a slot, whether the guest still uses it or not. Returns once no request is under way.
    pub fn detach_block(&self, position: usize) -> Result<(), AttachError> {
        let _one = self.lifecycle();
        let slot = self.slot(position)?;
        if slot.page.lock().device_type() == DeviceType::Empty {
            return Err(AttachError::NotAttached { slot: position });
        }
        let health = Arc::new(Health::new(format!("{} slot{position}", self.shared.name)));
        let empty = slot.transport(Box::new(Empty), health)?;
        let transport = slot.page.replace(empty);
        transport.disconnect(&slot.vm, &slot.address);
        // Not under the page's lock: requests may wait for the host's disks.
        let health = Arc::clone(transport.health());
        drop(transport);
        self.shared.health().retain(|one| !Arc::ptr_eq(one, &health));
        Ok(())
    }

    /// The pages of all slots, by position.
    fn slots(&self) -> Result<Vec<(usize, Arc<RegisterPage>)>, AttachError> {
        let inner = self.shared.lock();
        let machine = inner.machine.as_ref().ok_or(AttachError::Stopped)?;
        let devices = machine.devices.iter().enumerate();
        let slots = devices.filter(|(_, device)| device.is_slot);
        Ok(slots
            .map(|(position, device)| (position, Arc::clone(&device.transport)))
            .collect())
    }

    fn slot(&self, position: usize) -> Result<Slot, AttachError> {
        let inner = self.shared.lock();
        let machine = inner.machine.as_ref().ok_or(AttachError::Stopped)?;
        let placed = machine.devices.get(position).filter(|device| device.is_slot);
        let placed = placed.ok_or(AttachError::NotAttached { slot: position })?;
        Ok(Slot {
            page: Arc::clone(&placed.transport),
            address: placed.address,
            vm: Arc::clone(&machine.vm),
            ram: Arc::clone(machine.memory.ram()),
            event_loop: Arc::clone(&machine.event_loop),
        })
    }
}
