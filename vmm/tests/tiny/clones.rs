// SPDX-License-Identifier: Apache-2.0
//! Images and the cells that are made of them.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use cloister_devices::net::{NetBackend, NetConfig};
use cloister_vmm::image::{self, Image, ImageError, MAX_CHAIN, NewBase, WorkingSet};
use cloister_vmm::{
    Boot, Cell, CellConfig, CellHost, CellState, CreateError, DeviceConfig, InterruptChip, LifecycleError,
    PlugError,
};
use vm_memory::{Bytes, GuestAddress};

use super::{PATIENCE, alone, config, descriptors, eventually, guests, host, read_u32, threads};

const COUNT: u64 = 0x20_0000;

/// A guest that counts, with devices of all sorts and a place for one more.
fn counting() -> CellConfig {
    let mut config = config(guests::counter());
    config.devices = vec![DeviceConfig::Rng, DeviceConfig::Slot, balloon()];
    config
}

fn balloon() -> DeviceConfig {
    DeviceConfig::Balloon {
        deflate_on_oom: false,
    }
}

/// Starts it and pauses it on its way.
fn paused(host: &CellHost, config: CellConfig) -> Cell {
    let cell = Cell::create(config, host).unwrap();
    let before = read_u32(&cell, COUNT);
    cell.start().unwrap();
    eventually("the guest counts", || read_u32(&cell, COUNT) > before + 100);
    cell.pause().unwrap();
    cell
}

/// An image in sealed memory.
fn image_of(cell: &Cell) -> Arc<Image> {
    let file = image::memory_file().unwrap();
    let written = cell.write_image(&file).unwrap();
    image::seal(&file).unwrap();
    let image = Image::open(file).unwrap();
    assert_eq!(image.ram_bytes(), written.ram_bytes);
    image.verify().unwrap();
    image
}

fn clone_of(image: &Arc<Image>) -> CellConfig {
    let image = Arc::clone(image);
    let mut config = CellConfig::new("clone", Boot::Clone { image });
    config.memory_mib = 4;
    config.devices = vec![DeviceConfig::Rng, DeviceConfig::Slot, balloon()];
    config
}

fn goes_on(cell: &Cell) {
    let before = read_u32(cell, COUNT);
    eventually("it counts on", || read_u32(cell, COUNT) > before + 100);
}

