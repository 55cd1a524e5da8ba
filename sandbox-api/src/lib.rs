// SPDX-License-Identifier: Apache-2.0
//! Pods, containers, images, networks: the host half of every task call, and the `cloister` command.
//!
//! The only room of the house that is asynchronous. It never touches guest memory: it gives a cell plain data and file
//! descriptors, and speaks with the agent inside over vsock.

pub mod cli;
pub mod clock;
pub mod daemon;
pub mod error;
pub mod files;
pub mod host_check;
pub mod ids;
pub mod image;
pub mod net;
pub mod pod;
pub mod runtime;
mod sync;
