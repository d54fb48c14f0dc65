//! The agent's half and the cluster's against each other.

use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::clock::Clock;
use crate::crypto::{KeyAlgorithm, PrivateKey, Suite};
use crate::destination::{Destination, from_uri};
use crate::env::Env;
use crate::join::bound_keypair as agent;
use crate::join::verify::World;
use crate::join::{JoinError, JoinMethod as _, Proof, Surroundings};
use crate::pb::teleport::join::v1::{
    BoundKeypairInit, BoundKeypairResult, ClientParams, challenge, challenge_solution,
};
use crate::secret::Secret;
use crate::yaml::{Problems, parse};

const CLUSTER: &str = "example.test";
const BOT: &str = "robot";

fn start() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

/// A token in a cluster's hands.
struct Token {
    spec: Value,
    status: Value,
    authority: PrivateKey,
    suite: Suite,
    world: World,
    lock: Option<Refusal>,
    /// The instance before the bound one, where its answer was lost.
    lost: Option<String>,
    /// The instance that the bot's certificate names.
    instance: Option<String>,
    now: SystemTime,
    instances: u32,
}

impl Token {
    fn new(section: &str) -> Self {
        let spec = normal(section).unwrap();
        let status = BoundKeypair.status(&spec, &Value::Null);
        Self {
            spec,
            status,
            authority: PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap(),
            suite: Suite::BalancedV1,
            world: World::new(None).unwrap(),
            lock: None,
            lost: None,
            instance: None,
            now: start(),
            instances: 0,
        }
    }

    fn status(&self) -> Status {
        Status::read(&self.status).unwrap()
    }

    fn secret(&self) -> String {
        self.status().registration_secret
    }

    /// What the cluster says to a proof; nothing changes.
    async fn judge(&self, proof: &mut dyn Proof) -> (Result<(), Refusal>, Seen) {
        let opening = proof.opening(ClientParams::default());
        let state_keys = [self.authority.public_spki()];
        let joining = Joining {
            token: "token",
            spec: &self.spec,
            status: &self.status,
            bot: BOT,
            instance: self.instance.as_deref(),
            cluster: CLUSTER,
            suite: self.suite,
            state_keys: &state_keys,
            lost: self.lost.as_deref(),
            lock: self.lock.as_ref(),
            now: self.now,
            opening: &opening,
            challenge: "",
            address: std::net::Ipv4Addr::LOCALHOST.into(),
            again: self.instance.is_some(),
            world: &self.world,
        };
        let mut line = Line {
            proof,
            now: self.now,
            error: None,
        };
        let mut seen = Seen::default();
        let verdict = BoundKeypair.verify(&joining, &mut line, &mut seen).await;
        (verdict, seen)
    }

    /// A whole join, as the issuing transaction ends it.
    async fn join(&mut self, proof: &mut dyn Proof) -> Result<(), Refusal> {
        let (verdict, seen) = self.judge(proof).await;
        verdict?;
        let bound = seen.bound.unwrap();
        let mut status = bound.status.clone();
        if bound.kind != Kind::Renewal {
            self.instances += 1;
            status.bound_bot_instance_id = format!("instance-{}", self.instances);
        }
        status.write(&mut self.status);
        self.instance = Some(status.bound_bot_instance_id.clone());
        let about = About {
            cluster: CLUSTER,
            bot: BOT,
        };
        let state = issue_state(&self.authority, about, &bound.spec, &status, self.now).unwrap();
        let result = BoundKeypairResult {
            join_state: state.into_bytes(),
            public_key: status.bound_public_key.into_bytes(),
        };
        proof.settle(result).await.unwrap();
        Ok(())
    }
}

/// The stream between the two.
struct Line<'a> {
    proof: &'a mut dyn Proof,
    now: SystemTime,
    error: Option<JoinError>,
}

#[async_trait]
impl Dialogue for Line<'_> {
    async fn ask(
        &mut self,
        question: challenge::Payload,
    ) -> Result<challenge_solution::Payload, Refusal> {
        match self.proof.solve(question, self.now).await {
            Ok(answer) => answer.ok_or_else(Refusal::cancelled),
            Err(error) => {
                self.error = Some(error);
                Err(Refusal::bad_parameter("the client gave up"))
            }
        }
    }
}

