// SPDX-License-Identifier: Apache-2.0
//! A runtime handler of containerd as a peer: the lines of its configuration.
//!
//! | adapter | what containerd is told |
//! | --- | --- |
//! | `crun`, `youki`, `oci` | its own shim for runc, with `BinaryName` |
//! | `kata` | the shim, as `runtime_path`; with `config=` its `ConfigPath` |
//! | `kuasar` | a sandboxer on a socket, as Cloister is one |
//!
//! Kuasar's sandboxer has to run already, on the host that is measured: not in an emulated one.

use std::fmt::Write as _;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use super::program::Program;
use super::{Given, Peer};

/// See the module.
#[derive(Debug)]
pub struct Handler {
    label: String,
    version: String,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// An OCI runtime.
    Oci(PathBuf),
    /// A shim with its configuration.
    Shim(PathBuf, Option<PathBuf>),
    /// The socket of a sandboxer.
    Sandboxer(PathBuf),
}

fn oci_runtime(given: &Given, program: Program) -> io::Result<Peer> {
    given.all_taken()?;
    Ok(Peer::Handler(Handler {
        label: program.label,
        version: program.version,
        kind: Kind::Oci(program.path),
    }))
}

/// See [`super::ADAPTERS`].
pub fn crun(given: Given, _: &Path) -> io::Result<Peer> {
    let program = Program::of(&given, "crun", "crun")?;
    oci_runtime(&given, program)
}

/// See [`super::ADAPTERS`].
pub fn youki(given: Given, _: &Path) -> io::Result<Peer> {
    let program = Program::of(&given, "youki", "youki")?;
    oci_runtime(&given, program)
}

/// See [`super::ADAPTERS`].
pub fn oci(given: Given, _: &Path) -> io::Result<Peer> {
    let program = Program::named_by_file(&given)?;
    oci_runtime(&given, program)
}

/// See [`super::ADAPTERS`].
pub fn kata(mut given: Given, _: &Path) -> io::Result<Peer> {
    let config = given.take("config");
    given.all_taken()?;
    let program = Program::of(&given, "kata", "kata")?;
    Ok(Peer::Handler(Handler {
        label: program.label,
        version: program.version,
        kind: Kind::Shim(program.path, config),
    }))
}

/// See [`super::ADAPTERS`].
pub fn kuasar(given: Given, _: &Path) -> io::Result<Peer> {
    given.all_taken()?;
    if let Err(error) = UnixStream::connect(&given.path) {
        return Err(given.error(format_args!("not a socket that a sandboxer listens on: {error}")));
    }
    Ok(Peer::Handler(Handler {
        label: "kuasar".to_owned(),
        version: String::new(),
        kind: Kind::Sandboxer(given.path),
    }))
}

impl Handler {
    /// Part of figures' names, and the handler's in containerd.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// What it says of itself; empty if it cannot be asked.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// A program of this name (`containerd-shim-NAME-v1`) has to be on containerd's PATH, though it is only asked what it can do.
    pub fn shim(&self) -> Option<String> {
        matches!(self.kind, Kind::Sandboxer(_)).then(|| format!("containerd-shim-{}-v1", self.label))
    }

    /// Its part of containerd's configuration, version 3.
    pub fn containerd_config(&self) -> String {
        let table = format!(
            "plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.{}",
            self.label
        );
        let mut text = format!("\n[{table}]\n");
        // Writing to a String cannot fail.
        let _ = match &self.kind {
            Kind::Oci(program) => write!(
                text,
                "runtime_type = \"io.containerd.runc.v2\"\n[{table}.options]\nBinaryName = {program:?}\n"
            ),
            Kind::Shim(program, config) => {
                let _ = writeln!(
                    text,
                    "runtime_type = \"io.containerd.{}.v2\"\nruntime_path = {program:?}",
                    self.label
                );
                config
                    .iter()
                    .try_for_each(|config| writeln!(text, "[{table}.options]\nConfigPath = {config:?}"))
            }
            Kind::Sandboxer(socket) => write!(
                text,
                "runtime_type = \"io.containerd.{label}.v1\"\nsandboxer = \"{label}\"\n\n[proxy_plugins.{label}]\n\
                 type = \"sandbox\"\naddress = {socket:?}\n",
                label = self.label
            ),
        };
        text
    }
}

#[cfg(test)]
mod tests {
    use super::super::vmm::tests::fake;
    use super::super::{Given, Peer};
    use super::Handler;
    use std::os::unix::net::UnixListener;
    use std::path::Path;

    fn handler(text: &str) -> Handler {
        match Given::parse(text).unwrap().adapt(Path::new("/none")).unwrap() {
            Peer::Handler(handler) => handler,
            Peer::Vmm(_) => panic!("{text} is a VMM"),
        }
    }

    #[test]
    fn what_containerd_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().display();
        let crun = fake(dir.path(), "crun", "echo crun version 9.8; echo commit: x");
        let crun = handler(&format!("crun={}", crun.display()));
        assert_eq!((crun.label(), crun.version()), ("crun", "crun version 9.8"));
        assert_eq!(crun.shim(), None);
        let table = "plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes";
        assert_eq!(
            crun.containerd_config(),
            format!(
                "\n[{table}.crun]\nruntime_type = \"io.containerd.runc.v2\"\n[{table}.crun.options]\n\
                 BinaryName = \"{place}/crun\"\n"
            )
        );
        let shim = fake(
            dir.path(),
            "shim",
            "echo Kata Containers containerd shim: version 3.9",
        );
        std::fs::write(dir.path().join("kata.toml"), "").unwrap();
        let kata = handler(&format!("kata={},config={place}/kata.toml", shim.display()));
        assert_eq!(
            kata.containerd_config(),
            format!(
                "\n[{table}.kata]\nruntime_type = \"io.containerd.kata.v2\"\nruntime_path = \"{place}/shim\"\n\
                 [{table}.kata.options]\nConfigPath = \"{place}/kata.toml\"\n"
            )
        );
        let kata = handler(&format!("kata={}", shim.display()));
        assert!(!kata.containerd_config().contains("ConfigPath"));
        let socket = dir.path().join("s.sock");
        let _listener = UnixListener::bind(&socket).unwrap();
        let kuasar = handler(&format!("kuasar={}", socket.display()));
        assert_eq!(
            kuasar.containerd_config(),
            format!(
                "\n[{table}.kuasar]\nruntime_type = \"io.containerd.kuasar.v1\"\nsandboxer = \"kuasar\"\n\n\
                 [proxy_plugins.kuasar]\ntype = \"sandbox\"\naddress = \"{place}/s.sock\"\n"
            )
        );
        assert_eq!(kuasar.shim().as_deref(), Some("containerd-shim-kuasar-v1"));
    }
}
