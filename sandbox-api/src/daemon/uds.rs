// SPDX-License-Identifier: Apache-2.0
//! gRPC over unix sockets, both ends.

use crate::files;
use hyper_util::rt::TokioIo;
use std::io;
use std::os::unix::fs::FileTypeExt;
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
/// Something else than a socket is there, which stays; or the socket cannot be made.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(parent) = path.parent() {
        files::make_private_dir(parent)?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => std::fs::remove_file(path)?,
        Ok(_) => {
            return Err(io::Error::other(
                "something is there that is no socket; remove it",
            ));
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    UnixListener::from_std(files::listen(path)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[tokio::test]
    async fn a_socket_of_the_dead_is_replaced_and_nothing_else() {
        let dir = std::env::temp_dir().join(format!("cloister-uds-{}", crate::ids::random_hex(4)));
        let path = dir.join("new").join("s.sock");
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        drop(listen(&path).unwrap());
        assert_eq!((mode(path.parent().unwrap()), mode(&path)), (0o700, 0o600));
        let listener = listen(&path).unwrap();
        let (connected, accepted) = tokio::join!(UnixStream::connect(&path), listener.accept());
        connected.unwrap();
        accepted.unwrap();
        for (target, what) in [(None, "a file"), (Some(&path), "a symbolic link to a socket")] {
            let other = dir.join("other");
            match target {
                None => std::fs::write(&other, "mine").unwrap(),
                Some(target) => std::os::unix::fs::symlink(target, &other).unwrap(),
            }
            let refused = listen(&other).unwrap_err().to_string();
            assert!(refused.contains("no socket"), "{what}: {refused}");
            std::fs::remove_file(&other).expect("it is left");
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
