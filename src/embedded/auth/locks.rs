//! Locks: whoever one of them targets is refused everything.

use serde_json::{Value, json};

use super::refusal::Refusal;
use crate::embedded::instant::rfc3339;
use crate::embedded::store::{Put, Resource, Tx};
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
    /// The join token; empty if none is used.
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
            ("JoinToken", "/target/join_token", &[targets.join_token]),
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

/// Locks a bot's user because two parties hold one of its certificates.
pub(super) fn stolen(tx: &Tx<'_>, user: &str, now: SystemTime) -> Result<(), Refusal> {
    let message = format!(
        "The bot user {user:?} has been locked due to a certificate generation mismatch, possibly \
         indicating a stolen certificate."
    );
    let lock = Resource {
        kind: "lock".to_owned(),
        version: "v2".to_owned(),
        name: Uuid::new_v4().to_string(),
        spec: json!({
            "target": {"user": user},
            "message": message,
            "created_at": rfc3339(now),
            "created_by": "system",
        }),
        ..Resource::default()
    };
    tx.put(lock, &Put::Create)?;
    Ok(())
}
