// SPDX-License-Identifier: Apache-2.0
//! Which devices a container may make, read and write: the OCI rules of `linux.resources.devices` as a BPF program
//! attached to its cgroup (Linux, Documentation/admin-guide/cgroup-v2.rst, "Device controller").
//!
//! The rules are those of cgroup v1: each in its turn changes a default, and a set of exceptions to it. A request is allowed
//! by default unless an exception shares a right with it, or refused by default unless one exception holds all its rights.
//! The program is this decision, written out for each exception. After the specification's rules come those that every
//! container needs, as in runc: without its terminal or /dev/null none can run.
//!
//! Attached once a container has been made and before it starts; processes that join it later are in the same cgroup.

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use serde_json::Value;

/// `BPF_DEVCG_ACC_*` (linux/bpf.h).
const MAKE: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL: u32 = MAKE | READ | WRITE;

/// `BPF_DEVCG_DEV_*`.
const BLOCK: u32 = 1;
const CHARACTER: u32 = 2;

/// Most exceptions: far more than there are devices, far less than the kernel takes instructions.
const MAX_EXCEPTIONS: usize = 4096;

/// Devices that a rule is about; None stands for any number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Devices {
    kind: u32,
    major: Option<u32>,
    minor: Option<u32>,
}

/// What the rules amount to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Policy {
    allow: bool,
    /// Devices, with the rights for which the default does not hold.
    exceptions: Vec<(Devices, u32)>,
}

impl Policy {
    /// The policy of an array of OCI rules, with what is always allowed.
    fn new(rules: &Value) -> Result<Self, String> {
        let mut policy = Self::default();
        for rule in rules.as_array().into_iter().flatten() {
            policy
                .take(rule)
                .map_err(|why| format!("device rule {rule}: {why}"))?;
        }
        for kind in [CHARACTER, BLOCK] {
            policy.set(
                Devices {
                    kind,
                    major: None,
                    minor: None,
                },
                MAKE,
                true,
            );
        }
        // null, zero, full, random, urandom, tty, console, ptmx, and the pseudo terminals.
        let numbers = [
            (1, Some(3)),
            (1, Some(5)),
            (1, Some(7)),
            (1, Some(8)),
            (1, Some(9)),
            (5, Some(0)),
            (5, Some(1)),
            (5, Some(2)),
            (136, None),
        ];
        for (major, minor) in numbers {
            let devices = Devices {
                kind: CHARACTER,
                major: Some(major),
                minor,
            };
            policy.set(devices, ALL, true);
        }
        Ok(policy)
    }

    fn take(&mut self, rule: &Value) -> Result<(), String> {
        let allow = rule.get("allow").and_then(Value::as_bool).unwrap_or(false);
        let kind = match rule.get("type").and_then(Value::as_str).unwrap_or("a") {
            "" | "a" => {
                *self = Self {
                    allow,
                    exceptions: Vec::new(),
                };
                return Ok(());
            }
            "c" | "u" => CHARACTER,
            "b" => BLOCK,
            other => return Err(format!("there are no devices of type {other:?}")),
        };
        let number = |key: &str| match rule.get(key).and_then(Value::as_i64) {
            None | Some(-1) => Ok(None),
            Some(number) => u32::try_from(number)
                .map(Some)
                .map_err(|_| format!("{key} is out of range")),
        };
        let devices = Devices {
            kind,
            major: number("major")?,
            minor: number("minor")?,
        };
        let access = match rule.get("access").and_then(Value::as_str).unwrap_or_default() {
            "" => ALL,
            text => text.chars().try_fold(0, |access, c| match c {
                'r' => Ok(access | READ),
                'w' => Ok(access | WRITE),
                'm' => Ok(access | MAKE),
                other => Err(format!("{other:?} is no kind of access")),
            })?,
        };
        self.set(devices, access, allow);
        if self.exceptions.len() > MAX_EXCEPTIONS {
            return Err(format!("more than {MAX_EXCEPTIONS} rules"));
        }
        Ok(())
    }

    fn set(&mut self, devices: Devices, access: u32, allow: bool) {
        let known = self.exceptions.iter().position(|(known, _)| *known == devices);
        match (allow == self.allow, known) {
            (true, Some(at)) => {
                self.exceptions[at].1 &= !access;
                if self.exceptions[at].1 == 0 {
                    self.exceptions.remove(at);
                }
            }
            (true, None) => {}
            (false, Some(at)) => self.exceptions[at].1 |= access,
            (false, None) => self.exceptions.push((devices, access)),
        }
    }

