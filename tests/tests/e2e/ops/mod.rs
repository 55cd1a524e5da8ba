// SPDX-License-Identifier: Apache-2.0
//! Operations of a node: what an operator sees of containerd's pods and does about them, the daemon's end, what `cloister
//! install` sets up, and iSulad in containerd's place.

mod install;
mod isulad;
mod listen;
mod operators;
