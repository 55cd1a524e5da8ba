// SPDX-License-Identifier: Apache-2.0
//! OCI specs as they come from the host, made fit for libcontainer.
//!
//! They are handled as plain JSON: what the agent does not know passes through to libcontainer, which reads the file.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use cloister_protocol::CONTAINER_SPEC_TYPE_URL;
use cloister_protocol::pod::{ContainerSpec, Seccomp};
use cloister_protocol::protobuf::Message;
use cloister_protocol::protobuf::well_known_types::any::Any;
use serde_json::{Map, Value};

use crate::error::{Result, invalid_argument};
use crate::seccomp;

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
    pub json: Value,
    /// Its seccomp profile: see [`crate::seccomp`].
    pub seccomp: Option<Seccomp>,
    /// The container's cgroup, relative to the root of the tree.
    pub cgroup: PathBuf,
    /// Size the terminal starts with: width, height in characters.
    pub console_size: Option<(u16, u16)>,
}

/// Reads the spec of a container from Create's options.
///
/// `mounted_root` is set when the agent mounts the root file system itself. Fields that make libcontainer refuse a spec
/// though they mean nothing in a pod are dropped: the hostname of a container that shares the pod's UTS namespace, labels
/// of security modules, a limit of swap space on a kernel without any.
///
/// # Errors
/// InvalidArgument.
pub fn prepare(id: &str, options: &Any, terminal: bool, mounted_root: Option<&Path>) -> Result<Prepared> {
    let wrong = |what: &str| invalid_argument(format!("the OCI spec of container {id} {what}"));
    let unreadable = |e: &dyn Display| wrong(&format!("cannot be read: {e}"));
    let given = match options.type_url.as_str() {
        CONTAINER_SPEC_TYPE_URL => {
            ContainerSpec::parse_from_bytes(&options.value).map_err(|e| unreadable(&e))?
        }
        _ => ContainerSpec {
            oci: options.value.clone(),
            ..Default::default()
        },
    };
    let seccomp = given.seccomp.into_option();
    if let Some(profile) = &seccomp {
        seccomp::instructions(profile).map_err(|e| unreadable(&e))?;
    }
    let mut json: Value = serde_json::from_slice(&given.oci).map_err(|e| unreadable(&e))?;
    let spec = json.as_object_mut().ok_or_else(|| wrong("is no object"))?;
    let root = member(spec, "root").ok_or_else(|| wrong("has a root that is no object"))?;
    if let Some(path) = mounted_root {
        let path = path
            .to_str()
            .ok_or_else(|| wrong("has a bundle whose path is no text"))?;
        root.insert("path".to_owned(), path.into());
    }
    if !root
        .get("path")
        .and_then(Value::as_str)
        .is_some_and(|path| path.starts_with('/'))
    {
        return Err(wrong("has neither rootfs mounts nor an absolute root path"));
    }
    let process = spec
        .get_mut("process")
        .and_then(Value::as_object_mut)
        .ok_or_else(|| wrong("has no process"))?;
    let console_size = fit_process(process, terminal);
    let linux = member(spec, "linux").ok_or_else(|| wrong("has a linux section that is no object"))?;
    linux.remove("mountLabel");
    if linux.remove("seccomp").is_some_and(|profile| !profile.is_null()) {
        return Err(wrong("has a seccomp profile that the host has not translated"));
    }
    linux.remove("intelRdt");
    if !has_swap()
        && let Some(memory) = linux
            .get_mut("resources")
            .and_then(|r| r.get_mut("memory")?.as_object_mut())
    {
        memory.remove("swap");
    }
    let own_uts = linux
        .get("namespaces")
        .and_then(Value::as_array)
        .is_some_and(|all| {
            all.iter()
                .any(|ns| ns["type"] == "uts" && ns["path"].as_str().is_none_or(str::is_empty))
        });
    let namespaces = linux.get_mut("namespaces").and_then(Value::as_array_mut);
    for namespace in namespaces.into_iter().flatten().filter_map(Value::as_object_mut) {
        // No path, to OCI's Go types; libcontainer would open it.
        if namespace
            .get("path")
            .is_some_and(|path| path == "" || path.is_null())
        {
            namespace.remove("path");
        }
    }
    let cgroup = cgroup_path(
        id,
        linux.get("cgroupsPath").and_then(Value::as_str).map(Path::new),
    )?;
    let path = format!("/{}", cgroup.to_str().unwrap_or_default());
    linux.insert("cgroupsPath".to_owned(), path.into());
    if !own_uts {
        spec.remove("hostname");
        spec.remove("domainname");
    }
    if seccomp.is_some()
        && let Some(process) = spec.get_mut("process").and_then(Value::as_object_mut)
    {
        may_load_seccomp(process);
    }
    Ok(Prepared {
        json,
        seccomp,
        cgroup,
        console_size,
    })
}

