// SPDX-License-Identifier: Apache-2.0
//! A container's seccomp profile becomes what its guest's kernel takes: a program of classic BPF (Linux,
//! Documentation/userspace-api/seccomp_filter.rst).
//!
//! The pods of a node have few different profiles, and libseccomp needs some millions of instructions to translate one. So
//! the host does it, once for each, and guests get programs: for a container's first process and each one after it, they
//! only load it. Programs look for a call in a binary tree and not one after the other: the kernel runs them for each call
//! there is when it takes them.
//!
//! A profile that refuses what it does not list cannot list the calls of newer kernels than its author knew. A program that
//! tries such a call expects ENOSYS on an older kernel, and does without; EPERM makes it fail. So calls with higher numbers
//! than any that the profile names answer ENOSYS, as with runc.

use cloister_protocol::pod::{ContainerSpec, Seccomp};
use cloister_protocol::protobuf::MessageField;
use cloister_protocol::protobuf::well_known_types::any::Any;
use cloister_protocol::{AGENT_PACKAGE, SPEC_TYPE_URL, pack};
use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall, set_api,
};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator,
    Spec,
};
use rustix::fs::{MemfdFlags, memfd_create};
use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::io::{self, Read, Seek};
use std::sync::{Arc, Mutex, OnceLock};

use crate::sync::lock;

/// Profiles whose translations are kept. containerd's own differs with the capabilities of a container.
const KEPT: usize = 16;
/// `BPF_MAXINSNS`.
const MAX_INSTRUCTIONS: usize = 4096;
/// `sizeof(struct sock_filter)`.
const INSTRUCTION: usize = 8;
/// From this number on, system calls have the same one in all ABIs.
const COMMON_CALLS: u32 = 424;
/// Bit of the numbers of the x32 ABI.
const X32: u32 = 0x4000_0000;
/// `AUDIT_ARCH_X86_64`, `AUDIT_ARCH_I386`.
const ARCHITECTURES: [(Arch, u32); 2] = [
    (Arch::ScmpArchX86_64, 0xc000_003e),
    (Arch::ScmpArchX86, 0x4000_0003),
];
/// `SECCOMP_RET_ERRNO`.
const ERRNO: u32 = 0x0005_0000;
/// Largest number of an error (`MAX_ERRNO`).
const MAX_ERRNO: u32 = 4095;

/// Those translated last, the last one first.
static TRANSLATED: Mutex<VecDeque<(LinuxSeccomp, Arc<Seccomp>)>> = Mutex::new(VecDeque::new());

/// Takes the profile out of a specification and translates it.
///
/// # Errors
/// What of the profile cannot be done.
pub fn take(spec: &mut Spec) -> Result<Option<Arc<Seccomp>>, String> {
    let Some(linux) = spec.linux_mut() else {
        return Ok(None);
    };
    let Some(profile) = linux.seccomp().clone() else {
        return Ok(None);
    };
    linux.set_seccomp(None);
    if let Some(program) = known(&profile) {
        return Ok(Some(program));
    }
    // Not under the lock: a long one keeps nobody else waiting.
    let program = Arc::new(translate(&profile).map_err(|e| format!("linux.seccomp: {e}"))?);
    let mut translated = lock(&TRANSLATED);
    translated.truncate(KEPT - 1);
    translated.push_front((profile, Arc::clone(&program)));
    Ok(Some(program))
}

/// The translation of a profile that has come before.
fn known(profile: &LinuxSeccomp) -> Option<Arc<Seccomp>> {
    let mut translated = lock(&TRANSLATED);
    let at = translated.iter().position(|(known, _)| known == profile)?;
    let found = translated.remove(at)?;
    let program = Arc::clone(&found.1);
    translated.push_front(found);
    Some(program)
}

