// SPDX-License-Identifier: Apache-2.0
//! Everything the guest can poke: virtio devices over MMIO, and the early serial console.
//!
//! # Theory of operation
//!
//! The guest is hostile from its first instruction. A device has two sides. The *control side*
//! ([`virtio::VirtioDevice`] behind [`virtio::MmioTransport`]) answers register accesses on the vCPU's thread. The
//! *data side* ([`virtio::ActiveDevice`]) owns the queues from the moment the driver sets DRIVER_OK, and runs on an
//! [`event_loop::EventLoop`] that the devices of many cells share; there is no thread per device. Work that can block
//! (file-system requests) goes to a [`worker_pool::WorkerPool`], shared as well.
//!
//! A register access arrives at the transport; at DRIVER_OK the transport consumes the queue configuration, so that
//! nothing is left that later register writes could change, and hands [`virtio::ActiveQueue`]s to the device. A queue
//! notification is an eventfd (KVM ioeventfd) on the event loop; an interrupt is an eventfd too (KVM irqfd). Only what a
//! driver spins for is done on the vCPU's thread ([`virtio::VirtioDevice::queue_served_at_once`]). Nothing here knows of
//! KVM, pods or containers.
//!
//! When a guest breaks the rules the device stops and says so through its [`virtio::Health`]; the process, the
//! event loop and the other cells go on.

pub mod balloon;
pub mod block;
pub mod console;
mod discard;
pub mod event_loop;
pub mod fs;
pub mod host_io;
mod lanes;
pub mod mem;
pub mod metrics;
pub mod net;
pub mod output_tail;
pub mod rate_limit;
pub mod rng;
pub mod serial;
pub mod state;
pub mod virtio;
pub mod vsock;
mod watched;
pub mod worker_pool;

/// The guest's RAM as devices see it: mapped regions that are only touched through volatile accesses.
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;
