// SPDX-License-Identifier: Apache-2.0
//! Pods: their records, their VMs, their containers.

pub mod agent;
pub mod attach;
pub mod detach_keys;
pub mod devices;
pub mod disks;
pub mod guest;
pub mod host;
pub mod log;
pub mod machine;
pub mod members;
pub mod pool;
pub mod resize;
pub mod rewrite;
pub mod shelf;
pub mod size;
pub mod snapshot;
pub mod state;
pub mod streaming;
pub mod streams;
pub mod task;
pub mod template;
pub mod terminal;
pub mod vigil;
pub mod vm;
pub mod volumes;
