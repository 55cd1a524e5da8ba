// SPDX-License-Identifier: Apache-2.0
//! The control side: configuration space, features and what the tap is told of them.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::NetMetrics;
use super::handler::{self, HandlerState, NetHandler, Pair};
use super::tap::{self, TapError, offload};
use crate::state::{SavedState, StateError};
use crate::virtio::{
    ActivateError, ActivationContext, ActiveDevice, ConfigSignal, DeviceType, RestoreError, VirtioDevice,
    copy_config,
};

pub(super) const WHAT: &str = "net";
pub(super) const STATE_VERSION: u16 = 2;
const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 16;
const MAX_PAIRS: usize = 8;
/// Smallest MTU of a device (5.1.4.1: what IPv4 asks of every network).
const MIN_MTU: u16 = 68;

/// Feature bits (5.1.3).
pub(super) mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const GUEST_ECN: u64 = 1 << 9;
    pub const GUEST_UFO: u64 = 1 << 10;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const HOST_ECN: u64 = 1 << 13;
    pub const HOST_UFO: u64 = 1 << 14;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const CTRL_VQ: u64 = 1 << 17;
    pub const CTRL_RX: u64 = 1 << 18;
    pub const MQ: u64 = 1 << 22;
    pub const CTRL_MAC_ADDR: u64 = 1 << 23;
    pub const GUEST_USO4: u64 = 1 << 54;
    pub const GUEST_USO6: u64 = 1 << 55;
    pub const HOST_USO: u64 = 1 << 56;

    /// What taps of any kernel take.
    pub const CLASSIC: u64 =
        CSUM | GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | HOST_TSO4 | HOST_TSO6 | HOST_ECN;

    /// What lets frames be bigger than the MTU on their way to the guest.
    pub const GUEST_BIG: u64 = GUEST_TSO4 | GUEST_TSO6 | GUEST_UFO | GUEST_USO4 | GUEST_USO6;
}

/// What a network device is connected to.
#[derive(Debug)]
pub enum NetBackend {
    /// A tap, opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR: one descriptor per queue pair, 1 to 8; several need
    /// IFF_MULTI_QUEUE. Set to O_NONBLOCK.
    Tap(Vec<OwnedFd>),
    /// A Unix socket of type SOCK_SEQPACKET or SOCK_DGRAM, set to O_NONBLOCK. Without offloads.
    Socket(OwnedFd),
    /// Nothing yet: what the guest sends is dropped. For a guest that is saved to be cloned; a clone's device that is
    /// connected to a tap with as many queue pairs takes over its state. Offers what any tap takes.
    Unplugged {
        /// Queue pairs, 1 to 8.
        pairs: usize,
    },
}

impl NetBackend {
    /// Queue pairs.
    pub fn pairs(&self) -> usize {
        match self {
            Self::Tap(fds) => fds.len(),
            Self::Socket(_) => 1,
            Self::Unplugged { pairs } => *pairs,
        }
    }

    /// Closes a tap's queue pairs beyond the first `most`: for a card that has fewer than the tap.
    pub fn limit_pairs(&mut self, most: usize) {
        if let Self::Tap(fds) = self {
            fds.truncate(most);
        }
    }

    fn kind(&self) -> Kind {
        match self {
            Self::Tap(_) => Kind::Tap,
            Self::Socket(_) => Kind::Socket,
            Self::Unplugged { .. } => Kind::Unplugged,
        }
    }

