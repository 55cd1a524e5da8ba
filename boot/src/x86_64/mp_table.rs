// SPDX-License-Identifier: Apache-2.0
//! The MP table (Intel MultiProcessor Specification 1.4), by which a kernel without ACPI finds processors, the
//! IOAPIC and how ISA interrupts are wired: pin n of the IOAPIC is interrupt n, edge-triggered, active high. Only
//! pins that are wired are listed: Linux programs each that is, at eight exits a pin.

use super::layout::{BASE_MEMORY_END, IOAPIC, LOCAL_APIC, MP_TABLE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// Most processors the table is written for: APIC ids are eight bits and one is the IOAPIC's.
pub const MAX_VCPUS: u8 = 254;
const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IOAPIC: u8 = 2;
const ENTRY_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;
const SPECIFICATION_1_4: u8 = 4;
const APIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
const CPU_ENABLED: u8 = 1;
const CPU_BOOT: u8 = 2;
/// CPU feature flags of the table: FPU and on-chip APIC.
const CPU_FEATURES: u32 = 0x201;
const INTERRUPT_VECTORED: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTINT: u8 = 3;
const ALL_LOCAL_APICS: u8 = 0xff;

/// Why the table was not written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Too large for its KiB.
    #[error("{vcpus} vCPUs and {pins} interrupt pins need {size} bytes of MP table, {room} are there")]
    TooLarge {
        /// vCPUs asked for.
        vcpus: u8,
        /// Pins asked for.
        pins: usize,
        /// Bytes needed.
        size: usize,
        /// Bytes there.
        room: u64,
    },
    /// An interrupt that no pin has.
    #[error("interrupt {0} has no pin")]
    Gsi(u32),
    /// Guest memory ends before it.
    #[error("cannot write at {MP_TABLE:#x}")]
    Memory(#[source] vm_memory::GuestMemoryError),
}

/// Writes the table for `vcpus` processors with APIC ids from 0 and an IOAPIC whose pins `gsis` are wired.
pub fn write<M: GuestMemoryBackend>(mem: &M, vcpus: u8, gsis: &[u32]) -> Result<(), Error> {
    let mut pins = Vec::new();
    for gsi in gsis {
        pins.push(u8::try_from(*gsi).map_err(|_| Error::Gsi(*gsi))?);
    }
    let bytes = table(vcpus, &pins);
    let room = BASE_MEMORY_END - MP_TABLE;
    if bytes.len() as u64 > room || vcpus > MAX_VCPUS {
        return Err(Error::TooLarge {
            vcpus,
            pins: pins.len(),
            size: bytes.len(),
            room,
        });
    }
    mem.write_slice(&bytes, GuestAddress(MP_TABLE))
        .map_err(Error::Memory)
}

/// The floating pointer and, right behind it, the table.
fn table(vcpus: u8, pins: &[u8]) -> Vec<u8> {
    const POINTER_SIZE: u32 = 16;
    const HEADER_SIZE: usize = 44;
    // An APIC id that no processor has.
    let ioapic_id = vcpus;
    let low = |address: u64| u32::try_from(address).unwrap_or(0).to_le_bytes();

    let mut entries = Vec::new();
    let mut count: u16 = 0;
    let mut entry = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count = count.saturating_add(1);
    };
    for id in 0..vcpus {
        let flags = CPU_ENABLED | if id == 0 { CPU_BOOT } else { 0 };
        let mut cpu = vec![ENTRY_PROCESSOR, id, APIC_VERSION, flags, 0, 0, 0, 0];
        cpu.extend_from_slice(&CPU_FEATURES.to_le_bytes());
        cpu.extend_from_slice(&[0; 8]);
        entry(&cpu);
    }
    entry(&[ENTRY_BUS, 0, b'I', b'S', b'A', b' ', b' ', b' ']);
    let mut ioapic = vec![ENTRY_IOAPIC, ioapic_id, IOAPIC_VERSION, 1];
    ioapic.extend_from_slice(&low(IOAPIC));
    entry(&ioapic);
    for &pin in pins {
        // Flags 0: as the bus has it, which for ISA is edge-triggered, active high.
        entry(&[ENTRY_INTERRUPT, INTERRUPT_VECTORED, 0, 0, 0, pin, ioapic_id, pin]);
    }
    entry(&[
        ENTRY_LOCAL_INTERRUPT,
        INTERRUPT_EXTINT,
        0,
        0,
        0,
        0,
        ALL_LOCAL_APICS,
        0,
    ]);
    entry(&[
        ENTRY_LOCAL_INTERRUPT,
        INTERRUPT_NMI,
        0,
        0,
        0,
        0,
        ALL_LOCAL_APICS,
        1,
    ]);

    let mut header = Vec::with_capacity(HEADER_SIZE);
    header.extend_from_slice(b"PCMP");
    let length = u16::try_from(HEADER_SIZE + entries.len()).unwrap_or(u16::MAX);
    header.extend_from_slice(&length.to_le_bytes());
    header.extend_from_slice(&[SPECIFICATION_1_4, 0]);
    header.extend_from_slice(b"CLOISTERCELL        ");
    header.extend_from_slice(&[0; 6]);
    header.extend_from_slice(&count.to_le_bytes());
    header.extend_from_slice(&low(LOCAL_APIC));
    header.extend_from_slice(&[0; 4]);
    header[7] = checksum(header.iter().chain(&entries));

    let mut pointer = b"_MP_".to_vec();
    pointer.extend_from_slice(&low(MP_TABLE + u64::from(POINTER_SIZE)));
    pointer.extend_from_slice(&[1, SPECIFICATION_1_4, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);
    [pointer, header, entries].concat()
}

/// The byte that makes all of `bytes` sum to zero.
fn checksum<'a>(bytes: impl IntoIterator<Item = &'a u8>) -> u8 {
    bytes
        .into_iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_and_counts_agree_with_the_entries() {
        for (vcpus, pins) in [(1, 5), (2, 24), (32, 24)] {
            let bytes = table(vcpus, &(0..pins).collect::<Vec<u8>>());
            assert_eq!(&bytes[..4], b"_MP_");
            assert_eq!(checksum(&bytes[..16]), 0);
            let length = usize::from(u16::from_le_bytes([bytes[20], bytes[21]]));
            assert_eq!(length, bytes.len() - 16);
            assert_eq!(checksum(&bytes[16..]), 0);
            let mut at = 16 + 44;
            let (mut entries, mut cpus) = (0, 0);
            while at < bytes.len() {
                cpus += u8::from(bytes[at] == ENTRY_PROCESSOR);
                at += if bytes[at] == ENTRY_PROCESSOR { 20 } else { 8 };
                entries += 1;
            }
            assert_eq!(at, bytes.len());
            assert_eq!(cpus, vcpus);
            assert_eq!(entries, u16::from_le_bytes([bytes[16 + 34], bytes[16 + 35]]));
            assert!(bytes.len() <= 1024, "{} bytes", bytes.len());
        }
    }

    #[test]
    fn too_many_are_refused() {
        let mem = vm_memory::GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        assert!(write(&mem, 32, &(0..24).collect::<Vec<u32>>()).is_ok());
        assert!(matches!(
            write(&mem, 64, &(0..24).collect::<Vec<u32>>()),
            Err(Error::TooLarge { vcpus: 64, .. })
        ));
    }
}
