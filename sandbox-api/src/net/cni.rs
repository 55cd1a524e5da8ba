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
//! Nothing of it needs to be recorded: a namespace tells what was done to it, so [`disconnect_soon`] works for pods of a
//! daemon that was killed, and [`connect`] begins with the same.

use super::netns::Netns;
use super::survey::{self, Found};
use super::{Error, redirect};
use cloister_devices::net::{NetBackend, NetConfig};
use cloister_protocol::pod::{Interface, Neighbor, Route};
use std::net::IpAddr;
use std::path::Path;

/// Most queues of a network device.
pub const MAX_QUEUES: usize = 8;

/// A pod's network: [`PodNet::disconnect`] takes it apart; so does dropping it, but later.
#[derive(Debug)]
pub struct PodNet {
    cards: Vec<NetConfig>,
    /// How the guest sets up the cards: each with its interface's own name, hardware address, MTU and addresses.
    pub interfaces: Vec<Interface>,
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
                cards: Vec::new(),
                interfaces: Vec::new(),
                routes: found.routes,
                neighbors: found.neighbors,
                netns: Some(kept),
            };
            match join_all(&handle, found.interfaces, queues, &mut net).await {
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
    interfaces: Vec<Found>,
    queues: usize,
    net: &mut PodNet,
) -> Result<(), Error> {
    for found in interfaces {
        net.cards.push(NetConfig {
            backend: NetBackend::Tap(redirect::join(handle, &found, queues).await?),
            mac: found.mac,
            mtu: Some(found.mtu),
        });
        net.interfaces.push(found.interface);
    }
    Ok(())
}

impl PodNet {
    /// The VM's network cards, in the order of the interfaces; once.
    pub fn take_cards(&mut self) -> Vec<NetConfig> {
        std::mem::take(&mut self.cards)
    }

    /// The pod's addresses, in the order of the interfaces.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let texts = self.interfaces.iter().flat_map(|interface| &interface.addresses);
        texts
            .filter_map(|text| text.split('/').next()?.parse().ok())
            .collect()
    }

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
            part_soon(&netns);
        }
    }
}

/// Takes apart whatever [`connect`] has made in a namespace, in this process or in one that was killed; does not wait for it.
/// A namespace that is gone is no error.
pub fn disconnect_soon(netns: &Path) {
    match Netns::open(netns) {
        Ok(netns) => part_soon(&netns),
        Err(error) => log::debug!("{}", crate::error::chain(&error)),
    }
}

fn part_soon(netns: &Netns) {
    let part = async |handle| {
        redirect::part(&handle)
            .await
            .inspect_err(|error| log::warn!("{}", crate::error::chain(error)))
    };
    if let Err(error) = netns.start(part) {
        log::warn!("{}", crate::error::chain(&error));
    }
}