fn bytes_of(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn clones_go_on_from_the_same_moment_and_share_nothing_they_write() {
    let _alone = alone();
    let host = host();
    for interrupt_chip in [InterruptChip::Split, InterruptChip::Kernel] {
        let original = paused(
            &host,
            CellConfig {
                interrupt_chip,
                ..counting()
            },
        );
        original
            .ram()
            .unwrap()
            .write_obj(7u32, GuestAddress(0x30_0000))
            .unwrap();
        let moment = read_u32(&original, COUNT);
        let file = image::memory_file().unwrap();
        original.write_image(&file).unwrap();
        let content = bytes_of(&file);
        image::seal(&file).unwrap();
        let image = Image::open(file.try_clone().unwrap()).unwrap();
        assert_eq!(image.shape().devices, ["rng", "slot", "balloon"]);
        assert!(!image.processor().is_empty());
        let make = || {
            Cell::create(
                CellConfig {
                    interrupt_chip,
                    ..clone_of(&image)
                },
                &host,
            )
            .unwrap()
        };
        let (one, other) = (make(), make());
        for clone in [&one, &other] {
            assert_eq!(read_u32(clone, COUNT), moment);
            assert!(clone.memory_file().is_none());
        }
        one.start().unwrap();
        goes_on(&one);
        one.ram()
            .unwrap()
            .write_obj(8u32, GuestAddress(0x30_0000))
            .unwrap();
        // Neither the other clone nor the original has moved, and both can go on.
        for still in [&other, &original] {
            assert_eq!(read_u32(still, COUNT), moment);
            assert_eq!(read_u32(still, 0x30_0000), 7);
        }
        original.resume().unwrap();
        other.start().unwrap();
        for running in [&one, &other, &original] {
            goes_on(running);
        }
        assert_eq!(read_u32(&other, 0x30_0000), 7);
        // Made later, still from the same moment: nothing of all that is in the file.
        assert_eq!(read_u32(&make(), COUNT), moment);
        assert_eq!(bytes_of(&file), content);
        // Two pages have been written in the clone: what it counts in, and the test's. Perhaps the stack, too.
        let own = one.resident_ram().unwrap();
        assert!((0x2000..=0x8000).contains(&own), "{own:#x}");
    }
}

#[test]
fn what_the_first_clone_wrote_is_ready_for_the_next() {
    let _alone = alone();
    let host = host();
    let image = image_of(&paused(&host, counting()));
    let own = |cell: &Cell| cell.resident_ram().unwrap();
    let first = Cell::create(clone_of(&image), &host).unwrap();
    assert_eq!(own(&first), 0);
    first.start().unwrap();
    goes_on(&first);
    first
        .ram()
        .unwrap()
        .write_obj(8u32, GuestAddress(0x30_0000))
        .unwrap();
    first.note_ready();
    let written = own(&first);
    let next = Cell::create(clone_of(&image), &host).unwrap();
    assert_eq!(own(&next), written);
    // The pages, not what the first wrote into them.
    assert_eq!(read_u32(&next, 0x30_0000), 0);
    next.start().unwrap();
    goes_on(&next);
    // Noted once; and once more with the first container.
    let write = |page: u64| {
        let ram = next.ram().unwrap();
        ram.write_obj(8u32, GuestAddress(0x30_0000 + page * 0x1000))
            .unwrap();
    };
    let of_a_new_one = || own(&Cell::create(clone_of(&image), &host).unwrap());
    write(1);
    next.note_ready();
    assert_eq!(of_a_new_one(), written);
    next.note_container();
    assert_eq!(of_a_new_one(), own(&next));
    write(2);
    next.note_container();
    assert_eq!(of_a_new_one(), own(&next) - 0x1000);
}

#[test]
fn a_clone_can_be_cloned() {
    let _alone = alone();
    let host = host();
    let mut image = image_of(&paused(&host, counting()));
    let mut last = 0;
    for generation in 1..=3u32 {
        let cell = paused(&host, clone_of(&image));
        // In what the first image had nothing of.
        let own = GuestAddress(0x38_0000 + u64::from(generation) * 0x2000);
        cell.ram().unwrap().write_obj(generation, own).unwrap();
        image = image_of(&cell);
        let next = Cell::create(clone_of(&image), &host).unwrap();
        let count = read_u32(&next, COUNT);
        assert!(count > last);
        last = count;
        for before in 1..=generation {
            assert_eq!(read_u32(&next, 0x38_0000 + u64::from(before) * 0x2000), before);
        }
    }
}

/// An image on another one, in sealed memory, opened on that.
fn image_on(cell: &Cell, base: &Arc<Image>) -> (Arc<Image>, u64) {
    let file = image::memory_file().unwrap();
    let on = NewBase {
        image: base,
        name: "base",
    };
    let written = cell.write_image_on(&file, on).unwrap();
    image::seal(&file).unwrap();
    let image = Image::open_on(file, Arc::clone(base)).unwrap();
    image.verify().unwrap();
    assert_eq!(image.ram_bytes(), written.ram_bytes);
    (image, written.ram_bytes)
}

fn write(cell: &Cell, address: u64, value: u32) {
    cell.ram()
        .unwrap()
        .write_obj(value, GuestAddress(address))
        .unwrap();
}

/// What the counting guest writes in a moment: its counter, and perhaps its stack.
const COUNTED: u64 = 0x2000;

#[test]
fn an_image_on_a_base_holds_what_differs() {
    let _alone = alone();
    let host = host();
    let booted = paused(&host, counting());
    write(&booted, 0x30_0000, 1);
    write(&booted, 0x31_0000, 1);
    let whole = image_of(&booted);
    // One that booted, and one that was made of the base: what is found by comparison is what the page tables say.
    let cloned = Cell::create(clone_of(&whole), &host).unwrap();
    cloned.start().unwrap();
    goes_on(&cloned);
    cloned.pause().unwrap();
    for cell in [&booted, &cloned] {
        // Another content, a page of zeroes, a new page, a long run of new pages, one that is written but the same.
        write(cell, 0x30_0000, 2);
        write(cell, 0x31_0000, 0);
        write(cell, 0x38_0000, 3);
        for page in 0..32 {
            write(cell, 0x3a_0000 + page * 0x1000, 4);
        }
        write(cell, 0x10_0000, read_u32(cell, 0x10_0000));
        let (later, bytes) = image_on(cell, &whole);
        let own = 35 * 0x1000;
        assert!((own..=own + COUNTED).contains(&bytes), "{bytes:#x}");
        assert_eq!(later.base().unwrap().identity(), whole.identity());
        let next = Cell::create(clone_of(&later), &host).unwrap();
        assert_eq!(read_u32(&next, COUNT), read_u32(cell, COUNT));
        for (address, value) in [
            (0x30_0000, 2),
            (0x31_0000, 0),
            (0x38_0000, 3),
            (0x3a_0000, 4),
            (0x3b_f000, 4),
            (0x10_0000, read_u32(cell, 0x10_0000)),
        ] {
            assert_eq!(read_u32(&next, address), value, "{address:#x}");
        }
        next.start().unwrap();
        goes_on(&next);
        // All of RAM is the same as in a whole image of the same moment.
        let (one, other) = (
            Cell::create(clone_of(&later), &host).unwrap(),
            Cell::create(clone_of(&image_of(cell)), &host).unwrap(),
        );
        for page in 0..0x400 {
            let content = |cell: &Cell| {
                let mut bytes = vec![0; 0x1000];
                let address = GuestAddress(page * 0x1000);
                cell.ram().unwrap().read_slice(&mut bytes, address).unwrap();
                bytes
            };
            assert!(content(&one) == content(&other), "page {page:#x}");
        }
    }
    // The base is as it was.
    let first = Cell::create(clone_of(&whole), &host).unwrap();
    assert_eq!(read_u32(&first, 0x31_0000), 1);
    // What differs from one image is not what differs from another.
    let (_, bytes) = image_on(&first, &whole);
    assert_eq!(bytes, 0);
}

#[test]
fn images_stand_on_each_other_to_a_bound() {
    let _alone = alone();
    let host = host();
    let mut cell = paused(&host, counting());
    let mut image = image_of(&cell);
    for generation in 1..u32::try_from(MAX_CHAIN).unwrap() {
        let own = 0x38_0000 + u64::from(generation) * 0x2000;
        write(&cell, own, generation);
        // All write this one: the newest counts.
        write(&cell, 0x34_0000, generation);
        let (next, bytes) = image_on(&cell, &image);
        assert!((0x2000..=0x2000 + COUNTED).contains(&bytes), "{bytes:#x}");
        image = next;
        cell = paused(&host, clone_of(&image));
        assert_eq!(read_u32(&cell, 0x34_0000), generation);
        for before in 1..=generation {
            assert_eq!(read_u32(&cell, 0x38_0000 + u64::from(before) * 0x2000), before);
        }
    }
    let on = NewBase {
        image: &image,
        name: "last",
    };
    let file = image::memory_file().unwrap();
    let error = cell.write_image_on(&file, on).unwrap_err();
    assert!(
        matches!(error, LifecycleError::Image(ImageError::TooDeep)),
        "{error:?}"
    );
    assert!(matches!(cell.check_base(&image), Err(ImageError::TooDeep)));
    // A whole one goes, and the next can stand on that.
    let whole = image_of(&cell);
    assert!(image_on(&cell, &whole).1 == 0);
}

#[test]
fn a_wrong_or_missing_base_is_refused_by_name() {
    let _alone = alone();
    let host = host();
    let cell = paused(&host, counting());
    let (one, other) = (image_of(&cell), image_of(&cell));
    assert_ne!(one.identity(), other.identity());
    let file = image::memory_file().unwrap();
    let on = NewBase {
        image: &one,
        name: "monday.image",
    };
    cell.write_image_on(&file, on).unwrap();
    let again = || file.try_clone().unwrap();
    assert_eq!(image::base_of(&file).unwrap().unwrap().identity, one.identity());
    let missing = Image::open(again()).unwrap_err();
    let wrong = Image::open_on(again(), Arc::clone(&other)).unwrap_err();
    assert!(matches!(missing, ImageError::NeedsBase { .. }), "{missing:?}");
    assert!(matches!(wrong, ImageError::WrongBase { .. }), "{wrong:?}");
    for error in [&missing, &wrong] {
        let said = error.to_string();
        assert!(said.contains("monday.image"), "{said}");
        assert!(said.contains(&one.identity().to_string()), "{said}");
    }
    assert!(wrong.to_string().contains(&other.identity().to_string()));
    let itself = Image::open_on(again(), one).unwrap();
    // Nor can a whole one stand on something, or one of another size be stood on.
    let whole = image::memory_file().unwrap();
    cell.write_image(&whole).unwrap();
    assert!(matches!(Image::open_on(whole, itself), Err(ImageError::NoBase)));
    let larger = Cell::create(
        CellConfig {
            memory_mib: 8,
            ..counting()
        },
        &host,
    )
    .unwrap();
    let on = NewBase {
        image: &other,
        name: "other",
    };
    let error = larger
        .write_image_on(&image::memory_file().unwrap(), on)
        .unwrap_err();
    assert!(
        matches!(error, LifecycleError::Image(ImageError::OtherRam { .. })),
        "{error:?}"
    );
    // A full disk leaves the cell as it was here, too.
    let full = File::options().read(true).write(true).open("/dev/full").unwrap();
    write(&cell, 0x30_0000, 9);
    assert!(matches!(
        cell.write_image_on(&full, on),
        Err(LifecycleError::Image(ImageError::Io { .. }))
    ));
    cell.resume().unwrap();
    goes_on(&cell);
}

#[test]
fn what_a_clone_touches_can_be_kept_for_others() {
    let _alone = alone();
    let host = host();
    let file = image::memory_file().unwrap();
    paused(&host, counting()).write_image(&file).unwrap();
    image::seal(&file).unwrap();
    let open = || Image::open(file.try_clone().unwrap()).unwrap();
    let own = |cell: &Cell| cell.resident_ram().unwrap();
    let first = Cell::create(clone_of(&open()), &host).unwrap();
    first.start().unwrap();
    goes_on(&first);
    first.pause().unwrap();
    let path = std::env::temp_dir().join(format!("cloister-touched-{}", std::process::id()));
    first.working_set().unwrap().store(&path).unwrap();
    // Another process, or so.
    let image = open();
    assert!(image.working_set().is_none());
    let set = WorkingSet::load(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert_eq!(set.bytes().0, own(&first));
    assert!(image.expect(set.clone()));
    let next = Cell::create(clone_of(&image), &host).unwrap();
    assert_eq!(own(&next), own(&first));
    next.start().unwrap();
    goes_on(&next);
    // Of another image it is of no use, and does no harm.
    let other = image_of(&paused(&host, counting()));
    assert!(!other.expect(set));
    assert!(other.working_set().is_none());
}

#[test]
fn clones_come_and_go_and_leave_nothing() {
    let _alone = alone();
    let host = host();
    let image = image_of(&paused(&host, counting()));
    let maps = || {
        std::fs::read_to_string("/proc/self/maps")
            .unwrap()
            .matches("cloister-image")
            .count()
    };
    // What is made once is made with the first.
    let turn = |count: usize| {
        let cells: Vec<Cell> = (0..count)
            .map(|_| Cell::create(clone_of(&image), &host).unwrap())
            .collect();
        for cell in &cells {
            cell.start().unwrap();
        }
        for cell in &cells {
            goes_on(cell);
        }
        if count == 1 {
            println!("{:#?}", cells[0].phases());
        }
        assert!(maps() >= count);
        for cell in &cells {
            cell.stop();
        }
        for cell in &cells {
            assert!(cell.wait_taken_down(PATIENCE));
        }
    };
    turn(1);
    eventually("the first is gone", || threads() == 6);
    let fds = descriptors();
    for _ in 0..10 {
        turn(8);
    }
    eventually("the last is gone", || threads() == 6);
    assert_eq!((descriptors(), maps()), (fds, 0));
}

fn card(backend: NetBackend) -> NetConfig {
    NetConfig {
        backend,
        mac: [2, 0, 0, 0, 0, 1],
        mtu: None,
    }
}

#[test]
fn a_card_is_plugged_in_while_its_cell_stands_still() {
    let _alone = alone();
    let host = host();
    let unplugged = || DeviceConfig::Net(card(NetBackend::Unplugged { pairs: 1 }));
    let with_card = |config: CellConfig| CellConfig {
        devices: vec![DeviceConfig::Rng, unplugged()],
        ..config
    };
    let image = image_of(&paused(&host, with_card(counting())));
    let cell = Cell::create(with_card(clone_of(&image)), &host).unwrap();
    let (end, other) = std::os::unix::net::UnixDatagram::pair().unwrap();
    let plug = |position| {
        let end = end.try_clone().unwrap().into();
        cell.plug(position, card(NetBackend::Socket(end)))
    };
    assert!(
        matches!(plug(1), Err(PlugError::State { .. })),
        "it was never started"
    );
    cell.start().unwrap();
    goes_on(&cell);
    assert!(matches!(plug(1), Err(PlugError::State { .. })), "it runs");
    cell.pause().unwrap();
    for position in [0, 2] {
        assert!(
            matches!(plug(position), Err(PlugError::NoCard { .. })),
            "{position}"
        );
    }
    let fds = descriptors();
    plug(1).unwrap();
    assert_eq!(
        descriptors(),
        fds + 1,
        "its socket is there, and nothing of the device before it"
    );
    let several = card(NetBackend::Unplugged { pairs: 2 });
    assert!(matches!(cell.plug(1, several), Err(PlugError::Restore(_))));
    cell.resume().unwrap();
    goes_on(&cell);
    cell.stop();
    assert!(matches!(plug(1), Err(PlugError::State { .. })), "it has stopped");
    drop(other);
}

#[test]
fn a_device_can_come_into_a_slot_but_no_other_place() {
    let _alone = alone();
    let host = host();
    let image = image_of(&paused(&host, counting()));
    let with = |devices| CellConfig {
        devices,
        ..clone_of(&image)
    };
    let cell = Cell::create(with(vec![DeviceConfig::Rng, DeviceConfig::Rng, balloon()]), &host).unwrap();
    cell.start().unwrap();
    goes_on(&cell);
    for (config, words) in [
        (
            with(vec![balloon(), DeviceConfig::Slot, balloon()]),
            ["rng in place 0", "balloon in place 0"],
        ),
        (
            with(vec![DeviceConfig::Rng]),
            ["rng, slot, balloon", "devices rng"],
        ),
        (
            CellConfig {
                memory_mib: 8,
                ..clone_of(&image)
            },
            ["4 MiB of RAM", "8 MiB"],
        ),
        (
            CellConfig {
                max_vcpus: 2,
                ..clone_of(&image)
            },
            ["1 vCPUs", "2 vCPUs"],
        ),
        (
            CellConfig {
                serial: None,
                ..clone_of(&image)
            },
            ["1 serial", "0 serial"],
        ),
    ] {
        let error = Cell::create(config, &host).err().expect("it must not fit");
        assert!(matches!(error, CreateError::Shape { .. }), "{error:?}");
        for word in words {
            assert!(error.to_string().contains(word), "{error}: {word}");
        }
    }
}

#[test]
fn a_disk_that_is_full_leaves_the_cell_as_it_was() {
    let _alone = alone();
    let host = host();
    let cell = paused(&host, counting());
    let full = File::options().read(true).write(true).open("/dev/full").unwrap();
    let error = cell.write_image(&full).unwrap_err();
    match error {
        LifecycleError::Image(ImageError::Io { source, .. }) => {
            assert_eq!(source.kind(), std::io::ErrorKind::StorageFull);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(cell.state(), CellState::Paused);
    cell.resume().unwrap();
    goes_on(&cell);
    // Nor can a running cell be saved.
    let file = image::memory_file().unwrap();
    assert!(matches!(
        cell.write_image(&file),
        Err(LifecycleError::State { .. })
    ));
}

/// Runs `test` on a folder with room for so many bytes, of a file system that only its thread sees.
fn on_a_small_disk(bytes: usize, test: impl FnOnce(&Path) + Send) {
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
    let folder = std::env::temp_dir().join(format!("cloister-small-{}", std::process::id()));
    std::fs::create_dir(&folder).unwrap();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: no descriptors are taken apart; the thread's root and working folder are the same ones.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }
                .expect("this test needs root");
            let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            mount_change("/", private).unwrap();
            let size = std::ffi::CString::new(format!("size={bytes}")).unwrap();
            mount("small", &folder, "tmpfs", MountFlags::empty(), size.as_c_str()).unwrap();
            test(&folder);
        });
        let result = thread.join();
        std::fs::remove_dir(&folder).unwrap();
        result.unwrap();
    });
}

