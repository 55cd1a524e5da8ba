// SPDX-License-Identifier: Apache-2.0
//! Operations of a node: what an operator sees of containerd's pods and does about them, the daemon's end, what `cloister
//! install` sets up, and iSulad in containerd's place.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod install;
mod isulad;
mod listen;
mod operators;
mod pool;
