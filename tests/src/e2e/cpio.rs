// SPDX-License-Identifier: Apache-2.0
//! An initramfs of a few files, in the "newc" form (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).

/// Packs executable files and the folders above them.
pub fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    const DIRECTORY: u32 = 0o040_755;
    const PROGRAM: u32 = 0o100_755;
    let mut out = Vec::new();
    let mut inode = 0;
    let mut add = |name: &str, mode: u32, data: &[u8]| {
        inode += 1;
        let size = u32::try_from(data.len()).unwrap();
        let name_size = u32::try_from(name.len() + 1).unwrap();
        // ino, mode, uid, gid, nlink, mtime, filesize, major, minor, rmajor, rminor, namesize, check
        let fields = [inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        out.extend_from_slice(b"070701");
        for field in fields {
            out.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        out.extend_from_slice(name.as_bytes());
        out.push(0);
        out.resize(out.len().next_multiple_of(4), 0);
        out.extend_from_slice(data);
        out.resize(out.len().next_multiple_of(4), 0);
    };
    for (name, data) in files {
        for (at, _) in name.match_indices('/') {
            add(&name[..at], DIRECTORY, b"");
        }
        add(name, PROGRAM, data);
    }
    add("TRAILER!!!", 0, b"");
    out
}
