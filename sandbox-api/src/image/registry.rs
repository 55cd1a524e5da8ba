// SPDX-License-Identifier: Apache-2.0
//! Pulls an image from a registry (OCI distribution specification) with the crate oci-client.
//!
//! Manifest and configuration first, since the configuration names the layers as they will lie in the store: those that
//! are there already are not fetched. The others come a few at a time into a temporary folder and are unpacked in order;
//! nothing has a name in the store before its digest was checked.

use super::digest::Digest;
use super::error::{Context, Error, Result, bad};
use super::import::{self, LayerBlob};
use super::progress::Progress;
use super::reference;
use super::store::{Image, MAX_CONFIG, MAX_MANIFEST, Store, parse_config};
use futures_util::{StreamExt, TryStreamExt};
use oci_client::client::{Client, ClientConfig, ClientProtocol};
use oci_client::errors::{DigestError, OciDistributionError};
use oci_client::manifest::OciDescriptor;
use oci_client::secrets::RegistryAuth;
use oci_client::{Reference, RegistryOperation};
use oci_spec::image::MediaType;
use sha2::Digest as _;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How to reach registries.
#[derive(Clone, Debug, Default)]
pub struct PullOptions {
    /// Plain HTTP, and certificates of anybody. Loopback registries are spoken to in HTTP anyway.
    pub insecure: bool,
    /// Downloads at a time; 0 means 3, as docker.
    pub parallel: usize,
}

const ACCEPTED: [&str; 4] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

/// Pulls `name` into the store. Blocks; starts a runtime of its own on this thread.
///
/// # Errors
/// No such image, no access, a damaged blob, a full disk; the store is then as before.
pub fn pull(store: &Store, name: &str, options: &PullOptions, progress: &Progress) -> Result<Image> {
    let reference = reference::parse(name)?;
    // Another part of the program may have chosen already; either is fine.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| bad("pull", format!("cannot start a runtime: {e}")))?;
    let registry = Registry::new(reference, options)?;
    runtime.block_on(registry.pull(store, options, progress))
}

struct Registry {
    client: Client,
    reference: Reference,
}

impl Registry {
    fn new(reference: Reference, options: &PullOptions) -> Result<Self> {
        let host = reference.resolve_registry().to_owned();
        let plain = options.insecure || reference::is_loopback(&host);
        let config = ClientConfig {
            protocol: if plain {
                ClientProtocol::Http
            } else {
                ClientProtocol::Https
            },
            connect_timeout: Some(Duration::from_secs(15)),
            read_timeout: Some(Duration::from_secs(60)),
            user_agent: concat!("cloister/", env!("CARGO_PKG_VERSION")),
            ..ClientConfig::default()
        };
        let client = Client::try_from(config).map_err(|e| Error::Registry {
            reference: host,
            why: e.to_string(),
        })?;
        Ok(Self { client, reference })
    }

    fn error(&self, error: OciDistributionError) -> Error {
        let host = self.reference.resolve_registry();
        let why = match error {
            OciDistributionError::ImageManifestNotFoundError(_) => {
                format!("manifest unknown: no such image at {host}; check name and tag")
            }
            OciDistributionError::UnauthorizedError { .. }
            | OciDistributionError::AuthenticationFailure(_) => {
                format!(
                    "{host} denies access: the repository does not exist or needs a login (docker login {host})"
                )
            }
            OciDistributionError::RequestError(e) if e.is_connect() => {
                format!("cannot reach {host}: {}", innermost(&e))
            }
            OciDistributionError::RequestError(e) if e.is_timeout() => {
                format!("{host} does not answer in time")
            }
            OciDistributionError::ServerError { code, message, .. } => {
                format!(
                    "{host} answered {code} {}",
                    message.chars().take(200).collect::<String>()
                )
            }
            other => other.to_string(),
        };
        Error::Registry {
            reference: reference::familiar(&self.reference.whole()).to_owned(),
            why,
        }
    }

    /// A download that ended with an error.
    fn broken(&self, digest: &Digest, error: std::io::Error) -> Error {
        let inner = error.get_ref().and_then(|e| e.downcast_ref::<DigestError>());
        if let Some(DigestError::VerificationError { expected, actual }) = inner {
            let what = format!("blob {}", digest.short());
            return Error::Digest {
                what,
                expected: expected.clone(),
                actual: actual.clone(),
            };
        }
        let why = format!("the download of {} broke off: {error}; try again", digest.short());
        Error::Registry {
            reference: reference::familiar(&self.reference.whole()).to_owned(),
            why,
        }
    }

