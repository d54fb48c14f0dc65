//! The `identity` output: the files that Teleport's clients, OpenSSH and API programs use.

mod ssh;

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use async_trait::async_trait;

use self::ssh::Ssh;
use super::artifacts::{AUTHORITIES, Artifacts, CREDENTIALS, names};
use super::authorities::{Authorities, Authority, check_cluster_name};
use super::flags::DESTINATION;
use super::impersonated::Impersonated;
use super::program::{program, text};
use super::{Context, Flag, FlagValue, Lifetime, Made, Output, Service, ServiceKind, ServicePlan};
use crate::cluster::dial::host_of;
use crate::cluster::feature::Feature;
use crate::destination::{Destination, DestinationPlan, FileSet};
use crate::identity::{Issued, Request, Target};
use crate::yaml::{Fields, Tree};

/// The kind.
#[derive(Debug)]
pub struct Kind;

/// A configured identity output.
#[derive(Debug, Clone)]
struct Settings {
    base: Impersonated,
    cluster: Option<String>,
    ssh_config: bool,
    allow_reissue: bool,
}

impl ServiceKind for Kind {
    fn name(&self) -> &'static str {
        "identity"
    }

    fn aliases(&self) -> &'static [&'static str] {
        &["ssh", "id"]
    }

    fn flags(&self) -> &'static [Flag] {
        &[
            DESTINATION,
            Flag {
                name: "cluster",
                yaml: "cluster",
                value: FlagValue::Text,
                required: false,
                help: "Leaf cluster to issue the identity for, instead of the bot's own",
            },
            Flag {
                name: "allow-reissue",
                yaml: "allow_reissue",
                value: FlagValue::Bool,
                required: false,
                help: "Let holders of the identity ask for other certificates with it",
            },
        ]
    }

    fn parse(&self, fields: &mut Fields<'_>) -> Option<Box<dyn ServicePlan>> {
        Some(Box::new(Settings::read(fields)?))
    }
}

impl ServicePlan for Settings {
    fn label(&self) -> String {
        format!("identity-output ({})", self.base.destination)
    }

    fn destination(&self) -> Option<&Arc<dyn DestinationPlan>> {
        Some(&self.base.destination)
    }

    fn files(&self) -> Vec<String> {
        let ssh: &[&str] = if self.ssh_config {
            &["known_hosts", "ssh_config"]
        } else {
            &[]
        };
        names(&[CREDENTIALS, AUTHORITIES, ssh])
    }

    fn emit(&self) -> Vec<(String, Tree)> {
        let mode = if self.ssh_config { "on" } else { "off" };
        let reissue = self.allow_reissue.then_some(Tree::Bool(true));
        self.base.emit([
            ("cluster", self.cluster.as_ref().map(Tree::text)),
            ("ssh_config", Some(Tree::text(mode))),
            ("allow_reissue", reissue),
        ])
    }

    fn build(&self) -> Service {
        Service::Output(Box::new(IdentityOutput {
            settings: self.clone(),
            destination: self.base.destination.build(),
            program: program(),
        }))
    }
}

impl Settings {
    fn read(fields: &mut Fields<'_>) -> Option<Self> {
        let base = Impersonated::read(fields);
        let cluster = fields.string("cluster").filter(|name| !name.is_empty());
        // Upstream takes an empty value for the default.
        let ssh_config = fields.one_of("ssh_config", &["on", "off", ""]);
        let allow_reissue = fields.bool("allow_reissue").unwrap_or(false);
        Some(Self {
            base: base?,
            cluster,
            ssh_config: ssh_config.as_deref() != Some("off"),
            allow_reissue,
        })
    }

    /// The certificate that these settings ask for.
    fn request(&self, lifetime: Lifetime) -> Request {
        Request {
            cluster: self.cluster.clone(),
            reissuable: self.allow_reissue,
            ..self.base.request(lifetime, Target::Cluster)
        }
    }
}

/// A running identity output.
#[derive(Debug)]
struct IdentityOutput {
    settings: Settings,
    destination: Arc<dyn Destination>,
    /// What `ssh_config` calls to reach a host.
    program: PathBuf,
}

#[async_trait]
impl Output for IdentityOutput {
    fn destination(&self) -> Arc<dyn Destination> {
        Arc::clone(&self.destination)
    }

    async fn make(&self, context: &Context) -> anyhow::Result<Made> {
        let request = self.settings.request(context.lifetime);
        let issued = Box::pin(context.identity.issue(&request)).await?;
        Ok(Made {
            files: Box::pin(self.render(&issued, context)).await?,
            not_after: issued.not_after(),
        })
    }
}

