// SPDX-License-Identifier: Apache-2.0
//! The pod's network: links, addresses, routes, neighbours, set over rtnetlink.
//!
//! One request, one acknowledgement, on a blocking socket: the kernel answers within the call. Devices are found by
//! their hardware address in sysfs, so that no dump has to be parsed.

use std::fs;
use std::io;
use std::net::IpAddr;

use cloister_protocol::pod::{Interface, Neighbor, Route};
use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;

/// Index of the loopback device in every network namespace.
const LOOPBACK: u32 = 1;

/// An error that names what was wanted.
fn wrong(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

fn context(text: String) -> impl FnOnce(io::Error) -> io::Error {
    move |e| io::Error::new(e.kind(), format!("{text}: {e}"))
}

/// A connection to the kernel's routing tables.
pub struct Netlink(Socket);

impl Netlink {
    /// Opens one.
    ///
    /// # Errors
    /// As of socket(2).
    pub fn new() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        Ok(Self(socket))
    }

    fn request(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        message.finalize();
        let mut buffer = vec![0; message.buffer_len()];
        message.serialize(&mut buffer);
        self.0.send(&buffer, 0)?;
        let mut answer = [0; 4096];
        let length = self.0.recv(&mut &mut answer[..], 0)?;
        acknowledged(answer.get(..length).unwrap_or_default())
    }

    fn set_link(&self, index: u32, attributes: Vec<LinkAttribute>, up: Option<bool>) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        if let Some(up) = up {
            message.header.change_mask = LinkFlags::Up;
            message.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
        }
        message.attributes = attributes;
        self.request(RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Names, sizes, addresses and starts one device.
    ///
    /// # Errors
    /// InvalidInput for what cannot be read, NotFound without such a device, else the kernel's.
    pub fn interface(&self, interface: &Interface) -> io::Result<()> {
        let mut attributes = Vec::new();
        let (name, index) = if interface.mac.is_empty() {
            (interface.name.clone(), index_of(&interface.name)?)
        } else if let Ok((name, index)) = find_by_mac(&interface.former_mac) {
            let mac = parse_mac(&interface.mac)?.to_vec();
            // IPv6 makes its link-local address of it when the device starts: a template's has never been started.
            attributes.push(LinkAttribute::Address(mac));
            (name, index)
        } else {
            find_by_mac(&interface.mac)?
        };
        if !interface.name.is_empty() && interface.name != name {
            check_name(&interface.name)?;
            // The kernel may have given the name to one that is still to come.
            if let Ok(other) = index_of(&interface.name) {
                self.rename(other, &interface.name, &format!("moved{other}"))?;
            }
            self.rename(index, &name, &interface.name)?;
        }
        let name = if interface.name.is_empty() {
            &name
        } else {
            &interface.name
        };
        if interface.mtu > 0 {
            attributes.push(LinkAttribute::Mtu(interface.mtu));
        }
        self.set_link(index, attributes, Some(true))
            .map_err(context(format!("interface {name} up with MTU {}", interface.mtu)))?;
        for address in &interface.former_addresses {
            let mut message = address_message(index, address)?.1;
            message.attributes.truncate(1);
            if let Err(error) = self.request(RouteNetlinkMessage::DelAddress(message), 0) {
                log::info!("address {address} of interface {name} was not removed: {error}");
            }
        }
        for address in &interface.addresses {
            self.address(index, address, interface.no_prefix_routes)
                .map_err(context(format!("address {address} of interface {name}")))?;
        }
        Ok(())
    }

    fn rename(&self, index: u32, from: &str, to: &str) -> io::Result<()> {
        // A running device keeps its name.
        self.set_link(index, Vec::new(), Some(false))
            .map_err(context(format!("interface {from} down")))?;
        self.set_link(index, vec![LinkAttribute::IfName(to.to_owned())], None)
            .map_err(context(format!("rename of interface {from} to {to}")))
    }

    fn address(&self, index: u32, text: &str, no_prefix_route: bool) -> io::Result<()> {
        let (ip, mut message) = address_message(index, text)?;
        let prefix = message.header.prefix_len;
        let mut flags = AddressFlags::empty();
        if no_prefix_route {
            flags |= AddressFlags::Noprefixroute;
        }
        match ip {
            IpAddr::V4(ip) if prefix < 31 => {
                let host = u32::MAX.checked_shr(u32::from(prefix)).unwrap_or(0);
                message
                    .attributes
                    .push(AddressAttribute::Broadcast((ip.to_bits() | host).into()));
            }
            IpAddr::V4(_) => {}
            // The network behind was given this address by who manages it: no need to wait for a collision.
            IpAddr::V6(_) => flags |= AddressFlags::Nodad,
        }
        message.attributes.push(AddressAttribute::Flags(flags));
        self.request(
            RouteNetlinkMessage::NewAddress(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
    }

    /// Adds one route.
    ///
    /// # Errors
    /// As [`Netlink::interface`].
    pub fn route(&self, route: &Route) -> io::Result<()> {
        let message = route_message(route, index_of)?;
        self.request(
            RouteNetlinkMessage::NewRoute(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
        .map_err(context(format!(
            "route to {:?} through {:?} {:?}",
            route.destination, route.gateway, route.interface
        )))
    }

    /// Adds one static neighbour.
    ///
    /// # Errors
    /// As [`Netlink::interface`].
    pub fn neighbor(&self, neighbor: &Neighbor) -> io::Result<()> {
        let ip = parse_ip(&neighbor.address)?;
        let mut message = NeighbourMessage::default();
        message.header.family = family(ip);
        message.header.ifindex = index_of(&neighbor.interface)?;
        message.header.state = NeighbourState::Permanent;
        let destination = match ip {
            IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
            IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
        };
        message.attributes = vec![
            NeighbourAttribute::Destination(destination),
            NeighbourAttribute::LinkLayerAddress(parse_mac(&neighbor.mac)?.to_vec()),
        ];
        self.request(
            RouteNetlinkMessage::NewNeighbour(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
        .map_err(context(format!("neighbour {}", neighbor.address)))
    }
}

/// What both the adding and the removal of an address say, its local address first.
fn address_message(index: u32, text: &str) -> io::Result<(IpAddr, AddressMessage)> {
    let (ip, prefix) = parse_prefix(text)?;
    let mut message = AddressMessage::default();
    message.header.family = family(ip);
    message.header.prefix_len = prefix;
    message.header.index = index;
    message.header.scope = if ip.is_loopback() {
        AddressScope::Host
    } else {
        AddressScope::Universe
    };
    message.attributes = vec![AddressAttribute::Local(ip), AddressAttribute::Address(ip)];
    Ok((ip, message))
}

/// Starts the loopback device.
///
/// # Errors
/// The kernel's.
pub fn loopback_up() -> io::Result<()> {
    Netlink::new()?.set_link(LOOPBACK, Vec::new(), Some(true))
}

/// Reads the kernel's answer: an nlmsghdr of type NLMSG_ERROR with a negative errno, 0 for success.
fn acknowledged(answer: &[u8]) -> io::Result<()> {
    let word = |at: usize| {
        answer
            .get(at..at + 4)
            .and_then(|b| b.try_into().ok())
            .map(i32::from_ne_bytes)
    };
    let kind = answer
        .get(4..6)
        .and_then(|b| b.try_into().ok())
        .map(u16::from_ne_bytes);
    match (kind, word(16)) {
        (Some(2), Some(0)) => Ok(()),
        (Some(2), Some(errno)) if errno < 0 => Err(io::Error::from_raw_os_error(errno.saturating_neg())),
        _ => Err(io::Error::other("the kernel's answer makes no sense")),
    }
}

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    }
}

fn parse_ip(text: &str) -> io::Result<IpAddr> {
    text.parse()
        .map_err(|_| wrong(format!("{text:?} is no IP address")))
}

/// "10.0.0.1/8"; without a length it is a single address.
fn parse_prefix(text: &str) -> io::Result<(IpAddr, u8)> {
    let bad = || wrong(format!("{text:?} is no IP address with a prefix length"));
    let (ip, length) = match text.split_once('/') {
        Some((ip, length)) => (ip, Some(length)),
        None => (text, None),
    };
    let ip: IpAddr = ip.parse().map_err(|_| bad())?;
    let most = if ip.is_ipv4() { 32 } else { 128 };
    let length = match length {
        Some(length) => length.parse::<u8>().map_err(|_| bad())?,
        None => most,
    };
    if length > most {
        Err(bad())
    } else {
        Ok((ip, length))
    }
}

fn parse_mac(text: &str) -> io::Result<[u8; 6]> {
    let bad = || wrong(format!("{text:?} is no hardware address"));
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|p| p.len() == 2).ok_or_else(bad)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
    }
    if parts.next().is_some() {
        Err(bad())
    } else {
        Ok(mac)
    }
}

/// As the kernel's dev_valid_name.
fn check_name(name: &str) -> io::Result<()> {
    let good = !name.is_empty()
        && name.len() < 16
        && name != "."
        && name != ".."
        && !name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace());
    if good {
        Ok(())
    } else {
        Err(wrong(format!("{name:?} is no interface name")))
    }
}

fn index_of(name: &str) -> io::Result<u32> {
    check_name(name)?;
    fs::read_to_string(format!("/sys/class/net/{name}/ifindex"))
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("there is no interface {name:?}")))
}

