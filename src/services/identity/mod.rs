//! The `identity` output: the files that Teleport's clients, OpenSSH and API programs use.

mod files;
mod ssh;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use async_trait::async_trait;

use self::files::Facts;
use self::ssh::Ssh;
use super::authorities::{Authorities, Authority, check_cluster_name};
use super::{Context, Flag, FlagValue, Lifetime, Made, Output, Service, ServiceKind, ServicePlan};
use crate::cluster::dial::host_of;
use crate::cluster::feature::Feature;
use crate::destination::{self, Destination, DestinationPlan, FileSet};
use crate::identity::{Issued, Request};
use crate::yaml::{Fields, Tree};

/// The kind.
#[derive(Debug)]
pub struct Kind;

/// A configured identity output.
#[derive(Debug, Clone)]
struct Settings {
    destination: Arc<dyn DestinationPlan>,
    roles: Vec<String>,
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
            Flag {
                name: "destination",
                yaml: "destination",
                value: FlagValue::Destination,
                required: true,
                help: "Where to write the files: a path, file:///path or memory://",
            },
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

/// The identity and its parts.
const CREDENTIALS: &[&str] = &["identity", "key", "key-cert.pub", "key.pub", "tlscert"];
/// The cluster's authorities.
const AUTHORITIES: &[&str] = &[
    "teleport-database-ca.crt",
    "teleport-host-ca.crt",
    "teleport-user-ca.crt",
];

impl ServicePlan for Settings {
    fn label(&self) -> String {
        format!("identity-output ({})", self.destination)
    }

    fn destination(&self) -> Option<&Arc<dyn DestinationPlan>> {
        Some(&self.destination)
    }

    fn files(&self) -> Vec<String> {
        let ssh: &[&str] = if self.ssh_config {
            &["known_hosts", "ssh_config"]
        } else {
            &[]
        };
        let names = CREDENTIALS.iter().chain(AUTHORITIES).chain(ssh);
        names.map(|name| (*name).to_owned()).collect()
    }

    fn emit(&self) -> Vec<(String, Tree)> {
        let mode = if self.ssh_config { "on" } else { "off" };
        [
            ("destination", Some(self.destination.emit())),
            (
                "roles",
                (!self.roles.is_empty()).then(|| Tree::texts(self.roles.iter())),
            ),
            ("cluster", self.cluster.as_ref().map(Tree::text)),
            ("ssh_config", Some(Tree::text(mode))),
            (
                "allow_reissue",
                self.allow_reissue.then_some(Tree::Bool(true)),
            ),
        ]
        .into_iter()
        .filter_map(|(key, tree)| Some((key.to_owned(), tree?)))
        .collect()
    }

    fn build(&self) -> Service {
        Service::Output(Box::new(IdentityOutput {
            settings: self.clone(),
            destination: self.destination.build(),
            program: program(),
        }))
    }
}

impl Settings {
    fn read(fields: &mut Fields<'_>) -> Option<Self> {
        let destination = destination::read(fields, "destination");
        let roles = fields.strings("roles").unwrap_or_default();
        let cluster = fields.string("cluster").filter(|name| !name.is_empty());
        // Upstream takes an empty value for the default.
        let ssh_config = fields.one_of("ssh_config", &["on", "off", ""]);
        let allow_reissue = fields.bool("allow_reissue").unwrap_or(false);
        Some(Self {
            destination: destination?,
            roles,
            cluster,
            ssh_config: ssh_config.as_deref() != Some("off"),
            allow_reissue,
        })
    }

