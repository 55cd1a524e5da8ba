// SPDX-License-Identifier: Apache-2.0
//! A vCPU's thread: the loop around KVM_RUN.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::bus::Bus;
use crate::cell::{Shared, Wanted};
use crate::halt::{self, Answer};
use crate::kick::{Attached, Kick};
use crate::stats::{self, ExitCounters};
use crate::stop::{StopReason, classify_triple_fault};
use crate::x86_64::interrupt_chip::Chip;

/// KVM_EXIT_INTERNAL_ERROR's flag in data[0]: instruction bytes follow.
const INSTRUCTION_BYTES: u64 = 1;
/// KVM_INTERNAL_ERROR_EMULATION.
const EMULATION: u32 = 1;

/// One vCPU as other threads see it.
#[derive(Default)]
pub(crate) struct VcpuControl {
    pub(crate) kick: Kick,
    pub(crate) exits: ExitCounters,
    /// Counts entries into and returns from accesses to devices: odd while one is under way.
    access: AtomicU64,
    /// What is at work there may have to wait for somebody outside of this program: the reader of the serial port's
    /// output.
    may_block: AtomicBool,
    /// Its thread's id, for /proc.
    thread: AtomicI32,
    /// It is to say whether it has halted for good.
    ask: AtomicBool,
    /// What it said: an `Answer`.
    answer: AtomicU8,
}

/// An access to a device that is under way.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Access {
    /// No other access of the vCPU has the same.
    pub(crate) number: u64,
    /// It may have to wait for somebody outside of this program.
    pub(crate) may_block: bool,
    /// The thread that is in it.
    pub(crate) thread: i32,
}

/// What a vCPU's thread works with.
pub(crate) struct VcpuThread {
    pub(crate) index: u8,
    /// Locked by the thread but while it is parked: others save and restore it then.
    pub(crate) fd: Arc<Mutex<VcpuFd>>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) ports: Arc<Bus>,
    pub(crate) registers: Arc<Bus>,
    pub(crate) chip: Chip,
}

pub(crate) fn lock_fd(fd: &Mutex<VcpuFd>) -> MutexGuard<'_, VcpuFd> {
    // The descriptor is whole whatever panicked while it was locked.
    fd.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What to do after an exit.
enum Next {
    Run,
    Interrupted,
    Stop(StopReason),
}

impl VcpuThread {
    /// Runs the vCPU until its cell stops. The thread's whole life.
    pub(crate) fn run(self) {
        let result = catch_unwind(AssertUnwindSafe(|| self.run_loop()));
        if let Err(panic) = result {
            let message = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("no message")
                .to_owned();
            self.shared.stop(StopReason::ThreadPanicked {
                vcpu: self.index,
                message,
            });
        }
        let Self {
            shared,
            fd,
            ports,
            registers,
            chip,
            ..
        } = self;
        // What this thread shares goes before the last thread announces the end.
        drop((fd, ports, registers, chip));
        Shared::vcpu_ended(&shared);
    }

    fn control(&self) -> &VcpuControl {
        self.shared.vcpu(self.index)
    }

    fn run_loop(&self) {
        let id = rustix::thread::gettid().as_raw_nonzero().get();
        self.control().thread.store(id, Ordering::Relaxed);
        let mut fd = lock_fd(&self.fd);
        let attached = self.control().kick.attach(&mut fd);
        loop {
            attached.clear();
            match self.shared.wanted() {
                Wanted::Run => {
                    if self.control().ask.load(Ordering::SeqCst) {
                        self.control().ask.store(false, Ordering::SeqCst);
                        self.control()
                            .answer
                            .store(halt::ask(&fd) as u8, Ordering::Release);
                    }
                }
                Wanted::Stop => return,
                Wanted::Pause => {
                    if let Some(reason) = self.finish_access(&mut fd, &attached) {
                        self.shared.stop(reason);
                        continue;
                    }
                    drop(fd);
                    self.shared.park();
                    fd = lock_fd(&self.fd);
                    if self.shared.wanted() == Wanted::Run {
                        // Tells the guest's watchdogs that it was stopped. Fails where the guest has no such clock.
                        let _ = fd.kvmclock_ctrl();
                    }
                    continue;
                }
            }
            if let Next::Stop(reason) = self.run_once(&mut fd) {
                self.shared.stop(reason);
            }
        }
    }

    /// Completes the access that the last exit was for, so that the registers can be saved.
    fn finish_access(&self, fd: &mut VcpuFd, attached: &Attached) -> Option<StopReason> {
        loop {
            attached.set_immediate_exit();
            match self.run_once(fd) {
                // An access that crosses a boundary comes in pieces.
                Next::Run => {}
                Next::Interrupted => return None,
                Next::Stop(reason) => return Some(reason),
            }
        }
    }

