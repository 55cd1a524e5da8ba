// SPDX-License-Identifier: Apache-2.0
//! Saved state of the vsock device.
//!
//! Connections are not saved: their other ends are sockets of this host. A restored guest gets a TRANSPORT_RESET
//! event (section 5.10.6.6), upon which it resets its connections and reads its CID again, so a clone can have
//! another one. Its listeners stay, and so do those of the host. The host's own connections wait until the driver has
//! taken the event, for it drops every connection that it has then, and tells nobody (`handler.rs`).

use serde::{Deserialize, Serialize};

use crate::state::{SavedState, StateError};

const WHAT: &str = "virtio-vsock";
/// Version of [`ControlState`].
const CONTROL_VERSION: u16 = 1;
/// Version of [`ActiveState`].
const ACTIVE_VERSION: u16 = 1;

/// The control side has nothing that its configuration does not give.
#[derive(Serialize, Deserialize)]
struct ControlState;

/// The data side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ActiveState {
    /// The host port that the next host-initiated connection gets; kept so that late packets of a connection from
    /// before the snapshot never meet a new one.
    pub next_host_port: u32,
}

pub(super) fn save_control() -> Result<SavedState, StateError> {
    SavedState::encode(WHAT, CONTROL_VERSION, &ControlState)
}

pub(super) fn restore_control(state: &SavedState) -> Result<(), StateError> {
    state.decode::<ControlState>(WHAT, CONTROL_VERSION).map(|_| ())
}

impl ActiveState {
    pub fn save(&self) -> Result<SavedState, StateError> {
        SavedState::encode(WHAT, ACTIVE_VERSION, self)
    }

    pub fn restore(state: &SavedState) -> Result<Self, StateError> {
        state.decode(WHAT, ACTIVE_VERSION)
    }
}
