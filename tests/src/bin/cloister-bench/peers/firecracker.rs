// SPDX-License-Identifier: Apache-2.0
//! Firecracker: `--peer firecracker=PATH[,kernel=VMLINUX,initrd=CPIO]`.
//!
//! It boots ELF kernels, tells them of processors by an MP table and of devices on the command line (and by ACPI as well): our
//! kernel does. One process, no API socket, all it is to do in one file; its seccomp filters as it was built with them.

use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;

use serde_json::json;

use super::program::Program;
use super::vmm::{self, Guest, GuestFiles, ProgramVmm};
use super::{Given, Peer};

/// See [`super::ADAPTERS`].
pub fn adapter(mut given: Given, _: &Path) -> io::Result<Peer> {
    let files = GuestFiles::taken(&mut given)?;
    let program = Program::of(&given, "firecracker", "firecracker")?;
    Ok(Peer::Vmm(Box::new(ProgramVmm {
        program,
        files,
        command,
    })))
}

fn command(program: &Program, guest: &Guest<'_>, folder: &Path) -> io::Result<Command> {
    let config = json!({
        "boot-source": {
            "kernel_image_path": guest.files.kernel,
            "initrd_path": guest.files.initrd,
            "boot_args": guest.cmdline,
        },
        "drives": [],
        "machine-config": { "vcpu_count": 1, "mem_size_mib": guest.memory_mib },
        "vsock": { "guest_cid": guest.cid, "uds_path": vmm::vsock_socket(folder) },
    });
    let path = folder.join("firecracker.json");
    fs::write(&path, config.to_string())?;
    let mut command = Command::new(&program.path);
    command
        .args(["--no-api", "--id", "bench", "--config-file"])
        .arg(path);
    Ok(command)
}
#[cfg(test)]
mod tests {
    use super::super::vmm::seconds_to_ready;
    use super::super::vmm::tests::{READY, fake, files, guest};
    use super::super::{Given, Peer};
    use std::path::Path;

    /// Reads its configuration as Firecracker would, and has an agent say that it is ready.
    #[test]
    fn its_configuration_has_guest_and_socket() {
        let dir = tempfile::tempdir().unwrap();
        let seen = dir.path().join("seen");
        let text = format!(
            r#"if [ "$1" = --version ]; then echo Firecracker v9.9.9; exit; fi
[ "$1 $2 $3 $4" = "--no-api --id bench --config-file" ] || {{ echo "arguments: $*"; exit 1; }}
cp "$5" {seen}
socket=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["vsock"]["uds_path"])' "$5")
{READY}"#,
            seen = seen.display()
        );
        let path = fake(dir.path(), "firecracker", &text);
        let given = Given::parse(&format!("firecracker={}", path.display())).unwrap();
        let Peer::Vmm(vmm) = given.adapt(Path::new("/none")).unwrap() else {
            panic!()
        };
        assert_eq!(
            (vmm.label(), vmm.version()),
            ("firecracker", "Firecracker v9.9.9")
        );
        let files = files();
        let seconds = seconds_to_ready(&*vmm, &guest(&files)).unwrap();
        assert!(seconds > 0.0);
        let config: serde_json::Value = serde_json::from_slice(&std::fs::read(seen).unwrap()).unwrap();
        assert_eq!(config["boot-source"]["kernel_image_path"], "/guest/vmlinux");
        assert_eq!(config["boot-source"]["initrd_path"], "/guest/initramfs.cpio");
        assert_eq!(config["boot-source"]["boot_args"], "panic=-1 quiet");
        assert_eq!(config["machine-config"]["mem_size_mib"], 256);
        assert_eq!(config["vsock"]["guest_cid"], 77);
    }
}
