// SPDX-License-Identifier: Apache-2.0
//! Serves the metrics over HTTP/1.1: `GET /metrics`.

use super::http_server::{self, Body, Limits, Listener};
use super::metrics::CONTENT_TYPE;
use super::quantity::Listen;
use crate::files::{self, SocketPath};
use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::Duration;
use tokio::net::{TcpListener, UnixListener};

/// Scrapers have one connection.
const LIMITS: Limits = Limits {
    connections: 16,
    time: Some(Duration::from_secs(300)),
};

/// A server that is bound and does not answer yet.
#[derive(Debug)]
pub struct Server(Listener);

impl Server {
    /// Binds the address, so that its errors are told when the daemon starts. To be called in a runtime.
    ///
    /// # Errors
    /// It is taken, or not ours to take.
    pub async fn bind(listen: &Listen) -> io::Result<Self> {
        Ok(Self(match listen {
            Listen::Tcp(address) => Listener::Tcp(TcpListener::bind(address).await?),
            Listen::Unix(path) => Listener::Unix(bind_unix(path).await?),
        }))
    }

    /// Where it listens, for an address whose port was 0.
    ///
    /// # Errors
    /// getsockname(2) failed; it is a unix socket.
    pub fn tcp_address(&self) -> io::Result<std::net::SocketAddr> {
        match &self.0 {
            Listener::Tcp(listener) => listener.local_addr(),
            Listener::Unix(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Answers with what `scrape` says, until it is dropped.
    pub async fn serve<S: Future<Output = String> + Send + 'static>(
        self,
        scrape: impl Fn() -> S + Clone + Send + 'static,
    ) {
        let answer = move |request| answer(request, scrape.clone());
        http_server::serve("metrics", self.0, LIMITS, answer).await;
    }
}

/// A socket that nobody answers on is left over and replaced.
async fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    let short = SocketPath::of(path)?;
    if std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
        if tokio::net::UnixStream::connect(short.path()).await.is_ok() {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        std::fs::remove_file(path)?;
    }
    UnixListener::from_std(files::listen(path)?)
}

async fn answer<S: Future<Output = String>>(
    request: Request<Incoming>,
    scrape: impl Fn() -> S,
) -> Response<Body> {
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => http_server::text(CONTENT_TYPE, scrape().await),
        (_, "/metrics") => http_server::refusal(StatusCode::METHOD_NOT_ALLOWED, "only GET"),
        _ => http_server::refusal(StatusCode::NOT_FOUND, "metrics are at /metrics"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::metrics::tests::metrics;
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

    async fn exchange(mut stream: impl AsyncRead + AsyncWrite + Unpin, request: &str) -> String {
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn over_tcp() {
        let server = Server::bind(&"127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = server.tcp_address().unwrap();
        let task = tokio::spawn(server.serve(|| async { metrics().encode() }));
        for (request, status, body) in [
            ("GET /metrics", "200 OK", "# TYPE cloister_pods gauge"),
            ("GET /", "404", "metrics are at"),
            ("POST /metrics", "405", "only GET"),
            ("bogus", "400", ""),
        ] {
            let stream = tokio::net::TcpStream::connect(address).await.unwrap();
            let request = format!("{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
            let answer = exchange(stream, &request).await;
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status}")),
                "{request}: {answer}"
            );
            assert!(answer.contains(body), "{request}: {answer}");
        }
        assert!(
            Server::bind(&Listen::Tcp(address)).await.is_err(),
            "the port is taken"
        );
        task.abort();
    }

    #[tokio::test]
    async fn over_a_unix_socket() {
        let directory = std::env::temp_dir().join(format!("cloister-metrics-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join("m.sock");
        let listen = Listen::Unix(path.clone());
        // What a daemon that was killed leaves behind.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let server = Server::bind(&listen).await.unwrap();
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert!(Server::bind(&listen).await.is_err(), "somebody answers there");
        let task = tokio::spawn(server.serve(|| async { metrics().encode() }));
        let stream = tokio::net::UnixStream::connect(&path).await.unwrap();
        let answer = exchange(stream, "GET /metrics HTTP/1.0\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.0 200"), "{answer}");
        task.abort();
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
