// SPDX-License-Identifier: Apache-2.0
//! `cloisterd`: the daemon that containerd uses as a sandboxer.
//!
//! ```text
//! containerd ── gRPC, one socket ──▶ controller ─▶ node (table of pods) ─▶ sandbox (one pod's life) ─▶ pod::vm
//!            ── ttrpc, a socket per pod ──────────────────────────────────▶ pod::task
//!            ◀── events ── events
//! cloister   ── HTTP, admin.sock ────▶ admin ──────▶ reports of all that
//! ```
//!
//! Pods can live in processes of their own as well, which run the same code ([`workers`]): there a router stands before the
//! controller. The controller translates; a sandbox is walked through its life by a task of its own; everything about virtual machines
//! is below `pod::vm`. A pod is kept as plain data in `<state_dir>/sandboxes/<id>/sandbox.json`, from which a new daemon
//! learns which pods ended with the one before it.

pub mod admin;
pub mod args;
pub mod at_rest;
pub mod config;
pub mod controller;
pub mod event_log;
pub mod events;
pub mod exposition;
pub mod http_client;
pub mod http_server;
pub mod idle;
pub mod isulad;
pub mod log_format;
pub mod metrics;
pub mod metrics_server;
pub mod node;
pub mod pod_plan;
pub mod process_metrics;
pub mod quantity;
pub mod report;
pub mod sandbox;
pub mod steps;
pub mod telemetry;
pub mod uds;
pub mod usage;
pub mod vm_metrics;
pub mod watchdog;
pub mod workers;

use args::Asked;
use config::Config;
use events::Publisher;
use metrics::{Metrics, SharedThreads};
use node::{Node, Only};
use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;
use workers::router::Router;

/// The program that runs, whatever lies at its path by now.
const THIS_PROGRAM: &str = "/proc/self/exe";
/// Time for connections to end after the last pod has.
const LAST_ANSWERS: Duration = Duration::from_secs(2);

/// Why the daemon, or a worker of it, cannot run.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum Error {
    #[error("cannot use the state directory {path}")]
    State {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Telemetry(#[from] telemetry::Error),
    #[error("cannot listen on {path}")]
    Listen {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Cells(#[from] cloister_vmm::HostError),
    #[error("cannot serve")]
    Serve(#[from] tonic::transport::Error),
    #[error("a worker is started by cloisterd alone: standard input and output are not its sockets")]
    Sockets(#[source] io::Error),
    #[error("cannot start")]
    Io(#[from] io::Error),
}

/// Runs the daemon to its end, or does what else its command line asks for.
pub fn main() -> ExitCode {
    let ran = match args::asked() {
        Ok(Asked::Daemon(config)) => run(*config),
        Ok(Asked::Worker(dir)) => workers::host::run(&dir),
        Err(code) => return code,
    };
    match ran {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cloisterd: {}", crate::error::chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(config: Config) -> Result<(), Error> {
    // One daemon per state folder, hence per socket in it.
    let _only = Only::take(&config.state_dir).map_err(|source| Error::State {
        path: config.state_dir.display().to_string(),
        source,
    })?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("cloisterd")
        .enable_all()
        .build()?;
    let telemetry = runtime.block_on(async { telemetry::init(&config.log, &config.tracing) })?;
    let result = runtime.block_on(serve(config));
    // The last traces are sent from the runtime.
    drop(telemetry);
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

async fn serve(config: Config) -> Result<(), Error> {
    let socket = config.socket.clone();
    let admin_socket = admin::socket(&config.state_dir);
    let in_listening = |path: &Path| {
        let path = path.display().to_string();
        move |source| Error::Listen { path, source }
    };
    // Another daemon, with another state folder, may have it.
    if UnixStream::connect(&socket).await.is_ok() {
        return Err(in_listening(&socket)(io::Error::other(
            "another process listens there",
        )));
    }
    let shared = cloister_vmm::CellHostConfig::default();
    let cells = cloister_vmm::CellHost::new(shared)?;
    let threads = SharedThreads {
        event_loops: shared.event_loops,
        workers: shared.workers,
    };
    let metrics = Metrics::new(threads, config.sandboxer.keys().map(String::as_str));
    let scraped = match &config.metrics.listen {
        None => None,
        Some(listen) => {
            let server = metrics_server::Server::bind(listen).await;
            Some(server.map_err(|source| Error::Listen {
                path: listen.to_string(),
                source,
            })?)
        }
    };
    let events = Publisher::start(&config.containerd_address);
    let state = config.state_dir.display().to_string();
    let node = Node::new(config, cells, events, metrics, Path::new(THIS_PROGRAM))
        .map_err(|source| Error::State { path: state, source })?;
    if let Some(server) = scraped {
        let node = std::sync::Arc::clone(&node);
        tokio::spawn(server.serve(move || {
            let node = std::sync::Arc::clone(&node);
            async move { node.scrape().await }
        }));
    }
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let operators = uds::listen(&admin_socket).map_err(in_listening(&admin_socket))?;
    let listener = uds::listen(&socket)
        .inspect_err(|_| drop(std::fs::remove_file(&admin_socket)))
        .map_err(in_listening(&socket))?;
    tokio::spawn(admin::serve(operators, std::sync::Arc::clone(&node)));
    tokio::spawn(at_rest::keep_small(node.change()));
    tokio::spawn(watchdog::watch(std::sync::Arc::clone(&node)));
    log::info!("listening on {}", socket.display());
    notify(sd_notify::NotifyState::Ready);

    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let server = tonic::transport::Server::builder()
        .add_service(Router::new(std::sync::Arc::clone(&node)))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async {
            let _ = ended.await;
        });
    let mut server = std::pin::pin!(server);
    tokio::select! {
        served = &mut server => served?,
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    log::info!("ending all pods but those in workers");
    notify(sd_notify::NotifyState::Stopping);
    // Those who wait for a pod hear of its end before the connections go.
    node.stop_all().await;
    let _ = end.send(());
    let _ = tokio::time::timeout(LAST_ANSWERS, server).await;
    for socket in [&socket, &admin_socket] {
        let _ = std::fs::remove_file(socket);
    }
    Ok(())
}

/// Tells systemd, where it started us.
fn notify(state: sd_notify::NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        log::warn!("cannot tell systemd: {error}");
    }
}
