// SPDX-License-Identifier: Apache-2.0
//! The guest's half of vsock over the kernel-less driver: packets by hand, and streams that keep the rules.

use std::collections::VecDeque;
use std::time::Duration;

use cloister_devices::virtio::VirtioDevice;
use cloister_tests::driver::{Descriptor, Driver, Machine, TIMEOUT, VirtQueue, wait_until};

pub const GUEST_CID: u64 = 42;
pub const HOST_CID: u64 = 2;
const HEADER: usize = 44;
const QUEUE: u16 = 128;
const RX_BUFFER: usize = 4096;
const TX_BUFFER: usize = HEADER + (64 << 10);

pub mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}
pub const NO_RECEIVE: u32 = 1;
pub const NO_SEND: u32 = 2;

/// A packet as it lies in memory; the tests have their own idea of the format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub socket_type: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
    pub payload: Vec<u8>,
}

impl Packet {
    /// From the guest, with plenty of credit for the host.
    pub fn new(op: u16, guest_port: u32, host_port: u32) -> Self {
        Self {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: guest_port,
            dst_port: host_port,
            len: 0,
            socket_type: 1,
            op,
            flags: 0,
            buf_alloc: 256 << 10,
            fwd_cnt: 0,
            payload: Vec::new(),
        }
    }

    pub fn with_payload(mut self, payload: &[u8]) -> Self {
        self.payload = payload.to_vec();
        self.len = u32::try_from(payload.len()).unwrap();
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + self.payload.len());
        bytes.extend(self.src_cid.to_le_bytes());
        bytes.extend(self.dst_cid.to_le_bytes());
        bytes.extend(self.src_port.to_le_bytes());
        bytes.extend(self.dst_port.to_le_bytes());
        bytes.extend(self.len.to_le_bytes());
        bytes.extend(self.socket_type.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.buf_alloc.to_le_bytes());
        bytes.extend(self.fwd_cnt.to_le_bytes());
        bytes.extend(&self.payload);
        bytes
    }

    fn parse(bytes: &[u8]) -> Self {
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let u16_at = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            socket_type: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
            payload: bytes[HEADER..].to_vec(),
        }
    }
}

/// A machine with a vsock device whose driver is this test.
pub struct Guest<'m> {
    pub driver: Driver<'m>,
    pub rx: VirtQueue,
    pub tx: VirtQueue,
    pub event: VirtQueue,
    rx_buffers: u64,
    tx_buffers: u64,
    tx_free: Vec<u16>,
    arrived: VecDeque<Packet>,
}

impl<'m> Guest<'m> {
    /// Up to DRIVER_OK, with all rx buffers supplied.
    pub fn start(machine: &'m Machine, device: Box<dyn VirtioDevice>) -> Self {
        Self::start_with(machine, device, true)
    }

    pub fn start_with(machine: &'m Machine, device: Box<dyn VirtioDevice>, event_idx: bool) -> Self {
        let mut driver = Driver::new(machine, device);
        let sizes = [QUEUE, QUEUE, 8];
        let queues = if event_idx {
            driver.start_with_event_idx(1, &sizes)
        } else {
            driver.start(1, &sizes)
        };
        Self::with_queues(driver, queues)
    }

    /// Takes over queues that are set up already.
    pub fn with_queues(driver: Driver<'m>, queues: Vec<VirtQueue>) -> Self {
        let machine = driver.machine;
        let [rx, tx, event] = queues.try_into().unwrap_or_else(|_| panic!("three queues"));
        let mut guest = Self {
            rx,
            tx,
            event,
            rx_buffers: machine.allocate(RX_BUFFER * usize::from(QUEUE), 4096),
            tx_buffers: machine.allocate(TX_BUFFER * usize::from(QUEUE), 4096),
            tx_free: (0..QUEUE).collect(),
            arrived: VecDeque::new(),
            driver,
        };
        for slot in 0..QUEUE {
            guest.supply(slot);
        }
        guest.kick_rx();
        guest
    }

    /// The same guest memory and queues under another device, as after a restore.
    pub fn move_to(self, driver: Driver<'m>) -> Self {
        // The old device is taken away without a reset of what it shares with the new one.
        Self { driver, ..self }
    }

