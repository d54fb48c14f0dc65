//! A held directory and what is done in it.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::time::Duration;

use rustix::fs::{
    AtFlags, FlockOperation, Gid, Mode, OFlags, RawDir, Uid, fchmod, fchown, flock, fsync,
    ftruncate, mkdirat, openat, renameat, unlinkat,
};
use rustix::io::Errno;

use super::acl::Acl;
use super::path::Symlinks;
use crate::secret::Secret;

/// The largest file that is read, in bytes. Trust bundles of large federations have some 100 KiB.
pub const MAX_FILE: usize = 16 * 1024 * 1024;

/// How often a lock that someone holds is tried again.
const LOCK_STEP: Duration = Duration::from_millis(5);

/// Who may do what with a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Access {
    /// Permission bits.
    pub mode: u32,
    /// Owner and group; `None` leaves them to the system.
    pub owner: Option<(u32, u32)>,
    /// The access control list, if there is more than the mode.
    pub acl: Option<Acl>,
}

impl Access {
    /// The owner alone: 0600.
    pub const PRIVATE: Self = Self {
        mode: 0o600,
        owner: None,
        acl: None,
    };
}

/// What a name stands for.
#[derive(Debug)]
pub enum Entry {
    /// A regular file.
    File {
        /// Its bytes.
        content: Secret<Vec<u8>>,
        /// Who may do what with it.
        access: Access,
    },
    /// A symbolic link, which was not followed.
    Link,
    /// A directory, socket, device or pipe.
    Other,
}

/// Operations in one directory. Names are single path components.
///
/// A trait so that a test can stop a writer before any one of them.
pub trait Folder: Sized {
    /// Makes a directory that only the owner enters, and holds it.
    fn make(&self, name: &str) -> io::Result<Self>;
    /// Holds a directory below this one; `None` if it is not there. `follow` goes through a link.
    fn enter(&self, name: &str, follow: bool) -> io::Result<Option<Self>>;
    /// Gives the directory itself this access control list, unless it has it.
    fn grant(&self, acl: &Acl) -> io::Result<()>;
    /// The names in here, sorted.
    fn names(&self) -> io::Result<Vec<String>>;
    /// What `name` is, without following a link; `None` if it is not there.
    fn look(&self, name: &str) -> io::Result<Option<Entry>>;
    /// Makes a new file with its final access before its content, and syncs it. Leaves nothing
    /// behind when it fails.
    fn create(&self, name: &str, content: &[u8], access: &Access) -> io::Result<()>;
    /// Writes over an existing file: first the bytes, then the length, so that it is never empty.
    /// Puts the old bytes back when that fails. `follow` goes through a link at `name`.
    fn overwrite(
        &self,
        name: &str,
        content: &[u8],
        acl: Option<&Acl>,
        follow: bool,
    ) -> io::Result<()>;
    /// Moves a file to `to`, over what is there.
    fn rename(&self, name: &str, folder: &Self, to: &str) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Removes an empty directory.
    fn remove_folder(&self, name: &str) -> io::Result<()>;
    /// Makes the names in here durable.
    fn sync(&self) -> io::Result<()>;
    /// Takes the directory's advisory lock, waiting at most `patience`. Says whether it was got.
    fn lock(&self, patience: Duration) -> io::Result<bool>;
    /// Releases the lock.
    fn unlock(&self) -> io::Result<()>;
}

/// An open directory.
#[derive(Debug)]
pub struct Dir(OwnedFd);

impl Dir {
    /// Opens a directory.
    pub fn open(path: &Path, symlinks: Symlinks) -> io::Result<Self> {
        symlinks.open(path).map(Self)
    }

