//! Replacing several files as one set, so that a stop at any instruction leaves the old set or the
//! new one (`docs/adr/0006-file-sets.md`).
//!
//! A new set is written whole into a draft directory inside the destination, synced, and committed
//! by renaming the draft to [`STAGED`]. What is in there is then moved out, file by file, over the
//! old names; whoever finds a [`STAGED`] directory later, after a crash, finishes the moves.

use std::io;
use std::time::Duration;

use rustix::io::Errno;

use crate::destination::FileSet;
use crate::fsx::acl::Acl;
use crate::fsx::{Access, Entry, Folder, unique};
use crate::secret::Secret;

/// A committed set whose files are being moved to their names.
const STAGED: &str = ".tbot-set";
/// Starts the names of sets that are not complete yet.
const DRAFT: &str = ".tbot-draft-";
/// Starts the names of single files that are not complete yet.
const TEMPORARY: &str = ".tbot-tmp-";

/// How long readers that hold the directory's shared lock are waited for.
const PATIENCE: Duration = Duration::from_secs(2);

/// Files of a key and its certificates, in the order in which they are moved: a key between or beside
/// its certificates, so that as little as possible lies between the two renames of a pair.
const PAIRED: &[&str] = &[
    "key.pub",
    "key-cert.pub",
    "key",
    "tlscert",
    "ssh_host-cert.pub",
    "ssh_host",
    "svid_key.pem",
    "svid.pem",
    "tls.key",
    "tls.crt",
    "node.key",
    "node.crt",
];

/// Stands for the slash of a name in a draft, which is flat. No name has it: see [`check_name`].
const SLASH: &str = "\u{1f}";

/// How files are made and replaced.
#[derive(Debug, Clone, Default)]
pub(super) struct Rules {
    /// Whether a link in the place of a file is written through.
    pub(super) follow: bool,
    /// The access control list that every file gets; without one, a file keeps its access.
    pub(super) acl: Option<Acl>,
    /// The one that directories below the destination get.
    pub(super) folder_acl: Option<Acl>,
}

impl Rules {
    fn new_file(&self) -> Access {
        Access {
            acl: self.acl.clone(),
            ..Access::PRIVATE
        }
    }
}

/// Why a set could not be written.
#[derive(Debug)]
pub(super) enum Failure {
    /// The system refused `action` on `name`.
    Io {
        action: &'static str,
        name: String,
        source: io::Error,
    },
    /// `name` is not something to write to.
    Unsuitable { name: String, problem: &'static str },
}

impl Failure {
    fn io(action: &'static str, name: &str) -> impl FnOnce(io::Error) -> Self {
        let name = name.to_owned();
        move |source| Self::Io {
            action,
            name,
            source,
        }
    }
}

/// A file to be written.
struct Item<'a> {
    name: &'a str,
    content: &'a Secret<Vec<u8>>,
    access: Access,
}

/// Replaces the named files. Files with the right content and access are not touched.
pub(super) fn write<F: Folder>(folder: &F, files: &FileSet, rules: &Rules) -> Result<(), Failure> {
    finish(folder, rules)?;
    let mut changed = Vec::new();
    let mut in_place = Vec::new();
    for (name, content) in files {
        check_name(name)?;
        let item = |access| Item {
            name,
            content,
            access,
        };
        match look(folder, name, rules).map_err(Failure::io("read", name))? {
            None => changed.push(item(rules.new_file())),
            Some(Entry::File {
                content: old,
                access,
            }) => {
                let access = match &rules.acl {
                    None => access,
                    Some(acl) if access.acl.as_ref() == Some(acl) => access,
                    Some(_) => {
                        changed.push(item(rules.new_file()));
                        continue;
                    }
                };
                if old != *content {
                    changed.push(item(access));
                }
            }
            Some(Entry::Link) if rules.follow => in_place.push(item(rules.new_file())),
            Some(Entry::Link) => {
                return Err(Failure::Unsuitable {
                    name: name.clone(),
                    problem: "is a symbolic link: remove it, or set symlinks: insecure to write \
                              through it",
                });
            }
            Some(Entry::Other) => {
                return Err(Failure::Unsuitable {
                    name: name.clone(),
                    problem: "is not a regular file: remove it or choose another destination",
                });
            }
        }
    }
    for item in &changed {
        make_room(folder, item.name, rules)?;
    }
    changed.sort_by_key(|item| rank(item.name));
    let mut refusal = None;
    let left = match changed.as_slice() {
        [] => Vec::new(),
        [_] => replace_one(folder, changed, rules, &mut refusal)?,
        _ => replace_many(folder, changed, rules, &mut refusal)?,
    };
    in_place.extend(left);
    overwrite(folder, &in_place, rules, refusal)
}

