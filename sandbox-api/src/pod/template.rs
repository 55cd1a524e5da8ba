// SPDX-License-Identifier: Apache-2.0
//! Templates: VMs that have booted as far as "agent ready" and were put away as images, from which pods are cloned.
//!
//! ```text
//!  a pod of a new kind ──▶ boots; once it is up: want() ──▶ another VM boots, is saved and ended ──▶ template
//!  a later pod of this kind ──▶ find() ──▶ cloned, or take() ──▶ a cell that was cloned ahead ([`super::pool`])
//!  a larger pod of a new kind ──▶ find_smaller() ──▶ cloned, and grows ([`super::resize`])
//! ```
//!
//! A daemon's workers do not build: they ask the daemon, and clone what it puts on a [`super::shelf`].
//!
//! A template belongs to one kind of VM (its kernel, initramfs, size and devices) and one *domain*: those who may share
//! it. Its memory is shared, copy-on-write, by all its clones, so who is in it can find out by timing which parts of it the
//! others use. Nothing in it is secret: it has seen no pod. What the kernel's random generator held then is in it;
//! a clone is given fresh randomness with its identity, before anything of its pod runs.

use super::machine::{self, MachineConfig, Origin, Room};
use super::pool::{self, Ahead, Stock};
use super::shelf::Shelf;
use super::size::Size;
use super::vm::{self, PodVm, QUICK, agent_error, io_error};
use cloister_protocol::pod::{ConfigureRequest, InfoRequest};
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
pub const MAX_TEMPLATES: usize = 8;
/// Of those, the ones of which cells are made ahead: the last used.
const MAX_POOLS: usize = 4;
/// How long a pod that has just started has the processors to itself, before work for those that may follow.
pub const SETTLE: Duration = Duration::from_secs(2);
/// How long the building of one that failed is left alone.
const REST: Duration = Duration::from_secs(60);
/// How often a shelf is looked at for a template that was asked for.
const PACE: Duration = Duration::from_millis(500);

/// What VMs have to have in common to be clones of the same template.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
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
    /// Queue pairs of each network card.
    cards: Vec<usize>,
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
    /// The kind of a VM of this domain. None if such VMs cannot be cloned: of other kernels than ours it is not known, and
    /// reserved huge pages are not copied page by page.
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
            cards: config.nics.iter().map(|nic| nic.backend.pairs()).collect(),
            room: config.room,
        })
    }

    /// Whether VMs of this kind boot from these files.
    pub fn boots_from(&self, kernel: &Path, initrd: &Path) -> bool {
        self.kernel == kernel && self.initrd == initrd
    }

    /// The same with network cards of so many queue pairs each.
    pub fn with_cards(self, cards: Vec<usize>) -> Self {
        Self { cards, ..self }
    }

    /// Has a VM start as one of this kind, to [grow](Self::grows_into). Answers what it starts with.
    pub fn start(&self, config: &mut MachineConfig<'_>) -> Size {
        config.cpus = self.cpus;
        config.memory = self.memory;
        for (nic, pairs) in config.nics.iter_mut().zip(&self.cards) {
            nic.backend.limit_pairs(*pairs);
        }
        Size {
            cpus: self.cpus,
            memory: self.memory,
        }
    }

    /// Whether a VM of this kind becomes one of the other with what it can be given while it runs. It keeps its queues.
    fn grows_into(&self, other: &Self) -> bool {
        let alike = Self {
            cpus: other.cpus,
            memory: other.memory,
            cards: other.cards.clone(),
            ..self.clone()
        };
        alike == *other
            && (self.cpus..=self.room.cpus.max(self.cpus)).contains(&other.cpus)
            && (self.memory..=self.room.memory.max(self.memory)).contains(&other.memory)
            && self.cards.len() == other.cards.len()
            && self.cards.iter().zip(&other.cards).all(|(own, its)| own <= its)
    }

    /// A VM of this kind that has no network yet.
    pub(super) fn config(&self, name: String, origin: Origin) -> MachineConfig<'_> {
        MachineConfig {
            name,
            cpus: self.cpus,
            memory: self.memory,
            huge_pages: self.huge_pages,
            dax: self.dax,
            kernel: &self.kernel,
            initrd: &self.initrd,
            kernel_args: &self.kernel_args,
            nics: machine::unplugged(&self.cards),
            room: self.room,
            origin,
        }
    }
}

