// SPDX-License-Identifier: Apache-2.0
//! Saved device state: versioned, opaque bytes with a checked way in and out.
//!
//! Each device keeps a plain `…State` struct that derives serde's traits, and a version number that grows when the
//! struct changes. A state of another version is refused, never guessed at. Saved states are untrusted input: a
//! device's `restore` checks every value as it would check the guest's.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// The state of one device, vCPU or chip as it goes into a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedState {
    /// Version of the struct encoded in `bytes`.
    pub version: u16,
    /// The struct, in postcard's encoding.
    pub bytes: Vec<u8>,
}

/// Why a state could not be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The snapshot was written by another version of this device.
    #[error("{what}: saved state has version {found}, this program reads version {expected}")]
    Version {
        /// The device.
        what: &'static str,
        /// Version in the snapshot.
        found: u16,
        /// Version this program writes and reads.
        expected: u16,
    },
    /// The bytes do not decode.
    #[error("{what}: saved state is damaged")]
    Encoding {
        /// The device.
        what: &'static str,
        /// The decoder's complaint.
        #[source]
        source: postcard::Error,
    },
    /// The state decodes, but holds a value that this device cannot have.
    #[error("{what}: saved state is impossible: {why}")]
    Invalid {
        /// The device.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// The device cannot be saved now.
    #[error("{what}: cannot be saved now: {why}")]
    Busy {
        /// The device.
        what: &'static str,
        /// What prevents it.
        why: String,
    },
}

impl SavedState {
    /// Encodes `state` as version `version` of `what`.
    pub fn encode<T: Serialize>(what: &'static str, version: u16, state: &T) -> Result<Self, StateError> {
        let bytes = postcard::to_stdvec(state).map_err(|source| StateError::Encoding { what, source })?;
        Ok(Self { version, bytes })
    }

    /// The state of what keeps none.
    pub const fn nothing() -> Self {
        Self {
            version: 0,
            bytes: Vec::new(),
        }
    }

    /// Sees that this is [`nothing`](Self::nothing).
    pub fn expect_nothing(&self, what: &'static str) -> Result<(), StateError> {
        self.decode(what, 0)
    }

    /// Decodes a state of exactly version `expected`.
    pub fn decode<T: DeserializeOwned>(&self, what: &'static str, expected: u16) -> Result<T, StateError> {
        if self.version != expected {
            return Err(StateError::Version {
                what,
                found: self.version,
                expected,
            });
        }
        postcard::from_bytes(&self.bytes).map_err(|source| StateError::Encoding { what, source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_version_and_damage_are_refused() {
        let saved = SavedState::encode("test", 3, &(1u32, "x".to_owned())).unwrap();
        assert_eq!(
            saved.decode::<(u32, String)>("test", 3).unwrap(),
            (1, "x".to_owned())
        );
        assert!(matches!(
            saved.decode::<(u32, String)>("test", 4),
            Err(StateError::Version {
                found: 3,
                expected: 4,
                ..
            })
        ));
        let cut = SavedState {
            bytes: saved.bytes[..1].to_vec(),
            ..saved
        };
        assert!(matches!(
            cut.decode::<(u32, String)>("test", 3),
            Err(StateError::Encoding { .. })
        ));
    }
}