#[test]
fn a_disk_that_becomes_full_keeps_nothing_of_an_image() {
    let _alone = alone();
    let host = host();
    let cell = paused(&host, counting());
    // As much as there is room for; the image has other pages, too.
    let most = GuestAddress(0x28_0000);
    let fill = |byte| {
        let ram = cell.ram().unwrap();
        ram.write_slice(&[byte; 1 << 20], most).unwrap();
    };
    on_a_small_disk(1 << 20, |folder| {
        let path = folder.join("image");
        let names = || {
            let entries = std::fs::read_dir(folder).unwrap();
            let names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
            names
        };
        let assert_full = || {
            let error = cell.save_image(&path).unwrap_err();
            let LifecycleError::Image(error) = error else {
                panic!("{error:?}");
            };
            let source = std::error::Error::source(&error).unwrap().to_string();
            assert!(source.contains("No space left"), "{error}: {source}");
        };
        fill(7);
        assert_full();
        assert!(names().is_empty(), "{:?}", names());
        assert_eq!(cell.state(), CellState::Paused);
        cell.resume().unwrap();
        goes_on(&cell);
        cell.pause().unwrap();
        // Nor is the room taken: there is enough for a smaller one, which a larger one does not replace in part.
        fill(0);
        cell.save_image(&path).unwrap();
        let whole = std::fs::read(&path).unwrap();
        fill(7);
        assert_full();
        assert_eq!(names(), ["image"]);
        assert!(std::fs::read(&path).unwrap() == whole);
        let image = Image::open(File::open(&path).unwrap()).unwrap();
        image.verify().unwrap();
        goes_on_as_clone(&host, &image);
    });
    cell.resume().unwrap();
    goes_on(&cell);
}

