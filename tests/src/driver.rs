// SPDX-License-Identifier: Apache-2.0
//! A virtio driver without a kernel: drives a device's registers and queues from test code, well or badly.
//!
//! # Theory of operation
//!
//! A [`Machine`] is guest RAM, an event loop and a worker pool. A [`Driver`] puts a device behind an [`MmioTransport`] and plays the
//! vCPU: [`Driver::read32`] and [`Driver::write32`] are register accesses, [`Driver::start`] the whole way to
//! DRIVER_OK, [`Driver::kick`] a notification, and [`Driver::wait_used`] waits for the device by polling the interrupt
//! line. A [`VirtQueue`] is the driver's half of a split queue; each of its parts can be written raw
//! ([`VirtQueue::write_descriptor`], [`VirtQueue::push_available`], [`VirtQueue::set_available_index`]).
//!
//! ```no_run
//! use cloister_tests::driver::{Driver, Machine};
//! use cloister_devices::rng::Rng;
//!
//! let machine = Machine::new();
//! let mut driver = Driver::new(&machine, Box::new(Rng::new()));
//! let mut queues = driver.start(0, &[16]);
//! let reply = driver.request(&mut queues[0], &[], &[64]);   // nothing to read, 64 bytes to write
//! assert_eq!(reply.len, 64);
//! ```
//!
//! Waiting has a bound ([`TIMEOUT`]) only so that a device that hangs fails its test.

use std::cell::Cell;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cloister_devices::GuestRam;
use cloister_devices::event_loop::EventLoop;
use cloister_devices::state::SavedState;
use cloister_devices::virtio::{
    F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, Health, MmioTransport, RestoreError, VirtioDevice, status,
};
use cloister_devices::worker_pool::WorkerPool;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// How long to wait for what must happen.
pub const TIMEOUT: Duration = Duration::from_secs(20);

/// Register offsets (virtio 1.3, section 4.2.2).
pub mod register {
    #![allow(missing_docs)]
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

/// Descriptor flags (section 2.7.5).
pub mod flag {
    /// The chain goes on at `next`.
    pub const NEXT: u16 = 1;
    /// The device writes this buffer (else it reads it).
    pub const WRITE: u16 = 2;
    /// The buffer is a table of descriptors.
    pub const INDIRECT: u16 = 4;
}

/// Guest RAM, an event loop and a worker pool: what devices need of a machine.
pub struct Machine {
    /// The RAM: by default 32 MiB from 0 and 16 MiB from 64 MiB, with a hole between.
    pub ram: Arc<GuestRam>,
    /// The loop that devices run on.
    pub event_loop: Arc<EventLoop>,
    /// The pool that blocking requests run on.
    pub pool: Arc<WorkerPool>,
    next: Cell<u64>,
}

impl Machine {
    /// First address of the hole in the default RAM.
    pub const HOLE: u64 = 32 << 20;
    /// First address behind the hole.
    pub const HIGH: u64 = 64 << 20;
    /// First address beyond the default RAM.
    pub const END: u64 = 80 << 20;

    /// A machine with the default RAM.
    #[expect(clippy::new_without_default, reason = "it starts a thread")]
    pub fn new() -> Self {
        let ranges = [(GuestAddress(0), 32 << 20), (GuestAddress(Self::HIGH), 16 << 20)];
        Self::with_ram(Arc::new(GuestRam::from_ranges(&ranges).unwrap()))
    }

    /// A machine with this RAM. Buffers are taken from 64 KiB up.
    pub fn with_ram(ram: Arc<GuestRam>) -> Self {
        Self {
            ram,
            event_loop: Arc::new(EventLoop::new("test-io").unwrap()),
            pool: Arc::new(WorkerPool::new(4).unwrap()),
            next: Cell::new(0x1_0000),
        }
    }

