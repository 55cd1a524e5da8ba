// SPDX-License-Identifier: Apache-2.0
//! What the cells of a process share, and the housekeeper that cleans up after them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use cloister_devices::event_loop::EventLoop;
use cloister_devices::worker_pool::WorkerPool;
use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::{Cap, Kvm};

use crate::cell::{Machine, Shared};
use crate::config::HugePages;
use crate::error::HostError;
use crate::kick;
use crate::memory;
use crate::spare::Spares;

/// How often the housekeeper looks for stuck devices while cells run.
const WATCH_INTERVAL: Duration = Duration::from_millis(250);

/// Sizes of what all cells share.
#[derive(Debug, Clone, Copy)]
pub struct CellHostConfig {
    /// Threads for the data side of all devices.
    pub event_loops: usize,
    /// Threads for requests that block.
    pub workers: usize,
    /// How long a device's handler or a vCPU's access to a device may take before a warning is logged.
    pub warn_after: Duration,
    /// How long until it is taken for stuck and its cell is stopped. Long enough for an overloaded host.
    pub stuck_after: Duration,
}

impl Default for CellHostConfig {
    fn default() -> Self {
        Self {
            event_loops: 2,
            workers: 3,
            warn_after: Duration::from_millis(500),
            stuck_after: Duration::from_secs(10),
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
        let flags = cpuinfo
            .lines()
            .find(|line| line.starts_with("flags"))
            .unwrap_or_default();
        if flags
            .split_whitespace()
            .any(|flag| flag == "vmx" || flag == "svm")
        {
            Self::Hardware
        } else if std::path::Path::new("/sys/module/kvm_pvm").exists() {
            Self::Pvm
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
        let watched = event_loops.clone();
        let thread = std::thread::Builder::new()
            .name("housekeeper".to_owned())
            .stack_size(256 << 10)
            .spawn(move || {
                Housekeeper {
                    config,
                    event_loops: watched,
                    cells: Vec::new(),
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
    config: CellHostConfig,
    event_loops: Vec<Arc<EventLoop>>,
    cells: Vec<Watched>,
}

/// A running cell, and for each vCPU the access it was in when last looked at, and for how many looks.
struct Watched {
    cell: Arc<Shared>,
    seen: Vec<(u64, u32)>,
}

impl Housekeeper {
    fn run(mut self, tasks: &mpsc::Receiver<Task>) {
        loop {
            let task = if self.cells.is_empty() {
                tasks.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                tasks.recv_timeout(WATCH_INTERVAL)
            };
            match task {
                Ok(Task::Watch(cell)) => {
                    let seen = vec![(0, 0); cell.vcpu_count()];
                    self.cells.push(Watched { cell, seen });
                }
                Ok(Task::TakeDown(cell, machine)) => {
                    self.cells.retain(|watched| !Arc::ptr_eq(&watched.cell, &cell));
                    take_down(cell, machine);
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.watch_event_loops();
                    self.watch_vcpus();
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn watch_event_loops(&self) {
        for event_loop in &self.event_loops {
            let Some((elapsed, health)) = event_loop.busy() else {
                continue;
            };
            if elapsed >= self.config.stuck_after {
                health.fail(format_args!(
                    "its handler has not returned for {} ms",
                    elapsed.as_millis()
                ));
            } else if elapsed >= self.config.warn_after {
                health.complain(format_args!(
                    "its handler has not returned for {} ms",
                    elapsed.as_millis()
                ));
            }
        }
    }

    fn watch_vcpus(&mut self) {
        for Watched { cell, seen } in &mut self.cells {
            for (vcpu, (access, looks)) in seen.iter_mut().enumerate() {
                let now = cell.access_count(vcpu);
                // Odd: the vCPU's thread is inside an access to a device.
                if now % 2 == 0 || now != *access {
                    (*access, *looks) = (now, 0);
                    continue;
                }
                *looks = looks.saturating_add(1);
                let elapsed = WATCH_INTERVAL.saturating_mul(*looks);
                if elapsed >= self.config.stuck_after {
                    cell.vcpu_stuck(vcpu, elapsed);
                } else if elapsed >= self.config.warn_after {
                    let name = cell.name();
                    log::warn!(
                        "cell {name}: vCPU {vcpu} waits for a device since {} ms",
                        elapsed.as_millis()
                    );
                }
            }
        }
    }
}

/// Takes a stopped cell apart: here, unless a stuck handler would make everybody else wait.
fn take_down(cell: Arc<Shared>, machine: Box<Machine>) {
    if !cell.may_block() {
        machine.take_down(&cell);
        return;
    }
    let name = cell.name().to_owned();
    let spawned = std::thread::Builder::new()
        .name("take-down".to_owned())
        .stack_size(256 << 10)
        .spawn(move || machine.take_down(&cell));
    if let Err(error) = spawned {
        log::error!("cell {name}: cannot free it, its device is stuck and no thread can be started: {error}");
    }
}
