// SPDX-License-Identifier: Apache-2.0
use super::*;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use tar::{Builder, Header};

/// A folder with a neighbour that no archive may touch. Whoever runs these tests must be root: they make devices.
struct Bed {
    dir: PathBuf,
}

impl Bed {
    fn new() -> Self {
        let dir = std::env::temp_dir().join(format!("cloister-unpack-{}", crate::ids::random_hex(8)));
        std::fs::create_dir_all(dir.join("root")).unwrap();
        std::fs::create_dir_all(dir.join("outside")).unwrap();
        std::fs::write(dir.join("outside/file"), "precious").unwrap();
        Self { dir }
    }

    fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    fn unpack_with(&self, archive: &[u8], parents: &[OwnedFd], limits: Limits) -> Result<Unpacked> {
        let root = rustix::fs::open(self.root(), DIRECTORY, Mode::empty()).unwrap();
        let result = unpack(archive, root.as_fd(), parents, limits);
        assert_eq!(
            std::fs::read_to_string(self.dir.join("outside/file")).unwrap(),
            "precious"
        );
        assert_eq!(std::fs::read_dir(self.dir.join("outside")).unwrap().count(), 1);
        assert_eq!(std::fs::read_dir(&self.dir).unwrap().count(), 2);
        result
    }

    fn unpack(&self, archive: &[u8]) -> Result<Unpacked> {
        self.unpack_with(archive, &[], Limits::default())
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        remove_tree(&self.dir).unwrap();
    }
}

struct Tar(Builder<Vec<u8>>);

fn tar() -> Tar {
    Tar(Builder::new(Vec::new()))
}

