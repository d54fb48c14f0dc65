//! A Kubernetes Secret: one key of its data for each file, one server-side apply for each set.

mod client;
mod object;
mod place;
mod several;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

pub(crate) use self::several::{Secrets, manifest};

use self::client::Way;
use super::{Destination, DestinationKind, DestinationPlan, unescape};
use crate::env::Env;
use crate::yaml::{Fields, Tree};

/// The kind `kubernetes_secret`.
#[derive(Debug)]
pub(super) struct KubernetesSecret;

/// A configured Secret.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Settings {
    name: String,
    labels: BTreeMap<String, String>,
    way: Way,
}

impl DestinationKind for KubernetesSecret {
    fn name(&self) -> &'static str {
        "kubernetes_secret"
    }

    fn parse(&self, fields: &mut Fields<'_>) -> Option<Arc<dyn DestinationPlan>> {
        let mut good = true;
        let mut check = |fields: &Fields<'_>, key: &str, problem: Option<String>| {
            if let Some(problem) = problem {
                fields.error(key, problem, None);
                good = false;
            }
        };
        let name = fields.required("name");
        if let Some(name) = &name {
            check(fields, "name", name_problem(name));
        }
        let namespace = fields.string("namespace").filter(|text| !text.is_empty());
        if let Some(namespace) = &namespace {
            check(fields, "namespace", namespace_problem(namespace));
        }
        let labels: BTreeMap<_, _> = fields
            .string_map("labels")
            .unwrap_or_default()
            .into_iter()
            .collect();
        for (key, value) in &labels {
            check(fields, "labels", label_problem(key, value));
        }
        let text = |text: Option<String>| text.filter(|text| !text.is_empty());
        let kubeconfig_path = text(fields.string("kubeconfig_path")).map(PathBuf::from);
        let kubeconfig_context = text(fields.string("kubeconfig_context"));
        let name = name?;
        good.then(|| {
            Arc::new(Settings {
                name,
                labels,
                way: Way {
                    namespace,
                    kubeconfig_path,
                    kubeconfig_context,
                },
            }) as Arc<dyn DestinationPlan>
        })
    }

    fn parse_uri(&self, uri: &str) -> Option<Result<Arc<dyn DestinationPlan>, String>> {
        let ("kubernetes-secret", rest) = super::scheme(uri)? else {
            return None;
        };
        Some(of_uri(rest).map(|settings| Arc::new(settings) as Arc<dyn DestinationPlan>))
    }
}

/// `//[namespace]/name`, as upstream's newer versions read it.
fn of_uri(rest: &str) -> Result<Settings, String> {
    let form = "write kubernetes-secret:///name or kubernetes-secret://namespace/name";
    let rest = rest.split(['?', '#']).next().unwrap_or_default();
    let (namespace, name) = rest
        .strip_prefix("//")
        .and_then(|rest| rest.split_once('/'))
        .ok_or(form)?;
    let name = unescape(name).ok_or_else(|| format!("{name:?} has a malformed %-escape"))?;
    if name.is_empty() {
        return Err(format!("the Secret has no name: {form}"));
    }
    if let Some(problem) = name_problem(&name) {
        return Err(format!("{problem}; {form}"));
    }
    let namespace = (!namespace.is_empty()).then(|| namespace.to_owned());
    if let Some(problem) = namespace.as_deref().and_then(namespace_problem) {
        return Err(format!("{problem}; {form}"));
    }
    Ok(Settings {
        name,
        labels: BTreeMap::new(),
        way: Way {
            namespace,
            ..Way::default()
        },
    })
}

/// What keeps a text from being a DNS label (RFC 1123), which Kubernetes builds its names of.
fn is_label(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    (1..=63).contains(&text.len())
        && text.bytes().all(|b| inner(b) || b == b'-')
        && text.bytes().next().is_some_and(inner)
        && text.bytes().last().is_some_and(inner)
}

fn name_problem(name: &str) -> Option<String> {
    let subdomain = |text: &str| {
        let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        text.len() <= 253
            && text.split('.').all(|part| {
                part.bytes().all(|b| inner(b) || b == b'-')
                    && part.bytes().next().is_some_and(inner)
                    && part.bytes().last().is_some_and(inner)
            })
    };
    (!subdomain(name)).then(|| {
        format!(
            "{name:?} is no name for a Secret: at most 253 lower-case letters, digits, `-` and `.`, \
             with a letter or digit at both ends of each part"
        )
    })
}

/// What keeps a text from being the name of a namespace.
pub(crate) fn namespace_problem(name: &str) -> Option<String> {
    (!is_label(name)).then(|| {
        format!(
            "{name:?} is no name for a namespace: at most 63 lower-case letters, digits and `-`, \
             with a letter or digit at both ends"
        )
    })
}

/// What keeps two texts from being a label (or, with an empty value, the first from being the key of an
/// annotation).
pub(crate) fn label_problem(key: &str, value: &str) -> Option<String> {
    let part = |text: &str| {
        let ends = |b: u8| b.is_ascii_alphanumeric();
        text.len() <= 63
            && text.bytes().all(|b| ends(b) || b"-_.".contains(&b))
            && text.bytes().next().is_some_and(ends)
            && text.bytes().last().is_some_and(ends)
    };
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    if !part(name) || prefix.is_some_and(|prefix| name_problem(prefix).is_some()) {
        return Some(format!(
            "{key:?} is no name for a label: write `name` or `example.com/name`, the name with at \
             most 63 letters, digits, `-`, `_` and `.`"
        ));
    }
    if !value.is_empty() && !part(value) {
        return Some(format!(
            "{value:?} is no value for the label {key}: at most 63 letters, digits, `-`, `_` and `.`, \
             with a letter or digit at both ends"
        ));
    }
    None
}

impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("kubernetes_secret: ")?;
        if let Some(namespace) = &self.way.namespace {
            write!(f, "{namespace}/")?;
        }
        f.write_str(&self.name)
    }
}

impl DestinationPlan for Settings {
    fn key(&self) -> String {
        let namespace = self.way.namespace.as_deref().unwrap_or_default();
        format!("kubernetes-secret://{namespace}/{}", self.name)
    }

    fn has_folders(&self) -> bool {
        false
    }

    fn emit(&self) -> Tree {
        let labels = self
            .labels
            .iter()
            .map(|(key, value)| (key.clone(), Tree::text(value)));
        let path = self.way.kubeconfig_path.as_ref();
        Tree::map([
            ("type", Some(Tree::text("kubernetes_secret"))),
            ("name", Some(Tree::text(&self.name))),
            ("namespace", self.way.namespace.as_ref().map(Tree::text)),
            (
                "labels",
                (!self.labels.is_empty()).then(|| Tree::Map(labels.collect())),
            ),
            (
                "kubeconfig_path",
                path.map(|path| Tree::text(path.display().to_string())),
            ),
            (
                "kubeconfig_context",
                self.way.kubeconfig_context.as_ref().map(Tree::text),
            ),
        ])
    }

    fn build(&self) -> Arc<dyn Destination> {
        Arc::new(place::Place::new(self.clone(), Env::of_process()))
    }
}

#[cfg(test)]
mod tests;
