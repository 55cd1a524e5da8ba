// SPDX-License-Identifier: Apache-2.0
//! The control side: configuration space, cache mode and capacity.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::disk::{BlockConfig, BlockError, CacheMode, Disk};
use super::handler::{BlockHandler, Shared};
use super::request::{
    MAX_DISCARD_SECTORS, MAX_DISCARD_SEGMENTS, MAX_ZERO_SECTORS, MAX_ZERO_SEGMENTS, SERIAL_SIZE,
};
use super::{BlockMetrics, SECTOR_SIZE};
use crate::state::{SavedState, StateError};
use crate::virtio::{
    ActivateError, ActivationContext, ActiveDevice, ConfigSignal, DeviceType, VirtioDevice, copy_config,
};
use crate::worker_pool::WorkerPool;

const WHAT: &str = "block";
const STATE_VERSION: u16 = 1;
const QUEUE_SIZE: u16 = 256;
const MAX_QUEUES: u16 = 16;
/// A header, a status and this many data descriptors fit into a queue.
const SEGMENTS_MAX: u32 = 254;
const SEGMENT_SIZE_MAX: u32 = 128 << 10;

/// Feature bits (5.2.3).
mod feature {
    pub const SIZE_MAX: u64 = 1 << 1;
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Offset of `writeback` in configuration space.
const CONFIG_WRITEBACK: u32 = 32;

#[derive(Serialize, Deserialize)]
struct BlockState {
    capacity: u64,
    read_only: bool,
    writeback: bool,
}

/// What control side and handle share.
struct Common {
    disk: Arc<Disk>,
    /// The cache mode that the driver chose, if it may choose.
    writeback: Arc<AtomicBool>,
    signal: ConfigSignal,
}

/// A way to a disk that is in use by a guest.
#[derive(Clone)]
pub struct BlockHandle {
    common: Arc<Common>,
    metrics: Arc<BlockMetrics>,
}

impl BlockHandle {
    /// What the device counts.
    pub fn metrics(&self) -> &BlockMetrics {
        &self.metrics
    }

    /// The disk has another size on the host: the driver is told. Returns the size in bytes.
    pub fn refresh_capacity(&self) -> Result<u64, BlockError> {
        let Common { disk, signal, .. } = &*self.common;
        let before = disk.capacity();
        let sectors = disk.refresh_capacity()?;
        if sectors != before {
            signal.changed();
        }
        // Came from a number of bytes.
        Ok(sectors * SECTOR_SIZE)
    }
}

/// A virtio block device.
pub struct Block {
    common: Arc<Common>,
    cache: CacheMode,
    serial: [u8; SERIAL_SIZE],
    queue_sizes: Vec<u16>,
    pool: Arc<WorkerPool>,
    metrics: Arc<BlockMetrics>,
    /// The data side, while there is one.
    shared: Option<Arc<Shared>>,
}

impl Block {
    /// A device that no driver has touched. Its requests run on `pool`.
    pub fn new(config: BlockConfig, pool: Arc<WorkerPool>) -> Result<Self, BlockError> {
        let mut serial = [0; SERIAL_SIZE];
        match serial.get_mut(..config.serial.len()) {
            Some(start) => start.copy_from_slice(config.serial.as_bytes()),
            None => return Err(BlockError::Serial(config.serial)),
        }
        if !(1..=MAX_QUEUES).contains(&config.queues) {
            return Err(BlockError::Queues(config.queues));
        }
        let disk = Disk::new(config.fd, config.kind, config.read_only)?;
        Ok(Self {
            common: Arc::new(Common {
                disk: Arc::new(disk),
                writeback: Arc::new(AtomicBool::new(config.cache == CacheMode::Writeback)),
                signal: ConfigSignal::default(),
            }),
            cache: config.cache,
            serial,
            queue_sizes: vec![QUEUE_SIZE; config.queues.into()],
            pool,
            metrics: Arc::default(),
            shared: None,
        })
    }

    /// A handle that stays good when the device has gone behind its transport.
    pub fn handle(&self) -> BlockHandle {
        BlockHandle {
            common: Arc::clone(&self.common),
            metrics: Arc::clone(&self.metrics),
        }
    }

    /// What the device counts.
    pub fn metrics(&self) -> &Arc<BlockMetrics> {
        &self.metrics
    }

    fn disk(&self) -> &Disk {
        &self.common.disk
    }

