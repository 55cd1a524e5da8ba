// SPDX-License-Identifier: Apache-2.0
//! What a Task service needs of the VM it serves: a way in over vsock, the shared directory, and what a running VM can be
//! given and made to give back.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// How something is shared into a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShareOptions {
    /// The host refuses writes.
    pub read_only: bool,
    /// What the host mounts below it later shows.
    pub follows_mounts: bool,
}

/// A running VM, as far as its containers are concerned. Calls may block for a moment, never for long.
pub trait Guest: Send + Sync + 'static {
    /// A stream to a vsock port of the guest. A refusal shows as end of file.
    ///
    /// # Errors
    /// The VM is gone.
    fn connect(&self, port: u32) -> io::Result<UnixStream>;

    /// Shows a directory or file of the host as `name` in the shared directory.
    ///
    /// # Errors
    /// The name is taken, or the descriptor is of no use.
    fn attach(&self, name: &str, tree: OwnedFd, options: ShareOptions) -> io::Result<()>;

    /// Takes it away again. What the guest still has open stays usable to it until it closes it.
    ///
    /// # Errors
    /// There is none of that name.
    fn detach(&self, name: &str) -> io::Result<()>;

    /// A container has been made, and not started.
    fn note_container(&self) {}

    /// Ends the VM as it is: what runs in it does not respond any more.
    fn give_up(&self, why: String);

    /// Whether it is paused: nothing in it can answer.
    fn stands_still(&self) -> bool {
        false
    }

    /// Bytes of the host's memory that its RAM takes: what the guest has used and not given back. None if it is gone.
    fn memory_used(&self) -> Option<u64>;

    /// Makes vCPUs until the guest can set `count` online. Answers how many there are now, which may be more or fewer.
    ///
    /// # Errors
    /// The VM is gone, or the host's kernel refuses.
    fn provide_vcpus(&self, count: u8) -> io::Result<u8>;

    /// Asks the guest to bring what it has beyond the memory it booted with to `bytes`. Answers what is asked for now: whole
    /// blocks, and no more than there can be.
    fn request_memory(&self, bytes: u64) -> u64;

    /// Blocks until the guest has at least as much as it was asked to have, or `patience` is over. Answers what it has beyond the
    /// memory it booted with.
    fn wait_memory(&self, patience: Duration) -> u64;

    /// Puts a block device into a free slot, of which the guest has to be told. Answers the slot.
    ///
    /// # Errors
    /// No slot is free, or the descriptor is of no use.
    fn attach_disk(&self, disk: OwnedFd, read_only: bool) -> io::Result<u32>;

    /// Takes it out again, whatever the guest does with it. Blocks until no request is under way.
    ///
    /// # Errors
    /// There is none in that slot.
    fn detach_disk(&self, slot: u32) -> io::Result<()>;
}
