// SPDX-License-Identifier: Apache-2.0
//! `logs` of a pod's container: containerd writes them, and says where.

use super::{Daemon, report};
use crate::cli::{Context, Failure, Outcome, client};
use crate::daemon::report::{Container, Pod};
use crate::daemon::uds;
use crate::pod::log::{Format, Show, show};
use k8s_cri::v1::ContainerStatusRequest;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use std::cell::RefCell;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How often a container that is followed is looked for.
const PACE: Duration = Duration::from_secs(1);

/// Shows the log of a container.
pub fn logs(
    context: &Context,
    daemon: Option<&Daemon>,
    pod: &Pod,
    container: &Container,
    how: Show,
) -> Outcome {
    let daemon = daemon.ok_or_else(|| super::not_running(context))?;
    let node: report::Daemon = serde_json::from_slice(&daemon.get("/daemon")?)?;
    let path = client::runtime()?.block_on(log_path(&node.containerd_address, container))?;
    let how = Show {
        format: Format::Cri,
        ..how
    };
    let looked = RefCell::new((Instant::now(), container.exit_status.is_none()));
    let running = || {
        let (at, answer) = &mut *looked.borrow_mut();
        if *answer && at.elapsed() > PACE {
            *at = Instant::now();
            *answer = daemon.details(&pod.id).is_ok_and(|details| {
                let mut containers = details.pod.containers.iter();
                containers.any(|one| one.id == container.id && one.exit_status.is_none())
            });
        }
        *answer
    };
    match show(&path, &how, &mut io::stdout(), &mut io::stderr(), &running) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(141),
        Err(e) => Err(Failure::new(format!("cannot read {}: {e}", path.display()))),
        Ok(()) => Ok(0),
    }
}

/// Where containerd's CRI service keeps it.
async fn log_path(containerd: &Path, container: &Container) -> Outcome<PathBuf> {
    let failed = |why: &str| {
        Failure::new(format!(
            "containerd ({}) does not say where the log of container {} is: {why}",
            containerd.display(),
            container.id
        ))
    };
    let channel = uds::channel(containerd)
        .await
        .map_err(|e| failed(&crate::error::chain(&e)))?;
    let request = ContainerStatusRequest {
        container_id: container.id.clone(),
        verbose: false,
    };
    let answer = RuntimeServiceClient::new(channel)
        .container_status(request)
        .await
        .map_err(|status| failed(status.message()))?;
    let path = answer.into_inner().status.unwrap_or_default().log_path;
    if path.is_empty() {
        return Err(failed("nobody asked for one"));
    }
    Ok(path.into())
}
