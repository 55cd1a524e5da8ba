// SPDX-License-Identifier: Apache-2.0
//! What the CNI plugins have made of a pod's network namespace, read so that a guest can be made the same.
//!
//! All routes of the main table are taken, those included that the kernel adds for an address: a plugin may have removed
//! or replaced them (ptp does), so the guest is told to add none of its own ([`Interface::no_prefix_routes`]). What the
//! guest's kernel finds out by itself is left to it: link-local addresses, and what routers advertise.

use super::Error;
use cloister_protocol::pod::{Interface, Neighbor, Route};
use futures_util::{Stream, TryStreamExt};
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
    RouteType,
};
use rtnetlink::{Handle, RouteMessageBuilder};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An interface to be connected to the guest.
#[derive(Debug, PartialEq)]
pub(super) struct Found {
    pub index: u32,
    pub mac: [u8; 6],
    pub mtu: u16,
    pub interface: Interface,
}

/// The pod's network.
#[derive(Debug, Default)]
pub(super) struct Survey {
    pub interfaces: Vec<Found>,
    pub routes: Vec<Route>,
    pub neighbors: Vec<Neighbor>,
}

impl Survey {
    fn interface(&mut self, index: u32) -> Option<&mut Found> {
        self.interfaces.iter_mut().find(|found| found.index == index)
    }

    fn name(&self, index: u32) -> Option<String> {
        let found = self.interfaces.iter().find(|found| found.index == index)?;
        Some(found.interface.name.clone())
    }
}

/// Reads it.
///
/// # Errors
/// There is something that a guest cannot be given.
pub(super) async fn look(handle: &Handle) -> Result<Survey, Error> {
    let mut survey = Survey::default();
    for link in all("list interfaces", handle.link().get().execute()).await? {
        if let Some(found) = interface(&link)? {
            let twin = survey.interfaces.iter().find(|other| other.mac == found.mac);
            if let Some(twin) = twin {
                let why = format!("has the hardware address of {}", twin.interface.name);
                return Err(Error::Interface(found.interface.name, why));
            }
            survey.interfaces.push(found);
        }
    }
    for message in all("list addresses", handle.address().get().execute()).await? {
        if let Some(found) = survey.interface(message.header.index) {
            found.interface.addresses.extend(address(&message));
        }
    }
    for request in [
        RouteMessageBuilder::<Ipv4Addr>::new().build(),
        RouteMessageBuilder::<Ipv6Addr>::new().build(),
    ] {
        for message in all("list routes", handle.route().get(request).execute()).await? {
            let route = route(&message, |index| survey.name(index))?;
            survey.routes.extend(route);
        }
    }
    for message in all("list neighbours", handle.neighbours().get().execute()).await? {
        let neighbor = neighbor(&message, |index| survey.name(index));
        survey.neighbors.extend(neighbor);
    }
    Ok(survey)
}

/// The whole of a dump.
pub(super) async fn all<T>(
    what: &str,
    dump: impl Stream<Item = Result<T, rtnetlink::Error>>,
) -> Result<Vec<T>, Error> {
    dump.try_collect()
        .await
        .map_err(|e| Error::Netlink(what.to_owned(), e))
}

/// The name of an interface, for messages at least.
pub(super) fn name(link: &LinkMessage) -> String {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.clone()),
            _ => None,
        })
        .unwrap_or_else(|| format!("interface {}", link.header.index))
}

/// An interface that leads out of the namespace. Those that are down are not in use: kernels put tunnels into every
/// namespace.
fn interface(link: &LinkMessage) -> Result<Option<Found>, Error> {
    let flags = link.header.flags;
    if flags.contains(LinkFlags::Loopback) || !flags.contains(LinkFlags::Up) {
        return Ok(None);
    }
    let name = name(link);
    let refuse = |why: &str| Err(Error::Interface(name.clone(), why.to_owned()));
    let (mut mac, mut mtu, mut below, mut elsewhere) = (None, None, None, false);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::Address(bytes) => mac = <[u8; 6]>::try_from(bytes.as_slice()).ok(),
            LinkAttribute::Mtu(number) => mtu = u16::try_from(*number).ok(),
            LinkAttribute::Link(index) => below = Some(*index),
            LinkAttribute::LinkNetNsId(_) => elsewhere = true,
            LinkAttribute::Controller(index) if *index > 0 => {
                return refuse("is a port of another interface in the pod's network namespace");
            }
            _ => {}
        }
    }
    if link.header.link_layer_type != LinkLayerType::Ether || flags.contains(LinkFlags::Noarp) {
        return refuse(
            "is not Ethernet (only interfaces that are can be connected, such as veth and macvlan)",
        );
    }
    // The other end of a veth, or what a macvlan sits on, is in another namespace.
    if below.is_some_and(|index| index != 0 && index != link.header.index) && !elsewhere {
        return refuse("sits on another interface in the pod's network namespace");
    }
    let (Some(mac), Some(mtu)) = (mac, mtu) else {
        return refuse("has no hardware address or no MTU");
    };
    Ok(Some(Found {
        index: link.header.index,
        mac,
        mtu,
        interface: Interface {
            mac: mac_text(&mac),
            name,
            mtu: mtu.into(),
            no_prefix_routes: true,
            ..Default::default()
        },
    }))
}

