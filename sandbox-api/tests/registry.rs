// SPDX-License-Identifier: Apache-2.0
//! Pulls from Debian's docker-registry on loopback (`ci/setup` installs it).
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod common;

use cloister_sandbox_api::image::{self, Progress, PullOptions, Store};
use common::{Folder, GZIP, Made, gzip, layer};
use oci_client::client::{Client, ClientConfig, ClientProtocol, Config, ImageLayer};
use oci_client::secrets::RegistryAuth;
use oci_client::{Reference, manifest::OciImageManifest};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

struct Registry {
    child: Child,
    port: u16,
    folder: Folder,
}

impl Registry {
    fn start() -> Self {
        let folder = Folder::new("registry");
        // The registry takes no port 0; whoever takes this one in between makes it fail loudly.
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: 127.0.0.1:{port}}}\n",
            folder.join("data").display()
        );
        std::fs::write(folder.join("config.yml"), config).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(folder.join("config.yml"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry is missing: ci/setup installs it");
        let mut registry = Self { child, port, folder };
        for _ in 0..600 {
            if TcpStream::connect(("127.0.0.1", port)).is_ok() {
                return registry;
            }
            assert!(
                registry.child.try_wait().unwrap().is_none(),
                "docker-registry ended"
            );
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        panic!("docker-registry does not listen");
    }

    fn name(&self, rest: &str) -> String {
        format!("127.0.0.1:{}/{rest}", self.port)
    }

    fn push(&self, name: &str, made: &Made) {
        let config = ClientConfig {
            protocol: ClientProtocol::Http,
            ..Default::default()
        };
        let _ = rustls::crypto::ring::default_provider().install_default();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let reference: Reference = self.name(name).parse().unwrap();
        let layers: Vec<ImageLayer> = made
            .layers
            .iter()
            .map(|layer| ImageLayer::new(layer.clone(), GZIP.to_owned(), None))
            .collect();
        let manifest: OciImageManifest = serde_json::from_slice(&made.manifest).unwrap();
        let push = async {
            let client = Client::new(config);
            let config = Config::oci_v1(made.config.clone(), None);
            client
                .push(
                    &reference,
                    &layers,
                    config,
                    &RegistryAuth::Anonymous,
                    Some(manifest),
                )
                .await
        };
        runtime.block_on(push).unwrap();
    }

    /// Where the registry keeps a blob.
    fn blob(&self, hex: &str) -> std::path::PathBuf {
        self.folder.join(&format!(
            "data/docker/registry/v2/blobs/sha256/{}/{hex}/data",
            &hex[..2]
        ))
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn made() -> Made {
    let layers = [
        layer(&[("etc/a", "1")]),
        layer(&[("bin/sh", &"#!".repeat(100_000))]),
        layer(&[("etc/c", "3")]),
    ];
    common::image(&layers, gzip, GZIP)
}

#[test]
fn pull_and_pull_again() {
    let registry = Registry::start();
    let made = made();
    registry.push("team/app:1", &made);
    let bed = Folder::new("pull");
    let store = Store::open(&bed.join("store")).unwrap();
    let name = registry.name("team/app:1");
    let image = image::pull(&store, &name, &PullOptions::default(), &Progress::Quiet).unwrap();
    assert_eq!(image.id.hex(), made.id());
    assert_eq!(image.references, std::slice::from_ref(&name));
    assert_eq!(image.layers.len(), 3);
    let again = image::pull(&store, &name, &PullOptions::default(), &Progress::Quiet).unwrap();
    assert_eq!(again, image);
    let digest = image.manifest.as_ref().unwrap();
    let by_digest = registry.name(&format!("team/app@{digest}"));
    assert_eq!(
        image::pull(&store, &by_digest, &PullOptions::default(), &Progress::Quiet)
            .unwrap()
            .id,
        image.id
    );
    assert_eq!(std::fs::read_dir(store.root().join("tmp")).unwrap().count(), 0);
}

#[test]
fn what_goes_wrong_is_named() {
    let registry = Registry::start();
    let made = made();
    registry.push("app:1", &made);
    let bed = Folder::new("pull-errors");
    let store = Store::open(&bed.join("store")).unwrap();
    let pull = |name: &str| image::pull(&store, name, &PullOptions::default(), &Progress::Quiet);

    let error = pull(&registry.name("app:2")).unwrap_err().to_string();
    assert!(error.contains("manifest unknown"), "{error}");
    let error = pull("127.0.0.1:1/app").unwrap_err().to_string();
    assert!(error.contains("cannot reach 127.0.0.1:1"), "{error}");
    let error = pull("No Such").unwrap_err().to_string();
    assert!(error.contains("invalid image name"), "{error}");

    // The registry's disk went bad: same length, other bytes.
    let path = registry.blob(&common::sha256(&made.layers[1]));
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[20] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let error = pull(&registry.name("app:1")).unwrap_err().to_string();
    assert!(error.contains("does not match its digest"), "{error}");
    assert!(store.images().unwrap().is_empty());
    for folder in ["tmp", "layers"] {
        assert_eq!(
            std::fs::read_dir(store.root().join(folder)).unwrap().count(),
            0,
            "{folder}"
        );
    }
}

#[test]
fn concurrent_pulls() {
    let registry = Registry::start();
    let made = made();
    registry.push("app:1", &made);
    let bed = Folder::new("pull-many");
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let store = Store::open(&bed.join("store")).unwrap();
                let name = registry.name("app:1");
                image::pull(&store, &name, &PullOptions::default(), &Progress::Quiet).unwrap();
            });
        }
    });
    let store = Store::open(&bed.join("store")).unwrap();
    assert_eq!(store.images().unwrap().len(), 1);
    assert_eq!(std::fs::read_dir(store.root().join("tmp")).unwrap().count(), 0);
}

