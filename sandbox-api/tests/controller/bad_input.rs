// SPDX-License-Identifier: Apache-2.0
//! Requests that are none, too large, or about what is not there, and a state folder that cannot be used: the code says which
//! it was, nothing is half made, and others are served meanwhile.

use super::*;
use containerd_client::types::Sandbox;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Field 1, an id in every request, as bytes that are no text.
#[derive(Clone, PartialEq, Message)]
struct NoText {
    #[prost(bytes = "vec", tag = "1")]
    id: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
struct Nothing {}

impl Bed {
    /// Sends bytes to the controller's socket, and answers how many come back before the connection ends; it has to.
    async fn throw(&self, bytes: Vec<u8>) -> usize {
        let socket = self.dir.join("s.sock");
        let thrown = move || {
            let mut stream = UnixStream::connect(socket).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
            // It may be closed before all is written, or read.
            let _ = stream.write_all(&bytes);
            let mut answer = Vec::new();
            match stream.read_to_end(&mut answer) {
                Err(error) if error.kind() != std::io::ErrorKind::ConnectionReset => {
                    panic!("the connection goes on: {error}")
                }
                _ => answer.len(),
            }
        };
        tokio::task::spawn_blocking(thrown).await.unwrap()
    }

    async fn call_all(&mut self, id: &str) -> Vec<(&'static str, Result<(), Status>)> {
        let sandbox_id = id.to_owned();
        let platform = ControllerPlatformRequest {
            sandbox_id: sandbox_id.clone(),
            ..Default::default()
        };
        let wait = ControllerWaitRequest {
            sandbox_id: sandbox_id.clone(),
            ..Default::default()
        };
        let metrics = ControllerMetricsRequest {
            sandbox_id: sandbox_id.clone(),
            ..Default::default()
        };
        let update = ControllerUpdateRequest {
            sandbox_id,
            ..Default::default()
        };
        vec![
            ("Start", self.start(id).await),
            ("Platform", self.client.platform(k8s(platform)).await.map(drop)),
            ("Stop", self.stop(id).await),
            ("Wait", self.client.wait(k8s(wait)).await.map(drop)),
            ("Status", self.status(id).await.map(drop)),
            ("Shutdown", self.shutdown(id).await),
            ("Metrics", self.client.metrics(k8s(metrics)).await.map(drop)),
            ("Update", self.client.update(k8s(update)).await.map(drop)),
        ]
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_grpc_ends_its_connection_and_no_other() {
    let mut bed = bed("garbage").await;
    // One that says nothing, for as long as the others speak.
    let silent = UnixStream::connect(bed.dir.join("s.sock")).unwrap();
    for bytes in [
        vec![0; 64 << 10],
        vec![0xff; 64 << 10],
        b"GET /pods HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(),
        // The preface of HTTP/2, and a frame of the longest length there is.
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\x00\x00\x00\x00\x00\x01".to_vec(),
    ] {
        assert!(bed.throw(bytes.clone()).await < 1024, "{:?}", &bytes[..8]);
        assert_eq!(code(bed.status("a").await).0, Code::NotFound);
    }
    drop(silent);
    let elsewhere = bed.call::<_, Nothing>("Nothing", Nothing {}).await;
    assert_eq!(code(elsewhere).0, Code::Unimplemented);
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_cannot_be_read_are_refused() {
    let bed = bed("unread").await;
    for (method, expected) in [
        ("Create", Code::InvalidArgument),
        ("Start", Code::InvalidArgument),
        ("Platform", Code::InvalidArgument),
        ("Stop", Code::InvalidArgument),
        ("Wait", Code::InvalidArgument),
        ("Status", Code::InvalidArgument),
        ("Shutdown", Code::InvalidArgument),
        // gRPC's own word for it.
        ("Metrics", Code::Internal),
        ("Update", Code::Internal),
    ] {
        let no_text = NoText { id: vec![0xff; 8] };
        let (refused, message) = code(bed.call::<_, Nothing>(method, no_text).await);
        assert_eq!(refused, expected, "{method}: {message}");
        assert!(message.contains("decode"), "{method}: {message}");
    }
    assert_eq!(bed.left(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_has_a_limit() {
    let mut bed = bed("large").await;
    let with_annotation = |bytes: usize| {
        let mut pod = config(NamespaceMode::Pod);
        pod.annotations.insert("a".into(), "x".repeat(bytes));
        pod
    };
    for sandboxer in ["cloister", "worker"] {
        let request = ControllerCreateRequest {
            sandboxer: sandboxer.into(),
            ..creation("a", &with_annotation(4 << 20))
        };
        let (refused, message) = code(bed.create(request).await);
        assert_eq!(refused, Code::ResourceExhausted, "{sandboxer}: {message}");
        assert!(message.contains("larger than 4194304 bytes"), "{message}");
    }
    assert_eq!(bed.left(), [""; 0]);
    // The largest object that Kubernetes keeps.
    bed.create(creation("a", &with_annotation(3 << 19)))
        .await
        .unwrap();
    bed.shutdown("a").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_for_an_unknown_sandbox_is_told_so() {
    let mut bed = bed("unknown").await;
    for id in ["nobody", "../nobody"] {
        for (method, answer) in bed.call_all(id).await {
            let (refused, message) = code(answer);
            assert_eq!(refused, Code::NotFound, "{method}: {message}");
            assert!(message.contains(id), "{method}: {message}");
        }
    }
    assert_eq!(bed.left(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_that_cannot_be_read_changes_nothing() {
    let mut bed = bed("update").await;
    bed.create(creation("a", &config(NamespaceMode::Pod)))
        .await
        .unwrap();
    let update = |value: &[u8]| {
        let resources = prost_types::Any {
            type_url: "io.containerd.cri.v1/UpdatedResources".into(),
            value: value.to_vec(),
        };
        k8s(ControllerUpdateRequest {
            sandbox_id: "a".into(),
            sandbox: Some(Sandbox {
                extensions: [("updated-resources".to_owned(), resources)].into(),
                ..Default::default()
            }),
            ..Default::default()
        })
    };
    for value in [&b""[..], b"{", b"\xff\xff", br#"{"Resources":{"cpu_quota":"x"}}"#] {
        let (refused, message) = code(bed.client.update(update(value)).await);
        assert_eq!(refused, Code::InvalidArgument, "{message}");
        assert!(message.contains("updated-resources"), "{message}");
    }
    let (refused, message) = code(
        bed.client
            .update(update(br#"{"Resources":{"cpu_quota":1}}"#))
            .await,
    );
    assert_eq!(refused, Code::FailedPrecondition, "{message}");
    bed.shutdown("a").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_folders_nothing_is_half_made() {
    let mut bed = bed("folders").await;
    for (folder, sandboxer, expected) in [
        ("sandboxes", "cloister", Code::Unknown),
        ("workers", "worker", Code::Unavailable),
    ] {
        let path = bed.dir.join("state").join(folder);
        let _ = std::fs::remove_dir(&path);
        std::fs::write(&path, "").unwrap();
        let request = ControllerCreateRequest {
            sandboxer: sandboxer.into(),
            ..creation("a", &config(NamespaceMode::Pod))
        };
        let (refused, message) = code(bed.create(request.clone()).await);
        assert_eq!(refused, expected, "{message}");
        assert!(message.contains("sandbox a"), "{message}");
        assert!(message.contains(path.to_str().unwrap()), "{message}");
        assert_eq!(code(bed.status("a").await).0, Code::NotFound);
        // Nothing is in the way of another try.
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        bed.create(request).await.unwrap();
        bed.shutdown("a").await.unwrap();
    }
    bed.without_workers().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_and_pods_folders_are_roots() {
    let mut bed = bed("modes").await;
    let request = ControllerCreateRequest {
        sandboxer: "worker".into(),
        ..creation("a", &config(NamespaceMode::Pod))
    };
    bed.create(request).await.unwrap();
    let state = bed.dir.join("state");
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let workers = std::fs::read_dir(state.join("workers")).unwrap();
    let worker = workers.map(|entry| entry.unwrap().path()).next().unwrap();
    for folder in [
        &state,
        &state.join("sandboxes"),
        &state.join("sandboxes/a"),
        &worker,
    ] {
        assert_eq!(mode(folder), 0o700, "{}", folder.display());
    }
    let mut sockets = vec![bed.dir.join("s.sock"), state.join("admin.sock")];
    let of_worker = std::fs::read_dir(&worker)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    sockets.extend(of_worker.filter(|path| path.extension().is_some_and(|name| name == "sock")));
    assert_eq!(sockets.len(), 4, "{sockets:?}");
    for socket in &sockets {
        assert_eq!(mode(socket), 0o600, "{}", socket.display());
    }
    bed.shutdown("a").await.unwrap();
    bed.without_workers().await;
}
