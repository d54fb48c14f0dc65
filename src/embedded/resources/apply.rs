//! Writes resources and everything that follows from them, with an audit event for each.

use std::time::SystemTime;

use serde_json::{Value, json};

use super::{bot, role, set, token, view};
use crate::embedded::audit::Audit;
use crate::embedded::federation;
use crate::embedded::instant::rfc3339;
use crate::embedded::store::{Put, Resource, Store, StoreError, Tx};
use crate::join::verify;

/// The label that ties a user or a role to its bot.
const BOT_LABEL: &str = "teleport.internal/bot";
/// How events write "no expiry": Go's zero time.
const NEVER: &str = "0001-01-01T00:00:00Z";

/// What to do about resources that are there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Refuse them, except tokens, which `tctl create` always replaces.
    Create,
    /// Replace them (`create -f`).
    Force,
    /// Replace those that differ and leave the others alone, revision included; pass over those
    /// that have expired. For files that are loaded at every start.
    Ensure,
}

/// What happened to one resource.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Applied {
    /// The line that `tctl create` prints.
    pub message: String,
    /// Things that will surprise its maker later, for example a role that does not exist yet.
    pub notes: Vec<String>,
}

/// Why resources were not written, or not removed. Nothing was changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApplyError {
    /// The store failed, or the resource is not there.
    #[error(transparent)]
    Store(StoreError),
    /// It is there already.
    #[error("{kind} {name:?} already exists (use -f to replace it)")]
    Exists {
        /// The kind of the resource.
        kind: String,
        /// Its name.
        name: String,
    },
    /// The user or role of a bot can only be changed through the bot.
    #[error("{kind} {name:?} belongs to bot {bot:?} (change or remove the bot instead)")]
    Owned {
        /// The kind of the resource.
        kind: String,
        /// Its name.
        name: String,
        /// The bot.
        bot: String,
    },
}

impl From<StoreError> for ApplyError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Exists { kind, name } => Self::Exists { kind, name },
            other => Self::Store(other),
        }
    }
}

/// Writes all `resources` in one transaction: either every one is there afterwards, or nothing
/// has changed. `by` is who asked, for the audit log.
pub fn apply(
    store: &Store,
    audit: &Audit,
    resources: Vec<Resource>,
    mode: Mode,
    by: &str,
    now: SystemTime,
) -> Result<Vec<Applied>, ApplyError> {
    let mut run = Run {
        mode,
        by,
        at: now,
        now: rfc3339(now),
        events: Vec::new(),
    };
    let applied = store.transaction(|tx| {
        let mut applied = resources
            .into_iter()
            .map(|resource| run.one(tx, resource))
            .collect::<Result<Vec<_>, ApplyError>>()?;
        // Only now: a note about something that a later document of the same file makes is no
        // news.
        for (applied, resource) in &mut applied {
            if let Some(resource) = resource {
                applied.notes.extend(notes(tx, resource)?);
            }
        }
        Ok::<_, ApplyError>(applied)
    })?;
    // Right after the commit and before anything else that may fail.
    for event in run.events {
        audit.emit(event);
    }
    Ok(applied.into_iter().map(|(applied, _)| applied).collect())
}

/// Makes the resources that every cluster has, unless they are there.
pub fn seed(store: &Store, audit: &Audit, now: SystemTime) -> Result<(), ApplyError> {
    let preset = role::preset();
    if store.get(&preset.kind, &preset.name)?.is_none() {
        apply(store, audit, vec![preset], Mode::Create, "system", now)?;
    }
    Ok(())
}

/// Removes a resource and what belongs to it; returns the line that `tctl rm` prints.
pub fn remove(
    store: &Store,
    audit: &Audit,
    kind: &str,
    name: &str,
    by: &str,
) -> Result<String, ApplyError> {
    let (found, tokens) = store.transaction(|tx| {
        let Some(found) = tx.get(kind, name)? else {
            return Err(ApplyError::Store(StoreError::NotFound {
                kind: kind.to_owned(),
                name: name.to_owned(),
            }));
        };
        owned(tx, &found)?;
        tx.delete(kind, name)?;
        let mut tokens = 0;
        if kind == "bot" {
            let names_it = |token: &&Resource| token.spec_text("/bot_name") == name;
            tokens = tx.list("token")?.iter().filter(names_it).count();
            let user = bot::user_name(name);
            tx.delete("user", &user)?;
            tx.delete("role", &user)?;
            for instance in tx.list("bot_instance")? {
                if instance.spec_text("/bot_name") == name {
                    tx.delete("bot_instance", &instance.name)?;
                }
            }
        }
        Ok((found, tokens))
    })?;
    if let Some(event) = event(&found, Verb::Delete, by) {
        audit.emit(event);
    }
    let stay = match tokens {
        0 => "",
        _ => " (its tokens stay, but let nobody in: see `tbot cluster tokens ls`)",
    };
    Ok(format!("{} {name:?} has been deleted{stay}", title(kind)))
}

