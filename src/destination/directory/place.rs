//! A directory at work.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use rustix::io::Errno;

use super::set::{self, Failure, Rules};
use super::{AclMode, Settings};
use crate::destination::{Destination, DestinationError, FileSet, Lock};
use crate::fsx::acl::{self, Acl};
use crate::fsx::{Access, Dir, Entry, FileLock, Folder as _, clean, unique};
use crate::secret::Secret;

/// Proves that the directory can be written; always empty, never removed.
const WRITE_TEST: &str = ".write-test";
/// The file whose lock keeps a second process off.
pub(super) const LOCK: &str = "lock";

/// A directory of files.
#[derive(Debug)]
pub(super) struct Place {
    inner: Arc<Inner>,
    absolute: PathBuf,
}

/// The directory's settings and what was found out about it.
#[derive(Debug)]
pub(super) struct Inner {
    pub(super) settings: Settings,
    /// What [`Inner::prepare`] found out; also keeps two writers of this process apart.
    rules: Mutex<Option<Rules>>,
}

impl Lock for FileLock {}

impl Place {
    pub(super) fn new(settings: Settings) -> Self {
        let absolute =
            std::path::absolute(&settings.path).unwrap_or_else(|_error| settings.path.clone());
        Self {
            absolute: clean(&absolute),
            inner: Arc::new(Inner::new(settings)),
        }
    }

    /// Runs `work` where blocking is allowed.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, DestinationError> + Send + 'static,
    ) -> Result<T, DestinationError> {
        let inner = Arc::clone(&self.inner);
        let path = inner.settings.path.display().to_string();
        tokio::task::spawn_blocking(move || work(&inner))
            .await
            .unwrap_or_else(|stopped| {
                Err(DestinationError::Io {
                    action: "use",
                    path,
                    source: io::Error::other(stopped),
                })
            })
    }
}

impl Inner {
    pub(super) fn new(settings: Settings) -> Self {
        Self {
            settings,
            rules: Mutex::new(None),
        }
    }

    pub(super) fn open(&self) -> Result<Dir, DestinationError> {
        Dir::open_or_make(&self.settings.path, self.settings.symlinks)
            .map_err(|error| self.explain("open", None, error))
    }

    pub(super) fn path_of(&self, name: Option<&str>) -> String {
        match name {
            None | Some(".") => self.settings.path.display().to_string(),
            Some(name) => self.settings.path.join(name).display().to_string(),
        }
    }

    pub(super) fn explain(
        &self,
        action: &'static str,
        name: Option<&str>,
        source: io::Error,
    ) -> DestinationError {
        let path = self.path_of(name);
        let unsuitable = |problem| DestinationError::Unsuitable {
            path: path.clone(),
            problem,
        };
        match Errno::from_io_error(&source) {
            Some(Errno::LOOP) => unsuitable(format!(
                "there is a symbolic link in this path, which symlinks: {} refuses: name the real \
                 path{} or set symlinks: insecure",
                self.settings.symlinks.name(),
                self.settings
                    .path
                    .canonicalize()
                    .map(|real| format!(" ({})", real.display()))
                    .unwrap_or_default()
            )),
            Some(Errno::NOTDIR | Errno::EXIST) if name.is_none() => {
                unsuitable("is not a directory: remove it or choose another path".to_owned())
            }
            _ => DestinationError::Io {
                action,
                path,
                source,
            },
        }
    }

    pub(super) fn failure(&self, failure: Failure) -> DestinationError {
        match failure {
            Failure::Io {
                action,
                name,
                source,
            } => self.explain(action, Some(&name), source),
            Failure::Unsuitable { name, problem } => DestinationError::Unsuitable {
                path: self.path_of(Some(&name)),
                problem: problem.to_owned(),
            },
        }
    }

    /// Opens the directory and, the first time, repairs what an earlier run left and finds out which
    /// access can be given. Runs `work` with both, one writer at a time.
    fn with<T>(
        &self,
        work: impl FnOnce(&Dir, &Rules) -> Result<T, DestinationError>,
    ) -> Result<T, DestinationError> {
        let mut held = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = self.open()?;
        let rules = match held.as_ref() {
            Some(rules) => rules,
            None => held.insert(self.prepare(&dir)?),
        };
        work(&dir, rules)
    }

    fn read(&self, dir: &Dir, name: &str) -> Result<Option<Secret<Vec<u8>>>, DestinationError> {
        let follow = self.settings.symlinks.follows();
        match set::within(dir, name, follow, |dir, name| dir.read(name, follow)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            read => read.map_err(|error| self.explain("read", Some(name), error)),
        }
    }

    fn prepare(&self, dir: &Dir) -> Result<Rules, DestinationError> {
        let readers = self.readers(dir)?;
        let rules = Rules {
            follow: self.settings.symlinks.follows(),
            acl: readers.as_deref().map(Acl::for_file),
            folder_acl: readers.as_deref().map(Acl::for_folder),
        };
        set::finish(dir, &rules).map_err(|failure| self.failure(failure))?;
        if let Err(Failure::Io { name, source, .. }) = set::clean(dir) {
            tracing::debug!(name, error = %source, "A leftover of an earlier run stays");
        }
        Ok(rules)
    }

