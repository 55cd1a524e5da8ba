// SPDX-License-Identifier: Apache-2.0
//! Boots a kernel in one cell: serial console on standard output, figures on standard error.
//!
//! `boot KERNEL [--initrd FILE] [--append TEXT] [--memory MIB] [--cpus N] [--acpi] [--chip auto|split|kernel]
//! [--hugepages no|transparent|reserved] [--dax MIB] [--balloon] [--hvc] [--timeout SECONDS] [--until TEXT] [--quiet]`
//!
//! Ends with the guest, when its console has shown TEXT, with the first bytes on vsock port 1025 (the agent's ready
//! message), or at the timeout, and prints the exits.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cloister_boot::x86_64::Description;
use cloister_devices::fs::FsConfig;
use cloister_devices::vsock::VsockConfig;
use cloister_vmm::config::BASE_COMMAND_LINE;
use cloister_vmm::{
    Boot, Cell, CellConfig, CellHost, CellHostConfig, DeviceConfig, DeviceHandle, HugePages, InterruptChip,
    KernelBoot, SerialConfig,
};

/// Where the agent says that it is ready.
const READY_PORT: u32 = 1025;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

struct StderrLog;

impl log::Log for StderrLog {
    fn enabled(&self, _: &log::Metadata) -> bool {
        true
    }
    fn log(&self, record: &log::Record) {
        eprintln!("{}: {}", record.level(), record.args());
    }
    fn flush(&self) {}
}

struct Options {
    config: CellConfig,
    timeout: Duration,
    until: Option<String>,
}

fn options() -> Result<Options> {
    let mut args = std::env::args().skip(1);
    let kernel = args.next().ok_or("usage: boot KERNEL [options]")?;
    let mut boot = KernelBoot {
        kernel: File::open(&kernel).map_err(|e| format!("{kernel}: {e}"))?,
        initrd: None,
        command_line: format!("console=ttyS0 {BASE_COMMAND_LINE}"),
        description: Description::MpTable,
    };
    let (mut memory_mib, mut vcpus, mut chip, mut huge_pages) =
        (256, 1, InterruptChip::Auto, HugePages::default());
    let (mut timeout, mut until, mut quiet, mut dax_window) = (Duration::from_secs(60), None, false, None);
    let (mut balloon, mut hvc) = (false, false);
    while let Some(option) = args.next() {
        let mut value = || args.next().ok_or(format!("{option} needs a value"));
        match option.as_str() {
            "--initrd" => boot.initrd = Some(File::open(value()?)?),
            "--append" => boot.command_line = format!("{} {}", boot.command_line, value()?),
            "--cmdline" => boot.command_line = value()?,
            "--memory" => memory_mib = value()?.parse()?,
            "--cpus" => vcpus = value()?.parse()?,
            "--acpi" => boot.description = Description::Acpi,
            "--timeout" => timeout = Duration::from_secs(value()?.parse()?),
            "--until" => until = Some(value()?),
            "--quiet" => quiet = true,
            "--balloon" => balloon = true,
            "--hvc" => hvc = true,
            "--dax" => dax_window = Some(value()?.parse::<u64>()? << 20),
            "--chip" => {
                chip = match value()?.as_str() {
                    "split" => InterruptChip::Split,
                    "kernel" => InterruptChip::Kernel,
                    _ => InterruptChip::Auto,
                }
            }
            "--hugepages" => {
                huge_pages = match value()?.as_str() {
                    "transparent" => HugePages::Transparent,
                    "reserved" => HugePages::Reserved,
                    _ => HugePages::No,
                }
            }
            other => return Err(format!("unknown option {other}").into()),
        }
    }
    let output = if quiet {
        None
    } else {
        Some(std::io::stdout().as_fd().try_clone_to_owned()?)
    };
    let mut config = CellConfig::new("boot", Boot::Kernel(boot));
    config.memory_mib = memory_mib;
    config.vcpus = vcpus;
    config.interrupt_chip = chip;
    config.huge_pages = huge_pages;
    config.serial = Some(SerialConfig { output });
    config.devices.push(DeviceConfig::Fs {
        config: FsConfig::default(),
        dax_window,
        attached: Vec::new(),
    });
    config.devices.push(DeviceConfig::Vsock(VsockConfig::new(3)));
    config.devices.push(DeviceConfig::Rng);
    if balloon {
        config
            .devices
            .push(DeviceConfig::Balloon { deflate_on_oom: true });
    }
    if hvc {
        config.devices.push(DeviceConfig::Console {
            input: None,
            output: None,
            size: None,
        });
    }
    Ok(Options {
        config,
        timeout,
        until,
    })
}

fn run() -> Result<()> {
    log::set_logger(&StderrLog).map_err(|e| e.to_string())?;
    log::set_max_level(log::LevelFilter::Info);
    let Options {
        config,
        timeout,
        until,
    } = options()?;
    let host = CellHost::new(CellHostConfig::default())?;
    let begin = Instant::now();
    let cell = Cell::create(config, &host)?;
    let created = begin.elapsed();
    let ready = Arc::new(Mutex::new(None));
    for device in cell.devices() {
        if let DeviceHandle::Vsock(vsock) = device {
            let listener = vsock.listen(READY_PORT)?;
            let ready = Arc::clone(&ready);
            // Ends with the cell at the latest: the listener fails then.
            std::thread::spawn(move || {
                let first = listener
                    .accept()
                    .and_then(|(mut stream, _)| stream.read(&mut [0; 64]));
                if matches!(first, Ok(1..)) {
                    *ready.lock().unwrap_or_else(PoisonError::into_inner) = Some(begin.elapsed());
                }
            });
        }
    }
    cell.start()?;
    let started = begin.elapsed();
    let reason = loop {
        if let Some(reason) = cell.wait(Some(Duration::from_millis(5))) {
            break Some(reason);
        }
        let shown = |text: &String| {
            let tail = cell.console_tail().bytes();
            tail.windows(text.len()).any(|window| window == text.as_bytes())
        };
        let is_ready = ready.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        if is_ready || begin.elapsed() > timeout || until.as_ref().is_some_and(shown) {
            break None;
        }
    };
    let total = begin.elapsed();
    match *ready.lock().unwrap_or_else(PoisonError::into_inner) {
        Some(ready) => eprintln!("agent ready after {ready:?}"),
        None => eprintln!("no agent became ready"),
    }
    eprintln!("created {created:?}, started {started:?}, ended {total:?}: {reason:?}");
    eprintln!("exits to this program: {:?}", cell.stats());
    if reason.is_none() {
        for (vcpu, stats) in cell.kvm_stats()?.into_iter().enumerate() {
            let shown: Vec<String> = stats
                .iter()
                .filter(|s| s.value > 0)
                .map(|s| format!("{}={}", s.name, s.value))
                .collect();
            eprintln!("vcpu {vcpu}: {}", shown.join(" "));
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut text = error.to_string();
            let mut source = error.source();
            while let Some(cause) = source {
                text = format!("{text}: {cause}");
                source = cause.source();
            }
            eprintln!("boot: {text}");
            ExitCode::FAILURE
        }
    }
}
