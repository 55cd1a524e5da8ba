// SPDX-License-Identifier: Apache-2.0
//! What is behind the image in a pod's snapshot: the input is that, with magic, epoch, lengths and checksum made right. The
//! first two bytes are the length of the facts.
#![no_main]

use std::cell::OnceCell;
use std::os::unix::fs::FileExt;

use cloister_sandbox_api::pod::snapshot::Snapshot;
use cloister_tests::images::{self, Small};
use cloister_vmm::image::Image;
use libfuzzer_sys::fuzz_target;
use sha2::{Digest, Sha256};

thread_local! {
    // A real image, made once.
    static IMAGE: OnceCell<(Small, u64)> = const { OnceCell::new() };
}

fn make() -> (Small, u64) {
    let small = images::small();
    let image = small.whole.try_clone().map(Image::open);
    let end = image.expect("a file").expect("an image").file_len();
    (small, end.next_multiple_of(4096))
}

fuzz_target!(|data: &[u8]| {
    let Some((length, rest)) = data.split_first_chunk() else {
        return;
    };
    let facts = usize::from(u16::from_le_bytes(*length)).min(rest.len());
    let mut all = b"CLOISPOD".to_vec();
    all.extend(1u32.to_le_bytes());
    all.extend(u32::try_from(facts).unwrap_or(u32::MAX).to_le_bytes());
    all.extend(u64::try_from(rest.len() - facts).unwrap_or(u64::MAX).to_le_bytes());
    all.extend(Sha256::digest(rest));
    all.resize(64, 0);
    all.extend_from_slice(rest);
    IMAGE.with(|image| {
        let (small, start) = image.get_or_init(make);
        let file = small.whole.try_clone().expect("a descriptor");
        file.set_len(*start).expect("memory");
        file.write_all_at(&all, *start).expect("memory");
        if let Ok(snapshot) = Snapshot::open(&[file], false) {
            let _ = snapshot.wants();
        }
    });
});
