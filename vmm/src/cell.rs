// SPDX-License-Identifier: Apache-2.0
//! A cell: one virtual machine, from its configuration to its end.
//!
//! ```text
//!  create() ──▶ Created ──start()──▶ Running ──pause()──▶ Paused
//!                  │                  │   ▲                 │ │
//!                  │                  │   └────resume()─────┘ │
//!                  │                  │                       │   stop(), drop, or the end of the guest
//!                  └──────────────────┴───────────┬───────────┘
//!                                                 ▼
//!                                          Stopped(reason)      final; waiters are told at once, and the housekeeper
//!                                                               frees memory, descriptors and devices shortly after
//! ```
//!
//! Calls that do not fit the state answer a [`LifecycleError`] and change nothing. A cell can end at any moment by its
//! guest's doing, so every call must expect `Stopped`. Saving needs `Created` or `Paused`.

mod card;
mod resize;
mod slot;

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cloister_boot::initrd::{ALIGNMENT, Initrd};
use cloister_boot::x86_64::cpuid::{self, CpuidConfig};
use cloister_boot::x86_64::layout::{IOAPIC, Layout, POWER_PORT};
use cloister_boot::x86_64::{self as boot, BootRequest, MmioDevice};
use cloister_devices::GuestRam;
use cloister_devices::event_loop::EventLoop;
use cloister_devices::fs::DaxPlacement;
use cloister_devices::output_tail::OutputTail;
use cloister_devices::rate_limit::RateLimit;
use cloister_devices::serial::{COM1_GSI, COM1_PORT, PORT_COUNT, Serial};
use cloister_devices::state::SavedState;
use cloister_devices::virtio::Health;
use kvm_bindings::{kvm_cpuid_entry2, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bus::{Bus, BusDevice};
use crate::config::{Boot, CellConfig, NO_SERIAL, SerialConfig};
use crate::device_set::{self, Connect as _, DeviceHandle, OnFailure, Placed, RegisterPage, Surroundings};
use crate::error::{CreateError, LifecycleError};
use crate::halt::Answer;
use crate::host::{CellHost, HostInner, Task};
use crate::image::{self, Image, NewBase, Noted, Shape, Whole, Written, bounded};
use crate::memory::{Memory, SlotRange};
use crate::phases::{Phase, Phases};
use crate::report::{CellReport, VcpuReport};
use crate::spare::{Kind, Spare};
use crate::stats::{self, CellStats, KvmStat};
use crate::stop::{StopReason, classify_halt};
use crate::vcpu::{Access, VcpuControl, VcpuThread, lock_fd};
use crate::x86_64::cpu_check;
use crate::x86_64::interrupt_chip::Chip;
use crate::x86_64::ioapic::{Asserted, REGISTERS_SIZE};
use crate::x86_64::ports::{
    ABSENT, Absent, KEYBOARD_COMMAND, KeyboardReset, POWER_PORTS, PowerPorts, SerialPorts,
};
use crate::x86_64::vcpu_state;

/// What a kernel with a memory device is told: to use plugged memory by itself, most of it for what can be moved away when
/// it is to be unplugged.
const PLUGGED_MEMORY: &str = "memhp_default_state=online memory_hotplug.online_policy=auto-movable";

/// Most entries that KVM has of CPUID, and some.
const MAX_CPUID: usize = 512;

/// Stack of a vCPU's thread in bytes: register accesses need little.
const VCPU_STACK: usize = 256 << 10;

/// Where a cell stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CellState {
    /// Made, never run.
    Created,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs stand still and can go on.
    Paused,
    /// It has ended for good.
    Stopped(StopReason),
}

impl std::fmt::Display for CellState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Created => write!(f, "created"),
            Self::Running => write!(f, "running"),
            Self::Paused => write!(f, "paused"),
            Self::Stopped(reason) => write!(f, "stopped ({reason})"),
        }
    }
}

/// A saved cell without its RAM: versioned states of all parts.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SavedCell {
    /// What it consists of.
    pub(crate) shape: Shape,
    /// What its guest has seen in CPUID.
    #[serde(deserialize_with = "bounded::<_, _, MAX_CPUID>")]
    pub(crate) cpuid: Vec<kvm_cpuid_entry2>,
    #[serde(deserialize_with = "bounded::<_, _, 256>")]
    vcpus: Vec<SavedState>,
    chip: SavedState,
    #[serde(deserialize_with = "bounded::<_, _, 256>")]
    devices: Vec<SavedState>,
    serial: Option<SavedState>,
}

/// What a cell's vCPU threads are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Wanted {
    Run = 0,
    Pause = 1,
    Stop = 2,
}

struct Inner {
    state: CellState,
    /// Why the cell is stopping, from the first cause on.
    stopping: Option<StopReason>,
    threads: usize,
    parked: usize,
    machine: Option<Box<Machine>>,
    taken_down: bool,
}

/// What a cell's handle, its threads and the housekeeper share.
pub(crate) struct Shared {
    name: String,
    housekeeper: Sender<Task>,
    inner: Mutex<Inner>,
    changed: Condvar,
    /// Mirrors what `inner` says, for a look without a lock before each KVM_RUN. Written under the lock.
    wanted: AtomicU8,
    /// Readable once the cell has stopped.
    stopped: EventFd,
    /// All that there can be.
    vcpus: Vec<VcpuControl>,
    /// How many of them there are: the first so many.
    made: AtomicU8,
    tail: OutputTail,
    complaints: RateLimit,
    stop_on_device_failure: bool,
    /// The devices', those attached later included.
    health: Mutex<Vec<Arc<Health>>>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing panics half-way through a change of state.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// vCPUs that there can be.
    pub(crate) fn possible_vcpus(&self) -> usize {
        self.vcpus.len()
    }

    /// vCPUs that there are.
    pub(crate) fn made_vcpus(&self) -> &[VcpuControl] {
        let made = usize::from(self.made.load(Ordering::Acquire));
        &self.vcpus[..made.min(self.vcpus.len())]
    }