/// The command line, with folders of its own.
fn cloister(bed: &Folder, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cloister"));
    command.arg("--root").arg(bed.join("root"));
    command.arg("--state").arg(bed.join("state")).args(args);
    command
}

/// What it printed, having ended so.
#[track_caller]
fn said(mut command: Command, code: i32) -> (String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    let (out, err) = (
        String::from_utf8(stdout).unwrap(),
        String::from_utf8(stderr).unwrap(),
    );
    assert_eq!(status.code(), Some(code), "{out}{err}");
    (out, err)
}

#[test]
fn the_command_line_pulls_shows_and_removes() {
    let registry = Registry::start();
    let made = made();
    registry.push("team/app:1", &made);
    let bed = Folder::new("pull-cli");
    let name = registry.name("team/app:1");
    let (out, err) = said(cloister(&bed, &["pull", &name]), 0);
    assert_eq!(out, format!("{name}\n"));
    assert_eq!(err.matches("Pull complete").count(), 3, "{err}");
    let (_, err) = said(cloister(&bed, &["pull", "--quiet", &name]), 0);
    assert_eq!(err, "");
    let (out, _) = said(cloister(&bed, &["images"]), 0);
    let lines: Vec<Vec<&str>> = out
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(lines[0], ["REPOSITORY", "TAG", "IMAGE", "ID", "CREATED", "SIZE"]);
    let repository = registry.name("team/app");
    assert_eq!(
        lines[1][..3],
        [repository.as_str(), "1", &made.id()[..12]],
        "{out}"
    );
    let (out, _) = said(cloister(&bed, &["images", "--json"]), 0);
    let listed: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(listed[0]["references"][0], name, "{listed}");
    let (_, err) = said(cloister(&bed, &["pull", &registry.name("team/app:2")]), 1);
    assert!(err.contains("manifest unknown"), "{err}");
    let (out, _) = said(cloister(&bed, &["rmi", &name]), 0);
    let told = format!("Untagged: {name}\nDeleted: sha256:{}\n", made.id());
    assert_eq!(out, told);
    let (_, err) = said(cloister(&bed, &["rmi", &name]), 1);
    assert!(err.contains(&name), "{err}");
    let (out, _) = said(cloister(&bed, &["images", "--quiet"]), 0);
    assert_eq!(out, "");
}

#[test]
fn a_pull_that_is_killed_leaves_nothing_half_done() {
    let registry = Registry::start();
    // Enough to be in the midst of it.
    let numbers = |seed: u64| -> String {
        (0..300_000_u64)
            .map(|n| format!("{:x}", n.wrapping_mul(seed)))
            .collect()
    };
    let content = [numbers(0x9e37_79b9_7f4a_7c15), numbers(0xbf58_476d_1ce4_e5b9)];
    let layers = [
        layer(&[("a", &content[0])]),
        layer(&[("b", &content[1])]),
        layer(&[("c", "3")]),
    ];
    let made = common::image(&layers, gzip, GZIP);
    registry.push("app:1", &made);
    let bed = Folder::new("pull-killed");
    let name = registry.name("app:1");
    for round in 0..12 {
        let mut pull = cloister(&bed, &["pull", "--quiet", &name]).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(round * 25));
        pull.kill().unwrap();
        pull.wait().unwrap();
        // Listed is what is whole.
        let (out, _) = said(cloister(&bed, &["images", "--json"]), 0);
        let listed: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert!(listed.as_array().unwrap().len() <= 1, "{listed}");
        if !listed[0].is_null() {
            assert_eq!(listed[0]["layers"].as_array().unwrap().len(), 3, "{listed}");
        }
    }
    said(cloister(&bed, &["pull", &name]), 0);
    let store = Store::open(&bed.join("root")).unwrap();
    let image = &store.images().unwrap()[0];
    assert_eq!(image.id.hex(), made.id());
    let count = |folder: &str| std::fs::read_dir(store.root().join(folder)).unwrap().count();
    assert_eq!((count("tmp"), count("layers")), (0, 3));
}
