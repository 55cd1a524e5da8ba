// SPDX-License-Identifier: Apache-2.0
//! How large a VM has to be for what runs in it: arithmetic only.
//!
//! ```text
//!  processors = what the limits add up to, rounded up
//!  memory     = what the limits add up to, and the overhead, in steps of a huge page
//! ```
//! Those without a limit share what the sandboxer gives a pod without one: it is counted once, whatever their number, and
//! has the overhead in it already. If they request more than that together, they have what they request.

use oci_spec::runtime::{LinuxResources, Spec};
use std::collections::HashMap;

/// RAM comes in steps of a huge page.
pub const STEP: u64 = 2 << 20;
/// Least RAM of a VM: guest kernel and agent, and a little for a container.
const LEAST: u64 = 64 << 20;
/// Length of a CPU quota's period in microseconds, where none is named.
const PERIOD: u64 = 100_000;
/// Parts of a processor that quotas are added up in.
const PARTS: u64 = 1_000_000;
/// CPU shares by which kubelet says that one processor is requested.
const SHARES: u64 = 1024;
/// In cgroup v2's terms, memory that is requested: kubelet says so with its feature MemoryQoS.
const MEMORY_REQUEST: &str = "memory.min";

/// Processors and memory of a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// vCPUs.
    pub cpus: u8,
    /// Bytes of RAM.
    pub memory: u64,
}

/// What a container, or all of a pod's, may use, and what it requests. Nothing said is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Microseconds of CPU time in each period.
    quota: Option<u64>,
    /// Microseconds.
    period: Option<u64>,
    /// Bytes.
    memory: Option<u64>,
    /// Parts of a [`SHARES`]th of a processor that are requested.
    shares: Option<u64>,
    /// Bytes that are requested.
    requested_memory: Option<u64>,
}

fn positive(number: i64) -> Option<u64> {
    u64::try_from(number).ok().filter(|number| *number > 0)
}

/// What cgroup v2's keys say of requested memory.
fn requested_memory(unified: &HashMap<String, String>) -> Option<u64> {
    unified.get(MEMORY_REQUEST)?.trim().parse().ok()
}

/// A fraction of a processor in [`PARTS`], rounded down: a third and two thirds are one.
fn parts(number: u64, of: u64) -> u64 {
    let parts = u128::from(number) * u128::from(PARTS) / u128::from(of.max(1));
    u64::try_from(parts).unwrap_or(u64::MAX)
}

impl Limits {
    /// As CRI says it: what is not positive is not said.
    pub fn new(quota: i64, period: i64, memory: i64) -> Self {
        Self {
            quota: positive(quota),
            period: positive(period),
            memory: positive(memory),
            ..Self::default()
        }
    }

    /// With what CRI says of requests: shares of processors, and keys of cgroup v2.
    #[must_use]
    pub fn requesting(self, shares: i64, unified: &HashMap<String, String>) -> Self {
        Self {
            shares: positive(shares),
            requested_memory: requested_memory(unified).filter(|bytes| *bytes > 0),
            ..self
        }
    }

    /// Those of a container that is to be made.
    pub fn of_spec(spec: &Spec) -> Self {
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        resources.map_or_else(Self::default, |resources| Self::default().updated(resources))
    }

    /// With what an update names: 0 is not named, a negative number is no limit.
    #[must_use]
    pub fn updated(self, resources: &LinuxResources) -> Self {
        let change = |now: Option<u64>, named: Option<i64>| match named {
            None | Some(0) => now,
            Some(number) => positive(number),
        };
        let cpu = resources.cpu().as_ref();
        let memory = resources.memory().as_ref();
        Self {
            quota: change(self.quota, cpu.and_then(|cpu| cpu.quota())),
            period: cpu
                .and_then(|cpu| cpu.period())
                .filter(|period| *period > 0)
                .or(self.period),
            memory: change(self.memory, memory.and_then(|memory| memory.limit())),
            shares: cpu
                .and_then(|cpu| cpu.shares())
                .filter(|shares| *shares > 0)
                .or(self.shares),
            // Unlike the others it is a number's text: 0 is one that was named.
            requested_memory: resources
                .unified()
                .as_ref()
                .and_then(requested_memory)
                .or(self.requested_memory)
                .filter(|bytes| *bytes > 0),
        }
    }

    /// Processors that it may use, in [`PARTS`].
    fn cpu_parts(&self) -> Option<u64> {
        let period = self.period.unwrap_or(PERIOD);
        self.quota.map(|quota| parts(quota, period))
    }

    /// Processors that it requests, in [`PARTS`].
    fn requested_parts(&self) -> u64 {
        self.shares.map_or(0, |shares| parts(shares, SHARES))
    }
}

/// What is needed, whether it can be had or not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    /// vCPUs.
    pub cpus: u64,
    /// Bytes of RAM.
    pub memory: u64,
}

impl Demand {
    /// What is enough for each of the two.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self {
            cpus: self.cpus.max(other.cpus),
            memory: self.memory.max(other.memory),
        }
    }
}

