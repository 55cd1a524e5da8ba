// SPDX-License-Identifier: Apache-2.0
//! Requests that are none, and containers that cannot be had: which it was is said, and nothing is half made.

use super::tests::{Bed, Root, bed};
use super::*;
use cloister_protocol::TASK_V3;
use cloister_protocol::ttrpc::proto::{MESSAGE_LENGTH_MAX, MessageHeader, Request, Response};
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

fn framed(header: MessageHeader, payload: &[u8]) -> Vec<u8> {
    let mut bytes: Vec<u8> = header.into();
    bytes.extend_from_slice(payload);
    bytes
}

fn request(service: &str, method: &str, payload: Vec<u8>) -> Vec<u8> {
    let request = Request {
        service: service.into(),
        method: method.into(),
        payload,
        ..Default::default()
    };
    framed_request(&request.write_to_bytes().unwrap())
}

fn framed_request(payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap();
    framed(MessageHeader::new_request(1, length), payload)
}

fn state_of(id: &str) -> Vec<u8> {
    let state = api::StateRequest {
        id: id.into(),
        ..Default::default()
    };
    request(TASK_V3, "State", state.write_to_bytes().unwrap())
}

/// What is answered to bytes that somebody sends; nothing if the connection ends.
async fn answer(stream: &mut UnixStream, bytes: &[u8]) -> Option<(Code, String)> {
    let answered = async {
        stream.write_all(bytes).await.ok()?;
        let header = MessageHeader::read_from(&mut *stream).await.ok()?;
        let mut payload = vec![0; usize::try_from(header.length).unwrap()];
        stream.read_exact(&mut payload).await.ok()?;
        let status = Response::parse_from_bytes(&payload).unwrap().status.unwrap();
        Some((status.code.enum_value().unwrap(), status.message))
    };
    tokio::time::timeout(Duration::from_secs(30), answered)
        .await
        .expect("an answer, or an end")
}

#[tokio::test]
async fn what_is_no_request_is_answered_so_and_others_go_on() {
    let bed = bed().await;
    let root = Root::new();
    let socket = root.0.join("task.sock");
    let mut server = bed.service.server(&socket).unwrap();
    server.start().await.unwrap();
    let found = std::fs::metadata(&socket).unwrap();
    assert!(found.file_type().is_socket());
    assert_eq!(found.permissions().mode() & 0o777, 0o600, "root alone");

    let mut other = UnixStream::connect(&socket).await.unwrap();
    let largest = u32::try_from(MESSAGE_LENGTH_MAX).unwrap();
    let over = framed(
        MessageHeader::new_request(1, largest + 1),
        &vec![0; MESSAGE_LENGTH_MAX + 1],
    );
    for (bytes, code, words) in [
        (
            over,
            Code::INVALID_ARGUMENT,
            "exceed maximum message size of 4194304",
        ),
        (framed_request(&[0xff; 64]), Code::INVALID_ARGUMENT, ""),
        (
            request(TASK_V3, "State", vec![0xff; 64]),
            Code::UNKNOWN,
            "Unpack request error",
        ),
        (
            request("containerd.task.v9.Task", "State", Vec::new()),
            Code::INVALID_ARGUMENT,
            "containerd.task.v9.Task service does not exist",
        ),
        (
            request(TASK_V3, "Nothing", Vec::new()),
            Code::UNIMPLEMENTED,
            "Nothing method",
        ),
        (
            framed(MessageHeader::new_request(2, 0), &[]),
            Code::INVALID_ARGUMENT,
            "must be odd",
        ),
        (state_of("../c1"), Code::NOT_FOUND, "../c1"),
    ] {
        let mut stream = UnixStream::connect(&socket).await.unwrap();
        let told = answer(&mut stream, &bytes).await.expect("an answer");
        assert!(
            told.0 == code && told.1.contains(words),
            "{told:?} is not {code:?}, {words}"
        );
        // The same connection goes on, and another one.
        for stream in [&mut stream, &mut other] {
            assert_eq!(answer(stream, &state_of("c1")).await.unwrap().0, Code::NOT_FOUND);
        }
    }
    // What promises more than it brings is not kept for it.
    for bytes in [
        vec![0xff; 64 << 10],
        framed(MessageHeader::new_request(1, u32::MAX), &[0; 9]),
        vec![0; 3],
    ] {
        let mut stream = UnixStream::connect(&socket).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        assert_eq!(
            answer(&mut other, &state_of("c1")).await.unwrap().0,
            Code::NOT_FOUND
        );
        stream.shutdown().await.unwrap();
        assert_eq!(answer(&mut stream, &[]).await, None);
    }
    server.shutdown().await.unwrap();
}

