//! The keys of an issuer: a JWK Set (RFC 7517 section 5).

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::crypto::jws::{PublicKey, Token};

/// The longest key set that is read, in bytes. The largest in use have some 30 KiB.
pub const MAX_SET: usize = 256 * 1024;
/// The most keys of a set. Issuers have a handful.
const MAX_KEYS: usize = 256;

/// Why no key of a set verifies a token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeysError {
    /// The text is no JSON object with a list `keys`.
    #[error("the issuer's keys are no JSON Web Key Set: {0}")]
    Json(String),
    /// The set is larger than anybody needs.
    #[error("the issuer's key set is longer than {MAX_SET} bytes or has more than {MAX_KEYS} keys")]
    TooLarge,
    /// The set has no key that could verify anything.
    #[error("the issuer's key set has no usable key")]
    Empty,
    /// The token's key is not among them: the issuer changed its keys, or is another one.
    #[error("the issuer has no key {0:?}")]
    Unknown(String),
    /// The token names no key, and several keys, or none, could have signed it.
    #[error("it does not name its key, and not exactly one key of the issuer's fits its algorithm")]
    Unnamed,
    /// The key is there, but did not make the signature.
    #[error("its signature is not the issuer's")]
    Signature,
}

/// The public keys of an issuer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeySet(Vec<PublicKey>);

#[derive(Deserialize)]
struct Outer {
    keys: Vec<Value>,
}

impl KeySet {
    /// Reads a key set. Entries that are not for signatures, or of an unknown kind, are passed over.
    ///
    /// # Errors
    /// [`KeysError::TooLarge`], [`KeysError::Json`], and [`KeysError::Empty`] if nothing is left.
    pub fn parse(text: &[u8]) -> Result<Self, KeysError> {
        if text.len() > MAX_SET {
            return Err(KeysError::TooLarge);
        }
        let outer: Outer =
            serde_json::from_slice(text).map_err(|source| KeysError::Json(source.to_string()))?;
        if outer.keys.len() > MAX_KEYS {
            return Err(KeysError::TooLarge);
        }
        let entries = outer.keys.iter().filter_map(Value::as_object);
        let keys: Vec<PublicKey> = entries
            .filter(|jwk| is_for_signatures(jwk))
            .filter_map(PublicKey::from_jwk)
            .collect();
        if keys.is_empty() {
            return Err(KeysError::Empty);
        }
        Ok(Self(keys))
    }

    /// Whether the key that `token` names is among them.
    pub(crate) fn knows(&self, token: &Token<'_>) -> bool {
        !matches!(
            self.candidates(token),
            Err(KeysError::Unknown(_) | KeysError::Unnamed)
        )
    }

    /// Checks the signature of `token`.
    pub(crate) fn check(&self, token: &Token<'_>) -> Result<(), KeysError> {
        let keys = self.candidates(token)?;
        if keys.iter().any(|key| token.is_signed_by(key)) {
            Ok(())
        } else {
            Err(KeysError::Signature)
        }
    }

    /// The keys of the token's key ID; without one, the only key that it can be.
    fn candidates(&self, token: &Token<'_>) -> Result<Vec<&PublicKey>, KeysError> {
        let kid = token.header.kid.as_deref().filter(|kid| !kid.is_empty());
        let Some(kid) = kid else {
            let keys: Vec<_> = self.0.iter().filter(|key| token.suits(key)).collect();
            return if keys.len() == 1 {
                Ok(keys)
            } else {
                Err(KeysError::Unnamed)
            };
        };
        let keys: Vec<_> = self.0.iter().filter(|key| key.kid() == kid).collect();
        if keys.is_empty() {
            return Err(KeysError::Unknown(super::shortened(kid)));
        }
        Ok(keys)
    }
}

/// `use` and `key_ops` say so, or say nothing.
fn is_for_signatures(jwk: &Map<String, Value>) -> bool {
    let by_use = jwk.get("use").is_none_or(|r#use| r#use == "sig");
    let by_operation = jwk.get("key_ops").is_none_or(|ops| {
        ops.as_array()
            .is_some_and(|ops| ops.iter().any(|op| op == "verify"))
    });
    by_use && by_operation
}
