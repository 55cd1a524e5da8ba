// SPDX-License-Identifier: Apache-2.0
//! A pod's VM: a cell with the devices a pod needs, and its ways in and out for asynchronous code.

use super::guest::{Guest, ShareOptions};
use crate::net::mac_text;
use cloister_devices::block::{BlockConfig, CacheMode, DiskKind};
use cloister_devices::fs::{AttachOptions, CachePolicy, FsConfig, FsHandle, Kept};
use cloister_devices::mem::MemHandle;
use cloister_devices::net::{NetBackend, NetConfig};
use cloister_devices::vsock::{VsockConfig, VsockHandle};
use cloister_protocol::SHARED_TAG;
use cloister_vmm::config::BASE_COMMAND_LINE;
use cloister_vmm::image::Image;
use cloister_vmm::{
    AttachError, Boot, Cell, CellConfig, CellHost, CellState, DeviceConfig, DeviceHandle, HugePages,
    KernelBoot, PlugError, SpareConfig, StopReason,
};
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch};

/// Context id of every guest: each has a vsock of its own, so they need not differ.
const GUEST_CID: u64 = 3;
/// Names that begin so are roots of containers, which nobody but their guest changes.
const ROOT_PREFIX: &str = "rootfs-";

/// What a VM is to be.
#[derive(Debug)]
pub struct MachineConfig<'a> {
    /// In messages and thread names.
    pub name: String,
    /// vCPUs.
    pub cpus: u8,
    /// Bytes of RAM.
    pub memory: u64,
    /// Pages that back it.
    pub huge_pages: HugePages,
    /// Bytes of the window through which the guest maps files of its containers' roots; none without one.
    pub dax: Option<u64>,
    /// Guest kernel.
    pub kernel: &'a Path,
    /// Initramfs.
    pub initrd: &'a Path,
    /// More words for the kernel.
    pub kernel_args: &'a [String],
    /// Network cards.
    pub nics: Vec<NetConfig>,
    /// What it can be given while it runs.
    pub room: Room,
    /// How it comes to run.
    pub origin: Origin,
}

/// How a VM comes to run.
#[derive(Clone, Debug, Default)]
pub enum Origin {
    /// It boots.
    #[default]
    Boot,
    /// It is a clone of a template with network cards like its own, and otherwise configured alike.
    Clone(Arc<Image>),
    /// It goes on from where another one was saved, with the same devices and what that had attached.
    Restore(Arc<Image>, Arc<Vec<Shared>>),
}

/// Something in the shared directory.
#[derive(Debug)]
pub struct Shared {
    /// Its name there.
    pub name: String,
    /// What it is.
    pub tree: OwnedFd,
    /// How it is shared.
    pub options: ShareOptions,
}

/// What a VM can be given while it runs, beyond what it starts with. Without any it costs nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Room {
    /// vCPUs in all. Each costs the guest some 200 KiB of its RAM; no more than it starts with if this is less.
    pub cpus: u8,
    /// Bytes of RAM in all; no more than it starts with if this is less. Not with reserved huge pages.
    pub memory: u64,
    /// Disks.
    pub disks: u8,
}

