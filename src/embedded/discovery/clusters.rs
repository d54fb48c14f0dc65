//! From what AWS describes to `kube_cluster` resources, and what has to change. Names and labels are
//! those of upstream (`lib/srv/discovery/common`), so that roles and selectors mean the same.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::config::Matcher;
use super::eks::Cluster;
use crate::embedded::access::matches;
use crate::embedded::resources::{Change, is_label_key};
use crate::embedded::store::Resource;

/// What clusters become.
pub(super) const KIND: &str = "kube_cluster";

/// Tags that name the resource, in the order in which they count.
const NAME_TAGS: &[&str] = &["TeleportKubernetesName", "teleport.dev/kubernetes-name"];

/// What one look around found.
#[derive(Debug, Default)]
pub(super) struct Round {
    /// Clusters that match, as resources.
    pub(super) found: Vec<Resource>,
    /// What could not be looked at.
    pub(super) blind: Vec<Blind>,
}

/// A region, or one cluster of it, of which nothing is known this time.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Blind {
    region: String,
    cluster: Option<String>,
}

impl Blind {
    pub(super) fn region(region: impl AsRef<str>) -> Self {
        Self {
            region: region.as_ref().to_owned(),
            cluster: None,
        }
    }

    pub(super) fn cluster(region: &str, cluster: &str) -> Self {
        Self {
            region: region.to_owned(),
            cluster: Some(cluster.to_owned()),
        }
    }

    fn covers(&self, resource: &Resource) -> bool {
        resource.spec_text("/aws/region") == self.region
            && self
                .cluster
                .as_ref()
                .is_none_or(|name| resource.spec_text("/aws/name") == name)
    }
}

impl Round {
    /// Adds a cluster if it can be used and matches.
    pub(super) fn add(&mut self, cluster: &Cluster, matcher: &Matcher, group: &str) {
        if !["ACTIVE", "UPDATING"].contains(&cluster.status.as_str()) {
            tracing::debug!(
                name = cluster.name,
                status = cluster.status,
                "an EKS cluster is passed over because of its status"
            );
            return;
        }
        match resource(cluster, matcher, group) {
            Ok(found) => self.found.extend(found),
            Err(reason) => {
                tracing::warn!(name = cluster.name, reason, "an EKS cluster is passed over");
            }
        }
    }
}

