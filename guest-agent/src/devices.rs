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
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use cloister_protocol::bpf::{self, Instruction, answer, between, load, load_program, number, op, with};
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
            load(KIND, SCRATCH, 0),
            copy(ACCESS, KIND),
            with(op::AND, KIND, 0xffff),
            with(op::SHIFT_RIGHT, ACCESS, 16),
            load(MAJOR, SCRATCH, 4),
            load(MINOR, SCRATCH, 8),
        ];
        for (devices, access) in &self.exceptions {
            let mut block = Vec::new();
            // Each jump skips what is left of the block; its length is known at the end.
            block.push(unless(KIND, devices.kind));
            if *access != ALL {
                block.push(copy(SCRATCH, ACCESS));
                if self.allow {
                    block.push(with(op::AND, SCRATCH, access.cast_signed()));
                    block.push(with(op::JUMP_EQUAL, SCRATCH, 0));
                } else {
                    block.push(with(op::AND, SCRATCH, (ALL & !*access).cast_signed()));
                    block.push(unless(SCRATCH, 0));
                }
            }
            for (register, number) in [(MAJOR, devices.major), (MINOR, devices.minor)] {
                if let Some(number) = number {
                    block.push(unless(register, number));
                }
            }
            block.extend(answer((!self.allow).into()));
            let length = block.len();
            for (at, instruction) in block.iter_mut().enumerate() {
                if matches!(instruction.code, op::JUMP_EQUAL | op::JUMP_NOT_EQUAL) {
                    instruction.offset = i16::try_from(length - at - 1).unwrap_or(0);
                }
            }
            program.extend(block);
        }
        program.extend(answer(self.allow.into()));
        program
    }
}

/// The argument, until all is loaded.
const SCRATCH: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

fn copy(to: u8, from: u8) -> Instruction {
    between(op::MOVE_REGISTER, to, from)
}

/// Jumps, the offset to be filled in, if the register has another value.
fn unless(register: u8, value: u32) -> Instruction {
    with(op::JUMP_NOT_EQUAL, register, value.cast_signed())
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
    const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
    let policy = Policy::new(rules).map_err(|why| io::Error::new(io::ErrorKind::InvalidInput, why))?;
    let program = load_program(BPF_PROG_TYPE_CGROUP_DEVICE, 0, &policy.program())?;
    attach(File::open(cgroup)?.as_fd(), program.as_fd())
}

fn attach(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    const BPF_PROG_ATTACH: libc::c_long = 8;
    const BPF_CGROUP_DEVICE: u32 = 6;
    /// A container that manages cgroups of its own may attach more, and none takes this one away.
    const BPF_F_ALLOW_MULTI: u32 = 2;
    let attach = Attach {
        target: number(cgroup),
        program: number(program),
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: points to nothing.
    unsafe { bpf::command(BPF_PROG_ATTACH, &attach) }.map(|_| ())
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
            let immediate = immediate.cast_unsigned();
            let (to, from) = (usize::from(names & 15), usize::from(names >> 4));
            let mut jump = |holds: bool| {
                if holds {
                    at += usize::try_from(offset).unwrap();
                }
            };
            match code {
                op::LOAD => registers[to] = context[usize::try_from(offset).unwrap() / 4],
                op::MOVE_REGISTER => registers[to] = registers[from],
                op::MOVE => registers[to] = immediate,
                op::AND => registers[to] &= immediate,
                op::SHIFT_RIGHT => registers[to] >>= immediate,
                op::JUMP_EQUAL => jump(registers[to] == immediate),
                op::JUMP_NOT_EQUAL => jump(registers[to] != immediate),
                op::EXIT => return registers[0] == 1,
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
