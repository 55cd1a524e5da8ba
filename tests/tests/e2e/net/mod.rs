// SPDX-License-Identifier: Apache-2.0
//! Networks of pods under CNI: what the plugins made arrives in the guest, frames pass, and nothing stays.

mod bed;
mod frames;
mod vm;

use crate::runtime;
use bed::{Bed, MTU, NODE, POD, add_address, assert_no_thread, link, run};
use cloister_devices::net::{NetBackend, NetConfig};
use cloister_protocol::pod::{Neighbor, Route};
use cloister_sandbox_api::net::cni::{self, PodNet};
use cloister_tests::e2e::ProcessFootprint;
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::route::{RouteAttribute, RouteMetric, RouteNextHop, RouteProtocol, RouteScope};
use rtnetlink::{LinkUnspec, LinkVeth, RouteMessageBuilder};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

/// A test that leaves nothing in this process.
fn test(body: impl Future<Output = ()>) {
    // What the process makes once.
    drop(runtime());
    let before = ProcessFootprint::of_this();
    runtime().block_on(body);
    before.assert_no_more();
}

fn route(destination: &str, gateway: &str, interface: &str, scope: u32, metric: u32) -> Route {
    Route {
        destination: destination.into(),
        gateway: gateway.into(),
        interface: interface.into(),
        scope,
        metric,
        ..Default::default()
    }
}

fn has(net: &PodNet, wanted: &Route) {
    assert!(net.routes.contains(wanted), "no {wanted:?} in {:#?}", net.routes);
}

fn taps(card: &NetConfig) -> &[OwnedFd] {
    match &card.backend {
        NetBackend::Tap(taps) => taps,
        NetBackend::Socket(_) | NetBackend::Unplugged { .. } => panic!("no tap"),
    }
}

const UNIVERSE: u32 = 0;
const LINK: u32 = 253;

#[test]
fn what_the_plugins_made_is_carried_over() {
    test(async {
        let bed = Bed::with_eth0("survey").await;
        bed.attach("net1", 1500).await;
        bed.neighbor("net1", "10.98.0.1", [2, 0, 0, 0, 9, 9]).await;
        run(&bed.pod, async |handle| {
            let index = link(&handle, "net1").await.header.index;
            add_address(&handle, index, "10.98.0.2", 32).await;
            let add = async |route| handle.route().add(route).execute().await.unwrap();
            // As calico and cilium do: a gateway that no network contains, and a smaller MTU beyond.
            let gateway = Ipv4Addr::new(10, 98, 0, 1);
            let on_link = RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(gateway, 32)
                .scope(RouteScope::Link)
                .output_interface(index);
            add(on_link.build()).await;
            let mut beyond = RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(Ipv4Addr::new(10, 97, 0, 0), 16)
                .gateway(gateway)
                .pref_source(Ipv4Addr::new(10, 98, 0, 2))
                .output_interface(index)
                .priority(77);
            let metrics = vec![RouteMetric::Mtu(1380)];
            beyond.get_mut().attributes.push(RouteAttribute::Metrics(metrics));
            add(beyond.build()).await;
            // As ptp does: no network on the link, though the address has one.
            let eth0 = link(&handle, "eth0").await.header.index;
            let network = RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(Ipv4Addr::new(10, 99, 0, 0), 24)
                .scope(RouteScope::Link)
                .protocol(RouteProtocol::Kernel)
                .output_interface(eth0);
            handle.route().del(network.build()).execute().await.unwrap();
            // Not for the guest.
            let other_table = RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(Ipv4Addr::new(10, 96, 0, 0), 16)
                .table_id(100)
                .scope(RouteScope::Link)
                .output_interface(eth0);
            add(other_table.build()).await;
            // Down: not in use.
            handle
                .link()
                .add(LinkVeth::new("idle", "idler").build())
                .execute()
                .await
                .unwrap();
        })
        .await;

        let mut net = cni::connect(&bed.pod_path(), 2).await.unwrap();
        let cards = net.take_cards();
        let names: Vec<&str> = net.interfaces.iter().map(|one| one.name.as_str()).collect();
        assert_eq!(names, ["eth0", "net1"]);
        let ([eth0, net1], [eth0_card, net1_card]) = (&net.interfaces[..], &cards[..]) else {
            panic!("{cards:?}")
        };
        assert_eq!((eth0.mtu, eth0_card.mtu), (MTU, Some(1400)));
        assert_eq!((net1.mtu, net1_card.mtu), (1500, Some(1500)));
        assert_eq!((taps(eth0_card).len(), taps(net1_card).len()), (2, 2));
        assert_eq!(eth0.addresses, ["10.99.0.2/24", "fd99::2/64"]);
        assert_eq!(net1.addresses, ["10.98.0.2/32"]);
        assert_eq!(net.addresses()[0].to_string(), POD[0]);
        let own = run(&bed.pod, async |handle| link(&handle, "eth0").await).await;
        assert!(
            own.attributes
                .contains(&LinkAttribute::Address(eth0_card.mac.to_vec()))
        );
        let tap = format!("cloister{}", own.header.index);
        let tap = run(&bed.pod, async move |handle| link(&handle, &tap).await).await;
        assert!(tap.attributes.contains(&LinkAttribute::Mtu(MTU)));

        has(&net, &route("0.0.0.0/0", NODE[0], "eth0", UNIVERSE, 0));
        has(&net, &route("::/0", NODE[1], "eth0", UNIVERSE, 1024));
        has(&net, &route("fd99::/64", "", "eth0", UNIVERSE, 256));
        has(&net, &route("10.98.0.1/32", "", "net1", LINK, 0));
        has(
            &net,
            &Route {
                source: "10.98.0.2".into(),
                mtu: 1380,
                ..route("10.97.0.0/16", "10.98.0.1", "net1", UNIVERSE, 77)
            },
        );
        assert_eq!(net.routes.len(), 5, "{:#?}", net.routes);
        let neighbor = Neighbor {
            address: "10.98.0.1".into(),
            mac: "02:00:00:00:09:09".into(),
            interface: "net1".into(),
            ..Default::default()
        };
        assert_eq!(net.neighbors, [neighbor]);

        // Taken apart with the taps still open, as they are in a VM.
        net.disconnect().await.unwrap();
        bed.pod_becomes(&["lo", "eth0", "net1", "idle", "idler"]).await;
        drop(cards);
        assert_no_thread();
    });
}