/// An object in an object, made if it is not there; None if it is something else.
fn member<'a>(object: &'a mut Map<String, Value>, key: &str) -> Option<&'a mut Map<String, Value>> {
    object
        .entry(key)
        .or_insert_with(|| Value::Object(Map::new()))
        .as_object_mut()
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
fn fit_process(process: &mut Map<String, Value>, terminal: bool) -> Option<(u16, u16)> {
    process.insert("terminal".to_owned(), terminal.into());
    process.remove("apparmorProfile");
    process.remove("selinuxLabel");
    // Processors of the host's; all of the guest's are the container's.
    process.remove("execCPUAffinity");
    if process.get("noNewPrivileges") == Some(&Value::Bool(false)) {
        // libcontainer takes "present" for "true" when it decides how to load a seccomp profile.
        process.remove("noNewPrivileges");
    }
    let size = process.get("consoleSize")?;
    let of = |key: &str| {
        size.get(key)?
            .as_u64()
            .and_then(|n| u16::try_from(n).ok())
            .filter(|n| *n > 0)
    };
    Some((of("width")?, of("height")?))
}

/// Without "no new privileges" only a process with CAP_SYS_ADMIN may load a seccomp profile, and that happens after
/// libcontainer has set the capabilities (see [`crate::executor`]). So the process gets this one on top, outside the
/// bounding set: execve, which comes next, takes it away again.
fn may_load_seccomp(process: &mut Map<String, Value>) {
    if process.get("noNewPrivileges") != Some(&Value::Bool(true))
        && let Some(sets) = process.get_mut("capabilities").and_then(Value::as_object_mut)
    {
        for set in ["effective", "permitted"] {
            let set = sets.entry(set).or_insert_with(|| Value::Array(Vec::new()));
            if let Some(set) = set.as_array_mut() {
                set.push(Value::from("CAP_SYS_ADMIN"));
            }
        }
    }
}