    /// Another machine whose RAM holds the same, as a clone's does.
    #[must_use]
    pub fn copy(&self) -> Self {
        let size = |len: u64| usize::try_from(len).unwrap();
        let ranges: Vec<_> = self
            .ram
            .iter()
            .map(|region| (region.start_addr(), size(region.len())))
            .collect();
        let copy = Self::with_ram(Arc::new(GuestRam::from_ranges(&ranges).unwrap()));
        for (start, len) in ranges {
            copy.write(start.0, &self.read(start.0, len));
        }
        copy.next.set(self.next.get());
        copy
    }

    /// Guest memory that nobody else uses, aligned to `align` (a power of two), zeroed or not.
    pub fn allocate(&self, len: usize, align: u64) -> u64 {
        let address = self.next.get().next_multiple_of(align);
        self.next.set(address + len as u64);
        assert!(
            self.next.get() <= Self::HOLE,
            "the test uses too much guest memory"
        );
        address
    }

    /// Writes guest memory.
    pub fn write(&self, address: u64, data: &[u8]) {
        self.ram.write_slice(data, GuestAddress(address)).unwrap();
    }

    /// Reads guest memory.
    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.ram.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }
}

/// Where a queue's three areas are, and how many descriptors it has. Any nonsense can be put here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Value for QueueSize.
    pub size: u32,
    /// Guest physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest physical address of the available (driver) ring.
    pub available: u64,
    /// Guest physical address of the used (device) ring.
    pub used: u64,
}

impl Layout {
    /// A proper layout in fresh memory.
    pub fn new(machine: &Machine, size: u16) -> Self {
        let n = usize::from(size);
        Self {
            size: size.into(),
            descriptors: machine.allocate(16 * n, 4096),
            available: machine.allocate(6 + 2 * n, 2),
            used: machine.allocate(6 + 8 * n, 4),
        }
    }
}

/// One descriptor, as it lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest physical address.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// See [`flag`].
    pub flags: u16,
    /// Next descriptor of the chain, with [`flag::NEXT`].
    pub next: u16,
}

impl Descriptor {
    /// A buffer that the device reads.
    pub fn readable(address: u64, len: u32) -> Self {
        Self {
            address,
            len,
            flags: 0,
            next: 0,
        }
    }

    /// A buffer that the device writes.
    pub fn writable(address: u64, len: u32) -> Self {
        Self {
            flags: flag::WRITE,
            ..Self::readable(address, len)
        }
    }

    /// Its 16 bytes.
    pub fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// An element of the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Head of the chain that the device has finished with.
    pub head: u32,
    /// Bytes it says it wrote.
    pub len: u32,
}

/// The driver's half of a split queue. Descriptors are handed out round robin, so a test that keeps more in flight
/// than the queue has overwrites its own.
#[derive(Clone)]
pub struct VirtQueue {
    /// The queue's number.
    pub index: u32,
    /// Number of descriptors.
    pub size: u16,
    /// Where it lies.
    pub layout: Layout,
    ram: Arc<GuestRam>,
    next_descriptor: u16,
    available_index: u16,
    seen_used: u16,
}

impl VirtQueue {
    /// The driver's half of a queue that the device knows as `index`.
    pub fn new(machine: &Machine, index: u32, layout: Layout) -> Self {
        Self {
            index,
            size: u16::try_from(layout.size).unwrap(),
            layout,
            ram: Arc::clone(&machine.ram),
            next_descriptor: 0,
            available_index: 0,
            seen_used: 0,
        }
    }

    /// The same half of the same queue, in a [copy](Machine::copy) of the machine.
    #[must_use]
    pub fn in_copy(&self, machine: &Machine) -> Self {
        Self {
            ram: Arc::clone(&machine.ram),
            ..self.clone()
        }
    }

    fn store16(&self, address: u64, value: u16) {
        // Release: what was written to buffers and rings before shows first.
        self.ram
            .store(value.to_le(), GuestAddress(address), Ordering::Release)
            .unwrap();
    }

    fn load16(&self, address: u64) -> u16 {
        self.ram
            .load(GuestAddress(address), Ordering::Acquire)
            .map(u16::from_le)
            .unwrap()
    }

