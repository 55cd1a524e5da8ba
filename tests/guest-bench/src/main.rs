// SPDX-License-Identifier: Apache-2.0
//! The guest side of the benchmarks: the `/init` of an initramfs that measures and prints.
//!
//! It is the same for every VMM. `cloister.bench=NAME[,NAME…]` on the kernel command line chooses the parts; each
//! figure is a line `BENCH <name> <value> <unit>` on the console, `BENCH-ERROR <name> <why>` a failure. At the end the
//! guest reboots, which every VMM takes as the end of the run.

mod dax;
mod fs;
mod vsock;

use std::io::{self, Write};
use std::time::Instant;

use rustix::mount::{MountFlags, mount};

/// Prints one figure.
fn report(name: &str, value: f64, unit: &str) {
    println!("BENCH {name} {value} {unit}");
    // The console is all there is: nothing to be done about a failure.
    let _ = io::stdout().flush();
}

/// Seconds that `f` takes, with its result.
fn timed<T>(f: impl FnOnce() -> io::Result<T>) -> io::Result<(f64, T)> {
    let start = Instant::now();
    let value = f()?;
    Ok((start.elapsed().as_secs_f64(), value))
}

fn mount_basics() -> io::Result<()> {
    for (source, target, kind) in [
        ("proc", "/proc", "proc"),
        ("sys", "/sys", "sysfs"),
        ("dev", "/dev", "devtmpfs"),
    ] {
        std::fs::create_dir_all(target)?;
        match mount(source, target, kind, MountFlags::empty(), None) {
            // devtmpfs may be mounted by the kernel already.
            Ok(()) | Err(rustix::io::Errno::BUSY) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn main() {
    let result = mount_basics().and_then(|()| std::fs::read_to_string("/proc/cmdline"));
    let cmdline = result.unwrap_or_else(|error| {
        println!("BENCH-ERROR init {error}");
        String::new()
    });
    let parts = cmdline
        .split_whitespace()
        .find_map(|word| word.strip_prefix("cloister.bench="))
        .unwrap_or("");
    for part in parts.split(',').filter(|part| !part.is_empty()) {
        let result = match part {
            "fs" => fs::run(),
            "dax" => dax::run(),
            "vsock" => vsock::run(),
            _ => Err(io::Error::other("no such part")),
        };
        if let Err(error) = result {
            println!("BENCH-ERROR {part} {error}");
        }
    }
    println!("BENCH-END");
    let _ = io::stdout().flush();
    // Only PID 1 reboots: run by hand on a host, the program just ends.
    if rustix::process::getpid().is_init() {
        rustix::fs::sync();
        let _ = rustix::system::reboot(rustix::system::RebootCommand::Restart);
    }
}
