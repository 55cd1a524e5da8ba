// SPDX-License-Identifier: Apache-2.0
//! `containerd-shim-cloister-v1`: this program under the name by which containerd looks for a runtime's shim.
//!
//! Pods live in cloisterd, so there is nothing for a shim to do. containerd wants it to exist, asks it what it is
//! (`-info`), and has it clean up (`delete`) after tasks that it could not find again.

use cloister_protocol::protobuf::Message;
use cloister_protocol::task::DeleteResponse;
use containerd_client::types::{RuntimeInfo, RuntimeVersion};
use std::ffi::OsStr;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

/// The name.
pub const NAME: &str = "containerd-shim-cloister-v1";
/// The exit status of what was killed.
const KILLED: u32 = 137;

/// Answers containerd, if it was called by [`NAME`].
pub fn answer(arguments: &[String]) -> Option<ExitCode> {
    let (program, arguments) = arguments.split_first()?;
    if Path::new(program).file_name() != Some(OsStr::new(NAME)) {
        return None;
    }
    let said = match words(arguments) {
        Ok(bytes) => bytes,
        Err(message) => {
            crate::error::tell(format_args!("{NAME}: {message}"));
            return Some(ExitCode::FAILURE);
        }
    };
    let written = std::io::stdout().lock().write_all(&said);
    Some(ExitCode::from(u8::from(written.is_err())))
}

fn words(arguments: &[String]) -> Result<Vec<u8>, String> {
    let has = |word: &str| {
        arguments
            .iter()
            .any(|argument| argument.trim_start_matches('-') == word)
    };
    if arguments.last().is_some_and(|last| last == "delete") {
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        let mut response = DeleteResponse {
            exit_status: KILLED,
            ..Default::default()
        };
        let exited = response.exited_at.mut_or_insert_default();
        exited.seconds = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        exited.nanos = i32::try_from(now.subsec_nanos()).unwrap_or(0);
        return response.write_to_bytes().map_err(|e| e.to_string());
    }
    if has("info") {
        let info = RuntimeInfo {
            name: "io.containerd.cloister.v1".to_owned(),
            version: Some(RuntimeVersion {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                revision: String::new(),
            }),
            features: Some(features()),
            ..Default::default()
        };
        return Ok(prost::Message::encode_to_vec(&info));
    }
    if has("v") || has("version") {
        return Ok(format!("{NAME} {}\n", env!("CARGO_PKG_VERSION")).into_bytes());
    }
    Err("it starts no pods: cloisterd does, when containerd's runtime names a sandboxer (sandboxer = \"cloister\")".to_owned())
}

/// What the runtime can do, in the terms of the OCI runtime specification (features.md). containerd 2.1 shows it (`ctr plugins
/// inspect-runtime`); its CRI asks nobody but runc.
fn features() -> prost_types::Any {
    let features = serde_json::json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "hooks": ["startContainer"],
        "mountOptions": [
            "bind", "dev", "exec", "noatime", "nodev", "noexec", "nosuid", "private", "rbind", "relatime", "ro", "rprivate",
            "rro", "rslave", "rw", "slave", "strictatime", "suid",
        ],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "uts"],
            "cgroup": {"v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false},
            "seccomp": {"enabled": true},
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
            "intelRdt": {"enabled": false},
        },
    });
    prost_types::Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/features/Features".to_owned(),
        value: features.to_string().into_bytes(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(arguments: &[&str]) -> Result<Vec<u8>, String> {
        words(&arguments.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn containerd_is_answered() {
        let deleted = said(&["-namespace", "k8s.io", "-id", "a", "-bundle", "/b", "delete"]).unwrap();
        let deleted = DeleteResponse::parse_from_bytes(&deleted).unwrap();
        assert_eq!(deleted.exit_status, 137);
        assert!(deleted.exited_at.seconds > 1_600_000_000);
        let info: RuntimeInfo = prost::Message::decode(said(&["-info"]).unwrap().as_slice()).unwrap();
        assert_eq!(info.name, "io.containerd.cloister.v1");
        let features: serde_json::Value = serde_json::from_slice(&info.features.unwrap().value).unwrap();
        let options = features["mountOptions"].as_array().unwrap();
        assert!(options.contains(&"rro".into()));
        assert!(said(&["-v"]).unwrap().starts_with(NAME.as_bytes()));
        assert!(
            said(&["-namespace", "k8s.io", "-id", "a", "start"])
                .unwrap_err()
                .contains("sandboxer")
        );
        assert!(answer(&["/usr/bin/cloister".to_owned()]).is_none());
    }
}
