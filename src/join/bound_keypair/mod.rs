//! Join method `bound_keypair`: a key in the bot's own storage, which the cluster binds to the token at
//! the first join and challenges at each one after it.
//!
//! [`keys`] is what is stored; here are the configuration and the answers to the cluster.

mod keys;
pub mod verify;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

pub(crate) use self::keys::{Keys, KeysError};
use super::{JoinError, JoinMethod, Proof, Prover, Surroundings, TokenSource};
use crate::backoff::Backoff;
use crate::clock::Clock;
use crate::crypto::{PrivateKey, Purpose, Suite, compact, jitter, ssh};
use crate::destination::Destination;
use crate::pb::teleport::join::v1::{
    BoundKeypairChallengeSolution, BoundKeypairInit, BoundKeypairResult,
    BoundKeypairRotationResponse, ClientParams, challenge, challenge_solution, join_request,
};
use crate::secret::Secret;
use crate::yaml::{Fields, Tree};

const NAME: &str = "bound_keypair";
/// The first-join secret, where the configuration names none.
const SECRET_ENV: &str = "TBOT_REGISTRATION_SECRET";
/// The static key in base64, where the configuration names none.
const KEY_ENV: &str = "TBOT_BOUND_KEYPAIR_STATIC_KEY";
/// How often the result of a join is tried to be stored: the cluster has counted it, and takes a bot
/// that comes with an older join state for a copy.
const STORE_ATTEMPTS: u32 = 6;
/// The waits between these: together below the minute that a join may take.
const STORE_WAIT: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Join method `bound_keypair`.
#[derive(Debug, Clone, Copy)]
pub struct BoundKeypair;

/// What is configured.
#[derive(Debug, Clone, Default)]
struct Settings {
    secret: Option<TokenSource>,
    static_key: Option<PathBuf>,
}

impl JoinMethod for BoundKeypair {
    fn name(&self) -> &'static str {
        NAME
    }

    fn counts(&self) -> bool {
        true
    }

    fn section(&self) -> Option<&'static str> {
        Some(NAME)
    }

    fn read(&self, section: Option<&mut Fields<'_>>) -> Arc<dyn Prover> {
        Arc::new(section.map(settings).unwrap_or_default())
    }

    fn with_parameter(&self, parameter: Secret<String>) -> Option<Arc<dyn Prover>> {
        Some(Arc::new(Settings {
            secret: Some(TokenSource::Value(parameter)),
            static_key: None,
        }))
    }

    fn hint(&self, _code: Option<tonic::Code>) -> &'static str {
        " (look at the token with `tctl get token/NAME` or `tbot cluster get token/NAME`: a registration \
         secret counts once and until must_register_before; a bot without a valid certificate needs \
         recoveries left, raise spec.bound_keypair.recovery.limit; a lock on the token means that its \
         key was used from two places)"
    }
}

/// Reads the section; the key of 18.0, `initialjoinsecret`, is another name of the secret.
fn settings(fields: &mut Fields<'_>) -> Settings {
    let old = fields.secret_string("initialjoinsecret");
    let secret = fields.secret_string("registration_secret").or(old);
    let path = fields.string("registration_secret_path");
    if secret.is_some() && path.is_some() {
        fields.error(
            "registration_secret_path",
            "`registration_secret_path` together with `registration_secret`",
            Some("keep one of them"),
        );
    }
    let static_key = fields.string("static_private_key_path");
    let static_key = fields.string("static_key_path").or(static_key);
    Settings {
        secret: match (path, secret) {
            (Some(path), _) => Some(TokenSource::File(path.into())),
            (None, secret) => secret.map(TokenSource::Value),
        },
        static_key: static_key.map(Into::into),
    }
}

