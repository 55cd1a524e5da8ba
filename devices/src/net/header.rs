// SPDX-License-Identifier: Apache-2.0
//! The header in front of each frame (virtio 1.3, section 5.1.6): what a driver may put into it.

use super::device::feature;

/// Bytes of `struct virtio_net_hdr` with num_buffers, as VERSION_1 has it.
pub(super) const HEADER_SIZE: usize = 12;
/// Offset of num_buffers.
pub(super) const NUM_BUFFERS: usize = 10;
/// Bytes of an Ethernet header.
pub(super) const ETHERNET_SIZE: usize = 14;
/// Most bytes of a frame: an IP packet of 64 KiB, and an Ethernet header with two VLAN tags.
pub(super) const MAX_FRAME: usize = 65_535 + ETHERNET_SIZE + 8;

const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_UDP: u8 = 3;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// Why a frame from the guest is dropped.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadFrame {
    #[error("a frame of {0} bytes")]
    Length(usize),
    #[error("a frame asks for an offload that was not negotiated")]
    NotNegotiated,
    #[error("a frame whose header points outside of it")]
    Bounds,
}

/// Checks the header of a frame of `len` bytes that the driver sends, and brings it into the form that the tap gets.
pub(super) fn check(header: &mut [u8; HEADER_SIZE], len: usize, features: u64) -> Result<(), BadFrame> {
    if !(ETHERNET_SIZE..=MAX_FRAME).contains(&len) {
        return Err(BadFrame::Length(len));
    }
    let [flags, gso_type, h0, h1, g0, g1, s0, s1, o0, o1, ..] = *header;
    let header_len = usize::from(u16::from_le_bytes([h0, h1]));
    let gso_size = u16::from_le_bytes([g0, g1]);
    let csum_start = usize::from(u16::from_le_bytes([s0, s1]));
    let csum_offset = usize::from(u16::from_le_bytes([o0, o1]));
    let checksum = flags & NEEDS_CSUM != 0;
    if checksum {
        if features & feature::CSUM == 0 {
            return Err(BadFrame::NotNegotiated);
        }
        if csum_start + csum_offset + 2 > len {
            return Err(BadFrame::Bounds);
        }
    }
    let needed = match gso_type & !GSO_ECN {
        GSO_NONE if gso_type == GSO_NONE => 0,
        GSO_TCPV4 => feature::HOST_TSO4,
        GSO_TCPV6 => feature::HOST_TSO6,
        GSO_UDP if gso_type & GSO_ECN == 0 => feature::HOST_UFO,
        GSO_UDP_L4 if gso_type & GSO_ECN == 0 => feature::HOST_USO,
        _ => return Err(BadFrame::NotNegotiated),
    };
    if features & needed != needed || gso_type & GSO_ECN != 0 && features & feature::HOST_ECN == 0 {
        return Err(BadFrame::NotNegotiated);
    }
    if needed != 0 {
        // 5.1.6.2.1: segmentation comes with a checksum to fill in.
        if !checksum || gso_size == 0 || header_len > len {
            return Err(BadFrame::Bounds);
        }
    } else {
        // Means nothing without segmentation, and some drivers leave rubbish.
        header[2..6].fill(0);
    }
    header[0] = flags & NEEDS_CSUM;
    header[NUM_BUFFERS..].fill(0);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = u64::MAX;

    fn header(flags: u8, gso: u8, header_len: u16, gso_size: u16, start: u16, offset: u16) -> [u8; 12] {
        let mut header = [0xee; 12];
        header[0] = flags;
        header[1] = gso;
        for (at, value) in [(2, header_len), (4, gso_size), (6, start), (8, offset)] {
            header[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
        header
    }

    #[test]
    fn plain_frames_lose_their_rubbish() {
        let mut plain = header(0xfe, 0, 7, 7, 0, 0);
        assert_eq!(check(&mut plain, 60, 0), Ok(()));
        assert_eq!(plain, [0; 12]);
        for len in [0, 13, MAX_FRAME + 1, usize::MAX] {
            assert_eq!(check(&mut plain, len, ALL), Err(BadFrame::Length(len)));
        }
        assert_eq!(check(&mut plain, 14, 0), Ok(()));
        assert_eq!(check(&mut plain, MAX_FRAME, 0), Ok(()));
    }

    #[test]
    fn checksums_must_lie_in_the_frame() {
        let csum = |start, offset, len| check(&mut header(1, 0, 0, 0, start, offset), len, ALL);
        assert_eq!(csum(34, 16, 60), Ok(()));
        assert_eq!(csum(42, 16, 60), Ok(()));
        assert_eq!(csum(43, 16, 60), Err(BadFrame::Bounds));
        assert_eq!(csum(u16::MAX, u16::MAX, 60), Err(BadFrame::Bounds));
        let without = check(&mut header(1, 0, 0, 0, 34, 16), 60, !feature::CSUM);
        assert_eq!(without, Err(BadFrame::NotNegotiated));
    }

    #[test]
    fn segmentation_needs_its_feature_a_checksum_and_a_size() {
        for (gso, needed) in [
            (1, feature::HOST_TSO4),
            (4, feature::HOST_TSO6),
            (3, feature::HOST_UFO),
            (5, feature::HOST_USO),
            (0x81, feature::HOST_ECN),
        ] {
            let good = header(1, gso, 54, 1448, 34, 16);
            assert_eq!(check(&mut good.clone(), 9000, ALL), Ok(()), "{gso}");
            assert_eq!(
                check(&mut good.clone(), 9000, !needed),
                Err(BadFrame::NotNegotiated)
            );
            let no_checksum = check(&mut header(0, gso, 54, 1448, 34, 16), 9000, ALL);
            assert_eq!(no_checksum, Err(BadFrame::Bounds));
            let no_size = check(&mut header(1, gso, 54, 0, 34, 16), 9000, ALL);
            assert_eq!(no_size, Err(BadFrame::Bounds));
            let long_header = check(&mut header(1, gso, 9001, 1448, 34, 16), 9000, ALL);
            assert_eq!(long_header, Err(BadFrame::Bounds));
        }
        for gso in [2, 6, 0x80, 0x83, 0x85, 0xff] {
            let unknown = check(&mut header(1, gso, 54, 1448, 34, 16), 9000, ALL);
            assert_eq!(unknown, Err(BadFrame::NotNegotiated), "{gso}");
        }
    }
}
