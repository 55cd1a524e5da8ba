// SPDX-License-Identifier: Apache-2.0
//! What this host can do, found out by looking; used by `cloister check` and before each `run`.

use cloister_vmm::KvmKind;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use std::path::Path;

/// How a finding stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Something will not work, the rest will.
    Warning,
    /// No virtual machine can run.
    Failure,
}

/// One finding.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Finding {
    /// What was looked at.
    pub name: &'static str,
    /// How it stands.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do about it.
    pub remedy: Option<&'static str>,
}

fn finding(name: &'static str, verdict: Verdict, found: impl Into<String>, remedy: &'static str) -> Finding {
    let remedy = (verdict != Verdict::Ok && !remedy.is_empty()).then_some(remedy);
    Finding {
        name,
        verdict,
        found: found.into(),
        remedy,
    }
}

/// Said by `check` and by `run`, word for word.
pub const PVM: &str = "this host's KVM cannot run an unmodified guest kernel: no VT-x/AMD-V (kvm_pvm only)";
const PVM_REMEDY: &str = "use a host with hardware virtualisation, or switch nested virtualisation on for this one; for development, `ci/kvm-host -- COMMAND` emulates such a host";

/// What keeps virtual machines from running here at all, in one message with its remedy.
///
/// # Errors
/// The message.
pub fn can_run() -> Result<(), String> {
    judge([virtualisation(), kvm_device()])
}

fn judge(findings: [Finding; 2]) -> Result<(), String> {
    let first = findings
        .into_iter()
        .find(|finding| finding.verdict == Verdict::Failure);
    match first {
        None => Ok(()),
        Some(finding) => Err(match finding.remedy {
            Some(remedy) => format!("{}; {remedy}", finding.found),
            None => finding.found,
        }),
    }
}

/// Everything.
pub fn all() -> Vec<Finding> {
    let mut findings = vec![virtualisation(), kvm_device()];
    findings.extend(kvm_capabilities());
    findings.extend([root(), kernel(), overlay(), tun(), nft(), cgroups(), memory()]);
    findings
}

fn flags(cpuinfo: &str) -> Vec<&str> {
    let line = cpuinfo
        .lines()
        .find(|line| line.starts_with("flags"))
        .unwrap_or_default();
    line.split_whitespace()
        .skip_while(|word| *word != ":")
        .skip(1)
        .collect()
}

fn virtualisation() -> Finding {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    virtualisation_of(&cpuinfo, has_module)
}

fn has_module(name: &str) -> bool {
    Path::new("/sys/module").join(name).exists()
}

fn virtualisation_of(cpuinfo: &str, has_module: impl Fn(&str) -> bool) -> Finding {
    let name = "virtualisation";
    let flags = flags(cpuinfo);
    let extension = if flags.contains(&"vmx") {
        "VT-x (vmx)"
    } else {
        "AMD-V (svm)"
    };
    let nested = if flags.contains(&"hypervisor") {
        ", nested: this host is a virtual machine itself"
    } else {
        ""
    };
    match KvmKind::of(cpuinfo, has_module) {
        KvmKind::Hardware => finding(name, Verdict::Ok, format!("{extension}{nested}"), ""),
        KvmKind::Pvm => finding(name, Verdict::Failure, PVM, PVM_REMEDY),
        KvmKind::Unknown => finding(
            name,
            Verdict::Failure,
            "the processor shows neither VT-x (vmx) nor AMD-V (svm)",
            "switch virtualisation on in the firmware, or nested virtualisation for this virtual machine",
        ),
    }
}

fn kvm_device() -> Finding {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let opened = rustix::fs::openat(CWD, "/dev/kvm", flags, Mode::empty());
    kvm_device_of(opened.map(drop), has_module)
}

fn kvm_device_of(opened: Result<(), Errno>, has_module: impl Fn(&str) -> bool) -> Finding {
    let name = "/dev/kvm";
    match opened {
        Ok(()) => {
            let modules: Vec<&str> = ["kvm_intel", "kvm_amd", "kvm_pvm"]
                .into_iter()
                .filter(|module| has_module(module))
                .collect();
            finding(
                name,
                Verdict::Ok,
                format!(
                    "opens (module: {})",
                    if modules.is_empty() {
                        "built in".to_owned()
                    } else {
                        modules.join(", ")
                    }
                ),
                "",
            )
        }
        Err(Errno::NOENT | Errno::NODEV | Errno::NXIO) => finding(
            name,
            Verdict::Failure,
            "there is no /dev/kvm",
            "modprobe kvm_intel or kvm_amd; if that fails, switch virtualisation on in the firmware",
        ),
        Err(Errno::ACCESS | Errno::PERM) => finding(
            name,
            Verdict::Failure,
            "no right to open /dev/kvm",
            "run as root, or join the group kvm",
        ),
        Err(error) => finding(
            name,
            Verdict::Failure,
            format!("cannot open /dev/kvm: {}", std::io::Error::from(error)),
            "",
        ),
    }
}

