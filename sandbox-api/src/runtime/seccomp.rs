// SPDX-License-Identifier: Apache-2.0
//! Seccomp profiles: which system calls the guest's kernel does for a container.
//!
//! The default one refuses what is not listed with EPERM, as docker's and containerd's do: what a program in a container
//! expects to work works, what administers the machine does not unless a capability says so. The VM is the boundary
//! either way; this one keeps a container from the guest's kernel, and so from its neighbours in the pod.
//!
//! clone3 answers ENOSYS: its flags lie in memory, where a filter cannot see them, and the C library then uses clone.
//! io_uring is refused, for its history of holes.
//!
//! A file given to `--security-opt seccomp=FILE` is in docker's form, which is OCI's (runtime-spec, config-linux.md,
//! "Seccomp") with rules that depend on capabilities and architecture; see [`Profile`].

use oci_spec::runtime::{
    Arch, Capabilities, Capability, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg,
    LinuxSeccompArgBuilder, LinuxSeccompFilterFlag, LinuxSeccompOperator,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Largest file taken for a profile, in bytes.
const MAX_FILE: usize = 1 << 20;
/// "Operation not permitted", Linux's number.
const EPERM: u32 = 1;
/// "Function not implemented".
const ENOSYS: u32 = 38;
/// AF_VSOCK: the way to the host is the agent's.
const AF_VSOCK: u64 = 40;
/// Every CLONE_NEW flag but CLONE_NEWTIME, which clone does not take.
const CLONE_NAMESPACES: u64 = 0x7e02_0000;
/// personality(2): Linux, 32 bits (0x8), uname of 2.6 (0x20000), both, and the question which it is.
const PERSONALITIES: [u64; 5] = [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// Allowed to every container. Names of the 32-bit ABI are among them: the guest runs such programs, too.
const ALLOWED: &[&str] = &[
    // Files by path.
    "access chdir chmod chown chown32 creat faccessat faccessat2 fchmodat fchmodat2 fchownat fstatat64 futimesat \
     getcwd lchown lchown32 link linkat lstat lstat64 mkdir mkdirat mknod mknodat name_to_handle_at newfstatat open \
     openat openat2 readlink readlinkat rename renameat renameat2 rmdir stat stat64 statfs statfs64 statx symlink \
     symlinkat truncate truncate64 umask unlink unlinkat utime utimensat utimensat_time64 utimes",
    // Open files.
    "_llseek cachestat close close_range copy_file_range dup dup2 dup3 fadvise64 fadvise64_64 fallocate fchdir fchmod \
     fchown fchown32 fcntl fcntl64 fdatasync flock fstat fstat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 getdents \
     getdents64 ioctl lseek pipe pipe2 pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readahead readv sendfile \
     sendfile64 splice sync sync_file_range syncfs tee vmsplice write writev",
    "fgetxattr flistxattr fremovexattr fsetxattr getxattr getxattrat lgetxattr listxattr listxattrat llistxattr \
     lremovexattr lsetxattr removexattr removexattrat setxattr setxattrat",
    // Waiting for them.
    "_newselect epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old \
     eventfd eventfd2 fanotify_mark inotify_add_watch inotify_init inotify_init1 inotify_rm_watch poll ppoll \
     ppoll_time64 pselect6 pselect6_time64 select signalfd signalfd4 timerfd_create timerfd_gettime timerfd_gettime64 \
     timerfd_settime timerfd_settime64",
    "io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup io_submit",
    // Memory.
    "brk madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mlock mlock2 mlockall mmap mmap2 mprotect \
     mremap mseal msync munlock munlockall munmap pkey_alloc pkey_free pkey_mprotect process_mrelease remap_file_pages",
    // Processes and threads.
    "arch_prctl execve execveat exit exit_group fork futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake \
     get_robust_list get_thread_area getcpu getpgid getpgrp getpid getppid getpriority getrlimit getrusage getsid gettid \
     ioprio_get ioprio_set modify_ldt pidfd_open pidfd_send_signal prctl prlimit64 process_vm_readv process_vm_writev \
     ptrace restart_syscall rseq set_robust_list set_thread_area set_tid_address setpgid setpriority setrlimit setsid \
     ugetrlimit vfork wait4 waitid waitpid",
    "sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam sched_getscheduler \
     sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam \
     sched_setscheduler sched_yield",
    // Who they are, and what they may.
    "capget capset getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 getresgid getresgid32 \
     getresuid getresuid32 getuid getuid32 landlock_add_rule landlock_create_ruleset landlock_restrict_self \
     lsm_get_self_attr lsm_list_modules lsm_set_self_attr seccomp setfsgid setfsgid32 setfsuid setfsuid32 setgid \
     setgid32 setgroups setgroups32 setregid setregid32 setresgid setresgid32 setresuid setresuid32 setreuid \
     setreuid32 setuid setuid32",
    // Signals.
    "kill pause rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait \
     rt_sigtimedwait_time64 rt_tgsigqueueinfo sigaltstack sigprocmask sigreturn tgkill tkill",
    // Time. Setting the clock takes a capability, which the kernel asks for.
    "adjtimex alarm clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64 \
     clock_nanosleep clock_nanosleep_time64 getitimer gettimeofday nanosleep setitimer time timer_create timer_delete \
     timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64 times",
    // Sockets; `socket` has a rule of its own.
    "accept accept4 bind connect getpeername getsockname getsockopt listen recv recvfrom recvmmsg recvmmsg_time64 \
     recvmsg send sendmmsg sendmsg sendto setsockopt shutdown socketcall socketpair",
    // IPC of System V and POSIX.
    "ipc mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 \
     mq_unlink msgctl msgget msgrcv msgsnd semctl semget semop semtimedop semtimedop_time64 shmat shmctl shmdt shmget",
    // The machine.
    "getrandom sysinfo uname uretprobe",
];

/// Allowed beyond that to a container with the capability in its bounding set.
const BY_CAPABILITY: &[(Capability, &str)] = &[
    (Capability::DacReadSearch, "open_by_handle_at"),
    (
        Capability::SysAdmin,
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick listmount lookup_dcookie mount mount_setattr \
         move_mount open_tree open_tree_attr perf_event_open quotactl quotactl_fd setdomainname sethostname setns \
         statmount syslog umount umount2 unshare",
    ),
    (Capability::SysBoot, "reboot"),
    (Capability::SysChroot, "chroot"),
    (Capability::SysModule, "delete_module finit_module init_module"),
    (Capability::SysPacct, "acct"),
    (Capability::SysPtrace, "kcmp pidfd_getfd process_madvise"),
    (Capability::SysRawio, "ioperm iopl"),
    (
        Capability::SysTime,
        "clock_settime clock_settime64 settimeofday stime",
    ),
    (Capability::SysTtyConfig, "vhangup"),
    (
        Capability::SysNice,
        "get_mempolicy mbind set_mempolicy set_mempolicy_home_node",
    ),
    (Capability::Syslog, "syslog"),
    (Capability::Bpf, "bpf"),
    (Capability::Perfmon, "perf_event_open"),
];

/// Which profile a container gets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Choice {
    /// The default one; none with `--privileged`.
    #[default]
    Default,
    /// The default one, with `--privileged`, too.
    Builtin,
    /// None.
    Unconfined,
    /// The user's.
    Profile(Box<Profile>),
}

impl Choice {
    /// The profile for a container with these capabilities in its bounding set.
    pub fn resolve(&self, privileged: bool, capabilities: &Capabilities) -> Option<LinuxSeccomp> {
        match self {
            Self::Default if privileged => None,
            Self::Unconfined => None,
            Self::Default | Self::Builtin => Some(Profile::builtin(capabilities).resolve(capabilities)),
            Self::Profile(profile) => Some(profile.resolve(capabilities)),
        }
    }
}

/// A profile as docker writes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Profile {
    default_action: LinuxSeccompAction,
    #[serde(default)]
    default_errno_ret: Option<u32>,
    #[serde(default)]
    architectures: Vec<Arch>,
    #[serde(default)]
    arch_map: Vec<ArchMap>,
    #[serde(default)]
    flags: Vec<LinuxSeccompFilterFlag>,
    #[serde(default)]
    syscalls: Option<Vec<Rule>>,
}

