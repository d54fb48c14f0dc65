//! What flags and environment variables change in the tree that a file gave.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use crate::secret::Secret;
use crate::yaml::{Key, Node, Problem, Problems, Severity, Span, Value};

/// Where a value came from: a flag as it is typed (`--token`) or a variable's name.
pub type Origin = String;

/// Changes to the tree. Values that are not set change nothing.
#[derive(Clone, Default)]
pub struct Overlay {
    /// Texts for keys of the root (`proxy_server`, `credential_ttl`, …). One that replaces a value
    /// of the file says so.
    pub values: Vec<(&'static str, String, Origin)>,
    /// Switches of the root (`debug`, `insecure`, `oneshot`, `fips`): what was typed wins in either
    /// direction, without a word.
    pub switches: Vec<(&'static str, bool, Origin)>,
    /// The bot's storage, as a destination section.
    pub storage: Option<(Node, Origin)>,
    /// Token, join method and pins. Any of them replaces the whole `onboarding` section.
    pub onboarding: OnboardingFlags,
    /// A service to append.
    pub service: Option<ServiceFlags>,
    /// The legacy `--destination-dir`: `services` becomes one identity service there.
    pub only_destination: Option<String>,
    /// Where the process id is written; exists as a flag only.
    pub pid_file: Option<PathBuf>,
    /// The updater's diagnostics socket; exists as a flag only.
    pub diag_socket: Option<PathBuf>,
}

impl fmt::Debug for Overlay {
    /// Which keys are set, and by what; values may be secrets (`join_uri` holds a token).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let values = self.values.iter().map(|(key, _, origin)| (key, origin));
        f.debug_struct("Overlay")
            .field("values", &values.collect::<Vec<_>>())
            .field("switches", &self.switches)
            .field("onboarding", &self.onboarding)
            .finish_non_exhaustive()
    }
}

/// The flags that replace `onboarding`.
#[derive(Debug, Clone, Default)]
pub struct OnboardingFlags {
    /// Value or absolute path.
    pub token: Option<(Secret<String>, Origin)>,
    /// The method's name.
    pub join_method: Option<(String, Origin)>,
    /// Pins, possibly none.
    pub ca_pins: Vec<String>,
    /// Values for keys of `bound_keypair`: they are added to what else the section has.
    pub bound_keypair: Vec<(&'static str, Secret<String>, Origin)>,
}

/// A service that the command line describes.
#[derive(Debug, Clone)]
pub struct ServiceFlags {
    /// The service's mapping, `type` included.
    pub node: Node,
    /// Which flag set which dotted path below it.
    pub origins: BTreeMap<String, Origin>,
    /// What to call the rest of it: the subcommand.
    pub command: Origin,
}

/// Which flag stands behind a key path, for messages about values that are in no file.
#[derive(Debug, Default)]
pub(super) struct Origins(BTreeMap<String, Origin>);

impl Origins {
    /// The origin of `path` or of the nearest mapping or list around it.
    pub(super) fn of(&self, path: &str) -> Option<&str> {
        let mut rest = path;
        loop {
            if let Some(origin) = self.0.get(rest) {
                return Some(origin);
            }
            let cut = rest.rfind(['.', '['])?;
            rest = rest.get(..cut)?;
        }
    }