#[async_trait]
impl Prover for Settings {
    fn method(&self) -> &'static dyn JoinMethod {
        &BoundKeypair
    }

    fn tree(&self) -> Option<Tree> {
        let path = |path: &PathBuf| Tree::text(path.to_string_lossy());
        let (value, file) = match &self.secret {
            Some(TokenSource::Value(secret)) => (Some(Tree::text(secret.expose())), None),
            Some(TokenSource::File(secret)) => (None, Some(path(secret))),
            None => (None, None),
        };
        let static_key = self.static_key.as_ref().map(path);
        if value.is_none() && file.is_none() && static_key.is_none() {
            return None;
        }
        Some(Tree::map([
            ("registration_secret", value),
            ("registration_secret_path", file),
            ("static_key_path", static_key),
        ]))
    }

    async fn prepare(&self, around: &Surroundings<'_>) -> Result<Box<dyn Proof>, JoinError> {
        if let Some(key) = self.static_key(around)? {
            if self.secret.is_some() {
                tracing::warn!("A static key needs no registration secret: it is not used");
            }
            return Ok(Box::new(Static { key }));
        }
        let keys = Keys::load(around.storage, around.clock.now())
            .await
            .map_err(failed)?;
        let secret = match keys.state() {
            // The bot is bound: the secret is used up, and its file may be gone.
            Some(_) => None,
            None => match self.secret(around) {
                // It may have joined without having heard of it.
                Err(error) if keys.any() => {
                    tracing::warn!(%error, "Joining with the bot's key and without the secret");
                    None
                }
                secret => secret?,
            },
        };
        if !keys.any() {
            if secret.is_none() {
                return Err(proof(format!(
                    "the bot has no key: register one with `tbot keypair create`, or give the token's \
                     registration secret (`--registration-secret`, \
                     `onboarding.{NAME}.registration_secret` or ${SECRET_ENV})"
                )));
            }
            if !around.storage.is_persistent() {
                tracing::warn!(
                    "The bot's storage does not survive a restart: its key will be lost, and the \
                     registration secret counts only once"
                );
            }
        }
        Ok(Box::new(Managed {
            storage: Arc::clone(around.storage),
            clock: around.clock.clone(),
            secret,
            keys,
        }))
    }
}

impl Settings {
    /// The registration secret: the configured one, or that of the environment.
    fn secret(&self, around: &Surroundings<'_>) -> Result<Option<Secret<String>>, JoinError> {
        let given = around.env.get(SECRET_ENV);
        let Some(source) = &self.secret else {
            return Ok(given.map(|secret| Secret::new(secret.to_owned())));
        };
        if given.is_some() {
            tracing::warn!("The configured registration secret goes before ${SECRET_ENV}");
        }
        let secret = source
            .resolve()
            .map_err(|error| proof(format!("registration secret: {error}")))?;
        Ok(Some(secret))
    }

    /// The static key: the configured one, or that of the environment.
    fn static_key(&self, around: &Surroundings<'_>) -> Result<Option<PrivateKey>, JoinError> {
        let (from, text) = match (&self.static_key, around.env.get(KEY_ENV)) {
            (Some(path), _) => {
                let text = TokenSource::File(path.clone())
                    .resolve()
                    .map_err(|error| proof(format!("static key: {error}")))?;
                (path.display().to_string(), text)
            }
            (None, Some(base64)) => {
                let from = format!("${KEY_ENV}");
                let bytes = STANDARD.decode(base64.trim()).ok();
                let text = bytes.and_then(|bytes| String::from_utf8(bytes).ok());
                let text = text.ok_or_else(|| {
                    proof(format!(
                        "static key: {from} is not the base64 form of a PEM key"
                    ))
                })?;
                (from, Secret::new(text))
            }
            (None, None) => return Ok(None),
        };
        let key = PrivateKey::from_pem(text.expose())
            .map_err(|error| proof(format!("static key: {from}: {error}")))?;
        Ok(Some(key))
    }
}

/// Proves with the keys in the bot's storage.
#[derive(Debug)]
struct Managed {
    storage: Arc<dyn Destination>,
    clock: Clock,
    secret: Option<Secret<String>>,
    keys: Keys,
}

#[async_trait]
impl Proof for Managed {
    fn opening(&self, client_params: ClientParams) -> join_request::Payload {
        let secret = self.secret.as_ref().map(|secret| secret.expose().clone());
        let state = self.keys.state().map(|state| state.expose().clone());
        join_request::Payload::BoundKeypairInit(BoundKeypairInit {
            client_params: Some(client_params),
            initial_join_secret: secret.unwrap_or_default(),
            previous_join_state: state.unwrap_or_default(),
        })
    }

