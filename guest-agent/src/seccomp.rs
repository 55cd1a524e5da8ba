// SPDX-License-Identifier: Apache-2.0
//! A container's seccomp profile, loaded by each of its processes as the last thing before its program.
//!
//! libcontainer translates the profile; when it loads one itself, that is before it has dropped its privileges, and the
//! profile must then allow what it still has to do. Loaded last, it needs to allow execve only.
//!
//! A profile that refuses what it does not list cannot list the calls of newer kernels than its author knew. A program
//! that tries such a call expects ENOSYS on an older kernel, and does without; EPERM makes it fail. So a second filter
//! answers ENOSYS to calls with higher numbers than any that the profile allows, as runc's does.

use std::io;

use libcontainer::oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction};
use libseccomp::ScmpSyscall;

/// Bit of the numbers of the x32 ABI.
const X32: u32 = 0x4000_0000;
const ERRNO: u32 = 0x0005_0000;
const ALLOW: u32 = 0x7fff_0000;

/// Loads the profile for this thread and what it becomes.
///
/// # Errors
/// A text: the profile cannot be translated, or the kernel refused it.
pub fn load(profile: &LinuxSeccomp) -> Result<(), String> {
    let highest = highest_call(profile);
    libcontainer::seccomp::initialize_seccomp(profile)
        .map_err(|e| format!("seccomp profile: {}", crate::error::chain(&e)))?;
    if profile.default_action() == LinuxSeccompAction::ScmpActErrno
        && let Some(highest) = highest
        && let Err(error) = refuse_unknown(highest)
    {
        // A profile that does not let us load another has its own way.
        log::debug!("calls beyond {highest} get the profile's own answer: {error}");
    }
    Ok(())
}

/// The highest number of a call that has a rule. From 424 on they are the same for all ABIs.
fn highest_call(profile: &LinuxSeccomp) -> Option<u32> {
    let rules = profile.syscalls().iter().flatten();
    let names = rules.flat_map(|rule| rule.names().iter());
    names
        .filter_map(|name| u32::try_from(ScmpSyscall::from_name(name).ok()?.as_raw_syscall()).ok())
        .max()
        .map(|highest| highest.max(424))
}

/// Makes calls with numbers beyond `highest` answer ENOSYS, unless they have been refused otherwise than by an error. (Of
/// filters that answer with errors, the one loaded last decides.)
fn refuse_unknown(highest: u32) -> io::Result<()> {
    let instruction = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let enosys = ERRNO | u32::try_from(libc::ENOSYS).unwrap_or(38);
    // Classic BPF: load the number; jump if greater; jump if greater or equal; return.
    let program = [
        instruction(0x20, 0, 0, 0),
        instruction(0x25, 0, 2, highest),
        instruction(0x35, 1, 0, X32),
        instruction(0x06, 0, 0, enosys),
        instruction(0x06, 0, 0, ALLOW),
    ];
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).unwrap_or(0),
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel reads `len` instructions from `filter`, which live until the call returns, and writes nothing.
    let done = unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::c_ulong::from(libc::SECCOMP_MODE_FILTER),
            &raw const program,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a call without arguments answers.
    fn answer(number: libc::c_long) -> Option<i32> {
        // SAFETY: the filters below refuse these calls, and the kernel does not know them: no memory is touched.
        let result = unsafe { libc::syscall(number) };
        (result < 0).then(|| io::Error::last_os_error().raw_os_error().unwrap())
    }

    #[test]
    fn unknown_calls_are_not_implemented() {
        let profile = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
            {"names":["sendfile","pidfd_getfd","no_such_call"],"action":"SCMP_ACT_ALLOW"}]}"#;
        let profile: LinuxSeccomp = serde_json::from_str(profile).unwrap();
        assert_eq!(highest_call(&profile), Some(438));
        // In a thread of its own, which the filters end with.
        let answers = std::thread::spawn(|| {
            rustix::thread::set_no_new_privs(true).unwrap();
            let refuse_more = |highest| {
                // As a profile does: EPERM.
                let mut answers = vec![answer(900), answer(1100)];
                refuse_unknown(highest).unwrap();
                answers.extend([answer(900), answer(1100)]);
                answers
            };
            let eperm = [
                (0x20, 0, 0, 0),
                (0x35, 0, 1, 800),
                (0x06, 0, 0, ERRNO | 1),
                (0x06, 0, 0, ALLOW),
            ];
            let eperm = eperm.map(|(code, jt, jf, k)| libc::sock_filter { code, jt, jf, k });
            let program = libc::sock_fprog {
                len: 4,
                filter: eperm.as_ptr().cast_mut(),
            };
            // SAFETY: as in `refuse_unknown`.
            let done = unsafe { libc::prctl(libc::PR_SET_SECCOMP, 2_u64, &raw const program) };
            assert_eq!(done, 0);
            refuse_more(1000)
        });
        assert_eq!(
            answers.join().unwrap(),
            [libc::EPERM, libc::EPERM, libc::EPERM, libc::ENOSYS].map(Some)
        );
    }
}