    /// The same guest in a copy of its machine.
    pub fn copy<'n>(&self, driver: Driver<'n>) -> Guest<'n> {
        let machine = driver.machine;
        Guest {
            rx: self.rx.in_copy(machine),
            tx: self.tx.in_copy(machine),
            event: self.event.in_copy(machine),
            rx_buffers: self.rx_buffers,
            tx_buffers: self.tx_buffers,
            tx_free: self.tx_free.clone(),
            arrived: self.arrived.clone(),
            driver,
        }
    }

    /// That the device has all rx buffers and has used all packets, each once.
    pub fn assert_nothing_lost(&mut self) {
        assert!(wait_until(|| self.tx_in_flight() == 0), "packets are left");
        assert_eq!(self.tx.used_index(), self.tx.available_index());
        while self.take_arrived() {}
        let left = self.rx.available_index().wrapping_sub(self.rx.used_index());
        assert_eq!(left, QUEUE);
    }

    /// Puts an rx buffer into the queue, without notifying.
    fn supply(&mut self, slot: u16) {
        let address = self.rx_buffers + RX_BUFFER as u64 * u64::from(slot);
        self.rx.write_descriptor(
            slot,
            Descriptor::writable(address, u32::try_from(RX_BUFFER).unwrap()),
        );
        self.rx.push_available(slot);
    }

    fn kick_rx(&mut self) {
        self.driver.kick(0);
    }

    /// Sends a packet; waits for a free tx buffer if there is none.
    pub fn send(&mut self, packet: &Packet) {
        self.send_bytes(&packet.bytes());
    }

    pub fn send_bytes(&mut self, bytes: &[u8]) {
        let slot = self.tx_slot();
        let address = self.tx_buffers + TX_BUFFER as u64 * u64::from(slot);
        self.driver.machine.write(address, bytes);
        self.tx.write_descriptor(
            slot,
            Descriptor::readable(address, u32::try_from(bytes.len()).unwrap()),
        );
        self.tx.push_available(slot);
        self.driver.kick(1);
    }

    fn tx_slot(&mut self) -> u16 {
        while let Some(used) = self.tx.take_used() {
            self.tx_free.push(u16::try_from(used.head).unwrap());
        }
        if let Some(slot) = self.tx_free.pop() {
            return slot;
        }
        // What arrives meanwhile has to be taken, or the device could rightly wait for us.
        loop {
            self.take_arrived();
            if let Some(used) = self.tx.take_used() {
                return u16::try_from(used.head).unwrap();
            }
            let used = self.driver.wait_used_for(&mut self.tx, Duration::from_millis(5));
            if let Ok(used) = used {
                return u16::try_from(used.head).unwrap();
            }
            assert!(!self.driver.health().is_failed(), "{:?}", self.driver.failures());
        }
    }

    /// How many packets the device has not returned.
    pub fn tx_in_flight(&mut self) -> usize {
        while let Some(used) = self.tx.take_used() {
            self.tx_free.push(u16::try_from(used.head).unwrap());
        }
        usize::from(QUEUE) - self.tx_free.len()
    }

    /// Moves what the device delivered to `arrived` and gives the buffers back.
    fn take_arrived(&mut self) -> bool {
        let mut any = false;
        while let Some(used) = self.rx.take_used() {
            self.accept(used.head, used.len);
            any = true;
        }
        if any {
            self.kick_rx();
        }
        any
    }

    fn accept(&mut self, head: u32, len: u32) {
        let slot = u16::try_from(head).unwrap();
        let len = usize::try_from(len).unwrap();
        assert!((HEADER..=RX_BUFFER).contains(&len), "a packet of {len} bytes");
        let address = self.rx_buffers + RX_BUFFER as u64 * u64::from(slot);
        let packet = Packet::parse(&self.driver.machine.read(address, len));
        assert_eq!(packet.src_cid, HOST_CID);
        assert_eq!(packet.dst_cid, GUEST_CID);
        assert_eq!(packet.len as usize, packet.payload.len());
        self.arrived.push_back(packet);
        self.supply(slot);
    }

    /// The next packet from the host.
    pub fn receive(&mut self) -> Packet {
        self.receive_for(TIMEOUT)
            .unwrap_or_else(|| panic!("no packet came; failures: {:?}", self.driver.failures()))
    }

    pub fn receive_for(&mut self, timeout: Duration) -> Option<Packet> {
        loop {
            if let Some(packet) = self.arrived.pop_front() {
                return Some(packet);
            }
            if self.take_arrived() {
                continue;
            }
            match self.driver.wait_used_for(&mut self.rx, timeout) {
                Ok(used) => {
                    self.accept(used.head, used.len);
                    self.kick_rx();
                }
                Err(_) => return None,
            }
        }
    }

    /// That nothing comes for a while.
    pub fn expect_silence(&mut self) {
        if let Some(packet) = self.receive_for(Duration::from_millis(30)) {
            panic!("unexpected {packet:?}");
        }
    }

    /// The next packet must be this one.
    pub fn expect(&mut self, op: u16, guest_port: u32, host_port: u32) -> Packet {
        let packet = self.receive();
        assert_eq!(
            (packet.op, packet.dst_port, packet.src_port),
            (op, guest_port, host_port),
            "{packet:?}"
        );
        packet
    }

    /// Connects to the host.
    pub fn connect(&mut self, guest_port: u32, host_port: u32) -> Stream {
        self.send(&Packet::new(op::REQUEST, guest_port, host_port));
        let response = self.expect(op::RESPONSE, guest_port, host_port);
        Stream::new(guest_port, host_port, &response)
    }

    /// Takes the host's connection.
    pub fn accept_connection(&mut self, guest_port: u32) -> Stream {
        let request = self.receive();
        assert_eq!((request.op, request.dst_port), (op::REQUEST, guest_port));
        self.send(&Packet::new(op::RESPONSE, guest_port, request.src_port));
        Stream::new(guest_port, request.src_port, &request)
    }
}