/// Where what stays of a used token says which bot instance it let in.
pub const SPENT_BY: &str = "/bot_instance_id";

/// What stays of a token that its bot has used up, so that a file with it does not bring it back.
/// Only a digest: the name was a secret.
pub fn spent(token: &str) -> Resource {
    Resource {
        kind: "spent_token".to_owned(),
        version: "v1".to_owned(),
        name: crate::crypto::sha256_hex(token.as_bytes()),
        ..Resource::default()
    }
}

struct Run<'a> {
    mode: Mode,
    by: &'a str,
    at: SystemTime,
    now: String,
    events: Vec<Value>,
}

impl Run<'_> {
    /// What was done, with the resource if it is there now.
    fn one(
        &mut self,
        tx: &Tx<'_>,
        mut resource: Resource,
    ) -> Result<(Applied, Option<Resource>), ApplyError> {
        let existing = tx.get(&resource.kind, &resource.name)?;
        if let Some(existing) = &existing {
            owned(tx, existing)?;
        }
        let known = existing.is_some();
        if resource.kind == "lock" {
            self.sign(&mut resource, existing.as_ref());
        }
        if let Some(existing) = existing
            .as_ref()
            .filter(|known| known.kind == federation::KIND)
        {
            // The last good bundle stays until another has come, and that is looked for at once.
            resource.status = existing.status.clone();
            if let Some(status) = resource.status.as_object_mut() {
                status.remove("next_sync_at");
            }
        }
        if resource.kind == "token" {
            resource.status = token::status(&resource, existing.as_ref());
        }
        // Messages of the files loaded at start go into the log; the name of a secret does not.
        let mut shown = resource.clone();
        if self.mode == Mode::Ensure && resource.kind == "token" {
            shown.name = token::safe_name(&resource.name, resource.spec_text("/join_method"));
            let ended = spent(&resource.name);
            if tx.get(&ended.kind, &ended.name)?.is_some() {
                let message = format!("token {:?} has been used up by its bot", shown.name);
                let notes = Vec::new();
                return Ok((Applied { message, notes }, None));
            }
        }
        if let Some(expires) = resource.expires.filter(|at| *at <= self.at) {
            let (kind, expires) = (&resource.kind, rfc3339(expires));
            let message = format!("{kind} {:?} is passed over", shown.name);
            let note = format!(
                "{kind} {:?} has expired ({expires}): remove it from the file, or write a later \
                 time",
                shown.name
            );
            let notes = vec![note];
            return Ok((Applied { message, notes }, None));
        }
        if self.mode == Mode::Ensure && existing.is_some_and(|existing| same(&existing, &resource))
        {
            let message = format!("{} {:?} is unchanged", resource.kind, shown.name);
            return Ok((
                Applied {
                    message,
                    notes: Vec::new(),
                },
                Some(resource),
            ));
        }
        let put = match self.mode {
            Mode::Create if resource.kind != "token" => Put::Create,
            Mode::Create | Mode::Force | Mode::Ensure => Put::Upsert,
        };
        let written = tx.put(resource, &put)?;
        if written.kind == "bot" {
            self.put_bot_parts(tx, &written)?;
        }
        let verb = if known { Verb::Update } else { Verb::Create };
        self.events.extend(event(&written, verb, self.by));
        let applied = Applied {
            message: message(&shown, known),
            notes: Vec::new(),
        };
        Ok((applied, Some(written)))
    }

    /// Says when and by whom a lock was made, unless its file does; one that is there already
    /// keeps what it says.
    fn sign(&self, lock: &mut Resource, existing: Option<&Resource>) {
        for (key, value) in [("created_at", self.now.as_str()), ("created_by", self.by)] {
            if lock.spec.get(key).is_none() {
                let known = existing.and_then(|known| known.spec.get(key));
                set(&mut lock.spec, key, known.cloned().unwrap_or(value.into()));
            }
        }
    }

    fn put_bot_parts(&self, tx: &Tx<'_>, bot: &Resource) -> Result<(), ApplyError> {
        let name = bot::user_name(&bot.name);
        for kind in ["user", "role"] {
            let stranger = tx
                .get(kind, &name)?
                .filter(|found| found.labels.get(BOT_LABEL) != Some(&bot.name));
            if let Some(stranger) = stranger {
                // `a b` and `a-b` have the same user, and a role file may have taken the name.
                let owner = stranger.labels.get(BOT_LABEL).cloned();
                return Err(match owner {
                    Some(bot) => ApplyError::Owned {
                        kind: kind.to_owned(),
                        name,
                        bot,
                    },
                    None => ApplyError::Exists {
                        kind: kind.to_owned(),
                        name,
                    },
                });
            }
        }
        let user = bot::user(bot, tx.get("user", &name)?, &self.now, self.by);
        tx.put(user, &Put::Upsert)?;
        tx.put(bot::role(bot), &Put::Upsert)?;
        Ok(())
    }
}

