//! A writer is stopped before every single operation, and readers watch a writer at work.

use std::cell::Cell;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::fsx::{Dir, Symlinks};

/// A directory whose process dies before the n-th operation; a file being written then is torn. Or,
/// if it goes on, one in which that operation alone fails.
#[derive(Debug)]
struct Dying {
    inner: Dir,
    left: Rc<Cell<usize>>,
    goes_on: bool,
}

impl Dying {
    fn step(&self) -> io::Result<()> {
        match self.left.get().checked_sub(1) {
            Some(left) => {
                self.left.set(left);
                Ok(())
            }
            None => {
                if self.goes_on {
                    self.left.set(usize::MAX);
                }
                Err(io::Error::other("stopped"))
            }
        }
    }

    fn with(&self, inner: Dir) -> Self {
        Self {
            inner,
            left: Rc::clone(&self.left),
            goes_on: self.goes_on,
        }
    }
}

impl Folder for Dying {
    fn make(&self, name: &str) -> io::Result<Self> {
        self.step()?;
        self.inner.make(name).map(|dir| self.with(dir))
    }
    fn enter(&self, name: &str, follow: bool) -> io::Result<Option<Self>> {
        let entered = self.inner.enter(name, follow)?;
        Ok(entered.map(|dir| self.with(dir)))
    }
    fn grant(&self, acl: &Acl) -> io::Result<()> {
        self.step()?;
        self.inner.grant(acl)
    }
    fn names(&self) -> io::Result<Vec<String>> {
        self.inner.names()
    }
    fn look(&self, name: &str) -> io::Result<Option<Entry>> {
        self.inner.look(name)
    }
    fn create(&self, name: &str, content: &[u8], access: &Access) -> io::Result<()> {
        if let Err(stopped) = self.step() {
            if self.left.get() == 0 {
                self.inner
                    .create(name, &content[..content.len() / 2], access)?;
            }
            return Err(stopped);
        }
        self.inner.create(name, content, access)
    }
    fn overwrite(
        &self,
        name: &str,
        content: &[u8],
        acl: Option<&Acl>,
        follow: bool,
    ) -> io::Result<()> {
        self.step()?;
        self.inner.overwrite(name, content, acl, follow)
    }
    fn rename(&self, name: &str, folder: &Self, to: &str) -> io::Result<()> {
        self.step()?;
        self.inner.rename(name, &folder.inner, to)
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.step()?;
        self.inner.remove(name)
    }
    fn remove_folder(&self, name: &str) -> io::Result<()> {
        self.step()?;
        self.inner.remove_folder(name)
    }
    fn sync(&self) -> io::Result<()> {
        self.step()?;
        self.inner.sync()
    }
    fn lock(&self, patience: Duration) -> io::Result<bool> {
        self.inner.lock(patience)
    }
    fn unlock(&self) -> io::Result<()> {
        self.inner.unlock()
    }
}

const NAMES: [&str; 7] = [
    "cockroach/node.crt",
    "cockroach/node.key",
    "identity",
    "key",
    "key-cert.pub",
    "teleport-host-ca.crt",
    "tlscert",
];

fn set(generation: u32) -> FileSet {
    NAMES
        .iter()
        .map(|name| {
            let text = format!("{name} of {generation}\n").repeat(100);
            ((*name).to_owned(), Secret::new(text.into_bytes()))
        })
        .collect()
}

fn base() -> (tempfile::TempDir, PathBuf) {
    let base = tempfile::tempdir().unwrap();
    let path = base.path().canonicalize().unwrap();
    (base, path)
}

fn open(path: &Path) -> Dir {
    Dir::open(path, Symlinks::Secure).unwrap()
}

/// The files in a directory and one below.
fn names(path: &Path) -> Vec<String> {
    let mut all = Vec::new();
    for name in open(path).names().unwrap() {
        if path.join(&name).is_dir() {
            let below = open(&path.join(&name)).names().unwrap();
            all.extend(below.iter().map(|below| format!("{name}/{below}")));
        } else {
            all.push(name);
        }
    }
    all
}

