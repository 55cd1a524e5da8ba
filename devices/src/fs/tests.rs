// SPDX-License-Identifier: Apache-2.0
//! The server as a guest meets it: bytes in, bytes out, on a directory of the host.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::sync::Arc;

use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

use super::abi::{
    ATTR_DAX, AttrOut, BatchForgetIn, CopyFileRangeIn, CreateIn, Dirent, EntryOut, FallocateIn, FileLock,
    FlushIn, ForgetIn, ForgetOne, GetattrIn, GetxattrIn, InHeader, InterruptIn, LinkIn, LkIn, LkOut, LseekIn,
    LseekOut, MkdirIn, MknodIn, Opcode, OpenIn, OpenOut, ROOT_ID, ReadIn, ReleaseIn, RemovemappingIn,
    RemovemappingOne, Rename2In, SetattrIn, SetupmappingIn, SetxattrIn, StatfsOut, StatxIn, StatxOut,
    WRITE_KILL_SUIDGID, WriteIn, WriteOut, fattr, init,
};
use super::config::FsConfig;
use super::dax::DaxWindow;
use super::root::{AttachError, AttachOptions, CachePolicy};
use super::server::{MAX_FORGETS, MAX_WRITE, Outcome, Server};
use super::testing::{Driver, LINUX, TempDir};

const READ_ONLY: AttachOptions = AttachOptions {
    read_only: true,
    cache: super::root::CachePolicy::Auto,
    device_nodes: true,
    private_mount: true,
    dax: false,
};

impl Driver {
    fn open(&self, node: u64, flags: i32) -> Result<u64, Errno> {
        let args = OpenIn {
            flags: flags.cast_unsigned(),
            open_flags: 0,
        };
        self.ask::<OpenOut>(Opcode::Open, node, &[args.as_bytes()])
            .map(|reply| reply.fh)
    }

    fn create(&self, parent: u64, name: &str, flags: i32, mode: u32) -> Result<(EntryOut, u64), Errno> {
        let args = CreateIn {
            flags: flags.cast_unsigned(),
            mode,
            umask: 0,
            open_flags: 0,
        };
        let body = self.named(Opcode::Create, parent, &args, name)?;
        let (entry, rest) = EntryOut::read_from_prefix(&body).unwrap();
        Ok((entry, OpenOut::read_from_prefix(rest).unwrap().0.fh))
    }

    fn read(&self, node: u64, fh: u64, offset: u64, size: u32) -> Result<Vec<u8>, Errno> {
        self.call(Opcode::Read, node, &[at(fh, offset, size).as_bytes()])
    }

    fn write(&self, node: u64, fh: u64, offset: u64, data: &[u8]) -> Result<u32, Errno> {
        let args = WriteIn {
            fh,
            offset,
            size: u32::try_from(data.len()).unwrap(),
            ..WriteIn::default()
        };
        self.ask::<WriteOut>(Opcode::Write, node, &[args.as_bytes(), data])
            .map(|reply| reply.size)
    }

    fn getattr(&self, node: u64) -> Result<AttrOut, Errno> {
        self.ask(Opcode::Getattr, node, &[GetattrIn::default().as_bytes()])
    }

    fn setattr(&self, node: u64, args: SetattrIn) -> Result<AttrOut, Errno> {
        self.ask(Opcode::Setattr, node, &[args.as_bytes()])
    }

    /// Names in a directory, read in pieces of `size` bytes.
    fn list(&self, node: u64, size: u32, plus: bool) -> Vec<(String, u64)> {
        let opcode = if plus {
            Opcode::Readdirplus
        } else {
            Opcode::Readdir
        };
        let fh = self
            .ask::<OpenOut>(Opcode::Opendir, node, &[OpenIn::default().as_bytes()])
            .unwrap()
            .fh;
        let (mut names, mut offset) = (Vec::new(), 0);
        loop {
            let body = self
                .call(opcode, node, &[at(fh, offset, size).as_bytes()])
                .unwrap();
            assert!(body.len() <= size as usize);
            if body.is_empty() {
                break;
            }
            let mut rest = &body[..];
            while !rest.is_empty() {
                let mut nodeid = 0;
                let mut length = 0;
                if plus {
                    nodeid = EntryOut::read_from_prefix(rest).unwrap().0.nodeid;
                    length = size_of::<EntryOut>();
                }
                let dirent = Dirent::read_from_prefix(&rest[length..]).unwrap().0;
                length += size_of::<Dirent>();
                let name = &rest[length..length + dirent.namelen as usize];
                names.push((String::from_utf8(name.to_vec()).unwrap(), nodeid));
                length = (length + dirent.namelen as usize).next_multiple_of(8);
                rest = &rest[length..];
                offset = dirent.off;
            }
        }
        let release = ReleaseIn {
            fh,
            ..ReleaseIn::default()
        };
        self.call(Opcode::Releasedir, node, &[release.as_bytes()])
            .unwrap();
        names
    }
}

fn at(fh: u64, offset: u64, size: u32) -> ReadIn {
    ReadIn {
        fh,
        offset,
        size,
        ..ReadIn::default()
    }
}

#[test]
fn init_negotiates_what_both_have() {
    let server = Server::new(FsConfig::default(), None).unwrap();
    let driver = Driver::with_server(server);
    let reply = driver.init(LINUX).unwrap();
    let features = u64::from(reply.flags) | u64::from(reply.flags2) << 32;
    assert_eq!(features, driver.server.offered());
    assert_eq!((reply.max_write, reply.max_pages), (1 << 20, 256));
    for absent in [
        init::WRITEBACK_CACHE,
        init::POSIX_LOCKS,
        init::POSIX_ACL,
        init::MAP_ALIGNMENT,
    ] {
        assert_eq!(features & absent, 0);
    }
    let reply = driver.init(init::ASYNC_READ).unwrap();
    assert_eq!((u64::from(reply.flags), reply.flags2), (init::ASYNC_READ, 0));
}

#[test]
fn nothing_is_answered_before_init_and_old_protocols_are_refused() {
    let driver = Driver::uninitialised(Server::new(FsConfig::default(), None).unwrap());
    assert_eq!(driver.getattr(ROOT_ID).unwrap_err(), Errno::IO);
    for (major, minor, error) in [
        (6, 41, Some(Errno::PROTO)),
        (7, 30, Some(Errno::PROTO)),
        (8, 0, None),
    ] {
        let args = super::abi::InitIn {
            major,
            minor,
            max_readahead: 0,
            flags: 0,
        };
        let reply = driver.call(Opcode::Init, 0, &[args.as_bytes()]);
        assert_eq!(reply.err(), error, "{major}.{minor}");
        assert_eq!(driver.getattr(ROOT_ID).unwrap_err(), Errno::IO);
    }
}

#[test]
fn the_root_lists_what_is_attached_and_changes_while_it_is_used() {
    let (a, b) = (TempDir::new(), TempDir::new());
    std::fs::write(b.path().join("file"), "data").unwrap();
    let driver = Driver::new(FsConfig::default());
    let names = |driver: &Driver| -> Vec<String> {
        driver
            .list(ROOT_ID, 4096, true)
            .into_iter()
            .map(|(name, _)| name)
            .collect()
    };
    assert_eq!(names(&driver), [".", ".."]);
    driver
        .server
        .attach("a", &a.fd(), AttachOptions::default())
        .unwrap();
    driver.server.attach("b", &b.fd(), READ_ONLY).unwrap();
    let file = std::fs::File::open(b.path().join("file")).unwrap().into();
    driver.server.attach("f", &file, READ_ONLY).unwrap();
    assert_eq!(names(&driver), [".", "..", "a", "b", "f"]);
    // One at a time, offsets carry on where one ended.
    assert_eq!(driver.list(ROOT_ID, 32, false).len(), 5);
    for (name, error) in [
        ("a", "attached already"),
        ("x/y", "name"),
        ("..", "name"),
        ("", "name"),
    ] {
        let refused = driver
            .server
            .attach(name, &a.fd(), AttachOptions::default())
            .unwrap_err();
        assert!(refused.to_string().contains(error), "{refused}");
    }
    let null = std::fs::File::open("/dev/null").unwrap().into();
    let refused = driver.server.attach("null", &null, AttachOptions::default());
    assert!(matches!(refused, Err(AttachError::Type(_))), "{refused:?}");

    let node = driver.lookup(ROOT_ID, "b").unwrap();
    let inner = driver.lookup(node, "file").unwrap();
    let single = driver.lookup(ROOT_ID, "f").unwrap();
    let fh = driver.open(inner, libc::O_RDONLY).unwrap();
    assert_eq!(driver.read(inner, fh, 0, 100).unwrap(), b"data");
    let single_fh = driver.open(single, libc::O_RDONLY).unwrap();
    assert_eq!(driver.read(single, single_fh, 1, 100).unwrap(), b"ata");

    let before = driver.server.metrics_snapshot();
    driver.server.detach("b").unwrap();
    assert!(matches!(driver.server.detach("b"), Err(AttachError::Missing(_))));
    assert_eq!(driver.lookup(ROOT_ID, "b"), Err(Errno::NOENT));
    assert_eq!(driver.getattr(inner).unwrap_err(), Errno::STALE);
    assert_eq!(driver.read(inner, fh, 0, 1).unwrap_err(), Errno::BADF);
    assert_eq!(driver.read(single, single_fh, 0, 1).unwrap(), b"d");
    let after = driver.server.metrics_snapshot();
    assert_eq!(before.descriptors - after.descriptors, 3);
    // The same name again is another thing.
    driver
        .server
        .attach("b", &a.fd(), AttachOptions::default())
        .unwrap();
    assert_ne!(driver.lookup(ROOT_ID, "b").unwrap(), node);
}

