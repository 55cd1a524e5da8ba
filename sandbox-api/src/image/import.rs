// SPDX-License-Identifier: Apache-2.0
//! Brings images from a layout or an archive into the store.

use super::archive::Files;
use super::digest::Digest;
use super::error::{Error, Result, bad};
use super::progress::Progress;
use super::reference;
use super::source::Source;
use super::store::{Image, MAX_CONFIG, MAX_LAYERS, MAX_MANIFEST, Store, parse_config};
use oci_spec::image::{Arch, Descriptor, ImageIndex, ImageManifest, MediaType, Os};
use std::io::Read;
use std::path::{Path, PathBuf};

const REF_NAME: &str = "org.opencontainers.image.ref.name";
const CONTAINERD_NAME: &str = "io.containerd.image.name";

/// Imports the one image that `source` names.
///
/// # Errors
/// No image, several without a tag to choose by, a damaged one, or a full disk. The store is as before.
pub fn import(store: &Store, source: &Source, progress: &Progress) -> Result<Image> {
    let (found, tag) = open(store, source)?;
    let what = found.files.describe();
    let mut candidates = found.images;
    if let Some(tag) = &tag {
        candidates.retain(|image| image.names.iter().any(|name| named(name, tag)));
        if candidates.is_empty() {
            return Err(Error::NotFound(format!("{tag} in {what}")));
        }
    }
    let image = match candidates.len() {
        0 => return Err(bad(what, "holds no image")),
        1 => candidates.remove(0),
        _ => {
            let names: Vec<String> = candidates.into_iter().flat_map(|image| image.names).collect();
            return Err(bad(
                what,
                format!(
                    "holds several images, add :TAG to choose one of {}",
                    names.join(", ")
                ),
            ));
        }
    };
    image.import(store, &found.files, progress)
}

/// Imports all images of an archive or layout, as `docker load`.
///
/// # Errors
/// As [`import`].
pub fn load(store: &Store, source: &Source, progress: &Progress) -> Result<Vec<Image>> {
    let (found, _) = open(store, source)?;
    if found.images.is_empty() {
        return Err(bad(found.files.describe(), "holds no image"));
    }
    found
        .images
        .iter()
        .map(|image| image.import(store, &found.files, progress))
        .collect()
}

/// Whether an image called `name` is meant by `tag`: the name itself, its docker form, or only its tag.
fn named(name: &str, tag: &str) -> bool {
    name == tag
        || name.rsplit_once(':').is_some_and(|(_, t)| t == tag)
        || matches!((reference::normalize(name), reference::normalize(tag)), (Ok(a), Ok(b)) if a == b)
}

struct Found {
    files: Files,
    images: Vec<Candidate>,
}

struct Candidate {
    names: Vec<String>,
    kind: Kind,
}

enum Kind {
    /// A descriptor of an OCI layout's index.
    Oci(Box<Descriptor>),
    /// An entry of docker's `manifest.json`.
    Docker(DockerManifest),
}

#[derive(Clone, serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerManifest {
    config: PathBuf,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<PathBuf>,
}

fn open(store: &Store, source: &Source) -> Result<(Found, Option<String>)> {
    let (files, tag) = match source {
        Source::Layout { dir, tag } => (Files::folder(dir), tag.clone()),
        Source::Archive { file, tag } => (Files::archive(store, file)?, tag.clone()),
        Source::Reference(name) => return Err(Error::NotFound(name.clone())),
        Source::Directory(path) => return Err(bad(path.display().to_string(), "a plain folder is no image")),
    };
    let what = files.describe();
    let images = if let Some(bytes) = files.read(Path::new("manifest.json"), MAX_MANIFEST)? {
        // `docker save` writes an OCI index as well since 25; this one has the names.
        let manifests: Vec<DockerManifest> = serde_json::from_slice(&bytes)
            .map_err(|e| bad(format!("manifest.json of {what}"), e.to_string()))?;
        let candidate = |manifest: DockerManifest| Candidate {
            names: manifest.repo_tags.clone().unwrap_or_default(),
            kind: Kind::Docker(manifest),
        };
        manifests.into_iter().map(candidate).collect()
    } else if let Some(bytes) = files.read(Path::new("index.json"), MAX_MANIFEST)? {
        let index: ImageIndex = serde_json::from_slice(&bytes)
            .map_err(|e| bad(format!("index.json of {what}"), e.to_string()))?;
        let candidate = |descriptor: &Descriptor| {
            let annotations = descriptor.annotations().clone().unwrap_or_default();
            let name = annotations
                .get(CONTAINERD_NAME)
                .or_else(|| annotations.get(REF_NAME))
                .cloned();
            Candidate {
                names: name.into_iter().collect(),
                kind: Kind::Oci(Box::new(descriptor.clone())),
            }
        };
        index
            .manifests()
            .iter()
            .filter(|d| fits_platform(d) != Some(false))
            .map(candidate)
            .collect()
    } else {
        return Err(bad(
            what,
            "not an image: neither index.json (OCI layout) nor manifest.json (docker save) is in it",
        ));
    };
    Ok((Found { files, images }, tag))
}

