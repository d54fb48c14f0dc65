//! The verifying half of join method `bound_keypair`: the key that a token is bound to is challenged at
//! each join, and the join state of the last one is wanted back.
//!
//! [`decide`] says what a bot has to show, [`challenge`] has its key proved, [`state`] is the document
//! by which a copy of the key shows, [`record`] is how a token keeps all that. What a join changes in
//! the token is handed on in [`Bound`], for the transaction that issues its certificates.

mod challenge;
mod decide;
mod record;
mod state;

use std::time::{SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use serde_json::{Map, Value, json};

pub(crate) use self::decide::Kind;
pub(crate) use self::record::{Spec, Status};
pub(crate) use self::state::{About, issue as issue_state};

use self::challenge::Challenge;
use self::decide::{First, Plan, Presented, after, plan};
use self::record::{Mode, SECTION};
use crate::clock::{parse_rfc3339, rfc3339_nanos};
use crate::crypto::{random, ssh};
use crate::join::verify::{Carrier, Dialogue, Joining, Seen, Verifier, set};
use crate::pb::teleport::join::v1::{
    BoundKeypairChallenge, BoundKeypairRotationRequest, challenge::Payload as Ask,
    challenge_solution::Payload as Answer, join_request,
};
use crate::refusal::Refusal;
use crate::yaml::Fields;

/// The longest public key that a bot may answer with, in bytes.
const MAX_KEY: usize = 8 * 1024;

/// Join method `bound_keypair`.
#[derive(Debug)]
pub struct BoundKeypair;

/// What a join changes in its token, once certificates are issued for it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Bound {
    /// How it is counted.
    pub(crate) kind: Kind,
    /// What the token says of the method.
    pub(crate) spec: Spec,
    /// What it says of the key from now on. The instance in it is the one before.
    pub(crate) status: Status,
    /// The key before, if it was replaced.
    pub(crate) replaced: Option<String>,
}

#[async_trait]
impl Verifier for BoundKeypair {
    fn name(&self) -> &'static str {
        SECTION
    }

    fn carrier(&self) -> Carrier {
        Carrier::BoundKeypair
    }

    fn read(&self, spec: &mut Fields<'_>, stored: &mut Value) {
        let mut section = json!({});
        match spec.section(SECTION) {
            Some(mut fields) => {
                read(&mut fields, &mut section);
                fields.finish();
            }
            None if spec.has(SECTION) => {}
            None => set(&mut section, "recovery", recovery(None)),
        }
        set(stored, SECTION, section);
    }

    fn status(&self, spec: &Value, before: &Value) -> Value {
        let mut status = Status::read(before).unwrap_or_default();
        let onboarding = |key: &str| {
            let path = format!("/{SECTION}/onboarding/{key}");
            spec.pointer(&path).and_then(Value::as_str)
        };
        if !status.bound_public_key.is_empty() || onboarding("initial_public_key").is_some() {
            status.registration_secret.clear();
        } else if let Some(secret) = onboarding("registration_secret") {
            secret.clone_into(&mut status.registration_secret);
        } else if status.registration_secret.is_empty() {
            status.registration_secret = hex::encode(random::<16>());
        }
        let mut written = before.clone();
        status.write(&mut written);
        written
    }

    async fn verify(
        &self,
        joining: &Joining<'_>,
        dialogue: &mut dyn Dialogue,
        seen: &mut Seen,
    ) -> Result<(), Refusal> {
        let join_request::Payload::BoundKeypairInit(init) = joining.opening else {
            return Err(Refusal::bad_parameter("missing parameter Init"));
        };
        let damaged =
            || Refusal::bad_parameter("bad backend state, please recreate the join token");
        let spec = Spec::read(joining.spec).ok_or_else(damaged)?;
        let status = Status::read(joining.status).ok_or_else(damaged)?;
        let presented = Presented {
            secret: &init.initial_join_secret,
            instance: joining.instance,
            lost: joining.lost,
        };
        let plan = plan(&spec, &status, presented, joining.now)?;
        let mut exchange = Exchange { joining, dialogue };
        let first = exchange.first(&plan).await?;
        seen.metadata = json!({
            "public_key": first,
            "recovery_count": status.recovery_count,
            "recovery_mode": spec.mode.name(),
        });
        // Only who has the key hears what else is wrong, and may cause a lock.
        if let Some(refusal) = plan.then.clone() {
            return Err(refusal);
        }
        if let Some(lock) = joining.lock {
            return Err(lock.clone());
        }
        if !plan.states.is_empty() {
            check_state(joining, &init.previous_join_state, &plan.states, seen)?;
        }
        let instance = joining.instance.unwrap_or_default();
        if plan.kind == Kind::Renewal && instance != status.bound_bot_instance_id {
            return Err(Refusal::denied("bot instance mismatch"));
        }
        // A key that was made just now is as new as the token may want it.
        let (key, replaced) = if plan.rotate && plan.first != First::NewKey {
            (exchange.other_key(&first).await?, Some(first))
        } else {
            (first, None)
        };
        let status = after(&status, plan.kind, &key, plan.rotate, joining.now);
        let mut attributes = Map::new();
        attributes.insert("public_key".to_owned(), json!(key));
        attributes.insert("recovery_mode".to_owned(), json!(spec.mode.name()));
        attributes.insert("recovery_count".to_owned(), json!(status.recovery_count));
        seen.metadata = Value::Object(attributes.clone());
        seen.attributes = Some(attributes);
        seen.bound = Some(Bound {
            kind: plan.kind,
            spec,
            status,
            replaced,
        });
        Ok(())
    }
}

