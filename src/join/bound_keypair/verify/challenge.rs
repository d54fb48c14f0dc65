//! The challenge: a document that the owner of a key has to sign (upstream
//! `lib/boundkeypair/bound_keypair.go`).

use std::time::{Duration, SystemTime};

use serde_json::{Map, Value, json};

use super::seconds;
use crate::crypto::compact::{Jws, JwsError};
use crate::crypto::random;

/// How long a challenge may be answered.
const LIFE: Duration = Duration::from_mins(1);
/// How far back it begins, for clocks that are behind.
const BACKDATE: Duration = Duration::from_secs(10);

/// Why an answer is not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ChallengeError {
    /// It is not signed with the key that was asked for.
    #[error("validating challenge response: {0}")]
    Jws(#[from] JwsError),
    /// Another document was signed.
    #[error("validating challenge response: another document was signed")]
    Other,
    /// It took too long.
    #[error("validating challenge response: it came too late")]
    Late,
}

/// A challenge for the owner of one key.
#[derive(Debug, Clone)]
pub(crate) struct Challenge {
    spki: Vec<u8>,
    claims: Map<String, Value>,
    expires: SystemTime,
}

impl Challenge {
    /// A new challenge by `cluster` for the owner of a key (SubjectPublicKeyInfo DER).
    pub(crate) fn new(cluster: &str, spki: Vec<u8>, now: SystemTime) -> Self {
        let members = [
            ("iss", json!(cluster)),
            ("aud", json!([cluster])),
            ("sub", json!(crate::crypto::compact::key_id(&spki))),
            ("nbf", json!(seconds(now - BACKDATE))),
            ("iat", json!(seconds(now))),
            ("exp", json!(seconds(now + LIFE))),
            ("nonce", json!(hex::encode(random::<16>()))),
        ];
        Self {
            spki,
            claims: members
                .map(|(name, value)| (name.to_owned(), value))
                .into_iter()
                .collect(),
            expires: now + LIFE,
        }
    }

    /// The text to be signed.
    pub(crate) fn text(&self) -> String {
        Value::Object(self.claims.clone()).to_string()
    }

    /// Checks an answer: the same claims, signed with this key and no other, in time. Their order and
    /// spacing are the client's.
    ///
    /// # Errors
    /// [`ChallengeError`].
    pub(crate) fn check(&self, answer: &[u8], now: SystemTime) -> Result<(), ChallengeError> {
        let text = std::str::from_utf8(answer).map_err(|_source| JwsError::Malformed)?;
        let jws = Jws::parse(text)?;
        let signed: Value = serde_json::from_slice(jws.verify(&self.spki)?)
            .map_err(|_source| ChallengeError::Other)?;
        if signed.as_object() != Some(&self.claims) {
            return Err(ChallengeError::Other);
        }
        if now > self.expires + LIFE {
            return Err(ChallengeError::Late);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::{KeyAlgorithm, PrivateKey, compact};
    use crate::join::tests::mutilated::{Edit, mutilated};

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    #[test]
    fn the_owner_of_the_key_answers() {
        for algorithm in [
            KeyAlgorithm::Ed25519,
            KeyAlgorithm::EcdsaP256,
            KeyAlgorithm::Rsa2048,
        ] {
            let key = PrivateKey::generate(algorithm).unwrap();
            let challenge = Challenge::new("cluster", key.public_spki(), now());
            let answer = compact::sign(&key, None, challenge.text().as_bytes()).unwrap();
            let check = |at| challenge.check(answer.as_bytes(), at);
            assert_eq!(check(now() + LIFE), Ok(()));
            assert_eq!(check(now() + 3 * LIFE), Err(ChallengeError::Late));
        }
    }

    #[test]
    fn the_challenge_is_a_valid_jwt() {
        let key = PrivateKey::generate(KeyAlgorithm::Ed25519).unwrap();
        let text = Challenge::new("cluster", key.public_spki(), now()).text();
        let claims: Value = serde_json::from_str(&text).unwrap();
        for (name, value) in [
            ("iss", json!("cluster")),
            ("aud", json!(["cluster"])),
            ("nbf", json!(1_799_999_990)),
            ("iat", json!(1_800_000_000)),
            ("exp", json!(1_800_000_060)),
        ] {
            assert_eq!(claims.get(name), Some(&value), "{name}");
        }
        let again = Challenge::new("cluster", key.public_spki(), now()).text();
        assert_ne!(text, again, "each has a nonce of its own");
    }

    #[test]
    fn fuzz_answers_to_challenges() {
        let key = PrivateKey::generate(KeyAlgorithm::Ed25519).unwrap();
        let challenge = Challenge::new("cluster", key.public_spki(), now());
        let answer = compact::sign(&key, None, challenge.text().as_bytes()).unwrap();
        let accepted = |answer: &[u8]| challenge.check(answer, now()).is_ok();
        assert!(accepted(answer.as_bytes()));
        bolero::check!().with_type::<Vec<Edit>>().for_each(|edits| {
            let sent = mutilated(answer.as_bytes(), edits);
            assert_eq!(accepted(&sent), sent == answer.as_bytes());

            let payload = mutilated(challenge.text().as_bytes(), edits);
            let signed = compact::sign(&key, None, &payload).unwrap();
            if accepted(signed.as_bytes()) {
                let says: Value = serde_json::from_slice(&payload).unwrap();
                assert_eq!(says["nonce"], challenge.claims["nonce"]);
            }
        });
    }

    #[test]
    fn other_answers_are_refused() {
        let key = PrivateKey::generate(KeyAlgorithm::Ed25519).unwrap();
        let stranger = PrivateKey::generate(KeyAlgorithm::Ed25519).unwrap();
        let challenge = Challenge::new("cluster", key.public_spki(), now());
        let other = Challenge::new("cluster", key.public_spki(), now());
        let sign =
            |key: &PrivateKey, text: &str| compact::sign(key, None, text.as_bytes()).unwrap();
        let mut later = challenge.claims.clone();
        later.insert("exp".to_owned(), json!(4_000_000_000_u32));
        let mut more = challenge.claims.clone();
        more.insert("admin".to_owned(), json!(true));
        let text = |claims: Map<String, Value>| Value::Object(claims).to_string();
        for (answer, expected) in [
            (
                sign(&stranger, &challenge.text()),
                JwsError::Signature.into(),
            ),
            (sign(&key, &other.text()), ChallengeError::Other),
            (sign(&key, &text(later)), ChallengeError::Other),
            (sign(&key, &text(more)), ChallengeError::Other),
            (sign(&key, "null"), ChallengeError::Other),
            (challenge.text(), JwsError::Malformed.into()),
            (String::new(), JwsError::Malformed.into()),
        ] {
            let verdict = challenge.check(answer.as_bytes(), now());
            assert_eq!(verdict, Err(expected), "{answer}");
        }
        assert!(challenge.check(&[0xff; 40], now()).is_err());
    }
}