/// Reads the process of an exec. `seccomp` tells that the container has a profile. Returns the JSON for libcontainer, and
/// the size of the terminal.
///
/// # Errors
/// InvalidArgument.
pub fn prepare_exec(options: &Any, terminal: bool, seccomp: bool) -> Result<(Value, Option<(u16, u16)>)> {
    let mut json: Value = serde_json::from_slice(&options.value)
        .map_err(|e| invalid_argument(format!("the OCI process cannot be read: {e}")))?;
    let process = json
        .as_object_mut()
        .ok_or_else(|| invalid_argument("the OCI process is no object"))?;
    let size = fit_process(process, terminal);
    if seccomp {
        may_load_seccomp(process);
    }
    Ok((json, size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use cloister_protocol::protobuf::MessageField;

    fn any(json: &str) -> Any {
        Any {
            value: json.as_bytes().to_vec(),
            ..Default::default()
        }
    }

    const SPEC: &str = r#"{"ociVersion":"1.1.0","hostname":"h","root":{"path":"rootfs","readonly":true},"future":[1],
        "process":{"terminal":false,"cwd":"/","args":["sh"],"user":{"uid":0,"gid":0},"apparmorProfile":"x",
            "execCPUAffinity":{"initial":"62-63"},
            "noNewPrivileges":false,"consoleSize":{"width":100,"height":30}},
        "linux":{"cgroupsPath":"/k8s.io/./abc","namespaces":[{"type":"mount"},{"type":"uts","path":"/proc/1/ns/uts"}]}}"#;

    #[test]
    fn a_spec_is_made_fit() {
        let got = prepare("c1", &any(SPEC), true, Some(Path::new("/b/rootfs"))).unwrap();
        assert_eq!(got.cgroup, Path::new("k8s.io/abc"));
        assert_eq!(got.json["linux"]["cgroupsPath"], "/k8s.io/abc");
        assert_eq!(got.json["root"]["path"], "/b/rootfs");
        assert_eq!(got.json["root"]["readonly"], true);
        assert_eq!(got.json["process"]["terminal"], true);
        assert_eq!(got.json["future"][0], 1, "what we do not know is passed on");
        assert_eq!(got.console_size, Some((100, 30)));
        for gone in [
            "/hostname",
            "/process/apparmorProfile",
            "/process/execCPUAffinity",
            "/process/noNewPrivileges",
        ] {
            assert_eq!(got.json.pointer(gone), None, "{gone}");
        }
    }

    #[test]
    fn a_seccomp_profile_comes_translated() {
        let spec = SPEC.replace(
            r#""terminal":false,"#,
            r#""capabilities":{"bounding":["CAP_KILL"],"effective":[]},"#,
        );
        let given = |spec: &str, program: usize| Any {
            type_url: CONTAINER_SPEC_TYPE_URL.into(),
            value: ContainerSpec {
                oci: spec.as_bytes().to_vec(),
                seccomp: MessageField::some(Seccomp {
                    flags: 2,
                    program: vec![6; program],
                    ..Default::default()
                }),
                ..Default::default()
            }
            .write_to_bytes()
            .unwrap(),
            ..Default::default()
        };
        let root = Some(Path::new("/b"));
        let got = prepare("c1", &given(&spec, 8), false, root).unwrap();
        assert_eq!(got.seccomp.unwrap().flags, 2);
        let capabilities = &got.json["process"]["capabilities"];
        assert_eq!(capabilities["effective"][0], "CAP_SYS_ADMIN");
        assert_eq!(capabilities["bounding"][0], "CAP_KILL");
        let got = prepare("c1", &any(&spec), false, root).unwrap();
        assert!(got.seccomp.is_none());
        assert_eq!(
            got.json.pointer("/process/capabilities/effective"),
            Some(&Value::Array(Vec::new()))
        );
        assert!(
            prepare("c1", &given(&spec, 7), false, root).is_err(),
            "no program"
        );
        // One that nobody has translated is not passed over.
        let with =
            |profile: &str| spec.replace(r#""linux":{"#, &format!(r#""linux":{{"seccomp":{profile},"#));
        let error = prepare("c1", &any(&with("{}")), false, root).unwrap_err();
        assert!(error.to_string().contains("seccomp profile"), "{error}");
        let got = prepare("c1", &any(&with("null")), false, root).unwrap();
        assert_eq!(got.json.pointer("/linux/seccomp"), None);
    }

    #[test]
    fn a_hostname_of_its_own_is_kept() {
        let spec = SPEC.replace(r#","path":"/proc/1/ns/uts""#, "");
        let got = prepare("c1", &any(&spec), false, Some(Path::new("/b"))).unwrap();
        assert_eq!(got.json["hostname"], "h");
    }

    #[test]
    fn bad_specs_are_refused() {
        let root = Some(Path::new("/b"));
        for bad in [
            "{",
            "[]",
            "{}",
            r#"{"process":[]}"#,
            r#"{"process":{},"linux":1}"#,
            r#"{"process":{},"root":""}"#,
        ] {
            assert!(prepare("c1", &any(bad), false, root).is_err(), "{bad}");
        }
        assert!(
            prepare("c1", &any(SPEC), false, None).is_err(),
            "relative root and no mounts"
        );
        let spec = SPEC.replace("/k8s.io/./abc", "/../../x");
        assert!(prepare("c1", &any(&spec), false, root).is_err());
        assert!(prepare_exec(&any("[]"), false, false).is_err());
    }

    #[test]
    fn an_exec_may_load_its_seccomp_profile() {
        let process = r#"{"args":["sh"],"capabilities":{"bounding":["CAP_KILL"],"permitted":["CAP_KILL"]}}"#;
        let (json, _) = prepare_exec(&any(process), false, true).unwrap();
        assert_eq!(json["capabilities"]["permitted"][1], "CAP_SYS_ADMIN");
        assert_eq!(json["capabilities"]["effective"][0], "CAP_SYS_ADMIN");
        assert_eq!(json["capabilities"]["bounding"].as_array().unwrap().len(), 1);
        let (json, _) = prepare_exec(&any(process), false, false).unwrap();
        assert_eq!(json["capabilities"].get("effective"), None);
        let strict = process.replace(r#""args""#, r#""noNewPrivileges":true,"args""#);
        let (json, _) = prepare_exec(&any(&strict), false, true).unwrap();
        assert_eq!(json["capabilities"].get("effective"), None);
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