/// Checks that the join state goes with one of `statuses`. A wrong one means that the key is in two
/// hands.
fn check_state(
    joining: &Joining<'_>,
    document: &[u8],
    statuses: &[Status],
    seen: &mut Seen,
) -> Result<(), Refusal> {
    if document.is_empty() {
        return Err(Refusal::denied(
            "previous join state is required but was not provided",
        ));
    }
    let about = About {
        cluster: joining.cluster,
        bot: joining.bot,
    };
    for status in statuses {
        match state::check(joining.state_keys, document, about, status, joining.now) {
            Ok(()) => {
                seen.copied = None;
                return Ok(());
            }
            Err(error) => seen.copied = Some(error.to_string()),
        }
    }
    Err(Refusal::denied("join state verification failed"))
}

/// The questions of one join.
struct Exchange<'a> {
    joining: &'a Joining<'a>,
    dialogue: &'a mut dyn Dialogue,
}

impl Exchange<'_> {
    /// The key that the bot has proved to have.
    async fn first(&mut self, plan: &Plan<'_>) -> Result<String, Refusal> {
        match plan.first {
            First::Key(key) => {
                self.challenge(key).await?;
                Ok(key.to_owned())
            }
            First::NewKey => self.new_key().await,
        }
    }

    /// A key of the bot's that is not `key`.
    async fn other_key(&mut self, key: &str) -> Result<String, Refusal> {
        let other = self.new_key().await?;
        let spki = |line: &str| ssh::spki_of_public_line(line).ok();
        if spki(&other) == spki(key) {
            return Err(Refusal::bad_parameter(
                "public key may not be reused after rotation",
            ));
        }
        Ok(other)
    }

    /// A key that the bot makes, and proves to have.
    async fn new_key(&mut self) -> Result<String, Refusal> {
        let suite = self.joining.suite.name().to_owned();
        let question = Ask::BoundKeypairRotationRequest(BoundKeypairRotationRequest {
            signature_algorithm_suite: suite,
        });
        let Answer::BoundKeypairRotationResponse(made) = self.dialogue.ask(question).await? else {
            return Err(Refusal::bad_parameter(
                "the client did not send a new public key",
            ));
        };
        let unreadable = || Refusal::bad_parameter("cannot read the new public key");
        let line = Some(made.public_key).filter(|key| key.len() <= MAX_KEY);
        let line = line.and_then(|key| String::from_utf8(key).ok());
        let spki = line.and_then(|line| ssh::spki_of_public_line(&line).ok());
        let line = spki.and_then(|spki| ssh::public_line_of_spki(&spki).ok());
        let line = line.ok_or_else(unreadable)?.trim().to_owned();
        self.challenge(&line).await?;
        Ok(line)
    }

    /// Has the bot prove that it has the private half of a key (an `authorized_keys` line).
    async fn challenge(&mut self, key: &str) -> Result<(), Refusal> {
        let spki = ssh::spki_of_public_line(key)
            .map_err(|_source| Refusal::bad_parameter("cannot read the bound public key"))?;
        let challenge = Challenge::new(self.joining.cluster, spki, self.joining.now);
        let question = Ask::BoundKeypairChallenge(BoundKeypairChallenge {
            public_key: key.as_bytes().to_vec(),
            challenge: challenge.text(),
        });
        let Answer::BoundKeypairChallengeSolution(answer) = self.dialogue.ask(question).await?
        else {
            return Err(Refusal::bad_parameter(
                "the client did not send the solution of the challenge",
            ));
        };
        // The stream it came by lives for a minute, as the challenge does.
        challenge
            .check(&answer.solution, self.joining.now)
            .map_err(|error| {
                Refusal::denied(error.to_string()).context("failed to complete challenge")
            })
    }
}

