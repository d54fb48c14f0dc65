//! Making a directory ready for an agent that another user runs: `tbot init`.
//!
//! It runs as root in a directory that another user may change meanwhile. Every name is opened
//! without following links, and what has a second name is not given away.

use std::io;

use rustix::io::Errno;

use super::place::{self, Inner};
use super::set::{self, Rules};
use super::{AclMode, Reader};
use crate::destination::{DestinationError, Preparation};
use crate::fsx::acl::{self, Acl};
use crate::fsx::{Access, Dir, Entry, Folder as _};

/// Files that an agent writes under names that nobody knows beforehand, or for itself.
fn is_own(name: &str) -> bool {
    const NAMES: &[&str] = &[
        place::LOCK,
        "known_hosts",
        "kubeconfig-proxied.yaml",
        "ssh_config",
    ];
    NAMES.contains(&name)
        || name.ends_with(".ssh_config")
        || name.ends_with(".known_hosts")
        || name.starts_with(".tbot-")
        || name.starts_with(".slot-")
}

/// A user of this machine, or a number.
#[derive(Debug, Clone, Copy)]
struct Account {
    user: u32,
    /// The primary group, if the user is known.
    group: Option<u32>,
}

impl Account {
    fn find(name: &str) -> Result<Self, String> {
        let user = match Reader::User(name.to_owned()).number()? {
            acl::Reader::User(id) | acl::Reader::Group(id) => id,
        };
        let known = nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(user));
        Ok(Self {
            user,
            group: known.ok().flatten().map(|known| known.gid.as_raw()),
        })
    }
}

/// Makes everything that is missing, removes what is in the way, hands everything over.
pub(super) fn prepare(inner: &Inner, how: &Preparation) -> Result<(), DestinationError> {
    let dir = inner.open()?;
    let rules = Rules {
        follow: inner.settings.symlinks.follows(),
        ..Rules::default()
    };
    set::finish(&dir, &rules).map_err(|failure| inner.failure(failure))?;
    set::clean(&dir).map_err(|failure| inner.failure(failure))?;
    let unsuitable = |problem| DestinationError::Unsuitable {
        path: inner.path_of(None),
        problem,
    };
    let accounts = accounts(inner, &dir, how)?;
    let owner = owner(how, accounts).map_err(unsuitable)?;
    let (file, folder) = access(owner, accounts);
    if accounts.is_some_and(|(_, reader)| reader.user == owner.0) {
        tracing::warn!(
            path = inner.path_of(None),
            "The reader is to own the files: OpenSSH will refuse a key that others may read too"
        );
    }
    strangers(inner, &dir, how)?;
    let hand_over = |name: Option<&str>, error: io::Error| match Errno::from_io_error(&error) {
        Some(Errno::PERM | Errno::ACCESS) => DestinationError::Unsuitable {
            path: inner.path_of(name),
            problem: format!(
                "cannot be given to {}:{} by this user ({error}): run `tbot init` as root",
                owner.0, owner.1
            ),
        },
        _ => inner.explain("hand over", name, error),
    };
    dir.adjust(&folder)
        .map_err(|error| hand_over(None, error))?;
    for name in &how.files {
        set::check_name(name).map_err(|failure| inner.failure(failure))?;
        set::make_room(&dir, name, &rules).map_err(|failure| inner.failure(failure))?;
        let made = set::within(&dir, name, rules.follow, |below, name| {
            if below.look(name)?.is_none() {
                below.create(name, b"", &Access::PRIVATE)?;
            }
            Ok(())
        });
        made.map_err(|error| inner.explain("create", Some(name), error))?;
        set::within(&dir, name, rules.follow, |below, leaf| {
            if leaf != name {
                below.adjust(&folder)?;
            }
            below.adjust_file(leaf, &file)
        })
        .map_err(|error| hand_over(Some(name), error))?;
    }
    tracing::info!(
        path = inner.path_of(None),
        owner = format!("{}:{}", owner.0, owner.1),
        files = how.files.len(),
        "The destination is ready"
    );
    Ok(())
}

