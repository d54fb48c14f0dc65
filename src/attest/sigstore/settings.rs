//! What is configured of the attestor.

use std::path::PathBuf;

use super::guard::Prefix;
use super::reference::is_host;
use crate::yaml::{Fields, Tree};

/// Its keys, beside `enabled`.
pub(super) const KEYS: [&str; 3] = [REGISTRIES, CREDENTIALS, PREFIXES];
const REGISTRIES: &str = "additional_registries";
const CREDENTIALS: &str = "credentials_path";
const PREFIXES: &str = "allowed_private_network_prefixes";

/// The section as it was configured.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Settings {
    /// Registries that are asked beside the image's own.
    pub(super) registries: Vec<String>,
    pub(super) credentials: Option<PathBuf>,
    pub(super) allowed: Vec<Prefix>,
}

impl Settings {
    /// Reads the keys; `None` if there are problems, which were reported.
    pub(super) fn parse(fields: &mut Fields<'_>) -> Option<Self> {
        let mut sound = true;
        let mut registries = Vec::new();
        for mut registry in fields.sections(REGISTRIES).unwrap_or_default() {
            match registry.required("host") {
                Some(host) if is_host(&host) => registries.push(host),
                Some(host) => {
                    registry.error(
                        "host",
                        format!("{host:?} is no registry"),
                        Some("a host, with a port if need be: registry.example.org:5000"),
                    );
                    sound = false;
                }
                None => sound = false,
            }
            registry.finish();
        }
        let credentials = fields.string(CREDENTIALS).map(PathBuf::from);
        if let Some(path) = credentials.as_deref().filter(|path| !path.is_file()) {
            fields.error(
                CREDENTIALS,
                format!("{} is no file", path.display()),
                Some("a configuration of Docker, as `docker login` writes it"),
            );
            sound = false;
        }
        let mut allowed = Vec::new();
        for text in fields.strings(PREFIXES).unwrap_or_default() {
            match Prefix::parse(&text) {
                Some(prefix) => allowed.push(prefix),
                None => {
                    fields.error(
                        PREFIXES,
                        format!("{text:?} is no range of addresses"),
                        Some("an address and a number of bits, as 10.0.0.0/8 or fd00::/8"),
                    );
                    sound = false;
                }
            }
        }
        sound.then_some(Self {
            registries,
            credentials,
            allowed,
        })
    }

    /// The attestor's section.
    pub(super) fn emit(&self) -> Tree {
        let some = |items: Vec<Tree>| (!items.is_empty()).then_some(Tree::List(items));
        let registry = |host: &String| Tree::map([("host", Some(Tree::text(host)))]);
        let path = self
            .credentials
            .as_ref()
            .map(|path| path.display().to_string());
        Tree::map([
            ("enabled", Some(Tree::Bool(true))),
            (
                "additional_registries",
                some(self.registries.iter().map(registry).collect()),
            ),
            ("credentials_path", path.map(Tree::text)),
            (
                "allowed_private_network_prefixes",
                some(
                    self.allowed
                        .iter()
                        .map(|p| Tree::text(p.to_string()))
                        .collect(),
                ),
            ),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::yaml::{Problems, emit, parse};

    fn read(source: &str) -> (Option<Settings>, String) {
        let node = parse(source).unwrap();
        let problems = Problems::new();
        let mut fields = Fields::new(&node, "", &problems).unwrap();
        let settings = Settings::parse(&mut fields);
        fields.ignore("enabled");
        fields.finish();
        (settings, problems.render("t"))
    }

    #[test]
    fn what_is_configured_reads_back() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let source = format!(
            "enabled: true\nadditional_registries:\n- host: r.example.org:5000\n- host: x.org\n\
             credentials_path: {}\nallowed_private_network_prefixes:\n- 10.0.0.0/8\n- fd00::/8\n",
            file.path().display()
        );
        let (settings, problems) = read(&source);
        assert_eq!(problems, "");
        let settings = settings.unwrap();
        assert_eq!(settings.registries, ["r.example.org:5000", "x.org"]);
        assert_eq!(read(&emit::emit(&settings.emit())).0.unwrap(), settings);
        assert_eq!(emit::emit(&Settings::default().emit()), "enabled: true\n");
    }

    #[test]
    fn problems_are_told() {
        for (source, expected) in [
            (
                "additional_registries: [{host: 'https://x'}]",
                "is no registry",
            ),
            (
                "additional_registries: [{}]",
                "additional_registries[0].host",
            ),
            (
                "credentials_path: /nonexistent/x",
                "/nonexistent/x is no file",
            ),
            ("credentials_path: /tmp", "/tmp is no file"),
            (
                "allowed_private_network_prefixes: [10.0.0.1]",
                "no range of addresses",
            ),
        ] {
            let (settings, problems) = read(source);
            assert_eq!(settings, None, "{source}");
            assert!(problems.contains(expected), "{problems}");
        }
    }
}
