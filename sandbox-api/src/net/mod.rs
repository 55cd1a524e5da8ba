// SPDX-License-Identifier: Apache-2.0
//! The host's side of a pod's network.

/// What a pod's network left on the host, for whoever cleans up.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct NetRecord {
    /// The tap device.
    pub tap: String,
    /// Network address of its /30; None for a tap that is the user's own.
    pub subnet: Option<std::net::Ipv4Addr>,
}
