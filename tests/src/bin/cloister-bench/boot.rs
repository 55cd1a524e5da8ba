// SPDX-License-Identifier: Apache-2.0
//! `boot.*`: from nothing to the agent's ready message (the first bytes on vsock port 1025), against QEMU and the VMMs that
//! the user has given (`--peer`).
//!
//! A host that runs many pods keeps a spare ([`SpareConfig`]) and refills it while nothing is asked of it: the headline
//! figure is measured like that, the refilling outside of the clock. `*_cold` is the same without a spare. A peer that cannot
//! boot our kernel is measured against a cell with the peer's. Times of an emulated host are those of an emulator; where it
//! counts instructions (`ci/kvm-host --icount`), [`count`] does.

use std::fs::{self, File};
use std::io::{self, Read};
use std::time::{Duration, Instant};

use cloister_vmm::config::{BASE_COMMAND_LINE, NO_SERIAL};
use cloister_vmm::{Cell, CellHost, CellHostConfig, CellStats, HugePages, SpareConfig};

use crate::Context;
use crate::clone::float;
use crate::guest_mode::GuestMode;
use crate::ours::{Ours, chain};
use crate::peers::{Guest, GuestFiles, READY_PORT, Vmm, qemu, seconds_to_ready};
use crate::report::{Figure, median};

const MEMORY_MIB: u32 = 256;
const PAIRS: u32 = 10;

/// What one of our boots cost.
struct Boot {
    seconds: f64,
    to_this_program: CellStats,
    all: u64,
    /// CPU time of the vCPU's thread: guest, and KVM's work for it.
    vcpu_seconds: f64,
    /// The number of that thread.
    thread: u32,
    cell: Cell,
}

/// CPU time of the thread of this name in seconds, exact where the clock is.
pub fn thread_seconds(name: &str) -> io::Result<f64> {
    let stat = fs::read_to_string(format!("/proc/self/task/{}/schedstat", thread_id(name)?))?;
    let ns = stat.split(' ').next().and_then(|ns| ns.parse().ok()).unwrap_or(0);
    Ok(Duration::from_nanos(ns).as_secs_f64())
}

/// The number of the thread of this name.
pub fn thread_id(name: &str) -> io::Result<u32> {
    for task in fs::read_dir("/proc/self/task")? {
        let task = task?;
        // A thread that ends while it is looked at is not the one.
        if fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim_end() == name) {
            let id = task.file_name().to_str().and_then(|id| id.parse().ok());
            return id.ok_or_else(|| io::Error::other("a thread without a number"));
        }
    }
    Err(io::Error::other(format!("no thread {name}")))
}

/// Waits until the cell is gone.
pub fn end(cell: &Cell) {
    cell.stop();
    cell.wait_taken_down(Some(Duration::from_secs(10)));
}

/// All exits of a cell, as KVM counts them.
pub fn kvm_exits(cell: &Cell) -> io::Result<u64> {
    let stats = cell.kvm_stats().map_err(chain)?;
    Ok(stats
        .iter()
        .flatten()
        .filter(|stat| stat.name == "exits")
        .map(|stat| stat.value)
        .sum())
}

/// Has `host` keep a spare of what [`ours`] boots.
fn keep_spare(host: &CellHost, files: &GuestFiles, huge_pages: HugePages) -> io::Result<()> {
    let config = SpareConfig {
        kernel: File::open(&files.kernel)?,
        initrd: Some(File::open(&files.initrd)?),
        memory_mib: MEMORY_MIB.into(),
        pluggable_mib: 0,
        huge_pages,
        count: 1,
    };
    host.keep_spares(config).map_err(chain)
}

/// KiB of guest memory that the host has had to supply.
fn ram_kib(cell: &Cell) -> io::Result<f64> {
    let memory = cell
        .memory_file()
        .ok_or_else(|| io::Error::other("the cell has no memory any more"))?;
    let blocks = rustix::fs::fstat(&memory)?.st_blocks;
    Ok(f64::from(u32::try_from(blocks / 2).unwrap_or(u32::MAX)))
}

fn ours(host: &CellHost, files: &GuestFiles, cid: u32, huge_pages: HugePages) -> io::Result<Boot> {
    let start = Instant::now();
    let config = Ours {
        kernel: &files.kernel,
        initrd: &files.initrd,
        memory_mib: MEMORY_MIB,
        cmdline: "",
        console: None,
        devices: Vec::new(),
        cid,
        huge_pages,
    };
    let (cell, vsock) = config.create(host)?;
    let listener = vsock.listen(READY_PORT)?;
    cell.start().map_err(chain)?;
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    stream.read_exact(&mut [0])?;
    let seconds = start.elapsed().as_secs_f64();
    // A thread's name is the cell's first letters; see above for `cid`.
    let thread = format!("{}:vcpu0", &cell.name()[..8]);
    let (vcpu_seconds, thread) = (thread_seconds(&thread)?, thread_id(&thread)?);
    cell.note_ready();
    Ok(Boot {
        seconds,
        vcpu_seconds,
        thread,
        to_this_program: cell.stats(),
        all: kvm_exits(&cell)?,
        cell,
    })
}

