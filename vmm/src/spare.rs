// SPDX-License-Identifier: Apache-2.0
//! Spares: VMs whose memory was made ready before anybody asked for them.
//!
//! # Theory of operation
//!
//! Most of what it costs to make a cell is the same for every cell of one kind (kernel, RAM disk, memory size): the VM
//! itself, the copy of kernel and RAM disk, and the host's clearing of each page that the guest touches while it boots.
//! A spare has all of that behind it. [`crate::Cell::create`] takes one if its kind is at hand and adds what is the
//! cell's own: devices, interrupt chip, vCPUs, command line. Nothing in a spare has ever been a guest's.
//!
//! ```text
//!  keep_spares(kind) ─▶ stock, empty ──refill_spares()──▶ stock, full ──Cell::create──▶ stock, short of one
//!                          ▲                                  ▲                               │
//!                          │ Cell::note_ready: which pages    └───────refill_spares()─────────┘
//!                          └ this kind touches
//! ```
//!
//! Refilling takes as long as a creation and competes with running guests, so the owner says when: once a pod is up,
//! never between a request and its answer. Pages are only made ready once a cell of the kind has said, by
//! [`crate::Cell::note_ready`], which ones a boot touches. A spare costs the host those pages (some 60 MiB for a small
//! guest), whatever the number of cells.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cloister_boot::x86_64 as boot;
use cloister_boot::x86_64::layout::{self, Layout};
use kvm_ioctls::VmFd;

use crate::cell::create_vm;
use crate::config::HugePages;
use crate::error::CreateError;
use crate::host::{CellHost, HostInner};
use crate::memory::Memory;

/// A kind of cell to keep spares of.
#[derive(Debug)]
pub struct SpareConfig {
    /// The kernel image. A cell is of this kind if it boots this very file, unchanged since.
    pub kernel: File,
    /// The initial RAM disk, likewise.
    pub initrd: Option<File>,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// What a memory device can plug, in MiB; 0 without one.
    pub pluggable_mib: u64,
    /// Pages that back the RAM.
    pub huge_pages: HugePages,
    /// How many to keep; 0 gives up those that are there.
    pub count: usize,
}

/// Kinds that spares are kept of, so that what they take does not grow with the kinds of pods that a node has seen.
const MAX_KINDS: usize = 4;

/// What tells a file and its content from another without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileId {
    device: u64,
    inode: u64,
    size: i64,
    changed: (i64, i64),
}

impl FileId {
    fn of(file: &File) -> Option<Self> {
        let stat = rustix::fs::fstat(file.as_fd()).ok()?;
        Some(Self {
            device: stat.st_dev,
            inode: stat.st_ino,
            size: stat.st_size,
            changed: (stat.st_ctime, i64::try_from(stat.st_ctime_nsec).unwrap_or(0)),
        })
    }
}

/// What cells have to have in common to use the same spare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kind {
    kernel: FileId,
    initrd: Option<FileId>,
    memory_mib: u64,
    pluggable_mib: u64,
    huge_pages: HugePages,
}

impl Kind {
    /// `None` if the files cannot be told apart.
    pub(crate) fn of(
        kernel: &File,
        initrd: Option<&File>,
        memory_mib: u64,
        pluggable_mib: u64,
        huge_pages: HugePages,
    ) -> Option<Self> {
        Some(Self {
            kernel: FileId::of(kernel)?,
            initrd: match initrd {
                Some(file) => Some(FileId::of(file)?),
                None => None,
            },
            memory_mib,
            pluggable_mib,
            huge_pages,
        })
    }
}

/// A VM without devices or vCPUs, and the memory it is to have, with the images loaded.
pub(crate) struct Spare {
    pub(crate) vm: VmFd,
    pub(crate) memory: Memory,
    pub(crate) images: boot::Images,
}

struct Stock {
    kind: Kind,
    config: std::sync::Arc<SpareConfig>,
    ready: Vec<Spare>,
    /// What a boot touches, as ranges of the memory file.
    touched: Vec<Range<u64>>,
}

/// All spares of a host.
#[derive(Default)]
pub(crate) struct Spares {
    stocks: Mutex<Vec<Stock>>,
    /// Held by who refills, so that several do not each make the same spare.
    refilling: Mutex<()>,
}

impl Spares {
    fn lock(&self) -> MutexGuard<'_, Vec<Stock>> {
        // Nothing panics while it is held.
        self.stocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn take(&self, kind: &Kind) -> Option<Spare> {
        let mut stocks = self.lock();
        stocks.iter_mut().find(|stock| stock.kind == *kind)?.ready.pop()
    }

