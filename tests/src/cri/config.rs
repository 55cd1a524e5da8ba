// SPDX-License-Identifier: Apache-2.0
//! The configurations of all that runs on the node.

use super::{HANDLERS, SNAPSHOTTERS, is_ours};
use crate::e2e::guest_file;
use std::path::Path;

/// Of a containerd that knows runc, with everything in the node's folder.
pub fn containerd_with_runc(dir: &Path) -> String {
    let dir = dir.display();
    format!(
        r#"
version = 3
root = "{dir}/containerd"
state = "{dir}/state"
disabled_plugins = [
  "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.differ.v1.erofs",
  "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing",
]

[grpc]
  address = "{dir}/containerd.sock"
[ttrpc]
  address = "{dir}/containerd.ttrpc.sock"

[plugins."io.containerd.internal.v1.opt"]
  path = "{dir}/opt"
[plugins."io.containerd.nri.v1.nri"]
  disable = true

[plugins."io.containerd.cri.v1.images"]
  # What pods write is asked for now and then, not only every ten seconds.
  stats_collect_period = 1
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "localhost/pause:latest"

[plugins."io.containerd.cri.v1.runtime"]
  disable_apparmor = true
  enable_cdi = false
  netns_mounts_under_state_dir = true
  # Else runc's pods fail where root may not do everything.
  restrict_oom_score_adj = {restricted}
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["/usr/lib/cni"]
    conf_dir = "{dir}/cni"
  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
"#,
        restricted = !may_lower_oom_score(),
    )
}

/// Of one that knows Cloister as well.
pub(super) fn containerd(dir: &Path) -> String {
    let mut text = containerd_with_runc(dir);
    let dir = dir.display();
    text += &format!(
        r#"
[plugins."io.containerd.snapshotter.v1.blockfile"]
  scratch_file = "{dir}/scratch.ext4"
  fs_type = "ext4"
  mount_options = ["loop"]
"#
    );
    text.extend(HANDLERS.iter().map(|name| handler(&dir, name)));
    text
}

fn may_lower_oom_score() -> bool {
    const CAP_SYS_RESOURCE: u32 = 24;
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    u64::from_str_radix(set.unwrap().trim(), 16).unwrap() >> CAP_SYS_RESOURCE & 1 == 1
}

/// A handler, and its variants with other snapshotters.
fn handler(dir: &impl std::fmt::Display, name: &str) -> String {
    let (sandboxer, io) = match name {
        "cloister-stream" => ("cloister-clone", "io_type = \"streaming\""),
        _ => (name, ""),
    };
    let mut text: String = SNAPSHOTTERS
        .iter()
        .map(|kind| {
            runtime(
                &format!("{name}-{kind}"),
                sandboxer,
                &format!("snapshotter = \"{kind}\""),
            )
        })
        .collect();
    // runc's own is there already.
    if name != "runc" {
        text += &runtime(name, sandboxer, io);
    }
    if is_ours(name) && sandboxer == name {
        text += &format!(
            r#"
[proxy_plugins.{name}]
  type = "sandbox"
  address = "{dir}/cloister/sandboxer.sock"
"#
        );
    }
    text
}

fn runtime(name: &str, sandboxer: &str, more: &str) -> String {
    let kind = if is_ours(sandboxer) {
        format!("runtime_type = \"io.containerd.cloister.v1\"\n  sandboxer = \"{sandboxer}\"")
    } else {
        "runtime_type = \"io.containerd.runc.v2\"".to_owned()
    };
    format!(
        r#"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.{name}]
  {kind}
  {more}
"#
    )
}

/// Of cloisterd. An emulated host is slow.
pub(super) fn cloisterd(dir: &Path) -> String {
    let profile = format!(
        r#"
kernel = "{kernel}"
initrd = "{initrd}"
init_timeout = "600s"
answer_timeout = "60s"
kernel_args = [{kernel_args}]
"#,
        // To see more of what a guest says: "loglevel=7".
        kernel_args = std::env::var("CLOISTER_CRI_KERNEL_ARGS")
            .unwrap_or_default()
            .split_whitespace()
            .map(|word| format!("{word:?}, "))
            .collect::<String>(),
        kernel = guest_file("vmlinux").display(),
        initrd = guest_file("initramfs.cpio").display(),
    );
    format!(
        r#"
state_dir = "{dir}/r"
socket = "{dir}/cloister/sandboxer.sock"
containerd_address = "{dir}/containerd.sock"

[metrics]
listen = "unix:{dir}/metrics.sock"

[log]
level = "debug"
format = "text"

[sandboxer.cloister]
template = "none"
{profile}
[sandboxer.cloister-clone]
{profile}
[sandboxer.cloister-pool]
template = "node"
template_pool = 2
{profile}
[sandboxer.cloister-idle]
template = "none"
idle_reclaim = "4s"
{profile}
[sandboxer.cloister-worker]
pods_per_worker = 1
template = "none"
{profile}
[sandboxer.cloister-workers]
pods_per_worker = 2
template = "none"
{profile}
[sandboxer.cloister-worker-clone]
pods_per_worker = 1
template = "node"
{profile}"#,
        dir = dir.display(),
    )
}

/// The bridge that pods of the node are on.
pub const BRIDGE: &str = "cri-e2e0";

/// Of the pods' network: a bridge with addresses of both kinds, and the node's ports mapped to pods.
pub fn cni(dir: &Path) -> String {
    format!(
        r#"{{
  "cniVersion": "1.0.0", "name": "cri-e2e", "plugins": [
    {{ "type": "bridge", "bridge": "{BRIDGE}", "isGateway": true, "ipMasq": true, "hairpinMode": true, "mtu": 1400,
      "ipam": {{ "type": "host-local", "dataDir": "{dir}/ipam",
        "ranges": [[{{ "subnet": "10.214.0.0/16" }}], [{{ "subnet": "fd00:214::/64" }}]],
        "routes": [{{ "dst": "0.0.0.0/0" }}, {{ "dst": "::/0" }}] }} }},
    {{ "type": "portmap", "capabilities": {{ "portMappings": true }} }}
  ]
}}
"#,
        dir = dir.display(),
    )
}