/// A VM that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Kernel or initramfs.
    #[error("cannot open the {what} {path}; give another one with {flag}, or build ours with `make guest`")]
    File {
        /// "guest kernel" or "initramfs".
        what: &'static str,
        /// Where it should be.
        path: String,
        /// The flag that names another one.
        flag: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The VMM refused.
    #[error("cannot create the virtual machine")]
    Create(#[from] cloister_vmm::CreateError),
    /// A device is not there.
    #[error("the virtual machine has no {0} device")]
    Device(&'static str),
    /// It did not start, or did not stand still.
    #[error("cannot start the virtual machine")]
    Start(#[from] cloister_vmm::LifecycleError),
    /// Its network.
    #[error("cannot connect the virtual machine to its network")]
    Plug(#[from] PlugError),
    /// The host is short of something.
    #[error("cannot watch the virtual machine")]
    Io(#[from] io::Error),
}

/// A running VM.
pub struct Machine {
    cell: Arc<Cell>,
    fs: FsHandle,
    vsock: VsockHandle,
    mem: Option<MemHandle>,
    boots: bool,
    /// Of a clone: the hardware addresses of its network cards, in their order, once they are connected.
    macs: OnceLock<Vec<[u8; 6]>>,
    /// Places of the network cards among its devices.
    cards: Vec<usize>,
    /// What is attached, kept open: a mount that exists only as a descriptor goes with its last one.
    attached: Mutex<HashMap<String, OwnedFd>>,
    dead: watch::Receiver<Option<StopReason>>,
}

impl Machine {
    /// Creates and starts it. To be called in a runtime.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn start(config: MachineConfig<'_>, host: &CellHost) -> Result<Arc<Self>, Error> {
        let fs = FsConfig {
            tag: SHARED_TAG.to_owned(),
            request_queues: config.cpus.into(),
            ..FsConfig::default()
        };
        let boot = match &config.origin {
            Origin::Clone(image) | Origin::Restore(image, _) => Boot::Clone {
                image: Arc::clone(image),
            },
            Origin::Boot => kernel_boot(&config)?,
        };
        let boots = matches!(config.origin, Origin::Boot);
        let mut attached = HashMap::new();
        let mut trees = Vec::new();
        if let Origin::Restore(_, shared) = &config.origin {
            for one in shared.iter() {
                attached.insert(one.name.clone(), one.tree.try_clone()?);
                let options = attach_options(&one.name, one.options);
                trees.push((one.name.clone(), one.tree.try_clone()?, options));
            }
        }
        let (memory, more) = (memory_mib(&config), pluggable_mib(&config));
        let mut cell = CellConfig::new(config.name, boot);
        cell.vcpus = config.cpus;
        cell.max_vcpus = config.room.cpus;
        cell.memory_mib = memory;
        cell.huge_pages = config.huge_pages;
        cell.devices.push(DeviceConfig::Fs {
            config: fs,
            dax_window: config.dax,
            attached: trees,
        });
        cell.devices
            .push(DeviceConfig::Vsock(VsockConfig::new(GUEST_CID)));
        let (mut cards, mut macs) = (Vec::new(), Vec::new());
        for nic in config.nics {
            cards.push(cell.devices.len());
            if !matches!(nic.backend, NetBackend::Unplugged { .. }) {
                macs.push(nic.mac);
            }
            cell.devices.push(DeviceConfig::Net(nic));
        }
        cell.devices.push(DeviceConfig::Rng);
        cell.devices.push(DeviceConfig::Balloon { deflate_on_oom: true });
        if config
            .kernel_args
            .iter()
            .any(|word| word.starts_with("console=hvc0"))
        {
            // Its output is kept for reports like the serial port's.
            cell.devices.push(DeviceConfig::Console {
                input: None,
                output: None,
                size: None,
            });
        }
        if more > 0 {
            cell.devices.push(DeviceConfig::Mem { max_mib: more });
        }
        cell.devices
            .extend((0..config.room.disks).map(|_| DeviceConfig::Slot));
        let cell = Arc::new(Cell::create(cell, host)?);
        let (mut fs, mut vsock, mut mem) = (None, None, None);
        for device in cell.devices() {
            match device {
                DeviceHandle::Fs(handle) => fs = Some(handle.clone()),
                DeviceHandle::Vsock(handle) => vsock = Some(handle.clone()),
                DeviceHandle::Mem(handle) => mem = Some(handle.clone()),
                _ => {}
            }
        }
        let fs = fs.ok_or(Error::Device("file system"))?;
        let vsock = vsock.ok_or(Error::Device("vsock"))?;
        let dead = watch_end(&cell)?;
        cell.start()?;
        Ok(Arc::new(Self {
            cell,
            fs,
            vsock,
            mem,
            boots,
            macs: match config.origin {
                Origin::Clone(_) if macs.len() == cards.len() => OnceLock::from(macs),
                _ => OnceLock::new(),
            },
            cards,
            attached: Mutex::new(attached),
            dead,
        }))
    }

    /// Whether it booted, and was not cloned or restored.
    pub fn boots(&self) -> bool {
        self.boots
    }

    /// The hardware address that a clone's guest knows the network card by that has this one, until it is told so.
    pub fn former_mac(&self, mac: &str) -> Option<String> {
        let macs = self.macs.get()?;
        let card = macs.iter().position(|one| mac_text(one) == mac)?;
        Some(mac_text(&unplugged_mac(card)))
    }

    /// Has it stand still.
    ///
    /// # Errors
    /// It has ended.
    pub fn pause(&self) -> Result<(), Error> {
        Ok(self.cell.pause()?)
    }

    /// Has one that stands still go on, connected to its networks: one for each of its cards, which had none.
    ///
    /// # Errors
    /// It has ended, or its cards are others. It is to be ended then.
    pub fn resume_with(&self, nics: Vec<NetConfig>) -> Result<(), Error> {
        if nics.len() != self.cards.len() {
            return Err(Error::Device("fitting network"));
        }
        let macs = nics.iter().map(|nic| nic.mac).collect();
        for (position, nic) in self.cards.iter().zip(nics) {
            self.cell.plug(*position, nic)?;
        }
        // They are plugged in once.
        let _ = self.macs.set(macs);
        Ok(self.cell.resume()?)
    }

    /// Becomes the reason when the VM has ended.
    pub fn dead(&self) -> watch::Receiver<Option<StopReason>> {
        self.dead.clone()
    }

    /// The guest's last words, made fit for a terminal.
    pub fn last_words(&self) -> String {
        let bytes = self.cell.console_tail().bytes();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<String> = text
            .lines()
            .rev()
            .take(20)
            .map(super::super::cli::table::printable)
            .collect();
        lines
            .into_iter()
            .rev()
            .map(|line| format!("  | {}\n", line.trim_end_matches("\\r")))
            .collect()
    }

    /// Has the host take back the memory of the initial RAM disk, which the guest has said it does not use.
    pub fn discard_initrd(&self) {
        match self.cell.discard_initrd() {
            Ok(bytes) => log::debug!("{bytes} bytes of initial RAM disk were given back"),
            Err(error) => log::warn!("the initial RAM disk keeps its memory: {error}"),
        }
    }

    /// Gives copies to the files of containers' roots that are open and deleted, for a snapshot, until the answer is dropped.
    /// For a VM that is paused.
    ///
    /// # Errors
    /// A file cannot be read, or the disk is full.
    pub fn keep_deleted(&self) -> io::Result<Kept> {
        self.fs.keep_deleted(|name| name.starts_with(ROOT_PREFIX))
    }

    /// The VM itself.
    pub fn cell(&self) -> &Arc<Cell> {
        &self.cell
    }

    /// Ends the VM as it is.
    pub fn stop(&self) {
        self.cell.stop();
    }

    /// Waits until threads, descriptors and memory are gone.
    pub async fn taken_down(self: Arc<Self>) {
        let cell = Arc::clone(&self.cell);
        let _ =
            tokio::task::spawn_blocking(move || cell.wait_taken_down(Some(Duration::from_secs(10)))).await;
    }

    /// The guest's connections to a port of the host, as long as the VM lives.
    ///
    /// # Errors
    /// The port is taken.
    pub fn listen(&self, port: u32) -> io::Result<mpsc::Receiver<UnixStream>> {
        let listener = self.vsock.listen(port)?;
        listener.set_nonblocking(true)?;
        // SAFETY: the listener owns its descriptor, answers the same one each time, and closes it when dropped.
        let listener = unsafe { AsyncFd::register_with_interest(listener, Interest::READABLE) }?;
        let (sender, receiver) = mpsc::channel(64);
        tokio::spawn(async move {
            loop {
                let Ok(mut ready) = listener.readable().await else {
                    break;
                };
                match ready.try_io(|listener| listener.get_ref().accept()) {
                    Ok(Ok((stream, _))) => {
                        if sender.send(stream).await.is_err() {
                            break;
                        }
                    }
                    Ok(Err(error)) if error.kind() == io::ErrorKind::NotConnected => break,
                    Ok(Err(error)) => {
                        log::warn!("vsock port {port}: {error}");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                    // Not ready after all.
                    Err(_) => {}
                }
            }
        });
        Ok(receiver)
    }
}

impl Guest for Machine {
    fn connect(&self, port: u32) -> io::Result<UnixStream> {
        self.vsock.connect(port)
    }

    fn attach(&self, name: &str, tree: OwnedFd, share: ShareOptions) -> io::Result<()> {
        self.fs
            .attach(name, &tree, attach_options(name, share))
            .map_err(|e| io::Error::other(crate::error::chain(&e)))?;
        self.attached
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(name.to_owned(), tree);
        Ok(())
    }

    fn detach(&self, name: &str) -> io::Result<()> {
        let detached = self.fs.detach(name).map_err(io::Error::other);
        self.attached
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(name);
        detached
    }

    fn note_container(&self) {
        self.cell().note_container();
    }

    fn give_up(&self, why: String) {
        self.cell.give_up(why);
    }

    fn stands_still(&self) -> bool {
        self.cell.state() == CellState::Paused
    }

    fn memory_used(&self) -> Option<u64> {
        self.cell.resident_ram()
    }

    fn provide_vcpus(&self, count: u8) -> io::Result<u8> {
        self.cell
            .provide_vcpus(count)
            .map_err(|e| io::Error::other(crate::error::chain(&e)))
    }

    fn request_memory(&self, bytes: u64) -> u64 {
        self.mem.as_ref().map_or(0, |mem| mem.set_requested(bytes))
    }

    fn wait_memory(&self, patience: Duration) -> u64 {
        self.mem.as_ref().map_or(0, |mem| {
            let plugged = mem.plugged();
            // It may still be letting go of what it has too much.
            if plugged >= mem.requested() {
                plugged
            } else {
                mem.wait(patience)
            }
        })
    }

    fn attach_disk(&self, disk: OwnedFd, read_only: bool) -> io::Result<u32> {
        let config = BlockConfig {
            fd: disk,
            kind: DiskKind::BlockDevice,
            read_only,
            cache: CacheMode::default(),
            serial: String::new(),
            queues: 1,
        };
        let attached = self.cell.attach_block(config);
        let (slot, _) = attached.map_err(|e| io::Error::other(not_attached(&e)))?;
        u32::try_from(slot).map_err(io::Error::other)
    }

    fn detach_disk(&self, slot: u32) -> io::Result<()> {
        let slot = usize::try_from(slot).map_err(io::Error::other)?;
        self.cell
            .detach_block(slot)
            .map_err(|e| io::Error::other(crate::error::chain(&e)))
    }
}

/// Why a disk was not attached, in the words of the configuration.
fn not_attached(error: &AttachError) -> String {
    match error {
        AttachError::NoneFree => {
            "the pod has as many as the block_volumes of its sandboxer allow at once".to_owned()
        }
        error => crate::error::chain(error),
    }
}

fn attach_options(name: &str, share: ShareOptions) -> AttachOptions {
    let is_root = name.starts_with(ROOT_PREFIX);
    AttachOptions {
        read_only: share.read_only,
        private_mount: !share.follows_mounts,
        cache: if is_root {
            CachePolicy::Always
        } else {
            CachePolicy::Auto
        },
        // Volumes are others' too, who could cut a mapped file short, which stops this guest.
        dax: is_root,
        ..AttachOptions::default()
    }
}

/// Network cards that are not connected yet, each with so many queue pairs.
pub fn unplugged(pairs: &[usize]) -> Vec<NetConfig> {
    let card = |(card, pairs): (usize, &usize)| NetConfig {
        backend: NetBackend::Unplugged { pairs: *pairs },
        mac: unplugged_mac(card),
        mtu: None,
    };
    pairs.iter().enumerate().map(card).collect()
}

/// By which a template's guest knows its cards: locally administered, never on any network.
fn unplugged_mac(card: usize) -> [u8; 6] {
    // There are not as many places.
    [0x02, 0xc0, 0, 0, 0, u8::try_from(card).unwrap_or(u8::MAX)]
}

fn memory_mib(config: &MachineConfig<'_>) -> u64 {
    config.memory.div_ceil(1 << 20)
}

/// What a running VM can be given.
fn pluggable_mib(config: &MachineConfig<'_>) -> u64 {
    match config.huge_pages {
        HugePages::Reserved => 0,
        HugePages::No | HugePages::Transparent => config.room.memory.saturating_sub(config.memory) >> 20,
    }
}

/// Spares for machines that boot like this one.
///
/// # Errors
/// The kernel or the initramfs cannot be opened.
pub fn spares(config: &MachineConfig<'_>, count: usize) -> io::Result<SpareConfig> {
    Ok(SpareConfig {
        kernel: File::open(config.kernel)?,
        initrd: Some(File::open(config.initrd)?),
        memory_mib: memory_mib(config),
        pluggable_mib: pluggable_mib(config),
        huge_pages: config.huge_pages,
        count,
    })
}

/// What a VM boots.
fn kernel_boot(config: &MachineConfig<'_>) -> Result<Boot, Error> {
    let open = |what, path: &Path, flag| {
        File::open(path).map_err(|source| Error::File {
            what,
            path: path.display().to_string(),
            flag,
            source,
        })
    };
    let kernel = open("guest kernel", config.kernel, "--kernel")?;
    let initrd = open("initramfs", config.initrd, "--initrd")?;
    let description = cloister_boot::x86_64::Description::of(&kernel);
    let mut command_line = BASE_COMMAND_LINE.to_owned();
    // The serial port needs no driver to be probed: the fastest for few words.
    if !config.kernel_args.iter().any(|word| word.starts_with("console=")) {
        command_line.push_str(" console=ttyS0");
    }
    for word in config.kernel_args {
        command_line.push(' ');
        command_line.push_str(word);
    }
    Ok(Boot::Kernel(KernelBoot {
        kernel,
        initrd: Some(initrd),
        command_line,
        description,
    }))
}

fn watch_end(cell: &Arc<Cell>) -> io::Result<watch::Receiver<Option<StopReason>>> {
    let (sender, receiver) = watch::channel(None);
    let event = cell.stopped_event().try_clone_to_owned()?;
    // SAFETY: an OwnedFd is the same open descriptor until it is dropped.
    let event = unsafe { AsyncFd::register_with_interest(event, Interest::READABLE) }?;
    let weak = Arc::downgrade(cell);
    tokio::spawn(async move {
        if event.readable().await.is_ok() {
            let reason = weak
                .upgrade()
                .and_then(|cell| cell.wait(Some(Duration::from_secs(1))));
            sender.send_replace(Some(reason.unwrap_or(StopReason::Requested)));
        }
    });
    Ok(receiver)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_too_many_disks_hears_which_key_says_so() {
        assert!(not_attached(&AttachError::NoneFree).contains("block_volumes"));
        let gone = AttachError::Stopped;
        assert_eq!(not_attached(&gone), gone.to_string());
    }
}