fn kvm_capabilities() -> Option<Finding> {
    use kvm_ioctls::Cap;
    let kvm = kvm_ioctls::Kvm::new().ok()?;
    let needed = [
        ("user memory", Cap::UserMemory),
        ("irqfd", Cap::Irqfd),
        ("ioeventfd", Cap::Ioeventfd),
        ("immediate exit", Cap::ImmediateExit),
        ("MSR list", Cap::GetMsrFeatures),
    ];
    let missing: Vec<&str> = needed
        .iter()
        .filter(|(_, cap)| !kvm.check_extension(*cap))
        .map(|(name, _)| *name)
        .collect();
    if kvm.get_api_version() != 12 || !missing.is_empty() {
        let found = format!(
            "API version {}, missing: {}",
            kvm.get_api_version(),
            missing.join(", ")
        );
        return Some(finding(
            "KVM",
            Verdict::Failure,
            found,
            "use Linux 5.10 or later on the host",
        ));
    }
    let split = if kvm.check_extension(Cap::SplitIrqchip) {
        "split interrupt chip"
    } else {
        "no split interrupt chip"
    };
    Some(finding(
        "KVM",
        Verdict::Ok,
        format!("API version 12, {} vCPUs at most, {split}", kvm.get_max_vcpus()),
        "",
    ))
}

fn root() -> Finding {
    let is_root = rustix::process::geteuid().is_root();
    let verdict = if is_root { Verdict::Ok } else { Verdict::Failure };
    let found = if is_root {
        "root"
    } else {
        "not root: images cannot be unpacked and mounted"
    };
    finding("user", verdict, found, "run cloister as root")
}

fn kernel() -> Finding {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy().into_owned();
    let version = version(&release);
    let verdict = if version >= (5, 10) {
        Verdict::Ok
    } else {
        Verdict::Failure
    };
    finding(
        "kernel",
        verdict,
        format!("Linux {release}"),
        "use Linux 5.10 or later",
    )
}

