// SPDX-License-Identifier: Apache-2.0
//! A specification in the host's terms becomes one in the guest's.
//!
//! What names things of the host is replaced (bind mounts, which are shared into the VM) or dropped (namespace paths,
//! security profiles of the host's kernel, hooks but those that are the container's own programs); the pod's own DNS files are mounted where the specification does not
//! bring other ones.

use cloister_protocol::{ETC_DIR, SHARED_DIR};
use oci_spec::runtime::{Hooks, LinuxNamespaceType, MountBuilder, Spec};
use std::path::{Path, PathBuf};

/// A directory or file of the host that a container needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// Its name in the shared directory.
    pub name: String,
    /// Path on the host.
    pub source: PathBuf,
    /// The host refuses writes.
    pub read_only: bool,
}

/// The name under which a container's root file system is shared.
pub fn root_name(id: &str) -> String {
    format!("rootfs-{id}")
}

/// Rewrites `spec` for the guest and answers what must be shared before it is used.
///
/// # Errors
/// A bind mount without an absolute source.
pub fn for_guest(spec: &mut Spec, id: &str) -> Result<Vec<Share>, String> {
    let mut shares = Vec::new();
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for mount in &mut mounts {
        let options = mount.options().clone().unwrap_or_default();
        let is_bind =
            mount.typ().as_deref() == Some("bind") || options.iter().any(|o| o == "bind" || o == "rbind");
        if !is_bind {
            continue;
        }
        let Some(source) = mount.source().clone().filter(|source| source.is_absolute()) else {
            return Err(format!(
                "the mount on {} has no absolute source",
                mount.destination().display()
            ));
        };
        let name = format!("vol-{}-{id}", shares.len());
        mount.set_source(Some(Path::new(SHARED_DIR).join(&name)));
        let read_only = options.iter().any(|option| option == "ro" || option == "rro");
        shares.push(Share {
            name,
            source,
            read_only,
        });
    }
    for file in ["hosts", "hostname", "resolv.conf"] {
        let destination = Path::new("/etc").join(file);
        if mounts
            .iter()
            .any(|mount| mount.destination() == &destination || mount.destination() == Path::new("/etc"))
        {
            continue;
        }
        let read_only = spec
            .root()
            .as_ref()
            .is_some_and(|root| root.readonly() == Some(true));
        let options = vec!["bind".to_owned(), if read_only { "ro" } else { "rw" }.to_owned()];
        let mount = MountBuilder::default()
            .destination(destination)
            .typ("bind")
            .source(Path::new(ETC_DIR).join(file))
            .options(options)
            .build()
            .map_err(|e| e.to_string())?;
        mounts.push(mount);
    }
    spec.set_mounts(Some(mounts));

    if let Some(mut linux) = spec.linux().clone() {
        if let Some(namespaces) = linux.namespaces().clone() {
            let keep = namespaces
                .into_iter()
                .filter(|ns| ns.path().is_none() && ns.typ() != LinuxNamespaceType::Network)
                .collect();
            linux.set_namespaces(Some(keep));
        }
        linux.set_mount_label(None);
        spec.set_linux(Some(linux));
    }
    if let Some(mut process) = spec.process().clone() {
        process.set_apparmor_profile(None);
        process.set_selinux_label(None);
        spec.set_process(Some(process));
    }
    // Of all hooks, startContainer's are looked up in the container's root; the programs of the others lie on the host.
    let hooks = spec.hooks().as_ref().and_then(|hooks| {
        let mut kept = Hooks::default();
        kept.set_start_container(Some(hooks.start_container().clone()?));
        Some(kept)
    });
    spec.set_hooks(hooks);
    Ok(shares)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEC: &str = r#"{"ociVersion":"1.2.0","root":{"path":"rootfs"},
        "process":{"user":{"uid":0,"gid":0},"cwd":"/","args":["a"],"apparmorProfile":"p","selinuxLabel":"l"},
        "hooks":{"prestart":[{"path":"/bin/evil"}],"startContainer":[{"path":"/bin/own"}]},
        "mounts":[{"destination":"/proc","type":"proc","source":"proc"},
                  {"destination":"/data","type":"bind","source":"/srv/data","options":["rbind","ro"]},
                  {"destination":"/etc/hosts","type":"bind","source":"/srv/hosts","options":["rbind","rw"]}],
        "linux":{"cgroupsPath":"/k8s/x","namespaces":[{"type":"pid"},{"type":"network","path":"/proc/1/ns/net"},
                  {"type":"network"},{"type":"uts","path":"/proc/1/ns/uts"},{"type":"mount"}]}}"#;

    #[test]
    fn host_things_are_replaced_or_dropped() {
        let mut spec: Spec = serde_json::from_str(SPEC).unwrap();
        let shares = for_guest(&mut spec, "c1").unwrap();
        let share = |name: &str, source: &str, read_only| Share {
            name: name.into(),
            source: source.into(),
            read_only,
        };
        assert_eq!(
            shares,
            [
                share("vol-0-c1", "/srv/data", true),
                share("vol-1-c1", "/srv/hosts", false)
            ]
        );
        let mounts = spec.mounts().as_ref().unwrap();
        let sources: Vec<_> = mounts
            .iter()
            .map(|m| m.source().as_ref().unwrap().to_str().unwrap())
            .collect();
        assert_eq!(
            sources,
            [
                "proc",
                "/run/cloister/shared/vol-0-c1",
                "/run/cloister/shared/vol-1-c1",
                "/run/cloister/etc/hostname",
                "/run/cloister/etc/resolv.conf"
            ]
        );
        let types: Vec<_> = spec
            .linux()
            .as_ref()
            .unwrap()
            .namespaces()
            .as_ref()
            .unwrap()
            .iter()
            .map(|ns| ns.typ())
            .collect();
        assert_eq!(types, [LinuxNamespaceType::Pid, LinuxNamespaceType::Mount]);
        let hooks = serde_json::to_value(spec.hooks()).unwrap();
        assert_eq!(
            hooks,
            serde_json::json!({"startContainer": [{"path": "/bin/own"}]})
        );
        let process = spec.process().as_ref().unwrap();
        assert!(process.apparmor_profile().is_none() && process.selinux_label().is_none());
    }

    #[test]
    fn containerds_own_spec_goes_through() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/containerd-config.json");
        let mut spec: Spec = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        for_guest(&mut spec, "c1").unwrap();
        let text = serde_json::to_string(&spec).unwrap();
        assert!(
            !text.contains("/proc/") || !text.contains("/ns/"),
            "no namespace of the host is left"
        );
    }

    #[test]
    fn a_bind_of_nothing_is_refused() {
        let mut spec: Spec = serde_json::from_str(&SPEC.replace("/srv/data", "data")).unwrap();
        assert!(for_guest(&mut spec, "c1").unwrap_err().contains("/data"));
    }
}
