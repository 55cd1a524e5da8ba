// SPDX-License-Identifier: Apache-2.0
//! `fs.*`: a shared directory, against QEMU with virtiofsd; and a mapped file through the DAX window, against guest RAM.
//!
//! Both servers share the same directory on the same tmpfs, with the same cache policy (auto) and no writeback cache.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use cloister_devices::fs::{AttachOptions, FsConfig};
use cloister_vmm::{CellHost, CellHostConfig, DeviceConfig, DeviceHandle, HugePages};

use crate::Context;
use crate::guest_lines::GuestFigures;
use crate::ours::{Ours, chain, wait};
use crate::peers::qemu::Qemu;
use crate::report::Figure;

const MEMORY_MIB: u32 = 512;
// In turn with the peer, so that a burst of load elsewhere meets both.
const ROUNDS: u32 = 5;
const DAX_WINDOW: u64 = 64 << 20;
const PEER: &str = "QEMU + virtiofsd";

/// Runs `parts` in a cell that shares `dir`, and adds what it prints.
fn ours(
    context: &Context,
    host: &CellHost,
    cid: u32,
    share: &Path,
    parts: &str,
    figures: &mut GuestFigures,
) -> io::Result<()> {
    let (reader, console) = io::pipe()?;
    let config = Ours {
        kernel: &context.kernel,
        initrd: &context.bench_initrd,
        memory_mib: MEMORY_MIB,
        cmdline: &format!("cloister.bench={parts}"),
        console: Some(console.into()),
        devices: vec![DeviceConfig::Fs {
            config: FsConfig::default(),
            dax_window: Some(DAX_WINDOW),
            attached: Vec::new(),
        }],
        cid,
        huge_pages: HugePages::Transparent,
    };
    let (cell, _vsock) = config.create(host)?;
    let dir = OwnedFd::from(File::open(share.join("bench"))?);
    for device in cell.devices() {
        if let DeviceHandle::Fs(fs) = device {
            fs.attach("bench", &dir, AttachOptions::default())
                .map_err(chain)?;
        }
    }
    cell.start().map_err(chain)?;
    let ended = wait(&cell, 300);
    // Its end of the pipe goes with it.
    drop(cell);
    let console = io::read_to_string(reader)?;
    ended.map_err(|error| io::Error::other(format!("{error}; its console:\n{console}")))?;
    figures.add_console(&console)
}

/// Measures.
pub fn run(context: &mut Context) -> io::Result<()> {
    let host = CellHost::new(CellHostConfig::default()).map_err(chain)?;
    let share = std::env::temp_dir().join(format!("cloister-bench-fs-{}", std::process::id()));
    std::fs::create_dir_all(share.join("bench"))?;
    let result = measure(context, &host, &share);
    std::fs::remove_dir_all(&share)?;
    result
}

fn measure(context: &mut Context, host: &CellHost, share: &Path) -> io::Result<()> {
    let (mut our, mut their) = (GuestFigures::default(), GuestFigures::default());
    for round in 0..ROUNDS {
        ours(context, host, 500 + round, share, "fs", &mut our)?;
        let peer = Qemu {
            kernel: &context.kernel,
            initrd: &context.bench_initrd,
            memory_mib: MEMORY_MIB,
            cmdline: &format!("{} cloister.bench=fs", cloister_vmm::config::BASE_COMMAND_LINE),
            serial: true,
            share: Some(share),
            cid: 600 + round,
        };
        their.add_console(&peer.start()?.console(600)?)?;
    }
    let conditions =
        format!("1 vCPU, {MEMORY_MIB} MiB, files on a tmpfs; medians of {ROUNDS} guests, 2 runs each");
    let figure = |name: String, value, unit, peer: &str, goal| Figure {
        name,
        value,
        unit,
        peer: peer.into(),
        conditions: conditions.clone(),
        goal,
    };
    for (what, unit) in [
        ("seq_read", "MiB/s"),
        ("seq_write", "MiB/s"),
        ("rand_4k", "op/s"),
        ("small_files", "files/s"),
    ] {
        let name = format!("fs.{what}");
        let (our, their) = (our.median(&name)?, their.median(&name)?);
        let ratio = figure(
            format!("{name}_vs_virtiofsd"),
            our / their,
            "ratio",
            PEER,
            ">= 1.0",
        );
        context.report.add(ratio)?;
        context.report.add(figure(name.clone(), our, unit, "", ""))?;
        context
            .report
            .add(figure(format!("{name}_virtiofsd"), their, unit, PEER, ""))?;
    }
    let mut dax = GuestFigures::default();
    for round in 0..3 {
        ours(context, host, 700 + round, share, "dax", &mut dax)?;
    }
    let (mapped, ram) = (dax.median("fs.dax_read")?, dax.median("fs.ram_read")?);
    let name = "fs.dax_read_vs_guest_ram".to_owned();
    context
        .report
        .add(figure(name, mapped / ram, "ratio", "guest RAM", ">= 0.8"))?;
    context
        .report
        .add(figure("fs.dax_read".into(), mapped, "MiB/s", "", ""))?;
    context
        .report
        .add(figure("fs.ram_read".into(), ram, "MiB/s", "", ""))
}