    /// Opens a directory after making what is missing of its path, mode 0700 whatever the umask.
    /// Each part is made in its held parent, so that no link put there meanwhile leads elsewhere.
    pub fn open_or_make(path: &Path, symlinks: Symlinks) -> io::Result<Self> {
        let missing = match Self::open(path, symlinks) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => error,
            opened => return opened,
        };
        // `a/..` and names that are not text are for whoever makes directories by hand.
        let Some(name) = path.file_name().and_then(OsStr::to_str) else {
            return Err(missing);
        };
        let parent = match path.parent() {
            None => return Err(missing),
            Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
            Some(parent) => parent,
        };
        let parent = Self::open_or_make(parent, symlinks)?;
        match parent.make(name) {
            // Someone else was faster, or it is a link to nowhere.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                parent.enter(name, symlinks.follows())?.ok_or(error)
            }
            made => made,
        }
    }

    /// Permission bits, owner and group, and access control list of the directory itself.
    pub fn access(&self) -> io::Result<Access> {
        let stat = rustix::fs::fstat(&self.0)?;
        Ok(Access {
            mode: stat.st_mode & 0o7777,
            owner: Some((stat.st_uid, stat.st_gid)),
            acl: Acl::of(&self.0)?,
        })
    }

    /// Gives the directory itself this owner and access.
    pub fn adjust(&self, access: &Access) -> io::Result<()> {
        adjust(&self.0, access)
    }

    /// Gives a file this owner and access. A link is `ELOOP`; a file that has another name too is
    /// refused, because that name may be one that must not change hands.
    pub fn adjust_file(&self, name: &str, access: &Access) -> io::Result<()> {
        let file = File::from(openat(
            &self.0,
            name,
            READ | OFlags::NOFOLLOW,
            Mode::empty(),
        )?);
        let metadata = file.metadata()?;
        if !metadata.is_file() || metadata.nlink() != 1 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a regular file with one name",
            ));
        }
        adjust(&file, access)
    }

    /// Removes a file, or a directory with everything in it. Links are removed, not followed.
    pub fn remove_all(&self, name: &str) -> io::Result<()> {
        match unlinkat(&self.0, name, AtFlags::empty()) {
            Err(Errno::ISDIR | Errno::PERM) => {}
            removed => return Ok(removed?),
        }
        if let Some(inner) = self.enter(name, false)? {
            for below in inner.names()? {
                inner.remove_all(&below)?;
            }
        }
        self.remove_folder(name)
    }

    /// The bytes of a file; `None` if it is not there. A link at `name` is `ELOOP` unless `follow`.
    pub fn read(&self, name: &str, follow: bool) -> io::Result<Option<Secret<Vec<u8>>>> {
        match openat(&self.0, name, READ | no_follow(follow), Mode::empty()) {
            Ok(file) => read_file(&File::from(file)).map(|(content, _)| Some(content)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes the advisory lock of the file `name`, which is made if missing and stays; `None` if
    /// another process holds it.
    pub fn lock_file(&self, name: &str) -> io::Result<Option<FileLock>> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(&self.0, name, flags, Mode::from_raw_mode(0o600))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(FileLock(file))),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// A held advisory lock; dropping it releases the lock.
#[derive(Debug)]
pub struct FileLock(#[expect(dead_code, reason = "held for what dropping it does")] OwnedFd);

const READ: OFlags = OFlags::RDONLY
    .union(OFlags::CLOEXEC)
    .union(OFlags::NONBLOCK);

fn no_follow(follow: bool) -> OFlags {
    if follow {
        OFlags::empty()
    } else {
        OFlags::NOFOLLOW
    }
}

fn read_file(file: &File) -> io::Result<(Secret<Vec<u8>>, Access)> {
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        ));
    }
    let limit = u64::try_from(MAX_FILE).unwrap_or(u64::MAX);
    // Room for all of it and its end: two reads, and no copies of secrets left behind by a vector that
    // grows.
    let size = usize::try_from(metadata.len()).unwrap_or(MAX_FILE);
    let mut content = Vec::with_capacity(size.min(MAX_FILE).saturating_add(1));
    file.take(limit.saturating_add(1))
        .read_to_end(&mut content)?;
    if content.len() > MAX_FILE {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("larger than {MAX_FILE} bytes"),
        ));
    }
    let access = Access {
        mode: metadata.mode() & 0o7777,
        owner: Some((metadata.uid(), metadata.gid())),
        acl: Acl::of(file)?,
    };
    Ok((Secret::new(content), access))
}

fn fill(file: &File, content: &[u8], access: &Access) -> io::Result<()> {
    adjust(file, access)?;
    file.write_all_at(content, 0)?;
    Ok(fsync(file)?)
}

/// Gives an open file or directory its owner, then its list or mode.
fn adjust(file: impl AsFd + Copy, access: &Access) -> io::Result<()> {
    if let Some((user, group)) = access.owner {
        let stat = rustix::fs::fstat(file)?;
        if (stat.st_uid, stat.st_gid) != (user, group) {
            fchown(
                file,
                (stat.st_uid != user).then(|| Uid::from_raw(user)),
                (stat.st_gid != group).then(|| Gid::from_raw(group)),
            )?;
        }
    }
    match &access.acl {
        Some(acl) => give(file, acl),
        None => Ok(fchmod(file, Mode::from_raw_mode(access.mode))?),
    }
}

/// Gives a file or directory a list and reads it back: some file systems take one and keep less.
fn give(file: impl AsFd + Copy, acl: &Acl) -> io::Result<()> {
    acl.set(file)?;
    if Acl::of(file)?.as_ref() == Some(acl) {
        return Ok(());
    }
    Err(io::Error::other("the access control list was not kept"))
}