/// The resource of a cluster; `None` if the matcher does not want it.
fn resource(cluster: &Cluster, matcher: &Matcher, group: &str) -> Result<Option<Resource>, String> {
    // arn:aws:eks:<region>:<account>:cluster/<name>
    let parts: Vec<&str> = cluster.arn.splitn(6, ':').collect();
    let ["arn", _, "eks", region, account, _] = parts.as_slice() else {
        return Err(format!("{:?} is no ARN of an EKS cluster", cluster.arn));
    };
    let tags = cluster.tags.iter().flatten();
    let mut labels: BTreeMap<String, String> = tags
        .filter(|(key, _)| is_label_key(key))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    let mut label = |key: &str, value: &str| labels.insert(key.to_owned(), value.to_owned());
    label("teleport.dev/cloud", "AWS");
    label("region", region);
    label("account-id", account);
    if !matches(&matcher.tags, &labels) {
        return Ok(None);
    }
    let chosen = NAME_TAGS
        .iter()
        .filter_map(|tag| labels.get(*tag))
        .find(|name| !name.is_empty());
    let name = match chosen {
        Some(name) => name.clone(),
        None => {
            let discovered = "teleport.internal/discovered-name";
            labels.insert(discovered.to_owned(), cluster.name.clone());
            format!("{}-eks-{region}-{account}", cluster.name)
        }
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if !name.chars().all(plain) {
        return Err(format!("{name:?} cannot name a Kubernetes cluster"));
    }
    let mut label = |key: &str, value: &str| labels.insert(key.to_owned(), value.to_owned());
    label("teleport.dev/origin", "cloud");
    label("teleport.dev/discovery-type", "eks");
    if !group.is_empty() {
        label("teleport.internal/discovery-group-name", group);
    }
    Ok(Some(Resource {
        kind: KIND.to_owned(),
        version: "v3".to_owned(),
        name,
        description: format!("AWS EKS cluster {:?} in {region}", cluster.name),
        labels,
        spec: json!({"aws": {"region": region, "account_id": account, "name": cluster.name}}),
        status: status(group),
        ..Resource::default()
    }))
}

/// What tells our resources from others: files cannot write a status.
fn status(group: &str) -> Value {
    json!({"discovery": {"group": group}})
}

/// What has to change so that the resources are those that were found.
pub(super) fn decide(known: &[Resource], round: Round, group: &str) -> Vec<Change> {
    let ours = |resource: &&Resource| resource.status == status(group);
    let others: BTreeSet<&str> = known
        .iter()
        .filter(|resource| !ours(resource))
        .map(|resource| resource.name.as_str())
        .collect();
    let mut found = BTreeMap::new();
    for resource in round.found {
        if others.contains(resource.name.as_str()) {
            tracing::warn!(
                name = resource.name,
                "a discovered cluster has the name of a kube_cluster that is not discovered by \
                 this group: tag it TeleportKubernetesName to give it another"
            );
            continue;
        }
        // The same cluster by two matchers is the same resource.
        found.entry(resource.name.clone()).or_insert(resource);
    }
    let mut changes: Vec<Change> = known
        .iter()
        .filter(ours)
        .filter(|old| !found.contains_key(&old.name))
        .filter(|old| !round.blind.iter().any(|blind| blind.covers(old)))
        .map(|old| Change::Remove(old.name.clone()))
        .collect();
    changes.extend(
        found
            .into_values()
            .map(|found| Change::Put(Box::new(found))),
    );
    changes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matcher(tags: &[(&str, &str)]) -> Matcher {
        Matcher {
            regions: vec!["eu-west-1".to_owned()],
            tags: tags
                .iter()
                .map(|(key, value)| ((*key).to_owned(), vec![(*value).to_owned()]))
                .collect(),
            assume_role_arn: None,
            external_id: None,
        }
    }

    fn cluster(name: &str, region: &str, tags: &[(&str, &str)]) -> Cluster {
        let tags = tags.iter();
        Cluster {
            name: name.to_owned(),
            arn: format!("arn:aws:eks:{region}:123456789012:cluster/{name}"),
            status: "ACTIVE".to_owned(),
            tags: Some(
                tags.map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                    .collect(),
            ),
        }
    }

    fn made(name: &str, region: &str) -> Resource {
        let cluster = cluster(name, region, &[]);
        resource(&cluster, &matcher(&[("*", "*")]), "g")
            .unwrap()
            .unwrap()
    }

    #[test]
    fn a_cluster_becomes_what_upstream_makes_of_it() {
        let tags = [("env", "prod"), ("not a label", "x"), ("region", "forged")];
        let found = cluster("one", "eu-west-1", &tags);
        let found = resource(&found, &matcher(&[("env", "pr*")]), "aws-prod");
        let found = found.unwrap().unwrap();
        assert_eq!(found.name, "one-eks-eu-west-1-123456789012");
        assert_eq!(found.description, "AWS EKS cluster \"one\" in eu-west-1");
        let labels: Vec<String> = found
            .labels
            .iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        assert_eq!(
            labels,
            [
                "account-id=123456789012",
                "env=prod",
                "region=eu-west-1",
                "teleport.dev/cloud=AWS",
                "teleport.dev/discovery-type=eks",
                "teleport.dev/origin=cloud",
                "teleport.internal/discovered-name=one",
                "teleport.internal/discovery-group-name=aws-prod",
            ]
        );
        assert_eq!(found.spec_text("/aws/name"), "one");
    }

    #[test]
    fn tags_choose_and_name() {
        let named = |tags: &[(&str, &str)]| {
            let cluster = cluster("one", "eu-west-1", tags);
            resource(&cluster, &matcher(&[("*", "*")]), "").map(|found| found.unwrap().name)
        };
        assert_eq!(
            named(&[("teleport.dev/kubernetes-name", "b")]).unwrap(),
            "b"
        );
        let both = [
            ("teleport.dev/kubernetes-name", "b"),
            ("TeleportKubernetesName", "a"),
        ];
        assert_eq!(named(&both).unwrap(), "a");
        assert!(named(&[("TeleportKubernetesName", "a/b")]).is_err());
        for (selector, wanted) in [
            (("env", "prod"), true),
            (("env", "dev"), false),
            (("region", "eu-*"), true),
            (("none", "*"), false),
        ] {
            let cluster = cluster("one", "eu-west-1", &[("env", "prod")]);
            let found = resource(&cluster, &matcher(&[selector]), "").unwrap();
            assert_eq!(found.is_some(), wanted, "{selector:?}");
        }
        let mut odd = cluster("one", "eu-west-1", &[]);
        odd.arn = "arn:aws:s3:::bucket".to_owned();
        assert!(resource(&odd, &matcher(&[("*", "*")]), "").is_err());
        let mut round = Round::default();
        for status in ["CREATING", "DELETING", "FAILED", "UPDATING"] {
            let mut cluster = cluster("one", "eu-west-1", &[]);
            cluster.status = status.to_owned();
            round.add(&cluster, &matcher(&[("*", "*")]), "");
        }
        assert_eq!(round.found.len(), 1);
    }

    #[test]
    fn only_what_was_seen_to_be_gone_goes() {
        let mut by_hand = made("hand", "eu-west-1");
        by_hand.status = Value::Null;
        let mut other_group = made("other", "eu-west-1");
        other_group.status = status("other");
        let known = vec![
            made("gone", "eu-west-1"),
            made("stays", "eu-west-1"),
            made("unseen", "us-east-1"),
            made("undescribed", "eu-west-1"),
            by_hand.clone(),
            other_group,
        ];
        let round = Round {
            found: vec![
                made("stays", "eu-west-1"),
                made("new", "eu-west-1"),
                made("new", "eu-west-1"),
                // The name is somebody's own.
                made("hand", "eu-west-1"),
            ],
            blind: vec![
                Blind::region("us-east-1"),
                Blind::cluster("eu-west-1", "undescribed"),
            ],
        };
        assert_eq!(
            decide(&known, round, "g"),
            [
                Change::Remove(made("gone", "eu-west-1").name),
                Change::Put(Box::new(made("new", "eu-west-1"))),
                Change::Put(Box::new(made("stays", "eu-west-1"))),
            ]
        );
        // A region that is not looked at any more is no blind spot.
        assert_eq!(decide(&known, Round::default(), "g").len(), 4);
    }
}
