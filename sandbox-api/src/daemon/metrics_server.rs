// SPDX-License-Identifier: Apache-2.0
//! Serves the metrics over HTTP/1.1: `GET /metrics`. Who asks has no rights and is not trusted: headers come within
//! seconds or not at all, bodies are not read, and connections are bounded.

use super::metrics::{CONTENT_TYPE, Metrics};
use super::quantity::Listen;
use crate::files::SocketPath;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;

/// Connections at once; scrapers have one.
const MAX_CONNECTIONS: usize = 16;
/// Time for a request's header, and for the whole of a connection.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(300);

/// A server that is bound and does not answer yet.
#[derive(Debug)]
pub enum Server {
    /// On a TCP address.
    Tcp(TcpListener),
    /// On a unix socket, root's only.
    Unix(UnixListener),
}

impl Server {
    /// Binds the address, so that its errors are told when the daemon starts. To be called in a runtime.
    ///
    /// # Errors
    /// It is taken, or not ours to take.
    pub async fn bind(listen: &Listen) -> io::Result<Self> {
        match listen {
            Listen::Tcp(address) => TcpListener::bind(address).await.map(Self::Tcp),
            Listen::Unix(path) => bind_unix(path).await.map(Self::Unix),
        }
    }

    /// Where it listens, for an address whose port was 0.
    ///
    /// # Errors
    /// getsockname(2) failed; it is a unix socket.
    pub fn tcp_address(&self) -> io::Result<std::net::SocketAddr> {
        match self {
            Self::Tcp(listener) => listener.local_addr(),
            Self::Unix(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Answers until it is dropped.
    pub async fn serve(self, metrics: Metrics) {
        let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            // Nobody closes the semaphore.
            let Ok(permit) = Arc::clone(&connections).acquire_owned().await else {
                return;
            };
            let accepted = match &self {
                Self::Tcp(listener) => listener.accept().await.map(|(stream, _)| Stream::Tcp(stream)),
                Self::Unix(listener) => listener.accept().await.map(|(stream, _)| Stream::Unix(stream)),
            };
            let metrics = metrics.clone();
            match accepted {
                Ok(stream) => {
                    tokio::spawn(async move {
                        let served = async {
                            match stream {
                                Stream::Tcp(stream) => connection(stream, metrics).await,
                                Stream::Unix(stream) => connection(stream, metrics).await,
                            }
                        };
                        let _ = tokio::time::timeout(CONNECTION_TIMEOUT, served).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    log::warn!("metrics: cannot accept a connection: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

enum Stream {
    Tcp(tokio::net::TcpStream),
    Unix(tokio::net::UnixStream),
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
    let listener = UnixListener::bind(short.path())?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

async fn connection(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, metrics: Metrics) {
    let answer = service_fn(move |request| answer(request, metrics.clone()));
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(16 << 10)
        .serve_connection(TokioIo::new(stream), answer)
        .await;
    if let Err(error) = served {
        log::debug!("metrics: {error}");
    }
}

async fn answer(request: Request<Incoming>, metrics: Metrics) -> Result<Response<Full<Bytes>>, Infallible> {
    let (status, body) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => {
            // It asks each VM, which may have to wait for a lock.
            match tokio::task::spawn_blocking(move || metrics.encode()).await {
                Ok(text) => (StatusCode::OK, text),
                Err(_) => (StatusCode::INTERNAL_SERVER_ERROR, String::new()),
            }
        }
        (_, "/metrics") => (StatusCode::METHOD_NOT_ALLOWED, "only GET\n".to_owned()),
        _ => (StatusCode::NOT_FOUND, "metrics are at /metrics\n".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let content_type = http::HeaderValue::from_static(CONTENT_TYPE);
    response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::super::metrics::tests::metrics;
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

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
        let task = tokio::spawn(server.serve(metrics()));
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
        let task = tokio::spawn(server.serve(metrics()));
        let stream = tokio::net::UnixStream::connect(&path).await.unwrap();
        let answer = exchange(stream, "GET /metrics HTTP/1.0\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.0 200"), "{answer}");
        task.abort();
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