impl Candidate {
    fn import(&self, store: &Store, files: &Files, progress: &Progress) -> Result<Image> {
        let _hold = store.hold()?;
        let references: Vec<String> = self
            .names
            .iter()
            // A bare tag ("latest", skopeo's habit) names nothing by itself.
            .filter(|name| name.contains(['/', ':']) || self.names.len() == 1)
            .filter_map(|name| reference::normalize(name).ok())
            .collect();
        match &self.kind {
            Kind::Oci(descriptor) => {
                let (digest, manifest_bytes) = resolve(files, descriptor)?;
                let manifest = parse_manifest(&files.describe(), &manifest_bytes)?;
                let config_digest = digest_of(manifest.config())?;
                let config = files.read_blob(&config_digest, MAX_CONFIG)?;
                let layers: Vec<LayerBlob> = manifest
                    .layers()
                    .iter()
                    .map(|layer| {
                        Ok(LayerBlob {
                            blob: Some(digest_of(layer)?),
                            size: layer.size(),
                        })
                    })
                    .collect::<Result<_>>()?;
                store.put_blob(&digest, &manifest_bytes)?;
                add(
                    store,
                    Some(digest),
                    &config_digest,
                    &config,
                    &layers,
                    references,
                    progress,
                    |index| {
                        let blob = layers.get(index).and_then(|layer| layer.blob.as_ref());
                        files.open_blob(blob.ok_or_else(|| bad(files.describe(), "a layer has no digest"))?)
                    },
                )
            }
            Kind::Docker(manifest) => {
                let what = files.describe();
                let missing = |path: &Path| {
                    bad(
                        what.clone(),
                        format!("{} is missing: the archive is incomplete", path.display()),
                    )
                };
                let config = files
                    .read(&manifest.config, MAX_CONFIG)?
                    .ok_or_else(|| missing(&manifest.config))?;
                let config_digest = Digest::of(&config);
                // Its file is called after its digest, in both forms of `docker save`.
                let expected = manifest
                    .config
                    .file_stem()
                    .and_then(|stem| stem.to_str())
                    .unwrap_or_default();
                if expected.len() == 64 && expected != config_digest.hex() {
                    return Err(Error::Digest {
                        what: format!("the configuration in {what}"),
                        expected: format!("sha256:{expected}"),
                        actual: config_digest.to_string(),
                    });
                }
                let layers: Vec<LayerBlob> = manifest
                    .layers
                    .iter()
                    .map(|_| LayerBlob { blob: None, size: 0 })
                    .collect();
                add(
                    store,
                    None,
                    &config_digest,
                    &config,
                    &layers,
                    references,
                    progress,
                    |index| {
                        let path = manifest
                            .layers
                            .get(index)
                            .map(PathBuf::as_path)
                            .unwrap_or(Path::new(""));
                        files.open(path)?.ok_or_else(|| missing(path))
                    },
                )
            }
        }
    }
}

/// A layer as the manifest tells it.
pub(crate) struct LayerBlob {
    /// Digest of the blob as transferred; docker's archives have none.
    pub blob: Option<Digest>,
    /// Its size in bytes, 0 if unknown.
    pub size: u64,
}

/// Stores configuration and layers, and records the image. The straight line every source ends in.
#[allow(clippy::too_many_arguments)]
pub(crate) fn add(
    store: &Store,
    manifest: Option<Digest>,
    id: &Digest,
    config_bytes: &[u8],
    layers: &[LayerBlob],
    references: Vec<String>,
    progress: &Progress,
    open: impl Fn(usize) -> Result<Box<dyn Read>>,
) -> Result<Image> {
    let config = parse_config(&id.to_string(), config_bytes)?;
    let diff_ids = check_config(id, &config, layers.len())?;
    store.put_blob(id, config_bytes)?;
    let mut size = 0_u64;
    for (index, (diff_id, layer)) in diff_ids.iter().zip(layers).enumerate() {
        let bar = progress.layer(diff_id.short(), layer.size);
        if store.has_layer(diff_id) {
            bar.exists();
        }
        let below = diff_ids.get(..index).unwrap_or_default();
        let facts = store.ensure_layer(diff_id, layer.blob.as_ref(), below, || {
            bar.unpacking();
            Ok(Box::new(bar.wrap(open(index)?)))
        })?;
        bar.done();
        size = size.saturating_add(facts.bytes);
    }
    store.record(Image {
        id: id.clone(),
        manifest,
        references,
        layers: diff_ids,
        size,
        created: config.created().clone(),
    })
}