/// The bot's and the reader's accounts, if access control lists are to be used and can be.
fn accounts(
    inner: &Inner,
    dir: &Dir,
    how: &Preparation,
) -> Result<Option<(Account, Account)>, DestinationError> {
    let mode = inner.settings.acls;
    if mode == AclMode::Off {
        return Ok(None);
    }
    let tried = match (&how.bot_user, &how.reader_user) {
        (Some(bot), Some(reader)) => Account::find(bot)
            .and_then(|bot| Ok((bot, Account::find(reader)?)))
            .and_then(|(bot, reader)| {
                let list = Acl::shared_file(
                    &[acl::Reader::User(bot.user)],
                    &[acl::Reader::User(reader.user)],
                );
                place::test_acl(dir, &list)
                    .map(|()| (bot, reader))
                    .map_err(|error| format!("access control lists cannot be set here ({error})"))
            }),
        _ => Err(
            "without both --bot-user and --reader-user there is nobody to grant access to"
                .to_owned(),
        ),
    };
    let path = inner.path_of(None);
    match tried {
        Ok(both) => Ok(Some(both)),
        Err(problem) if mode == AclMode::Required => Err(DestinationError::Unsuitable {
            path,
            problem: format!("acls is required: {problem}"),
        }),
        Err(problem) => {
            tracing::warn!(
                path,
                problem,
                "No access control lists: only the owner has access"
            );
            Ok(None)
        }
    }
}

/// Who is to own everything, as numbers.
fn owner(how: &Preparation, accounts: Option<(Account, Account)>) -> Result<(u32, u32), String> {
    let Some(text) = &how.owner else {
        return match accounts {
            None => Ok((
                rustix::process::geteuid().as_raw(),
                rustix::process::getegid().as_raw(),
            )),
            Some((bot, _)) => {
                let group = bot.group.ok_or_else(|| {
                    format!(
                        "the user {} has no group on this machine: say --owner USER:GROUP",
                        bot.user
                    )
                })?;
                Ok((bot.user, group))
            }
        };
    };
    let mut parts = text.split(':');
    let (Some(user), Some(group), None) = (parts.next(), parts.next(), parts.next()) else {
        return Err(format!("--owner {text:?} is not USER:GROUP"));
    };
    let id = |who: Reader| match who.number()? {
        acl::Reader::User(id) | acl::Reader::Group(id) => Ok::<u32, String>(id),
    };
    Ok((
        id(Reader::User(user.to_owned()))?,
        id(Reader::Group(group.to_owned()))?,
    ))
}

/// What files and directories get.
fn access(owner: (u32, u32), accounts: Option<(Account, Account)>) -> (Access, Access) {
    let others = |account: Account| {
        let named = (account.user != owner.0).then_some(acl::Reader::User(account.user));
        named.into_iter().collect::<Vec<_>>()
    };
    let lists = accounts.map(|(bot, reader)| (others(bot), others(reader)));
    let lists = lists.filter(|(bot, reader)| !bot.is_empty() || !reader.is_empty());
    let of = |mode, list: fn(&[acl::Reader], &[acl::Reader]) -> Acl| Access {
        mode,
        owner: Some(owner),
        acl: lists.as_ref().map(|(bot, reader)| list(bot, reader)),
    };
    (of(0o600, Acl::shared_file), of(0o700, Acl::shared_folder))
}

/// Tells of what is in the directory and not an agent's, or removes it.
fn strangers(inner: &Inner, dir: &Dir, how: &Preparation) -> Result<(), DestinationError> {
    let list = |error| inner.explain("list", None, error);
    let mut found = Vec::new();
    for name in dir.names().map_err(list)? {
        if how.files.contains(&name) || is_own(&name) {
            continue;
        }
        let inside = format!("{name}/");
        if !how.files.iter().any(|file| file.starts_with(&inside)) {
            found.push(name);
            continue;
        }
        let Some(below) = dir.enter(&name, false).map_err(list)? else {
            continue;
        };
        let below = below.names().map_err(list)?;
        let below = below.iter().map(|below| format!("{name}/{below}"));
        found.extend(below.filter(|name| !how.files.contains(name)));
    }
    for name in found {
        let path = inner.path_of(Some(&name));
        if !how.clean {
            tracing::warn!(path, "No agent writes this; --clean removes it");
            continue;
        }
        set::within(dir, &name, false, Dir::remove_all)
            .map_err(|error| inner.explain("remove", Some(&name), error))?;
        tracing::info!(path, "Removed what no agent writes");
    }
    // What is left under a name of ours has to be a file.
    for name in &how.files {
        let looked = set::within(dir, name, false, Dir::look);
        if let Ok(Some(Entry::Link | Entry::Other)) = looked {
            return Err(DestinationError::Unsuitable {
                path: inner.path_of(Some(name)),
                problem: "is not a regular file: remove it".to_owned(),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "prepare_tests.rs"]
mod tests;