fn find_by_mac(mac: &str) -> io::Result<(String, u32)> {
    let wanted = parse_mac(mac)?;
    for entry in fs::read_dir("/sys/class/net")?.flatten() {
        let address = fs::read_to_string(entry.path().join("address")).unwrap_or_default();
        if parse_mac(address.trim()).is_ok_and(|mac| mac == wanted)
            && let Ok(name) = entry.file_name().into_string()
        {
            let index = index_of(&name)?;
            return Ok((name, index));
        }
    }
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        format!("there is no interface with hardware address {mac}"),
    ))
}

fn route_message(route: &Route, index: impl Fn(&str) -> io::Result<u32>) -> io::Result<RouteMessage> {
    let gateway = (!route.gateway.is_empty())
        .then(|| parse_ip(&route.gateway))
        .transpose()?;
    let destination = if route.destination.is_empty() {
        None
    } else {
        Some(parse_prefix(&route.destination)?)
    };
    let v4 = match (destination, gateway) {
        (Some((ip, _)), _) | (None, Some(ip)) => ip.is_ipv4(),
        (None, None) => return Err(wrong("a route needs a destination or a gateway".to_owned())),
    };
    if gateway.is_some_and(|ip| ip.is_ipv4() != v4) {
        return Err(wrong(format!(
            "gateway {} is of another family than {}",
            route.gateway, route.destination
        )));
    }
    let mut message = RouteMessage::default();
    message.header.address_family = if v4 {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    // One without a gateway is what the kernel makes with an address.
    message.header.protocol = match gateway {
        Some(_) => RouteProtocol::Boot,
        None => RouteProtocol::Kernel,
    };
    message.header.kind = RouteType::Unicast;
    message.header.scope = match (u8::try_from(route.scope), gateway) {
        (Ok(0), None) if v4 => RouteScope::Link,
        (Ok(scope), _) => RouteScope::from(scope),
        (Err(_), _) => return Err(wrong(format!("{} is no route scope", route.scope))),
    };
    if route.onlink {
        message.header.flags |= RouteFlags::Onlink;
    }
    if let Some((ip, length)) = destination {
        message.header.destination_prefix_length = length;
        if length > 0 {
            message.attributes.push(RouteAttribute::Destination(ip.into()));
        }
    }
    if let Some(ip) = gateway {
        message.attributes.push(RouteAttribute::Gateway(ip.into()));
    }
    if !route.source.is_empty() {
        message
            .attributes
            .push(RouteAttribute::PrefSource(parse_ip(&route.source)?.into()));
    }
    if !route.interface.is_empty() {
        message
            .attributes
            .push(RouteAttribute::Oif(index(&route.interface)?));
    } else if gateway.is_none() {
        return Err(wrong(format!(
            "the route to {} needs an interface or a gateway",
            route.destination
        )));
    }
    if route.metric > 0 {
        message.attributes.push(RouteAttribute::Priority(route.metric));
    }
    if route.mtu > 0 {
        let mtu = RouteMetric::Mtu(route.mtu);
        message.attributes.push(RouteAttribute::Metrics(vec![mtu]));
    }
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read() {
        assert_eq!(
            parse_prefix("10.0.0.1/8").unwrap(),
            ("10.0.0.1".parse().unwrap(), 8)
        );
        assert_eq!(parse_prefix("fd00::1").unwrap().1, 128);
        for bad in ["", "10.0.0.1/33", "10.0.0/8", "::/129", "10.0.0.1/-1", "x/8"] {
            assert!(parse_prefix(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_mac("02:00:00:00:00:aF").unwrap(), [2, 0, 0, 0, 0, 0xaf]);
        for bad in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:01:02",
            "2:0:0:0:0:1",
            "gg:00:00:00:00:00",
        ] {
            assert!(parse_mac(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_are_the_kernels() {
        for bad in ["", ".", "..", "a/b", "a b", "0123456789abcdef", "a:b"] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
        assert!(check_name("eth0").is_ok());
    }

    #[test]
    fn acknowledgements_are_read() {
        let answer = |kind: u16, errno: i32| {
            let mut bytes = vec![0; 36];
            bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
            bytes[16..20].copy_from_slice(&errno.to_ne_bytes());
            bytes
        };
        assert!(acknowledged(&answer(2, 0)).is_ok());
        assert_eq!(
            acknowledged(&answer(2, -17)).unwrap_err().raw_os_error(),
            Some(17)
        );
        assert!(acknowledged(&answer(3, 0)).is_err());
        assert!(acknowledged(&answer(2, i32::MIN)).is_err());
        assert!(acknowledged(&[]).is_err());
    }

    fn route(destination: &str, gateway: &str, interface: &str) -> io::Result<RouteMessage> {
        let route = Route {
            destination: destination.into(),
            gateway: gateway.into(),
            interface: interface.into(),
            ..Default::default()
        };
        route_message(&route, |_| Ok(7))
    }

    #[test]
    fn a_default_route() {
        let message = route("", "10.0.0.1", "").unwrap();
        assert_eq!(message.header.destination_prefix_length, 0);
        assert_eq!(message.header.scope, RouteScope::Universe);
        assert_eq!(
            message.attributes,
            [RouteAttribute::Gateway(
                "10.0.0.1".parse::<IpAddr>().unwrap().into()
            )]
        );
        assert_eq!(
            route("::/0", "fd00::1", "").unwrap().header.address_family,
            AddressFamily::Inet6
        );
    }

    #[test]
    fn an_on_link_route() {
        let message = route("169.254.1.1/32", "", "eth0").unwrap();
        assert_eq!(message.header.scope, RouteScope::Link);
        assert!(message.attributes.contains(&RouteAttribute::Oif(7)));
    }

    #[test]
    fn routes_that_lead_nowhere() {
        assert!(route("", "", "eth0").is_err());
        assert!(route("10.0.0.0/8", "", "").is_err());
        assert!(route("10.0.0.0/8", "fd00::1", "").is_err());
    }
}
