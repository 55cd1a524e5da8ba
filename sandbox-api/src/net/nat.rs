// SPDX-License-Identifier: Apache-2.0
//! A pod behind the host's addresses.

use super::{Error, NetRecord, tap};
use crate::pod::state::Pods;
use futures_util::TryStreamExt;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};
use serde_json::json;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// Where the /30 subnets come from.
pub const POOL: &str = "10.213.0.0/16";
const POOL_BASE: u32 = 0x0ad5_0000;
const POOL_SUBNETS: u32 = 1 << 14;

/// A pod's nat network, made.
#[derive(Debug)]
pub struct Nat {
    /// For the record and for [`remove`].
    pub record: NetRecord,
    /// The tap's queue.
    pub tap: OwnedFd,
    /// The pod's address; the prefix length is 30.
    pub address: Ipv4Addr,
    /// The host's address, the pod's gateway.
    pub gateway: Ipv4Addr,
    /// The pod's hardware address.
    pub mac: [u8; 6],
}

fn netlink(what: &str) -> impl FnOnce(rtnetlink::Error) -> Error {
    let what = what.to_owned();
    move |error| Error::Netlink(what, error)
}

/// Makes tap, addresses, forwarding and masquerade. The caller holds the pods' lock, and then writes the record.
///
/// # Errors
/// No rights, no tun, no nft; nothing is left behind.
pub async fn create(pods: &Pods, id: &str) -> Result<Nat, Error> {
    let taken: Vec<Ipv4Addr> = pods
        .list()
        .map_err(|e| Error::Io("read the pods' records".into(), io::Error::other(e)))?
        .into_iter()
        .filter_map(|record| record.net.map(|net| net.subnet))
        .collect();
    let (connection, handle, _) =
        rtnetlink::new_connection().map_err(|e| Error::Io("open a netlink socket".into(), e))?;
    let connection = tokio::spawn(connection);
    let result = create_with(pods, &handle, id, &taken).await;
    connection.abort();
    result
}

async fn create_with(pods: &Pods, handle: &Handle, id: &str, taken: &[Ipv4Addr]) -> Result<Nat, Error> {
    let mut routes = Vec::new();
    let mut dump = handle
        .route()
        .get(RouteMessageBuilder::<Ipv4Addr>::new().build())
        .execute();
    while let Some(route) = dump.try_next().await.map_err(netlink("list routes"))? {
        routes.extend(destination(&route));
    }
    // Begin somewhere in the pool: an address just freed is not the next one given.
    let mut start = [0_u8; 2];
    crate::ids::fill(&mut start);
    let subnet =
        choose(taken, &routes, u32::from(u16::from_ne_bytes(start))).ok_or(Error::PoolExhausted(POOL))?;
    let gateway = Ipv4Addr::from(u32::from(subnet).wrapping_add(1));
    let address = Ipv4Addr::from(u32::from(subnet).wrapping_add(2));

    let name = format!("clo{}", id.get(..10).unwrap_or(id));
    let tap = tap::open(&name)?;
    // From here on dropping `tap` removes the device and its addresses.
    let mut links = handle.link().get().match_name(name.clone()).execute();
    let link = links.try_next().await.map_err(netlink("find the tap"))?;
    let index = link.map(|link| link.header.index).ok_or_else(|| {
        Error::Io(
            format!("find the tap {name}"),
            io::Error::from(io::ErrorKind::NotFound),
        )
    })?;
    handle
        .address()
        .add(index, gateway.into(), 30)
        .execute()
        .await
        .map_err(netlink("give the tap its address"))?;
    handle
        .link()
        .set(LinkUnspec::new_with_index(index).up().build())
        .execute()
        .await
        .map_err(netlink("set the tap up"))?;
    let record = NetRecord { tap: name, subnet };
    forwarding_on(pods)?;
    if let Err(error) = apply(&rules(&record, address)) {
        let _ = forwarding_off(pods, taken.is_empty());
        return Err(Error::Nft("set up masquerading", Box::new(error)));
    }
    let octets = address.octets();
    let mac = [0x02, 0xc1, octets[0], octets[1], octets[2], octets[3]];
    Ok(Nat {
        record,
        tap,
        address,
        gateway,
        mac,
    })
}

/// Removes what [`create`] made, but for the tap, which goes with its descriptor. The caller holds the pods' lock;
/// `others` tells whether other pods still use forwarding.
///
/// # Errors
/// nft failed.
pub fn remove(pods: &Pods, record: &NetRecord, others: bool) -> Result<(), Error> {
    let table = table(record);
    // "add" makes the removal of one that is not there no error.
    let payload = json!({"nftables": [{"add": {"table": table}}, {"delete": {"table": table}}]});
    apply(&payload).map_err(|e| Error::Nft("remove masquerading", Box::new(e)))?;
    forwarding_off(pods, !others)
}

fn apply(payload: &serde_json::Value) -> Result<(), nftables::helper::NftablesError> {
    nftables::helper::apply_ruleset_raw(
        &payload.to_string(),
        nftables::helper::DEFAULT_NFT,
        nftables::helper::DEFAULT_ARGS,
    )
    .map(|_| ())
}

