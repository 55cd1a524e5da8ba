// SPDX-License-Identifier: Apache-2.0
//! ACPI tables for kernels that expect them: RSDP, XSDT, hardware-reduced FADT, MADT and a DSDT that names the
//! virtio-mmio devices (`LNRO0005`) and the soft-off state (ACPI 6.5, chapters 5 and 7.4).
//!
//! Power: sleep control, sleep status and reset are three bytes from [`POWER_PORT`](super::layout::POWER_PORT),
//! so that a kernel with ACPI powers off by itself.

use super::MmioDevice;
use super::layout::{ACPI_TABLES, HIGH_MEMORY, IOAPIC, LOCAL_APIC, POWER_PORT};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

const OEM_ID: [u8; 6] = *b"CLOSTR";
const OEM_TABLE_ID: [u8; 8] = *b"CLOISTER";
const OEM_REVISION: u32 = 1;
/// Sleep type of soft-off, put into `\_S5` here and compared by the power device.
pub const SLEEP_TYPE_S5: u8 = 5;
/// What the guest writes to the reset register.
pub const RESET_VALUE: u8 = 1;

/// Why the tables were not written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// More devices than the ACPI area holds.
    #[error("{devices} devices and {vcpus} vCPUs need {size} bytes of ACPI tables, {room} are there")]
    TooLarge {
        /// Devices described.
        devices: usize,
        /// vCPUs described.
        vcpus: u8,
        /// Bytes needed.
        size: u64,
        /// Bytes there.
        room: u64,
    },
    /// A device lies where ACPI's 32-bit descriptors do not reach.
    #[error("device registers at {base:#x} are not below 4 GiB")]
    Address {
        /// Guest-physical address.
        base: u64,
    },
    /// Guest memory ends before it.
    #[error("cannot write at {ACPI_TABLES:#x}")]
    Memory(#[source] vm_memory::GuestMemoryError),
}

/// Writes all tables from [`ACPI_TABLES`] on and answers the RSDP's guest-physical address.
pub fn write<M: GuestMemoryBackend>(mem: &M, vcpus: u8, devices: &[MmioDevice]) -> Result<u64, Error> {
    let image = tables(vcpus, devices)?;
    let room = HIGH_MEMORY - ACPI_TABLES;
    let size = image.len() as u64;
    if size > room {
        return Err(Error::TooLarge {
            devices: devices.len(),
            vcpus,
            size,
            room,
        });
    }
    mem.write_slice(&image, GuestAddress(ACPI_TABLES))
        .map_err(Error::Memory)?;
    Ok(ACPI_TABLES)
}

/// The bytes from [`ACPI_TABLES`] on: RSDP first, each table 16-byte aligned.
fn tables(vcpus: u8, devices: &[MmioDevice]) -> Result<Vec<u8>, Error> {
    let mut image = vec![0u8; Rsdp::len().next_multiple_of(16)];
    let mut place = |table: &[u8]| {
        image.resize(image.len().next_multiple_of(16), 0);
        let address = ACPI_TABLES + image.len() as u64;
        image.extend_from_slice(table);
        address
    };
    let dsdt = place(&dsdt(devices)?);
    let fadt = place(&fadt(dsdt));
    let madt = place(&madt(vcpus));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(&bytes(&xsdt));
    let rsdp = bytes(&Rsdp::new(OEM_ID, xsdt));
    image[..rsdp.len()].copy_from_slice(&rsdp);
    Ok(image)
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let port = |offset: u16| {
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            u64::from(POWER_PORT + offset),
        )
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::Unspecified)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.sleep_control_reg = port(0);
    fadt.sleep_status_reg = port(1);
    fadt.reset_reg = port(2);
    fadt.reset_value = RESET_VALUE;
    // No VGA (bit 2), no MSI restriction, no CMOS clock (bit 5): nothing to probe.
    fadt.iapc_boot_arch = (1 << 2 | 1 << 5).into();
    bytes(&fadt.finalize())
}

fn madt(vcpus: u8) -> Vec<u8> {
    let low = |address: u64| u32::try_from(address).unwrap_or(0);
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        LocalInterruptController::Address(low(LOCAL_APIC)),
    );
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(vcpus, low(IOAPIC), 0));
    bytes(&madt)
}

fn dsdt(devices: &[MmioDevice]) -> Result<Vec<u8>, Error> {
    let mut body = Vec::new();
    for (index, device) in devices.iter().enumerate() {
        let out_of_reach = |_| Error::Address { base: device.base };
        let base = u32::try_from(device.base).map_err(out_of_reach)?;
        let size = u32::try_from(device.size).map_err(out_of_reach)?;
        aml::Device::new(
            format!("V{index:03}").as_str().into(),
            vec![
                &aml::Name::new("_HID".into(), &"LNRO0005"),
                &aml::Name::new("_UID".into(), &index),
                &aml::Name::new("_CCA".into(), &aml::ONE),
                &aml::Name::new(
                    "_CRS".into(),
                    &aml::ResourceTemplate::new(vec![
                        &aml::Memory32Fixed::new(true, base, size),
                        &aml::Interrupt::new(true, true, false, false, device.gsi),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(&mut body);
    }
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let mut scope = Vec::new();
    aml::Name::new("_S5_".into(), &aml::Package::new(vec![&SLEEP_TYPE_S5])).to_aml_bytes(&mut scope);
    scope.extend_from_slice(&aml::Scope::raw("_SB_".into(), body));
    dsdt.append_slice(&scope);
    Ok(bytes(&dsdt))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn u64_at(image: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(image[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn every_table_is_reachable_and_sums_to_zero() {
        let devices: Vec<MmioDevice> = (0..19)
            .map(|n| MmioDevice {
                base: 0xd000_0000 + n * 4096,
                size: 4096,
                gsi: 5,
            })
            .collect();
        let image = tables(32, &devices).unwrap();
        assert_eq!(&image[..8], b"RSD PTR ");
        assert_eq!(sum(&image[..20]), 0);
        assert_eq!(sum(&image[..36]), 0);
        let table = |address: u64| {
            let at = usize::try_from(address - ACPI_TABLES).unwrap();
            let len = u32::from_le_bytes(image[at + 4..at + 8].try_into().unwrap());
            &image[at..at + usize::try_from(len).unwrap()]
        };
        let xsdt = table(u64_at(&image, 24));
        assert_eq!((&xsdt[..4], sum(xsdt)), (&b"XSDT"[..], 0));
        let fadt = table(u64_at(xsdt, 36));
        assert_eq!((&fadt[..4], sum(fadt)), (&b"FACP"[..], 0));
        let madt = table(u64_at(xsdt, 44));
        assert_eq!((&madt[..4], sum(madt)), (&b"APIC"[..], 0));
        assert_eq!(madt.len(), 44 + 32 * 8 + 12);
        let dsdt = table(u64_at(fadt, 140));
        assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
        assert_eq!(dsdt.windows(8).filter(|w| w == b"LNRO0005").count(), 19);
    }

    #[test]
    fn a_device_above_4_gib_is_refused() {
        let device = MmioDevice {
            base: 1 << 32,
            size: 4096,
            gsi: 5,
        };
        assert!(matches!(tables(1, &[device]), Err(Error::Address { .. })));
    }
}