    /// A descriptor per queue pair.
    fn into_fds(self) -> Result<Vec<OwnedFd>, TapError> {
        match self {
            Self::Tap(fds) => Ok(fds),
            Self::Socket(fd) => Ok(vec![fd]),
            // Never read, written or watched.
            Self::Unplugged { pairs } => (0..pairs)
                .map(|_| File::open("/dev/null").map(OwnedFd::from))
                .collect::<Result<_, _>>()
                .map_err(|source| TapError::Host {
                    what: "do without",
                    source,
                }),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Tap,
    Socket,
    Unplugged,
}

/// How a network device is made.
#[derive(Debug)]
pub struct NetConfig {
    /// What it is connected to.
    pub backend: NetBackend,
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// The network's MTU, told to the driver; at least 68. `None` leaves the driver's default (1500).
    pub mtu: Option<u16>,
}

/// What control side and handle share.
struct Common {
    link_up: AtomicBool,
    signal: ConfigSignal,
}

/// A way to a network device that is in use by a guest.
#[derive(Clone)]
pub struct NetHandle {
    common: Arc<Common>,
    metrics: Arc<NetMetrics>,
}

impl NetHandle {
    /// What the device counts.
    pub fn metrics(&self) -> &NetMetrics {
        &self.metrics
    }

    /// Plugs the cable in or out, as far as the driver is concerned. Frames pass all the same.
    pub fn set_link(&self, up: bool) {
        if self.common.link_up.swap(up, Ordering::AcqRel) == up {
            return;
        }
        self.common.signal.changed();
    }
}

#[derive(Serialize, Deserialize)]
struct NetState {
    link_up: bool,
}

/// A virtio network device.
pub struct Net {
    common: Arc<Common>,
    fds: Vec<Arc<OwnedFd>>,
    kind: Kind,
    mac: [u8; 6],
    mtu: Option<u16>,
    offered: u64,
    queue_sizes: Vec<u16>,
    metrics: Arc<NetMetrics>,
}

impl Net {
    /// A device that no driver has touched.
    pub fn new(config: NetConfig) -> Result<Self, TapError> {
        let (pairs, kind) = (config.backend.pairs(), config.backend.kind());
        if !(1..=MAX_PAIRS).contains(&pairs) {
            return Err(TapError::Pairs(pairs));
        }
        let fds = config.backend.into_fds()?;
        for fd in &fds {
            if kind == Kind::Tap {
                tap::prepare(fd.as_fd(), fds.len() > 1)?;
            }
            let nonblocking = || {
                let flags = rustix::fs::fcntl_getfl(fd)?;
                rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK)
            };
            nonblocking().map_err(|errno| TapError::Host {
                what: "set O_NONBLOCK",
                source: errno.into(),
            })?;
        }
        let mut offered = feature::MAC | feature::STATUS | feature::MRG_RXBUF;
        offered |= feature::CTRL_VQ | feature::CTRL_RX | feature::CTRL_MAC_ADDR;
        if config.mtu.is_some() {
            offered |= feature::MTU;
        }
        offered |= match kind {
            Kind::Tap => Self::offloads(&fds)?,
            Kind::Socket => 0,
            Kind::Unplugged => feature::CLASSIC,
        };
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * fds.len()];
        queue_sizes.push(CONTROL_QUEUE_SIZE);
        if fds.len() > 1 {
            offered |= feature::MQ;
        }
        Ok(Self {
            common: Arc::new(Common {
                link_up: AtomicBool::new(true),
                signal: ConfigSignal::default(),
            }),
            fds: fds.into_iter().map(Arc::new).collect(),
            kind,
            mac: config.mac,
            mtu: config.mtu.map(|mtu| mtu.max(MIN_MTU)),
            offered,
            queue_sizes,
            metrics: Arc::default(),
        })
    }

    /// Asks the tap what this kernel can do, and leaves it with nothing turned on.
    fn offloads(fds: &[OwnedFd]) -> Result<u64, TapError> {
        let Some(fd) = fds.first() else { return Ok(0) };
        let classic = offload::CSUM | offload::TSO4 | offload::TSO6 | offload::TSO_ECN;
        let can = |offloads| tap::set_offload(fd.as_fd(), offloads).is_ok();
        let mut features = 0;
        if can(classic) {
            features |= feature::CLASSIC;
            if can(classic | offload::UFO) {
                features |= feature::GUEST_UFO | feature::HOST_UFO;
            }
            // Since Linux 6.2.
            if can(classic | offload::USO4 | offload::USO6) {
                features |= feature::GUEST_USO4 | feature::GUEST_USO6 | feature::HOST_USO;
            }
        }
        tap::set_offload(fd.as_fd(), 0).map_err(|source| TapError::Host {
            what: "set the offloads",
            source,
        })?;
        Ok(features)
    }

    /// A handle that stays good when the device has gone behind its transport.
    pub fn handle(&self) -> NetHandle {
        NetHandle {
            common: Arc::clone(&self.common),
            metrics: Arc::clone(&self.metrics),
        }
    }

    /// The same for who has a handle to a device that this one replaces: it is a handle to this one.
    #[must_use]
    pub fn in_place_of(self, handle: &NetHandle) -> Self {
        Self {
            common: Arc::clone(&handle.common),
            metrics: Arc::clone(&handle.metrics),
            ..self
        }
    }

    /// What the device counts.
    pub fn metrics(&self) -> &Arc<NetMetrics> {
        &self.metrics
    }