/// "02:c1:00:00:00:01".
pub(crate) fn mac_text(mac: &[u8]) -> String {
    let bytes: Vec<String> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(":")
}

fn address(message: &AddressMessage) -> Option<String> {
    let (mut local, mut peer) = (None, None);
    let mut permanent = message.header.flags.contains(AddressHeaderFlags::Permanent);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => peer = Some(*ip),
            AddressAttribute::Flags(flags) => permanent = flags.contains(AddressFlags::Permanent),
            _ => {}
        }
    }
    let ip = local.or(peer)?;
    // An IPv4 address with a lifetime is DHCP's, which the plugin renews here and not in the guest.
    let own = message.header.scope == AddressScope::Link || ip.is_ipv6() && !permanent;
    if own {
        return None;
    }
    let single = if ip.is_ipv4() { 32 } else { 128 };
    // The length of an address with a peer is the peer's.
    let length = match peer {
        Some(peer) if peer != ip => single,
        _ => message.header.prefix_len,
    };
    Some(format!("{ip}/{length}"))
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}

fn route(message: &RouteMessage, name: impl Fn(u32) -> Option<String>) -> Result<Option<Route>, Error> {
    let header = &message.header;
    if header.kind != RouteType::Unicast
        || header.flags.contains(RouteFlags::Cloned)
        || matches!(header.protocol, RouteProtocol::Ra | RouteProtocol::IcmpRedirect)
    {
        return Ok(None);
    }
    let any: IpAddr = if header.address_family == AddressFamily::Inet {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let (mut destination, mut output, mut strange) = (any, None, None);
    let mut route = Route {
        scope: u8::from(header.scope).into(),
        onlink: header.flags.contains(RouteFlags::Onlink),
        ..Default::default()
    };
    let text = |address: &RouteAddress| ip(address).map(|ip| ip.to_string()).unwrap_or_default();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(table) if *table != u32::from(RouteHeader::RT_TABLE_MAIN) => {
                return Ok(None);
            }
            RouteAttribute::Destination(address) => destination = ip(address).unwrap_or(any),
            RouteAttribute::Gateway(address) => route.gateway = text(address),
            RouteAttribute::PrefSource(address) => route.source = text(address),
            RouteAttribute::Oif(index) => output = Some(*index),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    if let RouteMetric::Mtu(mtu) = metric {
                        route.mtu = *mtu;
                    }
                }
            }
            RouteAttribute::MultiPath(_) => strange = Some("several next hops"),
            RouteAttribute::Via(_) => strange = Some("a gateway of another address family"),
            RouteAttribute::Encap(_) => strange = Some("an encapsulation"),
            RouteAttribute::Source(_) => strange = Some("a source prefix"),
            _ => {}
        }
    }
    if header.table != RouteHeader::RT_TABLE_MAIN {
        return Ok(None);
    }
    route.destination = format!("{destination}/{}", header.destination_prefix_length);
    if let Some(strange) = strange {
        return Err(Error::Route(route.destination, strange));
    }
    // Link-local ones come with the interface.
    let own = match destination {
        IpAddr::V4(_) => false,
        IpAddr::V6(ip) => ip.is_unicast_link_local() || ip.is_multicast(),
    };
    match output.and_then(name) {
        Some(interface) if !own => route.interface = interface,
        _ => return Ok(None),
    }
    Ok(Some(route))
}

fn neighbor(message: &NeighbourMessage, name: impl Fn(u32) -> Option<String>) -> Option<Neighbor> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let (mut address, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => address = Some(ip.to_string()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => address = Some(ip.to_string()),
            NeighbourAttribute::LinkLayerAddress(bytes) if bytes.len() == 6 => mac = Some(mac_text(bytes)),
            _ => {}
        }
    }
    Some(Neighbor {
        address: address?,
        mac: mac?,
        interface: name(message.header.ifindex)?,
        ..Default::default()
    })
}
