// SPDX-License-Identifier: Apache-2.0
//! A pod's VM on its network: ping, a web server, bulk data both ways with segmentation left to the host, and port-forward
//! into it.

use super::bed::{Bed, POD, assert_no_thread, link, run};
use super::test;
use crate::container::{Script, pod_initramfs};
use crate::runtime;
use cloister_protocol::pod::ConfigureRequest;
use cloister_sandbox_api::net::cni::{self, PodNet};
use cloister_sandbox_api::net::forward::Forwarder;
use cloister_sandbox_api::pod::agent::Agent;
use cloister_sandbox_api::pod::machine::{Machine, MachineConfig, Origin, Room};
use cloister_sandbox_api::pod::vm::PodVm;
use cloister_tests::e2e::{PATIENCE, guest_file};
use cloister_vmm::{CellHost, CellHostConfig, HugePages};
use rtnetlink::packet_route::link::{LinkAttribute, Stats64};
use serde_json::json;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Bytes of bulk data.
const BULK: usize = 8 << 20;

async fn start(host: &CellHost, net: &mut PodNet) -> (PodVm, Agent) {
    let programs = ["sh", "httpd", "nc", "sha256sum", "cat", "echo", "sleep", "dd"];
    let page: (&str, &[u8]) = ("www/index.html", b"hello from the pod\n");
    let initramfs = pod_initramfs(&programs, &["proc", "dev", "tmp"], &[page]);
    let config = MachineConfig {
        name: "pod".into(),
        cpus: 2,
        memory: 256 << 20,
        huge_pages: HugePages::default(),
        dax: None,
        kernel: &guest_file("vmlinux"),
        initrd: &PathBuf::from(format!("/proc/self/fd/{}", initramfs.as_raw_fd())),
        kernel_args: &["cloister.log=info".into()],
        nics: net.take_cards(),
        room: Room::default(),
        origin: Origin::Boot,
    };
    let mut vm = PodVm::start(config, host).await.unwrap();
    let agent = vm.ready(PATIENCE).await.unwrap();
    let request = ConfigureRequest {
        hostname: "pod".into(),
        interfaces: net.interfaces.clone(),
        routes: net.routes.clone(),
        neighbors: net.neighbors.clone(),
        ..Default::default()
    };
    vm.configure(&request).await.unwrap();
    (vm, agent)
}

