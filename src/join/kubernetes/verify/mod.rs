//! The verifying half of join method `kubernetes`: which service account a pod runs as, by its own API
//! server ([`review`]), by the keys of that server in the token, or by those that it publishes
//! (upstream `lib/kube/token`).

pub(crate) mod review;

use std::time::Duration;

use async_trait::async_trait;
use serde_json::{Map, Value, json};

use crate::crypto::jws::Token;
use crate::join::verify::oidc::issuers::Issuer;
use crate::join::verify::oidc::keys::KeySet;
use crate::join::verify::oidc::rules::{Rules, exact, pattern};
use crate::join::verify::oidc::{Claims, Expected, Source, claims, text, url};
use crate::join::verify::{Carrier, Dialogue, Joining, Seen, Verifier, set};
use crate::pb::teleport::join::v1::join_request;
use crate::refusal::Refusal;
use crate::yaml::Fields;

const NAME: &str = "kubernetes";
/// How a token resource may have service accounts judged; the first is the default.
const TYPES: [&str; 3] = [IN_CLUSTER, STATIC_JWKS, OIDC];
const IN_CLUSTER: &str = "in_cluster";
const STATIC_JWKS: &str = "static_jwks";
const OIDC: &str = "oidc";
/// The longest life of a token that is judged by its signature alone: nobody can take it back.
const MAX_LIFE: Duration = Duration::from_mins(30);
/// The name of a service account as a user begins with this.
const PREFIX: &str = "system:serviceaccount:";

const RULES: Rules = Rules {
    keys: &[
        exact("service_account", "service_account"),
        pattern("service_account_name", "service_account_name"),
        pattern("service_account_namespace", "service_account_namespace"),
    ],
    needs: &[&[
        "service_account",
        "service_account_name",
        "service_account_namespace",
    ]],
};

/// Join method `kubernetes`.
#[derive(Debug)]
pub struct Kubernetes;

/// Whom a token vouches for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Account {
    /// The name of its user, `system:serviceaccount:namespace:name`.
    pub(crate) subject: String,
    /// The service account.
    pub(crate) name: String,
    /// Its namespace.
    pub(crate) namespace: String,
    /// The pod that the token was made for; older API servers do not say.
    pub(crate) pod: Option<String>,
}

impl Account {
    /// Reads the name of a user.
    ///
    /// # Errors
    /// The user is no service account.
    pub(crate) fn of(subject: &str, pod: Option<String>) -> Result<Self, Refusal> {
        let names = subject.strip_prefix(PREFIX).ok_or_else(|| {
            let subject = review::shortened(subject);
            Refusal::bad_parameter(format!("token user is not a service account: {subject}"))
        })?;
        let parts = names.split_once(':').filter(|(namespace, name)| {
            !namespace.is_empty() && !name.is_empty() && !name.contains(':')
        });
        let (namespace, name) = parts.ok_or_else(|| {
            let subject = review::shortened(subject);
            let text = format!("token user has malformed service account name: {subject}");
            Refusal::bad_parameter(text)
        })?;
        Ok(Self {
            subject: subject.to_owned(),
            name: name.to_owned(),
            namespace: namespace.to_owned(),
            pod,
        })
    }

    /// Reads the claims of a verified token.
    fn of_claims(claims: &Claims, kind: &str) -> Result<Self, Refusal> {
        let bound = claims
            .get("kubernetes.io")
            .and_then(|bound| bound.pointer("/pod/name"))
            .and_then(Value::as_str)
            .filter(|pod| !pod.is_empty())
            .ok_or_else(|| {
                Refusal::bad_parameter(format!(
                    "{kind} joining requires the use of projected pod bound service account token"
                ))
            })?;
        let at = |name: &str| claims.get(name).and_then(Value::as_f64);
        let life = at("exp").zip(at("iat")).map(|(exp, iat)| exp - iat);
        if life.is_none_or(|life| life > MAX_LIFE.as_secs_f64()) {
            return Err(Refusal::bad_parameter(format!(
                "{kind} joining requires the use of a service account token with a TTL of less than \
                 {}m: set expirationSeconds of the projected volume to 600",
                MAX_LIFE.as_secs() / 60
            )));
        }
        Self::of(
            text(claims, "sub").unwrap_or_default(),
            Some(bound.to_owned()),
        )
    }

    /// What rules are compared with.
    fn facts(&self) -> Claims {
        let pair = format!("{}:{}", self.namespace, self.name);
        [
            ("service_account", pair.as_str()),
            ("service_account_name", &self.name),
            ("service_account_namespace", &self.namespace),
        ]
        .map(|(key, value)| (key.to_owned(), json!(value)))
        .into_iter()
        .collect()
    }

    /// The join attributes.
    fn attributes(&self) -> Map<String, Value> {
        let mut attributes = Map::new();
        attributes.insert("subject".to_owned(), json!(self.subject));
        let account = json!({"name": self.name, "namespace": self.namespace});
        attributes.insert("service_account".to_owned(), account);
        if let Some(pod) = &self.pod {
            attributes.insert("pod".to_owned(), json!({"name": pod}));
        }
        attributes
    }
}

