//! POSIX access control lists in the kernel's form (`system.posix_acl_access`, acl(5) and
//! `include/uapi/linux/posix_acl_xattr.h`).

use std::io;
use std::os::fd::AsFd;

use rustix::fs::{XattrFlags, fgetxattr, fsetxattr};
use rustix::io::Errno;

/// The attribute that holds a list.
pub(super) const ATTRIBUTE: &str = "system.posix_acl_access";
/// The only version of the encoding there is.
const VERSION: u32 = 2;
/// The identifier of entries that name nobody.
const NOBODY: u32 = u32::MAX;
/// More entries than this are not read; ext4 stores at most some hundred.
const MAX_ENTRIES: usize = 1024;

const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

const READ: u16 = 4;
const WRITE: u16 = 2;
const EXECUTE: u16 = 1;

/// The rights of a user who is barred from a socket. To connect takes the right to write, and to execute means
/// nothing there: it is what tells these entries from those that somebody else made, and keeps the mask from
/// being empty, with which the kernel does not look at the list.
const BARRED_RIGHTS: u16 = EXECUTE;

/// Who may read beside the owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reader {
    /// A user ID.
    User(u32),
    /// A group ID.
    Group(u32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    tag: u16,
    id: u32,
    permissions: u16,
}

/// An access control list. Two lists with the same entries are equal, whatever their order was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acl(Vec<Entry>);

impl Acl {
    /// Owner reads and writes, each reader reads, nobody else does anything. `stat` shows 0640.
    pub fn for_file(readers: &[Reader]) -> Self {
        Self::shared_file(&[], readers)
    }

    /// Owner does everything, each reader lists and enters, nobody else does. `stat` shows 0750.
    pub fn for_folder(readers: &[Reader]) -> Self {
        Self::shared_folder(&[], readers)
    }

    /// As [`Acl::for_file`]; each writer does what the owner does.
    pub fn shared_file(writers: &[Reader], readers: &[Reader]) -> Self {
        Self::new(writers, readers, READ | WRITE, READ)
    }

    /// As [`Acl::for_folder`]; each writer does what the owner does.
    pub fn shared_folder(writers: &[Reader], readers: &[Reader]) -> Self {
        Self::new(writers, readers, READ | WRITE | EXECUTE, READ | EXECUTE)
    }

    fn new(writers: &[Reader], readers: &[Reader], all: u16, some: u16) -> Self {
        let entry = |tag, id, permissions| Entry {
            tag,
            id,
            permissions,
        };
        let named = |who: &Reader, permissions| match who {
            Reader::User(id) => entry(USER, *id, permissions),
            Reader::Group(id) => entry(GROUP, *id, permissions),
        };
        let mask = if writers.is_empty() { some } else { all };
        let mut entries = vec![
            entry(USER_OBJ, NOBODY, all),
            entry(GROUP_OBJ, NOBODY, 0),
            entry(MASK, NOBODY, mask),
            entry(OTHER, NOBODY, 0),
        ];
        entries.extend(writers.iter().map(|who| named(who, all)));
        let readers = readers.iter().filter(|who| !writers.contains(who));
        entries.extend(readers.map(|who| named(who, some)));
        Self::sorted(entries)
    }

    fn sorted(mut entries: Vec<Entry>) -> Self {
        entries.sort_unstable();
        entries.dedup();
        Self(entries)
    }

    /// What the permission bits of a mode say, and no more.
    pub fn of_mode(mode: u32) -> Self {
        let class = |tag, shift: u32| Entry {
            tag,
            id: NOBODY,
            permissions: ((mode >> shift) & 0o7) as u16,
        };
        Self::sorted(vec![
            class(USER_OBJ, 6),
            class(GROUP_OBJ, 3),
            class(OTHER, 0),
        ])
    }

    /// The users who are barred; `None` if the list says anything else beyond a mode.
    pub fn barred(&self) -> Option<Vec<u32>> {
        let named = self
            .0
            .iter()
            .filter(|entry| matches!(entry.tag, USER | GROUP));
        let barred = |entry: &Entry| {
            let bars = (entry.tag, entry.permissions) == (USER, BARRED_RIGHTS);
            bars.then_some(entry.id)
        };
        let barred: Option<Vec<_>> = named.map(barred).collect();
        // A mask without names is somebody's, too.
        barred.filter(|users| users.is_empty() == self.permissions(MASK).is_none())
    }

