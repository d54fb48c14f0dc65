//! The verifying half of join method `github` (facts: upstream `lib/githubactions`,
//! `lib/auth/join_github.go`; claims: GitHub's documentation of its ID tokens).

use async_trait::async_trait;
use serde_json::{Value, json};

use crate::join::verify::oidc::attributes::{Attribute, same};
use crate::join::verify::oidc::rules::{Rules, exact, pattern};
use crate::join::verify::oidc::{
    Expected, Shape, Source, claims, host, member, section, static_jwks,
};
use crate::join::verify::{Carrier, Dialogue, Joining, Seen, Verifier, set};
use crate::refusal::Refusal;
use crate::yaml::Fields;

/// Who issues the tokens of github.com.
const ISSUER: &str = "https://token.actions.githubusercontent.com";
/// The audience that agents ask for.
const AUDIENCE: &str = "teleport.cluster.local";
const HOST: &str = "enterprise_server_host";
const SLUG: &str = "enterprise_slug";

const SHAPE: Shape = Shape {
    rules: Rules {
        keys: &[
            pattern("sub", "sub"),
            pattern("repository", "repository"),
            pattern("repository_owner", "repository_owner"),
            pattern("workflow", "workflow"),
            pattern("environment", "environment"),
            pattern("actor", "actor"),
            pattern("ref", "ref"),
            exact("ref_type", "ref_type"),
            exact("enterprise", "enterprise"),
            exact("enterprise_id", "enterprise_id"),
        ],
        needs: &[&["repository", "repository_owner", "sub"]],
    },
    attributes: ATTRIBUTES,
};

const ATTRIBUTES: &[Attribute] = &[
    same("sub"),
    same("actor"),
    same("environment"),
    same("ref"),
    same("ref_type"),
    same("repository"),
    same("repository_owner"),
    same("workflow"),
    same("event_name"),
    same("sha"),
    same("run_id"),
    same("enterprise"),
    same("enterprise_id"),
];

/// Join method `github`.
#[derive(Debug)]
pub struct Github;

#[async_trait]
impl Verifier for Github {
    fn name(&self) -> &'static str {
        "github"
    }

    fn carrier(&self) -> Carrier {
        Carrier::IdToken
    }

    fn read(&self, spec: &mut Fields<'_>, stored: &mut Value) {
        section(self.name(), spec, stored, |section| {
            let mut github = json!({"allow": SHAPE.rules.read(section)});
            let host = host(section, HOST);
            let slug = section.string(SLUG);
            if host.is_some() && slug.is_some() {
                section.error(
                    SLUG,
                    format!("`{SLUG}` together with `{HOST}`"),
                    Some("keep one: a slug is of an enterprise on github.com"),
                );
            }
            if slug.as_ref().is_some_and(|slug| slug.contains('/')) {
                section.error(
                    SLUG,
                    "it is the enterprise's name in URLs, without slashes",
                    Some("write what stands behind `github.com/enterprises/`"),
                );
            }
            let texts = [
                (HOST, host),
                (SLUG, slug),
                ("static_jwks", static_jwks(section)),
            ];
            for (key, text) in texts {
                if let Some(text) = text {
                    set(&mut github, key, text);
                }
            }
            github
        });
    }

    async fn verify(
        &self,
        joining: &Joining<'_>,
        _dialogue: &mut dyn Dialogue,
        seen: &mut Seen,
    ) -> Result<(), Refusal> {
        let section = &joining.spec[self.name()];
        let issuer = issuer(section);
        let source = Source::of(section, issuer.as_deref().unwrap_or(ISSUER));
        let expected = Expected {
            // Keys that are given tell who it is, unless several share them: enterprises do.
            issuer: match &source {
                Source::Static(_) => issuer.as_deref(),
                Source::Discovery(issuer) => Some(&issuer.url),
            },
            audience: AUDIENCE,
            authorized_party: true,
        };
        let claims = claims(joining, &source, &expected).await?;
        SHAPE.admit(section, &claims, seen)
    }
}

/// The issuer of an enterprise, if the token resource names one.
fn issuer(section: &Value) -> Option<String> {
    let by_slug = member(section, SLUG).map(|slug| format!("{ISSUER}/{slug}"));
    by_slug.or_else(|| member(section, HOST).map(|host| format!("https://{host}/_services/token")))
}
