// SPDX-License-Identifier: Apache-2.0
//! Volumes, as kubelets hand them over: folders and files of the node.

use cloister_tests::cri::{
    Outcome, Pod, Runtime, VOLUME, api, args, code, ensure, eventually, script, security,
};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

/// A folder or file of the node.
pub fn mount(host: &Path, container: &str) -> api::Mount {
    api::Mount {
        host_path: host.display().to_string(),
        container_path: container.to_owned(),
        ..Default::default()
    }
}

fn read_only(host: &Path, container: &str) -> api::Mount {
    api::Mount {
        readonly: true,
        ..mount(host, container)
    }
}

fn node(command: &[&str]) -> Outcome {
    let status = Command::new(command[0]).args(&command[1..]).status()?;
    ensure(status.success(), format_args!("{command:?}"))
}

/// Folders and files, writable and not.
pub async fn writable_and_not(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let dir = runtime.folder("volume")?;
    for folder in ["rw", "ro", "missing-parent"] {
        fs::create_dir(dir.join(folder))?;
        fs::write(dir.join(folder).join("file"), "of the node\n")?;
    }
    fs::write(dir.join("single"), "one file\n")?;
    fs::write(dir.join("single-ro"), "one file\n")?;
    symlink("rw", dir.join("link"))?;
    let mut config = script(
        "cat /rw/file /ro/file /single /single-ro /link/file /new/file; echo changed >/rw/made; mkdir /rw/folder; chmod 640 /rw/made; chown 5:6 /rw/made; ln /rw/made /rw/hard; \
         (echo x >/ro/file) 2>/dev/null || echo read-only; (touch /ro/new) 2>/dev/null || echo read-only; echo changed >>/single && echo writable; \
         (echo x >/single-ro) 2>/dev/null || echo read-only; mount -o remount,rw /ro 2>/dev/null || echo no remount; rm /single 2>/dev/null || echo stays; \
         grep -E ' /(rw|ro|single|single-ro|new|deep/down/here) ' /proc/mounts | awk '{ print $2, substr($4, 1, 2) }' | sort; ls /new; \
         mkfifo /rw/fifo; mv /rw/hard /rw/moved; stat -c '%h %a %u:%g' /rw/moved; cat /deep/down/here; ls -ld /deep/down | cut -c1-10",
    );
    config.mounts = vec![
        mount(&dir.join("rw"), "/rw"),
        read_only(&dir.join("ro"), "/ro"),
        mount(&dir.join("single"), "/single"),
        read_only(&dir.join("single-ro"), "/single-ro"),
        mount(&dir.join("link"), "/link"),
        mount(&dir.join("missing-parent"), "/new"),
        mount(&dir.join("single-ro"), "/deep/down/here"),
    ];
    let output = pod.output(config).await?;
    let made = fs::metadata(dir.join("rw/made"))?;
    let node = json!([
        fs::read_to_string(dir.join("rw/moved"))?,
        made.mode() & 0o7777,
        made.uid(),
        made.gid(),
        made.nlink(),
        fs::read_to_string(dir.join("single"))?,
        fs::read_to_string(dir.join("ro/file"))?,
        dir.join("rw/folder").is_dir(),
    ]);
    // A path that is not there.
    let mut config = args(&["stat", "-c", "%F", "/absent"]);
    config.mounts = vec![mount(&dir.join("absent/folder"), "/absent")];
    let absent = match pod.create(config).await {
        Err(_) => json!("refused"),
        Ok(container) => {
            let started = code(container.start().await);
            let code = container.ended().await?.exit_code;
            container.remove().await?;
            json!([started, code, dir.join("absent/folder").is_dir()])
        }
    };
    Ok(json!({ "output": output, "node": node, "absent": absent }))
}

/// What the node changes is seen at once: as kubelets update configuration maps and secrets.
pub async fn live_updates(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let dir = runtime.folder("configmap")?;
    fs::create_dir(dir.join("..1"))?;
    fs::write(dir.join("..1/key"), "first")?;
    symlink("..1", dir.join("..data"))?;
    symlink("..data/key", dir.join("key"))?;
    let mut config = args(&["sleep", "infinity"]);
    config.mounts = vec![read_only(&dir, "/config"), mount(&dir, "/work")];
    let container = pod.start(config).await?;
    let first = container
        .exec_script("cat /config/key; ls -A /config | xargs")
        .await?;
    fs::create_dir(dir.join("..2"))?;
    fs::write(dir.join("..2/key"), "second")?;
    symlink("..2", dir.join("..new"))?;
    fs::rename(dir.join("..new"), dir.join("..data"))?;
    fs::remove_dir_all(dir.join("..1"))?;
    let second = container
        .exec_script("cat /config/key; ls -A /config | xargs")
        .await?;
    // A file that is changed in its place, grown, cut and removed.
    let file = dir.join("file");
    let mut seen = Vec::new();
    for content in ["one", "three and more", "2", ""] {
        fs::write(&file, content)?;
        seen.push(
            container
                .exec_script("cat /config/file; stat -c ' %s' /config/file")
                .await?
                .stdout,
        );
    }
    fs::remove_file(&file)?;
    // What is gone may be remembered for a second.
    let gone = eventually("the end of a file", async || {
        let code = container.exec_script("cat /config/file").await?.code;
        Ok((code != 0).then_some(code))
    });
    seen.push(gone.await?.to_string());
    // And the other way.
    container.exec_script("echo written >/work/answer").await?;
    seen.push(fs::read_to_string(dir.join("answer"))?);
    container.stop(0).await?;
    container.remove().await?;
    Ok(json!({ "first": first, "second": second, "file": seen }))
}