fn theirs(vmm: &dyn Vmm, files: &GuestFiles, cid: u32) -> io::Result<f64> {
    let cmdline = format!("{BASE_COMMAND_LINE} {NO_SERIAL}");
    seconds_to_ready(
        vmm,
        &Guest {
            files,
            memory_mib: MEMORY_MIB,
            cmdline: &cmdline,
            cid,
        },
    )
}

/// Our kernel, and the initramfs with the agent.
fn our_files(context: &Context) -> GuestFiles {
    GuestFiles {
        kernel: context.kernel.clone(),
        initrd: context.initrd.clone(),
    }
}

/// Figures of a peer are named after it; QEMU's times have always had the shorter name.
fn short(label: &str) -> &str {
    if label == qemu::LABEL { "qemu" } else { label }
}

/// What both sides ran, for figures' conditions.
fn conditions(vmm: &dyn Vmm) -> String {
    let guest = match vmm.files() {
        None => "our kernel and initramfs".to_owned(),
        Some(files) => format!(
            "both boot {} and {}",
            files.kernel.display(),
            files.initrd.display()
        ),
    };
    format!("1 vCPU, {MEMORY_MIB} MiB, {guest}, no serial port, vsock only, transparent huge pages")
}

/// Times of our boots with a spare and without, and of a peer's, in turn: `boot.ready_vs_*`. Answers the last of ours.
fn against(context: &mut Context, host: &CellHost, vmm: &dyn Vmm) -> io::Result<Boot> {
    let files = vmm.files().cloned().unwrap_or_else(|| our_files(context));
    let pages = HugePages::Transparent;
    keep_spare(host, &files, pages)?;
    // Says what a boot touches.
    let mut boot = ours(host, &files, 100, pages)?;
    end(&boot.cell);
    let (mut our_times, mut cold_times, mut their_times) = (Vec::new(), Vec::new(), Vec::new());
    for pair in 0..PAIRS {
        host.refill_spares().map_err(chain)?;
        boot = ours(host, &files, 110 + pair, pages)?;
        our_times.push(boot.seconds);
        end(&boot.cell);
        their_times.push(theirs(vmm, &files, 200 + pair)?);
        boot = ours(host, &files, 140 + pair, pages)?;
        cold_times.push(boot.seconds);
        end(&boot.cell);
    }
    let in_turn = format!(
        "{}; medians of {PAIRS}, in turn; peer: {}",
        conditions(vmm),
        vmm.version()
    );
    let (our, cold, their) = (median(&our_times), median(&cold_times), median(&their_times));
    let label = vmm.label();
    // The time of ours by itself is told once.
    let is_first = label == qemu::LABEL;
    let mut add = |name: String, value: f64, unit, peer: &str, goal, more: &str| {
        context.report.add(Figure {
            name,
            value,
            unit,
            peer: peer.into(),
            conditions: format!("{in_turn}{more}"),
            goal,
        })
    };
    let peer = vmm.title();
    add(
        format!("boot.ready_vs_{label}"),
        our / their,
        "ratio",
        peer,
        if is_first { "<= 0.45" } else { "" },
        "; the host keeps one spare, refilled between the boots",
    )?;
    add(
        format!("boot.ready_cold_vs_{label}"),
        cold / their,
        "ratio",
        peer,
        "",
        "; no spare",
    )?;
    if is_first {
        add("boot.ready".into(), our * 1e3, "ms", "", "", "; one spare")?;
        add("boot.ready_cold".into(), cold * 1e3, "ms", "", "", "; no spare")?;
    }
    let name = format!("boot.ready_{}", short(label));
    add(name, their * 1e3, "ms", peer, "", "")?;
    Ok(boot)
}

/// Times, and counts of exits and pages. A peer that fails does not take the others' figures with it.
pub fn run(context: &mut Context) -> io::Result<()> {
    let host = CellHost::new(CellHostConfig::default()).map_err(chain)?;
    let vmms = std::mem::take(&mut context.peers.vmms);
    let mut vmms = vmms.iter().map(AsRef::as_ref);
    let Some(first) = vmms.next() else { return Ok(()) };
    let boot = against(context, &host, first)?;
    counts(context, &host, &boot, &conditions(first))?;
    for vmm in vmms {
        if let Err(error) = against(context, &host, vmm) {
            context
                .report
                .fail(&format!("boot.ready_vs_{}", vmm.label()), &error);
        }
    }
    Ok(())
}

