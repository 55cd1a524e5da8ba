// SPDX-License-Identifier: Apache-2.0
//! Boots a kernel in one cell that shares host directories, to try the file system with a real Linux guest:
//! `share KERNEL INITRAMFS NAME=DIR[:ro][:always|:never][:dax]... [--append TEXT] [--dax MIB] [--cpus N] [--queues N]
//! [--memory MIB] [--transparent] [--locks] [--writeback] [--acl]`. `--transparent` asks for huge pages.
//! The guest's console is standard output; ends with the guest.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use cloister_boot::x86_64::Description;
use cloister_devices::fs::{AttachOptions, CachePolicy, FsConfig};
use cloister_vmm::config::BASE_COMMAND_LINE;
use cloister_vmm::{
    Boot, Cell, CellConfig, CellHost, CellHostConfig, DeviceConfig, DeviceHandle, HugePages, KernelBoot,
    SerialConfig,
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let mut file = || -> Result<File> {
        Ok(File::open(
            args.next().ok_or("usage: share KERNEL INITRAMFS ...")?,
        )?)
    };
    let (kernel, initrd) = (file()?, file()?);
    let mut fs = FsConfig::default();
    let mut shares: Vec<(String, OwnedFd, AttachOptions)> = Vec::new();
    let (mut append, mut dax_window, mut vcpus) = (String::new(), None, 1);
    let (mut memory_mib, mut huge_pages) = (1024, HugePages::default());
    while let Some(word) = args.next() {
        let mut value = || args.next().ok_or(format!("{word} needs a value"));
        match word.as_str() {
            "--append" => append = value()?,
            "--dax" => dax_window = Some(value()?.parse::<u64>()? << 20),
            "--memory" => memory_mib = value()?.parse()?,
            "--transparent" => huge_pages = HugePages::Transparent,
            "--cpus" => vcpus = value()?.parse()?,
            "--queues" => fs.request_queues = value()?.parse()?,
            "--locks" => fs.remote_locks = true,
            "--writeback" => fs.writeback = true,
            "--acl" => fs.posix_acl = true,
            share => {
                let (name, rest) = share.split_once('=').ok_or(format!("unknown option {share}"))?;
                let mut words = rest.split(':');
                let directory = File::open(words.next().unwrap_or_default())?;
                let mut options = AttachOptions::default();
                for word in words {
                    match word {
                        "ro" => options.read_only = true,
                        "always" => options.cache = CachePolicy::Always,
                        "never" => options.cache = CachePolicy::Never,
                        "dax" => options.dax = true,
                        _ => return Err(format!("unknown way to share: {word}").into()),
                    }
                }
                shares.push((name.to_owned(), directory.into(), options));
            }
        }
    }
    let mut config = CellConfig::new(
        "share",
        Boot::Kernel(KernelBoot {
            kernel,
            initrd: Some(initrd),
            command_line: format!("console=ttyS0 {BASE_COMMAND_LINE} {append}"),
            description: Description::MpTable,
        }),
    );
    config.memory_mib = memory_mib;
    config.huge_pages = huge_pages;
    config.vcpus = vcpus;
    config.serial = Some(SerialConfig {
        output: Some(std::io::stdout().as_fd().try_clone_to_owned()?),
    });
    config.devices.push(DeviceConfig::Fs {
        config: fs,
        dax_window,
        attached: Vec::new(),
    });
    config.devices.push(DeviceConfig::Rng);
    let host = CellHost::new(CellHostConfig::default())?;
    let cell = Cell::create(config, &host)?;
    for device in cell.devices() {
        if let DeviceHandle::Fs(fs) = device {
            for (name, directory, options) in &shares {
                fs.attach(name, directory, *options)?;
            }
        }
    }
    let begin = Instant::now();
    cell.start()?;
    let reason = cell.wait(Some(Duration::from_secs(3600)));
    eprintln!("ended after {:?}: {reason:?}", begin.elapsed());
    for device in cell.devices() {
        if let DeviceHandle::Fs(fs) = device {
            eprintln!("{:?}", fs.metrics());
        }
    }
    Ok(())
}
