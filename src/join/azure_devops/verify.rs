//! The verifying half of join method `azure_devops` (facts: upstream `lib/azuredevops`,
//! `lib/auth/join_azure_devops.go`).

use async_trait::async_trait;
use serde_json::{Map, Value, json};

use crate::join::verify::oidc::attributes::{Attribute, of, same};
use crate::join::verify::oidc::rules::{Rules, exact};
use crate::join::verify::oidc::{Claims, Shape, member, published, section, text};
use crate::join::verify::{Carrier, Dialogue, Joining, Seen, Verifier, set};
use crate::query::unescape;
use crate::refusal::Refusal;
use crate::yaml::Fields;

/// The audience that its tokens have, whatever is asked for.
const AUDIENCE: &str = "api://AzureADTokenExchange";

const SHAPE: Shape = Shape {
    rules: Rules {
        keys: &[
            exact("sub", "sub"),
            exact("project_name", "project_name"),
            exact("pipeline_name", "pipeline_name"),
            exact("project_id", "prj_id"),
            exact("definition_id", "def_id"),
            exact("repository_uri", "rpo_uri"),
            exact("repository_version", "rpo_ver"),
            exact("repository_ref", "rpo_ref"),
        ],
        needs: &[&["sub", "project_name", "project_id"]],
    },
    attributes: ATTRIBUTES,
};

const ATTRIBUTES: &[Attribute] = &[
    same("sub"),
    same("organization_name"),
    same("project_name"),
    same("pipeline_name"),
    of("organization_id", "org_id"),
    of("project_id", "prj_id"),
    of("definition_id", "def_id"),
    of("repository_id", "rpo_id"),
    of("repository_version", "rpo_ver"),
    of("repository_ref", "rpo_ref"),
    same("run_id"),
];

/// Join method `azure_devops`.
#[derive(Debug)]
pub struct AzureDevops;

#[async_trait]
impl Verifier for AzureDevops {
    fn name(&self) -> &'static str {
        "azure_devops"
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
        let issuer = format!("https://vstoken.dev.azure.com/{organization}");
        let mut claims = published(joining, &issuer, AUDIENCE).await?;
        let found = text(&claims, "org_id").unwrap_or_default();
        if found != organization {
            return Err(Refusal::bad_parameter(format!(
                "organization ID in token ({found}) does not match configured ({organization})"
            )));
        }
        name(&mut claims).map_err(Refusal::bad_parameter)?;
        let judged = SHAPE.admit(section, &claims, seen);
        seen.attributes = seen.attributes.take().map(|pipeline| {
            let pipeline = ("pipeline".to_owned(), Value::Object(pipeline));
            Map::from_iter([pipeline])
        });
        judged
    }
}

/// Adds what only the subject says, `p://<organization>/<project>/<pipeline>`, under the names that
/// rules have for it.
fn name(claims: &mut Claims) -> Result<(), String> {
    let subject = text(claims, "sub").unwrap_or_default().to_owned();
    let Some(path) = subject.strip_prefix("p://") else {
        return Err(format!(
            "id token is not of pipeline kind (sub: {subject:?})"
        ));
    };
    let parts: Vec<String> = path.split('/').filter_map(unescape).collect();
    let (3, [organization, project, pipeline]) = (path.split('/').count(), parts.as_slice()) else {
        return Err(format!(
            "subject malformed, expected 2 path elements (sub: {subject:?})"
        ));
    };
    for (key, value) in [
        ("organization_name", organization),
        ("project_name", project),
        ("pipeline_name", pipeline),
    ] {
        claims.insert(key.to_owned(), Value::String(value.clone()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_subject_names_organization_project_and_pipeline() {
        let named = |subject: &str| {
            let claims = json!({"sub": subject, "project_name": "claimed"});
            let mut claims = claims.as_object().unwrap().clone();
            name(&mut claims).map(|()| {
                ["organization_name", "project_name", "pipeline_name"]
                    .map(|key| text(&claims, key).unwrap().to_owned())
            })
        };
        let parts = named("p://org/my%20project/a.b").unwrap();
        assert_eq!(parts, ["org", "my project", "a.b"]);
        for subject in [
            "",
            "sc://org/p/c",
            "p://org/p",
            "p://org/p/q/r",
            "p://org/%zz/q",
        ] {
            assert!(named(subject).is_err(), "{subject}");
        }
    }
}
