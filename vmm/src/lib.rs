// SPDX-License-Identifier: Apache-2.0
//! Runs cells: one cell is one virtual machine, and one process runs many.
//!
//! # Theory of operation
//!
//! A [`CellHost`] is made once per process. It holds /dev/kvm, a small fixed number of device event-loop threads, the
//! worker pool for requests that block, and a housekeeper thread that watches for stuck devices and has stopped cells
//! taken apart (closing a VM costs about 14 ms). A [`Cell`] is made from a [`CellConfig`], which is plain data and open
//! files, and adds one thread per vCPU and nothing else.
//!
//! A vCPU thread is a loop around KVM_RUN. Port and memory accesses that KVM does not handle come back to it and go to
//! the cell's buses: the register pages of virtio-mmio devices, the serial port, the power and reset ports, the IOAPIC
//! when it is ours. Everything hot bypasses the thread: queue notifications are ioeventfds on the event loops,
//! interrupts are irqfds.
//!
//! A cell ends for a [`StopReason`], whoever finds it first: the guest shut down, reset, panicked or triple-faulted; KVM
//! gave up; a device failed or got stuck; somebody asked. Its vCPU threads end, its waiters are told, and the
//! housekeeper has the rest freed. A handler that does not return is found within a second; its event loop's other
//! handlers, of whatever cell, go on in a new thread. So is a guest whose vCPUs have all halted for good (`halt`). Other cells notice nothing: no state is global but the kick signal's empty handler, which
//! belongs to no cell.

pub mod bus;
mod cell;
pub mod config;
mod device_set;
pub mod error;
mod halt;
mod host;
pub mod image;
mod kick;
pub mod memory;
mod pagemap;
mod phases;
mod report;
pub mod spare;
pub mod stats;
pub mod stop;
mod suspicion;
mod take_down;
mod vcpu;

#[cfg(target_arch = "x86_64")]
pub mod x86_64;

pub use cell::{Cell, CellState, SavedCell};
pub use config::{Boot, CellConfig, DeviceConfig, HugePages, InterruptChip, KernelBoot, SerialConfig};
pub use device_set::DeviceHandle;
pub use error::{AttachError, CreateError, HostError, LifecycleError, PlugError};
pub use host::{CellHost, CellHostConfig, KvmKind};
pub use phases::Phase;
pub use report::{CellReport, VcpuReport};
pub use spare::SpareConfig;
pub use stats::{CellStats, KvmStat};
pub use stop::StopReason;
