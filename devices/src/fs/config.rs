// SPDX-License-Identifier: Apache-2.0
//! What can be set for a file system device.

/// Longest tag, in bytes (virtio 1.3, section 5.11.4).
pub const TAG_MAX: usize = 36;

/// Settings of one file system device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FsConfig {
    /// The name that the guest mounts: 1 to 36 bytes.
    pub tag: String,
    /// Request queues, 1 to 64; Linux before 6.11 uses the first only. One per vCPU is best.
    pub request_queues: u16,
    /// Descriptors per queue: a power of two up to 32768. Linux makes no request with more segments than this, so
    /// 512 and up allow 1 MiB per request.
    pub queue_size: u16,
    /// Host descriptors that the guest may hold through nodes and open files. Beyond three quarters of it, nodes are
    /// kept as file handles where the host's file system has them; beyond all of it the guest gets ENFILE.
    pub fd_budget: usize,
    /// Nodes that the guest may hold, with or without a descriptor.
    pub max_nodes: usize,
    /// Let the guest delay writes in its page cache. Only sound if nobody else writes the same files.
    pub writeback: bool,
    /// Record locks and flocks reach the host, so that guests that share a volume see each other's.
    pub remote_locks: bool,
    /// POSIX ACLs: the guest keeps them in its attributes, and the host applies default ACLs.
    pub posix_acl: bool,
    /// Extended attributes. Without them the guest saves a request before the first write to each file, and file
    /// capabilities do not exist.
    pub xattr: bool,
    /// Birth times (STATX). Programs that ask for them, knowingly or not (Rust's standard library always does), then
    /// cost one more request for each file that they look at.
    pub birth_time: bool,
    /// Show mounts inside an attachment (and attachments themselves) as mounts with device numbers of their own.
    pub announce_submounts: bool,
}

impl Default for FsConfig {
    fn default() -> Self {
        Self {
            tag: "cloister".to_owned(),
            request_queues: 1,
            queue_size: 1024,
            fd_budget: 65_536,
            max_nodes: 4 << 20,
            writeback: false,
            remote_locks: false,
            posix_acl: false,
            xattr: true,
            birth_time: false,
            announce_submounts: false,
        }
    }
}

/// Why a device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The tag does not fit.
    #[error("file system tag {0:?} is not 1 to 36 bytes without NUL")]
    Tag(String),
    /// Queues that cannot be.
    #[error("{queues} request queues of size {size}: give 1 to 64, of a power of two from 8 to 32768")]
    Queues {
        /// Number of request queues.
        queues: u16,
        /// Size of each.
        size: u16,
    },
    /// The host lacks something.
    #[error("{what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The host's answer.
        #[source]
        source: std::io::Error,
    },
}

impl FsConfig {
    /// Checks the values.
    pub(super) fn check(&self) -> Result<(), FsError> {
        if self.tag.is_empty() || self.tag.len() > TAG_MAX || self.tag.contains('\0') {
            return Err(FsError::Tag(self.tag.clone()));
        }
        let size_fits = self.queue_size.is_power_of_two() && (8..=32_768).contains(&self.queue_size);
        if !(1..=64).contains(&self.request_queues) || !size_fits {
            return Err(FsError::Queues {
                queues: self.request_queues,
                size: self.queue_size,
            });
        }
        Ok(())
    }
}
