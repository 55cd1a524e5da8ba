// SPDX-License-Identifier: Apache-2.0
//! What operators ask the daemon (`cloister ps`, `exec`, `console`, ...): HTTP/1.1 on `<state_dir>/admin.sock`, which admits
//! root alone. Nothing is changed by it.
//!
//! | `GET` | answers |
//! | --- | --- |
//! | `/daemon` | [`report::Daemon`] |
//! | `/pods` | an array of [`report::Pod`], oldest first |
//! | `/pods/ID` | [`report::Details`] |
//! | `/pods/ID/console` | what the guest's kernel has said lately; with `?follow`, and what it says until the VM ends |
//! | `/pods/ID/vm` | [`cloister_vmm::CellReport`]: where its queues and vCPUs stand; the VM is paused for a moment |
//! | `/events` | one [`Event`] a line; with `?follow`, without an end |
//! | `/config` | the configuration that holds, without secrets |
//! | `/metrics` | as on `metrics.listen` |
//!
//! JSON but for the last two and the console. Of pods in workers it is the worker that is asked. To look by hand:
//! `curl --unix-socket /run/cloister/admin.sock http://localhost/pods`.

use super::config::Config;
use super::event_log::Event;
use super::http_client;
use super::http_server::{self, Body, Limits, Listener, refusal, respond, text, told};
use super::metrics::CONTENT_TYPE;
use super::node::Node;
use super::report;
use super::sandbox::{Phase, Sandbox};
use futures_util::stream;
use http::uri::PathAndQuery;
use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::sync::broadcast::error::RecvError;

/// What is followed has no end.
const LIMITS: Limits = Limits {
    connections: 64,
    time: None,
};
/// Time for a worker to begin its answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often a console that is followed is looked at.
const CONSOLE_PACE: Duration = Duration::from_millis(100);

/// Where a daemon with this state folder listens.
pub fn socket(state_dir: &Path) -> PathBuf {
    state_dir.join("admin.sock")
}

/// Answers until it is dropped.
pub async fn serve(listener: UnixListener, node: Arc<Node>) {
    let answer = move |request| answer(request, Arc::clone(&node));
    http_server::serve("admin", Listener::Unix(listener), LIMITS, answer).await;
}

async fn answer(request: Request<Incoming>, node: Arc<Node>) -> Response<Body> {
    if request.method() != Method::GET {
        return refusal(StatusCode::METHOD_NOT_ALLOWED, "only GET");
    }
    let path: Vec<&str> = request.uri().path().trim_matches('/').split('/').collect();
    let follow = request.uri().query() == Some("follow");
    match path.as_slice() {
        ["daemon"] => json(&report::Daemon::new(&node)),
        ["pods"] => pods(node).await,
        ["pods", id, rest @ ..] => match (found(&node, id), node.workers.of(id), rest) {
            (Some(sandbox), _, []) => told(move || json(&report::Details::new(&sandbox))).await,
            (Some(sandbox), _, ["console"]) => console(sandbox, follow),
            (Some(sandbox), _, ["vm"]) => told(move || vm(&sandbox)).await,
            (None, Some(worker), _) => passed_on(&worker.admin(), request.uri()).await,
            _ => refusal(StatusCode::NOT_FOUND, "there is no such pod"),
        },
        ["events"] => events(&node, follow),
        ["config"] => text("application/toml", without_secrets(&node.config).to_toml()),
        ["metrics"] => text(CONTENT_TYPE, node.scrape().await),
        _ => refusal(
            StatusCode::NOT_FOUND,
            "there are /daemon, /pods, /events, /config, /metrics",
        ),
    }
}

async fn pods(node: Arc<Node>) -> Response<Body> {
    let mut pods = node.workers.reports(&node.dir()).await;
    told(move || {
        pods.extend(node.all().iter().map(|pod| report::Pod::new(pod)));
        pods.sort_by(|a, b| a.created.cmp(&b.created).then_with(|| a.id.cmp(&b.id)));
        // One whose worker ended while we asked is ours by now.
        pods.dedup_by(|a, b| a.id == b.id);
        json(&pods)
    })
    .await
}

