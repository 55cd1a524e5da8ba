// SPDX-License-Identifier: Apache-2.0
//! `cloister install` on a node that has a containerd of its own, and away again. It writes where nodes have these files: this
//! is for a host that is thrown away, which the emulated one is.

use cloister_tests::cri::{Pod, Runtime, cni, containerd_bin, containerd_with_runc, script};
use cloister_tests::e2e::{PATIENCE, checkout, eventually, guest_file};
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Instant;

const CONFIG: &str = "/etc/containerd/config.toml";

/// Ended when dropped.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = rustix::process::kill_process(
            rustix::process::Pid::from_child(&self.0),
            rustix::process::Signal::TERM,
        );
        let start = Instant::now();
        while start.elapsed() < PATIENCE / 6 {
            if self.0.try_wait().is_ok_and(|ended| ended.is_some()) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn command(program: &str) -> Command {
    let path = format!(
        "{}:/usr/local/bin:{}:/usr/sbin:/sbin",
        containerd_bin().display(),
        std::env::var("PATH").unwrap_or_default()
    );
    let mut command = Command::new("env");
    command.arg(format!("PATH={path}")).arg(program);
    command
}

fn start(dir: &Path, program: &str, args: &[&str], socket: &Path) -> Daemon {
    let log = fs::File::create(dir.join(format!("{program}.log"))).unwrap();
    let child = command(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap();
    let mut daemon = Daemon(child);
    eventually(program, || {
        let ended = daemon.0.try_wait().unwrap();
        let log = fs::read_to_string(dir.join(format!("{program}.log"))).unwrap_or_default();
        assert!(ended.is_none(), "{program} ended: {ended:?}\n{log}");
        UnixStream::connect(socket).ok()
    });
    daemon
}

#[track_caller]
fn good(output: Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn what_install_writes_makes_containerd_use_it() {
    for path in [CONFIG, "/etc/cloister", "/var/lib/cloister/install.json"] {
        assert!(
            !Path::new(path).exists(),
            "{path} is there: this test is for a host that is thrown away"
        );
    }
    let dir = PathBuf::from(format!("/run/install-{}", std::process::id()));
    fs::create_dir(&dir).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "mode=755", "e2e-install"])
        .arg(&dir)
        .status();
    assert!(mounted.unwrap().success());
    for folder in ["cni", "ipam", "opt", "pods"] {
        fs::create_dir(dir.join(folder)).unwrap();
    }
    fs::write(dir.join("cni/10-install.conflist"), cni(&dir)).unwrap();
    fs::create_dir_all("/etc/containerd").unwrap();
    fs::write(CONFIG, containerd_with_runc(&dir)).unwrap();
    // The node's administrator has this already; it stays.
    fs::create_dir_all("/etc/cloister").unwrap();
    let daemon_config = format!(
        "containerd_address = \"{dir}/containerd.sock\"\n[log]\nformat = \"text\"\n[sandboxer.cloister]\nkernel = \"{kernel}\"\n\
         initrd = \"{initrd}\"\ninit_timeout = \"600s\"\n[sandboxer.big]\nkernel = \"{kernel}\"\ninitrd = \"{initrd}\"\ndefault_vcpus = 2\ninit_timeout = \"600s\"\n",
        dir = dir.display(),
        kernel = guest_file("vmlinux").display(),
        initrd = guest_file("initramfs.cpio").display(),
    );
    fs::write("/etc/cloister/config.toml", daemon_config).unwrap();

    good(command("cloister").arg("install").output().unwrap());
    let written = fs::read_to_string(CONFIG).unwrap();
    assert!(
        written.contains("/etc/containerd/conf.d/*.toml") && written.contains("localhost/pause:latest"),
        "{written}"
    );
    let cloisterd = start(&dir, "cloisterd", &[], Path::new("/run/cloister/sandboxer.sock"));
    let socket = dir.join("containerd.sock");
    let containerd = start(&dir, "containerd", &["--config", CONFIG], &socket);
    // What containerd makes of both files together.
    let dump = good(
        command("containerd")
            .args(["--config", CONFIG, "config", "dump"])
            .output()
            .unwrap(),
    );
    for words in [
        "localhost/pause:latest",
        "runtimes.runc",
        "runtimes.cloister",
        "runtimes.big",
    ] {
        assert!(dump.contains(words), "{words} is not in {dump}");
    }
    let ctr = |args: &[&str]| {
        let mut command = command("ctr");
        command.arg("--address").arg(&socket).args(args);
        command.output().unwrap()
    };
    let plugins = good(ctr(&["plugins", "ls"]));
    for name in ["cloister", "big"] {
        let registered = plugins.lines().any(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            words
                .first()
                .is_some_and(|kind| kind.starts_with("io.containerd.sandbox"))
                && words.contains(&name)
                && words.last() == Some(&"ok")
        });
        assert!(registered, "{name} is not in\n{plugins}");
    }
    let shim = command("containerd-shim-cloister-v1")
        .args(["-namespace", "n", "-id", "i", "-bundle", "b", "delete"])
        .output()
        .unwrap();
    assert!(shim.status.success(), "{shim:?}");
    pods_run(&dir, &ctr);
    drop(containerd);
    drop(cloisterd);

    good(command("cloister").arg("uninstall").output().unwrap());
    assert_eq!(fs::read_to_string(CONFIG).unwrap(), containerd_with_runc(&dir));
    for path in [
        "/etc/containerd/conf.d/cloister.toml",
        "/etc/cloister/runtimeclass.yaml",
        "/usr/local/bin/containerd-shim-cloister-v1",
        "/etc/systemd/system/cloisterd.service",
    ] {
        assert!(fs::symlink_metadata(path).is_err(), "{path} is left");
    }
    assert!(Path::new("/etc/cloister/config.toml").exists());
    for path in ["/etc/containerd", "/etc/cloister", "/run/cloister"] {
        fs::remove_dir_all(path).unwrap();
    }
    let _ = Command::new("umount").arg("-Rl").arg(&dir).status();
    fs::remove_dir(&dir).unwrap();
}

/// A pod of each handler, as a kubelet runs it.
fn pods_run(dir: &Path, ctr: &dyn Fn(&[&str]) -> Output) {
    for image in ["pause", "tools"] {
        let archive = checkout(&format!("target/images/{image}.tar"));
        let archive = archive.to_str().unwrap();
        good(ctr(&[
            "-n",
            "k8s.io",
            "images",
            "import",
            "--local=true",
            archive,
        ]));
    }
    let tokio = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    tokio.block_on(async {
        for (handler, cpus) in [("cloister", "1"), ("big", "2")] {
            let runtime = Runtime::new(dir, handler, &[handler]);
            let pod = Pod::run(&runtime, Pod::config(&runtime)).await.unwrap();
            let output = pod.output(script("grep -c ^processor /proc/cpuinfo")).await;
            assert_eq!(output.unwrap().good().unwrap().trim(), cpus, "{handler}");
            pod.remove().await.unwrap();
        }
    });
}