    /// Writes a slot of the descriptor table.
    pub fn write_descriptor(&self, slot: u16, descriptor: Descriptor) {
        let address = self.layout.descriptors + 16 * u64::from(slot);
        self.ram
            .write_slice(&descriptor.bytes(), GuestAddress(address))
            .unwrap();
    }

    /// Links `parts` into a chain in the descriptor table, without making it available. Returns its head.
    pub fn write_chain(&mut self, parts: &[Descriptor]) -> u16 {
        let head = self.next_descriptor;
        for (position, part) in parts.iter().enumerate() {
            let slot = self.next_descriptor;
            self.next_descriptor = (slot + 1) % self.size;
            let mut part = *part;
            if position + 1 < parts.len() {
                part.flags |= flag::NEXT;
                part.next = self.next_descriptor;
            }
            self.write_descriptor(slot, part);
        }
        head
    }

    /// Writes `parts` as an indirect table to fresh memory and one descriptor that refers to it; returns that one's
    /// slot. The parts are linked in order.
    pub fn write_indirect(&mut self, machine: &Machine, parts: &[Descriptor]) -> u16 {
        let table = machine.allocate(16 * parts.len(), 16);
        for (position, part) in parts.iter().enumerate() {
            let mut part = *part;
            if position + 1 < parts.len() {
                part.flags |= flag::NEXT;
                part.next = u16::try_from(position + 1).unwrap();
            }
            machine.write(table + 16 * position as u64, &part.bytes());
        }
        let len = u32::try_from(16 * parts.len()).unwrap();
        self.write_chain(&[Descriptor {
            flags: flag::INDIRECT,
            ..Descriptor::readable(table, len)
        }])
    }

    /// Puts `head` into the next slot of the available ring and moves the index on.
    pub fn push_available(&mut self, head: u16) {
        let slot = self.available_index % self.size;
        self.store16(self.layout.available + 4 + 2 * u64::from(slot), head);
        self.set_available_index(self.available_index.wrapping_add(1));
    }

    /// Sets the available ring's index, to whatever.
    pub fn set_available_index(&mut self, index: u16) {
        self.available_index = index;
        self.store16(self.layout.available + 2, index);
    }

    /// Sets the available ring's flags (1: no interrupts, please).
    pub fn set_available_flags(&self, flags: u16) {
        self.store16(self.layout.available, flags);
    }

    /// Sets `used_event`: with EVENT_IDX, the used index behind which the driver wants an interrupt.
    pub fn set_used_event(&self, index: u16) {
        self.store16(self.layout.available + 4 + 2 * u64::from(self.size), index);
    }

    /// The device's `avail_event`: with EVENT_IDX, where it wants a notification.
    pub fn available_event(&self) -> u16 {
        self.load16(self.layout.used + 4 + 8 * u64::from(self.size))
    }

    /// The available ring's index as the driver last set it.
    pub fn available_index(&self) -> u16 {
        self.available_index
    }

    /// The used ring's index.
    pub fn used_index(&self) -> u16 {
        self.load16(self.layout.used + 2)
    }

    /// Makes a chain of `parts` and makes it available. Returns its head.
    pub fn add(&mut self, parts: &[Descriptor]) -> u16 {
        let head = self.write_chain(parts);
        self.push_available(head);
        head
    }

    /// Makes an indirect chain of `parts` and makes it available. Returns its head.
    pub fn add_indirect(&mut self, machine: &Machine, parts: &[Descriptor]) -> u16 {
        let head = self.write_indirect(machine, parts);
        self.push_available(head);
        head
    }

    /// The next used element that has not been taken yet, if there is one.
    pub fn take_used(&mut self) -> Option<Used> {
        if self.used_index() == self.seen_used {
            return None;
        }
        let element = self.layout.used + 4 + 8 * u64::from(self.seen_used % self.size);
        self.seen_used = self.seen_used.wrapping_add(1);
        // Ask for the next interrupt right behind this one (ignored without EVENT_IDX).
        self.set_used_event(self.seen_used);
        fence(Ordering::SeqCst);
        let mut bytes = [0; 8];
        self.ram.read_slice(&mut bytes, GuestAddress(element)).unwrap();
        let word = |range| u32::from_le_bytes(<[u8; 4]>::try_from(&bytes[range]).unwrap());
        Some(Used {
            head: word(0..4),
            len: word(4..8),
        })
    }
}