    fn add(&mut self, path: impl Into<String>, origin: &str) {
        self.0.insert(path.into(), origin.to_owned());
    }
}

impl Overlay {
    /// Changes `tree`, with warnings where the file's word is overruled.
    pub(super) fn apply(&self, tree: &mut Node, problems: &Problems) -> Origins {
        let mut origins = Origins::default();
        for (key, text, origin) in &self.values {
            if let Some(old) = present(tree, key)
                && old.text() != Some(text.as_str())
            {
                let shown = match old.text() {
                    Some(_) if *key == "join_uri" => "the value".to_owned(),
                    Some(old) => format!("{old:?}"),
                    None => "the value".to_owned(),
                };
                overruled(
                    problems,
                    old.span,
                    key,
                    &format!("{origin} replaces {shown} of the file"),
                );
            }
            tree.set(key, Node::made_text(text));
            origins.add(*key, origin);
        }
        for (key, value, origin) in &self.switches {
            let text = value.to_string();
            tree.set(
                key,
                Node::made(Value::Scalar {
                    text,
                    quoted: false,
                }),
            );
            origins.add(*key, origin);
        }
        if let Some((node, origin)) = &self.storage {
            if let Some(old) = present(tree, "storage") {
                overruled(
                    problems,
                    old.span,
                    "storage",
                    &format!("{origin} replaces it"),
                );
            }
            tree.set("storage", node.clone());
            origins.add("storage", origin);
        }
        self.onboarding.apply(tree, problems, &mut origins);
        if let Some(path) = &self.only_destination {
            if let Some(old) = present(tree, "services") {
                let message = "--destination-dir replaces all of it by one identity service";
                overruled(problems, old.span, "services", message);
            }
            let mut service = Node::made(Value::Null);
            service.set("type", Node::made_text("identity"));
            service.set("destination.type", Node::made_text("directory"));
            service.set("destination.path", Node::made_text(path));
            tree.set("services", Node::made(Value::Sequence(vec![service])));
            origins.add("services", "--destination-dir");
        }
        if let Some(service) = &self.service {
            service.append(tree, &mut origins);
        }
        origins
    }
}

impl OnboardingFlags {
    fn apply(&self, tree: &mut Node, problems: &Problems, origins: &mut Origins) {
        let mut section = Node::made(Value::Null);
        if let Some((token, origin)) = &self.token {
            section.set("token", Node::made_text(token.expose()));
            origins.add("onboarding.token", origin);
        }
        if let Some((method, origin)) = &self.join_method {
            section.set("join_method", Node::made_text(method));
            origins.add("onboarding.join_method", origin);
        }
        if !self.ca_pins.is_empty() {
            let pins = self.ca_pins.iter().map(Node::made_text).collect();
            section.set("ca_pins", Node::made(Value::Sequence(pins)));
            origins.add("onboarding.ca_pins", "--ca-pin");
        }
        if section.value == Value::Null {
            self.apply_bound_keypair(tree, origins);
            return;
        }
        if let Some(old) = present(tree, "onboarding") {
            let by: Vec<&str> = [
                self.token.as_ref().map(|(_, origin)| origin.as_str()),
                self.join_method.as_ref().map(|(_, origin)| origin.as_str()),
                (!self.ca_pins.is_empty()).then_some("--ca-pin"),
            ]
            .into_iter()
            .flatten()
            .collect();
            overruled(
                problems,
                old.span,
                "onboarding",
                &format!("{} replaces the whole section", by.join(" with ")),
            );
        }
        tree.set("onboarding", section);
        self.apply_bound_keypair(tree, origins);
    }

    fn apply_bound_keypair(&self, tree: &mut Node, origins: &mut Origins) {
        for (key, text, origin) in &self.bound_keypair {
            let path = format!("onboarding.bound_keypair.{key}");
            tree.set(&path, Node::made_text(text.expose()));
            origins.add(path, origin);
        }
    }
}

impl ServiceFlags {
    fn append(&self, tree: &mut Node, origins: &mut Origins) {
        if tree
            .get("services")
            .is_none_or(|node| node.value == Value::Null)
        {
            tree.set("services", Node::made(Value::Sequence(Vec::new())));
        }
        let Value::Mapping(entries) = &mut tree.value else {
            return;
        };
        let list = entries
            .iter_mut()
            .find(|(Key { text, .. }, _)| text == "services");
        if let Some((
            _,
            Node {
                value: Value::Sequence(items),
                ..
            },
        )) = list
        {
            let path = format!("services[{}]", items.len());
            items.push(self.node.clone());
            origins.add(path.as_str(), &self.command);
            for (below, origin) in &self.origins {
                origins.add(format!("{path}.{below}"), origin);
            }
        }
    }
}

/// The value that the file itself has under `key`.
fn present<'t>(tree: &'t Node, key: &str) -> Option<&'t Node> {
    tree.get(key)
        .filter(|node| node.value != Value::Null && node.span.line > 0)
}

fn overruled(problems: &Problems, span: Span, path: &str, message: &str) {
    problems.push(Problem {
        severity: Severity::Warning,
        span: Some(span),
        path: path.to_owned(),
        message: message.to_owned(),
        hint: None,
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_output_shows_no_values() {
        let overlay = Overlay {
            values: vec![(
                "join_uri",
                "tbot+proxy+token://canary@example.org:443".to_owned(),
                "--join-uri".to_owned(),
            )],
            onboarding: OnboardingFlags {
                token: Some((Secret::new("canary".to_owned()), "--token".to_owned())),
                ..OnboardingFlags::default()
            },
            ..Overlay::default()
        };
        let shown = format!("{overlay:?}");
        assert!(!shown.contains("canary"), "{shown}");
        assert!(
            shown.contains("join_uri") && shown.contains("--token"),
            "{shown}"
        );
    }
}
