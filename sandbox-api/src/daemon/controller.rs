// SPDX-License-Identifier: Apache-2.0
//! containerd's sandbox Controller service (containerd.services.sandbox.v1), as gRPC.

/// The generated server side.
pub mod api {
    #![allow(missing_docs, warnings, clippy::all, clippy::pedantic, clippy::unwrap_used)]
    include!(concat!(env!("OUT_DIR"), "/containerd.services.sandbox.v1.Controller.rs"));
}