fn goes_on_as_clone(host: &CellHost, image: &Arc<Image>) {
    let clone = Cell::create(clone_of(image), host).unwrap();
    clone.start().unwrap();
    goes_on(&clone);
    clone.stop();
    assert!(clone.wait_taken_down(PATIENCE));
}

fn file_with(content: &[u8]) -> File {
    let file = image::memory_file().unwrap();
    file.write_all_at(content, 0).unwrap();
    file
}

#[test]
fn damaged_and_foreign_images_are_refused() {
    let _alone = alone();
    let host = host();
    let cell = paused(&host, counting());
    let file = image::memory_file().unwrap();
    cell.write_image(&file).unwrap();
    let good = bytes_of(&file);
    let open = |content: &[u8]| Image::open(file_with(content));
    let number = |at: usize| u32::from_le_bytes(good[at..at + 4].try_into().unwrap());
    assert_eq!(&good[..8], b"CLOISTER");
    open(&good).unwrap().verify().unwrap();

    assert!(matches!(open(b""), Err(ImageError::NotAnImage)));
    assert!(matches!(open(b"CLOISTER"), Err(ImageError::NotAnImage)));
    assert!(matches!(open(&[0; 100_000]), Err(ImageError::NotAnImage)));
    let changed = |at: usize, to: &[u8]| {
        let mut content = good.clone();
        content[at..at + to.len()].copy_from_slice(to);
        content
    };
    let found = number(8) + 1;
    let error = open(&changed(8, &found.to_le_bytes())).unwrap_err();
    assert!(
        matches!(error, ImageError::Epoch { found: f, .. } if f == found),
        "{error}"
    );
    for length in [0, 1, number(12) - 1, number(12) + 1, u32::MAX] {
        assert!(matches!(
            open(&changed(12, &length.to_le_bytes())),
            Err(ImageError::Damaged { .. })
        ));
    }
    // Cut short anywhere.
    for len in [63, 64, 100, good.len() / 2, good.len() - 1] {
        assert!(open(&good[..len]).is_err(), "{len}");
    }
    // Any bit of prefix and header, with the checksum as it was.
    let header_end = 64 + usize::try_from(number(12)).unwrap();
    for at in (0..20).chain((64..header_end).step_by(7)) {
        assert!(open(&changed(at, &[good[at] ^ 0x10])).is_err(), "{at}");
    }
    // A bit of the RAM is only found by who looks.
    let last = good.len() - 4096;
    let place = last + good[last..].iter().position(|byte| *byte != 0).unwrap();
    let damaged = open(&changed(place, &[good[place] ^ 1])).unwrap();
    assert!(matches!(damaged.verify(), Err(ImageError::Damaged { .. })));
}

