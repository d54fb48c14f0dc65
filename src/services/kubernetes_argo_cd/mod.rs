//! The `kubernetes/argo-cd` output: one Secret for every cluster that selectors find, by which Argo CD
//! knows the cluster and reaches it. All have the same certificate; the proxy reads from the path which
//! cluster is meant.

mod cluster;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::ensure;
use async_trait::async_trait;

use self::cluster::{Credential, Look, TYPE_LABEL};
use super::impersonated::Impersonated;
use super::kubernetes::access::{Address, trusted};
use super::kubernetes::select::{BY_LABELS, BY_NAME, Selectors};
use super::kubernetes::template::{HINT, Template};
use super::{Context, Flag, FlagValue, Made, Output, Service, ServiceKind, ServicePlan};
use crate::destination::{
    Destination, DestinationPlan, FileSet, Secrets, label_problem, namespace_problem,
};
use crate::identity::Target;
use crate::yaml::{Fields, Tree};

/// What the names of the Secrets begin with, as upstream's.
const PREFIX: &str = "teleport.argocd-cluster";

/// The kind.
#[derive(Debug)]
pub struct Kind;

/// A configured output for Argo CD.
#[derive(Debug, Clone)]
struct Settings {
    /// With `secrets` as its destination.
    base: Impersonated,
    secrets: Secrets,
    selectors: Selectors,
    look: Look,
}

impl ServiceKind for Kind {
    fn name(&self) -> &'static str {
        "kubernetes/argo-cd"
    }

    fn flags(&self) -> &'static [Flag] {
        &[
            BY_NAME,
            BY_LABELS,
            Flag {
                name: "secret-namespace",
                yaml: "secret_namespace",
                value: FlagValue::Text,
                required: false,
                help: "Namespace of Argo CD, where the Secrets are made",
            },
            Flag {
                name: "secret-name-prefix",
                yaml: "secret_name_prefix",
                value: FlagValue::Text,
                required: false,
                help: "What the names of the Secrets begin with",
            },
            Flag {
                name: "project",
                yaml: "project",
                value: FlagValue::Text,
                required: false,
                help: "Project of Argo CD that the clusters belong to",
            },
        ]
    }

    fn parse(&self, fields: &mut Fields<'_>) -> Option<Box<dyn ServicePlan>> {
        Some(Box::new(Settings::read(fields)?))
    }
}

impl Settings {
    fn read(fields: &mut Fields<'_>) -> Option<Self> {
        let selectors = Selectors::read(fields);
        if selectors.as_ref().is_some_and(Selectors::name_namespaces) {
            fields.warn(
                "selectors",
                "Argo CD has no contexts, so `default_namespace` means nothing here",
                Some("`namespaces` restricts Argo CD to some"),
            );
        }
        let secrets = Secrets::read(fields, PREFIX);
        let look = Look::read(fields);
        let secrets = secrets?;
        Some(Self {
            base: Impersonated {
                destination: Arc::new(secrets.clone()),
                roles: Vec::new(),
            },
            secrets,
            selectors: selectors?,
            look: look?,
        })
    }
}

impl Look {
    fn read(fields: &mut Fields<'_>) -> Option<Self> {
        let labels = templates(fields, "secret_labels", label_problem);
        if labels
            .as_ref()
            .is_some_and(|labels| labels.contains_key(TYPE_LABEL))
        {
            fields.error(
                "secret_labels",
                format!("{TYPE_LABEL} is what Argo CD finds clusters by: it is always `cluster`"),
                Some("leave it out"),
            );
        }
        let annotations = templates(fields, "secret_annotations", |key, _value| {
            label_problem(key, "")
        });
        let project = fields.string("project");
        let namespaces = fields.strings("namespaces").unwrap_or_default();
        for name in &namespaces {
            if let Some(problem) = namespace_problem(name) {
                fields.error("namespaces", problem, None);
            }
        }
        let cluster_resources = fields.bool("cluster_resources").unwrap_or(false);
        if cluster_resources && namespaces.is_empty() {
            fields.error(
                "cluster_resources",
                "without `namespaces`, Argo CD manages the whole cluster anyway",
                Some("add `namespaces`, or leave it out"),
            );
        }
        let name = Template::read(fields, "cluster_name_template");
        Some(Self {
            labels: labels?,
            annotations: annotations?,
            project,
            namespaces,
            cluster_resources,
            name: name.ok()?,
        })
    }

