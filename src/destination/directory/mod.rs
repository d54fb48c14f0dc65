//! A directory of the file system, written as whole sets.

mod place;
mod prepare;
mod set;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use super::{Destination, DestinationError, DestinationKind, DestinationPlan, Preparation};
use crate::fsx::{Symlinks, acl, clean};
use crate::yaml::{Fields, Tree};

/// The kind `directory`.
#[derive(Debug)]
pub(super) struct Directory;

/// What to do about access control lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum AclMode {
    Off,
    #[default]
    Try,
    Required,
}

impl AclMode {
    const ALL: [Self; 3] = [Self::Try, Self::Required, Self::Off];

    fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Try => "try",
            Self::Required => "required",
        }
    }
}

/// Who may read beside the bot, by name or number.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Reader {
    User(String),
    Group(String),
}

impl Reader {
    /// The reader's number. Numbers need not exist, names must.
    fn resolve(&self) -> Result<acl::Reader, String> {
        self.number()
            .map_err(|problem| format!("readers: {problem}"))
    }

    fn number(&self) -> Result<acl::Reader, String> {
        let (what, name) = match self {
            Self::User(name) => ("user", name),
            Self::Group(name) => ("group", name),
        };
        let id = match name.parse() {
            Ok(id) => Ok(Some(id)),
            Err(_not_a_number) => match self {
                Self::User(name) => nix::unistd::User::from_name(name)
                    .map(|user| user.map(|user| user.uid.as_raw())),
                Self::Group(name) => nix::unistd::Group::from_name(name)
                    .map(|group| group.map(|group| group.gid.as_raw())),
            },
        };
        match (self, id) {
            (Self::User(_), Ok(Some(id))) => Ok(acl::Reader::User(id)),
            (Self::Group(_), Ok(Some(id))) => Ok(acl::Reader::Group(id)),
            (_, Ok(None)) => Err(format!("there is no {what} {name:?} on this machine")),
            (_, Err(error)) => Err(format!("cannot look up the {what} {name:?}: {error}")),
        }
    }
}

/// A configured directory.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Settings {
    path: PathBuf,
    symlinks: Symlinks,
    acls: AclMode,
    readers: Vec<Reader>,
}

impl Settings {
    fn of_path(path: PathBuf) -> Self {
        Self {
            path,
            symlinks: Symlinks::default(),
            acls: AclMode::default(),
            readers: Vec::new(),
        }
    }
}

impl DestinationKind for Directory {
    fn name(&self) -> &'static str {
        "directory"
    }

    fn parse(&self, fields: &mut Fields<'_>) -> Option<Arc<dyn DestinationPlan>> {
        let path = fields.required("path");
        let symlinks = match fields.one_of("symlinks", &Symlinks::NAMES) {
            Some(name) => Symlinks::from_name(&name)?,
            None => Symlinks::default(),
        };
        let acls = match fields.one_of("acls", &AclMode::ALL.map(AclMode::name)) {
            Some(name) => AclMode::ALL.into_iter().find(|mode| mode.name() == name)?,
            None => AclMode::default(),
        };
        let mut readers = Vec::new();
        for mut section in fields.sections("readers").unwrap_or_default() {
            match (section.string("user"), section.string("group")) {
                (Some(name), None) => readers.push(Reader::User(name)),
                (None, Some(name)) => readers.push(Reader::Group(name)),
                (None, None) | (Some(_), Some(_)) => section.error(
                    "user",
                    "a reader is either a user or a group",
                    Some("write `- user: NAME` or `- group: NAME`"),
                ),
            }
            section.finish();
        }
        let path = path?;
        if path.is_empty() {
            fields.error("path", "the path must not be empty", None);
            return None;
        }
        Some(Arc::new(Settings {
            path: PathBuf::from(path),
            symlinks,
            acls,
            readers,
        }))
    }

    fn parse_uri(&self, uri: &str) -> Option<Result<Arc<dyn DestinationPlan>, String>> {
        let rest = match super::scheme(uri) {
            None => uri,
            Some(("file", rest)) => rest,
            Some(_) => return None,
        };
        Some(
            path_of(rest).map(|path| Arc::new(Settings::of_path(path)) as Arc<dyn DestinationPlan>),
        )
    }
}

/// The path of a URI without its scheme: host refused, query and fragment cut, escapes resolved.
fn path_of(rest: &str) -> Result<PathBuf, String> {
    let path = match rest.strip_prefix("//") {
        None => rest,
        Some(authority) if authority.starts_with('/') || authority.is_empty() => authority,
        Some(authority) => {
            let host = authority.split('/').next().unwrap_or_default();
            return Err(format!(
                "{host:?} stands where a host would: write file:///path, with three slashes"
            ));
        }
    };
    let path = path.split(['?', '#']).next().unwrap_or_default();
    let path =
        crate::query::unescape(path).ok_or_else(|| format!("{path:?} has a malformed %-escape"))?;
    if path.is_empty() {
        return Err("the path must not be empty".to_owned());
    }
    Ok(PathBuf::from(path))
}

impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "directory: {}", self.path.display())
    }
}

impl DestinationPlan for Settings {
    fn key(&self) -> String {
        format!("file://{}", clean(&self.path).display())
    }

    fn emit(&self) -> Tree {
        let readers = self.readers.iter().map(|reader| {
            Tree::map([match reader {
                Reader::User(name) => ("user", Some(Tree::text(name))),
                Reader::Group(name) => ("group", Some(Tree::text(name))),
            }])
        });
        Tree::map([
            ("type", Some(Tree::text("directory"))),
            ("path", Some(Tree::text(self.path.display().to_string()))),
            ("symlinks", Some(Tree::text(self.symlinks.name()))),
            ("acls", Some(Tree::text(self.acls.name()))),
            (
                "readers",
                (!self.readers.is_empty()).then(|| Tree::List(readers.collect())),
            ),
        ])
    }

    fn build(&self) -> Arc<dyn Destination> {
        Arc::new(place::Place::new(self.clone()))
    }

    fn prepare(&self, how: &Preparation) -> Result<(), DestinationError> {
        prepare::prepare(&place::Inner::new(self.clone()), how)
    }
}

#[cfg(test)]
mod tests;
