// SPDX-License-Identifier: Apache-2.0
//! virtio-fs: host directories for the guest, served in-process (virtio 1.3, section 5.11; FUSE 7.41).
//!
//! # Theory of operation
//!
//! The guest's kernel is a FUSE client, and this is the server; requests are descriptor chains. A worker of the
//! shared pool ([`crate::worker_pool`]) is woken by the queue's own notification, takes a chain, runs the request to
//! its end with blocking system calls, returns the chain and interrupts the driver: one thread wakes per request,
//! none is handed from one thread to another, and while a request may wait for a disk other workers take the next.
//!
//! ```text
//!  device.rs   registers, configuration space ──activate──▶ handler.rs  queues, parked lock requests
//!                                                                │ one chain
//!                    message.rs  guest memory as bytes ◀── server.rs  header, negotiation, dispatch
//!                    abi.rs      the protocol's structures       │
//!           ┌──────────────┬──────────────┬──────────────┬──────┴───────┬────────────┐
//!       names.rs       attributes.rs   file.rs        xattr.rs       dax.rs       lock.rs
//!       lookup, make,  stat, chmod,    open, read,                   mappings     locks
//!       move, remove   statfs          write, list (directory.rs)
//!           └──────────────┴──────┬───────┴──────────────┘
//!                 inode.rs  nodes (O_PATH descriptors)    handle.rs  open files
//!                 root.rs   what is attached              host.rs    openat2 and /proc/self/fd
//!                 credentials.rs  whose rights            persist.rs, deleted.rs  state in a snapshot
//! ```
//!
//! # Promises
//!
//! 1. A guest reaches what is attached and nothing else: names are single components, resolved by `openat2` below a
//!    descriptor without following symlinks.
//! 2. Read-only is the host's word: no descriptor for writing comes to exist for such an attachment, no request
//!    changes it, and its mount is a read-only clone where the host allows one.
//! 3. Device nodes, FIFOs and sockets are never opened on the host.
//! 4. What the guest holds on the host is bounded: descriptors by a budget, nodes and waiting locks by limits.
//! 5. File data goes between guest memory and the host's page cache without a copy here.
//! 6. After `detach` no descriptor below what was attached is left.

mod abi;
mod attributes;
mod config;
mod credentials;
mod dax;
mod deleted;
mod device;
mod directory;
mod file;
mod handle;
mod handler;
mod host;
mod inode;
mod lock;
mod message;
mod metrics;
mod names;
mod persist;
mod root;
mod server;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod xattr;

pub use config::{FsConfig, FsError};
pub use dax::DaxWindow;
pub use deleted::Kept;
pub use device::{DaxPlacement, Fs, FsHandle};
pub use message::{Reader, Writer};
pub use metrics::MetricsSnapshot;
pub use root::{AttachError, AttachOptions, CachePolicy};
pub use server::{Outcome, Server};
