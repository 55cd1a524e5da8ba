// SPDX-License-Identifier: Apache-2.0
//! Steers all TCP connections to the loopback addresses of a network namespace to one listener (Linux,
//! Documentation/bpf/prog_sk_lookup.rst).
//!
//! The program is asked before the namespace's listeners are looked through. It finds ours in a map of one entry. What is
//! accepted has the address that was dialled as its local one.
//!
//! ```text
//!  link ──▶ program ──▶ map ──▶ (listener)
//! ```
//!
//! Each holds the next, the map not the listener: the link's descriptor is all there is to keep.

use cloister_protocol::bpf::{self, Instruction, RESULT, load_program, number, op, with};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

const ARGUMENTS: [u8; 3] = [1, 2, 3];
const SCRATCH: u8 = 2;
/// These survive calls.
const CONTEXT: u8 = 6;
const SOCKET: u8 = 7;
const FRAME: u8 = 10;
const PSEUDO_MAP_FD: u8 = 1;

/// `enum bpf_func_id`.
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;

/// `struct bpf_sk_lookup`. Addresses are in network byte order, as the words of four bytes that they are in memory.
mod context {
    pub const FAMILY: i16 = 8;
    pub const PROTOCOL: i16 = 12;
    pub const LOCAL_IP4: i16 = 40;
    pub const LOCAL_IP6: [i16; 4] = [44, 48, 52, 56];
}

fn copy(to: u8, from: u8) -> Instruction {
    bpf::between(op::MOVE_REGISTER_64, to, from)
}

fn load(offset: i16) -> Instruction {
    bpf::load(SCRATCH, CONTEXT, offset)
}

/// Jumps to the end, whose place is filled in later.
const TO_THE_END: i16 = -1;

fn unless(value: i32) -> Instruction {
    Instruction {
        offset: TO_THE_END,
        ..with(op::JUMP_NOT_EQUAL, SCRATCH, value)
    }
}

/// The program. Its result is always SK_PASS: with the listener if it is for us, else with whatever there is.
fn program(map: i32) -> Vec<Instruction> {
    const PASS: i32 = 1;
    let [first, second, third] = ARGUMENTS;
    let v4 = [
        load(context::LOCAL_IP4),
        with(op::AND, SCRATCH, i32::from_ne_bytes([0xff, 0, 0, 0])),
        unless(i32::from_ne_bytes([127, 0, 0, 0])),
    ];
    let words = [0, 0, 0, i32::from_ne_bytes([0, 0, 0, 1])];
    let v6 = context::LOCAL_IP6
        .into_iter()
        .zip(words)
        .flat_map(|(offset, word)| [load(offset), unless(word)]);
    let v6: Vec<_> = v6.collect();
    let skip = |count: usize| i16::try_from(count).unwrap_or(0);

    let mut program = vec![
        copy(CONTEXT, first),
        load(context::PROTOCOL),
        unless(libc::IPPROTO_TCP),
        load(context::FAMILY),
        Instruction {
            offset: skip(v4.len() + 1),
            ..with(op::JUMP_NOT_EQUAL, SCRATCH, libc::AF_INET)
        },
    ];
    program.extend(v4);
    program.push(Instruction {
        offset: skip(1 + v6.len()),
        ..with(op::JUMP, 0, 0)
    });
    program.push(unless(libc::AF_INET6));
    program.extend(v6);
    program.extend([
        // Key 0, on the stack.
        Instruction {
            offset: -4,
            ..with(op::STORE, FRAME, 0)
        },
        with(op::LOAD_MAP, first | PSEUDO_MAP_FD << 4, map),
        with(0, 0, 0),
        copy(second, FRAME),
        with(op::ADD_64, second, -4),
        with(op::CALL, 0, MAP_LOOKUP_ELEM),
        Instruction {
            offset: TO_THE_END,
            ..with(op::JUMP_EQUAL_64, RESULT, 0)
        },
        copy(SOCKET, RESULT),
        copy(first, CONTEXT),
        copy(second, RESULT),
        with(op::MOVE, third, 0),
        with(op::CALL, 0, SK_ASSIGN),
        copy(first, SOCKET),
        with(op::CALL, 0, SK_RELEASE),
    ]);
    let end = program.len();
    for (at, instruction) in program.iter_mut().enumerate() {
        if instruction.offset == TO_THE_END {
            instruction.offset = skip(end - at - 1);
        }
    }
    program.extend(bpf::answer(PASS));
    program
}

