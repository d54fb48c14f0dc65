//! The shared credentials file of AWS's programs: one profile is ours, everything else is kept as it
//! stands.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::secret::Secret;

/// A session's credentials.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) access_key_id: String,
    pub(super) secret_access_key: Secret<String>,
    pub(super) token: Secret<String>,
    pub(super) expiration: SystemTime,
}

/// The keys that are ours, in the order of upstream's files. Each is filled up to the longest.
const KEYS: [&str; 4] = [
    "aws_secret_access_key",
    "aws_access_key_id",
    "aws_session_token",
    "expiration",
];

/// Why an existing file cannot be merged with. Lines may hold secrets and are not shown.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum MergeError {
    /// The file is not text.
    #[error("the existing file is not UTF-8 text")]
    NotText,
    /// A line is not what such a file holds.
    #[error(
        "line {0} of the existing file is neither a [section] nor a comment nor key = value: mend \
         it, or set overwrite_credential_file: true"
    )]
    Line(usize),
    /// The section is there twice, which AWS's programs refuse.
    #[error("line {0} of the existing file begins the profile's section a second time: remove one")]
    Twice(usize),
}

/// What a line of the file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Line<'a> {
    /// `[name]`.
    Section(&'a str),
    /// `key = value`; the key.
    Key(&'a str),
    /// More of the value above: it is indented.
    More,
    /// A comment or nothing.
    Silent,
}

/// A credentials file without the profile's credentials: what goes before them and what after.
pub(super) struct Rest {
    before: Secret<String>,
    after: Secret<String>,
}

impl Rest {
    /// Reads what stands in the file; `None` and nothing at all are an empty file.
    pub(super) fn read(old: Option<&[u8]>, profile: &str) -> Result<Self, MergeError> {
        let old = std::str::from_utf8(old.unwrap_or_default());
        let old = old.map_err(|_source| MergeError::NotText)?;
        // As long as they may get, so that no copy of a secret is left behind by growing.
        let room = || String::with_capacity(old.len() + profile.len() + 4);
        let (mut before, mut after) = (room(), room());
        let mut found = false;
        let (mut inside, mut dropping, mut after_key) = (false, false, false);
        for (at, text) in old.lines().enumerate() {
            let line = Line::read(text, after_key).ok_or(MergeError::Line(at + 1))?;
            let part = if found { &mut after } else { &mut before };
            match line {
                Line::Section(name) => {
                    inside = name == profile;
                    if inside && found {
                        return Err(MergeError::Twice(at + 1));
                    }
                    found |= inside;
                    (dropping, after_key) = (false, false);
                    // Indented, it would go on with the line before, which may be ours.
                    push(part, text.trim_start());
                }
                Line::Key(name) => {
                    dropping = inside && KEYS.contains(&name);
                    after_key = true;
                    if !dropping {
                        // Indented, it would go on with the line before: ours, if it is the first.
                        push(part, text.trim_start());
                    }
                }
                Line::More if dropping => {}
                Line::More | Line::Silent => push(part, text),
            }
        }
        if !found {
            if !before.is_empty() && !before.ends_with("\n\n") {
                before.push('\n');
            }
            push(&mut before, &format!("[{profile}]"));
        }
        Ok(Self {
            before: Secret::new(before),
            after: Secret::new(after),
        })
    }

    /// The file with `ours`, the lines of [`section`].
    pub(super) fn with(&self, ours: &[u8]) -> Secret<Vec<u8>> {
        let [before, after] = [&self.before, &self.after].map(|part| part.expose().as_bytes());
        Secret::new([before, ours, after].concat())
    }
}

fn push(text: &mut String, line: &str) {
    text.push_str(line);
    text.push('\n');
}

/// The lines below the profile's name. The expiration is in milliseconds since 1970, as upstream
/// writes it; AWS's programs do not read it.
pub(super) fn section(session: &Session) -> Secret<Vec<u8>> {
    let expiration = session.expiration.duration_since(UNIX_EPOCH);
    let expiration = expiration.unwrap_or_default().as_millis().to_string();
    let values = [
        session.secret_access_key.expose(),
        &session.access_key_id,
        session.token.expose(),
        &expiration,
    ];
    let width = KEYS.iter().map(|key| key.len()).max().unwrap_or_default();
    let length: usize = values.iter().map(|value| value.len() + width + 4).sum();
    let mut text = String::with_capacity(length);
    for (key, value) in KEYS.iter().zip(values) {
        let blanks = " ".repeat(width - key.len());
        for part in [*key, &blanks, " = ", value, "\n"] {
            text.push_str(part);
        }
    }
    Secret::new(text.into_bytes())
}

impl<'a> Line<'a> {
    fn read(text: &'a str, after_key: bool) -> Option<Self> {
        let trimmed = text.trim();
        if trimmed.is_empty() || trimmed.starts_with(['#', ';']) {
            return Some(Self::Silent);
        }
        if after_key && text.starts_with([' ', '\t']) {
            return Some(Self::More);
        }
        if let Some(rest) = trimmed.strip_prefix('[') {
            let (name, rest) = rest.split_once(']')?;
            let rest = rest.trim_start();
            return (rest.is_empty() || rest.starts_with(['#', ';']))
                .then_some(Self::Section(name.trim()));
        }
        let at = trimmed.find(['=', ':'])?;
        let (key, _) = trimmed.split_at(at);
        let key = key.trim_end();
        (!key.is_empty()).then_some(Self::Key(key))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn session() -> Session {
        Session {
            access_key_id: "ASIA1".to_owned(),
            secret_access_key: Secret::new("s/+=".to_owned()),
            token: Secret::new("t==".to_owned()),
            expiration: UNIX_EPOCH + Duration::from_secs(1_700_000_000),
        }
    }

    const OURS: &str = "aws_secret_access_key = s/+=\naws_access_key_id     = ASIA1\n\
                        aws_session_token     = t==\nexpiration            = 1700000000000\n";

    fn text(old: &str, profile: &str) -> Result<String, MergeError> {
        let new = Rest::read(Some(old.as_bytes()), profile)?.with(section(&session()).expose());
        Ok(String::from_utf8(new.expose().clone()).unwrap())
    }

    #[test]
    fn only_our_keys_of_our_profile_change() {
        for (old, new) in [
            ("", format!("[default]\n{OURS}")),
            (
                "# by hand\n[other]\naws_access_key_id=A\n",
                format!("# by hand\n[other]\naws_access_key_id=A\n\n[default]\n{OURS}"),
            ),
            (
                "[other]\nx = y\n\n",
                format!("[other]\nx = y\n\n[default]\n{OURS}"),
            ),
            (
                "[a]\naws_access_key_id = A\n\n[default]\nregion = x\naws_access_key_id = OLD\n\
                 expiration: 3\n# note\ns3 =\n  aws_session_token = nested\n\n[b]\nk = v",
                format!(
                    "[a]\naws_access_key_id = A\n\n[default]\n{OURS}region = x\n# note\ns3 =\n  \
                     aws_session_token = nested\n\n[b]\nk = v\n"
                ),
            ),
            (
                "[ default ] ; ours\naws_session_token = a\n  b\n\tc\nk = v\n",
                format!("[ default ] ; ours\n{OURS}k = v\n"),
            ),
            (
                "[default]\r\nk = v\r\n",
                format!("[default]\n{OURS}k = v\n"),
            ),
        ] {
            assert_eq!(text(old, "default").unwrap(), new, "{old:?}");
            assert_eq!(text(&new, "default").unwrap(), new, "again: {old:?}");
        }
        let none = Rest::read(None, "p q").unwrap();
        let none = none.with(section(&session()).expose());
        assert_eq!(none.expose(), format!("[p q]\n{OURS}").as_bytes());
    }

    #[test]
    fn what_is_no_such_file_is_left_alone() {
        for (old, error) in [
            ("[default\n", MergeError::Line(1)),
            ("[a]\nhunter2\n", MergeError::Line(2)),
            ("[a]\n= x\n", MergeError::Line(2)),
            ("[a] x\n", MergeError::Line(1)),
            ("{\"a\": 1}\nx\n", MergeError::Line(2)),
            ("[default]\n[a]\n[default]\n", MergeError::Twice(3)),
        ] {
            let told = text(old, "default").unwrap_err();
            assert_eq!(told, error, "{old:?}");
            assert!(!told.to_string().contains("hunter2"));
        }
        let binary = Rest::read(Some(&[0xff]), "default");
        assert_eq!(binary.err(), Some(MergeError::NotText));
    }

    #[test]
    fn fuzz_merging() {
        const PIECES: &[&str] = &[
            "[",
            "]",
            "default",
            "other",
            "\n",
            "=",
            " ",
            "aws_access_key_id",
            "expiration",
            "x",
            "#",
            ";",
            "\r\n",
            "\t",
            "é",
            "aws_session_token = a\n",
            "[default]\n",
        ];
        bolero::check!().with_type::<Vec<u8>>().for_each(|choice| {
            let pick = |at: &u8| PIECES[usize::from(*at) % PIECES.len()];
            let old: String = choice.iter().map(pick).collect();
            if let Ok(new) = text(&old, "default") {
                // What was merged is merged, and ours is in it.
                assert_eq!(text(&new, "default").ok(), Some(new.clone()), "{old:?}");
                assert!(new.contains(OURS), "{old:?}");
            }
        });
    }
}
