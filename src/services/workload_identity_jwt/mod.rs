//! The `workload-identity-jwt` output: a JWT-SVID as a file.

use std::sync::Arc;

use async_trait::async_trait;

use super::flags::{DESTINATION, LABEL_SELECTOR, NAME_SELECTOR};
use super::svid::{Derived, Surroundings, only};
use super::{Context, Flag, FlagValue, Made, Output, Service, ServiceKind, ServicePlan};
use crate::destination::{self, Destination, DestinationPlan, FileSet};
use crate::pb::teleport::workloadidentity::v1::WorkloadAttrs;
use crate::secret::Secret;
use crate::workload::{Bundles, JwtIssuer, Selector, TokenIssuer as _};
use crate::yaml::{Fields, Tree};

/// The YAML `type`.
const NAME: &str = "workload-identity-jwt";
/// The file.
const FILE: &str = "jwt_svid";

/// The kind.
#[derive(Debug)]
pub struct Kind;

impl ServiceKind for Kind {
    fn name(&self) -> &'static str {
        NAME
    }

    fn flags(&self) -> &'static [Flag] {
        &[
            DESTINATION,
            NAME_SELECTOR,
            LABEL_SELECTOR,
            Flag {
                name: "audience",
                yaml: "audiences",
                value: FlagValue::List,
                required: true,
                help: "Whom the token is for; repeatable",
            },
        ]
    }

    fn parse(&self, fields: &mut Fields<'_>) -> Option<Box<dyn ServicePlan>> {
        let selector = Selector::parse(fields);
        let destination = destination::read(fields, "destination");
        let unreadable = fields.has("audiences");
        let audiences = match fields.strings("audiences") {
            Some(audiences) if !audiences.is_empty() && !audiences.contains(&String::new()) => {
                Some(audiences)
            }
            // A value that is no list was reported where it was read.
            None if unreadable => None,
            _ => {
                fields.error(
                    "audiences",
                    "at least one audience is required, and none may be empty",
                    Some("list whom the token is for: `audiences: [example.com]`"),
                );
                None
            }
        };
        Some(Box::new(Settings {
            selector: selector?,
            destination: destination?,
            audiences: audiences?,
        }))
    }

    fn skips_maximum_ttl(&self) -> bool {
        true
    }
}

/// A configured output.
#[derive(Debug, Clone)]
struct Settings {
    selector: Selector,
    destination: Arc<dyn DestinationPlan>,
    audiences: Vec<String>,
}

impl ServicePlan for Settings {
    fn label(&self) -> String {
        format!("{NAME} ({})", self.destination)
    }

    fn destination(&self) -> Option<&Arc<dyn DestinationPlan>> {
        Some(&self.destination)
    }

    fn files(&self) -> Vec<String> {
        vec![FILE.to_owned()]
    }

    fn emit(&self) -> Vec<(String, Tree)> {
        vec![
            ("selector".to_owned(), self.selector.emit()),
            ("destination".to_owned(), self.destination.emit()),
            (
                "audiences".to_owned(),
                Tree::texts(self.audiences.iter().cloned()),
            ),
        ]
    }

    fn build(&self) -> Service {
        Service::Output(Box::new(JwtOutput {
            selector: self.selector.clone(),
            audiences: self.audiences.clone(),
            destination: self.destination.build(),
            surroundings: Surroundings::default(),
        }))
    }
}

/// A running output.
#[derive(Debug)]
struct JwtOutput {
    selector: Selector,
    audiences: Vec<String>,
    destination: Arc<dyn Destination>,
    surroundings: Surroundings,
}

#[async_trait]
impl Output for JwtOutput {
    fn destination(&self) -> Arc<dyn Destination> {
        Arc::clone(&self.destination)
    }

    async fn make(&self, context: &Context) -> anyhow::Result<Made> {
        // The issuer verifies with the bundle and would wait for it without an end.
        self.surroundings.look(context).await?;
        let access = Arc::new(Derived::new(context.identity.clone(), context.lifetime));
        let feeds = context.trust.follow(&context.identity, &context.clock);
        let issuer = JwtIssuer::new(access, feeds.bundles, context.clock.clone());
        let issued = issuer
            .issue(
                &self.selector,
                context.lifetime.ttl,
                &WorkloadAttrs::default(),
                &self.audiences,
            )
            .await?;
        let svid = only(issued, |svid| svid.id.to_string())?;
        let mut files = FileSet::new();
        files.insert(FILE.to_owned(), Secret::new(svid.token.into_bytes()));
        Ok(Made {
            files,
            not_after: svid.not_after,
        })
    }

    /// A token is as good as the keys that verify it.
    async fn changed(&self, context: &Context) {
        while !self.surroundings.changed(context).await.of(Bundles::jwt) {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::services::testing;
    use crate::yaml::emit;

    fn read(source: &str) -> (Option<Box<dyn ServicePlan>>, String) {
        testing::read(&Kind, source)
    }

    #[test]
    fn sections_read_back() {
        let source = "selector: {name: x}\ndestination: {type: directory, path: /opt/x}\n\
                      audiences: [a, b]\n";
        let (plan, problems) = read(source);
        assert_eq!(problems, "");
        let plan = plan.unwrap();
        assert_eq!(plan.label(), "workload-identity-jwt (directory: /opt/x)");
        let text = emit::emit(&Tree::Map(plan.emit()));
        let (again, problems) = read(&text);
        assert_eq!(problems, "");
        assert_eq!(emit::emit(&Tree::Map(again.unwrap().emit())), text);
    }

    #[test]
    fn a_token_is_for_somebody() {
        for (audiences, expected) in [
            ("", "at least one audience"),
            ("audiences:", "at least one audience"),
            ("audiences: []", "at least one audience"),
            ("audiences: ['']", "none may be empty"),
            ("audiences: x", "must be a list"),
        ] {
            let source =
                format!("selector: {{name: x}}\ndestination: {{type: memory}}\n{audiences}\n");
            let (plan, problems) = read(&source);
            assert!(plan.is_none(), "{audiences}");
            assert!(problems.contains(expected), "{audiences}: {problems}");
        }
    }

    #[test]
    fn every_problem_is_told_in_one_run() {
        let (plan, problems) = read("selector: {}\n");
        assert!(plan.is_none());
        for key in ["selector", "destination", "audiences"] {
            assert!(problems.contains(&format!("{key}: ")), "{key}: {problems}");
        }
    }
}
