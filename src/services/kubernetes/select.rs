//! Which clusters an output of several is for.

use std::collections::{BTreeMap, HashSet};

use super::CALLED;
use crate::cluster::Client;
use crate::cluster::client::resources::Selection;
use crate::services::{Flag, FlagValue, lookup};
use crate::yaml::{Fields, Tree};

/// One more cluster by its name.
pub(in crate::services) const BY_NAME: Flag = Flag {
    name: "name-selector",
    yaml: "selectors",
    value: FlagValue::NameSelectors,
    required: false,
    help: "Name of a Kubernetes cluster; repeatable",
};

/// More clusters by their labels.
pub(in crate::services) const BY_LABELS: Flag = Flag {
    name: "label-selector",
    yaml: "selectors",
    value: FlagValue::LabelSelectors,
    required: false,
    help: "Labels that Kubernetes clusters have; repeatable, each adds clusters",
};

/// The key `selectors`: at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::services) struct Selectors(Vec<Selector>);

/// Which clusters are wanted, and what is special about them.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Selector {
    by: By,
    namespace: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum By {
    Name(String),
    Labels(BTreeMap<String, String>),
}

/// A cluster that a selector found.
#[derive(Debug, Clone)]
pub(in crate::services) struct Found {
    pub(in crate::services) name: String,
    pub(in crate::services) labels: BTreeMap<String, String>,
    /// The namespace that the selector gives its clusters' contexts.
    pub(in crate::services) namespace: Option<String>,
}

impl Selectors {
    pub(in crate::services) fn read(fields: &mut Fields<'_>) -> Option<Self> {
        let sections = fields.sections("selectors").unwrap_or_default();
        if sections.is_empty() {
            fields.error(
                "selectors",
                "at least one selector is needed",
                Some("write `- name: CLUSTER` or `- labels: {KEY: VALUE}`"),
            );
        }
        let listed = sections.len();
        let selectors: Vec<_> = sections.into_iter().filter_map(Selector::read).collect();
        (listed > 0 && selectors.len() == listed).then_some(Self(selectors))
    }

    pub(in crate::services) fn emit(&self) -> Tree {
        Tree::List(self.0.iter().map(Selector::emit).collect())
    }

    /// Whether any of them has a namespace for contexts.
    pub(in crate::services) fn name_namespaces(&self) -> bool {
        self.0.iter().any(|selector| selector.namespace.is_some())
    }

    /// The clusters, in the order of the selectors and then that of the Teleport cluster.
    pub(in crate::services) async fn find(&self, client: &Client) -> anyhow::Result<Vec<Found>> {
        let mut found = Vec::new();
        for selector in &self.0 {
            found.extend(Box::pin(selector.find(client)).await?);
        }
        Ok(distinct(found))
    }
}

/// Each cluster once: one that several selectors find counts for the first of them.
fn distinct(mut found: Vec<Found>) -> Vec<Found> {
    let mut seen = HashSet::new();
    found.retain(|item| seen.insert(item.name.clone()));
    found
}

impl Selector {
    fn read(mut fields: Fields<'_>) -> Option<Self> {
        let name = fields.string("name");
        let labels = fields.string_map("labels").unwrap_or_default();
        let namespace = fields.string("default_namespace");
        let by = match (name, labels.is_empty()) {
            (Some(name), true) => Some(By::Name(name)),
            (None, false) => Some(By::Labels(labels.into_iter().collect())),
            (Some(_), false) | (None, true) => {
                fields.error(
                    "name",
                    "a selector has either a name or labels",
                    Some("write `- name: CLUSTER` or `- labels: {KEY: VALUE}`"),
                );
                None
            }
        };
        fields.finish();
        Some(Self { by: by?, namespace })
    }

    fn emit(&self) -> Tree {
        let (name, labels) = match &self.by {
            By::Name(name) => (Some(Tree::text(name)), None),
            By::Labels(labels) => {
                let labels = labels
                    .iter()
                    .map(|(key, value)| (key.clone(), Tree::text(value)));
                (None, Some(Tree::Map(labels.collect())))
            }
        };
        Tree::map([
            ("name", name),
            ("labels", labels),
            ("default_namespace", self.namespace.as_ref().map(Tree::text)),
        ])
    }

    /// The clusters that it finds. By labels, none is no mistake.
    async fn find(&self, client: &Client) -> anyhow::Result<Vec<Found>> {
        let found = match &self.by {
            By::Name(name) => {
                let found = client.kubernetes_clusters(Selection::Name(name)).await?;
                vec![lookup::single(CALLED, name, found)?]
            }
            By::Labels(labels) => {
                client
                    .kubernetes_clusters(Selection::Labels(labels))
                    .await?
            }
        };
        Ok(found
            .into_iter()
            .map(|cluster| Found {
                name: cluster.name,
                labels: cluster.labels,
                namespace: self.namespace.clone(),
            })
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_counts_for_the_first_selector_that_finds_it() {
        let found = |name: &str, namespace: Option<&str>| Found {
            name: name.to_owned(),
            labels: BTreeMap::new(),
            namespace: namespace.map(str::to_owned),
        };
        let all = vec![found("k2", Some("a")), found("k1", None), found("k2", None)];
        let left: Vec<_> = distinct(all)
            .into_iter()
            .map(|item| (item.name, item.namespace))
            .collect();
        let expected = [
            ("k2".to_owned(), Some("a".to_owned())),
            ("k1".to_owned(), None),
        ];
        assert_eq!(left, expected);
    }
}
