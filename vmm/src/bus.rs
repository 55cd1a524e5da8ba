// SPDX-License-Identifier: Apache-2.0
//! Finding the device behind a guest address: a sorted list of ranges and a binary search.
//!
//! Used twice per cell, for I/O ports and for memory-mapped registers. Built before the cell starts and immutable
//! from then on, so that vCPU threads search it without a lock.

use std::sync::Arc;

/// What can sit on a bus. Called on vCPU threads, by several at a time; must not block for long.
pub trait BusDevice: Send + Sync {
    /// The guest reads `data.len()` bytes at `offset` of the device's range.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// The guest writes `data` at `offset` of the device's range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Two devices claim the same addresses, or a range is empty or wraps around.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("range {start:#x}+{len:#x} is empty, wraps around or overlaps another device's")]
pub struct OverlapError {
    /// Start of the refused range.
    pub start: u64,
    /// Its length.
    pub len: u64,
}

struct Entry {
    start: u64,
    last: u64,
    device: Arc<dyn BusDevice>,
}

/// A sorted list of address ranges.
#[derive(Default)]
pub struct Bus {
    entries: Vec<Entry>,
}

impl Bus {
    /// A bus without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at `start` for `len` addresses.
    pub fn insert(&mut self, start: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), OverlapError> {
        let overlap = OverlapError { start, len };
        let last = len
            .checked_sub(1)
            .and_then(|n| start.checked_add(n))
            .ok_or(OverlapError { start, len })?;
        let at = self.entries.partition_point(|e| e.last < start);
        if self.entries.get(at).is_some_and(|next| next.start <= last) {
            return Err(overlap);
        }
        self.entries.insert(at, Entry { start, last, device });
        Ok(())
    }

    fn find(&self, address: u64, len: usize) -> Option<(&dyn BusDevice, u64)> {
        let at = self.entries.partition_point(|e| e.last < address);
        let entry = self.entries.get(at).filter(|e| e.start <= address)?;
        let last = address.checked_add(u64::try_from(len).ok()?.checked_sub(1)?)?;
        // An access that reaches over the end of a device belongs to nobody.
        (last <= entry.last).then(|| (&*entry.device, address - entry.start))
    }

    /// Reads from whatever is at `address`; `false` when nothing is (or `data` is empty), and `data` is untouched.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                device.read(offset, data);
                true
            }
            None => false,
        }
    }

    /// Writes to whatever is at `address`; `false` when nothing is.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn accesses_reach_the_device_with_its_offset() {
        let mut bus = Bus::new();
        let devices: Vec<Arc<Recorder>> = (0..3).map(|_| Arc::default()).collect();
        // Inserted out of order on purpose.
        for n in [1u64, 0, 2] {
            bus.insert(
                0x1000 * (n + 1),
                0x10,
                Arc::clone(&devices[usize::try_from(n).unwrap()]) as _,
            )
            .unwrap();
        }
        let mut data = [0; 2];
        assert!(bus.read(0x2005, &mut data));
        assert_eq!(data, [5, 5]);
        assert!(bus.write(0x300f, &[9]));
        assert_eq!(*devices[2].0.lock().unwrap(), [(0xf, vec![9])]);
    }

    #[test]
    fn holes_ends_and_straddling_accesses_belong_to_nobody() {
        let mut bus = Bus::new();
        bus.insert(0x1000, 0x10, Arc::<Recorder>::default()).unwrap();
        bus.insert(0x1010, 0x10, Arc::<Recorder>::default()).unwrap();
        let mut four = [0xaa; 4];
        for address in [0, 0xfff, 0x100e, 0x1020, u64::MAX] {
            assert!(!bus.read(address, &mut four), "{address:#x}");
        }
        assert_eq!(four, [0xaa; 4]);
        assert!(!bus.read(0x1000, &mut []));
    }

    #[test]
    fn overlaps_are_refused() {
        let mut bus = Bus::new();
        bus.insert(0x1000, 0x10, Arc::<Recorder>::default()).unwrap();
        for (start, len) in [
            (0x1000, 0x10),
            (0xfff, 2),
            (0x100f, 1),
            (0x800, 0x1000),
            (5, 0),
            (u64::MAX, 2),
        ] {
            assert!(
                bus.insert(start, len, Arc::<Recorder>::default()).is_err(),
                "{start:#x}"
            );
        }
        bus.insert(u64::MAX, 1, Arc::<Recorder>::default()).unwrap();
    }
}
