// SPDX-License-Identifier: Apache-2.0
//! Where the queues of a live device stand, as device and driver see it: what tells whose turn it is when a guest waits for a
//! device, or seems to.
//!
//! Everything is read from the guest's rings as it is at the moment, and nothing is changed: a running guest gives
//! numbers that do not quite belong together.

use std::sync::atomic::Ordering;

use serde::Serialize;
use virtio_queue::QueueState;
use vm_memory::{Bytes, GuestAddress};

use super::F_EVENT_IDX;
use crate::GuestRam;

/// A split queue (virtio 1.3, section 2.7). Indices run freely, modulo 65,536.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct QueueReport {
    /// The queue's number.
    pub queue: usize,
    /// Its descriptors.
    pub size: u16,
    /// The next chain that the device takes.
    pub next_available: u16,
    /// Where the driver's next chain goes: the same if the device has taken all.
    pub available_index: Option<u16>,
    /// The driver notifies the device when it makes this one available (`avail_event`; with EVENT_IDX).
    pub notify_at: Option<u16>,
    /// Where the next chain goes that the device returns.
    pub used_index: u16,
    /// The device interrupts the driver when it returns this one (`used_event`; with EVENT_IDX).
    pub interrupt_at: Option<u16>,
}

/// A live device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceReport {
    /// InterruptStatus: reasons that the driver has not acknowledged (4.2.2).
    pub interrupt_status: u32,
    /// Its queues that are in use.
    pub queues: Vec<QueueReport>,
}

impl QueueReport {
    pub(super) fn new(queue: usize, state: &QueueState, features: u64, ram: &GuestRam) -> Self {
        let load = |address: Option<u64>| {
            let value: u16 = ram.load(GuestAddress(address?), Ordering::Acquire).ok()?;
            Some(u16::from_le(value))
        };
        let events = features & F_EVENT_IDX != 0;
        // Each stands behind its ring.
        let behind = |ring: u64, element: u64| {
            let length = element * u64::from(state.size);
            events.then_some(())?;
            ring.checked_add(4)?.checked_add(length)
        };
        Self {
            queue,
            size: state.size,
            next_available: state.next_avail,
            available_index: load(state.avail_ring.checked_add(2)),
            notify_at: load(behind(state.used_ring, 8)),
            used_index: state.next_used,
            interrupt_at: load(behind(state.avail_ring, 2)),
        }
    }
}
