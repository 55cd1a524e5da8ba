// SPDX-License-Identifier: Apache-2.0
//! The control side: nothing to configure, one queue.

use std::sync::{Arc, Mutex};

use super::RngMetrics;
use super::handler::RngHandler;
use crate::virtio::{ActivateError, ActivationContext, ActiveDevice, DeviceType, VirtioDevice};

const QUEUE_SIZES: [u16; 1] = [64];

/// A virtio entropy device.
#[derive(Debug, Default)]
pub struct Rng {
    metrics: Arc<RngMetrics>,
}

impl Rng {
    /// A device that no driver has touched.
    pub fn new() -> Self {
        Self::default()
    }

    /// What the device counts.
    pub fn metrics(&self) -> &Arc<RngMetrics> {
        &self.metrics
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn activate(
        &mut self,
        mut context: ActivationContext,
    ) -> Result<Arc<Mutex<dyn ActiveDevice>>, ActivateError> {
        let queue = context.take_queue(0)?;
        let handler = RngHandler::new(queue, context.health, Arc::clone(&self.metrics));
        Ok(Arc::new(Mutex::new(handler)))
    }

    fn reset(&mut self) {}
}