#[test]
fn detaching_lets_the_host_unmount() {
    let directory = TempDir::new();
    let target = std::ffi::CString::new(directory.path().to_str().unwrap()).unwrap();
    // SAFETY: NUL-terminated strings; a mount of this test's own.
    let mounted = unsafe {
        libc::mount(
            c"none".as_ptr(),
            target.as_ptr(),
            c"tmpfs".as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    assert_eq!(mounted, 0, "this test needs the right to mount");
    std::fs::write(directory.path().join("f"), "x").unwrap();
    let (driver, node) = Driver::attached(&directory, AttachOptions::default());
    let file = driver.lookup(node, "f").unwrap();
    driver.open(file, libc::O_RDWR).unwrap();
    driver.server.detach("d").unwrap();
    // SAFETY: as above.
    let unmounted = unsafe { libc::umount(target.as_ptr()) };
    assert_eq!(unmounted, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn files_are_made_written_read_and_removed() {
    let directory = TempDir::new();
    let (driver, root) = Driver::attached(&directory, AttachOptions::default());
    let (entry, fh) = driver.create(root, "f", libc::O_RDWR, 0o640).unwrap();
    let node = entry.nodeid;
    let data: Vec<u8> = (0..200_000u32).flat_map(u32::to_le_bytes).collect();
    assert_eq!(driver.write(node, fh, 5, &data).unwrap(), 800_000);
    assert_eq!(
        std::fs::metadata(directory.path().join("f")).unwrap().len(),
        800_005
    );
    assert_eq!(driver.read(node, fh, 5, 100_000).unwrap(), data[..100_000]);
    assert_eq!(driver.read(node, fh, 800_000, 100_000).unwrap().len(), 5);
    assert_eq!(driver.read(node, fh, 1 << 40, 10).unwrap(), b"");
    assert_eq!(driver.read(node, fh, u64::MAX, 10).unwrap_err(), Errno::INVAL);
    let exclusive = driver.create(root, "f", libc::O_EXCL | libc::O_RDWR, 0o600);
    assert_eq!(exclusive.unwrap_err(), Errno::EXIST);
    let (again, _) = driver
        .create(root, "f", libc::O_RDWR | libc::O_TRUNC, 0o600)
        .unwrap();
    assert_eq!((again.nodeid, again.attr.mode & 0o777), (node, 0o640));
    assert_eq!(driver.getattr(node).unwrap().attr.size, 0);

    driver
        .named(Opcode::Link, root, &LinkIn { oldnodeid: node }, "g")
        .unwrap();
    assert_eq!(driver.lookup(root, "g").unwrap(), node);
    assert_eq!(driver.getattr(node).unwrap().attr.nlink, 2);
    let mkdir = MkdirIn {
        mode: 0o755,
        umask: 0,
    };
    driver.named(Opcode::Mkdir, root, &mkdir, "sub").unwrap();
    let sub = driver.lookup(root, "sub").unwrap();
    let rename = |flags| Rename2In {
        newdir: sub,
        flags,
        padding: 0,
    };
    let both = "g\0h";
    driver.named(Opcode::Rename2, root, &rename(0), both).unwrap();
    assert_eq!(
        driver.named(Opcode::Rename2, root, &rename(8), "f\0h"),
        Err(Errno::INVAL)
    );
    assert_eq!(
        driver.named(Opcode::Rename2, root, &rename(1), "f\0h"),
        Err(Errno::EXIST)
    );
    assert_eq!(driver.lookup(sub, "h").unwrap(), node);
    assert_eq!(
        driver.call(Opcode::Rmdir, root, &[b"sub\0"]),
        Err(Errno::NOTEMPTY)
    );
    driver.call(Opcode::Unlink, sub, &[b"h\0"]).unwrap();
    driver.call(Opcode::Unlink, root, &[b"f\0"]).unwrap();
    driver.call(Opcode::Rmdir, root, &[b"sub\0"]).unwrap();
    // The guest still has it open.
    assert_eq!(driver.write(node, fh, 0, b"still").unwrap(), 5);
    assert_eq!(driver.getattr(node).unwrap().attr.nlink, 0);
    let release = ReleaseIn {
        fh,
        ..ReleaseIn::default()
    };
    driver.call(Opcode::Release, node, &[release.as_bytes()]).unwrap();
    assert_eq!(
        driver.call(Opcode::Release, node, &[release.as_bytes()]),
        Err(Errno::BADF)
    );
}

#[test]
fn read_only_is_enforced_here() {
    for private_mount in [true, false] {
        let directory = TempDir::new();
        std::fs::write(directory.path().join("f"), "data").unwrap();
        let options = AttachOptions {
            private_mount,
            ..READ_ONLY
        };
        let (driver, root) = Driver::attached(&directory, options);
        let node = driver.lookup(root, "f").unwrap();
        for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_TRUNC] {
            assert_eq!(driver.open(node, flags), Err(Errno::ROFS), "{flags:#x}");
        }
        let fh = driver.open(node, libc::O_RDONLY).unwrap();
        assert_eq!(driver.write(node, fh, 0, b"x"), Err(Errno::BADF));
        let fallocate = FallocateIn {
            fh,
            length: 10,
            ..FallocateIn::default()
        };
        let mkdir = MkdirIn {
            mode: 0o755,
            umask: 0,
        };
        let mknod = MknodIn {
            mode: libc::S_IFREG | 0o644,
            ..MknodIn::default()
        };
        let rename = Rename2In {
            newdir: root,
            ..Rename2In::default()
        };
        let copy = CopyFileRangeIn {
            fh_in: fh,
            nodeid_out: node,
            fh_out: fh,
            off_out: 100,
            len: 1,
            ..CopyFileRangeIn::default()
        };
        let setxattr = SetxattrIn { size: 1, flags: 0 };
        let refused = [
            driver.call(Opcode::Fallocate, node, &[fallocate.as_bytes()]),
            driver.named(Opcode::Mkdir, root, &mkdir, "x"),
            driver.named(Opcode::Mknod, root, &mknod, "x"),
            driver.named(Opcode::Rename2, root, &rename, "f\0g"),
            driver.named(Opcode::Link, root, &LinkIn { oldnodeid: node }, "g"),
            driver.call(Opcode::Unlink, root, &[b"f\0"]),
            driver.call(Opcode::Rmdir, root, &[b"f\0"]),
            driver.call(Opcode::Symlink, root, &[b"s\0t\0"]),
            driver.call(Opcode::CopyFileRange, node, &[copy.as_bytes()]),
            driver.call(Opcode::Setxattr, node, &[setxattr.as_bytes(), b"user.a\0x"]),
            driver.call(Opcode::Removexattr, node, &[b"user.a\0"]),
        ];
        for (index, result) in refused.into_iter().enumerate() {
            assert_eq!(result, Err(Errno::ROFS), "request {index}");
        }
        assert_eq!(
            driver.create(root, "x", libc::O_RDWR, 0o644).unwrap_err(),
            Errno::ROFS
        );
        for valid in [
            fattr::MODE,
            fattr::UID,
            fattr::SIZE,
            fattr::MTIME | fattr::MTIME_NOW,
        ] {
            let args = SetattrIn {
                valid,
                ..SetattrIn::default()
            };
            assert_eq!(driver.setattr(node, args).unwrap_err(), Errno::ROFS, "{valid:#x}");
        }
        assert_eq!(std::fs::read(directory.path().join("f")).unwrap(), b"data");
    }
}

#[test]
fn names_and_symlinks_lead_nowhere_else() {
    let (outside, directory) = (TempDir::new(), TempDir::new());
    std::fs::write(outside.path().join("secret"), "secret").unwrap();
    symlink(outside.path(), directory.path().join("out")).unwrap();
    symlink(outside.path().join("secret"), directory.path().join("file")).unwrap();
    symlink("/proc/self/root", directory.path().join("magic")).unwrap();
    let (driver, root) = Driver::attached(&directory, AttachOptions::default());
    for name in ["", ".", "..", "out/secret", "/", "/etc/passwd", "../x"] {
        assert_eq!(driver.lookup(root, name), Err(Errno::INVAL), "{name:?}");
    }
    assert_eq!(driver.lookup(root, &"x".repeat(256)), Err(Errno::NAMETOOLONG));
    for name in ["out", "file", "magic"] {
        // The link itself is found; it is for the guest to follow. Here it is no way to anywhere.
        let link = driver.lookup(root, name).unwrap();
        assert_eq!(
            driver.getattr(link).unwrap().attr.mode & libc::S_IFMT,
            libc::S_IFLNK
        );
        assert_eq!(driver.lookup(link, "secret"), Err(Errno::NOTDIR));
        assert_eq!(driver.open(link, libc::O_RDONLY), Err(Errno::LOOP));
        let opened = driver.call(Opcode::Opendir, link, &[OpenIn::default().as_bytes()]);
        assert_eq!(opened, Err(Errno::NOTDIR));
        assert_eq!(
            driver.create(link, "x", libc::O_RDWR, 0o644).unwrap_err(),
            Errno::NOTDIR
        );
    }
    // A name that exists as a symlink is not followed by a create, either.
    assert_eq!(
        driver
            .create(root, "file", libc::O_RDWR | libc::O_TRUNC, 0o644)
            .unwrap_err(),
        Errno::LOOP
    );
    assert_eq!(std::fs::read(outside.path().join("secret")).unwrap(), b"secret");
    let chmod = SetattrIn {
        valid: fattr::MODE,
        mode: 0o777,
        ..SetattrIn::default()
    };
    let link = driver.lookup(root, "file").unwrap();
    assert_eq!(driver.setattr(link, chmod).unwrap_err(), Errno::OPNOTSUPP);
    let times = SetattrIn {
        valid: fattr::MTIME | fattr::ATIME,
        mtime: 1,
        atime: 1,
        ..SetattrIn::default()
    };
    assert_eq!(driver.setattr(link, times).unwrap().attr.mtime, 1);
    assert_ne!(
        std::fs::metadata(outside.path().join("secret")).unwrap().mtime(),
        1
    );
    let target = driver.call(Opcode::Readlink, link, &[]).unwrap();
    assert_eq!(
        target,
        outside.path().join("secret").as_os_str().as_encoded_bytes()
    );
}

#[test]
fn special_files_are_made_but_never_opened() {
    let directory = TempDir::new();
    let (driver, root) = Driver::attached(&directory, AttachOptions::default());
    for (name, mode, rdev) in [
        ("fifo", libc::S_IFIFO, 0),
        ("socket", libc::S_IFSOCK, 0),
        ("null", libc::S_IFCHR, 0x103),
        ("disk", libc::S_IFBLK, 0x700),
    ] {
        let args = MknodIn {
            mode: mode | 0o666,
            rdev,
            ..MknodIn::default()
        };
        let body = driver.named(Opcode::Mknod, root, &args, name).unwrap();
        let entry = EntryOut::read_from_prefix(&body).unwrap().0;
        assert_eq!((entry.attr.mode, entry.attr.rdev), (mode | 0o666, rdev), "{name}");
        for flags in [libc::O_RDONLY, libc::O_RDWR, libc::O_WRONLY] {
            assert_eq!(driver.open(entry.nodeid, flags), Err(Errno::NXIO), "{name}");
            // An existing name, opened through CREATE: a FIFO would block for ever here.
            assert_eq!(driver.create(root, name, flags, 0o644).unwrap_err(), Errno::NXIO);
        }
    }
    let kind = std::fs::symlink_metadata(directory.path().join("fifo"))
        .unwrap()
        .file_type();
    assert!(kind.is_fifo());
    for mode in [libc::S_IFDIR, libc::S_IFLNK, 0o170_000] {
        let args = MknodIn {
            mode,
            ..MknodIn::default()
        };
        assert_eq!(driver.named(Opcode::Mknod, root, &args, "x"), Err(Errno::INVAL));
    }
    let strict = AttachOptions {
        device_nodes: false,
        ..AttachOptions::default()
    };
    driver.server.attach("strict", &directory.fd(), strict).unwrap();
    let strict = driver.lookup(ROOT_ID, "strict").unwrap();
    let device = |rdev| MknodIn {
        mode: libc::S_IFCHR,
        rdev,
        ..MknodIn::default()
    };
    assert_eq!(
        driver.named(Opcode::Mknod, strict, &device(0x103), "x"),
        Err(Errno::PERM)
    );
    // overlayfs's whiteout.
    driver.named(Opcode::Mknod, strict, &device(0), "x").unwrap();
}

#[test]
fn what_is_made_belongs_to_the_caller() {
    let directory = TempDir::new();
    let path = |name: &str| directory.path().join(name);
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    std::fs::create_dir(path("shared")).unwrap();
    std::os::unix::fs::chown(path("shared"), Some(0), Some(5000)).unwrap();
    std::fs::set_permissions(path("shared"), std::fs::Permissions::from_mode(0o2777)).unwrap();
    std::fs::create_dir(path("roots")).unwrap();
    let (mut driver, root) = Driver::attached(&directory, AttachOptions::default());
    (driver.uid, driver.gid) = (1000, 2000);
    driver.create(root, "f", libc::O_RDWR, 0o6775).unwrap();
    driver.call(Opcode::Symlink, root, &[b"s\0t\0"]).unwrap();
    let mkdir = MkdirIn {
        mode: 0o755,
        umask: 0,
    };
    driver.named(Opcode::Mkdir, root, &mkdir, "dir").unwrap();
    for name in ["f", "s", "dir"] {
        let metadata = std::fs::symlink_metadata(path(name)).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (1000, 2000), "{name}");
    }
    // CVE-2022-0358: a set-group-ID directory of a group that the caller is not in.
    let shared = driver.lookup(root, "shared").unwrap();
    driver.create(shared, "f", libc::O_RDWR, 0o2775).unwrap();
    let metadata = std::fs::metadata(path("shared/f")).unwrap();
    assert_eq!(
        (metadata.uid(), metadata.gid(), metadata.mode() & 0o7777),
        (1000, 5000, 0o775)
    );
    // As a member of that group (FUSE_EXT_GROUPS).
    let args = CreateIn {
        flags: libc::O_RDWR.cast_unsigned(),
        mode: 0o2775,
        umask: 0,
        open_flags: 0,
    };
    let extension: Vec<u8> = [16u32, 32, 1, 5000]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    let mut request = driver.request(
        Opcode::Create as u32,
        shared,
        &[args.as_bytes(), b"g\0", &extension],
    );
    // total_extlen, in units of 8 bytes.
    request[36] = 2;
    let (outcome, reply) = driver.raw(request, 4096);
    assert!(
        matches!(outcome, Outcome::Done { len: 160 }),
        "{outcome:?} {reply:?}"
    );
    let metadata = std::fs::metadata(path("shared/g")).unwrap();
    assert_eq!(
        (metadata.uid(), metadata.gid(), metadata.mode() & 0o7777),
        (1000, 5000, 0o2775)
    );
    // The guest's kernel allowed it (a user namespace there); the host alone would not.
    let roots = driver.lookup(root, "roots").unwrap();
    driver.create(roots, "f", libc::O_RDWR, 0o644).unwrap();
    assert_eq!(std::fs::metadata(path("roots/f")).unwrap().uid(), 1000);
}

#[test]
fn a_write_by_others_takes_privileges_away() {
    let directory = TempDir::new();
    let path = directory.path().join("f");
    std::fs::write(&path, "x").unwrap();
    let (driver, root) = Driver::attached(&directory, AttachOptions::default());
    let node = driver.lookup(root, "f").unwrap();
    let capability = [1u8, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let set = SetxattrIn { size: 20, flags: 0 };
    let get = GetxattrIn { size: 64, padding: 0 };
    let mode = || std::fs::metadata(&path).unwrap().mode() & 0o7777;
    let fh = driver.open(node, libc::O_RDWR).unwrap();
    for (flags, expected) in [(WRITE_KILL_SUIDGID, 0o755), (0, 0o6755)] {
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o6755)).unwrap();
        driver
            .call(
                Opcode::Setxattr,
                node,
                &[set.as_bytes(), b"security.capability\0", &capability],
            )
            .unwrap();
        let args = WriteIn {
            fh,
            size: 1,
            write_flags: flags,
            ..WriteIn::default()
        };
        driver
            .call(Opcode::Write, node, &[args.as_bytes(), b"y"])
            .unwrap();
        assert_eq!(mode(), expected);
        // CVE-2021-20263.
        let left = driver.call(
            Opcode::Getxattr,
            node,
            &[get.as_bytes(), b"security.capability\0"],
        );
        assert_eq!(left, Err(Errno::NODATA));
    }
    let truncate = SetattrIn {
        valid: fattr::SIZE | fattr::KILL_SUIDGID,
        ..SetattrIn::default()
    };
    driver.setattr(node, truncate).unwrap();
    assert_eq!(mode(), 0o755);
}

#[test]
fn attributes_are_set_and_shown() {
    let directory = TempDir::new();
    std::fs::write(directory.path().join("f"), "12345").unwrap();
    let (driver, root) = Driver::attached(&directory, AttachOptions::default());
    let node = driver.lookup(root, "f").unwrap();
    let all = SetattrIn {
        valid: fattr::MODE | fattr::UID | fattr::GID | fattr::SIZE | fattr::ATIME | fattr::MTIME,
        mode: 0o604,
        uid: 11,
        gid: 22,
        size: 3,
        atime: 1_000_000_000,
        atimensec: 7,
        mtime: (-5i64).cast_unsigned(),
        mtimensec: 8,
        ..SetattrIn::default()
    };
    let attr = driver.setattr(node, all).unwrap().attr;
    assert_eq!(
        (attr.mode, attr.uid, attr.gid, attr.size),
        (libc::S_IFREG | 0o604, 11, 22, 3)
    );
    assert_eq!((attr.atime, attr.atimensec), (1_000_000_000, 7));
    assert_eq!((attr.mtime.cast_signed(), attr.mtimensec), (-5, 8));
    let statx =
        |driver: &Driver, node| driver.ask::<StatxOut>(Opcode::Statx, node, &[StatxIn::default().as_bytes()]);
    assert_eq!(statx(&driver, node), Err(Errno::NOSYS));
    let config = FsConfig {
        birth_time: true,
        xattr: false,
        ..FsConfig::default()
    };
    let with_birth_time = Driver::new(config);
    with_birth_time
        .server
        .attach("d", &directory.fd(), AttachOptions::default())
        .unwrap();
    let root = with_birth_time.lookup(ROOT_ID, "d").unwrap();
    let same = with_birth_time.lookup(root, "f").unwrap();
    let list = GetxattrIn { size: 0, padding: 0 };
    assert_eq!(
        with_birth_time.call(Opcode::Listxattr, same, &[list.as_bytes()]),
        Err(Errno::NOSYS)
    );
    let stat = statx(&with_birth_time, same).unwrap();
    assert_eq!(
        (stat.stat.size, stat.stat.mtime.sec, stat.stat.ino),
        (3, -5, attr.ino)
    );
    assert!(stat.stat.btime.sec > 0);
    for bad in [
        SetattrIn {
            valid: fattr::UID,
            uid: u32::MAX,
            ..SetattrIn::default()
        },
        SetattrIn {
            valid: fattr::MTIME,
            // UTIME_OMIT on the host.
            mtimensec: 0x3fff_fffe,
            ..SetattrIn::default()
        },
        SetattrIn {
            valid: fattr::SIZE,
            size: u64::MAX,
            ..SetattrIn::default()
        },
        SetattrIn {
            valid: fattr::SIZE | fattr::FH,
            fh: 999,
            ..SetattrIn::default()
        },
    ] {
        assert!(driver.setattr(node, bad).is_err(), "{bad:?}");
    }
    let statfs: StatfsOut = driver.ask(Opcode::Statfs, node, &[]).unwrap();
    assert!(statfs.blocks > 0 && statfs.namelen == 255);
}

#[test]
fn directories_list_whole_in_any_buffer() {
    let directory = TempDir::new();
    let mut expected = vec![".".to_owned(), "..".to_owned()];
    for n in 0..300 {
        let name = format!("{n}-{}", "x".repeat(n % 200));
        std::fs::write(directory.path().join(&name), "").unwrap();
        expected.push(name);
    }
    expected.sort();
    let (driver, root) = Driver::attached(&directory, AttachOptions::default());
    let before = driver.server.metrics_snapshot().nodes;
    for plus in [false, true] {
        for size in [512, 4096, 65_536] {
            let mut listed = driver.list(root, size, plus);
            listed.sort();
            let names: Vec<_> = listed.iter().map(|(name, _)| name.clone()).collect();
            assert_eq!(names, expected, "{plus} {size}");
            for (name, nodeid) in listed {
                assert_eq!(nodeid != 0, plus && name != "." && name != "..");
            }
        }
    }
    assert_eq!(driver.server.metrics_snapshot().nodes, before + 300);
    let fh = driver
        .ask::<OpenOut>(Opcode::Opendir, root, &[OpenIn::default().as_bytes()])
        .unwrap()
        .fh;
    for opcode in [Opcode::Readdir, Opcode::Readdirplus] {
        for offset in [1 << 63, u64::MAX] {
            let read = driver.call(opcode, root, &[at(fh, offset, 4096).as_bytes()]);
            assert_eq!(read, Err(Errno::INVAL));
            driver
                .call(opcode, ROOT_ID, &[at(0, offset, 4096).as_bytes()])
                .unwrap();
        }
        // No room for even one record: empty, and nothing counted.
        assert_eq!(
            driver.call(opcode, root, &[at(fh, 0, 8).as_bytes()]).unwrap(),
            b""
        );
        assert_eq!(
            driver
                .call_with_room(opcode, root, &[at(fh, 0, 4096).as_bytes()], 16)
                .unwrap(),
            b""
        );
    }
}

/// A chain has room for much more than INIT allows: one request would keep a worker for long.
#[test]
fn an_answer_is_no_longer_than_init_allows() {
    const MOST: usize = MAX_WRITE as usize;
    const ROOM: usize = 2 * MOST;
    let directory = TempDir::new();
    let file = std::fs::File::create(directory.path().join("f")).unwrap();
    file.set_len(ROOM as u64).unwrap();
    // 280 bytes of READDIR each.
    for n in 0..4000 {
        std::fs::write(directory.path().join(format!("{n:0>250}")), "").unwrap();
    }
    let (driver, root) = Driver::attached(&directory, AttachOptions::default());
    let answer = |opcode, node, fh| {
        let args = at(fh, 0, u32::MAX);
        let answer = driver.call_with_room(opcode, node, &[args.as_bytes()], ROOM);
        answer.unwrap().len()
    };
    let node = driver.lookup(root, "f").unwrap();
    let fh = driver.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(answer(Opcode::Read, node, fh), MOST);
    let fh = driver
        .ask::<OpenOut>(Opcode::Opendir, root, &[OpenIn::default().as_bytes()])
        .unwrap()
        .fh;
    let listed = answer(Opcode::Readdir, root, fh);
    assert!((MOST - 500..=MOST).contains(&listed), "{listed}");
}

#[test]
fn lookups_are_counted_and_forgotten() {
    let directory = TempDir::new();
    std::fs::write(directory.path().join("f"), "").unwrap();
    let (driver, root) = Driver::attached(&directory, AttachOptions::default());
    let node = driver.lookup(root, "f").unwrap();
    assert_eq!(driver.lookup(root, "f").unwrap(), node);
    let forget = |count| {
        driver.request(
            Opcode::Forget as u32,
            node,
            &[ForgetIn { nlookup: count }.as_bytes()],
        )
    };
    assert_eq!(driver.raw(forget(1), 0).0, Outcome::Done { len: 0 });
    driver.getattr(node).unwrap();
    let batch = BatchForgetIn { count: 2, dummy: 0 };
    let one = ForgetOne {
        nodeid: node,
        nlookup: 1,
    };
    let request = driver.request(
        Opcode::BatchForget as u32,
        0,
        &[batch.as_bytes(), one.as_bytes(), one.as_bytes()],
    );
    assert_eq!(driver.raw(request, 0).0, Outcome::Done { len: 0 });
    assert_eq!(driver.getattr(node).unwrap_err(), Errno::STALE);
    // Never the same number again.
    let again = driver.lookup(root, "f").unwrap();
    assert_ne!(again, node);
    // More than there were: the node goes, and the offence is counted.
    let request = driver.request(
        Opcode::Forget as u32,
        again,
        &[ForgetIn { nlookup: u64::MAX }.as_bytes()],
    );
    assert_eq!(driver.raw(request, 64).0, Outcome::Malformed);
    assert_eq!(driver.server.metrics_snapshot().malformed, 1);
    // A count that promises more than there is.
    let batch = BatchForgetIn {
        count: u32::MAX,
        dummy: 0,
    };
    let request = driver.request(Opcode::BatchForget as u32, 0, &[batch.as_bytes(), one.as_bytes()]);
    assert_eq!(driver.raw(request, 0).0, Outcome::Malformed);
    // As many as are there, but more than a worker should be kept with: none of them is forgotten.
    let kept = driver.lookup(root, "f").unwrap();
    let forgets = |count: usize| {
        let batch = BatchForgetIn {
            count: u32::try_from(count).unwrap(),
            dummy: 0,
        };
        let one = ForgetOne {
            nodeid: kept,
            nlookup: 1,
        };
        let rest = ForgetOne {
            nodeid: ROOT_ID,
            nlookup: 1,
        };
        let rest = rest.as_bytes().repeat(count - 1);
        driver.request(
            Opcode::BatchForget as u32,
            0,
            &[batch.as_bytes(), one.as_bytes(), &rest],
        )
    };
    assert_eq!(driver.raw(forgets(MAX_FORGETS + 1), 0).0, Outcome::Malformed);
    driver.getattr(kept).unwrap();
    assert_eq!(driver.raw(forgets(MAX_FORGETS), 0).0, Outcome::Done { len: 0 });
    assert_eq!(driver.getattr(kept).unwrap_err(), Errno::STALE);
    // The root stays.
    let request = driver.request(
        Opcode::Forget as u32,
        ROOT_ID,
        &[ForgetIn { nlookup: 99 }.as_bytes()],
    );
    driver.raw(request, 0);
    driver.getattr(ROOT_ID).unwrap();
}

#[test]
fn the_descriptor_budget_holds() {
    let directory = TempDir::new();
    for n in 0..20 {
        std::fs::write(directory.path().join(format!("{n}")), format!("{n}")).unwrap();
    }
    let config = FsConfig {
        fd_budget: 8,
        ..FsConfig::default()
    };
    let driver = Driver::new(config);
    driver
        .server
        .attach("d", &directory.fd(), AttachOptions::default())
        .unwrap();
    let root = driver.lookup(ROOT_ID, "d").unwrap();
    let nodes: Vec<u64> = (0..20)
        .filter_map(|n| driver.lookup(root, &format!("{n}")).ok())
        .collect();
    assert!(
        driver.server.metrics_snapshot().descriptors <= 6,
        "a quarter is left for open files"
    );
    // Where the file system has handles, all are there; else as many as the budget allows.
    let has_handles = super::host::FileHandle::of(std::os::fd::AsFd::as_fd(&directory.fd())).is_ok();
    assert_eq!(nodes.len(), if has_handles { 20 } else { 5 });
    for (n, node) in nodes.iter().enumerate() {
        assert_eq!(driver.lookup(root, &format!("{n}")).unwrap(), *node);
        let fh = driver.open(*node, libc::O_RDONLY).unwrap();
        assert_eq!(driver.read(*node, fh, 0, 10).unwrap(), format!("{n}").as_bytes());
        let release = ReleaseIn {
            fh,
            ..ReleaseIn::default()
        };
        driver
            .call(Opcode::Release, *node, &[release.as_bytes()])
            .unwrap();
    }
    let opened: Vec<_> = (0..20).map(|_| driver.open(nodes[0], libc::O_RDONLY)).collect();
    assert!(opened.contains(&Err(Errno::NFILE)));
    assert!(driver.server.metrics_snapshot().descriptors <= 8);
    assert_eq!(
        driver.create(root, "new", libc::O_RDWR, 0o644).unwrap_err(),
        Errno::NFILE
    );
    assert!(!directory.path().join("new").exists());
    driver.server.end_session();
    assert_eq!(driver.server.metrics_snapshot().descriptors, 0);
}

/// Descriptors of this process for what is below `directory`.
fn descriptors_below(directory: &TempDir) -> usize {
    std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
        .filter(|path| path != directory.path() && path.starts_with(directory.path()))
        .count()
}

#[test]
fn a_forgotten_node_that_is_open_counts_until_it_is_closed() {
    let directory = TempDir::new();
    let config = FsConfig {
        fd_budget: 8,
        ..FsConfig::default()
    };
    let driver = Driver::new(config);
    let options = AttachOptions {
        private_mount: false,
        ..AttachOptions::default()
    };
    driver.server.attach("d", &directory.fd(), options).unwrap();
    let root = driver.lookup(ROOT_ID, "d").unwrap();
    let before = driver.server.metrics_snapshot().descriptors;
    let mut opened = Vec::new();
    for n in 0..20 {
        std::fs::write(directory.path().join(format!("{n}")), "").unwrap();
        let Ok(node) = driver.lookup(root, &format!("{n}")) else {
            continue;
        };
        opened.extend(driver.open(node, libc::O_RDONLY).map(|fh| (node, fh)));
        let forget = ForgetIn { nlookup: 1 };
        driver.raw(
            driver.request(Opcode::Forget as u32, node, &[forget.as_bytes()]),
            0,
        );
        let counted = driver.server.metrics_snapshot().descriptors - before;
        assert_eq!(counted, descriptors_below(&directory) as u64, "file {n}");
    }
    assert!(!opened.is_empty());
    for (node, fh) in opened {
        let release = ReleaseIn {
            fh,
            ..ReleaseIn::default()
        };
        driver.call(Opcode::Release, node, &[release.as_bytes()]).unwrap();
    }
    assert_eq!(driver.server.metrics_snapshot().descriptors, before);
    assert_eq!(descriptors_below(&directory), 0);
}

#[test]
fn a_reused_inode_number_is_another_node() {
    let directory = TempDir::new();
    let config = FsConfig {
        fd_budget: 0,
        ..FsConfig::default()
    };
    if super::host::FileHandle::of(std::os::fd::AsFd::as_fd(&directory.fd())).is_err() {
        panic!("this test needs a temporary directory on a file system with file handles (ext4, xfs, tmpfs)");
    }
    let driver = Driver::new(config);
    driver
        .server
        .attach("d", &directory.fd(), AttachOptions::default())
        .unwrap();
    let root = driver.lookup(ROOT_ID, "d").unwrap();
    let mut seen = std::collections::HashSet::new();
    for n in 0..50 {
        std::fs::write(directory.path().join("f"), format!("{n}")).unwrap();
        assert!(seen.insert(driver.lookup(root, "f").unwrap()), "round {n}");
        std::fs::remove_file(directory.path().join("f")).unwrap();
    }
}

#[test]
fn extended_attributes() {
    let directory = TempDir::new();
    std::fs::write(directory.path().join("f"), "").unwrap();
    let (driver, root) = Driver::attached(&directory, AttachOptions::default());
    let node = driver.lookup(root, "f").unwrap();
    let set = |size| SetxattrIn { size, flags: 0 };
    let get = |size| GetxattrIn { size, padding: 0 };
    driver
        .call(Opcode::Setxattr, node, &[set(5).as_bytes(), b"user.a\0value"])
        .unwrap();
    let size = driver
        .call(Opcode::Getxattr, node, &[get(0).as_bytes(), b"user.a\0"])
        .unwrap();
    assert_eq!(size, [5, 0, 0, 0, 0, 0, 0, 0]);
    let value = driver
        .call(Opcode::Getxattr, node, &[get(64).as_bytes(), b"user.a\0"])
        .unwrap();
    assert_eq!(value, b"value");
    let short = driver.call(Opcode::Getxattr, node, &[get(2).as_bytes(), b"user.a\0"]);
    assert_eq!(short, Err(Errno::RANGE));
    let list = driver
        .call(Opcode::Listxattr, node, &[get(256).as_bytes()])
        .unwrap();
    assert_eq!(list, b"user.a\0");
    for (size, rest, error) in [
        (5, &b"user.a\0valu"[..], Errno::INVAL),
        (5, b"user.a\0value-and-more", Errno::INVAL),
        (5, b"no-terminator", Errno::INVAL),
        (70_000, b"user.a\0v", Errno::TOOBIG),
        (1, b"security.selinux\0x", Errno::OPNOTSUPP),
    ] {
        assert_eq!(
            driver.call(Opcode::Setxattr, node, &[set(size).as_bytes(), rest]),
            Err(error)
        );
    }
    driver.call(Opcode::Removexattr, node, &[b"user.a\0"]).unwrap();
    assert_eq!(
        driver.call(Opcode::Removexattr, node, &[b"user.a\0"]),
        Err(Errno::NODATA)
    );
    assert_eq!(
        driver
            .call(Opcode::Listxattr, ROOT_ID, &[get(256).as_bytes()])
            .unwrap(),
        b""
    );
}

#[test]
fn holes_copies_and_allocation() {
    let directory = TempDir::new();
    let (driver, root) = Driver::attached(&directory, AttachOptions::default());
    let (entry, fh) = driver.create(root, "f", libc::O_RDWR, 0o644).unwrap();
    let node = entry.nodeid;
    driver.write(node, fh, 1 << 20, &[1; 4096]).unwrap();
    let seek = |offset, whence: i32| {
        let args = LseekIn {
            fh,
            offset,
            whence: whence.cast_unsigned(),
            padding: 0,
        };
        driver
            .ask::<LseekOut>(Opcode::Lseek, node, &[args.as_bytes()])
            .map(|reply| reply.offset)
    };
    assert_eq!(seek(0, libc::SEEK_DATA).unwrap(), 1 << 20);
    assert_eq!(seek(0, libc::SEEK_HOLE).unwrap(), 0);
    assert_eq!(seek(0, libc::SEEK_SET), Err(Errno::INVAL));
    assert_eq!(seek(u64::MAX, libc::SEEK_DATA), Err(Errno::NXIO));
    let copy = CopyFileRangeIn {
        fh_in: fh,
        off_in: 1 << 20,
        nodeid_out: node,
        fh_out: fh,
        off_out: 0,
        len: 4096,
        flags: 0,
    };
    let copied: WriteOut = driver
        .ask(Opcode::CopyFileRange, node, &[copy.as_bytes()])
        .unwrap();
    assert_eq!(copied.size, 4096);
    assert_eq!(driver.read(node, fh, 0, 4096).unwrap(), [1; 4096]);
    let fallocate = |mode: i32, offset, length| {
        let args = FallocateIn {
            fh,
            offset,
            length,
            mode: mode.cast_unsigned(),
            padding: 0,
        };
        driver.call(Opcode::Fallocate, node, &[args.as_bytes()])
    };
    fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, 0, 4096).unwrap();
    assert_eq!(driver.read(node, fh, 0, 4096).unwrap(), [0; 4096]);
    assert_eq!(fallocate(0x4000_0000, 0, 1), Err(Errno::OPNOTSUPP));
    assert_eq!(fallocate(0, u64::MAX, 1), Err(Errno::INVAL));
    fallocate(0, 1 << 21, 1).unwrap();
    assert_eq!(driver.getattr(node).unwrap().attr.size, (1 << 21) + 1);
}

