// SPDX-License-Identifier: Apache-2.0
//! From an image and the user's wishes to an OCI bundle: root file system, user, specification.

pub mod capabilities;
pub mod image_mount;
pub mod overlay;
pub mod seccomp;
pub mod spec;
pub mod user;