    /// The certificate that these settings ask for.
    fn request(&self, lifetime: Lifetime) -> Request {
        Request {
            roles: self.roles.clone(),
            ttl: lifetime.ttl,
            cluster: self.cluster.clone(),
            reissuable: self.allow_reissue,
            ..Request::default()
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
        let issued = context.identity.issue(&request).await?;
        Ok(Made {
            files: Box::pin(self.render(&issued, context)).await?,
            not_after: issued.not_after(),
        })
    }
}

impl IdentityOutput {
    /// The files for `issued`.
    async fn render(&self, issued: &Issued, context: &Context) -> anyhow::Result<FileSet> {
        let client = context.identity.client();
        let endpoints = async {
            if self.settings.ssh_config {
                context.identity.endpoints().await.map(Some)
            } else {
                Ok(None)
            }
        };
        let (authorities, endpoints) =
            tokio::try_join!(Authorities::fetch(&context.identity), async {
                Ok(endpoints.await?)
            },)?;
        let Authorities {
            mut hosts,
            users,
            databases,
        } = authorities;
        let public_line = issued.key().public_ssh_line()?;
        let directory = self.destination.directory().map(text).transpose()?;

        let mut reached = vec![issued.cluster().to_owned()];
        // Every leaf cluster has a host authority here, so a list without others needs no question.
        let leaves = hosts.iter().any(|host| host.cluster != issued.cluster());
        if endpoints.is_some() && leaves {
            let request = Request {
                cluster: None,
                ..self.settings.request(context.lifetime)
            };
            let derived = context.identity.derived(&request).await?;
            let leaves = context
                .identity
                .lacking()
                .optional(Feature::LeafClusters, derived.remote_clusters().await)?;
            reached.extend(leaves.unwrap_or_default());
        }
        let listed = hosts.len();
        if endpoints.is_some() {
            for cluster in &reached {
                check_cluster_name(cluster)?;
                if !hosts.iter().any(|host| host.cluster == *cluster) {
                    let host = client.cert_authority("host", cluster).await?;
                    hosts.extend(Authority::read_all(&[host])?);
                }
            }
        }
        let proxy = match &endpoints {
            Some(endpoints) => {
                let address = endpoints.ssh_address.as_deref().context(
                    "the proxy does not say where its SSH side is reached, which ssh_config needs: \
                     set ssh_config: off",
                )?;
                Some((address, endpoints.tls_routing))
            }
            None => None,
        };
        let program = text(&self.program)?;
        let ssh = proxy.map(|(address, tls_routing)| Ssh {
            clusters: reached
                .iter()
                .filter_map(|name| hosts.iter().find(|host| host.cluster == *name))
                .collect(),
            proxy_host: host_of(address),
            proxy_address: address,
            tls_routing,
            connection_upgrade: false,
            program,
        });
        Ok(files::render(&Facts {
            identity: issued,
            public_line,
            hosts: hosts.get(..listed).unwrap_or_default(),
            users: &users,
            databases: &databases,
            ssh,
            directory,
        }))
    }
}

fn text(path: &Path) -> anyhow::Result<&str> {
    path.to_str().with_context(|| {
        format!(
            "the path {} is not text and cannot be written down",
            path.display()
        )
    })
}

/// The path that this program was started by, if that is a link to it: a link survives an update,
/// the file behind it does not. Otherwise the program's file.
fn program() -> PathBuf {
    let file = std::env::current_exe().unwrap_or_else(|_error| PathBuf::from("tbot"));
    let started = std::env::args_os().next().map(PathBuf::from);
    stable(started, file)
}

fn stable(started: Option<PathBuf>, file: PathBuf) -> PathBuf {
    started
        .filter(|path| path.is_absolute())
        .filter(|path| path.canonicalize().is_ok_and(|real| real == file))
        .unwrap_or(file)
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

    #[test]
    fn a_link_to_this_program_is_kept() {
        let base = tempfile::tempdir().unwrap();
        let base = base.path().canonicalize().unwrap();
        let (file, link) = (base.join("tbot-1.2"), base.join("tbot"));
        std::fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        for (started, expected) in [
            (Some(link.clone()), &link),
            (Some(PathBuf::from("tbot")), &file),
            (Some(base.join("other")), &file),
            (None, &file),
        ] {
            assert_eq!(stable(started, file.clone()), *expected);
        }
    }
}
