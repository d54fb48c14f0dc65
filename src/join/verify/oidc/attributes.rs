//! Join attributes out of claims: what workload identities see as `join.<method>`.

use serde_json::{Map, Value};

use super::Claims;

/// The type of an attribute in the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Text.
    Text,
    /// A boolean, which the issuer sends as one or as the text `true`.
    Flag,
    /// A whole number. JSON forms of the protocol have it as text.
    Integer,
    /// A list of texts.
    Texts,
}

/// An attribute, and the claim that it comes from.
#[derive(Debug, Clone, Copy)]
pub struct Attribute {
    /// The field of the protocol's message.
    pub name: &'static str,
    /// The claim.
    pub claim: &'static str,
    /// Its type.
    pub form: Form,
}

/// An attribute that is text.
#[must_use]
pub const fn of(name: &'static str, claim: &'static str) -> Attribute {
    let form = Form::Text;
    Attribute { name, claim, form }
}

/// A text whose attribute has the claim's name.
#[must_use]
pub const fn same(name: &'static str) -> Attribute {
    of(name, name)
}

/// The attributes that `claims` have, in the order of `table`. Empty ones are left out, as in JSON
/// forms of the protocol.
#[must_use]
pub fn attributes(table: &[Attribute], claims: &Claims) -> Map<String, Value> {
    table
        .iter()
        .filter_map(|attribute| {
            let value = attribute.form.read(claims.get(attribute.claim)?)?;
            Some((attribute.name.to_owned(), value))
        })
        .collect()
}

impl Form {
    fn read(self, claim: &Value) -> Option<Value> {
        match (self, claim) {
            (Self::Text, Value::String(text)) if !text.is_empty() => Some(claim.clone()),
            (Self::Flag, Value::Bool(true)) => Some(Value::Bool(true)),
            (Self::Flag, Value::String(text)) if text == "true" => Some(Value::Bool(true)),
            (Self::Integer, Value::Number(number)) => {
                let number = number.as_i64().filter(|number| *number != 0)?;
                Some(Value::String(number.to_string()))
            }
            (Self::Texts, Value::Array(items)) => {
                let texts: Vec<_> = items
                    .iter()
                    .filter(|item| item.is_string())
                    .cloned()
                    .collect();
                (!texts.is_empty()).then_some(Value::Array(texts))
            }
            _ => None,
        }
    }
}

/// What the audit log shows of a token: its issuer, subject and audience, and what `table` lists, by
/// the claims' own names.
#[must_use]
pub fn metadata(table: &[Attribute], claims: &Claims) -> Value {
    let names = ["iss", "aud", "sub"]
        .into_iter()
        .chain(table.iter().map(|it| it.claim));
    let shown = names.filter_map(|name| Some((name.to_owned(), claims.get(name)?.clone())));
    Value::Object(shown.collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn claims_become_attributes_of_the_protocol_or_are_left_out() {
        let form = |name, form| Attribute {
            name,
            claim: name,
            form,
        };
        let table = [
            same("sub"),
            of("a", "b"),
            form("flag", Form::Flag),
            form("number", Form::Integer),
            form("list", Form::Texts),
        ];
        let claims = json!({
            "sub": "s", "b": "v", "flag": "true", "number": 7, "list": ["x", 1], "other": "secret?"
        });
        let claims = claims.as_object().unwrap();
        let found = Value::Object(attributes(&table, claims));
        assert_eq!(
            found,
            json!({"sub": "s", "a": "v", "flag": true, "number": "7", "list": ["x"]})
        );
        assert_eq!(
            metadata(&table, claims),
            json!({"sub": "s", "b": "v", "flag": "true", "number": 7, "list": ["x", 1]})
        );
        let none = json!({"sub": 1, "b": "", "flag": "false", "number": 0, "list": []});
        assert!(attributes(&table, none.as_object().unwrap()).is_empty());
    }
}
