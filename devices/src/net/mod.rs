// SPDX-License-Identifier: Apache-2.0
//! Virtio network device (virtio 1.3, section 5.1) on a tap.
//!
//! # Theory of operation
//!
//! A queue pair is a receive queue, a transmit queue and one descriptor: a queue of the tap. Frames go between guest
//! memory and tap by readv and writev, each behind the same 12-byte header (`struct virtio_net_hdr`) that the driver
//! uses, so checksum and segmentation offloads are the business of the guest's and the host's kernel. What the driver
//! accepts is told to the tap (TUNSETOFFLOAD); what it sends is checked here first: the header is copied out of guest
//! memory, checked against frame and negotiated features, and the copy is what the tap gets.
//!
//! *Receiving* stops where the guest's buffers end: the tap is then not watched until the driver adds some and
//! notifies, so nothing spins (CVE-2020-16843), and the tap's own queue overflows at its end, not ours. With
//! MRG_RXBUF a frame may take several buffers; those become used together. *Transmitting* into a tap that is full
//! waits for it. Both take a limited number of frames per turn on the event loop.
//!
//! Several pairs are one device on one event loop; the tap spreads flows over the pairs that the driver has turned on
//! through the control queue (VIRTIO_NET_CTRL_MQ), the others are detached.
//!
//! The driver says through the same queue which frames it wants (VIRTIO_NET_CTRL_RX, _MAC): others are dropped
//! here, and it is not woken for them.
//!
//! A datagram socket can stand in for the tap ([`NetBackend::Socket`]): each datagram is a header and a frame.

mod control;
mod device;
mod filter;
mod handler;
mod header;
mod metrics;
mod tap;

pub use device::{Net, NetBackend, NetConfig, NetHandle};
pub use metrics::NetMetrics;
pub use tap::TapError;