/// One connection as a well-behaved driver keeps it.
pub struct Stream {
    pub guest_port: u32,
    pub host_port: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
    pub tx_cnt: u32,
    pub peer_buf_alloc: u32,
    pub peer_fwd_cnt: u32,
    announced: u32,
    /// SHUTDOWN flags from the host.
    pub host_shutdown: u32,
    pub reset: bool,
    pub received: Vec<u8>,
}

impl Stream {
    pub fn new(guest_port: u32, host_port: u32, packet: &Packet) -> Self {
        Self {
            guest_port,
            host_port,
            buf_alloc: 256 << 10,
            fwd_cnt: 0,
            tx_cnt: 0,
            peer_buf_alloc: packet.buf_alloc,
            peer_fwd_cnt: packet.fwd_cnt,
            announced: 0,
            host_shutdown: 0,
            reset: false,
            received: Vec::new(),
        }
    }

    pub fn packet(&mut self, op: u16) -> Packet {
        self.announced = self.fwd_cnt;
        Packet {
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
            ..Packet::new(op, self.guest_port, self.host_port)
        }
    }

    pub fn credit(&self) -> usize {
        let in_flight = self.tx_cnt.wrapping_sub(self.peer_fwd_cnt);
        assert!(in_flight <= self.peer_buf_alloc, "the host took credit back");
        (self.peer_buf_alloc - in_flight) as usize
    }

    /// Sends as much of `data` as fits into the credit and one packet.
    pub fn send_some(&mut self, guest: &mut Guest<'_>, data: &[u8]) -> usize {
        let length = data.len().min(self.credit()).min(64 << 10);
        if length > 0 {
            let packet = self.packet(op::RW).with_payload(&data[..length]);
            guest.send(&packet);
            self.tx_cnt = self.tx_cnt.wrapping_add(packet.len);
        }
        length
    }

    /// Takes a packet of this connection; the data is consumed at once, and the host told of it when half the buffer
    /// was.
    pub fn handle(&mut self, guest: &mut Guest<'_>, packet: Packet) {
        assert_eq!(
            (packet.dst_port, packet.src_port),
            (self.guest_port, self.host_port)
        );
        if packet.op == op::RST {
            self.reset = true;
            return;
        }
        self.peer_buf_alloc = packet.buf_alloc;
        self.peer_fwd_cnt = packet.fwd_cnt;
        match packet.op {
            op::RW => {
                assert!(packet.len > 0);
                self.fwd_cnt = self.fwd_cnt.wrapping_add(packet.len);
                self.received.extend(&packet.payload);
                if self.fwd_cnt.wrapping_sub(self.announced) >= self.buf_alloc / 2 {
                    let update = self.packet(op::CREDIT_UPDATE);
                    guest.send(&update);
                }
            }
            op::CREDIT_REQUEST => {
                let update = self.packet(op::CREDIT_UPDATE);
                guest.send(&update);
            }
            op::SHUTDOWN => self.host_shutdown |= packet.flags,
            op::CREDIT_UPDATE => {}
            other => panic!("unexpected operation {other}"),
        }
    }

    pub fn shutdown(&mut self, guest: &mut Guest<'_>, flags: u32) {
        let packet = Packet {
            flags,
            ..self.packet(op::SHUTDOWN)
        };
        guest.send(&packet);
    }
}
