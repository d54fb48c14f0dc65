//! `credential_ttl` and `renewal_interval`: one pair for the agent, optionally one per service.

use std::time::Duration;

use crate::services::Lifetime;
use crate::yaml::{Fields, duration};

/// Longer lives are refused for a service and warned about for the agent.
const MAXIMUM: Duration = Duration::from_hours(168);

/// The agent's pair: each has its own default, and a doubtful pair is only warned about.
pub(super) fn of_agent(fields: &mut Fields<'_>, oneshot: bool) -> Lifetime {
    let defaults = Lifetime::default();
    let alias = nonzero(fields.duration("certificate_ttl"));
    let ttl = nonzero(fields.duration("credential_ttl"));
    if alias.is_some() {
        let outcome = if ttl.is_some() {
            "deprecated, and `credential_ttl` wins"
        } else {
            "deprecated"
        };
        fields.warn("certificate_ttl", outcome, Some("write `credential_ttl`"));
    }
    let lifetime = Lifetime {
        ttl: ttl.or(alias).unwrap_or(defaults.ttl),
        interval: nonzero(fields.duration("renewal_interval")).unwrap_or(defaults.interval),
    };
    if let Some((key, message, hint)) = doubt(lifetime, oneshot, false) {
        fields.warn(key, message, Some(&hint));
    }
    lifetime
}

/// A service's pair: both or neither, and a doubtful pair is an error.
pub(super) fn of_service(
    fields: &mut Fields<'_>,
    oneshot: bool,
    unlimited: bool,
) -> Option<Lifetime> {
    let (ttl_given, interval_given) =
        (fields.has("credential_ttl"), fields.has("renewal_interval"));
    let ttl = fields.duration("credential_ttl");
    let interval = fields.duration("renewal_interval");
    if (ttl_given && ttl.is_none()) || (interval_given && interval.is_none()) {
        return None;
    }
    match (nonzero(ttl), nonzero(interval)) {
        (Some(ttl), Some(interval)) => {
            let lifetime = Lifetime { ttl, interval };
            if let Some((key, message, hint)) = doubt(lifetime, oneshot, unlimited) {
                fields.error(key, message, Some(&hint));
            }
            Some(lifetime)
        }
        (None, None) => None,
        (Some(_), None) => {
            alone(fields, "credential_ttl", "renewal_interval");
            None
        }
        (None, Some(_)) => {
            alone(fields, "renewal_interval", "credential_ttl");
            None
        }
    }
}

fn alone(fields: &Fields<'_>, given: &str, missing: &str) {
    fields.error(
        given,
        format!("`{given}` without `{missing}`: a service sets both or neither"),
        Some(&format!(
            "add `{missing}`, or leave both to the agent's own pair"
        )),
    );
}

fn doubt(
    lifetime: Lifetime,
    oneshot: bool,
    unlimited: bool,
) -> Option<(&'static str, String, String)> {
    let (ttl, interval) = (
        duration::format(lifetime.ttl),
        duration::format(lifetime.interval),
    );
    if lifetime.ttl < lifetime.interval && !oneshot {
        return Some((
            "credential_ttl",
            format!("credentials that live {ttl} would expire before the renewal every {interval}"),
            "let the life be at least twice `renewal_interval`".to_owned(),
        ));
    }
    if lifetime.ttl > MAXIMUM && !unlimited {
        return Some((
            "credential_ttl",
            format!("{ttl} is longer than a cluster grants"),
            format!("at most {}", duration::format(MAXIMUM)),
        ));
    }
    None
}

fn nonzero(duration: Option<Duration>) -> Option<Duration> {
    duration.filter(|duration| !duration.is_zero())
}
