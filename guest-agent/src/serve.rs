// SPDX-License-Identifier: Apache-2.0
//! The runtime and the server, in a VM and (for tests) without one.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use cloister_protocol::pod::create_pod;
use cloister_protocol::ttrpc::asynchronous::Server;
use cloister_protocol::ttrpc::asynchronous::transport::Listener;
use tokio::runtime::{Builder, Runtime};

use crate::boot::{self, Timeline};
use crate::container::Context;
use crate::events::Publisher;
use crate::forward;
use crate::pod::PodService;
use crate::reaper::Reaper;
use crate::task::TaskService;
use crate::transport::{self, Dial, Host};

fn runtime() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

async fn serve(listener: Listener, context: Arc<Context>) -> io::Result<()> {
    context.reaper.start()?;
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(cloister_protocol::create_task(Arc::new(TaskService::new(
            Arc::clone(&context),
        ))))
        .register_service(create_pod(Arc::new(PodService::new(context))));
    server.start().await.map_err(io::Error::other)?;
    std::future::pending::<()>().await;
    Ok(())
}

/// Serves for ever as PID 1. The listeners, for requests and for forwarded connections, listen already; `dial` is the way to
/// the events service.
///
/// # Errors
/// When the runtime or the server cannot be set up.
pub fn in_vm(
    (listener, forwards): (OwnedFd, OwnedFd),
    dial: io::Result<Dial>,
    mut timeline: Timeline,
) -> io::Result<()> {
    let runtime = runtime()?;
    timeline.step("runtime");
    runtime.block_on(async move {
        let host = Host::Vsock;
        let dial = dial
            .inspect_err(|error| log::warn!("vsock: cannot dial the host: {error}"))
            .ok();
        let (events, said) = Publisher::start(host.clone(), dial, timeline);
        // An error is as good as a word: what follows does not need the host.
        let _ = said.await;
        boot::rest();
        tokio::spawn(forward::serve(forwards));
        let context = Arc::new(Context {
            host,
            events,
            reaper: Reaper::default(),
            run: PathBuf::from("/run/cloister"),
            in_vm: true,
            containers: Default::default(),
            pid_ns: Default::default(),
        });
        serve(transport::vsock_server(listener), context).await
    })
}

struct Arguments {
    listen: PathBuf,
    host: PathBuf,
    run: PathBuf,
}

const USAGE: &str = "cloister-agent is PID 1 of a pod VM.\n\
    To run its services without a VM, as tests do:\n\
    cloister-agent --listen unix:PATH --host unix:DIR --run DIR\n";

fn parse(args: &[OsString]) -> Option<Arguments> {
    let (mut listen, mut host, mut run) = (None, None, None);
    let mut args = args.iter().skip(1);
    while let (Some(key), Some(value)) = (args.next(), args.next()) {
        let unix = || value.to_str()?.strip_prefix("unix:").map(PathBuf::from);
        match key.to_str()? {
            "--listen" => listen = Some(unix()?),
            "--host" => host = Some(unix()?),
            "--run" => run = Some(PathBuf::from(value)),
            _ => return None,
        }
    }
    Some(Arguments {
        listen: listen?,
        host: host?,
        run: run?,
    })
}

/// Serves as a plain process, with unix sockets for vsock.
pub fn main_as_process(args: &[OsString], timeline: Timeline) -> i32 {
    if args.get(1).is_some_and(|a| a == "--version") {
        println!("cloister-agent {}", env!("CARGO_PKG_VERSION"));
        return 0;
    }
    let Some(args) = parse(args) else {
        eprint!("{USAGE}");
        return 2;
    };
    let level = std::env::var("CLOISTER_LOG").ok().and_then(|l| l.parse().ok());
    crate::log::to_stderr(level.unwrap_or(log::LevelFilter::Warn));
    match as_process(args, timeline) {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("cloister-agent: {error}");
            1
        }
    }
}

fn as_process(args: Arguments, timeline: Timeline) -> io::Result<()> {
    rustix::process::set_child_subreaper(Some(rustix::process::Pid::INIT))?;
    std::fs::create_dir_all(&args.run)?;
    runtime()?.block_on(async move {
        let listener = Listener::bind_unix(args.listen.to_string_lossy())?;
        let host = Host::Unix(args.host);
        let context = Arc::new(Context {
            events: Publisher::start(host.clone(), None, timeline).0,
            host,
            reaper: Reaper::default(),
            run: args.run,
            in_vm: false,
            containers: Default::default(),
            pid_ns: Default::default(),
        });
        serve(listener, context).await
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(words: &[&str]) -> Vec<OsString> {
        words.iter().map(OsString::from).collect()
    }

    #[test]
    fn arguments_need_all_three() {
        let good = parse(&args(&[
            "a", "--listen", "unix:/s", "--host", "unix:/h", "--run", "/r",
        ]))
        .unwrap();
        assert_eq!(good.listen, PathBuf::from("/s"));
        assert!(parse(&args(&["a", "--listen", "unix:/s"])).is_none());
        assert!(
            parse(&args(&[
                "a", "--listen", "tcp:1", "--host", "unix:/h", "--run", "/r"
            ]))
            .is_none()
        );
        assert!(parse(&args(&["a"])).is_none());
    }
}
