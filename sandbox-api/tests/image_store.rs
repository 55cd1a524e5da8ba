// SPDX-License-Identifier: Apache-2.0
//! The image store with good, damaged and hostile images. Runs as root, as the store does.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

mod common;

use cloister_sandbox_api::image::{self, Error, Progress, Source, Store};
use common::{Folder, GZIP, PLAIN, ZSTD, gzip, image, layer};
use std::path::Path;

fn plain(bytes: &[u8]) -> Vec<u8> {
    bytes.to_vec()
}

fn layers() -> Vec<Vec<u8>> {
    vec![
        layer(&[("etc/a", "1"), ("etc/b", "2")]),
        layer(&[("etc/.wh.a", ""), ("bin/sh", "#!")]),
    ]
}

fn import(store: &Store, source: &str) -> image::Result<image::Image> {
    image::import(store, &Source::parse(source).unwrap(), &Progress::Quiet)
}

/// Nothing half-done: only what `images.json` names, and no temporary folder.
fn assert_tidy(store: &Store) {
    let images = store.images().unwrap();
    let names = |folder: &str| -> Vec<String> {
        let listing = std::fs::read_dir(store.root().join(folder)).unwrap();
        listing
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    };
    assert_eq!(names("tmp"), Vec::<String>::new());
    for layer in names("layers") {
        let facts = store.root().join("layers").join(&layer).join("layer.json");
        assert!(facts.exists(), "{layer}");
    }
    for image in images {
        store.layer_roots(&image.layers).unwrap();
        store.config(&image).unwrap();
    }
}

#[test]
fn layouts_in_all_compressions() {
    for (compress, media_type) in [
        (&gzip as &dyn Fn(&[u8]) -> Vec<u8>, GZIP),
        (&plain, PLAIN),
        (&|bytes: &[u8]| zstd::encode_all(bytes, 1).unwrap(), ZSTD),
    ] {
        let bed = Folder::new("layout");
        let made = image(&layers(), compress, media_type);
        made.write_layout(&bed.join("layout"), "example.com/app:1");
        let store = Store::open(&bed.join("store")).unwrap();
        let imported = import(&store, &format!("oci:{}", bed.join("layout").display())).unwrap();
        assert_eq!(imported.id.hex(), made.id());
        assert_eq!(imported.references, ["example.com/app:1"]);
        assert_eq!(imported.layers.len(), 2);
        assert_eq!(imported.size, 4);
        let upper = store.root().join("layers").join(&made.diff_ids[1]).join("fs");
        assert_eq!(std::fs::read_to_string(upper.join("bin/sh")).unwrap(), "#!");
        let config = store.config(&imported).unwrap();
        assert_eq!(config.config().as_ref().unwrap().cmd().as_ref().unwrap(), &["sh"]);
        assert_tidy(&store);
        // Found by name, id and prefix.
        for name in ["example.com/app:1", &made.id(), &made.id()[..12]] {
            assert_eq!(store.find(name).unwrap().id, imported.id, "{name}");
        }
        assert!(matches!(store.find("example.com/app:2"), Err(Error::NotFound(_))));
    }
}

#[test]
fn docker_archives() {
    let bed = Folder::new("archive");
    let made = image(&layers(), plain, PLAIN);
    let archive = made.docker_archive(&layers(), &["app:1", "app:2"]);
    let file = bed.join("app.tar");
    std::fs::write(&file, &archive).unwrap();
    std::fs::write(bed.join("app.tar.gz"), gzip(&archive)).unwrap();
    for source in [file, bed.join("app.tar.gz")] {
        let store = Store::open(&bed.join("store")).unwrap();
        let imported = import(&store, &format!("docker-archive:{}", source.display())).unwrap();
        assert_eq!(
            imported.references,
            ["docker.io/library/app:1", "docker.io/library/app:2"]
        );
        assert_eq!(
            import(&store, source.to_str().unwrap()).unwrap().id,
            imported.id,
            "autodetected"
        );
        assert_tidy(&store);
        assert_eq!(
            store.remove("app:1", false, &|_| None).unwrap(),
            ["Untagged: app:1"]
        );
        let user = |_: &image::Image| Some("0123".to_owned());
        assert!(matches!(
            store.remove("app:2", false, &user),
            Err(Error::InUse { .. })
        ));
        let told = store.remove("app:2", false, &|_| None).unwrap();
        assert_eq!(
            told,
            ["Untagged: app:2".to_owned(), format!("Deleted: {}", imported.id)]
        );
        for folder in ["layers", "blobs/sha256", "tmp"] {
            assert_eq!(
                std::fs::read_dir(store.root().join(folder)).unwrap().count(),
                0,
                "{folder}"
            );
        }
    }
}

#[test]
fn oci_archives() {
    let bed = Folder::new("oci-archive");
    let made = image(&layers(), gzip, GZIP);
    made.write_layout(&bed.join("layout"), "latest");
    let mut tar = tar::Builder::new(Vec::new());
    tar.append_dir_all(".", bed.join("layout")).unwrap();
    std::fs::write(bed.join("app.tar"), tar.into_inner().unwrap()).unwrap();
    let store = Store::open(&bed.join("store")).unwrap();
    let imported = import(
        &store,
        &format!("oci-archive:{}:latest", bed.join("app.tar").display()),
    )
    .unwrap();
    assert_eq!(imported.id.hex(), made.id());
    let error = import(
        &store,
        &format!("oci-archive:{}:other", bed.join("app.tar").display()),
    )
    .unwrap_err();
    assert!(matches!(error, Error::NotFound(_)), "{error}");
}

