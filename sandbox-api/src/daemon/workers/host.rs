// SPDX-License-Identifier: Apache-2.0
//! `cloisterd worker FOLDER`: the worker's side. A daemon starts it, with its two sockets as standard input and output; it
//! hosts pods as the daemon would, and ends with the last of them.

use super::super::config::{Config, ConfigError};
use super::super::controller::Service;
use super::super::controller::api::controller_server::ControllerServer;
use super::super::events::Publisher;
use super::super::metrics::{Metrics, SharedThreads};
use super::super::node::Node;
use super::super::{Error, LAST_ANSWERS, admin, at_rest, telemetry, watchdog};
use super::cgroup;
use super::process::{self, About};
use crate::files;
use cloister_vmm::{CellHost, CellHostConfig};
use rustix::stdio;
use std::fs::File;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;

/// Time for the first pod: a daemon that was killed may never bring it.
const FIRST_POD: Duration = Duration::from_secs(60);
/// What `comm` of proc(5) says, at most 15 characters.
const TITLE: &std::ffi::CStr = c"cloister-worker";
/// How soon the kernel ends this process for want of memory; see proc(5).
const OOM_SCORE: &str = "/proc/self/oom_score_adj";

/// Requests for pods, and operators' requests.
struct Sockets {
    controller: UnixListener,
    admin: UnixListener,
}

impl Sockets {
    /// Takes them from standard input and output, where the daemon has put them.
    fn take() -> io::Result<Self> {
        let controller = UnixListener::from(stdio::stdin().try_clone_to_owned()?);
        let admin = UnixListener::from(stdio::stdout().try_clone_to_owned()?);
        // Either fails on what is no unix socket.
        for socket in [&controller, &admin] {
            socket.local_addr()?;
            socket.set_nonblocking(true)?;
        }
        let null = File::options().read(true).write(true).open("/dev/null")?;
        stdio::dup2_stdin(&null)?;
        stdio::dup2_stdout(&null)?;
        Ok(Self { controller, admin })
    }
}

/// The daemon is spared for want of memory on the host (`OOMScoreAdjust` of its unit), as all pods need it. A worker has
/// inherited that, and its pods are to be ended no later than others.
fn give_up_being_spared(score: &Path) -> io::Result<()> {
    let inherited = std::fs::read_to_string(score)?;
    if inherited.starts_with('-') {
        std::fs::write(score, "0")?;
    }
    Ok(())
}

/// Runs the worker whose folder this is, to its end.
///
/// # Errors
/// It cannot start.
pub fn run(dir: &Path) -> Result<(), Error> {
    let sockets = Sockets::take().map_err(Error::Sockets)?;
    let about = About::read(dir)?;
    // What is allocated from here on is the pod's.
    let entered = about
        .cgroup
        .as_ref()
        .map(|cgroup| cgroup::enter(&cgroup.parent, &cgroup.name));
    let exposed = give_up_being_spared(Path::new(OOM_SCORE));
    // It may lead its session already where somebody tries it by hand.
    let _ = rustix::process::setsid();
    let _ = rustix::thread::set_name(TITLE);
    let config = Config::load(&process::config(dir))
        .map_err(|e: ConfigError| io::Error::other(crate::error::chain(&e)))?;
    process::sign(dir)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("worker")
        .enable_all()
        .build()?;
    let telemetry = runtime.block_on(async { telemetry::init(&config.log, &config.tracing) })?;
    if let Some((Err(error), cgroup)) = entered.zip(about.cgroup.as_ref()) {
        log::warn!(
            "pods of worker {} are charged to cloisterd: cannot enter the cgroup {}/{}: {error}",
            about.name,
            cgroup.parent.display(),
            cgroup.name
        );
    }
    if let Err(error) = exposed {
        log::warn!(
            "worker {}: the kernel may spare it for want of memory as it does cloisterd: cannot write {OOM_SCORE}: {error}",
            about.name
        );
    }
    let result = runtime.block_on(serve(config, &about, sockets, dir));
    drop(telemetry);
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

async fn serve(config: Config, about: &About, sockets: Sockets, dir: &Path) -> Result<(), Error> {
    let mut terminate = signal(SignalKind::terminate())?;
    let shared = CellHostConfig {
        // One pod does not keep two loops busy.
        event_loops: CellHostConfig::default().event_loops.min(about.pods.into()),
        ..CellHostConfig::default()
    };
    let cells = CellHost::new(shared)?;
    let threads = SharedThreads {
        event_loops: shared.event_loops,
        workers: shared.workers,
    };
    let metrics = Metrics::new(threads, config.sandboxer.keys().map(String::as_str));
    let events = Publisher::start(&config.containerd_address);
    let node = Node::in_worker(config, cells, events, metrics, about.name.clone());
    let listen = tokio::net::UnixListener::from_std;
    tokio::spawn(admin::serve(listen(sockets.admin)?, Arc::clone(&node)));
    tokio::spawn(at_rest::keep_small(node.change()));
    tokio::spawn(watchdog::watch(Arc::clone(&node)));
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let server = tonic::transport::Server::builder()
        .add_service(ControllerServer::new(Service(Arc::clone(&node))))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listen(sockets.controller)?), async {
            let _ = ended.await;
        });
    let mut server = std::pin::pin!(server);
    let idle = async {
        tokio::select! {
            () = node.emptied() => {}
            () = tokio::time::sleep(FIRST_POD) => {
                node.close_if_empty();
                node.emptied().await;
            }
        }
    };
    tokio::select! {
        served = &mut server => served?,
        _ = terminate.recv() => {
            log::info!("worker {}: ending its pods", about.name);
            node.stop_all().await;
        }
        () = idle => log::debug!("worker {}: its last pod is gone", about.name),
    }
    let _ = end.send(());
    let _ = tokio::time::timeout(LAST_ANSWERS, server).await;
    if let Err(error) = files::replace(&process::metrics(dir), node.metrics.encode().as_bytes()) {
        log::warn!("worker {}: its last metrics are lost: {error}", about.name);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_is_not_spared_as_the_daemon_is() {
        let score = std::env::temp_dir().join(format!("cloister-oom-{}", crate::ids::random_hex(4)));
        for (inherited, expected) in [("-999\n", "0"), ("0\n", "0\n"), ("500\n", "500\n")] {
            std::fs::write(&score, inherited).unwrap();
            give_up_being_spared(&score).unwrap();
            assert_eq!(std::fs::read_to_string(&score).unwrap(), expected);
        }
        std::fs::remove_file(&score).unwrap();
        assert!(give_up_being_spared(&score).is_err());
    }
}