/// Refuses a user or role that lives and dies with a bot.
fn owned(tx: &Tx<'_>, resource: &Resource) -> Result<(), ApplyError> {
    let Some(bot) = resource.labels.get(BOT_LABEL) else {
        return Ok(());
    };
    if !["user", "role"].contains(&resource.kind.as_str()) || tx.get("bot", bot)?.is_none() {
        return Ok(());
    }
    Err(ApplyError::Owned {
        kind: resource.kind.clone(),
        name: resource.name.clone(),
        bot: bot.clone(),
    })
}

pub(super) fn same(old: &Resource, new: &Resource) -> bool {
    old.sub_kind == new.sub_kind
        && old.version == new.version
        && old.description == new.description
        && old.labels == new.labels
        && old.expires == new.expires
        && old.spec == new.spec
}

fn message(resource: &Resource, known: bool) -> String {
    let name = &resource.name;
    match resource.kind.as_str() {
        "token" => format!("provision_token {name:?} has been created"),
        kind @ ("role" | "app" | "db" | "kube_cluster" | "node") if known => {
            format!("{} {name:?} has been updated", title(kind))
        }
        kind => format!("{} {name:?} has been created", title(kind)),
    }
}

/// How `tctl` calls a resource of this kind.
fn title(kind: &str) -> &str {
    match kind {
        "app" => "application",
        "db" => "database",
        "kube_cluster" => "kubernetes cluster",
        "spiffe_federation" => "SPIFFE Federation",
        "workload_identity" => "Workload identity",
        kind => kind,
    }
}

fn notes(tx: &Tx<'_>, resource: &Resource) -> Result<Vec<String>, StoreError> {
    let mut notes = Vec::new();
    if resource.kind == "bot" {
        let roles = resource.spec_texts("/roles");
        if roles.is_empty() {
            notes.push(format!(
                "bot {:?} lists no roles: it may issue every workload identity (role {:?}); list \
                 roles to narrow that",
                resource.name,
                role::PRESET
            ));
        }
        for role in roles {
            if tx.get("role", &role)?.is_none() {
                notes.push(format!(
                    "there is no role {role:?} yet: outputs of bot {:?} fail until it is created",
                    resource.name
                ));
            }
        }
    }
    if resource.kind == federation::KIND
        && tx
            .get("cluster_name", "cluster_name")?
            .is_some_and(|own| own.spec_text("/cluster_name") == resource.name)
    {
        notes.push(format!(
            "{:?} is this cluster's own trust domain: agents pass the federation over",
            resource.name
        ));
    }
    if resource.kind == "user" {
        notes.push(format!(
            "nobody logs in to this cluster as user {:?}: give its roles to a bot",
            resource.name
        ));
    }
    if resource.kind == "token" {
        let bot = resource.spec_text("/bot_name");
        if tx.get("bot", bot)?.is_none() {
            notes.push(format!(
                "there is no bot {bot:?} yet: joining is refused until then"
            ));
        }
        let method = resource.spec_text("/join_method");
        if verify::method(method).is_none() {
            notes.push(format!(
                "this cluster does not verify the join method `{method}`: joining with this token \
                 is refused"
            ));
        }
    }
    Ok(notes)
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::embedded) enum Verb {
    Create,
    Update,
    Delete,
}