fn replace_content(file: &File, content: &[u8]) -> io::Result<()> {
    file.write_all_at(content, 0)?;
    ftruncate(file, u64::try_from(content.len()).unwrap_or(u64::MAX))?;
    Ok(fsync(file)?)
}

impl Folder for Dir {
    fn make(&self, name: &str) -> io::Result<Self> {
        mkdirat(&self.0, name, Mode::from_raw_mode(0o700))?;
        let made = self.enter(name, false)?.ok_or(Errno::NOENT)?;
        fchmod(&made.0, Mode::from_raw_mode(0o700))?;
        Ok(made)
    }

    fn enter(&self, name: &str, follow: bool) -> io::Result<Option<Self>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match openat(&self.0, name, flags | no_follow(follow), Mode::empty()) {
            Ok(fd) => Ok(Some(Self(fd))),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn grant(&self, acl: &Acl) -> io::Result<()> {
        if Acl::of(&self.0)?.as_ref() == Some(acl) {
            return Ok(());
        }
        give(&self.0, acl)
    }

    fn names(&self) -> io::Result<Vec<String>> {
        // A fresh description: reading a directory moves its position.
        let own = openat(
            &self.0,
            ".",
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let mut buffer = Vec::with_capacity(8192);
        let mut entries = RawDir::new(own, buffer.spare_capacity_mut());
        let mut names = Vec::new();
        while let Some(entry) = entries.next() {
            // Names that are not text are never ours.
            if let Ok(name) = entry?.file_name().to_str()
                && name != "."
                && name != ".."
            {
                names.push(name.to_owned());
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn look(&self, name: &str) -> io::Result<Option<Entry>> {
        let stat = match rustix::fs::statat(&self.0, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let kind = rustix::fs::FileType::from_raw_mode(stat.st_mode);
        if kind.is_symlink() {
            return Ok(Some(Entry::Link));
        }
        if !kind.is_file() {
            return Ok(Some(Entry::Other));
        }
        let file = openat(&self.0, name, READ | OFlags::NOFOLLOW, Mode::empty())?;
        let (content, access) = read_file(&File::from(file))?;
        Ok(Some(Entry::File { content, access }))
    }

    fn create(&self, name: &str, content: &[u8], access: &Access) -> io::Result<()> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = File::from(openat(&self.0, name, flags, Mode::from_raw_mode(0o600))?);
        let filled = fill(&file, content, access);
        if filled.is_err() {
            // The first error is the one that tells; a file that stays is cleaned at the next start.
            drop(self.remove(name));
        }
        filled
    }

    fn overwrite(
        &self,
        name: &str,
        content: &[u8],
        acl: Option<&Acl>,
        follow: bool,
    ) -> io::Result<()> {
        let old = self.read(name, follow).unwrap_or(None);
        let flags = OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | no_follow(follow);
        let file = File::from(openat(&self.0, name, flags, Mode::empty())?);
        if let Some(acl) = acl
            && Acl::of(&file)?.as_ref() != Some(acl)
        {
            give(&file, acl)?;
        }
        if content.is_empty() && old.as_ref().is_some_and(|old| old.expose().is_empty()) {
            // Whether it can be written was the question: there is nothing that a disk has to keep, and an
            // agent that starts does not wait for one.
            return Ok(());
        }
        let written = replace_content(&file, content);
        if let (Err(_), Some(old)) = (&written, old) {
            // As with `create`: the first error tells, and there is nothing better left to try.
            drop(replace_content(&file, old.expose()));
        }
        written
    }

    fn rename(&self, name: &str, folder: &Self, to: &str) -> io::Result<()> {
        Ok(renameat(&self.0, name, &folder.0, to)?)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        Ok(unlinkat(&self.0, name, AtFlags::empty())?)
    }

    fn remove_folder(&self, name: &str) -> io::Result<()> {
        Ok(unlinkat(&self.0, name, AtFlags::REMOVEDIR)?)
    }

    fn sync(&self) -> io::Result<()> {
        match fsync(&self.0) {
            // Some network and FUSE file systems cannot sync a directory.
            Err(Errno::INVAL | Errno::NOTSUP) => Ok(()),
            synced => Ok(synced?),
        }
    }

    fn lock(&self, patience: Duration) -> io::Result<bool> {
        let mut left = patience;
        loop {
            match flock(self.0.as_fd(), FlockOperation::NonBlockingLockExclusive) {
                // File systems without locks have no reader that could hold one; NFS locks nothing
                // that is not open for writing, and no directory is.
                Ok(()) | Err(Errno::NOTSUP | Errno::NOLCK | Errno::BADF) => return Ok(true),
                Err(Errno::WOULDBLOCK) if !left.is_zero() => {
                    std::thread::sleep(LOCK_STEP);
                    left = left.saturating_sub(LOCK_STEP);
                }
                Err(Errno::WOULDBLOCK) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn unlock(&self) -> io::Result<()> {
        Ok(flock(self.0.as_fd(), FlockOperation::Unlock)?)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::super::acl::Reader;
    use super::*;

    fn folder() -> (tempfile::TempDir, Dir) {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().canonicalize().unwrap();
        let dir = Dir::open(&path, Symlinks::Secure).unwrap();
        (base, dir)
    }

    fn text(entry: Option<Entry>) -> String {
        match entry {
            Some(Entry::File { content, .. }) => {
                String::from_utf8(content.expose().clone()).unwrap()
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn files_are_made_once_and_with_their_final_mode() {
        let (base, dir) = folder();
        let access = Access {
            mode: 0o666,
            ..Access::PRIVATE
        };
        dir.create("x", b"one", &access).unwrap();
        let mode = std::fs::metadata(base.path().join("x")).unwrap().mode();
        assert_eq!(mode & 0o7777, 0o666, "the umask has no say");
        assert!(dir.create("x", b"two", &access).is_err());
        assert_eq!(text(dir.look("x").unwrap()), "one");
        assert!(dir.look("y").unwrap().is_none());
    }

    #[test]
    fn overwriting_keeps_the_file_and_shortens_it() {
        let (base, dir) = folder();
        dir.create("x", b"a long text", &Access::PRIVATE).unwrap();
        let path = base.path().join("x");
        let inode = std::fs::metadata(&path).unwrap().ino();
        dir.overwrite("x", b"short", None, false).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"short");
        assert_eq!(std::fs::metadata(&path).unwrap().ino(), inode);
        assert!(dir.overwrite("missing", b"", None, false).is_err());
    }

    #[test]
    fn an_empty_file_that_stays_empty_is_not_written() {
        let (base, dir) = folder();
        dir.create("x", b"", &Access::PRIVATE).unwrap();
        let path = base.path().join("x");
        let written = || std::fs::metadata(&path).unwrap().modified().unwrap();
        let long_ago = std::time::SystemTime::UNIX_EPOCH;
        let file = File::options().write(true).open(&path).unwrap();
        file.set_modified(long_ago).unwrap();
        dir.overwrite("x", b"", None, false).unwrap();
        assert_eq!(written(), long_ago);
        dir.overwrite("x", b"no longer", None, false).unwrap();
        assert_ne!(written(), long_ago);
    }

    #[test]
    fn links_are_seen_and_not_followed() {
        let (base, dir) = folder();
        std::fs::write(base.path().join("target"), "t").unwrap();
        std::os::unix::fs::symlink("target", base.path().join("link")).unwrap();
        assert!(matches!(dir.look("link").unwrap(), Some(Entry::Link)));
        assert!(dir.overwrite("link", b"x", None, false).is_err());
        assert!(dir.read("link", false).is_err());
        dir.overwrite("link", b"x", None, true).unwrap();
        assert_eq!(dir.read("target", false).unwrap().unwrap().expose(), b"x");
        std::fs::create_dir(base.path().join("folder")).unwrap();
        assert!(matches!(dir.look("folder").unwrap(), Some(Entry::Other)));
        assert!(dir.read("folder", false).is_err());
    }

    #[test]
    fn a_lock_keeps_others_off_until_it_is_dropped() {
        let (_base, dir) = folder();
        let held = dir.lock_file("lock").unwrap().unwrap();
        assert!(dir.lock_file("lock").unwrap().is_none());
        drop(held);
        assert!(dir.lock_file("lock").unwrap().is_some());
    }

    #[test]
    fn missing_directories_are_made_private() {
        let (base, _dir) = folder();
        let path = base.path().canonicalize().unwrap().join("a/b");
        Dir::open_or_make(&path, Symlinks::Secure).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o700);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let kept = Dir::open_or_make(&path, Symlinks::Secure).unwrap();
        assert_eq!(
            kept.access().unwrap().mode,
            0o755,
            "what exists keeps its mode"
        );
    }

    #[test]
    fn access_lists_are_kept_by_the_file_system() {
        let (_base, dir) = folder();
        let acl = Acl::for_file(&[Reader::User(4242), Reader::Group(4243)]);
        let access = Access {
            acl: Some(acl.clone()),
            ..Access::PRIVATE
        };
        match dir.create("x", b"1", &access) {
            Ok(()) => {}
            Err(error) if Errno::from_io_error(&error) == Some(Errno::NOTSUP) => return,
            Err(error) => panic!("{error}"),
        }
        let Some(Entry::File { access, .. }) = dir.look("x").unwrap() else {
            panic!("no file");
        };
        assert_eq!(access.mode, 0o640);
        assert_eq!(access.acl, Some(acl));
    }
}
