//! The `kubernetes/v2` output: one kubeconfig for every cluster that selectors find, with one
//! certificate for all of them; the proxy reads from the path which cluster is meant.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::bail;
use async_trait::async_trait;

use super::artifacts::{Artifacts, CREDENTIALS, names};
use super::flags::DESTINATION;
use super::impersonated::Impersonated;
use super::kubernetes::DISABLE_PLUGIN;
use super::kubernetes::access::{Address, Logins, trusted};
use super::kubernetes::kubeconfig::{KubeContext, Kubeconfig};
use super::kubernetes::select::{BY_LABELS, BY_NAME, Found, Selectors};
use super::kubernetes::template::Template;
use super::{Context, Flag, Made, Output, Service, ServiceKind, ServicePlan};
use crate::destination::{Destination, DestinationPlan};
use crate::identity::Target;
use crate::yaml::{Fields, Tree};

/// The kind.
#[derive(Debug)]
pub struct Kind;

/// A configured Kubernetes output.
#[derive(Debug, Clone)]
struct Settings {
    base: Impersonated,
    disable_exec_plugin: bool,
    selectors: Selectors,
    /// How contexts are named; `None` as upstream does.
    template: Option<Template>,
}

impl ServiceKind for Kind {
    fn name(&self) -> &'static str {
        "kubernetes/v2"
    }

    fn aliases(&self) -> &'static [&'static str] {
        &["k8s/v2"]
    }

    fn flags(&self) -> &'static [Flag] {
        &[DESTINATION, DISABLE_PLUGIN, BY_NAME, BY_LABELS]
    }

    fn parse(&self, fields: &mut Fields<'_>) -> Option<Box<dyn ServicePlan>> {
        Some(Box::new(Settings::read(fields)?))
    }
}

impl Settings {
    fn read(fields: &mut Fields<'_>) -> Option<Self> {
        let base = Impersonated::with_every_role(fields);
        let disable_exec_plugin = fields.bool("disable_exec_plugin").unwrap_or(false);
        let selectors = Selectors::read(fields);
        let template = Template::read(fields, "context_name_template");
        Some(Self {
            base: base?,
            disable_exec_plugin,
            selectors: selectors?,
            template: template.ok()?,
        })
    }
}

/// The contexts by name, and the name of the first.
fn contexts(
    found: Vec<Found>,
    cluster: &str,
    address: &Address,
    template: Option<&Template>,
) -> anyhow::Result<(BTreeMap<String, KubeContext>, String)> {
    let template = template.cloned().unwrap_or_else(Template::both_names);
    let mut contexts = BTreeMap::new();
    let mut current = None;
    for item in found {
        let name = template.render(cluster, &item.name, &item.labels);
        let context = KubeContext {
            server: address.of_cluster(cluster, &item.name),
            namespace: item.namespace,
        };
        if contexts.insert(name.clone(), context).is_some() {
            bail!(
                "context_name_template gives two clusters the name {name:?}, one of them {:?}: add \
                 {{{{.KubeName}}}} to it",
                item.name
            );
        }
        current.get_or_insert(name);
    }
    Ok((contexts, current.unwrap_or_default()))
}

impl ServicePlan for Settings {
    fn label(&self) -> String {
        format!("kubernetes-v2-output ({})", self.base.destination)
    }

    fn destination(&self) -> Option<&Arc<dyn DestinationPlan>> {
        Some(&self.base.destination)
    }

    fn files(&self) -> Vec<String> {
        names(&[CREDENTIALS, &["kubeconfig.yaml", "teleport-host-ca.crt"]])
    }

    fn emit(&self) -> Vec<(String, Tree)> {
        let template = self.template.as_ref().map(Template::source);
        self.base.emit([
            (
                "disable_exec_plugin",
                self.disable_exec_plugin.then_some(Tree::Bool(true)),
            ),
            ("selectors", Some(self.selectors.emit())),
            ("context_name_template", template.map(Tree::text)),
        ])
    }

    fn build(&self) -> Service {
        Service::Output(Box::new(Kubernetes {
            settings: self.clone(),
            destination: self.base.destination.build(),
            logins: Logins::new(self.disable_exec_plugin),
        }))
    }
}

/// A running Kubernetes output.
#[derive(Debug)]
struct Kubernetes {
    settings: Settings,
    destination: Arc<dyn Destination>,
    logins: Logins,
}

#[async_trait]
impl Output for Kubernetes {
    fn destination(&self) -> Arc<dyn Destination> {
        Arc::clone(&self.destination)
    }

