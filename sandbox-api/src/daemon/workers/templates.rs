// SPDX-License-Identifier: Apache-2.0
//! Templates for pods in workers: built by the daemon, once for all workers, and given to them as files on a
//! [`Shelf`]. A worker whose pod has booted, or did not grow, leaves a wish there before it tells that it has started, or failed to.

use super::super::node::Node;
use crate::pod::shelf::Shelf;
use crate::pod::template::{self, Kind, MAX_TEMPLATES, SETTLE};
use std::io;
use std::sync::Arc;

/// Builds what workers have asked for, one after the other, when the pod that was started has settled.
pub(super) async fn build_what_is_asked_for(node: Arc<Node>) {
    tokio::time::sleep(SETTLE).await;
    let _only = node.workers.building.lock().await;
    let shelf = Shelf::of_workers(&node.config.state_dir);
    for kind in shelf.take_wishes() {
        match build(&node, &shelf, &kind).await {
            Ok(name) => log::info!("template {name} was built for workers"),
            Err(error) => log::warn!("pods in workers boot as before: no template: {error}"),
        }
    }
}

async fn build(node: &Node, shelf: &Shelf, kind: &Kind) -> Result<String, String> {
    let name = Shelf::name(kind);
    // Somebody else may have asked as well.
    if shelf.find(kind, &node.cells).is_some() {
        return Ok(name);
    }
    let profile = node
        .config
        .sandboxer
        .values()
        .find(|profile| profile.pods_per_worker > 0 && kind.boots_from(&profile.kernel, &profile.initrd))
        .ok_or("no profile has its kernel and agent")?;
    let image = template::build(kind, &node.cells, profile.init_timeout)
        .await
        .map_err(|error| crate::error::chain(&error))?;
    let (shelf, kind) = (shelf.clone(), kind.clone());
    let put = tokio::task::spawn_blocking(move || {
        shelf.keep(MAX_TEMPLATES - 1)?;
        shelf.put(&kind, &image)
    });
    let put = put.await.map_err(io::Error::other).and_then(|put| put);
    put.map_err(|error| format!("cannot be put on the shelf: {error}"))
}
