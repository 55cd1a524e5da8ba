// SPDX-License-Identifier: Apache-2.0
//! QEMU `-M microvm`, with virtiofsd and vhost-vsock: the peer that is always there.
//!
//! Its options are trimmed as its own documentation says a fast microvm is: no ACPI, PIT, PIC or RTC, no default
//! devices, the small qboot firmware, and the serial port only where the benchmark reads it.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::program::Program;
use super::vmm::{Guest, Vmm};
use super::{Given, Peer};

/// Part of figures' names.
pub const LABEL: &str = "qemu_microvm";
const PROGRAM: &str = "qemu-system-x86_64";

/// QEMU as a VMM that boots.
pub struct Microvm(Program);

/// See [`super::ADAPTERS`].
pub fn adapter(given: Given, _: &Path) -> io::Result<Peer> {
    given.all_taken()?;
    Ok(Peer::Vmm(Box::new(Microvm(Program::of(&given, LABEL, "qemu")?))))
}

impl Microvm {
    /// The one that is installed. Where there is none, the parts that need it will say so.
    pub fn installed() -> Self {
        let output = Command::new(PROGRAM)
            .arg("--version")
            .stdin(Stdio::null())
            .output();
        let said = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        Self(Program {
            label: LABEL.to_owned(),
            path: PROGRAM.into(),
            version: said
                .ok()
                .and_then(|said| said.lines().next().map(str::to_owned))
                .unwrap_or_default(),
        })
    }
}

impl Vmm for Microvm {
    fn label(&self) -> &str {
        &self.0.label
    }

    fn title(&self) -> &str {
        "QEMU -M microvm"
    }

    fn version(&self) -> &str {
        &self.0.version
    }

    fn command(&self, guest: &Guest<'_>, _: &Path) -> io::Result<Command> {
        let qemu = Qemu {
            kernel: &guest.files.kernel,
            initrd: &guest.files.initrd,
            memory_mib: guest.memory_mib,
            cmdline: guest.cmdline,
            serial: false,
            share: None,
            cid: guest.cid,
        };
        Ok(qemu.command(&self.0.path, None))
    }
}

/// What to run, for the parts that look at devices.
pub struct Qemu<'a> {
    /// vmlinux.
    pub kernel: &'a Path,
    /// The initramfs.
    pub initrd: &'a Path,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// The kernel command line, without the console.
    pub cmdline: &'a str,
    /// Give it a serial port and the console on it.
    pub serial: bool,
    /// Share this directory as tag `cloister` through virtiofsd.
    pub share: Option<&'a Path>,
    /// Its vsock address.
    pub cid: u32,
}

/// A started QEMU with its virtiofsd; both are killed when dropped.
pub struct Running {
    qemu: Child,
    virtiofsd: Option<Child>,
    socket: Option<PathBuf>,
}