/// Which generation each file is of.
fn generations(path: &Path) -> Vec<u32> {
    NAMES
        .iter()
        .map(|name| {
            let content = std::fs::read(path.join(name)).unwrap();
            (0..10)
                .find(|generation| *set(*generation)[*name].expose() == content)
                .unwrap_or_else(|| panic!("{name} is torn"))
        })
        .collect()
}

#[test]
fn a_stop_before_any_operation_leaves_the_old_or_the_new_set() {
    let rules = Rules::default();
    let mut outcomes = [0, 0];
    for stop in 0.. {
        let (_base, path) = base();
        write(&open(&path), &set(1), &rules).unwrap();
        let dying = Dying {
            inner: open(&path),
            left: Rc::new(Cell::new(stop)),
            goes_on: false,
        };
        let finished = write(&dying, &set(2), &rules).is_ok();
        drop(dying);
        // Every single file is whole even before anyone repairs the set.
        generations(&path);
        let restarted = open(&path);
        finish(&restarted, &rules).unwrap();
        clean(&restarted).unwrap();
        let seen = generations(&path);
        assert!(seen.iter().all(|g| *g == seen[0]), "stop {stop}: {seen:?}");
        assert_eq!(names(&path), NAMES, "stop {stop}: leftovers");
        outcomes[usize::from(seen[0] == 2)] += 1;
        write(&restarted, &set(3), &rules).unwrap();
        assert_eq!(generations(&path), [3; 7]);
        if finished {
            assert_eq!(seen, [2; 7]);
            break;
        }
    }
    assert!(outcomes[0] > 5 && outcomes[1] > 5, "{outcomes:?}");
}

#[test]
fn one_file_is_replaced_by_one_rename() {
    for stop in 0..5 {
        let (_base, path) = base();
        let one = |text: &str| FileSet::from([("x".to_owned(), text.as_bytes().to_vec().into())]);
        write(&open(&path), &one("old text"), &Rules::default()).unwrap();
        let dying = Dying {
            inner: open(&path),
            left: Rc::new(Cell::new(stop)),
            goes_on: false,
        };
        drop(write(&dying, &one("new text"), &Rules::default()));
        clean(&open(&path)).unwrap();
        assert_eq!(open(&path).names().unwrap(), ["x"]);
        let expected = if stop < 2 { "old text" } else { "new text" };
        assert_eq!(std::fs::read_to_string(path.join("x")).unwrap(), expected);
    }
}

#[test]
fn readers_see_whole_files_and_with_the_lock_whole_sets() {
    let (_base, path) = base();
    write(&open(&path), &set(0), &Rules::default()).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let single = scope.spawn(|| {
            let mut reads = 0;
            while !done.load(Ordering::Relaxed) {
                generations(&path);
                reads += 1;
            }
            reads
        });
        let (starts, started) = std::sync::mpsc::sync_channel(0);
        let path = &path;
        let whole = scope.spawn(move || {
            let mut reads = 0;
            while started.recv().is_ok() {
                let lock = std::fs::File::open(path).unwrap();
                rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockShared).unwrap();
                let seen = generations(path);
                drop(lock);
                assert!(seen.iter().all(|g| *g == seen[0]), "mixed: {seen:?}");
                reads += 1;
            }
            reads
        });
        for generation in 1..40 {
            // One read runs beside each write; readers without a pause would keep the lock.
            starts.send(()).unwrap();
            write(&open(path), &set(generation % 10), &Rules::default()).unwrap();
        }
        done.store(true, Ordering::Relaxed);
        drop(starts);
        assert!(single.join().unwrap() > 0 && whole.join().unwrap() > 0);
    });
}

