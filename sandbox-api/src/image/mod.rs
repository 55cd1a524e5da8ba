// SPDX-License-Identifier: Apache-2.0
//! Container images: where they come from, and how they lie on the disk.
//!
//! An image comes from a registry, an OCI layout, an archive of docker or OCI, all of which end in the [`Store`] with each
//! layer unpacked once. A plain folder can be a root file system too; it never enters the store.

mod archive;
mod digest;
mod error;
mod import;
mod pack;
mod progress;
pub mod reference;
mod registry;
mod source;
mod store;
mod unpack;

pub use digest::Digest;
pub(crate) use digest::hex;
pub use error::{Error, Result};
pub use import::{import, load};
pub(crate) use pack::pack;
pub use progress::Progress;
pub use registry::{PullOptions, pull};
pub use source::Source;
pub use store::{Hold, Image, Store};
pub(crate) use unpack::{Limits, open_in, remove_tree, unpack};
