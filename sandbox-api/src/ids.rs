// SPDX-License-Identifier: Apache-2.0
//! Random identifiers, and the names given to containers that got none.

use rustix::rand::{GetRandomFlags, getrandom};

/// `bytes` random bytes in hex, from the kernel.
pub fn random_hex(bytes: usize) -> String {
    let mut buffer = vec![0_u8; bytes];
    fill(&mut buffer);
    crate::image::hex(&buffer)
}

/// Fills a buffer with random bytes from the kernel.
pub fn fill(buffer: &mut [u8]) {
    let mut have = 0;
    while have < buffer.len() {
        match getrandom(&mut buffer[have..], GetRandomFlags::empty()) {
            Ok(n) => have += n,
            Err(rustix::io::Errno::INTR) => {}
            // Every Linux this runs on has it; without randomness nothing here may go on.
            Err(e) => panic!("getrandom: {e}"),
        }
    }
}

/// A container id: 64 hex digits, as docker's.
pub fn container_id() -> String {
    random_hex(32)
}

const ADJECTIVES: [&str; 32] = [
    "calm", "bright", "quiet", "brave", "gentle", "swift", "patient", "humble", "merry", "noble", "plain",
    "wise", "steady", "lucid", "modest", "keen", "frugal", "serene", "hardy", "cordial", "earnest", "candid",
    "nimble", "placid", "sober", "tidy", "upright", "vivid", "warm", "devout", "learned", "hopeful",
];
const NAMES: [&str; 32] = [
    "benedict",
    "hildegard",
    "bede",
    "alcuin",
    "anselm",
    "cassian",
    "scholastica",
    "gertrude",
    "columba",
    "aidan",
    "bernard",
    "clare",
    "dominic",
    "teresa",
    "guido",
    "hilda",
    "boniface",
    "cuthbert",
    "dunstan",
    "eadmer",
    "lanfranc",
    "mechthild",
    "notker",
    "odilo",
    "pachomius",
    "radegund",
    "suger",
    "thecla",
    "ursula",
    "walburga",
    "basil",
    "brendan",
];

/// A readable name such as `quiet_hildegard`.
pub fn name() -> String {
    let mut two = [0_u8; 2];
    fill(&mut two);
    format!(
        "{}_{}",
        ADJECTIVES[usize::from(two[0]) % ADJECTIVES.len()],
        NAMES[usize::from(two[1]) % NAMES.len()]
    )
}

/// Whether a text may name a container: docker's `[a-zA-Z0-9][a-zA-Z0-9_.-]+`, 128 bytes at most.
pub fn is_valid_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    (2..=128).contains(&name.len())
        && bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
        && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_names() {
        assert_eq!(container_id().len(), 64);
        assert_ne!(container_id(), container_id());
        assert!(is_valid_name(&name()));
        for wrong in ["", "a", "-ab", "a/b", "a b", "..", &"x".repeat(129)] {
            assert!(!is_valid_name(wrong), "{wrong}");
        }
    }
}
