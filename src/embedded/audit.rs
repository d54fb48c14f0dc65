//! The audit log: one JSON object per line for each join, certificate, refusal and change.
//!
//! Event names and codes are those of a Teleport 18.0.0 cluster, so that what reads its log reads
//! this one. Callers must not put secrets into events; names of `token` tokens are secrets.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use serde_json::{Map, Value};
use uuid::Uuid;

use super::files;
use super::instant::rfc3339;
use crate::clock::Clock;

/// The size at which a log is put aside, in bytes: about a hundred thousand events.
pub const MAX_SIZE: u64 = 64 * 1024 * 1024;

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
    File(Log),
    Memory(Vec<Value>),
}

/// A file that begins anew when it is full.
#[derive(Debug)]
struct Log {
    path: PathBuf,
    file: File,
    size: u64,
    most: u64,
}

impl Log {
    fn open(path: PathBuf, most: u64) -> io::Result<Self> {
        let file = files::open(&path, OpenOptions::new().append(true).create(true))?;
        let size = file.metadata()?.len();
        Ok(Self {
            path,
            file,
            size,
            most,
        })
    }

    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        let length = line.len() as u64;
        if self.size > 0 && self.size + length > self.most {
            let mut old = self.path.clone().into_os_string();
            old.push(".1");
            let begun =
                fs::rename(&self.path, old).and_then(|()| Self::open(self.path.clone(), self.most));
            match begun {
                Ok(new) => *self = new,
                // Rather too long a log than a gap in it.
                Err(error) => tracing::error!(
                    path = %self.path.display(), %error,
                    "the full audit log could not be put aside"
                ),
            }
        }
        self.file.write_all(line)?;
        self.size += length;
        Ok(())
    }
}

impl Audit {
    /// Opens the log at `path` for appending; the file has mode 0600 afterwards.
    ///
    /// At [`MAX_SIZE`] it becomes `<path>.1`, in the place of the one before, and a new one begins.
    pub fn open(path: &Path, clock: Clock, cluster_name: &str) -> Result<Self, AuditError> {
        Self::with_size(path, clock, cluster_name, MAX_SIZE)
    }

    fn with_size(
        path: &Path,
        clock: Clock,
        cluster_name: &str,
        most: u64,
    ) -> Result<Self, AuditError> {
        let log = Log::open(path.to_owned(), most).map_err(|source| AuditError {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self::new(clock, cluster_name, Sink::File(log)))
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
            Sink::File(log) => {
                line.push('\n');
                if let Err(error) = log.write(line.as_bytes()) {
                    tracing::error!(
                        path = %log.path.display(), event = name, %error,
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
            Sink::File(_) => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
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
    async fn a_full_log_is_put_aside_and_no_line_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let (path, old) = (
            dir.path().join("audit.jsonl"),
            dir.path().join("audit.jsonl.1"),
        );
        let numbers = |path: &Path| -> Vec<u64> {
            let text = std::fs::read_to_string(path).unwrap();
            let events = text
                .lines()
                .map(|line| serde_json::from_str::<Value>(line).unwrap());
            events
                .map(|event| event["number"].as_u64().unwrap())
                .collect()
        };
        let mut number = 0_u64;
        // Also over a restart.
        for _ in 0..2 {
            let audit = Audit::with_size(&path, clock(), "c", 2000).unwrap();
            for _ in 0..13 {
                number += 1;
                audit.emit(json!({"event": "e", "code": "c", "number": number}));
            }
        }
        for path in [&path, &old] {
            let metadata = std::fs::metadata(path).unwrap();
            assert!(metadata.len() <= 2000);
            assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
        }
        let kept = [numbers(&old), numbers(&path)].concat();
        let first = kept[0];
        assert_eq!(kept, (first..=number).collect::<Vec<_>>());
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