/// Exits and pages of a boot of ours.
fn counts(context: &mut Context, host: &CellHost, boot: &Boot, conditions: &str) -> io::Result<()> {
    let small_pages = ours(host, &our_files(context), 199, HugePages::No)?;
    let given_back = small_pages.cell.discard_initrd()?;
    let mut add = |name: &str, value: f64, unit, goal, conditions: &str| {
        context
            .report
            .add(Figure::ours(name, value, unit, goal, conditions))
    };
    let exits = f64::from(u32::try_from(boot.all).unwrap_or(u32::MAX));
    add(
        "boot.exits",
        exits,
        "exits",
        "<= 1000",
        &format!("{conditions}; KVM's own count, handled in the kernel or not"),
    )?;
    let stats = boot.to_this_program;
    let exits = f64::from(u32::try_from(stats.total()).unwrap_or(u32::MAX));
    add(
        "boot.exits_to_vmm",
        exits,
        "exits",
        "",
        &format!("{conditions}; {stats:?}"),
    )?;
    let exits = f64::from(u32::try_from(small_pages.all).unwrap_or(u32::MAX));
    let own = format!("{conditions}, but no huge pages: one exit per page that the guest touches first");
    add("boot.exits_4k_pages", exits, "exits", "", &own)?;
    let own = format!(
        "{conditions}; pages of the guest's memory file when it is ready, no huge pages; {} KiB of initramfs have been \
         given back",
        given_back >> 10
    );
    add(
        "guest.ram_used_kib",
        ram_kib(&small_pages.cell)?,
        "KiB",
        "<= 32768",
        &own,
    )?;
    end(&small_pages.cell);
    Ok(())
}

/// Instructions, where a nanosecond is one: `ci/kvm-host --icount`. The same each time, whatever else the machine does.
pub fn count(context: &mut Context) -> io::Result<()> {
    let host = CellHost::new(CellHostConfig::default()).map_err(chain)?;
    let vmms = std::mem::take(&mut context.peers.vmms);
    for vmm in vmms.iter().map(AsRef::as_ref) {
        if let Err(error) = count_against(context, &host, vmm) {
            let name = format!("boot.instructions_vs_{}", vmm.label());
            context.report.fail(&name, &error);
        }
    }
    Ok(())
}

fn count_against(context: &mut Context, host: &CellHost, vmm: &dyn Vmm) -> io::Result<()> {
    let files = vmm.files().cloned().unwrap_or_else(|| our_files(context));
    let pages = HugePages::Transparent;
    keep_spare(host, &files, pages)?;
    // Warms the page cache for all three, and says what a boot touches.
    end(&ours(host, &files, 100, pages)?.cell);
    theirs(vmm, &files, 101)?;
    let cold = ours(host, &files, 102, pages)?;
    end(&cold.cell);
    host.refill_spares().map_err(chain)?;
    let spare = ours(host, &files, 103, pages)?;
    end(&spare.cell);
    let their = theirs(vmm, &files, 104)?;
    let (label, peer) = (vmm.label(), vmm.title());
    let how = format!(
        "{}; peer: {}; 1 ns of the host's clock is one instruction",
        conditions(vmm),
        vmm.version()
    );
    let all = format!("{how}; all instructions of the host and the guest from the call to the ready message");
    let mut figures = Vec::new();
    // Ours by itself is told once.
    if label == qemu::LABEL {
        let trace = GuestMode::start()?;
        let traced = ours(host, &files, 105, pages)?;
        let guest_mode = trace.ticks(traced.thread)?;
        end(&traced.cell);
        figures.extend([
            (
                "boot.guest_instructions".to_owned(),
                float(guest_mode),
                "",
                format!("{how}; between KVM's trace points kvm_entry and kvm_exit"),
            ),
            (
                "boot.vcpu_instructions".to_owned(),
                cold.vcpu_seconds * 1e9,
                "",
                format!("{how}; CPU time of the vCPU's thread: the guest, and KVM's work for it"),
            ),
            (
                "boot.instructions".into(),
                spare.seconds * 1e9,
                "",
                format!("{all}; one spare"),
            ),
            (
                "boot.instructions_cold".into(),
                cold.seconds * 1e9,
                "",
                format!("{all}; no spare"),
            ),
        ]);
    }
    let name = format!("boot.instructions_{}", short(label));
    figures.push((name, their * 1e9, peer, all.clone()));
    for (name, value, peer, conditions) in figures {
        context.report.add(Figure {
            name,
            value,
            unit: "instructions",
            peer: peer.into(),
            conditions,
            goal: "",
        })?;
    }
    for (how, our, goal, conditions) in [
        ("", spare.seconds, "<= 0.45", "one spare"),
        ("_cold", cold.seconds, "", "no spare"),
    ] {
        context.report.add(Figure {
            name: format!("boot.instructions{how}_vs_{label}"),
            value: our / their,
            unit: "ratio",
            peer: peer.into(),
            conditions: format!("{all}; {conditions}"),
            goal: if label == qemu::LABEL { goal } else { "" },
        })?;
    }
    Ok(())
}
