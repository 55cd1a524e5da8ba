// SPDX-License-Identifier: Apache-2.0
//! What the files say that `install` writes.

use crate::daemon::config::{Config, Profile};
use std::fmt::Write;
use std::path::Path;

const UNIT: &str = include_str!("../../dist/cloisterd.service");
/// How the unit of the package starts the daemon.
const PACKAGED_START: &str = "ExecStart=/usr/bin/cloisterd\n";
const MADE: &str = "# Made by `cloister install`; `cloister uninstall` removes it.\n";

/// containerd's drop-in: each sandboxer, and a runtime of its name.
pub fn containerd(config: &Config) -> String {
    let mut text = format!("{MADE}version = 3\n");
    let address = toml::Value::from(config.socket.display().to_string());
    for name in config.sandboxer.keys() {
        // Names are DNS labels, which need no quotes. Writing to a string does not fail.
        let _ = write!(
            text,
            r#"
[proxy_plugins.{name}]
  type = "sandbox"
  address = {address}

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.{name}]
  # Names the shim that must exist, not one that runs.
  runtime_type = "io.containerd.cloister.v1"
  sandboxer = "{name}"
  # The host's devices are not in the pods' virtual machines.
  privileged_without_host_devices = true
"#
        );
    }
    text
}

/// A RuntimeClass for each sandboxer.
pub fn runtime_classes(config: &Config) -> String {
    let class = |(name, profile): (&String, &Profile)| {
        format!(
            "apiVersion: node.k8s.io/v1\nkind: RuntimeClass\nmetadata:\n  name: {name}\nhandler: {name}\noverhead:\n  podFixed:\n    memory: {}Ki\n    cpu: {}\n",
            profile.overhead.memory.0.div_ceil(1024),
            profile.overhead.cpu,
        )
    };
    let classes: Vec<String> = config.sandboxer.iter().map(class).collect();
    format!("{MADE}{}", classes.join("---\n"))
}

/// The unit of a daemon that lies at `program`.
pub fn unit(program: &Path) -> String {
    let program = program.display().to_string();
    // systemd.service(5): words end at blanks, % and $ mean something.
    let quoted = program
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('%', "%%")
        .replace('$', "$$");
    UNIT.replace(PACKAGED_START, &format!("ExecStart=\"{quoted}\"\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_containerd_and_kubernetes_are_told() {
        let text = "[sandboxer.big]\noverhead = { memory = '100MiB', cpu = '250m' }\n";
        let config = Config::parse(text, Path::new("c")).unwrap();
        let table: toml::Table = containerd(&config).parse().unwrap();
        assert_eq!(table["version"].as_integer(), Some(3));
        for name in ["big", "cloister"] {
            let proxy = &table["proxy_plugins"][name];
            assert_eq!(proxy["type"].as_str(), Some("sandbox"));
            assert_eq!(proxy["address"].as_str(), Some("/run/cloister/sandboxer.sock"));
            let runtime = &table["plugins"]["io.containerd.cri.v1.runtime"]["containerd"]["runtimes"][name];
            assert_eq!(runtime["sandboxer"].as_str(), Some(name));
            assert_eq!(runtime["privileged_without_host_devices"].as_bool(), Some(true));
            assert_eq!(
                runtime["runtime_type"].as_str(),
                Some("io.containerd.cloister.v1")
            );
        }
        let classes = runtime_classes(&config);
        assert_eq!(classes.matches("kind: RuntimeClass").count(), 2);
        assert!(
            classes.contains(
                "name: big\nhandler: big\noverhead:\n  podFixed:\n    memory: 102400Ki\n    cpu: 250m\n"
            ),
            "{classes}"
        );
    }

    #[test]
    fn the_unit_starts_this_program() {
        let unit = unit(Path::new("/opt/my cloister/50%"));
        assert!(unit.contains("ExecStart=\"/opt/my cloister/50%%\"\n"), "{unit}");
        assert_eq!(unit.matches("ExecStart=").count(), 1);
    }
}