fn dial(address: &str, port: u16) -> TcpStream {
    let address = SocketAddr::new(address.parse().unwrap(), port);
    for _ in 0..600 {
        // The program may not listen yet.
        if let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_secs(60)) {
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.set_write_timeout(Some(PATIENCE)).unwrap();
            return stream;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("{address} does not take connections");
}

/// Sends all, says so, and answers what comes back.
fn exchange(mut stream: TcpStream, request: &[u8]) -> io::Result<Vec<u8>> {
    let mut reader = stream.try_clone()?;
    let answer = std::thread::spawn(move || {
        let mut answer = Vec::new();
        reader.read_to_end(&mut answer).map(|_| answer)
    });
    stream.write_all(request)?;
    stream.shutdown(Shutdown::Write)?;
    answer.join().unwrap()
}

const GET: &[u8] = b"GET / HTTP/1.0\r\n\r\n";

fn assert_page(answer: &[u8]) {
    let text = String::from_utf8_lossy(answer);
    assert!(
        text.starts_with("HTTP/1.") && text.ends_with("hello from the pod\n"),
        "{text}"
    );
}

/// Bytes that differ everywhere.
fn bulk() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(BULK);
    while bytes.len() < BULK {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes
}

/// What has passed the pod's veth on the node.
async fn passed(bed: &Bed) -> Stats64 {
    run(&bed.node, async |handle| {
        let link = link(&handle, "up-eth0").await;
        let stats = link.attributes.into_iter().find_map(|attribute| match attribute {
            LinkAttribute::Stats64(stats) => Some(stats),
            _ => None,
        });
        stats.unwrap()
    })
    .await
}

#[test]
fn a_pod_vm_on_its_network() {
    // The shared threads are not this test's.
    let host = CellHost::new(CellHostConfig::default()).unwrap();
    runtime().block_on(async {
        let bed = Bed::with_eth0("warm").await;
        let mut net = cni::connect(&bed.pod_path(), 2).await.unwrap();
        let (vm, _) = start(&host, &mut net).await;
        stop(vm, net, &bed).await;
    });
    test(async {
        let bed = Bed::with_eth0("vm").await;
        let mut net = cni::connect(&bed.pod_path(), 2).await.unwrap();
        let (vm, agent) = start(&host, &mut net).await;

        // IPv6 at once: without a wait for duplicates.
        bed.on_node(&["busybox", "ping", "-c", "3", POD[0]]).await;
        bed.on_node(&["busybox", "ping6", "-c", "3", POD[1]]).await;

        let script = "httpd -p 80 -h /www; nc -ll -p 5000 -e /bin/sha256sum & nc -ll -p 5001 -e /bin/cat & \
            while :; do sleep 1000; done";
        let tmp = json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"});
        let servers = Script {
            id: "servers",
            script,
            capabilities: &["CAP_NET_BIND_SERVICE"],
            mounts: vec![tmp],
        };
        servers.start(&agent).await;
        for pod in POD {
            let page = run(&bed.node, async move |_| exchange(dial(pod, 80), GET).unwrap()).await;
            assert_page(&page);
        }

        // Bulk data there (the guest's own sum of it), and there and back.
        let data = bulk();
        let before = passed(&bed).await;
        let sent = data.clone();
        let sum = run(&bed.node, async move |_| {
            exchange(dial(POD[0], 5000), &sent).unwrap()
        })
        .await;
        let middle = passed(&bed).await;
        assert_eq!(String::from_utf8_lossy(&sum), format!("{}  -\n", sha256(&data)));
        let sent = data.clone();
        let echo = run(&bed.node, async move |_| {
            exchange(dial(POD[1], 5001), &sent).unwrap()
        })
        .await;
        assert!(
            echo == data,
            "{} of {} bytes came back, or others",
            echo.len(),
            data.len()
        );
        let after = passed(&bed).await;
        // The node sends segments bigger than the network takes, and so does the guest.
        let to_pod = (middle.tx_bytes - before.tx_bytes) / (middle.tx_packets - before.tx_packets);
        let from_pod = (after.rx_bytes - middle.rx_bytes) / (after.rx_packets - middle.rx_packets);
        println!("bytes per frame: {to_pod} to the pod, {from_pod} from it");
        assert!(to_pod > 2000, "{to_pod} bytes per frame to the pod");
        assert!(from_pod > 2000, "{from_pod} bytes per frame from the pod");

        // Port-forward: localhost in the pod's namespace on the host.
        let guest = Arc::<Machine>::clone(&vm.machine);
        let forwarder = Forwarder::start(&bed.pod_path(), guest).await.unwrap();
        let answers = run(&bed.pod, async move |_| {
            for local in ["127.0.0.1", "127.1.2.3", "::1"] {
                assert_page(&exchange(dial(local, 80), GET).unwrap());
            }
            let echo = exchange(dial("127.0.0.1", 5001), &data).unwrap();
            assert!(
                echo == data,
                "{} of {} bytes came back, or others",
                echo.len(),
                data.len()
            );
            // Where nobody listens.
            let mut refused = dial("127.0.0.1", 81);
            refused.read(&mut [0]).map_err(|e| e.kind())
        })
        .await;
        assert_eq!(answers, Err(io::ErrorKind::ConnectionReset));
        // Its end ends what it carries, and then nobody listens any more.
        let open = run(&bed.pod, async |_| dial("127.0.0.1", 5001)).await;
        drop(forwarder);
        let ended = tokio::task::spawn_blocking(move || (&open).read(&mut [0]))
            .await
            .unwrap();
        assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
        let refused = run(&bed.pod, async |_| TcpStream::connect("127.0.0.1:80").map(|_| ())).await;
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        drop(agent);
        stop(vm, net, &bed).await;
        assert_no_thread();
    });
    drop(host);
}

async fn stop(vm: PodVm, net: PodNet, bed: &Bed) {
    vm.power_off().await;
    vm.shut_down().await;
    net.disconnect().await.unwrap();
    bed.pod_becomes(&["lo", "eth0"]).await;
}

/// By the same program as in the guest.
fn sha256(data: &[u8]) -> String {
    let mut child = std::process::Command::new("busybox")
        .arg("sha256sum")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(data).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.split(' ').next().unwrap().to_owned()
}