#[test]
fn two_writers_do_not_get_into_each_others_way() {
    let (_base, path) = base();
    std::thread::scope(|scope| {
        for writer in 0..3 {
            let path = &path;
            scope.spawn(move || {
                for round in 0..15 {
                    let folder = open(path);
                    clean(&folder).unwrap();
                    write(&folder, &set(writer * 3 + round % 3), &Rules::default()).unwrap();
                    let one = FileSet::from([("key".to_owned(), set(writer)["key"].clone())]);
                    write(&folder, &one, &Rules::default()).unwrap();
                }
            });
        }
    });
    generations(&path);
    write(&open(&path), &set(9), &Rules::default()).unwrap();
    assert_eq!(generations(&path), [9; 7]);
    assert_eq!(names(&path), NAMES);
}

#[test]
fn what_is_the_same_is_not_touched_and_what_changes_keeps_its_access() {
    let (_base, path) = base();
    write(&open(&path), &set(1), &Rules::default()).unwrap();
    let inode = |name: &str| std::fs::metadata(path.join(name)).unwrap().ino();
    let mode = |name: &str| std::fs::metadata(path.join(name)).unwrap().mode() & 0o7777;
    assert_eq!(mode("key"), 0o600);
    std::fs::set_permissions(path.join("tlscert"), std::fs::Permissions::from_mode(0o640)).unwrap();
    let before = (inode("key"), inode("tlscert"));
    let mut files = set(1);
    files.insert("tlscert".into(), b"other".to_vec().into());
    write(&open(&path), &files, &Rules::default()).unwrap();
    assert_eq!(inode("key"), before.0);
    assert_ne!(inode("tlscert"), before.1);
    assert_eq!(mode("tlscert"), 0o640);
}

#[test]
fn links_and_folders_in_the_way_are_refused_before_anything_changes() {
    for follow in [false, true] {
        let (_base, path) = base();
        write(&open(&path), &set(1), &Rules::default()).unwrap();
        std::fs::rename(path.join("tlscert"), path.join("elsewhere")).unwrap();
        std::os::unix::fs::symlink("elsewhere", path.join("tlscert")).unwrap();
        let rules = Rules {
            follow,
            ..Rules::default()
        };
        let written = write(&open(&path), &set(2), &rules);
        if follow {
            written.unwrap();
            assert_eq!(generations(&path), [2; 7]);
            assert!(path.join("tlscert").is_symlink(), "the user's link stays");
        } else {
            assert!(matches!(written, Err(Failure::Unsuitable { .. })));
            assert_eq!(generations(&path), [1; 7]);
        }
        std::fs::remove_file(path.join("tlscert")).unwrap();
        std::fs::create_dir(path.join("tlscert")).unwrap();
        assert!(matches!(
            write(&open(&path), &set(3), &rules),
            Err(Failure::Unsuitable { .. })
        ));
    }
}

#[test]
fn a_folder_below_is_a_folder_and_nothing_else() {
    let (_base, path) = base();
    std::fs::write(path.join("cockroach"), "mine").unwrap();
    let written = write(&open(&path), &set(1), &Rules::default());
    assert!(written.is_err());
    assert_eq!(names(&path), ["cockroach"]);
    std::fs::remove_file(path.join("cockroach")).unwrap();
    let (_elsewhere, elsewhere) = base();
    std::os::unix::fs::symlink(&elsewhere, path.join("cockroach")).unwrap();
    write(&open(&path), &set(1), &Rules::default()).unwrap_err();
    assert_eq!(names(&elsewhere), [""; 0], "a link is not followed");
    let follow = Rules {
        follow: true,
        ..Rules::default()
    };
    write(&open(&path), &set(1), &follow).unwrap();
    assert_eq!(names(&elsewhere), ["node.crt", "node.key"]);
    assert_eq!(generations(&path), [1; 7]);
    // One file alone goes there too, and one that vanished after the commit is made anew.
    let one = FileSet::from([("cockroach/node.crt".to_owned(), b"x".to_vec().into())]);
    write(&open(&path), &one, &follow).unwrap();
    assert_eq!(std::fs::read(elsewhere.join("node.crt")).unwrap(), b"x");
}

