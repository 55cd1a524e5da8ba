// SPDX-License-Identifier: Apache-2.0
//! A node and a pod as CNI's bridge plugin makes them, in two network namespaces of their own.
//!
//! ```text
//!  node │ br0 10.99.0.1/24, fd99::1/64 ── up-eth0 ─┼─ eth0 10.99.0.2/24, fd99::2/64 │ pod
//! ```

use cloister_sandbox_api::net::Error;
use cloister_sandbox_api::net::netns::Netns;
use cloister_tests::e2e::eventually;
use futures_util::TryStreamExt;
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::packet_route::neighbour::NeighbourState;
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle, TcMessage};
use rtnetlink::{Handle, LinkBridge, LinkUnspec, LinkVeth, RouteMessageBuilder};
use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::Command;

pub const MTU: u32 = 1400;
pub const NODE: [&str; 2] = ["10.99.0.1", "fd99::1"];
pub const POD: [&str; 2] = ["10.99.0.2", "fd99::2"];

pub struct Bed {
    dir: PathBuf,
    pub node: Netns,
    pub pod: Netns,
}

impl Drop for Bed {
    fn drop(&mut self) {
        for name in ["node", "pod"] {
            let path = self.dir.join(name);
            let _ = rustix::mount::unmount(&path, rustix::mount::UnmountFlags::DETACH);
            let _ = fs::remove_file(&path);
        }
        let _ = fs::remove_dir(&self.dir);
    }
}

/// A new network namespace with lo up, mounted at a path.
async fn make(path: PathBuf) -> Netns {
    fs::write(&path, "").unwrap();
    let at = path.clone();
    std::thread::spawn(move || {
        // SAFETY: the thread has nothing that another network namespace could take away from it, and ends here.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
        rustix::mount::mount_bind("/proc/thread-self/ns/net", &at).unwrap();
    })
    .join()
    .expect("this test makes network namespaces: run it as root");
    let netns = Netns::open(&path).unwrap();
    run(&netns, async |handle| up(&handle, "lo").await).await;
    netns
}

/// Works in a namespace.
pub async fn run<T: Send + 'static>(
    netns: &Netns,
    work: impl AsyncFnOnce(Handle) -> T + Send + 'static,
) -> T {
    let work = async |handle| Ok::<T, Error>(work(handle).await);
    netns.run(work).await.unwrap()
}

pub async fn link(handle: &Handle, name: &str) -> LinkMessage {
    let mut links = handle.link().get().match_name(name).execute();
    links.try_next().await.unwrap().unwrap()
}

pub async fn up(handle: &Handle, name: &str) {
    let up = LinkUnspec::new_with_name(name).up().build();
    handle.link().set(up).execute().await.unwrap();
}

pub async fn add_address(handle: &Handle, index: u32, ip: &str, length: u8) {
    let ip: IpAddr = ip.parse().unwrap();
    let mut request = handle.address().add(index, ip, length);
    // Usable at once.
    request.message_mut().header.flags = rtnetlink::packet_route::address::AddressHeaderFlags::Nodad;
    request.execute().await.unwrap();
}

