//! The `ssh_host` output: an SSH server's key with a certificate that clients of the cluster
//! believe, and the authorities whose users the server is to let in.

use std::sync::Arc;

use anyhow::{Context as _, ensure};
use async_trait::async_trait;

use super::artifacts::{Artifacts, names};
use super::authorities::{Authorities, Authority};
use super::flags::DESTINATION;
use super::impersonated::Impersonated;
use super::{Context, Flag, FlagValue, Made, Output, Service, ServiceKind, ServicePlan};
use crate::crypto::Purpose;
use crate::crypto::ssh::SshCertificate;
use crate::destination::{Destination, DestinationPlan};
use crate::identity::new_key;
use crate::pb::teleport::trust::v1::GenerateHostCertRequest;
use crate::query::encoded;
use crate::yaml::{Fields, Tree};

/// The authorities that a server may be told to believe: that of the cluster's users, or the one
/// that signs for hosts without an agent. The first is the default.
const AUTHORITIES: [&str; 2] = ["user", "openssh"];

/// The kind.
#[derive(Debug)]
pub struct Kind;

/// A configured SSH host output.
#[derive(Debug, Clone)]
struct Settings {
    base: Impersonated,
    principals: Vec<String>,
    authority: &'static str,
}

impl ServiceKind for Kind {
    fn name(&self) -> &'static str {
        "ssh_host"
    }

    fn flags(&self) -> &'static [Flag] {
        &[
            DESTINATION,
            Flag {
                name: "principal",
                yaml: "principals",
                value: FlagValue::List,
                required: true,
                help: "Host name that clients call the server by; repeatable",
            },
        ]
    }

    fn parse(&self, fields: &mut Fields<'_>) -> Option<Box<dyn ServicePlan>> {
        Some(Box::new(Settings::read(fields)?))
    }
}

impl Settings {
    fn read(fields: &mut Fields<'_>) -> Option<Self> {
        let base = Impersonated::read(fields);
        let listed = fields.has("principals");
        let principals = fields.strings("principals");
        let authority = fields.one_of("ca_type", &AUTHORITIES);
        let hint = "list the names that clients call the server by";
        match &principals {
            // What is no list of texts was reported.
            None if listed => return None,
            Some(names) if names.iter().any(|name| name.trim().is_empty()) => {
                fields.error("principals", "a principal is empty", Some(hint));
                return None;
            }
            Some(names) if !names.is_empty() => {}
            None | Some(_) => {
                let problem = "at least one principal must be specified";
                fields.error("principals", problem, Some(hint));
                return None;
            }
        }
        let [default, ..] = AUTHORITIES;
        Some(Self {
            base: base?,
            principals: principals?,
            authority: AUTHORITIES
                .into_iter()
                .find(|known| Some(*known) == authority.as_deref())
                .unwrap_or(default),
        })
    }
}

impl ServicePlan for Settings {
    fn label(&self) -> String {
        format!("ssh-host ({})", self.base.destination)
    }

    fn destination(&self) -> Option<&Arc<dyn DestinationPlan>> {
        Some(&self.base.destination)
    }

    fn files(&self) -> Vec<String> {
        names(&[&["ssh_host", "ssh_host-cert.pub", "ssh_host-user-ca.pub"]])
    }

    fn emit(&self) -> Vec<(String, Tree)> {
        let [default, ..] = AUTHORITIES;
        let authority = (self.authority != default).then(|| Tree::text(self.authority));
        self.base.emit([
            ("principals", Some(Tree::texts(self.principals.iter()))),
            ("ca_type", authority),
        ])
    }

    fn build(&self) -> Service {
        Service::Output(Box::new(SshHost {
            settings: self.clone(),
            destination: self.base.destination.build(),
        }))
    }
}

/// A running SSH host output.
#[derive(Debug)]
struct SshHost {
    settings: Settings,
    destination: Arc<dyn Destination>,
}

#[async_trait]
impl Output for SshHost {
    fn destination(&self) -> Arc<dyn Destination> {
        Arc::clone(&self.destination)
    }

