// SPDX-License-Identifier: Apache-2.0
//! Peers: the VMMs and runtimes that our cells and pods are compared with.
//!
//! QEMU `-M microvm` and runc are always measured. Others are the user's, who says where they are:
//! `--peer NAME=PATH[,WHAT=PATH]...` ([`ADAPTERS`] has the names). An adapter is one small file.
//!
//! ```text
//!   --peer NAME=PATH ─▶ Given ─▶ adapter ─▶ Peer::Vmm      boots our agent to its ready message: the part `boot`
//!                                       └─▶ Peer::Handler  a runtime handler of containerd: the parts `cri.start`, `cri.rate`
//! ```
//!
//! An adapter looks at what it was given when it is made, so that a program that is not there, or is another one, ends the
//! benchmark before anything has run.

mod cloud_hypervisor;
mod firecracker;
mod handler;
mod program;
pub mod qemu;
mod script;
mod vmm;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

pub use handler::Handler;
pub use vmm::{Guest, GuestFiles, READY_PORT, Vmm, seconds_to_ready};

/// One peer.
pub enum Peer {
    /// A VMM.
    Vmm(Box<dyn Vmm>),
    /// A runtime handler of containerd.
    Handler(Handler),
}

/// What `--peer` said.
#[derive(Debug)]
pub struct Given {
    /// The adapter.
    pub name: String,
    /// The program, or what else the adapter asks for.
    pub path: PathBuf,
    more: BTreeMap<String, PathBuf>,
}

type Adapter = fn(Given, &Path) -> io::Result<Peer>;

/// The adapters: a name, what its path is, and what may follow it.
const ADAPTERS: [(&str, Adapter, &str); 9] = [
    ("qemu", qemu::adapter, "PATH: another qemu-system-x86_64"),
    (
        "firecracker",
        firecracker::adapter,
        "PATH[,kernel=VMLINUX,initrd=CPIO]",
    ),
    (
        "cloud-hypervisor",
        cloud_hypervisor::adapter,
        "PATH[,kernel=FILE,initrd=CPIO]; it finds devices by PCI and ACPI only, so Debian's kernel unless told otherwise",
    ),
    (
        "script",
        script::adapter,
        "PATH[,kernel=FILE,initrd=CPIO]: any other VMM, started by a script (tests/bench/README.md)",
    ),
    (
        "crun",
        handler::crun,
        "PATH: an OCI runtime, below containerd-shim-runc-v2",
    ),
    ("youki", handler::youki, "PATH: the same"),
    ("oci", handler::oci, "PATH: the same with any other"),
    (
        "kata",
        handler::kata,
        "PATH[,config=TOML]: containerd-shim-kata-v2, with its configuration",
    ),
    (
        "kuasar",
        handler::kuasar,
        "SOCKET: of a sandboxer that runs, as containerd is to find it",
    ),
];

/// The lines of the usage that name the adapters.
pub fn usage() -> String {
    let line = |(name, _, what): &(&str, Adapter, &str)| format!("    {name}={what}\n");
    ADAPTERS.iter().map(line).collect()
}

impl Given {
    /// Of `NAME=PATH[,WHAT=PATH]...`.
    ///
    /// # Errors
    /// It is not of that form, or one of the paths is not there.
    pub fn parse(text: &str) -> io::Result<Self> {
        let wrong = || io::Error::other(format!("--peer {text}: not of the form NAME=PATH[,WHAT=PATH]..."));
        let mut words = text.split(',').map(|word| match word.split_once('=') {
            Some((name, path)) if !name.is_empty() && !path.is_empty() => {
                let found = fs::canonicalize(path)
                    .map_err(|error| io::Error::other(format!("--peer {text}: {path}: {error}")))?;
                Ok((name.to_owned(), found))
            }
            _ => Err(wrong()),
        });
        let (name, path) = words.next().ok_or_else(wrong)??;
        Ok(Self {
            name,
            path,
            more: words.collect::<io::Result<_>>()?,
        })
    }

    /// Takes what was said of `what`.
    fn take(&mut self, what: &str) -> Option<PathBuf> {
        self.more.remove(what)
    }

    /// What was said and not taken is not understood.
    ///
    /// # Errors
    /// There is some.
    fn all_taken(&self) -> io::Result<()> {
        match self.more.keys().next() {
            None => Ok(()),
            Some(what) => Err(self.error(format_args!("it takes no {what}="))),
        }
    }

