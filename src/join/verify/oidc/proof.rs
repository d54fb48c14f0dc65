//! The proof of methods with an ID token: whose keys, what it has to say, and whether a rule of the
//! join token lets its owner in.

use serde_json::Value;

use super::attributes::{Attribute, attributes, metadata};
use super::fetch::split;
use super::issuers::Issuer;
use super::keys::KeySet;
use super::rules::Rules;
use super::{Claims, Expected, OidcError, expiry, verify};
use crate::join::verify::{Joining, Seen};
use crate::outbound::{Target, trusting};
use crate::pb::teleport::join::v1::join_request::Payload;
use crate::refusal::Refusal;
use crate::yaml::Fields;

/// Where an issuer's keys come from.
#[derive(Debug, Clone)]
pub(crate) enum Source<'a> {
    /// The token resource has them.
    Static(&'a str),
    /// The issuer publishes them.
    Discovery(Issuer),
}

impl<'a> Source<'a> {
    /// `static_jwks` of `section` if it is there, else what `issuer` publishes.
    pub(crate) fn of(section: &'a Value, issuer: &str) -> Self {
        match member(section, "static_jwks") {
            Some(keys) => Self::Static(keys),
            None => Self::Discovery(Issuer::web(issuer)),
        }
    }
}

/// Verifies the ID token of `joining`, and that it was not overheard.
///
/// # Errors
/// The refusal that the client gets. What it says of the token is no secret.
pub(crate) async fn claims(
    joining: &Joining<'_>,
    source: &Source<'_>,
    expected: &Expected<'_>,
) -> Result<Claims, Refusal> {
    let token = match joining.opening {
        Payload::OidcInit(init) => std::str::from_utf8(&init.id_token).unwrap_or_default(),
        _ => "",
    };
    if token.is_empty() {
        let text = "IDToken not provided: the agent sent none, is its join_method right?";
        return Err(Refusal::bad_parameter(text));
    }
    let verified = match source {
        Source::Static(keys) => KeySet::parse(keys.as_bytes())
            .map_err(OidcError::from)
            .and_then(|keys| verify(token, &keys, expected, joining.now)),
        Source::Discovery(issuer) => {
            let issuers = &joining.world.issuers;
            issuers.verify(issuer, token, expected, joining.now).await
        }
    };
    let doing = match source {
        Source::Static(_) => "validating with jwks",
        Source::Discovery(_) => "validating with oidc",
    };
    let claims = verified.map_err(|error| match &error {
        // Not the agent's fault, and it may pass.
        OidcError::Fetch(_) => Refusal::unavailable(error.to_string()).context(doing),
        _ => Refusal::denied(error.to_string()).context(doing),
    })?;
    let expires = expiry(&claims).unwrap_or(joining.now);
    let used = &joining.world.used;
    used.note(token, joining.address, joining.again, expires, joining.now)
        .map_err(|error| Refusal::denied(error.to_string()))?;
    Ok(claims)
}

/// Verifies the ID token of `joining` with the keys that `issuer` publishes, for `audience`.
///
/// # Errors
/// As [`claims`].
pub(crate) async fn published(
    joining: &Joining<'_>,
    issuer: &str,
    audience: &str,
) -> Result<Claims, Refusal> {
    let expected = Expected {
        issuer: Some(issuer),
        audience,
        authorized_party: true,
    };
    claims(joining, &Source::Discovery(Issuer::web(issuer)), &expected).await
}

/// Reads the section of the method `name`, as [`verify::section`](crate::join::verify::section) does.
pub(crate) fn section(
    name: &str,
    spec: &mut Fields<'_>,
    stored: &mut Value,
    read: impl FnOnce(&mut Fields<'_>) -> Value,
) {
    let missing = format!("`{name}` is required");
    let example = format!("add `{name}: {{allow: […]}}`");
    crate::join::verify::section(name, (&missing, &example), spec, stored, read);
}

/// What a method's rules look like, and what of the claims is passed on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    /// The rules.
    pub(crate) rules: Rules,
    /// The join attributes, and what the audit log shows.
    pub(crate) attributes: &'static [Attribute],
}

impl Shape {
    /// Notes who it is, and whether a rule of `section` lets it in.
    ///
    /// # Errors
    /// Denied, if none does.
    pub(crate) fn admit(
        &self,
        section: &Value,
        claims: &Claims,
        seen: &mut Seen,
    ) -> Result<(), Refusal> {
        seen.metadata = metadata(self.attributes, claims);
        seen.attributes = Some(attributes(self.attributes, claims));
        self.judge(section, claims, seen)
    }

    /// Whether a rule of `section` lets in whom `claims` are of.
    ///
    /// # Errors
    /// Denied, if none does.
    pub(crate) fn judge(
        &self,
        section: &Value,
        claims: &Claims,
        seen: &mut Seen,
    ) -> Result<(), Refusal> {
        self.rules
            .check(section.get("allow"), claims)
            .map_err(|miss| {
                seen.near = Some(miss.to_string());
                let text = "id token claims did not match any allow rules";
                let keys = miss.keys();
                Refusal::denied(if keys.is_empty() {
                    text.to_owned()
                } else {
                    format!("{text}: the nearest rule differs in {}", keys.join(", "))
                })
            })
    }
}

/// A text of a section, unless it is absent or empty.
pub(crate) fn member<'a>(section: &'a Value, key: &str) -> Option<&'a str> {
    section
        .get(key)
        .and_then(Value::as_str)
        .filter(|text| !text.is_empty())
}

/// Reads `static_jwks`, which has to hold a usable key.
pub(crate) fn static_jwks(section: &mut Fields<'_>) -> Option<String> {
    const KEY: &str = "static_jwks";
    let text = section.string(KEY)?;
    if let Err(error) = KeySet::parse(text.as_bytes()) {
        section.error(
            KEY,
            error.to_string(),
            Some("paste what the issuer's jwks_uri answers, as text: `static_jwks: |`"),
        );
    }
    Some(text)
}

/// Reads a host, with a port or without.
pub(crate) fn host(section: &mut Fields<'_>, key: &str) -> Option<String> {
    let host = section.string(key)?;
    if host.contains('/') || Target::parse(&format!("https://{host}")).is_none() {
        section.error(
            key,
            format!("{host:?} is no host: it must not contain the scheme or a path"),
            Some("write `host` or `host:port`"),
        );
    }
    Some(host)
}

/// Reads the URL of an issuer; without TLS only where that is allowed.
pub(crate) fn url(section: &mut Fields<'_>, key: &str, insecure: bool) -> Option<String> {
    let url = section.required(key)?;
    if split(&url, insecure).is_none() {
        section.error(
            key,
            format!("{url:?} is no URL of an issuer"),
            Some("write it as in the `iss` of its tokens, beginning with https://"),
        );
    }
    Some(url)
}

/// Reads `tls_ca`, which has to hold certificates.
pub(crate) fn tls_ca(section: &mut Fields<'_>) -> Option<String> {
    const KEY: &str = "tls_ca";
    let pem = section.string(KEY)?;
    if let Err(problem) = trusting(&pem) {
        section.error(
            KEY,
            problem,
            Some("paste the issuer's authority as `tls_ca: |`"),
        );
    }
    Some(pem)
}