    async fn make(&self, context: &Context) -> anyhow::Result<Made> {
        let Settings {
            base,
            principals,
            authority,
        } = &self.settings;
        let identity = &context.identity;
        let own = identity.identity().borrow().clone();
        let own = own.context("the bot has not joined the cluster yet")?;
        let (client, suite) =
            tokio::try_join!(base.client(context), async { Ok(identity.suite().await?) })?;
        let key = new_key(suite, Purpose::HostSsh).await?;
        let certificate = client
            .generate_host_cert(GenerateHostCertRequest {
                key: key.public_ssh_line()?.into_bytes(),
                principals: principals.clone(),
                cluster_name: own.cluster().to_owned(),
                role: "Node".to_owned(),
                ttl: Some(context.lifetime.ttl.try_into()?),
                ..GenerateHostCertRequest::default()
            })
            .await?;
        let parsed = SshCertificate::parse(&certificate).context("the cluster's certificate")?;
        ensure!(
            parsed.is_for(&key),
            "the cluster's certificate is for another key"
        );
        let users = match *authority {
            "user" => Box::pin(Authorities::fetch(identity)).await?.users,
            other => Authority::read_all(&identity.authorities(other).await?)?,
        };
        let files = Artifacts::default()
            .add("ssh_host", key.to_openssh()?.expose())
            .add("ssh_host-cert.pub", certificate)
            .add(
                "ssh_host-user-ca.pub",
                trusted(&users, own.cluster(), authority),
            );
        Ok(Made {
            files: files.files(),
            not_after: parsed.valid_before(),
        })
    }
}

/// What sshd's `TrustedUserCAKeys` reads: the keys of the own cluster's authority, with a comment
/// that says so as a URL's query.
fn trusted(users: &[Authority], cluster: &str, authority: &str) -> String {
    let own = users.iter().filter(|users| users.cluster == cluster);
    let (name, kind) = (encoded(cluster), encoded(authority));
    let mut text = String::new();
    for key in own.flat_map(|own| &own.ssh) {
        text.extend([key, " clustername=", &name, "&type=", &kind, "\n"]);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::services::testing::plan;

    #[test]
    fn the_section_is_read_and_written() {
        let head = "destination: {type: memory}\n";
        let written = plan(&Kind, &format!("{head}principals: [node.example.com]\n"));
        assert_eq!(
            written.unwrap(),
            "ssh-host (memory)\ndestination:\n  type: memory\nprincipals:\n  - node.example.com\n"
        );
        let written = plan(&Kind, &format!("{head}principals: [a]\nca_type: openssh\n"));
        assert!(written.unwrap().ends_with("ca_type: openssh\n"));
        for (bad, told) in [
            ("", "at least one principal must be specified"),
            ("principals: []", "at least one principal must be specified"),
            ("principals: ['']", "a principal is empty"),
            ("principals: [a, ' ']", "a principal is empty"),
            ("principals: node", "must be a list"),
            (
                "principals: [a]\nca_type: host",
                "is not a value of `ca_type`",
            ),
        ] {
            let error = plan(&Kind, &format!("{head}{bad}")).unwrap_err();
            assert!(error.contains(told), "{bad}: {error}");
        }
    }

    #[test]
    fn only_the_own_clusters_users_are_let_in() {
        let authority = |cluster: &str, keys: &[&str]| Authority {
            cluster: cluster.to_owned(),
            tls: Vec::new(),
            ssh: keys
                .iter()
                .map(|key| format!("ssh-ed25519 {key}"))
                .collect(),
        };
        let users = [
            authority("leaf", &["LEAF"]),
            authority("root", &["NEW", "OLD"]),
        ];
        assert_eq!(
            trusted(&users, "root", "user"),
            "ssh-ed25519 NEW clustername=root&type=user\nssh-ed25519 OLD clustername=root&type=user\n"
        );
        let odd = [authority("a&type=x\nb%-._~é", &["KEY"])];
        assert_eq!(
            trusted(&odd, &odd[0].cluster, "user"),
            "ssh-ed25519 KEY clustername=a%26type%3Dx%0Ab%25-._~%C3%A9&type=user\n"
        );
    }
}
