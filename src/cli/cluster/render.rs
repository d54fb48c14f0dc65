//! How resources are printed: tables as `tctl` draws them, YAML, JSON.

use std::time::{Duration, SystemTime};

use serde_json::Value;

use crate::embedded::admin::Status;
use crate::embedded::instant::parse_rfc3339;
use crate::embedded::resources::safe_name;
use crate::yaml::{duration, emit};

/// The resource's name.
pub(super) fn name(resource: &Value) -> &str {
    text(resource, "/metadata/name")
}

fn text<'a>(resource: &'a Value, pointer: &str) -> &'a str {
    resource
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or_default()
}

/// The texts of a JSON list.
pub(super) fn texts(list: &Value) -> Vec<String> {
    let items = list.as_array().into_iter().flatten();
    items
        .filter_map(|item| item.as_str().map(str::to_owned))
        .collect()
}

/// Indented JSON with a newline at the end.
pub(super) fn json(value: &Value) -> String {
    format!("{value:#}\n")
}

/// YAML documents.
pub(super) fn yaml(documents: &[Value]) -> String {
    let documents: Vec<String> = documents
        .iter()
        .map(|value| emit::emit(&tree(value)))
        .collect();
    documents.join("---\n")
}

fn tree(value: &Value) -> emit::Tree {
    match value {
        Value::Null => emit::Tree::Null,
        Value::Bool(flag) => emit::Tree::Bool(*flag),
        Value::Number(number) => emit::Tree::Raw(number.to_string()),
        Value::String(text) => emit::Tree::text(text),
        Value::Array(items) => emit::Tree::List(items.iter().map(tree).collect()),
        Value::Object(members) => emit::Tree::Map(
            members
                .iter()
                .map(|(key, value)| (key.clone(), tree(value)))
                .collect(),
        ),
    }
}

/// Two columns without a head.
pub(super) fn pairs(rows: &[(String, String)]) -> String {
    let width = rows
        .iter()
        .map(|(key, _)| key.chars().count())
        .max()
        .unwrap_or_default();
    let mut text = String::new();
    for (key, value) in rows {
        let pad = width.saturating_sub(key.chars().count()) + 2;
        text.extend([
            key.as_str(),
            &" ".repeat(pad),
            value,
            "
",
        ]);
    }
    text
}

/// A table with a head.
fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let head: Vec<String> = head.iter().map(|&title| title.to_owned()).collect();
    let mut widths: Vec<usize> = head.iter().map(|title| title.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let rule: Vec<String> = widths.iter().map(|width| "-".repeat(*width)).collect();
    let mut text = String::new();
    for row in [&head, &rule].into_iter().chain(rows) {
        let cells = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        text += cells.collect::<Vec<_>>().join(" ").trim_end();
        text.push('\n');
    }
    text
}

/// Any resources: kind, name and labels.
pub(super) fn resources(resources: &[Value]) -> String {
    let rows: Vec<Vec<String>> = resources
        .iter()
        .map(|resource| {
            let kind = text(resource, "/kind").to_owned();
            vec![kind, name(resource).to_owned(), labels(resource)]
        })
        .collect();
    table(&["Kind", "Name", "Labels"], &rows)
}

fn labels(resource: &Value) -> String {
    let labels = resource
        .pointer("/metadata/labels")
        .and_then(Value::as_object);
    let labels = labels.into_iter().flatten();
    let pairs = labels.map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()));
    pairs.collect::<Vec<_>>().join(",")
}

/// Bots with their users and roles.
pub(super) fn bots(bots: &[Value]) -> String {
    if bots.is_empty() {
        return "No bots were found on this cluster.\n".to_owned();
    }
    let rows: Vec<Vec<String>> = bots
        .iter()
        .map(|bot| {
            let roles = bot.pointer("/spec/roles").map(texts).unwrap_or_default();
            let user = text(bot, "/status/user_name").to_owned();
            vec![name(bot).to_owned(), user, roles.join(",")]
        })
        .collect();
    table(&["Bot", "User", "Roles"], &rows)
}

/// Tokens, soonest expiry first. Names that are secrets are hidden unless asked for.
pub(super) fn tokens(tokens: &[Value], with_secrets: bool, now: SystemTime) -> String {
    if tokens.is_empty() {
        return "No active tokens found.\n".to_owned();
    }
    let mut sorted: Vec<&Value> = tokens.iter().collect();
    let expires = |token: &Value| parse_rfc3339(text(token, "/metadata/expires"));
    sorted.sort_by_key(|token| (expires(token).is_none(), expires(token)));
    let rows: Vec<Vec<String>> = sorted
        .into_iter()
        .map(|token| {
            let shown = if with_secrets {
                name(token).to_owned()
            } else {
                safe_name(name(token), text(token, "/spec/join_method"))
            };
            let expiry = expires(token).map_or_else(
                || "never".to_owned(),
                |at| {
                    let left = at.duration_since(now).unwrap_or_default().as_secs();
                    let left = duration::format(Duration::from_secs(left));
                    format!("{} ({left})", text(token, "/metadata/expires"))
                },
            );
            let roles = token.pointer("/spec/roles").map(texts).unwrap_or_default();
            vec![shown, roles.join(","), labels(token), expiry]
        })
        .collect();
    table(&["Token", "Type", "Labels", "Expiry Time (UTC)"], &rows)
}

/// What the maker of an invite token has to know.
pub(super) fn invitation(token: &str, bot: &str, ttl: Duration, status: &Status) -> String {
    let life = match ttl.as_secs() {
        seconds if seconds % 60 == 0 => format!("{} minutes", seconds / 60),
        _ => duration::format(ttl),
    };
    format!(
        "The invite token: {token}\n\
         This token will expire in {life}. It lets bot {bot:?} join once.\n\
         \n\
         Put this into the bot's tbot.yaml:\n\
         \n\
         version: v2\n\
         proxy_server: {}\n\
         onboarding:\n\
         \x20 join_method: token\n\
         \x20 token: {token}\n\
         \n\
         CA pin, for agents that use auth_server: {}\n",
        status.public_addr,
        status.ca_pins.join(", ")
    )
}
