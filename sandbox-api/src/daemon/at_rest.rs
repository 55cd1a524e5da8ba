// SPDX-License-Identifier: Apache-2.0
//! Gives back the memory that the start of pods has used, once nothing happens in any: pages of the program, and what is free in
//! its heap, which the C library keeps for the next time.
//!
//! Most of what a daemon with few pods holds is its own program: the kernel maps up to 16 pages around each that is
//! touched. A daemon at rest needs a few of them. The others stay in the page cache for as long as the host has no better
//! use for that memory; while they are mapped it thinks that they are in use. A later start takes them from there, some
//! hundred page faults without I/O.
//!
//! Which they are is said by the program headers of the program and its libraries (ELF, PT_LOAD): what a segment that may not
//! be written has in memory is what the file has. The others have been relocated.

use rustix::mm::{Advice, madvise};
use rustix::param::page_size;
use std::convert::Infallible;
use std::ffi::{CStr, c_int, c_void};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;

/// How long nothing happens before the pages go.
const REST: Duration = Duration::from_secs(10);

/// Does so forever. `change` is told of each pod that starts or ends, and of what happens in it.
pub async fn keep_small(change: Arc<Notify>) -> Infallible {
    loop {
        while tokio::time::timeout(REST, change.notified()).await.is_ok() {}
        // SAFETY: no condition; the heap's locks are held for a moment.
        unsafe { libc::malloc_trim(0) };
        match give_back() {
            Ok(bytes) => log::debug!("nobody needs most of the program's {} KiB now", bytes >> 10),
            Err(error) => log::warn!("the program's pages stay in memory: {error}"),
        }
        change.notified().await;
    }
}

/// Gives all such pages of the program back. Answers how many bytes they would be if all were there.
fn give_back() -> io::Result<usize> {
    let mut given = 0_usize;
    for (start, length) in segments() {
        let address = std::ptr::with_exposed_provenance_mut(start);
        // SAFETY: whole pages of a private mapping of a file that is never written to: the same bytes are read from it when
        // they are needed next. It lasts as long as the process, which unloads no library.
        unsafe { madvise(address, length, Advice::LinuxDontNeed) }?;
        given = given.saturating_add(length);
    }
    Ok(given)
}

/// Address and length of the whole pages that only segments without the right to write have.
fn segments() -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    // SAFETY: the callback gets the address of `found` and of an object's description, and returns before this does.
    unsafe { libc::dl_iterate_phdr(Some(of_object), (&raw mut found).cast()) };
    found
}

/// dl_iterate_phdr(3)'s callback: adds those of one object.
unsafe extern "C" fn of_object(
    object: *mut libc::dl_phdr_info,
    _: libc::size_t,
    found: *mut c_void,
) -> c_int {
    // SAFETY: `segments` passed the address of this vector, and uses it only after we have returned.
    let found = unsafe { &mut *found.cast::<Vec<(usize, usize)>>() };
    // SAFETY: the loader describes an object that stays loaded; its name is a C string or null.
    let object = unsafe { &*object };
    let name = (!object.dlpi_name.is_null()).then(|| {
        // SAFETY: as above.
        unsafe { CStr::from_ptr(object.dlpi_name) }
    });
    // The kernel's own, which is no file.
    if name.is_some_and(|name| name.to_bytes().starts_with(b"linux-vdso")) || object.dlpi_phdr.is_null() {
        return 0;
    }
    // SAFETY: the object has so many program headers at this address.
    let headers = unsafe { std::slice::from_raw_parts(object.dlpi_phdr, usize::from(object.dlpi_phnum)) };
    found.extend(
        headers
            .iter()
            .filter_map(|header| pages(object.dlpi_addr, header)),
    );
    0
}

/// The whole pages of a segment that is loaded and may not be written.
fn pages(base: libc::Elf64_Addr, header: &libc::Elf64_Phdr) -> Option<(usize, usize)> {
    if header.p_type != libc::PT_LOAD || header.p_flags & libc::PF_W != 0 {
        return None;
    }
    let page = page_size();
    let start = usize::try_from(base.checked_add(header.p_vaddr)?).ok()?;
    let end = start.checked_add(usize::try_from(header.p_filesz).ok()?)?;
    // The first page is the segment's own from its start on: what is before that is of the file's, too. The last one may be
    // shared with what follows in memory.
    let (start, end) = (start & !(page - 1), end & !(page - 1));
    (start < end).then_some((start, end - start))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(kind: u32, flags: u32, address: u64, size: u64) -> libc::Elf64_Phdr {
        libc::Elf64_Phdr {
            p_type: kind,
            p_flags: flags,
            p_offset: 0,
            p_vaddr: address,
            p_paddr: 0,
            p_filesz: size,
            p_memsz: size,
            p_align: 4096,
        }
    }

    #[test]
    fn only_what_is_as_in_its_file_is_meant() {
        let (load, code, read) = (libc::PT_LOAD, libc::PF_R | libc::PF_X, libc::PF_R);
        let base = 0x5000_0000;
        let of = |kind, flags, address, size| pages(base, &header(kind, flags, address, size));
        assert_eq!(of(load, code, 0x1000, 0x3000), Some((0x5000_1000, 0x3000)));
        assert_eq!(of(load, read, 0x1200, 0x2f00), Some((0x5000_1000, 0x3000)));
        assert_eq!(of(load, read, 0x1000, 0xfff), None);
        assert_eq!(of(load, read | libc::PF_W, 0x1000, 0x3000), None);
        // Relocated and then protected: a part of a segment that may be written.
        assert_eq!(of(libc::PT_GNU_RELRO, read, 0x1000, 0x3000), None);
        assert_eq!(of(load, read, u64::MAX, 0x3000), None);
    }

    #[test]
    fn the_program_goes_on_with_what_it_had() {
        static RELOCATED: [&str; 3] = ["one", "two", "three"];
        let before = RELOCATED.concat();
        assert!(segments().len() > 3, "program and libraries");
        assert!(give_back().unwrap() > 2 << 20);
        assert!(give_back().is_ok());
        assert_eq!(RELOCATED.concat(), before);
    }
}
