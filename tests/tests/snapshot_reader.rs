// SPDX-License-Identifier: Apache-2.0
//! Whoever reads images and snapshots, given files in which something was changed: bits, numbers, the length. It answers an
//! error, or the same image as before; it never panics, and never asks for more memory than such a file can mean.
//!
//! From fixed seeds. The fuzz targets `image` and `snapshot` in `fuzz/` do the same with coverage as their guide.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "common/small_facts.rs"]
mod small_facts;

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};

use cloister_sandbox_api::pod::snapshot::{self, Snapshot};
use cloister_tests::images;
use cloister_tests::random::Random;
use cloister_vmm::image::{Image, ImageError, memory_file};

/// Remembers the largest piece that was asked for.
struct Watching;

static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all is the system's allocator's own doing.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.fetch_max(size, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(block, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Watching = Watching;

/// More than any reader of files of a few megabytes needs, with its buffers.
const LARGE: usize = 32 << 20;
/// Where an image's header begins; its length and its checksum are in front of it.
const HEADER: usize = 64;
const ROUNDS: usize = 2000;

fn number(bytes: &[u8], at: usize) -> usize {
    let four: [u8; 4] = bytes[at..at + 4].try_into().unwrap();
    usize::try_from(u32::from_le_bytes(four)).unwrap()
}

fn bytes_of(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn file_with(bytes: &[u8]) -> File {
    let file = memory_file().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file
}

/// A number that lengths and offsets are likely to be wrong with.
fn nasty(random: &mut Random) -> u64 {
    let near = random.choose(&[
        0u64,
        1 << 7,
        1 << 12,
        1 << 16,
        1 << 20,
        1 << 31,
        1 << 32,
        1 << 52,
        1 << 63,
        u64::MAX,
    ]);
    near.wrapping_add(random.below(3)).wrapping_sub(1)
}

/// A number as postcard has it: seven bits to a byte.
fn varint(mut number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number >= 0x80 {
        bytes.push(u8::try_from(number & 0x7f).unwrap() | 0x80);
        number >>= 7;
    }
    bytes.push(u8::try_from(number).unwrap());
    bytes
}

/// Changes something in `place` of a file.
fn change(random: &mut Random, bytes: &mut [u8], place: std::ops::Range<usize>) {
    let at = |random: &mut Random| place.start + usize::try_from(random.below(place.len() as u64)).unwrap();
    for _ in 0..=random.below(3) {
        let at = at(random);
        let new = match random.below(4) {
            0 => vec![bytes[at] ^ (1 << random.below(8))],
            1 => nasty(random).to_le_bytes().to_vec(),
            2 => varint(nasty(random)),
            _ => {
                vec![random.choose(&[0, 1, 0x7f, 0x80, 0xff]); 1 + usize::try_from(random.below(16)).unwrap()]
            }
        };
        for (byte, new) in bytes[at..place.end].iter_mut().zip(new) {
            *byte = new;
        }
    }
}

/// Opens an image on its base and looks at all of it.
fn read(bytes: &[u8], base: Option<&File>) -> Result<std::sync::Arc<Image>, ImageError> {
    let mut files = vec![file_with(bytes)];
    files.extend(base.map(|base| base.try_clone().unwrap()));
    let image = Image::open_chain(files)?;
    image.verify()?;
    let _ = (image.shape(), image.processor(), image.ram_bytes());
    Ok(image)
}

#[test]
fn a_changed_image_is_refused_or_the_same() {
    let small = images::small();
    for (name, file, base) in [
        ("whole", &small.whole, None),
        ("later", &small.later, Some(&small.whole)),
    ] {
        let good = bytes_of(file);
        let identity = read(&good, base).unwrap().identity();
        let header = HEADER..HEADER + number(&good, 12);
        let mut random = Random::new(1);
        let (mut same, mut forged) = (0, 0);
        LARGEST.store(0, Ordering::Relaxed);
        for round in 0..ROUNDS {
            let mut bytes = good.clone();
            let fix = random.once_in(2);
            match random.below(8) {
                // Cut short, or longer.
                0 => bytes.resize(
                    usize::try_from(random.below(good.len() as u64 + 9000)).unwrap(),
                    0,
                ),
                1 => change(&mut random, &mut bytes, 0..HEADER),
                2 => change(&mut random, &mut bytes, header.end..good.len()),
                _ => change(&mut random, &mut bytes, header.clone()),
            }
            if fix && bytes.len() >= header.end {
                let sum = crc32fast::hash(&bytes[header.clone()]);
                bytes[16..20].copy_from_slice(&sum.to_le_bytes());
            }
            if let Ok(image) = read(&bytes, base) {
                if image.identity() == identity {
                    assert_eq!(
                        bytes[header.clone()],
                        good[header.clone()],
                        "{name}, round {round}"
                    );
                    same += 1;
                } else {
                    // Only who makes the checksum right gets past it, with states that those whose they are look at.
                    assert!(fix, "{name}, round {round}");
                    forged += 1;
                }
            }
        }
        let largest = LARGEST.load(Ordering::Relaxed);
        assert!(largest < LARGE, "{name}: {largest} bytes at once");
        assert!(
            same > 0 && forged > 0,
            "{name}: {same} as before, {forged} others"
        );
    }
}

/// Every element of a list can be a byte in the file and many in memory.
#[test]
fn long_lists_are_refused_before_they_are_there() {
    let small = images::small();
    let good = bytes_of(&small.whole);
    let header = number(&good, 12);
    for at in (0..header.min(240)).step_by(2) {
        let mut bytes = good[..HEADER + at].to_vec();
        bytes.extend(varint(1 << 40));
        bytes.resize(HEADER + (3 << 20), 0);
        let len = u32::try_from(bytes.len() - HEADER).unwrap();
        bytes[12..16].copy_from_slice(&len.to_le_bytes());
        let sum = crc32fast::hash(&bytes[HEADER..]);
        bytes[16..20].copy_from_slice(&sum.to_le_bytes());
        let file = file_with(&bytes);
        LARGEST.store(0, Ordering::Relaxed);
        assert!(Image::open(file).is_err(), "{at}");
        let largest = LARGEST.load(Ordering::Relaxed);
        assert!(largest < LARGE, "{at}: {largest} bytes at once");
    }
}

#[test]
fn a_changed_snapshot_is_refused_or_the_same() {
    let small = images::small();
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("file"), "content").unwrap();
    std::fs::create_dir(folder.path().join("folder")).unwrap();
    let image_end = Image::open(small.whole.try_clone().unwrap()).unwrap().file_len();
    let start = usize::try_from(image_end.next_multiple_of(4096)).unwrap();
    let facts = small_facts::facts();
    snapshot::write_pod(&small.whole, image_end, &facts, folder.path()).unwrap();
    let good = bytes_of(&small.whole);
    let opened = Snapshot::open(&[file_with(&good)], true).unwrap();
    assert_eq!(opened.facts.record, facts.record);
    let mut random = Random::new(2);
    LARGEST.store(0, Ordering::Relaxed);
    for round in 0..ROUNDS / 2 {
        let mut bytes = good.clone();
        match random.below(4) {
            0 => bytes.truncate(usize::try_from(random.below(good.len() as u64)).unwrap()),
            1 => change(&mut random, &mut bytes, start..start + 24),
            _ => change(&mut random, &mut bytes, start..good.len()),
        }
        if let Ok(snapshot) = Snapshot::open(&[file_with(&bytes)], true) {
            // The sum is of all that matters.
            assert_eq!(snapshot.facts.record, facts.record, "round {round}");
        }
    }
    let largest = LARGEST.load(Ordering::Relaxed);
    assert!(largest < LARGE, "{largest} bytes at once");
}
