//! The `database` output: a certificate that the proxy lets through to one database, in the forms
//! that database clients read.

use std::sync::Arc;

use async_trait::async_trait;

use super::artifacts::{AUTHORITIES, Artifacts, CREDENTIALS, TLS, names};
use super::authorities::{Authorities, bundle, terminated};
use super::flags::DESTINATION;
use super::impersonated::Impersonated;
use super::lookup;
use super::{Context, Flag, FlagValue, Made, Output, Service, ServiceKind, ServicePlan};
use crate::cluster::client::resources::Resource;
use crate::destination::{Destination, DestinationPlan};
use crate::identity::{Identity, Target};
use crate::pb::types::DatabaseSpecV3;
use crate::yaml::{Fields, Tree};

/// The kind.
#[derive(Debug)]
pub struct Kind;

/// Which files a client of the database reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Format {
    /// Those of every identity.
    #[default]
    Plain,
    /// `tls.crt`, `tls.key`, `tls.cas`.
    Tls,
    /// `mongo.crt` with certificate and key, `mongo.cas`.
    Mongo,
    /// The directory that `cockroach --certs-dir` reads.
    Cockroach,
}

impl Format {
    const ALL: [Self; 4] = [Self::Plain, Self::Tls, Self::Mongo, Self::Cockroach];

    fn name(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::Tls => "tls",
            Self::Mongo => "mongo",
            Self::Cockroach => "cockroach",
        }
    }

    /// The names of the format's own files.
    fn files(self) -> &'static [&'static str] {
        match self {
            Self::Plain => &[],
            Self::Tls => &TLS,
            Self::Mongo => &["mongo.cas", "mongo.crt"],
            Self::Cockroach => &[
                "cockroach/ca-client.crt",
                "cockroach/ca.crt",
                "cockroach/node.crt",
                "cockroach/node.key",
            ],
        }
    }

    /// Adds the format's own files.
    fn add(self, files: Artifacts, identity: &Identity, authorities: &Authorities) -> Artifacts {
        let key = identity.key().to_pem();
        let (certificate, key) = (identity.tls_pem(), key.expose());
        let databases = || bundle(&authorities.databases);
        match self {
            Self::Plain => files,
            Self::Tls => files.tls(identity, &authorities.hosts),
            Self::Mongo => files
                .add("mongo.crt", terminated(certificate.to_owned()) + key)
                .add("mongo.cas", databases()),
            // Upstream leaves ca.crt empty, by which a client of CockroachDB judges the server.
            Self::Cockroach => files
                .add("cockroach/node.crt", certificate)
                .add("cockroach/node.key", key)
                .add("cockroach/ca.crt", databases())
                .add("cockroach/ca-client.crt", databases()),
        }
    }
}

/// A configured database output.
#[derive(Debug, Clone)]
struct Settings {
    base: Impersonated,
    format: Format,
    service: String,
    database: String,
    username: String,
}

impl ServiceKind for Kind {
    fn name(&self) -> &'static str {
        "database"
    }

    fn aliases(&self) -> &'static [&'static str] {
        &["db"]
    }

    fn flags(&self) -> &'static [Flag] {
        &[
            DESTINATION,
            Flag {
                name: "format",
                yaml: "format",
                value: FlagValue::Text,
                required: false,
                help: "Files for certain clients: tls, mongo or cockroach",
            },
            Flag {
                name: "service",
                yaml: "service",
                value: FlagValue::Text,
                required: true,
                help: "Name of the database in the cluster",
            },
            Flag {
                name: "username",
                yaml: "username",
                value: FlagValue::Text,
                required: true,
                help: "Database user to connect as",
            },
            Flag {
                name: "database",
                yaml: "database",
                value: FlagValue::Text,
                required: true,
                help: "Logical database to connect to",
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
        let format = fields.one_of("format", &Format::ALL.map(Format::name));
        let format = Format::ALL
            .into_iter()
            .find(|known| Some(known.name()) == format.as_deref());
        let service = fields.required("service");
        let database = fields.string("database").unwrap_or_default();
        let username = fields.string("username").unwrap_or_default();
        Some(Self {
            base: base?,
            format: format.unwrap_or_default(),
            service: service?,
            database,
            username,
        })
    }

    /// What the certificate for `found` has to lead to.
    fn target(&self, found: Resource<DatabaseSpecV3>) -> Target {
        let protocol = found.spec.protocol;
        let user = match (protocol.as_str(), self.username.as_str()) {
            ("redis", "") => "default",
            ("mongodb", "") => {
                tracing::error!(
                    service = self.service,
                    "MongoDB takes no certificate without a user: set username"
                );
                ""
            }
            (_, user) => user,
        };
        Target::Database {
            service: found.name,
            user: user.to_owned(),
            database: self.database.clone(),
            protocol,
        }
    }
}

impl ServicePlan for Settings {
    fn label(&self) -> String {
        format!("database-output ({})", self.base.destination)
    }

    fn destination(&self) -> Option<&Arc<dyn DestinationPlan>> {
        Some(&self.base.destination)
    }