    async fn pull(&self, store: &Store, options: &PullOptions, progress: &Progress) -> Result<Image> {
        let _hold = store.hold()?;
        let name = self.reference.whole();
        progress.say(&format!("Pulling {}", reference::familiar(&name)));
        let auth = credentials(self.reference.resolve_registry())?;
        self.client
            .auth(&self.reference, &auth, RegistryOperation::Pull)
            .await
            .map_err(|e| self.error(e))?;

        let (digest, manifest_bytes) = self.manifest(&auth).await?;
        let manifest = import::parse_manifest(&name, &manifest_bytes)?;
        let id = import::digest_of(manifest.config())?;
        if manifest.config().size() > MAX_CONFIG {
            return Err(bad(name, "the configuration is too large"));
        }
        let temp = store.temp()?;
        let config_path = temp.path().join("config");
        self.blob(&id, manifest.config().size(), &config_path, |_| {})
            .await?;
        let config_bytes = std::fs::read(&config_path).at("read", &config_path)?;
        let config = parse_config(&id.to_string(), &config_bytes)?;
        let diff_ids = import::check_config(&id, &config, manifest.layers().len())?;

        let mut layers = Vec::new();
        for layer in manifest.layers() {
            layers.push(LayerBlob {
                blob: Some(import::digest_of(layer)?),
                size: layer.size(),
            });
        }
        let file_of = |index: usize| -> PathBuf { temp.path().join(format!("layer-{index}")) };
        let wanted = diff_ids
            .iter()
            .zip(&layers)
            .enumerate()
            .filter(|(_, (diff_id, _))| !store.has_layer(diff_id));
        let downloads = wanted.filter_map(|(index, (diff_id, layer))| {
            let blob = layer.blob.as_ref()?;
            let path = file_of(index);
            let bar = progress.layer(diff_id.short(), layer.size);
            Some(async move {
                bar.downloading();
                self.blob(blob, layer.size, &path, |bytes| bar.add(bytes)).await?;
                bar.downloaded();
                Ok::<(), Error>(())
            })
        });
        let parallel = if options.parallel == 0 {
            3
        } else {
            options.parallel
        };
        futures_util::stream::iter(downloads.collect::<Vec<_>>())
            .buffer_unordered(parallel)
            .try_collect::<Vec<()>>()
            .await?;

        store.put_blob(&digest, &manifest_bytes)?;
        let mut references = vec![name.clone()];
        references.retain(|name| !name.is_empty());
        let image = import::add(
            store,
            Some(digest.clone()),
            &id,
            &config_bytes,
            &layers,
            references,
            progress,
            |index| {
                let path = file_of(index);
                Ok(Box::new(File::open(&path).at("open", &path)?))
            },
        )?;
        progress.say(&format!("Digest: {digest}"));
        Ok(image)
    }

    /// The manifest for this machine, through an index if there is one.
    async fn manifest(&self, auth: &RegistryAuth) -> Result<(Digest, Vec<u8>)> {
        let mut reference = self.reference.clone();
        for _ in 0..4 {
            let (bytes, _) = self
                .client
                .pull_manifest_raw(&reference, auth, &ACCEPTED)
                .await
                .map_err(|e| self.error(e))?;
            let what = reference.whole();
            if bytes.len() as u64 > MAX_MANIFEST {
                return Err(bad(what, "the manifest is too large"));
            }
            let digest = Digest::of(&bytes);
            if let Some(expected) = reference.digest()
                && expected != digest.to_string()
            {
                return Err(Error::Digest {
                    what,
                    expected: expected.to_owned(),
                    actual: digest.to_string(),
                });
            }
            if !import::is_index(&MediaType::Other(String::new()), &bytes) {
                return Ok((digest, bytes.to_vec()));
            }
            let chosen = import::digest_of(&import::choose(&what, &bytes)?)?;
            reference = self.reference.clone_with_digest(chosen.to_string());
        }
        Err(bad(self.reference.whole(), "indexes nested too deeply"))
    }