fn table(record: &NetRecord) -> serde_json::Value {
    json!({"family": "ip", "name": format!("cloister-{}", record.tap)})
}

fn rules(record: &NetRecord, address: Ipv4Addr) -> serde_json::Value {
    let table = table(record);
    let name = &table["name"];
    let chain = |chain: &str, kind: &str, hook: &str, priority: i32| json!({"add": {"chain": {"family": "ip", "table": name, "name": chain, "type": kind, "hook": hook, "prio": priority, "policy": "accept"}}});
    let rule = |chain: &str, expression: serde_json::Value| json!({"add": {"rule": {"family": "ip", "table": name, "chain": chain, "expr": expression}}});
    let saddr = json!({"payload": {"protocol": "ip", "field": "saddr"}});
    json!({"nftables": [
        {"add": {"table": table}},
        chain("postrouting", "nat", "postrouting", 100),
        chain("prerouting", "filter", "prerouting", -300),
        rule("postrouting", json!([
            {"match": {"op": "==", "left": saddr, "right": address.to_string()}},
            {"match": {"op": "!=", "left": {"meta": {"key": "oifname"}}, "right": record.tap}},
            {"masquerade": null},
        ])),
        // The pod speaks for its own address only.
        rule("prerouting", json!([
            {"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": record.tap}},
            {"match": {"op": "!=", "left": saddr, "right": address.to_string()}},
            {"drop": null},
        ])),
    ]})
}

fn destination(route: &RouteMessage) -> Option<(u32, u8)> {
    let prefix = route.header.destination_prefix_length;
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => Some((u32::from(*address), prefix)),
        _ => None,
    })
}

/// The first /30 from `start` on that no pod has and no route (but a default one, or one over the whole pool) covers.
fn choose(taken: &[Ipv4Addr], routes: &[(u32, u8)], start: u32) -> Option<Ipv4Addr> {
    let overlaps = |subnet: u32| {
        routes
            .iter()
            .filter(|(_, prefix)| *prefix > 8)
            .any(|(network, prefix)| {
                let common = u32::from(*prefix).min(30);
                let mask = u32::MAX.checked_shl(32 - common).unwrap_or(0);
                network & mask == subnet & mask
            })
    };
    (0..POOL_SUBNETS)
        .map(|offset| POOL_BASE + (start.wrapping_add(offset) % POOL_SUBNETS) * 4)
        .find(|subnet| !taken.contains(&Ipv4Addr::from(*subnet)) && !overlaps(*subnet))
        .map(Ipv4Addr::from)
}

const IP_FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";

/// Remembers that forwarding was off before us.
fn marker(pods: &Pods) -> PathBuf {
    pods.state_root().join("ip_forward-was-off")
}

fn forwarding_on(pods: &Pods) -> Result<(), Error> {
    let failed = |e| Error::Io(format!("switch on {IP_FORWARD}"), e);
    if fs::read_to_string(IP_FORWARD).map_err(failed)?.trim() == "0" {
        fs::write(marker(pods), "").map_err(failed)?;
        fs::write(IP_FORWARD, "1").map_err(failed)?;
    }
    Ok(())
}

fn forwarding_off(pods: &Pods, last: bool) -> Result<(), Error> {
    if last && marker(pods).exists() {
        let failed = |e| Error::Io(format!("switch off {IP_FORWARD}"), e);
        fs::write(IP_FORWARD, "0").map_err(failed)?;
        fs::remove_file(marker(pods)).map_err(failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> u32 {
        u32::from(text.parse::<Ipv4Addr>().unwrap())
    }

    #[test]
    fn subnets_do_not_collide() {
        assert_eq!(choose(&[], &[], 0), Some(Ipv4Addr::new(10, 213, 0, 0)));
        assert_eq!(
            choose(&[Ipv4Addr::new(10, 213, 0, 0)], &[], 0),
            Some(Ipv4Addr::new(10, 213, 0, 4))
        );
        assert_eq!(
            choose(&[], &[], u32::from(u16::MAX)),
            Some(Ipv4Addr::new(10, 213, 255, 252))
        );
        // A route of the host into the pool, one host in it, and routes that say nothing about it.
        let routes = [
            (ip("10.213.0.0"), 24),
            (ip("10.213.1.1"), 32),
            (ip("10.0.0.0"), 8),
            (0, 0),
            (ip("192.168.0.0"), 16),
        ];
        assert_eq!(choose(&[], &routes, 0), Some(Ipv4Addr::new(10, 213, 1, 4)));
        assert_eq!(choose(&[], &[(ip("10.213.0.0"), 16)], 3), None);
        let all: Vec<_> = (0..POOL_SUBNETS)
            .map(|i| Ipv4Addr::from(POOL_BASE + i * 4))
            .collect();
        assert_eq!(choose(&all, &[], 77), None);
    }

    #[test]
    fn rules_name_the_pod() {
        let record = NetRecord {
            tap: "clo0123456789".into(),
            subnet: Ipv4Addr::new(10, 213, 0, 0),
        };
        let text = rules(&record, Ipv4Addr::new(10, 213, 0, 2)).to_string();
        assert!(text.contains(r#""name":"cloister-clo0123456789""#));
        assert_eq!(text.matches("10.213.0.2").count(), 2);
    }
}
