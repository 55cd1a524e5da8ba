// SPDX-License-Identifier: Apache-2.0
//! Connections that the host carries to programs in the pod: what they are is in [`cloister_protocol::forward`].

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use cloister_protocol::forward::{CONNECTED, MAX_HEADER, parse};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy_bidirectional};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_vsock::VsockListener;

/// Most connections at a time; more wait.
const MAX_CONNECTIONS: usize = 512;
/// The header comes with the connection.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// Takes connections for ever.
pub async fn serve(listener: OwnedFd) {
    let listener = VsockListener::from(listener);
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        match listener.accept().await {
            Ok((stream, _)) => drop(tokio::spawn(async move {
                if let Err(error) = carry(stream).await {
                    log::debug!("forwarded connection: {error}");
                }
                drop(place);
            })),
            Err(error) => {
                log::warn!("forwarded connections: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn carry(mut host: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    let port = tokio::time::timeout(HEADER_TIMEOUT, header(&mut host)).await??;
    let mut program = connect(port).await?;
    program.set_nodelay(true)?;
    host.write_all(CONNECTED).await?;
    copy_bidirectional(&mut host, &mut program).await?;
    Ok(())
}

async fn header(host: &mut (impl AsyncRead + Unpin)) -> io::Result<u16> {
    let mut line = Vec::with_capacity(MAX_HEADER);
    while line.last() != Some(&b'\n') && line.len() < MAX_HEADER {
        line.push(host.read_u8().await?);
    }
    parse(&line).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no header"))
}

async fn connect(port: u16) -> io::Result<TcpStream> {
    match TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).await {
        Ok(stream) => Ok(stream),
        Err(_) => TcpStream::connect(SocketAddr::from((Ipv6Addr::LOCALHOST, port))).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::{TcpListener, UnixStream};

    #[tokio::test]
    async fn both_ways_with_an_end_each() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let (mut host, ours) = UnixStream::pair().unwrap();
            let carried = tokio::spawn(carry(ours));
            host.write_all(format!("tcp {port}\nhello").as_bytes())
                .await
                .unwrap();
            host.shutdown().await.unwrap();
            let (mut program, _) = listener.accept().await.unwrap();
            let mut text = String::new();
            program.read_to_string(&mut text).await.unwrap();
            assert_eq!(text, "hello");
            // Its own direction is still open.
            program.write_all(b"world").await.unwrap();
            drop(program);
            let mut text = String::new();
            host.read_to_string(&mut text).await.unwrap();
            assert_eq!(text, "ok\nworld");
            carried.await.unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn nobody_listens_or_nothing_is_said() {
        // Bound, so that no other test gets it, and not listening.
        let idle = tokio::net::TcpSocket::new_v4().unwrap();
        idle.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let port = idle.local_addr().unwrap().port();
        for said in [
            format!("tcp {port}\n"),
            "tcp 1234567890\n".into(),
            "udp 1\n".into(),
        ] {
            let (mut host, ours) = UnixStream::pair().unwrap();
            host.write_all(said.as_bytes()).await.unwrap();
            carry(ours).await.unwrap_err();
            let mut answer = Vec::new();
            // What was not read makes the end a reset.
            let _ = host.read_to_end(&mut answer).await;
            assert_eq!(answer, b"");
        }
    }
}
