// SPDX-License-Identifier: Apache-2.0
//! The control side: configuration space, activation, and the handle by which the host attaches and detaches.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use super::config::{FsConfig, FsError, TAG_MAX};
use super::dax::DaxWindow;
use super::deleted::Kept;
use super::handler::FsHandler;
use super::metrics::MetricsSnapshot;
use super::root::{AttachError, AttachOptions};
use super::server::Server;
use crate::state::{SavedState, StateError};
use crate::virtio::{
    ActivateError, ActivationContext, ActiveDevice, DeviceType, SharedMemory, VirtioDevice, copy_config,
};
use crate::worker_pool::WorkerPool;

pub(super) const WHAT: &str = "virtio-fs";
/// Shared-memory region 0 is the DAX window (virtio 1.3, section 5.11.5).
const DAX_REGION: u8 = 0;

/// Where a DAX window is.
#[derive(Clone, Debug)]
pub struct DaxPlacement {
    /// The window, which the VMM has made a memory slot of.
    pub window: Arc<DaxWindow>,
    /// Its guest physical address.
    pub base: u64,
}

/// A virtio file system device.
pub struct Fs {
    server: Arc<Server>,
    pool: Arc<WorkerPool>,
    dax: Option<DaxPlacement>,
    queue_sizes: Vec<u16>,
}

/// What the host can do with a file system while the guest uses it. Clones are handles to the same one.
#[derive(Clone, Debug)]
pub struct FsHandle {
    server: Arc<Server>,
}

impl FsHandle {
    /// Adds an entry `name` to the root: what `fd` refers to, a directory or a regular file. The descriptor itself is
    /// not kept.
    pub fn attach(&self, name: &str, fd: &OwnedFd, options: AttachOptions) -> Result<(), AttachError> {
        self.server.attach(name, fd, options).map(drop)
    }

    /// Takes an entry out of the root. The guest's nodes and open files below it answer ESTALE and EBADF from now on,
    /// and no descriptor for anything below it is left but those of requests under way.
    pub fn detach(&self, name: &str) -> Result<(), AttachError> {
        self.server.detach(name)
    }

    /// Gives copies to the deleted files that are open in those entries of the root that `goes_along` picks: what is saved
    /// before the answer is dropped has them. For a device that is paused, and for one snapshot at a time.
    ///
    /// # Errors
    /// A file cannot be read, or its copy not be written.
    pub fn keep_deleted(&self, goes_along: impl Fn(&str) -> bool) -> std::io::Result<Kept> {
        self.server.keep_deleted(goes_along)
    }

    /// The counters.
    pub fn metrics(&self) -> MetricsSnapshot {
        self.server.metrics_snapshot()
    }
}

impl Fs {
    /// A device that no driver has touched and with nothing attached. Its requests run on `pool`.
    pub fn new(config: FsConfig, pool: Arc<WorkerPool>, dax: Option<DaxPlacement>) -> Result<Self, FsError> {
        // One high-priority queue comes before the request queues.
        let queues = usize::from(config.request_queues) + 1;
        let queue_sizes = vec![config.queue_size; queues];
        let window = dax.as_ref().map(|dax| Arc::clone(&dax.window));
        Ok(Self {
            server: Arc::new(Server::new(config, window)?),
            pool,
            dax,
            queue_sizes,
        })
    }

    /// A handle that stays good when the device has gone behind its transport.
    pub fn handle(&self) -> FsHandle {
        FsHandle {
            server: Arc::clone(&self.server),
        }
    }

    fn start(
        &mut self,
        mut context: ActivationContext,
    ) -> Result<Arc<Mutex<dyn ActiveDevice>>, ActivateError> {
        let queues: Vec<_> = context.queues.iter_mut().map(Option::take).collect();
        // Linux uses the high-priority queue and the first request queue at least.
        for needed in 0..2 {
            if queues.get(needed).is_none_or(Option::is_none) {
                return Err(ActivateError::MissingQueue(needed));
            }
        }
        let (server, pool) = (Arc::clone(&self.server), Arc::clone(&self.pool));
        let handler =
            FsHandler::new(queues, server, context.health, pool).map_err(|source| ActivateError::Host {
                what: "cannot create the file system's lock timer",
                source,
            })?;
        Ok(Arc::new(Mutex::new(handler)))
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> DeviceType {
        DeviceType::Fs
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        // struct virtio_fs_config (5.11.4): tag, num_request_queues.
        let mut config = [0; TAG_MAX + 4];
        let (tag, queues) = config.split_at_mut(TAG_MAX);
        let given = self.server.config().tag.as_bytes();
        // Checked when the server was made.
        if let Some(tag) = tag.get_mut(..given.len()) {
            tag.copy_from_slice(given);
        }
        queues.copy_from_slice(&u32::from(self.server.config().request_queues).to_le_bytes());
        copy_config(&config, offset, data);
    }

    fn shared_memory(&self, id: u8) -> Option<SharedMemory> {
        self.dax
            .as_ref()
            .filter(|_| id == DAX_REGION)
            .map(|dax| SharedMemory {
                id,
                base: dax.base,
                length: dax.window.len(),
            })
    }

    fn activate(
        &mut self,
        context: ActivationContext,
    ) -> Result<Arc<Mutex<dyn ActiveDevice>>, ActivateError> {
        self.start(context)
    }

    fn reset(&mut self) {
        self.server.end_session();
    }

    fn save(&self) -> Result<SavedState, StateError> {
        self.server.save()
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), StateError> {
        self.server.restore(state)
    }
}
