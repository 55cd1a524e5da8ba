// SPDX-License-Identifier: Apache-2.0
//! `snapshot-seeds FOLDER`: makes what the fuzz targets `image` and `snapshot` start from, of small images of real cells, in
//! FOLDER/image and FOLDER/snapshot.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../tests/common/small_facts.rs"]
mod small_facts;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use cloister_sandbox_api::pod::snapshot::write_pod;
use cloister_tests::images;
use cloister_vmm::image::memory_file;

fn header(image: &File) -> Vec<u8> {
    let mut length = [0; 4];
    image.read_exact_at(&mut length, 12).unwrap();
    let mut header = vec![0; usize::try_from(u32::from_le_bytes(length)).unwrap()];
    image.read_exact_at(&mut header, 64).unwrap();
    header
}

fn main() {
    let folder = std::env::args_os().nth(1).expect("usage: snapshot-seeds FOLDER");
    let folder = Path::new(&folder);
    let put = |target: &str, name: &str, bytes: Vec<u8>| {
        let folder = folder.join(target);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(name), bytes).unwrap();
    };
    let small = images::small();
    let (whole, later) = (header(&small.whole), header(&small.later));
    put("image", "whole", [&[0], &*whole].concat());
    let length = u16::try_from(whole.len()).unwrap().to_le_bytes();
    put("image", "later", [&[1], &length[..], &whole, &later].concat());

    let pod = memory_file().unwrap();
    let files = folder.join("snapshot");
    fs::create_dir_all(&files).unwrap();
    // A layer of what is there already: the folder of the seeds.
    write_pod(&pod, 0, &small_facts::facts(), &files).unwrap();
    let mut lengths = [0; 12];
    pod.read_exact_at(&mut lengths, 12).unwrap();
    let mut rest = vec![0; usize::try_from(pod.metadata().unwrap().len()).unwrap() - 64];
    pod.read_exact_at(&mut rest, 64).unwrap();
    put("snapshot", "pod", [&lengths[..2], &rest].concat());
}