/// Where the header is in an image.
fn header_of(image: &[u8]) -> Range<usize> {
    let length = u32::from_le_bytes(image[12..16].try_into().unwrap());
    64..64 + usize::try_from(length).unwrap()
}

/// The image with another header, and its right checksum.
fn forged(image: &[u8], change: impl FnOnce(&mut [u8])) -> File {
    let mut content = image.to_vec();
    let header = header_of(image);
    change(&mut content[header.clone()]);
    let sum = crc32fast::hash(&content[header]);
    content[16..20].copy_from_slice(&sum.to_le_bytes());
    file_with(&content)
}

/// Where a structure of KVM's is in a header that begins with these numbers: its length is in front of it.
fn find(header: &[u8], length: u8, begin: [u32; 2]) -> usize {
    let mut bytes = vec![length];
    bytes.extend(begin.iter().flat_map(|number| number.to_le_bytes()));
    let mut places = (0..header.len()).filter(|at| header[*at..].starts_with(&bytes));
    let place = places.next().expect("it is not in the image") + 1;
    assert_eq!(places.next(), None, "{begin:x?} is there twice");
    place
}

/// Changes a number in a header.
fn adapt(header: &mut [u8], at: usize, change: impl FnOnce(u32) -> u32) {
    let bytes: &mut [u8; 4] = header[at..].first_chunk_mut().unwrap();
    *bytes = change(u32::from_le_bytes(*bytes)).to_le_bytes();
}