/// What the agent's Create takes as its options: a specification, and the profile that was taken out of it.
///
/// # Errors
/// They cannot be encoded.
pub fn options(spec: &Spec, profile: Option<&Seccomp>) -> io::Result<Any> {
    let value = serde_json::to_vec(spec)?;
    let Some(profile) = profile else {
        return Ok(Any {
            type_url: SPEC_TYPE_URL.into(),
            value,
            ..Any::default()
        });
    };
    let both = ContainerSpec {
        oci: value,
        seccomp: MessageField::some(profile.clone()),
        ..ContainerSpec::default()
    };
    pack(AGENT_PACKAGE, &both).map_err(io::Error::other)
}

/// Translates a profile.
///
/// # Errors
/// What of it cannot be done.
pub fn translate(profile: &LinuxSeccomp) -> Result<Seccomp, String> {
    let (filter, named) = build(profile, 2)?;
    let rest = export(&filter).map_err(|e| format!("the translation: {e}"))?;
    let mut program = Vec::new();
    if profile.default_action() == LinuxSeccompAction::ScmpActErrno
        && let Some(highest) = named
    {
        program = unknown_calls(profile, highest.max(COMMON_CALLS));
    }
    program.extend(rest);
    let count = program.len() / INSTRUCTION;
    if count > MAX_INSTRUCTIONS {
        return Err(format!(
            "it takes {count} instructions of BPF, and the kernel takes {MAX_INSTRUCTIONS} at most"
        ));
    }
    Ok(Seccomp {
        flags: flags(profile),
        program,
        ..Seccomp::default()
    })
}

/// libseccomp writes to descriptors.
fn export(filter: &ScmpFilterContext) -> io::Result<Vec<u8>> {
    let mut file = File::from(memfd_create("seccomp", MemfdFlags::CLOEXEC)?);
    filter.export_bpf(&file).map_err(io::Error::other)?;
    let mut program = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut program)?;
    Ok(program)
}

/// Flags of seccomp(2).
fn flags(profile: &LinuxSeccomp) -> u32 {
    let flags = profile.flags().iter().flatten().map(|flag| match flag {
        LinuxSeccompFilterFlag::SeccompFilterFlagTsync => 1,
        LinuxSeccompFilterFlag::SeccompFilterFlagLog => 2,
        LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => 4,
        // For those who wait for a listener, of whom there are none.
        LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
    });
    flags.fold(0, |all, flag| all | flag)
}

/// The profile as libseccomp has it, and the highest number of a call that it names.
fn build(profile: &LinuxSeccomp, optimize: u32) -> Result<(ScmpFilterContext, Option<u32>), String> {
    // What actions there are is a question to the guest's kernel, not to the host's: this level has all but SCMP_ACT_NOTIFY. It
    // is the library's, for all threads.
    static LEVEL: OnceLock<bool> = OnceLock::new();
    if !LEVEL.get_or_init(|| set_api(3).is_ok()) {
        return Err("libseccomp 2.5 or later is needed".to_owned());
    }
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    let mut filter = ScmpFilterContext::new(default).map_err(|e| format!("the default action: {e}"))?;
    filter
        .set_ctl_optimize(optimize)
        .map_err(|e| format!("libseccomp: {e}"))?;
    for arch in profile.architectures().iter().flatten() {
        let Some(ours) = architecture(*arch) else {
            continue;
        };
        filter
            .add_arch(ours)
            .map_err(|e| format!("architecture {arch:?}: {e}"))?;
    }
    let (mut highest, mut left) = (None, MAX_INSTRUCTIONS);
    for rule in profile.syscalls().iter().flatten() {
        let action = action(rule.action(), rule.errno_ret())?;
        for name in rule.names() {
            // Each takes an instruction at least, and the library's time grows with the square.
            let Some(fewer) = left.checked_sub(rule.args().as_ref().map_or(1, Vec::len).max(1)) else {
                return Err(format!("it has more than {MAX_INSTRUCTIONS} rules"));
            };
            left = fewer;
            // One that libseccomp does not know is newer than it.
            let Ok(call) = ScmpSyscall::from_name(name) else {
                continue;
            };
            highest = highest.max(u32::try_from(call.as_raw_syscall()).ok());
            if action == default {
                continue;
            }
            let wrong = |e| format!("the rule for {name}: {e}");
            for conditions in conditions(rule.args().as_deref().unwrap_or_default()).map_err(wrong)? {
                filter
                    .add_rule_conditional(action, call, &conditions)
                    .map_err(|e| wrong(e.to_string()))?;
            }
        }
    }
    Ok((filter, highest))
}