/// What came back for a [`Driver::request`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// Bytes that the device says it wrote.
    pub len: u32,
    /// The contents of each writable buffer, whole.
    pub buffers: Vec<Vec<u8>>,
}

/// Why waiting for a device ended without a used buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoReply {
    /// The device failed ([`Health`]).
    Failed,
    /// Nothing happened.
    TimedOut,
}

/// A device behind its register page, and the hands of a driver on it.
pub struct Driver<'m> {
    /// The machine it is in.
    pub machine: &'m Machine,
    /// Its registers.
    pub transport: MmioTransport,
    failures: Arc<Mutex<Vec<String>>>,
}

impl<'m> Driver<'m> {
    /// Puts `device` behind registers. No driver has touched it yet.
    pub fn new(machine: &'m Machine, device: Box<dyn VirtioDevice>) -> Self {
        let name = format!("test {:?}", device.device_type());
        let health = Arc::new(Health::new(name));
        let failures = Arc::<Mutex<Vec<String>>>::default();
        let observed = Arc::clone(&failures);
        health.observe(move |_, why| observed.lock().unwrap().push(why.to_owned()));
        let (ram, event_loop) = (Arc::clone(&machine.ram), Arc::clone(&machine.event_loop));
        Self {
            machine,
            transport: MmioTransport::new(device, ram, event_loop, health).unwrap(),
            failures,
        }
    }

    /// Why the device failed, each time that it did.
    pub fn failures(&self) -> Vec<String> {
        self.failures.lock().unwrap().clone()
    }

    /// Puts `device` behind registers and restores both from what [`MmioTransport::save`] gave.
    pub fn restored(
        machine: &'m Machine,
        device: Box<dyn VirtioDevice>,
        saved: &SavedState,
    ) -> Result<Self, RestoreError> {
        let mut driver = Self::new(machine, device);
        driver.transport.restore(saved)?;
        Ok(driver)
    }

    /// The device's health.
    pub fn health(&self) -> &Arc<Health> {
        self.transport.health()
    }

    /// Reads a register.
    pub fn read32(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes a register.
    pub fn write32(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    /// Reads `N` bytes of configuration space.
    pub fn config<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.transport.read(register::CONFIG + offset, &mut data);
        data
    }

    /// Writes configuration space.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.transport.write(register::CONFIG + offset, data);
    }

    /// The status register.
    pub fn status(&self) -> u32 {
        self.read32(register::STATUS)
    }

    /// Sets bits in the status register.
    pub fn add_status(&mut self, bits: u32) {
        let status = self.status() & !status::DEVICE_NEEDS_RESET;
        self.write32(register::STATUS, status | bits);
    }

    /// Resets the device.
    pub fn reset(&mut self) {
        self.write32(register::STATUS, 0);
    }

    /// All features that the device offers.
    pub fn offered(&mut self) -> u64 {
        let mut half = |select| {
            self.write32(register::DEVICE_FEATURES_SEL, select);
            u64::from(self.read32(register::DEVICE_FEATURES))
        };
        half(0) | half(1) << 32
    }

    /// ACKNOWLEDGE, DRIVER, `features` as they are, FEATURES_OK. Returns whether the device agreed.
    pub fn negotiate(&mut self, features: u64) -> bool {
        self.add_status(status::ACKNOWLEDGE);
        self.add_status(status::DRIVER);
        for (select, shift) in [(0, 0), (1, 32)] {
            self.write32(register::DRIVER_FEATURES_SEL, select);
            let half = u32::try_from(features >> shift & 0xffff_ffff).unwrap();
            self.write32(register::DRIVER_FEATURES, half);
        }
        self.add_status(status::FEATURES_OK);
        self.status() & status::FEATURES_OK != 0
    }

