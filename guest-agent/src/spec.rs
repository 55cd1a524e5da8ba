// SPDX-License-Identifier: Apache-2.0
//! OCI specs as they come from the host, made fit for libcontainer.

use std::path::{Path, PathBuf};

use cloister_protocol::protobuf::well_known_types::any::Any;
use oci_spec::runtime::{LinuxNamespaceType, Process, Root, Spec};

use crate::error::{Result, invalid_argument};

/// Longest container or exec id.
const MAX_ID: usize = 128;

/// Checks an id, which becomes a file name: as containerd's identifiers, letters and digits with `_`, `-`, `.` between.
///
/// # Errors
/// InvalidArgument.
pub fn check_id(id: &str) -> Result<()> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '+');
    let sound = !id.is_empty()
        && id.len() <= MAX_ID
        && id.chars().all(good)
        && id.starts_with(|c: char| c.is_ascii_alphanumeric());
    if sound {
        Ok(())
    } else {
        Err(invalid_argument(format!("identifier {id:?} is not a valid one")))
    }
}

/// A spec ready to be written to a bundle.
#[derive(Debug)]
pub struct Prepared {
    /// config.json
    pub spec: Spec,
    /// The container's cgroup, relative to the root of the tree.
    pub cgroup: PathBuf,
    /// Size the terminal starts with: width, height in characters.
    pub console_size: Option<(u16, u16)>,
}

/// Reads the spec of a container from Create's options.
///
/// `mounted_root` is set when the agent mounts the root file system itself. Fields that make libcontainer refuse a spec
/// though they mean nothing in a pod are dropped: the hostname of a container that shares the pod's UTS namespace, labels of security modules, a limit of swap
/// space on a kernel without any.
///
/// # Errors
/// InvalidArgument.
pub fn prepare(id: &str, options: &Any, terminal: bool, mounted_root: Option<&Path>) -> Result<Prepared> {
    let mut spec: Spec = serde_json::from_slice(&options.value)
        .map_err(|e| invalid_argument(format!("the OCI spec of container {id} cannot be read: {e}")))?;
    if let Some(path) = mounted_root {
        let mut root = spec.root().clone().unwrap_or_default();
        root.set_path(path.to_owned());
        spec.set_root(Some(root));
    }
    let rooted = spec
        .root()
        .as_ref()
        .map(Root::path)
        .is_some_and(|path| path.is_absolute());
    if !rooted {
        return Err(invalid_argument(format!(
            "container {id} has neither rootfs mounts nor an absolute root path"
        )));
    }
    let mut process = spec
        .process()
        .clone()
        .ok_or_else(|| invalid_argument(format!("container {id} has no process")))?;
    let console_size = fit_process(&mut process, terminal);
    spec.set_process(Some(process));
    let mut linux = spec.linux().clone().unwrap_or_default();
    linux.set_mount_label(None).set_intel_rdt(None);
    if !has_swap()
        && let Some(resources) = linux.resources_mut()
        && let Some(memory) = resources.memory_mut()
    {
        memory.set_swap(None);
    }
    let own_uts = linux.namespaces().as_ref().is_some_and(|all| {
        all.iter()
            .any(|ns| ns.typ() == LinuxNamespaceType::Uts && ns.path().is_none())
    });
    if !own_uts {
        spec.set_hostname(None);
        spec.set_domainname(None);
    }
    let cgroup = cgroup_path(id, linux.cgroups_path().as_deref())?;
    linux.set_cgroups_path(Some(Path::new("/").join(&cgroup)));
    spec.set_linux(Some(linux));
    Ok(Prepared {
        spec,
        cgroup,
        console_size,
    })
}

/// A container's cgroup below the root of the tree; `cloister/ID` when the spec names none.
fn cgroup_path(id: &str, given: Option<&Path>) -> Result<PathBuf> {
    use std::path::Component;
    let mut path = PathBuf::new();
    for part in given.unwrap_or_else(|| Path::new("")).components() {
        match part {
            Component::Normal(name) => path.push(name),
            Component::RootDir | Component::CurDir => {}
            _ => return Err(invalid_argument(format!("cgroup path {given:?} leaves its tree"))),
        }
    }
    Ok(if path.as_os_str().is_empty() {
        Path::new("cloister").join(id)
    } else {
        path
    })
}

