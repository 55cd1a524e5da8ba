// SPDX-License-Identifier: Apache-2.0
//! What PID 1 does before it serves.
//!
//! # Theory of operation
//!
//! Start-up time of every pod passes through here, so the order matters:
//!
//! 1. load modules, if the kernel needs any to have vsock (never with our own kernel);
//! 2. listen on vsock, dial the host and say "ready" ([`events::say_ready`]);
//! 3. enter the runtime ([`crate::serve`]);
//! 4. [`rest`]: mount what containers expect, bring up the loopback device. Requests wait in the listener's queue
//!    meanwhile;
//! 5. serve.
//!
//! The initramfs is the kernel's rootfs, which pivot_root(2) refuses to leave. So a bind mount of it is put on top of
//! itself and becomes the root: containers can then pivot away from it, instead of being
//! held in by no more than a chroot. No file is copied.

use std::fs;
use std::io;
use std::path::Path;

use cloister_protocol::pod::Step;
use cloister_protocol::{AGENT_PORT, EVENTS_PORT, FORWARD_PORT, SHM_DIR};
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat, open};
use rustix::mount::{MountFlags, mount, mount_bind_recursive, mount_move};
use rustix::process::{Resource, Rlimit, chdir, chroot, setrlimit};
use rustix::time::{ClockId, clock_gettime};

use crate::{cmdline, events, log as logger, net, power, serve, transport};

/// List of kernel module files to load, one path per line, in order.
const MODULE_ORDER: &str = "/lib/modules/cloister/order";
/// Open files a process may have, as container runtimes usually give.
const MAX_FILES: u64 = 1 << 20;

/// Nanoseconds since the machine started.
pub fn boottime_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
}

/// What PID 1 mounts besides /proc: type, target, flags, data.
const MOUNTS: &[(&str, &str, MountFlags, &str)] = &[
    ("devtmpfs", "/dev", MountFlags::NOSUID, "mode=0755"),
    ("sysfs", "/sys", NO_ALL, ""),
    (
        "cgroup2",
        "/sys/fs/cgroup",
        NO_ALL,
        "nsdelegate,memory_recursiveprot",
    ),
    (
        "devpts",
        "/dev/pts",
        NO_SUID_EXEC,
        "mode=0620,gid=5,ptmxmode=0666",
    ),
    ("tmpfs", "/dev/shm", NO_SUID_DEV, "mode=1777"),
    ("tmpfs", "/run", NO_SUID_DEV, "mode=0755"),
    ("tmpfs", "/tmp", NO_SUID_DEV, "mode=1777"),
    // As large as container runtimes usually make it, unless Configure says otherwise.
    ("tmpfs", SHM_DIR, NO_ALL, "mode=1777,size=64m"),
];
const NO_SUID_DEV: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);
const NO_SUID_EXEC: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC);
const NO_ALL: MountFlags = NO_SUID_DEV.union(MountFlags::NOEXEC);

