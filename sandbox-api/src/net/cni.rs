// SPDX-License-Identifier: Apache-2.0
//! The network of a pod that containerd has had made by its CNI plugins, carried into the pod's VM.
//!
//! ```text
//!  host            │ the pod's network namespace        │ VM
//!  bridge ── veth ─┼─ eth0 ◀── redirect ──▶ cloister2 ──┼─ eth0   same name, MAC, MTU, addresses, routes, neighbours
//!                  │ net1  ◀── redirect ──▶ cloister3 ──┼─ net1
//!                  │ lo: port-forward (`forward`)       │ lo: its own
//! ```
//!
//! Nothing of it needs to be recorded: a namespace tells what was done to it, so [`disconnect`] works for pods of a daemon
//! that was killed, and [`connect`] begins with it.

use super::netns::Netns;
use super::survey::{self, Survey};
use super::{Error, redirect};
use cloister_protocol::pod::{Interface, Neighbor, Route};
use std::os::fd::OwnedFd;
use std::path::Path;

/// Most queues of a network device.
pub const MAX_QUEUES: usize = 8;

/// A network card for the guest.
#[derive(Debug)]
pub struct Nic {
    /// The tap, one descriptor per queue; the device is there as long as one of them.
    pub tap: Vec<OwnedFd>,
    /// Hardware address, the interface's own.
    pub mac: [u8; 6],
    /// The network's MTU.
    pub mtu: u16,
    /// How the guest sets it up.
    pub interface: Interface,
}

/// A pod's network: [`PodNet::disconnect`] takes it apart; so does dropping it, but later.
#[derive(Debug)]
pub struct PodNet {
    /// One for each interface but lo. May be taken.
    pub nics: Vec<Nic>,
    /// For the guest.
    pub routes: Vec<Route>,
    /// For the guest.
    pub neighbors: Vec<Neighbor>,
    /// What is to be taken apart.
    netns: Option<Netns>,
}

/// Connects every interface in the namespace but lo. `queues`: of each network card, 1 to 8; as many as the guest has
/// processors are of use.
///
/// # Errors
/// There is an interface or a route that cannot be carried into a guest, or the kernel lacks something; nothing is left
/// behind.
pub async fn connect(netns: &Path, queues: usize) -> Result<PodNet, Error> {
    let netns = Netns::open(netns)?;
    let queues = queues.clamp(1, MAX_QUEUES);
    let kept = netns.clone();
    netns
        .run(async move |handle| {
            redirect::part(&handle).await?;
            let found = survey::look(&handle).await?;
            // From here on, dropping it takes all apart.
            let mut net = PodNet {
                nics: Vec::new(),
                routes: Vec::new(),
                neighbors: Vec::new(),
                netns: Some(kept),
            };
            match join_all(&handle, found, queues, &mut net).await {
                Ok(()) => Ok(net),
                Err(error) => {
                    net.netns = None;
                    drop(net);
                    let _ = redirect::part(&handle).await;
                    Err(error)
                }
            }
        })
        .await
}

async fn join_all(
    handle: &rtnetlink::Handle,
    found: Survey,
    queues: usize,
    net: &mut PodNet,
) -> Result<(), Error> {
    for interface in found.interfaces {
        net.nics.push(Nic {
            tap: redirect::join(handle, &interface, queues).await?,
            mac: interface.mac,
            mtu: interface.mtu,
            interface: interface.interface,
        });
    }
    net.routes = found.routes;
    net.neighbors = found.neighbors;
    Ok(())
}

impl PodNet {
    /// Takes apart what [`connect`] made. Does not need the taps to be closed.
    ///
    /// # Errors
    /// netlink's.
    pub async fn disconnect(mut self) -> Result<(), Error> {
        match self.netns.take() {
            Some(netns) => netns.run(async |handle| redirect::part(&handle).await).await,
            None => Ok(()),
        }
    }
}

impl Drop for PodNet {
    fn drop(&mut self) {
        if let Some(netns) = self.netns.take() {
            let parted = netns.start(async |handle| {
                redirect::part(&handle)
                    .await
                    .inspect_err(|error| log::warn!("{}", crate::error::chain(error)))
            });
            if let Err(error) = parted {
                log::warn!("{}", crate::error::chain(&error));
            }
        }
    }
}

/// Takes apart whatever [`connect`] has made in a namespace, in this process or in one that was killed. A namespace that
/// is gone is no error.
///
/// # Errors
/// netlink's.
pub async fn disconnect(netns: &Path) -> Result<(), Error> {
    let gone = |error: &Error| {
        // Its file is there without it once it has been unmounted.
        matches!(error, Error::Io(_, e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)))
    };
    let parted = async {
        Netns::open(netns)?
            .run(async |handle| redirect::part(&handle).await)
            .await
    };
    match parted.await {
        Err(error) if gone(&error) => Ok(()),
        result => result,
    }
}
