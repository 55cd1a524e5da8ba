// SPDX-License-Identifier: Apache-2.0
//! The control side.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::FIRST_HOST_PORT;
use super::handler::VsockHandler;
use super::host::{Host, VsockHandle};
use super::mux::Mux;
use super::persist::{self, ActiveState};
use super::uds::UdsPath;
use crate::state::{SavedState, StateError};
use crate::virtio::{
    ActivateError, ActivationContext, ActiveDevice, DeviceType, RestoreError, VirtioDevice, copy_config,
};

/// Feature bit VIRTIO_VSOCK_F_STREAM (section 5.10.3).
const F_STREAM: u64 = 1 << 0;
/// rx, tx, event. 128 rx buffers of Linux's 4 KiB hold more than a connection's credit; its driver uses 8 for events.
const QUEUE_SIZES: [u16; 3] = [128, 128, 16];

/// What a vsock device is made of.
#[derive(Clone, Debug)]
pub struct VsockConfig {
    /// The guest's CID: 3 to 2^32 - 2.
    pub guest_cid: u64,
    /// Where the host's programs meet the guest; see [`super`] for the convention. The socket must not exist and is
    /// removed with the device. `None`: only [`VsockHandle`] leads to the guest.
    pub uds_path: Option<PathBuf>,
    /// Connections at once, both ways together. Each takes a file descriptor of the process, or two if its other end
    /// is in the process as well.
    pub max_connections: usize,
    /// How long the guest may take to answer a connection from the host.
    pub connect_timeout: Duration,
}

impl VsockConfig {
    /// The usual device: no unix sockets, 4096 connections, 20 seconds.
    pub fn new(guest_cid: u64) -> Self {
        Self {
            guest_cid,
            uds_path: None,
            max_connections: 4096,
            connect_timeout: Duration::from_secs(20),
        }
    }
}

/// Why a vsock device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// CIDs 0 to 2 and those beyond 32 bits have other meanings.
    #[error("vsock CID {0} cannot be a guest's: choose one from 3 to 4294967294")]
    Cid(u64),
    /// The socket for the host's programs could not be created.
    #[error("cannot listen at {path}")]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// No eventfd to be had.
    #[error("cannot create an eventfd for a vsock device")]
    EventFd(#[source] io::Error),
}

/// The vsock device's control side. Dropping it ends its connections, listeners and handles.
pub struct Vsock {
    guest_cid: u64,
    max_connections: usize,
    host: Arc<Host>,
    uds: Option<Arc<UdsPath>>,
}

impl Vsock {
    /// Makes a device and the handle through which the host uses it.
    ///
    /// # Errors
    /// [`VsockError`].
    pub fn new(config: VsockConfig) -> Result<(Self, VsockHandle), VsockError> {
        let VsockConfig {
            guest_cid,
            uds_path,
            max_connections,
            connect_timeout,
        } = config;
        if !(3..u64::from(u32::MAX)).contains(&guest_cid) {
            return Err(VsockError::Cid(guest_cid));
        }
        let uds = uds_path
            .map(|path| UdsPath::bind(&path).map_err(|source| VsockError::Listen { path, source }))
            .transpose()?
            .map(Arc::new);
        let host = Host::new(max_connections, connect_timeout).map_err(VsockError::EventFd)?;
        let handle = VsockHandle::new(Arc::clone(&host));
        let device = Self {
            guest_cid,
            max_connections,
            host,
            uds,
        };
        Ok((device, handle))
    }

    fn handler(
        &self,
        context: ActivationContext,
        next_host_port: u32,
        restored: bool,
    ) -> Result<Arc<Mutex<dyn ActiveDevice>>, ActivateError> {
        let mux = Mux::new(
            self.guest_cid,
            self.max_connections,
            next_host_port,
            Arc::clone(&self.host),
            self.uds.clone(),
            Arc::clone(&context.health),
        )
        .map_err(|source| ActivateError::Host {
            what: "cannot set up epoll for a vsock device",
            source,
        })?;
        let handler = VsockHandler::new(context, mux, Arc::clone(&self.host), restored)?;
        Ok(Arc::new(Mutex::new(handler)))
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> DeviceType {
        DeviceType::Vsock
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        // `struct virtio_vsock_config` is the guest's CID.
        copy_config(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn activate(
        &mut self,
        context: ActivationContext,
    ) -> Result<Arc<Mutex<dyn ActiveDevice>>, ActivateError> {
        self.handler(context, FIRST_HOST_PORT, false)
    }

    /// The connections went with the data side; listeners and what waits to be connected stay for the next driver.
    fn reset(&mut self) {}

    fn save(&self) -> Result<SavedState, StateError> {
        persist::save_control()
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), StateError> {
        persist::restore_control(state)
    }

    fn restore_active(
        &mut self,
        context: ActivationContext,
        state: &SavedState,
    ) -> Result<Arc<Mutex<dyn ActiveDevice>>, RestoreError> {
        let state = ActiveState::restore(state)?;
        Ok(self.handler(context, state.next_host_port, true)?)
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.host.close();
    }
}
