// SPDX-License-Identifier: Apache-2.0
//! gRPC over unix sockets, both ends.

use hyper_util::rt::TokioIo;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use tokio::net::{UnixListener, UnixStream};
use tonic::transport::{Channel, Endpoint, Uri};

/// A channel to whoever listens on `path`.
///
/// # Errors
/// Nobody does.
pub async fn channel(path: &Path) -> Result<Channel, tonic::transport::Error> {
    // The name is never looked up.
    Endpoint::from_static("http://localhost")
        .connect_with_connector(connector(path))
        .await
}

/// The same, connected when it is first used. To be called in a runtime.
pub fn lazy_channel(path: &Path) -> Channel {
    Endpoint::from_static("http://localhost").connect_with_connector_lazy(connector(path))
}

type Connecting = std::pin::Pin<Box<dyn Future<Output = io::Result<TokioIo<UnixStream>>> + Send>>;

fn connector(
    path: &Path,
) -> impl tower::Service<Uri, Response = TokioIo<UnixStream>, Error = io::Error, Future = Connecting> + Send + use<>
{
    let path = path.to_owned();
    tower::service_fn(move |_: Uri| -> Connecting {
        let path = path.clone();
        Box::pin(async move { Ok(TokioIo::new(UnixStream::connect(path).await?)) })
    })
}

/// Listens on `path` for root alone. A socket that is there is somebody's who died: the caller holds the daemon's lock.
///
/// # Errors
/// The socket cannot be made.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    match std::fs::remove_file(path) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    // Made without rights for others from the first moment on.
    let mask = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(path);
    rustix::process::umask(mask);
    let listener = listener?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}