#[test]
fn frames_pass_both_ways() {
    test(async {
        let bed = Bed::with_eth0("frames").await;
        bed.attach("net1", 9000).await;
        let mut net = cni::connect(&bed.pod_path(), 1).await.unwrap();
        for (card, interface) in net.take_cards().iter().zip(&net.interfaces) {
            let tap = &taps(card)[0];
            let outer = format!("up-{}", interface.name);
            let outer = run(&bed.node, async move |handle| {
                frames::packet_socket(link(&handle, &outer).await.header.index)
            })
            .await;
            // From the smallest to the biggest.
            for bytes in [46, usize::from(card.mtu.unwrap())] {
                let frame = frames::frame(bytes);
                frames::send_to_tap(tap, &frame);
                assert!(frames::receive(&outer, &frame), "{bytes} bytes from the guest");
                frames::send(&outer, &frame);
                assert!(
                    frames::receive_from_tap(tap, &frame),
                    "{bytes} bytes for the guest"
                );
            }
        }
        drop(net);
        bed.pod_becomes(&["lo", "eth0", "net1"]).await;
        assert_no_thread();
    });
}

#[test]
fn a_killed_daemon_leaves_nothing_that_stays() {
    test(async {
        let bed = Bed::with_eth0("killed").await;
        let path = bed.pod_path();
        let clean = ["lo", "eth0"];
        let killed = async || {
            let mut net = cni::connect(&path, 1).await.unwrap();
            // What the kernel does of itself.
            drop(net.take_cards());
            let left = ["lo", "eth0", "ingress of eth0", "filters of eth0"];
            bed.pod_becomes(&left).await;
            net
        };
        let first = killed().await;
        cni::disconnect_soon(&path);
        bed.pod_becomes(&clean).await;
        cni::disconnect_soon(&path);
        first.disconnect().await.unwrap();

        // Connected again over what is left, and while another connection stands.
        let second = killed().await;
        let third = cni::connect(&path, 4).await.unwrap();
        let fourth = cni::connect(&path, 1).await.unwrap();
        assert_eq!(fourth.interfaces.len(), 1);
        drop((second, third));
        drop(fourth);
        bed.pod_becomes(&clean).await;

        // A namespace that is not there, or no longer mounted.
        let gone = path.with_file_name("gone");
        cni::disconnect_soon(&gone);
        std::fs::write(&gone, "").unwrap();
        cni::disconnect_soon(&gone);
        let error = cni::connect(&gone, 1).await.unwrap_err();
        assert!(error.to_string().contains("/gone"), "{error}");
        std::fs::remove_file(&gone).unwrap();
        assert_no_thread();
    });
}

#[test]
fn what_a_guest_cannot_have_is_refused() {
    test(async {
        let bed = Bed::with_eth0("refused").await;
        let path = bed.pod_path();
        let refused = async |named: &[&str]| {
            let error = cni::connect(&path, 1).await.unwrap_err().to_string();
            for named in named {
                assert!(error.contains(named), "{error}");
            }
        };
        run(&bed.pod, async |handle| {
            handle
                .link()
                .add(LinkVeth::new("in0", "in1").up().build())
                .execute()
                .await
                .unwrap();
        })
        .await;
        refused(&["in", "sits on another"]).await;
        run(&bed.pod, async |handle| {
            let index = link(&handle, "in0").await.header.index;
            handle.link().del(index).execute().await.unwrap();
            let index = link(&handle, "eth0").await.header.index;
            let mut hops = Vec::new();
            for last in [3, 4] {
                let mut hop = RouteNextHop::default();
                hop.interface_index = index;
                hop.attributes = vec![RouteAttribute::Gateway(
                    std::net::IpAddr::V4(Ipv4Addr::new(10, 99, 0, last)).into(),
                )];
                hops.push(hop);
            }
            let route = RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(Ipv4Addr::new(10, 95, 0, 0), 16)
                .multipath(hops);
            handle.route().add(route.build()).execute().await.unwrap();
        })
        .await;
        refused(&["10.95.0.0/16", "several next hops"]).await;
        run(&bed.pod, async |handle| {
            let route =
                RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(Ipv4Addr::new(10, 95, 0, 0), 16);
            handle.route().del(route.build()).execute().await.unwrap();
            // Somebody else's.
            let index = link(&handle, "eth0").await.header.index;
            handle
                .qdisc()
                .add(index.cast_signed())
                .ingress()
                .execute()
                .await
                .unwrap();
        })
        .await;
        refused(&["ingress queueing discipline", "eth0"]).await;
        bed.pod_becomes(&["lo", "eth0", "ingress of eth0"]).await;
        // That of a pod with nothing but lo is no error.
        run(&bed.pod, async |handle| {
            let down = LinkUnspec::new_with_name("eth0").down().build();
            handle.link().set(down).execute().await.unwrap();
        })
        .await;
        assert_eq!(cni::connect(&path, 1).await.unwrap().interfaces.len(), 0);
        assert_no_thread();
    });
}
