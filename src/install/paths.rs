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
    /// Those of `runtime` that hold state: it has to outlive the service, and is nobody else's.
    pub kept: BTreeSet<PathBuf>,
    /// Output directories and storage elsewhere; private to the service's user.
    pub private: BTreeSet<PathBuf>,
    /// Directories of sockets, which other users must be able to enter.
    pub shared: BTreeSet<PathBuf>,
    /// Whether it looks at the programs of those who connect to its sockets.
    pub attests: bool,
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
            let section = service.plan.emit();
            let attests = section.iter().any(|(key, _)| key == "attestors");
            for (key, value) in section {
                if key == "listen"
                    && let Tree::Text(uri) = value
                    && let Some(socket) = uri.strip_prefix("unix://").map(Path::new)
                    && let Some(parent) = socket.parent().filter(|_| socket.is_absolute())
                {
                    access.attests |= attests;
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

    /// Takes out what `user` cannot be given: directories such as `/run` and `/opt` belong to the
    /// whole machine. Returns what to do instead, one line each.
    pub fn take_common(&mut self, user: &str) -> Vec<String> {
        if user == "root" {
            return Vec::new();
        }
        let common = |path: &PathBuf| is_common(path);
        let found: Vec<PathBuf> = self
            .shared
            .extract_if(.., common)
            .chain(self.private.extract_if(.., common))
            .collect();
        found.iter().map(|path| instead_of(path, user)).collect()
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
                if !shared {
                    self.kept.insert(below.to_owned());
                }
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

/// What to tell about a file that the agent is to make in a directory of the machine.
pub fn instead_of(common: &Path, user: &str) -> String {
    format!(
        "{user} cannot make files in {}, which belongs to the whole machine: choose a directory of \
         their own, for example {}",
        common.display(),
        common.join("tbot").display()
    )
}

/// Whether a directory is one that every machine has and many programs share. `/tmp` and `/var/tmp`
/// are made for everyone to write to.
pub fn is_common(path: &Path) -> bool {
    const COMMON: [&str; 21] = [
        "/",
        "/bin",
        "/boot",
        "/dev",
        "/etc",
        "/home",
        "/lib",
        "/media",
        "/mnt",
        "/opt",
        "/root",
        "/run",
        "/sbin",
        "/srv",
        "/usr",
        "/usr/local",
        "/var",
        "/var/cache",
        "/var/lib",
        "/var/log",
        "/var/run",
    ];
    COMMON.iter().any(|common| path == Path::new(common))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Overlay, Source, load};
    use crate::env::Env;

    fn access(services: &str) -> Access {
        let text = format!("version: v2\nonboarding: {{join_method: iam}}\n{services}");
        let source = Source {
            name: "tbot.yaml".to_owned(),
            text,
        };
        let loaded = load(Some(&source), &Overlay::default(), &Env::default()).unwrap();
        Access::of(&loaded.plan)
    }

    fn paths(all: &[&str]) -> BTreeSet<PathBuf> {
        all.iter().map(PathBuf::from).collect()
    }

    #[test]
    fn state_below_run_is_kept_and_sockets_are_not_state() {
        let found = access(
            "storage: {type: directory, path: /run/bot}\nservices:\n\
             - {type: identity, destination: {type: directory, path: /run/app/id}}\n\
             - {type: workload-identity-api, listen: unix:///run/api/w.sock, selector: {name: x}}\n",
        );
        assert_eq!(found.runtime, paths(&["bot", "app/id", "api"]));
        assert_eq!(found.kept, paths(&["bot", "app/id"]));
        assert!(found.state.is_none() && found.outside().next().is_none());
        assert!(found.attests);
    }

    #[test]
    fn directories_of_the_machine_are_not_given_away() {
        let mut found = access(
            "storage: {type: directory, path: /opt/bot}\nservices:\n\
             - {type: workload-identity-api, listen: unix:///opt/w.sock, selector: {name: x}}\n\
             - {type: workload-identity-api, listen: unix:///run/w.sock, selector: {name: x}}\n\
             - {type: workload-identity-api, listen: unix:///tmp/w.sock, selector: {name: x}}\n",
        );
        let mut of_root = found.clone();
        assert!(of_root.take_common("root").is_empty());
        assert_eq!(of_root, found);
        let lines = found.take_common("teleport");
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(
            lines[0].contains("/opt/tbot") && lines[1].contains("/run/tbot"),
            "{lines:?}"
        );
        assert_eq!(found.private, paths(&["/opt/bot"]));
        assert_eq!(found.shared, paths(&["/tmp"]));
    }
}
