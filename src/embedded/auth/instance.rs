//! Bot instances: a record for each joined bot, and the generation counter that notices when two
//! parties hold one certificate.

use std::time::{Duration, SystemTime};

use base64::Engine as _;
use serde_json::{Value, json};

use crate::clock::parse_rfc3339;
use crate::embedded::instant::rfc3339;
use crate::embedded::store::{Put, Resource, Tx};
use crate::refusal::Refusal;

/// The kind under which instances are stored.
const KIND: &str = "bot_instance";
/// How many authentications and heartbeats a record keeps besides the first.
const KEPT: usize = 10;
/// How long a record outlives the certificate.
const GRACE: Duration = Duration::from_mins(5);
/// The label of a bot's user with the highest generation of a renewable certificate.
const GENERATION_LABEL: &str = "teleport.internal/bot-generation";

/// What a caller's certificate says about its instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Presented {
    /// The instance, a UUID.
    pub(super) id: String,
    /// Its generation; 0 on certificates of outputs.
    pub(super) generation: u32,
}

/// One successful authentication of an instance.
#[derive(Debug, Clone)]
pub(super) struct Authentication {
    /// The join method.
    pub(super) method: String,
    /// The token's name in a form that may be shown.
    pub(super) token: String,
    /// The public key, exactly as it was sent.
    pub(super) public_key: Vec<u8>,
    /// What was proved: the method's attributes under the names of the event.
    pub(super) metadata: Value,
    /// What was proved, as it goes into certificates.
    pub(super) join_attributes: Value,
    /// End of the certificate that is issued.
    pub(super) expires: SystemTime,
    /// The instance that the bot was before, if a new one follows it.
    pub(super) previous: Option<String>,
}

/// What follows from a presented generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Decision {
    /// A new instance, beginning with this generation.
    New(u32),
    /// The same instance with this generation.
    Next(u32),
    /// The answer to this very request was issued before and got lost: the same again.
    Again(u32),
    /// Somebody else has used the certificate: lock the bot.
    Stolen {
        /// The generation that was expected.
        stored: u32,
        /// Whether the instance itself is known.
        known: bool,
    },
    /// A certificate without a generation cannot stand for an instance.
    Missing,
}

/// Whom a wrong generation locks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Enforced {
    /// Nobody: the bot has proved anew who it is, with what nobody else has.
    No,
    /// The token: what the bot proved itself with (`bound_keypair`) can be copied.
    Token,
    /// The bot's user: the certificate itself is the proof (`token`).
    User,
}

/// Decides by the generation: `stored` is that of the record and the key it was issued for,
/// `label` that of the bot's user.
///
/// Methods that prove anew each time who they are do not enforce it, a wrong number is no theft
/// there. One that is one behind may come
/// with the very key that got the current number: the agent asked, the cluster answered, and the
/// answer was lost. Who stole the certificate does not have that key and would gain nothing.
pub(super) fn decide(
    presented: Option<u32>,
    stored: Option<(u32, bool)>,
    label: u32,
    enforced: Enforced,
) -> Decision {
    let renewable = enforced == Enforced::User;
    match (presented, stored) {
        // What was to be repeated is gone: its record was removed meanwhile.
        (Some(0), None) if enforced == Enforced::Token => Decision::Missing,
        (None, _) | (Some(0), None) => Decision::New(1),
        (Some(presented), Some((stored, true))) if presented.checked_add(1) == Some(stored) => {
            Decision::Again(stored)
        }
        (Some(0), Some(_)) => Decision::Missing,
        (Some(presented), Some((stored, _))) if presented == stored => Decision::Next(stored + 1),
        (Some(_), Some((stored, _))) if enforced != Enforced::No => Decision::Stolen {
            stored,
            known: true,
        },
        (Some(_), Some((stored, _))) => Decision::Next(stored + 1),
        (Some(presented), None) if renewable && presented == label => Decision::New(presented + 1),
        (Some(_), None) if renewable => Decision::Stolen {
            stored: label,
            known: false,
        },
        (Some(_), None) => Decision::New(1),
    }
}

