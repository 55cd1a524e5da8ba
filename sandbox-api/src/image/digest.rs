// SPDX-License-Identifier: Apache-2.0
//! SHA-256 digests in the form `sha256:<64 hex digits>`, and readers that compute them on the way through.

use super::error::{Error, Result, bad};
use sha2::{Digest as _, Sha256};
use std::fmt;
use std::io::{self, Read};

/// A checked SHA-256 digest.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

impl Digest {
    /// Parses `sha256:<64 lower-case hex digits>`.
    ///
    /// # Errors
    /// Any other form, also other algorithms: the image specification asks only SHA-256 of everybody.
    pub fn parse(text: &str) -> Result<Self> {
        let hex = text
            .strip_prefix("sha256:")
            .ok_or_else(|| bad(format!("digest {text:?}"), "only sha256 digests are supported"))?;
        if hex.len() != 64
            || !hex
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        {
            return Err(bad(format!("digest {text:?}"), "not 64 lower-case hex digits"));
        }
        Ok(Self(hex.to_owned()))
    }

    /// The digest of a short buffer.
    pub fn of(bytes: &[u8]) -> Self {
        Self(hex(&Sha256::digest(bytes)))
    }

    /// The 64 hex digits.
    pub fn hex(&self) -> &str {
        &self.0
    }

    /// The first 12 hex digits, as docker shows ids.
    pub fn short(&self) -> &str {
        &self.0[..12]
    }

    /// The first byte, used to spread locks.
    pub(crate) fn bucket(&self) -> &str {
        &self.0[..2]
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.0)
    }
}

impl TryFrom<String> for Digest {
    type Error = Error;
    fn try_from(text: String) -> Result<Self> {
        Self::parse(&text)
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

/// Lower-case hex of bytes.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    bytes.iter().fold(
        String::with_capacity(bytes.len().saturating_mul(2)),
        |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        },
    )
}

/// Passes bytes through and hashes them.
pub(crate) struct HashReader<R> {
    inner: R,
    hash: Sha256,
    bytes: u64,
}

impl<R: Read> HashReader<R> {
    pub fn new(inner: R) -> Self {
        Self {
            inner,
            hash: Sha256::new(),
            bytes: 0,
        }
    }

    /// Reads to the end of the stream and compares.
    pub fn verify(mut self, what: &str, expected: &Digest) -> Result<u64> {
        let drained = io::copy(&mut self, &mut io::sink());
        drained.map_err(|e| bad(what, format!("cannot read to its end: {e}")))?;
        let actual = Digest(hex(&self.hash.finalize()));
        if actual != *expected {
            return Err(Error::Digest {
                what: what.to_owned(),
                expected: expected.to_string(),
                actual: actual.to_string(),
            });
        }
        Ok(self.bytes)
    }
}

impl<R: Read> Read for HashReader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.hash.update(&buf[..n]);
        self.bytes = self.bytes.saturating_add(n as u64);
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn parses_only_sha256() {
        assert_eq!(Digest::parse(EMPTY).unwrap().to_string(), EMPTY);
        assert_eq!(Digest::of(b""), Digest::parse(EMPTY).unwrap());
        for text in [
            "",
            "sha256:",
            "sha256:../../etc/passwd",
            "sha512:00",
            &EMPTY.to_uppercase(),
            &EMPTY[..70],
        ] {
            assert!(Digest::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn verifies_what_was_not_read_yet() {
        let expected = Digest::of(b"hello");
        let mut reader = HashReader::new(&b"hello"[..]);
        let mut two = [0; 2];
        reader.read_exact(&mut two).unwrap();
        assert_eq!(reader.verify("blob", &expected).unwrap(), 5);
        let error = HashReader::new(&b"hallo"[..])
            .verify("blob x", &expected)
            .unwrap_err();
        assert!(
            error.to_string().starts_with("blob x does not match its digest"),
            "{error}"
        );
    }
}
