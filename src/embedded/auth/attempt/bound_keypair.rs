//! What the cluster knows of a bound key, and what a join with it leaves behind: all of it in the
//! token's status, in the transaction that issues the certificates.

use std::time::Duration;

use serde_json::{Value, json};

use super::Attempt;
use crate::embedded::auth::locks::{self, Targets};
use crate::embedded::auth::{Refusal, instance};
use crate::embedded::ca::AuthorityType;
use crate::embedded::store::{Put, Resource, Tx};
use crate::join::bound_keypair::verify::{About, Bound, Kind, Status, issue_state};
use crate::join::verify::Seen;
use crate::pb::teleport::join::v1::BoundKeypairResult;

/// How long after an answer it may be given again. Agents ask again within seconds, or when they are
/// started again.
const AGAIN: Duration = Duration::from_mins(10);

/// What the verifier has to know beside the token.
#[derive(Debug, Default)]
pub(in crate::embedded::auth) struct Known {
    /// Public keys of the authority for join states.
    pub(in crate::embedded::auth) state_keys: Vec<Vec<u8>>,
    /// Why the token lets nobody in, or not the bot that is bound to it.
    pub(in crate::embedded::auth) lock: Option<Refusal>,
    /// The instance before the bound one, if the answer that would have told of the bound one was
    /// lost.
    pub(in crate::embedded::auth) lost: Option<String>,
}

impl Attempt {
    /// Looks up what the verifier has to know.
    ///
    /// # Errors
    /// The store failed.
    pub(in crate::embedded::auth) fn known(&self) -> Result<Known, Refusal> {
        let Some(token) = &self.token else {
            return Ok(Known::default());
        };
        let state_keys = self
            .state
            .authorities
            .trusted_jwt(AuthorityType::BoundKeypair);
        let bound = Status::read(&token.status).unwrap_or_default();
        let bound = bound.bound_bot_instance_id.as_str();
        self.state.store.transaction(|tx| {
            let targets = Targets {
                bot_instance: bound,
                join_token: &token.name,
                ..Targets::default()
            };
            Ok(Known {
                state_keys,
                lock: locks::check(tx, &targets).err(),
                lost: self.lost(tx, bound)?,
            })
        })
    }

    /// The instance before `bound`, if that has but one certificate, which is young and was made for
    /// the very key of this request: the bot asked, the cluster answered, and the answer never came,
    /// or was not stored. Who stole the bot's storage
    /// before that has the key too, but then both have the same certificate, and the generation of
    /// its next renewal tells.
    fn lost(&self, tx: &Tx<'_>, bound: &str) -> Result<Option<String>, Refusal> {
        if bound.is_empty() {
            return Ok(None);
        }
        let record = instance::find(tx, self.bot(), bound)?;
        let key = match self.request.public_tls_key.as_slice() {
            [] => &self.request.public_ssh_key,
            tls => tls,
        };
        let now = self.now();
        let only = |record: &Resource| {
            instance::last(record, key) == (1, true)
                && instance::last_at(record)
                    .is_some_and(|at| now.duration_since(at).unwrap_or_default() <= AGAIN)
                && instance::certified_until(record).is_some_and(|end| now < end)
        };
        Ok(record
            .filter(only)
            .map(|record| record.spec_text("/previous_instance_id").to_owned()))
    }

    /// The instance that the bot was before, if a recovery makes a new one.
    pub(super) fn previous(&self) -> Option<String> {
        let bound = self.seen.bound.as_ref()?;
        let before = &bound.status.bound_bot_instance_id;
        (bound.kind == Kind::Recovery).then(|| before.clone())
    }