fn mount_at(kind: &str, target: &str, flags: MountFlags, data: &str) -> io::Result<()> {
    let data = std::ffi::CString::new(data)?;
    let again = || mount(kind, target, kind, flags, Some(data.as_c_str()));
    match again() {
        // Most directories are there; making them only when they are not saves the calls.
        Err(rustix::io::Errno::NOENT) => {
            fs::create_dir_all(target)?;
            again()?;
        }
        // devtmpfs may have been mounted by the kernel.
        Err(rustix::io::Errno::BUSY) | Ok(()) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

/// Puts a mount over the kernel's rootfs, see the module's theory of operation.
fn leave_rootfs() -> io::Result<()> {
    const STEP: &str = "/.root";
    fs::create_dir_all(STEP)?;
    mount_bind_recursive("/", STEP)?;
    chdir(STEP)?;
    mount_move(".", "/")?;
    chroot(".")?;
    chdir("/")?;
    fs::remove_dir(STEP)
}

/// Opens /dev/null for each of the first three descriptors the kernel left closed, so that no later one lands there.
fn standard_fds() {
    loop {
        let fd = open("/dev/null", OFlags::RDWR, Mode::empty()).or_else(|_| {
            mknodat(
                CWD,
                "/dev/null",
                FileType::CharacterDevice,
                Mode::from_raw_mode(0o666),
                rustix::fs::makedev(1, 3),
            )?;
            open("/dev/null", OFlags::RDWR, Mode::empty())
        });
        match fd {
            Ok(fd) if std::os::fd::AsRawFd::as_raw_fd(&fd) < 3 => std::mem::forget(fd),
            _ => break,
        }
    }
}

fn load_modules() {
    let Ok(order) = fs::read_to_string(MODULE_ORDER) else {
        return;
    };
    for path in order
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty() && !l.starts_with('#'))
    {
        let path = Path::new("/lib/modules/cloister").join(path);
        // MODULE_INIT_COMPRESSED_FILE
        let flags = if path.extension().is_some_and(|e| e == "ko") {
            0
        } else {
            4
        };
        let loaded =
            fs::File::open(&path).and_then(|file| Ok(rustix::system::finit_module(&file, c"", flags)?));
        match loaded {
            Ok(()) => {}
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {}
            Err(e) => log::error!("kernel module {} was not loaded: {e}", path.display()),
        }
    }
}

/// Gives every controller to the cgroups below the root.
fn delegate_controllers() -> io::Result<()> {
    let available = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")?;
    let wanted: String = available
        .split_ascii_whitespace()
        .map(|c| format!("+{c} "))
        .collect();
    fs::write("/sys/fs/cgroup/cgroup.subtree_control", wanted.trim_end())
}

fn warn(what: &str, result: io::Result<()>) {
    if let Err(error) = result {
        log::error!("{what}: {error}");
    }
}

/// When the agent did what until it was ready.
pub struct Timeline {
    /// Nanoseconds since the machine started when the agent entered main.
    pub started: u64,
    /// What it did since.
    pub steps: Vec<Step>,
}

impl Timeline {
    /// A timeline that begins now.
    pub fn begin() -> Self {
        Self {
            started: boottime_ns(),
            steps: Vec::new(),
        }
    }

    /// Notes that something has been done.
    pub fn step(&mut self, name: &str) {
        self.steps.push(Step {
            name: name.to_owned(),
            ns: boottime_ns(),
            ..Default::default()
        });
    }
}

/// Life of PID 1; returns only by panicking the kernel.
pub fn main(mut timeline: Timeline) -> i32 {
    standard_fds();
    // What devtmpfs will bring later.
    let kmsg = rustix::fs::makedev(1, 11);
    let _ = mknodat(
        CWD,
        "/dev/kmsg",
        FileType::CharacterDevice,
        Mode::from_raw_mode(0o600),
        kmsg,
    );
    logger::to_kernel(cmdline::Options::default().log);
    timeline.step("logging");

    load_modules();
    let listen = |port| transport::listen_vsock(port);
    let listeners = match listen(AGENT_PORT).and_then(|agent| Ok((agent, listen(FORWARD_PORT)?))) {
        Ok(listeners) => listeners,
        Err(error) => fatal(&format!(
            "vsock: cannot listen (has the VM a vsock device?): {error}"
        )),
    };
    timeline.step("listening");
    let mut dial = transport::dial_vsock(EVENTS_PORT);
    timeline.step("dialled");
    if let Ok(dial) = &mut dial {
        events::say_ready(dial, &timeline);
    }

    warn("/proc was not mounted", mount_at("proc", "/proc", NO_ALL, ""));
    let options = cmdline::parse(&fs::read_to_string("/proc/cmdline").unwrap_or_default());
    log::set_max_level(options.log);
    if options.log >= log::LevelFilter::Debug {
        // The kernel would drop most of it otherwise.
        warn("kernel log", fs::write("/proc/sys/kernel/printk_devkmsg", "on\n"));
    }
    match serve::in_vm(listeners, dial, timeline) {
        Ok(()) => fatal("the server ended"),
        Err(error) => fatal(&format!("cannot serve: {error}")),
    }
}

/// What has to be there before the first request, and not before "ready".
pub fn rest() {
    warn("root was not moved off rootfs", leave_rootfs());
    for (kind, target, flags, data) in MOUNTS {
        warn(target, mount_at(kind, target, *flags, data));
    }
    warn("cgroup controllers were not delegated", delegate_controllers());
    // It looks for fragments twice a second, and wakes an idle VM for that. Who needs large pages still has them made.
    warn(
        "proactive compaction",
        fs::write("/proc/sys/vm/compaction_proactiveness", "0"),
    );
    let limit = Rlimit {
        current: Some(MAX_FILES),
        maximum: Some(MAX_FILES),
    };
    warn(
        "open file limit",
        setrlimit(Resource::Nofile, limit).map_err(io::Error::from),
    );
    warn("loopback device", net::loopback_up());
}

/// Says why and restarts the machine, which the VMM reports.
fn fatal(text: &str) -> ! {
    log::error!("{text}");
    power::down(true)
}
