//! Allow rules: which keys a method's rules have, how each is compared with a claim, and which rule
//! came how close when none matched.

use std::fmt;

use serde_json::{Map, Value};

use super::{Claims, shortened};
use crate::join::verify::glob;
use crate::yaml::Fields;

/// How a key of a rule is compared with its claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// The same text.
    Exact,
    /// `*` is any run of characters, `?` exactly one.
    Glob,
    /// The claim is a list that has the text.
    Listed,
    /// The rule has a boolean, the claim `"true"` or `"false"`, as text or not.
    Flag,
}

/// A key of a rule.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// Its name in the rule.
    pub name: &'static str,
    /// The claim.
    pub claim: &'static str,
    /// How they are compared.
    pub how: How,
}

/// A key that is compared text by text.
#[must_use]
pub const fn exact(name: &'static str, claim: &'static str) -> Key {
    let how = How::Exact;
    Key { name, claim, how }
}

/// A key that is a pattern.
#[must_use]
pub const fn pattern(name: &'static str, claim: &'static str) -> Key {
    let how = How::Glob;
    Key { name, claim, how }
}

/// What the rules of a method look like.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Their keys, in the order of the protocol's fields.
    pub keys: &'static [Key],
    /// Of each of these groups every rule has to have a key, or it would let in strangers.
    pub needs: &'static [&'static [&'static str]],
}

impl Rules {
    /// Reads `allow` of a method's section; its normal form, or what could be read of it.
    #[must_use]
    pub fn read(&self, section: &mut Fields<'_>) -> Value {
        let reported = section.has("allow");
        let rules = section.sections("allow").unwrap_or_default();
        if rules.is_empty() && (!reported || section.list("allow").is_some()) {
            section.error(
                "allow",
                "`allow` must have at least one rule",
                self.needs
                    .first()
                    .and_then(|group| group.first())
                    .map(|key| format!("add `- {key}: …`"))
                    .as_deref(),
            );
        }
        let rules = rules.into_iter().map(|mut rule| self.read_rule(&mut rule));
        rules.collect()
    }

    fn read_rule(&self, rule: &mut Fields<'_>) -> Value {
        let mut stored = Map::new();
        for key in self.keys {
            let value = match key.how {
                How::Flag => rule.bool(key.name).map(Value::Bool),
                How::Exact | How::Glob | How::Listed => rule.string(key.name).map(Value::String),
            };
            if let Some(value) = value {
                stored.insert(key.name.to_owned(), value);
            }
        }
        rule.warn_unknown();
        for group in self.needs {
            // An empty text, say of a variable that is not set, asks for nothing.
            if !group.iter().any(|name| stored.contains_key(*name)) {
                rule.error_here(
                    format!("a rule needs {}", or(group)),
                    "without one it would let in whoever the issuer has as a customer",
                );
            }
        }
        Value::Object(stored)
    }

    /// Whether a rule of `allow`, as [`Rules::read`] left it, has nothing against `claims`.
    ///
    /// # Errors
    /// [`Miss`], if none lets them in.
    pub fn check(&self, allow: Option<&Value>, claims: &Claims) -> Result<(), Miss> {
        let rules = allow
            .and_then(Value::as_array)
            .map(Vec::as_slice)
            .unwrap_or_default();
        let mut nearest: Option<Near> = None;
        for (index, rule) in rules.iter().enumerate() {
            let near = self.compare(index, rule, claims);
            if near.is_match() {
                return Ok(());
            }
            if nearest
                .as_ref()
                .is_none_or(|best| near.rank() < best.rank())
            {
                nearest = Some(near);
            }
        }
        Err(Miss {
            rules: rules.len(),
            nearest,
        })
    }

    fn compare(&self, index: usize, rule: &Value, claims: &Claims) -> Near {
        let mut near = Near {
            index,
            ..Near::default()
        };
        let members = rule.as_object().into_iter().flatten();
        for (name, wanted) in members {
            let key = self.keys.iter().find(|key| key.name == name);
            let found = key.and_then(|key| claims.get(key.claim));
            if key
                .zip(found)
                .is_some_and(|(key, found)| key.how.matches(wanted, found))
            {
                near.matched.push(name.clone());
            } else {
                near.differs.push(Difference {
                    key: name.clone(),
                    wanted: shown(wanted),
                    found: found.map(shown),
                });
            }
        }
        near
    }
}

impl How {
    fn matches(self, wanted: &Value, found: &Value) -> bool {
        match (self, wanted, found) {
            (Self::Exact, Value::String(wanted), Value::String(found)) => wanted == found,
            (Self::Glob, Value::String(wanted), Value::String(found)) => glob(wanted, found),
            (Self::Listed, wanted, Value::Array(found)) => found.contains(wanted),
            (Self::Flag, Value::Bool(wanted), Value::Bool(found)) => wanted == found,
            (Self::Flag, Value::Bool(wanted), Value::String(found)) => *found == wanted.to_string(),
            _ => false,
        }
    }
}

/// No rule lets the owner of a token in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Miss {
    rules: usize,
    nearest: Option<Near>,
}

impl Miss {
    /// The keys in which the nearest rule differs: what an agent may know. The values that the rule
    /// wants are none of a stranger's business.
    #[must_use]
    pub fn keys(&self) -> Vec<&str> {
        let differs = self.nearest.iter().flat_map(|near| &near.differs);
        differs.map(|difference| difference.key.as_str()).collect()
    }
}

