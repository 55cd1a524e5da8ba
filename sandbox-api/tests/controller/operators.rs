// SPDX-License-Identifier: Apache-2.0
//! What `cloister` shows of the daemon's pods, as far as there are any without a guest.

use super::{Bed, bed, config, creation};
use k8s_cri::v1::NamespaceMode;
use serde_json::Value;
use std::os::unix::fs::PermissionsExt;
use std::process::Output;

impl Bed {
    async fn cloister(&self, args: &[&str]) -> Output {
        let (dir, args) = (
            self.dir.clone(),
            args.iter().map(|&arg| arg.to_owned()).collect::<Vec<_>>(),
        );
        let run = move || {
            std::process::Command::new(env!("CARGO_BIN_EXE_cloister"))
                .arg("--state")
                .arg(dir.join("state"))
                .arg("--root")
                .arg(dir.join("root"))
                .args(args)
                .current_dir(&dir)
                .output()
                .unwrap()
        };
        tokio::task::spawn_blocking(run).await.unwrap()
    }

    async fn good(&self, args: &[&str]) -> String {
        let output = self.cloister(args).await;
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    async fn refused(&self, args: &[&str], words: &[&str]) {
        let output = self.cloister(args).await;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
        for word in words {
            assert!(said.contains(word), "{args:?}: {said}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_are_seen_and_not_touched() {
    let mut bed = bed("seen").await;
    let pod = config(NamespaceMode::Pod);
    bed.create(creation("abc1", &pod)).await.unwrap();
    let socket = std::fs::metadata(bed.dir.join("state/admin.sock")).unwrap();
    assert_eq!(socket.permissions().mode() & 0o777, 0o600);

    let list: Value = serde_json::from_str(&bed.good(&["ps", "--pods", "--json"]).await).unwrap();
    assert_eq!(list[0]["id"], "abc1");
    assert_eq!(
        (&list[0]["name"], &list[0]["phase"]),
        (&"web".into(), &"created".into())
    );
    assert_eq!(bed.good(&["ps", "-p", "-q"]).await, "abc1\n");
    let table = bed.good(&["ps"]).await;
    assert!(table.contains("POD ID") && table.contains("Created"), "{table}");
    // Others' commands on `ps -q` are about containers of ours.
    assert_eq!(bed.good(&["ps", "-q"]).await, "");

    let details: Value = serde_json::from_str(&bed.good(&["inspect", "ab"]).await).unwrap();
    assert_eq!(details[0]["record"]["plan"]["name"], "web");
    let events = bed.good(&["events", "--no-follow", "--json"]).await;
    let event: Value = serde_json::from_str(events.trim_end()).unwrap();
    assert_eq!(
        (&event["kind"], &event["pod"]),
        (&"created".into(), &"abc1".into())
    );

    bed.refused(
        &["stop", "web"],
        &[
            "made by containerd",
            "kubectl delete pod web",
            "crictl stopp abc1",
        ],
    )
    .await;
    bed.refused(&["kill", "abc1"], &["crictl stopp"]).await;
    bed.refused(&["rm", "-f", "abc1"], &["crictl rmp abc1"]).await;
    bed.refused(&["exec", "web", "true"], &["has no container"]).await;
    bed.refused(&["console", "nothing"], &["No such pod"]).await;
    bed.create(creation("abc2", &pod)).await.unwrap();
    bed.refused(&["inspect", "ab"], &["abc1", "abc2", "give more digits"])
        .await;
    bed.refused(&["console", "web"], &["abc1", "abc2"]).await;

    let path = bed.good(&["debug-bundle", "abc1", "-o", "b.tar.gz"]).await;
    let file = bed.dir.join(path.trim_end());
    assert_eq!(
        std::fs::metadata(&file).unwrap().permissions().mode() & 0o777,
        0o600
    );
    let again = bed.cloister(&["debug-bundle", "abc1", "-o", "b.tar.gz"]).await;
    assert!(!again.status.success(), "it is not written over");
    let archive = flate2::read::GzDecoder::new(std::fs::File::open(&file).unwrap());
    let mut archive = tar::Archive::new(archive);
    let names: Vec<String> = archive
        .entries()
        .unwrap()
        .map(|entry| entry.unwrap().path().unwrap().display().to_string())
        .collect();
    for name in [
        "pod.json",
        "console.txt",
        "events.jsonl",
        "config.toml",
        "metrics.txt",
        "host.txt",
    ] {
        assert!(
            names.contains(&format!("cloister-debug-abc1/{name}")),
            "{names:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_failed_is_explained() {
    let mut bed = bed("why").await;
    bed.create(creation("abc1", &config(NamespaceMode::Pod)))
        .await
        .unwrap();
    bed.start("abc1").await.unwrap_err();
    let events = bed.good(&["events", "--no-follow"]).await;
    assert!(events.contains("start-failed web pod=abc1: "), "{events}");
    assert!(events.contains("virtual machine"), "{events}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_has_ended_is_told_of() {
    let mut bed = bed("ended").await;
    bed.create(creation("abc1", &config(NamespaceMode::Pod)))
        .await
        .unwrap();
    bed.operators.abort();
    while bed.cloister(&["events", "--no-follow"]).await.status.success() {}
    bed.refused(
        &["events"],
        &["cloisterd is not running", "systemctl start cloisterd"],
    )
    .await;
    let output = bed.cloister(&["ps", "--pods", "--all"]).await;
    assert!(output.status.success());
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(out.contains("abc1") && out.contains("Stopped (137)"), "{out}");
    assert!(err.contains("cloisterd is not running"), "{err}");
    bed.refused(&["console", "abc1"], &["not running"]).await;
    bed.refused(
        &["exec", "abc1", "true"],
        &["has stopped: cloisterd is not running"],
    )
    .await;
    let bundle = bed.cloister(&["debug-bundle", "abc1", "-o", "-"]).await;
    assert!(bundle.status.success() && bundle.stdout.starts_with(b"\x1f\x8b"));
}