#[test]
fn locks_reach_the_host_and_waiting_holds_no_thread() {
    let directory = TempDir::new();
    let config = FsConfig {
        remote_locks: true,
        ..FsConfig::default()
    };
    let driver = Driver::new(config);
    driver
        .server
        .attach("d", &directory.fd(), AttachOptions::default())
        .unwrap();
    let root = driver.lookup(ROOT_ID, "d").unwrap();
    let (entry, fh) = driver.create(root, "f", libc::O_RDWR, 0o644).unwrap();
    let node = entry.nodeid;
    let lock = |owner, kind: i32, start, end, lk_flags| LkIn {
        fh,
        owner,
        lk: FileLock {
            start,
            end,
            r#type: kind.cast_unsigned(),
            pid: 1,
        },
        lk_flags,
        padding: 0,
    };
    let call = |opcode, args: LkIn| driver.call(opcode, node, &[args.as_bytes()]);
    call(Opcode::Setlk, lock(1, libc::F_WRLCK, 0, 9, 0)).unwrap();
    call(Opcode::Setlk, lock(2, libc::F_WRLCK, 10, 19, 0)).unwrap();
    assert_eq!(
        call(Opcode::Setlk, lock(2, libc::F_RDLCK, 5, 5, 0)),
        Err(Errno::AGAIN)
    );
    // Waiting gives the thread back (the driver maps "blocked" to EAGAIN).
    let before = driver.server.unlocks();
    assert_eq!(
        call(Opcode::Setlkw, lock(2, libc::F_RDLCK, 5, 5, 0)),
        Err(Errno::AGAIN)
    );
    let seen: LkOut = driver
        .ask(Opcode::Getlk, node, &[lock(2, libc::F_WRLCK, 0, 9, 0).as_bytes()])
        .unwrap();
    assert_eq!(
        (seen.lk.r#type, seen.lk.start, seen.lk.end),
        (libc::F_WRLCK.cast_unsigned(), 0, 9)
    );
    // On the host it is a real lock.
    let file = std::fs::File::options()
        .write(true)
        .open(directory.path().join("f"))
        .unwrap();
    let theirs = FileLock {
        start: 0,
        end: 0,
        r#type: libc::F_WRLCK.cast_unsigned(),
        pid: 0,
    };
    assert_eq!(
        super::lock::set(std::os::fd::AsFd::as_fd(&file), &theirs),
        Err(Errno::AGAIN)
    );
    let flush = FlushIn {
        fh,
        lock_owner: 1,
        ..FlushIn::default()
    };
    driver.call(Opcode::Flush, node, &[flush.as_bytes()]).unwrap();
    assert!(driver.server.unlocks() > before);
    call(Opcode::Setlkw, lock(2, libc::F_RDLCK, 5, 5, 0)).unwrap();
    // flock belongs to the open file.
    call(Opcode::Setlk, lock(0, libc::F_WRLCK, 0, 0, 1)).unwrap();
    assert_eq!(
        super::lock::flock(std::os::fd::AsFd::as_fd(&file), libc::F_WRLCK.cast_unsigned()),
        Err(Errno::AGAIN)
    );
    let release = ReleaseIn {
        fh,
        lock_owner: 2,
        ..ReleaseIn::default()
    };
    driver.call(Opcode::Release, node, &[release.as_bytes()]).unwrap();
    super::lock::flock(std::os::fd::AsFd::as_fd(&file), libc::F_WRLCK.cast_unsigned()).unwrap();
    super::lock::set(std::os::fd::AsFd::as_fd(&file), &theirs).unwrap();
}

#[test]
fn what_was_not_negotiated_is_not_there() {
    let directory = TempDir::new();
    let (driver, root) = Driver::attached(&directory, AttachOptions::default());
    let (entry, fh) = driver.create(root, "f", libc::O_RDWR, 0o644).unwrap();
    let lock = LkIn {
        fh,
        ..LkIn::default()
    };
    let map = SetupmappingIn {
        len: 4096,
        ..SetupmappingIn::default()
    };
    let unmap = RemovemappingIn { count: 0 };
    let flush = FlushIn {
        fh,
        ..FlushIn::default()
    };
    for (opcode, args) in [
        (Opcode::Setlk, lock.as_bytes()),
        (Opcode::Getlk, lock.as_bytes()),
        (Opcode::Setlkw, lock.as_bytes()),
        (Opcode::Setupmapping, map.as_bytes()),
        (Opcode::Removemapping, unmap.as_bytes()),
        (Opcode::Flush, flush.as_bytes()),
        (Opcode::Bmap, &[0; 16][..]),
        (Opcode::Poll, &[0; 24][..]),
        (Opcode::NotifyReply, &[0; 40][..]),
    ] {
        assert_eq!(
            driver.call(opcode, entry.nodeid, &[args]),
            Err(Errno::NOSYS),
            "{opcode:?}"
        );
    }
    assert_eq!(
        driver.call(Opcode::Ioctl, entry.nodeid, &[&[0; 32]]),
        Err(Errno::NOTTY)
    );
    for number in [0, 7, 19, 53, 4096, 1 << 20, u32::MAX] {
        let (outcome, reply) = driver.raw(driver.request(number, ROOT_ID, &[&[0; 64]]), 256);
        assert_eq!(outcome, Outcome::Done { len: 16 }, "{number}");
        assert_eq!(i32::from_le_bytes(reply[4..8].try_into().unwrap()), -libc::ENOSYS);
    }
}

#[test]
fn interrupts_name_a_request() {
    let driver = Driver::new(FsConfig::default());
    let request = driver.request(
        Opcode::Interrupt as u32,
        0,
        &[InterruptIn { unique: 42 }.as_bytes()],
    );
    assert_eq!(driver.raw(request, 0).0, Outcome::Interrupt { unique: 42 });
    let request = driver.request(Opcode::Interrupt as u32, 0, &[&[0; 4]]);
    assert_eq!(driver.raw(request, 0).0, Outcome::Malformed);
}

/// Each opcode, cut short at each length, with and without room, and with bytes of all kinds: an answer or a
/// complaint, never a panic, and nothing changed on the host beyond what the request may.
#[test]
fn no_request_of_any_length_or_content_harms() {
    let directory = TempDir::new();
    std::fs::write(directory.path().join("f"), "data").unwrap();
    let window = Arc::new(DaxWindow::new(64 << 10).unwrap());
    let config = FsConfig {
        remote_locks: true,
        posix_acl: true,
        ..FsConfig::default()
    };
    let driver = Driver::with_server(Server::new(config, Some(window)).unwrap());
    driver.server.attach("d", &directory.fd(), READ_ONLY).unwrap();
    let mut state = 0x1234_5678_9abc_def0u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for opcode in Opcode::ALL {
        for length in (0..=160).step_by(4) {
            driver.init(LINUX).unwrap();
            let root = driver.lookup(ROOT_ID, "d").unwrap();
            let node = driver.lookup(root, "f").unwrap();
            let fh = driver.open(node, libc::O_RDONLY).unwrap();
            for fill in 0..4 {
                let mut args = vec![0u8; length];
                match fill {
                    0 => {}
                    1 => args.fill(0xff),
                    2 => args.fill_with(|| random().to_le_bytes()[0]),
                    _ => {
                        // A good handle, small numbers, then random bytes.
                        args.fill_with(|| random().to_le_bytes()[0] % 3);
                        for (to, from) in args.iter_mut().zip(fh.to_le_bytes()) {
                            *to = from;
                        }
                    }
                }
                for nodeid in [ROOT_ID, root, node, 0, u64::MAX] {
                    for room in [0, 15, 16, 24, 160, 4096] {
                        let mut request = driver.request(*opcode as u32, nodeid, &[&args]);
                        if random() % 8 == 0 {
                            // total_extlen
                            request[36] = random().to_le_bytes()[0];
                        }
                        if random() % 16 == 0 {
                            // len
                            request[0] = random().to_le_bytes()[0];
                        }
                        driver.raw(request, room);
                    }
                }
            }
        }
    }
    for length in 0..size_of::<InHeader>() {
        assert_eq!(driver.raw(vec![0xff; length], 64).0, Outcome::Malformed);
    }
    let names: Vec<_> = std::fs::read_dir(directory.path()).unwrap().collect();
    assert_eq!(names.len(), 1);
    assert_eq!(std::fs::read(directory.path().join("f")).unwrap(), b"data");
}

#[test]
fn requests_longer_than_their_chain_are_refused() {
    let driver = Driver::new(FsConfig::default());
    let mut request = driver.request(
        Opcode::Getattr as u32,
        ROOT_ID,
        &[GetattrIn::default().as_bytes()],
    );
    let length = u8::try_from(request.len()).unwrap();
    request[0] = length + 1;
    assert_eq!(driver.raw(request.clone(), 256).0, Outcome::Malformed);
    request[0] = 39;
    assert_eq!(driver.raw(request.clone(), 256).0, Outcome::Malformed);
    // Shorter: what lies beyond is not looked at.
    request[0] = length - 1;
    assert_eq!(driver.raw(request, 256).0, Outcome::Done { len: 16 });
}

#[test]
fn nothing_is_done_when_the_answer_has_no_room() {
    let directory = TempDir::new();
    let (driver, root) = Driver::attached(&directory, AttachOptions::default());
    let before = driver.server.metrics_snapshot();
    let create = CreateIn {
        flags: libc::O_RDWR.cast_unsigned(),
        mode: 0o644,
        ..CreateIn::default()
    };
    let mkdir = MkdirIn {
        mode: 0o755,
        umask: 0,
    };
    for room in [16, 17, 100, 143] {
        for (opcode, args) in [
            (Opcode::Create, create.as_bytes()),
            (Opcode::Mkdir, mkdir.as_bytes()),
        ] {
            let refused = driver.call_with_room(opcode, root, &[args, b"x\0"], room);
            assert_eq!(refused, Err(Errno::INVAL), "{opcode:?} {room}");
        }
    }
    let after = driver.server.metrics_snapshot();
    assert_eq!(
        (after.nodes, after.descriptors),
        (before.nodes, before.descriptors)
    );
    assert!(!directory.path().join("x").exists());
}

#[test]
fn dax_mappings_are_confined_and_read_only_stays_so() {
    let directory = TempDir::new();
    std::fs::write(directory.path().join("f"), vec![7; 8192]).unwrap();
    let window = Arc::new(DaxWindow::new(64 << 10).unwrap());
    let driver = Driver::with_server(Server::new(FsConfig::default(), Some(Arc::clone(&window))).unwrap());
    driver.server.attach("ro", &directory.fd(), READ_ONLY).unwrap();
    driver
        .server
        .attach("rw", &directory.fd(), AttachOptions::default())
        .unwrap();
    let node = |name| {
        let root = driver.lookup(ROOT_ID, name).unwrap();
        (root, driver.lookup(root, "f").unwrap())
    };
    let ((ro_root, ro), (_, rw)) = (node("ro"), node("rw"));
    let map = |node, moffset, len, flags| {
        let args = SetupmappingIn {
            fh: u64::MAX,
            foffset: 0,
            len,
            flags,
            moffset,
        };
        driver.call(Opcode::Setupmapping, node, &[args.as_bytes()])
    };
    const READ: u64 = 2;
    const WRITE: u64 = 1;
    map(ro, 0, 4096, READ).unwrap();
    map(rw, 8192, 8192, READ | WRITE).unwrap();
    assert_eq!(map(ro, 0, 4096, READ | WRITE), Err(Errno::ROFS));
    assert_eq!(map(ro, 0, 4096, 4), Err(Errno::INVAL));
    assert_eq!(map(ro_root, 0, 4096, READ), Err(Errno::ISDIR));
    assert_eq!(map(ROOT_ID, 0, 4096, READ), Err(Errno::ROFS));
    assert_eq!(map(ro, 64 << 10, 4096, READ), Err(Errno::INVAL));
    assert_eq!(map(ro, 60 << 10, 8192, READ), Err(Errno::INVAL));
    assert_eq!(map(ro, 12_288, 4096, READ), Err(Errno::INVAL));
    let unmap = |count, list: &[RemovemappingOne]| {
        driver.call(
            Opcode::Removemapping,
            ro,
            &[RemovemappingIn { count }.as_bytes(), list.as_bytes()],
        )
    };
    let one = |moffset, len| RemovemappingOne { moffset, len };
    assert_eq!(unmap(2, &[one(0, 4096)]), Err(Errno::INVAL));
    assert_eq!(unmap(u32::MAX, &[one(0, 4096)]), Err(Errno::INVAL));
    unmap(1, &[one(8192, 8192)]).unwrap();
    assert_eq!(unmap(1, &[one(64 << 10, 4096)]), Err(Errno::INVAL));
    map(ro, 0, 4096, READ).unwrap();
    assert_eq!(window.all().len(), 1);
    // What is mapped cannot keep the file busy after a detach, and a new session begins with an empty window.
    driver.server.detach("ro").unwrap();
    assert!(window.all().iter().all(|(_, mapping)| mapping.source.is_none()));
    driver.call(Opcode::Destroy, ROOT_ID, &[]).unwrap();
    assert!(window.all().is_empty());
}

/// A byte of the window, read by the kernel: what is not there is an error and no signal.
fn peek(window: &DaxWindow, offset: u64) -> Option<u8> {
    let (reader, writer) = std::io::pipe().unwrap();
    let address = std::ptr::without_provenance::<libc::c_void>(
        usize::try_from(window.host_address() + offset).unwrap(),
    );
    // SAFETY: the kernel checks the address.
    let written = unsafe { libc::write(writer.as_raw_fd(), address, 1) };
    drop(writer);
    let mut byte = Vec::new();
    std::io::Read::read_to_end(&mut { reader }, &mut byte).unwrap();
    assert_eq!(written == 1, byte.len() == 1);
    byte.first().copied()
}

#[test]
fn only_larger_files_of_an_attachment_with_dax_are_for_the_window() {
    let directory = TempDir::new();
    let mib = 1 << 20;
    for (name, len) in [("large", mib), ("small", mib - 1)] {
        std::fs::File::create(directory.path().join(name))
            .unwrap()
            .set_len(len)
            .unwrap();
    }
    let window = Arc::new(DaxWindow::new(2 << 20).unwrap());
    let driver = Driver::with_server(Server::new(FsConfig::default(), Some(window)).unwrap());
    let with = |dax, cache| AttachOptions {
        dax,
        cache,
        ..AttachOptions::default()
    };
    let attach = |name, options| driver.server.attach(name, &directory.fd(), options).unwrap();
    attach("dax", with(true, CachePolicy::Always));
    attach("plain", with(false, CachePolicy::Always));
    attach("uncached", with(true, CachePolicy::Never));
    let flags = |attached: &str, name: &str| {
        let root = driver.lookup(ROOT_ID, attached).unwrap();
        let entry: EntryOut = driver
            .ask(Opcode::Lookup, root, &[name.as_bytes(), b"\0"])
            .unwrap();
        let args = GetattrIn::default();
        let again: AttrOut = driver
            .ask(Opcode::Getattr, entry.nodeid, &[args.as_bytes()])
            .unwrap();
        assert_eq!(entry.attr.flags, again.attr.flags);
        entry.attr.flags
    };
    assert_eq!(flags("dax", "large"), ATTR_DAX);
    assert_eq!(flags("dax", "small"), 0);
    assert_eq!(flags("plain", "large"), 0);
    assert_eq!(flags("uncached", "large"), 0);
    let root: AttrOut = driver
        .ask(Opcode::Getattr, ROOT_ID, &[GetattrIn::default().as_bytes()])
        .unwrap();
    assert_eq!(root.attr.flags, 0);
    // A guest that does not know of it is told nothing.
    driver.init(LINUX & !init::HAS_INODE_DAX).unwrap();
    assert_eq!(flags("dax", "large"), 0);
}

#[test]
fn mappings_follow_a_copy_up() {
    // An overlay cannot be mounted everywhere, so another file plays what the copy-up leaves behind.
    let directory = TempDir::new();
    let (old, new) = (directory.path().join("old"), directory.path().join("new"));
    std::fs::write(&old, vec![1; 8192]).unwrap();
    std::fs::write(&new, vec![2; 4096]).unwrap();
    let window = Arc::new(DaxWindow::new(64 << 10).unwrap());
    let driver = Driver::with_server(Server::new(FsConfig::default(), Some(Arc::clone(&window))).unwrap());
    driver
        .server
        .attach("d", &directory.fd(), AttachOptions::default())
        .unwrap();
    let root = driver.lookup(ROOT_ID, "d").unwrap();
    let node = driver.lookup(root, "old").unwrap();
    let map = |moffset, flags| {
        let args = SetupmappingIn {
            fh: u64::MAX,
            foffset: 0,
            len: 8192,
            flags,
            moffset,
        };
        driver
            .call(Opcode::Setupmapping, node, &[args.as_bytes()])
            .unwrap();
    };
    assert!(!window.has_readers(node));
    map(0, 2);
    map(16 << 10, 3);
    assert!(window.has_readers(node) && !window.has_readers(root));
    // As if opening for writing had made another file of it.
    let copy = std::fs::File::open(&new).unwrap();
    window.renew(node, copy.as_fd()).unwrap();
    assert_eq!((peek(&window, 0), peek(&window, 4096)), (Some(2), None));
    // A mapping for writing was of the copy already.
    assert_eq!(peek(&window, 16 << 10), Some(1));
    // Opening for writing does that, be it to truncate.
    driver.open(node, libc::O_WRONLY).unwrap();
    assert_eq!((peek(&window, 0), peek(&window, 4096)), (Some(1), Some(1)));
    window.renew(node, copy.as_fd()).unwrap();
    let size = SetattrIn {
        valid: fattr::SIZE,
        size: 4096,
        ..SetattrIn::default()
    };
    let attr: AttrOut = driver.ask(Opcode::Setattr, node, &[size.as_bytes()]).unwrap();
    assert_eq!(attr.attr.size, 4096);
    assert_eq!((peek(&window, 0), peek(&window, 4096)), (Some(1), None));
    // Opening for reading leaves mappings alone.
    window.renew(node, copy.as_fd()).unwrap();
    driver.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(peek(&window, 0), Some(2));
}

#[test]
fn many_threads_and_an_attachment_that_comes_and_goes() {
    let directory = TempDir::new();
    for n in 0..8 {
        std::fs::write(directory.path().join(format!("{n}")), "data").unwrap();
    }
    let driver = Arc::new(Driver::new(FsConfig::default()));
    let threads: Vec<_> = (0..4)
        .map(|thread| {
            let driver = Arc::clone(&driver);
            std::thread::spawn(move || {
                let mut read = 0;
                for round in 0..400 {
                    let Ok(root) = driver.lookup(ROOT_ID, "d") else {
                        std::thread::yield_now();
                        continue;
                    };
                    let Ok(node) = driver.lookup(root, &format!("{}", (thread + round) % 8)) else {
                        continue;
                    };
                    if let Ok(fh) = driver.open(node, libc::O_RDWR) {
                        match driver.read(node, fh, 0, 10) {
                            Ok(data) => {
                                assert_eq!(data, b"data");
                                read += 1;
                            }
                            Err(errno) => assert_eq!(errno, Errno::BADF),
                        }
                        let release = ReleaseIn {
                            fh,
                            ..ReleaseIn::default()
                        };
                        let _ = driver.call(Opcode::Release, node, &[release.as_bytes()]);
                    }
                    let forget = ForgetIn { nlookup: 1 };
                    driver.raw(
                        driver.request(Opcode::Forget as u32, node, &[forget.as_bytes()]),
                        0,
                    );
                }
                read
            })
        })
        .collect();
    while threads.iter().any(|thread| !thread.is_finished()) {
        driver
            .server
            .attach("d", &directory.fd(), AttachOptions::default())
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(3));
        driver.server.detach("d").unwrap();
    }
    let read: u32 = threads.into_iter().map(|thread| thread.join().unwrap()).sum();
    assert!(read > 0);
    assert_eq!(driver.server.metrics_snapshot().descriptors, 0);
    assert_eq!(driver.server.metrics_snapshot().nodes, 0);
}

