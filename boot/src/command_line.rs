// SPDX-License-Identifier: Apache-2.0
//! The kernel's command line, built piece by piece with its size checked.
//!
//! linux-loader's `Cmdline` checks the characters; this module adds the size that Linux really reads, and
//! errors that quote the piece which did not fit.

use linux_loader::cmdline::Cmdline;
use std::ffi::CString;

/// Bytes of command line that Linux reads on x86 (`COMMAND_LINE_SIZE`), its closing NUL included. What is
/// longer would be cut off silently by the guest, so it is refused here.
pub const COMMAND_LINE_SIZE: usize = 2048;

/// Why a piece of command line was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The whole would be longer than Linux reads.
    #[error(
        "kernel command line too long: {used} bytes used, {piece_len} more for \"{piece}\" do not fit in {}; \
         shorten it or attach fewer devices",
        COMMAND_LINE_SIZE
    )]
    TooLong {
        /// Bytes in use, the closing NUL included.
        used: usize,
        /// Length of the refused piece in bytes.
        piece_len: usize,
        /// Its first 40 characters.
        piece: String,
    },
    /// Control or non-ASCII characters.
    #[error("kernel command line: \"{piece}\" is not printable ASCII without quotes left open")]
    Characters {
        /// First 40 characters of the refused piece, escaped.
        piece: String,
    },
}

/// A kernel command line of at most [`COMMAND_LINE_SIZE`] bytes.
#[derive(Clone, Debug)]
pub struct KernelCommandLine {
    inner: Cmdline,
    used: usize,
}

impl KernelCommandLine {
    /// An empty command line.
    pub fn new() -> Result<Self, Error> {
        let inner = Cmdline::new(COMMAND_LINE_SIZE).map_err(|_| Error::TooLong {
            used: 0,
            piece_len: 0,
            piece: String::new(),
        })?;
        Ok(Self { inner, used: 1 })
    }

    /// Appends `text` (one or more parameters separated by blanks). Empty text changes nothing.
    pub fn push(&mut self, text: &str) -> Result<(), Error> {
        let text = text.trim();
        if text.is_empty() {
            return Ok(());
        }
        if !text.bytes().all(|b| (0x20..0x7f).contains(&b)) || !text.matches('"').count().is_multiple_of(2) {
            return Err(Error::Characters { piece: excerpt(text) });
        }
        let separator = usize::from(self.used > 1);
        let too_long = || Error::TooLong {
            used: self.used,
            piece_len: text.len(),
            piece: excerpt(text),
        };
        let used = self
            .used
            .checked_add(separator)
            .and_then(|n| n.checked_add(text.len()))
            .filter(|&n| n <= COMMAND_LINE_SIZE)
            .ok_or_else(too_long)?;
        self.inner
            .insert_str(text)
            .map_err(|_| Error::Characters { piece: excerpt(text) })?;
        self.used = used;
        Ok(())
    }

    /// Appends `virtio_mmio.device=<size>K@<base>:<gsi>`, by which a kernel without ACPI finds a device
    /// (Documentation/admin-guide/kernel-parameters.txt).
    pub fn push_virtio_mmio(&mut self, base: u64, size: u64, gsi: u32) -> Result<(), Error> {
        self.push(&format!("virtio_mmio.device={}K@{base:#x}:{gsi}", size / 1024))
    }

    /// Length in bytes with the closing NUL.
    pub fn len_with_nul(&self) -> usize {
        self.used
    }

    /// The text with its closing NUL, as guest memory receives it.
    pub fn to_bytes_with_nul(&self) -> Vec<u8> {
        // Characters were checked on the way in: no NUL is left to fail on.
        let text: CString = self.inner.as_cstring().unwrap_or_default();
        text.into_bytes_with_nul()
    }
}

fn excerpt(text: &str) -> String {
    text.escape_default().take(40).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joins_with_blanks_and_ends_with_nul() {
        let mut line = KernelCommandLine::new().unwrap();
        assert_eq!(line.to_bytes_with_nul(), b"\0");
        line.push("quiet").unwrap();
        line.push("  ").unwrap();
        line.push_virtio_mmio(0xd000_0000, 0x1000, 5).unwrap();
        assert_eq!(
            line.to_bytes_with_nul(),
            b"quiet virtio_mmio.device=4K@0xd0000000:5\0"
        );
        assert_eq!(line.len_with_nul(), line.to_bytes_with_nul().len());
    }

    #[test]
    fn exactly_full_fits_and_one_more_does_not() {
        let mut line = KernelCommandLine::new().unwrap();
        line.push(&"a".repeat(COMMAND_LINE_SIZE - 1)).unwrap();
        assert_eq!(line.to_bytes_with_nul().len(), COMMAND_LINE_SIZE);
        assert!(matches!(
            line.push("b"),
            Err(Error::TooLong {
                used: COMMAND_LINE_SIZE,
                ..
            })
        ));
        let mut line = KernelCommandLine::new().unwrap();
        assert!(line.push(&"a".repeat(COMMAND_LINE_SIZE)).is_err());
    }

    #[test]
    fn control_characters_and_open_quotes_are_refused() {
        let mut line = KernelCommandLine::new().unwrap();
        for bad in ["a\0b", "a\nb", "caf\u{e9}", "x=\"y"] {
            assert!(matches!(line.push(bad), Err(Error::Characters { .. })), "{bad:?}");
        }
        assert_eq!(line.len_with_nul(), 1);
    }
}
