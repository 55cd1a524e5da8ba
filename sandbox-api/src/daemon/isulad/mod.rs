// SPDX-License-Identifier: Apache-2.0
//! iSulad's two dialects of the sandbox Controller. Both name no containerd namespace, which is how they are told from
//! containerd: their pods are in [`NAMESPACE`]. iSulad speaks to containers over Task v2 on the pod's socket.
//!
//! | | iSulad of 2023 and 2024 | iSulad from 2025 on |
//! | --- | --- | --- |
//! | messages | fields of an early draft, the sandboxer first ([`dialect`]) | containerd's |
//! | options of Create | `PodSandboxConfig` as JSON ([`options`]), no type | the same as protobuf, no type |
//! | before Task.Create | `Prepare` with specification and root file system, answered with a bundle | `Update` of `extensions.tasks` with the list of all tasks ([`tasks`]) |
//! | after Task.Delete | `Purge` | `Update` with one fewer |
//! | resources | `UpdateResources` | Task.Update |
//! | Task address | `unix://PATH` | `ttrpc+unix://PATH` |
//!
//! Task.Create has no mounts: the root file system is the one of Prepare or Update. iSulad takes any answer to Wait but
//! Unavailable for the pod's end, and asks Platform whether a daemon is back: so that answers without a pod, too.

pub mod dialect;
pub mod options;
pub mod tasks;

/// The namespace of those who name none.
pub const NAMESPACE: &str = "isulad";
