// SPDX-License-Identifier: Apache-2.0
//! The DNS files of a pod.

use std::net::IpAddr;

/// The host's resolv.conf as it can work inside a pod: without resolvers on the host's loopback. The second value lists
/// those.
pub fn resolv_conf(host: &str) -> (String, Vec<String>) {
    let mut dropped = Vec::new();
    let mut kept = String::new();
    for line in host.lines() {
        let mut words = line.split_whitespace();
        if words.next() == Some("nameserver") {
            let server = words.next().unwrap_or_default();
            // A zone after % is of the host's interfaces.
            let address = server.split('%').next().unwrap_or(server);
            if address
                .parse::<IpAddr>()
                .map_or(true, |ip| ip.is_loopback() || server.contains('%'))
            {
                dropped.push(server.to_owned());
                continue;
            }
        }
        kept.push_str(line);
        kept.push('\n');
    }
    (kept, dropped)
}

/// /etc/hosts of a pod.
pub fn hosts(hostname: &str, address: Option<IpAddr>) -> String {
    let mut text = String::from(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n",
    );
    let own = address.map_or_else(|| "127.0.1.1".to_owned(), |address| address.to_string());
    text.push_str(&format!("{own}\t{hostname}\n"));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_resolvers_are_dropped() {
        let host = "# comment\nsearch example\nnameserver 127.0.0.53\nnameserver 10.0.0.1\nnameserver ::1\nnameserver fe80::1%eth0\nnameserver\noptions edns0\n";
        let (kept, dropped) = resolv_conf(host);
        assert_eq!(
            kept,
            "# comment\nsearch example\nnameserver 10.0.0.1\noptions edns0\n"
        );
        assert_eq!(dropped, ["127.0.0.53", "::1", "fe80::1%eth0", ""]);
    }

    #[test]
    fn own_name() {
        assert!(hosts("box", Some("10.0.0.2".parse().unwrap())).ends_with("10.0.0.2\tbox\n"));
        assert!(hosts("box", None).ends_with("127.0.1.1\tbox\n"));
    }
}
