//! The functions and methods of the language: their types, and what they do.

use std::collections::{BTreeMap, BTreeSet};

use regex::{Regex, RegexBuilder};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::Type::{Dict, Flag, Pair, Set, Text, Time};
use super::{EvalError, MAX_ELEMENTS, MAX_TEXT, Type, Value};

/// The largest compiled regular expression, in bytes.
const MAX_REGEXP: usize = 256 * 1024;

/// What a call does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Function {
    Set,
    Dict,
    Pair,
    Union,
    IfElse,
    Choose,
    Upper,
    Lower,
    ReplaceAll,
    Split,
    EmailLocal,
    RegexpReplace,
    Rfc3339,
    Before,
    After,
    Between,
    Contains,
    ContainsAny,
    ContainsAll,
    IsEmpty,
    Add,
    Remove,
    Put,
    AddValues,
    RemoveKeys,
    PolicySatisfied,
}

/// One way to call a function. A name may have several.
#[derive(Debug)]
pub(super) struct Signature {
    pub(super) name: &'static str,
    pub(super) parameters: &'static [Type],
    /// The type of any number of further arguments.
    pub(super) rest: Option<Type>,
    pub(super) result: Type,
    pub(super) function: Function,
}

const fn of(
    name: &'static str,
    parameters: &'static [Type],
    result: Type,
    function: Function,
) -> Signature {
    Signature {
        name,
        parameters,
        rest: None,
        result,
        function,
    }
}

const fn many(
    name: &'static str,
    parameters: &'static [Type],
    rest: Type,
    result: Type,
    function: Function,
) -> Signature {
    Signature {
        name,
        parameters,
        rest: Some(rest),
        result,
        function,
    }
}

/// Functions by their dotted name. `ifelse`, `choose` and `option`, which take any type, are the
/// checker's.
pub(super) const FUNCTIONS: &[Signature] = &[
    many("set", &[], Text, Set, Function::Set),
    many("dict", &[], Pair, Dict, Function::Dict),
    of("pair", &[Text, Set], Pair, Function::Pair),
    many("union", &[], Set, Set, Function::Union),
    of("strings.upper", &[Text], Text, Function::Upper),
    of("strings.upper", &[Set], Set, Function::Upper),
    of("strings.lower", &[Text], Text, Function::Lower),
    of("strings.lower", &[Set], Set, Function::Lower),
    of(
        "strings.replaceall",
        &[Text, Text, Text],
        Text,
        Function::ReplaceAll,
    ),
    of(
        "strings.replaceall",
        &[Set, Text, Text],
        Set,
        Function::ReplaceAll,
    ),
    of("strings.split", &[Text, Text], Set, Function::Split),
    of("strings.split", &[Set, Text], Set, Function::Split),
    of("email.local", &[Set], Set, Function::EmailLocal),
    of(
        "regexp.replace",
        &[Set, Text, Text],
        Set,
        Function::RegexpReplace,
    ),
    // The name in the published documentation.
    of(
        "regex.replace",
        &[Set, Text, Text],
        Set,
        Function::RegexpReplace,
    ),
    of("time.RFC3339", &[Text], Time, Function::Rfc3339),
    of("before", &[Time, Time], Flag, Function::Before),
    of("after", &[Time, Time], Flag, Function::After),
    of("between", &[Time, Time, Time], Flag, Function::Between),
    of("contains_any", &[Set, Set], Flag, Function::ContainsAny),
    of("contains_all", &[Set, Set], Flag, Function::ContainsAll),
    of("is_empty", &[Set], Flag, Function::IsEmpty),
];

/// Functions that exist in rules only.
pub(super) const RULE_FUNCTIONS: &[Signature] = &[many(
    "sigstore.policy_satisfied",
    &[Text],
    Text,
    Flag,
    Function::PolicySatisfied,
)];

/// Methods; the first parameter is what stands before the dot.
pub(super) const METHODS: &[Signature] = &[
    of("contains", &[Set, Text], Flag, Function::Contains),
    many("add", &[Set], Text, Set, Function::Add),
    many("remove", &[Set], Text, Set, Function::Remove),
    of("contains_any", &[Set, Set], Flag, Function::ContainsAny),
    of("contains_all", &[Set, Set], Flag, Function::ContainsAll),
    of("isempty", &[Set], Flag, Function::IsEmpty),
    of("put", &[Dict, Text, Set], Dict, Function::Put),
    many("add_values", &[Dict, Text], Text, Dict, Function::AddValues),
    many("remove", &[Dict], Text, Dict, Function::RemoveKeys),
    of("before", &[Time, Time], Flag, Function::Before),
    of("after", &[Time, Time], Flag, Function::After),
    of("between", &[Time, Time, Time], Flag, Function::Between),
];

