// SPDX-License-Identifier: Apache-2.0
//! A specification in the host's terms becomes one in the guest's.
//!
//! What names things of the host is replaced (bind mounts, which are shared into the VM) or dropped (namespace paths,
//! security profiles of the host's kernel, its processors and memory nodes, hooks but those that are the container's own
//! programs); the pod's own DNS files are mounted where the specification does not bring other ones.

use super::devices::{self, Number};
use cloister_protocol::{ETC_DIR, SHARED_DIR, SHARED_PID_NS, SHM_DIR};
use oci_spec::runtime::{Hooks, LinuxNamespaceType, LinuxResources, Mount, MountBuilder, Spec};
use std::collections::BTreeMap;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// Device nodes that a guest has as the host does.
const COMMON_DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];

/// A directory or file of the host that a container needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// Its name in the shared directory.
    pub name: String,
    /// Path on the host.
    pub source: PathBuf,
    /// The host refuses writes.
    pub read_only: bool,
    /// What the host mounts below it later is to show (mount propagation from the host).
    pub follows_mounts: bool,
}

/// Has the mounts of what was to be shared as `from` come from `to`.
pub fn rename(spec: &mut Spec, from: &str, to: &str) {
    let (from, to) = (Path::new(SHARED_DIR).join(from), Path::new(SHARED_DIR).join(to));
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for mount in &mut mounts {
        if mount.source().as_ref() == Some(&from) {
            mount.set_source(Some(to.clone()));
        }
    }
    spec.set_mounts(Some(mounts));
}

/// The name under which a container's root file system is shared.
pub fn root_name(id: &str) -> String {
    format!("rootfs-{id}")
}