/// A bundle in a folder, with an empty root file system.
fn bundle(at: &Path) -> PathBuf {
    std::fs::create_dir_all(at.join("rootfs")).unwrap();
    let spec = r#"{"ociVersion":"1.2.0","root":{"path":"rootfs"},"process":{"user":{"uid":0,"gid":0},"cwd":"/","args":["a"]},"linux":{}}"#;
    std::fs::write(at.join("config.json"), spec).unwrap();
    at.to_owned()
}

impl Bed {
    async fn create(&self, request: api::CreateTaskRequest) -> Result<u32> {
        let served = Served(Arc::clone(&self.service));
        let answer = api::Task::create(&served, &TtrpcContext::default(), request).await;
        answer.map(|answer| answer.pid)
    }

    /// The request is refused so, and nothing is left of it.
    async fn refuses(&self, request: api::CreateTaskRequest, code: Code, words: &str) {
        let told = match self.create(request).await {
            Err(Error::RpcStatus(status)) => status,
            other => panic!("{words}: {other:?}"),
        };
        assert_eq!(told.code.enum_value(), Ok(code), "{words}: {}", told.message);
        assert!(told.message.contains(words), "{words}: {}", told.message);
        assert!(self.service.list().is_empty(), "{words}");
        assert!(lock(&self.guest.attached).is_empty(), "{words}");
        assert!(lock(&self.agent.created).is_empty(), "{words}");
    }
}