/// Sets of conditions any of which is to hold. Those of a rule must all hold, but where several are on the same argument,
/// which libseccomp does not do in one rule, each stands for itself, as with runc.
fn conditions(args: &[LinuxSeccompArg]) -> Result<Vec<Vec<ScmpArgCompare>>, String> {
    let all = args.iter().map(|arg| {
        let index = u32::try_from(arg.index()).ok().filter(|index| *index <= 5);
        let index = index.ok_or("a system call has the arguments 0 to 5 only")?;
        // The mask is the first value, and what is compared with the second.
        let second = arg.value_two().unwrap_or(0);
        let (op, value) = match arg.op() {
            LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, arg.value()),
            LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, arg.value()),
            LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, arg.value()),
            LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, arg.value()),
            LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, arg.value()),
            LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, arg.value()),
            LinuxSeccompOperator::ScmpCmpMaskedEq => (ScmpCompareOp::MaskedEqual(arg.value()), second),
        };
        Ok(ScmpArgCompare::new(index, op, value))
    });
    let all = all.collect::<Result<Vec<_>, String>>()?;
    let indices: BTreeSet<usize> = args.iter().map(LinuxSeccompArg::index).collect();
    Ok(if indices.len() == all.len() {
        vec![all]
    } else {
        all.into_iter().map(|one| vec![one]).collect()
    })
}

fn action(action: LinuxSeccompAction, number: Option<u32>) -> Result<ScmpAction, String> {
    let number = |most: u32| match number {
        Some(number) if number > most => Err(format!("errnoRet {number} is more than {most}")),
        // EPERM.
        number => Ok(number.unwrap_or(1)),
    };
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => ScmpAction::KillThread,
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(number(MAX_ERRNO)?.cast_signed()),
        LinuxSeccompAction::ScmpActTrace => {
            ScmpAction::Trace(u16::try_from(number(0xffff)?).map_err(|e| e.to_string())?)
        }
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActNotify => {
            return Err("SCMP_ACT_NOTIFY has nobody to notify in the virtual machine".to_owned());
        }
    })
}

/// None for those whose calls the guest's kernel does not take: profiles may list them, and they are without effect.
fn architecture(arch: Arch) -> Option<ScmpArch> {
    Some(match arch {
        Arch::ScmpArchNative => ScmpArch::Native,
        Arch::ScmpArchX86_64 => ScmpArch::X8664,
        Arch::ScmpArchX86 => ScmpArch::X86,
        Arch::ScmpArchX32 => ScmpArch::X32,
        _ => return None,
    })
}