/// Calls `function`; the checker has made sure of the types.
pub(super) fn call(function: Function, arguments: &[Value]) -> Result<Value, EvalError> {
    use Value as V;
    let value = match (function, arguments) {
        (Function::Set, texts) => V::Set(all_texts(texts)?),
        (Function::Dict, pairs) => {
            let mut dict = BTreeMap::new();
            for pair in pairs {
                let V::Pair(key, set) = pair else {
                    return Err(EvalError::Types);
                };
                dict.insert(key.clone(), set.clone());
            }
            V::Dict(dict)
        }
        (Function::Pair, [V::Text(key), V::Set(set)]) => V::Pair(key.clone(), set.clone()),
        (Function::Union, sets) => {
            let mut union = BTreeSet::new();
            for set in sets {
                let V::Set(set) = set else {
                    return Err(EvalError::Types);
                };
                union.extend(set.iter().cloned());
            }
            V::Set(union)
        }
        (Function::IfElse, [V::Flag(condition), yes, no]) => {
            if *condition { yes } else { no }.clone()
        }
        // Conditions and values by turns.
        (Function::Choose, options) => options
            .chunks_exact(2)
            .find_map(|option| match option {
                [V::Flag(true), value] => Some(value.clone()),
                _ => None,
            })
            .ok_or(EvalError::NoOption)?,
        (Function::Upper, [input]) => transform(input, |text| Ok(text.to_uppercase()))?,
        (Function::Lower, [input]) => transform(input, |text| Ok(text.to_lowercase()))?,
        (Function::ReplaceAll, [input, V::Text(old), V::Text(new)]) => {
            transform(input, |text| replace_all(text, old, new))?
        }
        (Function::Split, [input, V::Text(separator)]) => V::Set(split(input, separator)?),
        (Function::EmailLocal, [input @ V::Set(_)]) => transform(input, email_local)?,
        (Function::RegexpReplace, [V::Set(set), V::Text(pattern), V::Text(new)]) => {
            V::Set(regexp_replace(set, pattern, new)?)
        }
        (Function::Rfc3339, [V::Text(text)]) => V::Time(
            OffsetDateTime::parse(text, &Rfc3339)
                .map_err(|_source| EvalError::Time(text.clone()))?,
        ),
        (Function::Before, [V::Time(time), V::Time(other)]) => V::Flag(time < other),
        (Function::After, [V::Time(time), V::Time(other)]) => V::Flag(time > other),
        (Function::Between, [V::Time(time), V::Time(from), V::Time(to)]) => {
            V::Flag(time > from && time < to)
        }
        (Function::Contains, [V::Set(set), V::Text(text)]) => V::Flag(set.contains(text)),
        (Function::ContainsAny, [V::Set(set), V::Set(other)]) => V::Flag(!set.is_disjoint(other)),
        // Nothing is not contained: an empty list of demands must not open a door.
        (Function::ContainsAll, [V::Set(set), V::Set(other)]) => {
            V::Flag(!other.is_empty() && other.is_subset(set))
        }
        (Function::IsEmpty, [V::Set(set)]) => V::Flag(set.is_empty()),
        (Function::Add, [V::Set(set), texts @ ..]) => {
            let mut set = set.clone();
            set.extend(all_texts(texts)?);
            V::Set(set)
        }
        (Function::Remove, [V::Set(set), texts @ ..]) => {
            let gone = all_texts(texts)?;
            V::Set(set.difference(&gone).cloned().collect())
        }
        (Function::Put, [V::Dict(dict), V::Text(key), V::Set(set)]) => {
            let mut dict = dict.clone();
            dict.insert(key.clone(), set.clone());
            V::Dict(dict)
        }
        (Function::AddValues, [V::Dict(dict), V::Text(key), texts @ ..]) => {
            let mut dict = dict.clone();
            dict.entry(key.clone())
                .or_default()
                .extend(all_texts(texts)?);
            V::Dict(dict)
        }
        (Function::RemoveKeys, [V::Dict(dict), texts @ ..]) => {
            let gone = all_texts(texts)?;
            let mut dict = dict.clone();
            dict.retain(|key, _| !gone.contains(key));
            V::Dict(dict)
        }
        (Function::PolicySatisfied, _) => return Err(EvalError::Policies),
        _ => return Err(EvalError::Types),
    };
    bounded(value)
}

