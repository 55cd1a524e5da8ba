// SPDX-License-Identifier: Apache-2.0
//! A file that claims to be the image of a cell, alone or on another one. Magic, epoch and the checksum of its header are made
//! right, so that the fuzzer gets past them; behind the header are zeroes.
//!
//! The input: with an even first byte, a header; with an odd one, the length of the base's header (2 bytes), that, and a
//! header. What may be beside an image, its working set, is read from the same bytes.
#![no_main]

use std::cell::OnceCell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use cloister_vmm::image::{self, Image, WorkingSet, memory_file};
use libfuzzer_sys::fuzz_target;

/// More than the RAM of the images that the fuzzer starts from.
const LENGTH: u64 = 5 << 20;

fn file(header: &[u8]) -> Option<File> {
    let file = memory_file().ok()?;
    let length = u32::try_from(header.len()).ok()?;
    let mut all = b"CLOISTER".to_vec();
    for number in [image::EPOCH, length, crc32fast::hash(header)] {
        all.extend_from_slice(&number.to_le_bytes());
    }
    all.resize(64, 0);
    all.extend_from_slice(header);
    file.write_all_at(&all, 0).ok()?;
    file.set_len(LENGTH).ok()?;
    image::seal(&file).ok()?;
    Some(file)
}

fn files(data: &[u8]) -> Option<Vec<File>> {
    let (flag, rest) = data.split_first()?;
    if flag % 2 == 0 {
        return Some(vec![file(rest)?]);
    }
    let (length, rest) = rest.split_first_chunk()?;
    let (base, header) = rest.split_at_checked(usize::from(u16::from_le_bytes(*length)))?;
    Some(vec![file(header)?, file(base)?])
}

thread_local! {
    static PATH: OnceCell<PathBuf> = const { OnceCell::new() };
}

fn working_set(body: &[u8]) {
    PATH.with(|path| {
        let own = || std::env::temp_dir().join(format!("cloister-fuzz-{}", std::process::id()));
        let path = path.get_or_init(own);
        let mut all = b"CLOISSET".to_vec();
        for number in [1, crc32fast::hash(body)] {
            all.extend_from_slice(&number.to_le_bytes());
        }
        all.extend_from_slice(body);
        if std::fs::write(path, &all).is_ok()
            && let Ok(set) = WorkingSet::load(path)
        {
            let _ = set.bytes();
        }
    });
}

fuzz_target!(|data: &[u8]| {
    if let Some(files) = files(data)
        && let Ok(image) = Image::open_chain(files)
    {
        let _ = image.verify();
        let _ = (image.shape(), image.processor(), image.ram_bytes());
    }
    working_set(data);
});
