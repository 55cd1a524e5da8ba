// SPDX-License-Identifier: Apache-2.0
//! A file that claims to be the image of a cell. The checksum of its header is made right, so that the fuzzer gets past it.
#![no_main]

use std::fs::File;
use std::os::unix::fs::FileExt;

use cloister_vmm::image::{Image, memory_file};
use libfuzzer_sys::fuzz_target;

/// Where the header begins; its length and its checksum are before it (`vmm/src/image/format.rs`).
const HEADER: usize = 64;

fn open(data: &[u8]) -> Option<File> {
    let file = memory_file().ok()?;
    file.write_all_at(data, 0).ok()?;
    let header = data.get(HEADER..)?;
    let length = u32::from_le_bytes(data.get(12..16)?.try_into().ok()?);
    let header = header.get(..usize::try_from(length).ok()?).unwrap_or(header);
    let length = u32::try_from(header.len()).ok()?;
    let mut prefix = b"CLOISTER".to_vec();
    for number in [1, length, crc32fast::hash(header)] {
        prefix.extend_from_slice(&number.to_le_bytes());
    }
    file.write_all_at(&prefix, 0).ok()?;
    Some(file)
}

fuzz_target!(|data: &[u8]| {
    if let Some(file) = open(data)
        && let Ok(image) = Image::open(file)
    {
        let _ = image.verify();
        let _ = (image.shape(), image.processor(), image.ram_bytes());
    }
});