    pub(crate) fn vcpu(&self, index: u8) -> &VcpuControl {
        &self.vcpus[usize::from(index)]
    }

    pub(crate) fn vcpu_access(&self, vcpu: usize) -> Option<Access> {
        self.vcpus.get(vcpu).and_then(VcpuControl::access)
    }

    /// The threads of the vCPUs, while they run.
    pub(crate) fn running_threads(&self) -> Option<Vec<i32>> {
        let running = self.wanted() == Wanted::Run && self.lock().state == CellState::Running;
        running.then(|| self.made_vcpus().iter().map(VcpuControl::thread).collect())
    }

    /// Has all vCPUs say whether they have halted for good.
    pub(crate) fn ask_halted(&self) {
        for vcpu in self.made_vcpus() {
            vcpu.ask();
        }
    }

    pub(crate) fn halt_answers(&self) -> Vec<Answer> {
        self.made_vcpus().iter().map(VcpuControl::answer).collect()
    }

    /// Nothing can wake the guest any more.
    pub(crate) fn all_halted(&self) {
        self.stop(classify_halt(&self.tail));
    }

    fn health(&self) -> MutexGuard<'_, Vec<Arc<Health>>> {
        // Nothing panics while it is held.
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a reset of a device waits for requests that are under way on the host.
    pub(crate) fn waits_for_requests(&self) -> bool {
        self.health().iter().any(|health| health.is_quiescing())
    }

    pub(crate) fn tail(&self) -> &OutputTail {
        &self.tail
    }

    pub(crate) fn complain(&self, what: std::fmt::Arguments<'_>) {
        self.complaints.warn(&self.name, what);
    }

    pub(crate) fn wanted(&self) -> Wanted {
        match self.wanted.load(Ordering::SeqCst) {
            0 => Wanted::Run,
            1 => Wanted::Pause,
            _ => Wanted::Stop,
        }
    }

    fn set_wanted(&self, wanted: Wanted) {
        self.wanted.store(wanted as u8, Ordering::SeqCst);
    }

    fn kick_all(&self) {
        for vcpu in &self.vcpus {
            vcpu.kick.kick();
        }
    }

    /// Ends the cell for `reason`, unless it is ending already. Never waits: can be called from anywhere.
    pub(crate) fn stop(&self, reason: StopReason) {
        let mut inner = self.lock();
        if inner.stopping.is_some() {
            return;
        }
        inner.stopping = Some(reason);
        self.set_wanted(Wanted::Stop);
        let idle = inner.threads == 0;
        self.changed.notify_all();
        if idle {
            self.finish(&mut inner);
        }
        drop(inner);
        self.kick_all();
    }

    /// The last vCPU thread is gone, or there was none: the cell has stopped.
    fn finish(&self, inner: &mut Inner) {
        let reason = inner.stopping.clone().unwrap_or(StopReason::Requested);
        log::info!("cell {}: {reason}", self.name);
        inner.state = CellState::Stopped(reason);
        // The counter of a fresh eventfd cannot be full.
        let _ = self.stopped.write(1);
        self.changed.notify_all();
    }

    /// A vCPU thread ends.
    pub(crate) fn vcpu_ended(shared: &Arc<Self>) {
        let mut inner = shared.lock();
        inner.threads = inner.threads.saturating_sub(1);
        if inner.threads > 0 {
            return;
        }
        // Unless its thread was given up as stuck and has come back after all.
        if !matches!(inner.state, CellState::Stopped(_)) {
            shared.finish(&mut inner);
        }
        let machine = inner.machine.take();
        drop(inner);
        shared.hand_over(machine);
    }

    /// Gives a stopped cell's machine to the housekeeper.
    fn hand_over(self: &Arc<Self>, machine: Option<Box<Machine>>) {
        if let Some(machine) = machine {
            // The housekeeper lives as long as anybody can send to it.
            let _ = self.housekeeper.send(Task::TakeDown(Arc::clone(self), machine));
        }
    }

    /// Called by a vCPU thread that is to pause: returns when it is to run or to stop.
    pub(crate) fn park(&self) {
        let mut inner = self.lock();
        inner.parked += 1;
        self.changed.notify_all();
        while self.wanted() == Wanted::Pause {
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        inner.parked -= 1;
        self.changed.notify_all();
    }

    fn device_failed(&self, device: &str, why: &str) {
        if self.stop_on_device_failure {
            self.stop(StopReason::DeviceFailed {
                device: device.to_owned(),
                why: why.to_owned(),
            });
        }
    }

    /// A vCPU's thread does not come back from a device. Called again as long as that is so.
    pub(crate) fn vcpu_stuck(&self, vcpu: usize, elapsed: Duration) {
        let mut inner = self.lock();
        if inner.stopping.is_some() {
            // The others have had time to end. It runs no guest, so the cell has stopped, whenever it comes back.
            if !matches!(inner.state, CellState::Stopped(_)) {
                self.finish(&mut inner);
            }
            return;
        }
        drop(inner);
        self.stop(StopReason::DeviceFailed {
            device: format!("{} vCPU {vcpu}", self.name),
            why: format!(
                "its access to a device has not returned for {} ms",
                elapsed.as_millis()
            ),
        });
    }
}

type Vcpus = Vec<Arc<Mutex<VcpuFd>>>;
type Cpuid = Arc<[kvm_cpuid_entry2]>;

/// All that a cell holds of the host's: gone when it has been taken down.
pub(crate) struct Machine {
    threads: Vec<JoinHandle<()>>,
    vcpus: Vcpus,
    /// What each vCPU finds in CPUID.
    cpuid: Cpuid,
    devices: Vec<Placed>,
    /// The loop that they run on.
    event_loop: Arc<EventLoop>,
    ports: Arc<Bus>,
    registers: Arc<Bus>,
    serial: Option<Arc<SerialPorts>>,
    chip: Chip,
    vm: Arc<VmFd>,
    windows: Vec<DaxPlacement>,
    memory: Arc<Memory>,
    shape: Shape,
    /// Which spares fit it.
    kind: Option<Kind>,
    /// Where the initial RAM disk was put.
    initrd: Option<Initrd>,
}

impl Machine {
    /// Frees everything, in an order that leaves nobody with a dangling view: threads, devices, VM, memory.
    pub(crate) fn take_down(self, cell: &Shared) {
        let Self {
            threads,
            vcpus,
            cpuid: _,
            devices,
            event_loop: _,
            ports,
            registers,
            serial,
            chip,
            vm,
            windows,
            memory,
            shape: _,
            kind: _,
            initrd: _,
        } = self;
        for thread in threads {
            // Panics are contained in the thread.
            let _ = thread.join();
        }
        drop((ports, registers, serial, devices));
        drop(vcpus);
        drop((chip, vm));
        drop((windows, memory));
        cell.lock().taken_down = true;
        cell.changed.notify_all();
    }

