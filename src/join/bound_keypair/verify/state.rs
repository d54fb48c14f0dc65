//! The join state: a document that the cluster gives a bot with each join and wants back at the next
//! one. Two bots that share one key cannot both have the last one, so a copy of a bot's storage shows
//! (upstream `lib/boundkeypair/join_state.go`).

use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use super::record::{Spec, Status};
use super::seconds;
use crate::crypto::compact::{self, Jws, JwsError};
use crate::crypto::{KeyError, PrivateKey};

/// How far two clocks may differ.
const LEEWAY: Duration = Duration::from_mins(1);
/// How far back a document begins.
const BACKDATE: Duration = Duration::from_secs(10);

/// Why a join state is not the last one of this token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum StateError {
    /// It is no document of this cluster's.
    #[error("join state could not be verified: {0}")]
    Jws(#[from] JwsError),
    /// None of the cluster's keys has the name in its header.
    #[error("join state could not be verified: its key is not one of this cluster's")]
    Key,
    /// It is for another cluster or another bot, or lies in the future.
    #[error("validating join state claims: {0}")]
    Claim(&'static str),
    /// The key was used for a recovery that this bot knows nothing of.
    #[error("recovery counter mismatch")]
    Sequence,
    /// The key was used by another instance of the bot.
    #[error("bot instance mismatch")]
    Instance,
}

/// Whom a join state is about.
#[derive(Debug, Clone, Copy)]
pub(crate) struct About<'a> {
    /// The cluster's name.
    pub(crate) cluster: &'a str,
    /// The bot's name.
    pub(crate) bot: &'a str,
}

/// The join state that goes with `status`, signed with the cluster's key for these.
///
/// # Errors
/// [`KeyError::Library`] if the system has no randomness.
pub(crate) fn issue(
    key: &PrivateKey,
    about: About<'_>,
    spec: &Spec,
    status: &Status,
    now: SystemTime,
) -> Result<String, KeyError> {
    let claims = json!({
        "iss": about.cluster,
        "aud": [about.cluster],
        "sub": about.bot,
        "nbf": seconds(now - BACKDATE),
        "iat": seconds(now),
        "bot_instance_id": status.bound_bot_instance_id,
        "recovery_sequence": status.recovery_count,
        "recovery_limit": spec.limit,
        "recovery_mode": spec.mode.name(),
    });
    let kid = compact::key_id(&key.public_spki());
    compact::sign(key, Some(&kid), claims.to_string().as_bytes())
}

