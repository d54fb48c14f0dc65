//! Private files of the data directory: ours, closed to others, never through a link.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt};
use std::path::Path;

use rustix::fs::OFlags;
use rustix::io::Errno;

/// Opens the file at `path` with `options`, made with mode 0600 if missing, and closes it to
/// others.
///
/// # Errors
/// The system's, and others if the file is a symbolic link, no file, or somebody else's: whoever
/// can put one there would choose what the cluster reads and where it writes.
pub(super) fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let file = options.mode(0o600).custom_flags(flags).open(path);
    let file = file.map_err(|error| match Errno::from_io_error(&error) {
        Some(Errno::LOOP) => io::Error::other("it is a symbolic link; remove it"),
        _ => error,
    })?;
    let metadata = file.metadata()?;
    owned(&metadata)?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is no file; remove it"));
    }
    file.set_permissions(PermissionsExt::from_mode(0o600))?;
    Ok(file)
}

/// Refuses what belongs to another user.
pub(super) fn owned(metadata: &Metadata) -> io::Result<()> {
    let (owner, own) = (metadata.uid(), nix::unistd::geteuid().as_raw());
    if owner == own {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::PermissionDenied,
        format!("it belongs to the user with id {owner}, the cluster runs as {own}; chown it"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn append(path: &Path) -> io::Result<File> {
        open(path, OpenOptions::new().append(true).create(true))
    }

    #[test]
    fn links_and_files_of_others_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("file"), "").unwrap();
        std::fs::set_permissions(path("file"), PermissionsExt::from_mode(0o666)).unwrap();
        for name in ["file", "new"] {
            let mode = append(&path(name)).unwrap().metadata().unwrap().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
        std::os::unix::fs::symlink(path("file"), path("link")).unwrap();
        std::os::unix::fs::symlink(path("nowhere"), path("dangling")).unwrap();
        for name in ["link", "dangling"] {
            let error = append(&path(name)).unwrap_err().to_string();
            assert!(error.contains("symbolic link"), "{error}");
        }
        assert!(!path("nowhere").exists());
        assert!(append(dir.path()).is_err());
        if nix::unistd::geteuid().is_root() {
            std::os::unix::fs::chown(path("file"), Some(12345), None).unwrap();
            let error = append(&path("file")).unwrap_err().to_string();
            assert!(error.contains("id 12345, the cluster runs as 0"), "{error}");
        }
    }
}
