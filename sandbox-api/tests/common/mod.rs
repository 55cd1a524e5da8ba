// SPDX-License-Identifier: Apache-2.0
//! Images made on the spot, and a folder that goes away.
#![allow(missing_docs, dead_code)]

use sha2::{Digest as _, Sha256};
use std::io::Write;
use std::path::{Path, PathBuf};

pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!(
            "cloister-{name}-{}",
            cloister_sandbox_api::ids::random_hex(6)
        ));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// A layer with these files.
pub fn layer(files: &[(&str, &str)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(1);
        tar.append_data(&mut header, path, content.as_bytes()).unwrap();
    }
    tar.into_inner().unwrap()
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// An image: its blobs and the digest (hex) of its manifest.
pub struct Made {
    pub manifest: Vec<u8>,
    pub config: Vec<u8>,
    pub layers: Vec<Vec<u8>>,
    pub diff_ids: Vec<String>,
}

pub fn image(layers: &[Vec<u8>], compress: impl Fn(&[u8]) -> Vec<u8>, media_type: &str) -> Made {
    let diff_ids: Vec<String> = layers.iter().map(|layer| sha256(layer)).collect();
    let with_algorithm: Vec<String> = diff_ids.iter().map(|hex| format!("sha256:{hex}")).collect();
    let config = serde_json::json!({
        "created": "2024-01-02T03:04:05Z", "architecture": "amd64", "os": "linux",
        "config": {"Cmd": ["sh"], "Env": ["PATH=/bin"], "Labels": null, "Volumes": null, "ExposedPorts": null, "Entrypoint": null},
        "rootfs": {"type": "layers", "diff_ids": with_algorithm},
    });
    let config = serde_json::to_vec(&config).unwrap();
    let layers: Vec<Vec<u8>> = layers.iter().map(|layer| compress(layer)).collect();
    let descriptors: Vec<serde_json::Value> = layers
        .iter()
        .map(|layer| serde_json::json!({"mediaType": media_type, "digest": format!("sha256:{}", sha256(layer)), "size": layer.len()}))
        .collect();
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": format!("sha256:{}", sha256(&config)), "size": config.len()},
        "layers": descriptors,
    });
    Made {
        manifest: serde_json::to_vec(&manifest).unwrap(),
        config,
        layers,
        diff_ids,
    }
}

pub const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";
pub const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";

impl Made {
    pub fn id(&self) -> String {
        sha256(&self.config)
    }

    /// Writes the image as an OCI layout; `name` goes into the annotation.
    pub fn write_layout(&self, dir: &Path, name: &str) {
        let blobs = dir.join("blobs/sha256");
        std::fs::create_dir_all(&blobs).unwrap();
        for blob in self.layers.iter().chain([&self.manifest, &self.config]) {
            std::fs::write(blobs.join(sha256(blob)), blob).unwrap();
        }
        std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        let index = serde_json::json!({"schemaVersion": 2, "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": format!("sha256:{}", sha256(&self.manifest)),
            "size": self.manifest.len(), "annotations": {"org.opencontainers.image.ref.name": name},
        }]});
        std::fs::write(dir.join("index.json"), serde_json::to_vec(&index).unwrap()).unwrap();
    }

    /// As `docker save` wrote it for years: the second layer's file may be a link to the first one's.
    pub fn docker_archive(&self, plain_layers: &[Vec<u8>], names: &[&str]) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        let mut add = |name: &str, bytes: &[u8]| {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, name, bytes).unwrap();
        };
        let files: Vec<String> = (0..plain_layers.len())
            .map(|i| format!("layer{i}/layer.tar"))
            .collect();
        for (file, layer) in files.iter().zip(plain_layers) {
            add(file, layer);
        }
        let config = format!("{}.json", self.id());
        add(&config, &self.config);
        let manifest = serde_json::json!([{"Config": config, "RepoTags": names, "Layers": files}]);
        add("manifest.json", &serde_json::to_vec(&manifest).unwrap());
        tar.into_inner().unwrap()
    }
}