    /// Who is to read every file, after proving that it can be granted.
    fn readers(&self, dir: &Dir) -> Result<Option<Vec<acl::Reader>>, DestinationError> {
        let settings = &self.settings;
        let path = self.path_of(None);
        let required = settings.acls == AclMode::Required;
        let unsuitable = |problem: String| DestinationError::Unsuitable {
            path: path.clone(),
            problem,
        };
        let access = dir
            .access()
            .map_err(|error| self.explain("inspect", None, error))?;
        let own = rustix::process::geteuid().as_raw();
        let owned = access.owner.is_some_and(|(user, _)| user == own);
        if settings.acls == AclMode::Off {
            if !settings.readers.is_empty() {
                tracing::info!(
                    path,
                    "acls is off: the destination's readers are not managed"
                );
            }
            return Ok(None);
        }
        if settings.readers.is_empty() {
            if !owned && access.acl.is_none() {
                if required {
                    return Err(unsuitable(format!(
                        "acls is required, but there are none, and the directory is not owned by \
                         this user ({own}): list readers and give the directory to this user"
                    )));
                }
                tracing::warn!(path, own, "The destination belongs to another user");
            }
            return Ok(None);
        }
        let readers = settings
            .readers
            .iter()
            .map(super::Reader::resolve)
            .collect::<Result<Vec<_>, _>>()
            .map_err(unsuitable)?;
        if !owned {
            tracing::warn!(
                path,
                own,
                "The destination belongs to another user: its readers cannot be managed"
            );
            return Ok(None);
        }
        if let Err(error) = test_acl(dir, &Acl::for_file(&readers)) {
            if required {
                return Err(unsuitable(format!(
                    "acls is required, but access control lists cannot be set here ({error}): \
                     mount a file system that has them (ext4, xfs, btrfs or tmpfs, not mounted with \
                     noacl), choose another directory, or set acls: try"
                )));
            }
            tracing::warn!(
                path,
                %error,
                "Access control lists cannot be set here: readers get no access"
            );
            return Ok(None);
        }
        dir.grant(&Acl::for_folder(&readers))
            .map_err(|error| self.explain("set the access control list of", None, error))?;
        Ok(Some(readers))
    }

    /// Warns of bot storage that others can read: whoever reads it is the bot.
    fn warn_of_others(&self, dir: &Dir) {
        let Ok(access) = dir.access() else { return };
        if access.mode & 0o077 != 0 {
            tracing::warn!(
                path = self.path_of(None),
                mode = format!("{:04o}", access.mode),
                "The bot's storage is open to other users: chmod it to 0700"
            );
        }
        let own = rustix::process::geteuid().as_raw();
        if access
            .owner
            .is_some_and(|(user, _)| user != own && own != 0)
        {
            tracing::warn!(
                path = self.path_of(None),
                "The bot's storage belongs to another user"
            );
        }
        if let Ok(Some(Entry::File { access, .. })) = dir.look("key")
            && access.mode & 0o077 != 0
        {
            tracing::warn!(
                path = self.path_of(Some("key")),
                mode = format!("{:04o}", access.mode),
                "The bot's key can be read by other users: chmod it to 0600"
            );
        }
    }
}

/// Gives a file that nobody looks for the list, and reads it back.
pub(super) fn test_acl(dir: &Dir, acl: &Acl) -> io::Result<()> {
    let name = format!(".tbot-tmp-{}", unique());
    let access = Access {
        acl: Some(acl.clone()),
        ..Access::PRIVATE
    };
    dir.create(&name, b"", &access)?;
    let kept = dir.look(&name);
    dir.remove(&name)?;
    match kept? {
        Some(Entry::File { access, .. }) if access.acl.as_ref() == Some(acl) => Ok(()),
        _ => Err(io::Error::other("the list was not kept")),
    }
}

#[async_trait]
impl Destination for Place {
    async fn init(&self) -> Result<(), DestinationError> {
        self.blocking(|inner| inner.with(|_, _| Ok(()))).await
    }

    async fn check_writable(&self) -> Result<(), DestinationError> {
        self.blocking(|inner| {
            inner.with(|dir, rules| {
                let overwrite = || dir.overwrite(WRITE_TEST, b"", rules.acl.as_ref(), rules.follow);
                let access = Access {
                    acl: rules.acl.clone(),
                    ..Access::PRIVATE
                };
                let tested = match dir.look(WRITE_TEST) {
                    Ok(Some(_)) => overwrite(),
                    Ok(None) => match dir.create(WRITE_TEST, b"", &access) {
                        // Another output writes here too, and was faster.
                        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => overwrite(),
                        created => created,
                    },
                    Err(error) => Err(error),
                };
                tested.map_err(|error| inner.explain("write", Some(WRITE_TEST), error))
            })
        })
        .await
    }

    async fn write(&self, files: FileSet) -> Result<(), DestinationError> {
        self.blocking(move |inner| {
            inner.with(|dir, rules| {
                set::write(dir, &files, rules).map_err(|failure| inner.failure(failure))
            })
        })
        .await
    }

    async fn read(&self, name: &str) -> Result<Option<Secret<Vec<u8>>>, DestinationError> {
        let name = name.to_owned();
        self.blocking(move |inner| {
            let settings = &inner.settings;
            match Dir::open(&settings.path, settings.symlinks) {
                Ok(dir) => inner.read(&dir, &name),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(inner.explain("open", None, error)),
            }
        })
        .await
    }

    fn lock(&self) -> Result<Option<Box<dyn Lock>>, DestinationError> {
        let dir = self.inner.open()?;
        self.inner.warn_of_others(&dir);
        match dir.lock_file(LOCK) {
            Ok(Some(lock)) => Ok(Some(Box::new(lock))),
            Ok(None) => Err(DestinationError::Locked {
                path: self.inner.path_of(Some(LOCK)),
            }),
            Err(error) => Err(self.inner.explain("lock", Some(LOCK), error)),
        }
    }

    fn is_persistent(&self) -> bool {
        true
    }

    fn directory(&self) -> Option<&Path> {
        Some(&self.absolute)
    }
}