/// The beginning of a program, which goes on with the rest: calls of the profile's architectures with numbers beyond `highest`
/// answer ENOSYS. No rule is for them, and all the program knew to answer is its default.
fn unknown_calls(profile: &LinuxSeccomp, highest: u32) -> Vec<u8> {
    const LOAD: u16 = 0x20;
    const JUMP_EQUAL: u16 = 0x15;
    const JUMP_GREATER: u16 = 0x25;
    const JUMP_GREATER_EQUAL: u16 = 0x35;
    const RETURN: u16 = 0x06;
    // Of struct seccomp_data.
    const NUMBER: u32 = 0;
    const ARCHITECTURE: u32 = 4;
    const ENOSYS: u32 = 38;
    let mut program = Vec::new();
    let mut add = |code: u16, if_true: u8, if_false: u8, k: u32| {
        program.extend(code.to_ne_bytes());
        program.extend([if_true, if_false]);
        program.extend(k.to_ne_bytes());
    };
    let given = profile.architectures().as_deref().unwrap_or_default();
    let ours = ARCHITECTURES.iter().filter(|(arch, _)| {
        // Native is always there.
        *arch == Arch::ScmpArchX86_64 || given.contains(arch)
    });
    add(LOAD, 0, 0, ARCHITECTURE);
    let mut left = ours.clone().count();
    for (_, number) in ours {
        left -= 1;
        // To the number of the call; or to the next one, or past all of this.
        let hit = u8::try_from(left).unwrap_or(0);
        add(JUMP_EQUAL, hit, if left == 0 { 4 } else { 0 }, *number);
    }
    add(LOAD, 0, 0, NUMBER);
    add(JUMP_GREATER, 0, 2, highest);
    add(JUMP_GREATER_EQUAL, 1, 0, X32);
    add(RETURN, 0, 0, ERRNO | ENOSYS);
    program
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const ALLOW: u32 = 0x7fff_0000;
    const KILL_THREAD: u32 = 0;
    const X86_64: u32 = 0xc000_003e;
    const I386: u32 = 0x4000_0003;

    fn profile(json: Value) -> LinuxSeccomp {
        serde_json::from_value(json).unwrap()
    }

    fn program(profile: &LinuxSeccomp) -> Vec<u8> {
        translate(profile).unwrap().program
    }

    /// What a program answers to a call.
    fn run(program: &[u8], arch: u32, number: u32, args: [u64; 6]) -> u32 {
        let mut data = [number, arch, 0, 0].map(u32::to_ne_bytes).concat();
        data.extend(args.iter().flat_map(|arg| arg.to_ne_bytes()));
        let word = |at: usize| u32::from_ne_bytes(data[at..at + 4].try_into().unwrap());
        let (mut at, mut a) = (0, 0_u32);
        loop {
            let one = &program[at * INSTRUCTION..(at + 1) * INSTRUCTION];
            let code = u16::from_ne_bytes([one[0], one[1]]);
            let k = u32::from_ne_bytes(one[4..].try_into().unwrap());
            at += 1;
            let holds = match code {
                0x20 => {
                    a = word(usize::try_from(k).unwrap());
                    continue;
                }
                0x54 => {
                    a &= k;
                    continue;
                }
                0x05 => {
                    at += usize::try_from(k).unwrap();
                    continue;
                }
                0x06 => return k,
                0x15 => a == k,
                0x25 => a > k,
                0x35 => a >= k,
                0x45 => a & k != 0,
                _ => panic!("operation {code:#x}"),
            };
            at += usize::from(if holds { one[2] } else { one[3] });
        }
    }

    #[test]
    fn rules_hold_with_their_conditions() {
        let profile = profile(json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 13,
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_AARCH64"],
            "flags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"],
            "syscalls": [
                {"names": ["read", "not_a_call"], "action": "SCMP_ACT_ALLOW"},
                {"names": ["clone"], "action": "SCMP_ACT_ALLOW",
                 "args": [{"index": 0, "value": 0x7e02_0000, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]},
                {"names": ["ioctl"], "action": "SCMP_ACT_TRAP", "args": [{"index": 1, "value": 5, "op": "SCMP_CMP_GT"},
                    {"index": 2, "value": 0x1_0000_0000_u64, "op": "SCMP_CMP_EQ"}]},
                {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"},
                    {"index": 0, "value": 2, "op": "SCMP_CMP_EQ"}]},
                {"names": ["write"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28},
                {"names": ["close"], "action": "SCMP_ACT_KILL_PROCESS"},
                {"names": ["dup"], "action": "SCMP_ACT_LOG"},
                {"names": ["dup2"], "action": "SCMP_ACT_TRACE", "errnoRet": 7}]}));
        let translated = translate(&profile).unwrap();
        assert_eq!(translated.flags, 6);
        let run = |arch, number, args| run(&translated.program, arch, number, args);
        let call = |number, first, second, third| run(X86_64, number, [first, second, third, 0, 0, 0]);
        assert_eq!(call(0, 1, 2, 3), ALLOW, "read");
        assert_eq!(call(56, 0x11, 0, 0), ALLOW, "clone");
        assert_eq!(call(56, 0x0002_0011, 0, 0), ERRNO | 13, "clone with a namespace");
        assert_eq!(call(16, 0, 6, 1 << 32), 0x0003_0000, "ioctl");
        assert_eq!(call(16, 0, 5, 1 << 32), ERRNO | 13, "ioctl, second");
        assert_eq!(call(16, 0, 6, 1), ERRNO | 13, "ioctl, third");
        assert_eq!(
            [1, 2, 3].map(|family| call(41, family, 0, 0)),
            [ALLOW, ALLOW, ERRNO | 13],
            "socket"
        );
        assert_eq!(call(1, 0, 0, 0), ERRNO | 28, "write");
        assert_eq!(call(3, 0, 0, 0), 0x8000_0000, "close");
        assert_eq!(call(32, 0, 0, 0), 0x7ffc_0000, "dup");
        assert_eq!(call(33, 0, 0, 0), 0x7ff0_0007, "dup2");
        assert_eq!(call(2, 0, 0, 0), ERRNO | 13, "open, which no rule names");
        // Of the other ABI, where read and write are 3 and 4.
        assert_eq!(run(I386, 3, [0; 6]), ALLOW);
        assert_eq!(run(I386, 4, [0; 6]), ERRNO | 28);
        // Newer than the profile; x32's, whose numbers have a bit of their own; a foreign architecture's.
        for arch in [X86_64, I386] {
            assert_eq!(run(arch, 424, [0; 6]), ERRNO | 13);
            assert_eq!(run(arch, 425, [0; 6]), ERRNO | 38);
        }
        assert_eq!(run(X86_64, X32 | 425, [0; 6]), KILL_THREAD);
        assert_eq!(run(0xc000_00b7, 425, [0; 6]), KILL_THREAD);
    }

    #[test]
    fn only_errors_become_unknown_calls() {
        for (default, answer) in [
            ("SCMP_ACT_KILL", KILL_THREAD),
            ("SCMP_ACT_TRAP", 0x0003_0000),
            ("SCMP_ACT_ALLOW", ALLOW),
        ] {
            let profile = profile(json!({"defaultAction": default,
                "syscalls": [{"names": ["write"], "action": "SCMP_ACT_LOG"}]}));
            assert_eq!(run(&program(&profile), X86_64, 900, [0; 6]), answer, "{default}");
        }
        let nothing = profile(json!({"defaultAction": "SCMP_ACT_ERRNO"}));
        assert_eq!(run(&program(&nothing), X86_64, 900, [0; 6]), ERRNO | 1);
        // The highest number that is named counts, where its rule is the default, too.
        let newest = profile(json!({"defaultAction": "SCMP_ACT_ERRNO",
            "syscalls": [{"names": ["pidfd_getfd"], "action": "SCMP_ACT_ERRNO"}]}));
        let answers = [438, 439].map(|number| run(&program(&newest), X86_64, number, [0; 6]));
        assert_eq!(answers, [ERRNO | 1, ERRNO | 38]);
    }

    #[test]
    fn a_tree_answers_as_a_list_does() {
        use crate::runtime::seccomp::Choice;
        use oci_spec::runtime::{Capabilities, Capability};
        let all = [
            Capabilities::new(),
            Capabilities::from([Capability::SysAdmin, Capability::SysTime]),
        ];
        for capabilities in all {
            let profile = Choice::Default.resolve(false, &capabilities).unwrap();
            let tree = program(&profile);
            let (list, _) = build(&profile, 1).unwrap();
            let mut list = export(&list).unwrap();
            list.splice(..0, unknown_calls(&profile, highest(&profile)));
            for number in (0..600).chain(X32..X32 + 600) {
                for first in [0, 1, 8, 40, 0x0002_0000, 0x7e02_0000, u64::MAX] {
                    for arch in [X86_64, I386, 0xc000_00b7] {
                        let args = [first, 3, first, 0, 0, 0];
                        let answers = [&tree, &list].map(|program| run(program, arch, number, args));
                        assert_eq!(answers[0], answers[1], "{arch:#x} {number:#x} {first:#x}");
                    }
                }
            }
        }
    }

    fn highest(profile: &LinuxSeccomp) -> u32 {
        build(profile, 1).unwrap().1.unwrap().max(COMMON_CALLS)
    }

    #[test]
    fn what_cannot_be_done_is_named() {
        let rule = |rule: Value| json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]});
        let argument = |index: u32| json!([{"index": index, "value": 0, "op": "SCMP_CMP_EQ"}]);
        for (wrong, what) in [
            (json!({"defaultAction": "SCMP_ACT_NOTIFY"}), "SCMP_ACT_NOTIFY"),
            (
                rule(json!({"names": ["read"], "action": "SCMP_ACT_NOTIFY"})),
                "SCMP_ACT_NOTIFY",
            ),
            (
                rule(json!({"names": ["read"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5000})),
                "errnoRet 5000",
            ),
            (
                rule(json!({"names": ["read"], "action": "SCMP_ACT_TRACE", "errnoRet": 70_000})),
                "errnoRet 70000",
            ),
            (
                rule(json!({"names": ["read"], "action": "SCMP_ACT_KILL", "args": argument(6)})),
                "the rule for read",
            ),
        ] {
            let error = translate(&profile(wrong)).err().unwrap();
            assert!(error.contains(what), "{error}");
        }
        // One argument of one call, compared with too many values, each in two halves.
        let calls: Vec<_> = (0..2200_u64)
            .map(|value| {
                json!({"names": ["ioctl"], "action": "SCMP_ACT_KILL",
                "args": [{"index": 1, "value": value << 32 | value, "op": "SCMP_CMP_EQ"}]})
            })
            .collect();
        let error = translate(&profile(
            json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": calls}),
        ))
        .err()
        .unwrap();
        assert!(error.contains("4096 at most"), "{error}");
        let names: Vec<_> = (0..5000).map(|n| format!("call{n}")).collect();
        let many = rule(json!({"names": names, "action": "SCMP_ACT_KILL"}));
        let error = translate(&profile(many)).err().unwrap();
        assert!(error.contains("more than 4096 rules"), "{error}");
    }

    #[test]
    fn a_profile_is_translated_once() {
        let spec = |number: u32| -> Spec {
            serde_json::from_value(
                json!({"ociVersion": "1.2.0", "linux": {"seccomp": {"defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": ["acct"], "action": "SCMP_ACT_ERRNO", "errnoRet": number}]}}}),
            )
            .unwrap()
        };
        let mut first = spec(1);
        let translated = take(&mut first).unwrap().unwrap();
        assert!(first.linux().as_ref().unwrap().seccomp().is_none());
        assert!(Arc::ptr_eq(&translated, &take(&mut spec(1)).unwrap().unwrap()));
        for other in 2..40 {
            assert_ne!(
                translated.program,
                take(&mut spec(other)).unwrap().unwrap().program
            );
        }
        assert!(lock(&TRANSLATED).len() <= KEPT);
        assert_eq!(translated.program, take(&mut spec(1)).unwrap().unwrap().program);
        let mut none: Spec = serde_json::from_value(json!({"ociVersion": "1.2.0", "linux": {}})).unwrap();
        assert!(take(&mut none).unwrap().is_none());
    }
}
