// SPDX-License-Identifier: Apache-2.0
//! The data side: requests to plug, to unplug, and to tell which is which.

use std::ops::Range;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_queue::QueueState;

use super::blocks::Found;
use super::device::{Common, bytes};
use super::{BLOCK_SIZE, MemMetrics};
use crate::GuestRam;
use crate::discard::discard;
use crate::lanes::Lanes;
use crate::virtio::{ActiveDevice, ActiveQueue, Buffers, Chain, Health};
use crate::worker_pool::WorkerPool;

const QUEUE: u32 = 0;

/// Request types (5.15.6).
mod request {
    pub const PLUG: u16 = 0;
    pub const UNPLUG: u16 = 1;
    pub const UNPLUG_ALL: u16 = 2;
    pub const STATE: u16 = 3;
}

/// Bytes of a request: type and padding; address, number of blocks and padding.
const REQUEST_SIZE: usize = 24;

/// Response types (5.15.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Response {
    /// Done. With what the blocks are, for a question about them.
    Ack(Option<Found>),
    /// Not what the host asked for.
    Nack,
    /// Not now.
    Busy,
    /// Against the rules.
    Error,
}

impl Response {
    /// struct virtio_mem_resp: type and padding, state.
    fn bytes(self) -> [u8; 10] {
        let (kind, state) = match self {
            Self::Ack(found) => (0, found),
            Self::Nack => (1, None),
            Self::Busy => (2, None),
            Self::Error => (3, None),
        };
        let state = match state {
            None | Some(Found::Plugged) => 0,
            Some(Found::Unplugged) => 1,
            Some(Found::Mixed) => 2,
        };
        let mut bytes = [0; 10];
        (bytes[0], bytes[8]) = (kind, state);
        bytes
    }
}

/// What requests are about.
struct Guest {
    common: Arc<Common>,
    ram: Arc<GuestRam>,
    health: Arc<Health>,
    metrics: Arc<MemMetrics>,
}

impl Guest {
    /// Serves one chain; returns how many bytes were written into it.
    fn serve(&self, chain: &Chain) -> u32 {
        let buffers = match Buffers::of(chain) {
            Ok(buffers) => buffers,
            Err(error) => return self.complain(error),
        };
        let mut request = [0; REQUEST_SIZE];
        let answer = Response::Error.bytes().len();
        if buffers.readable.read(0, &mut request) < REQUEST_SIZE || buffers.writable.len() < answer {
            return self.complain("a request that is too short, or without room for the answer");
        }
        let response = self.respond(&request);
        let counter = match response {
            Response::Ack(_) => None,
            Response::Nack => Some(&self.metrics.refused_requests),
            Response::Busy => Some(&self.metrics.busy_requests),
            Response::Error => Some(&self.metrics.bad_requests),
        };
        if let Some(counter) = counter {
            counter.increment();
        }
        u32::try_from(buffers.writable.write(0, &response.bytes())).unwrap_or(0)
    }

    fn complain(&self, complaint: impl std::fmt::Display) -> u32 {
        self.metrics.bad_requests.increment();
        self.health.complain(complaint);
        0
    }

    fn respond(&self, request: &[u8; REQUEST_SIZE]) -> Response {
        let [t0, t1, _, _, _, _, _, _, a @ .., n0, n1, _, _, _, _, _, _] = *request;
        let kind = u16::from_le_bytes([t0, t1]);
        if kind == request::UNPLUG_ALL {
            return self.unplug_all();
        }
        let (address, count) = (u64::from_le_bytes(a), u16::from_le_bytes([n0, n1]));
        let Some(range) = self.range(address, count) else {
            self.health.complain(format_args!(
                "{count} blocks at {address:#x} are not all in its region"
            ));
            return Response::Error;
        };
        match kind {
            request::PLUG => self.plug(range),
            request::UNPLUG => self.unplug(range),
            request::STATE => Response::Ack(Some(self.common.amounts().blocks.find(range))),
            _ => {
                self.health.complain(format_args!("a request of type {kind}"));
                Response::Error
            }
        }
    }

    /// The blocks that a request is about.
    fn range(&self, address: u64, count: u16) -> Option<Range<usize>> {
        let offset = address.checked_sub(self.common.region.base)?;
        let size = u64::from(count).checked_mul(BLOCK_SIZE)?;
        let end = offset.checked_add(size)?;
        if count == 0 || !offset.is_multiple_of(BLOCK_SIZE) || end > self.common.region.size {
            return None;
        }
        let block = |offset: u64| usize::try_from(offset / BLOCK_SIZE).ok();
        Some(block(offset)?..block(end)?)
    }

    fn plug(&self, range: Range<usize>) -> Response {
        let mut amounts = self.common.amounts();
        if amounts.blocks.find(range.clone()) != Found::Unplugged {
            return Response::Error;
        }
        if amounts.plugged_bytes().saturating_add(bytes(range.len())) > amounts.requested {
            return Response::Nack;
        }
        self.metrics.plugged_blocks.add(range.len());
        amounts.blocks.set(range, true);
        drop(amounts);
        self.common.plugged_changed();
        Response::Ack(None)
    }

    fn unplug(&self, range: Range<usize>) -> Response {
        if self.common.amounts().blocks.find(range.clone()) != Found::Plugged {
            return Response::Error;
        }
        if self.free(range) {
            Response::Ack(None)
        } else {
            Response::Busy
        }
    }

    fn unplug_all(&self) -> Response {
        let runs = self.common.amounts().blocks.runs();
        let mut response = Response::Ack(None);
        // All of them, whatever becomes of one.
        for run in runs {
            if !self.free(run) {
                response = Response::Busy;
            }
        }
        response
    }

    /// Gives plugged blocks back to the host. Requests are served one at a time, so nobody plugs them meanwhile; not
    /// under the lock, for it takes its time.
    fn free(&self, range: Range<usize>) -> bool {
        let address = self.common.region.base.saturating_add(bytes(range.start));
        if let Err(error) = discard(&self.ram, address, bytes(range.len())) {
            self.health.complain(error);
            return false;
        }
        self.metrics.unplugged_blocks.add(range.len());
        self.common.amounts().blocks.set(range, false);
        self.common.plugged_changed();
        true
    }
}

pub(super) struct MemHandler {
    queue: Arc<Lanes>,
}

impl MemHandler {
    pub(super) fn new(
        queue: ActiveQueue,
        common: Arc<Common>,
        pool: &Arc<WorkerPool>,
        health: Arc<Health>,
        metrics: Arc<MemMetrics>,
    ) -> Self {
        let guest = Guest {
            common,
            ram: Arc::clone(queue.ram()),
            health: Arc::clone(&health),
            metrics,
        };
        // One lane: requests come true in their order.
        let queue = Lanes::new(queue, 1, Arc::clone(pool), health, move |chain| {
            guest.serve(chain)
        });
        Self { queue }
    }
}

impl MutEventSubscriber for MemHandler {
    fn init(&mut self, ops: &mut EventOps) {
        self.queue.start(QUEUE, ops);
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        self.queue.notified();
    }
}

impl ActiveDevice for MemHandler {
    fn quiesce(&mut self) {
        self.queue.quiesce();
    }

    fn queues(&self) -> Vec<Option<QueueState>> {
        vec![Some(self.queue.state())]
    }
}