#[test]
fn an_image_of_another_processor_is_refused_by_name() {
    // Where these are in a kvm_cpuid_entry2.
    const FUNCTION: usize = 0;
    const EAX: usize = 12;
    const EBX: usize = 16;
    const ECX: usize = 20;
    let _alone = alone();
    let host = host();
    let file = image::memory_file().unwrap();
    paused(&host, counting()).write_image(&file).unwrap();
    let good = bytes_of(&file);
    let open = |function, part, change: fn(u32) -> u32| {
        let file = forged(&good, |header| {
            let leaf = find(header, 40, [function, 0]);
            adapt(header, leaf + part, change);
        });
        Image::open(file).unwrap()
    };
    let own = |function, part| {
        let header = &good[header_of(&good)];
        let at = find(header, 40, [function, 0]) + part;
        u32::from_le_bytes(*header[at..].first_chunk().unwrap())
    };
    // A guest that has seen less than there is goes on.
    let less = open(1, ECX, |ecx| ecx & !(1 << 30));
    host.can_run(&less).unwrap();
    goes_on_as_clone(&host, &less);

    let missing = |leaf: &str, bits: u32| {
        let first = (!bits).trailing_zeros();
        format!("CPUID {leaf} bit {first} is missing here")
    };
    for (image, word) in [
        (open(0, EBX, |ebx| !ebx), "the vendor is another".to_owned()),
        (
            open(1, EAX, |model| model ^ 0x10),
            format!("family, model and stepping are {:#x} there", own(1, EAX) ^ 0x10),
        ),
        (open(1, ECX, |_| u32::MAX), missing("0x1.0 ECX", own(1, ECX))),
        (open(7, EBX, |_| u32::MAX), missing("0x7.0 EBX", own(7, EBX))),
        (
            open(0x8000_0001, ECX, |_| u32::MAX),
            missing("0x80000001.0 ECX", own(0x8000_0001, ECX)),
        ),
        (
            open(0x8000_0008, FUNCTION, |_| 0x8fff_ffff),
            "CPUID 0x8fffffff.0 is missing here".to_owned(),
        ),
    ] {
        let create = Cell::create(clone_of(&image), &host).err().expect(&word);
        for error in [host.can_run(&image).expect_err(&word), create] {
            assert!(matches!(error, CreateError::Processor { .. }), "{error:?}");
            let said = error.to_string();
            assert!(said.contains(&word), "{said}: {word}");
            let processor = image.processor();
            assert_eq!(said.matches(&processor).count(), 2, "{said}: {processor}");
        }
    }
}

