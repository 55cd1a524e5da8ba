// SPDX-License-Identifier: Apache-2.0
//! What the tests of the whole house share.
//!
//! [`driver`] is the hostile-guest kit: a virtio driver without a kernel. Tests that use it are in `tests/hostile_*.rs`,
//! its fuzz target in `fuzz/` (a workspace of its own, since all of it is built with instrumentation).
// A test helper that meets the unexpected ends the test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::missing_panics_doc)]

pub mod cri;
pub mod driver;
pub mod e2e;
pub mod game;
pub mod images;
pub mod random;
pub mod zoo;
