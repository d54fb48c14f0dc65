//! `kind: token`: who may join as which bot, and how it has to prove itself.

use serde_json::Value;

use super::{Resource, set};
use crate::join::verify;
use crate::yaml::Fields;

/// Join methods of Teleport's, in the order of its documentation.
const KNOWN: &[&str] = &[
    "token",
    "iam",
    "ec2",
    "azure",
    "azure_devops",
    "bitbucket",
    "bound_keypair",
    "circleci",
    "env0",
    "gcp",
    "generic_oidc",
    "github",
    "gitlab",
    "kubernetes",
    "oracle",
    "spacelift",
    "terraform_cloud",
    "tpm",
];

/// Keys that are kept as they are, beside the rules of methods that are not verified.
const KEPT: &[&str] = &[
    "aws_iid_ttl",
    "suggested_labels",
    "suggested_agent_matcher_labels",
    "integration",
];
/// Methods whose rules, if any, are under `allow`; others have a key of their name for them.
const UNDER_ALLOW: &[&str] = &["token", "iam", "ec2"];

/// The form of a token's name that may be logged: names of `token` tokens are secrets.
///
/// As upstream: names below 16 characters are hidden, of longer ones the last quarter is shown.
#[must_use]
pub fn safe_name(name: &str, join_method: &str) -> String {
    const SHORT: usize = 16;
    if join_method != "token" {
        return name.to_owned();
    }
    let length = name.chars().count();
    let hidden = if length < SHORT {
        length
    } else {
        length * 3 / 4
    };
    let shown: String = name.chars().skip(hidden).collect();
    "*".repeat(hidden) + &shown
}

/// The status of a token that is written, in the place of `existing` if there is one.
pub(super) fn status(token: &Resource, existing: Option<&Resource>) -> Value {
    let method = token.spec_text("/join_method");
    let before = existing.filter(|existing| existing.spec_text("/join_method") == method);
    let before = before.map_or(&Value::Null, |existing| &existing.status);
    verify::method(method).map_or(Value::Null, |method| method.status(&token.spec, before))
}

pub(super) fn check(fields: &mut Fields<'_>, resource: &mut Resource) {
    let methods = KNOWN.iter().filter(|name| !UNDER_ALLOW.contains(name));
    for key in KEPT.iter().chain(methods) {
        fields.ignore(key);
    }
    let roles = fields.strings("roles").unwrap_or_default();
    match roles.as_slice() {
        [] => fields.error(
            "roles",
            "`roles` must not be empty",
            Some("write `roles: [Bot]`"),
        ),
        all => {
            for role in all.iter().filter(|role| !role.eq_ignore_ascii_case("bot")) {
                fields.error(
                    "roles",
                    format!("{role:?} cannot join this cluster"),
                    Some("only bots can: write `roles: [Bot]`"),
                );
            }
            set(&mut resource.spec, "roles", vec!["Bot"; all.len()]);
        }
    }
    let bot = fields.string("bot_name");
    if bot.is_none() {
        fields.error(
            "bot_name",
            "`bot_name` is required for the role `Bot`",
            Some("name the bot that joins with this token"),
        );
    }
    set(&mut resource.spec, "bot_name", bot);
    let method = if fields.has("join_method") {
        fields.one_of("join_method", KNOWN)
    } else if fields.list("allow").is_none_or(|rules| rules.is_empty()) {
        Some("token".to_owned())
    } else {
        Some("ec2".to_owned())
    };
    let Some(method) = method else { return };
    match verify::method(&method) {
        Some(verifier) => verifier.read(fields, &mut resource.spec),
        None => fields.ignore("allow"),
    }
    set(&mut resource.spec, "join_method", method);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_of_agents_is_known() {
        let agents = crate::join::METHODS.iter().map(|method| method.name());
        for name in agents {
            assert!(KNOWN.contains(&name), "{name}");
        }
    }
}
