//! Locks: whoever one of them targets is refused everything.

use serde_json::{Value, json};

use crate::embedded::instant::rfc3339;
use crate::embedded::resources::{SPENT_BY, spent};
use crate::embedded::store::{Put, Resource, Tx};
use crate::refusal::Refusal;
use std::time::SystemTime;
use uuid::Uuid;

/// What a lock may target among the facts of one call.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Targets<'a> {
    /// The user.
    pub(super) user: &'a str,
    /// Roles of the caller or of the certificate to be made.
    pub(super) roles: &'a [String],
    /// The bot instance; empty if there is none.
    pub(super) bot_instance: &'a str,
    /// The token that is used, or was used for the identity; empty if its name is not known any
    /// more. Then its record tells which instance it let in.
    pub(super) join_token: &'a str,
}

/// Refuses if a lock in force targets one of `targets`.
pub(super) fn check(tx: &Tx<'_>, targets: &Targets<'_>) -> Result<(), Refusal> {
    for lock in tx.list("lock")? {
        let text = |path: &str| {
            let found = lock.spec.pointer(path).and_then(Value::as_str);
            found.filter(|text| !text.is_empty())
        };
        let hit = [
            ("User", "/target/user", [targets.user].as_slice()),
            (
                "BotInstanceID",
                "/target/bot_instance_id",
                &[targets.bot_instance],
            ),
        ]
        .into_iter()
        .find_map(|(kind, path, values)| {
            text(path)
                .filter(|value| values.contains(value))
                .map(|value| (kind, value))
        })
        .or_else(|| {
            text("/target/role")
                .filter(|role| targets.roles.iter().any(|held| held == role))
                .map(|role| ("Role", role))
        });
        let hit = match (hit, text("/target/join_token")) {
            (None, Some(token)) if came_through(tx, token, targets)? => Some(("JoinToken", token)),
            (hit, _) => hit,
        };
        if let Some((kind, value)) = hit {
            let message = text("/message")
                .map(|message| format!(": {message}"))
                .unwrap_or_default();
            let text = format!("lock targeting {kind}:{value:?} is in force{message}");
            return Err(Refusal::denied(text));
        }
    }
    Ok(())
}

/// Whether `token` is the one that is used now, or the one that let this instance in.
fn came_through(tx: &Tx<'_>, token: &str, targets: &Targets<'_>) -> Result<bool, Refusal> {
    if token == targets.join_token {
        return Ok(true);
    }
    let used = spent(token);
    let used = tx.get(&used.kind, &used.name)?;
    Ok(!targets.bot_instance.is_empty()
        && used.is_some_and(|used| used.spec_text(SPENT_BY) == targets.bot_instance))
}

/// Locks a bot's user because two parties hold one of its certificates.
pub(super) fn stolen(tx: &Tx<'_>, user: &str, now: SystemTime) -> Result<(), Refusal> {
    let message = format!(
        "The bot user {user:?} has been locked due to a certificate generation mismatch, possibly \
         indicating a stolen certificate."
    );
    make(tx, &json!({"user": user}), &message, now)
}

/// Locks a token because what its bot proves itself with is in two hands: `why`, in a few words.
pub(super) fn copied(
    tx: &Tx<'_>,
    token: &str,
    bot: &str,
    why: &str,
    now: SystemTime,
) -> Result<(), Refusal> {
    let message = format!(
        "The join token {token:?} of bot {bot:?} has been locked after {why}, possibly indicating a \
         stolen keypair."
    );
    make(tx, &json!({"join_token": token}), &message, now)
}

fn make(tx: &Tx<'_>, target: &Value, message: &str, now: SystemTime) -> Result<(), Refusal> {
    let lock = Resource {
        kind: "lock".to_owned(),
        version: "v2".to_owned(),
        name: Uuid::new_v4().to_string(),
        spec: json!({
            "target": target,
            "message": message,
            "created_at": rfc3339(now),
            "created_by": "system",
        }),
        ..Resource::default()
    };
    tx.put(lock, &Put::Create)?;
    Ok(())
}
