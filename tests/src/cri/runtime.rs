// SPDX-License-Identifier: Apache-2.0
//! CRI for the pods of one runtime handler.

use super::api::runtime_service_client::RuntimeServiceClient;
use super::{Container, Outcome, PATIENCE, Pod, api, is_ours, script};
use hyper_util::rt::TokioIo;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use tokio::net::UnixStream;
use tokio::sync::OnceCell;
use tonic::transport::{Channel, Endpoint, Uri};

/// A runtime handler of the node. Clones are the same one.
#[derive(Debug, Clone)]
pub struct Runtime(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    handler: &'static str,
    handlers: Vec<&'static str>,
    dir: PathBuf,
    channel: Channel,
    shared: OnceCell<Container>,
}

/// The name of the code that an RPC failed with; what it says differs between runtimes, the code must not.
pub fn code<T>(answer: Result<T, tonic::Status>) -> String {
    match answer {
        Ok(_) => "Ok".to_owned(),
        Err(status) => format!("{:?}", status.code()),
    }
}

/// What is asked of containerd's own services, of which CRI's pods and containers are in this namespace.
pub fn k8s<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    let namespace = tonic::metadata::MetadataValue::from_static("k8s.io");
    request.metadata_mut().insert("containerd-namespace", namespace);
    request
}

impl Runtime {
    /// Of the containerd whose socket and pods' logs are in this folder; to be called in a runtime.
    pub fn new(dir: &Path, handler: &'static str, handlers: &[&'static str]) -> Self {
        let socket = dir.join("containerd.sock");
        let connector = tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
        });
        let channel = Endpoint::from_static("http://containerd")
            .timeout(PATIENCE)
            .connect_with_connector_lazy(connector);
        Self(Arc::new(Inner {
            handler,
            handlers: handlers.to_vec(),
            dir: dir.to_owned(),
            channel,
            shared: OnceCell::new(),
        }))
    }

    /// Its name.
    pub fn handler(&self) -> &'static str {
        self.0.handler
    }

    /// Its pods are virtual machines of ours.
    pub fn is_vm(&self) -> bool {
        is_ours(self.0.handler)
    }

    /// Of the handlers that the node has, this one and the others.
    pub fn siblings(&self) -> Vec<Self> {
        let of = |&handler| Self::new(&self.0.dir, handler, &self.0.handlers);
        self.0.handlers.iter().map(of).collect()
    }

    /// This handler, its containers' root file systems by one of [`SNAPSHOTTERS`](super::SNAPSHOTTERS).
    #[must_use]
    pub fn with_snapshotter(&self, snapshotter: &str) -> Self {
        let handler = format!("{}-{snapshotter}", self.0.handler).leak();
        Self::new(&self.0.dir, handler, &self.0.handlers)
    }

    /// containerd, with all its services.
    pub fn containerd(&self) -> Channel {
        self.0.channel.clone()
    }

    /// The runtime service itself.
    pub fn cri(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.containerd()).max_decoding_message_size(64 << 20)
    }

    /// A name that no other pod or container of the node has.
    pub fn name(&self, kind: &str) -> String {
        static NAMES: AtomicU32 = AtomicU32::new(0);
        let number = NAMES.fetch_add(1, Ordering::Relaxed);
        format!("{kind}-{}-{number}", self.handler())
    }

    /// A new folder on the node, for volumes.
    pub fn folder(&self, kind: &str) -> Outcome<PathBuf> {
        let path = self.0.dir.join("volumes").join(self.name(kind));
        std::fs::create_dir_all(&path)?;
        Ok(path)
    }

    /// Where cloisterd listens for containerd.
    pub fn sandboxer(&self) -> PathBuf {
        self.0.dir.join("cloister/sandboxer.sock")
    }

    /// Where pods keep their logs.
    pub(super) fn pods(&self) -> PathBuf {
        self.0.dir.join("pods")
    }

    /// A container of the image of tools that runs till the end, for cases that change nothing in it or its pod.
    pub async fn shared(&self) -> Outcome<&Container> {
        let make = async || -> Outcome<Container> {
            let pod = Pod::run(self, Pod::config(self)).await?;
            pod.start(script("trap 'exit 0' TERM; sleep infinity & wait"))
                .await
        };
        self.0.shared.get_or_try_init(make).await
    }

    /// Removes every pod of this handler that there still is.
    pub async fn clear(&self) -> Outcome {
        let request = api::ListPodSandboxRequest { filter: None };
        let pods = self.cri().list_pod_sandbox(request).await?.into_inner().items;
        for pod in pods
            .into_iter()
            .filter(|pod| pod.runtime_handler == self.handler())
        {
            Pod::of(self, pod).remove().await?;
        }
        Ok(())
    }
}
