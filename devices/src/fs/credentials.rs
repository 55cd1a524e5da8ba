// SPDX-License-Identifier: Apache-2.0
//! Whose rights a request has on the host.
//!
//! The guest's kernel checks permissions itself (virtio-fs mounts with `default_permissions`), so most requests run
//! with the daemon's rights, confined by descriptors. Two things need more care:
//!
//! - What a request *creates* belongs to the caller. The thread takes the caller's fsuid and fsgid for that one call;
//!   the host kernel then applies its own rules on owner, group and set-group-ID directories (CVE-2022-0358). If the
//!   host refuses what the guest's kernel has allowed (a user namespace in the guest may), the call is repeated with
//!   CAP_DAC_OVERRIDE, still as the caller.
//! - A write by a caller without CAP_FSETID clears set-user-ID and set-group-ID. Then the thread lacks CAP_FSETID
//!   during the call.
//!
//! Everything here belongs to one thread, and a guard puts it back. File creation masks are per thread as well: a
//! thread leaves the process's shared `fs_struct` when it first creates something.

use std::cell::Cell;

use rustix::io::Errno;
use rustix::process::{Gid, umask};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_thread_groups};

/// A caller in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// The one supplementary group that matters here (FUSE_EXT_GROUPS), if any.
    pub group: Option<u32>,
}

thread_local! {
    // Whether this thread has a file creation mask of its own, which is then 0.
    static OWN_MASK: Cell<bool> = const { Cell::new(false) };
}

/// Gives this thread its own file creation mask, once.
fn own_mask() -> Result<(), Errno> {
    OWN_MASK.with(|own| {
        if !own.get() {
            // SAFETY: unshares only what concerns paths (root, current directory, mask), for this thread; nothing
            // here relies on threads sharing those.
            if unsafe { libc::unshare(libc::CLONE_FS) } != 0 {
                return Err(Errno::PERM);
            }
            umask(rustix::fs::Mode::empty());
            own.set(true);
        }
        Ok(())
    })
}

/// Runs `create` as `caller`, with the mask `mask` (applied by the host where no default ACL overrules it).
pub fn create_as<T>(
    caller: &Caller,
    mask: u32,
    mut create: impl FnMut() -> Result<T, Errno>,
) -> Result<T, Errno> {
    own_mask()?;
    let _mask = Mask::set(mask);
    if caller.uid == 0 && caller.gid == 0 {
        return create();
    }
    let _identity = Identity::assume(caller)?;
    match create() {
        Err(Errno::ACCESS | Errno::PERM) if caller.uid != 0 => {
            let _more = Effective::change(|set| set.insert(CapabilitySet::DAC_OVERRIDE))?;
            create()
        }
        result => result,
    }
}

/// Runs `write` so that the host clears set-user-ID and set-group-ID bits.
pub fn without_fsetid<T>(write: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    let _less = Effective::change(|set| set.remove(CapabilitySet::FSETID))?;
    write()
}

struct Mask(bool);

impl Mask {
    fn set(mask: u32) -> Self {
        let mask = mask & 0o777;
        if mask != 0 {
            umask(rustix::fs::Mode::from_raw_mode(mask));
        }
        Self(mask != 0)
    }
}

impl Drop for Mask {
    fn drop(&mut self) {
        if self.0 {
            umask(rustix::fs::Mode::empty());
        }
    }
}

/// This thread as `caller`, until dropped.
struct Identity {
    groups: bool,
}

impl Identity {
    fn assume(caller: &Caller) -> Result<Self, Errno> {
        let identity = Self {
            groups: caller.group.is_some(),
        };
        if let Some(group) = caller.group {
            set_thread_groups(&[Gid::from_raw(group)])?;
        }
        set_fsgid(caller.gid);
        set_fsuid(caller.uid);
        // setfsuid reports nothing: ask. Without the right to change identity the file would belong to the daemon.
        if set_fsuid(u32::MAX) != caller.uid || set_fsgid(u32::MAX) != caller.gid {
            return Err(Errno::PERM);
        }
        Ok(identity)
    }
}

impl Drop for Identity {
    fn drop(&mut self) {
        // Back to root first: that also gives the capabilities back which fsuid took away.
        set_fsuid(effective_uid());
        set_fsgid(effective_gid());
        if self.groups {
            let _ = set_thread_groups(&[]);
        }
    }
}

fn set_fsuid(uid: u32) -> u32 {
    // SAFETY: takes and returns numbers; concerns this thread only.
    unsafe { libc::setfsuid(uid) }.cast_unsigned()
}

fn set_fsgid(gid: u32) -> u32 {
    // SAFETY: as above.
    unsafe { libc::setfsgid(gid) }.cast_unsigned()
}

fn effective_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

fn effective_gid() -> u32 {
    rustix::process::getegid().as_raw()
}

/// This thread with other effective capabilities, until dropped.
struct Effective(CapabilitySets);

impl Effective {
    fn change(change: impl FnOnce(&mut CapabilitySet)) -> Result<Self, Errno> {
        let before = capabilities(None)?;
        let mut now = before;
        change(&mut now.effective);
        // What is not permitted cannot be made effective: leave it out rather than fail.
        now.effective &= now.permitted;
        if now.effective != before.effective {
            set_capabilities(None, now)?;
        }
        Ok(Self(before))
    }
}

impl Drop for Effective {
    fn drop(&mut self) {
        let _ = set_capabilities(None, self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_and_mask_come_back() {
        std::thread::spawn(|| {
            let caller = Caller {
                uid: 1234,
                gid: 2345,
                group: Some(3456),
            };
            let before = capabilities(None).unwrap();
            let seen = create_as(&caller, 0o022, || Ok((set_fsuid(u32::MAX), set_fsgid(u32::MAX)))).unwrap();
            assert_eq!(seen, (1234, 2345));
            assert_eq!((set_fsuid(u32::MAX), set_fsgid(u32::MAX)), (0, 0));
            assert_eq!(umask(rustix::fs::Mode::empty()).as_raw_mode(), 0);
            assert_eq!(capabilities(None).unwrap().effective, before.effective);
            without_fsetid(|| {
                assert!(!capabilities(None)?.effective.contains(CapabilitySet::FSETID));
                Ok(())
            })
            .unwrap();
            assert_eq!(capabilities(None).unwrap().effective, before.effective);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn what_the_host_refuses_is_tried_again_with_more_rights_and_the_same_owner() {
        std::thread::spawn(|| {
            let caller = Caller {
                uid: 1234,
                gid: 2345,
                group: None,
            };
            let mut tries = 0;
            let seen = create_as(&caller, 0, || {
                tries += 1;
                let can = capabilities(None)?
                    .effective
                    .contains(CapabilitySet::DAC_OVERRIDE);
                if can {
                    Ok(set_fsuid(u32::MAX))
                } else {
                    Err(Errno::ACCESS)
                }
            });
            assert_eq!((seen, tries), (Ok(1234), 2));
        })
        .join()
        .unwrap();
    }
}
