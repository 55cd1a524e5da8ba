// SPDX-License-Identifier: Apache-2.0
//! One request (virtio 1.3, section 5.2.6): out of a chain, through the disk, into a status byte.
//!
//! ```text
//!  readable: type u32, reserved u32, sector u64, data of a write …     writable: data of a read …, status u8
//! ```
//! The parts may be cut into descriptors anyhow.

use super::BlockMetrics;
use super::disk::{Disk, DiskError};
use crate::virtio::{Buffers, Health, Slices};

/// Largest serial number (VIRTIO_BLK_ID_BYTES).
pub(super) const SERIAL_SIZE: usize = 20;
/// Most sectors per discard segment: 2 GiB.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 22;
/// Most segments per discard request.
pub(super) const MAX_DISCARD_SEGMENTS: u32 = 16;
/// Most sectors per write-zeroes segment: 32 MiB, since they may have to be written.
pub(super) const MAX_ZERO_SECTORS: u32 = 1 << 16;
/// Most segments per write-zeroes request.
pub(super) const MAX_ZERO_SEGMENTS: u32 = 1;
/// Most bytes of data per request. Above what SEG_MAX times SIZE_MAX allows, so that only a driver that ignores both
/// meets it; it keeps one request from occupying a worker for long.
const MAX_DATA: usize = 64 << 20;

const HEADER_SIZE: usize = 16;
const SEGMENT_SIZE: usize = 16;
const SEGMENT_UNMAP: u32 = 1;

/// Request types.
mod kind {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

/// Status bytes.
mod status {
    pub const OK: u8 = 0;
    pub const IOERR: u8 = 1;
    pub const UNSUPP: u8 = 2;
}

/// What requests run against.
pub(super) struct Target<'a> {
    pub disk: &'a Disk,
    pub serial: &'a [u8; SERIAL_SIZE],
    /// Each write must be stable before it is reported.
    pub write_through: bool,
    pub health: &'a Health,
    pub metrics: &'a BlockMetrics,
}

/// Why a chain is no request: there is nowhere to put a status.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("a block request without a header or without room for a status")]
pub(super) struct NotARequest;

/// Serves the request in `buffers`; returns how many bytes of the writable part are used.
pub(super) fn serve(buffers: &Buffers<'_>, target: &Target<'_>) -> Result<u32, NotARequest> {
    let Some(room) = buffers.writable.len().checked_sub(1) else {
        return Err(NotARequest);
    };
    let mut header = [0; HEADER_SIZE];
    if buffers.readable.read(0, &mut header) != HEADER_SIZE {
        return Err(NotARequest);
    }
    let [kind @ .., _, _, _, _, _, _, _, _, _, _, _, _] = header;
    let [_, _, _, _, _, _, _, _, sector @ ..] = header;
    let (kind, sector) = (u32::from_le_bytes(kind), u64::from_le_bytes(sector));
    let out = buffers.readable.range(HEADER_SIZE, buffers.readable.len());
    let room = buffers.writable.range(0, room);
    let (status, written) = match execute(kind, sector, &out, &room, target) {
        Ok(written) => (status::OK, written),
        Err(error) => {
            target.metrics.failed_requests.increment();
            match error {
                DiskError::Unsupported => (status::UNSUPP, 0),
                error => {
                    target.health.complain(format_args!(
                        "request of type {kind} at sector {sector} failed: {error}"
                    ));
                    (status::IOERR, 0)
                }
            }
        }
    };
    buffers.writable.write(room.len(), &[status]);
    // The status is the last byte: up to it all counts as written where a read succeeded. At most MAX_DATA + 1.
    Ok(u32::try_from(written + 1).unwrap_or(u32::MAX))
}

/// Returns how many bytes were written into `room`.
fn execute(
    kind: u32,
    sector: u64,
    out: &Slices<'_>,
    room: &Slices<'_>,
    target: &Target<'_>,
) -> Result<usize, DiskError> {
    let Target { disk, metrics, .. } = target;
    if out.len() > MAX_DATA || room.len() > MAX_DATA {
        return Err(DiskError::Refused("more than 64 MiB at once"));
    }
    match kind {
        kind::IN => {
            disk.read(sector, room)?;
            metrics.reads.increment();
            metrics.read_bytes.add(room.len());
            return Ok(room.len());
        }
        kind::OUT => {
            disk.write(sector, out)?;
            metrics.writes.increment();
            metrics.written_bytes.add(out.len());
        }
        kind::FLUSH => {
            metrics.flushes.increment();
            disk.flush()?;
            return Ok(0);
        }
        kind::GET_ID => return Ok(room.write(0, target.serial)),
        kind::DISCARD => {
            metrics.discards.increment();
            for segment in segments(out, MAX_DISCARD_SEGMENTS)? {
                // 5.2.6.2: the unmap bit makes no sense here, and reserved bits must be zero.
                if segment.flags != 0 {
                    return Err(DiskError::Unsupported);
                }
                if segment.sectors > MAX_DISCARD_SECTORS {
                    return Err(DiskError::Refused("more sectors than max_discard_sectors"));
                }
                disk.discard(segment.sector, segment.sectors)?;
            }
        }
        kind::WRITE_ZEROES => {
            metrics.discards.increment();
            for segment in segments(out, MAX_ZERO_SEGMENTS)? {
                if segment.flags & !SEGMENT_UNMAP != 0 {
                    return Err(DiskError::Unsupported);
                }
                if segment.sectors > MAX_ZERO_SECTORS {
                    return Err(DiskError::Refused("more sectors than max_write_zeroes_sectors"));
                }
                disk.write_zeroes(segment.sector, segment.sectors, segment.flags != 0)?;
            }
        }
        _ => return Err(DiskError::Unsupported),
    }
    if target.write_through {
        disk.flush()?;
    }
    Ok(0)
}

/// A range in a discard or write-zeroes request.
#[derive(Debug, PartialEq, Eq)]
struct Segment {
    sector: u64,
    sectors: u32,
    flags: u32,
}

/// Reads all segments first: none takes effect if one of them is malformed.
fn segments(out: &Slices<'_>, most: u32) -> Result<Vec<Segment>, DiskError> {
    let count = out.len() / SEGMENT_SIZE;
    if out.is_empty() || !out.len().is_multiple_of(SEGMENT_SIZE) || count > usize::try_from(most).unwrap_or(0)
    {
        return Err(DiskError::Refused("a list of ranges of the wrong length"));
    }
    let segment = |index: usize| {
        let mut bytes = [0; SEGMENT_SIZE];
        out.read(index * SEGMENT_SIZE, &mut bytes);
        let [sector @ .., _, _, _, _, _, _, _, _] = bytes;
        let [_, _, _, _, _, _, _, _, s0, s1, s2, s3, flags @ ..] = bytes;
        Segment {
            sector: u64::from_le_bytes(sector),
            sectors: u32::from_le_bytes([s0, s1, s2, s3]),
            flags: u32::from_le_bytes(flags),
        }
    };
    Ok((0..count).map(segment).collect())
}
