// SPDX-License-Identifier: Apache-2.0
//! Virtio socket device (virtio 1.3, section 5.10): stream sockets between guest and host, served in-process.
//!
//! # Theory of operation
//!
//! The guest sees AF_VSOCK streams to and from CID 2. On the host each stream is a unix stream socket. The device moves
//! bytes between its two queues and those sockets, on the shared event loop: it has no thread, and no kernel module
//! (vhost) is involved.
//!
//! ```text
//!   guest ── tx queue ──▶ packet.rs ──▶ mux.rs ──▶ connection.rs ──sendmsg──▶ unix socket ── host's program
//!         ◀─ rx queue ─── rx.rs ◀────── mux.rs ◀── connection.rs ◀─recvmsg─── unix socket ──
//! ```
//!
//! Bytes are copied once, by the kernel, between guest memory and the socket ([`crate::host_io`]); only what a full
//! socket does not take is kept (`backlog.rs`), up to the credit that the guest was given.
//!
//! Who is at the host's end:
//! - guest to host port `P`: a [`VsockListener`] for `P`, or else the unix socket `<uds path>_<P>`, or else RST;
//! - host to guest: [`VsockHandle::connect`], or a client of the unix socket `<uds path>` that writes `CONNECT <P>\n`.
//!
//! # What a hostile guest can do
//!
//! Fill its own connections (their number is limited, and so are their backlogs and descriptors), have its own
//! connections reset by breaking rules, and have its own device stopped by corrupting the rings. It is slower to itself
//! when it floods the host: each turn on the event loop handles a bounded number of packets and bytes.

mod backlog;
mod connection;
mod device;
mod handler;
mod host;
mod metrics;
mod mux;
mod packet;
mod persist;
mod poll;
mod rx;
mod table;
mod uds;

pub use device::{Vsock, VsockConfig, VsockError};
pub use host::{VsockHandle, VsockListener};
pub use metrics::VsockMetrics;

/// The host's CID (section 5.10.4).
pub const HOST_CID: u64 = 2;

/// Host ports of connections that the host initiates count up from here, away from those that programs choose.
const FIRST_HOST_PORT: u32 = 1 << 30;