    fn addresses(devices: &[Placed]) -> Vec<MmioDevice> {
        devices.iter().map(|device| device.address).collect()
    }

    /// Starts the thread of a vCPU.
    fn spawn(
        &self,
        shared: &Arc<Shared>,
        index: u8,
        fd: &Arc<Mutex<VcpuFd>>,
    ) -> std::io::Result<JoinHandle<()>> {
        let vcpu = VcpuThread {
            index,
            fd: Arc::clone(fd),
            shared: Arc::clone(shared),
            ports: Arc::clone(&self.ports),
            registers: Arc::clone(&self.registers),
            chip: self.chip.clone(),
        };
        let short: String = shared.name.chars().take(8).collect();
        std::thread::Builder::new()
            .name(format!("{short}:vcpu{index}"))
            .stack_size(VCPU_STACK)
            .spawn(move || vcpu.run())
    }
}

/// A virtual machine. Dropping it stops it.
pub struct Cell {
    shared: Arc<Shared>,
    // Keeps the housekeeper and the event loops alive as long as the cell.
    host: Arc<HostInner>,
    /// Serialises start, pause, resume and save.
    lifecycle: Mutex<()>,
    handles: Vec<DeviceHandle>,
    ram: std::sync::Weak<GuestRam>,
    phases: Vec<Phase>,
}

impl Cell {
    /// Makes the VM, its memory and devices, and loads what it is to run. No guest instruction runs yet.
    pub fn create(config: CellConfig, host: &CellHost) -> Result<Self, CreateError> {
        let host = &host.inner;
        let mut layout = config
            .validate(host.max_vcpus)
            .map_err(|source| CreateError::Config {
                name: config.name.clone(),
                source,
            })?;
        let shared = Arc::new(new_shared(&config, host)?);
        let mut phases = Phases::begin();
        let machine = build(config, &mut layout, host, &shared, &mut phases)?;
        let handles = machine
            .devices
            .iter()
            .map(|device| device.handle.clone())
            .collect();
        let ram = Arc::downgrade(machine.memory.ram());
        shared.lock().machine = Some(Box::new(machine));
        Ok(Self {
            shared,
            host: Arc::clone(host),
            lifecycle: Mutex::new(()),
            handles,
            ram,
            phases: phases.all().to_vec(),
        })
    }

    /// What its making cost, part by part.
    pub fn phases(&self) -> &[Phase] {
        &self.phases
    }

    /// The cell's name.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Where it stands now.
    pub fn state(&self) -> CellState {
        self.shared.lock().state.clone()
    }

    /// The ways to the devices, in the order of the configuration.
    pub fn devices(&self) -> &[DeviceHandle] {
        &self.handles
    }

    /// The RAM, while the cell has it. Holding the answer keeps the memory.
    pub fn ram(&self) -> Option<Arc<GuestRam>> {
        self.ram.upgrade()
    }

    /// Another descriptor of the memory file, while the cell has it. A clone has none.
    pub fn memory_file(&self) -> Option<OwnedFd> {
        let inner = self.shared.lock();
        inner
            .machine
            .as_ref()
            .and_then(|machine| machine.memory.file()?.try_clone_to_owned().ok())
    }

    /// Bytes of the host's memory that the guest's RAM takes now: what the guest has touched and a balloon has not given
    /// back. Nothing once the cell has stopped.
    pub fn resident_ram(&self) -> Option<u64> {
        // Not under the lock: a clone's page tables are read.
        let memory = Arc::clone(&self.shared.lock().machine.as_ref()?.memory);
        memory.resident()
    }

    /// Says that the guest is up, for the sake of those that come after it: spares of this cell's kind, or clones of the same
    /// image, will have ready what it has touched by now.
    pub fn note_ready(&self) {
        // Not under the lock: the page tables are read.
        let (memory, kind) = match &self.shared.lock().machine {
            Some(machine) => (Arc::clone(&machine.memory), machine.kind),
            None => return,
        };
        memory.note_working_set(Noted::Ready);
        if let Some(kind) = kind {
            self.host.spares.note_touched(&kind, &memory);
        }
    }

    /// Says that the guest has a container, of which nothing runs yet: where it is the first one of any clone of its image, later
    /// clones will have ready what that takes, too.
    pub fn note_container(&self) {
        // Not under the lock: the page tables are read.
        let memory = match &self.shared.lock().machine {
            Some(machine) => Arc::clone(&machine.memory),
            None => return,
        };
        memory.note_working_set(Noted::Container);
    }

    /// What a clone has touched by now. None of a cell that was not made of an image, or that has stopped.
    pub fn working_set(&self) -> Option<image::WorkingSet> {
        // Not under the lock: the page tables are read.
        let memory = Arc::clone(&self.shared.lock().machine.as_ref()?.memory);
        memory.working_set()
    }

