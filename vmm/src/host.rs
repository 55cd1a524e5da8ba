// SPDX-License-Identifier: Apache-2.0
//! What the cells of a process share, and the housekeeper that cleans up after them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cloister_devices::event_loop::EventLoop;
use cloister_devices::worker_pool::WorkerPool;
use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::{Cap, Kvm};

use crate::cell::{Machine, Shared};
use crate::config::HugePages;
use crate::error::HostError;
use crate::halt::{self, HaltWatch};
use crate::kick;
use crate::memory;
use crate::spare::Spares;
use crate::suspicion::{Limits, Look, Suspicion, Verdict};
use crate::take_down::TakeDown;

/// How often the housekeeper looks for what is stuck while cells run.
const WATCH_INTERVAL: Duration = Duration::from_millis(200);

/// Looks at which a guest has more memory than it was given until it is stopped: one may fall between two changes.
const GREEDY_LOOKS: u32 = 3;

/// Sizes of what all cells share.
#[derive(Debug, Clone, Copy)]
pub struct CellHostConfig {
    /// Threads for the data side of all devices.
    pub event_loops: usize,
    /// Threads for requests that block.
    pub workers: usize,
    /// How long a device's handler or a vCPU's access to a device may take before a warning is logged.
    pub warn_after: Duration,
    /// How long until it is taken for stuck and its cell is stopped. Time in which it waits for a processor or for the
    /// host's disks does not count, nor does time in which nobody looked or did so late; in steps of 200 ms.
    pub stuck_after: Duration,
    /// The same for what may have to wait for the host: disks, swapped memory, processors that a hypervisor below
    /// takes away, the reader of a serial port's output.
    pub stuck_on_host_after: Duration,
}

impl Default for CellHostConfig {
    fn default() -> Self {
        Self {
            event_loops: 2,
            workers: 3,
            warn_after: Duration::from_millis(400),
            stuck_after: Duration::from_millis(600),
            stuck_on_host_after: Duration::from_secs(10),
        }
    }
}

impl CellHostConfig {
    fn limits(&self) -> Limits {
        Limits {
            warn_after: self.warn_after,
            stuck_after: self.stuck_after,
            stuck_on_host_after: self.stuck_on_host_after,
        }
    }
}

/// Which kind of KVM a host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvmKind {
    /// Hardware virtualisation: VT-x or AMD-V. Runs any guest kernel.
    Hardware,
    /// kvm_pvm: runs tiny guests of tests, but no unmodified kernel.
    Pvm,
    /// Neither was recognised.
    Unknown,
}

impl KvmKind {
    /// Looks at /proc/cpuinfo and /sys/module.
    pub fn detect() -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Self::of(&cpuinfo, |module| {
            std::path::Path::new("/sys/module").join(module).exists()
        })
    }

    /// The same of a host whose /proc/cpuinfo and modules are these.
    pub fn of(cpuinfo: &str, has_module: impl Fn(&str) -> bool) -> Self {
        // It leaves the processor's flags as they are, and keeps the other two from being loaded.
        if has_module("kvm_pvm") && !has_module("kvm_intel") && !has_module("kvm_amd") {
            return Self::Pvm;
        }
        let flags = cpuinfo
            .lines()
            .find(|line| line.starts_with("flags"))
            .unwrap_or_default();
        if flags
            .split_whitespace()
            .any(|flag| flag == "vmx" || flag == "svm")
        {
            Self::Hardware
        } else {
            Self::Unknown
        }
    }
}

/// What the cells of a process share. Clones are handles to the same one; it ends with the last of them and of its
/// cells.
#[derive(Clone)]
pub struct CellHost {
    pub(crate) inner: Arc<HostInner>,
}

pub(crate) struct HostInner {
    pub(crate) kvm: Kvm,
    pub(crate) cpuid: Vec<kvm_cpuid_entry2>,
    pub(crate) msr_indices: Vec<u32>,
    pub(crate) max_vcpus: usize,
    pub(crate) workers: Arc<WorkerPool>,
    event_loops: Vec<Arc<EventLoop>>,
    next_loop: AtomicUsize,
    /// VMs made ahead.
    pub(crate) spares: Spares,
    /// A tmpfs with huge pages, made when first asked for; `None` when it could not be.
    huge_mount: OnceLock<Option<OwnedFd>>,
    /// `None` only while dropping.
    housekeeper: Option<Sender<Task>>,
    thread: Option<JoinHandle<()>>,
}

/// What the housekeeper is asked to do. It ends when nobody can ask any more.
pub(crate) enum Task {
    /// Watch this cell's vCPUs.
    Watch(Arc<Shared>),
    /// Free what this stopped cell held.
    TakeDown(Arc<Shared>, Box<Machine>),
}

