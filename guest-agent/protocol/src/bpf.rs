// SPDX-License-Identifier: Apache-2.0
//! BPF programs, written instruction by instruction: the agent confines containers to their devices with one, the daemon
//! steers connections with another (Linux, Documentation/bpf/standardization/instruction-set.rst; bpf(2)).

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// One of [`op`].
    pub code: u8,
    /// Destination in the lower half, source in the upper.
    pub registers: u8,
    /// Of a jump, or in memory.
    pub offset: i16,
    /// A value.
    pub immediate: i32,
}

/// Operations. Those with an immediate value or on memory are of 32 bits where the name says nothing else.
#[allow(missing_docs)]
pub mod op {
    pub const AND: u8 = 0x54;
    pub const SHIFT_RIGHT: u8 = 0x74;
    pub const MOVE: u8 = 0xb4;
    pub const ADD_64: u8 = 0x07;
    pub const JUMP: u8 = 0x05;
    pub const JUMP_EQUAL: u8 = 0x16;
    pub const JUMP_EQUAL_64: u8 = 0x15;
    pub const JUMP_NOT_EQUAL: u8 = 0x56;
    /// Between registers.
    pub const MOVE_REGISTER: u8 = 0xbc;
    pub const MOVE_REGISTER_64: u8 = 0xbf;
    /// From memory, and to it.
    pub const LOAD: u8 = 0x61;
    pub const STORE: u8 = 0x62;
    /// A map's descriptor, over two instructions.
    pub const LOAD_MAP: u8 = 0x18;
    pub const CALL: u8 = 0x85;
    pub const EXIT: u8 = 0x95;
}

/// What a program answers.
pub const RESULT: u8 = 0;

/// An operation on a register with a value.
pub fn with(code: u8, register: u8, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers: register,
        offset: 0,
        immediate,
    }
}

/// An operation between registers.
pub fn between(code: u8, to: u8, from: u8) -> Instruction {
    Instruction {
        registers: to | from << 4,
        ..with(code, 0, 0)
    }
}

/// Loads 32 bits that lie so far behind where a register points.
pub fn load(to: u8, from: u8, offset: i16) -> Instruction {
    Instruction {
        offset,
        ..between(op::LOAD, to, from)
    }
}

/// The end of a program, with this as its result.
pub fn answer(result: i32) -> [Instruction; 2] {
    [with(op::MOVE, RESULT, result), with(op::EXIT, 0, 0)]
}

/// The part of `union bpf_attr` for BPF_PROG_LOAD.
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

/// bpf(2), again while the verifier gives way to signals.
///
/// # Errors
/// The kernel's.
///
/// # Safety
/// `T` is the part of `union bpf_attr` for this command, and all that it points to is there.
pub unsafe fn command<T>(command: libc::c_long, attributes: &T) -> io::Result<i32> {
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
        if !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) {
            return Err(error);
        }
    }
}

/// [`command`] for one that answers a descriptor.
///
/// # Errors
/// The kernel's.
///
/// # Safety
/// As of [`command`], and the command answers a descriptor.
pub unsafe fn command_fd<T>(number: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's; and the kernel has just made the descriptor for us alone.
    unsafe { Ok(OwnedFd::from_raw_fd(command(number, attributes)?)) }
}

/// A descriptor as it stands in `union bpf_attr`.
pub fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// Has the kernel verify and take a program of a kind (`enum bpf_prog_type`) for a place (`enum bpf_attach_type`, 0 where
/// the kind says it).
///
/// # Errors
/// The kernel's.
pub fn load_program(kind: u32, place: u32, program: &[Instruction]) -> io::Result<OwnedFd> {
    const BPF_PROG_LOAD: libc::c_long = 5;
    let address = |pointer: *const u8| pointer.addr() as u64;
    let mut name = [0; 16];
    name[..8].copy_from_slice(b"cloister");
    let load = ProgramLoad {
        kind,
        count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: address(program.as_ptr().cast()),
        license: address(c"Apache-2.0".as_ptr().cast()),
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name,
        interface: 0,
        expected_attach_type: place,
    };
    // SAFETY: the kernel reads `count` instructions and the license, which live until the call returns, and writes nothing
    // (no log).
    unsafe { command_fd(BPF_PROG_LOAD, &load) }
}
