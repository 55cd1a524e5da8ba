// SPDX-License-Identifier: Apache-2.0
//! Any VMM that has no adapter: `--peer script=PATH[,kernel=FILE,initrd=CPIO]`, a program of the user's that starts it.
//!
//! It finds what to boot in its environment: `KERNEL`, `INITRD`, `CMDLINE`, `MEMORY_MIB`, and for the vsock device `CID` and,
//! unless it is vhost-vsock's, `VSOCK`: the guest's port 1025 is the unix socket `$VSOCK_1025`, which is there already. It is
//! killed with all that it has started, and has to answer `--version`. Figures are named after its file.

use std::io;
use std::path::Path;
use std::process::Command;

use super::program::Program;
use super::vmm::{self, Guest, GuestFiles, ProgramVmm};
use super::{Given, Peer};

/// See [`super::ADAPTERS`].
pub fn adapter(mut given: Given, _: &Path) -> io::Result<Peer> {
    let files = GuestFiles::taken(&mut given)?;
    let program = Program::named_by_file(&given)?;
    Ok(Peer::Vmm(Box::new(ProgramVmm {
        program,
        files,
        command,
    })))
}

fn command(program: &Program, guest: &Guest<'_>, folder: &Path) -> io::Result<Command> {
    let mut command = Command::new(&program.path);
    command
        .env("KERNEL", &guest.files.kernel)
        .env("INITRD", &guest.files.initrd)
        .env("CMDLINE", guest.cmdline)
        .env("MEMORY_MIB", guest.memory_mib.to_string())
        .env("CID", guest.cid.to_string())
        .env("VSOCK", vmm::vsock_socket(folder))
        .current_dir(folder);
    Ok(command)
}
#[cfg(test)]
mod tests {
    use super::super::vmm::seconds_to_ready;
    use super::super::vmm::tests::{READY, fake, files, guest};
    use super::super::{Given, Peer};
    use std::path::Path;

    /// The whole way with a script for a VMM, which starts a process that has to end with it.
    #[test]
    fn a_script_is_told_all_and_ends_with_what_it_started() {
        let dir = tempfile::tempdir().unwrap();
        let seen = dir.path().join("seen");
        let text = format!(
            r#"if [ "$1" = --version ]; then echo mine 1.2; exit; fi
sleep 1000 &
echo "$!:$KERNEL:$INITRD:$CMDLINE:$MEMORY_MIB:$CID" >{seen}
socket=$VSOCK
{READY}"#,
            seen = seen.display()
        );
        let path = fake(dir.path(), "My-VMM.sh", &text);
        let given = Given::parse(&format!("script={}", path.display())).unwrap();
        let Peer::Vmm(vmm) = given.adapt(Path::new("/none")).unwrap() else {
            panic!()
        };
        assert_eq!((vmm.label(), vmm.version()), ("my_vmm", "mine 1.2"));
        let files = files();
        seconds_to_ready(&*vmm, &guest(&files)).unwrap();
        let said = std::fs::read_to_string(seen).unwrap();
        let (pid, said) = said.trim_end().split_once(':').unwrap();
        assert_eq!(said, "/guest/vmlinux:/guest/initramfs.cpio:panic=-1 quiet:256:77");
        // Killed: it takes a moment to end, and may be waited for by an init that takes its time.
        let gone = || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.is_empty() || stat.contains(") Z ")
        };
        let begin = std::time::Instant::now();
        while !gone() {
            assert!(begin.elapsed().as_secs() < 60, "process {pid} goes on");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }

    #[test]
    fn both_files_of_a_guest_are_given_or_none() {
        let error = Given::parse("script=/bin/ls,kernel=/bin/ls")
            .unwrap()
            .adapt(Path::new("/none"));
        assert!(error.err().unwrap().to_string().contains("kernel= and initrd="));
    }
}