#[test]
fn damage_is_named_and_leaves_nothing() {
    let damage = |what: &str, change: &dyn Fn(&Path, &common::Made)| {
        let bed = Folder::new("damage");
        let made = image(&layers(), gzip, GZIP);
        let layout = bed.join("layout");
        made.write_layout(&layout, "app:1");
        change(&layout.join("blobs/sha256"), &made);
        let store = Store::open(&bed.join("store")).unwrap();
        let error = import(&store, layout.to_str().unwrap()).unwrap_err();
        assert_tidy(&store);
        assert!(store.images().unwrap().is_empty(), "{what}");
        error.to_string()
    };
    let flip = |path: &Path| {
        let mut bytes = std::fs::read(path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x20;
        std::fs::write(path, bytes).unwrap();
    };
    let config = damage("config", &|blobs, made| flip(&blobs.join(made.id())));
    assert!(config.contains("does not match its digest"), "{config}");
    let manifest = damage("manifest", &|blobs, made| {
        flip(&blobs.join(common::sha256(&made.manifest)))
    });
    assert!(manifest.contains("does not match its digest"), "{manifest}");
    let layer_blob = damage("layer", &|blobs, made| {
        flip(&blobs.join(common::sha256(&made.layers[1])))
    });
    assert!(layer_blob.contains("does not match its digest"), "{layer_blob}");
    let short = damage("short", &|blobs, made| {
        let path = blobs.join(common::sha256(&made.layers[0]));
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(path, &bytes[..bytes.len() - 9]).unwrap();
    });
    assert!(short.contains("does not match its digest"), "{short}");
    let missing = damage("missing", &|blobs, made| {
        std::fs::remove_file(blobs.join(common::sha256(&made.layers[1]))).unwrap();
    });
    assert!(missing.contains("is missing"), "{missing}");
}

#[test]
fn wrong_diff_id_and_hostile_entry() {
    let bed = Folder::new("diffid");
    let store = Store::open(&bed.join("store")).unwrap();
    let mut made = image(&layers(), gzip, GZIP);
    // The blob's own digest is right, what is in it is not what the configuration says.
    let config = String::from_utf8(made.config.clone())
        .unwrap()
        .replace(&made.diff_ids[1], &common::sha256(b"x"));
    let old = made.id();
    made.config = config.into_bytes();
    let manifest = String::from_utf8(made.manifest.clone())
        .unwrap()
        .replace(&old, &made.id());
    made.manifest = manifest.into_bytes();
    made.write_layout(&bed.join("layout"), "app:1");
    let error = import(&store, bed.join("layout").to_str().unwrap()).unwrap_err();
    assert!(error.to_string().contains("does not match its digest"), "{error}");
    assert!(store.images().unwrap().is_empty());
    assert_tidy(&store);

    let mut header = tar::Header::new_gnu();
    header.as_old_mut().name[..9].copy_from_slice(b"../escape");
    header.set_size(0);
    header.set_mode(0o644);
    header.set_cksum();
    let mut tar = tar::Builder::new(Vec::new());
    tar.append(&header, &b""[..]).unwrap();
    let made = image(&[tar.into_inner().unwrap()], gzip, GZIP);
    made.write_layout(&bed.join("hostile"), "app:2");
    let error = import(&store, bed.join("hostile").to_str().unwrap()).unwrap_err();
    assert_eq!(
        error.to_string(),
        r#"layer entry "../escape": a path with ".." leaves the layer"#
    );
    assert_tidy(&store);
}

#[test]
fn other_machines_images_and_no_images() {
    let bed = Folder::new("other");
    let store = Store::open(&bed.join("store")).unwrap();
    let mut made = image(&layers(), gzip, GZIP);
    let old = made.id();
    made.config = String::from_utf8(made.config)
        .unwrap()
        .replace("amd64", "arm64")
        .into_bytes();
    made.manifest = String::from_utf8(made.manifest.clone())
        .unwrap()
        .replace(&old, &made.id())
        .into_bytes();
    made.write_layout(&bed.join("layout"), "app:1");
    let error = import(&store, bed.join("layout").to_str().unwrap()).unwrap_err();
    assert!(error.to_string().contains("made for linux/arm64"), "{error}");
    std::fs::write(bed.join("text"), "hello").unwrap();
    let error = import(&store, bed.join("text").to_str().unwrap()).unwrap_err();
    assert!(error.to_string().contains("not an image"), "{error}");
    std::fs::create_dir(bed.join("empty")).unwrap();
    let error = import(&store, &format!("oci:{}", bed.join("empty").display())).unwrap_err();
    assert!(error.to_string().contains("neither index.json"), "{error}");
}

#[test]
fn leftovers_of_the_dead_go_and_work_of_the_living_stays() {
    let bed = Folder::new("sweep");
    let path = bed.join("store");
    drop(Store::open(&path).unwrap());
    let dead = path.join("tmp/dead");
    std::fs::create_dir_all(dead.join("layer/fs")).unwrap();
    let living = path.join("tmp/living");
    std::fs::create_dir_all(&living).unwrap();
    let lock = std::fs::File::open(&living).unwrap();
    lock.lock().unwrap();
    drop(Store::open(&path).unwrap());
    assert!(!dead.exists());
    assert!(living.exists());
}

#[test]
fn many_at_once() {
    let bed = Folder::new("many");
    let made = image(&layers(), gzip, GZIP);
    made.write_layout(&bed.join("layout"), "app:1");
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let store = Store::open(&bed.join("store")).unwrap();
                import(&store, bed.join("layout").to_str().unwrap()).unwrap();
            });
        }
    });
    let store = Store::open(&bed.join("store")).unwrap();
    assert_eq!(store.images().unwrap().len(), 1);
    assert_tidy(&store);
}
