// SPDX-License-Identifier: Apache-2.0
//! The control side: where the region is, how much the guest should have, and how much it has.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::blocks::Blocks;
use super::handler::MemHandler;
use super::{BLOCK_SIZE, MemMetrics};
use crate::state::{SavedState, StateError};
use crate::virtio::{
    ActivateError, ActivationContext, ActiveDevice, ConfigSignal, DeviceType, VirtioDevice, copy_config,
};
use crate::worker_pool::WorkerPool;

const WHAT: &str = "mem";
const STATE_VERSION: u16 = 1;
const QUEUE_SIZES: [u16; 1] = [64];
/// Feature bit (5.15.3): the driver does not touch unplugged memory.
pub(super) const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// Guest-physical addresses that a device has to give: whole blocks, and RAM to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// First address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
}

/// Why a region is none.
#[derive(Debug, thiserror::Error)]
#[error("a memory device's region of {:#x} bytes at {:#x} is not made of whole blocks of {BLOCK_SIZE:#x} bytes", .0.size, .0.base)]
pub struct RegionError(Region);

#[derive(Serialize, Deserialize)]
struct MemState {
    requested: u64,
    blocks: Blocks,
}

/// What the host asked for, and what the guest has.
pub(super) struct Amounts {
    pub(super) requested: u64,
    pub(super) blocks: Blocks,
}

impl Amounts {
    pub(super) fn plugged_bytes(&self) -> u64 {
        bytes(self.blocks.plugged())
    }
}

/// Bytes of so many blocks of a region, which has fewer than 2^64.
pub(super) fn bytes(blocks: usize) -> u64 {
    u64::try_from(blocks)
        .unwrap_or(u64::MAX)
        .saturating_mul(BLOCK_SIZE)
}

pub(super) struct Common {
    pub(super) region: Region,
    amounts: Mutex<Amounts>,
    changed: Condvar,
    signal: ConfigSignal,
}

impl Common {
    pub(super) fn amounts(&self) -> MutexGuard<'_, Amounts> {
        // Nothing panics half-way through a change.
        self.amounts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Blocks have been plugged or unplugged.
    pub(super) fn plugged_changed(&self) {
        self.changed.notify_all();
    }
}

/// A way to a memory device that is in use by a guest.
#[derive(Clone)]
pub struct MemHandle {
    common: Arc<Common>,
    metrics: Arc<MemMetrics>,
}

impl MemHandle {
    /// Asks the driver to bring the plugged memory to `bytes`, rounded up to whole blocks and no more than the region. It
    /// does so when it can; what it cannot do without it keeps. Answers what is asked for now.
    pub fn set_requested(&self, bytes: u64) -> u64 {
        let requested = bytes
            .checked_next_multiple_of(BLOCK_SIZE)
            .unwrap_or(u64::MAX)
            .min(self.common.region.size);
        let mut amounts = self.common.amounts();
        let before = std::mem::replace(&mut amounts.requested, requested);
        drop(amounts);
        if before != requested {
            self.common.signal.changed();
        }
        requested
    }

    /// What was asked for.
    pub fn requested(&self) -> u64 {
        self.common.amounts().requested
    }

    /// Bytes that are plugged.
    pub fn plugged(&self) -> u64 {
        self.common.amounts().plugged_bytes()
    }

    /// The most that can be plugged.
    pub fn max(&self) -> u64 {
        self.common.region.size
    }

    /// Waits until as much is plugged as was asked for, or `patience` is over. Answers how much is plugged then.
    pub fn wait(&self, patience: Duration) -> u64 {
        let amounts = self.common.amounts();
        let waited = self
            .common
            .changed
            .wait_timeout_while(amounts, patience, |amounts| {
                amounts.plugged_bytes() != amounts.requested
            });
        let (amounts, _) = waited.unwrap_or_else(PoisonError::into_inner);
        amounts.plugged_bytes()
    }

    /// What the device counts.
    pub fn metrics(&self) -> &MemMetrics {
        &self.metrics
    }
}

/// A virtio memory device.
pub struct Mem {
    common: Arc<Common>,
    pool: Arc<WorkerPool>,
    metrics: Arc<MemMetrics>,
}

impl Mem {
    /// A device that no driver has touched, with everything in `region` unplugged. Memory is freed on `pool`.
    ///
    /// # Errors
    /// A region that is not made of whole blocks.
    pub fn new(region: Region, pool: Arc<WorkerPool>) -> Result<Self, RegionError> {
        let whole = |n: u64| n.is_multiple_of(BLOCK_SIZE);
        let count = usize::try_from(region.size / BLOCK_SIZE).unwrap_or(0);
        if count == 0
            || !whole(region.base)
            || !whole(region.size)
            || region.base.checked_add(region.size).is_none()
        {
            return Err(RegionError(region));
        }
        Ok(Self {
            common: Arc::new(Common {
                region,
                amounts: Mutex::new(Amounts {
                    requested: 0,
                    blocks: Blocks::new(count),
                }),
                changed: Condvar::new(),
                signal: ConfigSignal::default(),
            }),
            pool,
            metrics: Arc::default(),
        })
    }

    /// A handle that stays good when the device has gone behind its transport.
    pub fn handle(&self) -> MemHandle {
        MemHandle {
            common: Arc::clone(&self.common),
            metrics: Arc::clone(&self.metrics),
        }
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> DeviceType {
        DeviceType::Mem
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        UNPLUGGED_INACCESSIBLE
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        let Region { base, size } = self.common.region;
        let amounts = self.common.amounts();
        let (plugged, requested) = (amounts.plugged_bytes(), amounts.requested);
        drop(amounts);
        // struct virtio_mem_config: block_size, node_id and padding, addr, region_size, usable_region_size,
        // plugged_size, requested_size.
        let fields = [BLOCK_SIZE, 0, base, size, size, plugged, requested];
        copy_config(fields.map(u64::to_le_bytes).as_flattened(), offset, data);
    }

    fn activate(
        &mut self,
        mut context: ActivationContext,
    ) -> Result<Arc<Mutex<dyn ActiveDevice>>, ActivateError> {
        let queue = context.take_queue(0)?;
        if context.features & UNPLUGGED_INACCESSIBLE == 0 {
            context
                .health
                .complain("its driver does not say that it leaves unplugged memory alone");
        }
        self.common.signal.connect(Some(context.interrupt));
        let (common, metrics) = (Arc::clone(&self.common), Arc::clone(&self.metrics));
        let handler = MemHandler::new(queue, common, &self.pool, context.health, metrics);
        Ok(Arc::new(Mutex::new(handler)))
    }

    fn reset(&mut self) {
        self.common.signal.connect(None);
    }

    fn save(&self) -> Result<SavedState, StateError> {
        let amounts = self.common.amounts();
        let state = MemState {
            requested: amounts.requested,
            blocks: amounts.blocks.clone(),
        };
        SavedState::encode(WHAT, STATE_VERSION, &state)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), StateError> {
        let state: MemState = state.decode(WHAT, STATE_VERSION)?;
        let mut amounts = self.common.amounts();
        let count = amounts.blocks.count();
        let whole = state.requested.is_multiple_of(BLOCK_SIZE) && state.requested <= self.common.region.size;
        if !whole || !state.blocks.is_sound(count) {
            return Err(StateError::Invalid {
                what: WHAT,
                why: format!("it does not fit a region of {count} blocks"),
            });
        }
        *amounts = Amounts {
            requested: state.requested,
            blocks: state.blocks,
        };
        Ok(())
    }
}
