// SPDX-License-Identifier: Apache-2.0
//! The control queue (virtio 1.3, section 5.1.6.5): how many queue pairs the driver uses, and which frames it wants.
//!
//! ```text
//!  readable: class u8, command u8, data …     writable: ack u8
//! ```

use super::filter::{self, Mac, Table};
use crate::virtio::{Buffers, Slices};

const CLASS_RX: u8 = 0;
const RX_PROMISC: u8 = 0;
const RX_ALLMULTI: u8 = 1;
const CLASS_MAC: u8 = 1;
const MAC_TABLE_SET: u8 = 0;
const MAC_ADDR_SET: u8 = 1;
const CLASS_MQ: u8 = 4;
const MQ_PAIRS_SET: u8 = 0;
const ACK_OK: u8 = 0;
const ACK_ERROR: u8 = 1;

/// What the driver may ask for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// To use so many queue pairs.
    Pairs(u16),
    /// All frames.
    Promiscuous(bool),
    /// All multicast frames.
    AllMulticast(bool),
    /// Frames to these unicast and multicast addresses, too.
    Table(Table, Table),
    /// Another address for the device.
    Address(Mac),
}

/// Serves one command; `obey` puts it into effect, if it can. Returns how many bytes were written.
pub(super) fn serve(
    buffers: &Buffers<'_>,
    obey: impl FnOnce(Command) -> Result<(), String>,
) -> Result<u32, String> {
    if buffers.writable.is_empty() {
        return Err("a control command without room for an answer".to_owned());
    }
    let result = command(&buffers.readable).and_then(obey);
    let ack = if result.is_ok() { ACK_OK } else { ACK_ERROR };
    buffers.writable.write(0, &[ack]);
    result.map(|()| 1)
}

/// `N` bytes at `offset`, if they are there.
fn bytes<const N: usize>(data: &Slices<'_>, offset: u64) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    let read = data.read(usize::try_from(offset).ok()?, &mut bytes);
    (read == N).then_some(bytes)
}

fn command(data: &Slices<'_>) -> Result<Command, String> {
    let [class, number] = bytes(data, 0).ok_or("a control command without a number")?;
    let len = data.len();
    let on = || bytes::<1>(data, 2).map(|[on]| on != 0);
    let command = match (class, number) {
        (CLASS_MQ, MQ_PAIRS_SET) if len == 4 => bytes(data, 2).map(u16::from_le_bytes).map(Command::Pairs),
        (CLASS_RX, RX_PROMISC) if len == 3 => on().map(Command::Promiscuous),
        (CLASS_RX, RX_ALLMULTI) if len == 3 => on().map(Command::AllMulticast),
        (CLASS_MAC, MAC_TABLE_SET) => tables(data),
        (CLASS_MAC, MAC_ADDR_SET) if len == 8 => bytes(data, 2).map(Command::Address),
        _ => None,
    };
    command.ok_or_else(|| format!("control command {class}.{number} of {len} bytes is not known"))
}

/// Two tables, of unicast and of multicast addresses: each a number of entries (le32), and so many addresses.
fn tables(data: &Slices<'_>) -> Option<Command> {
    const ENTRY: u64 = 6;
    let read = |at: u64| {
        let entries = u64::from(u32::from_le_bytes(bytes(data, at)?));
        let first = at.checked_add(4)?;
        let end = first.checked_add(entries.checked_mul(ENTRY)?)?;
        // What is not there is not asked for below.
        (end <= u64::try_from(data.len()).ok()?).then_some(())?;
        let entry =
            |index: u64| bytes(data, first.saturating_add(index.saturating_mul(ENTRY))).unwrap_or_default();
        Some((filter::table(entries, entry), end))
    };
    let (unicast, end) = read(2)?;
    let (multicast, end) = read(end)?;
    (end == u64::try_from(data.len()).ok()?).then_some(Command::Table(unicast, multicast))
}
