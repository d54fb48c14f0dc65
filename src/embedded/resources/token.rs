//! `kind: token`: who may join as which bot, and how it has to prove itself.

use serde_json::{Value, json};

use super::{Resource, set, whole};
use crate::yaml::Fields;

/// Join methods that this cluster verifies. Tokens of other methods are stored, but joining with
/// them is refused by name.
pub const METHODS: &[&str] = &["token", "iam"];

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
    let allow = fields.sections("allow").unwrap_or_default();
    let method = if fields.has("join_method") {
        fields.one_of("join_method", KNOWN)
    } else if allow.is_empty() {
        Some("token".to_owned())
    } else {
        Some("ec2".to_owned())
    };
    let Some(method) = method else { return };
    let mut stored = Vec::new();
    for mut rule in allow {
        stored.push(check_rule(&mut rule, &method));
        rule.finish();
    }
    match method.as_str() {
        "iam" if stored.is_empty() && !fields.has("integration") => fields.error(
            "allow",
            "`allow` must have at least one rule for the join method `iam`",
            Some("add `- aws_account: \"111111111111\"`"),
        ),
        "token" if !stored.is_empty() => fields.error(
            "allow",
            "allow rules mean nothing for the join method `token`",
            Some("remove them, or write `join_method: iam`"),
        ),
        _ => {}
    }
    if !stored.is_empty() {
        set(&mut resource.spec, "allow", stored);
    }
    set(&mut resource.spec, "join_method", method);
}

fn check_rule(rule: &mut Fields<'_>, method: &str) -> Value {
    let mut stored = json!({});
    for key in ["aws_account", "aws_arn", "aws_role", "aws_organization_id"] {
        if let Some(text) = rule.string(key) {
            set(&mut stored, key, text);
        }
    }
    if let Some(regions) = rule.strings("aws_regions") {
        set(&mut stored, "aws_regions", regions);
    }
    if let Some(mut units) = rule.section("aws_organizational_units") {
        let (include, exclude) = (units.strings("include"), units.strings("exclude"));
        units.finish();
        set(
            &mut stored,
            "aws_organizational_units",
            json!({"include": include.unwrap_or_default(), "exclude": exclude.unwrap_or_default()}),
        );
    }
    if method != "iam" {
        return stored;
    }
    for key in ["aws_role", "aws_regions"] {
        if rule.has(key) {
            rule.error(
                key,
                format!("`{key}` belongs to the join method `ec2`"),
                Some("remove it; `aws_arn` limits the role"),
            );
        }
    }
    for key in ["aws_organization_id", "aws_organizational_units"] {
        if rule.has(key) {
            rule.error(
                key,
                "rules on AWS organizations are not supported by this cluster",
                Some("use `aws_account` and `aws_arn`"),
            );
        }
    }
    let text = |key| stored.get(key).and_then(Value::as_str);
    let account = text("aws_account");
    if let Some(account) = account
        && (account.len() != 12 || !account.bytes().all(|b| b.is_ascii_digit()))
    {
        rule.error(
            "aws_account",
            format!("{account:?} is no AWS account: it has to be 12 digits"),
            Some("quote it, a leading 0 counts"),
        );
    }
    if account.is_none() && text("aws_arn").is_none() {
        whole(
            rule,
            "a rule needs `aws_account` or `aws_arn`",
            "without one it would let in every AWS account",
        );
    }
    stored
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_of_agents_is_known() {
        let agents = crate::join::METHODS.iter().map(|method| method.name());
        for name in agents.chain(crate::join::UPSTREAM.iter().copied()) {
            assert!(KNOWN.contains(&name), "{name}");
        }
    }
}