/// The record of an instance, if it belongs to this bot.
pub(super) fn find(tx: &Tx<'_>, bot: &str, id: &str) -> Result<Option<Resource>, Refusal> {
    let found = tx.get(KIND, id)?;
    Ok(found.filter(|record| record.spec_text("/bot_name") == bot))
}

/// The generation of the record's last authentication, and whether it was made with this key.
pub(super) fn last(record: &Resource, public_key: &[u8]) -> (u32, bool) {
    let latest = record.status.pointer("/latest_authentications");
    let latest = latest.and_then(Value::as_array).and_then(|all| all.last());
    let generation = latest
        .and_then(|entry| entry.get("generation"))
        .and_then(Value::as_u64)
        .and_then(|number| u32::try_from(number).ok())
        .unwrap_or_default();
    let key = latest
        .and_then(|entry| entry.get("public_key"))
        .and_then(Value::as_str);
    (generation, key == Some(encode(public_key).as_str()))
}

/// When the record's last authentication was.
pub(super) fn last_at(record: &Resource) -> Option<SystemTime> {
    let latest = record.status.pointer("/latest_authentications");
    let latest = latest.and_then(Value::as_array).and_then(|all| all.last());
    let at = latest.and_then(|entry| entry.get("authenticated_at"));
    parse_rfc3339(at.and_then(Value::as_str)?)
}

/// The end of the instance's certificate that ends last.
pub(super) fn certified_until(record: &Resource) -> Option<SystemTime> {
    record.expires?.checked_sub(GRACE)
}

/// The authentication that a renewal continues: method, token and attributes of the last one.
pub(super) fn inherited(
    record: &Resource,
    public_key: Vec<u8>,
    expires: SystemTime,
) -> Authentication {
    let latest = record.status.pointer("/latest_authentications");
    let latest = latest.and_then(Value::as_array).and_then(|all| all.last());
    let member = |key: &str| latest.and_then(|entry| entry.get(key)).cloned();
    let text = |key: &str| match member(key) {
        Some(Value::String(text)) => text,
        _ => String::new(),
    };
    Authentication {
        method: text("join_method"),
        token: text("join_token"),
        public_key,
        metadata: member("metadata").unwrap_or_default(),
        join_attributes: member("join_attrs").unwrap_or_default(),
        expires,
        previous: None,
    }
}

/// Writes an authentication into the instance's record, making the record if there is none.
pub(super) fn record(
    tx: &Tx<'_>,
    bot: &str,
    id: &str,
    generation: u32,
    by: &Authentication,
    now: SystemTime,
) -> Result<(), Refusal> {
    let entry = json!({
        "authenticated_at": rfc3339(now),
        "join_method": by.method,
        "join_token": by.token,
        "metadata": by.metadata,
        "join_attrs": by.join_attributes,
        "generation": generation,
        "public_key": encode(&by.public_key),
    });
    let existing = find(tx, bot, id)?;
    let mut record = existing.unwrap_or_else(|| {
        let mut spec = json!({"bot_name": bot, "instance_id": id});
        if let (Some(previous), Some(spec)) = (&by.previous, spec.as_object_mut()) {
            spec.insert("previous_instance_id".to_owned(), json!(previous));
        }
        Resource {
            kind: KIND.to_owned(),
            version: "v1".to_owned(),
            name: id.to_owned(),
            spec,
            status: json!({"initial_authentication": entry}),
            ..Resource::default()
        }
    });
    push(&mut record.status, "latest_authentications", entry);
    outlive(&mut record, by.expires);
    tx.put(record, &Put::Upsert)?;
    Ok(())
}

/// Keeps an instance's record for the life of a certificate that repeats the last answer: it may
/// end later than the one that was lost.
pub(super) fn prolong(tx: &Tx<'_>, mut record: Resource, end: SystemTime) -> Result<(), Refusal> {
    outlive(&mut record, end);
    tx.put(record, &Put::Upsert)?;
    Ok(())
}

fn outlive(record: &mut Resource, certificate: SystemTime) {
    let until = certificate + GRACE;
    record.expires = Some(record.expires.map_or(until, |known| known.max(until)));
}