    /// Writes what the join changes into the token, unless somebody else did so first, or the bot was
    /// locked meanwhile.
    pub(super) fn bind(
        tx: &Tx<'_>,
        mut token: Resource,
        bound: &Bound,
        instance: &str,
    ) -> Result<(), Refusal> {
        let before = Targets {
            bot_instance: &bound.status.bound_bot_instance_id,
            ..Targets::default()
        };
        locks::check(tx, &before)?;
        let status = bound_to(bound, instance);
        if Status::read(&token.status).as_ref() != Some(&status) {
            status.write(&mut token.status);
            let put = Put::Update {
                revision: token.revision.clone(),
            };
            tx.put(token, &put)?;
        }
        Ok(())
    }

    /// The refusal of a join whose token was changed while it proved itself: by the owner of the
    /// token, or by another bot that was faster.
    pub(super) fn overtaken(bound: &Bound) -> Refusal {
        let cause = "unexpected backend state";
        let refusal = match bound.kind {
            Kind::First => Refusal::denied(cause),
            Kind::Again | Kind::Renewal | Kind::Recovery => Refusal::unavailable(cause),
        };
        refusal.context("committing updated token state, please try again")
    }

    /// What the bot gets beside its certificates.
    pub(super) fn result(&self, instance: &str) -> Result<Option<BoundKeypairResult>, Refusal> {
        let Some(bound) = &self.seen.bound else {
            return Ok(None);
        };
        let status = bound_to(bound, instance);
        let authority = self.state.authorities.get(AuthorityType::BoundKeypair);
        let key = authority.jwt_signer()?;
        let about = About {
            cluster: &self.state.name,
            bot: self.bot(),
        };
        let state = issue_state(key, about, &bound.spec, &status, self.now())
            .map_err(|error| Refusal::unknown(error.to_string()))?;
        Ok(Some(BoundKeypairResult {
            join_state: state.into_bytes(),
            public_key: status.bound_public_key.into_bytes(),
        }))
    }

    /// Locks the token if its key must be in two hands.
    ///
    /// # Errors
    /// The store failed.
    pub(in crate::embedded::auth) fn lock_if_copied(&self) -> Result<(), Refusal> {
        let Seen { copied, .. } = &self.seen;
        let Some(why) = copied else {
            return Ok(());
        };
        let token = &self.request.token;
        self.state.store.transaction(|tx| {
            let why = format!("a client failed to verify its join state ({why})");
            locks::copied(tx, token, self.bot(), &why, self.now())
        })?;
        self.emit_key(
            "join_state_verification_failed",
            "TBK003W",
            &json!({"success": false, "error": why}),
        );
        Ok(())
    }

    /// Tells the audit log what became of the key.
    pub(super) fn tell_bound(&self) {
        let Some(bound) = &self.seen.bound else {
            return;
        };
        if bound.kind != Kind::Renewal {
            let mut what = json!({
                "success": true,
                "public_key": bound.status.bound_public_key,
                "recovery_count": bound.status.recovery_count,
                "recovery_mode": bound.spec.mode.name(),
            });
            if let (Kind::Again, Some(what)) = (bound.kind, what.as_object_mut()) {
                what.insert("repeated".to_owned(), json!(true));
            }
            self.emit_key("recovery", "TBK001I", &what);
        }
        if let Some(replaced) = &bound.replaced {
            let what = json!({
                "success": true,
                "previous_public_key": replaced,
                "new_public_key": bound.status.bound_public_key,
            });
            self.emit_key("rotation", "TBK002I", &what);
        }
    }

    fn emit_key(&self, what: &str, code: &str, more: &Value) {
        let mut event = json!({
            "event": format!("join_token.bound_keypair.{what}"),
            "code": code,
            "token_name": self.request.token,
            "bot_name": self.bot(),
            "addr.remote": self.caller.addr.ip().to_string(),
        });
        if let (Some(event), Some(more)) = (event.as_object_mut(), more.as_object()) {
            event.extend(more.clone());
        }
        self.state.audit.emit(event);
    }
}

/// The status of a token whose bot is `instance` now.
fn bound_to(bound: &Bound, instance: &str) -> Status {
    Status {
        bound_bot_instance_id: instance.to_owned(),
        ..bound.status.clone()
    }
}