/// The normal form of a token's section; the lines of what is wrong with it otherwise.
fn normal(section: &str) -> Result<Value, String> {
    let node = parse(section).map_err(|problem| problem.render("token.yaml"))?;
    let problems = Problems::new();
    let mut fields = Fields::new(&node, "spec", &problems).unwrap();
    let mut stored = json!({});
    BoundKeypair.read(&mut fields, &mut stored);
    fields.finish();
    let lines: Vec<_> = problems
        .into_sorted()
        .into_iter()
        .map(|problem| problem.render("token.yaml"))
        .collect();
    if lines.is_empty() {
        Ok(stored)
    } else {
        Err(lines.join("\n"))
    }
}

async fn storage() -> Arc<dyn Destination> {
    let storage = from_uri("memory://").unwrap().build();
    storage.init().await.unwrap();
    storage
}

/// A bot with this storage and this secret.
async fn bot(storage: &Arc<dyn Destination>, secret: &str) -> Result<Box<dyn Proof>, JoinError> {
    let (env, clock) = (Env::default(), Clock::simulated(start()));
    let around = Surroundings {
        env: &env,
        clock: &clock,
        storage,
    };
    let prover = match secret {
        "" => agent::BoundKeypair.read(None),
        secret => agent::BoundKeypair
            .with_parameter(Secret::new(secret.to_owned()))
            .unwrap(),
    };
    prover.prepare(&around).await
}

async fn copy(storage: &Arc<dyn Destination>) -> Arc<dyn Destination> {
    let other = self::storage().await;
    for name in ["id_bkp", "id_bkp.pub", "bkp_state", "bkp_key_history.json"] {
        if let Some(content) = storage.read(name).await.unwrap() {
            let files = [(name.to_owned(), content)].into();
            other.write(files).await.unwrap();
        }
    }
    other
}

fn denied(verdict: Result<(), Refusal>, text: &str) {
    let refusal = verdict.unwrap_err().to_string();
    assert!(refusal.contains(text), "{refusal}");
}

#[tokio::test(start_paused = true)]
async fn a_bot_joins_by_the_secret_once_and_by_its_key_from_then_on() {
    let mut token = Token::new("bound_keypair: {recovery: {limit: 2}}");
    let (secret, storage) = (token.secret(), storage().await);
    assert_eq!(secret.len(), 32);
    token
        .join(&mut *bot(&storage, &secret).await.unwrap())
        .await
        .unwrap();
    let first = token.status();
    assert_eq!(first.registration_secret, "", "it is used up");
    assert_eq!(first.recovery_count, 1);
    assert!(first.bound_public_key.starts_with("ssh-ed25519 "));
    // Renewals change nothing and are not counted.
    for _ in 0..3 {
        token
            .join(&mut *bot(&storage, "").await.unwrap())
            .await
            .unwrap();
        assert_eq!(token.status(), first);
    }
    // Its certificate is lost.
    token.instance = None;
    token
        .join(&mut *bot(&storage, "").await.unwrap())
        .await
        .unwrap();
    assert_eq!(token.status().recovery_count, 2);
    assert_ne!(
        token.status().bound_bot_instance_id,
        first.bound_bot_instance_id
    );
    token.instance = None;
    let mut proof = bot(&storage, "").await.unwrap();
    denied(token.join(&mut *proof).await, "no rejoins remaining");
    // Nobody else gets in, whatever they know.
    let mut stranger = bot(&self::storage().await, &secret).await.unwrap();
    let (verdict, seen) = token.judge(&mut *stranger).await;
    denied(verdict, "the client gave up");
    assert_eq!(seen.copied, None, "a stranger cannot have the token locked");
}

#[tokio::test(start_paused = true)]
async fn a_registered_key_needs_no_secret() {
    let storage = storage().await;
    let key = PrivateKey::generate(KeyAlgorithm::Rsa2048).unwrap();
    let line = key.public_ssh_line().unwrap();
    agent::Keys::unbound(key, start())
        .store(&storage)
        .await
        .unwrap();
    let mut token = Token::new(&format!(
        "bound_keypair: {{onboarding: {{initial_public_key: {line:?}}}}}"
    ));
    assert_eq!(token.secret(), "");
    let mut stranger = bot(&self::storage().await, "guess").await.unwrap();
    denied(token.judge(&mut *stranger).await.0, "the client gave up");
    token
        .join(&mut *bot(&storage, "").await.unwrap())
        .await
        .unwrap();
    assert_eq!(token.status().bound_public_key, line.trim());
}