    async fn make(&self, context: &Context) -> anyhow::Result<Made> {
        let settings = &self.settings;
        let client = settings.base.client(context).await?;
        let found = Box::pin(settings.selectors.find(&client)).await?;
        let endpoints = Box::pin(context.identity.endpoints()).await?;
        let address = Address::of(&endpoints)?;
        let cluster = endpoints.cluster_name.as_str();
        let (contexts, current) = contexts(found, cluster, &address, settings.template.as_ref())?;
        let (issued, authorities) = settings.base.issue(context, Target::Cluster).await?;
        let key = issued.key().to_pem();
        let kubeconfig = Kubeconfig {
            contexts,
            current: &current,
            user: cluster,
            login: self
                .logins
                .choose(self.destination.as_ref(), &issued, &key)?,
            authorities: &trusted(&issued, &authorities.hosts)?,
            server_name: address.server_name.as_deref(),
        };
        let files = Artifacts::of(&issued, &authorities.hosts)?
            .hosts(&authorities.hosts)
            .add("kubeconfig.yaml", kubeconfig.render());
        Ok(Made {
            files: files.files(),
            not_after: issued.not_after(),
        })
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;

    use super::*;
    use crate::services::testing::plan;

    /// `https://p:1`, without a name of its own for TLS.
    fn address() -> Address {
        Address {
            url: "https://p:1".to_owned(),
            server_name: None,
        }
    }

    const HEAD: &str = "destination: {type: memory}\n";

    #[test]
    fn the_section_is_read_and_written() {
        let written = plan(
            &Kind,
            &format!(
                "{HEAD}disable_exec_plugin: true\nselectors:\n- name: n\n  default_namespace: team\n\
                 - labels: {{env: a, b: c}}\ncontext_name_template: '{{{{.KubeName}}}}'\n"
            ),
        );
        assert_eq!(
            written.unwrap(),
            "kubernetes-v2-output (memory)\ndestination:\n  type: memory\ndisable_exec_plugin: true\n\
             selectors:\n  - name: \"n\"\n    default_namespace: team\n  - labels:\n      b: c\n      \
             env: a\ncontext_name_template: '{{.KubeName}}'\n"
        );
        let both = plan(
            &Kind,
            &format!("{HEAD}selectors: [{{name: '', labels: {{b: c}}}}]\n"),
        );
        assert!(both.unwrap().contains("- labels:\n      b: c\n"));
        for (bad, told) in [
            ("", "at least one selector is needed"),
            ("selectors: []", "at least one selector is needed"),
            ("selectors: [{}]", "either a name or labels"),
            (
                "selectors: [{name: a, labels: {b: c}}]",
                "either a name or labels",
            ),
            ("selectors: [{labels: {}}]", "either a name or labels"),
            ("selectors: [{name: ''}]", "either a name or labels"),
            ("selectors: [a]", "must be a mapping"),
            (
                "selectors: [{name: a}]\ncontext_name_template: '{{.X}}'",
                "`{{.X}}` is not known here",
            ),
            ("selectors: [{name: a}]\nroles: [x]", "roles: unknown key"),
        ] {
            let error = plan(&Kind, &format!("{HEAD}{bad}")).unwrap_err();
            assert!(error.contains(told), "{bad}: {error}");
        }
    }

    fn found(name: &str, namespace: Option<&str>) -> Found {
        Found {
            name: name.to_owned(),
            labels: BTreeMap::from([("env".to_owned(), "prod".to_owned())]),
            namespace: namespace.map(str::to_owned),
        }
    }

    #[test]
    fn every_cluster_has_one_context_and_the_first_found_is_current() {
        let listed = vec![found("k2", Some("a")), found("k1", None)];
        let (all, current) = contexts(listed, "real.example.org", &address(), None).unwrap();
        assert_eq!(current, "real.example.org-k2");
        let context = |server: &str, namespace: Option<&str>| KubeContext {
            server: format!("https://p:1/v1/teleport/cmVhbC5leGFtcGxlLm9yZw/{server}"),
            namespace: namespace.map(str::to_owned),
        };
        let expected = [
            ("real.example.org-k1", context("azE", None)),
            ("real.example.org-k2", context("azI", Some("a"))),
        ];
        let expected = expected.map(|(name, context)| (name.to_owned(), context));
        assert_eq!(all, BTreeMap::from(expected));
        let (all, current) = contexts(Vec::new(), "c", &address(), None).unwrap();
        assert!(all.is_empty() && current.is_empty());
    }

    #[test]
    fn two_clusters_cannot_share_a_name() {
        let template = Template::parse("{{index .Labels \"env\"}}").unwrap();
        let listed = || vec![found("k1", None), found("k2", None)];
        let refused = contexts(listed(), "c", &address(), Some(&template)).unwrap_err();
        assert!(
            refused.to_string().contains("\"prod\", one of them \"k2\""),
            "{refused}"
        );
    }

    #[test]
    fn hostile_names_stay_in_their_place() {
        for name in ["a/../b", "x\ny", "\"'", &"k".repeat(300)] {
            let (all, current) = contexts(vec![found(name, None)], "c", &address(), None).unwrap();
            assert_eq!(current, format!("c-{name}"));
            let server = &all[&current].server;
            let path = server.strip_prefix("https://p:1/v1/teleport/Yw/").unwrap();
            assert_eq!(URL_SAFE_NO_PAD.decode(path).unwrap(), name.as_bytes());
        }
    }
}
