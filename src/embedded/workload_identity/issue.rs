//! The making of SVIDs, once it is decided what they hold.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use der::Decode as _;
use serde_json::{Map, Value, json};
use x509_cert::ext::pkix::KeyUsages;
use x509_cert::spki::SubjectPublicKeyInfoOwned;

use super::decision::Contents;
pub(crate) use crate::crypto::compact::key_id;
use crate::crypto::x509::{COMMON_NAME, Certificate, ORGANIZATION};
use crate::crypto::{KeyAlgorithm, KeyError, PrivateKey, compact, random};
use crate::embedded::ca::mint::{self, CLIENT_AUTH, MintError, SERVER_AUTH, Subject, Template};
use crate::embedded::ca::{BACKDATE, TlsAuthority};
use crate::embedded::caller::oid;
use crate::pb::teleport::workloadidentity::v1 as wire;
use crate::spiffe::SpiffeId;

/// The life of an SVID when the request names none.
pub const DEFAULT_TTL: Duration = Duration::from_hours(1);
/// The longest life when the resource names none.
pub const DEFAULT_MAX_TTL: Duration = Duration::from_hours(24);

/// Why an SVID could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IssueError {
    /// The request's public key is no SubjectPublicKeyInfo.
    #[error("public_key: not a DER SubjectPublicKeyInfo")]
    PublicKey,
    /// The certificate could not be made.
    #[error(transparent)]
    Mint(#[from] MintError),
    /// The token could not be signed.
    #[error("the JWT-SVID cannot be signed: {0}")]
    Sign(#[from] KeyError),
    /// The authority's JWT key is not RSA, the only kind that clusters advertise.
    #[error("the SPIFFE authority's JWT key is not RSA")]
    JwtKey,
}

/// The life granted: what is wished (zero for the default), as far as the resource allows.
#[must_use]
pub fn granted(requested: Duration, maximum: Option<Duration>) -> Duration {
    let wish = if requested.is_zero() {
        DEFAULT_TTL
    } else {
        requested
    };
    wish.min(
        maximum
            .filter(|most| !most.is_zero())
            .unwrap_or(DEFAULT_MAX_TTL),
    )
}

/// Makes an X.509-SVID for the public key `spki`, from a minute ago until `now` and `ttl`, or
/// until its authority ends.
///
/// # Errors
/// [`IssueError`].
pub fn x509(
    authority: &TlsAuthority,
    id: &SpiffeId,
    contents: &Contents,
    spki: &[u8],
    now: SystemTime,
    ttl: Duration,
) -> Result<wire::X509svidCredential, IssueError> {
    SubjectPublicKeyInfoOwned::from_der(spki).map_err(|_source| IssueError::PublicKey)?;
    let subject = Subject::default()
        .one(ORGANIZATION, &contents.organization)?
        .one(oid::ORGANIZATIONAL_UNIT, &contents.organizational_unit)?
        .one(COMMON_NAME, &contents.common_name)?;
    let mut names = Vec::new();
    for name in &contents.dns_sans {
        names.push(mint::dns(name)?);
    }
    names.push(mint::uri(&id.to_string())?);
    let cert = Template {
        serial: mint::serial(),
        subject: subject.finish(),
        not_before: now - BACKDATE,
        not_after: (now + ttl).min(authority.not_after),
        spki,
        key_usage: KeyUsages::DigitalSignature
            | KeyUsages::KeyEncipherment
            | KeyUsages::KeyAgreement,
        extended: &[SERVER_AUTH, CLIENT_AUTH],
        authority: false,
        names,
    }
    .sign(authority.issuer())?;
    let serial_number = Certificate::from_der(&cert)
        .map(|certificate| certificate.serial())
        .unwrap_or_default();
    Ok(wire::X509svidCredential {
        cert,
        serial_number,
        chain: Vec::new(),
    })
}

/// Makes a JWT-SVID. Claims of the resource never replace those that an SVID has anyway.
///
/// # Errors
/// [`IssueError`].
pub fn jwt(
    key: &PrivateKey,
    issuer: &str,
    id: &SpiffeId,
    contents: &Contents,
    audiences: &[String],
    now: SystemTime,
    ttl: Duration,
) -> Result<wire::JwtsvidCredential, IssueError> {
    if key.algorithm() != KeyAlgorithm::Rsa2048 {
        return Err(IssueError::JwtKey);
    }
    let jti = hex::encode(random::<16>());
    let audience = match audiences {
        [one] => json!(one),
        many => json!(many),
    };
    let own = [
        ("sub", json!(id.to_string())),
        ("aud", audience),
        ("exp", json!(seconds(now + ttl))),
        ("iat", json!(seconds(now))),
        ("jti", json!(jti)),
        ("iss", json!(issuer)),
    ];
    let mut claims: Map<String, Value> = contents.extra_claims.clone();
    claims.extend(own.map(|(name, value)| (name.to_owned(), value)));
    let payload = Value::Object(claims).to_string();
    let kid = key_id(&key.public_spki());
    Ok(wire::JwtsvidCredential {
        jwt: compact::sign(key, Some(&kid), payload.as_bytes())?,
        jti,
    })
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// The PKCS#1 `RSAPublicKey` inside of a SubjectPublicKeyInfo; `None` for other algorithms.
pub(super) fn rsa_public_key(spki: &[u8]) -> Option<Vec<u8>> {
    const RSA: &str = "1.2.840.113549.1.1.1";
    let info = SubjectPublicKeyInfoOwned::from_der(spki).ok()?;
    (info.algorithm.oid.to_string() == RSA).then(|| info.subject_public_key.raw_bytes().to_vec())
}

#[cfg(test)]
mod tests;