#[test]
fn a_committed_set_does_not_need_what_was_removed_since() {
    let (_base, path) = base();
    let staged = open(&path).make(STAGED).unwrap();
    for (name, content) in set(4) {
        let flat = name.replace('/', SLASH);
        staged
            .create(&flat, content.expose(), &Access::PRIVATE)
            .unwrap();
    }
    finish(&open(&path), &Rules::default()).unwrap();
    assert_eq!(generations(&path), [4; 7]);
    assert_eq!(names(&path), NAMES);
}

#[test]
fn a_set_that_somebody_else_committed_leads_nowhere_else() {
    let base = tempfile::tempdir().unwrap();
    let path = base.path().join("destination");
    std::fs::create_dir(&path).unwrap();
    std::fs::write(base.path().join("outside"), "old").unwrap();
    let files = FileSet::from([("key".to_owned(), b"new".to_vec().into())]);
    let staged = path.join(STAGED);
    for (name, link) in [
        ("..\u{1f}outside", false),
        (".tbot-x", false),
        ("key", true),
    ] {
        std::fs::create_dir(&staged).unwrap();
        if link {
            std::os::unix::fs::symlink("../../outside", staged.join(name)).unwrap();
        } else {
            std::fs::write(staged.join(name), "forged").unwrap();
        }
        let refused = write(&open(&path), &files, &Rules::default());
        assert!(
            matches!(refused, Err(Failure::Unsuitable { .. })),
            "{name}: {refused:?}"
        );
        assert_eq!(
            std::fs::read_to_string(base.path().join("outside")).unwrap(),
            "old"
        );
        assert!(!path.join("key").exists(), "{name}");
        std::fs::remove_dir_all(&staged).unwrap();
    }
    write(&open(&path), &files, &Rules::default()).unwrap();
}

#[test]
fn a_failed_write_leaves_no_draft_behind() {
    let rules = Rules::default();
    let one = FileSet::from([("key".to_owned(), set(2)["key"].clone())]);
    for files in [set(2), one] {
        let mut failures = 0;
        for stop in 0.. {
            let (_base, path) = base();
            write(&open(&path), &set(1), &rules).unwrap();
            let failing = Dying {
                inner: open(&path),
                left: Rc::new(Cell::new(stop)),
                goes_on: true,
            };
            if write(&failing, &files, &rules).is_ok() {
                break;
            }
            failures += 1;
            let names = open(&path).names().unwrap();
            let left = |name: &String| name.starts_with(DRAFT) || name.starts_with(TEMPORARY);
            assert!(!names.iter().any(left), "operation {stop}: {names:?}");
            write(&open(&path), &files, &rules).unwrap();
        }
        assert!(failures > 2, "{failures}");
    }
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    let (_base, path) = base();
    for name in [
        "",
        ".",
        "..",
        "a/b/c",
        "a/",
        "/a",
        "../a",
        "a/..",
        "/etc/passwd",
        "a\0b",
        "a\nb",
        ".tbot-set",
        "a/.tbot-set",
        "a\u{1f}b",
    ] {
        let files = FileSet::from([(name.to_owned(), b"x".to_vec().into())]);
        assert!(
            write(&open(&path), &files, &Rules::default()).is_err(),
            "{name:?}"
        );
    }
}

/// A directory in which nothing can be made or renamed, as one mounted read-only around writable
/// files, or one whose files are single mounts.
#[derive(Debug)]
struct Fixed(Dir, Errno, bool);

