// SPDX-License-Identifier: Apache-2.0
//! Guests of a few dozen instructions: 32-bit protected mode without paging, entered by PVH at 0x100000.
//!
//! Written so that they run under kvm_pvm too, which interprets them: no instruction that KVM's emulator lacks.

use std::arch::global_asm;
use std::fs::File;
use std::io::Write;

macro_rules! guests {
    ($($(#[$doc:meta])* $name:ident: $($line:literal),+ $(,)?;)+) => {
        $(
            global_asm!(
                ".pushsection .rodata",
                ".code32",
                concat!(".globl tiny_", stringify!($name)),
                concat!("tiny_", stringify!($name), ":"),
                $($line,)+
                concat!(".globl tiny_", stringify!($name), "_end"),
                concat!("tiny_", stringify!($name), "_end:"),
                ".code64",
                ".popsection",
            );
            $(#[$doc])*
            pub fn $name() -> Vec<u8> {
                unsafe extern "C" {
                    #[link_name = concat!("tiny_", stringify!($name))]
                    static START: u8;
                    #[link_name = concat!("tiny_", stringify!($name), "_end")]
                    static END: u8;
                }
                let (start, end) = (&raw const START, &raw const END);
                let len = end.addr() - start.addr();
                // SAFETY: both symbols bound one run of bytes in .rodata, defined above.
                unsafe { std::slice::from_raw_parts(start, len) }.to_vec()
            }
        )+
    };
}

guests! {
    /// Writes "hello" to the serial port and powers off.
    hello:
        "mov esp, 0x300000",
        "call 2f",
        ".ascii \"hello\"",
        "2: pop esi",
        "mov ecx, 5",
        "mov edx, 0x3f8",
        "3: mov al, [esi]",
        "out dx, al",
        "inc esi",
        "dec ecx",
        "jnz 3b",
        "mov edx, 0x600",
        "mov al, 0x34",
        "out dx, al",
        "4: jmp 4b";
    /// Restarts through the keyboard controller.
    keyboard_reset:
        "mov al, 0xfe",
        "out 0x64, al",
        "2: jmp 2b";
    /// Restarts through the reset port.
    port_reset:
        "mov edx, 0x602",
        "mov al, 1",
        "out dx, al",
        "2: jmp 2b";
    /// An exception without an IDT.
    triple_fault:
        "ud2";
    /// A panic line on the serial port, then a triple fault.
    panic:
        "mov esp, 0x300000",
        "call 2f",
        ".ascii \"[ 0.1] Kernel panic - not syncing: tiny\\r\\n\"",
        ".byte 0",
        "2: pop esi",
        "mov edx, 0x3f8",
        "3: mov al, [esi]",
        "test al, al",
        "jz 4f",
        "out dx, al",
        "inc esi",
        "jmp 3b",
        "4: ud2";
    /// Executes where nothing is: KVM has no instruction to emulate there.
    jump_into_the_hole:
        "mov eax, 0xe0000000",
        "jmp eax";
    /// Counts in memory at 0x200000 for ever.
    counter:
        "2: inc dword ptr [0x200000]",
        "jmp 2b";
    /// Counts at 0x200000, and writes each count to port 0x3ff (the serial port's scratch register) as an access that
    /// needs this program.
    port_counter:
        "mov edx, 0x3ff",
        "2: inc dword ptr [0x200000]",
        "mov al, [0x200000]",
        "out dx, al",
        "in al, dx",
        "mov [0x200004], al",
        "inc dword ptr [0x200008]",
        "jmp 2b";
    /// Reads a port and an address where nothing is, and writes what it got to memory at 0x200000.
    nothing_there:
        "mov edx, 0x1234",
        "in eax, dx",
        "mov [0x200000], eax",
        "mov eax, [0xe0000000]",
        "mov [0x200004], eax",
        "mov dword ptr [0xe0000000], 5",
        "out dx, eax",
        "mov edx, 0x600",
        "mov al, 0x34",
        "out dx, al",
        "2: jmp 2b";
    /// Reads the magic value and the device type of the first virtio device and writes them to the serial port.
    virtio_magic:
        "mov ebx, [0xd0000000]",
        "mov edx, 0x3f8",
        "mov ecx, 4",
        "2: mov al, bl",
        "out dx, al",
        "shr ebx, 8",
        "dec ecx",
        "jnz 2b",
        "mov eax, [0xd0000008]",
        "add al, 0x30",
        "out dx, al",
        "mov edx, 0x600",
        "mov al, 0x34",
        "out dx, al",
        "3: jmp 3b";
    /// Waits for interrupts, of which there are none: no PIC, no timer.
    idle:
        "mov al, 0xff",
        "out 0x21, al",
        "out 0xa1, al",
        "sti",
        "2: hlt",
        "jmp 2b";
    /// Waits with interrupts off.
    halt:
        "cli",
        "2: hlt",
        "jmp 2b";
    /// Drives virtio device 0 to DRIVER_OK with one queue of 16, notifies queue 0, and ends when vector 0x41 comes
    /// through the IOAPIC: writes "i" to the serial port and powers off. Leaves interrupts off if memory at 0x200000 is set.
    notify_and_wait:
        "mov esp, 0x300000",
        // An IDT at 0x310000 with vector 0x41: 32-bit interrupt gate, selector 8.
        "call 2f",
        "mov edx, 0x3f8",
        "mov al, 0x69",
        "out dx, al",
        "mov edx, 0x600",
        "mov al, 0x34",
        "out dx, al",
        "9: jmp 9b",
        "2: pop eax",
        "mov ebx, eax",
        "and eax, 0xffff",
        "or eax, 0x00080000",
        "mov [0x310000 + 0x41 * 8], eax",
        "and ebx, 0xffff0000",
        "or ebx, 0x8e00",
        "mov [0x310000 + 0x41 * 8 + 4], ebx",
        "mov word ptr [0x320000], 0x7ff",
        "mov dword ptr [0x320002], 0x310000",
        "lidt [0x320000]",
        // No PIC, where there is one: it has this interrupt too.
        "mov al, 0xff",
        "out 0x21, al",
        // Local APIC on, spurious vector 0xff.
        "mov dword ptr [0xfee000f0], 0x1ff",
        // IOAPIC pin 1: vector 0x41, fixed, physical, edge, APIC 0, unmasked.
        "mov dword ptr [0xfec00000], 0x13",
        "mov dword ptr [0xfec00010], 0",
        "mov dword ptr [0xfec00000], 0x12",
        "mov dword ptr [0xfec00010], 0x41",
        "mov dword ptr [0xd0000070], 0",
        "mov dword ptr [0xd0000070], 1",
        "mov dword ptr [0xd0000070], 3",
        "mov dword ptr [0xd0000024], 1",
        "mov dword ptr [0xd0000020], 1",
        "mov dword ptr [0xd0000070], 0xb",
        "mov dword ptr [0xd0000030], 0",
        "mov dword ptr [0xd0000038], 16",
        "mov dword ptr [0xd0000080], 0x330000",
        "mov dword ptr [0xd0000090], 0x331000",
        "mov dword ptr [0xd00000a0], 0x332000",
        "mov dword ptr [0xd0000044], 1",
        "mov dword ptr [0xd0000070], 0xf",
        "mov dword ptr [0xd0000050], 0",
        "cmp dword ptr [0x200000], 0",
        "jne 3f",
        "sti",
        "3: hlt",
        "jmp 3b";
    /// Drives virtio device 0 to DRIVER_OK with one queue of 16 and notifies queue 0 for ever, with interrupts off.
    notify_for_ever:
        "mov dword ptr [0xd0000070], 0",
        "mov dword ptr [0xd0000070], 1",
        "mov dword ptr [0xd0000070], 3",
        "mov dword ptr [0xd0000024], 1",
        "mov dword ptr [0xd0000020], 1",
        "mov dword ptr [0xd0000070], 0xb",
        "mov dword ptr [0xd0000030], 0",
        "mov dword ptr [0xd0000038], 16",
        "mov dword ptr [0xd0000080], 0x330000",
        "mov dword ptr [0xd0000090], 0x331000",
        "mov dword ptr [0xd00000a0], 0x332000",
        "mov dword ptr [0xd0000044], 1",
        "mov dword ptr [0xd0000070], 0xf",
        "2: mov dword ptr [0xd0000050], 0",
        "mov ecx, 10000",
        "3: dec ecx",
        "jnz 3b",
        "jmp 2b";
    /// As `start_others`, once 0x200008 is not 0.
    start_others_later:
        "2: cmp dword ptr [0x200008], 0",
        "je 2b",
        "mov word ptr [0x9000], 0",
        "mov dword ptr [0x8000], 0x0006fff0",
        "mov dword ptr [0x8004], 0xfdebf490",
        "mov dword ptr [0xfee000f0], 0x1ff",
        "mov dword ptr [0xfee00300], 0x000c4500",
        "mov dword ptr [0xfee00300], 0x000c4608",
        "2: mov eax, [0x200004]",
        "cmp [0x9000], ax",
        "jne 2b",
        "mov edx, 0x600",
        "mov al, 0x34",
        "out dx, al",
        "3: jmp 3b";
    /// Starts all other vCPUs with INIT and SIPI; each adds one to 0x200000 in real mode and halts. Powers off when
    /// as many as 0x200004 says have.
    start_others:
        // Real-mode code at 0x8000: lock inc word ptr [0x9000]; hlt; jmp to the hlt.
        "mov word ptr [0x9000], 0",
        "mov dword ptr [0x8000], 0x0006fff0",
        "mov dword ptr [0x8004], 0xfdebf490",
        "mov dword ptr [0xfee000f0], 0x1ff",
        // INIT, then SIPI with page 8, to all but self.
        "mov dword ptr [0xfee00300], 0x000c4500",
        "mov dword ptr [0xfee00300], 0x000c4608",
        "2: mov eax, [0x200004]",
        "cmp [0x9000], ax",
        "jne 2b",
        "mov edx, 0x600",
        "mov al, 0x34",
        "out dx, al",
        "3: jmp 3b";
}

/// An ELF file with a PVH note whose one segment is `code` at 0x100000.
pub fn kernel(code: &[u8]) -> File {
    const HEADERS: usize = 0x1000;
    let mut image = vec![0u8; HEADERS];
    image[..7].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1]);
    put(&mut image, 16, &2u16.to_le_bytes());
    put(&mut image, 18, &62u16.to_le_bytes());
    put(&mut image, 24, &0x10_0000u64.to_le_bytes());
    put(&mut image, 32, &64u64.to_le_bytes());
    put(&mut image, 54, &56u16.to_le_bytes());
    put(&mut image, 56, &2u16.to_le_bytes());
    segment(&mut image, 64, 1, HEADERS as u64, 0x10_0000, code.len() as u64);
    segment(&mut image, 64 + 56, 4, 0x800, 0, 20);
    put(&mut image, 0x800, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    put(&mut image, 0x80c, b"Xen\0");
    put(&mut image, 0x810, &0x10_0000u32.to_le_bytes());
    image.extend_from_slice(code);
    let fd = rustix::fs::memfd_create("tiny-kernel", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut file = File::from(fd);
    file.write_all(&image).unwrap();
    file
}

fn segment(image: &mut [u8], at: usize, kind: u32, offset: u64, address: u64, size: u64) {
    put(image, at, &kind.to_le_bytes());
    for (field, value) in [(8, offset), (24, address), (32, size), (40, size)] {
        put(image, at + field, &value.to_le_bytes());
    }
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}
