//! The verifying half of join method `spacelift` (facts: upstream `lib/spacelift`;
//! claims: Spacelift's documentation of its OIDC tokens).

use async_trait::async_trait;
use serde_json::{Value, json};

use crate::join::verify::oidc::attributes::{Attribute, of, same};
use crate::join::verify::oidc::rules::{Rules, exact, pattern};
use crate::join::verify::oidc::{Shape, host, member, published, section};
use crate::join::verify::{Carrier, Dialogue, Joining, Seen, Verifier, set};
use crate::refusal::Refusal;
use crate::yaml::Fields;

/// Has `space_id` and `caller_id` taken as patterns.
const GLOBS: &str = "enable_glob_matching";

const SHAPE: Shape = Shape {
    rules: Rules {
        keys: &[
            exact("space_id", "spaceId"),
            exact("caller_id", "callerId"),
            exact("caller_type", "callerType"),
            exact("scope", "scope"),
        ],
        needs: &[&["space_id", "caller_id"]],
    },
    attributes: ATTRIBUTES,
};

/// The same with patterns.
const GLOBBED: Shape = Shape {
    rules: Rules {
        keys: &[
            pattern("space_id", "spaceId"),
            pattern("caller_id", "callerId"),
            exact("caller_type", "callerType"),
            exact("scope", "scope"),
        ],
        needs: &[&["space_id", "caller_id"]],
    },
    attributes: ATTRIBUTES,
};

const ATTRIBUTES: &[Attribute] = &[
    same("sub"),
    of("space_id", "spaceId"),
    of("caller_type", "callerType"),
    of("caller_id", "callerId"),
    of("run_type", "runType"),
    of("run_id", "runId"),
    same("scope"),
];

/// Join method `spacelift`.
#[derive(Debug)]
pub struct Spacelift;

#[async_trait]
impl Verifier for Spacelift {
    fn name(&self) -> &'static str {
        "spacelift"
    }

    fn carrier(&self) -> Carrier {
        Carrier::IdToken
    }

    fn read(&self, spec: &mut Fields<'_>, stored: &mut Value) {
        section(self.name(), spec, stored, |section| {
            let mut normal = json!({"allow": SHAPE.rules.read(section)});
            if let Some(host) = host(section, "hostname") {
                set(&mut normal, "hostname", host);
            } else if !section.has("hostname") {
                section.required("hostname");
            }
            if let Some(globs) = section.bool(GLOBS) {
                set(&mut normal, GLOBS, globs);
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
        let host = member(section, "hostname").unwrap_or_default();
        let issuer = format!("https://{host}");
        let claims = published(joining, &issuer, host).await?;
        let shape = if section[GLOBS] == true {
            &GLOBBED
        } else {
            &SHAPE
        };
        shape.admit(section, &claims, seen)
    }
}
