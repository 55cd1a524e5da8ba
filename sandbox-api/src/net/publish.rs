// SPDX-License-Identifier: Apache-2.0
//! Published ports: a TCP listener on the host whose connections are carried to the pod's address.
//!
//! A user-space relay works for every address of the host, loopback included, and leaves nothing behind. The pod sees the
//! host's end of the tap as the client's address.

use crate::pod::state::Publish;
use std::net::{IpAddr, SocketAddr};
use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::{TcpListener, TcpStream};

/// Listeners of one pod; dropped, they close.
#[derive(Debug)]
pub struct Relays {
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Drop for Relays {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Starts to listen.
///
/// # Errors
/// A port is taken.
pub async fn start(ports: &[Publish], pod: IpAddr) -> Result<Relays, super::Error> {
    let mut relays = Relays { tasks: Vec::new() };
    for port in ports {
        let at = SocketAddr::new(port.host_ip, port.host_port);
        let listener = TcpListener::bind(at)
            .await
            .map_err(|e| super::Error::Io(format!("publish port {at} (is it in use?)"), e))?;
        let target = SocketAddr::new(pod, port.container_port);
        relays.tasks.push(tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((client, _)) => drop(tokio::spawn(relay(client, target))),
                    // Out of descriptors: the connections there are will end some time.
                    Err(_) => tokio::time::sleep(std::time::Duration::from_millis(100)).await,
                }
            }
        }));
    }
    Ok(relays)
}

async fn relay(mut client: TcpStream, target: SocketAddr) {
    match TcpStream::connect(target).await {
        Ok(mut server) => {
            let _ = copy_bidirectional_with_sizes(&mut client, &mut server, 16 << 10, 16 << 10).await;
        }
        Err(error) => log::debug!("published port: {target}: {error}"),
    }
}
