//! ID tokens: whether one was signed by its issuer, for this cluster, and is valid now.
//!
//! [`keys`] reads the issuer's keys, [`issuers`] finds and remembers them, [`used`] remembers the
//! tokens that were seen, [`rules`] compares claims with what a join token allows, [`attributes`]
//! passes them on; `proof` puts these together. Nothing here knows a provider: that is each method's.

pub mod attributes;
mod fetch;
pub mod issuers;
pub mod keys;
mod proof;
pub mod rules;
pub mod used;

use std::time::{Duration, SystemTime};

use serde_json::{Map, Value};

use self::issuers::FetchError;
use self::keys::{KeySet, KeysError};
use crate::crypto::jws::{JwsError, Token};
pub(crate) use fetch::Web;
pub(crate) use proof::{
    Shape, Source, claims, host, member, published, section, static_jwks, tls_ca, url,
};

/// How far an issuer's clock may be from this cluster's: what upstream grants with `static_jwks`.
pub const LEEWAY: Duration = Duration::from_secs(10);

/// The claims of a token that was verified.
pub type Claims = Map<String, Value>;

/// Why an ID token is refused. The texts say what it is and what was expected: neither is a secret,
/// and the token itself is never repeated.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum OidcError {
    /// It is no token, or its algorithm is not allowed.
    #[error("id token: {0}")]
    Token(#[from] JwsError),
    /// It lacks a claim that every ID token has.
    #[error("id token: the claim {0:?} is missing or malformed")]
    Claim(&'static str),
    /// Somebody else issued it.
    #[error("id token: issued by {found:?}, but this join token takes {expected:?}")]
    Issuer {
        /// What the token says.
        found: String,
        /// Whom the join token names.
        expected: String,
    },
    /// It is for somebody else.
    #[error("id token: its audience is {found}, but it has to be {expected:?}")]
    Audience {
        /// What the token says.
        found: String,
        /// What it has to say.
        expected: String,
    },
    /// It was given to a party other than its audience.
    #[error("id token: it has several audiences, or its authorized party is not {0:?}")]
    AuthorizedParty(String),
    /// It is past its end.
    #[error("id token: it expired {} s ago: take a new one, or set the clocks", .0.as_secs())]
    Expired(Duration),
    /// It begins later, or was issued in the future.
    #[error(
        "id token: it is valid only {} s from now: set the clocks, the issuer's and this cluster's \
         differ",
        .0.as_secs()
    )]
    NotYet(Duration),
    /// No key verifies it, or the configured keys cannot be read.
    #[error("id token: {0}")]
    Keys(#[from] KeysError),
    /// The issuer's keys cannot be had.
    #[error("the issuer of the id token cannot be asked for its keys: {0}")]
    Fetch(#[from] FetchError),
}

/// What a token has to say.
#[derive(Debug, Clone, Copy)]
pub struct Expected<'a> {
    /// Its issuer. `None` only where the keys themselves are given: they tell who it is.
    pub issuer: Option<&'a str>,
    /// Whom it has to be for.
    pub audience: &'a str,
    /// Whether `azp` counts (OpenID Connect Core 3.1.3.7): some providers put other things there.
    pub authorized_party: bool,
}

impl Expected<'_> {
    /// Checks what the token says of itself, which costs nothing, before anybody is asked for keys.
    fn check(&self, claims: &Claims, now: SystemTime) -> Result<(), OidcError> {
        text(claims, "sub")
            .filter(|subject| !subject.is_empty())
            .ok_or(OidcError::Claim("sub"))?;
        let issuer = text(claims, "iss").ok_or(OidcError::Claim("iss"))?;
        if let Some(expected) = self.issuer
            && issuer != expected
        {
            return Err(OidcError::Issuer {
                found: shortened(issuer),
                expected: expected.to_owned(),
            });
        }
        let audiences = audiences(claims);
        if !audiences.contains(&self.audience) {
            return Err(OidcError::Audience {
                found: shortened(&format!("{audiences:?}")),
                expected: self.audience.to_owned(),
            });
        }
        if self.authorized_party {
            let party = text(claims, "azp");
            if party.map_or(audiences.len() > 1, |party| party != self.audience) {
                return Err(OidcError::AuthorizedParty(self.audience.to_owned()));
            }
        }
        check_times(claims, now)
    }
}

fn check_times(claims: &Claims, now: SystemTime) -> Result<(), OidcError> {
    let at = |name: &'static str| {
        claims
            .get(name)
            .map(|value| time(value).ok_or(OidcError::Claim(name)))
    };
    let ends = at("exp").ok_or(OidcError::Claim("exp"))??;
    if let Ok(since) = now.duration_since(ends)
        && since >= LEEWAY
    {
        return Err(OidcError::Expired(since));
    }
    let issued = at("iat").ok_or(OidcError::Claim("iat"))??;
    let begins = at("nbf").transpose()?.unwrap_or(issued);
    match issued.max(begins).duration_since(now) {
        Ok(until) if until > LEEWAY => Err(OidcError::NotYet(until)),
        _ => Ok(()),
    }
}

/// Verifies `token` with keys that are at hand.
///
/// # Errors
/// [`OidcError`].
pub fn verify(
    token: &str,
    keys: &KeySet,
    expected: &Expected<'_>,
    now: SystemTime,
) -> Result<Claims, OidcError> {
    let token = Token::parse(token)?;
    expected.check(&token.claims, now)?;
    keys.check(&token)?;
    Ok(token.claims)
}

/// A claim that is text.
#[must_use]
pub fn text<'a>(claims: &'a Claims, name: &str) -> Option<&'a str> {
    claims.get(name).and_then(Value::as_str)
}

/// When a verified token ends. Its claims have been checked, so there is such a time.
#[must_use]
pub fn expiry(claims: &Claims) -> Option<SystemTime> {
    claims.get("exp").and_then(time)
}

/// Whom a token is for: `aud` is a text, or a list of them.
fn audiences(claims: &Claims) -> Vec<&str> {
    match claims.get("aud") {
        Some(Value::String(one)) => vec![one],
        Some(Value::Array(several)) => several.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    }
}

/// A `NumericDate` (RFC 7519 2).
fn time(seconds: &Value) -> Option<SystemTime> {
    let since = Duration::try_from_secs_f64(seconds.as_f64()?).ok()?;
    SystemTime::UNIX_EPOCH.checked_add(since)
}

/// What a stranger wrote, in an error: one line, no longer than a line.
fn shortened(text: &str) -> String {
    const MOST: usize = 200;
    text.chars()
        .filter(|c| !c.is_control())
        .take(MOST)
        .collect()
}

#[cfg(test)]
mod tests;
