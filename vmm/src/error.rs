// SPDX-License-Identifier: Apache-2.0
//! Errors of this crate.

use crate::config::ConfigError;
use crate::memory;
use cloister_boot::x86_64 as boot;
use cloister_devices::block::BlockError;
use cloister_devices::event_loop::EventLoopError;
use cloister_devices::net::TapError;
use cloister_devices::state::StateError;
use cloister_devices::virtio::{RestoreError, TransportError};

/// Why a process cannot host cells.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// There is no /dev/kvm.
    #[error("there is no /dev/kvm: load kvm_intel or kvm_amd, or switch virtualisation on in the firmware")]
    NoKvm,
    /// No right to open it.
    #[error("no right to open /dev/kvm: run as root or join the group kvm")]
    NoRights,
    /// It could not be opened for another reason.
    #[error("cannot open /dev/kvm")]
    OpenKvm(#[source] kvm_ioctls::Error),
    /// Not KVM's stable API.
    #[error("/dev/kvm has API version {found}, 12 is needed")]
    ApiVersion {
        /// What it answered.
        found: i32,
    },
    /// A capability without which nothing runs.
    #[error("this host's KVM lacks {capability}; Linux 4.14 or later is needed")]
    Capability {
        /// Name of the capability.
        capability: &'static str,
    },
    /// KVM refused something else.
    #[error("{what} failed")]
    Kvm {
        /// The call.
        what: &'static str,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// The event loops could not be started.
    #[error("cannot start the device threads")]
    EventLoop(#[from] EventLoopError),
    /// Threads or the kick handler could not be set up.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The host's answer.
        source: std::io::Error,
    },
}

/// Why a cell could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The files of a kind of cell to keep spares of.
    #[error("cannot keep spares: the kernel or the initial RAM disk cannot be looked at")]
    Spare {
        /// The cause.
        source: std::io::Error,
    },
    /// The configuration contradicts itself or asks for too much.
    #[error("bad configuration of cell {name}")]
    Config {
        /// The cell.
        name: String,
        /// What is wrong.
        source: ConfigError,
    },
    /// No memory.
    #[error("cannot get guest memory")]
    Memory(#[from] memory::Error),
    /// The kernel or what belongs to it.
    #[error("cannot prepare the guest's boot")]
    Boot(#[from] boot::Error),
    /// CPUID.
    #[error("cannot compute the guest's CPUID")]
    Cpuid(#[from] boot::cpuid::Error),
    /// A KVM call failed.
    #[error("{what} failed")]
    Kvm {
        /// The call.
        what: &'static str,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// Split interrupt chip asked for and not there.
    #[error("this host's KVM has no split interrupt chip; leave the choice to the program")]
    NoSplitChip,
    /// KVM refused an MSR.
    #[error("KVM refused MSR {index:#x}")]
    Msr {
        /// Its number.
        index: u32,
    },
    /// A device could not be made.
    #[error("cannot make device {device}")]
    Device {
        /// The device.
        device: String,
        /// The cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A device's transport could not be made.
    #[error("cannot make device {device}")]
    Transport {
        /// The device.
        device: String,
        /// The cause.
        source: TransportError,
    },
    /// Device addresses collide: a bug.
    #[error("device addresses collide")]
    Bus(#[from] crate::bus::OverlapError),
    /// A saved cell of another shape.
    #[error("the saved cell has {saved}, the configuration {configured}")]
    Shape {
        /// What the saved one has.
        saved: String,
        /// What was asked for.
        configured: String,
    },
    /// A cell that was saved on another kind of processor.
    #[error("the cell was saved on {saved}, this host has {here}: {why}")]
    Processor {
        /// Name of the processor there.
        saved: String,
        /// Name of the processor here.
        here: String,
        /// The first difference that matters.
        why: String,
    },
    /// A saved state does not fit.
    #[error("cannot restore the saved cell")]
    State(#[from] StateError),
    /// A saved device does not fit.
    #[error("cannot restore device {device}")]
    RestoreDevice {
        /// The device.
        device: String,
        /// The cause.
        source: RestoreError,
    },
    /// No eventfd or thread.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The host's answer.
        source: std::io::Error,
    },
}

/// Why a disk was not attached to a cell, or not detached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// No slots, or none left.
    #[error("every slot for a disk is taken; start the pod with more of them")]
    NoneFree,
    /// Nothing was attached there.
    #[error("no disk is attached at slot {slot}")]
    NotAttached {
        /// The slot asked for.
        slot: usize,
    },
    /// The cell is gone.
    #[error("the cell has stopped")]
    Stopped,
    /// The disk itself.
    #[error("cannot attach the disk")]
    Disk(#[source] BlockError),
    /// Its register page.
    #[error("cannot attach the disk")]
    Transport(#[source] TransportError),
    /// KVM.
    #[error("cannot attach the disk")]
    Connect(#[from] CreateError),
}

/// Why a network card was not plugged in.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// The device there is something else, or there is none.
    #[error("device {position} is no network card")]
    NoCard {
        /// The place asked for.
        position: usize,
    },
    /// The cell must be paused.
    #[error("cannot plug in a network card of a cell that is {state}")]
    State {
        /// The state it is in.
        state: String,
    },
    /// What it is to be connected to.
    #[error("cannot connect the network card")]
    Backend(#[source] TapError),
    /// Its register page.
    #[error("cannot connect the network card")]
    Transport(#[source] TransportError),
    /// It has failed.
    #[error("cannot connect the network card")]
    Save(#[from] StateError),
    /// What it is to be connected to does not fit what it has been so far.
    #[error("cannot connect the network card")]
    Restore(#[from] RestoreError),
    /// KVM.
    #[error("cannot connect the network card")]
    Connect(#[from] CreateError),
}

/// Why a cell did not change its state.
#[derive(Debug, thiserror::Error)]
pub enum LifecycleError {
    /// Not possible from the state it is in.
    #[error("cannot {action} a cell that is {state}")]
    State {
        /// What was asked.
        action: &'static str,
        /// The state it is in.
        state: String,
    },
    /// A vCPU's thread could not be started.
    #[error("cannot start the thread of vCPU {vcpu}")]
    Thread {
        /// The vCPU.
        vcpu: u8,
        /// The host's answer.
        source: std::io::Error,
    },
    /// A vCPU could not be added.
    #[error("cannot add vCPU {vcpu}")]
    Vcpu {
        /// The vCPU.
        vcpu: u8,
        /// The cause.
        source: Box<CreateError>,
    },
    /// Something could not be saved.
    #[error("cannot save the cell")]
    Save(#[from] StateError),
    /// Its image could not be written.
    #[error("cannot save the cell")]
    Image(#[from] crate::image::ImageError),
    /// KVM's statistics could not be read.
    #[error("cannot read KVM's statistics; Linux 5.14 or later has them")]
    Stats(#[source] std::io::Error),
}