fn of(bundle: impl AsRef<Path>) -> api::CreateTaskRequest {
    api::CreateTaskRequest {
        id: "c1".into(),
        bundle: bundle.as_ref().to_str().unwrap().into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_bundle_is_a_folder_by_its_own_path() {
    let bed = bed().await;
    let root = Root::new();
    let at = |name: &str| root.0.join(name);
    let good = bundle(&at("good"));
    symlink(&good, at("link")).unwrap();
    let config = |name: &str| {
        let config = bundle(&at(name)).join("config.json");
        std::fs::remove_file(&config).unwrap();
        config
    };
    symlink(good.join("config.json"), config("linked")).unwrap();
    rustix::fs::mknodat(CWD, config("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    std::fs::create_dir(config("folder")).unwrap();
    let _socket = files::listen(&config("socket")).unwrap();
    std::fs::File::create(config("large"))
        .unwrap()
        .set_len(MAX_SPEC + 1)
        .unwrap();
    std::fs::write(config("text"), "{").unwrap();
    config("missing");
    for name in ["root-linked", "root-file"] {
        std::fs::remove_dir(bundle(&at(name)).join("rootfs")).unwrap();
    }
    symlink("/", at("root-linked").join("rootfs")).unwrap();
    std::fs::write(at("root-file").join("rootfs"), "").unwrap();

    let regular = "a regular file config.json";
    let up = format!("{}/x/../good", root.0.display());
    let long = format!("/{}", "x".repeat(5000));
    for (path, code, words) in [
        (PathBuf::new(), Code::INVALID_ARGUMENT, "is not an absolute path"),
        ("good".into(), Code::INVALID_ARGUMENT, "is not an absolute path"),
        (up.into(), Code::INVALID_ARGUMENT, "without \"..\""),
        ("/a\0b".into(), Code::INVALID_ARGUMENT, "is not a path"),
        (long.into(), Code::INVALID_ARGUMENT, "is not a path"),
        (at("nowhere"), Code::NOT_FOUND, "nowhere/config.json"),
        (good.join("config.json"), Code::INVALID_ARGUMENT, regular),
        (at("link"), Code::INVALID_ARGUMENT, regular),
        (at("linked"), Code::INVALID_ARGUMENT, regular),
        (at("fifo"), Code::INVALID_ARGUMENT, regular),
        (at("folder"), Code::INVALID_ARGUMENT, regular),
        (at("socket"), Code::INVALID_ARGUMENT, regular),
        (
            at("large"),
            Code::RESOURCE_EXHAUSTED,
            "is larger than 4194304 bytes",
        ),
        (at("text"), Code::INVALID_ARGUMENT, "text/config.json: EOF"),
        (at("missing"), Code::NOT_FOUND, "missing/config.json"),
        (
            at("root-linked"),
            Code::INVALID_ARGUMENT,
            "root-linked/rootfs: not a directory",
        ),
        (
            at("root-file"),
            Code::INVALID_ARGUMENT,
            "root-file/rootfs: not a directory",
        ),
    ] {
        bed.refuses(of(path), code, words).await;
    }
    // A link on the way to it is the host's affair: /var/run is one.
    symlink(&root.0, at("way")).unwrap();
    bed.create(of(at("way").join("good"))).await.unwrap();
}

#[tokio::test]
async fn what_a_container_cannot_have_is_named() {
    let bed = bed().await;
    let root = Root::new();
    let good = bundle(&root.0.join("good"));
    let mounted = |mounts: &[(&str, &str)]| {
        let mount = |(kind, source): &(&str, &str)| api::Mount {
            type_: (*kind).into(),
            source: (*source).into(),
            ..Default::default()
        };
        api::CreateTaskRequest {
            rootfs: mounts.iter().map(mount).collect(),
            ..of(&good)
        }
    };
    let two = [("bind", "/a"), ("bind", "/b")];
    bed.refuses(mounted(&two), Code::UNIMPLEMENTED, "several mounts")
        .await;
    let foreign = mounted(&[("nfs", "server:/")]);
    bed.refuses(foreign, Code::UNIMPLEMENTED, "type \"nfs\"").await;
    let relative = mounted(&[("bind", "rootfs")]);
    bed.refuses(relative, Code::INVALID_ARGUMENT, "not an absolute path")
        .await;
    let restored = api::CreateTaskRequest {
        checkpoint: "/saved".into(),
        ..of(&good)
    };
    bed.refuses(restored, Code::UNIMPLEMENTED, "restoring a checkpoint")
        .await;
    let logged = api::CreateTaskRequest {
        stdout: "binary:///bin/logger".into(),
        ..of(&good)
    };
    bed.refuses(logged, Code::INVALID_ARGUMENT, "binary:///bin/logger")
        .await;
    for id in ["", "../c1", "a/b", "-c1"] {
        let other = api::CreateTaskRequest {
            id: id.into(),
            ..of(&good)
        };
        bed.refuses(other, Code::INVALID_ARGUMENT, "identifier").await;
    }
    let config = good.join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let other = text.replace(r#""linux":{}"#, r#""linux":{"intelRdt":{}}"#);
    std::fs::write(&config, other).unwrap();
    bed.refuses(of(&good), Code::INVALID_ARGUMENT, "linux.intelRdt")
        .await;

    std::fs::write(&config, text).unwrap();
    bed.create(of(&good)).await.unwrap();
    let served = Served(Arc::clone(&bed.service));
    let saved = api::CheckpointTaskRequest {
        id: "c1".into(),
        path: root.0.join("saved").to_str().unwrap().into(),
        ..Default::default()
    };
    let told = api::Task::checkpoint(&served, &TtrpcContext::default(), saved).await;
    assert_eq!(
        told,
        Err(status(Code::UNIMPLEMENTED, "checkpoint is not supported"))
    );
}
