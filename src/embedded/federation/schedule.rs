//! When a federated trust domain is asked for its bundle.

use std::time::{Duration, SystemTime};

use crate::embedded::instant::parse_rfc3339;
use crate::embedded::store::Resource;

/// How often a publisher is asked that does not say (`SPIFFE_Federation.md` section 4.1).
const DEFAULT: Duration = Duration::from_mins(5);
/// The most and the least that a publisher may ask for (upstream `spiffe_federation_syncer.go`).
const SHORTEST: Duration = Duration::from_mins(1);
const LONGEST: Duration = Duration::from_hours(24);

/// How long a bundle with this refresh hint is good enough.
pub(super) fn interval(hint: Option<Duration>) -> Duration {
    hint.map_or(DEFAULT, |hint| hint.clamp(SHORTEST, LONGEST))
}

/// When the bundle is to be fetched next: now or earlier if it is overdue, `None` for never.
pub(super) fn due(resource: &Resource, now: SystemTime) -> Option<SystemTime> {
    let time = |key: &str| parse_rfc3339(resource.status.get(key)?.as_str()?);
    let has_bundle = resource.status.get("current_bundle").is_some();
    let synced = time("current_bundle_synced_at").filter(|_| has_bundle);
    let Some(synced) = synced.filter(|_| is_from_its_source(resource)) else {
        return Some(now);
    };
    if resource.spec.pointer("/bundle_source/static").is_some() {
        return None;
    }
    // A time that no schedule gives was written by a clock that went wrong, and so was all before
    // which the clock was set back.
    let next = time("next_sync_at").filter(|next| synced <= now && *next <= now + LONGEST);
    Some(next.unwrap_or(now))
}

/// Whether what is known came from where the resource says now.
pub(super) fn is_from_its_source(resource: &Resource) -> bool {
    let source = resource.spec.get("bundle_source");
    source.is_some() && source == resource.status.get("current_bundle_synced_from")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::embedded::instant::rfc3339;

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_hours(500_000)
    }

    #[test]
    fn hints_are_followed_within_reason() {
        let (minute, day) = (60, 24 * 3600);
        for (hint, seconds) in [
            (None, 300),
            (Some(0), minute),
            (Some(59), minute),
            (Some(300), 300),
            (Some(3600), 3600),
            (Some(day + 1), day),
            (Some(u64::MAX), day),
        ] {
            let expected = Duration::from_secs(seconds);
            assert_eq!(
                interval(hint.map(Duration::from_secs)),
                expected,
                "{hint:?}"
            );
        }
    }

    #[test]
    fn what_is_missing_changed_or_overdue_is_fetched() {
        let minute = Duration::from_mins(1);
        let web = json!({"https_web": {"bundle_endpoint_url": "https://a"}});
        let other = json!({"https_web": {"bundle_endpoint_url": "https://b"}});
        let fixed = json!({"static": {"bundle": "{}"}});
        let status_at = |from: &Value, synced: SystemTime, next: Option<SystemTime>| {
            let mut status = json!({
                "current_bundle": "{}",
                "current_bundle_synced_at": rfc3339(synced),
                "current_bundle_synced_from": from,
            });
            if let Some(next) = next {
                status["next_sync_at"] = rfc3339(next).into();
            }
            status
        };
        let status = |from: &Value, next| status_at(from, now() - minute, next);
        let undated = {
            let mut status = status(&fixed, None);
            status["current_bundle_synced_at"] = json!("yesterday");
            status
        };
        for (what, source, status, expected) in [
            ("new", &web, Value::Null, Some(now())),
            ("no bundle", &web, json!({"next_sync_at": "x"}), Some(now())),
            ("undated", &fixed, undated, Some(now())),
            (
                "planned",
                &web,
                status(&web, Some(now() + minute)),
                Some(now() + minute),
            ),
            (
                "overdue",
                &web,
                status(&web, Some(now() - minute)),
                Some(now() - minute),
            ),
            ("no plan", &web, status(&web, None), Some(now())),
            (
                "a clock was wrong",
                &web,
                status(&web, Some(now() + LONGEST + minute)),
                Some(now()),
            ),
            (
                "the clock was set back",
                &web,
                status_at(&web, now() + minute, Some(now() + 2 * minute)),
                Some(now()),
            ),
            (
                "another source",
                &web,
                status(&other, Some(now() + minute)),
                Some(now()),
            ),
            ("a new static one", &fixed, status(&web, None), Some(now())),
            ("static", &fixed, status(&fixed, None), None),
        ] {
            let resource = Resource {
                spec: json!({"bundle_source": source}),
                status,
                ..Resource::default()
            };
            assert_eq!(due(&resource, now()), expected, "{what}");
        }
    }
}