    /// The program: its argument is `struct bpf_cgroup_dev_ctx`, its result 1 to allow.
    fn program(&self) -> Vec<Instruction> {
        let mut program = vec![
            load(KIND, 0),
            copy(ACCESS, KIND),
            with(AND, KIND, 0xffff),
            with(SHIFT_RIGHT, ACCESS, 16),
            load(MAJOR, 4),
            load(MINOR, 8),
        ];
        for (devices, access) in &self.exceptions {
            let mut block = Vec::new();
            // Each jump skips what is left of the block; its length is known at the end.
            block.push(with(JUMP_NOT_EQUAL, KIND, devices.kind));
            if *access != ALL {
                block.push(copy(SCRATCH, ACCESS));
                if self.allow {
                    block.push(with(AND, SCRATCH, *access));
                    block.push(with(JUMP_EQUAL, SCRATCH, 0));
                } else {
                    block.push(with(AND, SCRATCH, ALL & !*access));
                    block.push(with(JUMP_NOT_EQUAL, SCRATCH, 0));
                }
            }
            for (register, number) in [(MAJOR, devices.major), (MINOR, devices.minor)] {
                if let Some(number) = number {
                    block.push(with(JUMP_NOT_EQUAL, register, number));
                }
            }
            block.extend(answer(!self.allow));
            let length = block.len();
            for (at, instruction) in block.iter_mut().enumerate() {
                if matches!(instruction.code, JUMP_EQUAL | JUMP_NOT_EQUAL) {
                    instruction.offset = i16::try_from(length - at - 1).unwrap_or(0);
                }
            }
            program.extend(block);
        }
        program.extend(answer(self.allow));
        program
    }
}

/// `struct bpf_insn` (Linux, Documentation/bpf/standardization/instruction-set.rst).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Instruction {
    code: u8,
    /// Destination in the lower half, source in the upper.
    registers: u8,
    offset: i16,
    immediate: u32,
}

const RESULT: u8 = 0;
/// The argument, until all is loaded.
const SCRATCH: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

/// Operations of 32 bits with an immediate value.
const AND: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
const MOVE: u8 = 0xb4;
const JUMP_EQUAL: u8 = 0x16;
const JUMP_NOT_EQUAL: u8 = 0x56;
/// Between registers, of 32 bits.
const MOVE_REGISTER: u8 = 0xbc;
/// From memory, of 32 bits.
const LOAD: u8 = 0x61;
const EXIT: u8 = 0x95;

fn with(code: u8, register: u8, immediate: u32) -> Instruction {
    Instruction {
        code,
        registers: register,
        offset: 0,
        immediate,
    }
}

fn copy(to: u8, from: u8) -> Instruction {
    Instruction {
        registers: to | from << 4,
        ..with(MOVE_REGISTER, 0, 0)
    }
}

fn load(to: u8, offset: i16) -> Instruction {
    Instruction {
        registers: to | SCRATCH << 4,
        offset,
        ..with(LOAD, 0, 0)
    }
}

fn answer(allow: bool) -> [Instruction; 2] {
    [with(MOVE, RESULT, u32::from(allow)), with(EXIT, 0, 0)]
}

/// The part of `union bpf_attr` for BPF_PROG_LOAD.
#[repr(C)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

/// The part of `union bpf_attr` for BPF_PROG_ATTACH.
#[repr(C)]
struct Attach {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

/// Confines the processes of a cgroup to the devices that OCI rules allow. Not to be called twice for one cgroup: both
/// programs would hold.
///
/// # Errors
/// A rule is none, or as of bpf(2).
pub fn confine(cgroup: &Path, rules: &Value) -> io::Result<()> {
    let policy = Policy::new(rules).map_err(|why| io::Error::new(io::ErrorKind::InvalidInput, why))?;
    let program = load_program(&policy.program())?;
    attach(File::open(cgroup)?.as_fd(), program.as_fd())
}

fn load_program(program: &[Instruction]) -> io::Result<OwnedFd> {
    const BPF_PROG_LOAD: libc::c_long = 5;
    const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
    let address = |pointer: *const u8| pointer.addr() as u64;
    let load = Load {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: address(program.as_ptr().cast()),
        license: address(c"Apache-2.0".as_ptr().cast()),
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
    };
    loop {
        // SAFETY: the kernel reads `size_of::<Load>()` bytes of the structure, `count` instructions and the license, all of
        // which live until the call returns, and writes nothing (no log).
        let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const load, size_of::<Load>()) };
        if let Ok(fd) = i32::try_from(fd)
            && fd >= 0
        {
            // SAFETY: the kernel has just made this descriptor for us alone.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
        let error = io::Error::last_os_error();
        // The verifier gives way to signals.
        if !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) {
            return Err(error);
        }
    }
}