    /// Writes a queue's registers, QueueReady last.
    pub fn configure_queue(&mut self, index: u32, layout: Layout) {
        self.write32(register::QUEUE_SEL, index);
        self.write32(register::QUEUE_SIZE, layout.size);
        for (low, high, address) in [
            (
                register::QUEUE_DESC_LOW,
                register::QUEUE_DESC_HIGH,
                layout.descriptors,
            ),
            (
                register::QUEUE_DRIVER_LOW,
                register::QUEUE_DRIVER_HIGH,
                layout.available,
            ),
            (
                register::QUEUE_DEVICE_LOW,
                register::QUEUE_DEVICE_HIGH,
                layout.used,
            ),
        ] {
            self.write32(low, u32::try_from(address & 0xffff_ffff).unwrap());
            self.write32(high, u32::try_from(address >> 32).unwrap());
        }
        self.write32(register::QUEUE_READY, 1);
    }

    /// A proper queue of `size` descriptors in fresh memory.
    pub fn set_up_queue(&mut self, index: u32, size: u16) -> VirtQueue {
        let layout = Layout::new(self.machine, size);
        self.configure_queue(index, layout);
        VirtQueue::new(self.machine, index, layout)
    }

    /// The whole way to DRIVER_OK: `features` plus VERSION_1 and INDIRECT_DESC, a queue per size. A size of 0 leaves the
    /// queue out, but still counts.
    pub fn start(&mut self, features: u64, sizes: &[u16]) -> Vec<VirtQueue> {
        self.reset();
        let features = features | F_VERSION_1 | F_INDIRECT_DESC;
        assert!(self.negotiate(features), "features {features:#x} refused");
        let mut queues = Vec::new();
        for (index, &size) in (0..).zip(sizes) {
            if size == 0 {
                // Stands in for the missing queue, so that numbers match.
                let layout = Layout::new(self.machine, 1);
                queues.push(VirtQueue::new(self.machine, index, layout));
            } else {
                queues.push(self.set_up_queue(index, size));
            }
        }
        self.add_status(status::DRIVER_OK);
        queues
    }

    /// As [`Driver::start`], with EVENT_IDX too.
    pub fn start_with_event_idx(&mut self, features: u64, sizes: &[u16]) -> Vec<VirtQueue> {
        self.start(features | F_EVENT_IDX, sizes)
    }

    /// Notifies the device of queue `index`.
    pub fn kick(&mut self, index: u32) {
        self.write32(register::QUEUE_NOTIFY, index);
    }

    /// Waits until the interrupt line is raised, acknowledges and returns the reasons (1: used buffers, 2:
    /// configuration); 0 after `timeout`.
    pub fn wait_interrupt(&mut self, timeout: Duration) -> u32 {
        let deadline = Instant::now() + timeout;
        loop {
            let reasons = self.read32(register::INTERRUPT_STATUS);
            if reasons != 0 {
                let _ = self.transport.interrupt().line().read();
                self.write32(register::INTERRUPT_ACK, reasons);
                return reasons;
            }
            if !self.wait_line(deadline) {
                return 0;
            }
            // Raised before, acknowledged already.
            let _ = self.transport.interrupt().line().read();
        }
    }

    /// Waits for the interrupt line, not longer than until `deadline`.
    fn wait_line(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let line = self.transport.interrupt().line();
        let mut fds = [rustix::event::PollFd::from_borrowed_fd(
            as_fd(line),
            rustix::event::PollFlags::IN,
        )];
        let left = rustix::event::Timespec::try_from(left).unwrap();
        rustix::event::poll(&mut fds, Some(&left)).is_ok_and(|n| n > 0)
    }

    /// Waits for the next used buffer of `queue`.
    pub fn wait_used(&mut self, queue: &mut VirtQueue) -> Result<Used, NoReply> {
        self.wait_used_for(queue, TIMEOUT)
    }

