//! `kind: lock`: whoever it targets is refused until it is removed or expires.

use super::{Resource, set, time};
use crate::embedded::instant::rfc3339;
use crate::yaml::Fields;

/// Targets that this cluster enforces; the names are those of Teleport's `LockTarget`.
pub(super) const TARGETS: &[&str] = &["user", "role", "bot_instance_id", "join_token"];

pub(super) fn check(fields: &mut Fields<'_>, resource: &mut Resource) {
    match fields.section("target") {
        Some(mut target) => {
            let given = TARGETS
                .iter()
                .filter(|key| target.string(key).is_some())
                .count();
            for key in target
                .keys()
                .into_iter()
                .filter(|key| !TARGETS.contains(key))
            {
                target.ignore(key);
                target.error(
                    key,
                    "is no target that this cluster can lock",
                    Some("targets are user, role, bot_instance_id and join_token"),
                );
            }
            if given == 0 {
                target.error_here(
                    "locks nothing",
                    "name a user, role, bot_instance_id or join_token",
                );
            }
            target.finish();
        }
        None if fields.has("target") => {}
        None => fields.error(
            "target",
            "`target` is required",
            Some("add `target: {user: bot-x}`"),
        ),
    }
    let _message = fields.string("message");
    fields.ignore("created_at");
    fields.ignore("created_by");
    if let Some(expires) = time(fields, "expires") {
        // The store forgets it then; a lock that is there is in force.
        resource.expires = Some(resource.expires.map_or(expires, |other| other.min(expires)));
        set(&mut resource.spec, "expires", rfc3339(expires));
    }
}