impl Tar {
    fn header(kind: EntryType, path: &str, link: &str, size: u64) -> Header {
        let mut header = Header::new_gnu();
        // Written by hand: the builder refuses what the tests are about.
        let name = path.as_bytes();
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(if kind == EntryType::Directory {
            0o755
        } else {
            0o644
        });
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000_000_000);
        header.set_size(size);
        if matches!(kind, EntryType::Char | EntryType::Block) {
            header.set_device_major(1).unwrap();
            header.set_device_minor(3).unwrap();
        }
        header
    }

    fn with(
        mut self,
        change: impl FnOnce(&mut Header),
        kind: EntryType,
        path: &str,
        link: &str,
        data: &[u8],
    ) -> Self {
        let mut header = Self::header(kind, path, link, data.len() as u64);
        change(&mut header);
        header.set_cksum();
        self.0.append(&header, data).unwrap();
        self
    }

    fn file(self, path: &str, data: &str) -> Self {
        self.with(|_| {}, EntryType::Regular, path, "", data.as_bytes())
    }
    fn dir(self, path: &str) -> Self {
        self.with(|_| {}, EntryType::Directory, path, "", b"")
    }
    fn symlink(self, path: &str, to: &str) -> Self {
        self.with(|_| {}, EntryType::Symlink, path, to, b"")
    }
    fn link(self, path: &str, to: &str) -> Self {
        self.with(|_| {}, EntryType::Link, path, to, b"")
    }
    fn done(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

fn read(path: PathBuf) -> String {
    std::fs::read_to_string(path).unwrap()
}

fn opaque(path: &Path) -> bool {
    let mut value = [0; 4];
    rustix::fs::lgetxattr(path, OPAQUE, &mut value).is_ok_and(|n| &value[..n] == b"y")
}

#[test]
fn ordinary_layer() {
    let bed = Bed::new();
    let archive = tar()
        .dir("./")
        .dir("bin/")
        .with(
            |h| {
                h.set_mode(0o4755);
                h.set_uid(7);
                h.set_gid(8);
            },
            EntryType::Regular,
            "bin/su",
            "",
            b"#!",
        )
        .symlink("bin/sh", "/bin/su")
        .link("bin/su2", "bin/su")
        .with(|_| {}, EntryType::Char, "dev/null", "", b"")
        .with(|_| {}, EntryType::Fifo, "fifo", "", b"")
        .done();
    let facts = bed.unpack(&archive).unwrap();
    assert_eq!(facts, Unpacked { entries: 7, bytes: 2 });
    let su = bed.root().join("bin/su").metadata().unwrap();
    assert_eq!(
        (su.mode() & 0o7777, su.uid(), su.gid(), su.mtime(), su.nlink()),
        (0o4755, 7, 8, 1_000_000_000, 2)
    );
    assert_eq!(bed.root().join("bin").metadata().unwrap().mtime(), 1_000_000_000);
    assert_eq!(
        std::fs::read_link(bed.root().join("bin/sh")).unwrap(),
        Path::new("/bin/su")
    );
    let null = bed.root().join("dev/null").symlink_metadata().unwrap();
    assert!(null.file_type().is_char_device());
    assert_eq!(null.rdev(), rustix::fs::makedev(1, 3));
    assert!(
        bed.root()
            .join("fifo")
            .symlink_metadata()
            .unwrap()
            .file_type()
            .is_fifo()
    );
}

#[test]
fn paths_that_climb_out_are_refused() {
    for path in [
        "../outside/file",
        "a/../../outside/file",
        "/../outside/file",
        "..",
    ] {
        let bed = Bed::new();
        let error = bed.unpack(&tar().file(path, "x").done()).unwrap_err();
        assert!(matches!(error, Error::Entry { .. }), "{path}: {error}");
        let error = bed
            .unpack(&tar().file("f", "x").link("l", path).done())
            .unwrap_err();
        assert!(error.to_string().contains("hard link target"), "{path}: {error}");
    }
}

#[test]
fn absolute_paths_are_inside() {
    let bed = Bed::new();
    bed.unpack(&tar().file("/etc/hostname", "x").done()).unwrap();
    assert_eq!(read(bed.root().join("etc/hostname")), "x");
}

#[test]
fn symbolic_links_lead_nowhere_else() {
    // Up and absolute links, then an entry through them: the root of the layer is the root of the world.
    let bed = Bed::new();
    let outside = bed.dir.join("outside");
    let archive = tar()
        .symlink("up", "../outside")
        .symlink("abs", outside.to_str().unwrap())
        .dir("outside/")
        .file("up/file", "inside")
        .done();
    bed.unpack(&archive).unwrap();
    assert_eq!(read(bed.root().join("outside/file")), "inside");
    // A link to nothing in the layer cannot become a directory.
    assert!(
        bed.unpack(
            &tar()
                .symlink("abs2", outside.to_str().unwrap())
                .file("abs2/file", "x")
                .done()
        )
        .is_err()
    );
    // The last component is never followed: the file replaces the link.
    let bed = Bed::new();
    bed.unpack(&tar().symlink("f", "../outside/file").file("f", "mine").done())
        .unwrap();
    assert_eq!(read(bed.root().join("f")), "mine");
    // A hard link to a symbolic link links that, not its target.
    let bed = Bed::new();
    bed.unpack(
        &tar()
            .symlink("s", "../outside/file")
            .link("h", "s")
            .file("h", "new")
            .done(),
    )
    .unwrap();
    assert!(bed.root().join("s").symlink_metadata().unwrap().is_symlink());
    // Attributes of a symbolic link are not those of its target.
    let bed = Bed::new();
    let set_uid = |h: &mut Header| h.set_uid(99);
    bed.unpack(
        &tar()
            .with(set_uid, EntryType::Symlink, "s", "../outside/file", b"")
            .done(),
    )
    .unwrap();
    assert_eq!(bed.dir.join("outside/file").metadata().unwrap().uid(), 0);
}

#[test]
fn whiteouts() {
    let bed = Bed::new();
    let archive = tar()
        .file("etc/.wh.gone", "")
        .dir("var/")
        .file("var/.wh..wh..opq", "")
        .file(".wh..wh.plnk", "")
        .file("back/.wh.dir", "")
        .dir("back/dir/")
        .file("kept/file", "x")
        .file("kept/.wh.file", "")
        .done();
    bed.unpack(&archive).unwrap();
    let gone = bed.root().join("etc/gone").symlink_metadata().unwrap();
    assert!(gone.file_type().is_char_device());
    assert_eq!(gone.rdev(), 0);
    assert!(opaque(&bed.root().join("var")));
    assert!(!bed.root().join(".wh..wh.plnk").exists());
    assert!(
        opaque(&bed.root().join("back/dir")),
        "a directory in place of a whiteout hides the one below"
    );
    assert_eq!(read(bed.root().join("kept/file")), "x");
    for path in [".wh.", ".wh..", ".wh...", "a/.wh..."] {
        assert!(bed.unpack(&tar().file(path, "").done()).is_err(), "{path}");
    }
}

fn with_pax(records: &[(&str, &[u8])], path: &str) -> Vec<u8> {
    let mut tar = tar();
    tar.0.append_pax_extensions(records.iter().copied()).unwrap();
    tar.file(path, "x").done()
}

#[test]
fn attributes_of_overlayfs_are_not_taken() {
    let bed = Bed::new();
    let records: &[(&str, &[u8])] = &[
        ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
        ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
        ("SCHILY.xattr.security.selinux", b"x"),
        ("SCHILY.xattr.user.comment", b"hello"),
        ("mtime", b"1000000001.25"),
        ("uid", b"70000"),
    ];
    bed.unpack(&with_pax(records, "f")).unwrap();
    let path = bed.root().join("f");
    let mut value = [0; 64];
    for name in [
        "trusted.overlay.redirect",
        "trusted.overlay.opaque",
        "security.selinux",
    ] {
        assert!(rustix::fs::lgetxattr(&path, name, &mut value).is_err(), "{name}");
    }
    let n = rustix::fs::lgetxattr(&path, "user.comment", &mut value).unwrap();
    assert_eq!(&value[..n], b"hello");
    let metadata = path.metadata().unwrap();
    assert_eq!(
        (metadata.mtime(), metadata.mtime_nsec(), metadata.uid()),
        (1_000_000_001, 250_000_000, 70_000)
    );
    // An owner of -1 would mean "leave it".
    assert!(bed.unpack(&with_pax(&[("uid", b"4294967295")], "g")).is_err());
    assert!(bed.unpack(&with_pax(&[("gid", b"many")], "g")).is_err());
}

#[test]
fn limits() {
    let bed = Bed::new();
    let limits = Limits {
        entries: 2,
        bytes: 10,
        header: 4096,
    };
    let error = bed
        .unpack_with(
            &tar().file("a", "").file("b", "").file("c", "").done(),
            &[],
            limits,
        )
        .unwrap_err();
    assert!(error.to_string().contains("more than 2 entries"), "{error}");
    let error = bed
        .unpack_with(&tar().file("a", "12345678901").done(), &[], limits)
        .unwrap_err();
    assert!(error.to_string().contains("larger than 10 bytes"), "{error}");
    // A long name of a gigabyte would be kept in memory.
    let long = vec![b'a'; 100_000];
    let archive = tar()
        .with(|_| {}, EntryType::GNULongName, "././@LongLink", "", &long)
        .file("x", "")
        .done();
    assert!(bed.unpack_with(&archive, &[], limits).is_err());
    // A sparse file claims petabytes.
    let archive = tar()
        .with(
            |h| {
                let gnu = h.as_gnu_mut().unwrap();
                gnu.realsize.copy_from_slice(b"77777777777\0");
            },
            EntryType::GNUSparse,
            "sparse",
            "",
            b"",
        )
        .done();
    assert!(bed.unpack_with(&archive, &[], limits).is_err());
    // Names Linux cannot have.
    let name = "n/".repeat(40);
    bed.unpack(&tar().dir(&name).done()).unwrap();
    let error = bed
        .unpack(&with_pax(&[("path", "y".repeat(300).as_bytes())], "f"))
        .unwrap_err();
    assert!(error.to_string().contains("longer than 255"), "{error}");
}

#[test]
fn broken_archives() {
    let bed = Bed::new();
    let mut archive = tar().file("a", "hello").done();
    archive.truncate(514);
    assert!(bed.unpack(&archive).is_err(), "data cut off");
    assert!(bed.unpack(&[b'x'; 1024]).is_err(), "no tar at all");
    assert_eq!(bed.unpack(&[]).unwrap().entries, 0, "an empty layer is a layer");
    assert!(bed.unpack(&tar().link("a", "missing").done()).is_err());
    assert!(
        bed.unpack(&tar().with(|_| {}, EntryType::new(b'Z'), "z", "", b"").done())
            .is_err()
    );
}

#[test]
fn later_entries_replace_earlier_ones() {
    let bed = Bed::new();
    let archive = tar()
        .dir("a/")
        .file("a/b/c", "1")
        .file("a", "2")
        .dir("a/")
        .file("a/d", "3")
        .done();
    bed.unpack(&archive).unwrap();
    assert_eq!(read(bed.root().join("a/d")), "3");
    assert!(!bed.root().join("a/b").exists());
}

#[test]
fn unlisted_directories_are_as_below() {
    let below = Bed::new();
    let sticky = |h: &mut Header| {
        h.set_mode(0o1777);
        h.set_gid(12);
    };
    below
        .unpack(&tar().with(sticky, EntryType::Directory, "tmp/", "", b"").done())
        .unwrap();
    let parent = rustix::fs::open(below.root(), DIRECTORY, Mode::empty()).unwrap();
    let bed = Bed::new();
    bed.unpack_with(
        &tar().file("tmp/x", "").file("new/x", "").done(),
        &[parent],
        Limits::default(),
    )
    .unwrap();
    let tmp = bed.root().join("tmp").metadata().unwrap();
    assert_eq!((tmp.mode() & 0o7777, tmp.gid()), (0o1777, 12));
    assert_eq!(bed.root().join("new").metadata().unwrap().mode() & 0o7777, 0o755);
}

#[test]
fn deep_trees_are_removed() {
    let bed = Bed::new();
    let mut dir = rustix::fs::open(bed.root(), DIRECTORY, Mode::empty()).unwrap();
    for _ in 0..2000 {
        rustix::fs::mkdirat(&dir, "d", Mode::RWXU).unwrap();
        dir = rustix::fs::openat(&dir, "d", DIRECTORY, Mode::empty()).unwrap();
    }
    drop(dir);
    remove_tree(&bed.root().join("d")).unwrap();
    std::os::unix::fs::symlink(bed.dir.join("outside"), bed.root().join("s")).unwrap();
    remove_tree(&bed.root().join("s")).unwrap();
    assert!(bed.dir.join("outside/file").exists());
}

#[test]
fn times() {
    for (text, seconds, nanos) in [
        ("12", 12, 0),
        ("12.5", 12, 500_000_000),
        ("-1.25", -2, 750_000_000),
        ("0.000000001", 0, 1),
    ] {
        let time = parse_time(text).unwrap();
        assert_eq!((time.tv_sec, time.tv_nsec), (seconds, nanos), "{text}");
    }
    for text in ["", "x", "1.x", "1e9", "99999999999999999999"] {
        assert!(parse_time(text).is_none(), "{text}");
    }
}