fn bounded(value: Value) -> Result<Value, EvalError> {
    let fits = match &value {
        Value::Text(text) => text.len() <= MAX_TEXT,
        Value::Set(set) | Value::Pair(_, set) => fits(set),
        Value::Dict(dict) => {
            dict.values().map(|set| set.len() + 1).sum::<usize>() <= MAX_ELEMENTS
                && dict.values().all(fits)
        }
        Value::Flag(_) | Value::Integer(_) | Value::Time(_) => true,
    };
    if fits {
        Ok(value)
    } else {
        Err(EvalError::TooLarge)
    }
}

fn fits(set: &BTreeSet<String>) -> bool {
    set.len() <= MAX_ELEMENTS && set.iter().map(String::len).sum::<usize>() <= MAX_TEXT
}

fn all_texts(values: &[Value]) -> Result<BTreeSet<String>, EvalError> {
    values
        .iter()
        .map(|value| match value {
            Value::Text(text) => Ok(text.clone()),
            _ => Err(EvalError::Types),
        })
        .collect()
}

/// Applies `change` to a text, or to each element of a set.
fn transform(
    input: &Value,
    change: impl Fn(&str) -> Result<String, EvalError>,
) -> Result<Value, EvalError> {
    match input {
        Value::Text(text) => Ok(Value::Text(change(text)?)),
        Value::Set(set) => {
            let changed = set.iter().map(|text| change(text));
            Ok(Value::Set(changed.collect::<Result<_, _>>()?))
        }
        _ => Err(EvalError::Types),
    }
}

fn replace_all(text: &str, old: &str, new: &str) -> Result<String, EvalError> {
    let growth = text.matches(old).count().saturating_mul(new.len());
    if growth > MAX_TEXT {
        return Err(EvalError::TooLarge);
    }
    Ok(text.replace(old, new))
}

fn split(input: &Value, separator: &str) -> Result<BTreeSet<String>, EvalError> {
    let one = |text: &str| -> Vec<String> {
        if separator.is_empty() {
            text.chars().map(String::from).collect()
        } else {
            text.split(separator).map(str::to_owned).collect()
        }
    };
    match input {
        Value::Text(text) => Ok(one(text).into_iter().collect()),
        Value::Set(set) => Ok(set.iter().flat_map(|text| one(text)).collect()),
        _ => Err(EvalError::Types),
    }
}

fn email_local(text: &str) -> Result<String, EvalError> {
    let address = text
        .trim()
        .strip_suffix('>')
        .and_then(|rest| rest.rsplit_once('<'))
        .map_or(text.trim(), |(_, address)| address);
    match address.rsplit_once('@') {
        Some((local, domain)) if !local.is_empty() && !domain.is_empty() => Ok(local.to_owned()),
        _ => Err(EvalError::Email(text.to_owned())),
    }
}

/// Replaces in the elements that match; the others are left out.
fn regexp_replace(
    set: &BTreeSet<String>,
    pattern: &str,
    new: &str,
) -> Result<BTreeSet<String>, EvalError> {
    let regexp: Regex = RegexBuilder::new(pattern)
        .size_limit(MAX_REGEXP)
        .build()
        .map_err(|_source| EvalError::Regexp(pattern.to_owned()))?;
    let mut result = BTreeSet::new();
    for text in set {
        let mut replaced = String::new();
        let mut from = 0;
        let mut matched = false;
        for captures in regexp.captures_iter(text) {
            let Some(found) = captures.get(0) else {
                continue;
            };
            matched = true;
            replaced.push_str(text.get(from..found.start()).unwrap_or_default());
            captures.expand(new, &mut replaced);
            from = found.end();
            if replaced.len() > MAX_TEXT {
                return Err(EvalError::TooLarge);
            }
        }
        replaced.push_str(text.get(from..).unwrap_or_default());
        if matched {
            result.insert(replaced);
        }
    }
    Ok(result)
}