    /// Bars a user, who is not the owner, from connecting to a socket. `false`, and nothing is changed, if the
    /// list says anything else beyond a mode.
    pub fn bar(&mut self, user: u32) -> bool {
        let Some(barred) = self.barred() else {
            return false;
        };
        if barred.contains(&user) {
            return true;
        }
        let entry = |tag, id, permissions| Entry {
            tag,
            id,
            permissions,
        };
        if barred.is_empty() {
            // It limits the group, too.
            let group = self.permissions(GROUP_OBJ).unwrap_or_default();
            self.0.push(entry(MASK, NOBODY, group | BARRED_RIGHTS));
        }
        self.0.push(entry(USER, user, BARRED_RIGHTS));
        self.0.sort_unstable();
        true
    }

    /// Lets a user in who was barred. When nobody is barred any more, the list says no more than a mode does.
    pub fn unbar(&mut self, user: u32) {
        let of_user =
            |entry: &Entry| (entry.tag, entry.id, entry.permissions) == (USER, user, BARRED_RIGHTS);
        let before = self.0.len();
        self.0.retain(|entry| !of_user(entry));
        let named = |entry: &Entry| matches!(entry.tag, USER | GROUP);
        if self.0.len() == before || self.0.iter().any(named) {
            return;
        }
        let mask = self.permissions(MASK);
        self.0.retain(|entry| entry.tag != MASK);
        let group = self.0.iter_mut().find(|entry| entry.tag == GROUP_OBJ);
        // chmod(2) changes the mask where there is one, and means the group.
        if let Some((group, mask)) = group.zip(mask)
            && mask != group.permissions | BARRED_RIGHTS
        {
            group.permissions = mask;
        }
    }

    fn permissions(&self, tag: u16) -> Option<u16> {
        let found = self.0.iter().find(|entry| entry.tag == tag);
        found.map(|entry| entry.permissions)
    }

