// SPDX-License-Identifier: Apache-2.0
//! Who a container's processes are, and what they may do.

use cloister_tests::cri::{
    Container, Outcome, Output, Pod, Runtime, Security, USER, api, args, script, security,
};
use serde_json::{Value, json};
use std::fs;

const WHO: &str =
    "id -u; id -g; id -G; echo $HOME; awk '/^(Cap|NoNewPrivs|Seccomp:)/ { print $1 $2 }' /proc/self/status";

fn number(value: i64) -> Option<api::Int64Value> {
    Some(api::Int64Value { value })
}

/// Runs it with these rights; all that comes is what it says, or that it is refused.
async fn run(
    pod: &Pod,
    mut config: api::ContainerConfig,
    rights: impl FnOnce(&mut Security),
) -> Outcome<Value> {
    rights(security(&mut config));
    Ok(match pod.output(config).await {
        Ok(Output { code, stdout, stderr }) => json!([code, stdout.lines().collect::<Vec<_>>(), stderr]),
        Err(_) => json!("refused"),
    })
}

/// Users and groups, by number, by name and of the image.
pub async fn users(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let mut of_image = script(WHO);
    of_image.command = ["sh", "-c", "id -u; id -g; id -G"].map(str::to_owned).into();
    of_image.image.get_or_insert_default().image = USER.to_owned();
    Ok(json!({
        "nobody asked": run(pod, script(WHO), |_| {}).await?,
        "number": run(pod, script(WHO), |rights| rights.run_as_user = number(1000)).await?,
        "unknown number": run(pod, script(WHO), |rights| rights.run_as_user = number(4321)).await?,
        "name": run(pod, script(WHO), |rights| rights.run_as_username = "user".into()).await?,
        "group": run(pod, script(WHO), |rights| (rights.run_as_user, rights.run_as_group) = (number(1000), number(77))).await?,
        "more groups": run(pod, script(WHO), |rights| {
            rights.run_as_user = number(1000);
            rights.supplemental_groups = vec![1234, 5678];
        }).await?,
        "these groups": run(pod, script(WHO), |rights| {
            rights.run_as_user = number(1000);
            rights.supplemental_groups = vec![1234];
            rights.supplemental_groups_policy = api::SupplementalGroupsPolicy::Strict.into();
        }).await?,
        "of the image": run(pod, of_image, |_| {}).await?,
    }))
}

/// Capabilities, added and dropped.
pub async fn capabilities(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let text = "awk '/^Cap/ { print $1 $2 }' /proc/self/status; chown 1:1 /etc/image-file && echo chown; ip link set lo mtu 60000 2>/dev/null && echo net && ip link set lo mtu 65536; \
        hostname x 2>/dev/null && echo admin; date -s @0 >/dev/null 2>&1 && echo time; ls /root >/dev/null && echo read";
    let set = |add: &[&str], drop: &[&str]| {
        let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
        Some(api::Capability {
            add_capabilities: words(add),
            drop_capabilities: words(drop),
            ..Default::default()
        })
    };
    let cases = [
        ("usual", set(&[], &[])),
        ("added", set(&["NET_ADMIN"], &[])),
        ("dropped", set(&[], &["CHOWN"])),
        ("none", set(&[], &["ALL"])),
        ("one", set(&["CHOWN"], &["ALL"])),
        ("all but", set(&["ALL"], &["SYS_TIME"])),
    ];
    let mut seen = serde_json::Map::new();
    for (name, capabilities) in cases {
        // All of them would set the node's clock: for runc it is the same one.
        let text = if name == "all but" {
            text.replace("date -s @0", "false")
        } else {
            text.to_owned()
        };
        let value = run(pod, script(&text), |rights| rights.capabilities = capabilities).await?;
        seen.insert(name.to_owned(), value);
    }
    // Kept by an ordinary user only as ambient ones.
    let ambient = run(
        pod,
        script("awk '/^Cap/ { print $1 $2 }' /proc/self/status"),
        |rights| {
            rights.run_as_user = number(1000);
            rights.capabilities = set(&["NET_BIND_SERVICE"], &["ALL"]);
        },
    );
    seen.insert("of a user".to_owned(), ambient.await?);
    Ok(seen.into())
}