#[test]
fn an_msr_that_cannot_be_set_here_is_named() {
    // Where these are in a kvm_msr_entry.
    const INDEX: usize = 0;
    const DATA: usize = 8;
    const EFER: u32 = 0xc000_0080;
    const PAT: u32 = 0x277;
    const NONE: u32 = 0x4b56_4dff;
    let _alone = alone();
    let host = host();
    let file = image::memory_file().unwrap();
    paused(&host, counting()).write_image(&file).unwrap();
    let good = bytes_of(&file);
    let refused = |index, data| {
        let file = forged(&good, |header| {
            let entry = find(header, 16, [PAT, 0]);
            adapt(header, entry + INDEX, |_| index);
            adapt(header, entry + DATA, |_| data);
        });
        let image = Image::open(file).unwrap();
        Cell::create(clone_of(&image), &host).err()
    };
    // One that there is, with bits that there are not; and one that there is not.
    let mut bad = vec![(EFER, 0xffff_f0ff)];
    let ignores = std::fs::read_to_string("/sys/module/kvm/parameters/ignore_msrs");
    if ignores.is_ok_and(|ignores| ignores.trim() == "N") {
        bad.push((NONE, 1));
    }
    for (index, data) in bad {
        let error = refused(index, data).unwrap_or_else(|| panic!("{index:#x}: {data:#x} was taken"));
        let CreateError::State(source) = error else {
            panic!("{error:?}");
        };
        let (said, msr) = (source.to_string(), format!("MSR {index:#x} cannot be set"));
        assert!(said.contains(&msr), "{said}");
    }
    let none = refused(PAT, 0x0606_0606);
    assert!(none.is_none(), "{none:?}");
}