impl From<Size> for Demand {
    fn from(size: Size) -> Self {
        Self {
            cpus: size.cpus.into(),
            memory: size.memory,
        }
    }
}

/// More than a sandboxer allows.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("{what} of {asked} is more than the sandboxer's {key} of {most}")]
pub struct TooMuch {
    /// "a memory size", ...
    pub what: &'static str,
    /// What would be needed.
    pub asked: u64,
    /// The key of the configuration.
    pub key: &'static str,
    /// Its value.
    pub most: u64,
}

/// What a sandboxer's pods are sized by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizing {
    /// For those without limits.
    pub default: Size,
    /// The most a VM can have.
    pub most: Size,
    /// Bytes for kernel and agent, beside what containers with limits need.
    pub overhead: u64,
}

impl Sizing {
    /// What a VM needs for all of these together.
    pub fn demand(&self, limits: impl IntoIterator<Item = Limits>) -> Demand {
        let (mut parts, mut memory) = (0_u64, 0_u64);
        // Of those without limits.
        let (mut requested_parts, mut requested_memory) = (0_u64, 0_u64);
        let (mut any, mut no_cpu, mut no_memory) = (false, false, false);
        for limits in limits {
            any = true;
            match limits.cpu_parts() {
                Some(more) => parts = parts.saturating_add(more),
                None => {
                    no_cpu = true;
                    requested_parts = requested_parts.saturating_add(limits.requested_parts());
                }
            }
            match limits.memory {
                Some(more) => memory = memory.saturating_add(more),
                None => {
                    no_memory = true;
                    let more = limits.requested_memory.unwrap_or(0);
                    requested_memory = requested_memory.saturating_add(more);
                }
            }
        }
        if !any {
            return Demand::default();
        }
        if no_cpu {
            let default = u64::from(self.default.cpus).saturating_mul(PARTS);
            parts = parts.saturating_add(requested_parts.max(default));
        }
        let requested = requested_memory.saturating_add(self.overhead);
        let beside = match (no_memory, requested_memory) {
            (false, _) => self.overhead,
            (true, 0) => self.default.memory,
            (true, _) => requested.max(self.default.memory),
        };
        let memory = memory
            .saturating_add(beside)
            .checked_next_multiple_of(STEP)
            .unwrap_or(u64::MAX);
        Demand {
            cpus: parts.div_ceil(PARTS).max(1),
            memory: memory.max(LEAST),
        }
    }

    /// The size that is needed, if it can be had.
    ///
    /// # Errors
    /// Which key of the sandboxer stands against it.
    pub fn check(&self, demand: Demand) -> Result<Size, TooMuch> {
        let size = self.clamp(demand);
        if demand.cpus > size.cpus.into() {
            return Err(TooMuch {
                what: "a number of processors",
                asked: demand.cpus,
                key: "max_vcpus",
                most: self.most.cpus.into(),
            });
        }
        if demand.memory > size.memory {
            return Err(TooMuch {
                what: "a memory size",
                asked: demand.memory,
                key: "max_memory",
                most: self.most.memory,
            });
        }
        Ok(size)
    }

