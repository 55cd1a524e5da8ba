// SPDX-License-Identifier: Apache-2.0
//! A block device of the host's: a loop device on a file of the test's (linux/loop.h).

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

const LOOP_SET_FD: libc::c_ulong = 0x4C00;
const LOOP_CLR_FD: libc::c_ulong = 0x4C01;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;

/// Goes away when dropped.
pub struct LoopDevice {
    path: PathBuf,
    device: File,
}

impl LoopDevice {
    pub fn new(backing: &File) -> Self {
        let control = File::options()
            .read(true)
            .write(true)
            .open("/dev/loop-control")
            .expect("no loop devices: run ci/e2e");
        // Another process may be faster.
        for _ in 0..100 {
            // SAFETY: takes no argument.
            let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE as _) };
            assert!(number >= 0, "{}", std::io::Error::last_os_error());
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = File::options().read(true).write(true).open(&path).unwrap();
            // SAFETY: takes a descriptor, which is open.
            let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_SET_FD as _, backing.as_raw_fd()) };
            if result == 0 {
                return Self { path, device };
            }
        }
        panic!("no loop device: {}", std::io::Error::last_os_error());
    }

    pub fn open(&self) -> OwnedFd {
        let file = File::options().read(true).write(true).open(&self.path).unwrap();
        file.into()
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // SAFETY: takes no argument.
        unsafe { libc::ioctl(self.device.as_raw_fd(), LOOP_CLR_FD as _, 0) };
    }
}
