//! What an installation changes on disk, and what it can tell about the service's user.

use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};

use nix::unistd::{Gid, Group, Uid, User, chown};

use super::InstallError;
use super::paths::Access;

/// What became of the unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// The file was there with exactly this content.
    Unchanged,
    /// The file is new or was replaced.
    Changed,
}

/// Writes the unit, mode 0644, in one step. One that differs is kept unless `force`; an empty one
/// counts as absent.
///
/// # Errors
/// The unit differs, or its directory cannot be written.
pub fn write_unit(path: &Path, text: &str, force: bool) -> Result<Written, InstallError> {
    match std::fs::read(path) {
        Ok(old) if old == text.as_bytes() => return Ok(Written::Unchanged),
        Ok(old) if !old.is_empty() && !force => {
            return Err(InstallError::Differs {
                path: path.to_owned(),
            });
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(failed("read", path, source)),
    }
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(&temporary)
        .and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.set_permissions(std::fs::Permissions::from_mode(0o644))?;
            file.sync_all()
        })
        .and_then(|()| std::fs::rename(&temporary, path));
    written.map_err(|source| {
        // The old unit, if any, is untouched; only our own temporary goes.
        let _removed = std::fs::remove_file(&temporary);
        failed("write", path, source)
    })?;
    Ok(Written::Changed)
}

/// The account that the service runs as.
#[derive(Clone, Debug)]
pub struct Account {
    user: User,
    group: Gid,
}

/// Looks the account up; the error is what to tell the user, remedy included.
///
/// # Errors
/// User or group does not exist.
pub fn account(user: &str, group: &str) -> Result<Account, String> {
    let found = User::from_name(user).ok().flatten().ok_or_else(|| {
        format!(
            "the user {user} does not exist: create it with \
             `useradd --system --user-group --home-dir /var/lib/teleport --shell /usr/sbin/nologin {user}`"
        )
    })?;
    let gid = Group::from_name(group)
        .ok()
        .flatten()
        .map(|group| group.gid)
        .ok_or_else(|| {
            format!("the group {group} does not exist: create it with `groupadd --system {group}`")
        })?;
    Ok(Account {
        user: found,
        group: gid,
    })
}

/// Makes the directories that systemd does not make, with missing ones above them; each new one
/// that the agent writes to is the account's. Returns one line for each that was made, then one for
/// each that the account may be unable to write.
///
/// # Errors
/// A directory that cannot be made or given away.
pub fn make_directories(
    access: &Access,
    account: &Account,
) -> Result<(Vec<String>, Vec<String>), InstallError> {
    let (mut made, mut doubtful) = (Vec::new(), Vec::new());
    let private = access.private.iter().map(|path| (path, 0o700));
    let shared = access.shared.iter().map(|path| (path, 0o755));
    for (path, mode) in private.chain(shared) {
        match std::fs::metadata(path) {
            Ok(found) if found.is_dir() => {
                if !account.may(&found, 0o3) {
                    doubtful.push(format!(
                        "{} exists and {} may not write to it: `chown {} {}`, or choose another path",
                        path.display(),
                        account.user.name,
                        account.user.name,
                        path.display()
                    ));
                }
            }
            Ok(_) => doubtful.push(format!("{} is no directory", path.display())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                make(path, mode, account)?;
                made.push(format!(
                    "made {} (mode {mode:04o}) for {}",
                    path.display(),
                    account.user.name
                ));
            }
            Err(source) => return Err(failed("look at", path, source)),
        }
    }
    Ok((made, doubtful))
}

fn make(path: &Path, mode: u32, account: &Account) -> Result<(), InstallError> {
    if let Some(parent) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(parent)
            .map_err(|source| failed("make", parent, source))?;
    }
    DirBuilder::new()
        .mode(mode)
        .create(path)
        .and_then(|()| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)))
        .and_then(|()| {
            chown(path, Some(account.user.uid), Some(account.group)).map_err(io::Error::from)
        })
        .map_err(|source| failed("make", path, source))
}

/// What to do if the account cannot read `file`; `None` if it can, or if there is no such file.
pub fn unreadable_by(file: &Path, account: &Account) -> Option<String> {
    let found = std::fs::metadata(file).ok()?;
    if account.may(&found, 0o4) {
        return None;
    }
    let (shown, group) = (
        file.display(),
        Group::from_gid(account.group).ok().flatten(),
    );
    let group = group.map_or_else(|| account.group.to_string(), |group| group.name);
    Some(format!(
        "{} may not read {shown}: `chgrp {group} {shown} && chmod g+r {shown}`",
        account.user.name
    ))
}

impl Account {
    /// Whether the mode bits grant `bits` (4 read, 2 write, 1 enter). Lists of access rules are not
    /// looked at.
    fn may(&self, found: &std::fs::Metadata, bits: u32) -> bool {
        if self.user.uid.is_root() {
            return true;
        }
        let shift = if Uid::from_raw(found.uid()) == self.user.uid {
            6
        } else if [self.group, self.user.gid].contains(&Gid::from_raw(found.gid())) {
            3
        } else {
            0
        };
        (found.mode() >> shift) & bits == bits
    }
}

fn failed(action: &'static str, path: &Path, source: io::Error) -> InstallError {
    InstallError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn me() -> Account {
        let user = User::from_uid(Uid::current()).unwrap().unwrap();
        let group = user.gid;
        Account { user, group }
    }

    #[test]
    fn a_unit_is_replaced_only_on_purpose() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tbot.service");
        std::fs::write(&path, "").unwrap();
        assert_eq!(write_unit(&path, "a\n", false).unwrap(), Written::Changed);
        assert_eq!(write_unit(&path, "a\n", false).unwrap(), Written::Unchanged);
        let refused = write_unit(&path, "b\n", false).unwrap_err().to_string();
        assert!(refused.contains("--force"), "{refused}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "a\n");
        assert_eq!(write_unit(&path, "b\n", true).unwrap(), Written::Changed);
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o644);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(write_unit(&dir.path().join("no/x.service"), "a", false).is_err());
    }

    #[test]
    fn directories_are_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let access = Access {
            private: [dir.path().join("a/output")].into(),
            shared: [dir.path().join("b/socket")].into(),
            ..Access::default()
        };
        let (made, doubtful) = make_directories(&access, &me()).unwrap();
        assert_eq!((made.len(), doubtful.len()), (2, 0));
        let mode = |p: &str| std::fs::metadata(dir.path().join(p)).unwrap().mode() & 0o777;
        assert_eq!((mode("a/output"), mode("b/socket")), (0o700, 0o755));
        let (made, doubtful) = make_directories(&access, &me()).unwrap();
        assert_eq!((made.len(), doubtful.len()), (0, 0));
    }

    #[test]
    fn a_missing_user_gets_the_command_that_makes_it() {
        let text = account("no-such-user-here", "root").unwrap_err();
        assert!(text.contains("useradd --system"), "{text}");
        let text = account("root", "no-such-group-here").unwrap_err();
        assert!(text.contains("groupadd --system"), "{text}");
    }

    #[test]
    fn mode_bits_decide() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tbot.yaml");
        std::fs::write(&file, "x").unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        let Some(stranger) = User::from_name("nobody").unwrap() else {
            return;
        };
        let group = stranger.gid;
        let stranger = Account {
            user: stranger,
            group,
        };
        let text = unreadable_by(&file, &stranger).unwrap();
        assert!(text.contains("chmod g+r"), "{text}");
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o604)).unwrap();
        assert_eq!(unreadable_by(&file, &stranger), None);
        assert_eq!(unreadable_by(Path::new("/no/such/file"), &stranger), None);
    }
}