    fn files(&self) -> Vec<String> {
        names(&[CREDENTIALS, AUTHORITIES, self.format.files()])
    }

    fn emit(&self) -> Vec<(String, Tree)> {
        let given = |text: &str| (!text.is_empty()).then(|| Tree::text(text));
        self.base.emit([
            ("format", given(self.format.name())),
            ("service", Some(Tree::text(&self.service))),
            ("database", given(&self.database)),
            ("username", given(&self.username)),
        ])
    }

    fn build(&self) -> Service {
        Service::Output(Box::new(Database {
            settings: self.clone(),
            destination: self.base.destination.build(),
        }))
    }
}

/// A running database output.
#[derive(Debug)]
struct Database {
    settings: Settings,
    destination: Arc<dyn Destination>,
}

#[async_trait]
impl Output for Database {
    fn destination(&self) -> Arc<dyn Destination> {
        Arc::clone(&self.destination)
    }

    async fn make(&self, context: &Context) -> anyhow::Result<Made> {
        let settings = &self.settings;
        let client = settings.base.client(context).await?;
        let found = client.databases(&settings.service).await?;
        let found = lookup::single("database", &settings.service, found)?;
        let target = settings.target(found);
        let (issued, authorities) = settings.base.issue(context, target).await?;
        let files = Artifacts::of(&issued, &authorities.hosts)?.authorities(&authorities);
        let files = settings.format.add(files, &issued, &authorities);
        Ok(Made {
            files: files.files(),
            not_after: issued.not_after(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::crypto::{KeyAlgorithm, pem};
    use crate::services::artifacts::tests::{facts, text};
    use crate::services::testing::plan;

    #[test]
    fn the_section_is_read_and_written() {
        let written = plan(
            &Kind,
            "destination: {type: memory}\nservice: pg\nusername: alice\ndatabase: app\nformat: tls\n",
        );
        assert_eq!(
            written.unwrap(),
            "database-output (memory)\ndestination:\n  type: memory\nformat: tls\nservice: pg\n\
             database: app\nusername: alice\n"
        );
        plan(
            &Kind,
            "destination: {type: memory}\nservice: pg\nformat: ''",
        )
        .unwrap();
        for bad in [
            "{}",
            "destination: {type: memory}",
            "destination: {type: memory}\nservice: ''",
            "destination: {type: memory}\nservice: pg\nformat: mysql",
            "destination: {type: memory}\nservice: pg\nroles: a",
        ] {
            assert!(plan(&Kind, bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn each_format_adds_its_files() {
        let (identity, authorities) = facts(KeyAlgorithm::Rsa2048);
        for (format, expected) in [
            (Format::Plain, &[][..]),
            (
                Format::Tls,
                &[("tls.cas", 2), ("tls.crt", 1), ("tls.key", 1)],
            ),
            (Format::Mongo, &[("mongo.cas", 2), ("mongo.crt", 2)]),
            (
                Format::Cockroach,
                &[
                    ("cockroach/ca-client.crt", 2),
                    ("cockroach/ca.crt", 2),
                    ("cockroach/node.crt", 1),
                    ("cockroach/node.key", 1),
                ],
            ),
        ] {
            let files = format.add(Artifacts::default(), &identity, &authorities);
            let files = files.files();
            let counted: Vec<(&str, usize)> = files
                .keys()
                .map(|name| {
                    (
                        name.as_str(),
                        pem::decode_all(&text(&files, name)).unwrap().len(),
                    )
                })
                .collect();
            assert_eq!(counted, expected, "{format:?}");
        }
        let files = Format::Mongo.add(Artifacts::default(), &identity, &authorities);
        let blocks = pem::decode_all(&text(&files.files(), "mongo.crt")).unwrap();
        let labels: Vec<&str> = blocks.iter().map(|block| block.label.as_str()).collect();
        assert_eq!(labels, ["CERTIFICATE", "RSA PRIVATE KEY"]);
    }

    #[test]
    fn the_certificate_leads_to_what_was_found() {
        let target = |protocol: &str, username: &str| {
            let settings = Settings {
                base: Impersonated {
                    destination: crate::destination::from_uri("memory://").unwrap(),
                    roles: Vec::new(),
                },
                format: Format::Plain,
                service: "pg".to_owned(),
                database: "app".to_owned(),
                username: username.to_owned(),
            };
            let found = Resource {
                name: "pg-rds-eu".to_owned(),
                labels: BTreeMap::new(),
                spec: DatabaseSpecV3 {
                    protocol: protocol.to_owned(),
                    uri: String::new(),
                },
            };
            match settings.target(found) {
                Target::Database {
                    service,
                    user,
                    database,
                    ..
                } => (service, user, database),
                other => panic!("{other:?}"),
            }
        };
        for (protocol, given, user) in [
            ("postgres", "alice", "alice"),
            ("postgres", "", ""),
            ("redis", "", "default"),
            ("redis", "alice", "alice"),
            ("mongodb", "", ""),
        ] {
            let expected = ("pg-rds-eu".to_owned(), user.to_owned(), "app".to_owned());
            assert_eq!(target(protocol, given), expected, "{protocol}");
        }
    }
}