impl Folder for Fixed {
    fn make(&self, name: &str) -> io::Result<Self> {
        if self.2 {
            return Err(self.1.into());
        }
        Ok(Self(self.0.make(name)?, self.1, self.2))
    }
    fn enter(&self, name: &str, follow: bool) -> io::Result<Option<Self>> {
        let entered = self.0.enter(name, follow)?;
        Ok(entered.map(|dir| Self(dir, self.1, self.2)))
    }
    fn grant(&self, acl: &Acl) -> io::Result<()> {
        self.0.grant(acl)
    }
    fn names(&self) -> io::Result<Vec<String>> {
        self.0.names()
    }
    fn look(&self, name: &str) -> io::Result<Option<Entry>> {
        self.0.look(name)
    }
    fn create(&self, name: &str, content: &[u8], access: &Access) -> io::Result<()> {
        if self.2 {
            return Err(self.1.into());
        }
        self.0.create(name, content, access)
    }
    fn overwrite(
        &self,
        name: &str,
        content: &[u8],
        acl: Option<&Acl>,
        follow: bool,
    ) -> io::Result<()> {
        self.0.overwrite(name, content, acl, follow)
    }
    fn rename(&self, name: &str, folder: &Self, to: &str) -> io::Result<()> {
        if name.starts_with(DRAFT) {
            return self.0.rename(name, &folder.0, to);
        }
        Err(self.1.into())
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.0.remove(name)
    }
    fn remove_folder(&self, name: &str) -> io::Result<()> {
        self.0.remove_folder(name)
    }
    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }
    fn lock(&self, patience: Duration) -> io::Result<bool> {
        self.0.lock(patience)
    }
    fn unlock(&self) -> io::Result<()> {
        self.0.unlock()
    }
}

#[test]
fn files_that_cannot_be_replaced_are_written_over() {
    for (errno, nothing_made) in [
        (Errno::ACCESS, true),
        (Errno::ROFS, true),
        (Errno::BUSY, false),
        (Errno::XDEV, false),
    ] {
        let (_base, path) = base();
        write(&open(&path), &set(1), &Rules::default()).unwrap();
        let inode = std::fs::metadata(path.join("key")).unwrap().ino();
        let fixed = Fixed(open(&path), errno, nothing_made);
        write(&fixed, &set(2), &Rules::default()).unwrap();
        let one = FileSet::from([("key".to_owned(), set(2)["key"].clone())]);
        write(&fixed, &one, &Rules::default()).unwrap();
        assert_eq!(generations(&path), [2; 7], "{errno}");
        assert_eq!(std::fs::metadata(path.join("key")).unwrap().ino(), inode);
        assert_eq!(names(&path), NAMES, "{errno}: leftovers");
    }
}

#[test]
fn a_file_that_cannot_be_made_is_the_error_that_is_told() {
    let (_base, path) = base();
    let fixed = Fixed(open(&path), Errno::ACCESS, true);
    let Err(Failure::Io { source, .. }) = write(&fixed, &set(1), &Rules::default()) else {
        panic!("written");
    };
    assert_eq!(Errno::from_io_error(&source), Some(Errno::ACCESS));
}

#[test]
fn only_own_leftovers_are_cleaned() {
    let (_base, path) = base();
    let folder = open(&path);
    let strangers = [
        ".tbot-tmp-x",
        ".tbot-draft-notes",
        ".other",
        "tbot-tmp-0123456789abcdef",
    ];
    for name in strangers {
        folder.create(name, b"", &Access::PRIVATE).unwrap();
    }
    folder
        .create(&format!("{TEMPORARY}{}", unique()), b"", &Access::PRIVATE)
        .unwrap();
    let name = format!("{DRAFT}{}", unique());
    let draft = folder.make(&name).unwrap();
    draft.create("key", b"", &Access::PRIVATE).unwrap();
    draft.lock(Duration::ZERO).unwrap();
    clean(&folder).unwrap();
    assert!(path.join(&name).exists(), "someone is writing it");
    drop(draft);
    clean(&folder).unwrap();
    let mut expected = strangers.map(str::to_owned).to_vec();
    expected.sort_unstable();
    assert_eq!(folder.names().unwrap(), expected);
}