/// Root file system, privileges that grow, and paths that are hidden or may not be changed.
pub async fn restrictions(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let read_only = "(touch /new) 2>/dev/null || echo read-only; touch /dev/shm/new && rm /dev/shm/new && echo shm; (touch /dev/new) 2>/dev/null && echo dev; \
        (echo x >>/etc/hosts) 2>/dev/null || echo hosts";
    // A copy of a shell that belongs to root.
    let grows = "cp /bin/cat /tmp/cat; chmod 4755 /tmp/cat; exec setpriv --reuid 1000 --clear-groups sh -c '/tmp/cat /proc/self/status | grep -E \"^(Uid|NoNewPrivs)\" | xargs'";
    let hidden = "for path in /proc/keys /proc/timer_list /sys/firmware; do [ ! -e $path ] || { printf '%s ' $path; (cat $path 2>/dev/null; ls $path) | grep -v \"^$path\" | wc -c; }; done; \
        for path in /proc/sys/kernel/domainname /proc/sysrq-trigger /sys/fs/cgroup/cgroup.procs; do (echo x >$path) 2>/dev/null || echo \"$path read-only\"; done; \
        (mount -t proc proc /mnt) 2>/dev/null || echo no mount";
    Ok(json!({
        "read-only root": run(pod, script(read_only), |rights| rights.readonly_rootfs = true).await?,
        "privileges grow": run(pod, script(grows), |_| {}).await?,
        "privileges do not": run(pod, script(grows), |rights| rights.no_new_privs = true).await?,
        "hidden": run(pod, script(hidden), |_| {}).await?,
        "nothing hidden": run(pod, script("head -c 1 /proc/timer_list | wc -c; (echo x >/proc/sys/kernel/domainname) 2>/dev/null && echo writable"), |rights| {
            rights.masked_paths.clear();
            rights.readonly_paths.clear();
        }).await?,
        "more hidden": run(pod, script("cat /etc/image-file; ls /home; (touch /srv/new) 2>/dev/null || echo read-only"), |rights| {
            rights.masked_paths.extend(["/etc/image-file", "/home", "/not/there"].map(str::to_owned));
            rights.readonly_paths.push("/srv".to_owned());
        }).await?,
    }))
}

/// Profiles of system calls.
pub async fn seccomp(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let file = runtime.folder("seccomp")?.join("profile.json");
    fs::write(
        &file,
        r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86_64"],
        "syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":28},
        {"names":["chmod","fchmodat"],"action":"SCMP_ACT_ERRNO","args":[{"index":1,"value":7,"op":"SCMP_CMP_EQ"},{"index":2,"value":511,"op":"SCMP_CMP_EQ"}]}]}"#,
    )?;
    let text = "grep -E '^Seccomp:' /proc/self/status; mkdir /tmp/made 2>&1; unshare -U true 2>/dev/null && echo namespace; echo end";
    let profile = |kind: api::security_profile::ProfileType, file: &str| {
        Some(api::SecurityProfile {
            profile_type: kind.into(),
            localhost_ref: file.to_owned(),
        })
    };
    let (default, unconfined, localhost) = (
        api::security_profile::ProfileType::RuntimeDefault,
        api::security_profile::ProfileType::Unconfined,
        api::security_profile::ProfileType::Localhost,
    );
    let path = file.display().to_string();
    Ok(json!({
        "default": run(pod, script(text), |rights| rights.seccomp = profile(default, "")).await?,
        "none": run(pod, script(text), |rights| rights.seccomp = profile(unconfined, "")).await?,
        "own": run(pod, script(text), |rights| rights.seccomp = profile(localhost, &path)).await?,
        "missing": run(pod, script(text), |rights| rights.seccomp = profile(localhost, "/no/such/file")).await?,
    }))
}

/// A container that may do everything, in a pod of such; and what it sees of devices.
pub async fn privileged(runtime: &Runtime) -> Outcome<Value> {
    let mut config = Pod::config(runtime);
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().privileged = true;
    let pod = Pod::run(runtime, config).await?;
    let text = "awk '/^(Cap|NoNewPrivs|Seccomp:)/ { print $1 $2 }' /proc/self/status; mount -t tmpfs none /mnt && echo mounted; \
        echo name >/proc/sys/kernel/domainname && echo proc; ip link set lo mtu 5000 && echo link; \
        awk '$2 == \"/sys\" || $2 == \"/sys/fs/cgroup\" { print $2, substr($4, 1, 2) }' /proc/mounts; [ -e /dev/kmsg ] && echo devices; mknod /tmp/null c 1 3 && echo x >/tmp/null && echo node";
    let privileged = run(&pod, script(text), |rights| {
        rights.privileged = true;
        rights.masked_paths.clear();
        rights.readonly_paths.clear();
    })
    .await?;
    pod.remove().await?;
    Ok(privileged)
}

/// Devices asked for by name.
pub async fn devices(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let mut config = script(
        "stat -c '%F %t:%T %a %u:%g' /dev/other; head -c 3 /dev/other | od -An -tx1; (echo x >/dev/other) 2>/dev/null && echo written; \
         mknod /tmp/mem c 1 1 2>/dev/null && echo made; head -c 1 /tmp/mem 2>&1 | grep -o 'not permitted'",
    );
    config.devices = vec![api::Device {
        container_path: "/dev/other".into(),
        host_path: "/dev/zero".into(),
        permissions: "rwm".into(),
    }];
    let named = run(pod, config, |_| {}).await?;
    let mut missing = args(&["true"]);
    missing.devices = vec![api::Device {
        container_path: "/dev/other".into(),
        host_path: "/dev/no-such-device".into(),
        permissions: "rwm".into(),
    }];
    Ok(json!({ "named": named, "missing": run(pod, missing, |_| {}).await? }))
}

/// What CRI reports of a running container's user.
pub async fn reported_user(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let mut config = args(&["sleep", "infinity"]);
    security(&mut config).run_as_user = number(1000);
    security(&mut config).supplemental_groups = vec![1234];
    let container: Container = pod.start(config).await?;
    let status = container.status().await?;
    container.stop(0).await?;
    container.remove().await?;
    Ok(json!(status.user))
}
