//! Files the careful way: every operation is relative to a held directory, follows links only where
//! it was told to, and leaves either what was there or what was asked for.
//!
//! Everything here blocks (it syncs to disk): call it from a blocking thread.

pub mod acl;
mod dir;
mod path;

pub use dir::{Access, Dir, Entry, FileLock, Folder, MAX_FILE};
pub use path::{Symlinks, clean};

use crate::crypto::random;

/// A name part that no other writer has chosen.
pub fn unique() -> String {
    hex::encode(random::<8>())
}