    /// The first answer is kept: later boots of the same kind differ little.
    pub(crate) fn note_touched(&self, kind: &Kind, memory: &Memory) {
        let wants = |stock: &Stock| stock.kind == *kind && stock.touched.is_empty();
        if !self.lock().iter().any(wants) {
            return;
        }
        // Not under the lock, which who creates a cell waits for: the page tables are read.
        let touched = memory.touched();
        if let Some(stock) = self.lock().iter_mut().find(|stock| wants(stock)) {
            stock.touched = touched;
        }
    }

    fn keep(&self, kind: Kind, config: SpareConfig) {
        let mut stocks = self.lock();
        let (mut ready, touched): (Vec<Spare>, _) = match stocks.iter().position(|stock| stock.kind == kind) {
            Some(at) => {
                let before = stocks.remove(at);
                (before.ready, before.touched)
            }
            None => Default::default(),
        };
        let given_up = ready.split_off(ready.len().min(config.count));
        let excess = (stocks.len() + 1).saturating_sub(MAX_KINDS);
        let forgotten: Vec<Stock> = stocks.drain(..excess).collect();
        stocks.push(Stock {
            kind,
            config: std::sync::Arc::new(config),
            ready,
            touched,
        });
        // Closing a VM takes a while, and who creates a cell waits for the lock.
        drop(stocks);
        drop((given_up, forgotten));
    }

    /// A stock that is short of a spare.
    fn short(&self) -> Option<(Kind, std::sync::Arc<SpareConfig>, Vec<Range<u64>>)> {
        let stocks = self.lock();
        let stock = stocks
            .iter()
            .find(|stock| stock.ready.len() < stock.config.count)?;
        Some((
            stock.kind,
            std::sync::Arc::clone(&stock.config),
            stock.touched.clone(),
        ))
    }

    /// Gives a new spare to its stock; drops it where the stock has been filled or given up meanwhile.
    fn add(&self, kind: &Kind, spare: Spare) {
        let mut stocks = self.lock();
        if let Some(stock) = stocks.iter_mut().find(|stock| stock.kind == *kind)
            && stock.ready.len() < stock.config.count
        {
            stock.ready.push(spare);
        }
    }
}

impl CellHost {
    /// From now on keeps spares of this kind, made by [`CellHost::refill_spares`], and of the kinds that were last said, four in
    /// all. Replaces what was said of the same kind before; spares that there are stay, up to the new number.
    pub fn keep_spares(&self, config: SpareConfig) -> Result<(), CreateError> {
        let kind = Kind::of(
            &config.kernel,
            config.initrd.as_ref(),
            config.memory_mib,
            config.pluggable_mib,
            config.huge_pages,
        );
        let kind = kind.ok_or_else(|| CreateError::Spare {
            source: std::io::Error::last_os_error(),
        })?;
        self.inner.spares.keep(kind, config);
        Ok(())
    }

    /// Makes the spares that are missing, on the calling thread: for a quiet moment. Answers how many it made. Waits for another
    /// thread that does so.
    pub fn refill_spares(&self) -> Result<usize, CreateError> {
        let _alone = self
            .inner
            .spares
            .refilling
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut made = 0;
        while let Some((kind, config, touched)) = self.inner.spares.short() {
            let spare = make(&self.inner, &config, &touched)?;
            self.inner.spares.add(&kind, spare);
            made += 1;
        }
        Ok(made)
    }
}

fn layout(config: &SpareConfig) -> Result<Layout, layout::Error> {
    let mut layout = Layout::new(config.memory_mib)?;
    if config.pluggable_mib > 0 {
        layout.add_pluggable(config.pluggable_mib.saturating_mul(1 << 20))?;
    }
    Ok(layout)
}

fn make(host: &HostInner, config: &SpareConfig, touched: &[Range<u64>]) -> Result<Spare, CreateError> {
    let layout = layout(config).map_err(|source| CreateError::Config {
        name: "spare".to_owned(),
        source: source.into(),
    })?;
    let mount = host.mount_for(config.huge_pages);
    let memory = Memory::new(&layout, config.huge_pages, false, None, mount)?;
    let vm = create_vm(host)?;
    memory.populate(touched);
    let images = boot::load_images(
        memory.ram().as_ref(),
        &layout,
        &config.kernel,
        config.initrd.as_ref(),
    )?;
    Ok(Spare { vm, memory, images })
}