/// Parts of `union bpf_attr`, one for each command.
#[repr(C)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

#[repr(C)]
struct MapUpdate {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;

/// Steers until the link that is answered is closed, or the listener. The listener is one for IPv6 that takes IPv4 too, or
/// one for IPv4 alone.
///
/// # Errors
/// bpf(2)'s.
pub(super) fn steer(netns: BorrowedFd<'_>, listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let address = |pointer: *const u8| pointer.addr() as u64;
    let map = MapCreate {
        kind: BPF_MAP_TYPE_SOCKMAP,
        key_size: 4,
        value_size: 4,
        max_entries: 1,
    };
    // SAFETY: points to nothing.
    let map = unsafe { bpf::command_fd(BPF_MAP_CREATE, &map) }?;
    let (key, value) = (0_u32, number(listener));
    let update = MapUpdate {
        map: number(map.as_fd()),
        padding: 0,
        key: address((&raw const key).cast()),
        value: address((&raw const value).cast()),
        flags: 0,
    };
    // SAFETY: key and value are of the sizes that the map was made with, and live until the call returns.
    unsafe { bpf::command(BPF_MAP_UPDATE_ELEM, &update) }?;
    let program = load_program(BPF_PROG_TYPE_SK_LOOKUP, BPF_SK_LOOKUP, &program(map.as_raw_fd()))?;
    let link = LinkCreate {
        program: number(program.as_fd()),
        target: number(netns),
        attach_type: BPF_SK_LOOKUP,
        flags: 0,
    };
    // SAFETY: points to nothing.
    unsafe { bpf::command_fd(BPF_LINK_CREATE, &link) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether the program asks the map for a connection like this.
    fn steers(protocol: i32, family: i32, v4: [u8; 4], v6: [u8; 16]) -> bool {
        let program = program(7);
        let word = |offset: i16| match offset {
            context::FAMILY => family,
            context::PROTOCOL => protocol,
            context::LOCAL_IP4 => i32::from_ne_bytes(v4),
            _ => {
                let at = usize::try_from(offset - context::LOCAL_IP6[0]).unwrap();
                i32::from_ne_bytes(v6[at..at + 4].try_into().unwrap())
            }
        };
        let (mut at, mut scratch) = (0, 0);
        loop {
            let Instruction {
                code,
                offset,
                immediate,
                ..
            } = program[at];
            let mut jump = |holds: bool| {
                if holds {
                    at += usize::try_from(offset).unwrap();
                }
            };
            match code {
                op::LOAD => scratch = word(offset),
                op::AND => scratch &= immediate,
                op::JUMP => jump(true),
                op::JUMP_NOT_EQUAL => jump(scratch != immediate),
                op::MOVE_REGISTER_64 => {}
                op::STORE => return true,
                op::MOVE => {
                    assert_eq!(immediate, 1);
                    assert_eq!(program[at + 1].code, op::EXIT);
                    return false;
                }
                other => panic!("{other:#x}"),
            }
            at += 1;
        }
    }

    #[test]
    fn loopback_and_nothing_else() {
        const TCP: i32 = libc::IPPROTO_TCP;
        let none = [0; 16];
        let one = std::net::Ipv6Addr::LOCALHOST.octets();
        assert!(steers(TCP, libc::AF_INET, [127, 0, 0, 1], none));
        assert!(steers(TCP, libc::AF_INET, [127, 9, 9, 9], none));
        assert!(!steers(TCP, libc::AF_INET, [10, 0, 0, 127], none));
        assert!(!steers(TCP, libc::AF_INET, [128, 0, 0, 1], one));
        assert!(!steers(libc::IPPROTO_UDP, libc::AF_INET, [127, 0, 0, 1], none));
        assert!(steers(TCP, libc::AF_INET6, [0; 4], one));
        assert!(!steers(TCP, libc::AF_INET6, [127, 0, 0, 1], none));
        for byte in 0..16 {
            let mut other = one;
            other[byte] ^= 2;
            assert!(!steers(TCP, libc::AF_INET6, [0; 4], other));
        }
        assert!(!steers(TCP, libc::AF_UNIX, [127, 0, 0, 1], one));
    }
}