/// The diff ids of a configuration that this machine can run.
pub(crate) fn check_config(
    id: &Digest,
    config: &oci_spec::image::ImageConfiguration,
    layers: usize,
) -> Result<Vec<Digest>> {
    let what = format!("image {}", id.short());
    if *config.os() != Os::Linux || *config.architecture() != Arch::default() {
        return Err(bad(
            what,
            format!(
                "made for {}/{}, this machine needs linux/{}",
                config.os(),
                config.architecture(),
                Arch::default()
            ),
        ));
    }
    let diff_ids = config.rootfs().diff_ids();
    if diff_ids.len() != layers {
        return Err(bad(
            what,
            format!(
                "{} layers, but {} diff ids in its configuration",
                layers,
                diff_ids.len()
            ),
        ));
    }
    if layers > MAX_LAYERS {
        return Err(bad(
            what,
            format!("{layers} layers; one overlay mount takes {MAX_LAYERS}"),
        ));
    }
    diff_ids.iter().map(|text| Digest::parse(text)).collect()
}

/// Goes from an index to the manifest for this machine.
fn resolve(files: &Files, descriptor: &Descriptor) -> Result<(Digest, Vec<u8>)> {
    let mut digest = digest_of(descriptor)?;
    let mut media_type = descriptor.media_type().clone();
    for _ in 0..4 {
        let bytes = files.read_blob(&digest, MAX_MANIFEST)?;
        if !is_index(&media_type, &bytes) {
            return Ok((digest, bytes));
        }
        let chosen = choose(&files.describe(), &bytes)?;
        digest = digest_of(&chosen)?;
        media_type = chosen.media_type().clone();
    }
    Err(bad(files.describe(), "indexes nested too deeply"))
}

pub(crate) fn is_index(media_type: &MediaType, bytes: &[u8]) -> bool {
    #[derive(serde::Deserialize)]
    struct Probe {
        manifests: Option<serde::de::IgnoredAny>,
    }
    match media_type {
        MediaType::ImageIndex => true,
        MediaType::ImageManifest => false,
        _ => serde_json::from_slice::<Probe>(bytes).is_ok_and(|probe| probe.manifests.is_some()),
    }
}

/// The entry of an index that fits this machine.
pub(crate) fn choose(what: &str, bytes: &[u8]) -> Result<Descriptor> {
    let index: ImageIndex =
        serde_json::from_slice(bytes).map_err(|e| bad(what, format!("not an image index: {e}")))?;
    let fits = |wanted| move |d: &&Descriptor| fits_platform(d) == wanted;
    let manifests = index.manifests();
    // One that says so, else one that does not say.
    let chosen = manifests
        .iter()
        .find(fits(Some(true)))
        .or_else(|| manifests.iter().find(fits(None)));
    chosen.cloned().ok_or_else(|| {
        let have: Vec<String> = manifests
            .iter()
            .filter_map(|d| {
                d.platform()
                    .as_ref()
                    .map(|p| format!("{}/{}", p.os(), p.architecture()))
            })
            .collect();
        bad(
            what,
            format!(
                "no image for linux/{} in it (there are: {})",
                Arch::default(),
                have.join(", ")
            ),
        )
    })
}

fn fits_platform(descriptor: &Descriptor) -> Option<bool> {
    let platform = descriptor.platform().as_ref()?;
    Some(*platform.os() == Os::Linux && *platform.architecture() == Arch::default())
}

pub(crate) fn digest_of(descriptor: &Descriptor) -> Result<Digest> {
    Digest::parse(descriptor.digest().as_ref())
}

pub(crate) fn parse_manifest(what: &str, bytes: &[u8]) -> Result<ImageManifest> {
    let manifest: ImageManifest =
        serde_json::from_slice(bytes).map_err(|e| bad(what, format!("not an image manifest: {e}")))?;
    Ok(manifest)
}
