// SPDX-License-Identifier: Apache-2.0
//! Connections carried into the VM, on [`FORWARD_PORT`](crate::FORWARD_PORT).
//!
//! The host dials once per connection and sends one header line, `tcp <port>\n`. The agent connects to that port of the
//! VM's loopback, answers [`CONNECTED`], and from then on the stream carries the connection's bytes both ways; each side
//! shuts down its direction at its end. If nothing listens there, the agent closes the stream without an answer.

/// The agent's answer.
pub const CONNECTED: &[u8; 3] = b"ok\n";
/// Longest header line: "tcp 65535" and a newline.
pub const MAX_HEADER: usize = 10;

/// The header line.
#[must_use]
pub fn header(port: u16) -> String {
    format!("tcp {port}\n")
}

/// The port of a header line, newline included; None if it is not one.
#[must_use]
pub fn parse(line: &[u8]) -> Option<u16> {
    let text = std::str::from_utf8(line).ok()?;
    let digits = text.strip_prefix("tcp ")?.strip_suffix('\n')?;
    let port = digits.parse().ok()?;
    // No sign, no leading zeros.
    (header(port) == text).then_some(port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_round_trip() {
        for port in [1, 80, 65535] {
            let line = header(port);
            assert!(line.len() <= MAX_HEADER);
            assert_eq!(parse(line.as_bytes()), Some(port));
        }
    }

    #[test]
    fn what_is_no_header_is_refused() {
        for bad in [
            "",
            "\n",
            "tcp \n",
            "tcp 80",
            "tcp 65536\n",
            "tcp +80\n",
            "tcp 080\n",
            "udp 80\n",
            "tcp 80\n\n",
        ] {
            assert_eq!(parse(bad.as_bytes()), None, "{bad:?}");
        }
        assert_eq!(parse(b"tcp \xff\n"), None);
    }
}