/// Reads the section of a token resource.
fn read(fields: &mut Fields<'_>, stored: &mut Value) {
    let mut kept = json!({});
    if let Some(mut onboarding) = fields.section("onboarding") {
        if let Some(key) = onboarding.string("initial_public_key") {
            if ssh::spki_of_public_line(&key).is_err() {
                onboarding.error(
                    "initial_public_key",
                    "this is no public key that a bot can join with",
                    Some(
                        "paste the line that `tbot keypair create` prints: `ssh-ed25519 AAAA…`, or \
                         one with an RSA or P-256 key",
                    ),
                );
            }
            set(&mut kept, "initial_public_key", key.trim());
        }
        if let Some(secret) = onboarding.secret_string("registration_secret") {
            set(&mut kept, "registration_secret", secret.expose().as_str());
        }
        time(&mut onboarding, "must_register_before", &mut kept);
        onboarding.finish();
    }
    if kept.as_object().is_some_and(|kept| !kept.is_empty()) {
        set(stored, "onboarding", kept);
    }
    let kept = match fields.section("recovery") {
        Some(mut section) => {
            let kept = recovery(Some(&mut section));
            section.finish();
            kept
        }
        None => recovery(None),
    };
    set(stored, "recovery", kept);
    time(fields, "rotate_after", stored);
}

/// Reads `recovery`; its defaults are upstream's.
fn recovery(section: Option<&mut Fields<'_>>) -> Value {
    let (mut limit, mut mode) = (1, Mode::Standard.name().to_owned());
    if let Some(section) = section {
        if let Some(number) = section.integer("limit") {
            if u32::try_from(number).is_ok_and(|number| number > 0) {
                limit = number;
            } else {
                section.error(
                    "limit",
                    format!("{number} is no number of recoveries"),
                    Some("write 1 or more: the first join counts as one"),
                );
            }
        }
        let names = Mode::ALL.map(Mode::name);
        mode = section.one_of("mode", &names).unwrap_or(mode);
    }
    json!({"limit": limit, "mode": mode})
}

/// Reads an RFC 3339 time.
fn time(fields: &mut Fields<'_>, key: &str, stored: &mut Value) {
    let Some(text) = fields.string(key) else {
        return;
    };
    match parse_rfc3339(&text) {
        Some(time) => set(stored, key, rfc3339_nanos(time)),
        None => fields.error(
            key,
            format!("{text:?} is no point in time"),
            Some("write RFC 3339, for example \"2030-01-01T00:00:00Z\""),
        ),
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests;
