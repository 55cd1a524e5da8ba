// SPDX-License-Identifier: Apache-2.0
//! The host's side of a pod's network.
//!
//! For pods that containerd made: [`cni`] carries what its CNI plugins have set up into the VM, and [`forward`] what comes to
//! the loopback device of the pod's network namespace.
//!
//! For pods started from the command line: `nat`: a tap device that exists only as long as its descriptor, a /30 out of [`nat::POOL`] with the host at the first
//! address and the pod at the second, masquerade by one nftables table per pod, and TCP ports published by a listener in
//! the hosting process. `tap=NAME`: the queue of a device that is there already; addresses are its owner's business.
//!
//! What a killed process leaves (the table, forwarding switched on) is in its record; the next command removes it.

pub mod cni;
pub mod dns;
pub mod forward;
pub mod nat;
pub mod netns;
pub mod publish;
mod redirect;
mod sk_lookup;
mod survey;
pub mod tap;

pub(crate) use survey::mac_text;

/// What a pod's network left on the host, for whoever cleans up.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct NetRecord {
    /// The tap device.
    pub tap: String,
    /// Network address of its /30.
    pub subnet: std::net::Ipv4Addr,
}

/// A network that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call or a file.
    #[error("network: cannot {0}")]
    Io(String, #[source] std::io::Error),
    /// rtnetlink.
    #[error("network: cannot {0}")]
    Netlink(String, #[source] rtnetlink::Error),
    /// nft.
    #[error("network: cannot {0} (--net nat needs the program nft, Debian package nftables)")]
    Nft(&'static str, #[source] Box<nftables::helper::NftablesError>),
    /// An interface that the CNI plugins made.
    #[error("network: the pod's interface {0} {1}")]
    Interface(String, String),
    /// A route that the CNI plugins made.
    #[error("network: the pod's route to {0} has {1}, which cannot be carried into a virtual machine")]
    Route(String, &'static str),
    /// No free subnet.
    #[error("network: all subnets of {0} are taken by pods or routes of this host; use --net tap=NAME")]
    PoolExhausted(&'static str),
}