    /// Downloads a blob and checks size and digest.
    async fn blob(&self, digest: &Digest, size: u64, path: &Path, mut count: impl FnMut(u64)) -> Result<()> {
        let text = digest.to_string();
        let descriptor = OciDescriptor {
            digest: text.clone(),
            size: i64::try_from(size).unwrap_or(i64::MAX),
            ..Default::default()
        };
        let mut stream = self
            .client
            .pull_blob_stream(&self.reference, &descriptor)
            .await
            .map_err(|e| self.error(e))?
            .stream;
        let mut file = File::options()
            .write(true)
            .create_new(true)
            .open(path)
            .at("create", path)?;
        let mut hash = sha2::Sha256::new();
        let mut have = 0_u64;
        while let Some(chunk) = stream.next().await {
            let chunk = chunk.map_err(|e| self.broken(digest, e))?;
            have = have.saturating_add(chunk.len() as u64);
            if have > size {
                break;
            }
            hash.update(&chunk);
            file.write_all(&chunk).at("write", path)?;
            count(chunk.len() as u64);
        }
        let actual = format!("sha256:{}", super::digest::hex(&hash.finalize()));
        if have != size || actual != text {
            let actual = if have == size {
                actual
            } else {
                format!("{have} bytes instead of {size}")
            };
            return Err(Error::Digest {
                what: format!("blob {}", digest.short()),
                expected: text,
                actual,
            });
        }
        Ok(())
    }
}

fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// What `docker login` stored for a registry.
fn credentials(registry: &str) -> Result<RegistryAuth> {
    let folder = std::env::var_os("DOCKER_CONFIG")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".docker")));
    let Some(path) = folder.map(|folder| folder.join("config.json")) else {
        return Ok(RegistryAuth::Anonymous);
    };
    match std::fs::read(&path) {
        Ok(bytes) => stored_credentials(&bytes, registry).map_err(|why| bad(path.display().to_string(), why)),
        Err(_) => Ok(RegistryAuth::Anonymous),
    }
}

fn stored_credentials(config: &[u8], registry: &str) -> std::result::Result<RegistryAuth, String> {
    #[derive(serde::Deserialize)]
    struct Config {
        #[serde(default)]
        auths: std::collections::HashMap<String, Entry>,
    }
    #[derive(serde::Deserialize)]
    struct Entry {
        auth: Option<String>,
        username: Option<String>,
        password: Option<String>,
    }
    let config: Config = serde_json::from_slice(config).map_err(|e| e.to_string())?;
    // Docker Hub goes by an address of old.
    let is_hub = matches!(registry, "docker.io" | "index.docker.io" | "registry-1.docker.io");
    let matches = |key: &str| {
        let host = key.trim_start_matches("https://").trim_start_matches("http://");
        let host = host.split('/').next().unwrap_or(host);
        host == registry || (is_hub && matches!(host, "index.docker.io" | "docker.io"))
    };
    let Some((_, entry)) = config.auths.into_iter().find(|(key, _)| matches(key)) else {
        return Ok(RegistryAuth::Anonymous);
    };
    if let (Some(user), Some(password)) = (entry.username, entry.password) {
        return Ok(RegistryAuth::Basic(user, password));
    }
    match entry.auth.filter(|auth| !auth.is_empty()) {
        Some(auth) => {
            use base64::Engine as _;
            let decoded = base64::engine::general_purpose::STANDARD
                .decode(auth.trim())
                .map_err(|e| e.to_string())?;
            let text = String::from_utf8(decoded).map_err(|e| e.to_string())?;
            let (user, password) = text.split_once(':').ok_or("an auth entry without a colon")?;
            Ok(RegistryAuth::Basic(
                user.to_owned(),
                password.trim_end_matches('\0').to_owned(),
            ))
        }
        // Kept by a credential helper, which we do not run.
        None => Ok(RegistryAuth::Anonymous),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_of_docker_login() {
        let config = br#"{"auths":{"https://registry.example/v2/":{"auth":"bWU6c2VjcmV0"},"other:5000":{}}}"#;
        assert_eq!(
            stored_credentials(config, "registry.example").unwrap(),
            RegistryAuth::Basic("me".into(), "secret".into())
        );
        assert_eq!(
            stored_credentials(config, "other:5000").unwrap(),
            RegistryAuth::Anonymous
        );
        assert_eq!(
            stored_credentials(config, "unknown").unwrap(),
            RegistryAuth::Anonymous
        );
        assert_eq!(
            stored_credentials(b"{}", "unknown").unwrap(),
            RegistryAuth::Anonymous
        );
        assert!(stored_credentials(b"[", "unknown").is_err());
        assert!(stored_credentials(br#"{"auths":{"a":{"auth":"%%"}}}"#, "a").is_err());
    }
}
