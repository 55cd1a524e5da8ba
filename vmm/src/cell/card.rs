// SPDX-License-Identifier: Apache-2.0
//! Network cards that are connected to a network after their guest has come to know them.
//!
//! A card without a network ([`NetBackend::Unplugged`]) is probed by the guest like any other. In a cell that is paused
//! another device can take its place, which has what it is to be connected to, and goes on from the state of the first: to
//! the guest it is the same card.
//!
//! [`NetBackend::Unplugged`]: cloister_devices::net::NetBackend::Unplugged

use std::sync::Arc;

use cloister_devices::net::{Net, NetConfig};
use cloister_devices::virtio::{Health, MmioTransport};

use super::{Cell, CellState, on_failure};
use crate::device_set::{Connect as _, DeviceHandle};
use crate::error::PlugError;

impl Cell {
    /// Connects the network card at a position of the configuration's devices. The cell must be paused, and the card have as
    /// many queue pairs as before. The guest keeps the hardware address and the MTU that it has read. When this fails the
    /// card may be of no use any more: end the cell.
    pub fn plug(&self, position: usize, config: NetConfig) -> Result<(), PlugError> {
        let _one = self.lifecycle();
        let Some(DeviceHandle::Net(handle)) = self.devices().get(position) else {
            return Err(PlugError::NoCard { position });
        };
        let (page, address, vm, ram, event_loop) = {
            let inner = self.shared.lock();
            match (&inner.state, inner.machine.as_ref()) {
                (CellState::Paused, Some(machine)) => {
                    let placed = machine.devices.get(position);
                    let placed = placed.ok_or(PlugError::NoCard { position })?;
                    (
                        Arc::clone(&placed.transport),
                        placed.address,
                        Arc::clone(&machine.vm),
                        Arc::clone(machine.memory.ram()),
                        Arc::clone(&machine.event_loop),
                    )
                }
                (state, _) => {
                    let state = state.to_string();
                    return Err(PlugError::State { state });
                }
            }
        };
        let net = Net::new(config).map_err(PlugError::Backend)?.in_place_of(handle);
        let health = Arc::new(Health::new(format!("{} net{position}", self.shared.name)));
        health.observe(on_failure(&self.shared));
        let mut transport = MmioTransport::new(Box::new(net), ram, event_loop, Arc::clone(&health))
            .map_err(PlugError::Transport)?;
        let was = Arc::clone(page.lock().health());
        let state = page.lock().save()?;
        transport.restore(&state)?;
        // Until the cell goes on, as all its devices.
        transport.pause();
        page.lock().disconnect(&vm, &address);
        transport.connect(&vm, &address)?;
        drop(page.replace(transport));
        let mut all = self.shared.health();
        all.retain(|one| !Arc::ptr_eq(one, &was));
        all.push(health);
        Ok(())
    }
}
