// SPDX-License-Identifier: Apache-2.0
//! The register page of a virtio device (virtio 1.3, section 4.2.2).
//!
//! ```text
//!  status   0 ─▶ ACKNOWLEDGE ─▶ +DRIVER ─▶ +FEATURES_OK ─▶ +DRIVER_OK
//!  phase    Setup: queue registers can be written            Active: there are none to write
//!           ▲                                                  │ (activation failed, device failed:
//!           └───────────── status := 0 (reset) ────────────────┘  DEVICE_NEEDS_RESET shows)
//! ```
//!
//! Status bits are set in that order or not at all. What the driver writes out of order, to a register that does not
//! exist, or with another width than the specification's, is ignored and complained about.

use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use virtio_queue::QueueState;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{ActivationContext, ActiveDevice, RestoreError, SharedMemory, VirtioDevice};
use super::interrupt::{CONFIG_CHANGE, USED_BUFFER};
use super::report::{DeviceReport, QueueReport};
use super::{
    ActivateError, ActiveQueue, DeviceType, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, Health, Interrupt,
    status,
};
use crate::GuestRam;
use crate::event_loop::{EventLoop, EventLoopError, Registration};
use crate::state::{SavedState, StateError};

/// Bytes of guest physical address space per device.
pub const REGISTER_PAGE_SIZE: u64 = 0x1000;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
// "Cloi", which names no PCI vendor; drivers only show it.
const VENDOR_ID: u32 = u32::from_le_bytes(*b"Cloi");

/// Register offsets (table 4.1).
mod register {
    pub const MAGIC_VALUE: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub const SHM_SEL: u64 = 0x0ac;
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    pub const SHM_LEN_HIGH: u64 = 0x0b4;
    pub const SHM_BASE_LOW: u64 = 0x0b8;
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

/// Why a transport could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// No eventfd to be had.
    #[error("cannot create an eventfd for a virtio device")]
    EventFd(#[source] std::io::Error),
}

/// One queue's registers while the driver may still write them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct QueueRegisters {
    max_size: u16,
    size: u16,
    ready: bool,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

impl QueueRegisters {
    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            ready: false,
            desc_table: 0,
            avail_ring: 0,
            used_ring: 0,
        }
    }

    fn state(&self, features: u64, next_avail: u16, next_used: u16) -> QueueState {
        QueueState {
            max_size: self.max_size,
            next_avail,
            next_used,
            event_idx_enabled: features & F_EVENT_IDX != 0,
            size: self.size,
            ready: self.ready,
            desc_table: self.desc_table,
            avail_ring: self.avail_ring,
            used_ring: self.used_ring,
        }
    }
}

/// A device on its event loop.
struct Live {
    /// The configuration as it was frozen; a device need not use all of it.
    queues: Vec<QueueRegisters>,
    device: Arc<Mutex<dyn ActiveDevice>>,
    // Taken out of the loop before the device is dropped or reset.
    registration: Option<Registration>,
}

enum Phase {
    Setup(Vec<QueueRegisters>),
    Active(Live),
    /// Activation failed: only a reset helps.
    Failed,
}

/// A device behind its register page. vCPU threads call [`MmioTransport::read`] and [`MmioTransport::write`].
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    event_loop: Arc<EventLoop>,
    ram: Arc<GuestRam>,
    interrupt: Arc<Interrupt>,
    health: Arc<Health>,
    notifications: Vec<Arc<EventFd>>,
    phase: Phase,
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    shm_sel: u32,
}

/// Version of [`TransportState`].
const STATE_VERSION: u16 = 1;

#[derive(Serialize, Deserialize)]
struct SavedQueue {
    registers: QueueRegisters,
    next_avail: u16,
    next_used: u16,
}

#[derive(Serialize, Deserialize)]
struct TransportState {
    device_type: u32,
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    shm_sel: u32,
    interrupt_status: u32,
    config_generation: u32,
    queues: Vec<SavedQueue>,
    control: SavedState,
    active: Option<SavedState>,
}

