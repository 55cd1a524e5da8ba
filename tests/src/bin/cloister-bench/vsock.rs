// SPDX-License-Identifier: Apache-2.0
//! `vsock.*`: round trips and throughput from the guest to this host, against vhost-vsock.

use std::io;

use cloister_vmm::{CellHost, CellHostConfig, HugePages};

use crate::Context;
use crate::guest_lines::GuestFigures;
use crate::ours::{Ours, chain, wait};
use crate::peers::qemu::Qemu;
use crate::report::Figure;
use crate::vsock_server;

const MEMORY_MIB: u32 = 256;
const ROUNDS: u32 = 3;
/// Seconds for a guest: 10 on an idle machine, 90 under the load of builds.
const PATIENCE: u64 = 300;
/// Guests that may hang before the part counts as failed.
const MOST_HUNG: u32 = 1;

/// Measures.
pub fn run(context: &mut Context) -> io::Result<()> {
    let host = CellHost::new(CellHostConfig::default()).map_err(chain)?;
    let (mut ours, mut theirs) = (GuestFigures::default(), GuestFigures::default());
    vsock_server::serve(|port| {
        let listener = vsock_server::listen(port)?;
        Ok(move || vsock_server::accept(&listener))
    });
    let mut hung = 0;
    let mut round = 0;
    while round < ROUNDS + hung {
        match pair(context, &host, round) {
            Ok((our, their)) => {
                ours.add_console(&our)?;
                theirs.add_console(&their)?;
            }
            // Once in some fifty guests of the emulated host, ours or QEMU's (docs/numbers.md). Said, and measured again.
            Err(error) if hung < MOST_HUNG => {
                eprintln!("round {round}: {error}");
                hung += 1;
            }
            Err(error) => return Err(error),
        }
        round += 1;
    }
    for (name, unit, goal) in [
        ("vsock.rtt", "us", "<= 1.0"),
        ("vsock.throughput", "MiB/s", ">= 1.0"),
    ] {
        let (our, their) = (ours.median(name)?, theirs.median(name)?);
        let conditions = format!(
            "1 vCPU, guest to host; medians of {ROUNDS} guests with 3 runs each, in turn; {hung} hung and measured again"
        );
        let mut add = |name: String, value, unit, peer: &str, goal| {
            let (peer, conditions) = (peer.to_owned(), conditions.clone());
            context.report.add(Figure {
                name,
                value,
                unit,
                peer,
                conditions,
                goal,
            })
        };
        add(
            format!("{name}_vs_vhost"),
            our / their,
            "ratio",
            "QEMU + vhost-vsock",
            goal,
        )?;
        add(name.to_owned(), our, unit, "", "")?;
        add(format!("{name}_vhost"), their, unit, "QEMU + vhost-vsock", "")?;
    }
    Ok(())
}

/// One guest of ours and one of the peer's: what they printed.
fn pair(context: &Context, host: &CellHost, round: u32) -> io::Result<(String, String)> {
    let (reader, console) = io::pipe()?;
    let config = Ours {
        kernel: &context.kernel,
        initrd: &context.bench_initrd,
        memory_mib: MEMORY_MIB,
        cmdline: "cloister.bench=vsock",
        console: Some(console.into()),
        devices: Vec::new(),
        cid: 300 + round,
        huge_pages: HugePages::Transparent,
    };
    let (cell, vsock) = config.create(host)?;
    vsock_server::serve(|port| {
        let listener = vsock.listen(port)?;
        Ok(move || listener.accept().map(|(stream, _)| stream))
    });
    cell.start().map_err(chain)?;
    let ended = wait(&cell, PATIENCE);
    drop(cell);
    let console = io::read_to_string(reader)?;
    ended.map_err(|error| {
        let counters = vsock.metrics();
        io::Error::other(format!("{error}; {counters:?}; its console:\n{console}"))
    })?;
    let peer = Qemu {
        kernel: &context.kernel,
        initrd: &context.bench_initrd,
        memory_mib: MEMORY_MIB,
        cmdline: &format!("{} cloister.bench=vsock", cloister_vmm::config::BASE_COMMAND_LINE),
        serial: true,
        share: None,
        cid: 400 + round,
    };
    let theirs = peer.start()?.console(PATIENCE)?;
    Ok((console, theirs))
}
