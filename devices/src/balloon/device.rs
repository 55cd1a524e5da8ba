// SPDX-License-Identifier: Apache-2.0
//! The control side: how big the balloon should be, and how big it is.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::BalloonMetrics;
use super::handler::BalloonHandler;
use crate::state::{SavedState, StateError};
use crate::virtio::{
    ActivateError, ActivationContext, ActiveDevice, ConfigSignal, DeviceType, VirtioDevice, copy_config,
};
use crate::worker_pool::WorkerPool;

const WHAT: &str = "balloon";
const STATE_VERSION: u16 = 1;
/// Inflate, deflate, free page reporting. The numbers of queues that are not offered are not left free (5.5.2).
const QUEUE_SIZES: [u16; 3] = [128, 128, 32];
/// Offset of `actual` in configuration space.
const CONFIG_ACTUAL: u32 = 4;

/// Feature bits (5.5.3).
mod feature {
    pub const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub const REPORTING: u64 = 1 << 5;
}

#[derive(Serialize, Deserialize)]
struct BalloonState {
    target: u32,
    actual: u32,
}

#[derive(Default)]
struct Common {
    target: AtomicU32,
    actual: AtomicU32,
    signal: ConfigSignal,
}

/// A way to a balloon that is in use by a guest. Sizes are in pages of 4096 bytes.
#[derive(Clone)]
pub struct BalloonHandle {
    common: Arc<Common>,
    metrics: Arc<BalloonMetrics>,
}

impl BalloonHandle {
    /// Asks the driver to bring the balloon to `pages`. It does so when it can; what it does not give it keeps.
    pub fn set_target(&self, pages: u32) {
        if self.common.target.swap(pages, Ordering::AcqRel) == pages {
            return;
        }
        self.common.signal.changed();
    }

    /// The size that was asked for.
    pub fn target(&self) -> u32 {
        self.common.target.load(Ordering::Acquire)
    }

    /// The size that the driver says the balloon has. Its word only.
    pub fn actual(&self) -> u32 {
        self.common.actual.load(Ordering::Acquire)
    }

    /// What the balloon counts.
    pub fn metrics(&self) -> &BalloonMetrics {
        &self.metrics
    }
}

/// A virtio memory balloon.
pub struct Balloon {
    common: Arc<Common>,
    /// DEFLATE_ON_OOM: the driver may take pages back before it kills processes.
    deflate_on_oom: bool,
    pool: Arc<WorkerPool>,
    metrics: Arc<BalloonMetrics>,
}

impl Balloon {
    /// An empty balloon that no driver has touched. Memory is freed on `pool`. With `deflate_on_oom` the guest takes
    /// pages back rather than run out of memory.
    pub fn new(deflate_on_oom: bool, pool: Arc<WorkerPool>) -> Self {
        Self {
            common: Arc::default(),
            deflate_on_oom,
            pool,
            metrics: Arc::default(),
        }
    }

    /// A handle that stays good when the device has gone behind its transport.
    pub fn handle(&self) -> BalloonHandle {
        BalloonHandle {
            common: Arc::clone(&self.common),
            metrics: Arc::clone(&self.metrics),
        }
    }

    /// What the balloon counts.
    pub fn metrics(&self) -> &Arc<BalloonMetrics> {
        &self.metrics
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::Balloon
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let oom = if self.deflate_on_oom {
            feature::DEFLATE_ON_OOM
        } else {
            0
        };
        feature::REPORTING | oom
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        // struct virtio_balloon_config: num_pages, actual.
        let mut config = [0; 8];
        config[..4].copy_from_slice(&self.common.target.load(Ordering::Acquire).to_le_bytes());
        config[4..].copy_from_slice(&self.common.actual.load(Ordering::Acquire).to_le_bytes());
        copy_config(&config, offset, data);
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        if let (CONFIG_ACTUAL, Ok(actual)) = (offset, data.try_into()) {
            let actual = u32::from_le_bytes(actual);
            self.common.actual.store(actual, Ordering::Release);
        }
    }

    fn activate(
        &mut self,
        mut context: ActivationContext,
    ) -> Result<Arc<Mutex<dyn ActiveDevice>>, ActivateError> {
        let queues = [context.take_queue(0)?, context.take_queue(1)?];
        let report = match context.features & feature::REPORTING {
            0 => None,
            _ => Some(context.take_queue(2)?),
        };
        self.common.signal.connect(Some(context.interrupt));
        let metrics = Arc::clone(&self.metrics);
        let handler = BalloonHandler::new(queues, report, &self.pool, context.health, metrics);
        Ok(Arc::new(Mutex::new(handler)))
    }

    fn reset(&mut self) {
        self.common.signal.connect(None);
        // Whatever was in the balloon, the next driver starts with an empty one.
        self.common.actual.store(0, Ordering::Release);
    }

    fn save(&self) -> Result<SavedState, StateError> {
        let state = BalloonState {
            target: self.common.target.load(Ordering::Acquire),
            actual: self.common.actual.load(Ordering::Acquire),
        };
        SavedState::encode(WHAT, STATE_VERSION, &state)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), StateError> {
        let state: BalloonState = state.decode(WHAT, STATE_VERSION)?;
        self.common.target.store(state.target, Ordering::Release);
        self.common.actual.store(state.actual, Ordering::Release);
        Ok(())
    }
}
