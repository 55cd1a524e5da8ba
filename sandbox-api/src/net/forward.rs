// SPDX-License-Identifier: Apache-2.0
//! Connections to the loopback device of a pod's network namespace, carried into its VM: what `kubectl port-forward` needs.
//!
//! For a port-forward containerd dials localhost in the pod's namespace on the host, where nothing listens: the programs
//! are in the VM. One listener per pod takes the connections to every port (see [`sk_lookup`]), and each goes
//! through vsock to the agent, which dials localhost inside.
//!
//! ```text
//!  containerd ── 127.0.0.1:80 ──▶ listener ── vsock FORWARD_PORT: "tcp 80\n" ──▶ agent ──▶ 127.0.0.1:80, else [::1]:80
//! ```
//!
//! A connection is accepted before it is known whether something listens in the VM; if not, it is reset at once.

use super::netns::Netns;
use super::{Error, sk_lookup};
use crate::pod::guest::Guest;
use cloister_protocol::{FORWARD_PORT, forward};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener as StdListener};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional_with_sizes};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::task::{JoinHandle, JoinSet};

/// Time for the agent to connect. It takes long only when the program inside does not accept.
const PATIENCE: Duration = Duration::from_secs(30);
const BACKLOG: i32 = 1024;
/// Bytes on their way, in each direction of a connection.
const BUFFER: usize = 16 << 10;

/// Takes connections until it is dropped, and with it what it carries.
#[derive(Debug)]
pub struct Forwarder {
    task: JoinHandle<()>,
    _link: OwnedFd,
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Forwarder {
    /// Starts to listen. The namespace's loopback device must be up.
    ///
    /// # Errors
    /// The kernel lacks SK_LOOKUP (Linux 5.9), or we the right.
    pub async fn start(netns: &Path, guest: Arc<dyn Guest>) -> Result<Self, Error> {
        let netns = Netns::open(netns)?;
        let failed = |e: io::Error| Error::Io("listen on the pod's loopback device (is lo up?)".into(), e);
        let listener = netns.run(async move |_| listener().map_err(failed)).await?;
        let link = sk_lookup::steer(netns.as_fd(), listener.as_fd())
            .map_err(|e| Error::Io("attach a BPF program of type SK_LOOKUP".into(), e))?;
        let listener = TcpListener::from_std(listener).map_err(failed)?;
        Ok(Self {
            task: tokio::spawn(accept(listener, guest)),
            _link: link,
        })
    }
}

/// For both families, or for IPv4 where there is no other. A socket that is bound to one IPv6 address takes no IPv4.
fn listener() -> io::Result<StdListener> {
    let listen_at = |family, ip: std::net::IpAddr| {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(family, SocketType::STREAM, flags, None)?;
        if family == AddressFamily::INET6 {
            sockopt::set_ipv6_v6only(&socket, false)?;
        }
        bind(&socket, &SocketAddr::new(ip, 0))?;
        listen(&socket, BACKLOG)?;
        Ok(StdListener::from(socket))
    };
    listen_at(AddressFamily::INET6, Ipv6Addr::UNSPECIFIED.into())
        .or_else(|_: io::Error| listen_at(AddressFamily::INET, Ipv4Addr::LOCALHOST.into()))
}

async fn accept(listener: TcpListener, guest: Arc<dyn Guest>) {
    // Dropped with this task, it ends those in it.
    let mut connections = JoinSet::new();
    loop {
        match listener.accept().await {
            Ok((client, _)) => drop(connections.spawn(carry(client, Arc::clone(&guest)))),
            // Out of descriptors: the connections there are will end some time.
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
        while connections.try_join_next().is_some() {}
    }
}

async fn carry(mut client: TcpStream, guest: Arc<dyn Guest>) {
    if let Err(error) = carry_to(&mut client, &*guest).await {
        log::debug!("port-forward: {error}");
        // Closed so, it is reset.
        let _ = sockopt::set_socket_linger(&client, Some(Duration::ZERO));
    }
}

async fn carry_to(client: &mut TcpStream, guest: &dyn Guest) -> io::Result<()> {
    client.set_nodelay(true)?;
    let local = client.local_addr()?;
    if !local.ip().to_canonical().is_loopback() {
        // Dialled by the listener's own number, on another address.
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let stream = guest.connect(FORWARD_PORT)?;
    stream.set_nonblocking(true)?;
    let mut server = UnixStream::from_std(stream)?;
    let connected = async {
        server.write_all(forward::header(local.port()).as_bytes()).await?;
        let mut answer = [0; forward::CONNECTED.len()];
        server.read_exact(&mut answer).await?;
        Ok(answer)
    };
    match tokio::time::timeout(PATIENCE, connected).await? {
        Ok(answer) if answer == *forward::CONNECTED => {}
        Ok(_) => return Err(io::Error::other("the agent's answer makes no sense")),
        Err(error) => return Err(error),
    }
    copy_bidirectional_with_sizes(client, &mut server, BUFFER, BUFFER).await?;
    Ok(())
}
