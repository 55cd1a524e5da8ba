// SPDX-License-Identifier: Apache-2.0
//! The list of tasks in a pod's extensions: all that there are or are about to be, each with its root file system. iSulad
//! sends it whole whenever it changes. Specification, streams and execs are in it, too; they come again with the calls of
//! the Task service.

use cloister_protocol::task::Mount;
use containerd_client::services::v1::sandbox::ControllerUpdateRequest;
use serde::Deserialize;
use std::collections::HashMap;

/// The field of an Update that is about them.
const FIELD: &str = "extensions.tasks";
/// Their key among the extensions.
const KEY: &str = "tasks";

#[derive(Deserialize)]
struct List {
    #[serde(default)]
    tasks: Vec<Task>,
}

#[derive(Deserialize)]
struct Task {
    task_id: String,
    #[serde(default)]
    rootfs: Vec<JsonMount>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct JsonMount {
    #[serde(rename = "type")]
    kind: String,
    source: String,
    options: Vec<String>,
}

/// Root file systems by container.
pub type Roots = HashMap<String, Vec<Mount>>;

/// A mount in the Task service's terms.
pub fn mount(kind: &str, source: &str, options: &[String]) -> Mount {
    Mount {
        type_: kind.to_owned(),
        source: source.to_owned(),
        options: options.to_vec(),
        ..Default::default()
    }
}

/// The list in an Update; None if it is about something else.
///
/// # Errors
/// The list is not well-formed.
pub fn read(request: &ControllerUpdateRequest) -> Option<Result<Roots, String>> {
    if !request.fields.iter().any(|field| field == FIELD) {
        return None;
    }
    let list = request
        .sandbox
        .as_ref()
        .and_then(|sandbox| sandbox.extensions.get(KEY));
    Some(match list {
        // All of them are gone.
        None => Ok(Roots::new()),
        Some(any) => parse(&any.value).map_err(|e| format!("{FIELD}: {e}")),
    })
}

fn parse(json: &[u8]) -> serde_json::Result<Roots> {
    let list: List = serde_json::from_slice(json)?;
    let root = |task: Task| {
        let mounts = task.rootfs.iter();
        let mounts = mounts.map(|one| mount(&one.kind, &one.source, &one.options));
        (task.task_id, mounts.collect())
    };
    Ok(list.tasks.into_iter().map(root).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_as_isulad_writes_it() {
        let json = br#"{"tasks":[{"task_id":"c1","spec":{"ociVersion":"1.0.1"},"rootfs":[{"type":"bind","source":"/fs/c1"}],
            "stdin":"","stdout":"/f/out","stderr":"/f/err","processes":[{"exec_id":"e1","spec":{}}]},{"task_id":"c2"}]}"#;
        let roots = parse(json).unwrap();
        assert_eq!(roots["c1"], [mount("bind", "/fs/c1", &[])]);
        assert_eq!(roots["c2"], []);
        assert!(parse(b"{}").unwrap().is_empty());
        for wrong in [&b""[..], b"[]x", br#"{"tasks":[{}]}"#, br#"{"tasks":5}"#] {
            assert!(parse(wrong).is_err());
        }
    }
}