impl MmioTransport {
    /// Puts `device` behind a register page. `health` names it in messages.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        ram: Arc<GuestRam>,
        event_loop: Arc<EventLoop>,
        health: Arc<Health>,
    ) -> Result<Self, TransportError> {
        let interrupt = Arc::new(Interrupt::new().map_err(TransportError::EventFd)?);
        health.set_interrupt(Arc::clone(&interrupt));
        let notifications = device
            .queue_max_sizes()
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK).map(Arc::new))
            .collect::<Result<_, _>>()
            .map_err(TransportError::EventFd)?;
        let phase = Phase::Setup(Self::fresh_queues(&*device));
        Ok(Self {
            device,
            event_loop,
            ram,
            interrupt,
            health,
            notifications,
            phase,
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            shm_sel: 0,
        })
    }

    /// The queues whose notifications go past the vCPU's thread, and the eventfd of each, to be signalled by writes of the
    /// queue's number to register 0x50 (ioeventfd).
    pub fn ioeventfds(&self) -> impl Iterator<Item = (u32, &EventFd)> {
        let at_once = self.device.queue_served_at_once();
        let queues = (0..).zip(self.notifications.iter().map(Arc::as_ref));
        queues.filter(move |(queue, _)| at_once.is_none_or(|at_once| usize::try_from(*queue) != Ok(at_once)))
    }

    /// The device's interrupt line (irqfd).
    pub fn interrupt(&self) -> &Arc<Interrupt> {
        &self.interrupt
    }

    /// What is behind the page.
    pub fn device_type(&self) -> DeviceType {
        self.device.device_type()
    }

    /// The device's health.
    pub fn health(&self) -> &Arc<Health> {
        &self.health
    }

    /// Whether the driver has set DRIVER_OK and the device went live.
    pub fn is_active(&self) -> bool {
        matches!(self.phase, Phase::Active(_))
    }

    fn fresh_queues(device: &dyn VirtioDevice) -> Vec<QueueRegisters> {
        device
            .queue_max_sizes()
            .iter()
            .map(|&max| QueueRegisters::new(max))
            .collect()
    }

    fn device_features(&self) -> u64 {
        self.device.features() | F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC
    }

    fn shown_status(&self) -> u32 {
        let failed = self.health.is_failed() || matches!(self.phase, Phase::Failed);
        self.status | if failed { status::DEVICE_NEEDS_RESET } else { 0 }
    }

    fn selected_shared_memory(&self) -> Option<SharedMemory> {
        u8::try_from(self.shm_sel)
            .ok()
            .and_then(|id| self.device.shared_memory(id))
    }

    /// A read of `data.len()` bytes at `offset` of the page.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            if let Ok(offset) = u32::try_from(offset) {
                self.device.read_config(offset, data);
            }
            return;
        }
        let Ok(data) = <&mut [u8; 4]>::try_from(data) else {
            self.health.complain(format_args!(
                "read of register {offset:#x} with a width that is not 4"
            ));
            return;
        };
        *data = self.read_register(offset).to_le_bytes();
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            register::MAGIC_VALUE => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => self.device.device_type() as u32,
            register::VENDOR_ID => VENDOR_ID,
            register::DEVICE_FEATURES => select(self.device_features(), self.device_features_sel),
            register::QUEUE_SIZE_MAX => self.queue_max_size(),
            register::QUEUE_READY => match &self.phase {
                Phase::Setup(queues) => self.selected(queues).is_some_and(|queue| queue.ready).into(),
                Phase::Active(live) => self
                    .selected(&live.queues)
                    .is_some_and(|queue| queue.ready)
                    .into(),
                Phase::Failed => 0,
            },
            register::INTERRUPT_STATUS => self.interrupt.status() & (USED_BUFFER | CONFIG_CHANGE),
            register::STATUS => self.shown_status(),
            // A region that does not exist has length -1 (section 4.2.2).
            register::SHM_LEN_LOW => select(
                self.selected_shared_memory()
                    .map_or(u64::MAX, |region| region.length),
                0,
            ),
            register::SHM_LEN_HIGH => select(
                self.selected_shared_memory()
                    .map_or(u64::MAX, |region| region.length),
                1,
            ),
            register::SHM_BASE_LOW => select(
                self.selected_shared_memory()
                    .map_or(u64::MAX, |region| region.base),
                0,
            ),
            register::SHM_BASE_HIGH => select(
                self.selected_shared_memory()
                    .map_or(u64::MAX, |region| region.base),
                1,
            ),
            register::CONFIG_GENERATION => self.interrupt.config_generation(),
            _ => {
                self.health
                    .complain(format_args!("read of register {offset:#x}, which cannot be read"));
                0
            }
        }
    }

    /// A write of `data` at `offset` of the page.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(register::CONFIG) {
            match u32::try_from(offset) {
                Ok(offset) if self.status & status::DRIVER != 0 => self.device.write_config(offset, data),
                _ => self
                    .health
                    .complain("configuration written by a guest without a driver"),
            }
            return;
        }
        let Ok(data) = <[u8; 4]>::try_from(data) else {
            self.health.complain(format_args!(
                "write of register {offset:#x} with a width that is not 4"
            ));
            return;
        };
        let value = u32::from_le_bytes(data);
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            register::DRIVER_FEATURES => self.write_driver_features(value),
            register::QUEUE_SEL => self.queue_sel = value,
            register::SHM_SEL => self.shm_sel = value,
            register::QUEUE_NOTIFY => self.notify(value),
            register::INTERRUPT_ACK => self.interrupt.acknowledge(value),
            register::STATUS => self.write_status(value),
            _ => self.write_queue_register(offset, value),
        }
    }

    fn notify(&self, queue: u32) {
        let index = usize::try_from(queue).unwrap_or(usize::MAX);
        let Some(notification) = self.notifications.get(index) else {
            self.health.complain(format_args!(
                "notification of queue {queue}, which does not exist"
            ));
            return;
        };
        if let Phase::Active(live) = &self.phase
            && self.device.queue_served_at_once() == Some(index)
            && live.registration.is_some()
            && !self.health.is_failed()
            // At work on its event loop, which then looks at this queue, too: a vCPU does not wait for that.
            && let Ok(mut device) = live.device.try_lock()
        {
            device.serve_at_once();
            return;
        }
        // EAGAIN: a notification is pending already.
        let _ = notification.write(1);
    }

    fn write_driver_features(&mut self, value: u32) {
        if self.status & (status::DRIVER | status::FEATURES_OK) != status::DRIVER {
            self.health
                .complain("features written outside of feature negotiation");
            return;
        }
        match self.driver_features_sel {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | u64::from(value),
            1 => self.driver_features = self.driver_features & 0xffff_ffff | u64::from(value) << 32,
            // Bits 64 and up: none is offered.
            _ if value == 0 => {}
            _ => self.health.complain("features accepted that do not exist"),
        }
    }

    fn queue_index(&self) -> usize {
        usize::try_from(self.queue_sel).unwrap_or(usize::MAX)
    }

    fn queue_max_size(&self) -> u32 {
        self.device
            .queue_max_sizes()
            .get(self.queue_index())
            .map_or(0, |&max| u32::from(max))
    }

    fn selected<'a>(&self, queues: &'a [QueueRegisters]) -> Option<&'a QueueRegisters> {
        queues.get(self.queue_index())
    }

    fn write_queue_register(&mut self, offset: u64, value: u32) {
        let index = self.queue_index();
        let Phase::Setup(queues) = &mut self.phase else {
            self.health
                .complain(format_args!("register {offset:#x} written after DRIVER_OK"));
            return;
        };
        let Some(queue) = queues.get_mut(index) else {
            self.health.complain(format_args!(
                "register {offset:#x} of queue {index}, which does not exist"
            ));
            return;
        };
        // Section 4.2.2.2: a ready queue is configured no further; it can be made not ready.
        if queue.ready && offset != register::QUEUE_READY {
            self.health.complain(format_args!(
                "register {offset:#x} of queue {index} written while it is ready"
            ));
            return;
        }
        match offset {
            // A size that does not fit is caught at activation.
            register::QUEUE_SIZE => queue.size = u16::try_from(value).unwrap_or(0),
            register::QUEUE_READY => queue.ready = value == 1,
            register::QUEUE_DESC_LOW => set_low(&mut queue.desc_table, value),
            register::QUEUE_DESC_HIGH => set_high(&mut queue.desc_table, value),
            register::QUEUE_DRIVER_LOW => set_low(&mut queue.avail_ring, value),
            register::QUEUE_DRIVER_HIGH => set_high(&mut queue.avail_ring, value),
            register::QUEUE_DEVICE_LOW => set_low(&mut queue.used_ring, value),
            register::QUEUE_DEVICE_HIGH => set_high(&mut queue.used_ring, value),
            _ => {
                self.health.complain(format_args!(
                    "write of register {offset:#x}, which cannot be written"
                ));
            }
        }
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let value = value & !status::DEVICE_NEEDS_RESET;
        let (old, new) = (self.status, value & !self.status);
        if old & !value != 0 {
            self.health.complain(format_args!(
                "status {old:#x} cannot become {value:#x} without a reset"
            ));
            return;
        }
        // Bits set together are taken in their order.
        for (bit, needed) in [
            (status::ACKNOWLEDGE, 0),
            (status::DRIVER, status::ACKNOWLEDGE),
            (status::FEATURES_OK, status::DRIVER),
            (status::DRIVER_OK, status::FEATURES_OK),
        ] {
            if new & bit == 0 {
                continue;
            }
            if self.status & needed != needed || self.status & status::FAILED != 0 {
                self.health.complain(format_args!(
                    "status bit {bit:#x} set out of order ({old:#x} to {value:#x})"
                ));
                return;
            }
            match bit {
                status::FEATURES_OK if !self.features_acceptable() => return,
                status::DRIVER_OK => {
                    self.status |= bit;
                    self.activate();
                }
                _ => self.status |= bit,
            }
        }
        if new & status::FAILED != 0 {
            self.status |= status::FAILED;
            self.health.complain("the guest's driver gave up");
        }
    }

    fn features_acceptable(&self) -> bool {
        let unknown = self.driver_features & !self.device_features();
        if unknown != 0 {
            self.health.complain(format_args!(
                "features accepted that were not offered: {unknown:#x}"
            ));
        }
        if self.driver_features & F_VERSION_1 == 0 {
            self.health
                .complain("the driver does not accept VIRTIO_F_VERSION_1");
        }
        unknown == 0 && self.driver_features & F_VERSION_1 != 0
    }

    fn context(&self, states: Vec<QueueState>) -> Result<ActivationContext, ActivateError> {
        let queues = states
            .into_iter()
            .zip(&self.notifications)
            .enumerate()
            .map(|(index, (state, notification))| {
                state
                    .ready
                    .then(|| {
                        let (ram, notification) = (Arc::clone(&self.ram), Arc::clone(notification));
                        ActiveQueue::new(state, ram, notification, Arc::clone(&self.interrupt))
                    })
                    .transpose()
                    .map_err(|source| ActivateError::Queue { index, source })
            })
            .collect::<Result<_, _>>()?;
        Ok(ActivationContext {
            ram: Arc::clone(&self.ram),
            queues,
            features: self.driver_features,
            interrupt: Arc::clone(&self.interrupt),
            health: Arc::clone(&self.health),
        })
    }

    fn go_live(
        &self,
        queues: Vec<QueueRegisters>,
        device: Arc<Mutex<dyn ActiveDevice>>,
    ) -> Result<Phase, ActivateError> {
        let handler: crate::event_loop::Handler = device.clone();
        let registration = self.event_loop.add(handler, Arc::clone(&self.health))?;
        Ok(Phase::Active(Live {
            queues,
            device,
            registration: Some(registration),
        }))
    }

    fn activate(&mut self) {
        let Phase::Setup(queues) = std::mem::replace(&mut self.phase, Phase::Failed) else {
            return;
        };
        let states = queues
            .iter()
            .map(|queue| queue.state(self.driver_features, 0, 0))
            .collect();
        let phase = self
            .context(states)
            .and_then(|context| self.device.activate(context))
            .and_then(|device| self.go_live(queues, device));
        match phase {
            Ok(phase) => self.phase = phase,
            Err(error) => self.health.fail(report(&error)),
        }
    }

    fn reset(&mut self) {
        if let Phase::Active(mut live) = std::mem::replace(&mut self.phase, Phase::Failed) {
            drop(live.registration.take());
            self.health.quiescing(|| lock(&live.device).quiesce());
        }
        self.device.reset();
        self.health.recover();
        self.interrupt.acknowledge(u32::MAX);
        self.status = 0;
        self.driver_features = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.queue_sel = 0;
        self.shm_sel = 0;
        self.phase = Phase::Setup(Self::fresh_queues(&*self.device));
    }

    /// Takes the device off its event loop and waits for its requests: from here to [`MmioTransport::resume`] neither
    /// rings nor buffers change, whatever arrives on the host. Call with the vCPUs paused, before guest memory is
    /// saved. What arrives meanwhile is not lost; it waits in the host's descriptors and in the rings.
    pub fn pause(&mut self) {
        if let Phase::Active(live) = &mut self.phase {
            drop(live.registration.take());
            self.health.quiescing(|| lock(&live.device).quiesce());
        }
    }

    /// Puts a paused device back on its event loop.
    pub fn resume(&mut self) -> Result<(), EventLoopError> {
        if let Phase::Active(live) = &mut self.phase
            && live.registration.is_none()
        {
            let handler: crate::event_loop::Handler = live.device.clone();
            live.registration = Some(self.event_loop.add(handler, Arc::clone(&self.health))?);
        }
        Ok(())
    }

    /// Where a live device's queues stand; none if it is not live, or at work this very moment.
    pub fn report(&self) -> Option<DeviceReport> {
        let Phase::Active(live) = &self.phase else {
            return None;
        };
        let states = live.device.try_lock().ok()?.queues();
        let queues = states.iter().enumerate().filter_map(|(queue, state)| {
            Some(QueueReport::new(
                queue,
                state.as_ref()?,
                self.driver_features,
                &self.ram,
            ))
        });
        Some(DeviceReport {
            interrupt_status: self.interrupt.status(),
            queues: queues.collect(),
        })
    }

    /// Waits until no request of the device is under way outside of its event loop. Call with the vCPUs paused.
    pub fn quiesce(&self) {
        if let Phase::Active(live) = &self.phase {
            self.health.quiescing(|| lock(&live.device).quiesce());
        }
    }

    /// The state of transport and device. Call with the vCPUs paused.
    pub fn save(&self) -> Result<SavedState, StateError> {
        let (queues, active) = match &self.phase {
            Phase::Setup(queues) => {
                let idle = |registers: &QueueRegisters| SavedQueue {
                    registers: registers.clone(),
                    next_avail: 0,
                    next_used: 0,
                };
                (queues.iter().map(idle).collect(), None)
            }
            Phase::Active(live) => {
                let mut device = lock(&live.device);
                device.quiesce();
                let positions = device.queues().into_iter().chain(std::iter::repeat(None));
                let queues = live.queues.iter().zip(positions).map(|(registers, position)| {
                    // A queue that the device does not use stays where it was.
                    let (next_avail, next_used) =
                        position.map_or((0, 0), |state| (state.next_avail, state.next_used));
                    SavedQueue {
                        registers: registers.clone(),
                        next_avail,
                        next_used,
                    }
                });
                (queues.collect(), Some(device.save()?))
            }
            Phase::Failed => {
                let why = "it has failed and waits for a reset".to_owned();
                return Err(StateError::Busy {
                    what: "virtio-mmio",
                    why,
                });
            }
        };
        let state = TransportState {
            device_type: self.device.device_type() as u32,
            status: self.status,
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            driver_features: self.driver_features,
            queue_sel: self.queue_sel,
            shm_sel: self.shm_sel,
            interrupt_status: self.interrupt.status(),
            config_generation: self.interrupt.config_generation(),
            queues,
            control: self.device.save()?,
            active,
        };
        SavedState::encode("virtio-mmio", STATE_VERSION, &state)
    }

    /// Puts back what `save` gave, into a transport that no driver has touched yet.
    pub fn restore(&mut self, saved: &SavedState) -> Result<(), RestoreError> {
        let invalid = |why: &str| StateError::Invalid {
            what: "virtio-mmio",
            why: why.to_owned(),
        };
        let state: TransportState = saved.decode("virtio-mmio", STATE_VERSION)?;
        if state.device_type != self.device.device_type() as u32 {
            return Err(invalid("it belongs to a device of another type").into());
        }
        let sizes = self.device.queue_max_sizes();
        if state.queues.len() != sizes.len()
            || state
                .queues
                .iter()
                .zip(sizes)
                .any(|(queue, &max)| queue.registers.max_size != max)
        {
            return Err(invalid("it has other queues").into());
        }
        if state.driver_features & !self.device_features() != 0 {
            return Err(invalid("it has features that this device lacks").into());
        }
        if state.active.is_some() != (state.status & status::DRIVER_OK != 0) {
            return Err(invalid("status and queues disagree").into());
        }
        self.device.restore(&state.control)?;
        self.status = state.status;
        self.device_features_sel = state.device_features_sel;
        self.driver_features_sel = state.driver_features_sel;
        self.driver_features = state.driver_features;
        self.queue_sel = state.queue_sel;
        self.shm_sel = state.shm_sel;
        match &state.active {
            None => {
                self.phase = Phase::Setup(state.queues.into_iter().map(|queue| queue.registers).collect())
            }
            Some(active) => {
                let states = state
                    .queues
                    .iter()
                    .map(|queue| {
                        queue
                            .registers
                            .state(self.driver_features, queue.next_avail, queue.next_used)
                    })
                    .collect();
                let context = self.context(states)?;
                let device = self.device.restore_active(context, active)?;
                let queues = state.queues.into_iter().map(|queue| queue.registers).collect();
                self.phase = self.go_live(queues, device)?;
            }
        }
        self.interrupt
            .restore(state.interrupt_status, state.config_generation);
        Ok(())
    }
}

impl Drop for MmioTransport {
    fn drop(&mut self) {
        if let Phase::Active(live) = &mut self.phase {
            drop(live.registration.take());
            self.health.quiescing(|| lock(&live.device).quiesce());
        }
    }
}

fn lock(device: &Mutex<dyn ActiveDevice>) -> MutexGuard<'_, dyn ActiveDevice + 'static> {
    // A device that panicked has been failed; what is read from it now only serves to take it down.
    device.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The `half`th 32 bits of `value`; zero beyond.
fn select(value: u64, half: u32) -> u32 {
    let bytes = value.to_le_bytes();
    let start = usize::try_from(half).unwrap_or(usize::MAX).saturating_mul(4);
    bytes
        .get(start..start.saturating_add(4))
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u32::from_le_bytes)
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !0xffff_ffff | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & 0xffff_ffff | u64::from(value) << 32;
}

/// An error and its sources in one line.
fn report(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
