//! The audit log: one JSON object per line for each join, certificate, refusal and change.
//!
//! Event names and codes are those of a Teleport 18.0.0 cluster, so that what reads its log reads
//! this one. Callers must not put secrets into events; names of `token` tokens are secrets.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use serde_json::{Map, Value};
use uuid::Uuid;

use super::instant::rfc3339;
use crate::clock::Clock;

/// An audit log that cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the audit log {path}: {source}")]
pub struct AuditError {
    /// The file of the log.
    pub path: PathBuf,
    /// Why the system refused; usually a directory that is not ours.
    #[source]
    pub source: io::Error,
}

/// The audit log of one cluster; clones share it.
#[derive(Debug, Clone)]
pub struct Audit(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    clock: Clock,
    cluster_name: String,
    sink: Mutex<Sink>,
}

#[derive(Debug)]
enum Sink {
    File { path: PathBuf, file: File },
    Memory(Vec<Value>),
}

impl Audit {
    /// Opens the log at `path` for appending; the file has mode 0600 afterwards.
    pub fn open(path: &Path, clock: Clock, cluster_name: &str) -> Result<Self, AuditError> {
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)
            .and_then(|file| {
                file.set_permissions(PermissionsExt::from_mode(0o600))?;
                Ok(file)
            })
            .map_err(|source| AuditError {
                path: path.to_owned(),
                source,
            })?;
        let path = path.to_owned();
        Ok(Self::new(clock, cluster_name, Sink::File { path, file }))
    }

    /// A log that keeps its events in memory, for tests and throw-away clusters.
    #[must_use]
    pub fn in_memory(clock: Clock, cluster_name: &str) -> Self {
        Self::new(clock, cluster_name, Sink::Memory(Vec::new()))
    }

    fn new(clock: Clock, cluster_name: &str, sink: Sink) -> Self {
        Self(Arc::new(Inner {
            clock,
            cluster_name: cluster_name.to_owned(),
            sink: Mutex::new(sink),
        }))
    }

    /// Writes one event, an object that holds at least `event` and `code`.
    ///
    /// Adds `time`, `uid`, `ei` and `cluster_name`; a value that is no object becomes an event
    /// with the single member `message`. A log that cannot be written is told as an error in the
    /// process log: what happened has happened, and refusing it afterwards helps nobody.
    pub fn emit(&self, event: impl Into<Value>) {
        let mut members = match event.into() {
            Value::Object(members) => members,
            other => Map::from_iter([("message".to_owned(), other)]),
        };
        members.insert("time".to_owned(), rfc3339(self.0.clock.now()).into());
        members.insert("uid".to_owned(), Uuid::new_v4().to_string().into());
        members.insert(
            "cluster_name".to_owned(),
            self.0.cluster_name.clone().into(),
        );
        members.entry("ei").or_insert_with(|| 0.into());
        let text = |key: &str| members.get(key).and_then(Value::as_str).unwrap_or_default();
        let (name, code) = (text("event").to_owned(), text("code").to_owned());
        let event = Value::Object(members);
        let mut line = event.to_string();
        tracing::info!(event = name, code, audit = line, "audit event");
        let mut sink = self.0.sink.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *sink {
            Sink::Memory(events) => events.push(event),
            Sink::File { path, file } => {
                line.push('\n');
                if let Err(error) = file.write_all(line.as_bytes()) {
                    tracing::error!(
                        path = %path.display(), event = name, %error,
                        "an audit event could not be written; free space or fix the file's owner"
                    );
                }
            }
        }
    }

    /// The events so far of a log in memory; empty for a log in a file.
    #[must_use]
    pub fn events(&self) -> Vec<Value> {
        match &*self.0.sink.lock().unwrap_or_else(PoisonError::into_inner) {
            Sink::Memory(events) => events.clone(),
            Sink::File { .. } => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use serde_json::json;

    use super::*;

    fn clock() -> Clock {
        Clock::simulated(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000))
    }

    #[tokio::test(start_paused = true)]
    async fn an_event_is_one_line_in_a_private_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        std::fs::write(&path, "").unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
        let audit = Audit::open(&path, clock(), "c").unwrap();
        audit.emit(json!({"event": "bot.join", "code": "TJ001I", "note": "two\nlines"}));
        audit.emit(json!({"event": "bot.create", "code": "TB001I"}));
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0]["note"], "two\nlines");
        assert_eq!(lines[0]["cluster_name"], "c");
        assert_eq!(lines[0]["time"], "2027-01-15T08:00:00Z");
        assert_eq!(lines[0]["ei"], 0);
        assert_ne!(lines[0]["uid"], lines[1]["uid"]);
    }

    #[tokio::test(start_paused = true)]
    async fn memory_keeps_events_and_takes_what_is_no_object() {
        let audit = Audit::in_memory(clock(), "c");
        audit.clone().emit(json!({"event": "a", "code": "b"}));
        audit.emit("odd");
        let events = audit.events();
        assert_eq!(events[0]["event"], "a");
        assert_eq!(events[1]["message"], "odd");
    }

    #[tokio::test(start_paused = true)]
    async fn an_error_names_the_file() {
        let error = Audit::open(Path::new("/proc/nowhere/audit"), clock(), "c").unwrap_err();
        assert!(error.to_string().contains("/proc/nowhere/audit"), "{error}");
    }
}
