//! This program's path and those of destinations, as texts for other programs have them.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

/// The path that this program was started by, if that is a link to it: a link survives an update,
/// the file behind it does not. Otherwise the program's file.
pub(crate) fn program() -> PathBuf {
    let file = std::env::current_exe().unwrap_or_else(|_error| PathBuf::from("tbot"));
    let started = std::env::args_os().next().map(PathBuf::from);
    stable(started, file)
}

fn stable(started: Option<PathBuf>, file: PathBuf) -> PathBuf {
    started
        .filter(|path| path.is_absolute())
        .filter(|path| path.canonicalize().is_ok_and(|real| real == file))
        .unwrap_or(file)
}

/// The path as text.
pub(crate) fn text(path: &Path) -> anyhow::Result<&str> {
    path.to_str().with_context(|| {
        format!(
            "the path {} is not text and cannot be written down",
            path.display()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_to_this_program_is_kept() {
        let base = tempfile::tempdir().unwrap();
        let base = base.path().canonicalize().unwrap();
        let (file, link) = (base.join("tbot-1.2"), base.join("tbot"));
        std::fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        for (started, expected) in [
            (Some(link.clone()), &link),
            (Some(PathBuf::from("tbot")), &file),
            (Some(base.join("other")), &file),
            (None, &file),
        ] {
            assert_eq!(stable(started, file.clone()), *expected);
        }
    }
}
