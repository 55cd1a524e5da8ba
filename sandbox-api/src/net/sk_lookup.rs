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

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `struct bpf_insn` (Linux, Documentation/bpf/standardization/instruction-set.rst).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Instruction {
    code: u8,
    /// Destination in the lower half, source in the upper.
    registers: u8,
    offset: i16,
    immediate: i32,
}

const RESULT: u8 = 0;
const ARGUMENTS: [u8; 3] = [1, 2, 3];
const SCRATCH: u8 = 2;
/// These survive calls.
const CONTEXT: u8 = 6;
const SOCKET: u8 = 7;
const FRAME: u8 = 10;

/// Operations of 32 bits with an immediate value.
const AND: u8 = 0x54;
const MOVE: u8 = 0xb4;
const JUMP_NOT_EQUAL: u8 = 0x56;
/// Of 64 bits.
const ADD_64: u8 = 0x07;
const JUMP_EQUAL_64: u8 = 0x15;
const JUMP: u8 = 0x05;
/// Between registers, of 64 bits.
const MOVE_REGISTER: u8 = 0xbf;
/// From and to memory, of 32 bits.
const LOAD: u8 = 0x61;
const STORE: u8 = 0x62;
/// A map's descriptor, over two instructions.
const LOAD_MAP: u8 = 0x18;
const PSEUDO_MAP_FD: u8 = 1;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;

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

fn with(code: u8, register: u8, immediate: i32) -> Instruction {
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

fn load(offset: i16) -> Instruction {
    Instruction {
        registers: SCRATCH | CONTEXT << 4,
        offset,
        ..with(LOAD, 0, 0)
    }
}

/// Jumps to the end, whose place is filled in later.
const TO_THE_END: i16 = -1;

fn unless(value: i32) -> Instruction {
    Instruction {
        offset: TO_THE_END,
        ..with(JUMP_NOT_EQUAL, SCRATCH, value)
    }
}

/// The program. Its result is always SK_PASS: with the listener if it is for us, else with whatever there is.
fn program(map: i32) -> Vec<Instruction> {
    const PASS: i32 = 1;
    let [first, second, third] = ARGUMENTS;
    let v4 = [
        load(context::LOCAL_IP4),
        with(AND, SCRATCH, i32::from_ne_bytes([0xff, 0, 0, 0])),
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
            ..with(JUMP_NOT_EQUAL, SCRATCH, libc::AF_INET)
        },
    ];
    program.extend(v4);
    program.push(Instruction {
        offset: skip(1 + v6.len()),
        ..with(JUMP, 0, 0)
    });
    program.push(unless(libc::AF_INET6));
    program.extend(v6);
    program.extend([
        // Key 0, on the stack.
        Instruction {
            offset: -4,
            ..with(STORE, FRAME, 0)
        },
        with(LOAD_MAP, first | PSEUDO_MAP_FD << 4, map),
        with(0, 0, 0),
        copy(second, FRAME),
        with(ADD_64, second, -4),
        with(CALL, 0, MAP_LOOKUP_ELEM),
        Instruction {
            offset: TO_THE_END,
            ..with(JUMP_EQUAL_64, RESULT, 0)
        },
        copy(SOCKET, RESULT),
        copy(first, CONTEXT),
        copy(second, RESULT),
        with(MOVE, third, 0),
        with(CALL, 0, SK_ASSIGN),
        copy(first, SOCKET),
        with(CALL, 0, SK_RELEASE),
    ]);
    let end = program.len();
    for (at, instruction) in program.iter_mut().enumerate() {
        if instruction.offset == TO_THE_END {
            instruction.offset = skip(end - at - 1);
        }
    }
    program.extend([with(MOVE, RESULT, PASS), with(EXIT, 0, 0)]);
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
struct ProgramLoad {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    expected_attach_type: u32,
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
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;

/// # Safety
/// `T` is the part of `union bpf_attr` for this command, and all that it points to is there.
unsafe fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<i32> {
    loop {
        // SAFETY: the kernel reads `size_of::<T>()` bytes; the caller answers for the rest.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                command,
                std::ptr::from_ref(attributes),
                size_of::<T>(),
            )
        };
        if let Ok(result) = i32::try_from(result)
            && result >= 0
        {
            return Ok(result);
        }
        let error = io::Error::last_os_error();
        // The verifier gives way to signals.
        if !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) {
            return Err(error);
        }
    }
}

/// # Safety
/// As of [`bpf`], and the command answers a descriptor.
unsafe fn bpf_fd<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's; and the kernel has just made the descriptor for us alone.
    unsafe { Ok(OwnedFd::from_raw_fd(bpf(command, attributes)?)) }
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

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
    let map = unsafe { bpf_fd(BPF_MAP_CREATE, &map) }?;
    let (key, value) = (0_u32, number(listener));
    let update = MapUpdate {
        map: number(map.as_fd()),
        padding: 0,
        key: address((&raw const key).cast()),
        value: address((&raw const value).cast()),
        flags: 0,
    };
    // SAFETY: key and value are of the sizes that the map was made with, and live until the call returns.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &update) }?;
    let instructions = program(map.as_raw_fd());
    let mut name = [0; 16];
    name[..8].copy_from_slice(b"cloister");
    let load = ProgramLoad {
        kind: BPF_PROG_TYPE_SK_LOOKUP,
        count: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        instructions: address(instructions.as_ptr().cast()),
        license: address(c"Apache-2.0".as_ptr().cast()),
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name,
        interface: 0,
        expected_attach_type: BPF_SK_LOOKUP,
    };
    // SAFETY: the kernel reads `count` instructions and the license, which live until the call returns, and writes nothing
    // (no log).
    let program = unsafe { bpf_fd(BPF_PROG_LOAD, &load) }?;
    let link = LinkCreate {
        program: number(program.as_fd()),
        target: number(netns),
        attach_type: BPF_SK_LOOKUP,
        flags: 0,
    };
    // SAFETY: points to nothing.
    unsafe { bpf_fd(BPF_LINK_CREATE, &link) }
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
                LOAD => scratch = word(offset),
                AND => scratch &= immediate,
                JUMP => jump(true),
                JUMP_NOT_EQUAL => jump(scratch != immediate),
                MOVE_REGISTER => {}
                STORE => return true,
                MOVE => {
                    assert_eq!(immediate, 1);
                    assert_eq!(program[at + 1].code, EXIT);
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
