// SPDX-License-Identifier: Apache-2.0
//! A running cell becomes larger or smaller.
//!
//! *vCPUs*: the kernel knows from the start how many there can be, and starts with fewer. One more is made, with its
//! thread, before the guest sets it online: INIT and SIPI then find it waiting in KVM. One that the guest sets offline halts
//! with interrupts disabled: its thread sleeps in KVM, without an exit, until it is set online again.
//!
//! *Memory*: see [`cloister_devices::mem`]. Nothing stops a guest that touches what is not plugged, so the housekeeper
//! compares what the memory file holds with what it may, and stops a guest that took more.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use cloister_boot::x86_64::cpuid;

use super::{Cell, CellState, Inner, Shared, create_vcpu};
use crate::device_set::DeviceHandle;
use crate::error::LifecycleError;
use crate::stop::StopReason;
use crate::vcpu::VcpuControl;
use crate::x86_64::vcpu_state;

impl Cell {
    /// Makes more vCPUs, so that the guest can set `count` of them online (at most as many as the configuration allows).
    /// Answers how many there are now; there are never fewer than before. One that the guest has set offline sleeps in
    /// KVM until it is set online again.
    pub fn provide_vcpus(&self, count: u8) -> Result<u8, LifecycleError> {
        let _one = self.lifecycle();
        let possible = u8::try_from(self.shared.possible_vcpus()).unwrap_or(u8::MAX);
        loop {
            let made = self.shared.made.load(Ordering::Acquire);
            if made >= count.min(possible) {
                return Ok(made);
            }
            self.add_vcpu(made)?;
        }
    }

    fn add_vcpu(&self, index: u8) -> Result<(), LifecycleError> {
        let wrong_state = |inner: &Inner| Err(Self::wrong_state("add a vCPU to", &inner.state));
        let inner = self.shared.lock();
        let (vm, cpuid) = match &inner.machine {
            Some(machine) => (Arc::clone(&machine.vm), Arc::clone(&machine.cpuid)),
            None => return wrong_state(&inner),
        };
        drop(inner);
        let fd = create_vcpu(&vm, index)
            .and_then(|fd| {
                vcpu_state::set_cpuid(&fd, &cpuid::for_vcpu(&cpuid, index))?;
                vcpu_state::prepare_boot(&fd, None)?;
                vcpu_state::publish_lapic(&fd)?;
                Ok(Arc::new(Mutex::new(fd)))
            })
            .map_err(|source| LifecycleError::Vcpu {
                vcpu: index,
                source: Box::new(source),
            })?;
        let mut guard = self.shared.lock();
        let inner = &mut *guard;
        let Some(machine) = inner.machine.as_mut().filter(|_| inner.stopping.is_none()) else {
            return wrong_state(inner);
        };
        // Before it runs nobody starts the threads; while it runs or is paused the thread sees which.
        if inner.state != CellState::Created {
            let thread = machine.spawn(&self.shared, index, &fd);
            let thread = thread.map_err(|source| LifecycleError::Thread { vcpu: index, source })?;
            machine.threads.push(thread);
            inner.threads += 1;
        }
        machine.vcpus.push(fd);
        self.shared.made.store(index.saturating_add(1), Ordering::Release);
        Ok(())
    }

    /// The ids of the vCPUs' threads, while it runs. For cgroups and the like; a thread that has just been started may not
    /// be among them yet.
    pub fn vcpu_threads(&self) -> Vec<i32> {
        let threads = self.shared.made_vcpus().iter().map(VcpuControl::thread);
        threads.filter(|thread| *thread != 0).collect()
    }
}

impl Shared {
    /// How many bytes of memory the guest has beyond what it was given: RAM, and what is plugged. None if nothing can be
    /// plugged, so that there is nothing beyond.
    pub(crate) fn excess_memory(&self) -> Option<u64> {
        let inner = self.lock();
        let machine = inner.machine.as_ref()?;
        let mem = machine.devices.iter().find_map(|device| match &device.handle {
            DeviceHandle::Mem(mem) => Some(mem),
            _ => None,
        })?;
        // Some may be plugged or unplugged right now.
        let before = mem.plugged();
        let excess = machine.memory.excess(before)?;
        let meanwhile = mem.plugged().saturating_sub(before);
        Some(excess.saturating_sub(meanwhile))
    }

    /// Ends a guest that has taken memory that it was not given.
    pub(crate) fn took_memory(&self, bytes: u64) {
        self.stop(StopReason::DeviceFailed {
            device: format!("{} mem", self.name),
            why: format!("the guest uses {} MiB of memory that is not plugged", bytes >> 20),
        });
    }
}