    fn start(
        &mut self,
        mut context: ActivationContext,
    ) -> Result<Arc<Mutex<dyn ActiveDevice>>, ActivateError> {
        // 5.2.5: a driver that does not take MQ uses queue 0 only.
        let queues: Vec<_> = context.queues.iter_mut().map(Option::take).collect();
        if queues.first().is_none_or(Option::is_none) {
            return Err(ActivateError::MissingQueue(0));
        }
        self.common.signal.connect(Some(context.interrupt));
        let shared = Arc::new(Shared {
            disk: Arc::clone(&self.common.disk),
            serial: self.serial,
            // 5.2.6.2: without FLUSH the driver cannot ask for stable writes, so all of them are.
            always_write_through: self.cache == CacheMode::Writethrough
                || context.features & feature::FLUSH == 0,
            cache_is_chosen: context.features & feature::CONFIG_WCE != 0,
            writeback: Arc::clone(&self.common.writeback),
            pool: Arc::clone(&self.pool),
            health: context.health,
            metrics: Arc::clone(&self.metrics),
        });
        let handler = BlockHandler::new(queues, &shared);
        self.shared = Some(shared);
        Ok(Arc::new(Mutex::new(handler)))
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        let mut features = feature::SIZE_MAX | feature::SEG_MAX | feature::BLK_SIZE | feature::FLUSH;
        if self.queue_sizes.len() > 1 {
            features |= feature::MQ;
        }
        if self.disk().is_read_only() {
            features |= feature::RO;
        } else {
            features |= feature::DISCARD | feature::WRITE_ZEROES;
            if self.cache == CacheMode::Writeback {
                features |= feature::CONFIG_WCE;
            }
        }
        features
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        // struct virtio_blk_config (5.2.4).
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.disk().capacity().to_le_bytes());
        put(8, &SEGMENT_SIZE_MAX.to_le_bytes());
        put(12, &SEGMENTS_MAX.to_le_bytes());
        put(20, &self.disk().block_size().to_le_bytes());
        put(32, &[self.common.writeback.load(Ordering::Acquire).into()]);
        // At most MAX_QUEUES.
        let queues = u16::try_from(self.queue_sizes.len()).unwrap_or(1);
        put(34, &queues.to_le_bytes());
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &MAX_DISCARD_SEGMENTS.to_le_bytes());
        let alignment = u64::from(self.disk().block_size()) / SECTOR_SIZE;
        put(44, &u32::try_from(alignment).unwrap_or(1).to_le_bytes());
        put(48, &MAX_ZERO_SECTORS.to_le_bytes());
        put(52, &MAX_ZERO_SEGMENTS.to_le_bytes());
        put(56, &[1]);
        copy_config(&config, offset, data);
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        let (CONFIG_WRITEBACK, &[value @ (0 | 1)]) = (offset, data) else {
            return;
        };
        // Only where CONFIG_WCE was negotiated.
        let Some(shared) = self.shared.as_ref().filter(|shared| shared.cache_is_chosen) else {
            return;
        };
        let before = self.common.writeback.swap(value == 1, Ordering::AcqRel);
        if before && value == 0 {
            // What was written before becomes stable, too, and not on this vCPU's time.
            let shared = Arc::clone(shared);
            self.pool.submit(move || {
                if let Err(error) = shared.disk.flush() {
                    shared.health.complain(format_args!("flush failed: {error}"));
                }
            });
        }
    }

    fn activate(
        &mut self,
        context: ActivationContext,
    ) -> Result<Arc<Mutex<dyn ActiveDevice>>, ActivateError> {
        self.start(context)
    }

    fn reset(&mut self) {
        self.shared = None;
        self.common.signal.connect(None);
        let writeback = self.cache == CacheMode::Writeback;
        self.common.writeback.store(writeback, Ordering::Release);
    }

    fn save(&self) -> Result<SavedState, StateError> {
        let state = BlockState {
            capacity: self.disk().capacity(),
            read_only: self.disk().is_read_only(),
            writeback: self.common.writeback.load(Ordering::Acquire),
        };
        SavedState::encode(WHAT, STATE_VERSION, &state)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), StateError> {
        let state: BlockState = state.decode(WHAT, STATE_VERSION)?;
        let invalid = |why: String| Err(StateError::Invalid { what: WHAT, why });
        let capacity = self.disk().capacity();
        if state.capacity != capacity {
            return invalid(format!(
                "the disk had {} sectors, this one has {capacity}",
                state.capacity
            ));
        }
        if state.read_only != self.disk().is_read_only() {
            return invalid("one of the two disks is read-only, the other is not".to_owned());
        }
        if state.writeback && self.cache == CacheMode::Writethrough {
            return invalid("the disk had a write-back cache, this one must not".to_owned());
        }
        self.common.writeback.store(state.writeback, Ordering::Release);
        Ok(())
    }
}
