// SPDX-License-Identifier: Apache-2.0
//! `boot.*`: from nothing to the agent's ready message (the first bytes on vsock port 1025), against QEMU.

use std::io::{self, Read};
use std::time::{Duration, Instant};

use cloister_vmm::{Cell, CellHost, CellHostConfig, CellStats, HugePages};

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
    ram_kib: f64,
    cell: Cell,
}

fn kvm_exits(cell: &Cell) -> io::Result<u64> {
    let stats = cell.kvm_stats().map_err(chain)?;
    Ok(stats
        .iter()
        .flatten()
        .filter(|stat| stat.name == "exits")
        .map(|stat| stat.value)
        .sum())
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
    Ok(Boot {
        seconds,
        to_this_program: cell.stats(),
        all: kvm_exits(&cell)?,
        ram_kib: ram_kib(&cell)?,
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

/// Measures.
pub fn run(context: &mut Context) -> io::Result<()> {
    let host = CellHost::new(CellHostConfig::default()).map_err(chain)?;
    let (mut our_times, mut qemu_times, mut last) = (Vec::new(), Vec::new(), None);
    for pair in 0..PAIRS {
        if let Some(Boot { cell, .. }) = last.take() {
            cell.stop();
            cell.wait_taken_down(Some(Duration::from_secs(10)));
        }
        let boot = ours(context, &host, 100 + pair, HugePages::Transparent)?;
        our_times.push(boot.seconds);
        last = Some(boot);
        qemu_times.push(qemu(context, 200 + pair)?);
    }
    let Some(boot) = last else { return Ok(()) };
    let small_pages = ours(context, &host, 99, HugePages::No)?;
    let conditions = format!(
        "1 vCPU, {MEMORY_MIB} MiB, our kernel and initramfs, no serial port, vsock only, transparent huge pages"
    );
    let peer = "QEMU -M microvm".to_owned();
    let (our, theirs) = (median(&our_times), median(&qemu_times));
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
        &format!("{conditions}; medians of {PAIRS}, in turn"),
    )?;
    add("boot.ready", our * 1e3, "ms", "", "", &conditions)?;
    add("boot.ready_qemu", theirs * 1e3, "ms", &peer, "", &conditions)?;
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
    add(
        "guest.ram_used_kib",
        small_pages.ram_kib,
        "KiB",
        "",
        "<= 32768",
        &format!("{conditions}; pages of the guest's memory file at ready, no huge pages"),
    )?;
    for cell in [boot.cell, small_pages.cell] {
        cell.stop();
        cell.wait_taken_down(Some(Duration::from_secs(10)));
    }
    Ok(())
}
