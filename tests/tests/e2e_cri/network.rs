// SPDX-License-Identifier: Apache-2.0
//! The network of pods.

use cloister_tests::cri::{BRIDGE, HANDLERS, Outcome, Pod, Runtime, api, ensure, eventually, script};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

/// Asks a server of ours for its line.
fn ask(address: &str, port: u16) -> Outcome<String> {
    let address: SocketAddr = if address.contains(':') {
        format!("[{address}]:{port}")
    } else {
        format!("{address}:{port}")
    }
    .parse()?;
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(20))?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    Ok(said)
}

/// Addresses and routes are those that CNI gave.
pub async fn addresses(runtime: &Runtime) -> Outcome<Value> {
    let shared = runtime.shared().await?;
    let network = shared.pod.status().await?.network.ok_or("no network")?;
    let six = network
        .additional_ips
        .first()
        .ok_or("no IPv6 address")?
        .ip
        .clone();
    let seen = shared
        .exec_script("ip -o addr show dev eth0 scope global | awk '{ print $4 }'")
        .await?
        .good()?;
    let expected = format!("{}/16\n{six}/64\n", network.ip);
    ensure(seen == expected, format_args!("{seen:?} instead of {expected:?}"))?;
    let text = "ip -o link | awk '{ sub(\"@.*\", \"\", $2); sub(\":\", \"\", $2); for (i = 3; i <= NF; i++) if ($i == \"mtu\") print $2, $(i + 1) }'; ip -o addr show dev lo | awk '{ print $4 }'; \
        ip route | sed 's/ src .*//; s/ *$//'; ip -6 route show default | awk '{ print $1, $2, $3, $4, $5 }'; cat /sys/class/net/eth0/operstate; \
        ip -o -6 addr show dev eth0 | grep -c tentative";
    Ok(json!(shared.exec_script(text).await?))
}

/// From the node to the pod, from the pod to the node, within the pod, and by both kinds of addresses.
pub async fn reach(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let network = pod.status().await?.network.ok_or("no network")?;
    let server = pod.start(script(
        "socat TCP6-LISTEN:8200,ipv6only=0,fork,reuseaddr SYSTEM:'echo from the pod' & socat UDP4-LISTEN:8201,fork EXEC:cat & \
         until [ $(ss -Hln | grep -c ':820[01] ') -ge 2 ]; do sleep 0.1; done; echo ready; wait",
    )).await?;
    server.says("ready").await?;
    let mut seen = serde_json::Map::new();
    for (kind, address) in [("IPv4", &network.ip), ("IPv6", &network.additional_ips[0].ip)] {
        let said = eventually("an answer of the pod", async || Ok(ask(address, 8200).ok())).await?;
        seen.insert(format!("{kind} from the node"), json!(said));
        let inside = server
            .exec_script(&format!(
                "socat -u TCP:{}:8200 STDOUT",
                if address.contains(':') {
                    format!("[{address}]")
                } else {
                    address.clone()
                }
            ))
            .await?;
        seen.insert(format!("{kind} within"), json!(inside));
    }
    let datagram = UdpSocket::bind("0.0.0.0:0")?;
    datagram.set_read_timeout(Some(Duration::from_secs(20)))?;
    datagram.send_to(b"datagram", format!("{}:8201", network.ip))?;
    let mut bytes = [0; 64];
    let count = datagram.recv(&mut bytes)?;
    seen.insert("UDP".into(), json!(String::from_utf8_lossy(&bytes[..count])));
    // To the node, and more than fits into a few packets.
    let listener = TcpListener::bind("0.0.0.0:0")?;
    let port = listener.local_addr()?.port();
    let thread = std::thread::spawn(move || -> std::io::Result<usize> {
        let (mut stream, _) = listener.accept()?;
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes)?;
        stream.write_all(b"thanks\n")?;
        Ok(bytes.len())
    });
    let sent = server.exec_script(&format!("head -c 3000000 /dev/zero | socat -t 30 - TCP:$(ip route | awk '/^default/ {{ print $3 }}'):{port}")).await?;
    let count = thread.join().map_err(|_| "the node's server")??;
    seen.insert("to the node".into(), json!([sent.stdout, count.to_string()]));
    let refused = server.exec_script("socat -u TCP:127.0.0.1:8299 STDOUT 2>&1 | grep -o 'Connection refused'; ping -c 1 -W 5 127.0.0.1 >/dev/null 2>&1; echo").await?;
    seen.insert("refused".into(), json!(refused));
    server.stop(0).await?;
    server.remove().await?;
    Ok(seen.into())
}

