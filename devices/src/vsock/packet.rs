// SPDX-License-Identifier: Apache-2.0
//! Vsock packets in guest memory (virtio 1.3, section 5.10.6).
//!
//! A packet is a 44-byte header and `len` bytes of payload, spread over the descriptors of one chain in any way.
//! Nothing else in this folder looks at chains: [`TxPacket::parse`] and [`RxBuffer::parse`] have them walked and
//! checked once, copy the header out (so that it cannot change after it was checked), and give the payload as slices
//! whose total length has been checked against the header.

use crate::GuestRam;
use crate::virtio::{Buffers, Chain, ChainError, Slices};

/// Bytes of a header.
pub(super) const HEADER_SIZE: usize = 44;
/// Longest payload taken from the guest in one packet; Linux sends at most this much.
pub(super) const MAX_PAYLOAD: usize = 64 << 10;

/// Packet operations (section 5.10.6).
pub(super) mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Socket type of stream sockets, the only one offered (section 5.10.6).
pub(super) const TYPE_STREAM: u16 = 1;

/// SHUTDOWN flags (section 5.10.6.5): what the sender of the packet will not do any more.
pub(super) mod shutdown {
    pub const RECEIVE: u32 = 1;
    pub const SEND: u32 = 2;
    pub const BOTH: u32 = RECEIVE | SEND;
}

/// `struct virtio_vsock_hdr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    /// Bytes of payload.
    pub len: u32,
    pub socket_type: u16,
    pub op: u16,
    pub flags: u32,
    /// The sender's receive buffer in bytes.
    pub buf_alloc: u32,
    /// How many bytes the sender's reader has consumed, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    pub fn from_bytes(bytes: &[u8; HEADER_SIZE]) -> Self {
        let mut rest = bytes.as_slice();
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            socket_type: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    pub fn to_bytes(self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.socket_type.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

/// The next `N` bytes; zeros past the end, which the fixed size of the header rules out.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    match rest.split_first_chunk() {
        Some((first, tail)) => {
            *rest = tail;
            *first
        }
        None => [0; N],
    }
}

/// What is wrong with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum PacketError {
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error("a buffer has the wrong direction")]
    Direction,
    #[error("a buffer is shorter than a packet's header")]
    Short,
    #[error("a packet of {len} bytes is longer than the {held} bytes it may have")]
    Length { len: u32, held: usize },
}

/// A packet from the guest.
pub(super) struct TxPacket<'a> {
    pub header: Header,
    /// Exactly `header.len` bytes.
    pub payload: Slices<'a>,
}

impl<'a> TxPacket<'a> {
    pub fn parse(chain: &Chain, ram: &'a GuestRam) -> Result<Self, PacketError> {
        let Buffers { readable, writable } = Buffers::in_ram(ram, chain)?;
        if !writable.is_empty() {
            return Err(PacketError::Direction);
        }
        let mut bytes = [0; HEADER_SIZE];
        if readable.read(0, &mut bytes) < HEADER_SIZE {
            return Err(PacketError::Short);
        }
        let header = Header::from_bytes(&bytes);
        let held = MAX_PAYLOAD.min(readable.len() - HEADER_SIZE);
        match usize::try_from(header.len) {
            Ok(length) if length <= held => Ok(Self {
                header,
                payload: readable.range(HEADER_SIZE, length),
            }),
            _ => Err(PacketError::Length {
                len: header.len,
                held,
            }),
        }
    }
}

/// A buffer for a packet to the guest.
pub(super) struct RxBuffer<'a> {
    head_index: u16,
    writable: Slices<'a>,
}

impl<'a> RxBuffer<'a> {
    pub fn parse(chain: &Chain, ram: &'a GuestRam) -> Result<Self, PacketError> {
        let Buffers { readable, writable } = Buffers::in_ram(ram, chain)?;
        if !readable.is_empty() {
            return Err(PacketError::Direction);
        }
        if writable.len() < HEADER_SIZE {
            return Err(PacketError::Short);
        }
        Ok(Self {
            head_index: chain.head_index(),
            writable,
        })
    }

    /// The chain's head, for the used ring.
    pub fn head_index(&self) -> u16 {
        self.head_index
    }

    /// Bytes of payload that fit.
    pub fn capacity(&self) -> usize {
        self.writable.len() - HEADER_SIZE
    }

    /// Where the first `length` bytes of payload go, as far as they fit.
    pub fn payload(&self, length: usize) -> Slices<'a> {
        self.writable.range(HEADER_SIZE, length)
    }

    /// Writes the header; gives the bytes used in the chain together with `header.len`.
    pub fn write_header(&self, header: Header) -> u32 {
        let written = self.writable.write(0, &header.to_bytes());
        // 44, as `parse` made sure.
        u32::try_from(written).unwrap_or(0).saturating_add(header.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_the_wire() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 2,
            src_port: 0xdead_beef,
            dst_port: 1024,
            len: 17,
            socket_type: TYPE_STREAM,
            op: op::RW,
            flags: shutdown::BOTH,
            buf_alloc: u32::MAX,
            fwd_cnt: 0x8000_0000,
        };
        let bytes = header.to_bytes();
        assert_eq!(Header::from_bytes(&bytes), header);
        assert_eq!(bytes[..8], [8, 7, 6, 5, 4, 3, 2, 1], "fields are little-endian");
        assert_eq!(bytes[24..32], [17, 0, 0, 0, 1, 0, 5, 0]);
    }
}