/// Finishes a set that was committed and not moved out completely.
pub(super) fn finish<F: Folder>(folder: &F, rules: &Rules) -> Result<(), Failure> {
    let entered = folder.enter(STAGED, false);
    if entered.map_err(Failure::io("open", STAGED))?.is_none() {
        return Ok(());
    }
    locked(folder, || move_all_out(folder, rules))
}

/// Moves what was committed to its names, if anything was. Needs the lock.
fn move_all_out<F: Folder>(folder: &F, rules: &Rules) -> Result<(), Failure> {
    let entered = folder.enter(STAGED, false);
    let Some(staged) = entered.map_err(Failure::io("open", STAGED))? else {
        return Ok(());
    };
    let flat = staged.names().map_err(Failure::io("list", STAGED))?;
    let mut names: Vec<_> = flat.iter().map(|name| name.replace(SLASH, "/")).collect();
    names.sort_by_key(|name| rank(name));
    // Whoever may write here may have made this directory: it leads to nowhere else because of that.
    for name in &names {
        check_name(name)?;
        let found = staged.look(&name.replace('/', SLASH));
        if !matches!(found, Ok(Some(Entry::File { .. }))) {
            return Err(Failure::Unsuitable {
                name: format!("{STAGED}/{name}"),
                problem: "is not a regular file: remove .tbot-set, which no agent left like this",
            });
        }
    }
    for name in &names {
        move_out(&staged, folder, name, rules)?;
    }
    for name in &names {
        sync_below(folder, name, rules)?;
    }
    folder.sync().map_err(Failure::io("sync", "."))?;
    folder
        .remove_folder(STAGED)
        .map_err(Failure::io("remove", STAGED))
}

/// Removes what a writer left that was stopped before it committed. Only names that this module
/// makes are touched, and no draft that someone is writing.
pub(super) fn clean<F: Folder>(folder: &F) -> Result<(), Failure> {
    locked(folder, || {
        let names = folder.names().map_err(Failure::io("list", "."))?;
        for name in names {
            if is_made(&name, TEMPORARY) {
                folder.remove(&name).map_err(Failure::io("remove", &name))?;
            } else if is_made(&name, DRAFT) {
                discard_unused(folder, &name).map_err(Failure::io("remove", &name))?;
            }
        }
        Ok(())
    })
}

