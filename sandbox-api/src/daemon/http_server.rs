// SPDX-License-Identifier: Apache-2.0
//! HTTP/1.1 for operators and scrapers. Who asks is not trusted: headers come within seconds or not at all, and connections are
//! bounded, in number and, where there is a limit, in time. Bodies of requests are not read.

use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;

/// Time for a request's header.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// What is answered.
pub type Body = UnsyncBoxBody<Bytes, Infallible>;

/// Where it is answered.
#[derive(Debug)]
pub enum Listener {
    /// On a TCP address.
    Tcp(TcpListener),
    /// On a unix socket.
    Unix(UnixListener),
}

trait Duplex: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Duplex for T {}

impl Listener {
    async fn accept(&self) -> io::Result<Box<dyn Duplex>> {
        match self {
            Self::Tcp(listener) => Ok(Box::new(listener.accept().await?.0)),
            Self::Unix(listener) => Ok(Box::new(listener.accept().await?.0)),
        }
    }
}

/// What bounds a server.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at once; more wait.
    pub connections: usize,
    /// The life of a connection.
    pub time: Option<Duration>,
}

/// Answers until it is dropped. `name` is the server's in the log.
pub async fn serve<A: Future<Output = Response<Body>> + Send + 'static>(
    name: &'static str,
    listener: Listener,
    limits: Limits,
    answer: impl Fn(Request<Incoming>) -> A + Clone + Send + 'static,
) {
    let connections = Arc::new(Semaphore::new(limits.connections));
    loop {
        // Nobody closes the semaphore.
        let Ok(permit) = Arc::clone(&connections).acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok(stream) => stream,
            Err(error) => {
                log::warn!("{name}: cannot accept a connection: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let answer = answer.clone();
        tokio::spawn(async move {
            let answered = move |request| {
                let answer = answer(request);
                async move { Ok::<_, Infallible>(answer.await) }
            };
            let served = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .max_buf_size(16 << 10)
                .serve_connection(TokioIo::new(stream), service_fn(answered));
            let time = limits.time.unwrap_or(Duration::MAX);
            if let Ok(Err(error)) = tokio::time::timeout(time, served).await {
                log::debug!("{name}: {error}");
            }
            drop(permit);
        });
    }
}

/// A body of this media type.
pub fn respond(kind: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    let kind = HeaderValue::from_static(kind);
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

/// The same, all of it there.
pub fn text(kind: &'static str, text: impl Into<Bytes>) -> Response<Body> {
    respond(kind, Full::new(text.into()).boxed_unsync())
}

/// No, and why.
pub fn refusal(status: StatusCode, why: &str) -> Response<Body> {
    let mut response = text("text/plain", format!("{why}\n"));
    *response.status_mut() = status;
    response
}

/// Asks off the event loops, for what has to wait for a VM's locks.
pub async fn told(ask: impl FnOnce() -> Response<Body> + Send + 'static) -> Response<Body> {
    tokio::task::spawn_blocking(ask)
        .await
        .unwrap_or_else(|e| refusal(StatusCode::INTERNAL_SERVER_ERROR, &e.to_string()))
}
