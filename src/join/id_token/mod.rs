//! Joining with an ID token: a short-lived JWT that the place where the agent runs vouches for it
//! with. Methods differ in where the token comes from and in what the cluster checks.

mod web;

use std::fmt;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;

pub(super) use web::{Question, ask};

use super::{JoinError, JoinMethod, Proof, Prover, Surroundings};
use crate::crypto::jws::Token;
use crate::pb::teleport::join::v1::{ClientParams, OidcInit, join_request};
use crate::secret::Secret;
use crate::yaml::Tree;

/// The audience of tokens that are asked for, where the method lets the agent choose.
pub(super) const AUDIENCE: &str = "teleport.cluster.local";

/// A token that proves who the agent is.
pub(super) struct IdToken(Secret<String>);

impl fmt::Debug for IdToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("IdToken(<redacted>)")
    }
}

impl IdToken {
    /// The proof of a token. What the token says of itself goes to the log, because that is what has
    /// to be compared with the join token if the cluster refuses it.
    pub(super) fn proof(
        method: &'static str,
        token: Secret<String>,
        now: SystemTime,
    ) -> Box<dyn Proof> {
        tell(method, token.expose(), now);
        Box::new(Self(token))
    }
}

impl Proof for IdToken {
    fn opening(&self, client_params: ClientParams) -> join_request::Payload {
        join_request::Payload::OidcInit(OidcInit {
            client_params: Some(client_params),
            id_token: self.0.expose().clone().into_bytes(),
        })
    }
}

/// Issuer, subject and audience are no secrets; the signature, which makes the token one, stays out.
fn tell(method: &'static str, token: &str, now: SystemTime) {
    let Ok(token) = Token::parse(token) else {
        tracing::warn!(
            method,
            "The ID token is no signed JWT: the cluster will refuse it"
        );
        return;
    };
    let text = |name: &str| {
        let claim = token.claims.get(name);
        claim.map(|claim| {
            claim
                .as_str()
                .map_or_else(|| claim.to_string(), str::to_owned)
        })
    };
    let (issuer, subject, audience) = (text("iss"), text("sub"), text("aud"));
    tracing::info!(
        method,
        issuer = issuer.unwrap_or_default(),
        subject = subject.unwrap_or_default(),
        audience = audience.unwrap_or_default(),
        "Joining with an ID token"
    );
    let ends = token.claims.get("exp").and_then(serde_json::Value::as_u64);
    let ended = ends.and_then(|ends| {
        let ends = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(ends))?;
        now.duration_since(ends).ok()
    });
    if let Some(ended) = ended {
        tracing::warn!(
            method,
            seconds = ended.as_secs(),
            "The ID token has expired: the job ran for longer than it lasts, or the clock is wrong"
        );
    }
}

/// A method whose token stands in an environment variable.
#[derive(Debug)]
pub(super) struct Variable {
    /// The method.
    pub(super) method: &'static dyn JoinMethod,
    /// The variable's name.
    pub(super) name: String,
    /// What to do if it is not set.
    pub(super) remedy: &'static str,
    /// The method's section of the configuration.
    pub(super) tree: Option<Tree>,
}

#[async_trait]
impl Prover for Variable {
    fn method(&self) -> &'static dyn JoinMethod {
        self.method
    }

    fn tree(&self) -> Option<Tree> {
        self.tree.clone()
    }

    async fn prepare(&self, around: &Surroundings<'_>) -> Result<Box<dyn Proof>, JoinError> {
        let method = self.method.name();
        let token = variable(around, method, &self.name, self.remedy)?;
        let token = Secret::new(token.trim().to_owned());
        Ok(IdToken::proof(method, token, around.clock.now()))
    }
}

/// The value of an environment variable that the method needs.
pub(super) fn variable<'a>(
    around: &Surroundings<'a>,
    method: &'static str,
    name: &str,
    remedy: &str,
) -> Result<&'a str, JoinError> {
    around.env.get(name).ok_or_else(|| JoinError::Missing {
        method,
        problem: format!("the environment variable {name} is not set: {remedy}"),
    })
}