#[test]
fn a_snapshot_holds_files_that_are_open_and_deleted() {
    let directory = TempDir::new();
    let config = FsConfig::default();
    let driver = Driver::with_server(Server::new(config.clone(), None).unwrap());
    let folder = |name: &str| directory.path().join(name);
    let open = |name: &str| OwnedFd::from(std::fs::File::open(folder(name)).unwrap());
    for name in ["kept", "other"] {
        std::fs::create_dir(folder(name)).unwrap();
        let options = AttachOptions::default();
        driver.server.attach(name, &open(name), options).unwrap();
    }
    let gone = |attachment: &str| {
        let root = driver.lookup(ROOT_ID, attachment).unwrap();
        let (entry, fh) = driver.create(root, "gone", libc::O_WRONLY, 0o640).unwrap();
        driver.write(entry.nodeid, fh, 0, attachment.as_bytes()).unwrap();
        // Far behind a hole, and a hole behind it.
        driver.write(entry.nodeid, fh, 1 << 40, b"far").unwrap();
        driver.call(Opcode::Unlink, root, &[b"gone\0"]).unwrap();
        (entry.nodeid, fh)
    };
    let (kept, other) = (gone("kept"), gone("other"));
    let names = |name: &str| std::fs::read_dir(folder(name)).unwrap().count();
    let copies = driver.server.keep_deleted(|name| name == "kept").unwrap();
    assert_eq!((names("kept"), names("other")), (1, 0));
    let saved = driver.server.save().unwrap();
    // What goes with the snapshot is the folder as it is with the copy in it.
    std::fs::create_dir(folder("restored")).unwrap();
    for entry in std::fs::read_dir(folder("kept")).unwrap() {
        let entry = entry.unwrap();
        assert!(
            entry.metadata().unwrap().blocks() < 1 << 10,
            "its holes are holes"
        );
        std::fs::rename(entry.path(), folder("restored").join(entry.file_name())).unwrap();
    }
    drop(copies);
    assert_eq!(names("kept"), 0);

    let restored = Server::new(config, None).unwrap();
    for (name, from) in [("kept", "restored"), ("other", "other")] {
        restored
            .attach(name, &open(from), AttachOptions::default())
            .unwrap();
    }
    restored.restore(&saved).unwrap();
    let restored = Driver::uninitialised(restored);
    assert_eq!(names("restored"), 0);
    let (node, fh) = kept;
    assert_eq!(restored.write(node, fh, 4, b" on").unwrap(), 3);
    let attributes = restored.getattr(node).unwrap().attr;
    assert_eq!(
        (attributes.size, attributes.mode & 0o7777, attributes.nlink),
        ((1 << 40) + 3, 0o640, 0)
    );
    assert_eq!(restored.getattr(other.0).unwrap_err(), Errno::STALE);
    assert_eq!(
        restored.write(other.0, other.1, 0, b"x").unwrap_err(),
        Errno::BADF
    );
}