    /// The kernel's form. It wants entries in the order of their tags and identifiers.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = VERSION.to_le_bytes().to_vec();
        for entry in &self.0 {
            bytes.extend(entry.tag.to_le_bytes());
            bytes.extend(entry.permissions.to_le_bytes());
            bytes.extend(entry.id.to_le_bytes());
        }
        bytes
    }

    /// Reads the kernel's form; `None` if it is not one.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (version, rest) = bytes.split_first_chunk::<4>()?;
        let (chunks, left) = rest.as_chunks::<8>();
        if u32::from_le_bytes(*version) != VERSION || !left.is_empty() || chunks.len() > MAX_ENTRIES
        {
            return None;
        }
        let entries = chunks
            .iter()
            .map(|&[tag0, tag1, perm0, perm1, id0, id1, id2, id3]| Entry {
                tag: u16::from_le_bytes([tag0, tag1]),
                permissions: u16::from_le_bytes([perm0, perm1]),
                id: u32::from_le_bytes([id0, id1, id2, id3]),
            })
            .collect();
        Some(Self::sorted(entries))
    }

    /// The list of an open file; `None` if it has none beyond its mode, or the file system has none
    /// at all.
    pub fn of(file: impl AsFd) -> io::Result<Option<Self>> {
        let mut buffer = buffer();
        match fgetxattr(file, ATTRIBUTE, &mut buffer) {
            Ok(length) => Ok(buffer.get(..length).and_then(Self::decode)),
            Err(Errno::NODATA | Errno::NOTSUP) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Gives an open file this list, and the mode that goes with it.
    pub fn set(&self, file: impl AsFd) -> io::Result<()> {
        Ok(fsetxattr(
            file,
            ATTRIBUTE,
            &self.encode(),
            XattrFlags::empty(),
        )?)
    }
}

/// Room for a list.
pub(super) fn buffer() -> Vec<u8> {
    vec![0; 4 + 8 * MAX_ENTRIES]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_barred_and_let_in_leaves_nothing() {
        for mode in [0o777, 0o660, 0o606, 0o600, 0o770] {
            let usual = Acl::of_mode(mode);
            let mut acl = usual.clone();
            assert_eq!(acl.barred(), Some(vec![]));
            for user in [7, 5, 7] {
                assert!(acl.bar(user));
            }
            assert_eq!(acl.barred(), Some(vec![5, 7]));
            let mask = acl.permissions(MASK).unwrap();
            assert_ne!(mask, 0, "the kernel would not look");
            assert_eq!(mask, acl.permissions(GROUP_OBJ).unwrap() | EXECUTE);
            acl.unbar(5);
            acl.unbar(6);
            assert_eq!(acl.barred(), Some(vec![7]));
            acl.unbar(7);
            assert_eq!(acl, usual, "{mode:o}");
        }
    }

    #[test]
    fn a_list_that_is_somebody_else_s_is_left_alone() {
        let theirs = Acl::shared_file(&[Reader::User(5)], &[Reader::Group(7)]);
        let mut acl = theirs.clone();
        assert_eq!(acl.barred(), None);
        assert!(!acl.bar(1000));
        acl.unbar(5);
        assert_eq!(acl, theirs);
        // Made while somebody was barred: that one is let in, the others stay.
        let mut acl = Acl::of_mode(0o660);
        assert!(acl.bar(1000));
        acl.0
            .extend(theirs.0.iter().filter(|entry| entry.tag == USER));
        let mask = acl.permissions(MASK);
        acl.unbar(1000);
        assert_eq!(acl.permissions(MASK), mask);
        assert_eq!(acl.0.iter().filter(|entry| entry.tag == USER).count(), 1);
    }

    #[test]
    fn what_chmod_gave_and_took_meanwhile_is_kept() {
        for (before, after) in [
            (0o660, 0o640),
            (0o606, 0o660),
            (0o777, 0o700),
            (0o600, 0o620),
        ] {
            let mut acl = Acl::of_mode(before);
            assert!(acl.bar(1000));
            for (tag, shift) in [(USER_OBJ, 6), (MASK, 3), (OTHER, 0)] {
                let entry = acl.0.iter_mut().find(|entry| entry.tag == tag).unwrap();
                entry.permissions = after >> shift & 0o7;
            }
            acl.unbar(1000);
            assert_eq!(acl, Acl::of_mode(after.into()), "{before:o} {after:o}");
        }
    }

    #[test]
    fn a_mask_that_somebody_made_is_left_alone() {
        let mut theirs = Acl::of_mode(0o660);
        theirs.0.push(Entry {
            tag: MASK,
            id: NOBODY,
            permissions: 0,
        });
        let mut acl = theirs.clone();
        assert!(!acl.bar(1000));
        acl.unbar(1000);
        assert_eq!(acl, theirs);
    }

    #[test]
    fn a_file_list_is_what_the_kernel_wants() {
        let acl = Acl::for_file(&[Reader::Group(7), Reader::User(1000), Reader::User(5)]);
        let hex = hex::encode(acl.encode());
        assert_eq!(
            hex,
            concat!(
                "02000000",
                "01000600ffffffff",
                "0200040005000000",
                "02000400e8030000",
                "04000000ffffffff",
                "0800040007000000",
                "10000400ffffffff",
                "20000000ffffffff"
            )
        );
        assert_eq!(Acl::decode(&acl.encode()), Some(acl));
    }

    #[test]
    fn readers_named_twice_count_once() {
        let twice = Acl::for_folder(&[Reader::User(5), Reader::User(5)]);
        assert_eq!(twice, Acl::for_folder(&[Reader::User(5)]));
    }

    #[test]
    fn other_bytes_are_no_list() {
        let good = Acl::for_file(&[]).encode();
        for length in [0, 3, 5, good.len() - 1] {
            assert_eq!(Acl::decode(&good[..length]), None, "{length}");
        }
        let mut other_version = good;
        other_version[0] = 1;
        assert_eq!(Acl::decode(&other_version), None);
    }
}
