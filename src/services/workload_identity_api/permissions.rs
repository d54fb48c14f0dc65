//! Who may connect: mode and owner of the unix socket, the `socket` section.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use nix::unistd::{Gid, Group, Uid, User, chown};

use crate::yaml::{Fields, Tree};

/// The mode that upstream gives the socket: who gets what is decided by attestation and by the
/// directory.
const EVERYBODY: u32 = 0o777;

/// Mode and owner of the socket; unset ones stay as they come: open to everybody, owned by the agent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Permissions {
    mode: Option<u32>,
    user: Option<String>,
    group: Option<String>,
}

impl Permissions {
    /// Reads the section; `None` if it has problems.
    pub(super) fn parse(fields: &mut Fields<'_>) -> Option<Self> {
        if !fields.has("socket") {
            fields.ignore("socket");
            return Some(Self::default());
        }
        let mut section = fields.section("socket")?;
        let mode = section.string("mode").map(|text| {
            let mode = mode(&text);
            if mode.is_none() {
                section.error(
                    "mode",
                    format!("{text:?} is no mode of a file in octal digits, at most 0777"),
                    Some("for example \"0660\": to connect takes the right to write"),
                );
            }
            mode.unwrap_or_default()
        });
        let permissions = Self {
            mode,
            user: section.string("user"),
            group: section.string("group"),
        };
        let sound = !section.problems().has_errors();
        section.finish();
        sound.then_some(permissions)
    }

    /// The section with what is set; `None` if nothing is, as upstream knows no such section.
    pub(super) fn emit(&self) -> Option<Tree> {
        let set = *self != Self::default();
        set.then(|| {
            Tree::map([
                (
                    "mode",
                    self.mode.map(|mode| Tree::text(format!("{mode:04o}"))),
                ),
                ("user", self.user.as_ref().map(Tree::text)),
                ("group", self.group.as_ref().map(Tree::text)),
            ])
        })
    }

    /// Gives the socket at `path` its mode and its owner; the error says what to do.
    pub(super) fn apply(&self, path: &Path) -> Result<(), String> {
        let mode = self.mode.unwrap_or(EVERYBODY);
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
            .map_err(|error| format!("setting the mode {mode:04o} of the socket: {error}"))?;
        let uid = self.user.as_deref().map(user).transpose()?;
        let gid = self.group.as_deref().map(group).transpose()?;
        if uid.is_none() && gid.is_none() {
            return Ok(());
        }
        chown(path, uid, gid).map_err(|error| {
            format!(
                "giving the socket to {}:{}: {error}: only root gives files away, and others only to a \
                 group that they are in",
                self.user.as_deref().unwrap_or_default(),
                self.group.as_deref().unwrap_or_default()
            )
        })
    }
}

fn mode(text: &str) -> Option<u32> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    let octal = !digits.is_empty() && digits.bytes().all(|digit| (b'0'..=b'7').contains(&digit));
    u32::from_str_radix(digits, 8)
        .ok()
        .filter(|mode| octal && *mode <= EVERYBODY)
}

fn user(name: &str) -> Result<Uid, String> {
    if let Ok(id) = name.parse() {
        return Ok(Uid::from_raw(id));
    }
    let found = User::from_name(name).map_err(|error| format!("looking up {name}: {error}"))?;
    found
        .map(|user| user.uid)
        .ok_or_else(|| format!("socket.user: there is no user {name} on this machine"))
}

fn group(name: &str) -> Result<Gid, String> {
    if let Ok(id) = name.parse() {
        return Ok(Gid::from_raw(id));
    }
    let found = Group::from_name(name).map_err(|error| format!("looking up {name}: {error}"))?;
    found
        .map(|group| group.gid)
        .ok_or_else(|| format!("socket.group: there is no group {name} on this machine"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;
    use crate::yaml::{Problems, emit, parse};

    fn read(source: &str) -> (Option<Permissions>, String) {
        let node = parse(source).unwrap();
        let problems = Problems::new();
        let mut fields = Fields::new(&node, "", &problems).unwrap();
        let permissions = Permissions::parse(&mut fields);
        fields.finish();
        (permissions, problems.render("t"))
    }

    #[test]
    fn what_is_set_is_written_back() {
        assert_eq!(read("a:\n").0.unwrap().emit(), None);
        for (source, mode) in [
            ("mode: 0660", "\"0660\""),
            ("mode: \"660\"", "\"0660\""),
            ("mode: 0o7", "\"0007\""),
        ] {
            let (permissions, problems) = read(&format!("socket: {{{source}, group: workloads}}"));
            assert_eq!(problems, "");
            let text = emit::emit(&permissions.unwrap().emit().unwrap());
            assert_eq!(text, format!("mode: {mode}\ngroup: workloads\n"));
        }
    }

    #[test]
    fn bad_modes_are_told() {
        for mode in ["rw", "888", "01777", "+7", "0x1", "-1", "0o"] {
            let (permissions, problems) = read(&format!("socket: {{mode: \"{mode}\"}}"));
            assert!(permissions.is_none(), "{mode}");
            assert!(problems.contains("socket.mode: "), "{mode}: {problems}");
        }
        let (_, problems) = read("socket: {owner: x}");
        assert!(problems.contains("socket.owner"), "{problems}");
    }

    #[test]
    fn mode_and_owner_are_set() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        std::fs::write(&path, "").unwrap();
        let own = Gid::current().as_raw();
        let permissions = Permissions {
            mode: Some(0o620),
            user: None,
            group: Some(own.to_string()),
        };
        permissions.apply(&path).unwrap();
        let meta = std::fs::metadata(&path).unwrap();
        assert_eq!((meta.mode() & 0o7777, meta.gid()), (0o620, own));
        for (user, group) in [(Some("no-such-user"), None), (None, Some("no-such-group"))] {
            let permissions = Permissions {
                mode: None,
                user: user.map(str::to_owned),
                group: group.map(str::to_owned),
            };
            let problem = permissions.apply(&path).unwrap_err();
            assert!(problem.contains("there is no"), "{problem}");
        }
    }
}
