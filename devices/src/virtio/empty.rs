// SPDX-License-Identifier: Apache-2.0
//! No device: what stands behind a register page until there is one.

use std::sync::{Arc, Mutex};

use super::{ActivateError, ActivationContext, ActiveDevice, DeviceType, VirtioDevice};

/// A place without a device. It has no queue, so no driver can start it.
#[derive(Debug, Clone, Copy)]
pub struct Empty;

impl VirtioDevice for Empty {
    fn device_type(&self) -> DeviceType {
        DeviceType::Empty
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[]
    }

    fn features(&self) -> u64 {
        0
    }

    fn activate(&mut self, _: ActivationContext) -> Result<Arc<Mutex<dyn ActiveDevice>>, ActivateError> {
        Err(ActivateError::MissingQueue(0))
    }

    fn reset(&mut self) {}
}
