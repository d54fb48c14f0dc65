//! The verifying half of join method `terraform_cloud` (facts: upstream
//! `lib/terraformcloud`; claims: HashiCorp's documentation of workload identity tokens).

use async_trait::async_trait;
use serde_json::{Value, json};

use crate::join::verify::oidc::attributes::{Attribute, of, same};
use crate::join::verify::oidc::rules::{Rules, exact};
use crate::join::verify::oidc::{Shape, host, member, published, section};
use crate::join::verify::{Carrier, Dialogue, Joining, Seen, Verifier, set};
use crate::refusal::Refusal;
use crate::yaml::Fields;

/// Where no hostname is given.
const HOST: &str = "app.terraform.io";

const SHAPE: Shape = Shape {
    rules: Rules {
        keys: &[
            exact("organization_id", "terraform_organization_id"),
            exact("organization_name", "terraform_organization_name"),
            exact("project_id", "terraform_project_id"),
            exact("project_name", "terraform_project_name"),
            exact("workspace_id", "terraform_workspace_id"),
            exact("workspace_name", "terraform_workspace_name"),
            exact("run_phase", "terraform_run_phase"),
        ],
        needs: &[
            &["organization_id", "organization_name"],
            &[
                "project_id",
                "project_name",
                "workspace_id",
                "workspace_name",
            ],
        ],
    },
    attributes: ATTRIBUTES,
};

const ATTRIBUTES: &[Attribute] = &[
    same("sub"),
    of("organization_name", "terraform_organization_name"),
    of("project_name", "terraform_project_name"),
    of("workspace_name", "terraform_workspace_name"),
    of("full_workspace", "terraform_full_workspace"),
    of("run_id", "terraform_run_id"),
    of("run_phase", "terraform_run_phase"),
];

/// Join method `terraform_cloud`.
#[derive(Debug)]
pub struct TerraformCloud;

#[async_trait]
impl Verifier for TerraformCloud {
    fn name(&self) -> &'static str {
        "terraform_cloud"
    }

    fn carrier(&self) -> Carrier {
        Carrier::IdToken
    }

    fn read(&self, spec: &mut Fields<'_>, stored: &mut Value) {
        section(self.name(), spec, stored, |section| {
            let mut normal = json!({"allow": SHAPE.rules.read(section)});
            let texts = [
                ("audience", section.string("audience")),
                ("hostname", host(section, "hostname")),
            ];
            for (key, text) in texts {
                if let Some(text) = text {
                    set(&mut normal, key, text);
                }
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
        let host = member(section, "hostname").unwrap_or(HOST);
        let issuer = format!("https://{host}");
        let claims = published(
            joining,
            &issuer,
            member(section, "audience").unwrap_or(joining.cluster),
        )
        .await?;
        SHAPE.admit(section, &claims, seen)
    }
}
