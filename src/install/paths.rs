//! Which directories an agent with a given plan must be able to write.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use crate::config::Plan;
use crate::yaml::Tree;

/// Directories by what systemd has to do for each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Below `/var/lib`, for the bot's own storage: systemd makes it, owned by the service's user.
    pub state: Option<PathBuf>,
    /// Below `/run`, which is empty after each boot: systemd makes them.
    pub runtime: BTreeSet<PathBuf>,
    /// Output directories and storage elsewhere; private to the service's user.
    pub private: BTreeSet<PathBuf>,
    /// Directories of sockets, which other users must be able to enter.
    pub shared: BTreeSet<PathBuf>,
}

impl Access {
    /// What `plan` writes to.
    #[must_use]
    pub fn of(plan: &Plan) -> Self {
        let mut access = Self::default();
        if let Some(storage) = directory(&plan.storage.key()) {
            match storage.strip_prefix("/var/lib") {
                Ok(below) if is_plain(below) => access.state = Some(below.to_owned()),
                Ok(_) | Err(_) => access.add(&storage, false),
            }
        }
        for service in &plan.services {
            if let Some(path) = service.plan.destination().and_then(|d| directory(&d.key())) {
                access.add(&path, false);
            }
            for (key, value) in service.plan.emit() {
                if key == "listen"
                    && let Tree::Text(uri) = value
                    && let Some(socket) = uri.strip_prefix("unix://").map(Path::new)
                    && let Some(parent) = socket.parent().filter(|_| socket.is_absolute())
                {
                    access.add(parent, true);
                }
            }
        }
        access
    }

    /// Adds the directory of a file that the agent makes itself.
    pub fn add_parent_of(&mut self, file: &Path) {
        if let Some(parent) = file.parent() {
            self.add(parent, true);
        }
    }

    /// Directories that systemd does not make.
    pub fn outside(&self) -> impl Iterator<Item = &PathBuf> {
        self.private.iter().chain(&self.shared)
    }

    fn add(&mut self, path: &Path, shared: bool) {
        let run = path
            .strip_prefix("/run")
            .or_else(|_| path.strip_prefix("/var/run"));
        match run {
            Ok(below) if is_plain(below) => {
                self.runtime.insert(below.to_owned());
            }
            Ok(_) | Err(_) if shared => {
                if !self.private.contains(path) {
                    self.shared.insert(path.to_owned());
                }
            }
            Ok(_) | Err(_) => {
                self.shared.remove(path);
                self.private.insert(path.to_owned());
            }
        }
    }
}

/// The absolute directory in a destination's key.
fn directory(key: &str) -> Option<PathBuf> {
    let path = PathBuf::from(key.strip_prefix("file://")?);
    path.is_absolute().then_some(path)
}

/// Something below, without `..`: a form that `StateDirectory=` takes.
fn is_plain(below: &Path) -> bool {
    below.components().next().is_some()
        && below
            .components()
            .all(|c| matches!(c, Component::Normal(_)))
}
