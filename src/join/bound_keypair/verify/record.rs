//! What a token says of a bound key: the section of its maker, and the status that the cluster keeps
//! (upstream `ProvisionTokenSpecV2BoundKeypair`, `ProvisionTokenStatusV2BoundKeypair`).

use std::time::SystemTime;

use serde_json::{Map, Value, json};

use crate::clock::{parse_rfc3339, rfc3339_nanos};

/// The member of a token's spec and of its status that these are kept in.
pub(crate) const SECTION: &str = "bound_keypair";

/// How strictly a bot that lost its certificate is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// The number of recoveries is limited, and the join state has to be right.
    Standard,
    /// The join state has to be right.
    Relaxed,
    /// The key alone is enough.
    Insecure,
}

impl Mode {
    /// Every mode, the default first.
    pub(crate) const ALL: [Self; 3] = [Self::Standard, Self::Relaxed, Self::Insecure];

    /// Its name in resources.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Standard => "standard",
            Self::Relaxed => "relaxed",
            Self::Insecure => "insecure",
        }
    }

    /// The mode of a name.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.name() == name)
    }
}

/// What the maker of the token wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Spec {
    /// The key that joins first, an `authorized_keys` line; `None` if a secret does.
    pub(crate) initial_public_key: Option<String>,
    /// The secret does not count from then on.
    pub(crate) must_register_before: Option<SystemTime>,
    /// How often the bot may join without a certificate, the first time included.
    pub(crate) limit: u32,
    /// How strictly that is looked at.
    pub(crate) mode: Mode,
    /// A key that was made before is to be replaced.
    pub(crate) rotate_after: Option<SystemTime>,
}

impl Spec {
    /// Reads the section of a stored token; `None` if it is not what this program stores.
    pub(crate) fn read(spec: &Value) -> Option<Self> {
        let section = spec.get(SECTION)?;
        let text = |path: &str| section.pointer(path).and_then(Value::as_str);
        let time = |path: &str| match text(path) {
            None => Some(None),
            Some(text) => parse_rfc3339(text).map(Some),
        };
        Some(Self {
            initial_public_key: text("/onboarding/initial_public_key").map(str::to_owned),
            must_register_before: time("/onboarding/must_register_before")?,
            limit: section
                .pointer("/recovery/limit")?
                .as_u64()?
                .try_into()
                .ok()?,
            mode: Mode::from_name(text("/recovery/mode")?)?,
            rotate_after: time("/rotate_after")?,
        })
    }
}

/// What the cluster knows of the key.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Status {
    /// What the first join has to know; empty once it is used, or if there never was one.
    pub(crate) registration_secret: String,
    /// The key, an `authorized_keys` line; empty before the first join.
    pub(crate) bound_public_key: String,
    /// The instance that proved to have it; empty before the first join.
    pub(crate) bound_bot_instance_id: String,
    /// How often the bot joined without a certificate.
    pub(crate) recovery_count: u32,
    /// When it last did.
    pub(crate) last_recovered_at: Option<SystemTime>,
    /// When the key was last replaced.
    pub(crate) last_rotated_at: Option<SystemTime>,
}

impl Status {
    /// Reads the status of a stored token; what is missing is not known yet. `None` if it is not
    /// what this program stores.
    pub(crate) fn read(status: &Value) -> Option<Self> {
        let Some(section) = status.get(SECTION).filter(|section| !section.is_null()) else {
            return Some(Self::default());
        };
        let text = |key: &str| {
            let text = section.get(key).and_then(Value::as_str);
            text.unwrap_or_default().to_owned()
        };
        let time = |key: &str| match section.get(key).and_then(Value::as_str) {
            None => Some(None),
            Some(text) => parse_rfc3339(text).map(Some),
        };
        let count = section
            .get("recovery_count")
            .map_or(Some(0), Value::as_u64)?;
        Some(Self {
            registration_secret: text("registration_secret"),
            bound_public_key: text("bound_public_key"),
            bound_bot_instance_id: text("bound_bot_instance_id"),
            recovery_count: count.try_into().ok()?,
            last_recovered_at: time("last_recovered_at")?,
            last_rotated_at: time("last_rotated_at")?,
        })
    }

    /// Puts this status into that of a stored token. What is empty is left out.
    pub(crate) fn write(&self, status: &mut Value) {
        let texts = [
            ("registration_secret", &self.registration_secret),
            ("bound_public_key", &self.bound_public_key),
            ("bound_bot_instance_id", &self.bound_bot_instance_id),
        ];
        let times = [
            ("last_recovered_at", self.last_recovered_at),
            ("last_rotated_at", self.last_rotated_at),
        ];
        let texts = texts.into_iter().filter(|(_, text)| !text.is_empty());
        let mut section: Map<String, Value> = texts
            .map(|(key, text)| (key.to_owned(), json!(text)))
            .collect();
        for (key, time) in times {
            if let Some(time) = time {
                section.insert(key.to_owned(), json!(rfc3339_nanos(time)));
            }
        }
        section.insert("recovery_count".to_owned(), json!(self.recovery_count));
        match status {
            Value::Object(status) => {
                status.insert(SECTION.to_owned(), Value::Object(section));
            }
            other => *other = json!({ SECTION: section }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_status_comes_back_as_it_was_written() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_nanos(1_800_000_000_123_456_789);
        let full = Status {
            registration_secret: "s".to_owned(),
            bound_public_key: "ssh-ed25519 A".to_owned(),
            bound_bot_instance_id: "i".to_owned(),
            recovery_count: 3,
            last_recovered_at: Some(now),
            last_rotated_at: Some(now),
        };
        for status in [full, Status::default()] {
            let mut stored = Value::Null;
            status.write(&mut stored);
            assert_eq!(Status::read(&stored), Some(status.clone()));
            // What else there is stays.
            let mut stored = json!({"other": 1});
            status.write(&mut stored);
            assert_eq!(stored.get("other"), Some(&json!(1)));
            assert_eq!(Status::read(&stored), Some(status));
        }
        assert_eq!(Status::read(&Value::Null), Some(Status::default()));
    }

    #[test]
    fn what_nobody_here_wrote_is_not_read() {
        for (path, value) in [
            ("recovery_count", json!("1")),
            ("recovery_count", json!(-1)),
            ("last_rotated_at", json!("soon")),
        ] {
            assert_eq!(
                Status::read(&json!({SECTION: {path: value}})),
                None,
                "{path}"
            );
        }
        for section in [
            json!({}),
            json!({"recovery": {"limit": 1, "mode": "lax"}}),
            json!({"recovery": {"limit": -1, "mode": "standard"}}),
            json!({"recovery": {"limit": 1, "mode": "standard"}, "rotate_after": "soon"}),
        ] {
            assert_eq!(Spec::read(&json!({SECTION: section})), None, "{section}");
        }
        assert_eq!(Spec::read(&Value::Null), None);
    }
}