fn version(release: &str) -> (u32, u32) {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

fn overlay() -> Finding {
    // Opening a context loads the module, which /proc/filesystems would not.
    match rustix::mount::fsopen("overlay", rustix::mount::FsOpenFlags::FSOPEN_CLOEXEC) {
        Ok(_) => finding("overlayfs", Verdict::Ok, "present", ""),
        Err(Errno::PERM) => finding(
            "overlayfs",
            Verdict::Failure,
            "may not be mounted by this user",
            "run cloister as root",
        ),
        Err(_) => finding(
            "overlayfs",
            Verdict::Failure,
            "this kernel has no overlayfs",
            "modprobe overlay",
        ),
    }
}

fn tun() -> Finding {
    match rustix::fs::openat(CWD, "/dev/net/tun", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
        Ok(_) => finding("/dev/net/tun", Verdict::Ok, "opens", ""),
        Err(error) => finding(
            "/dev/net/tun",
            Verdict::Warning,
            format!(
                "cannot be opened: {}; only --net none works",
                std::io::Error::from(error)
            ),
            "modprobe tun",
        ),
    }
}

fn nft() -> Finding {
    let path = std::env::var_os("PATH").unwrap_or_default();
    match std::env::split_paths(&path)
        .map(|dir| dir.join("nft"))
        .find(|program| program.is_file())
    {
        Some(program) => finding("nft", Verdict::Ok, program.display().to_string(), ""),
        None => finding(
            "nft",
            Verdict::Warning,
            "not on PATH; --net nat does not work",
            "install the package nftables",
        ),
    }
}

fn cgroups() -> Finding {
    let has = |file: &str| Path::new("/sys/fs/cgroup").join(file).exists();
    if has("cgroup.controllers") {
        finding("cgroups", Verdict::Ok, "version 2", "")
    } else if has("memory/cgroup.procs") {
        finding("cgroups", Verdict::Ok, "version 1", "")
    } else {
        finding(
            "cgroups",
            Verdict::Warning,
            "not mounted",
            "mount cgroup2 at /sys/fs/cgroup; without it no pod's use is charged to the pod",
        )
    }
}

fn memory() -> Finding {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok())
        .unwrap_or(0)
        .saturating_mul(1024);
    let verdict = if available >= 256 << 20 {
        Verdict::Ok
    } else {
        Verdict::Warning
    };
    finding(
        "memory",
        verdict,
        format!("{} available", crate::cli::table::binary_size(available)),
        "free some memory: a VM takes 512m unless --memory says otherwise",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_cpuinfo_and_versions() {
        assert_eq!(flags("processor\t: 0\nflags\t\t: fpu svm\n"), ["fpu", "svm"]);
        assert_eq!(flags(""), Vec::<&str>::new());
        assert_eq!(version("6.1.0-35-cloud-amd64"), (6, 1));
        assert_eq!(version("5.10.9"), (5, 10));
        assert_eq!(version("odd"), (0, 0));
    }

    const VMX: &str = "processor\t: 0\nflags\t\t: fpu vmx\n";
    const SVM: &str = "processor\t: 0\nflags\t\t: fpu svm\n";
    const BARE: &str = "processor\t: 0\nflags\t\t: fpu hypervisor\n";
    const NESTED: &str = "processor\t: 0\nflags\t\t: fpu vmx hypervisor\n";

    /// Processor and loaded modules; what is said of them.
    type Case = (
        &'static str,
        &'static [&'static str],
        Verdict,
        &'static str,
        Option<&'static str>,
    );

    #[test]
    fn kinds_of_virtualisation() {
        let nothing = "the processor shows neither VT-x (vmx) nor AMD-V (svm)";
        let firmware =
            "switch virtualisation on in the firmware, or nested virtualisation for this virtual machine";
        let (failure, pvm) = (Verdict::Failure, &["kvm", "kvm_pvm"][..]);
        let cases: [Case; 9] = [
            (VMX, &["kvm", "kvm_intel"], Verdict::Ok, "VT-x (vmx)", None),
            (SVM, &["kvm", "kvm_amd"], Verdict::Ok, "AMD-V (svm)", None),
            // Built into the kernel.
            (VMX, &[], Verdict::Ok, "VT-x (vmx)", None),
            (
                NESTED,
                &["kvm_intel"],
                Verdict::Ok,
                "VT-x (vmx), nested: this host is a virtual machine itself",
                None,
            ),
            (BARE, pvm, failure, PVM, Some(PVM_REMEDY)),
            (VMX, pvm, failure, PVM, Some(PVM_REMEDY)),
            (VMX, &["kvm_pvm", "kvm_intel"], Verdict::Ok, "VT-x (vmx)", None),
            (BARE, &["kvm"], failure, nothing, Some(firmware)),
            ("", &[], failure, nothing, Some(firmware)),
        ];
        for (cpuinfo, modules, verdict, found, remedy) in cases {
            let got = virtualisation_of(cpuinfo, |module| modules.contains(&module));
            assert_eq!(
                (got.verdict, got.found.as_str(), got.remedy),
                (verdict, found, remedy)
            );
        }
    }

    #[test]
    fn ways_to_the_device() {
        let got = kvm_device_of(Ok(()), |module| module == "kvm_amd");
        assert_eq!(
            (got.verdict, got.found.as_str()),
            (Verdict::Ok, "opens (module: kvm_amd)")
        );
        assert_eq!(kvm_device_of(Ok(()), |_| false).found, "opens (module: built in)");
        let no_device =
            "modprobe kvm_intel or kvm_amd; if that fails, switch virtualisation on in the firmware";
        let no_right = "run as root, or join the group kvm";
        for (errno, found, remedy) in [
            (Errno::NOENT, "there is no /dev/kvm", Some(no_device)),
            (Errno::NODEV, "there is no /dev/kvm", Some(no_device)),
            (Errno::NXIO, "there is no /dev/kvm", Some(no_device)),
            (Errno::ACCESS, "no right to open /dev/kvm", Some(no_right)),
            (Errno::PERM, "no right to open /dev/kvm", Some(no_right)),
            (
                Errno::IO,
                "cannot open /dev/kvm: Input/output error (os error 5)",
                None,
            ),
        ] {
            let got = kvm_device_of(Err(errno), |_| true);
            assert_eq!(
                (got.verdict, got.found.as_str(), got.remedy),
                (Verdict::Failure, found, remedy)
            );
        }
    }

    #[test]
    fn the_first_obstacle_is_told_with_its_remedy() {
        let device = |opened| kvm_device_of(opened, |_| false);
        let told = |cpuinfo, pvm, opened| {
            judge([
                virtualisation_of(cpuinfo, |module| pvm && module == "kvm_pvm"),
                device(opened),
            ])
        };
        assert_eq!(told(NESTED, false, Ok(())), Ok(()));
        assert_eq!(told(VMX, true, Ok(())), Err(format!("{PVM}; {PVM_REMEDY}")));
        assert_eq!(
            told(VMX, false, Err(Errno::ACCESS)).unwrap_err(),
            "no right to open /dev/kvm; run as root, or join the group kvm"
        );
        let neither = told(BARE, false, Err(Errno::NOENT)).unwrap_err();
        assert!(neither.starts_with("the processor shows neither"), "{neither}");
    }

    #[test]
    fn a_failure_has_a_remedy() {
        for finding in all() {
            assert!(
                finding.verdict == Verdict::Ok || finding.remedy.is_some() || finding.name == "/dev/kvm",
                "{finding:?}"
            );
        }
    }
}
