// SPDX-License-Identifier: Apache-2.0
//! Templates: VMs that have booted as far as "agent ready" and were put away as images, from which pods are cloned.
//!
//! ```text
//!  a pod of a new kind ──▶ boots; once it is up: want() ──▶ another VM boots, is saved and ended ──▶ template
//!  a later pod of this kind ──▶ find() ──▶ cloned
//! ```
//!
//! A template belongs to one kind of VM (its kernel, initramfs, size and devices) and one *domain*: those who may share
//! it. Its memory is shared, copy-on-write, by all its clones, so who is in it can find out by timing which parts of it the
//! others use. Nothing in it is secret: it has seen no pod. What the kernel's random generator held then is in it;
//! a clone is given fresh randomness with its identity, before anything of its pod runs.

use super::machine::{MachineConfig, Origin, Room};
use super::vm::{self, PodVm, QUICK, agent_error, io_error};
use cloister_protocol::pod::InfoRequest;
use cloister_protocol::ttrpc::context::with_duration;
use cloister_vmm::image::{self, Image};
use cloister_vmm::{CellHost, HugePages};
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Templates that a process keeps: each is the memory of a VM that has just booted.
const MAX_TEMPLATES: usize = 8;
/// How long a pod that has just started has the processors to itself, before work for those that may follow.
pub const SETTLE: Duration = Duration::from_secs(2);
/// How long the building of one that failed is left alone.
const REST: Duration = Duration::from_secs(60);

/// What VMs have to have in common to be clones of the same template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kind {
    domain: String,
    kernel: PathBuf,
    initrd: PathBuf,
    files: [FileId; 2],
    kernel_args: Vec<String>,
    cpus: u8,
    memory: u64,
    huge_pages: HugePages,
    dax: Option<u64>,
    cards: usize,
    room: Room,
}

/// The domain of all pods of a node.
pub const NODE: &str = "node";

/// What tells a file and its content from another without reading it.
type FileId = (u64, u64, u64, i64, i64);

fn file_id(path: &Path) -> io::Result<FileId> {
    let data = std::fs::metadata(path)?;
    Ok((
        data.dev(),
        data.ino(),
        data.size(),
        data.ctime(),
        data.ctime_nsec(),
    ))
}

impl Kind {
    /// The kind of a VM of this domain. None if such VMs cannot be cloned: a kernel that is not ours does not find a
    /// network card that comes later, and reserved huge pages are not copied page by page.
    pub fn of(config: &MachineConfig<'_>, domain: &str) -> Option<Self> {
        if config.huge_pages == HugePages::Reserved {
            return None;
        }
        let kernel = File::open(config.kernel).ok()?;
        if cloister_boot::x86_64::Description::of(&kernel) != cloister_boot::x86_64::Description::MpTable {
            return None;
        }
        Some(Self {
            domain: domain.to_owned(),
            kernel: config.kernel.to_owned(),
            initrd: config.initrd.to_owned(),
            files: [file_id(config.kernel).ok()?, file_id(config.initrd).ok()?],
            kernel_args: config.kernel_args.to_vec(),
            cpus: config.cpus,
            memory: config.memory,
            huge_pages: config.huge_pages,
            dax: config.dax,
            cards: config.nics.len(),
            room: config.room,
        })
    }

    /// The same with so many network cards.
    pub fn with_cards(self, cards: usize) -> Self {
        Self { cards, ..self }
    }

    fn config(&self) -> MachineConfig<'_> {
        MachineConfig {
            name: "template".to_owned(),
            cpus: self.cpus,
            memory: self.memory,
            huge_pages: self.huge_pages,
            dax: self.dax,
            kernel: &self.kernel,
            initrd: &self.initrd,
            kernel_args: &self.kernel_args,
            nics: Vec::new(),
            room: self.room,
            origin: Origin::Template { cards: self.cards },
        }
    }
}

/// Boots a VM of this kind, and answers its image once its agent is ready. To be called in a runtime.
///
/// # Errors
/// It does not come up within `patience`, or cannot be saved.
pub async fn build(kind: &Kind, cells: &CellHost, patience: Duration) -> Result<Arc<Image>, vm::Error> {
    let mut vm = PodVm::start(kind.config(), cells).await?;
    let agent = vm.ready(patience).await?;
    // It says that it is ready before it has mounted everything: this answer comes after that.
    agent
        .pod
        .info(with_duration(QUICK), &InfoRequest::new())
        .await
        .map_err(agent_error("ask the agent"))?;
    drop(agent);
    let machine = Arc::clone(&vm.machine);
    let saved = tokio::task::spawn_blocking(move || {
        let cell = machine.cell();
        cell.pause().map_err(io::Error::other)?;
        let file = image::memory_file()?;
        cell.write_image(&file).map_err(io::Error::other)?;
        machine.stop();
        image::seal(&file)?;
        Image::open(file).map_err(io::Error::other)
    });
    let image = saved
        .await
        .map_err(io::Error::other)
        .and_then(|saved| saved)
        .map_err(io_error("save a template"))?;
    vm.shut_down().await;
    Ok(image)
}

enum State {
    Building,
    Ready(Arc<Image>),
    /// When it failed.
    Failed(Instant),
}

/// The templates of a process. Clones are handles to the same ones.
#[derive(Clone)]
pub struct Templates {
    cells: CellHost,
    /// The most recently used last.
    known: Arc<Mutex<Vec<(Kind, State)>>>,
}

impl Templates {
    /// None yet.
    pub fn new(cells: CellHost) -> Self {
        Self {
            cells,
            known: Arc::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(Kind, State)>> {
        // Every change under the lock is complete in itself.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The template of a kind, if there is one.
    pub fn find(&self, kind: &Kind) -> Option<Arc<Image>> {
        let mut known = self.lock();
        let at = known.iter().position(|(other, _)| other == kind)?;
        let State::Ready(image) = &known[at].1 else {
            return None;
        };
        let image = Arc::clone(image);
        let used = known.remove(at);
        known.push(used);
        Some(image)
    }

    /// Has a template of this kind built, soon, unless there is one. To be called in a runtime, at a quiet moment: it
    /// takes as much as a boot.
    pub fn want(&self, kind: Kind, patience: Duration) {
        {
            let mut known = self.lock();
            // What it was built of has been replaced.
            known.retain(|(other, _)| {
                other.kernel != kind.kernel || other.initrd != kind.initrd || other.files == kind.files
            });
            let rests = |state: &State| matches!(state, State::Failed(since) if since.elapsed() >= REST);
            known.retain(|(other, state)| *other != kind || !rests(state));
            if known.iter().any(|(other, _)| *other == kind) {
                return;
            }
            let excess = known.len().saturating_sub(MAX_TEMPLATES - 1);
            known.drain(..excess);
            known.push((kind.clone(), State::Building));
        }
        let templates = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(SETTLE).await;
            let state = match build(&kind, &templates.cells, patience).await {
                Ok(image) => {
                    let kib = image.ram_bytes() >> 10;
                    log::info!(
                        "template of {} MiB, {} vCPUs, {} network cards: {kib} KiB",
                        kind.memory >> 20,
                        kind.cpus,
                        kind.cards
                    );
                    State::Ready(image)
                }
                Err(error) => {
                    log::warn!(
                        "pods boot as before: no template: {}",
                        crate::error::chain(&error)
                    );
                    State::Failed(Instant::now())
                }
            };
            let mut known = templates.lock();
            if let Some(place) = known.iter_mut().find(|(other, _)| *other == kind) {
                place.1 = state;
            }
        });
    }
}