/// Boots a VM of this kind, and answers its image once its agent is ready. To be called in a runtime.
///
/// # Errors
/// It does not come up within `patience`, or cannot be saved.
pub async fn build(kind: &Kind, cells: &CellHost, patience: Duration) -> Result<Arc<Image>, vm::Error> {
    let mut vm = PodVm::start(kind.config("template".to_owned(), Origin::Boot), cells).await?;
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

/// Waits for somebody else's [`build`]ing of what was asked for.
async fn wait_for(
    shelf: &Shelf,
    kind: &Kind,
    cells: &CellHost,
    patience: Duration,
) -> Result<Arc<Image>, vm::Error> {
    let found = async {
        loop {
            if let Some(image) = shelf.find(kind, cells) {
                return image;
            }
            tokio::time::sleep(PACE).await;
        }
    };
    // The builder lets the pod settle, too.
    tokio::time::timeout(SETTLE + patience, found)
        .await
        .map_err(|_| io_error("wait for a template from cloisterd")(io::ErrorKind::TimedOut.into()))
}

enum State {
    Building,
    Ready(Arc<Image>, Stock<PodVm>),
    /// When it failed.
    Failed(Instant),
}

#[derive(Default)]
struct Known {
    /// The most recently used last.
    list: Vec<(Kind, State)>,
    /// Those of whose templates the last clone did not come up.
    doubted: Vec<Kind>,
    /// Nothing is made any more.
    closed: bool,
}

impl Known {
    /// A template that is there, which is used now.
    fn used(&mut self, kind: &Kind) -> Option<(&Arc<Image>, &mut Stock<PodVm>)> {
        let at = self.list.iter().position(|(other, _)| other == kind)?;
        let used = self.list.remove(at);
        self.list.push(used);
        match self.list.last_mut() {
            Some((_, State::Ready(image, stock))) => Some((image, stock)),
            _ => None,
        }
    }

    fn state(&mut self, kind: &Kind) -> Option<&mut State> {
        let found = self.list.iter_mut().find(|(other, _)| other == kind);
        found.map(|(_, state)| state)
    }

    /// A clone of this kind's template did not come up. Answers whether that makes it one too many: its template is no good.
    fn doubt(&mut self, kind: &Kind) -> bool {
        if self.trust(kind) {
            return true;
        }
        if self.doubted.len() >= MAX_TEMPLATES {
            self.doubted.remove(0);
        }
        self.doubted.push(kind.clone());
        false
    }

    /// Answers whether it was doubted.
    fn trust(&mut self, kind: &Kind) -> bool {
        let before = self.doubted.len();
        self.doubted.retain(|other| other != kind);
        self.doubted.len() < before
    }

    fn stock(&mut self, kind: &Kind) -> Option<&mut Stock<PodVm>> {
        match self.state(kind) {
            Some(State::Ready(_, stock)) => Some(stock),
            _ => None,
        }
    }
}

/// The templates of a process, with the cells that are cloned of them ahead. Clones are handles to the same ones.
#[derive(Clone)]
pub struct Templates {
    cells: CellHost,
    /// Where they come from; without it they are built here.
    shelf: Option<Shelf>,
    known: Arc<Mutex<Known>>,
}

impl Templates {
    /// None yet.
    pub fn new(cells: CellHost) -> Self {
        Self {
            cells,
            shelf: None,
            known: Arc::default(),
        }
    }

    /// None yet, and others than this process build them: whoever keeps the shelf.
    pub fn from_shelf(cells: CellHost, shelf: Shelf) -> Self {
        Self {
            shelf: Some(shelf),
            ..Self::new(cells)
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        // Every change under the lock is complete in itself.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The template of a kind, if there is one.
    pub fn find(&self, kind: &Kind) -> Option<Arc<Image>> {
        if let Some((image, _)) = self.lock().used(kind) {
            return Some(Arc::clone(image));
        }
        let image = self.shelf.as_ref()?.find(kind, &self.cells)?;
        let mut known = self.lock();
        if known.state(kind).is_none() && known.list.len() < MAX_TEMPLATES {
            let state = State::Ready(Arc::clone(&image), Stock::default());
            known.list.push((kind.clone(), state));
        }
        Some(image)
    }

    /// The largest template, and its kind, of which a clone grows to be of this kind.
    pub fn find_smaller(&self, kind: &Kind) -> Option<(Kind, Arc<Image>)> {
        let mut smaller: Vec<Kind> = {
            let known = self.lock();
            let ready =
                |(kind, state): &(Kind, State)| matches!(state, State::Ready(..)).then(|| kind.clone());
            known.list.iter().filter_map(ready).collect()
        };
        smaller.extend(self.shelf.iter().flat_map(Shelf::kinds));
        smaller.retain(|other| other.grows_into(kind));
        let largest = smaller
            .into_iter()
            .max_by_key(|other| (other.memory, other.cpus))?;
        let image = self.find(&largest)?;
        Some((largest, image))
    }

    /// A cell of this kind that was made ahead, if there is one. It stands still, without a network. To be called in a
    /// runtime.
    pub fn take(&self, kind: &Kind) -> Option<PodVm> {
        loop {
            let vm = self.lock().used(kind)?.1.take()?;
            if vm.machine.dead().borrow().is_none() {
                return Some(vm);
            }
            log::warn!(
                "a cell that was made ahead has ended: {}",
                vm.machine.cell().name()
            );
            discard(vec![vm]);
        }
    }

    /// A clone of this kind's template came up, or did not. After two in a row that did not the template is given up, wherever
    /// it is, for it may be the cause: pods of the kind boot, and ask for another one. To be called in a runtime.
    pub fn came_up(&self, kind: &Kind, up: bool) {
        let mut known = self.lock();
        if up {
            known.trust(kind);
            return;
        }
        if !known.doubt(kind) {
            return;
        }
        let given_up = known
            .state(kind)
            .map(|state| std::mem::replace(state, State::Failed(Instant::now())));
        drop(known);
        log::warn!(
            "pods boot as before: two clones of their template in a row did not come up, so it is given up"
        );
        if let Some(State::Ready(_, mut stock)) = given_up {
            discard(stock.give_up());
        }
        // Another process may have done so.
        if let Some(shelf) = &self.shelf
            && let Err(error) = shelf.remove(&Shelf::name(kind))
            && error.kind() != io::ErrorKind::NotFound
        {
            log::warn!("cannot remove a template that is given up: {error}");
        }
    }

    /// Has a template of this kind built, soon, unless there is one, and cells made ahead of those who take them. To be
    /// called in a runtime, at a quiet moment: it takes as much as a boot.
    pub fn want(&self, kind: Kind, patience: Duration, ahead: Ahead) {
        let (build, given_up) = {
            let mut known = self.lock();
            if known.closed {
                return;
            }
            let mut given_up = Vec::new();
            // What it was built of has been replaced.
            let stale = |other: &Kind| {
                other.kernel == kind.kernel && other.initrd == kind.initrd && other.files != kind.files
            };
            let rests = |state: &State| matches!(state, State::Failed(since) if since.elapsed() >= REST);
            let gone = |(other, state): &(Kind, State)| stale(other) || *other == kind && rests(state);
            given_up.extend(known.list.extract_if(.., |one| gone(one)));
            let build = known.state(&kind).is_none();
            if build {
                let excess = known.list.len().saturating_sub(MAX_TEMPLATES - 1);
                given_up.extend(known.list.drain(..excess));
                known.list.push((kind.clone(), State::Building));
            }
            let mut given_up: Vec<PodVm> = given_up
                .into_iter()
                .flat_map(|(_, state)| match state {
                    State::Ready(_, mut stock) => stock.give_up(),
                    State::Building | State::Failed(_) => Vec::new(),
                })
                .collect();
            let unused = known.list.len().saturating_sub(MAX_POOLS);
            for (_, state) in known.list.iter_mut().take(unused) {
                if let State::Ready(_, stock) = state {
                    given_up.extend(stock.give_up());
                }
            }
            // Another profile may want some of the same kind.
            let stock = known.stock(&kind).filter(|_| ahead.count > 0);
            let fill = stock.is_some_and(|stock| stock.keep(ahead.count));
            if !build && !fill {
                drop(known);
                discard(given_up);
                return;
            }
            (build, given_up)
        };
        discard(given_up);
        if build
            && let Some(shelf) = &self.shelf
            && let Err(error) = shelf.wish(&kind)
        {
            log::warn!("pods boot as before: cannot ask for a template: {error}");
        }
        let templates = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(SETTLE).await;
            if build {
                templates.build(&kind, patience, ahead.count).await;
            }
            templates.fill(&kind, &ahead.configuration).await;
        });
    }

    async fn build(&self, kind: &Kind, patience: Duration, ahead: usize) {
        let made = match &self.shelf {
            None => build(kind, &self.cells, patience).await,
            Some(shelf) => wait_for(shelf, kind, &self.cells, patience).await,
        };
        let state = match made {
            Ok(image) => {
                let kib = image.ram_bytes() >> 10;
                log::info!(
                    "template of {} MiB, {} vCPUs, {} network cards: {kib} KiB",
                    kind.memory >> 20,
                    kind.cpus,
                    kind.cards.len()
                );
                let mut stock = Stock::default();
                stock.keep(ahead);
                State::Ready(image, stock)
            }
            Err(error) => {
                log::warn!(
                    "pods boot as before: no template: {}",
                    crate::error::chain(&error)
                );
                State::Failed(Instant::now())
            }
        };
        if let Some(place) = self.lock().state(kind) {
            *place = state;
        }
    }

    /// Makes the cells that are missing, one after the other.
    async fn fill(&self, kind: &Kind, configuration: &ConfigureRequest) {
        loop {
            let image = match self.lock().state(kind) {
                Some(State::Ready(image, stock)) => stock.wants_more().then(|| Arc::clone(image)),
                _ => None,
            };
            let Some(image) = image else { return };
            match pool::make(kind, image, &self.cells, configuration).await {
                Ok(vm) => {
                    log::debug!("cell {} was made ahead", vm.machine.cell().name());
                    let too_many = match self.lock().stock(kind) {
                        Some(stock) => stock.add(vm),
                        None => Some(vm),
                    };
                    discard(too_many);
                }
                Err(error) => {
                    log::warn!("no cell was made ahead: {}", crate::error::chain(&error));
                    if let Some(stock) = self.lock().stock(kind) {
                        stock.stop_filling();
                    }
                    return;
                }
            }
        }
    }

    /// Gives all up, at the process's end: nothing is made any more, and the cells made ahead are gone when this returns.
    pub async fn close(&self) {
        let list = {
            let mut known = self.lock();
            known.closed = true;
            std::mem::take(&mut known.list)
        };
        let cells = list.into_iter().flat_map(|(_, state)| match state {
            State::Ready(_, mut stock) => stock.give_up(),
            State::Building | State::Failed(_) => Vec::new(),
        });
        futures_util::future::join_all(cells.map(PodVm::discard)).await;
    }
}

/// Ends cells, off the caller's path.
fn discard(cells: impl IntoIterator<Item = PodVm>) {
    for vm in cells {
        tokio::spawn(vm.discard());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::config::Trust;
    use cloister_boot::x86_64::Description;
    use cloister_vmm::{Boot, Cell, CellConfig, CellHostConfig, KernelBoot};
    use std::os::unix::fs::FileExt;

    /// A kernel that is none, and an initramfs, in a folder of their own.
    struct Files(PathBuf);

    impl Files {
        fn new() -> Self {
            let folder =
                std::env::temp_dir().join(format!("cloister-template-{}", crate::ids::random_hex(4)));
            std::fs::create_dir(&folder).unwrap();
            std::fs::write(folder.join("initrd"), "initrd").unwrap();
            std::fs::write(folder.join("kernel"), elf()).unwrap();
            Self(folder)
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.join(name)
        }

        /// The kind of a pod of this namespace.
        fn kind(&self, trust: Trust, namespace: &str) -> Option<Kind> {
            self.kind_of(trust, namespace, |_| {})
        }

        fn kind_of(
            &self,
            trust: Trust,
            namespace: &str,
            adapt: impl FnOnce(&mut MachineConfig<'_>),
        ) -> Option<Kind> {
            let (kernel, initrd) = (self.path("kernel"), self.path("initrd"));
            let mut config = MachineConfig {
                name: "pod".to_owned(),
                cpus: 1,
                memory: 64 << 20,
                huge_pages: HugePages::No,
                dax: None,
                kernel: &kernel,
                initrd: &initrd,
                kernel_args: &[],
                nics: machine::unplugged(&[1]),
                room: Room {
                    cpus: 2,
                    memory: 1 << 30,
                    disks: 0,
                },
                origin: Origin::Boot,
            };
            adapt(&mut config);
            Kind::of(&config, &trust.domain(namespace)?)
        }
    }

    impl Drop for Files {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    /// The least that can be loaded: an ELF file of a page for 1 MiB, which halts.
    fn elf() -> Vec<u8> {
        let mut file = vec![0xf4; 0x2000];
        file[..0x1000].fill(0);
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &[0x7f, b'E', b'L', b'F', 2, 1, 1]);
        put(16, &[2, 0, 62, 0]);
        for (at, value) in [
            (24, 0x10_0000u64),
            (32, 64),
            (64 + 8, 0x1000),
            (64 + 24, 0x10_0000),
            (64 + 32, 0x1000),
            (64 + 40, 0x1000),
        ] {
            put(at, &value.to_le_bytes());
        }
        put(54, &[56, 0, 1, 0]);
        put(64, &[1]);
        file
    }

    fn templates() -> Templates {
        Templates::new(CellHost::new(CellHostConfig::default()).expect("this test needs /dev/kvm"))
    }

    /// An image of a VM that has not run.
    fn image(files: &Files, cells: &CellHost) -> Arc<Image> {
        let boot = Boot::Kernel(KernelBoot {
            kernel: File::open(files.path("kernel")).unwrap(),
            initrd: None,
            command_line: String::new(),
            description: Description::MpTable,
        });
        let mut config = CellConfig::new("template", boot);
        config.memory_mib = 4;
        let cell = Cell::create(config, cells).unwrap();
        let file = image::memory_file().unwrap();
        cell.write_image(&file).unwrap();
        image::seal(&file).unwrap();
        Image::open(file).unwrap()
    }

    fn put(templates: &Templates, kind: &Kind, image: &Arc<Image>) {
        let state = State::Ready(Arc::clone(image), Stock::default());
        templates.lock().list.push((kind.clone(), state));
    }

    #[test]
    fn only_those_who_trust_each_other_share_a_template() {
        let (files, templates) = (Files::new(), templates());
        let image = image(&files, &templates.cells);
        let of = |trust, namespace| files.kind(trust, namespace);
        let larger = |trust, namespace| {
            let grown = |config: &mut MachineConfig<'_>| config.memory *= 2;
            files.kind_of(trust, namespace, grown).unwrap()
        };
        assert_eq!(of(Trust::None, "one"), None, "no kind, no template");

        let one = of(Trust::Namespace, "one").unwrap();
        put(&templates, &one, &image);
        let other = of(Trust::Namespace, "other").unwrap();
        assert!(templates.find(&one).is_some());
        assert!(templates.find(&of(Trust::Namespace, "one").unwrap()).is_some());
        assert!(templates.find_smaller(&larger(Trust::Namespace, "one")).is_some());
        assert!(templates.find(&other).is_none());
        assert!(templates.take(&other).is_none());
        assert!(
            templates
                .find_smaller(&larger(Trust::Namespace, "other"))
                .is_none()
        );
        // Nor those of a profile that trusts the node, in a namespace of whatever name.
        for namespace in ["one", NODE] {
            let kind = of(Trust::Node, namespace).unwrap();
            assert!(templates.find(&kind).is_none(), "{namespace}");
            assert!(templates.find_smaller(&larger(Trust::Node, namespace)).is_none());
        }

        let node = of(Trust::Node, "one").unwrap();
        put(&templates, &node, &image);
        assert!(templates.find(&of(Trust::Node, "other").unwrap()).is_some());
        assert!(templates.find_smaller(&larger(Trust::Node, "other")).is_some());
        for namespace in ["other", NODE, "namespace one"] {
            let kind = of(Trust::Namespace, namespace).unwrap();
            assert!(templates.find(&kind).is_none(), "{namespace}");
        }
        // Workers clone from files: each kind has one of its own.
        let names = [&one, &other, &node].map(Shelf::name);
        assert!(names[0] != names[1] && names[1] != names[2] && names[0] != names[2]);
        assert_eq!(
            Shelf::name(&node),
            Shelf::name(&of(Trust::Node, "other").unwrap())
        );
    }

    #[tokio::test]
    async fn a_template_of_files_that_were_replaced_is_used_no_more_and_built_anew() {
        let (files, templates) = (Files::new(), templates());
        let image = image(&files, &templates.cells);
        let kind = || files.kind(Trust::Node, "").unwrap();
        let ahead = || Ahead {
            count: 0,
            configuration: ConfigureRequest::new(),
        };
        let is_building = |kind: &Kind| matches!(templates.lock().state(kind), Some(State::Building));
        // All that a package manager keeps when it replaces a file: name, size, the time of the last change.
        let keeping_its_time = |path: &Path, change: &dyn Fn(&Path)| {
            let before = std::fs::metadata(path).unwrap();
            change(path);
            let after = File::options().write(true).open(path).unwrap();
            after.set_modified(before.modified().unwrap()).unwrap();
            assert_eq!(after.metadata().unwrap().len(), before.len());
        };
        for name in ["kernel", "initrd"] {
            let rename: &dyn Fn(&Path) = &|path| {
                std::fs::copy(path, files.path("new")).unwrap();
                std::fs::rename(files.path("new"), path).unwrap();
            };
            let write: &dyn Fn(&Path) = &|path| {
                let file = File::options().write(true).open(path).unwrap();
                file.write_all_at(b"!", file.metadata().unwrap().len() - 1)
                    .unwrap();
            };
            for change in [rename, write] {
                let before = kind();
                templates.lock().list.clear();
                put(&templates, &before, &image);
                assert!(templates.find(&kind()).is_some());
                // The clock of a file system may be as coarse as this.
                tokio::time::sleep(Duration::from_millis(20)).await;
                keeping_its_time(&files.path(name), change);
                let after = kind();
                let grown = |config: &mut MachineConfig<'_>| config.memory *= 2;
                let larger = files.kind_of(Trust::Node, "", grown).unwrap();
                assert!(templates.find(&after).is_none(), "{name}");
                assert!(templates.take(&after).is_none(), "{name}");
                assert!(templates.find_smaller(&larger).is_none(), "{name}");
                assert_ne!(Shelf::name(&before), Shelf::name(&after));
                templates.want(after.clone(), Duration::from_secs(1), ahead());
                assert!(is_building(&after), "{name}");
                assert!(templates.lock().state(&before).is_none(), "the old one is kept");
            }
        }
        // Those of other files stay.
        let others = Kind {
            kernel: files.path("another kernel"),
            ..kind()
        };
        put(&templates, &others, &image);
        templates.want(kind(), Duration::from_secs(1), ahead());
        assert!(templates.find(&others).is_some());
    }

    #[test]
    fn what_cannot_be_cloned_or_is_configured_otherwise_has_no_template() {
        let files = Files::new();
        let of = |adapt: &dyn Fn(&mut MachineConfig<'_>)| files.kind_of(Trust::Node, "", adapt);
        let plain = of(&|_| {});
        assert!(plain.is_some() && of(&|_| {}) == plain);
        let others: [&dyn Fn(&mut MachineConfig<'_>); 7] = [
            &|config| config.cpus = 2,
            &|config| config.memory *= 2,
            &|config| config.huge_pages = HugePages::Transparent,
            &|config| config.dax = Some(1 << 30),
            &|config| config.nics = machine::unplugged(&[1, 1]),
            &|config| config.nics = machine::unplugged(&[2]),
            &|config| config.room.disks = 1,
        ];
        for other in others {
            assert_ne!(of(other), plain);
        }
        assert!(of(&|config| config.huge_pages = HugePages::Reserved).is_none());
        // A distribution's kernel.
        let mut bzimage = elf();
        bzimage[0x202..0x206].copy_from_slice(b"HdrS");
        std::fs::write(files.path("kernel"), bzimage).unwrap();
        assert!(of(&|_| {}).is_none());
        std::fs::remove_file(files.path("kernel")).unwrap();
        assert!(of(&|_| {}).is_none());
    }

    /// Makes an image one of another stepping, in a file that is sound.
    fn change_processor(path: &Path) {
        let mut bytes = std::fs::read(path).unwrap();
        let length = u32::from_le_bytes(*bytes[12..].first_chunk().unwrap());
        let end = 64 + usize::try_from(length).unwrap();
        // Of CPUID 1, behind its length: function, index, flags, and EAX.
        let leaf = [40, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let at = bytes[64..end].windows(leaf.len()).position(|part| part == leaf);
        bytes[64 + at.unwrap() + leaf.len()] ^= 1;
        let sum = bytes[64..end].iter().fold(!0u32, |crc, byte| {
            (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
                (crc >> 1) ^ (0xedb8_8320 * (crc & 1))
            })
        });
        bytes[16..20].copy_from_slice(&(!sum).to_le_bytes());
        std::fs::write(path, bytes).unwrap();
        Image::open(File::open(path).unwrap()).unwrap();
    }

    #[test]
    fn a_template_of_another_processor_is_passed_over() {
        let (files, templates) = (Files::new(), templates());
        let cells = &templates.cells;
        let image = image(&files, cells);
        let shelf = Shelf::of(&files.path("state"));
        let kind = files.kind(Trust::Node, "").unwrap();
        let name = shelf.put(&kind, &image).unwrap();
        assert!(shelf.find(&kind, cells).is_some());
        change_processor(&files.path("state/templates").join(name).with_extension("image"));
        assert!(shelf.find(&kind, cells).is_none());
        let grown = |config: &mut MachineConfig<'_>| config.memory *= 2;
        let larger = files.kind_of(Trust::Node, "", grown).unwrap();
        let workers = Templates::from_shelf(cells.clone(), shelf.clone());
        assert!(workers.find(&kind).is_none());
        assert!(workers.find_smaller(&larger).is_none());
        // Another one takes its place.
        shelf.put(&kind, &image).unwrap();
        assert!(workers.find(&kind).is_some());
        assert!(workers.find_smaller(&larger).is_some());
    }

    #[test]
    fn two_failures_in_a_row_are_too_many() {
        let (one, other) = (kind(1, 256 << 20, &[1]), kind(2, 512 << 20, &[2]));
        let mut known = Known::default();
        assert!(!known.doubt(&one) && !known.doubt(&other));
        known.trust(&one);
        assert!(!known.doubt(&one), "one came up in between");
        assert!(known.doubt(&other) && known.doubt(&one));
        assert!(!known.doubt(&one), "it is another one now");
        for memory in 0..100 {
            known.doubt(&kind(1, memory, &[]));
        }
        assert!(known.doubted.len() <= MAX_TEMPLATES);
    }

    fn kind(cpus: u8, memory: u64, cards: &[usize]) -> Kind {
        Kind {
            domain: NODE.to_owned(),
            kernel: "/kernel".into(),
            initrd: "/initrd".into(),
            files: [(0, 0, 0, 0, 0); 2],
            kernel_args: Vec::new(),
            cpus,
            memory,
            huge_pages: HugePages::No,
            dax: None,
            cards: cards.to_vec(),
            room: Room {
                cpus: 4,
                memory: 1 << 30,
                disks: 1,
            },
        }
    }

    #[test]
    fn a_clone_grows_into_what_there_is_room_for() {
        let small = kind(1, 256 << 20, &[1]);
        for larger in [
            kind(1, 256 << 20, &[1]),
            kind(4, 256 << 20, &[4]),
            kind(1, 1 << 30, &[1]),
        ] {
            assert!(small.grows_into(&larger), "{larger:?}");
        }
        let others = Kind {
            domain: "namespace".to_owned(),
            ..kind(2, 1 << 30, &[2])
        };
        for other in [
            kind(5, 256 << 20, &[5]),
            kind(1, (1 << 30) + 1, &[1]),
            kind(1, 128 << 20, &[1]),
            kind(2, 512 << 20, &[1, 1]),
            kind(2, 512 << 20, &[]),
            others,
        ] {
            assert!(!small.grows_into(&other), "{other:?}");
        }
        // Where there is no room, and downwards.
        let large = Kind {
            room: Room::default(),
            ..kind(2, 512 << 20, &[2])
        };
        let none = |cpus, memory| Kind {
            room: Room::default(),
            ..kind(cpus, memory, &[2])
        };
        assert!(!large.grows_into(&none(3, 512 << 20)));
        assert!(!large.grows_into(&none(2, 513 << 20)));
        assert!(!large.grows_into(&none(1, 512 << 20)));
    }
}