    /// The size that is needed, or as much of it as can be had.
    pub fn clamp(&self, demand: Demand) -> Size {
        Size {
            cpus: u8::try_from(demand.cpus).unwrap_or(u8::MAX).min(self.most.cpus),
            memory: demand.memory.min(self.most.memory),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn sizing() -> Sizing {
        Sizing {
            default: Size {
                cpus: 1,
                memory: 256 * MIB,
            },
            most: Size {
                cpus: 8,
                memory: 4096 * MIB,
            },
            overhead: 64 * MIB,
        }
    }

    fn of(quota: i64, mib: i64) -> Limits {
        Limits::new(quota, 0, mib << 20)
    }

    fn demand(limits: &[Limits]) -> (u64, u64) {
        let demand = sizing().demand(limits.iter().copied());
        assert!(demand.memory.is_multiple_of(STEP));
        (demand.cpus, demand.memory / MIB)
    }

    #[test]
    fn limits_add_up() {
        assert_eq!(demand(&[]), (0, 0));
        assert_eq!(demand(&[of(0, 0)]), (1, 256));
        assert_eq!(demand(&[of(50_000, 64)]), (1, 128));
        assert_eq!(demand(&[of(50_000, 64), of(50_000, 64)]), (1, 192));
        assert_eq!(demand(&[of(50_000, 64), of(50_001, 65)]), (2, 194));
        // Those without limits share one default, which has the overhead in it.
        assert_eq!(demand(&[of(0, 0), of(0, 0)]), (1, 256));
        assert_eq!(demand(&[of(150_000, 100), of(0, 0)]), (3, 356));
        assert_eq!(demand(&[of(0, 100), of(250_000, 0)]), (4, 356));
        // Thirds of a processor.
        let thirds = [Limits::new(1, 3, 1), Limits::new(2, 3, 1)];
        assert_eq!(demand(&thirds), (1, 66));
        assert_eq!(demand(&[of(1, 1), of(-1, 1)]).0, 2);
        assert_eq!(demand(&[Limits::new(0, 0, 1)]).1, 66);
    }

    fn unified(memory_min: &str) -> HashMap<String, String> {
        HashMap::from([(MEMORY_REQUEST.to_owned(), memory_min.to_owned())])
    }

    #[test]
    fn requests_count_where_there_is_no_limit() {
        let request = |limits: Limits, shares: i64, mib: u64| {
            limits.requesting(shares, &unified(&(mib * MIB).to_string()))
        };
        // What kubelet says where nothing is requested.
        assert_eq!(demand(&[request(of(0, 0), 2, 0)]), (1, 256));
        assert_eq!(demand(&[of(0, 0).requesting(-1, &unified("max"))]), (1, 256));
        // The default is enough, up to what it is; the overhead is beside what is requested.
        assert_eq!(demand(&[request(of(0, 0), 1024, 192)]), (1, 256));
        assert_eq!(demand(&[request(of(0, 0), 1025, 193)]), (2, 258));
        assert_eq!(demand(&[request(of(0, 0), 2560, 1000)]), (3, 1064));
        // Together.
        let small = request(of(0, 0), 1536, 128);
        assert_eq!(demand(&[small, small, of(0, 0)]), (3, 320));
        // Limits win, each for its own.
        assert_eq!(demand(&[request(of(50_000, 64), 4096, 1000)]), (1, 128));
        assert_eq!(demand(&[request(of(150_000, 0), 4096, 1000)]), (2, 1064));
        assert_eq!(
            demand(&[of(150_000, 100), request(of(0, 0), 2048, 300)]),
            (4, 464)
        );
        let sizing = sizing();
        let too_many = sizing.demand([request(of(0, 0), 9 * 1024, 0)]);
        assert_eq!(sizing.check(too_many).unwrap_err().key, "max_vcpus");
        let too_much = sizing.demand([request(of(0, 0), 0, 4096)]);
        assert_eq!(sizing.check(too_much).unwrap_err().key, "max_memory");
    }

    /// Numbers without an order, always the same ones.
    fn numbers() -> impl Iterator<Item = i64> {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        std::iter::from_fn(move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            // Of every magnitude, and some that say nothing.
            let magnitude = u32::try_from(state >> 58).unwrap();
            let number = i64::try_from((state >> 1) >> (magnitude % 63)).unwrap();
            Some(if state.is_multiple_of(7) { -number } else { number })
        })
    }

    #[test]
    fn what_holds_for_all_limits() {
        let mut numbers = numbers();
        let sizing = sizing();
        for _ in 0..20_000 {
            let mut next = || numbers.next().unwrap();
            let count = next().unsigned_abs() % 5;
            let mut any = || {
                let limits = Limits::new(next(), next(), next());
                limits.requesting(next(), &unified(&next().to_string()))
            };
            let mut all: Vec<Limits> = (0..count).map(|_| any()).collect();
            let before = sizing.demand(all.iter().copied());
            // The order does not count.
            assert_eq!(sizing.demand(all.iter().rev().copied()), before);
            let size = sizing.clamp(before);
            assert!(size.cpus <= sizing.most.cpus && size.memory <= sizing.most.memory);
            match sizing.check(before) {
                Ok(fits) => assert_eq!((Demand::from(fits), fits), (before, size)),
                Err(error) => assert!(error.asked > error.most, "{error}"),
            }
            // Limits are covered.
            let sum = all
                .iter()
                .fold(0_u64, |sum, one| sum.saturating_add(one.memory.unwrap_or(0)));
            assert!(before.memory >= sum);
            // One more container never needs less.
            all.push(any());
            let after = sizing.demand(all.iter().copied());
            assert_eq!(after.max(before), after, "{all:?}");
        }
    }

    #[test]
    fn updates_name_what_changes() {
        let updated = |limits: Limits, json: &str| limits.updated(&serde_json::from_str(json).unwrap());
        let before = Limits::new(50_000, 200_000, 1000);
        assert_eq!(updated(before, "{}"), before);
        let nothing =
            r#"{"memory":{"limit":0},"cpu":{"quota":0,"period":0,"shares":0},"unified":{"memory.max":"1"}}"#;
        assert_eq!(updated(before, nothing), before);
        let requested = updated(before, r#"{"cpu":{"shares":7},"unified":{"memory.min":"9"}}"#);
        assert_eq!(requested, before.requesting(7, &unified("9")));
        assert_eq!(updated(requested, nothing), requested);
        let none = updated(requested, r#"{"unified":{"memory.min":"0"}}"#);
        assert_eq!((none.shares, none.requested_memory), (Some(7), None));
        let quota = updated(before, r#"{"cpu":{"quota":100000}}"#);
        assert_eq!(quota, Limits::new(100_000, 200_000, 1000));
        let unlimited = updated(before, r#"{"memory":{"limit":-1},"cpu":{"quota":-1}}"#);
        assert_eq!(
            (unlimited.quota, unlimited.memory, unlimited.period),
            (None, None, Some(200_000))
        );
    }
}
