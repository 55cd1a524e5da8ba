// SPDX-License-Identifier: Apache-2.0
//! Many VMs with a real kernel and agent in one process: they come up together, one that ends badly says why and takes
//! nobody along, and nothing of them is left in the process.

use cloister_boot::x86_64::Description;
use cloister_devices::vsock::{Vsock, VsockConfig, VsockHandle, VsockListener};
use cloister_tests::e2e::{PATIENCE, ProcessFootprint, archive, guest_file};
use cloister_vmm::config::BASE_COMMAND_LINE;
use cloister_vmm::{
    Boot, Cell, CellConfig, CellHost, CellHostConfig, CellState, DeviceConfig, KernelBoot, StopReason,
};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

const AGENT_PORT: u32 = 1024;
const EVENTS_PORT: u32 = 1025;

struct Vm {
    cell: Cell,
    vsock: VsockHandle,
    events: VsockListener,
}

/// A started VM. `words` are for its kernel.
fn start(host: &CellHost, name: &str, initrd: &Path, words: &str) -> Vm {
    start_with(host, name, initrd, words, |_| {})
}

fn start_with(
    host: &CellHost,
    name: &str,
    initrd: &Path,
    words: &str,
    adapt: impl FnOnce(&mut CellConfig),
) -> Vm {
    let (vsock, handle) = Vsock::new(VsockConfig::new(3)).unwrap();
    let boot = KernelBoot {
        kernel: File::open(guest_file("vmlinux")).unwrap(),
        initrd: Some(File::open(initrd).unwrap()),
        command_line: format!("console=ttyS0 {BASE_COMMAND_LINE} {words}"),
        description: Description::MpTable,
    };
    let mut config = CellConfig::new(name, Boot::Kernel(boot));
    config.memory_mib = 128;
    let device = Box::new(vsock);
    config.devices.push(DeviceConfig::Custom {
        name: "vsock".into(),
        device,
    });
    config.devices.push(DeviceConfig::Rng);
    adapt(&mut config);
    let cell = Cell::create(config, host).unwrap();
    let events = handle.listen(EVENTS_PORT).unwrap();
    cell.start().unwrap();
    Vm {
        cell,
        vsock: handle,
        events,
    }
}

impl Vm {
    /// Waits for the agent's first word.
    fn ready(&self) -> UnixStream {
        let (mut stream, _) = self
            .events
            .accept()
            .expect("the VM ended before its agent was ready");
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.read_exact(&mut [0]).unwrap();
        stream
    }

    /// Asks the agent whether it is there: one request of ttrpc by hand.
    fn ping(&self) {
        let mut request = Vec::new();
        // service = 1 and method = 2 of ttrpc's Request.
        for (tag, text) in [(0x0a, "cloister.agent.v1.Pod"), (0x12, "Ping")] {
            request.push(tag);
            request.push(u8::try_from(text.len()).unwrap());
            request.extend_from_slice(text.as_bytes());
        }
        let length = u32::try_from(request.len()).unwrap();
        let (stream_id, is_request, no_flags) = (1_u32, 1, 0);
        let mut frame = [length.to_be_bytes(), stream_id.to_be_bytes()].concat();
        frame.extend([is_request, no_flags]);
        frame.extend(request);
        let mut stream = self.vsock.connect(AGENT_PORT).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(&frame).unwrap();
        let mut header = [0; 10];
        stream.read_exact(&mut header).unwrap();
        let is_response = 2;
        assert_eq!(
            (&header[4..8], header[8]),
            (&stream_id.to_be_bytes()[..], is_response)
        );
        // A failure has a status: field 1 with something in it.
        let mut response =
            vec![0; usize::try_from(u32::from_be_bytes(header[..4].try_into().unwrap())).unwrap()];
        stream.read_exact(&mut response).unwrap();
        let is_failure = response.first() == Some(&0x0a) && response.get(1) != Some(&0);
        assert!(!is_failure, "{}", String::from_utf8_lossy(&response));
    }

    #[track_caller]
    fn ends(&self) -> StopReason {
        let reason = self.cell.wait(Some(PATIENCE)).expect("does not end");
        assert!(self.cell.wait_taken_down(Some(PATIENCE)), "is not taken down");
        reason
    }
}

fn agent() -> PathBuf {
    guest_file("initramfs.cpio")
}

