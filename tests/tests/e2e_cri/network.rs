// SPDX-License-Identifier: Apache-2.0
//! The network of pods.

use cloister_tests::cri::{HANDLERS, Outcome, Pod, Runtime, api, ensure, eventually, script};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
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
    let datagram = std::net::UdpSocket::bind("0.0.0.0:0")?;
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
