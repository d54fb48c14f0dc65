//! The cluster's half of joining: a registry, and one folder per join method beside the agent's half.
//!
//! Nothing here or in a method's `verify.rs` imports anything of the agent's (ring 0 only), so that a
//! mistake of one half cannot hide in the other. A [`Verifier`] reads what a token resource says of
//! its method, and judges a proof. The messages are those of the newer protocol; whoever speaks the
//! older one puts its forms into them.

mod glob;
pub mod oidc;
mod world;

use std::fmt;
use std::net::IpAddr;
use std::time::SystemTime;

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use serde_json::{Map, Value};

pub(crate) use glob::glob;
pub use world::{World, WorldError};

use super::bound_keypair::verify::Bound;
use crate::crypto::{Suite, random};
use crate::pb::teleport::join::v1::{challenge, challenge_solution, join_request};
use crate::refusal::Refusal;
use crate::yaml::Fields;

/// The join methods that a cluster verifies, by the `join_method` of a token.
pub const VERIFIERS: &[&dyn Verifier] = &[
    &super::azure::verify::Azure,
    &super::azure_devops::verify::AzureDevops,
    &super::bitbucket::verify::Bitbucket,
    &super::bound_keypair::verify::BoundKeypair,
    &super::circleci::verify::Circleci,
    &super::env0::verify::Env0,
    &super::gcp::verify::Gcp,
    &super::generic_oidc::verify::GenericOidc,
    &super::github::verify::Github,
    &super::gitlab::verify::Gitlab,
    &super::iam::verify::Iam,
    &super::kubernetes::verify::Kubernetes,
    &super::oracle::verify::Oracle,
    &super::spacelift::verify::Spacelift,
    &super::terraform_cloud::verify::TerraformCloud,
    &super::token::verify::Token,
    &super::tpm::verify::Tpm,
];

/// The verifier of `join_method: name`.
pub fn method(name: &str) -> Option<&'static dyn Verifier> {
    VERIFIERS.iter().copied().find(|it| it.name() == name)
}

/// A new challenge: 32 random bytes, base64 of the standard alphabet without padding.
#[must_use]
pub fn challenge() -> String {
    STANDARD_NO_PAD.encode(random::<32>())
}

/// Which messages carry a method's proof. In the older protocol each but the first two has a call of
/// its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carrier {
    /// Nothing but the token.
    Token,
    /// An ID token of an OIDC issuer.
    IdToken,
    /// `IAMInit`.
    Iam,
    /// `AzureInit`.
    Azure,
    /// `TPMInit`.
    Tpm,
    /// `OracleInit`.
    Oracle,
    /// `BoundKeypairInit`.
    BoundKeypair,
}

impl Carrier {
    /// Which carrier a first message belongs to; `None` if it is none.
    pub fn of(opening: &join_request::Payload) -> Option<Self> {
        use join_request::Payload as Opening;
        Some(match opening {
            Opening::TokenInit(_) => Self::Token,
            Opening::OidcInit(_) => Self::IdToken,
            Opening::IamInit(_) => Self::Iam,
            Opening::AzureInit(_) => Self::Azure,
            Opening::TpmInit(_) => Self::Tpm,
            Opening::OracleInit(_) => Self::Oracle,
            Opening::BoundKeypairInit(_) => Self::BoundKeypair,
            Opening::ClientInit(_) | Opening::Solution(_) | Opening::GivingUp(_) => return None,
        })
    }
}

/// A new challenge for Azure, which takes no longer one and puts it into a URL: 24 random bytes,
/// base64 of the URL alphabet without padding.
#[must_use]
pub fn azure_challenge() -> String {
    URL_SAFE_NO_PAD.encode(random::<24>())
}

/// One join, as far as a verifier may know it.
#[derive(Debug, Clone, Copy)]
pub struct Joining<'a> {
    /// The token's name.
    pub token: &'a str,
    /// The token's `spec`, as [`Verifier::read`] left it.
    pub spec: &'a Value,
    /// The token's `status`, as [`Verifier::status`] or the last join left it.
    pub status: &'a Value,
    /// The bot that the token is for.
    pub bot: &'a str,
    /// The bot's instance whose certificate the connection was made with; `None` if none was shown.
    pub instance: Option<&'a str>,
    /// The cluster's name.
    pub cluster: &'a str,
    /// The suite of the cluster's keys.
    pub suite: Suite,
    /// Public keys (SubjectPublicKeyInfo) of the cluster's authority for join states. Empty but for
    /// `bound_keypair`.
    pub state_keys: &'a [Vec<u8>],
    /// The instance before the bound one (empty if there was none), if this request has the very key
    /// for which the bound one's only certificate was made: its answer was lost.
    pub lost: Option<&'a str>,
    /// Why the token lets nobody in, if it is locked. Whoever has proved nothing must not hear it.
    pub lock: Option<&'a Refusal>,
    /// When.
    pub now: SystemTime,
    /// The client's first message, of the verifier's carrier. The keys in it are none of its business.
    pub opening: &'a join_request::Payload,
    /// A fresh random text, for methods that have one signed.
    pub challenge: &'a str,
    /// The address that the client connects from.
    pub address: IpAddr,
    /// Whether it is connected with a valid certificate of the token's bot: it joined before.
    pub again: bool,
    /// Whom the cluster asks.
    pub world: &'a World,
}

