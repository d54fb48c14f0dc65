//! The `kubernetes` output: a kubeconfig for one cluster behind the proxy, with a certificate that
//! leads to that cluster alone.

pub(super) mod access;
pub(crate) mod kubeconfig;
pub(super) mod select;
pub(super) mod template;

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;

use self::access::{Address, Logins, trusted};
use self::kubeconfig::{KubeContext, Kubeconfig};
use super::artifacts::{AUTHORITIES, Artifacts, CREDENTIALS, names};
use super::flags::DESTINATION;
use super::impersonated::Impersonated;
use super::lookup;
use super::{Context, Flag, FlagValue, Made, Output, Service, ServiceKind, ServicePlan};
use crate::cluster::client::resources::Selection;
use crate::destination::{Destination, DestinationPlan};
use crate::identity::Target;
use crate::yaml::{Fields, Tree};

/// What messages call a Kubernetes cluster.
pub(super) const CALLED: &str = "kubernetes cluster";

/// The flag that both kinds have.
pub(super) const DISABLE_PLUGIN: Flag = Flag {
    name: "disable-exec-plugin",
    yaml: "disable_exec_plugin",
    value: FlagValue::Bool,
    required: false,
    help: "Put certificate and key into the kubeconfig instead of a call of this program",
};

/// The kind.
#[derive(Debug)]
pub struct Kind;

/// A configured Kubernetes output.
#[derive(Debug, Clone)]
struct Settings {
    base: Impersonated,
    cluster: String,
    disable_exec_plugin: bool,
}

impl ServiceKind for Kind {
    fn name(&self) -> &'static str {
        "kubernetes"
    }

    fn aliases(&self) -> &'static [&'static str] {
        &["k8s"]
    }

    fn flags(&self) -> &'static [Flag] {
        &[
            DESTINATION,
            Flag {
                name: "kubernetes-cluster",
                yaml: "kubernetes_cluster",
                value: FlagValue::Text,
                required: true,
                help: "Name of the Kubernetes cluster",
            },
            DISABLE_PLUGIN,
        ]
    }

    fn parse(&self, fields: &mut Fields<'_>) -> Option<Box<dyn ServicePlan>> {
        Some(Box::new(Settings::read(fields)?))
    }
}

impl Settings {
    fn read(fields: &mut Fields<'_>) -> Option<Self> {
        let base = Impersonated::read(fields);
        let cluster = fields.required("kubernetes_cluster");
        let disable_exec_plugin = fields.bool("disable_exec_plugin").unwrap_or(false);
        Some(Self {
            base: base?,
            cluster: cluster?,
            disable_exec_plugin,
        })
    }
}

impl ServicePlan for Settings {
    fn label(&self) -> String {
        format!("kubernetes-output ({})", self.base.destination)
    }

    fn destination(&self) -> Option<&Arc<dyn DestinationPlan>> {
        Some(&self.base.destination)
    }

    fn files(&self) -> Vec<String> {
        names(&[CREDENTIALS, AUTHORITIES, &["kubeconfig.yaml"]])
    }

    fn emit(&self) -> Vec<(String, Tree)> {
        self.base.emit([
            ("kubernetes_cluster", Some(Tree::text(&self.cluster))),
            (
                "disable_exec_plugin",
                Some(Tree::Bool(self.disable_exec_plugin)),
            ),
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
        let Settings { base, cluster, .. } = &self.settings;
        let client = base.client(context).await?;
        let found = client.kubernetes_clusters(Selection::Name(cluster)).await?;
        let cluster = lookup::single(CALLED, cluster, found)?.name;
        let endpoints = Box::pin(context.identity.endpoints()).await?;
        let address = Address::of(&endpoints)?;
        let name = format!("{}-{cluster}", endpoints.cluster_name);
        let (issued, authorities) = base.issue(context, Target::Kubernetes { cluster }).await?;
        let key = issued.key().to_pem();
        let kubeconfig = Kubeconfig {
            contexts: BTreeMap::from([(
                name.clone(),
                KubeContext {
                    server: address.url,
                    namespace: None,
                },
            )]),
            current: &name,
            user: &name,
            login: self
                .logins
                .choose(self.destination.as_ref(), &issued, &key)?,
            authorities: &trusted(&issued, &authorities.hosts)?,
            server_name: address.server_name.as_deref(),
        };
        let files = Artifacts::of(&issued, &authorities.hosts)?
            .authorities(&authorities)
            .add("kubeconfig.yaml", kubeconfig.render());
        Ok(Made {
            files: files.files(),
            not_after: issued.not_after(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::services::testing::plan;

    #[test]
    fn the_section_is_read_and_written() {
        let written = plan(
            &Kind,
            "destination: {type: memory}\nkubernetes_cluster: k\ndisable_exec_plugin: true\n",
        );
        assert_eq!(
            written.unwrap(),
            "kubernetes-output (memory)\ndestination:\n  type: memory\nkubernetes_cluster: k\n\
             disable_exec_plugin: true\n"
        );
        for bad in [
            "{}",
            "destination: {type: memory}",
            "destination: {type: memory}\nkubernetes_cluster: ''",
            "destination: {type: memory}\nkubernetes_cluster: [k]",
        ] {
            assert!(plan(&Kind, bad).is_err(), "{bad}");
        }
    }
}