impl CellHost {
    /// Opens /dev/kvm and starts the shared threads.
    pub fn new(config: CellHostConfig) -> Result<Self, HostError> {
        let kvm = Kvm::new().map_err(|error| match error.errno() {
            libc::ENOENT | libc::ENXIO | libc::ENODEV => HostError::NoKvm,
            libc::EACCES | libc::EPERM => HostError::NoRights,
            _ => HostError::OpenKvm(error),
        })?;
        let found = kvm.get_api_version();
        if found != 12 {
            return Err(HostError::ApiVersion { found });
        }
        for (cap, capability) in [
            (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
            (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
            (Cap::Irqfd, "KVM_CAP_IRQFD"),
            (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
            (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
        ] {
            if !kvm.check_extension(cap) {
                return Err(HostError::Capability { capability });
            }
        }
        let call = |what| move |source| HostError::Kvm { what, source };
        let cpuid = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(call("KVM_GET_SUPPORTED_CPUID"))?
            .as_slice()
            .to_vec();
        let msr_indices = kvm
            .get_msr_index_list()
            .map_err(call("KVM_GET_MSR_INDEX_LIST"))?
            .as_slice()
            .to_vec();
        kick::install_handler().map_err(|source| HostError::Io {
            what: "cannot install the kick signal's handler",
            source,
        })?;
        let event_loops = (0..config.event_loops.max(1))
            .map(|n| EventLoop::new(&format!("device-io-{n}")).map(Arc::new))
            .collect::<Result<Vec<_>, _>>()?;
        let workers = WorkerPool::new(config.workers).map_err(|source| HostError::Io {
            what: "cannot start the worker threads",
            source,
        })?;
        let (sender, receiver) = mpsc::channel();
        let watched = event_loops
            .iter()
            .map(|event_loop| (Arc::clone(event_loop), Suspicion::default()))
            .collect();
        let thread = std::thread::Builder::new()
            .name("housekeeper".to_owned())
            .stack_size(256 << 10)
            .spawn(move || {
                Housekeeper {
                    limits: config.limits(),
                    event_loops: watched,
                    cells: Vec::new(),
                    take_down: TakeDown::default(),
                    looks: 0,
                    turn: 0,
                }
                .run(&receiver)
            })
            .map_err(|source| HostError::Io {
                what: "cannot start the housekeeper thread",
                source,
            })?;
        Ok(Self {
            inner: Arc::new(HostInner {
                max_vcpus: kvm.get_max_vcpus(),
                kvm,
                cpuid,
                msr_indices,
                workers: Arc::new(workers),
                event_loops,
                next_loop: AtomicUsize::new(0),
                spares: Spares::default(),
                huge_mount: OnceLock::new(),
                housekeeper: Some(sender),
                thread: Some(thread),
            }),
        })
    }

    /// The pool for requests that block, for devices made by the caller.
    pub fn workers(&self) -> &Arc<WorkerPool> {
        &self.inner.workers
    }
}

impl HostInner {
    /// The event loop for the next cell: all devices of a cell share one, cells take turns.
    pub(crate) fn event_loop(&self) -> &Arc<EventLoop> {
        let n = self.next_loop.fetch_add(1, Ordering::Relaxed);
        &self.event_loops[n % self.event_loops.len()]
    }

    /// Where memory files with pages of this kind are made, if not by memfd_create(2).
    pub(crate) fn mount_for(&self, huge_pages: HugePages) -> Option<BorrowedFd<'_>> {
        if huge_pages != HugePages::Transparent {
            return None;
        }
        let mount = self.huge_mount.get_or_init(|| {
            let made = memory::huge_tmpfs();
            if let Err(error) = &made {
                log::info!("no tmpfs with huge pages of our own ({error}): shmem_enabled decides");
            }
            made.ok()
        });
        mount.as_ref().map(AsFd::as_fd)
    }

    /// The way to the housekeeper.
    pub(crate) fn housekeeper(&self) -> Sender<Task> {
        match &self.housekeeper {
            Some(sender) => sender.clone(),
            // Not reached: only `drop` takes it.
            None => mpsc::channel().0,
        }
    }
}

impl Drop for HostInner {
    fn drop(&mut self) {
        // Cells hold this and are gone: what remains is taking the last of them down. Only then do the housekeeper's
        // other senders, which the cells' threads hold, go away.
        self.housekeeper = None;
        if let Some(thread) = self.thread.take() {
            // It does not panic: it runs no code of devices but their removal.
            let _ = thread.join();
        }
    }
}

struct Housekeeper {
    limits: Limits,
    event_loops: Vec<(Arc<EventLoop>, Suspicion)>,
    cells: Vec<Watched>,
    take_down: TakeDown,
    looks: u64,
    /// Whose turn it is to be looked at for a halt.
    turn: usize,
}

/// A running cell, and what is suspected of its vCPUs.
struct Watched {
    cell: Arc<Shared>,
    vcpus: Vec<Suspicion>,
    halt: HaltWatch,
    /// Looks in a row at which its guest had more memory than it was given.
    greedy: u32,
}

impl Housekeeper {
    fn run(mut self, tasks: &mpsc::Receiver<Task>) {
        let mut next_look = Instant::now();
        loop {
            let task = if self.cells.is_empty() && self.take_down.is_idle() {
                let task = tasks.recv().map_err(|_| RecvTimeoutError::Disconnected);
                next_look = Instant::now() + WATCH_INTERVAL;
                task
            } else {
                // However many tasks there are, looks are at their intervals.
                match next_look.saturating_duration_since(Instant::now()) {
                    Duration::ZERO => Err(RecvTimeoutError::Timeout),
                    remaining => tasks.recv_timeout(remaining),
                }
            };
            match task {
                Ok(Task::Watch(cell)) => {
                    let vcpus = (0..cell.possible_vcpus()).map(|_| Suspicion::default()).collect();
                    let halt = HaltWatch::new();
                    let greedy = 0;
                    self.cells.push(Watched {
                        cell,
                        vcpus,
                        halt,
                        greedy,
                    });
                }
                Ok(Task::TakeDown(cell, machine)) => {
                    self.cells.retain(|watched| !Arc::ptr_eq(&watched.cell, &cell));
                    self.take_down.add(cell, machine);
                }
                Err(RecvTimeoutError::Timeout) => {
                    let look = Look {
                        interval: WATCH_INTERVAL,
                        late: next_look.elapsed(),
                    };
                    self.watch_event_loops(look);
                    self.watch_vcpus(look);
                    self.watch_for_halts();
                    self.watch_memory();
                    self.take_down.look();
                    next_look = Instant::now() + WATCH_INTERVAL;
                }
                Err(RecvTimeoutError::Disconnected) => return self.take_down.finish(),
            }
        }
    }

    fn watch_event_loops(&mut self, look: Look) {
        for (event_loop, suspicion) in &mut self.event_loops {
            let busy = event_loop.busy();
            let (run, thread) = busy
                .as_ref()
                .map_or((None, 0), |busy| (Some(busy.run), busy.thread));
            let verdict = suspicion.look(run, thread, look, &self.limits);
            let Some(busy) = busy else { continue };
            match verdict {
                Verdict::Fine => {}
                Verdict::Slow(elapsed) => busy.health.complain(not_returned(elapsed)),
                Verdict::Stuck(elapsed) => {
                    // First the others, then the blame.
                    match event_loop.leave_behind(&busy) {
                        Ok(true) => log::warn!(
                            "{}: its handler is stuck; the other devices of its thread go on with another",
                            busy.health.name()
                        ),
                        // It has come back at the last moment.
                        Ok(false) => continue,
                        Err(error) => {
                            log::error!(
                                "{}: its handler is stuck, and others with it: {error}",
                                busy.health.name()
                            );
                        }
                    }
                    busy.health.fail(not_returned(elapsed));
                    suspicion.forget();
                    // Who waited behind it did so for no fault of its own.
                    for vcpu in self.cells.iter_mut().flat_map(|watched| &mut watched.vcpus) {
                        vcpu.forget();
                    }
                }
            }
        }
    }

    fn watch_vcpus(&mut self, look: Look) {
        for Watched { cell, vcpus, .. } in &mut self.cells {
            for (index, suspicion) in vcpus.iter_mut().enumerate() {
                let access = cell.vcpu_access(index);
                let mut limits = self.limits;
                if access.is_some_and(|access| access.may_block) || cell.waits_for_requests() {
                    limits.stuck_after = limits.stuck_after.max(limits.stuck_on_host_after);
                }
                let (run, thread) = access.map_or((None, 0), |access| (Some(access.number), access.thread));
                match suspicion.look(run, thread, look, &limits) {
                    Verdict::Fine => {}
                    Verdict::Slow(elapsed) => {
                        let elapsed = elapsed.as_millis();
                        cell.complain(format_args!("vCPU {index} waits for a device since {elapsed} ms"));
                    }
                    Verdict::Stuck(elapsed) => cell.vcpu_stuck(index, elapsed),
                }
            }
        }
    }

    fn watch_memory(&mut self) {
        for Watched { cell, greedy, .. } in &mut self.cells {
            match cell.excess_memory() {
                Some(excess) if excess >= memory::HUGE_PAGE => {
                    *greedy += 1;
                    if *greedy >= GREEDY_LOOKS {
                        cell.took_memory(excess);
                    }
                }
                _ => *greedy = 0,
            }
        }
    }

    fn watch_for_halts(&mut self) {
        self.looks += 1;
        for _ in 0..self.cells.len().min(halt::CELLS_PER_LOOK) {
            self.turn = (self.turn + 1) % self.cells.len();
            let Watched { cell, halt, .. } = &mut self.cells[self.turn];
            halt.look(cell, self.looks);
        }
    }
}

fn not_returned(elapsed: Duration) -> String {
    format!("its handler has not returned for {} ms", elapsed.as_millis())
}
