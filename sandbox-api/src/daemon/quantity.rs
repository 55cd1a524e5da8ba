// SPDX-License-Identifier: Apache-2.0
//! Values of the configuration that have a grammar of their own.

use crate::cli::parse;
use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use std::fmt::{self, Display};
use std::net::SocketAddr;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

/// A TCP address or a unix socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// `ADDRESS:PORT`
    Tcp(SocketAddr),
    /// `unix:PATH`
    Unix(PathBuf),
}

/// A number of bytes: `"256MiB"`, or a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

/// Thousandths of a processor: `"250m"`, `"0.25"`, or a number of processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MilliCpus(pub u32);

/// Whether a path is one to put into a configuration.
///
/// # Errors
/// What is wrong with it.
pub fn check_absolute(path: &Path) -> Result<(), String> {
    if !path.is_absolute() || path.components().any(|part| part == Component::ParentDir) {
        return Err(format!("{path:?} is not an absolute path without \"..\""));
    }
    if path.as_os_str().as_encoded_bytes().contains(&0) {
        return Err(format!("{path:?} is no path"));
    }
    Ok(())
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            let path = Path::new(path);
            check_absolute(path)?;
            return Ok(Self::Unix(path.to_owned()));
        }
        text.parse()
            .map(Self::Tcp)
            .map_err(|_| format!("{text:?} is neither ADDRESS:PORT, as in 127.0.0.1:9464, nor unix:PATH"))
    }
}

impl Display for Listen {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(out),
            Self::Unix(path) => write!(out, "unix:{}", path.display()),
        }
    }
}

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        parse::memory(text).map(Self)
    }
}

impl Display for Bytes {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
        match units
            .iter()
            .find(|(shift, _)| self.0 != 0 && self.0.trailing_zeros() >= *shift)
        {
            Some((shift, unit)) => write!(out, "{}{unit}", self.0 >> shift),
            None => self.0.fmt(out),
        }
    }
}

impl FromStr for MilliCpus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a number of processors such as \"250m\" or \"0.25\"");
        if let Some(thousandths) = text.strip_suffix('m') {
            return thousandths.parse().map(Self).map_err(|_| wrong());
        }
        let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
        if fraction.is_empty() || fraction.len() > 3 || !fraction.bytes().all(|b| b.is_ascii_digit()) {
            return Err(wrong());
        }
        let whole: u32 = whole.parse().map_err(|_| wrong())?;
        let fraction: u32 = format!("{fraction:0<3}").parse().map_err(|_| wrong())?;
        whole
            .checked_mul(1000)
            .and_then(|whole| whole.checked_add(fraction))
            .map(Self)
            .ok_or_else(wrong)
    }
}

impl Display for MilliCpus {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}m", self.0)
    }
}

/// A value that is written as a string, or as a number that means the same as that number's digits.
struct Quantity<T>(std::marker::PhantomData<T>, &'static str);

impl<T: FromStr<Err = String>> Visitor<'_> for Quantity<T> {
    type Value = T;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.1)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }
}

macro_rules! written_as_strings {
    ($($kind:ty: $expected:literal),*) => {$(
        impl<'de> Deserialize<'de> for $kind {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                from.deserialize_any(Quantity(std::marker::PhantomData, $expected))
            }
        }

        impl Serialize for $kind {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.collect_str(self)
            }
        }
    )*};
}
written_as_strings!(
    Bytes: "a size such as \"256MiB\"",
    MilliCpus: "a number of processors such as \"250m\"",
    Listen: "an address such as \"127.0.0.1:9464\""
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities() {
        for (text, value) in [("250m", 250), ("1", 1000), ("0.25", 250), ("1.5", 1500), ("0", 0)] {
            assert_eq!(text.parse(), Ok(MilliCpus(value)), "{text}");
        }
        for text in ["", "m", "-1", "1.", ".5", "0.0001", "99999999", "1e3"] {
            assert!(text.parse::<MilliCpus>().is_err(), "{text}");
        }
        for (bytes, text) in [
            (0, "0"),
            (1, "1"),
            (1 << 10, "1KiB"),
            (3 << 29, "1536MiB"),
            (1 << 40, "1TiB"),
        ] {
            assert_eq!(Bytes(bytes).to_string(), text);
            assert_eq!(text.parse(), Ok(Bytes(bytes)));
        }
        assert_eq!(
            "unix:/a.sock".parse::<Listen>().unwrap().to_string(),
            "unix:/a.sock"
        );
        assert!("unix:a.sock".parse::<Listen>().is_err());
    }
}