/// Between a pod of this handler and one of each.
pub async fn between_pods(runtime: &Runtime) -> Outcome<Value> {
    let mut seen = serde_json::Map::new();
    let client = runtime.shared().await?;
    let others = runtime.siblings();
    ensure(others.len() <= HANDLERS.len(), "handlers")?;
    for other in others {
        let pod = Pod::run(&other, Pod::config(&other)).await?;
        let server = pod.start(script("socat TCP-LISTEN:8300,fork,reuseaddr SYSTEM:'head -c 1000000 /dev/zero' & until ss -Hltn | grep -q 8300; do sleep 0.1; done; echo ready; wait")).await?;
        server.says("ready").await?;
        let address = pod.address().await?;
        let got = client
            .exec_script(&format!("socat -u TCP:{address}:8300 STDOUT | wc -c"))
            .await?;
        pod.remove().await?;
        seen.insert(format!("to {}", other.handler()), json!(got));
    }
    Ok(seen.into())
}

/// A port of the node that leads to the pod.
pub async fn host_port(runtime: &Runtime) -> Outcome<Value> {
    // Runs at once on all handlers, on the same node.
    let port = 18_400 + u16::try_from(runtime.handler().len())?;
    let mut config = Pod::config(runtime);
    config.port_mappings = vec![api::PortMapping {
        protocol: api::Protocol::Tcp.into(),
        container_port: 8400,
        host_port: port.into(),
        host_ip: String::new(),
    }];
    // The plugin makes its chains without a lock: two that come at once can fail.
    let pod = eventually("the port's mapping", async || {
        match Pod::run(runtime, config.clone()).await {
            Err(error) if error.to_string().contains("File exists") => Ok(None),
            run => run.map(Some),
        }
    })
    .await?;
    let server = pod.start(script("socat TCP-LISTEN:8400,fork,reuseaddr SYSTEM:'echo through the node' & until ss -Hltn | grep -q 8400; do sleep 0.1; done; echo ready; wait")).await?;
    server.says("ready").await?;
    let local = eventually("an answer through the node", async || {
        Ok(ask("127.0.0.1", port).ok())
    })
    .await?;
    // By the pod's own way out.
    let hairpin = server
        .exec_script(&format!(
            "socat -u TCP:$(ip route | awk '/^default/ {{ print $3 }}'):{port} STDOUT"
        ))
        .await?;
    pod.remove().await?;
    let after = ask("127.0.0.1", port).is_err();
    Ok(json!({ "local": local, "hairpin": hairpin, "closed after": after }))
}

/// A program of the node, with this as its input.
fn node(command: &[&str], input: &str) -> Outcome {
    let mut process = Command::new(command[0])
        .args(&command[1..])
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .stdin(Stdio::piped())
        .spawn()?;
    if let Some(mut stdin) = process.stdin.take() {
        stdin.write_all(input.as_bytes())?;
    }
    ensure(process.wait()?.success(), format_args!("{command:?}"))
}

/// A service as kube-proxy has them with nftables: an address that nobody has, translated on the node to that of a pod. It ends
/// when dropped.
struct Service {
    table: String,
    address: String,
}

impl Service {
    const PORT: u16 = 80;

    /// One for each handler at a time.
    fn start(runtime: &Runtime, pod: &str, port: u16) -> Outcome<Self> {
        let number = HANDLERS.iter().position(|&name| name == runtime.handler());
        let service = Self {
            table: format!("cri-e2e-{}", runtime.handler()),
            address: format!("10.96.0.{}", number.ok_or("a handler without a number")? + 10),
        };
        // A client on the pod's own bridge must get its answer by the way of its question: so it is made the node's.
        let rules = format!(
            "table ip {table} {{
                chain service {{ ip daddr {address} tcp dport {service_port} dnat to {pod}:{port}; }}
                chain prerouting {{ type nat hook prerouting priority -100; jump service; }}
                chain output {{ type nat hook output priority -100; jump service; }}
                chain postrouting {{ type nat hook postrouting priority 90; ip daddr {pod} tcp dport {port} ct status dnat masquerade; }}
            }}",
            table = service.table,
            address = service.address,
            service_port = Self::PORT,
        );
        node(&["nft", "-f", "-"], &rules)?;
        // A node without a way to the Internet has none to that address either.
        let route = ["ip", "route", "replace", &service.address, "dev", BRIDGE];
        node(&route, "")?;
        Ok(service)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        for command in [
            &["nft", "delete", "table", "ip", &self.table][..],
            &["ip", "route", "delete", &self.address, "dev", BRIDGE],
        ] {
            if let Err(error) = node(command, "") {
                eprintln!("a service is left on the node: {error}");
            }
        }
    }
}

