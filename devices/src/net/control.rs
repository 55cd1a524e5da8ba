// SPDX-License-Identifier: Apache-2.0
//! The control queue (virtio 1.3, section 5.1.6.5): how many queue pairs the driver uses.
//!
//! ```text
//!  readable: class u8, command u8, data …     writable: ack u8
//! ```

use crate::virtio::Buffers;

const CLASS_MQ: u8 = 4;
const MQ_PAIRS_SET: u8 = 0;
const ACK_OK: u8 = 0;
const ACK_ERROR: u8 = 1;

/// Serves one command; `set_pairs` puts a number of pairs into effect, if it can. Returns how many bytes were written.
pub(super) fn serve(
    buffers: &Buffers<'_>,
    set_pairs: impl FnOnce(u16) -> Result<(), String>,
) -> Result<u32, String> {
    if buffers.writable.is_empty() {
        return Err("a control command without room for an answer".to_owned());
    }
    let mut command = [0; 4];
    let len = buffers.readable.read(0, &mut command);
    let [class, number, low, high] = command;
    let result = match (class, number) {
        (CLASS_MQ, MQ_PAIRS_SET) if len == 4 && buffers.readable.len() == 4 => {
            set_pairs(u16::from_le_bytes([low, high]))
        }
        _ => Err(format!("control command {class}.{number} is not known")),
    };
    let ack = if result.is_ok() { ACK_OK } else { ACK_ERROR };
    buffers.writable.write(0, &[ack]);
    result.map(|()| 1)
}