#[async_trait]
impl Verifier for Kubernetes {
    fn name(&self) -> &'static str {
        NAME
    }

    fn carrier(&self) -> Carrier {
        Carrier::IdToken
    }

    fn read(&self, spec: &mut Fields<'_>, stored: &mut Value) {
        let Some(mut section) = spec.section(NAME) else {
            if !spec.has(NAME) {
                let hint = "add `kubernetes: {allow: [{service_account: \"namespace:name\"}]}`";
                spec.error(NAME, "`kubernetes` is required", Some(hint));
            }
            return;
        };
        let normal = read(&mut section);
        section.finish();
        set(stored, NAME, normal);
    }

    async fn verify(
        &self,
        joining: &Joining<'_>,
        _dialogue: &mut dyn Dialogue,
        seen: &mut Seen,
    ) -> Result<(), Refusal> {
        let section = joining.spec.get(NAME).unwrap_or(&Value::Null);
        let at = |path: &str| section.pointer(path).and_then(Value::as_str);
        let kind = at("/type").unwrap_or(IN_CLUSTER);
        let expected = Expected {
            issuer: at("/oidc/issuer"),
            audience: joining.cluster,
            authorized_party: false,
        };
        let account = match kind {
            STATIC_JWKS => {
                let source = Source::Static(at("/static_jwks/jwks").unwrap_or_default());
                let claims = claims(joining, &source, &expected).await;
                claims.and_then(|claims| Account::of_claims(&claims, kind))
            }
            OIDC => {
                let issuer = Issuer {
                    insecure: section.pointer("/oidc/insecure_allow_http_issuer")
                        == Some(&Value::Bool(true)),
                    ..Issuer::web(at("/oidc/issuer").unwrap_or_default())
                };
                let claims = claims(joining, &Source::Discovery(issuer), &expected).await;
                claims.and_then(|claims| Account::of_claims(&claims, kind))
            }
            _ => in_cluster(joining).await,
        };
        let account = account.map_err(|refusal| {
            refusal.context(&format!("reviewing kubernetes token with {kind}"))
        })?;
        seen.metadata = json!({
            "type": kind,
            "username": account.subject,
            "service_account_name": account.name,
            "service_account_namespace": account.namespace,
        });
        seen.attributes = Some(account.attributes());
        RULES
            .check(section.get("allow"), &account.facts())
            .map_err(|miss| {
                seen.near = Some(miss.to_string());
                Refusal::denied("kubernetes token did not match any allow rules")
            })
    }
}

/// Has the API server of the cluster's own pod judge the token.
async fn in_cluster(joining: &Joining<'_>) -> Result<Account, Refusal> {
    let join_request::Payload::OidcInit(init) = joining.opening else {
        return Err(Refusal::bad_parameter("IDToken is required"));
    };
    let token = std::str::from_utf8(&init.id_token).unwrap_or_default();
    if token.is_empty() {
        return Err(Refusal::bad_parameter("IDToken is required"));
    }
    // Nobody is asked about what cannot be the token of a service account.
    let subject = Token::parse(token)
        .map_err(|error| Refusal::denied(error.to_string()))?
        .claims
        .get("sub")
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned();
    Account::of(&subject, None)?;
    review::ApiServer::of(&joining.world.env)?
        .review(token, joining.cluster)
        .await
}

/// Reads the section of a token resource.
fn read(section: &mut Fields<'_>) -> Value {
    let allow = RULES.read(section);
    let rules = allow.as_array().into_iter().flatten();
    for account in rules.filter_map(|rule| rule.get("service_account")?.as_str()) {
        if account.split(':').count() != 2 || account.split(':').any(str::is_empty) {
            section.error(
                "allow",
                format!("{account:?} is no service account"),
                Some("write `namespace:name`"),
            );
        }
    }
    let kind = section.one_of("type", &TYPES);
    let kind = kind.unwrap_or_else(|| IN_CLUSTER.to_owned());
    let mut normal = json!({"type": kind, "allow": allow});
    if let Some(mut keys) = section.section(STATIC_JWKS) {
        if let Some(jwks) = keys.string("jwks") {
            if let Err(error) = KeySet::parse(jwks.as_bytes()) {
                let hint = "paste what `kubectl get --raw /openid/v1/jwks` prints";
                keys.error("jwks", error.to_string(), Some(hint));
            }
            set(&mut normal, STATIC_JWKS, json!({"jwks": jwks}));
        }
        keys.finish();
    }
    if let Some(mut oidc) = section.section(OIDC) {
        let insecure = oidc.bool("insecure_allow_http_issuer").unwrap_or_default();
        if let Some(issuer) = url(&mut oidc, "issuer", insecure) {
            let kept = json!({"issuer": issuer, "insecure_allow_http_issuer": insecure});
            set(&mut normal, OIDC, kept);
        }
        oidc.finish();
    }
    for (needed, key) in [(STATIC_JWKS, "static_jwks.jwks"), (OIDC, "oidc.issuer")] {
        if kind == needed && normal.get(needed).is_none() {
            let text = format!("`type: {needed}` needs `{key}`");
            section.error("type", text, Some(&format!("add `{key}`")));
        }
    }
    normal
}

#[cfg(test)]
mod tests;