/// Keeps a heartbeat: the first, and the last few.
pub(super) fn heartbeat(
    tx: &Tx<'_>,
    bot: &str,
    id: &str,
    heartbeat: Value,
    health: Value,
) -> Result<(), Refusal> {
    let mut record = find(tx, bot, id)?
        .ok_or_else(|| Refusal::not_found(format!("bot_instance {id:?} is not found")))?;
    if let Some(status) = record.status.as_object_mut() {
        status
            .entry("initial_heartbeat")
            .or_insert_with(|| heartbeat.clone());
        status.insert("service_health".to_owned(), health);
    }
    push(&mut record.status, "latest_heartbeats", heartbeat);
    let put = Put::Update {
        revision: record.revision.clone(),
    };
    tx.put(record, &put)?;
    Ok(())
}

/// The generation in the label of a bot's user.
pub(super) fn label(user: &Resource) -> u32 {
    let label = user.labels.get(GENERATION_LABEL);
    label
        .and_then(|number| number.parse().ok())
        .unwrap_or_default()
}

/// Raises that label, never lowers it.
pub(super) fn raise_label(tx: &Tx<'_>, mut user: Resource, generation: u32) -> Result<(), Refusal> {
    if generation > label(&user) {
        user.labels
            .insert(GENERATION_LABEL.to_owned(), generation.to_string());
        tx.put(user, &Put::Upsert)?;
    }
    Ok(())
}

fn push(status: &mut Value, key: &str, entry: Value) {
    let Some(status) = status.as_object_mut() else {
        return;
    };
    let list = status.entry(key).or_insert_with(|| json!([]));
    if let Some(list) = list.as_array_mut() {
        list.push(entry);
        let surplus = list.len().saturating_sub(KEPT);
        list.drain(..surplus);
    }
}

fn encode(bytes: &[u8]) -> String {
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generations_decide() {
        let stolen = |stored, known| Decision::Stolen { stored, known };
        let (no, token, user) = (Enforced::No, Enforced::Token, Enforced::User);
        let cases = [
            // presented, stored, label, enforced
            (None, None, 0, user, Decision::New(1)),
            (None, Some((4, false)), 4, user, Decision::New(1)),
            (Some(4), Some((4, false)), 4, user, Decision::Next(5)),
            (Some(4), Some((4, false)), 0, no, Decision::Next(5)),
            (Some(4), Some((4, false)), 0, token, Decision::Next(5)),
            (Some(3), Some((4, false)), 4, user, stolen(4, true)),
            (Some(3), Some((4, false)), 0, token, stolen(4, true)),
            (Some(5), Some((4, false)), 4, user, stolen(4, true)),
            (Some(3), Some((4, true)), 4, user, Decision::Again(4)),
            (Some(3), Some((4, true)), 0, token, Decision::Again(4)),
            (Some(2), Some((4, true)), 4, user, stolen(4, true)),
            (Some(3), Some((4, false)), 0, no, Decision::Next(5)),
            (Some(0), Some((4, false)), 4, user, Decision::Missing),
            (Some(0), Some((4, false)), 4, no, Decision::Missing),
            (Some(0), Some((1, true)), 0, token, Decision::Again(1)),
            (Some(0), Some((1, false)), 0, token, Decision::Missing),
            (Some(4), None, 4, user, Decision::New(5)),
            (Some(3), None, 4, user, stolen(4, false)),
            (Some(3), None, 0, no, Decision::New(1)),
            (Some(3), None, 0, token, Decision::New(1)),
            (Some(0), None, 0, token, Decision::Missing),
            (None, None, 0, token, Decision::New(1)),
            (Some(0), None, 0, user, Decision::New(1)),
        ];
        for (presented, stored, label, enforced, expected) in cases {
            assert_eq!(
                decide(presented, stored, label, enforced),
                expected,
                "{presented:?} {stored:?} {label} {enforced:?}"
            );
        }
    }

    #[test]
    fn lists_keep_the_last_ten() {
        let mut status = json!({});
        for number in 0..25 {
            push(&mut status, "list", number.into());
        }
        let kept: Vec<u64> = (15..25).collect();
        assert_eq!(status, json!({"list": kept}));
    }
}