impl Bed {
    /// With a bridge on the node, and nothing in the pod.
    pub async fn empty(name: &str) -> Self {
        let dir = Path::new("/run").join(format!("e2e-net-{}-{name}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        let bed = Self {
            node: make(dir.join("node")).await,
            pod: make(dir.join("pod")).await,
            dir,
        };
        run(&bed.node, async |handle| {
            handle
                .link()
                .add(LinkBridge::new("br0").up().build())
                .execute()
                .await
                .unwrap();
            let bridge = link(&handle, "br0").await.header.index;
            add_address(&handle, bridge, NODE[0], 24).await;
            add_address(&handle, bridge, NODE[1], 64).await;
        })
        .await;
        bed
    }

    /// With eth0 as the bridge plugin leaves it.
    pub async fn with_eth0(name: &str) -> Self {
        let bed = Self::empty(name).await;
        bed.attach("eth0", MTU).await;
        run(&bed.pod, async |handle| {
            let index = link(&handle, "eth0").await.header.index;
            add_address(&handle, index, POD[0], 24).await;
            add_address(&handle, index, POD[1], 64).await;
            let v4 = RouteMessageBuilder::<Ipv4Addr>::new().gateway(NODE[0].parse().unwrap());
            handle.route().add(v4.build()).execute().await.unwrap();
            let v6 = RouteMessageBuilder::<Ipv6Addr>::new().gateway(NODE[1].parse().unwrap());
            handle.route().add(v6.build()).execute().await.unwrap();
        })
        .await;
        bed
    }

    /// Where the pod's namespace is mounted.
    pub fn pod_path(&self) -> PathBuf {
        self.dir.join("pod")
    }

    /// A veth into the pod, whose other end `up-NAME` is a port of the node's bridge.
    pub async fn attach(&self, name: &'static str, mtu: u32) {
        let pod = self.pod.clone();
        run(&self.node, async move |handle| {
            let outer = format!("up-{name}");
            let veth = LinkVeth::new(&outer, name).mtu(mtu).build();
            handle.link().add(veth).execute().await.unwrap();
            let bridge = link(&handle, "br0").await.header.index;
            let port = LinkUnspec::new_with_name(&outer).controller(bridge).mtu(mtu).up();
            handle.link().set(port.build()).execute().await.unwrap();
            let moved = LinkUnspec::new_with_name(name)
                .mtu(mtu)
                .setns_by_fd(pod.as_fd().as_raw_fd());
            handle.link().set(moved.build()).execute().await.unwrap();
        })
        .await;
        run(&self.pod, async move |handle| up(&handle, name).await).await;
    }

    /// A permanent neighbour in the pod.
    pub async fn neighbor(&self, name: &'static str, ip: &'static str, mac: [u8; 6]) {
        run(&self.pod, async move |handle| {
            let index = link(&handle, name).await.header.index;
            let add = handle.neighbours().add(index, ip.parse().unwrap());
            add.state(NeighbourState::Permanent)
                .link_layer_address(&mac)
                .execute()
                .await
                .unwrap();
        })
        .await;
    }

    /// All interfaces, queueing disciplines and filters in the pod.
    pub async fn pod_things(&self) -> BTreeSet<String> {
        run(&self.pod, async |handle| {
            let mut things = BTreeSet::new();
            let links: Vec<LinkMessage> = handle.link().get().execute().try_collect().await.unwrap();
            for link in links {
                let name = link.attributes.iter().find_map(|attribute| match attribute {
                    LinkAttribute::IfName(name) => Some(name.clone()),
                    _ => None,
                });
                let name = name.unwrap();
                let index = i32::try_from(link.header.index).unwrap();
                let filters = handle.traffic_filter(index).get().ingress().execute();
                let filters: Vec<TcMessage> = filters.try_collect().await.unwrap();
                if !filters.is_empty() {
                    things.insert(format!("filters of {name}"));
                }
                let disciplines: Vec<TcMessage> = handle
                    .qdisc()
                    .get()
                    .index(index)
                    .execute()
                    .try_collect()
                    .await
                    .unwrap();
                for discipline in disciplines {
                    if discipline.header.index == index && discipline.header.parent == TcHandle::INGRESS {
                        let kind = discipline
                            .attributes
                            .iter()
                            .find_map(|attribute| match attribute {
                                TcAttribute::Kind(kind) => Some(kind.clone()),
                                _ => None,
                            });
                        things.insert(format!("{} of {name}", kind.unwrap()));
                    }
                }
                things.insert(name);
            }
            things
        })
        .await
    }

    /// Waits until there are these things in the pod.
    pub async fn pod_becomes(&self, things: &[&str]) {
        let wanted: BTreeSet<String> = things.iter().map(|thing| (*thing).to_owned()).collect();
        for _ in 0..200 {
            if self.pod_things().await == wanted {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        assert_eq!(self.pod_things().await, wanted);
    }

    /// Runs a program on the node to its end, which must be a good one.
    pub async fn on_node(&self, args: &'static [&'static str]) -> String {
        run(&self.node, async move |_| {
            // A child is born in its parent thread's namespace.
            let output = Command::new(args[0]).args(&args[1..]).output().unwrap();
            assert!(output.status.success(), "{args:?}: {output:?}");
            String::from_utf8_lossy(&output.stdout).into_owned()
        })
        .await
    }
}

/// No thread of ours is in a namespace any more.
pub fn assert_no_thread() {
    eventually("the end of the threads in network namespaces", || {
        let threads = fs::read_dir("/proc/self/task").unwrap().flatten();
        let mut names =
            threads.map(|thread| fs::read_to_string(thread.path().join("comm")).unwrap_or_default());
        (!names.any(|name| name.trim() == "netns")).then_some(())
    });
}
