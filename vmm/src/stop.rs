// SPDX-License-Identifier: Apache-2.0
//! Why a cell stopped.
//!
//! KVM reports a kernel that restarts by triple fault (`reboot=t`, how our kernel does it, having no ACPI), one that
//! panicked (`panic=-1` restarts at once) and one that really lost its way by the same exit. What tells them apart is
//! the console: the kernel's last words are looked through. A hostile guest can fake them; it fools only the text of
//! its own report.

use cloister_devices::output_tail::OutputTail;

/// Why a cell stopped. The first reason found wins.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum StopReason {
    /// Somebody on the host asked for it.
    Requested,
    /// Its owner gave it up: what runs in it does not answer any more.
    Unresponsive {
        /// What was asked, and what came.
        why: String,
    },
    /// The guest powered off (ACPI sleep control, or a kernel that said so before it halted).
    PowerOff,
    /// The guest restarted itself: keyboard controller, reset port, or `reboot=t`.
    Reset,
    /// The guest's kernel panicked.
    Panic {
        /// The panic line from the console.
        message: String,
    },
    /// A vCPU triple-faulted without having announced a restart.
    TripleFault {
        /// Index of the vCPU.
        vcpu: u8,
    },
    /// All vCPUs have halted with interrupts disabled: nothing can wake them.
    AllHalted,
    /// A vCPU executed HLT and nothing can wake it (no in-kernel local APIC).
    Halted {
        /// Index of the vCPU.
        vcpu: u8,
    },
    /// KVM could not go on (KVM_EXIT_INTERNAL_ERROR).
    InternalError {
        /// Index of the vCPU.
        vcpu: u8,
        /// KVM's suberror: 1 is an instruction its emulator does not know.
        suberror: u32,
        /// Instruction pointer.
        rip: u64,
        /// Bytes of the instruction where KVM tells them.
        instruction: Vec<u8>,
    },
    /// The processor refused to enter the guest (KVM_EXIT_FAIL_ENTRY).
    FailedEntry {
        /// Index of the vCPU.
        vcpu: u8,
        /// Hardware's reason code.
        reason: u64,
    },
    /// KVM_RUN itself failed: usually guest memory that the host could not supply.
    RunFailed {
        /// Index of the vCPU.
        vcpu: u8,
        /// The error number.
        errno: i32,
    },
    /// KVM left the guest for a reason this program does not know.
    UnknownExit {
        /// Index of the vCPU.
        vcpu: u8,
        /// What it was.
        exit: String,
    },
    /// A device failed: the guest broke its rules, or it panicked, or did not answer any more.
    DeviceFailed {
        /// The device.
        device: String,
        /// What happened.
        why: String,
    },
    /// A vCPU's thread panicked: a bug in this program.
    ThreadPanicked {
        /// Index of the vCPU.
        vcpu: u8,
        /// The panic's message.
        message: String,
    },
}

impl std::fmt::Display for StopReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Requested => write!(f, "stopped on request"),
            Self::Unresponsive { why } => write!(f, "the guest does not respond: {why}"),
            Self::PowerOff => write!(f, "the guest powered off"),
            Self::Reset => write!(f, "the guest restarted"),
            Self::Panic { message } => write!(f, "guest kernel panic: {message}"),
            Self::TripleFault { vcpu } => write!(f, "vCPU {vcpu} triple-faulted"),
            Self::AllHalted => write!(f, "the guest halted: its vCPUs wait with interrupts disabled"),
            Self::Halted { vcpu } => write!(f, "vCPU {vcpu} halted for good"),
            Self::InternalError {
                vcpu,
                suberror,
                rip,
                instruction,
            } => {
                write!(f, "KVM internal error on vCPU {vcpu} at {rip:#x}: ")?;
                match suberror {
                    1 => write!(f, "an instruction it cannot emulate")?,
                    2 => write!(f, "two simultaneous exceptions")?,
                    3 => write!(f, "an exit while delivering an event")?,
                    4 => write!(f, "an unexpected exit")?,
                    other => write!(f, "suberror {other}")?,
                }
                if !instruction.is_empty() {
                    write!(f, " ({instruction:02x?})")?;
                }
                Ok(())
            }
            Self::FailedEntry { vcpu, reason } => {
                write!(
                    f,
                    "the processor refused to enter vCPU {vcpu} (reason {reason:#x})"
                )
            }
            Self::RunFailed { vcpu, errno } => {
                let error = std::io::Error::from_raw_os_error(*errno);
                write!(f, "KVM_RUN failed on vCPU {vcpu}: {error}")
            }
            Self::UnknownExit { vcpu, exit } => write!(f, "unexpected exit of vCPU {vcpu}: {exit}"),
            Self::DeviceFailed { device, why } => write!(f, "device {device} failed: {why}"),
            Self::ThreadPanicked { vcpu, message } => {
                write!(
                    f,
                    "the thread of vCPU {vcpu} panicked (a bug in Cloister): {message}"
                )
            }
        }
    }
}

/// Most characters of a panic line that are kept.
const MAX_MESSAGE: usize = 200;

/// What a triple fault of `vcpu` means, by the console's last words.
pub(crate) fn classify_triple_fault(tail: &OutputTail, vcpu: u8) -> StopReason {
    classify(tail).unwrap_or(StopReason::TripleFault { vcpu })
}

/// What it means that all vCPUs halted for good: without ACPI, powering off ends so.
pub(crate) fn classify_halt(tail: &OutputTail) -> StopReason {
    classify(tail).unwrap_or(StopReason::AllHalted)
}

/// The end that the guest announced.
fn classify(tail: &OutputTail) -> Option<StopReason> {
    let text = String::from_utf8_lossy(&tail.bytes()).into_owned();
    // The latest announcement counts.
    for line in text.lines().rev() {
        if let Some((_, message)) = line.split_once("Kernel panic - not syncing:") {
            let message: String = message
                .trim()
                .chars()
                .filter(|c| !c.is_control())
                .take(MAX_MESSAGE)
                .collect();
            return Some(StopReason::Panic { message });
        }
        if line.contains("reboot: Power down") {
            return Some(StopReason::PowerOff);
        }
        if line.contains("reboot: Restarting system") {
            return Some(StopReason::Reset);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn classify(text: &str) -> StopReason {
        let tail = OutputTail::new();
        tail.push(text.as_bytes());
        classify_triple_fault(&tail, 1)
    }

    #[test]
    fn the_console_tells_panic_reset_and_fault_apart() {
        let panic = "[    0.5] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100\r\n\
                     [    0.5] CPU: 0 PID: 1\r\n[    0.6] Rebooting in 1 seconds..\r\n";
        let message = "Attempted to kill init! exitcode=0x00000100".to_owned();
        assert_eq!(classify(panic), StopReason::Panic { message });
        assert_eq!(
            classify("[ 1.0] reboot: Restarting system\r\n"),
            StopReason::Reset
        );
        assert_eq!(classify("hello\n"), StopReason::TripleFault { vcpu: 1 });
        assert_eq!(classify(""), StopReason::TripleFault { vcpu: 1 });
    }

    #[test]
    fn a_guest_cannot_make_the_report_long_or_send_escapes() {
        let text = format!("Kernel panic - not syncing: \x1b[2J{}", "x".repeat(5000));
        let StopReason::Panic { message } = classify(&text) else {
            panic!("not a panic")
        };
        assert!(message.len() <= MAX_MESSAGE && !message.contains('\x1b'));
    }
}