/// Checks that `document` is the join state that goes with `status`; `keys` are those of the cluster
/// for these, as SubjectPublicKeyInfo DER. It has no end: how old it is says nothing.
///
/// # Errors
/// [`StateError`]: the key may be in two hands.
pub(crate) fn check(
    keys: &[Vec<u8>],
    document: &[u8],
    about: About<'_>,
    status: &Status,
    now: SystemTime,
) -> Result<(), StateError> {
    let text = std::str::from_utf8(document).map_err(|_source| JwsError::Malformed)?;
    let jws = Jws::parse(text)?;
    let kid = jws.kid().ok_or(StateError::Key)?;
    let key = keys.iter().find(|spki| compact::key_id(spki) == kid);
    let payload = jws.verify(key.ok_or(StateError::Key)?)?;
    let claims: Value = serde_json::from_slice(payload).map_err(|_source| JwsError::Malformed)?;
    let text = |name: &str| claims.get(name).and_then(Value::as_str).unwrap_or_default();
    let at = |name: &str| claims.get(name).and_then(Value::as_u64);
    if text("iss") != about.cluster {
        return Err(StateError::Claim("its issuer is another cluster"));
    }
    let audience = match claims.get("aud") {
        Some(Value::String(one)) => one == about.cluster,
        Some(Value::Array(several)) => several.iter().any(|one| one == about.cluster),
        _ => false,
    };
    if !audience {
        return Err(StateError::Claim("it is for another cluster"));
    }
    if text("sub") != about.bot {
        return Err(StateError::Claim("it is another bot's"));
    }
    let latest = seconds(now + LEEWAY);
    for name in ["nbf", "iat"] {
        if at(name).is_none_or(|begins| begins > latest) {
            return Err(StateError::Claim("it begins in the future"));
        }
    }
    if at("recovery_sequence") != Some(status.recovery_count.into()) {
        return Err(StateError::Sequence);
    }
    if text("bot_instance_id") != status.bound_bot_instance_id {
        return Err(StateError::Instance);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::record::Mode;
    use super::*;
    use crate::crypto::KeyAlgorithm;
    use crate::join::tests::mutilated::{Edit, mutilated};

    const ABOUT: About<'static> = About {
        cluster: "cluster",
        bot: "bot",
    };

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    fn spec() -> Spec {
        Spec {
            initial_public_key: None,
            must_register_before: None,
            limit: 3,
            mode: Mode::Standard,
            rotate_after: None,
        }
    }

    fn status() -> Status {
        Status {
            bound_public_key: "key".to_owned(),
            bound_bot_instance_id: "instance".to_owned(),
            recovery_count: 2,
            ..Status::default()
        }
    }

    #[test]
    fn the_last_state_is_accepted_however_old() {
        for algorithm in [KeyAlgorithm::EcdsaP256, KeyAlgorithm::Rsa2048] {
            let key = PrivateKey::generate(algorithm).unwrap();
            let old = PrivateKey::generate(algorithm).unwrap();
            let keys = [old.public_spki(), key.public_spki()];
            let state = issue(&key, ABOUT, &spec(), &status(), now()).unwrap();
            let check = |at| check(&keys, state.as_bytes(), ABOUT, &status(), at);
            assert_eq!(check(now()), Ok(()));
            assert_eq!(check(now() + Duration::from_hours(24 * 365 * 20)), Ok(()));
            assert_eq!(check(now() - LEEWAY), Ok(()));
            assert!(check(now() - 2 * LEEWAY).is_err());
        }
    }

    #[test]
    fn fuzz_join_states() {
        let key = PrivateKey::generate(KeyAlgorithm::Ed25519).unwrap();
        let (keys, kid) = ([key.public_spki()], compact::key_id(&key.public_spki()));
        let state = issue(&key, ABOUT, &spec(), &status(), now()).unwrap();
        let claims = Jws::parse(&state)
            .unwrap()
            .verify(&keys[0])
            .unwrap()
            .to_vec();
        let accepted = |document: &[u8]| check(&keys, document, ABOUT, &status(), now()).is_ok();
        assert!(accepted(state.as_bytes()));
        bolero::check!().with_type::<Vec<Edit>>().for_each(|edits| {
            let sent = mutilated(state.as_bytes(), edits);
            assert_eq!(accepted(&sent), sent == state.as_bytes());

            // Even what the cluster signed has to say the right thing.
            let payload = mutilated(&claims, edits);
            let signed = compact::sign(&key, Some(&kid), &payload).unwrap();
            if accepted(signed.as_bytes()) {
                let says: Value = serde_json::from_slice(&payload).unwrap();
                assert_eq!(says["iss"], "cluster");
                assert_eq!(says["sub"], "bot");
                assert_eq!(says["bot_instance_id"], "instance");
                assert_eq!(says["recovery_sequence"], 2);
            }
        });
    }

    #[test]
    fn every_other_state_is_refused() {
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        let stranger = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        let keys = [key.public_spki()];
        let state = issue(&key, ABOUT, &spec(), &status(), now()).unwrap();
        let refused = |document: &[u8], about, status: &Status| {
            check(&keys, document, about, status, now()).unwrap_err()
        };
        for (status, expected) in [
            (
                Status {
                    recovery_count: 3,
                    ..status()
                },
                StateError::Sequence,
            ),
            (
                Status {
                    bound_bot_instance_id: "other".to_owned(),
                    ..status()
                },
                StateError::Instance,
            ),
        ] {
            assert_eq!(refused(state.as_bytes(), ABOUT, &status), expected);
        }
        for about in [
            About {
                cluster: "other",
                ..ABOUT
            },
            About {
                bot: "other",
                ..ABOUT
            },
        ] {
            let error = refused(state.as_bytes(), about, &status());
            assert!(matches!(error, StateError::Claim(_)), "{error}");
        }
        let forged = issue(&stranger, ABOUT, &spec(), &status(), now()).unwrap();
        assert_eq!(
            refused(forged.as_bytes(), ABOUT, &status()),
            StateError::Key
        );
        // The stranger claims our key's name.
        let kid = compact::key_id(&key.public_spki());
        let claims = r#"{"iss":"cluster"}"#;
        let forged = compact::sign(&stranger, Some(&kid), claims.as_bytes()).unwrap();
        assert_eq!(
            refused(forged.as_bytes(), ABOUT, &status()),
            StateError::Jws(JwsError::Signature)
        );
        let nameless = compact::sign(&key, None, claims.as_bytes()).unwrap();
        assert_eq!(
            refused(nameless.as_bytes(), ABOUT, &status()),
            StateError::Key
        );
        for junk in [&b""[..], b"junk", &[0xff; 9]] {
            let error = refused(junk, ABOUT, &status());
            assert_eq!(error, StateError::Jws(JwsError::Malformed));
        }
    }
}