/// The client at the other end.
#[async_trait]
pub trait Dialogue: Send {
    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// The client has gone, gave up, or said something else.
    async fn ask(
        &mut self,
        challenge: challenge::Payload,
    ) -> Result<challenge_solution::Payload, Refusal>;
}

/// What became known of who joins, for whatever way it ends.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Seen {
    /// `attributes` of the audit event, for example `Account`. No secrets.
    pub metadata: Value,
    /// The method's part of the join attributes, in the order of the protocol's fields; workload
    /// identities see it as `join.<method>`.
    pub attributes: Option<Map<String, Value>>,
    /// For the audit log: which allow rule came how close. No secrets.
    pub near: Option<String>,
    /// What a join by `bound_keypair` changes in its token.
    pub(crate) bound: Option<Bound>,
    /// Why what the bot proved itself with must be in two hands: the token gets locked.
    pub(crate) copied: Option<String>,
}

/// One join method: the cluster's half.
#[async_trait]
pub trait Verifier: Send + Sync + fmt::Debug {
    /// The token's `join_method`.
    fn name(&self) -> &'static str;
    /// Which messages carry its proof.
    fn carrier(&self) -> Carrier;
    /// The member of the join attributes that is the method's.
    fn attributes(&self) -> &'static str {
        self.name()
    }
    /// Reads what the `spec` of a token resource says of this method: problems go to `spec`, the
    /// normal form into `stored`.
    fn read(&self, spec: &mut Fields<'_>, stored: &mut Value);
    /// A new text for a client to have signed, in the method's form.
    fn challenge(&self) -> String {
        challenge()
    }
    /// The `status` of a token that is written with `spec`, the normal form, in the place of one of
    /// the same method whose status was `before`.
    fn status(&self, _spec: &Value, _before: &Value) -> Value {
        Value::Null
    }
    /// Judges the proof, and whether a rule of the token lets its owner in. What becomes known goes
    /// into `seen` as soon as it is known.
    ///
    /// # Errors
    /// The refusal that the client gets.
    async fn verify(
        &self,
        joining: &Joining<'_>,
        dialogue: &mut dyn Dialogue,
        seen: &mut Seen,
    ) -> Result<(), Refusal>;
}

/// Whether one of the `allow` rules has nothing against who joins; otherwise what each differs in, as
/// `differs` names the keys.
///
/// # Errors
/// The differences, for the audit log.
pub(crate) fn admitted(
    allow: Option<&Value>,
    differs: impl Fn(&Value) -> Vec<&'static str>,
) -> Result<(), String> {
    let rules = allow
        .and_then(Value::as_array)
        .map(Vec::as_slice)
        .unwrap_or_default();
    let mut misses = Vec::new();
    for (at, rule) in rules.iter().enumerate() {
        let miss = differs(rule);
        if miss.is_empty() {
            return Ok(());
        }
        misses.push(format!("rule {} differs in {}", at + 1, miss.join(", ")));
    }
    Err(misses.join("; "))
}

/// Reads the section of the method `name` in a token's `spec` with `read`, and stores the normal form that
/// it gives. `missing` is what is wrong without a section, and `example` how to write one.
pub(crate) fn section(
    name: &str,
    (missing, example): (&str, &str),
    spec: &mut Fields<'_>,
    stored: &mut Value,
    read: impl FnOnce(&mut Fields<'_>) -> Value,
) {
    let Some(mut section) = spec.section(name) else {
        return spec.error(name, missing, Some(example));
    };
    let normal = read(&mut section);
    section.finish();
    set(stored, name, normal);
}

/// Reads the rules under `allow` of a method's section, of which there has to be one: `missing` is what is
/// wrong without, and `example` how to write one.
pub(crate) fn rules(
    section: &mut Fields<'_>,
    (missing, example): (&str, &str),
    read: impl Fn(&mut Fields<'_>) -> Value,
) -> Vec<Value> {
    let rules: Vec<Value> = section
        .sections("allow")
        .unwrap_or_default()
        .into_iter()
        .map(|mut rule| {
            let stored = read(&mut rule);
            rule.finish();
            stored
        })
        .collect();
    if rules.is_empty() {
        section.error("allow", missing, Some(example));
    }
    rules
}

/// Writes `value` under `key` of a JSON object.
pub fn set(object: &mut Value, key: &str, value: impl Into<Value>) {
    if !object.is_object() {
        *object = Value::Object(Map::new());
    }
    if let Value::Object(members) = object {
        members.insert(key.to_owned(), value.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agents_and_clusters_know_the_same_methods() {
        let agents: Vec<_> = crate::join::METHODS.iter().map(|it| it.name()).collect();
        let clusters: Vec<_> = VERIFIERS.iter().map(|it| it.name()).collect();
        assert_eq!(agents, clusters);
        assert!(clusters.is_sorted(), "{clusters:?}");
    }

    #[test]
    fn challenges_are_new_each_time() {
        assert_ne!(challenge(), challenge());
        assert_eq!(challenge().len(), 43);
        assert!(!challenge().contains('='));
    }
}