/// A worker's answer, as it comes.
async fn passed_on(socket: &Path, uri: &Uri) -> Response<Body> {
    let path = uri.path_and_query().map_or("/", PathAndQuery::as_str);
    match http_client::get(socket, path, PATIENCE).await {
        Ok(answer) => answer.map(|body| {
            // Where it breaks, it ends.
            let frames = stream::unfold(body, |mut body| async {
                let frame = body.frame().await?.ok()?;
                Some((Ok(frame), body))
            });
            StreamBody::new(frames).boxed_unsync()
        }),
        Err(error) => refusal(StatusCode::BAD_GATEWAY, &format!("the pod's worker: {error}")),
    }
}

fn found(node: &Node, id: &str) -> Option<Arc<Sandbox>> {
    node.all().into_iter().find(|sandbox| sandbox.id() == id)
}

fn vm(sandbox: &Sandbox) -> Response<Body> {
    let Some(machine) = sandbox.machine() else {
        return refusal(StatusCode::NOT_FOUND, "this pod has no VM");
    };
    match machine.cell().report() {
        Ok(report) => json(&report),
        Err(error) => refusal(StatusCode::CONFLICT, &error.to_string()),
    }
}

fn json(value: &impl serde::Serialize) -> Response<Body> {
    match serde_json::to_vec(value) {
        Ok(json) => text("application/json", json),
        Err(error) => refusal(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

fn frame(bytes: impl Into<Bytes>) -> Result<Frame<Bytes>, Infallible> {
    Ok(Frame::data(bytes.into()))
}

fn console(sandbox: Arc<Sandbox>, follow: bool) -> Response<Body> {
    const KIND: &str = "application/octet-stream";
    let (bytes, seen) = sandbox.console(0);
    if !follow {
        return text(KIND, bytes);
    }
    let pieces = stream::unfold(
        (sandbox, seen, Some(bytes)),
        |(sandbox, mut seen, first)| async move {
            if let Some(first) = first.filter(|first| !first.is_empty()) {
                return Some((frame(first), (sandbox, seen, None)));
            }
            loop {
                // Before the look: what came up to the end is told below.
                let over = sandbox.phase() >= Phase::Stopped;
                let bytes;
                (bytes, seen) = sandbox.console(seen);
                if !bytes.is_empty() {
                    return Some((frame(bytes), (sandbox, seen, None)));
                }
                if over {
                    return None;
                }
                tokio::time::sleep(CONSOLE_PACE).await;
            }
        },
    );
    respond(KIND, StreamBody::new(pieces).boxed_unsync())
}

fn events(node: &Node, follow: bool) -> Response<Body> {
    const KIND: &str = "application/x-ndjson";
    let (kept, live) = node.log.listen();
    let line = |event: &Event| {
        let mut line = serde_json::to_vec(event).unwrap_or_default();
        line.push(b'\n');
        line
    };
    if !follow {
        return text(KIND, kept.iter().flat_map(line).collect::<Vec<u8>>());
    }
    let lines = stream::unfold(
        (VecDeque::from(kept), live),
        move |(mut kept, mut live)| async move {
            if let Some(event) = kept.pop_front() {
                return Some((frame(line(&event)), (kept, live)));
            }
            loop {
                match live.recv().await {
                    Ok(event) => return Some((frame(line(&event)), (kept, live))),
                    // A reader that is too slow for so many goes on with the next.
                    Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => return None,
                }
            }
        },
    );
    respond(KIND, StreamBody::new(lines).boxed_unsync())
}

/// A collector's address can have a user's name and password in it.
fn without_secrets(config: &Config) -> Config {
    let mut config = config.clone();
    if let Some(endpoint) = &mut config.tracing.otlp_endpoint
        && let Some((scheme, rest)) = endpoint.split_once("://")
    {
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        if let Some((_, host)) = authority.rsplit_once('@') {
            *endpoint = format!("{scheme}://{host}{path}");
        }
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_not_told() {
        let public = |endpoint: &str| {
            let mut config = Config::default();
            config.tracing.otlp_endpoint = Some(endpoint.to_owned());
            without_secrets(&config).tracing.otlp_endpoint.unwrap()
        };
        assert_eq!(
            public("http://me:secret@c:4318/v1/traces"),
            "http://c:4318/v1/traces"
        );
        assert_eq!(public("http://me:se@cret@c"), "http://c");
        assert_eq!(public("http://c:4318/a@b"), "http://c:4318/a@b");
    }
}
