//! Which workload identities of the cluster a service issues.

use std::collections::BTreeMap;

use crate::pb::teleport::workloadidentity::v1::LabelSelector;
use crate::yaml::{Fields, Tree};

/// One workload identity by its name, or all whose labels match.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Selector {
    /// The resource of this name. A refusal by the cluster is an error.
    Name(String),
    /// Every resource that has each of these labels with one of its values, up to the cluster's
    /// limit. Those that the caller may not have are left out by the cluster.
    Labels(BTreeMap<String, Vec<String>>),
}

impl Selector {
    /// Reads the `selector` key of a service; problems go to `fields`, and `None` comes back then.
    pub fn parse(fields: &mut Fields<'_>) -> Option<Self> {
        if !fields.has("selector") {
            fields.ignore("selector");
            fields.error(
                "selector",
                "`selector` is required",
                Some("name one workload identity (`name`), or select several (`labels`)"),
            );
            return None;
        }
        let mut section = fields.section("selector")?;
        let name = section.string("name");
        let labelled = section.has("labels");
        let labels = labels(&mut section);
        let selector = match (name, labelled) {
            (Some(_), true) => {
                section.error(
                    "",
                    "`name` and `labels` exclude each other",
                    Some("keep one"),
                );
                None
            }
            (None, false) => {
                section.error("", "one of `name` and `labels` is required", None);
                None
            }
            (Some(name), false) => Some(Self::Name(name)),
            (None, true) => labels.map(Self::Labels),
        };
        section.finish();
        selector
    }

    /// The `selector` section as written in a configuration file.
    pub fn emit(&self) -> Tree {
        match self {
            Self::Name(name) => Tree::map([("name", Some(Tree::text(name)))]),
            Self::Labels(labels) => {
                let lists = labels
                    .iter()
                    .map(|(key, values)| (key.clone(), Tree::texts(values.iter().cloned())))
                    .collect();
                Tree::map([("labels", Some(Tree::Map(lists)))])
            }
        }
    }

    /// The labels as the cluster takes them.
    pub(super) fn label_selectors(labels: &BTreeMap<String, Vec<String>>) -> Vec<LabelSelector> {
        labels
            .iter()
            .map(|(key, values)| LabelSelector {
                key: key.clone(),
                values: values.clone(),
            })
            .collect()
    }
}

/// Reads `labels`: at least one, each with at least one value.
fn labels(section: &mut Fields<'_>) -> Option<BTreeMap<String, Vec<String>>> {
    let mut lists = section.section("labels")?;
    let mut labels = BTreeMap::new();
    for key in lists.keys() {
        let given = lists.has(key);
        match lists.strings(key) {
            Some(values) if !values.is_empty() => {
                labels.insert(key.to_owned(), values);
            }
            // A value that is no list was reported where it was read.
            None if given => {}
            _ => lists.error(
                key,
                "needs at least one value",
                Some("`key: [value]`, or `['*']`"),
            ),
        }
    }
    if lists.keys().is_empty() {
        section.error("labels", "needs at least one label", None);
        return None;
    }
    let complete = labels.len() == lists.keys().len();
    complete.then_some(labels)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::yaml::{Problems, emit, parse};

    fn read(source: &str) -> (Option<Selector>, String) {
        let node = parse(source).unwrap();
        let problems = Problems::new();
        let mut fields = Fields::new(&node, "", &problems).unwrap();
        let selector = Selector::parse(&mut fields);
        fields.finish();
        (selector, problems.render("t"))
    }

    #[test]
    fn selectors_read_back() {
        for source in [
            "selector:\n  name: example\n",
            "selector:\n  labels:\n    env:\n      - prod\n      - dev\n    team:\n      - '*'\n",
        ] {
            let (selector, problems) = read(source);
            assert_eq!(problems, "");
            let written = Tree::map([("selector", Some(selector.unwrap().emit()))]);
            assert_eq!(read(&emit::emit(&written)), read(source));
        }
    }

    #[test]
    fn exactly_one_way_to_select() {
        for (source, expected) in [
            ("a: b", "`selector` is required"),
            ("selector:", "`selector` is required"),
            ("selector: {}", "one of `name` and `labels` is required"),
            (
                "selector: {name: ''}",
                "one of `name` and `labels` is required",
            ),
            (
                "selector: {name: x, labels: {a: [b]}}",
                "exclude each other",
            ),
            ("selector: {labels: {}}", "needs at least one label"),
            (
                "selector: {labels: {a: []}}",
                "selector.labels.a: needs at least one value",
            ),
            (
                "selector: {labels: {a: }}",
                "selector.labels.a: needs at least one value",
            ),
            (
                "selector: {labels: {a: b, c: []}}",
                "selector.labels.a: must be a list",
            ),
            ("selector: {labels: [a]}", "must be a mapping"),
            ("selector: x", "must be a mapping"),
        ] {
            let (selector, problems) = read(source);
            assert_eq!(selector, None, "{source}");
            assert!(problems.contains(expected), "{source}: {problems}");
        }
    }
}
