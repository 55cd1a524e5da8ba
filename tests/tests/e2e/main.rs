// SPDX-License-Identifier: Apache-2.0
//! The end-to-end tests of all but CRI: one program, for each that links the daemon takes long to build. `ci/e2e` runs each module in a
//! host of its own.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod agent;
mod cells;
mod cgroup_v1;
mod clone;
mod container;
mod devices;
mod net;
mod ops;
mod pool;
mod resources;
mod run;
mod snapshot;
mod workers;

/// What tests of asynchronous code run on.
fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}