impl Qemu<'_> {
    /// The command; `virtiofsd` is its socket where a directory is shared.
    fn command(&self, program: &Path, virtiofsd: Option<&Path>) -> Command {
        let mut machine = String::from("microvm,acpi=off,pit=off,pic=off,rtc=off,auto-kernel-cmdline=on");
        let mut command = Command::new(program);
        let mut append = self.cmdline.to_owned();
        if self.serial {
            machine.push_str(",isa-serial=on");
            append.push_str(" console=ttyS0");
            command.args(["-serial", "stdio"]);
        } else {
            machine.push_str(",isa-serial=off");
        }
        if let Some(path) = virtiofsd {
            machine.push_str(",memory-backend=mem");
            command
                .arg("-object")
                .arg(format!(
                    "memory-backend-memfd,id=mem,size={}M,share=on",
                    self.memory_mib
                ))
                .arg("-chardev")
                .arg(format!("socket,id=fs,path={}", path.display()))
                .args(["-device", "vhost-user-fs-device,chardev=fs,tag=cloister"]);
        }
        command
            .args([
                "-M",
                &machine,
                "-bios",
                "qboot.rom",
                "-accel",
                "kvm",
                "-cpu",
                "host",
                "-smp",
                "1",
            ])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .arg("-m")
            .arg(format!("{}M", self.memory_mib))
            .arg("-kernel")
            .arg(self.kernel)
            .arg("-initrd")
            .arg(self.initrd)
            .args(["-append", &append])
            .arg("-device")
            .arg(format!("vhost-vsock-device,guest-cid={}", self.cid));
        command
    }

    /// Starts it, with its virtiofsd before it.
    pub fn start(&self) -> io::Result<Running> {
        let (mut virtiofsd, mut socket) = (None, None);
        if let Some(share) = self.share {
            let path = std::env::temp_dir().join(format!("cloister-bench-{}.sock", self.cid));
            // Left by an earlier run, perhaps.
            let _ = std::fs::remove_file(&path);
            virtiofsd = Some(start_virtiofsd(share, &path)?);
            socket = Some(path);
        }
        let qemu = self
            .command(Path::new(PROGRAM), socket.as_deref())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .map_err(|error| io::Error::other(format!("{PROGRAM} (install it with ci/setup): {error}")));
        match qemu {
            Ok(qemu) => Ok(Running {
                qemu,
                virtiofsd,
                socket,
            }),
            Err(error) => {
                if let Some(mut virtiofsd) = virtiofsd {
                    let _ = virtiofsd.kill();
                    let _ = virtiofsd.wait();
                }
                Err(error)
            }
        }
    }
}

impl Running {
    /// Waits until the guest reboots, and gives what it printed. One that does not in `seconds` is an error.
    pub fn console(&mut self, seconds: u64) -> io::Result<String> {
        let mut text = Vec::new();
        let end = Instant::now() + Duration::from_secs(seconds);
        if let Some(stdout) = &mut self.qemu.stdout {
            let mut piece = [0; 4096];
            loop {
                let left = end.saturating_duration_since(Instant::now());
                let left = Timespec::try_from(left).map_err(io::Error::other)?;
                let ready = poll(&mut [PollFd::new(stdout, PollFlags::IN)], Some(&left))?;
                if ready == 0 {
                    let said = String::from_utf8_lossy(&text);
                    return Err(io::Error::other(format!(
                        "QEMU's guest did not end in {seconds} s; its console:\n{said}"
                    )));
                }
                match stdout.read(&mut piece)? {
                    0 => break,
                    count => text.extend_from_slice(&piece[..count]),
                }
            }
        }
        self.qemu.wait()?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both may have ended by themselves.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        if let Some(virtiofsd) = &mut self.virtiofsd {
            let _ = virtiofsd.kill();
            let _ = virtiofsd.wait();
        }
        if let Some(socket) = &self.socket {
            let _ = std::fs::remove_file(socket);
        }
    }
}

/// virtiofsd from the cache that ci/setup fills, or from PATH.
fn start_virtiofsd(share: &Path, socket: &Path) -> io::Result<Child> {
    let cache = std::env::var_os("CLOISTER_CACHE")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache/cloister")));
    let cached = cache
        .map(|cache| cache.join("virtiofsd/bin/virtiofsd"))
        .filter(|path| path.exists());
    let program = cached.unwrap_or_else(|| PathBuf::from("virtiofsd"));
    let child = Command::new(&program)
        .arg(format!("--socket-path={}", socket.display()))
        .arg(format!("--shared-dir={}", share.display()))
        .args(["--cache=auto", "--sandbox=none", "--log-level=error"])
        .stdin(Stdio::null())
        .stdout(File::open("/dev/null")?)
        .spawn()
        .map_err(|error| io::Error::other(format!("{}: {error}", program.display())))?;
    let start = Instant::now();
    while !socket.exists() {
        if start.elapsed() > Duration::from_secs(20) {
            return Err(io::Error::other("virtiofsd did not make its socket"));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(child)
}
