// SPDX-License-Identifier: Apache-2.0
//! Cloud Hypervisor: `--peer cloud-hypervisor=PATH[,kernel=FILE,initrd=CPIO]`.
//!
//! Its devices are on PCI and its machine is described by ACPI, neither of which our kernel knows. So it boots Debian's kernel
//! with our agent (`make guest` has both), unless other files are given; our cell boots the same files.

use std::io;
use std::path::Path;
use std::process::Command;

use super::program::Program;
use super::vmm::{self, Guest, GuestFiles, ProgramVmm};
use super::{Given, Peer};

/// See [`super::ADAPTERS`].
pub fn adapter(mut given: Given, guest: &Path) -> io::Result<Peer> {
    let files = GuestFiles::taken(&mut given)?;
    let program = Program::of(&given, "cloud_hypervisor", "cloud-hypervisor")?;
    let files = files.unwrap_or_else(|| GuestFiles {
        kernel: guest.join("debian/bzImage"),
        initrd: guest.join("debian/initramfs.cpio"),
    });
    for file in [&files.kernel, &files.initrd] {
        if !file.exists() {
            return Err(given.error(format_args!(
                "{} is missing: build it with make guest, or say kernel= and initrd=",
                file.display()
            )));
        }
    }
    Ok(Peer::Vmm(Box::new(ProgramVmm {
        program,
        files: Some(files),
        command,
    })))
}

fn command(program: &Program, guest: &Guest<'_>, folder: &Path) -> io::Result<Command> {
    let mut command = Command::new(&program.path);
    command
        .arg("--kernel")
        .arg(&guest.files.kernel)
        .arg("--initramfs")
        .arg(&guest.files.initrd)
        .args(["--cmdline", guest.cmdline])
        .args(["--cpus", "boot=1"])
        .arg("--memory")
        .arg(format!("size={}M", guest.memory_mib))
        .args(["--console", "off", "--serial", "off"])
        .arg("--vsock")
        .arg(format!(
            "cid={},socket={}",
            guest.cid,
            vmm::vsock_socket(folder).display()
        ));
    Ok(command)
}
#[cfg(test)]
mod tests {
    use super::super::vmm::seconds_to_ready;
    use super::super::vmm::tests::{READY, arguments, fake, guest};
    use super::super::{Given, Peer};
    use std::path::Path;

    /// Takes the socket from its command line as Cloud Hypervisor would, and has an agent say that it is ready.
    #[test]
    fn its_command_line_has_guest_and_socket() {
        let dir = tempfile::tempdir().unwrap();
        let text = format!(
            r#"if [ "$1" = --version ]; then echo cloud-hypervisor v9.9; exit; fi
while [ "$1" != --vsock ]; do shift; done
socket=${{2#cid=77,socket=}}
{READY}"#
        );
        let path = fake(dir.path(), "cloud-hypervisor", &text);
        let text = format!("cloud-hypervisor={}", path.display());
        let error = Given::parse(&text)
            .unwrap()
            .adapt(dir.path())
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("debian/bzImage is missing"), "{error}");
        std::fs::create_dir(dir.path().join("debian")).unwrap();
        for name in ["bzImage", "initramfs.cpio"] {
            std::fs::write(dir.path().join("debian").join(name), "").unwrap();
        }
        let Peer::Vmm(vmm) = Given::parse(&text).unwrap().adapt(dir.path()).unwrap() else {
            panic!()
        };
        let files = vmm.files().unwrap().clone();
        let guest = guest(&files);
        seconds_to_ready(&*vmm, &guest).unwrap();
        let words = arguments(&vmm.command(&guest, Path::new("/folder")).unwrap());
        for pair in [
            ["--kernel", files.kernel.to_str().unwrap()],
            ["--initramfs", files.initrd.to_str().unwrap()],
            ["--cmdline", "panic=-1 quiet"],
            ["--cpus", "boot=1"],
            ["--memory", "size=256M"],
            ["--vsock", "cid=77,socket=/folder/vsock"],
        ] {
            assert!(
                words.windows(2).any(|words| words == pair),
                "{pair:?} is not in {words:?}"
            );
        }
    }
}