impl IdentityOutput {
    /// The files for `issued`.
    async fn render(&self, issued: &Issued, context: &Context) -> anyhow::Result<FileSet> {
        let endpoints = async {
            Ok(if self.settings.ssh_config {
                Some(context.identity.endpoints().await?)
            } else {
                None
            })
        };
        let (authorities, endpoints) =
            tokio::try_join!(Box::pin(Authorities::fetch(&context.identity)), endpoints)?;
        let files = Artifacts::of(issued, &authorities.hosts)?.authorities(&authorities);
        let Some(endpoints) = endpoints else {
            return Ok(files.files());
        };
        let hosts = self.reached(issued, authorities.hosts, context).await?;
        let address = endpoints.ssh_address.as_deref().context(
            "the proxy does not say where its SSH side is reached, which ssh_config needs: set \
             ssh_config: off",
        )?;
        let ssh = Ssh {
            clusters: hosts,
            proxy_host: host_of(address),
            proxy_address: address,
            tls_routing: endpoints.tls_routing,
            connection_upgrade: false,
            program: text(&self.program)?,
        };
        let directory = self.destination.directory().map(text).transpose()?;
        Ok(ssh.add_to(files, directory).files())
    }

    /// The host authorities of the clusters that the identity reaches: its own, then the leaves that
    /// its roles see.
    async fn reached(
        &self,
        issued: &Issued,
        mut hosts: Vec<Authority>,
        context: &Context,
    ) -> anyhow::Result<Vec<Authority>> {
        let mut names = vec![issued.cluster().to_owned()];
        // Every leaf cluster has a host authority here, so a list without others needs no question.
        if hosts.iter().any(|host| host.cluster != issued.cluster()) {
            let request = Request {
                cluster: None,
                ..self.settings.request(context.lifetime)
            };
            let derived = Box::pin(context.identity.derived(&request)).await?;
            let leaves = context
                .identity
                .lacking()
                .optional(Feature::LeafClusters, derived.remote_clusters().await)?;
            names.extend(leaves.unwrap_or_default());
        }
        let mut reached = Vec::new();
        for name in &names {
            check_cluster_name(name)?;
            if let Some(at) = hosts.iter().position(|host| host.cluster == *name) {
                reached.push(hosts.swap_remove(at));
            } else {
                let host = context
                    .identity
                    .client()
                    .cert_authority("host", name)
                    .await?;
                reached.extend(Authority::read_all(&[host])?);
            }
        }
        Ok(reached)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::yaml::{Problems, emit, parse};

    fn plan(yaml: &str) -> Result<Settings, String> {
        let problems = Problems::default();
        let node = parse(yaml).map_err(|problem| problem.to_string())?;
        let mut fields = Fields::new(&node, "services[0]", &problems).unwrap();
        let plan = Settings::read(&mut fields);
        fields.finish();
        let text = problems.render("tbot.yaml");
        plan.filter(|_| text.is_empty()).ok_or(text)
    }

    #[test]
    fn the_section_is_written_as_upstream_writes_it() {
        let plan = plan("destination: {type: directory, path: /opt/machine-id}").unwrap();
        assert_eq!(plan.label(), "identity-output (directory: /opt/machine-id)");
        assert_eq!(
            emit::emit(&Tree::Map(plan.emit())),
            "destination:\n  type: directory\n  path: /opt/machine-id\n  symlinks: try-secure\n  \
             acls: try\nssh_config: \"on\"\n"
        );
    }

    #[test]
    fn every_option_reaches_the_request() {
        let plan = plan(
            "destination: {type: memory}\nroles: [a, b]\ncluster: leaf\nssh_config: off\n\
             allow_reissue: true\n",
        )
        .unwrap();
        assert_eq!(
            emit::emit(&Tree::Map(plan.emit())),
            "destination:\n  type: memory\nroles:\n  - a\n  - b\ncluster: leaf\n\
             ssh_config: \"off\"\nallow_reissue: true\n"
        );
        let request = plan.request(Lifetime::default());
        assert_eq!(request.roles, ["a", "b"]);
        assert_eq!(request.cluster.as_deref(), Some("leaf"));
        assert!(request.reissuable);
        assert_eq!(request.ttl, Lifetime::default().ttl);
    }

    #[test]
    fn bad_sections_are_refused() {
        for bad in [
            "{}",
            "destination: {type: memory}\nssh_config: maybe",
            "destination: {type: memory}\nroles: one",
            "destination: {type: memory}\nallow_reissue: perhaps",
            "destination: /opt/x",
        ] {
            assert!(plan(bad).is_err(), "{bad}");
        }
        assert!(plan("destination: {type: memory}\nssh_config: ''").is_ok());
    }
}