    /// Whether an image of this cell can be written on `base`; answers what stands against it.
    ///
    /// # Errors
    /// As of [`Image::check_can_be_base`].
    pub fn check_base(&self, base: &Image) -> Result<(), image::ImageError> {
        let len = self
            .shared
            .lock()
            .machine
            .as_ref()
            .map(|machine| machine.memory.len());
        len.map_or(Ok(()), |len| base.check_can_be_base(len))
    }

    /// Gives the pages of the initial RAM disk back to the host. Only for a guest that has unpacked it and keeps its
    /// memory for nothing else (Linux does by `retain_initrd`). Answers how many bytes there were.
    pub fn discard_initrd(&self) -> std::io::Result<u64> {
        let mut inner = self.shared.lock();
        let Some(machine) = &mut inner.machine else {
            return Ok(0);
        };
        let Some(initrd) = machine.initrd.take() else {
            return Ok(0);
        };
        // A kernel reserves whole pages for it.
        let size = initrd.size.next_multiple_of(ALIGNMENT);
        machine.memory.discard(initrd.address, size)?;
        Ok(size)
    }

    /// The guest's latest console output.
    pub fn console_tail(&self) -> &OutputTail {
        &self.shared.tail
    }

    /// Types `input` at the serial port; answers how many bytes it took.
    pub fn serial_input(&self, input: &[u8]) -> usize {
        let serial = self
            .shared
            .lock()
            .machine
            .as_ref()
            .and_then(|machine| machine.serial.clone());
        serial
            .and_then(|serial| serial.with(|serial| serial.enqueue(input)))
            .unwrap_or(0)
    }

    /// Becomes readable when the cell has stopped, and stays so. For poll and its kin; do not read it.
    pub fn stopped_event(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor lives as long as `self`.
        unsafe { BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(&self.shared.stopped)) }
    }

    fn lifecycle(&self) -> MutexGuard<'_, ()> {
        self.lifecycle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wrong_state(action: &'static str, state: &CellState) -> LifecycleError {
        LifecycleError::State {
            action,
            state: state.to_string(),
        }
    }

    /// Created → Running.
    pub fn start(&self) -> Result<(), LifecycleError> {
        let _one = self.lifecycle();
        let mut inner = self.shared.lock();
        if inner.state != CellState::Created {
            return Err(Self::wrong_state("start", &inner.state));
        }
        let Some(machine) = inner.machine.as_ref() else {
            return Err(Self::wrong_state("start", &inner.state));
        };
        let mut threads = Vec::new();
        let mut failure = None;
        for (index, fd) in (0u8..).zip(&machine.vcpus) {
            match machine.spawn(&self.shared, index, fd) {
                Ok(thread) => threads.push(thread),
                Err(source) => {
                    failure = Some(LifecycleError::Thread { vcpu: index, source });
                    break;
                }
            }
        }
        inner.threads = threads.len();
        if let Some(machine) = inner.machine.as_mut() {
            machine.threads = threads;
        }
        inner.state = CellState::Running;
        // Under the lock: the last thread's report of its end must come after it.
        let _ = self
            .shared
            .housekeeper
            .send(Task::Watch(Arc::clone(&self.shared)));
        drop(inner);
        match failure {
            None => Ok(()),
            Some(failure) => {
                // Those that started end again; with none the cell ends here.
                self.stop();
                Err(failure)
            }
        }
    }

    /// Running → Paused. Returns when no vCPU runs any more and no device touches the RAM.
    pub fn pause(&self) -> Result<(), LifecycleError> {
        let _one = self.lifecycle();
        self.pause_locked()?;
        // Not under the lock: a device that fails meanwhile needs it to say so.
        for page in self.pages() {
            page.lock().pause();
        }
        Ok(())
    }

    fn pages(&self) -> Vec<Arc<RegisterPage>> {
        let inner = self.shared.lock();
        let devices = inner.machine.iter().flat_map(|machine| &machine.devices);
        devices.map(|device| Arc::clone(&device.transport)).collect()
    }