    fn emit(&self) -> Tree {
        let map = |map: &BTreeMap<String, Template>| {
            let entries = map
                .iter()
                .map(|(key, template)| (key.clone(), Tree::text(template.source())));
            (!map.is_empty()).then(|| Tree::Map(entries.collect()))
        };
        let namespaces = self.namespaces.iter();
        let name = self.name.as_ref().map(Template::source);
        Tree::map([
            ("secret_labels", map(&self.labels)),
            ("secret_annotations", map(&self.annotations)),
            ("project", self.project.as_ref().map(Tree::text)),
            (
                "namespaces",
                (!self.namespaces.is_empty()).then(|| Tree::texts(namespaces)),
            ),
            (
                "cluster_resources",
                self.cluster_resources.then_some(Tree::Bool(true)),
            ),
            ("cluster_name_template", name.map(Tree::text)),
        ])
    }
}

/// A map to templates; those that are the same for every cluster are checked.
fn templates(
    fields: &mut Fields<'_>,
    key: &str,
    problem: impl Fn(&str, &str) -> Option<String>,
) -> Option<BTreeMap<String, Template>> {
    let entries = fields.string_map(key).unwrap_or_default();
    let listed = entries.len();
    let mut all = BTreeMap::new();
    for (name, source) in entries {
        match Template::parse(&source) {
            Ok(template) => match problem(&name, template.fixed().unwrap_or_default()) {
                None => {
                    all.insert(name, template);
                }
                Some(problem) => fields.error(key, problem, None),
            },
            Err(problem) => fields.error(key, format!("{name}: {problem}"), Some(HINT)),
        }
    }
    (all.len() == listed).then_some(all)
}

impl ServicePlan for Settings {
    fn label(&self) -> String {
        format!("kubernetes-argo-cd-output ({})", self.base.destination)
    }

    fn destination(&self) -> Option<&Arc<dyn DestinationPlan>> {
        Some(&self.base.destination)
    }

    fn emit(&self) -> Vec<(String, Tree)> {
        let parts = [
            Tree::map([("selectors", Some(self.selectors.emit()))]),
            self.base.destination.emit(),
            self.look.emit(),
        ];
        let entries = parts.into_iter().map(|part| match part {
            Tree::Map(entries) => entries,
            _ => Vec::new(),
        });
        entries.flatten().collect()
    }

    fn build(&self) -> Service {
        Service::Output(Box::new(ArgoCd {
            settings: self.clone(),
            destination: self.base.destination.build(),
        }))
    }
}

/// A running output for Argo CD.
#[derive(Debug)]
struct ArgoCd {
    settings: Settings,
    destination: Arc<dyn Destination>,
}

#[async_trait]
impl Output for ArgoCd {
    fn destination(&self) -> Arc<dyn Destination> {
        Arc::clone(&self.destination)
    }

    async fn make(&self, context: &Context) -> anyhow::Result<Made> {
        let Settings {
            base,
            secrets,
            selectors,
            look,
        } = &self.settings;
        let endpoints = Box::pin(context.identity.endpoints()).await?;
        let address = Address::of(&endpoints)?;
        if let Some(proxy) = endpoints
            .ssh_address
            .as_deref()
            .filter(|_| endpoints.tls_routing)
        {
            ensure!(
                !context.identity.hides_alpn(proxy).await,
                "a load balancer at layer 7 (HTTP) stands before the proxy {proxy} and hides ALPN, by \
                 which the proxy tells Kubernetes apart; Argo CD cannot upgrade its connections: put a \
                 load balancer at layer 4 (TCP) there, or give the proxy a kube_listen_addr and turn \
                 TLS routing off"
            );
        }
        let client = base.client(context).await?;
        let found = Box::pin(selectors.find(&client)).await?;
        let (issued, authorities) = base.issue(context, Target::Cluster).await?;
        let key = issued.key().to_pem();
        let user = issued.user();
        let credential = Credential {
            cluster: &endpoints.cluster_name,
            address: &address,
            authorities: &trusted(&issued, &authorities.hosts)?,
            certificate: issued.tls_pem(),
            key: key.expose(),
            bot: user.strip_prefix("bot-").unwrap_or(&user),
            now: context.clock.now(),
        };
        let mut files = FileSet::new();
        for cluster in &found {
            let (suffix, manifest) = look.manifest(cluster, &credential)?;
            files.insert(secrets.name(&suffix), manifest);
        }
        Ok(Made {
            files,
            not_after: issued.not_after(),
        })
    }
}