    /// As [`Driver::wait_used`], but for `timeout`: to see that something does not happen.
    pub fn wait_used_for(&mut self, queue: &mut VirtQueue, timeout: Duration) -> Result<Used, NoReply> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(used) = queue.take_used() {
                return Ok(used);
            }
            if self.health().is_failed() {
                return Err(NoReply::Failed);
            }
            if !self.wait_line(deadline) {
                return queue.take_used().ok_or(NoReply::TimedOut);
            }
            let _ = self.transport.interrupt().line().read();
            let reasons = self.read32(register::INTERRUPT_STATUS);
            self.write32(register::INTERRUPT_ACK, reasons);
        }
    }

    /// Waits for the used buffers of all these chains, in whatever order they come, and a little longer for others. Answers
    /// them in the order of `heads`; panics unless each came once, and nothing else.
    pub fn wait_each_used(&mut self, queue: &mut VirtQueue, heads: &[u16]) -> Vec<Used> {
        let name = self.health().name().to_owned();
        let mut used = Vec::new();
        while used.len() < heads.len() {
            match self.wait_used(queue) {
                Ok(one) => used.push(one),
                Err(why) => panic!("{name}: {why:?}: {used:?} of {heads:?}"),
            }
        }
        let more = self.wait_used_for(queue, Duration::from_millis(30));
        assert_eq!(
            more,
            Err(NoReply::TimedOut),
            "{name}: after {used:?} of {heads:?}"
        );
        let place = |head: &u16| used.iter().position(|used| used.head == u32::from(*head));
        let places: Vec<_> = heads.iter().filter_map(place).collect();
        assert_eq!(places.len(), heads.len(), "{name}: {used:?} of {heads:?}");
        places.into_iter().map(|place| used[place]).collect()
    }

    /// Waits until the device has failed.
    pub fn wait_failed(&self) -> bool {
        wait_until(|| self.health().is_failed())
    }

    /// Copies `readable` into guest memory, makes room for `writable` bytes, and sends a request of these buffers.
    /// Panics when no reply comes.
    pub fn request(&mut self, queue: &mut VirtQueue, readable: &[&[u8]], writable: &[usize]) -> Reply {
        self.try_request(queue, readable, writable)
            .unwrap_or_else(|why| panic!("{}: no reply: {why:?}", self.health().name()))
    }

    /// As [`Driver::request`], for requests that may get no reply.
    pub fn try_request(
        &mut self,
        queue: &mut VirtQueue,
        readable: &[&[u8]],
        writable: &[usize],
    ) -> Result<Reply, NoReply> {
        let mut parts = Vec::new();
        for data in readable {
            let address = self.machine.allocate(data.len(), 16);
            self.machine.write(address, data);
            parts.push(Descriptor::readable(address, u32::try_from(data.len()).unwrap()));
        }
        for &len in writable {
            let address = self.machine.allocate(len, 16);
            self.machine.write(address, &vec![0xa5; len]);
            parts.push(Descriptor::writable(address, u32::try_from(len).unwrap()));
        }
        let head = queue.add(&parts);
        self.kick(queue.index);
        let used = self.wait_used(queue)?;
        assert_eq!(used.head, u32::from(head), "another chain came back");
        let buffers = parts[readable.len()..]
            .iter()
            .map(|part| self.machine.read(part.address, part.len as usize))
            .collect();
        Ok(Reply {
            len: used.len,
            buffers,
        })
    }
}

impl Drop for Driver<'_> {
    /// A device may stop because of its guest; it may not panic. That is contained, so the test has to ask.
    fn drop(&mut self) {
        // Takes the device off the event loop, and so waits for its last event.
        self.reset();
        let panics = self.failures().iter().any(|why| why.contains("panicked"));
        if panics && !std::thread::panicking() {
            panic!("{}: {:?}", self.health().name(), self.failures());
        }
    }
}

/// Waits, up to [`TIMEOUT`], until `condition` holds.
pub fn wait_until(mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + TIMEOUT;
    while !condition() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

fn as_fd(fd: &vmm_sys_util::eventfd::EventFd) -> std::os::fd::BorrowedFd<'_> {
    use std::os::fd::AsRawFd;
    // SAFETY: the descriptor is open as long as the eventfd, which the result borrows.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}