/// Two containers with one volume, as they work together through it.
pub async fn shared_by_containers(runtime: &Runtime) -> Outcome<Value> {
    let pod = Pod::run(runtime, Pod::config(runtime)).await?;
    let dir = runtime.folder("empty-dir")?;
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o2777))?;
    let mut config = script(
        "exec 9>/data/lock; flock 9; mkfifo -m 666 /data/fifo; echo locked >/data/ready; read -r line </data/fifo; echo \"got $line\"; \
         echo ended >/data/done; flock -u 9; sleep infinity",
    );
    config.mounts = vec![mount(&dir, "/data")];
    let first = pod.start(config).await?;
    let mut config = script(
        "until [ -e /data/ready ]; do sleep 0.1; done; flock -n /data/lock true || echo locked by the other; echo word >/data/fifo; \
         flock /data/lock cat /data/done; socat UNIX-LISTEN:/data/socket,fork EXEC:'echo through a socket' & \
         until [ -S /data/socket ]; do sleep 0.1; done; socat -u UNIX:/data/socket STDOUT; stat -c '%a %F' /data /data/socket; touch /data/mine; stat -c %g /data/mine; echo finished; wait",
    );
    security(&mut config).run_as_user = Some(api::Int64Value { value: 1000 });
    config.mounts = vec![mount(&dir, "/data")];
    let second = pod.start(config).await?;
    second.says("finished").await?;
    let socket = pod_socket(&pod, &dir).await?;
    let seen = json!({ "first": first.log()?, "second": second.log()?, "from a third": socket });
    pod.remove().await?;
    Ok(seen)
}

async fn pod_socket(pod: &Pod, dir: &Path) -> Outcome<Value> {
    let mut config = script("socat -u UNIX:/other/socket STDOUT");
    config.mounts = vec![mount(dir, "/other")];
    Ok(json!(pod.output(config).await?))
}

/// Mounts inside volumes: of the node's, and of one volume in another.
pub async fn nested(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let dir = runtime.folder("nested")?;
    for folder in ["outer/tmpfs", "outer/place", "inner", "sub/path"] {
        fs::create_dir_all(dir.join(folder))?;
    }
    node(&[
        "mount",
        "-t",
        "tmpfs",
        "-o",
        "size=1m",
        "e2e",
        &dir.join("outer/tmpfs").display().to_string(),
    ])?;
    fs::write(dir.join("outer/tmpfs/file"), "in memory\n")?;
    fs::write(dir.join("inner/file"), "inner\n")?;
    // As kubelets do subPath: a bind mount of what the path led to.
    node(&[
        "mount",
        "--bind",
        &dir.join("inner").display().to_string(),
        &dir.join("sub/path").display().to_string(),
    ])?;
    let mut config = script(
        "cat /outer/tmpfs/file /outer/place/file /sub/file; df -k --output=size /outer/tmpfs | tail -n 1; (touch /outer/place/new) 2>/dev/null || echo read-only; \
         (touch /ro/tmpfs/new) 2>/dev/null && echo not recursive; (touch /ro/new) 2>/dev/null || echo read-only; (dd if=/dev/zero of=/outer/tmpfs/fill bs=1M count=2 2>&1) | grep -o 'No space.*'; rm /outer/tmpfs/fill",
    );
    config.mounts = vec![
        mount(&dir.join("outer"), "/outer"),
        read_only(&dir.join("inner"), "/outer/place"),
        mount(&dir.join("sub/path"), "/sub"),
        read_only(&dir.join("outer"), "/ro"),
    ];
    let output = pod.output(config).await;
    let mut config = script("(touch /ro/tmpfs/new) 2>/dev/null || echo recursive");
    config.mounts = vec![api::Mount {
        recursive_read_only: true,
        ..read_only(&dir.join("outer"), "/ro")
    }];
    // containerd 2.1 asks nobody but runc what it can do, and crashes when somebody wants such a mount of another one. kubelet
    // wants it only of those that are known to have it.
    let recursive = if runtime.handler() == "runc" {
        pod.output(config).await?.stdout
    } else {
        "not offered".to_owned()
    };
    for path in ["outer/tmpfs", "sub/path"] {
        node(&["umount", &dir.join(path).display().to_string()])?;
    }
    Ok(json!({ "output": output?, "recursive": recursive }))
}