impl fmt::Display for Miss {
    /// For the audit log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(near) = &self.nearest else {
            return f.write_str("the token has no allow rules");
        };
        write!(
            f,
            "rule {} of {} comes closest: ",
            near.index + 1,
            self.rules
        )?;
        if !near.matched.is_empty() {
            write!(f, "{} match, ", near.matched.join(", "))?;
        }
        for (index, difference) in near.differs.iter().enumerate() {
            let comma = if index == 0 { "" } else { "; " };
            let Difference { key, wanted, found } = difference;
            match found {
                Some(found) => write!(f, "{comma}{key} is {found}, not {wanted}")?,
                None => write!(f, "{comma}{key} is not in the token, it has to be {wanted}")?,
            }
        }
        Ok(())
    }
}

/// How close a rule came.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Near {
    index: usize,
    matched: Vec<String>,
    differs: Vec<Difference>,
}

impl Near {
    /// A rule that asks for nothing matches nothing: it would let in everybody.
    fn is_match(&self) -> bool {
        self.differs.is_empty() && !self.matched.is_empty()
    }

    /// Less is closer.
    fn rank(&self) -> (usize, std::cmp::Reverse<usize>) {
        (self.differs.len(), std::cmp::Reverse(self.matched.len()))
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Difference {
    key: String,
    wanted: String,
    found: Option<String>,
}

fn shown(value: &Value) -> String {
    shortened(&value.to_string())
}

fn or(names: &[&str]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    match quoted.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, before)) => format!("{} or {last}", before.join(", ")),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::yaml::{Problems, parse};

    const RULES: Rules = Rules {
        keys: &[
            pattern("repo", "repository"),
            exact("ref", "ref"),
            Key {
                name: "context",
                claim: "contexts",
                how: How::Listed,
            },
            Key {
                name: "safe",
                claim: "ref_protected",
                how: How::Flag,
            },
        ],
        needs: &[&["repo", "context"]],
    };

    fn check(allow: &Value, claims: &Value) -> Result<(), Miss> {
        RULES.check(Some(allow), claims.as_object().unwrap())
    }

    #[test]
    fn one_rule_has_to_match_in_every_key_that_it_has() {
        let claims = json!({
            "repository": "o/r", "ref": "main", "contexts": ["c1", "c2"], "ref_protected": "true"
        });
        for rule in [
            json!({"repo": "o/r"}),
            json!({"repo": "o/*", "ref": "main"}),
            json!({"repo": "?/r", "context": "c2", "safe": true}),
        ] {
            assert_eq!(
                check(&json!([{"ref": "x"}, rule]), &claims),
                Ok(()),
                "{rule}"
            );
        }
        for rule in [
            json!({}),
            json!(null),
            json!({"repo": "o/"}),
            json!({"repo": "O/R"}),
            json!({"repo": "o/r", "ref": "m*"}),
            json!({"repo": "o/r", "context": "c3"}),
            json!({"repo": "o/r", "safe": false}),
            // Of a newer version, or damaged: it must not be read as a wider one.
            json!({"repo": "o/r", "other": "x"}),
            json!({"repo": ["o/r"]}),
        ] {
            assert!(check(&json!([rule]), &claims).is_err(), "{rule}");
        }
        assert!(RULES.check(None, claims.as_object().unwrap()).is_err());
        assert!(check(&json!([{"repo": "*"}]), &json!({})).is_err());
        assert!(check(&json!([{"repo": "1"}]), &json!({"repository": 1})).is_err());
    }

    #[test]
    fn the_nearest_rule_is_told() {
        let claims = json!({"repository": "o/r", "ref": "feature"});
        let allow = json!([
            {"repo": "x/*", "ref": "main"},
            {"repo": "o/r", "ref": "main"},
            {"repo": "y/*"},
        ]);
        let miss = check(&allow, &claims).unwrap_err();
        assert_eq!(
            miss.to_string(),
            "rule 2 of 3 comes closest: repo match, ref is \"feature\", not \"main\""
        );
        assert_eq!(miss.keys(), ["ref"]);
        let miss = check(&json!([{"context": "c"}]), &claims).unwrap_err();
        assert_eq!(
            miss.to_string(),
            "rule 1 of 1 comes closest: context is not in the token, it has to be \"c\""
        );
        let long = json!({"repository": "x".repeat(10_000)});
        let miss = check(&json!([{"repo": "y"}]), &long).unwrap_err();
        assert!(miss.to_string().len() < 500);
    }

    #[test]
    fn rules_are_read_strictly() {
        let read = |text: &str| {
            let node = parse(text).unwrap();
            let problems = Problems::new();
            let mut fields = Fields::new(&node, "spec.x", &problems).unwrap();
            let stored = RULES.read(&mut fields);
            (stored, problems.render("t"))
        };
        let (stored, problems) = read("allow: [{repo: o/*, safe: true, ref: ''}]");
        assert_eq!(stored, json!([{"repo": "o/*", "safe": true}]));
        assert_eq!(problems, "");
        for (text, complaint) in [
            ("{}", "must have at least one rule"),
            ("allow: []", "must have at least one rule"),
            ("allow: o/r", "must be a list"),
            ("allow: [{ref: main}]", "a rule needs `repo` or `context`"),
            (
                "allow: [{repo: '', ref: main}]",
                "a rule needs `repo` or `context`",
            ),
            ("allow: [{repo: o/r, reff: main}]", "did you mean `ref`?"),
            (
                "allow: [{repo: o/r, safe: 'yes'}]",
                "must be `true` or `false`",
            ),
        ] {
            let (_, problems) = read(text);
            assert!(problems.contains(complaint), "{text}: {problems}");
        }
    }
}
