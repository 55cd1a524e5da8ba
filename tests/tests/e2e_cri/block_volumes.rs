// SPDX-License-Identifier: Apache-2.0
//! Raw block volumes: a block device of the node in a container, as kubelet asks for it (`volumeDevices`).

use cloister_tests::cri::{Outcome, Pod, Runtime, api, args, ensure, eventually, script};
use serde_json::{Value, json};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;

const SIZE: u64 = 16 << 20;

/// A loop device of the node, with the file behind it.
struct Disk {
    file: PathBuf,
    device: String,
}

impl Disk {
    fn new(runtime: &Runtime) -> Outcome<Self> {
        let file = runtime.folder("disk")?.join("image");
        std::fs::File::create(&file)?.set_len(SIZE)?;
        let output = losetup().args(["--find", "--show"]).arg(&file).output()?;
        ensure(output.status.success(), String::from_utf8_lossy(&output.stderr))?;
        let device = String::from_utf8(output.stdout)?.trim().to_owned();
        Ok(Self { file, device })
    }

    /// In the container at `path`.
    fn at(&self, path: &str, permissions: &str) -> Vec<api::Device> {
        vec![api::Device {
            container_path: path.into(),
            host_path: self.device.clone(),
            permissions: permissions.into(),
        }]
    }

    fn read(&self, offset: u64, length: usize) -> Outcome<String> {
        let mut bytes = vec![0; length];
        std::fs::File::open(&self.file)?.read_exact_at(&mut bytes, offset)?;
        Ok(String::from_utf8(bytes)?)
    }

    /// Nobody has it open any more.
    async fn is_free(&self) -> Outcome {
        losetup().arg("--detach").arg(&self.device).status()?;
        let name = self.device.trim_start_matches("/dev/");
        let behind = format!("/sys/block/{name}/loop/backing_file");
        eventually("a free loop device", async || {
            Ok((!std::path::Path::new(&behind).exists()).then_some(()))
        })
        .await
    }
}

fn losetup() -> Command {
    let mut command = Command::new("losetup");
    command.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
    command
}

/// What one container writes another one of the pod reads, and then one of another pod, and the node.
pub async fn written_and_read(runtime: &Runtime) -> Outcome<Value> {
    let disk = Disk::new(runtime)?;
    let pod = Pod::run(runtime, Pod::config(runtime)).await?;
    let mut writer = script(
        "stat -c '%F %a' /dev/volume; head -c 4 /dev/volume | od -An -tx1; \
         printf 'from the first' | dd of=/dev/volume bs=4096 seek=3 conv=notrunc,fsync 2>/dev/null; echo $?; \
         dd if=/dev/volume bs=1M 2>/dev/null | wc -c; (mknod /tmp/other b 7 200 && head -c 1 /tmp/other) 2>&1 | grep -o 'not permitted'",
    );
    writer.devices = disk.at("/dev/volume", "rwm");
    let first = pod.output(writer).await?;
    let text = "head -c 12302 /dev/disk | tail -c 14; printf 'and the second' | dd of=/dev/disk bs=4096 seek=5 conv=notrunc,fsync 2>/dev/null";
    let mut reader = script(text);
    reader.devices = disk.at("/dev/disk", "mrw");
    let second = pod.output(reader).await?;
    pod.remove().await?;
    let on_node = [disk.read(3 * 4096, 14)?, disk.read(5 * 4096, 14)?];
    // Two at once, in another pod.
    let pod = Pod::run(runtime, Pod::config(runtime)).await?;
    let mut waits = args(&["sleep", "infinity"]);
    waits.devices = disk.at("/dev/one", "rwm");
    let one = pod.start(waits).await?;
    let mut looks = script("head -c 20494 /dev/two | tail -c 14");
    looks.devices = disk.at("/dev/two", "rwm");
    let two = pod.output(looks).await?;
    let still = one.exec_script("head -c 12302 /dev/one | tail -c 14").await?;
    one.stop(0).await?;
    one.remove().await?;
    disk.is_free().await?;
    pod.remove().await?;
    Ok(json!({ "first": first, "second": second, "node": on_node, "two": two, "still": still }))
}

/// Reading is all that is allowed.
pub async fn read_only(runtime: &Runtime) -> Outcome<Value> {
    let disk = Disk::new(runtime)?;
    let file = std::fs::File::options().write(true).open(&disk.file)?;
    file.write_all_at(b"from the node", 0)?;
    let pod = &runtime.shared().await?.pod;
    let mut config = script(
        "head -c 13 /dev/volume; echo; (printf x | dd of=/dev/volume bs=512 conv=notrunc,fsync) 2>/dev/null; echo $?; head -c 13 /dev/volume",
    );
    config.devices = disk.at("/dev/volume", "r");
    let seen = pod.output(config).await?;
    let on_node = disk.read(0, 13)?;
    disk.is_free().await?;
    Ok(json!({ "seen": seen, "node": on_node }))
}

/// A device that the node does not have.
pub async fn not_there(runtime: &Runtime) -> Outcome<Value> {
    let pod = &runtime.shared().await?.pod;
    let mut config = args(&["true"]);
    config.devices = vec![api::Device {
        container_path: "/dev/volume".into(),
        host_path: "/dev/no-such-disk".into(),
        permissions: "rwm".into(),
    }];
    let container = pod.create(config).await;
    let refused = match container {
        Ok(container) => {
            let started = container.start().await;
            container.remove().await?;
            started.is_err()
        }
        Err(_) => true,
    };
    Ok(json!(refused))
}
