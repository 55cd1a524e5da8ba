// SPDX-License-Identifier: Apache-2.0
//! Root file systems that are not overlayfs': each snapshotter hands over mounts of its own kind.

use cloister_tests::cri::{Outcome, Output, Pod, Runtime, USER, api, script, security};
use serde_json::{Value, json};

/// Changes of all kinds to what the image has.
const CHANGES: &str = "b=busybox; $b head -n 1 /etc/passwd; echo new >/etc/new; echo more >>/etc/group; $b rm /etc/passwd; $b mkdir -p /a/b; \
    $b ln /etc/new /a/hard; $b mv /bin/id /a/id; $b chown 5:6 /a/hard; $b chmod 4751 /a/hard; $b stat -c '%h %a %u:%g' /etc/new; \
    $b ls /etc /a /bin; $b tail -n 1 /etc/group; /a/id -u; $b ln -s ../etc /a/link; cat /a/link/new; $b mkfifo /a/fifo; $b rm -r /a/b; $b ls -l /a | $b cut -c1-10";

/// Containers of one image: what one changes, the next does not see, and one may change nothing.
async fn containers(runtime: &Runtime, snapshotter: &str) -> Outcome<Value> {
    let runtime = runtime.with_snapshotter(snapshotter);
    let pod = Pod::run(&runtime, Pod::config(&runtime)).await?;
    let run = async |read_only: bool, text: &str| -> Outcome<Output> {
        let mut config = script(text);
        config.image = Some(api::ImageSpec {
            image: USER.to_owned(),
            ..Default::default()
        });
        let security = security(&mut config);
        security.run_as_user = Some(api::Int64Value { value: 0 });
        security.readonly_rootfs = read_only;
        pod.output(config).await
    };
    let first = run(false, CHANGES).await?;
    let second = run(false, CHANGES).await?;
    let third = run(
        true,
        "(echo x >/etc/new) 2>/dev/null || echo read-only; cat /etc/group | busybox tail -n 1",
    )
    .await?;
    pod.remove().await?;
    Ok(json!({ "first": first, "the same again": first == second, "read-only": third }))
}

/// Folders that are copied.
pub async fn native(runtime: &Runtime) -> Outcome<Value> {
    containers(runtime, "native").await
}

/// A file system in a file per container.
pub async fn blockfile(runtime: &Runtime) -> Outcome<Value> {
    containers(runtime, "blockfile").await
}

/// Layers that are images of a read-only file system.
pub async fn erofs(runtime: &Runtime) -> Outcome<Value> {
    containers(runtime, "erofs").await
}
