//! Opening a directory by its path under a policy on symbolic links.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, open, openat2};
use rustix::io::Errno;

/// What symbolic links in a path mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Symlinks {
    /// A link anywhere in the path is an error. Needs Linux 5.6.
    Secure,
    /// As [`Symlinks::Secure`] where the system can tell; else links are followed, with one warning.
    #[default]
    TrySecure,
    /// Links are followed.
    Insecure,
}

impl Symlinks {
    /// Every policy, by its configuration word.
    pub const NAMES: [&'static str; 3] = ["try-secure", "secure", "insecure"];

    /// The configuration word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Secure => "secure",
            Self::TrySecure => "try-secure",
            Self::Insecure => "insecure",
        }
    }

    /// The policy of a configuration word.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Secure, Self::TrySecure, Self::Insecure]
            .into_iter()
            .find(|policy| policy.name() == name)
    }

    /// Whether links are followed on purpose.
    pub fn follows(self) -> bool {
        self == Self::Insecure
    }

    /// Opens a directory. `ELOOP` means that the policy refused a link.
    pub(super) fn open(self, path: &Path) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        if self == Self::Insecure {
            return Ok(open(path, flags, Mode::empty())?);
        }
        match openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS) {
            Err(error) if unsupported(error) => {
                if self == Self::Secure {
                    return Err(io::Error::new(
                        io::ErrorKind::Unsupported,
                        "this system cannot refuse symbolic links (openat2 is missing or \
                         forbidden): set symlinks: try-secure",
                    ));
                }
                warn_once(error);
                Ok(open(path, flags, Mode::empty())?)
            }
            opened => Ok(opened?),
        }
    }
}

/// Whether the system has no usable `openat2`: a kernel before 5.6, or a sandbox that forbids it.
/// A sandbox answers with the errors of a real refusal, so a path that must open is tried.
fn unsupported(error: Errno) -> bool {
    match error {
        Errno::NOSYS => true,
        Errno::PERM | Errno::ACCESS => {
            let probe = openat2(
                CWD,
                "/",
                OFlags::PATH | OFlags::CLOEXEC,
                Mode::empty(),
                ResolveFlags::NO_SYMLINKS,
            );
            matches!(probe, Err(Errno::PERM | Errno::ACCESS))
        }
        _ => false,
    }
}

fn warn_once(error: Errno) {
    static WARNED: AtomicBool = AtomicBool::new(false);
    if !WARNED.swap(true, Ordering::Relaxed) {
        tracing::warn!(
            %error,
            "This system cannot refuse symbolic links in paths; following them"
        );
    }
}

/// `path` without `.`, `..`, doubled and trailing slashes, by its text alone (Go's
/// `filepath.Clean`).
pub fn clean(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => match out.components().next_back() {
                Some(Component::Normal(_)) => {
                    out.pop();
                }
                Some(Component::RootDir) => {}
                _ => out.push(".."),
            },
            other => out.push(other),
        }
    }
    if out.as_os_str().is_empty() {
        out.push(".");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_cleaned_by_their_text() {
        for (path, cleaned) in [
            ("/a//b/", "/a/b"),
            ("/a/./b/../c", "/a/c"),
            ("/..", "/"),
            ("a/../..", ".."),
            ("./", "."),
            ("", "."),
        ] {
            assert_eq!(clean(Path::new(path)), Path::new(cleaned), "{path}");
        }
    }

    #[test]
    fn links_are_refused_unless_insecure() {
        let base = tempfile::tempdir().unwrap();
        let base = base.path().canonicalize().unwrap();
        std::fs::create_dir_all(base.join("real/below")).unwrap();
        std::os::unix::fs::symlink("real", base.join("link")).unwrap();
        for path in ["link", "link/below"] {
            for policy in [Symlinks::Secure, Symlinks::TrySecure] {
                let error = policy.open(&base.join(path)).unwrap_err();
                assert_eq!(Errno::from_io_error(&error), Some(Errno::LOOP), "{path}");
            }
            Symlinks::Insecure.open(&base.join(path)).unwrap();
        }
        Symlinks::Secure.open(&base.join("real/below")).unwrap();
        std::fs::write(base.join("file"), "").unwrap();
        for policy in [Symlinks::Secure, Symlinks::Insecure] {
            let error = policy.open(&base.join("file")).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::NotADirectory);
        }
    }
}
