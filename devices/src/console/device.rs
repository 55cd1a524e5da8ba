// SPDX-License-Identifier: Apache-2.0
//! The control side: configuration space and the terminal's size.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};

use super::ConsoleMetrics;
use super::handler::{ConsoleHandler, HandlerState};
use crate::output_tail::OutputTail;
use crate::state::{SavedState, StateError};
use crate::virtio::{
    ActivateError, ActivationContext, ActiveDevice, DeviceType, Interrupt, RestoreError, VirtioDevice,
    copy_config,
};

pub(super) const WHAT: &str = "console";
pub(super) const STATE_VERSION: u16 = 1;
/// VIRTIO_CONSOLE_F_SIZE (5.3.3): columns and rows are valid.
const F_SIZE: u64 = 1 << 0;
const QUEUE_SIZES: [u16; 2] = [64, 64];

/// Size of a terminal in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Columns.
    pub columns: u16,
    /// Rows.
    pub rows: u16,
}

/// What a console is connected to.
#[derive(Debug, Default)]
pub struct ConsoleConfig {
    /// Where input comes from: a pipe, socket or pty. Set to O_NONBLOCK, which whoever shares it will notice.
    pub input: Option<OwnedFd>,
    /// Where output goes: a pipe, socket, pty or file. Set to O_NONBLOCK like the input. To use one pty or socket both
    /// ways, give two descriptors of it.
    pub output: Option<OwnedFd>,
    /// Where the latest output is kept.
    pub tail: OutputTail,
    /// The terminal's size, if it is one.
    pub size: Option<TerminalSize>,
}

#[derive(Default)]
struct Shared {
    size: Option<TerminalSize>,
    interrupt: Option<Arc<Interrupt>>,
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    // Plain values, whole behind a poisoned lock.
    shared.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A way to a console that is in use by a guest.
#[derive(Clone)]
pub struct ConsoleHandle {
    shared: Arc<Mutex<Shared>>,
}

impl ConsoleHandle {
    /// The terminal has another size: the driver is told. Of no effect on a console made without a size.
    pub fn resize(&self, size: TerminalSize) {
        let mut shared = lock(&self.shared);
        if shared.size.is_none_or(|old| old == size) {
            return;
        }
        shared.size = Some(size);
        if let Some(interrupt) = &shared.interrupt {
            interrupt.signal_config();
        }
    }
}

/// A virtio console.
pub struct Console {
    input: Option<Arc<OwnedFd>>,
    output: Option<Arc<OwnedFd>>,
    tail: OutputTail,
    shared: Arc<Mutex<Shared>>,
    has_size: bool,
    metrics: Arc<ConsoleMetrics>,
}

impl Console {
    /// A console that no driver has touched.
    pub fn new(config: ConsoleConfig) -> io::Result<Self> {
        for fd in [&config.input, &config.output].into_iter().flatten() {
            let flags = rustix::fs::fcntl_getfl(fd)?;
            rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK)?;
        }
        Ok(Self {
            input: config.input.map(Arc::new),
            output: config.output.map(Arc::new),
            tail: config.tail,
            has_size: config.size.is_some(),
            shared: Arc::new(Mutex::new(Shared {
                size: config.size,
                interrupt: None,
            })),
            metrics: Arc::default(),
        })
    }

    /// A handle that stays good when the console has gone behind its transport.
    pub fn handle(&self) -> ConsoleHandle {
        ConsoleHandle {
            shared: Arc::clone(&self.shared),
        }
    }

    /// What the console counts.
    pub fn metrics(&self) -> &Arc<ConsoleMetrics> {
        &self.metrics
    }

    fn start(
        &mut self,
        mut context: ActivationContext,
        state: HandlerState,
    ) -> Result<Arc<Mutex<dyn ActiveDevice>>, ActivateError> {
        let receive = context.take_queue(0)?;
        let transmit = context.take_queue(1)?;
        lock(&self.shared).interrupt = Some(context.interrupt);
        let handler = ConsoleHandler::new(
            receive,
            transmit,
            self.input.clone(),
            self.output.clone(),
            self.tail.clone(),
            context.health,
            Arc::clone(&self.metrics),
            state,
        );
        Ok(Arc::new(Mutex::new(handler)))
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> DeviceType {
        DeviceType::Console
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        if self.has_size { F_SIZE } else { 0 }
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        // struct virtio_console_config: cols, rows, max_nr_ports, emerg_wr.
        let size = lock(&self.shared)
            .size
            .unwrap_or(TerminalSize { columns: 0, rows: 0 });
        let mut config = [0; 12];
        config[..2].copy_from_slice(&size.columns.to_le_bytes());
        config[2..4].copy_from_slice(&size.rows.to_le_bytes());
        config[4..8].copy_from_slice(&1u32.to_le_bytes());
        copy_config(&config, offset, data);
    }

    fn activate(
        &mut self,
        context: ActivationContext,
    ) -> Result<Arc<Mutex<dyn ActiveDevice>>, ActivateError> {
        self.start(context, HandlerState::default())
    }

    fn reset(&mut self) {
        lock(&self.shared).interrupt = None;
    }

    fn save(&self) -> Result<SavedState, StateError> {
        SavedState::encode(WHAT, STATE_VERSION, &lock(&self.shared).size)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), StateError> {
        let size: Option<TerminalSize> = state.decode(WHAT, STATE_VERSION)?;
        if size.is_some() != self.has_size {
            return Err(StateError::Invalid {
                what: WHAT,
                why: "one of the two consoles is a terminal, the other is not".to_owned(),
            });
        }
        lock(&self.shared).size = size;
        Ok(())
    }

    fn restore_active(
        &mut self,
        context: ActivationContext,
        state: &SavedState,
    ) -> Result<Arc<Mutex<dyn ActiveDevice>>, RestoreError> {
        let state = state.decode(WHAT, STATE_VERSION)?;
        Ok(self.start(context, state)?)
    }
}
