// SPDX-License-Identifier: Apache-2.0
//! The data side: pages in, pages out, pages lent.

use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_queue::QueueState;

use super::{BalloonMetrics, PAGE_SIZE};
use crate::GuestRam;
use crate::discard::{DiscardError, discard};
use crate::host_io::MAX_SLICES;
use crate::lanes::Lanes;
use crate::virtio::{ActiveDevice, ActiveQueue, Buffers, Chain, Health, Outcome};
use crate::worker_pool::WorkerPool;

const INFLATE: u32 = 0;
const DEFLATE: u32 = 1;
const REPORT: u32 = 2;

/// Most page numbers in a chain. Linux sends 256 at a time.
const MAX_PAGES: usize = 4096;

/// What pages are freed from and counted with.
struct Guest {
    ram: Arc<GuestRam>,
    health: Arc<Health>,
    metrics: Arc<BalloonMetrics>,
}

impl Guest {
    fn complain(&self, complaint: impl std::fmt::Display) {
        self.metrics.bad_requests.increment();
        self.health.complain(complaint);
    }

    /// Returns how many pages were freed.
    fn free(&self, address: u64, len: u64) -> usize {
        match discard(&self.ram, address, len) {
            Ok(pages) => usize::try_from(pages).unwrap_or(usize::MAX),
            Err(DiscardError::Host(error)) => {
                let pages = usize::try_from(len / PAGE_SIZE).unwrap_or(usize::MAX);
                self.metrics.kept_pages.add(pages);
                log::debug!("{}: {error}", self.health.name());
                0
            }
            Err(error) => {
                self.complain(error);
                0
            }
        }
    }

    /// A list of page numbers.
    fn inflate(&self, chain: &Chain) {
        let pages = match page_numbers(chain) {
            Ok(pages) => pages,
            Err(complaint) => return self.complain(complaint),
        };
        for (first, count) in runs(&pages) {
            let freed = self.free(u64::from(first) * PAGE_SIZE, count * PAGE_SIZE);
            self.metrics.inflated_pages.add(freed);
        }
    }

    /// Free pages: the buffers themselves.
    fn report(&self, chain: &Chain) {
        // Checks all of the chain before any of it is freed.
        if let Err(error) = Buffers::of(chain) {
            return self.complain(error);
        }
        // What is read from the guest again may have changed; each range is checked where it is freed.
        for descriptor in chain.clone().take(MAX_SLICES) {
            if descriptor.is_write_only() {
                let freed = self.free(descriptor.addr().0, descriptor.len().into());
                self.metrics.reported_pages.add(freed);
            } else {
                self.complain("a report of free pages with a buffer to read");
            }
        }
    }
}

/// The page numbers in the readable part of `chain`.
fn page_numbers(chain: &Chain) -> Result<Vec<u32>, String> {
    let buffers = Buffers::of(chain).map_err(|error| error.to_string())?;
    let len = buffers.readable.len();
    if len == 0 || !len.is_multiple_of(4) || len > 4 * MAX_PAGES {
        return Err(format!("{len} bytes of page numbers"));
    }
    let mut bytes = vec![0; len];
    buffers.readable.read(0, &mut bytes);
    let (numbers, _) = bytes.as_chunks::<4>();
    Ok(numbers.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect())
}

/// Joins page numbers that follow each other, up or down, into first and count.
fn runs(pages: &[u32]) -> Vec<(u32, u64)> {
    let mut runs: Vec<(u32, u64)> = Vec::new();
    for &page in pages {
        match runs.last_mut() {
            Some((first, count)) if u64::from(page) == u64::from(*first) + *count => *count += 1,
            Some((first, count)) if first.checked_sub(1) == Some(page) => {
                *first = page;
                *count += 1;
            }
            _ => runs.push((page, 1)),
        }
    }
    runs
}

pub(super) struct BalloonHandler {
    inflate: Arc<Lanes>,
    deflate: ActiveQueue,
    report: Option<Arc<Lanes>>,
    health: Arc<Health>,
    metrics: Arc<BalloonMetrics>,
}

impl BalloonHandler {
    pub(super) fn new(
        [inflate, deflate]: [ActiveQueue; 2],
        report: Option<ActiveQueue>,
        pool: &Arc<WorkerPool>,
        health: Arc<Health>,
        metrics: Arc<BalloonMetrics>,
    ) -> Self {
        let guest = Arc::new(Guest {
            ram: Arc::clone(inflate.ram()),
            health: Arc::clone(&health),
            metrics: Arc::clone(&metrics),
        });
        let lanes = |queue, serve: fn(&Guest, &Chain)| {
            let guest = Arc::clone(&guest);
            Lanes::new(queue, 1, Arc::clone(pool), Arc::clone(&health), move |chain| {
                serve(&guest, chain);
                0
            })
        };
        Self {
            inflate: lanes(inflate, Guest::inflate),
            report: report.map(|queue| lanes(queue, Guest::report)),
            deflate,
            health: Arc::clone(&health),
            metrics,
        }
    }

    fn deflate(&mut self) {
        let Self {
            deflate,
            health,
            metrics,
            ..
        } = self;
        let result = deflate.serve(|chain| {
            match page_numbers(chain) {
                Ok(pages) => metrics.deflated_pages.add(pages.len()),
                Err(complaint) => {
                    metrics.bad_requests.increment();
                    health.complain(complaint);
                }
            }
            Outcome::Done { len: 0 }
        });
        if let Err(error) = result {
            self.health.fail(error);
        }
    }
}

impl MutEventSubscriber for BalloonHandler {
    fn init(&mut self, ops: &mut EventOps) {
        self.inflate.start(INFLATE, ops);
        if let Some(report) = &self.report {
            report.start(REPORT, ops);
        }
        let events = Events::with_data(self.deflate.notification(), DEFLATE, EventSet::IN);
        match ops.add(events) {
            Ok(()) => self.deflate(),
            Err(error) => self.health.fail(format_args!("cannot watch its queue: {error}")),
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps) {
        match (events.data(), &self.report) {
            (INFLATE, _) => self.inflate.notified(),
            (REPORT, Some(report)) => report.notified(),
            _ => {
                self.deflate.clear_notification();
                self.deflate();
            }
        }
    }
}

impl ActiveDevice for BalloonHandler {
    fn quiesce(&mut self) {
        self.inflate.quiesce();
        if let Some(report) = &self.report {
            report.quiesce();
        }
    }

    fn queues(&self) -> Vec<Option<QueueState>> {
        vec![
            Some(self.inflate.state()),
            Some(self.deflate.state()),
            self.report.as_ref().map(|report| report.state()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::runs;

    #[test]
    fn neighbours_are_joined() {
        assert_eq!(runs(&[]), []);
        assert_eq!(runs(&[5, 6, 7, 9]), [(5, 3), (9, 1)]);
        assert_eq!(runs(&[7, 6, 5]), [(5, 3)]);
        assert_eq!(runs(&[5, 4, 6, 3]), [(3, 4)]);
        assert_eq!(runs(&[5, 5]), [(5, 1), (5, 1)]);
        assert_eq!(runs(&[u32::MAX, 0]), [(u32::MAX, 1), (0, 1)]);
        assert_eq!(runs(&[0, u32::MAX]), [(0, 1), (u32::MAX, 1)]);
    }
}