#[tokio::test(start_paused = true)]
async fn a_copy_of_the_storage_locks_the_token_by_the_mode() {
    for (mode, locked) in [("standard", true), ("relaxed", true), ("insecure", false)] {
        let mut token = Token::new(&format!(
            "bound_keypair: {{recovery: {{limit: 9, mode: {mode}}}}}"
        ));
        let storage = storage().await;
        token
            .join(&mut *bot(&storage, &token.secret()).await.unwrap())
            .await
            .unwrap();
        let thief = copy(&storage).await;
        token.instance = None;
        token
            .join(&mut *bot(&thief, "").await.unwrap())
            .await
            .unwrap();
        token.instance = None;
        let (verdict, seen) = token.judge(&mut *bot(&storage, "").await.unwrap()).await;
        if locked {
            denied(verdict, "join state verification failed");
            assert_eq!(
                seen.copied.as_deref(),
                Some("recovery counter mismatch"),
                "{mode}"
            );
            assert_eq!(seen.bound, None);
        } else {
            verdict.unwrap();
            assert_eq!(seen.copied, None);
        }
        // Once it is locked, a wrong state makes no second lock.
        token.lock = Some(Refusal::denied("lock targeting JoinToken"));
        let (verdict, seen) = token.judge(&mut *bot(&storage, "").await.unwrap()).await;
        denied(verdict, "lock targeting JoinToken");
        assert_eq!(seen.copied, None);
    }
}

