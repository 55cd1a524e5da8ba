// SPDX-License-Identifier: Apache-2.0
//! `getpwuid_r` in place of the C library's.
//!
//! libcontainer looks up HOME in the container, with the C library's function. That one obeys the container's
//! /etc/nsswitch.conf and loads the plug-ins named there: code of the container's in a process that is not yet confined,
//! and in a static binary a crash at best. This one reads /etc/passwd and nothing else. Being defined here it takes the
//! place of the other for the whole program, which leaves the name service (and 100 KB) out of it.

use std::ffi::{c_char, c_int};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::ptr::null_mut;

/// How much of /etc/passwd is looked at: the file is the container's.
const MAX_FILE: u64 = 1 << 20;

/// Home directory of `uid` in the text of a passwd file.
fn home_of(uid: u32, text: &str) -> Option<&str> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        // name:password:uid:gid:gecos:home:shell
        let found = fields.nth(2)?.parse::<u32>().ok()? == uid;
        let home = fields.nth(2)?;
        (found && !home.is_empty()).then_some(home)
    })
}

fn read_passwd() -> Option<String> {
    // O_NONBLOCK: it may be a FIFO.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open("/etc/passwd")
        .ok()?;
    let mut text = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut text).ok()?;
    Some(String::from_utf8_lossy(&text).into_owned())
}

/// See getpwuid_r(3) and the module. Only the user id and the home directory are filled in, all other texts are empty.
///
/// # Safety
/// As POSIX has it: `entry` and `result` valid, `buffer` valid for `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getpwuid_r(
    uid: libc::uid_t,
    entry: *mut libc::passwd,
    buffer: *mut c_char,
    size: libc::size_t,
    result: *mut *mut libc::passwd,
) -> c_int {
    // SAFETY: the caller gives a valid place for the result.
    unsafe { result.write(null_mut()) };
    let text = read_passwd().unwrap_or_default();
    let Some(home) = home_of(uid, &text).filter(|home| !home.contains('\0')) else {
        return 0;
    };
    if home.len().saturating_add(1) > size {
        return libc::ERANGE;
    }
    let empty: *mut c_char = c"".as_ptr().cast_mut();
    // SAFETY: the buffer has room for the text and its NUL, entry and result are valid; nobody writes through the empty
    // text, which lives for ever.
    unsafe {
        buffer.copy_from_nonoverlapping(home.as_ptr().cast(), home.len());
        buffer.add(home.len()).write(0);
        entry.write(libc::passwd {
            pw_name: empty,
            pw_passwd: empty,
            pw_uid: uid,
            pw_gid: 0,
            pw_gecos: empty,
            pw_dir: buffer,
            pw_shell: empty,
        });
        result.write(entry);
    }
    0
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;

    use super::*;

    const TEXT: &str = "# comment\nroot:x:0:0:root:/root:/bin/sh\nbad\nno:x:x:0::/x:\nuser:x:1000:1000:a,b:/home/u:/bin/sh\n\
        empty:x:7:7:::\nuser2:x:1000:1::/second:/bin/sh";

    #[test]
    fn homes_are_found() {
        assert_eq!(home_of(0, TEXT), Some("/root"));
        assert_eq!(home_of(1000, TEXT), Some("/home/u"));
        assert_eq!(home_of(7, TEXT), None);
        assert_eq!(home_of(99, TEXT), None);
        assert_eq!(home_of(0, ""), None);
    }

    #[test]
    fn the_c_interface_answers() {
        let mut buffer = [0; 64];
        // SAFETY: all zeros are a passwd with null pointers.
        let mut entry: libc::passwd = unsafe { std::mem::zeroed() };
        let mut result = null_mut();
        // SAFETY: all pointers are valid for the sizes given.
        let status = unsafe {
            getpwuid_r(
                0,
                &raw mut entry,
                buffer.as_mut_ptr(),
                buffer.len(),
                &raw mut result,
            )
        };
        assert_eq!((status, result), (0, &raw mut entry));
        // SAFETY: the function has put a C string there.
        assert_eq!(unsafe { CStr::from_ptr(entry.pw_dir) }, c"/root");
        // SAFETY: as before; the buffer is too small.
        let status = unsafe { getpwuid_r(0, &raw mut entry, buffer.as_mut_ptr(), 2, &raw mut result) };
        assert_eq!((status, result.is_null()), (libc::ERANGE, true));
    }
}