/// From a pod, from the node and from the server itself to a server of each handler, by the address of a service.
pub async fn service(runtime: &Runtime) -> Outcome<Value> {
    let mut seen = serde_json::Map::new();
    let client = runtime.shared().await?;
    for other in runtime.siblings() {
        let pod = Pod::run(&other, Pod::config(&other)).await?;
        let server = pod.start(script("socat TCP-LISTEN:8600,fork,reuseaddr SYSTEM:'echo served $SOCAT_PEERADDR' & until ss -Hltn | grep -q 8600; do sleep 0.1; done; echo ready; wait")).await?;
        server.says("ready").await?;
        let service = Service::start(runtime, &pod.address().await?, 8600)?;
        let ask_it = format!(
            "socat -u TCP:{}:{},connect-timeout=60 STDOUT",
            service.address,
            Service::PORT
        );
        let from_pod = client.exec_script(&ask_it).await?;
        let from_itself = server.exec_script(&ask_it).await?;
        let from_node = eventually("an answer of the service", async || {
            Ok(ask(&service.address, Service::PORT).ok())
        })
        .await?;
        drop(service);
        pod.remove().await?;
        seen.insert(
            format!("of {}", other.handler()),
            json!([from_pod, from_itself, from_node]),
        );
    }
    Ok(seen.into())
}

/// The one name that the node's name server knows.
const NAME: &str = "service.e2e.test";

/// What a name server that knows one name, and one IPv4 address of it, says to this.
fn resolve(query: &[u8]) -> Option<Vec<u8>> {
    let (mut name, mut at) = (Vec::new(), 12);
    while let length @ 1.. = usize::from(*query.get(at)?) {
        name.push(String::from_utf8_lossy(query.get(at + 1..=at + length)?).into_owned());
        at += length + 1;
    }
    let question = query.get(12..at + 5)?;
    let is_known = name.join(".").eq_ignore_ascii_case(NAME);
    // Type A, class IN.
    let is_answered = is_known && question.ends_with(&[0, 1, 0, 1]);
    let mut answer = query[..2].to_vec();
    // A response, recursion available; no error, or no such name. One question, as many answers, nothing else.
    answer.extend([0x81, if is_known { 0x80 } else { 0x83 }]);
    answer.extend([0, 1, 0, u8::from(is_answered), 0, 0, 0, 0]);
    answer.extend(question);
    if is_answered {
        // The name in the question, A, IN, for a minute, four bytes.
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 53]);
    }
    Some(answer)
}

/// A name server on the node till the end of the test, one for all handlers: they ask at the same port.
fn name_server(address: &str) -> Outcome {
    static STARTED: OnceLock<Result<(), String>> = OnceLock::new();
    let start = || {
        let socket = UdpSocket::bind(format!("{address}:53")).map_err(|e| format!("{address}:53: {e}"))?;
        std::thread::spawn(move || {
            let mut query = [0; 512];
            while let Ok((count, client)) = socket.recv_from(&mut query) {
                if let Some(answer) = resolve(&query[..count]) {
                    let _ = socket.send_to(&answer, client);
                }
            }
        });
        Ok(())
    };
    Ok(STARTED.get_or_init(start).clone()?)
}

/// A name is found through the pod's name server and search domain.
pub async fn dns(runtime: &Runtime) -> Outcome<Value> {
    let gateway = "ip route | awk '/^default/ { print $3 }'";
    let gateway = runtime.shared().await?.exec_script(gateway).await?.good()?;
    name_server(gateway.trim())?;
    let mut config = Pod::config(runtime);
    config.dns_config = Some(api::DnsConfig {
        servers: vec![gateway.trim().to_owned()],
        searches: vec!["nothing.test".to_owned(), "e2e.test".to_owned()],
        options: vec!["ndots:5".to_owned()],
    });
    let pod = Pod::run(runtime, config).await?;
    let text =
        format!("for name in service {NAME} {NAME}. another; do getent hosts $name || echo $name: $?; done");
    let output = pod.output(script(&text)).await?;
    pod.remove().await?;
    Ok(json!(output))
}
