// SPDX-License-Identifier: Apache-2.0
//! The keys that leave a container running in the background, found in what the user types.

/// A sequence of keys; docker's default is ctrl-p, ctrl-q.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys(Vec<u8>);

impl Default for Keys {
    fn default() -> Self {
        Self(vec![0x10, 0x11])
    }
}

impl Keys {
    /// Reads docker's form: `a`, `ctrl-a` to `ctrl-z`, `ctrl-@`, `ctrl-[` and so on, with commas between. An empty text is
    /// the default.
    ///
    /// # Errors
    /// docker's words.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Ok(Self::default());
        }
        let key = |part: &str| -> Option<u8> {
            match (part.strip_prefix("ctrl-"), part.as_bytes()) {
                (_, [key]) => Some(*key),
                (Some(name), _) => match name.as_bytes() {
                    [c @ (b'a'..=b'z')] => Some(c - b'a' + 1),
                    [b'@'] => Some(0),
                    [c @ (b'[' | b'\\' | b']' | b'^' | b'_')] => Some(c - b'[' + 27),
                    _ => None,
                },
                (None, _) => None,
            }
        };
        let keys: Option<Vec<u8>> = text.split(',').map(key).collect();
        keys.map(Self)
            .ok_or_else(|| format!("invalid detach keys ({text}) provided"))
    }
}

/// Looks for the keys in a stream of bytes.
#[derive(Debug)]
pub struct Scanner {
    keys: Vec<u8>,
    /// So many of them have come.
    seen: usize,
}

impl Scanner {
    /// A scanner at the start of a stream.
    pub fn new(keys: Keys) -> Self {
        Self {
            keys: keys.0,
            seen: 0,
        }
    }

    /// Takes bytes of the stream. What is to be passed on is added to `out`; a part of the sequence is held back until it
    /// is known not to be one. Answers whether the sequence is complete; the rest of the bytes is then dropped.
    pub fn take(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> bool {
        for byte in bytes {
            if self.keys.get(self.seen) != Some(byte) {
                out.extend(self.keys.iter().take(self.seen));
                self.seen = 0;
            }
            if self.keys.get(self.seen) == Some(byte) {
                self.seen += 1;
            } else {
                out.push(*byte);
            }
            if self.seen == self.keys.len() {
                return true;
            }
        }
        false
    }

    /// What is held back at the end of the stream.
    pub fn rest(&self) -> &[u8] {
        self.keys.get(..self.seen).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_in_dockers_form() {
        for (text, keys) in [
            ("", &[16, 17][..]),
            ("ctrl-p,ctrl-q", &[16, 17]),
            ("a", b"a"),
            (
                "ctrl-@,ctrl-[,ctrl-\\,ctrl-],ctrl-^,ctrl-_",
                &[0, 27, 28, 29, 30, 31],
            ),
            ("ctrl-a,x", b"\x01x"),
        ] {
            assert_eq!(Keys::parse(text).unwrap().0, keys, "{text}");
        }
        for wrong in ["ab", "ctrl-", "ctrl-A", "ctrl-1", "a,", ",", "ctrl-pp"] {
            assert!(Keys::parse(wrong).unwrap_err().contains(wrong), "{wrong}");
        }
    }

    #[test]
    fn the_sequence_is_found_wherever_it_is_cut() {
        let scan = |pieces: &[&[u8]]| {
            let mut scanner = Scanner::new(Keys::parse("ctrl-p,ctrl-q").unwrap());
            let mut out = Vec::new();
            let found = pieces.iter().any(|piece| scanner.take(piece, &mut out));
            if !found {
                out.extend(scanner.rest());
            }
            (out, found)
        };
        assert_eq!(scan(&[b"ls\x10\x11more"]), (b"ls".to_vec(), true));
        assert_eq!(scan(&[b"ls\x10", b"\x11"]), (b"ls".to_vec(), true));
        assert_eq!(scan(&[b"\x10x\x11"]), (b"\x10x\x11".to_vec(), false));
        assert_eq!(scan(&[b"\x10\x10\x11"]), (b"\x10".to_vec(), true));
        assert_eq!(scan(&[b"a\x10"]), (b"a\x10".to_vec(), false));
        assert_eq!(scan(&[b"", b"\x11\x10"]), (b"\x11\x10".to_vec(), false));
    }
}
