//! The verifying half of join method `circleci` (facts: upstream `lib/circleci`;
//! claims: CircleCI's documentation of its OpenID Connect tokens).

use async_trait::async_trait;
use serde_json::{Value, json};

use crate::join::verify::oidc::attributes::{Attribute, Form, of, same};
use crate::join::verify::oidc::rules::{How, Key, Rules, exact};
use crate::join::verify::oidc::{Shape, member, published, section};
use crate::join::verify::{Carrier, Dialogue, Joining, Seen, Verifier, set};
use crate::refusal::Refusal;
use crate::yaml::Fields;

const SHAPE: Shape = Shape {
    rules: Rules {
        keys: &[
            exact("project_id", "oidc.circleci.com/project-id"),
            Key {
                name: "context_id",
                claim: "oidc.circleci.com/context-ids",
                how: How::Listed,
            },
        ],
        needs: &[&["project_id", "context_id"]],
    },
    attributes: ATTRIBUTES,
};

const ATTRIBUTES: &[Attribute] = &[
    same("sub"),
    Attribute {
        name: "context_ids",
        claim: "oidc.circleci.com/context-ids",
        form: Form::Texts,
    },
    of("project_id", "oidc.circleci.com/project-id"),
];

/// Join method `circleci`.
#[derive(Debug)]
pub struct Circleci;

#[async_trait]
impl Verifier for Circleci {
    fn name(&self) -> &'static str {
        "circleci"
    }

    fn carrier(&self) -> Carrier {
        Carrier::IdToken
    }

    fn read(&self, spec: &mut Fields<'_>, stored: &mut Value) {
        section(self.name(), spec, stored, |section| {
            let mut normal = json!({"allow": SHAPE.rules.read(section)});
            if let Some(organization) = section.required("organization_id") {
                set(&mut normal, "organization_id", organization);
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
        let organization = member(section, "organization_id").unwrap_or_default();
        let issuer = format!("https://oidc.circleci.com/org/{organization}");
        let claims = published(joining, &issuer, organization).await?;
        SHAPE.admit(section, &claims, seen)
    }
}