/// The bot stopped before its answer came, or between storing the join state and the certificate.
#[tokio::test(start_paused = true)]
async fn a_lost_answer_is_repeated_for_the_state_before_it_and_for_its_own() {
    let mut token = Token::new("bound_keypair: {recovery: {limit: 9}}");
    let mut copies = Vec::new();
    let storage = storage().await;
    let secret = token.secret();
    for secret in [secret.as_str(), "", ""] {
        token.lost = None;
        token.instance = None;
        let before = token.status().bound_bot_instance_id;
        token
            .join(&mut *bot(&storage, secret).await.unwrap())
            .await
            .unwrap();
        copies.push(copy(&storage).await);
        token.lost = Some(before);
    }
    token.instance = None;
    for (storage, good) in copies.iter().zip([false, true, true]) {
        let (verdict, seen) = token.judge(&mut *bot(storage, "").await.unwrap()).await;
        assert_eq!(verdict.is_ok(), good);
        assert_eq!(seen.copied.is_none(), good);
        if let Some(bound) = seen.bound {
            assert_eq!(bound.kind, Kind::Again);
            assert_eq!(bound.status, token.status(), "nothing is counted");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_first_key_is_new_enough_for_any_wish() {
    let mut token =
        Token::new("bound_keypair: {rotate_after: \"2020-01-01T00:00:00Z\", recovery: {limit: 9}}");
    let storage = storage().await;
    let mut proof = bot(&storage, &token.secret()).await.unwrap();
    let (verdict, seen) = token.judge(&mut *proof).await;
    verdict.unwrap();
    assert_eq!(seen.bound.unwrap().replaced, None);
    token.join(&mut *proof).await.unwrap();
    let first = token.status();
    assert_eq!(first.last_rotated_at, Some(token.now));
    token
        .join(&mut *bot(&storage, "").await.unwrap())
        .await
        .unwrap();
    assert_eq!(token.status(), first, "nor is it replaced at the next join");
}

#[tokio::test(start_paused = true)]
async fn a_state_that_is_missing_is_refused_without_a_lock() {
    let mut token = Token::new("bound_keypair: {recovery: {limit: 9}}");
    let storage = storage().await;
    token
        .join(&mut *bot(&storage, &token.secret()).await.unwrap())
        .await
        .unwrap();
    let files = [("bkp_state".to_owned(), Secret::new(Vec::new()))].into();
    storage.write(files).await.unwrap();
    let (verdict, seen) = token.judge(&mut *bot(&storage, "").await.unwrap()).await;
    denied(verdict, "previous join state is required");
    assert_eq!(seen.copied, None);
    // Another instance's certificate with the right key and state.
    let mut token = Token::new("bound_keypair: {recovery: {limit: 9}}");
    token
        .join(&mut *bot(&storage, &token.secret()).await.unwrap())
        .await
        .unwrap();
    token.instance = Some("other".to_owned());
    let (verdict, _) = token.judge(&mut *bot(&storage, "").await.unwrap()).await;
    denied(verdict, "bot instance mismatch");
}

#[tokio::test(start_paused = true)]
async fn a_key_is_replaced_when_the_token_says_so() {
    for (suite, kind) in [
        (Suite::BalancedV1, "ssh-ed25519 "),
        (Suite::FipsV1, "ecdsa-sha2-nistp256 "),
    ] {
        let mut token = Token::new("bound_keypair: {recovery: {limit: 9}}");
        token.suite = suite;
        let storage = storage().await;
        token
            .join(&mut *bot(&storage, &token.secret()).await.unwrap())
            .await
            .unwrap();
        let first = token.status();
        assert!(first.bound_public_key.starts_with(kind));
        assert_eq!(first.last_rotated_at, None, "a first key is no replacement");
        token.now += Duration::from_secs(60);
        let wish = rfc3339_nanos(token.now);
        set(&mut token.spec[SECTION], "rotate_after", wish);
        token.now += Duration::from_secs(60);
        token
            .join(&mut *bot(&storage, "").await.unwrap())
            .await
            .unwrap();
        let second = token.status();
        assert_ne!(second.bound_public_key, first.bound_public_key);
        assert_eq!(second.last_rotated_at, Some(token.now));
        token
            .join(&mut *bot(&storage, "").await.unwrap())
            .await
            .unwrap();
        assert_eq!(token.status(), second, "once is enough");
    }
}

/// The agent is killed, or its answer lost, after each message of a rotation.
#[tokio::test(start_paused = true)]
async fn a_rotation_may_stop_anywhere() {
    let mut token = Token::new("bound_keypair: {recovery: {limit: 99}}");
    let storage = storage().await;
    token
        .join(&mut *bot(&storage, &token.secret()).await.unwrap())
        .await
        .unwrap();
    set(
        &mut token.spec[SECTION],
        "rotate_after",
        rfc3339_nanos(start()),
    );
    for answered in 0..=3 {
        let mut short = Short {
            proof: bot(&storage, "").await.unwrap(),
            left: answered,
        };
        let (verdict, seen) = token.judge(&mut short).await;
        assert_eq!(verdict.is_ok(), answered == 3, "{answered}");
        if let Some(bound) = seen.bound {
            // The cluster has taken the new key, and the bot never heard of it.
            bound.status.write(&mut token.status);
            assert!(bound.replaced.is_some());
        }
    }
    token
        .join(&mut *bot(&storage, "").await.unwrap())
        .await
        .unwrap();
}

/// A bot that answers only so many questions.
#[derive(Debug)]
struct Short {
    proof: Box<dyn Proof>,
    left: u32,
}

#[async_trait]
impl Proof for Short {
    fn opening(&self, params: ClientParams) -> join_request::Payload {
        self.proof.opening(params)
    }

    async fn solve(
        &mut self,
        challenge: challenge::Payload,
        now: SystemTime,
    ) -> Result<Option<challenge_solution::Payload>, JoinError> {
        let Some(left) = self.left.checked_sub(1) else {
            return Ok(None);
        };
        self.left = left;
        self.proof.solve(challenge, now).await
    }
}

/// A client that does what it likes.
#[derive(Debug)]
struct Rogue {
    key: PrivateKey,
    answers: PrivateKey,
    secret: String,
    state: Vec<u8>,
}

#[async_trait]
impl Proof for Rogue {
    fn opening(&self, _params: ClientParams) -> join_request::Payload {
        join_request::Payload::BoundKeypairInit(BoundKeypairInit {
            client_params: None,
            initial_join_secret: self.secret.clone(),
            previous_join_state: self.state.clone(),
        })
    }

    async fn solve(
        &mut self,
        challenge: challenge::Payload,
        _now: SystemTime,
    ) -> Result<Option<challenge_solution::Payload>, JoinError> {
        use crate::pb::teleport::join::v1::{
            BoundKeypairChallengeSolution, BoundKeypairRotationResponse,
        };
        Ok(match challenge {
            challenge::Payload::BoundKeypairChallenge(asked) => {
                let text = asked.challenge.as_bytes();
                let signed = crate::crypto::compact::sign(&self.answers, None, text)?;
                Some(challenge_solution::Payload::BoundKeypairChallengeSolution(
                    BoundKeypairChallengeSolution {
                        solution: signed.into_bytes(),
                    },
                ))
            }
            challenge::Payload::BoundKeypairRotationRequest(_) => {
                let public_key = self.key.public_ssh_line()?.into_bytes();
                Some(challenge_solution::Payload::BoundKeypairRotationResponse(
                    BoundKeypairRotationResponse { public_key },
                ))
            }
            _ => None,
        })
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_cannot_have_a_key_bound_that_it_has_not() {
    let token = Token::new("bound_keypair: {}");
    let [key, other] = [(); 2].map(|()| PrivateKey::generate(KeyAlgorithm::Ed25519).unwrap());
    let mut rogue = Rogue {
        key: key.clone(),
        answers: other,
        secret: token.secret(),
        state: Vec::new(),
    };
    let (verdict, seen) = token.judge(&mut rogue).await;
    denied(verdict, "failed to complete challenge");
    assert_eq!(seen.bound, None);
    rogue.answers = key;
    token.judge(&mut rogue).await.0.unwrap();
    rogue.secret = "guess".to_owned();
    denied(
        token.judge(&mut rogue).await.0,
        "a valid registration secret is required",
    );
}

#[tokio::test(start_paused = true)]
async fn a_replaced_key_has_to_be_another_one() {
    let key = PrivateKey::generate(KeyAlgorithm::Ed25519).unwrap();
    let line = key.public_ssh_line().unwrap();
    let token = Token::new(&format!(
        "bound_keypair: {{onboarding: {{initial_public_key: {line:?}}}, rotate_after: \
         \"2020-01-01T00:00:00Z\"}}"
    ));
    let mut rogue = Rogue {
        key: key.clone(),
        answers: key,
        secret: String::new(),
        state: Vec::new(),
    };
    denied(token.judge(&mut rogue).await.0, "may not be reused");
}

#[test]
fn sections_have_a_normal_form() {
    let recovery = json!({"limit": 1, "mode": "standard"});
    for section in [
        "{}",
        "bound_keypair:",
        "bound_keypair: {}",
        "bound_keypair: {recovery: {}}",
    ] {
        let expected = json!({SECTION: {"recovery": recovery}});
        assert_eq!(normal(section).unwrap(), expected, "{section}");
    }
    let full = "bound_keypair:\n  \
         onboarding: {registration_secret: s, must_register_before: \"2030-01-01T01:00:00+01:00\"}\n  \
         recovery: {limit: 7, mode: relaxed}\n  \
         rotate_after: \"2029-01-01T00:00:00.5Z\"\n";
    let stored = normal(full).unwrap();
    let expected = json!({SECTION: {
        "onboarding": {
            "registration_secret": "s",
            "must_register_before": "2030-01-01T00:00:00Z",
        },
        "recovery": {"limit": 7, "mode": "relaxed"},
        "rotate_after": "2029-01-01T00:00:00.5Z",
    }});
    assert_eq!(stored, expected);
    let spec = Spec::read(&stored).unwrap();
    assert_eq!((spec.limit, spec.mode), (7, Mode::Relaxed));
    assert!(spec.must_register_before.is_some() && spec.rotate_after.is_some());
}

#[test]
fn every_mistake_of_a_section_is_told() {
    for (section, text) in [
        ("{recovery: {limit: 0}}", "write 1 or more"),
        ("{recovery: {limit: -1}}", "write 1 or more"),
        ("{recovery: {limit: 4294967296}}", "write 1 or more"),
        ("{recovery: {mode: lax}}", "standard"),
        ("{rotate_after: soon}", "no point in time"),
        (
            "{onboarding: {must_register_before: 2030}}",
            "no point in time",
        ),
        (
            "{onboarding: {initial_public_key: ssh-dss AAAA}}",
            "tbot keypair create",
        ),
        ("{onboarding: {initial_key: x}}", "initial_key"),
        ("{recovery: {count: 1}}", "count"),
        ("5", "mapping"),
    ] {
        let lines = normal(&format!("bound_keypair: {section}")).unwrap_err();
        assert!(lines.contains(text), "{section}: {lines}");
    }
}

#[test]
fn a_token_that_is_written_again_keeps_its_bot() {
    let spec = normal("bound_keypair: {onboarding: {registration_secret: first}}").unwrap();
    let made = BoundKeypair.status(&spec, &Value::Null);
    assert_eq!(Status::read(&made).unwrap().registration_secret, "first");
    let other = normal("bound_keypair: {onboarding: {registration_secret: second}}").unwrap();
    let changed = BoundKeypair.status(&other, &made);
    assert_eq!(
        Status::read(&changed).unwrap().registration_secret,
        "second"
    );
    // One that the cluster made stays, until it is used.
    let none = normal("bound_keypair: {}").unwrap();
    let made = BoundKeypair.status(&none, &Value::Null);
    assert_eq!(BoundKeypair.status(&none, &made), made);
    let mut bound = Value::Null;
    let status = Status {
        bound_public_key: "key".to_owned(),
        bound_bot_instance_id: "instance".to_owned(),
        recovery_count: 3,
        ..Status::default()
    };
    status.write(&mut bound);
    for spec in [&spec, &none] {
        assert_eq!(BoundKeypair.status(spec, &bound), bound);
    }
}