/// Whether the name is `prefix` and what [`unique`] returns.
fn is_made(name: &str, prefix: &str) -> bool {
    name.strip_prefix(prefix)
        .is_some_and(|rest| rest.len() == 16 && rest.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// The order of the moves: what others refer to first, pairs together, then the one file that says
/// everything, then texts that point to the others.
fn rank(name: &str) -> usize {
    let name = name.rsplit('/').next().unwrap_or(name);
    if let Some(place) = PAIRED.iter().position(|paired| *paired == name) {
        1 + place
    } else if name == "identity" {
        1 + PAIRED.len()
    } else if name.ends_with("ssh_config") || name == "kubeconfig.yaml" {
        2 + PAIRED.len()
    } else {
        0
    }
}

/// Takes `name` and `folder/name`, and nothing that leads out of the destination or into the way of
/// this module's own names.
pub(super) fn check_name(name: &str) -> Result<(), Failure> {
    let mut parts = name.split('/');
    let good = |part: &str| {
        !matches!(part, "" | "." | "..")
            && !part.starts_with(".tbot-")
            && !part.contains(char::is_control)
    };
    if parts.clone().count() > 2 || !parts.all(good) {
        return Err(Failure::Unsuitable {
            name: name.to_owned(),
            problem: "is no name for a file in here: write `name` or `folder/name`, without `..`, \
                      control characters or a leading `.tbot-`",
        });
    }
    Ok(())
}

/// Does `work` in the directory that holds `name`, with the name that the file has there.
pub(super) fn within<F: Folder, T>(
    folder: &F,
    name: &str,
    follow: bool,
    work: impl FnOnce(&F, &str) -> io::Result<T>,
) -> io::Result<T> {
    match name.split_once('/') {
        None => work(folder, name),
        Some((below, name)) => {
            let below = folder.enter(below, follow)?.ok_or(Errno::NOENT)?;
            work(&below, name)
        }
    }
}

fn look<F: Folder>(folder: &F, name: &str, rules: &Rules) -> io::Result<Option<Entry>> {
    match within(folder, name, rules.follow, F::look) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        looked => looked,
    }
}

/// Makes the directory that `name` is to be in, if it is to be in one, and lets the readers in.
pub(super) fn make_room<F: Folder>(folder: &F, name: &str, rules: &Rules) -> Result<(), Failure> {
    let Some((below, _)) = name.split_once('/') else {
        return Ok(());
    };
    let entered = folder.enter(below, rules.follow);
    let room = match entered.map_err(Failure::io("open", below))? {
        Some(room) => room,
        None => folder.make(below).map_err(Failure::io("create", below))?,
    };
    match &rules.folder_acl {
        Some(acl) => room
            .grant(acl)
            .map_err(Failure::io("set the access control list of", below)),
        None => Ok(()),
    }
}

/// Makes the new name of a file in a directory below durable.
fn sync_below<F: Folder>(folder: &F, name: &str, rules: &Rules) -> Result<(), Failure> {
    if !name.contains('/') {
        return Ok(());
    }
    within(folder, name, rules.follow, |below, _| below.sync()).map_err(Failure::io("sync", name))
}

/// Whether nothing can be made or moved here, so that writing over what exists is all that is left:
/// a directory without write permission, a read-only file system.
fn refused(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::ACCESS | Errno::PERM | Errno::ROFS)
    )
}

/// Whether this one name cannot be replaced, as when a single file is mounted there.
fn pinned(error: &io::Error) -> bool {
    refused(error) || matches!(Errno::from_io_error(error), Some(Errno::BUSY | Errno::XDEV))
}

/// One file: its own rename is the commit. Returns it if it must be written in place.
fn replace_one<'a, F: Folder>(
    folder: &F,
    items: Vec<Item<'a>>,
    rules: &Rules,
    refusal: &mut Option<io::Error>,
) -> Result<Vec<Item<'a>>, Failure> {
    let temporary = format!("{TEMPORARY}{}", unique());
    // The lock keeps another writer from cleaning the temporary away.
    locked(folder, || {
        for item in &items {
            match folder.create(&temporary, item.content.expose(), &item.access) {
                Ok(()) => {}
                Err(error) if refused(&error) => {
                    *refusal = Some(error);
                    return Ok(items);
                }
                Err(error) => return Err(Failure::io("write", item.name)(error)),
            }
            let renamed = within(folder, item.name, rules.follow, |below, name| {
                folder.rename(&temporary, below, name)
            });
            if let Err(error) = renamed {
                folder
                    .remove(&temporary)
                    .map_err(Failure::io("remove", &temporary))?;
                if pinned(&error) {
                    *refusal = Some(error);
                    return Ok(items);
                }
                return Err(Failure::io("replace", item.name)(error));
            }
            sync_below(folder, item.name, rules)?;
            folder.sync().map_err(Failure::io("sync", "."))?;
        }
        Ok(Vec::new())
    })
}

