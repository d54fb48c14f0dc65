//! One event as one line.

use std::fmt::{self, Write as _};
use std::time::SystemTime;

use serde_json::{Map, Value};
use time::OffsetDateTime;
use time::macros::format_description;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata};

/// Width of `[COMPONENT]` in a text line.
const COMPONENT: usize = 11;

/// Whether an event comes from this package.
pub(super) fn ours(target: &str) -> bool {
    target == "tbot" || target.starts_with("tbot::")
}

/// `<time> LEVEL [COMPONENT] message key:value … file.rs:line`
pub(super) fn text(event: &Event<'_>, now: SystemTime, colour: bool) -> String {
    let fields = Fields::of(event);
    let metadata = event.metadata();
    let (name, escape) = match *metadata.level() {
        Level::ERROR => ("ERRO", "\u{1b}[31m"),
        Level::WARN => ("WARN", "\u{1b}[33m"),
        Level::INFO => ("INFO", "\u{1b}[36m"),
        Level::DEBUG => ("DEBU", "\u{1b}[90m"),
        Level::TRACE => ("TRAC", "\u{1b}[90m"),
    };
    let mut line = stamp(now, true);
    line.push(' ');
    if colour {
        line.extend([escape, name, "\u{1b}[0m"]);
    } else {
        line.push_str(name);
    }
    line.push(' ');
    if let Some(component) = component(&fields, metadata) {
        let inner: String = component
            .chars()
            .take(COMPONENT - 2)
            .flat_map(char::to_uppercase)
            .collect();
        let bracketed = format!("[{inner}]");
        push(&mut line, format_args!("{bracketed:<COMPONENT$} "));
    }
    escaped(&mut line, &fields.message, false);
    for (key, value) in &fields.rest {
        push(&mut line, format_args!(" {key}:"));
        match value {
            Value::String(text) if needs_quotes(text) => {
                line.push('"');
                escaped(&mut line, text, true);
                line.push('"');
            }
            Value::String(text) => line.push_str(text),
            other => push(&mut line, format_args!("{other}")),
        }
    }
    if let Some(caller) = caller(metadata) {
        line.push(' ');
        line.push_str(&caller);
    }
    line.push('\n');
    line
}

/// One flat JSON object.
pub(super) fn json(event: &Event<'_>, now: SystemTime) -> String {
    let fields = Fields::of(event);
    let metadata = event.metadata();
    let level = match *metadata.level() {
        Level::ERROR => "error",
        Level::WARN => "warning",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    };
    let component = component(&fields, metadata);
    let mut object = Map::new();
    object.insert("timestamp".into(), stamp(now, false).into());
    object.insert("level".into(), level.into());
    if let Some(caller) = caller(metadata) {
        object.insert("caller".into(), caller.into());
    }
    if let Some(component) = component {
        object.insert("component".into(), component.into());
    }
    object.insert("message".into(), fields.message.into());
    for (key, value) in fields.rest {
        // A field never overwrites what the line itself says.
        let key = if object.contains_key(key) {
            format!("{key}_")
        } else {
            key.to_owned()
        };
        object.insert(key, value);
    }
    let mut line = Value::Object(object).to_string();
    line.push('\n');
    line
}

/// The component of an event: its `component` field, else the module below the crate's root.
fn component(fields: &Fields, metadata: &Metadata<'_>) -> Option<String> {
    if let Some(component) = &fields.component {
        return Some(component.clone());
    }
    let mut path = metadata.target().split("::");
    if path.next() != Some("tbot") {
        return None;
    }
    Some(match path.next() {
        // The program as a whole, not a part of it.
        None | Some("app" | "cli" | "config") => "tbot".to_owned(),
        Some("embedded") => "cluster".to_owned(),
        Some(module) => format!("tbot:{module}"),
    })
}

/// `telemetry/line.rs:1`: the file below `src/`, or the last two parts of a library's path.
fn caller(metadata: &Metadata<'_>) -> Option<String> {
    let (file, line) = (metadata.file()?, metadata.line()?);
    let short = match file.rsplit_once("src/") {
        Some((_, below)) if ours(metadata.target()) || !below.contains('/') => below,
        _ => {
            let start = file.rmatch_indices('/').nth(1).map_or(0, |(at, _)| at + 1);
            file.get(start..).unwrap_or(file)
        }
    };
    Some(format!("{short}:{line}"))
}

fn stamp(now: SystemTime, milliseconds: bool) -> String {
    let now = OffsetDateTime::from(now);
    let format = if milliseconds {
        format_description!("[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z")
    } else {
        format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]Z")
    };
    // Years beyond 9999 cannot be written; an empty stamp is better than no line.
    now.format(format).unwrap_or_default()
}

fn needs_quotes(text: &str) -> bool {
    text.is_empty()
        || text
            .chars()
            .any(|c| c.is_whitespace() || c == '"' || c == '\\' || dangerous(c))
}

/// Characters that move the cursor, break the line or reorder what is read.
fn dangerous(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{2028}' | '\u{2029}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn escaped(line: &mut String, text: &str, quoted: bool) {
    for c in text.chars() {
        if dangerous(c) || (quoted && (c == '"' || c == '\\')) {
            if c.is_ascii() {
                line.extend(c.escape_default());
            } else {
                line.extend(c.escape_unicode());
            }
        } else {
            line.push(c);
        }
    }
}

fn push(line: &mut String, arguments: fmt::Arguments<'_>) {
    // Writing to a string does not fail.
    if line.write_fmt(arguments).is_err() {
        line.push('?');
    }
}

/// What an event carries.
#[derive(Default)]
struct Fields {
    message: String,
    component: Option<String>,
    rest: Vec<(&'static str, Value)>,
}

impl Fields {
    fn of(event: &Event<'_>) -> Self {
        let mut fields = Self::default();
        event.record(&mut fields);
        fields
    }

    fn add(&mut self, field: &Field, value: Value) {
        match (field.name(), value) {
            ("message", Value::String(text)) => self.message = text,
            ("component", Value::String(text)) => self.component = Some(text),
            (name, value) => self.rest.push((name, value)),
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add(field, format!("{value:?}").into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add(field, value.into());
    }
}
