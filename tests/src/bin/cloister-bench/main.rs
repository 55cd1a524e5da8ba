// SPDX-License-Identifier: Apache-2.0
//! The benchmarks: our cells and their peers side by side, in one run on one host.
//!
//! `cloister-bench` as root on a host whose KVM runs Linux (`make bench` finds or makes one). Prints a table and writes one JSON
//! object per figure. [`USAGE`] has the options; [`peers`] says what can be measured beside QEMU and runc.

mod boot;
mod cells;
mod clone;
mod cri;
mod cri_rate;
mod density;
mod fs;
mod guest_lines;
mod guest_mode;
mod ours;
mod peers;
mod plot;
mod report;
mod vsock;
mod vsock_server;

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use peers::{Given, Peers};
use report::{Figure, Report};

const USAGE: &str = "\
usage: cloister-bench [options]
  --only PREFIX   the parts whose names start so, or that have figures of such names
  --out FILE      where figures go, one JSON object a line (target/bench/results.jsonl)
  --counting      this host's clock counts instructions: figures of them
  --list          names the parts that would run
  --plot FOLDER   draws what is in --out's FILE, and measures nothing
  --peer NAME=PATH[,WHAT=PATH]...
                  measures this VMM (part boot) or runtime (parts cri.start, cri.at_once, cri.rate) as well; may be repeated:
";

/// What every part needs.
pub struct Context {
    /// The guest kernel.
    pub kernel: PathBuf,
    /// The initramfs with the agent.
    pub initrd: PathBuf,
    /// The initramfs with guest-bench.
    pub bench_initrd: PathBuf,
    /// What is measured beside ours.
    pub peers: Peers,
    /// Where figures go.
    pub report: Report,
}

type Part = fn(&mut Context) -> io::Result<()>;

const PARTS: [(&str, Part); 13] = [
    ("boot", boot::run),
    ("clone", clone::run),
    ("cell", cells::run),
    ("fs", fs::run),
    ("vsock", vsock::run),
    ("sizes", sizes),
    ("density", density::run),
    ("cri.start", cri::start),
    ("cri.at_once", cri::at_once),
    ("cri.rate", cri_rate::run),
    ("cri.streams", cri::streams),
    ("cri.idle", cri::idle),
    ("cri.rest", cri::rest),
];

const COUNTING_PARTS: [(&str, Part); 2] = [("boot", boot::count), ("clone", clone::count)];

/// `agent.bytes`, `kernel.bytes`.
fn sizes(context: &mut Context) -> io::Result<()> {
    let agent = context.initrd.with_file_name("cloister-agent");
    for (name, path, goal) in [
        ("agent.bytes", agent, "<= 4e6"),
        ("kernel.bytes", context.kernel.clone(), ""),
    ] {
        let value = f64::from(u32::try_from(std::fs::metadata(&path)?.len()).unwrap_or(u32::MAX));
        let conditions = path.display().to_string();
        context.report.add(Figure {
            name: name.into(),
            value,
            unit: "bytes",
            peer: String::new(),
            conditions,
            goal,
        })?;
    }
    Ok(())
}

fn host_conditions() -> String {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu.lines().find_map(|line| {
        line.strip_prefix("model name")
            .map(|rest| rest.trim_matches([' ', '\t', ':']))
    });
    let emulated =
        read("/proc/cmdline").contains("kvm-host") || read("/sys/class/dmi/id/sys_vendor").contains("QEMU");
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    format!(
        "{}, kernel {}, {processors} CPUs ({}), cloister {}, guest kernel {}",
        if emulated {
            "emulated KVM host (QEMU TCG): ratios count, times do not"
        } else {
            "KVM host"
        },
        read("/proc/sys/kernel/osrelease").trim(),
        model.unwrap_or("unknown processor"),
        env!("CARGO_PKG_VERSION"),
        guest_kernel().unwrap_or_else(|| "unknown".into()),
    )
}

/// What the guest's kernel says first of all when it boots.
fn guest_kernel() -> Option<String> {
    let image = std::fs::read(cloister_tests::e2e::guest_file("vmlinux")).ok()?;
    let banner = b"Linux version ";
    let at = image.windows(banner.len()).position(|bytes| bytes == banner)?;
    let version = image.get(at.checked_add(banner.len())?..)?;
    let version = version.split(|byte| *byte == b' ').next()?;
    (version.len() < 64).then(|| String::from_utf8_lossy(version).into_owned())
}

/// The parts whose names start with `only`. If none does, it is the start of figures' names: the parts of that area, for the figures of
/// a part come out of the same guests.
fn wanted<'a>(parts: &'a [(&'static str, Part)], only: &str) -> Vec<&'a (&'static str, Part)> {
    let named = |only: &str| -> Vec<_> { parts.iter().filter(|(name, _)| name.starts_with(only)).collect() };
    let found = named(only);
    if found.is_empty() {
        named(only.split('.').next().unwrap_or_default())
    } else {
        found
    }
}

fn run() -> io::Result<usize> {
    let (mut only, mut out) = (String::new(), PathBuf::from("target/bench/results.jsonl"));
    let (mut counting, mut list, mut plots, mut given) = (false, false, None, Vec::new());
    let mut args = std::env::args().skip(1);
    while let Some(option) = args.next() {
        let mut value = || {
            args.next()
                .ok_or_else(|| io::Error::other(format!("{option} needs a value")))
        };
        match option.as_str() {
            "--only" => only = value()?,
            "--out" => out = value()?.into(),
            "--counting" => counting = true,
            "--list" => list = true,
            "--plot" => plots = Some(PathBuf::from(value()?)),
            "--peer" => given.push(Given::parse(&value()?)?),
            "--help" => {
                print!("{USAGE}{}", peers::usage());
                return Ok(0);
            }
            _ => {
                return Err(io::Error::other(format!(
                    "unknown option {option}; --help lists them"
                )));
            }
        }
    }
    if let Some(folder) = plots {
        plot::run(&folder, &out)?;
        return Ok(0);
    }
    let guest =
        std::env::var_os("CLOISTER_GUEST").map_or_else(|| PathBuf::from("target/guest"), PathBuf::from);
    let peers = Peers::of(given, &guest)?;
    let wanted = wanted(if counting { &COUNTING_PARTS } else { &PARTS }, &only);
    if list {
        wanted.iter().for_each(|(name, _)| println!("{name}"));
        return Ok(0);
    }
    let file = |name: &str| -> io::Result<PathBuf> {
        let path = guest.join(name);
        let missing =
            |error| io::Error::other(format!("{}: {error}; build it with make build", path.display()));
        std::fs::canonicalize(&path).map_err(missing)
    };
    let mut context = Context {
        kernel: file("vmlinux")?,
        initrd: file("initramfs.cpio")?,
        bench_initrd: file("bench.cpio")?,
        peers,
        report: Report::create(Path::new(&out), host_conditions())?,
    };
    for &(name, part) in wanted {
        if let Err(error) = part(&mut context) {
            context.report.fail(name, &error);
        }
    }
    println!("\nfigures: {}", out.display());
    Ok(context.report.failures())
}

fn main() -> ExitCode {
    match run() {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("cloister-bench: {error}");
            ExitCode::FAILURE
        }
    }
}