/// Which further ABIs come with an architecture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ArchMap {
    architecture: Arch,
    #[serde(default)]
    sub_architectures: Option<Vec<Arch>>,
}

/// What is done with some system calls.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rule {
    /// An older form of `names`.
    #[serde(default)]
    name: String,
    #[serde(default)]
    names: Vec<String>,
    action: LinuxSeccompAction,
    #[serde(default)]
    errno_ret: Option<u32>,
    #[serde(default)]
    args: Option<Vec<LinuxSeccompArg>>,
    #[serde(default)]
    includes: Condition,
    #[serde(default)]
    excludes: Condition,
}

/// When a rule holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Condition {
    #[serde(default)]
    caps: Option<Vec<Capability>>,
    /// Go's names of architectures.
    #[serde(default)]
    arches: Option<Vec<String>>,
    /// The guest's kernel is newer than any a profile asks for.
    #[serde(default)]
    min_kernel: Option<String>,
}

impl Condition {
    fn caps(&self) -> &[Capability] {
        self.caps.as_deref().unwrap_or_default()
    }

    fn arches(&self) -> &[String] {
        self.arches.as_deref().unwrap_or_default()
    }
}

fn is_ours(arch: &String) -> bool {
    arch == "amd64"
}

impl Rule {
    fn new(names: &str, action: LinuxSeccompAction, args: Option<Vec<LinuxSeccompArg>>) -> Self {
        Self {
            name: String::new(),
            names: names.split_whitespace().map(str::to_owned).collect(),
            action,
            errno_ret: None,
            args,
            includes: Condition::default(),
            excludes: Condition::default(),
        }
    }

