// SPDX-License-Identifier: Apache-2.0
//! Asks a daemon, or a worker of it, on its socket for operators ([`super::admin`]).

use crate::files::SocketPath;
use http::{Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::TokioIo;
use std::io;
use std::path::Path;
use std::time::Duration;
use tokio::net::UnixStream;

/// Asks for `path`, and answers when the answer begins. To be called in a runtime.
///
/// # Errors
/// Nobody listens (`NotFound`, `ConnectionRefused`), the answer does not begin within `patience` (`TimedOut`), or is none.
pub async fn get(socket: &Path, path: &str, patience: Duration) -> io::Result<Response<Incoming>> {
    let short = SocketPath::of(socket)?;
    let stream = UnixStream::connect(short.path()).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(io::Error::other)?;
    // It ends with the answer's body.
    tokio::spawn(connection);
    let request = Request::get(path)
        .header(header::HOST, "cloisterd")
        .body(Empty::<Bytes>::new())
        .map_err(io::Error::other)?;
    tokio::time::timeout(patience, sender.send_request(request))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "it does not answer"))?
        .map_err(io::Error::other)
}

/// The same, and the whole of an answer of up to `limit` bytes.
///
/// # Errors
/// As [`get`]; it refuses, or says more.
pub async fn collect(socket: &Path, path: &str, limit: usize, patience: Duration) -> io::Result<Bytes> {
    let whole = async {
        let answer = get(socket, path, patience).await?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), limit)
            .collect()
            .await
            .map_err(io::Error::other)?
            .to_bytes();
        if status == StatusCode::OK {
            return Ok(body);
        }
        Err(io::Error::other(
            String::from_utf8_lossy(&body).trim_end().to_owned(),
        ))
    };
    tokio::time::timeout(patience, whole)
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "it does not answer"))?
}
