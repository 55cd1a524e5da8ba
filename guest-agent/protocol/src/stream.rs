// SPDX-License-Identifier: Apache-2.0
//! Names and header of stdio streams.
//!
//! The host half chooses an id per stream and writes `stream://<id>` where containerd writes a fifo's path (`stdin`,
//! `stdout`, `stderr` of Create and Exec; empty: /dev/null). When it starts the process the agent dials
//! [`STREAM_PORT`](crate::STREAM_PORT) once per stream, sends one header line `<id>\n`, and from then on the connection
//! carries the stream's bytes and nothing else:
//!
//! - stdin: host to guest. The host shuts down its write side for end of file.
//! - stdout, stderr: guest to host. The agent shuts down its write side after the last byte. It keeps the connection
//!   until the host closes it, so that no reset overtakes bytes the host has not read yet.
//! - with a terminal there are stdin and stdout only, both of the pseudo-terminal.
//!
//! Unread bytes stop the writer: vsock credit, then the pipe, then the process.

/// Scheme of a stream's name, with the slashes.
pub const SCHEME: &str = "stream://";
/// Number of hex digits of an id.
pub const ID_LEN: usize = 32;
/// Bytes of the header line: the id and a newline.
pub const HEADER_LEN: usize = ID_LEN + 1;

/// The id of a stream: 32 lower-case hex digits, chosen at random by the host.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct StreamId([u8; ID_LEN]);

impl StreamId {
    /// Takes the id as it stands in a name or header; None unless it is exactly 32 lower-case hex digits.
    #[must_use]
    pub fn parse(text: &[u8]) -> Option<Self> {
        let id: [u8; ID_LEN] = text.try_into().ok()?;
        id.iter()
            .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
            .then_some(Self(id))
    }

    /// Makes an id of 16 random bytes.
    #[must_use]
    pub fn from_random(bytes: [u8; 16]) -> Self {
        let digit = |n: u8| if n < 10 { b'0' + n } else { b'a' + (n - 10) };
        let mut id = [0; ID_LEN];
        for (pair, byte) in id.as_chunks_mut::<2>().0.iter_mut().zip(bytes) {
            *pair = [digit(byte >> 4), digit(byte & 15)];
        }
        Self(id)
    }

    /// Takes a `stream://<id>` name; None if it is something else.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::parse(name.strip_prefix(SCHEME)?.as_bytes())
    }

    /// The name to put into a request.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{SCHEME}{}", self.as_str())
    }

    /// The 32 digits.
    #[must_use]
    pub fn as_str(&self) -> &str {
        // Only hex digits get in.
        std::str::from_utf8(&self.0).unwrap_or_default()
    }

    /// The header line.
    #[must_use]
    pub fn header(&self) -> [u8; HEADER_LEN] {
        let mut line = [b'\n'; HEADER_LEN];
        line[..ID_LEN].copy_from_slice(&self.0);
        line
    }

    /// Takes a header line, newline included; None if it is not one.
    #[must_use]
    pub fn from_header(line: &[u8; HEADER_LEN]) -> Option<Self> {
        let (id, end) = line.split_at(ID_LEN);
        if end == b"\n" { Self::parse(id) } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "0123456789abcdef0123456789abcdef";

    #[test]
    fn names_and_headers_round_trip() {
        let id = StreamId::from_name(&format!("stream://{TEXT}")).unwrap();
        assert_eq!(id.as_str(), TEXT);
        assert_eq!(StreamId::from_name(&id.name()), Some(id));
        assert_eq!(StreamId::from_header(&id.header()), Some(id));
        let made = StreamId::from_random([0xf0; 16]);
        assert_eq!(made.as_str(), "f0".repeat(16));
    }

    #[test]
    fn what_is_no_id_is_refused() {
        for bad in ["", "stream://", TEXT, "stream://0123", "fifo:///x"] {
            assert_eq!(StreamId::from_name(bad), None, "{bad}");
        }
        assert_eq!(StreamId::from_name(&format!("stream://{TEXT}0")), None);
        assert_eq!(
            StreamId::from_name(&format!("stream://{}", TEXT.to_uppercase())),
            None
        );
        assert_eq!(
            StreamId::from_name("stream://../../../../../../../../etc/pass"),
            None
        );
        let mut header = StreamId::from_random([1; 16]).header();
        header[ID_LEN] = b'x';
        assert_eq!(StreamId::from_header(&header), None);
    }
}