/// The shared threads, and a first VM through its whole life: what is made once is there now.
fn warm_host() -> CellHost {
    let host = CellHost::new(CellHostConfig::default()).unwrap();
    let vm = start(&host, "first", &agent(), "");
    vm.ready();
    vm.ping();
    vm.cell.stop();
    assert_eq!(vm.ends(), StopReason::Requested);
    host
}

fn panics(reason: &StopReason, with: &str) {
    let StopReason::Panic { message } = reason else {
        panic!("no panic: {reason}")
    };
    assert!(message.contains(with), "{message}");
}

#[test]
fn eight_at_once_and_a_ninth_that_panics() {
    let bare = ProcessFootprint::of_this();
    let host = warm_host();
    let before = ProcessFootprint::of_this();
    let vms: Vec<Vm> = (0..8)
        .map(|n| start(&host, &format!("pod-{n}"), &agent(), ""))
        .collect();
    // Neither an init nor a root file system.
    let ninth = start(&host, "panics", &agent(), "rdinit=/nonexistent");
    let events: Vec<UnixStream> = vms.iter().map(Vm::ready).collect();
    panics(&ninth.ends(), "Unable to mount root fs");
    for vm in &vms {
        assert_eq!(vm.cell.state(), CellState::Running);
        vm.ping();
    }
    for vm in &vms {
        vm.cell.stop();
    }
    for vm in &vms {
        assert_eq!(vm.ends(), StopReason::Requested);
    }
    drop((vms, ninth, events));
    before.assert_no_more();
    // The shared threads go with the last handle.
    drop(host);
    bare.assert_no_more();
}

#[test]
fn the_death_of_pid_1_is_a_panic() {
    let host = warm_host();
    let before = ProcessFootprint::of_this();
    let other = start(&host, "other", &agent(), "");
    let events = other.ready();
    // An init that ends at once: busybox under the name of true.
    let busybox = fs::read("/bin/busybox").expect("busybox-static is missing: run ci/setup");
    let dir = std::env::temp_dir();
    let initrd = dir.join(format!("e2e-{}.cpio", std::process::id()));
    fs::write(&initrd, archive(&[("bin/true", &busybox)])).unwrap();
    let vm = start(&host, "no-init", &initrd, "rdinit=/bin/true");
    panics(&vm.ends(), "Attempted to kill init");
    other.ping();
    other.cell.stop();
    assert_eq!(other.ends(), StopReason::Requested);
    fs::remove_file(&initrd).unwrap();
    drop((vm, other, events));
    before.assert_no_more();
}

/// A kernel that is not ours: a bzImage, with modules in the initramfs, that finds its processors and devices by ACPI.
#[test]
fn debians_kernel_with_our_agent() {
    let host = warm_host();
    let before = ProcessFootprint::of_this();
    let initrd = guest_file("debian/initramfs.cpio");
    let vm = start_with(&host, "debian", &initrd, "", |config| {
        config.memory_mib = 512;
        config.vcpus = 2;
        let Boot::Kernel(boot) = &mut config.boot else {
            panic!("not booted from a kernel")
        };
        boot.kernel = File::open(guest_file("debian/bzImage")).unwrap();
        boot.description = Description::Acpi;
    });
    let events = vm.ready();
    vm.ping();
    vm.cell.stop();
    assert_eq!(vm.ends(), StopReason::Requested);
    drop((vm, events));
    before.assert_no_more();
}

#[test]
fn stopped_while_booting() {
    let host = warm_host();
    let before = ProcessFootprint::of_this();
    // From the first instruction to somewhere in the kernel; hardware is further then than the emulated host.
    for millis in [0, 10, 100, 400] {
        let vm = start(&host, "stopped", &agent(), "");
        std::thread::sleep(Duration::from_millis(millis));
        vm.cell.stop();
        assert_eq!(vm.ends(), StopReason::Requested);
    }
    // Never started.
    let (vsock, handle) = Vsock::new(VsockConfig::new(3)).unwrap();
    let boot = KernelBoot {
        kernel: File::open(guest_file("vmlinux")).unwrap(),
        initrd: None,
        command_line: String::new(),
        description: Description::MpTable,
    };
    let mut config = CellConfig::new("never-started", Boot::Kernel(boot));
    let device = Box::new(vsock);
    config.devices.push(DeviceConfig::Custom {
        name: "vsock".into(),
        device,
    });
    drop(Cell::create(config, &host).unwrap());
    drop(handle);
    before.assert_no_more();
}