fn attach(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    const BPF_PROG_ATTACH: libc::c_long = 8;
    const BPF_CGROUP_DEVICE: u32 = 6;
    /// A container that manages cgroups of its own may attach more, and none takes this one away.
    const BPF_F_ALLOW_MULTI: u32 = 2;
    let number = |fd: BorrowedFd<'_>| u32::try_from(fd.as_raw_fd()).map_err(io::Error::other);
    let attach = Attach {
        target: number(cgroup)?,
        program: number(program)?,
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: the kernel reads `size_of::<Attach>()` bytes of the structure and keeps nothing of it.
    let done = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_ATTACH,
            &raw const attach,
            size_of::<Attach>(),
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// What the kernel would do with the program.
    fn run(program: &[Instruction], request: (u32, u32, u32, u32)) -> bool {
        let (kind, access, major, minor) = request;
        let context = [kind | access << 16, major, minor];
        let mut registers = [0_u32; 6];
        let mut at = 0;
        loop {
            let Instruction {
                code,
                registers: names,
                offset,
                immediate,
            } = program[at];
            let (to, from) = (usize::from(names & 15), usize::from(names >> 4));
            let mut jump = |holds: bool| {
                if holds {
                    at += usize::try_from(offset).unwrap();
                }
            };
            match code {
                LOAD => registers[to] = context[usize::try_from(offset).unwrap() / 4],
                MOVE_REGISTER => registers[to] = registers[from],
                MOVE => registers[to] = immediate,
                AND => registers[to] &= immediate,
                SHIFT_RIGHT => registers[to] >>= immediate,
                JUMP_EQUAL => jump(registers[to] == immediate),
                JUMP_NOT_EQUAL => jump(registers[to] != immediate),
                EXIT => return registers[0] == 1,
                other => panic!("{other:#x}"),
            }
            at += 1;
        }
    }

    fn program(rules: &Value) -> Vec<Instruction> {
        Policy::new(rules).unwrap().program()
    }

    #[test]
    fn what_every_container_needs() {
        for rules in [Value::Null, json!([]), json!([{"allow": false, "access": "rwm"}])] {
            let program = program(&rules);
            for allowed in [
                (CHARACTER, READ | WRITE, 1, 3),
                (CHARACTER, READ, 136, 77),
                (CHARACTER, MAKE, 10, 200),
                (BLOCK, MAKE, 254, 0),
            ] {
                assert!(run(&program, allowed), "{rules} {allowed:?}");
            }
            for refused in [
                (CHARACTER, READ, 1, 1),
                (CHARACTER, READ | WRITE, 10, 200),
                (BLOCK, READ, 254, 0),
                (BLOCK, READ, 1, 3),
                (CHARACTER, READ | MAKE, 4, 0),
            ] {
                assert!(!run(&program, refused), "{rules} {refused:?}");
            }
        }
    }

    #[test]
    fn rules_in_their_order() {
        let program = program(&json!([
            {"allow": true, "type": "c", "major": 1, "minor": 1, "access": "rwm"},
            {"allow": false, "type": "a"},
            {"allow": true, "type": "b", "major": 8, "access": "r"},
            {"allow": true, "type": "b", "major": 8, "access": "w"},
            {"allow": true, "type": "b", "major": 9, "minor": -1, "access": "rw"},
            {"allow": false, "type": "b", "major": 9, "access": "w"},
            {"allow": true, "type": "c", "major": 4_294_967_295_u32, "minor": 5}
        ]));
        assert!(
            !run(&program, (CHARACTER, READ, 1, 1)),
            "the second clears the first"
        );
        assert!(run(&program, (BLOCK, READ | WRITE, 8, 3)), "two rules add up");
        assert!(run(&program, (BLOCK, READ, 9, 0)));
        assert!(!run(&program, (BLOCK, READ | WRITE, 9, 0)));
        assert!(run(&program, (CHARACTER, ALL, u32::MAX, 5)));
        assert!(!run(&program, (CHARACTER, READ, u32::MAX, 6)));
    }

    #[test]
    fn all_but() {
        let program = program(&json!([
            {"allow": true, "type": "a", "access": "rwm"},
            {"allow": false, "type": "b", "major": 8, "minor": 0, "access": "w"},
            {"allow": false, "type": "c", "major": 1, "minor": 3}
        ]));
        assert!(run(&program, (BLOCK, READ, 8, 0)));
        assert!(!run(&program, (BLOCK, READ | WRITE, 8, 0)));
        assert!(run(&program, (BLOCK, WRITE, 8, 1)));
        assert!(run(&program, (CHARACTER, READ | WRITE, 1, 3)), "always allowed");
        assert!(run(&program, (CHARACTER, ALL, 10, 200)));
    }

    #[test]
    fn what_is_no_rule() {
        for wrong in [
            json!([{"allow": true, "type": "x"}]),
            json!([{"allow": true, "type": "c", "major": -2}]),
            json!([{"allow": true, "type": "c", "major": 4_294_967_296_u64}]),
            json!([{"allow": true, "type": "c", "access": "rx"}]),
        ] {
            assert!(Policy::new(&wrong).is_err(), "{wrong}");
        }
    }
}
