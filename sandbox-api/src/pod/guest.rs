// SPDX-License-Identifier: Apache-2.0
//! What a Task service needs of the VM it serves: a way in over vsock, and the shared directory.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

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

    /// Ends the VM as it is: what runs in it does not respond any more.
    fn give_up(&self, why: String);
}