    async fn solve(
        &mut self,
        challenge: challenge::Payload,
        now: SystemTime,
    ) -> Result<Option<challenge_solution::Payload>, JoinError> {
        match challenge {
            challenge::Payload::BoundKeypairChallenge(asked) => {
                let public = String::from_utf8_lossy(&asked.public_key);
                let key = self.keys.find(&public).map_err(failed)?;
                solution(key, &asked.challenge).map(Some)
            }
            challenge::Payload::BoundKeypairRotationRequest(asked) => {
                let suite = Suite::from_name(&asked.signature_algorithm_suite);
                let key = PrivateKey::generate(suite.algorithm(Purpose::BoundKeypair))?;
                let public = key.public_ssh_line()?;
                self.keys.add(key, now);
                // Stored first: once the cluster has bound it, nothing else opens the token.
                self.keys.store(&self.storage).await.map_err(failed)?;
                let public_key = public.trim().as_bytes().to_vec();
                tracing::info!(
                    public_key = public.trim(),
                    "The bot has a new key to prove itself with"
                );
                Ok(Some(
                    challenge_solution::Payload::BoundKeypairRotationResponse(
                        BoundKeypairRotationResponse { public_key },
                    ),
                ))
            }
            _ => Ok(None),
        }
    }

    async fn settle(&mut self, result: BoundKeypairResult) -> Result<(), JoinError> {
        let public = String::from_utf8_lossy(&result.public_key);
        self.keys
            .settle(&public, result.join_state)
            .map_err(failed)?;
        let mut backoff = Backoff::new(STORE_WAIT.0, STORE_WAIT.1);
        loop {
            let Err(error) = self.keys.store(&self.storage).await else {
                return Ok(());
            };
            if backoff.failures() + 1 >= STORE_ATTEMPTS {
                return Err(failed(error));
            }
            tracing::warn!(%error, "The join state could not be stored, trying again");
            self.clock.sleep(backoff.next_wait(jitter())).await;
        }
    }
}

/// Proves with a key that somebody else keeps: never rotated, and without a join state.
#[derive(Debug)]
struct Static {
    key: PrivateKey,
}

#[async_trait]
impl Proof for Static {
    fn opening(&self, client_params: ClientParams) -> join_request::Payload {
        join_request::Payload::BoundKeypairInit(BoundKeypairInit {
            client_params: Some(client_params),
            ..BoundKeypairInit::default()
        })
    }

    async fn solve(
        &mut self,
        challenge: challenge::Payload,
        _now: SystemTime,
    ) -> Result<Option<challenge_solution::Payload>, JoinError> {
        match challenge {
            challenge::Payload::BoundKeypairChallenge(asked) => {
                let public = String::from_utf8_lossy(&asked.public_key);
                let wanted = ssh::spki_of_public_line(&public).ok();
                if wanted != Some(self.key.public_spki()) {
                    return Err(proof(
                        "the cluster asks for another key than the static one: put its public half into \
                         the token's spec.bound_keypair.onboarding.initial_public_key",
                    ));
                }
                solution(&self.key, &asked.challenge).map(Some)
            }
            challenge::Payload::BoundKeypairRotationRequest(_) => Err(proof(
                "the cluster wants another key, and a static one is never replaced: give the token an \
                 initial_public_key, and remove its rotate_after",
            )),
            _ => Ok(None),
        }
    }
}

/// The text of a challenge, signed.
fn solution(key: &PrivateKey, challenge: &str) -> Result<challenge_solution::Payload, JoinError> {
    let solution = compact::sign(key, None, challenge.as_bytes())?.into_bytes();
    Ok(challenge_solution::Payload::BoundKeypairChallengeSolution(
        BoundKeypairChallengeSolution { solution },
    ))
}

fn failed(error: KeysError) -> JoinError {
    proof(error.to_string())
}

fn proof(problem: impl Into<String>) -> JoinError {
    JoinError::Proof {
        method: NAME,
        problem: problem.into(),
    }
}

#[cfg(test)]
mod tests;