    fn start(
        &mut self,
        mut context: ActivationContext,
        state: HandlerState,
    ) -> Result<Arc<Mutex<dyn ActiveDevice>>, ActivateError> {
        let features = context.features;
        let multi_queue = features & feature::MQ != 0;
        let pairs = if multi_queue { self.fds.len() } else { 1 };
        // 5.1.2: behind the pairs, of which there is one without MQ.
        let control = match features & feature::CTRL_VQ {
            0 => None,
            _ => Some(context.take_queue(2 * pairs)?),
        };
        let mut live = Vec::new();
        for index in 0..pairs {
            // The first pair must be there; a driver may leave out others.
            let receive = context.take_queue(2 * index);
            let transmit = context.take_queue(2 * index + 1);
            let (receive, transmit) = match (receive, transmit) {
                (Ok(receive), Ok(transmit)) => (receive, transmit),
                (Err(error), _) | (_, Err(error)) if index == 0 => return Err(error),
                _ => break,
            };
            let Some(fd) = self.fds.get(index) else { break };
            let mut pair = Pair::new(index, receive, transmit, Arc::clone(fd));
            pair.gone = self.kind == Kind::Unplugged;
            live.push(pair);
        }
        if self.kind == Kind::Tap
            && let Some(fd) = self.fds.first()
        {
            tap::set_offload(fd.as_fd(), tap_offloads(features)).map_err(|source| {
                let what = "the tap does not take the offloads that it took before";
                ActivateError::Host { what, source }
            })?;
        }
        self.common.signal.connect(Some(context.interrupt));
        let common = handler::Common::new(
            features,
            state.filter,
            usize::from(self.mtu.unwrap_or(1500)),
            context.health,
            Arc::clone(&self.metrics),
        );
        let mut handler = NetHandler::new(live, control, self.queue_sizes.len(), common);
        handler
            .set_pairs(state.pairs)
            .map_err(|source| ActivateError::Host {
                what: "cannot attach the queues of the tap",
                source,
            })?;
        // Queues that no pair stands for get no flows.
        let others = self.fds.iter().skip(handler.pair_count().max(1));
        for fd in others.filter(|_| self.kind == Kind::Tap) {
            tap::set_attached(fd.as_fd(), false).map_err(|source| ActivateError::Host {
                what: "cannot detach a queue of the tap",
                source,
            })?;
        }
        Ok(Arc::new(Mutex::new(handler)))
    }
}

/// What the tap is told when the driver has accepted `features`.
fn tap_offloads(features: u64) -> u32 {
    if features & feature::GUEST_CSUM == 0 {
        // All others build on it.
        return 0;
    }
    let mut offloads = offload::CSUM;
    for (feature, offload) in [
        (feature::GUEST_TSO4, offload::TSO4),
        (feature::GUEST_TSO6, offload::TSO6),
        (feature::GUEST_ECN, offload::TSO_ECN),
        (feature::GUEST_UFO, offload::UFO),
    ] {
        if features & feature != 0 {
            offloads |= offload;
        }
    }
    // The kernel takes both or neither.
    if features & feature::GUEST_USO4 != 0 && features & feature::GUEST_USO6 != 0 {
        offloads |= offload::USO4 | offload::USO6;
    }
    offloads
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn queue_served_at_once(&self) -> Option<usize> {
        // The control queue, but for a driver that leaves the other pairs alone: its is the third one.
        self.queue_sizes.len().checked_sub(1)
    }

    fn features(&self) -> u64 {
        self.offered
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        // struct virtio_net_config (5.1.4): mac, status, max_virtqueue_pairs, mtu.
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.mac);
        let link_up = u16::from(self.common.link_up.load(Ordering::Acquire));
        config[6..8].copy_from_slice(&link_up.to_le_bytes());
        // At most MAX_PAIRS.
        let pairs = u16::try_from(self.fds.len()).unwrap_or(1);
        config[8..10].copy_from_slice(&pairs.to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.unwrap_or(0).to_le_bytes());
        copy_config(&config, offset, data);
    }

    fn activate(
        &mut self,
        context: ActivationContext,
    ) -> Result<Arc<Mutex<dyn ActiveDevice>>, ActivateError> {
        self.start(context, HandlerState::new(self.mac))
    }

    fn reset(&mut self) {
        self.common.signal.connect(None);
    }

    fn save(&self) -> Result<SavedState, StateError> {
        let state = NetState {
            link_up: self.common.link_up.load(Ordering::Acquire),
        };
        SavedState::encode(WHAT, STATE_VERSION, &state)
    }

    fn restore(&mut self, state: &SavedState) -> Result<(), StateError> {
        let state: NetState = state.decode(WHAT, STATE_VERSION)?;
        self.common.link_up.store(state.link_up, Ordering::Release);
        Ok(())
    }

    fn restore_active(
        &mut self,
        context: ActivationContext,
        state: &SavedState,
    ) -> Result<Arc<Mutex<dyn ActiveDevice>>, RestoreError> {
        let state: HandlerState = state.decode(WHAT, STATE_VERSION)?;
        if state.pairs == 0 || usize::from(state.pairs) > self.fds.len() {
            return Err(StateError::Invalid {
                what: WHAT,
                why: format!("it uses {} queue pairs", state.pairs),
            }
            .into());
        }
        if !state.filter.is_sound() {
            return Err(StateError::Invalid {
                what: WHAT,
                why: "it wants frames to more addresses than are kept".to_owned(),
            }
            .into());
        }
        Ok(self.start(context, state)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tap_hears_what_was_negotiated() {
        assert_eq!(tap_offloads(0), 0);
        assert_eq!(tap_offloads(feature::GUEST_TSO4), 0, "without checksums");
        assert_eq!(tap_offloads(feature::GUEST_CSUM), offload::CSUM);
        let half = feature::GUEST_CSUM | feature::GUEST_USO4;
        assert_eq!(tap_offloads(half), offload::CSUM);
        assert_eq!(tap_offloads(u64::MAX), 0x7f);
    }
}