/// Several files through a draft. Returns those that must be written in place.
fn replace_many<'a, F: Folder>(
    folder: &F,
    items: Vec<Item<'a>>,
    rules: &Rules,
    refusal: &mut Option<io::Error>,
) -> Result<Vec<Item<'a>>, Failure> {
    let name = format!("{DRAFT}{}", unique());
    let made = locked(folder, || {
        let made = folder.make(&name).and_then(|draft| {
            // Held until the draft is dropped: it says that someone is at work here.
            draft.lock(Duration::ZERO)?;
            Ok(draft)
        });
        Ok(made)
    })?;
    let draft = match made {
        Ok(draft) => draft,
        Err(error) if refused(&error) => {
            *refusal = Some(error);
            return Ok(items);
        }
        Err(error) => return Err(Failure::io("create", &name)(error)),
    };
    let mut left = Vec::new();
    // The first error tells; a draft that cannot be discarded is cleaned at the next start.
    let failed = |failure| {
        drop(discard(folder, &name));
        failure
    };
    for item in items {
        let flat = item.name.replace('/', SLASH);
        match draft.create(&flat, item.content.expose(), &item.access) {
            Ok(()) => {}
            // The owner of the old file cannot be given to a new one.
            Err(error) if refused(&error) => {
                *refusal = Some(error);
                left.push(item);
            }
            Err(error) => return Err(failed(Failure::io("write", item.name)(error))),
        }
    }
    draft
        .sync()
        .map_err(|error| failed(Failure::io("sync", &name)(error)))?;
    locked(folder, || {
        // Another writer may have been stopped between its commit and its last move.
        move_all_out(folder, rules).map_err(failed)?;
        folder
            .rename(&name, folder, STAGED)
            .map_err(|error| failed(Failure::io("commit", &name)(error)))?;
        folder.sync().map_err(Failure::io("sync", "."))?;
        move_all_out(folder, rules)
    })?;
    Ok(left)
}

/// Moves one file of a committed set to its name, or its content where the name is pinned.
fn move_out<F: Folder>(staged: &F, folder: &F, name: &str, rules: &Rules) -> Result<(), Failure> {
    // Someone may have removed what was made before the commit.
    make_room(folder, name, rules)?;
    let flat = name.replace('/', SLASH);
    let moved = within(folder, name, rules.follow, |below, name| {
        staged.rename(&flat, below, name)
    });
    match moved {
        Err(error) if pinned(&error) => {
            let Some(Entry::File { content, .. }) =
                staged.look(&flat).map_err(Failure::io("read", name))?
            else {
                return Err(Failure::io("replace", name)(error));
            };
            write_over(folder, name, &content, rules).map_err(Failure::io("write", name))?;
            staged.remove(&flat).map_err(Failure::io("remove", name))
        }
        moved => moved.map_err(Failure::io("replace", name)),
    }
}

fn write_over<F: Folder>(
    folder: &F,
    name: &str,
    content: &Secret<Vec<u8>>,
    rules: &Rules,
) -> io::Result<()> {
    within(folder, name, rules.follow, |below, name| {
        below.overwrite(name, content.expose(), rules.acl.as_ref(), rules.follow)
    })
}

/// Writes over existing files: the last resort, during which a reader can see mixed files.
fn overwrite<F: Folder>(
    folder: &F,
    items: &[Item<'_>],
    rules: &Rules,
    mut refusal: Option<io::Error>,
) -> Result<(), Failure> {
    if items.is_empty() {
        return Ok(());
    }
    locked(folder, || {
        for item in items {
            write_over(folder, item.name, item.content, rules).map_err(|error| {
                // A file that is not there is missing because it could not be made.
                let cause = match refusal.take() {
                    Some(refusal) if error.kind() == io::ErrorKind::NotFound => refusal,
                    _ => error,
                };
                Failure::io("write", item.name)(cause)
            })?;
        }
        Ok(())
    })
}

/// Runs `work` under the directory's exclusive lock, which keeps writers of all processes apart. A
/// reader that takes the shared lock sees whole sets even when it opens several files; one that never
/// lets go delays a renewal, no more.
fn locked<F: Folder, T>(
    folder: &F,
    work: impl FnOnce() -> Result<T, Failure>,
) -> Result<T, Failure> {
    let held = folder.lock(PATIENCE).map_err(Failure::io("lock", "."))?;
    if !held {
        tracing::warn!("A reader holds the destination's lock for too long; writing without it");
    }
    let done = work();
    if held {
        folder.unlock().map_err(Failure::io("unlock", "."))?;
    }
    done
}

/// Removes a draft whose writer is gone.
fn discard_unused<F: Folder>(folder: &F, name: &str) -> io::Result<()> {
    if let Some(draft) = folder.enter(name, false)?
        && draft.lock(Duration::ZERO)?
    {
        discard(folder, name)?;
    }
    Ok(())
}

/// Removes a draft and what is in it.
fn discard<F: Folder>(folder: &F, name: &str) -> io::Result<()> {
    if let Some(draft) = folder.enter(name, false)? {
        for file in draft.names()? {
            draft.remove(&file)?;
        }
        folder.remove_folder(name)?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "set_tests.rs"]
mod tests;
