// SPDX-License-Identifier: Apache-2.0
//! Work in a pod's network namespace.
//!
//! A socket belongs for ever to the namespace of the thread that made it. So a thread is started that enters the namespace,
//! does the work with a runtime of its own, and ends: none of the daemon's threads ever changes its namespace, and none
//! stays.

use super::Error;
use rtnetlink::Handle;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::oneshot;

/// A network namespace, kept alive. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Netns {
    path: PathBuf,
    file: Arc<OwnedFd>,
}

impl Netns {
    /// Opens the one that is mounted at a path.
    ///
    /// # Errors
    /// There is none.
    pub fn open(path: &Path) -> Result<Self, Error> {
        // Should it be a fifo, nobody waits for its other end.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = rustix::fs::openat(CWD, path, flags, Mode::empty())
            .map_err(|e| Error::Io(format!("open the network namespace {}", path.display()), e.into()))?;
        Ok(Self {
            path: path.to_owned(),
            file: Arc::new(file),
        })
    }

    /// Does `work` in it, and answers what it answers. Goes on to its end even if nobody waits for that.
    ///
    /// # Errors
    /// The work's; no thread, no rights, or it is no network namespace.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl AsyncFnOnce(Handle) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        self.start(work)?
            .await
            .unwrap_or_else(|_| Err(self.failed(io::Error::other("its thread panicked"))))
    }

    /// As [`Netns::run`], without a runtime and without waiting.
    pub(super) fn start<T: Send + 'static>(
        &self,
        work: impl AsyncFnOnce(Handle) -> Result<T, Error> + Send + 'static,
    ) -> Result<oneshot::Receiver<Result<T, Error>>, Error> {
        let (sender, receiver) = oneshot::channel();
        let netns = self.clone();
        std::thread::Builder::new()
            .name("netns".into())
            .spawn(move || {
                let result = netns.work(work);
                // The namespace is let go before the caller hears of the end.
                drop(netns);
                drop(sender.send(result));
            })
            .map_err(|e| self.failed(e))?;
        Ok(receiver)
    }

    fn work<T>(&self, work: impl AsyncFnOnce(Handle) -> Result<T, Error>) -> Result<T, Error> {
        move_into_link_name_space(self.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(|e| self.failed(e.into()))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .map_err(|e| self.failed(e))?;
        runtime.block_on(async {
            let (connection, handle, _) =
                rtnetlink::new_connection().map_err(|e| Error::Io("open a netlink socket".into(), e))?;
            tokio::spawn(connection);
            work(handle).await
        })
    }

    fn failed(&self, error: io::Error) -> Error {
        Error::Io(
            format!("enter the network namespace {}", self.path.display()),
            error,
        )
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_no_namespace() {
        let missing = Netns::open(Path::new("/run/netns/none")).unwrap_err();
        assert!(missing.to_string().contains("/run/netns/none"));
        let file = Netns::open(Path::new("/proc/self/maps")).unwrap();
        let refused = file.run(async |_| Ok(())).await.unwrap_err();
        assert!(refused.to_string().contains("/proc/self/maps"));
    }
}