#[test]
fn a_snapshot_holds_nodes_handles_and_mappings() {
    let directory = TempDir::new();
    std::fs::create_dir(directory.path().join("sub")).unwrap();
    std::fs::write(directory.path().join("sub/f"), "data").unwrap();
    let config = FsConfig {
        writeback: true,
        ..FsConfig::default()
    };
    let window = || Some(Arc::new(DaxWindow::new(64 << 10).unwrap()));
    let driver = Driver::with_server(Server::new(config.clone(), window()).unwrap());
    driver
        .server
        .attach("d", &directory.fd(), AttachOptions::default())
        .unwrap();
    let root = driver.lookup(ROOT_ID, "d").unwrap();
    let sub = driver.lookup(root, "sub").unwrap();
    let file = driver.lookup(sub, "f").unwrap();
    let fh = driver.open(file, libc::O_RDWR).unwrap();
    let appending = driver.open(file, libc::O_WRONLY | libc::O_APPEND).unwrap();
    let (gone, _) = driver.create(root, "gone", libc::O_RDWR, 0o644).unwrap();
    driver.call(Opcode::Unlink, root, &[b"gone\0"]).unwrap();
    let map = SetupmappingIn {
        len: 4096,
        flags: 2,
        ..SetupmappingIn::default()
    };
    driver
        .call(Opcode::Setupmapping, file, &[map.as_bytes()])
        .unwrap();
    let saved = driver.server.save().unwrap();

    let restored = Server::new(config.clone(), window()).unwrap();
    restored
        .attach("d", &directory.fd(), AttachOptions::default())
        .unwrap();
    restored.restore(&saved).unwrap();
    let restored = Driver::uninitialised(restored);
    assert_eq!(restored.read(file, fh, 0, 10).unwrap(), b"data");
    // With its page cache written back later, the guest reads and places by itself whatever it is open for.
    assert_eq!(restored.write(file, appending, 0, b"D").unwrap(), 1);
    assert_eq!(restored.read(file, appending, 0, 10).unwrap(), b"Data");
    assert_eq!(restored.write(file, fh, 4, b"!").unwrap(), 1);
    assert_eq!(restored.lookup(sub, "f").unwrap(), file);
    assert_eq!(restored.getattr(gone.nodeid).unwrap_err(), Errno::STALE);
    assert_eq!(
        restored.server.window().unwrap().all(),
        driver.server.window().unwrap().all()
    );
    // New numbers are above all old ones.
    let (new, new_fh) = restored.create(root, "new", libc::O_RDWR, 0o644).unwrap();
    assert!(new.nodeid > gone.nodeid && new_fh > fh);

    for (other, why) in [
        (
            FsConfig {
                tag: "other".to_owned(),
                ..config.clone()
            },
            "tag",
        ),
        (
            FsConfig {
                max_nodes: 1,
                ..config.clone()
            },
            "nodes",
        ),
    ] {
        let server = Server::new(other, window()).unwrap();
        let refused = server.restore(&saved).unwrap_err().to_string();
        assert!(refused.contains(why), "{refused}");
    }
    let without = Server::new(config, None).unwrap();
    assert!(without.restore(&saved).is_err());
}
