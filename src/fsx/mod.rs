//! Files the careful way: every operation is relative to a held directory, follows links only where
//! it was told to, and leaves either what was there or what was asked for.
//!
//! Everything here but [`read_proc`] blocks (it syncs to disk): call it from a blocking thread.

pub mod acl;
mod dir;
mod path;
mod socket_file;

pub use dir::{Access, Dir, Entry, FileLock, Folder, MAX_FILE};
pub use path::{Symlinks, clean};
pub use socket_file::SocketFile;

use std::fs::File;
use std::io::{self, Read as _};

use crate::crypto::random;

/// What files of procfs come to, in bytes, as a rule.
const USUAL: usize = 4096;

/// What the kernel says in a file of procfs, up to `limit` bytes.
///
/// Such files have no size before they are read: without room, a vector is filled in steps of 32 bytes
/// and more, each of them a system call (eight for a `status`, instead of two).
///
/// # Errors
/// If the process has ended, or may not be looked at.
pub fn read_proc(path: impl AsRef<std::path::Path>, limit: u64) -> io::Result<Vec<u8>> {
    let mut content = Vec::with_capacity(USUAL);
    File::open(path)?.take(limit).read_to_end(&mut content)?;
    Ok(content)
}

/// A name part that no other writer has chosen.
pub fn unique() -> String {
    hex::encode(random::<8>())
}
