//! The `application` output: a certificate that the proxy lets through to one web or TCP
//! application.

use std::sync::Arc;

use async_trait::async_trait;

use super::artifacts::{AUTHORITIES, Artifacts, CREDENTIALS, TLS, names};
use super::flags::DESTINATION;
use super::impersonated::Impersonated;
use super::lookup::NoSingle;
use super::{Context, Flag, FlagValue, Made, Output, Service, ServiceKind, ServicePlan};
use crate::destination::{Destination, DestinationPlan};
use crate::identity::Target;
use crate::yaml::{Fields, Tree};

/// The kind.
#[derive(Debug)]
pub struct Kind;

/// A configured application output.
#[derive(Debug, Clone)]
struct Settings {
    base: Impersonated,
    app: String,
    /// Whether `tls.crt`, `tls.key` and `tls.cas` are written.
    tls: bool,
}

impl ServiceKind for Kind {
    fn name(&self) -> &'static str {
        "application"
    }

    fn aliases(&self) -> &'static [&'static str] {
        &["app"]
    }

    fn flags(&self) -> &'static [Flag] {
        &[
            DESTINATION,
            Flag {
                name: "app",
                yaml: "app_name",
                value: FlagValue::Text,
                required: true,
                help: "Name of the application",
            },
            Flag {
                name: "specific-tls-extensions",
                yaml: "specific_tls_naming",
                value: FlagValue::Bool,
                required: false,
                help: "Write tls.crt, tls.key and tls.cas too",
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
        let app = fields.required("app_name");
        let tls = fields.bool("specific_tls_naming").unwrap_or(false);
        Some(Self {
            base: base?,
            app: app?,
            tls,
        })
    }
}

impl ServicePlan for Settings {
    fn label(&self) -> String {
        format!("application-output ({})", self.base.destination)
    }

    fn destination(&self) -> Option<&Arc<dyn DestinationPlan>> {
        Some(&self.base.destination)
    }

    fn files(&self) -> Vec<String> {
        let tls: &[&str] = if self.tls { &TLS } else { &[] };
        names(&[CREDENTIALS, AUTHORITIES, tls])
    }

    fn emit(&self) -> Vec<(String, Tree)> {
        self.base.emit([
            ("app_name", Some(Tree::text(&self.app))),
            ("specific_tls_naming", Some(Tree::Bool(self.tls))),
        ])
    }

    fn build(&self) -> Service {
        Service::Output(Box::new(Application {
            settings: self.clone(),
            destination: self.base.destination.build(),
        }))
    }
}

/// A running application output.
#[derive(Debug)]
struct Application {
    settings: Settings,
    destination: Arc<dyn Destination>,
}

#[async_trait]
impl Output for Application {
    fn destination(&self) -> Arc<dyn Destination> {
        Arc::clone(&self.destination)
    }

    async fn make(&self, context: &Context) -> anyhow::Result<Made> {
        let Settings { base, app, tls } = &self.settings;
        let client = base.client(context).await?;
        let found = client.application(app).await?;
        let found = found.ok_or_else(|| NoSingle::None {
            kind: "application",
            name: app.clone(),
        })?;
        let target = Target::Application {
            name: found.name,
            public_address: found.spec.public_addr,
        };
        let (issued, authorities) = base.issue(context, target).await?;
        let mut files = Artifacts::of(&issued, &authorities.hosts)?.authorities(&authorities);
        if *tls {
            files = files.tls(&issued, &authorities.hosts);
        }
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
            "destination: {type: memory}\nroles: [a]\napp_name: grafana\n",
        );
        assert_eq!(
            written.unwrap(),
            "application-output (memory)\ndestination:\n  type: memory\nroles:\n  - a\n\
             app_name: grafana\nspecific_tls_naming: false\n"
        );
        for bad in [
            "{}",
            "app_name: x",
            "destination: {type: memory}",
            "destination: {type: memory}\napp_name: ''",
            "destination: {type: memory}\napp_name: x\nspecific_tls_naming: 'true'",
        ] {
            assert!(plan(&Kind, bad).is_err(), "{bad}");
        }
    }
}