/// Whether the kernel can swap: if not, cgroups have no file for a limit.
pub fn has_swap() -> bool {
    Path::new("/proc/swaps").exists()
}

/// What holds for every process. Security labels name profiles of the host's kernel, which the guest's does not have: the
/// VM is what they would protect. Returns the size of the terminal.
fn fit_process(process: &mut Process, terminal: bool) -> Option<(u16, u16)> {
    process
        .set_terminal(Some(terminal))
        .set_apparmor_profile(None)
        .set_selinux_label(None);
    if process.no_new_privileges() == Some(false) {
        // libcontainer takes "present" for "true" when it decides how to load a seccomp profile.
        process.set_no_new_privileges(None);
    }
    console_size(process)
}

fn console_size(process: &Process) -> Option<(u16, u16)> {
    let size = process.console_size()?;
    let of = |n: u64| u16::try_from(n).ok().filter(|n| *n > 0);
    Some((of(size.width())?, of(size.height())?))
}

/// Reads the process of an exec.
///
/// # Errors
/// InvalidArgument.
pub fn prepare_exec(options: &Any, terminal: bool) -> Result<(Process, Option<(u16, u16)>)> {
    let mut process: Process = serde_json::from_slice(&options.value)
        .map_err(|e| invalid_argument(format!("the OCI process cannot be read: {e}")))?;
    let size = fit_process(&mut process, terminal);
    Ok((process, size))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(json: &str) -> Any {
        Any {
            value: json.as_bytes().to_vec(),
            ..Default::default()
        }
    }

    const SPEC: &str = r#"{"ociVersion":"1.1.0","hostname":"h","root":{"path":"rootfs"},
        "process":{"terminal":false,"cwd":"/","args":["sh"],"user":{"uid":0,"gid":0},"consoleSize":{"width":100,"height":30}},
        "linux":{"cgroupsPath":"/k8s.io/./abc","namespaces":[{"type":"mount"},{"type":"uts","path":"/proc/1/ns/uts"}]}}"#;

    #[test]
    fn a_spec_is_made_fit() {
        let got = prepare("c1", &any(SPEC), true, Some(Path::new("/b/rootfs"))).unwrap();
        assert_eq!(got.cgroup, Path::new("k8s.io/abc"));
        assert_eq!(got.spec.root().as_ref().unwrap().path(), Path::new("/b/rootfs"));
        assert_eq!(got.spec.hostname(), &None);
        assert_eq!(got.spec.process().as_ref().unwrap().terminal(), Some(true));
        assert_eq!(got.console_size, Some((100, 30)));
    }

    #[test]
    fn a_hostname_of_its_own_is_kept() {
        let spec = SPEC.replace(r#","path":"/proc/1/ns/uts""#, "");
        let got = prepare("c1", &any(&spec), false, Some(Path::new("/b"))).unwrap();
        assert_eq!(got.spec.hostname().as_deref(), Some("h"));
    }

    #[test]
    fn bad_specs_are_refused() {
        assert!(prepare("c1", &any("{"), false, None).is_err());
        assert!(
            prepare("c1", &any(SPEC), false, None).is_err(),
            "relative root and no mounts"
        );
        let spec = SPEC.replace("/k8s.io/./abc", "/../../x");
        assert!(prepare("c1", &any(&spec), false, Some(Path::new("/b"))).is_err());
        assert!(prepare_exec(&any("[]"), false).is_err());
    }

    #[test]
    fn cgroups_have_a_default() {
        assert_eq!(cgroup_path("c1", None).unwrap(), Path::new("cloister/c1"));
        assert_eq!(
            cgroup_path("c1", Some(Path::new("/"))).unwrap(),
            Path::new("cloister/c1")
        );
    }

    #[test]
    fn ids_are_file_names() {
        for good in ["a", "0123456789abcdef", "my_pod-1.x"] {
            assert!(check_id(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "-x", "a b", "ä", &"x".repeat(129)] {
            assert!(check_id(bad).is_err(), "{bad}");
        }
    }
}
