//! `kind: bot`: a name, the roles and traits its outputs may have, and how long its sessions last.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Resource, set};
use crate::yaml::{self, Fields};

/// Sessions of a bot that says nothing else (upstream `DefaultBotMaxSessionTTL`).
const DEFAULT_TTL: Duration = Duration::from_hours(12);
/// The longest session a bot may ask for, as upstream documents it.
const LONGEST_TTL: Duration = Duration::from_hours(168);

/// The user and the role of the bot `name`: `bot-<name>`, with spaces replaced.
#[must_use]
pub fn user_name(name: &str) -> String {
    format!("bot-{}", name.replace(' ', "-"))
}

pub(super) fn check(fields: &mut Fields<'_>, resource: &mut Resource) {
    let roles = fields.strings("roles").unwrap_or_default();
    if roles.iter().any(|role| role.trim().is_empty()) {
        fields.error(
            "roles",
            "a role has no name",
            Some("remove the empty entry"),
        );
    }
    set(&mut resource.spec, "roles", roles);
    let mut traits = Vec::new();
    for mut entry in fields.sections("traits").unwrap_or_default() {
        let name = entry.required("name").unwrap_or_default();
        let values = entry.strings("values").unwrap_or_default();
        traits.push(json!({"name": name, "values": values}));
        entry.finish();
    }
    if !traits.is_empty() {
        set(&mut resource.spec, "traits", traits);
    }
    let ttl = ttl(fields).unwrap_or(DEFAULT_TTL);
    if ttl > LONGEST_TTL || ttl.is_zero() {
        fields.error(
            "max_session_ttl",
            format!("{} is not between 1s and 168h", yaml::duration::format(ttl)),
            Some("leave it out for 12h"),
        );
    }
    set(
        &mut resource.spec,
        "max_session_ttl",
        json!({"seconds": ttl.as_secs()}),
    );
    let user = user_name(&resource.name);
    resource.status = json!({"role_name": user, "user_name": user});
}

/// A duration as files write it (`12h`, `43200s`) or as a cluster shows it (`seconds: 43200`).
fn ttl(fields: &mut Fields<'_>) -> Option<Duration> {
    let node = fields.node("max_session_ttl")?;
    if !matches!(node.value, yaml::Value::Mapping(_)) {
        return fields.duration("max_session_ttl");
    }
    let mut parts = fields.section("max_session_ttl")?;
    let seconds = parts.integer("seconds").unwrap_or_default();
    let nanos = parts.integer("nanos").unwrap_or_default();
    parts.finish();
    let seconds = u64::try_from(seconds).unwrap_or_default();
    Some(Duration::new(
        seconds,
        u32::try_from(nanos).unwrap_or_default(),
    ))
}

/// The role that comes with `bot`: it may take on the bot's roles and read authorities.
pub(super) fn role(bot: &Resource) -> Resource {
    let ttl = bot
        .spec
        .pointer("/max_session_ttl/seconds")
        .and_then(Value::as_u64);
    let ttl = Duration::from_secs(ttl.unwrap_or_default());
    // A bot without roles could do nothing at all, and the guides begin with one. On a single node,
    // whose administrator makes both, it may issue workload identities (docs/adr/0007).
    let roles = match bot.spec_texts("/roles") {
        none if none.is_empty() => vec![super::role::PRESET.to_owned()],
        roles => roles,
    };
    Resource {
        kind: "role".to_owned(),
        version: "v8".to_owned(),
        name: user_name(&bot.name),
        description: format!("Automatically generated role for bot {}", bot.name),
        labels: BTreeMap::from([("teleport.internal/bot".to_owned(), bot.name.clone())]),
        spec: json!({
            "allow": {
                "impersonate": {"roles": roles},
                "rules": [{"resources": ["cert_authority"], "verbs": ["readnosecrets"]}],
            },
            "deny": {},
            "options": super::role::options(&yaml::duration::format(ttl)),
        }),
        ..Resource::default()
    }
}

/// The user that comes with `bot`. `existing` is the one that is there already: its generation
/// and its maker stay.
pub(super) fn user(bot: &Resource, existing: Option<Resource>, now: &str, maker: &str) -> Resource {
    let name = user_name(&bot.name);
    let mut traits = BTreeMap::new();
    let entries = bot.spec.get("traits").and_then(Value::as_array);
    for (index, entry) in entries.into_iter().flatten().enumerate() {
        let key = entry
            .get("name")
            .and_then(Value::as_str)
            .unwrap_or_default();
        let values = bot.spec_texts(&format!("/traits/{index}/values"));
        traits.insert(key.to_owned(), values);
    }
    let mut user = existing.unwrap_or_else(|| Resource {
        kind: "user".to_owned(),
        version: "v2".to_owned(),
        name: name.clone(),
        labels: BTreeMap::from([
            ("teleport.internal/bot".to_owned(), bot.name.clone()),
            (
                "teleport.internal/bot-generation".to_owned(),
                "0".to_owned(),
            ),
        ]),
        spec: json!({"created_by": {"time": now, "user": {"name": maker}}}),
        ..Resource::default()
    });
    set(&mut user.spec, "roles", vec![name]);
    if traits.is_empty() {
        if let Value::Object(members) = &mut user.spec {
            members.remove("traits");
        }
    } else {
        set(&mut user.spec, "traits", json!(traits));
    }
    user
}
