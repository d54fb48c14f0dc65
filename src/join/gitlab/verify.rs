//! The verifying half of join method `gitlab` (facts: upstream `lib/gitlab`,
//! `lib/auth/join_gitlab.go`; claims: GitLab's documentation of its ID tokens).

use async_trait::async_trait;
use serde_json::{Value, json};

use crate::join::verify::oidc::attributes::{Attribute, Form, same};
use crate::join::verify::oidc::rules::{How, Key, Rules, exact, pattern};
use crate::join::verify::oidc::{
    Expected, Shape, Source, claims, host, member, section, static_jwks,
};
use crate::join::verify::{Carrier, Dialogue, Joining, Seen, Verifier, set};
use crate::refusal::Refusal;
use crate::yaml::Fields;

/// Where nothing else is said.
const DOMAIN: &str = "gitlab.com";

const SHAPE: Shape = Shape {
    rules: Rules {
        keys: &[
            pattern("sub", "sub"),
            pattern("ref", "ref"),
            exact("ref_type", "ref_type"),
            pattern("namespace_path", "namespace_path"),
            pattern("project_path", "project_path"),
            exact("pipeline_source", "pipeline_source"),
            exact("environment", "environment"),
            exact("user_login", "user_login"),
            exact("user_id", "user_id"),
            exact("user_email", "user_email"),
            Key {
                name: "ref_protected",
                claim: "ref_protected",
                how: How::Flag,
            },
            Key {
                name: "environment_protected",
                claim: "environment_protected",
                how: How::Flag,
            },
            exact("ci_config_sha", "ci_config_sha"),
            exact("ci_config_ref_uri", "ci_config_ref_uri"),
            exact("deployment_tier", "deployment_tier"),
            exact("project_visibility", "project_visibility"),
        ],
        needs: &[&["sub", "project_path", "namespace_path", "ci_config_ref_uri"]],
    },
    attributes: ATTRIBUTES,
};

const ATTRIBUTES: &[Attribute] = &[
    same("sub"),
    same("ref"),
    same("ref_type"),
    Attribute {
        name: "ref_protected",
        claim: "ref_protected",
        form: Form::Flag,
    },
    same("namespace_path"),
    same("project_path"),
    same("user_login"),
    same("user_email"),
    same("pipeline_id"),
    same("pipeline_source"),
    same("environment"),
    Attribute {
        name: "environment_protected",
        claim: "environment_protected",
        form: Form::Flag,
    },
    Attribute {
        name: "runner_id",
        claim: "runner_id",
        form: Form::Integer,
    },
    same("runner_environment"),
    same("sha"),
    same("ci_config_ref_uri"),
    same("ci_config_sha"),
];

/// Join method `gitlab`.
#[derive(Debug)]
pub struct Gitlab;

#[async_trait]
impl Verifier for Gitlab {
    fn name(&self) -> &'static str {
        "gitlab"
    }

    fn carrier(&self) -> Carrier {
        Carrier::IdToken
    }

    fn read(&self, spec: &mut Fields<'_>, stored: &mut Value) {
        section(self.name(), spec, stored, |section| {
            let mut normal = json!({"allow": SHAPE.rules.read(section)});
            let domain = host(section, "domain").unwrap_or_else(|| DOMAIN.to_owned());
            set(&mut normal, "domain", domain);
            if let Some(keys) = static_jwks(section) {
                set(&mut normal, "static_jwks", keys);
            }
            normal
        });
    }

    async fn verify(
        &self,
        joining: &Joining<'_>,
        _dialogue: &mut dyn Dialogue,
        seen: &mut Seen,
    ) -> Result<(), Refusal> {
        let section = &joining.spec[self.name()];
        let domain = member(section, "domain").unwrap_or(DOMAIN);
        let url = format!("https://{domain}");
        let source = Source::of(section, &url);
        let expected = Expected {
            // The default stands in every token resource: beside keys it says nothing.
            issuer: match &source {
                Source::Static(_) if domain == DOMAIN => None,
                Source::Static(_) | Source::Discovery(_) => Some(&url),
            },
            audience: joining.cluster,
            authorized_party: true,
        };
        let claims = claims(joining, &source, &expected).await?;
        SHAPE.admit(section, &claims, seen)
    }
}