/// Whoever makes the checksum right again gets an error or a cell, and never harms the host.
#[test]
fn forged_headers_are_refused_or_harmless() {
    let _alone = alone();
    let host = host();
    let cell = paused(&host, counting());
    let file = image::memory_file().unwrap();
    cell.write_image(&file).unwrap();
    let good = bytes_of(&file);
    let (mut opened, mut made) = (0, 0);
    // The numbers at its begin densely, the states behind them here and there.
    for at in (0..200).chain((200..header_of(&good).len()).step_by(61)) {
        for change in [0x01, 0x7f, 0x80, 0xff] {
            let Ok(image) = Image::open(forged(&good, |header| header[at] ^= change)) else {
                continue;
            };
            opened += 1;
            let mut config = clone_of(&image);
            config.stop_on_device_failure = true;
            if let Ok(cell) = Cell::create(config, &host) {
                made += 1;
                cell.start().unwrap();
                cell.stop();
                assert!(cell.wait(PATIENCE).is_some());
            }
        }
    }
    assert!(opened > made && made > 0, "{opened} opened, {made} made");
}

#[test]
fn a_file_that_others_can_write_is_copied() {
    let _alone = alone();
    let host = host();
    let cell = paused(&host, counting());
    let moment = read_u32(&cell, COUNT);
    for (mode, mapped) in [(0o600, true), (0o666, false)] {
        // Names of their own: a clone's memory goes a moment after it.
        let name = format!("cloister-image-{mode:o}-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        file.set_permissions(std::fs::Permissions::from_mode(mode))
            .unwrap();
        cell.write_image(&file).unwrap();
        let image = Image::open(file.try_clone().unwrap()).unwrap();
        image.verify().unwrap();
        let clone = Cell::create(clone_of(&image), &host).unwrap();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        assert_eq!(maps.contains(path.to_str().unwrap()), mapped);
        if !mapped {
            // It can be cut short by now.
            file.set_len(0).unwrap();
        }
        assert_eq!(read_u32(&clone, COUNT), moment);
        clone.start().unwrap();
        goes_on(&clone);
        std::fs::remove_file(&path).unwrap();
    }
}
