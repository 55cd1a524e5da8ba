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
use std::process::{Child, Command, Stdio};

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
