// SPDX-License-Identifier: Apache-2.0
//! `boot.*`: from nothing to the agent's ready message (the first bytes on vsock port 1025), against QEMU.
//!
//! A host that runs many pods keeps a spare ([`SpareConfig`]) and refills it while nothing is asked of it: the headline
//! figure is measured like that, the refilling outside of the clock. `*_cold` is the same without a spare. Times of an
//! emulated host are those of an emulator; where it counts instructions (`ci/kvm-host --icount`), [`count`] does.

use std::fs::{self, File};
use std::io::{self, Read};
use std::time::{Duration, Instant};

use cloister_vmm::{Cell, CellHost, CellHostConfig, CellStats, HugePages, SpareConfig};

use crate::Context;
use crate::ours::{Ours, chain};
use crate::qemu::Qemu;
use crate::report::{Figure, median};
use crate::vsock_server;

const READY_PORT: u32 = 1025;
const MEMORY_MIB: u32 = 256;
const PAIRS: u32 = 10;

/// What one of our boots cost.
struct Boot {
    seconds: f64,
    to_this_program: CellStats,
    all: u64,
    /// CPU time of the vCPU's thread: guest, and KVM's work for it.
    vcpu_seconds: f64,
    cell: Cell,
}

/// CPU time of the thread of this name in seconds, exact where the clock is.
pub fn thread_seconds(name: &str) -> io::Result<f64> {
    for task in fs::read_dir("/proc/self/task")? {
        let task = task?.path();
        // A thread that ends while it is looked at is not the one.
        if fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim_end() == name) {
            let stat = fs::read_to_string(task.join("schedstat"))?;
            let ns = stat.split(' ').next().and_then(|ns| ns.parse().ok()).unwrap_or(0);
            return Ok(Duration::from_nanos(ns).as_secs_f64());
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
fn keep_spare(context: &Context, host: &CellHost, huge_pages: HugePages) -> io::Result<()> {
    let config = SpareConfig {
        kernel: File::open(&context.kernel)?,
        initrd: Some(File::open(&context.initrd)?),
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

fn ours(context: &Context, host: &CellHost, cid: u32, huge_pages: HugePages) -> io::Result<Boot> {
    let start = Instant::now();
    let config = Ours {
        kernel: &context.kernel,
        initrd: &context.initrd,
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
    let vcpu_seconds = thread_seconds(&format!("{}:vcpu0", &cell.name()[..8]))?;
    cell.note_ready();
    Ok(Boot {
        seconds,
        vcpu_seconds,
        to_this_program: cell.stats(),
        all: kvm_exits(&cell)?,
        cell,
    })
}

fn qemu(context: &Context, cid: u32) -> io::Result<f64> {
    let listener = vsock_server::listen(READY_PORT)?;
    let start = Instant::now();
    let config = Qemu {
        kernel: &context.kernel,
        initrd: &context.initrd,
        memory_mib: MEMORY_MIB,
        cmdline: cloister_vmm::config::BASE_COMMAND_LINE,
        serial: false,
        share: None,
        cid,
    };
    let running = config.start()?;
    let mut stream = vsock_server::accept(&listener)?;
    stream.read_exact(&mut [0])?;
    let seconds = start.elapsed().as_secs_f64();
    drop(running);
    Ok(seconds)
}

/// Times, and counts of exits and pages.
pub fn run(context: &mut Context) -> io::Result<()> {
    let host = CellHost::new(CellHostConfig::default()).map_err(chain)?;
    keep_spare(context, &host, HugePages::Transparent)?;
    // Says what a boot touches.
    end(&ours(context, &host, 100, HugePages::Transparent)?.cell);
    let (mut our_times, mut cold_times, mut qemu_times) = (Vec::new(), Vec::new(), Vec::new());
    let mut last = None;
    for pair in 0..PAIRS {
        host.refill_spares().map_err(chain)?;
        let boot = ours(context, &host, 110 + pair, HugePages::Transparent)?;
        our_times.push(boot.seconds);
        end(&boot.cell);
        qemu_times.push(qemu(context, 200 + pair)?);
        let boot = ours(context, &host, 140 + pair, HugePages::Transparent)?;
        cold_times.push(boot.seconds);
        end(&boot.cell);
        last = Some(boot);
    }
    let Some(boot) = last else { return Ok(()) };
    let small_pages = ours(context, &host, 199, HugePages::No)?;
    let given_back = small_pages.cell.discard_initrd()?;
    let conditions = format!(
        "1 vCPU, {MEMORY_MIB} MiB, our kernel and initramfs, no serial port, vsock only, transparent huge pages"
    );
    let in_turn = format!("{conditions}; medians of {PAIRS}, in turn");
    let peer = "QEMU -M microvm".to_owned();
    let (our, cold, theirs) = (median(&our_times), median(&cold_times), median(&qemu_times));
    let mut add = |name: &str, value: f64, unit, peer: &str, goal, conditions: &str| {
        context.report.add(Figure {
            name: name.into(),
            value,
            unit,
            peer: peer.into(),
            conditions: conditions.into(),
            goal,
        })
    };
    add(
        "boot.ready_vs_qemu_microvm",
        our / theirs,
        "ratio",
        &peer,
        "<= 0.45",
        &format!("{in_turn}; the host keeps one spare, refilled between the boots"),
    )?;
    add(
        "boot.ready_cold_vs_qemu_microvm",
        cold / theirs,
        "ratio",
        &peer,
        "",
        &format!("{in_turn}; no spare"),
    )?;
    add(
        "boot.ready",
        our * 1e3,
        "ms",
        "",
        "",
        &format!("{in_turn}; one spare"),
    )?;
    add(
        "boot.ready_cold",
        cold * 1e3,
        "ms",
        "",
        "",
        &format!("{in_turn}; no spare"),
    )?;
    add("boot.ready_qemu", theirs * 1e3, "ms", &peer, "", &in_turn)?;
    let exits = f64::from(u32::try_from(boot.all).unwrap_or(u32::MAX));
    add(
        "boot.exits",
        exits,
        "exits",
        "",
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
        "",
        &format!("{conditions}; {stats:?}"),
    )?;
    let exits = f64::from(u32::try_from(small_pages.all).unwrap_or(u32::MAX));
    let own = format!("{conditions}, but no huge pages: one exit per page that the guest touches first");
    add("boot.exits_4k_pages", exits, "exits", "", "", &own)?;
    let own = format!(
        "{conditions}; pages of the guest's memory file when it is ready, no huge pages; {} KiB of initramfs have been \
         given back",
        given_back >> 10
    );
    add(
        "guest.ram_used_kib",
        ram_kib(&small_pages.cell)?,
        "KiB",
        "",
        "<= 32768",
        &own,
    )?;
    end(&small_pages.cell);
    Ok(())
}

/// Instructions, where a nanosecond is one: `ci/kvm-host --icount`. The same each time, whatever else the machine does.
pub fn count(context: &mut Context) -> io::Result<()> {
    let host = CellHost::new(CellHostConfig::default()).map_err(chain)?;
    keep_spare(context, &host, HugePages::Transparent)?;
    // Warms the page cache for all three, and says what a boot touches.
    end(&ours(context, &host, 100, HugePages::Transparent)?.cell);
    qemu(context, 101)?;
    let cold = ours(context, &host, 102, HugePages::Transparent)?;
    end(&cold.cell);
    host.refill_spares().map_err(chain)?;
    let spare = ours(context, &host, 103, HugePages::Transparent)?;
    end(&spare.cell);
    let theirs = qemu(context, 104)?;
    let peer = "QEMU -M microvm";
    let how = format!("1 vCPU, {MEMORY_MIB} MiB, vsock only; 1 ns of the host's clock is one instruction");
    let all = format!("{how}; all instructions of the host and the guest from the call to the ready message");
    let figures: [(&str, f64, &'static str, &str, &'static str, String); 6] = [
        (
            "boot.guest_instructions",
            cold.vcpu_seconds * 1e9,
            "instructions",
            "",
            "",
            format!("{how}; CPU time of the vCPU's thread: the guest, and KVM's work for it"),
        ),
        (
            "boot.instructions",
            spare.seconds * 1e9,
            "instructions",
            "",
            "",
            format!("{all}; one spare"),
        ),
        (
            "boot.instructions_cold",
            cold.seconds * 1e9,
            "instructions",
            "",
            "",
            format!("{all}; no spare"),
        ),
        (
            "boot.instructions_qemu",
            theirs * 1e9,
            "instructions",
            peer,
            "",
            all.clone(),
        ),
        (
            "boot.instructions_vs_qemu_microvm",
            spare.seconds / theirs,
            "ratio",
            peer,
            "<= 0.45",
            format!("{all}; one spare"),
        ),
        (
            "boot.instructions_cold_vs_qemu_microvm",
            cold.seconds / theirs,
            "ratio",
            peer,
            "",
            format!("{all}; no spare"),
        ),
    ];
    for (name, value, unit, peer, goal, conditions) in figures {
        context.report.add(Figure {
            name: name.into(),
            value,
            unit,
            peer: peer.into(),
            conditions,
            goal,
        })?;
    }
    Ok(())
}