/// Mounts made later, on either side.
pub async fn propagation(runtime: &Runtime) -> Outcome<Value> {
    // Only such pods may have a say in the node's mounts.
    let mut config = Pod::config(runtime);
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().privileged = true;
    let pod = Pod::run(runtime, config).await?;
    let dir = runtime.folder("propagation")?;
    let kinds = [
        ("private", api::MountPropagation::PropagationPrivate),
        ("from-node", api::MountPropagation::PropagationHostToContainer),
        ("both-ways", api::MountPropagation::PropagationBidirectional),
    ];
    let mut seen = serde_json::Map::new();
    for (name, kind) in kinds {
        let place = dir.join(name);
        fs::create_dir_all(place.join("by-node"))?;
        fs::create_dir_all(place.join("by-container"))?;
        let mut config = args(&["sleep", "infinity"]);
        security(&mut config).privileged = true;
        config.mounts = vec![api::Mount {
            propagation: kind.into(),
            ..mount(&place, "/volume")
        }];
        let container = match pod.create(config).await {
            Ok(container) => container,
            Err(_) => {
                seen.insert(name.to_owned(), json!("not created"));
                continue;
            }
        };
        if let Err(error) = container.start().await {
            eprintln!("{name}: {error}");
            seen.insert(name.to_owned(), json!("not started"));
            container.remove().await?;
            continue;
        }
        let by_node = place.join("by-node").display().to_string();
        node(&["mount", "-t", "tmpfs", "e2e", &by_node])?;
        fs::write(place.join("by-node/file"), "")?;
        let inside = container.exec_script("ls /volume/by-node; mount -t tmpfs e2e /volume/by-container && touch /volume/by-container/file").await?;
        let outside = place.join("by-container/file").exists();
        let unmounted = container.exec_script("umount /volume/by-container").await?;
        container.stop(0).await?;
        container.remove().await?;
        node(&["umount", &by_node])?;
        seen.insert(name.to_owned(), json!([inside, outside, unmounted]));
    }
    pod.remove().await?;
    Ok(seen.into())
}

/// The message that a container leaves for its end.
pub async fn termination_log(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let file = runtime.folder("termination")?.join("log");
    fs::write(&file, "")?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o666))?;
    let mut config = script("printf 'last words' >/dev/termination-log; exit 2");
    security(&mut config).run_as_user = Some(api::Int64Value { value: 1000 });
    config.mounts = vec![mount(&file, "/dev/termination-log")];
    let output = pod.output(config).await?;
    Ok(json!([output, fs::read_to_string(file)?]))
}

/// The files of an image as a volume.
pub async fn image_volume(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let mut config = script(
        "cat /volume/file /volume/folder/file; (touch /volume/new) 2>/dev/null || echo read-only; ls /volume | xargs",
    );
    config.mounts = vec![api::Mount {
        container_path: "/volume".into(),
        readonly: true,
        image: Some(api::ImageSpec {
            image: VOLUME.into(),
            ..Default::default()
        }),
        ..Default::default()
    }];
    Ok(json!(pod.output(config).await?))
}

/// File systems in all the ways programs use them.
pub async fn file_operations(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let dir = runtime.folder("operations")?;
    let text = "cd $1; ln -s target link; readlink link; echo a >file; echo b >>file; cat file; truncate -s 100000 file; stat -c '%s' file; fallocate -l 200000 file && stat -c %s file; \
        cp --sparse=always file copy && cmp file copy && echo same; mkdir -p a/b/c; touch a/b/c/{1..50}; find a -type f | wc -l; rm -r a; ls; \
        chmod 4755 file; stat -c %a file; touch -d '2001-02-03 04:05:06 UTC' file; stat -c %Y file; exec 3>unlinked; rm unlinked; echo still >&3; cat /proc/self/fd/3; \
        mv file renamed; cat renamed | head -n 2; dd if=/dev/zero of=direct bs=4096 count=4 oflag=dsync 2>/dev/null; stat -c %s direct; df --output=target . | tail -n 1; mknod null c 1 3 && ls -l null | cut -c1; chown 1:2 renamed; stat -c '%u:%g %a' renamed; sync . && echo synced";
    let bash = |place: &str| args(&["bash", "-c", text, "operations", place]);
    let mut config = bash("/volume");
    config.mounts = vec![mount(&dir, "/volume")];
    let volume = pod.output(config).await?;
    let root = pod.output(bash("/srv")).await?;
    Ok(
        json!({ "volume": volume.stdout.lines().collect::<Vec<_>>(), "complaints": volume.stderr, "root": root.stdout.lines().collect::<Vec<_>>(), "root's": root.stderr }),
    )
}
