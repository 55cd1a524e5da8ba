// SPDX-License-Identifier: Apache-2.0
//! No device: what stands behind a register page until there is one.

use std::sync::{Arc, Mutex};

use super::{ActivateError, ActivationContext, ActiveDevice, DeviceType, RestoreError, VirtioDevice};
use crate::state::{SavedState, StateError};

const WHAT: &str = "empty";
const STATE_VERSION: u16 = 1;

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

    fn read_config(&self, _offset: u32, _data: &mut [u8]) {}

    fn activate(&mut self, _: ActivationContext) -> Result<Arc<Mutex<dyn ActiveDevice>>, ActivateError> {
        Err(ActivateError::MissingQueue(0))
    }

    fn reset(&mut self) {}

    fn save(&self) -> Result<SavedState, StateError> {
        SavedState::encode(WHAT, STATE_VERSION, &())
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), StateError> {
        state.decode(WHAT, STATE_VERSION)
    }

    fn restore_active(
        &mut self,
        context: ActivationContext,
        _: &SavedState,
    ) -> Result<Arc<Mutex<dyn ActiveDevice>>, RestoreError> {
        Ok(self.activate(context)?)
    }
}