/// The audit event of a change; `None` for kinds whose owner's event says it all.
pub(in crate::embedded) fn event(resource: &Resource, verb: Verb, by: &str) -> Option<Value> {
    let [create, update, delete] = match resource.kind.as_str() {
        "bot" => [
            ("bot.create", "TB001I"),
            ("bot.update", "TB002I"),
            ("bot.delete", "TB003I"),
        ],
        "role" => [
            ("role.created", "T9000I"),
            ("role.updated", "T9002I"),
            ("role.deleted", "T9001I"),
        ],
        // A Teleport cluster has one event for both writes of a token and none for its end; the
        // name and code of the latter are this cluster's own.
        "token" => [
            ("join_token.create", "TJT00I"),
            ("join_token.create", "TJT00I"),
            ("join_token.delete", "TJT01I"),
        ],
        "lock" => [
            ("lock.created", "TLK00I"),
            ("lock.created", "TLK00I"),
            ("lock.deleted", "TLK01I"),
        ],
        "app" => [
            ("app.create", "TAP03I"),
            ("app.update", "TAP04I"),
            ("app.delete", "TAP05I"),
        ],
        "db" => [
            ("db.create", "TDB03I"),
            ("db.update", "TDB04I"),
            ("db.delete", "TDB05I"),
        ],
        "kube_cluster" => [
            ("kube.create", "T3010I"),
            ("kube.update", "T3011I"),
            ("kube.delete", "T3012I"),
        ],
        // A Teleport cluster cannot replace a federation; the third name is this cluster's own.
        "spiffe_federation" => [
            ("spiffe.federation.create", "TSPIFFE001I"),
            ("spiffe.federation.update", "TSPIFFE003I"),
            ("spiffe.federation.delete", "TSPIFFE002I"),
        ],
        "workload_identity" => [
            ("workload_identity.create", "WID001I"),
            ("workload_identity.update", "WID002I"),
            ("workload_identity.delete", "WID003I"),
        ],
        "workload_identity_x509_issuer_override" => [
            ("workload_identity_x509_issuer_override.create", "WID007I"),
            ("workload_identity_x509_issuer_override.create", "WID007I"),
            ("workload_identity_x509_issuer_override.delete", "WID008I"),
        ],
        "workload_identity_x509_revocation" => [
            ("workload_identity_x509_revocation.create", "WID004I"),
            ("workload_identity_x509_revocation.update", "WID005I"),
            ("workload_identity_x509_revocation.delete", "WID006I"),
        ],
        "bot_instance" if verb == Verb::Delete => [("bot_instance.delete", "TBI03I"); 3],
        _ => return None,
    };
    let (name, code) = match verb {
        Verb::Create => create,
        Verb::Update => update,
        Verb::Delete => delete,
    };
    let method = resource.spec_text("/join_method");
    let shown = match resource.kind.as_str() {
        "token" => token::safe_name(&resource.name, method),
        _ => resource.name.clone(),
    };
    let mut event = json!({
        "event": name,
        "code": code,
        "name": shown,
        "user": by,
        "user_kind": 3,
        "expires": resource.expires.map_or_else(|| NEVER.to_owned(), rfc3339),
    });
    let spec = |key| resource.spec.get(key).cloned().unwrap_or_default();
    match resource.kind.as_str() {
        "token" => {
            set(&mut event, "join_method", method);
            set(&mut event, "roles", spec("roles"));
            set(&mut event, "updated_by", by);
        }
        "lock" => {
            set(&mut event, "target", spec("target"));
            set(&mut event, "message", spec("message"));
        }
        "app" if verb != Verb::Delete => {
            set(&mut event, "app_labels", json!(resource.labels));
            set(&mut event, "app_uri", spec("uri"));
            set(&mut event, "app_public_addr", spec("public_addr"));
        }
        "db" if verb != Verb::Delete => {
            set(&mut event, "db_labels", json!(resource.labels));
            set(&mut event, "db_protocol", spec("protocol"));
            set(&mut event, "db_uri", spec("uri"));
        }
        "kube_cluster" if verb != Verb::Delete => {
            set(&mut event, "kube_labels", json!(resource.labels));
        }
        "workload_identity_x509_revocation" if verb != Verb::Delete => {
            set(&mut event, "reason", spec("reason"));
        }
        "workload_identity" if verb != Verb::Delete => {
            set(&mut event, "workload_identity_data", view(resource));
        }
        _ => {}
    }
    Some(event)
}