    /// Why this peer will not do.
    fn error(&self, why: impl std::fmt::Display) -> io::Error {
        io::Error::other(format!("--peer {}={}: {why}", self.name, self.path.display()))
    }

    /// The peer. `guest` is the folder of the guest's kernels.
    ///
    /// # Errors
    /// There is no such adapter, or what was given will not do for it.
    pub fn adapt(self, guest: &Path) -> io::Result<Peer> {
        let Some((_, adapter, _)) = ADAPTERS.iter().find(|(name, ..)| *name == self.name) else {
            let names: Vec<&str> = ADAPTERS.iter().map(|(name, ..)| *name).collect();
            return Err(self.error(format_args!("no such adapter: there are {}", names.join(", "))));
        };
        adapter(self, guest)
    }
}

/// All that are measured.
#[derive(Default)]
pub struct Peers {
    /// VMMs; QEMU is the first.
    pub vmms: Vec<Box<dyn Vmm>>,
    /// Runtime handlers beside runc.
    pub handlers: Vec<Handler>,
}

impl Peers {
    /// Those that were given, and QEMU.
    ///
    /// # Errors
    /// One will not do, or two would give figures of the same name.
    pub fn of(given: Vec<Given>, guest: &Path) -> io::Result<Self> {
        let mut peers = Self::default();
        for given in given {
            match given.adapt(guest)? {
                Peer::Vmm(vmm) => peers.vmms.push(vmm),
                Peer::Handler(handler) => peers.handlers.push(handler),
            }
        }
        match peers.vmms.iter().position(|vmm| vmm.label() == qemu::LABEL) {
            Some(at) => peers.vmms[..=at].rotate_right(1),
            None => peers.vmms.insert(0, Box::new(qemu::Microvm::installed())),
        }
        let vmms = peers.vmms.iter().map(|vmm| vmm.label());
        let mut labels: Vec<&str> = vmms
            .chain(peers.handlers.iter().map(|peer| peer.label()))
            .collect();
        labels.sort_unstable();
        match labels.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(io::Error::other(format!("--peer: two are called {}", pair[0]))),
            None => Ok(peers),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Given, Peers};
    use std::path::Path;

    fn refused(peers: &[&str]) -> String {
        let given: std::io::Result<Vec<Given>> = peers.iter().map(|text| Given::parse(text)).collect();
        let made = given.and_then(|given| Peers::of(given, Path::new("/none")));
        made.err().map(|error| error.to_string()).unwrap()
    }

    #[test]
    fn what_will_not_do_is_refused_by_name() {
        for (peers, words) in [
            (&["firecracker"][..], &["firecracker", "NAME=PATH"][..]),
            (&["=/bin/true"], &["NAME=PATH"]),
            (
                &["firecracker=/none/firecracker"],
                &["firecracker", "/none/firecracker", "No such file"],
            ),
            (&["firecracker=/bin"], &["firecracker=", "/bin", "not a program"]),
            (&["firecracker=/etc/passwd"], &["/etc/passwd", "not a program"]),
            // A program, but another one.
            (
                &["firecracker=/bin/ls"],
                &["/bin/ls", "does not say that it is firecracker"],
            ),
            (&["crun=/bin/ls"], &["crun=", "does not say that it is crun"]),
            (&["oci=/bin/false"], &["/bin/false", "--version"]),
            (&["oci=/bin/ls,kernel=/bin/ls"], &["it takes no kernel="]),
            (
                &["kata=/bin/ls,config=/none"],
                &["config=/none: /none: No such file"],
            ),
            (&["kuasar=/bin/ls"], &["/bin/ls", "not a socket"]),
            (
                &["bhyve=/bin/ls"],
                &["no such adapter", "firecracker, cloud-hypervisor"],
            ),
            (&["oci=/bin/ls", "oci=/bin/ls"], &["two are called ls"]),
        ] {
            let said = refused(peers);
            for word in words {
                assert!(said.contains(word), "{word:?} is not in {said:?}");
            }
        }
    }

    #[test]
    fn qemu_is_always_there_and_the_first() {
        let peers = Peers::of(Vec::new(), Path::new("/none")).unwrap();
        assert_eq!(peers.vmms.len(), 1);
        assert_eq!(peers.vmms[0].label(), "qemu_microvm");
        let peers = Peers::of(vec![Given::parse("oci=/bin/ls").unwrap()], Path::new("/none")).unwrap();
        assert_eq!((peers.vmms.len(), peers.handlers.len()), (1, 1));
        assert_eq!(peers.handlers[0].label(), "ls");
    }
}