    fn allow(names: &str) -> Self {
        Self::new(names, LinuxSeccompAction::ScmpActAllow, None)
    }

    fn allow_if(names: &str, op: LinuxSeccompOperator, value: u64, value_two: Option<u64>) -> Self {
        let mut arg = LinuxSeccompArgBuilder::default()
            .index(0_usize)
            .value(value)
            .op(op);
        if let Some(value) = value_two {
            arg = arg.value_two(value);
        }
        // All its fields have defaults: it cannot fail.
        let arg = arg.build().unwrap_or_default();
        Self::new(names, LinuxSeccompAction::ScmpActAllow, Some(vec![arg]))
    }

    fn holds(&self, capabilities: &Capabilities) -> bool {
        let Self {
            includes, excludes, ..
        } = self;
        includes.caps().iter().all(|cap| capabilities.contains(cap))
            && !excludes.caps().iter().any(|cap| capabilities.contains(cap))
            && (includes.arches().is_empty() || includes.arches().iter().any(is_ours))
            && !excludes.arches().iter().any(is_ours)
    }
}

impl Profile {
    /// The default one for a container with these capabilities in its bounding set.
    fn builtin(capabilities: &Capabilities) -> Self {
        let mut rules: Vec<Rule> = ALLOWED.iter().map(|names| Rule::allow(names)).collect();
        // Some calls come with either of two capabilities.
        let mut more = BTreeSet::new();
        for (capability, names) in BY_CAPABILITY {
            if capabilities.contains(capability) {
                more.extend(names.split_whitespace());
            }
        }
        if !more.is_empty() {
            let mut rule = Rule::allow("");
            rule.names = more.into_iter().map(str::to_owned).collect();
            rules.push(rule);
        }
        use LinuxSeccompOperator::{ScmpCmpEq, ScmpCmpMaskedEq, ScmpCmpNe};
        rules.push(Rule::allow_if("socket", ScmpCmpNe, AF_VSOCK, None));
        for personality in PERSONALITIES {
            rules.push(Rule::allow_if("personality", ScmpCmpEq, personality, None));
        }
        if !capabilities.contains(&Capability::SysAdmin) {
            rules.push(Rule::allow_if(
                "clone",
                ScmpCmpMaskedEq,
                CLONE_NAMESPACES,
                Some(0),
            ));
            let mut clone3 = Rule::new("clone3", LinuxSeccompAction::ScmpActErrno, None);
            clone3.errno_ret = Some(ENOSYS);
            rules.push(clone3);
        }
        Self {
            default_action: LinuxSeccompAction::ScmpActErrno,
            default_errno_ret: Some(EPERM),
            architectures: vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32],
            arch_map: Vec::new(),
            flags: Vec::new(),
            syscalls: Some(rules),
        }
    }

    /// Reads a profile's file.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() > MAX_FILE {
            return Err(format!("it is larger than {MAX_FILE} bytes"));
        }
        let profile: Self = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        if !profile.architectures.is_empty() && !profile.arch_map.is_empty() {
            return Err("use either 'architectures' or 'archMap'".to_owned());
        }
        for rule in profile.syscalls.iter().flatten() {
            if rule.name.is_empty() == rule.names.is_empty() {
                return Err("each of its rules needs either 'name' or 'names'".to_owned());
            }
            if rule.action == LinuxSeccompAction::ScmpActNotify {
                return Err("SCMP_ACT_NOTIFY has nobody to notify in the virtual machine".to_owned());
            }
            if rule.args.iter().flatten().any(|arg| arg.index() > 5) {
                return Err("a system call has the arguments 0 to 5 only".to_owned());
            }
        }
        Ok(profile)
    }

    /// The profile in OCI's form, for a container with these capabilities in its bounding set.
    fn resolve(&self, capabilities: &Capabilities) -> LinuxSeccomp {
        let mut architectures = self.architectures.clone();
        let ours = |map: &&ArchMap| map.architecture == Arch::ScmpArchX86_64;
        if let Some(map) = self.arch_map.iter().find(ours) {
            architectures.push(map.architecture);
            architectures.extend(map.sub_architectures.iter().flatten());
        }
        let rules = self.syscalls.iter().flatten();
        let syscalls = rules.filter(|rule| rule.holds(capabilities)).map(|rule| {
            let mut names = rule.names.clone();
            names.extend((!rule.name.is_empty()).then(|| rule.name.clone()));
            let mut syscall = oci_spec::runtime::LinuxSyscall::default();
            let args = rule.args.clone().filter(|args| !args.is_empty());
            syscall
                .set_names(names)
                .set_action(rule.action)
                .set_errno_ret(rule.errno_ret)
                .set_args(args);
            syscall
        });
        let mut seccomp = LinuxSeccomp::default();
        seccomp
            .set_default_action(self.default_action)
            .set_default_errno_ret(self.default_errno_ret)
            .set_architectures((!architectures.is_empty()).then_some(architectures))
            .set_flags((!self.flags.is_empty()).then(|| self.flags.clone()))
            .set_syscalls(Some(syscalls.collect()));
        seccomp
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::capabilities;
    use std::collections::HashSet;

    fn actions(seccomp: &LinuxSeccomp, name: &str) -> Vec<(LinuxSeccompAction, bool)> {
        let rules = seccomp.syscalls().as_ref().unwrap().iter();
        rules
            .filter(|rule| rule.names().iter().any(|n| n == name))
            .map(|rule| (rule.action(), rule.args().is_some()))
            .collect()
    }

    #[test]
    fn the_default_profile() {
        use LinuxSeccompAction::{ScmpActAllow, ScmpActErrno};
        let usual = capabilities::resolve(false, &[], &[]);
        let seccomp = Choice::Default.resolve(false, &usual).unwrap();
        assert_eq!(
            (seccomp.default_action(), seccomp.default_errno_ret()),
            (ScmpActErrno, Some(1))
        );
        assert_eq!(actions(&seccomp, "read"), [(ScmpActAllow, false)]);
        assert_eq!(actions(&seccomp, "chroot"), [(ScmpActAllow, false)]);
        assert_eq!(actions(&seccomp, "clone"), [(ScmpActAllow, true)]);
        assert_eq!(actions(&seccomp, "clone3"), [(ScmpActErrno, false)]);
        assert_eq!(actions(&seccomp, "personality").len(), PERSONALITIES.len());
        for refused in [
            "mount",
            "unshare",
            "keyctl",
            "bpf",
            "init_module",
            "kexec_load",
            "io_uring_setup",
            "userfaultfd",
        ] {
            assert_eq!(actions(&seccomp, refused), [], "{refused}");
        }
        // Conditional and unconditional rules do not mix in a filter.
        let rules = seccomp.syscalls().as_ref().unwrap();
        let unconditional: Vec<&String> = rules
            .iter()
            .filter(|r| r.args().is_none())
            .flat_map(|r| r.names())
            .collect();
        assert_eq!(
            unconditional.iter().collect::<HashSet<_>>().len(),
            unconditional.len()
        );
        for rule in rules.iter().filter(|rule| rule.args().is_some()) {
            assert!(rule.names().iter().all(|name| !unconditional.contains(&name)));
        }
    }

    #[test]
    fn capabilities_open_it() {
        let admin = capabilities::resolve(false, &[capabilities::parse("sys_admin").unwrap()], &[]);
        let seccomp = Choice::Default.resolve(false, &admin).unwrap();
        for allowed in ["mount", "unshare", "clone", "clone3"] {
            assert_eq!(
                actions(&seccomp, allowed),
                [(LinuxSeccompAction::ScmpActAllow, false)],
                "{allowed}"
            );
        }
        assert_eq!(actions(&seccomp, "keyctl"), []);
        let none = Capabilities::new();
        assert_eq!(
            actions(&Choice::Default.resolve(false, &none).unwrap(), "chroot"),
            []
        );
        assert!(Choice::Default.resolve(true, &admin).is_none());
        assert!(Choice::Builtin.resolve(true, &admin).is_some());
        assert!(Choice::Unconfined.resolve(false, &none).is_none());
    }

    #[test]
    fn a_profile_of_dockers_form() {
        let text = br#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":38,
            "archMap":[{"architecture":"SCMP_ARCH_X86_64","subArchitectures":["SCMP_ARCH_X86"]},
                {"architecture":"SCMP_ARCH_AARCH64","subArchitectures":null}],
            "syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW","args":[],"comment":"x"},
                {"name":"mount","action":"SCMP_ACT_ALLOW","includes":{"caps":["CAP_SYS_ADMIN"]}},
                {"names":["clone"],"action":"SCMP_ACT_ALLOW","excludes":{"caps":["CAP_SYS_ADMIN"],"arches":["s390x"]},
                    "args":[{"index":0,"value":2114060288,"op":"SCMP_CMP_MASKED_EQ"}]},
                {"names":["arm_x"],"action":"SCMP_ACT_ALLOW","includes":{"arches":["arm64"],"minKernel":"4.8"}}]}"#;
        let profile = Choice::Profile(Box::new(Profile::parse(text).unwrap()));
        let names = |capabilities: &Capabilities| -> Vec<String> {
            let seccomp = profile.resolve(true, capabilities).unwrap();
            assert_eq!(
                seccomp.architectures().as_ref().unwrap(),
                &[Arch::ScmpArchX86_64, Arch::ScmpArchX86]
            );
            let rules = seccomp.syscalls().as_ref().unwrap();
            rules.iter().flat_map(|rule| rule.names().clone()).collect()
        };
        assert_eq!(names(&Capabilities::new()), ["read", "clone"]);
        assert_eq!(names(&[Capability::SysAdmin].into()), ["read", "mount"]);
    }

    #[test]
    fn what_is_no_profile() {
        for wrong in [
            &b"{}"[..],
            b"[]",
            br#"{"defaultAction":"SCMP_ACT_WHATEVER"}"#,
            br#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"action":"SCMP_ACT_ALLOW"}]}"#,
            br#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["a"],"action":"SCMP_ACT_NOTIFY"}]}"#,
            br#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["a"],"action":"SCMP_ACT_ALLOW",
                "args":[{"index":6,"value":1,"op":"SCMP_CMP_EQ"}]}]}"#,
        ] {
            assert!(
                Profile::parse(wrong).is_err(),
                "{}",
                String::from_utf8_lossy(wrong)
            );
        }
    }
}
