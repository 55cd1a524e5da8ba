// SPDX-License-Identifier: Apache-2.0
//! Lists that cannot be longer than what they are of allows. An element may take fewer bytes in a file than in memory: without
//! a bound, a file of some hundred megabytes would ask for some gigabytes.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error as _, SeqAccess, Visitor};

struct Bounded<T, const MOST: usize>(PhantomData<T>);

impl<'de, T: Deserialize<'de>, const MOST: usize> Visitor<'de> for Bounded<T, MOST> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at most {MOST} elements")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Self::Value, A::Error> {
        let mut all = Vec::new();
        while let Some(element) = elements.next_element()? {
            if all.len() >= MOST {
                return Err(A::Error::custom("there are more elements than there can be"));
            }
            all.push(element);
        }
        Ok(all)
    }
}

/// For `deserialize_with`: a list of at most `MOST` elements.
pub fn bounded<'de, D: Deserializer<'de>, T: Deserialize<'de>, const MOST: usize>(
    from: D,
) -> Result<Vec<T>, D::Error> {
    from.deserialize_seq(Bounded::<T, MOST>(PhantomData))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    struct Few {
        #[serde(deserialize_with = "bounded::<_, _, 3>")]
        few: Vec<u8>,
    }

    #[test]
    fn no_more_than_there_can_be() {
        for count in 0..8 {
            let bytes = postcard::to_stdvec(&vec![7u8; count]).unwrap();
            match postcard::from_bytes::<Few>(&bytes) {
                Ok(read) => assert_eq!(read.few, vec![7; count]),
                Err(_) => assert!(count > 3, "{count}"),
            }
            assert_eq!(postcard::from_bytes::<Few>(&bytes).is_ok(), count <= 3);
        }
        // A length that nothing follows.
        assert!(postcard::from_bytes::<Few>(&[0xff, 0xff, 0xff, 0x7f]).is_err());
    }
}