/// Rewrites `spec` for the guest and answers what must be shared before it is used. `targets` are processes of containers
/// with PID namespaces of their own, which another container can ask for.
///
/// # Errors
/// By name, what a container in a VM cannot have.
pub fn for_guest(spec: &mut Spec, id: &str, targets: &[u32]) -> Result<Vec<Share>, String> {
    refuse(spec)?;
    devices::refuse_characters(spec, id)?;
    let mut shares = Vec::new();
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for mount in &mut mounts {
        if let Some(share) = share(mount, &format!("vol-{}-{id}", shares.len()))? {
            shares.push(share);
        }
    }
    let shm = Path::new("/dev/shm");
    mounts.retain(|mount| !is_own_shared_memory(mount));
    if !mounts.iter().any(|mount| mount.destination() == shm) {
        mounts.push(bind(shm, Path::new(SHM_DIR), "rw")?);
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
        let mode = if read_only { "ro" } else { "rw" };
        mounts.push(bind(&destination, &Path::new(ETC_DIR).join(file), mode)?);
    }
    spec.set_mounts(Some(mounts));

    if let Some(mut linux) = spec.linux().clone() {
        if let Some(namespaces) = linux.namespaces().clone() {
            let mut kept = Vec::new();
            for mut namespace in namespaces {
                match (namespace.typ(), namespace.path().clone()) {
                    (LinuxNamespaceType::Network, _) => continue,
                    (_, None) => {}
                    (LinuxNamespaceType::Pid, Some(path)) => {
                        namespace.set_path(Some(guest_pid_namespace(&path, targets)?));
                    }
                    // The pod's, which are the guest's own.
                    (_, Some(_)) => continue,
                }
                kept.push(namespace);
            }
            linux.set_namespaces(Some(kept));
        }
        if let Some(resources) = linux.resources_mut() {
            without_cpuset(resources);
        }
        linux.set_mount_label(None);
        // As the memory nodes among the limits.
        linux.set_memory_policy(None);
        // containerd writes it as mount(8) does; the specification's word, which is recursive as well, is what libcontainer takes.
        let propagation = linux.rootfs_propagation().clone();
        linux.set_rootfs_propagation(propagation.map(|word| word.trim_start_matches('r').to_owned()));
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

/// Rewrites the limits of a container that exists, whose block devices have these numbers in the guest.
pub fn resources(resources: &mut LinuxResources, found: &BTreeMap<Number, Number>) {
    without_cpuset(resources);
    devices::rewrite_resources(resources, found);
}

/// The processors and memory nodes are the host's. The guest has others, all of which are the pod's.
fn without_cpuset(resources: &mut LinuxResources) {
    if let Some(cpu) = resources.cpu_mut() {
        cpu.set_cpus(None).set_mems(None);
    }
    if let Some(unified) = resources.unified_mut() {
        unified.retain(|file, _| !file.starts_with("cpuset."));
    }
}

/// containerd shares one /dev/shm between the containers of a pod only where it makes the pod's sandbox itself. Elsewhere each
/// gets the one that specifications begin with, which is the pod's here. One that somebody asked for stays.
fn is_own_shared_memory(mount: &Mount) -> bool {
    let is_default = |options: &Vec<String>| options.iter().any(|option| option == "size=65536k");
    mount.destination() == Path::new("/dev/shm")
        && mount.typ().as_deref() == Some("tmpfs")
        && mount.options().as_ref().is_some_and(is_default)
}

fn bind(destination: &Path, source: &Path, mode: &str) -> Result<Mount, String> {
    MountBuilder::default()
        .destination(destination)
        .typ("bind")
        .source(source)
        .options(vec!["bind".to_owned(), mode.to_owned()])
        .build()
        .map_err(|e| e.to_string())
}

/// Gives a bind mount its source in the guest.
fn share(mount: &mut Mount, name: &str) -> Result<Option<Share>, String> {
    let options = mount.options().clone().unwrap_or_default();
    let has = |names: &[&str]| options.iter().any(|option| names.contains(&option.as_str()));
    if mount.typ().as_deref() != Some("bind") && !has(&["bind", "rbind"]) {
        return Ok(None);
    }
    let destination = mount.destination().display().to_string();
    let Some(source) = mount.source().clone().filter(|source| source.is_absolute()) else {
        return Err(format!("the mount on {destination} has no absolute source"));
    };
    let kind = std::fs::metadata(&source).map(|metadata| metadata.file_type());
    if kind.is_ok_and(|kind| kind.is_char_device() || kind.is_block_device()) {
        let known = source.file_name().and_then(|name| name.to_str());
        if source.parent() == Some(Path::new("/dev"))
            && known.is_some_and(|name| COMMON_DEVICES.contains(&name))
        {
            return Ok(None);
        }
        let source = source.display();
        return Err(format!(
            "the mount on {destination}: the host's device {source} is not in the pod's virtual machine"
        ));
    }
    mount.set_source(Some(Path::new(SHARED_DIR).join(name)));
    Ok(Some(Share {
        name: name.to_owned(),
        source,
        read_only: has(&["ro", "rro"]),
        follows_mounts: has(&["slave", "rslave", "shared", "rshared"]),
    }))
}

/// containerd names the PID namespace of the pod by Start's process id, which is ours, and that of another container by
/// the one its task has, which is the guest's and can be the same number.
fn guest_pid_namespace(path: &Path, targets: &[u32]) -> Result<PathBuf, String> {
    let text = path.to_str().unwrap_or_default();
    let pid = text
        .strip_prefix("/proc/")
        .and_then(|rest| rest.strip_suffix("/ns/pid"))
        .and_then(|pid| pid.parse::<u32>().ok());
    match pid {
        Some(pid) if pid == std::process::id() && !targets.contains(&pid) => Ok(SHARED_PID_NS.into()),
        Some(_) => Ok(path.to_owned()),
        None => Err(format!("the PID namespace {text:?} is not one of this pod's")),
    }
}

/// Whether a specification of the guest's has the container share the pod's PID namespace.
pub fn shares_pids(spec: &Spec) -> bool {
    let namespaces = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_ref());
    namespaces.into_iter().flatten().any(|namespace| {
        namespace.typ() == LinuxNamespaceType::Pid
            && namespace.path().as_deref() == Some(Path::new(SHARED_PID_NS))
    })
}

/// What would be silently different is refused by name.
fn refuse(spec: &Spec) -> Result<(), String> {
    let unsupported = |what: &str| {
        Err(format!(
            "{what} is not supported in a pod with a virtual machine of its own"
        ))
    };
    let is_mapped = |mount: &Mount| {
        let mut options = mount.options().iter().flatten();
        mount.uid_mappings().is_some()
            || mount.gid_mappings().is_some()
            || options.any(|option| matches!(option.as_str(), "idmap" | "ridmap"))
    };
    for mount in spec.mounts().iter().flatten() {
        if is_mapped(mount) {
            return unsupported(&format!(
                "the ID-mapped mount on {}",
                mount.destination().display()
            ));
        }
    }
    let Some(linux) = spec.linux() else { return Ok(()) };
    if linux
        .rootfs_propagation()
        .as_ref()
        .is_some_and(|word| word.ends_with("shared"))
    {
        return unsupported("mount propagation from the container to the host (Bidirectional)");
    }
    if linux.net_devices().is_some() {
        return unsupported("linux.netDevices");
    }
    if linux.intel_rdt().is_some() {
        return unsupported("linux.intelRdt");
    }
    if linux
        .seccomp()
        .as_ref()
        .is_some_and(|seccomp| seccomp.listener_path().is_some())
    {
        return unsupported("linux.seccomp.listenerPath");
    }
    let has_user = |ns: &oci_spec::runtime::LinuxNamespace| ns.typ() == LinuxNamespaceType::User;
    if linux.namespaces().iter().flatten().any(has_user) {
        return unsupported("a user namespace");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEC: &str = r#"{"ociVersion":"1.2.0","root":{"path":"rootfs"},
        "process":{"user":{"uid":0,"gid":0},"cwd":"/","args":["a"],"apparmorProfile":"p","selinuxLabel":"l"},
        "hooks":{"prestart":[{"path":"/bin/evil"}],"startContainer":[{"path":"/bin/own"}]},
        "mounts":[{"destination":"/proc","type":"proc","source":"proc"},
                  {"destination":"/dev/shm","type":"tmpfs","source":"shm","options":["nosuid","mode=1777","size=65536k"]},
                  {"destination":"/data","type":"bind","source":"/srv/data","options":["rbind","ro"]},
                  {"destination":"/etc/hosts","type":"bind","source":"/srv/hosts","options":["rbind","rw"]}],
        "linux":{"cgroupsPath":"/k8s/x","namespaces":[{"type":"pid"},{"type":"network","path":"/proc/1/ns/net"},
                  {"type":"network"},{"type":"uts","path":"/proc/1/ns/uts"},{"type":"mount"}]}}"#;

    #[test]
    fn host_things_are_replaced_or_dropped() {
        let mut spec: Spec = serde_json::from_str(SPEC).unwrap();
        let shares = for_guest(&mut spec, "c1", &[]).unwrap();
        let share = |name: &str, source: &str, read_only| Share {
            name: name.into(),
            source: source.into(),
            read_only,
            follows_mounts: false,
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
                "/run/cloister/shm",
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
    fn processors_and_memory_nodes_are_the_guests() {
        let limits = r#""memoryPolicy":{"mode":"MPOL_BIND","nodes":"1"},"resources":{"cpu":{"quota":200000,"cpus":"62-63","mems":"1"},
            "unified":{"cpuset.cpus":"62-63","memory.high":"1"}},"cgroupsPath""#;
        let text = SPEC.replace(r#""cgroupsPath""#, limits);
        let mut spec: Spec = serde_json::from_str(&text).unwrap();
        for_guest(&mut spec, "c1", &[]).unwrap();
        let left = serde_json::to_value(spec.linux().as_ref().unwrap().resources()).unwrap();
        let expected = serde_json::json!({"cpu": {"quota": 200_000}, "unified": {"memory.high": "1"}});
        assert_eq!(left, expected);
        assert!(spec.linux().as_ref().unwrap().memory_policy().is_none());
    }

    #[test]
    fn containerds_own_spec_goes_through() {
        let text = include_str!("../../tests/data/containerd-config.json");
        // Start's answer was another process then.
        let text = text.replace("/proc/14446/", &format!("/proc/{}/", std::process::id()));
        let mut spec: Spec = serde_json::from_str(&text).unwrap();
        for_guest(&mut spec, "c1", &[]).unwrap();
        let text = serde_json::to_string(&spec).unwrap();
        let paths = text.matches("/ns/").count();
        assert!(
            paths == 1 && text.contains(SHARED_PID_NS),
            "no namespace of the host is left"
        );
    }

    #[test]
    fn pid_namespaces_are_the_pods_or_a_tasks() {
        let own = format!("/proc/{}/ns/pid", std::process::id());
        assert_eq!(
            guest_pid_namespace(Path::new(&own), &[7]).unwrap(),
            Path::new(SHARED_PID_NS)
        );
        let task = Path::new("/proc/0/ns/pid");
        assert_eq!(guest_pid_namespace(task, &[]).unwrap(), task);
        // A container's process in the guest has our number.
        let targets = [7, std::process::id()];
        assert_eq!(
            guest_pid_namespace(Path::new(&own), &targets).unwrap(),
            Path::new(&own)
        );
        for bad in [
            "/proc/self/ns/pid",
            "/proc/1/ns/net",
            "/run/netns/x",
            "/proc/1/../2/ns/pid",
        ] {
            assert!(guest_pid_namespace(Path::new(bad), &[]).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_cannot_be_is_named() {
        let refused = |from: &str, to: &str| {
            let text = SPEC.replace(from, to);
            for_guest(&mut serde_json::from_str(&text).unwrap(), "c1", &[]).unwrap_err()
        };
        let (linux, mapping) = (r#""cgroupsPath""#, r#"[{"containerID":0,"hostID":9,"size":1}]"#);
        for (from, to, name) in [
            (
                r#"{"type":"mount"}"#,
                r#"{"type":"mount"},{"type":"user"}"#,
                "a user namespace",
            ),
            ("/srv/data", "/dev/kmsg", "/dev/kmsg"),
            (
                linux,
                r#""devices":[{"path":"/dev/gpu0","type":"c","major":195,"minor":0}]"#,
                "/dev/gpu0",
            ),
            (linux, r#""netDevices":{"eth1":{}}"#, "linux.netDevices"),
            (linux, r#""intelRdt":{}"#, "linux.intelRdt"),
            (
                linux,
                r#""seccomp":{"defaultAction":"SCMP_ACT_NOTIFY","listenerPath":"/run/l.sock"}"#,
                "linux.seccomp.listenerPath",
            ),
            (linux, r#""rootfsPropagation":"rshared""#, "(Bidirectional)"),
            (linux, r#""rootfsPropagation":"shared""#, "(Bidirectional)"),
            (
                r#""options":["rbind","ro"]"#,
                &format!(r#""uidMappings":{mapping},"options":["rbind"]"#),
                "the ID-mapped mount on /data",
            ),
            (
                r#""options":["rbind","ro"]"#,
                &format!(r#""gidMappings":{mapping},"options":["rbind"]"#),
                "the ID-mapped mount on /data",
            ),
            (
                r#"["rbind","ro"]"#,
                r#"["rbind","idmap"]"#,
                "the ID-mapped mount on /data",
            ),
            (
                r#"["rbind","ro"]"#,
                r#"["rbind","ridmap"]"#,
                "the ID-mapped mount on /data",
            ),
        ] {
            // Members of the specification's `linux` go before the one that is there.
            let to = if from == linux {
                format!("{to},{linux}")
            } else {
                to.to_owned()
            };
            let told = refused(from, &to);
            assert!(told.contains(name), "{to}: {told}");
        }
    }

    #[test]
    fn propagation_from_the_host_is_in_the_specifications_words() {
        let slave = r#""rootfsPropagation":"rslave","cgroupsPath""#;
        let text = SPEC.replace(r#""cgroupsPath""#, slave);
        let mut spec: Spec = serde_json::from_str(&text).unwrap();
        for_guest(&mut spec, "c1", &[]).unwrap();
        let linux = spec.linux().as_ref().unwrap();
        assert_eq!(linux.rootfs_propagation().as_deref(), Some("slave"));
    }

    #[test]
    fn devices_that_every_guest_has_are_bound_there() {
        let mut spec: Spec = serde_json::from_str(&SPEC.replace("/srv/data", "/dev/null")).unwrap();
        let shares = for_guest(&mut spec, "c1", &[]).unwrap();
        assert_eq!(shares.len(), 1);
        let source = |index: usize| spec.mounts().as_ref().unwrap()[index].source().clone().unwrap();
        assert_eq!(source(1), Path::new("/dev/null"));
    }

    #[test]
    fn a_bind_of_nothing_is_refused() {
        let mut spec: Spec = serde_json::from_str(&SPEC.replace("/srv/data", "data")).unwrap();
        assert!(for_guest(&mut spec, "c1", &[]).unwrap_err().contains("/data"));
    }
}
