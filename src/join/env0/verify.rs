//! The verifying half of join method `env0` (facts: upstream `lib/join/env0`; claims:
//! env0's documentation of its OIDC integrations).

use async_trait::async_trait;
use serde_json::{Value, json};

use crate::join::verify::oidc::attributes::{Attribute, of, same};
use crate::join::verify::oidc::rules::{Rules, exact};
use crate::join::verify::oidc::{Shape, published, section};
use crate::join::verify::{Carrier, Dialogue, Joining, Seen, Verifier};
use crate::refusal::Refusal;
use crate::yaml::Fields;

/// Who issues all of its tokens; the slash at the end is part of the name.
const ISSUER: &str = "https://login.app.env0.com/";
/// The audience that its tokens have, whatever is asked for.
const AUDIENCE: &str = "https://app.env0.com";

const SHAPE: Shape = Shape {
    rules: Rules {
        keys: &[
            exact("organization_id", "organizationId"),
            exact("project_id", "projectId"),
            exact("project_name", "projectName"),
            exact("template_id", "templateId"),
            exact("template_name", "templateName"),
            exact("environment_id", "environmentId"),
            exact("environment_name", "environmentName"),
            exact("workspace_name", "workspaceName"),
            exact("deployment_type", "deploymentType"),
            exact("deployer_email", "deployerEmail"),
            exact("env0_tag", "env0Tag"),
        ],
        needs: &[&["organization_id"], &["project_id", "project_name"]],
    },
    attributes: ATTRIBUTES,
};

const ATTRIBUTES: &[Attribute] = &[
    same("sub"),
    of("organization_id", "organizationId"),
    of("project_id", "projectId"),
    of("project_name", "projectName"),
    of("template_id", "templateId"),
    of("template_name", "templateName"),
    of("environment_id", "environmentId"),
    of("environment_name", "environmentName"),
    of("workspace_name", "workspaceName"),
    of("deployment_log_id", "deploymentLogId"),
    of("deployment_type", "deploymentType"),
    of("deployer_email", "deployerEmail"),
    of("env0_tag", "env0Tag"),
];

/// Join method `env0`.
#[derive(Debug)]
pub struct Env0;

#[async_trait]
impl Verifier for Env0 {
    fn name(&self) -> &'static str {
        "env0"
    }

    fn carrier(&self) -> Carrier {
        Carrier::IdToken
    }

    fn read(&self, spec: &mut Fields<'_>, stored: &mut Value) {
        section(self.name(), spec, stored, |section| {
            let normal = json!({"allow": SHAPE.rules.read(section)});
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
        let claims = published(joining, ISSUER, AUDIENCE).await?;
        SHAPE.admit(section, &claims, seen)
    }
}