    fn run_once(&self, fd: &mut VcpuFd) -> Next {
        let control = self.control();
        let exits = &control.exits;
        let access = |counter: &AtomicU64, f: &mut dyn FnMut()| {
            stats::count(counter);
            stats::count(&control.access);
            f();
            stats::count(&control.access);
            Next::Run
        };
        let port_access = |counter: &AtomicU64, f: &mut dyn FnMut()| {
            control.may_block.store(true, Ordering::Relaxed);
            let next = access(counter, f);
            control.may_block.store(false, Ordering::Relaxed);
            next
        };
        match fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => port_access(&exits.io_in, &mut || {
                if !self.ports.read(u64::from(port), data) {
                    data.fill(0xff);
                    self.shared
                        .complain(format_args!("read of port {port:#x}, where nothing is"));
                }
            }),
            Ok(VcpuExit::IoOut(port, data)) => port_access(&exits.io_out, &mut || {
                if !self.ports.write(u64::from(port), data) {
                    self.shared
                        .complain(format_args!("write of port {port:#x}, where nothing is"));
                }
            }),
            Ok(VcpuExit::MmioRead(address, data)) => access(&exits.mmio_read, &mut || {
                if !self.registers.read(address, data) {
                    data.fill(0xff);
                    self.shared
                        .complain(format_args!("read of {address:#x}, where nothing is"));
                }
            }),
            Ok(VcpuExit::MmioWrite(address, data)) => access(&exits.mmio_write, &mut || {
                if !self.registers.write(address, data) {
                    self.shared
                        .complain(format_args!("write of {address:#x}, where nothing is"));
                }
            }),
            Ok(VcpuExit::IoapicEoi(vector)) => {
                stats::count(&exits.eoi);
                if let Chip::Split(ioapic) = &self.chip {
                    ioapic.end_of_interrupt(vector);
                }
                Next::Run
            }
            Ok(VcpuExit::Intr) => Next::Interrupted,
            Ok(VcpuExit::Hlt) => Next::Stop(StopReason::Halted { vcpu: self.index }),
            Ok(VcpuExit::Shutdown) => Next::Stop(classify_triple_fault(self.shared.tail(), self.index)),
            Ok(VcpuExit::InternalError) => Next::Stop(self.internal_error(fd)),
            Ok(VcpuExit::FailEntry(reason, _)) => Next::Stop(StopReason::FailedEntry {
                vcpu: self.index,
                reason,
            }),
            Ok(VcpuExit::MemoryFault { .. }) => Next::Stop(StopReason::RunFailed {
                vcpu: self.index,
                errno: libc::EFAULT,
            }),
            Ok(exit) => {
                stats::count(&exits.other);
                Next::Stop(StopReason::UnknownExit {
                    vcpu: self.index,
                    exit: format!("{exit:?}"),
                })
            }
            Err(error) => match error.errno() {
                libc::EINTR => {
                    stats::count(&exits.interrupted);
                    Next::Interrupted
                }
                // A vCPU that waits to be started, or was interrupted before it entered.
                libc::EAGAIN => Next::Run,
                errno => Next::Stop(StopReason::RunFailed {
                    vcpu: self.index,
                    errno,
                }),
            },
        }
    }

    fn internal_error(&self, fd: &mut VcpuFd) -> StopReason {
        // SAFETY: the exit reason just reported says that this member of the union is the valid one.
        let internal = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal };
        let rip = fd.get_regs().map_or(0, |regs| regs.rip);
        let mut instruction = Vec::new();
        // struct emulation_failure: flags, then one byte of length and up to 15 of instruction.
        if internal.suberror == EMULATION && internal.ndata >= 3 && internal.data[0] & INSTRUCTION_BYTES != 0
        {
            let bytes: Vec<u8> = internal.data[1..3]
                .iter()
                .flat_map(|word| word.to_ne_bytes())
                .collect();
            let len = usize::from(bytes[0]).min(15);
            instruction = bytes[1..=len].to_vec();
        }
        StopReason::InternalError {
            vcpu: self.index,
            suberror: internal.suberror,
            rip,
            instruction,
        }
    }
}

impl VcpuControl {
    /// Its thread, once it has one.
    pub(crate) fn thread(&self) -> i32 {
        self.thread.load(Ordering::Relaxed)
    }

    /// Has the vCPU say whether it has halted for good.
    pub(crate) fn ask(&self) {
        self.answer.store(Answer::None as u8, Ordering::Relaxed);
        self.ask.store(true, Ordering::SeqCst);
        self.kick.kick();
    }

    /// What it said since it was asked.
    pub(crate) fn answer(&self) -> Answer {
        self.answer.load(Ordering::Acquire).into()
    }

    /// The access to a device that the vCPU's thread is in.
    pub(crate) fn access(&self) -> Option<Access> {
        let number = self.access.load(Ordering::Relaxed);
        (number % 2 == 1).then(|| Access {
            number,
            may_block: self.may_block.load(Ordering::Relaxed),
            thread: self.thread.load(Ordering::Relaxed),
        })
    }
}