    fn pause_locked(&self) -> Result<(), LifecycleError> {
        let mut inner = self.shared.lock();
        if inner.state != CellState::Running || inner.stopping.is_some() {
            return Err(Self::wrong_state("pause", &inner.state));
        }
        self.shared.set_wanted(Wanted::Pause);
        drop(inner);
        self.shared.kick_all();
        inner = self.shared.lock();
        while inner.stopping.is_none() && inner.parked < inner.threads {
            inner = self
                .shared
                .changed
                .wait(inner)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if inner.stopping.is_some() {
            return Err(Self::wrong_state("pause", &inner.state));
        }
        inner.state = CellState::Paused;
        Ok(())
    }

    /// Paused → Running.
    pub fn resume(&self) -> Result<(), LifecycleError> {
        let _one = self.lifecycle();
        if self.state() == CellState::Paused {
            for page in self.pages() {
                let mut page = page.lock();
                if let Err(error) = page.resume() {
                    // Only a process that falls apart has no event loop: stop what can be stopped.
                    page.health().fail(error);
                }
            }
        }
        self.resume_locked()
    }

    fn resume_locked(&self) -> Result<(), LifecycleError> {
        let mut inner = self.shared.lock();
        if inner.state != CellState::Paused || inner.stopping.is_some() {
            return Err(Self::wrong_state("resume", &inner.state));
        }
        inner.state = CellState::Running;
        self.shared.set_wanted(Wanted::Run);
        self.shared.changed.notify_all();
        // A later pause must not count a thread that has not woken from this one.
        while inner.stopping.is_none() && inner.parked > 0 {
            inner = self
                .shared
                .changed
                .wait(inner)
                .unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }

    /// Any state → Stopped. Does not wait; a cell that has stopped keeps its first reason.
    pub fn stop(&self) {
        self.end(StopReason::Requested);
    }

    /// The same, for a cell whose guest does not respond any more.
    pub fn give_up(&self, why: String) {
        self.end(StopReason::Unresponsive { why });
    }

    fn end(&self, reason: StopReason) {
        self.shared.stop(reason);
        let mut inner = self.shared.lock();
        // Without vCPU threads nobody else hands the machine over.
        let machine = if inner.threads == 0 {
            inner.machine.take()
        } else {
            None
        };
        drop(inner);
        self.shared.hand_over(machine);
    }

    /// Waits until the cell has stopped, or `timeout` has passed.
    pub fn wait(&self, timeout: Option<Duration>) -> Option<StopReason> {
        self.wait_for(timeout, |inner| match &inner.state {
            CellState::Stopped(reason) => Some(reason.clone()),
            _ => None,
        })
    }

    /// Waits until the stopped cell's threads, descriptors and memory are gone, too.
    pub fn wait_taken_down(&self, timeout: Option<Duration>) -> bool {
        self.wait_for(timeout, |inner| inner.taken_down.then_some(()))
            .is_some()
    }

    fn wait_for<T>(&self, timeout: Option<Duration>, found: impl Fn(&Inner) -> Option<T>) -> Option<T> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut inner = self.shared.lock();
        loop {
            if let Some(result) = found(&inner) {
                return Some(result);
            }
            inner = match deadline {
                None => self
                    .shared
                    .changed
                    .wait(inner)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.checked_duration_since(Instant::now())?;
                    self.shared
                        .changed
                        .wait_timeout(inner, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
        }
    }

    /// Exits that reached this program.
    pub fn stats(&self) -> CellStats {
        let mut stats = CellStats::default();
        for vcpu in &self.shared.vcpus {
            stats.add(&vcpu.exits);
        }
        stats
    }

    /// KVM's own statistics of each vCPU, `exits` among them. A running cell is paused for the moment.
    pub fn kvm_stats(&self) -> Result<Vec<Vec<KvmStat>>, LifecycleError> {
        let _one = self.lifecycle();
        let running = self.state() == CellState::Running;
        if running {
            self.pause_locked()?;
        }
        let vcpus = self
            .shared
            .lock()
            .machine
            .as_ref()
            .map(|machine| machine.vcpus.clone());
        let result = match vcpus {
            Some(vcpus) => vcpus
                .iter()
                .map(|fd| stats::read_kvm_stats(&*lock_fd(fd)).map_err(LifecycleError::Stats))
                .collect(),
            None => Err(Self::wrong_state("read the statistics of", &self.state())),
        };
        if running {
            self.resume_locked()?;
        }
        result
    }

    /// Where the devices' queues and the vCPUs stand, for somebody who wants to know why a guest does nothing. The devices
    /// come first, undisturbed; then a running cell is paused for the moment.
    pub fn report(&self) -> Result<CellReport, LifecycleError> {
        let _one = self.lifecycle();
        let (devices, vcpus) = {
            let inner = self.shared.lock();
            let Some(machine) = &inner.machine else {
                return Err(Self::wrong_state("look into", &inner.state));
            };
            let page = |device: &Placed| (device.name.clone(), Arc::clone(&device.transport));
            let pages: Vec<_> = machine.devices.iter().map(page).collect();
            (pages, machine.vcpus.clone())
        };
        let devices = devices
            .into_iter()
            .filter_map(|(name, page)| Some((name, page.lock().report()?)));
        let devices = devices.collect();
        let running = self.state() == CellState::Running;
        if running {
            self.pause_locked()?;
        }
        let vcpus = vcpus.iter().map(|fd| VcpuReport::new(&lock_fd(fd))).collect();
        if running {
            self.resume_locked()?;
        }
        Ok(CellReport { devices, vcpus })
    }

    /// The state of vCPUs, interrupt chip and devices. The RAM is in [`Cell::memory_file`].
    pub fn save(&self) -> Result<SavedCell, LifecycleError> {
        let _one = self.lifecycle();
        Ok(self.save_locked()?.0)
    }

    /// Writes an image of the cell into `file`, which must be empty. Needs a cell that is created or paused, and leaves it
    /// so. The header is written last: what is there when this fails is no image.
    pub fn write_image(&self, file: &std::fs::File) -> Result<Written, LifecycleError> {
        self.write(file, None)
    }

    /// The same, but the image holds only what differs from `base`, without which it is of no use.
    ///
    /// # Errors
    /// As of [`Cell::write_image`], or `base` is of a cell with other RAM, or has as many bases as there can be.
    pub fn write_image_on(&self, file: &std::fs::File, base: NewBase<'_>) -> Result<Written, LifecycleError> {
        self.write(file, Some(base))
    }

    fn write(&self, file: &std::fs::File, base: Option<NewBase<'_>>) -> Result<Written, LifecycleError> {
        let _one = self.lifecycle();
        let (saved, memory) = self.save_locked()?;
        let memory = &memory;
        Ok(image::write(file, Whole { saved, memory, base })?)
    }

    /// Writes an image of the cell to a file, which is there whole or not at all, in the place of one that is there. As
    /// [`Cell::write_image`] otherwise.
    pub fn save_image(&self, path: &std::path::Path) -> Result<Written, LifecycleError> {
        let failed = |source| image::ImageError::Io {
            what: "write",
            source,
        };
        let new = image::NewFile::create(path).map_err(failed)?;
        let written = self.write_image(new.file())?;
        new.finish().map_err(failed)?;
        Ok(written)
    }

    fn save_locked(&self) -> Result<(SavedCell, Arc<Memory>), LifecycleError> {
        // Not under the lock: a device that fails meanwhile needs it to say so.
        let (vcpus, pages, serial, chip, vm, shape, cpuid, memory) = {
            let inner = self.shared.lock();
            let savable = matches!(inner.state, CellState::Created | CellState::Paused);
            match inner.machine.as_ref() {
                Some(machine) if savable && inner.stopping.is_none() => {
                    let pages = machine.devices.iter().map(|device| Arc::clone(&device.transport));
                    (
                        machine.vcpus.clone(),
                        pages.collect::<Vec<_>>(),
                        machine.serial.clone(),
                        machine.chip.clone(),
                        Arc::clone(&machine.vm),
                        machine.shape.clone(),
                        machine.cpuid.to_vec(),
                        Arc::clone(&machine.memory),
                    )
                }
                _ => return Err(Self::wrong_state("save", &inner.state)),
            }
        };
        // Devices first: one that completes its last request now may still interrupt a vCPU.
        let devices = pages
            .iter()
            .map(|page| page.lock().save())
            .collect::<Result<_, _>>()?;
        let vcpus = vcpus
            .iter()
            .map(|fd| vcpu_state::save(&lock_fd(fd), &self.host.msr_indices))
            .collect::<Result<_, _>>()?;
        let serial = serial.and_then(|serial| serial.with(|s| s.save())).transpose()?;
        let saved = SavedCell {
            shape,
            cpuid,
            vcpus,
            chip: chip.save(&vm)?,
            devices,
            serial,
        };
        Ok((saved, memory))
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        self.stop();
    }
}

fn new_shared(config: &CellConfig, host: &HostInner) -> Result<Shared, CreateError> {
    Ok(Shared {
        name: config.name.clone(),
        housekeeper: host.housekeeper(),
        inner: Mutex::new(Inner {
            state: CellState::Created,
            stopping: None,
            threads: 0,
            parked: 0,
            machine: None,
            taken_down: false,
        }),
        changed: Condvar::new(),
        wanted: AtomicU8::new(Wanted::Run as u8),
        stopped: EventFd::new(EFD_NONBLOCK).map_err(|source| CreateError::Io {
            what: "cannot create an eventfd",
            source,
        })?,
        vcpus: (0..config.possible_vcpus())
            .map(|_| VcpuControl::default())
            .collect(),
        made: AtomicU8::new(0),
        tail: OutputTail::new(),
        complaints: RateLimit::new(),
        stop_on_device_failure: config.stop_on_device_failure,
        health: Mutex::default(),
    })
}

/// Makes all that a cell consists of.
fn build(
    config: CellConfig,
    layout: &mut Layout,
    host: &HostInner,
    shared: &Arc<Shared>,
    phases: &mut Phases,
) -> Result<Machine, CreateError> {
    let pluggable_mib = config.pluggable_mib();
    let shape = config.shape();
    let (memory_file, boot) = match config.boot {
        Boot::Restore { saved, memory } => (Some(memory), Source::Saved(saved)),
        Boot::Kernel(kernel) => (None, Source::Kernel(kernel)),
        Boot::Clone { image } => (None, Source::Image(image)),
    };
    if let Some(saved) = boot.saved() {
        check_shape(&saved.shape, &shape)?;
    }
    let kind = match &boot {
        Source::Kernel(kernel) => Kind::of(
            &kernel.kernel,
            kernel.initrd.as_ref(),
            config.memory_mib,
            pluggable_mib.unwrap_or(0),
            config.huge_pages,
        ),
        Source::Saved(_) | Source::Image(_) => None,
    };
    let (memory, vm, images) = match kind.and_then(|kind| host.spares.take(&kind)) {
        Some(Spare { vm, memory, images }) => (memory, Some(vm), Some(images)),
        None => {
            let mount = host.mount_for(config.huge_pages);
            let (pages, overcommit) = (config.huge_pages, config.overcommit);
            let memory = match &boot {
                Source::Image(image) => Memory::of_image(layout, pages, overcommit, image, mount)?,
                _ => Memory::new(layout, pages, overcommit, memory_file, mount)?,
            };
            (memory, None, None)
        }
    };
    phases.ours("memory");
    let event_loop = Arc::clone(host.event_loop());
    let devices = device_set::make(
        config.devices,
        &Surroundings {
            cell: &config.name,
            ram: memory.ram(),
            event_loop: &event_loop,
            tail: &shared.tail,
            workers: &host.workers,
            on_failure: &|| on_failure(shared),
        },
        layout,
    )?;
    *shared.health() = devices.iter().map(|device| Arc::clone(&device.health)).collect();
    let windows: Vec<DaxPlacement> = devices
        .iter()
        .filter_map(|device| device.window.clone())
        .collect();
    let addresses = Machine::addresses(&devices);
    let wired = addresses.iter().map(|device| device.gsi);
    let wired = wired.chain(config.serial.is_some().then_some(COM1_GSI));
    let pins = u8::try_from(wired.max().unwrap_or(0) + 1).unwrap_or(u8::MAX);

    phases.ours("devices");
    let vm = Arc::new(match vm {
        Some(vm) => vm,
        None => create_vm(host)?,
    });
    phases.kvm("VM");
    set_memory(&vm, &memory, &windows)?;
    let chip = Chip::create(&vm, config.interrupt_chip, pins)?;
    phases.kvm("memory slots, interrupt chip");
    let serial = make_serial(config.serial, shared, &boot)?;
    let (ports, registers) = make_buses(shared, &devices, serial.as_ref(), &chip)?;
    phases.ours("buses");
    for device in devices.iter().filter(|device| !device.is_slot) {
        device.transport.lock().connect(&vm, &device.address)?;
    }
    if let Some(serial) = &serial {
        let connected = serial.with(|serial| vm.register_irqfd(serial.interrupt(), COM1_GSI));
        connected.unwrap_or(Ok(())).map_err(|source| CreateError::Kvm {
            what: "KVM_IRQFD",
            source,
        })?;
    }

    phases.kvm("irqfds and ioeventfds");
    let possible = u8::try_from(shared.possible_vcpus()).unwrap_or(u8::MAX);
    let count = match boot.saved() {
        None => config.vcpus,
        // Some may have been added since it started.
        Some(saved) => u8::try_from(saved.vcpus.len())
            .ok()
            .filter(|count| (config.vcpus..=possible).contains(count))
            .ok_or_else(|| mismatch("vCPUs", saved.vcpus.len(), config.vcpus.into()))?,
    };
    let seen = boot.saved().map(|saved| saved.cpuid.as_slice());
    let (vcpus, cpuid) = create_vcpus(&vm, host, count, possible, seen)?;
    shared.made.store(count, Ordering::Release);
    phases.kvm("vCPUs");
    let mut initrd = None;
    match boot {
        Source::Kernel(kernel) => {
            // In front: a `--` of the caller's ends what is for the kernel.
            let mut command_line = String::new();
            if serial.is_none() {
                command_line.push_str(NO_SERIAL);
                command_line.push(' ');
            }
            if pluggable_mib.is_some() {
                command_line.push_str(PLUGGED_MEMORY);
                command_line.push(' ');
            }
            command_line.push_str(&kernel.command_line);
            let request = BootRequest {
                kernel: &kernel.kernel,
                initrd: kernel.initrd.as_ref(),
                command_line: &command_line,
                description: kernel.description,
                vcpus: possible,
                started: config.vcpus,
                other_gsis: if serial.is_some() { &[COM1_GSI] } else { &[] },
                devices: &addresses,
            };
            let ram = memory.ram().as_ref();
            let loaded = match &images {
                Some(images) => boot::describe(ram, layout, images, &request)?,
                None => boot::load(ram, layout, &request)?,
            };
            initrd = loaded.initrd;
            for (index, fd) in vcpus.iter().enumerate() {
                vcpu_state::prepare_boot(&lock_fd(fd), (index == 0).then_some(&loaded.entry))?;
            }
        }
        Source::Saved(saved) => restore(&saved, &vm, &chip, &vcpus, &devices, phases)?,
        Source::Image(image) => restore(image.saved(), &vm, &chip, &vcpus, &devices, phases)?,
    }
    phases.ours("guest, or states of devices");
    Ok(Machine {
        threads: Vec::new(),
        vcpus,
        cpuid,
        devices,
        event_loop,
        ports,
        registers,
        serial,
        chip,
        vm,
        windows,
        memory: Arc::new(memory),
        shape,
        kind,
        initrd,
    })
}

/// What a device of this cell calls when it fails.
fn on_failure(shared: &Arc<Shared>) -> OnFailure {
    let cell = Arc::downgrade(shared);
    Box::new(move |device, why| {
        if let Some(cell) = cell.upgrade() {
            cell.device_failed(device, why);
        }
    })
}

enum Source {
    Kernel(crate::config::KernelBoot),
    Saved(Box<SavedCell>),
    Image(Arc<Image>),
}

impl Source {
    fn saved(&self) -> Option<&SavedCell> {
        match self {
            Self::Kernel(_) => None,
            Self::Saved(saved) => Some(saved),
            Self::Image(image) => Some(image.saved()),
        }
    }
}

/// The name of an empty place for a device.
const SLOT: &str = "slot";

fn check_shape(saved: &Shape, configured: &Shape) -> Result<(), CreateError> {
    let differ = |saved: String, configured: String| Err(CreateError::Shape { saved, configured });
    if saved.devices.len() != configured.devices.len() {
        let list = |shape: &Shape| format!("the devices {}", shape.devices.join(", "));
        return differ(list(saved), list(configured));
    }
    let mut devices = saved.devices.iter().zip(&configured.devices).enumerate();
    if let Some((at, (was, is))) = devices.find(|(_, (was, is))| was != is && *was != SLOT) {
        let device = |name| format!("a device {name} in place {at}");
        return differ(device(was), device(is));
    }
    for (was, is, what) in [
        (saved.memory_mib, configured.memory_mib, "MiB of RAM"),
        (saved.pluggable_mib, configured.pluggable_mib, "MiB to plug"),
        (
            saved.max_vcpus.into(),
            configured.max_vcpus.into(),
            "vCPUs at most",
        ),
        (saved.serial.into(), configured.serial.into(), "serial ports"),
    ] {
        if was != is {
            return differ(format!("{was} {what}"), format!("{is} {what}"));
        }
    }
    Ok(())
}

pub(crate) fn create_vm(host: &HostInner) -> Result<VmFd, CreateError> {
    loop {
        match host.kvm.create_vm() {
            // A signal to this thread: the call has no side effects yet.
            Err(error) if error.errno() == libc::EINTR => {}
            result => {
                return result.map_err(|source| CreateError::Kvm {
                    what: "KVM_CREATE_VM",
                    source,
                });
            }
        }
    }
}

/// One slot per range of RAM, and one per DAX window: what is not mapped in a window faults in the host.
fn set_memory(vm: &VmFd, memory: &Memory, windows: &[DaxPlacement]) -> Result<(), CreateError> {
    let windows = windows.iter().map(|placement| SlotRange {
        guest: placement.base,
        size: placement.window.len(),
        host: placement.window.host_address(),
    });
    for (slot, range) in (0u32..).zip(memory.slots().into_iter().chain(windows)) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: range.guest,
            memory_size: range.size,
            userspace_addr: range.host,
        };
        // SAFETY: the range is one whole mapping of RAM or of a window, which `Machine` drops after the VM.
        unsafe { vm.set_user_memory_region(region) }.map_err(|source| CreateError::Kvm {
            what: "KVM_SET_USER_MEMORY_REGION",
            source,
        })?;
    }
    Ok(())
}

fn make_serial(
    config: Option<SerialConfig>,
    shared: &Shared,
    source: &Source,
) -> Result<Option<Arc<SerialPorts>>, CreateError> {
    let Some(config) = config else { return Ok(None) };
    let sink = config
        .output
        .map(|output| Box::new(std::fs::File::from(output)) as Box<dyn std::io::Write + Send>);
    let mut serial = Serial::new(shared.tail.clone(), sink).map_err(|source| CreateError::Io {
        what: "cannot create the serial port",
        source,
    })?;
    if let Some(saved) = source.saved()
        && let Some(state) = &saved.serial
    {
        serial = serial.restore(state)?;
    }
    Ok(Some(Arc::new(SerialPorts(Mutex::new(Some(serial))))))
}

/// I/O ports and device registers.
fn make_buses(
    shared: &Arc<Shared>,
    devices: &[Placed],
    serial: Option<&Arc<SerialPorts>>,
    chip: &Chip,
) -> Result<(Arc<Bus>, Arc<Bus>), CreateError> {
    let on_stop = || {
        let cell = Arc::downgrade(shared);
        Box::new(move |reason| {
            if let Some(cell) = cell.upgrade() {
                cell.stop(reason);
            }
        })
    };
    let mut ports = Bus::new();
    ports.insert(
        u64::from(POWER_PORT),
        POWER_PORTS,
        Arc::new(PowerPorts(on_stop())),
    )?;
    ports.insert(u64::from(KEYBOARD_COMMAND), 1, Arc::new(KeyboardReset(on_stop())))?;
    let absent: Arc<dyn BusDevice> = Arc::new(Absent);
    for (start, len) in ABSENT {
        ports.insert(start, len, Arc::clone(&absent))?;
    }
    if let Some(serial) = serial {
        ports.insert(
            u64::from(COM1_PORT),
            u64::from(PORT_COUNT),
            Arc::clone(serial) as _,
        )?;
    }
    let mut registers = Bus::new();
    for device in devices {
        registers.insert(
            device.address.base,
            device.address.size,
            Arc::clone(&device.transport) as _,
        )?;
    }
    if let Chip::Split(ioapic) = chip {
        let mut asserted = HashMap::<u32, Asserted>::new();
        for device in devices {
            let page = Arc::downgrade(&device.transport);
            let is_asserted = move || page.upgrade().is_some_and(|page| Placed::asserted(&page));
            asserted.insert(device.address.gsi, Box::new(is_asserted));
        }
        ioapic.set_asserted(asserted);
        registers.insert(IOAPIC, REGISTERS_SIZE, Arc::clone(ioapic) as _)?;
    }
    Ok((Arc::new(ports), Arc::new(registers)))
}

/// Makes the vCPUs. `seen` is what a saved guest knows of CPUID.
fn create_vcpus(
    vm: &VmFd,
    host: &HostInner,
    count: u8,
    possible: u8,
    seen: Option<&[kvm_cpuid_entry2]>,
) -> Result<(Vcpus, Cpuid), CreateError> {
    let first = create_vcpu(vm, 0)?;
    let mut leaves = host.leaves(possible, first.get_tsc_khz().ok())?;
    if let Some(seen) = seen {
        check_processor(seen, &leaves)?;
        leaves = seen.to_vec();
    }
    let mut fds = vec![first];
    for index in 1..count {
        fds.push(create_vcpu(vm, index)?);
    }
    let mut vcpus = Vec::new();
    for (index, fd) in (0u8..).zip(fds) {
        vcpu_state::set_cpuid(&fd, &cpuid::for_vcpu(&leaves, index))?;
        vcpus.push(Arc::new(Mutex::new(fd)));
    }
    Ok((vcpus, leaves.into()))
}

fn check_processor(seen: &[kvm_cpuid_entry2], leaves: &[kvm_cpuid_entry2]) -> Result<(), CreateError> {
    cpu_check::check(seen, leaves).map_err(|why| CreateError::Processor {
        saved: cpu_check::name(seen),
        here: cpu_check::name(leaves),
        why,
    })
}

impl HostInner {
    /// What CPUID says in a new cell.
    fn leaves(&self, vcpus: u8, tsc_khz: Option<u32>) -> Result<Vec<kvm_cpuid_entry2>, CreateError> {
        let config = CpuidConfig {
            vcpus,
            tsc_deadline: self.kvm.check_extension(Cap::TscDeadlineTimer),
            tsc_khz,
        };
        Ok(cpuid::filter(&self.cpuid, &config)?)
    }
}

impl CellHost {
    /// Whether clones of this image can run on this host's processor; answers what stands against it.
    pub fn can_run(&self, image: &Image) -> Result<(), CreateError> {
        // The frequency is not looked at: KVM makes it what it was.
        let leaves = self.inner.leaves(image.shape().max_vcpus, Some(0))?;
        check_processor(&image.saved().cpuid, &leaves)
    }
}

fn create_vcpu(vm: &VmFd, index: u8) -> Result<VcpuFd, CreateError> {
    vm.create_vcpu(index.into()).map_err(|source| CreateError::Kvm {
        what: "KVM_CREATE_VCPU",
        source,
    })
}

fn mismatch(what: &'static str, found: usize, expected: usize) -> CreateError {
    CreateError::State(cloister_devices::state::StateError::Invalid {
        what,
        why: format!("{found} are saved, the configuration has {expected}"),
    })
}

fn restore(
    saved: &SavedCell,
    vm: &VmFd,
    chip: &Chip,
    vcpus: &[Arc<Mutex<VcpuFd>>],
    devices: &[Placed],
    phases: &mut Phases,
) -> Result<(), CreateError> {
    if saved.vcpus.len() != vcpus.len() {
        return Err(mismatch("vCPUs", saved.vcpus.len(), vcpus.len()));
    }
    if saved.devices.len() != devices.len() {
        return Err(mismatch("devices", saved.devices.len(), devices.len()));
    }
    for (index, (fd, state)) in vcpus.iter().zip(&saved.vcpus).enumerate() {
        vcpu_state::restore(&lock_fd(fd), state, index == 0)?;
    }
    chip.restore(vm, &saved.chip)?;
    phases.kvm("states of vCPUs and chip");
    // Last: a restored device may interrupt at once, by the routes that are there now.
    for ((device, state), was) in devices.iter().zip(&saved.devices).zip(&saved.shape.devices) {
        if was == SLOT && !device.is_slot {
            // New to the guest.
            continue;
        }
        let restored = device.transport.lock().restore(state);
        restored.map_err(|source| CreateError::RestoreDevice {
            device: device.name.clone(),
            source,
        })?;
    }
    Ok(())
}

impl AsFd for Cell {
    /// The event of [`Cell::stopped_event`].
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stopped_event()
    }
}
