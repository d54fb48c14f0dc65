//! The verifying half of join method `bitbucket` (facts: upstream `lib/bitbucket`;
//! claims: Atlassian's documentation of OpenID Connect in Bitbucket Pipelines).

use async_trait::async_trait;
use serde_json::{Value, json};

use crate::join::verify::oidc::attributes::{Attribute, of, same};
use crate::join::verify::oidc::rules::{Rules, exact};
use crate::join::verify::oidc::{Shape, member, published, section, url};
use crate::join::verify::{Carrier, Dialogue, Joining, Seen, Verifier, set};
use crate::refusal::Refusal;
use crate::yaml::Fields;

const SHAPE: Shape = Shape {
    rules: Rules {
        keys: &[
            exact("workspace_uuid", "workspaceUuid"),
            exact("repository_uuid", "repositoryUuid"),
            exact("deployment_environment_uuid", "deploymentEnvironmentUuid"),
            exact("branch_name", "branchName"),
        ],
        needs: &[&["workspace_uuid", "repository_uuid"]],
    },
    attributes: ATTRIBUTES,
};

const ATTRIBUTES: &[Attribute] = &[
    same("sub"),
    of("step_uuid", "stepUuid"),
    of("repository_uuid", "repositoryUuid"),
    of("pipeline_uuid", "pipelineUuid"),
    of("workspace_uuid", "workspaceUuid"),
    of("deployment_environment_uuid", "deploymentEnvironmentUuid"),
    of("branch_name", "branchName"),
];

/// Join method `bitbucket`.
#[derive(Debug)]
pub struct Bitbucket;

#[async_trait]
impl Verifier for Bitbucket {
    fn name(&self) -> &'static str {
        "bitbucket"
    }

    fn carrier(&self) -> Carrier {
        Carrier::IdToken
    }

    fn read(&self, spec: &mut Fields<'_>, stored: &mut Value) {
        section(self.name(), spec, stored, |section| {
            let mut normal = json!({"allow": SHAPE.rules.read(section)});
            if let Some(audience) = section.required("audience") {
                set(&mut normal, "audience", audience);
            }
            if let Some(provider) = url(section, "identity_provider_url", false) {
                set(&mut normal, "identity_provider_url", provider);
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
        let issuer = member(section, "identity_provider_url").unwrap_or_default();
        let claims = published(
            joining,
            issuer,
            member(section, "audience").unwrap_or_default(),
        )
        .await?;
        SHAPE.admit(section, &claims, seen)
    }
}
