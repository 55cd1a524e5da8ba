// SPDX-License-Identifier: Apache-2.0
//! A container's seccomp profile, loaded by each of its processes as the last thing before its program.
//!
//! It comes from the host as the program that the kernel takes. When libcontainer loads one itself, that is before it has
//! dropped its privileges, and the profile must then allow what it still has to do. Loaded last, it needs to allow execve
//! only.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use cloister_protocol::pod::Seccomp;
use cloister_protocol::protobuf::Message;

/// The file in a bundle with its profile.
const FILE: &str = "seccomp";
/// Instructions that the kernel takes at most (`BPF_MAXINSNS`).
const MAX_INSTRUCTIONS: usize = 4096;

/// Puts a profile into a bundle.
///
/// # Errors
/// The kernel's.
pub fn write(bundle: &Path, profile: &Seccomp) -> io::Result<()> {
    fs::write(bundle.join(FILE), profile.write_to_bytes()?)
}

/// The profile in a bundle, if it has one.
///
/// # Errors
/// It cannot be read.
pub fn read(bundle: &Path) -> io::Result<Option<Seccomp>> {
    let mut bytes = Vec::new();
    match File::open(bundle.join(FILE)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?.read_to_end(&mut bytes)?,
    };
    Ok(Some(Seccomp::parse_from_bytes(&bytes)?))
}

/// The instructions of a profile, if there are as many as the kernel takes.
///
/// # Errors
/// A text.
pub fn instructions(profile: &Seccomp) -> Result<Vec<libc::sock_filter>, String> {
    let (all, rest) = profile.program.as_chunks::<{ size_of::<libc::sock_filter>() }>();
    if all.is_empty() || all.len() > MAX_INSTRUCTIONS || !rest.is_empty() {
        let bytes = profile.program.len();
        return Err(format!("seccomp profile: {bytes} bytes are no program"));
    }
    let instruction = |[c0, c1, jt, jf, k @ ..]: &[u8; 8]| libc::sock_filter {
        code: u16::from_ne_bytes([*c0, *c1]),
        jt: *jt,
        jf: *jf,
        k: u32::from_ne_bytes(*k),
    };
    Ok(all.iter().map(instruction).collect())
}

/// Loads a profile for this thread and what it becomes.
///
/// # Errors
/// A text: it is none, or the kernel refused it.
pub fn load(profile: &Seccomp) -> Result<(), String> {
    let program = instructions(profile)?;
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).unwrap_or(0),
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel reads `len` instructions from `filter`, which live until the call returns, and writes nothing.
    let done = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::c_long::from(libc::SECCOMP_SET_MODE_FILTER),
            libc::c_long::from(profile.flags),
            &raw const program,
        )
    };
    match done {
        0 => Ok(()),
        _ => Err(format!("seccomp profile: {}", io::Error::last_os_error())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a call without arguments answers.
    fn answer(number: libc::c_long) -> Option<i32> {
        // SAFETY: the filter below refuses these calls, and the kernel does not know them: no memory is touched.
        let result = unsafe { libc::syscall(number) };
        (result < 0).then(|| io::Error::last_os_error().raw_os_error().unwrap())
    }

    /// Calls from 800 on answer with an error.
    fn profile(error: u32) -> Seccomp {
        let program: [(u16, u8, u8, u32); 4] = [
            (0x20, 0, 0, 0),
            (0x35, 0, 1, 800),
            (0x06, 0, 0, 0x0005_0000 | error),
            (0x06, 0, 0, 0x7fff_0000),
        ];
        let bytes = |(code, jt, jf, k): (u16, u8, u8, u32)| {
            let [k0, k1, k2, k3] = k.to_ne_bytes();
            let [c0, c1] = code.to_ne_bytes();
            [c0, c1, jt, jf, k0, k1, k2, k3]
        };
        Seccomp {
            program: program.map(bytes).concat(),
            ..Default::default()
        }
    }

    #[test]
    fn a_profile_holds_after_it_was_loaded() {
        let bundle = tempfile::tempdir().unwrap();
        assert!(read(bundle.path()).unwrap().is_none());
        write(bundle.path(), &profile(28)).unwrap();
        let profile = read(bundle.path()).unwrap().unwrap();
        // In a thread of its own, which the filter ends with.
        let answers = std::thread::spawn(move || {
            rustix::thread::set_no_new_privs(true).unwrap();
            let before = answer(900);
            load(&profile).unwrap();
            [before, answer(900), answer(799)]
        });
        let answers = answers.join().unwrap();
        assert_eq!(answers, [libc::ENOSYS, libc::ENOSPC, libc::ENOSYS].map(Some));
    }

    #[test]
    fn what_is_no_program_is_refused() {
        for length in [0, 7, 4097 * 8] {
            let profile = Seccomp {
                program: vec![6; length],
                ..Default::default()
            };
            assert!(load(&profile).unwrap_err().contains("are no program"), "{length}");
        }
        let nonsense = Seccomp {
            program: vec![0xff; 8],
            ..Default::default()
        };
        let error = std::thread::spawn(move || load(&nonsense)).join().unwrap();
        assert!(error.unwrap_err().contains("seccomp profile: "));
    }
}
