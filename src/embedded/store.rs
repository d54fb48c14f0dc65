//! Resources in SQLite: durable when a call returns, with revisions, expiry and transactions.
//!
//! One connection behind a mutex: calls are synchronous and short (a few rows), and a write waits
//! for the disk. Whoever runs many of them, or cannot wait a few milliseconds, moves them off the
//! async threads. Every write is one SQLite transaction in WAL mode with `synchronous=FULL`, so a
//! process killed or a machine switched off at any point leaves the state before or after it.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fmt,
    fs::OpenOptions,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rusqlite::{Connection, OptionalExtension as _, Row, Transaction, TransactionBehavior, params};
use serde_json::Value;
use tokio::sync::broadcast;
use uuid::Uuid;

use super::files;
use crate::clock::Clock;

/// The layout of the database this program writes (`PRAGMA user_version`).
const SCHEMA: i64 = 1;

/// Changes a slow listener may lag behind before it is told that it missed some.
const CHANGES: usize = 1024;

const COLUMNS: &str =
    "kind, name, sub_kind, version, description, labels, expires, revision, spec, status";

/// One resource as the cluster keeps it; `kind` and `name` identify it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Resource {
    /// For example `bot`, `token`, `workload_identity`.
    pub kind: String,
    /// A variant of the kind; mostly empty.
    pub sub_kind: String,
    /// Version of the kind's format, for example `v1`.
    pub version: String,
    /// Unique among the resources of its kind. Secret if this is a token of join method `token`.
    pub name: String,
    /// Free text for people.
    pub description: String,
    /// Labels, by key.
    pub labels: BTreeMap<String, String>,
    /// From this time on the resource counts as deleted. Kept to the microsecond.
    pub expires: Option<SystemTime>,
    /// A new UUID at every write; set by the store.
    pub revision: String,
    /// What its maker wants.
    pub spec: Value,
    /// What the cluster found out; `Null` if nothing.
    pub status: Value,
}

impl Resource {
    /// The text at a JSON pointer (`/spec` is implied: `/bot_name`) into the spec; empty if there
    /// is none.
    #[must_use]
    pub fn spec_text(&self, pointer: &str) -> &str {
        let value = self.spec.pointer(pointer);
        value.and_then(Value::as_str).unwrap_or_default()
    }

    /// The list of texts at a JSON pointer into the spec; what is no text in it is left out.
    #[must_use]
    pub fn spec_texts(&self, pointer: &str) -> Vec<String> {
        let items = self.spec.pointer(pointer).and_then(Value::as_array);
        items
            .into_iter()
            .flatten()
            .filter_map(|item| item.as_str().map(str::to_owned))
            .collect()
    }
}

/// What a write expects to find.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Put {
    /// Nothing: fails with [`StoreError::Exists`] otherwise.
    Create,
    /// Anything: replaces what is there.
    Upsert,
    /// The resource at this revision: fails with [`StoreError::NotFound`] or
    /// [`StoreError::Conflict`] otherwise.
    Update {
        /// The revision that was read.
        revision: String,
    },
}

/// Told to listeners after a write is durable, in the order of the writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The kind of the changed resource.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// Whether it is gone now.
    pub deleted: bool,
}

/// Why the store could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The database file cannot be made or made private; check the directory's owner and mode.
    #[error("cannot open the cluster's database {path}: {source}")]
    Open {
        /// The database file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The file was written by a newer program; run that one, or use another data directory.
    #[error(
        "the cluster's database {path} has layout {found}, this program knows up to {SCHEMA}: \
         run the newer tbot that wrote it"
    )]
    Schema {
        /// The database file.
        path: PathBuf,
        /// The layout it claims to have.
        found: i64,
    },
    /// SQLite failed: disk full, file damaged, or not a database.
    #[error("the cluster's database {path} failed: {source}")]
    Sqlite {
        /// The database file.
        path: PathBuf,
        /// SQLite's reason.
        #[source]
        source: rusqlite::Error,
    },
    /// A row holds something that this program did not write.
    #[error("{kind} {name:?} in the cluster's database cannot be read: {source}")]
    Damaged {
        /// The kind of the resource.
        kind: String,
        /// Its name.
        name: String,
        /// What is wrong with its JSON.
        #[source]
        source: serde_json::Error,
    },
    /// A resource of this kind and name is there already; use `-f` to replace it.
    #[error("{kind} {name:?} already exists")]
    Exists {
        /// The kind of the resource.
        kind: String,
        /// Its name.
        name: String,
    },
    /// There is no such resource, or it has expired.
    #[error("{kind} {name:?} is not found")]
    NotFound {
        /// The kind of the resource.
        kind: String,
        /// Its name.
        name: String,
    },
    /// Somebody else wrote the resource since it was read; read it again and retry.
    #[error("{kind} {name:?} was changed by somebody else: its revision is now {found}")]
    Conflict {
        /// The kind of the resource.
        kind: String,
        /// Its name.
        name: String,
        /// The revision in the store.
        found: String,
    },
}

/// The resources of one cluster; clones share them.
#[derive(Clone)]
pub struct Store(Arc<Inner>);

struct Inner {
    path: PathBuf,
    clock: Clock,
    connection: Mutex<Connection>,
    changes: broadcast::Sender<Change>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("path", &self.0.path)
            .finish_non_exhaustive()
    }
}

impl Store {
    /// Opens the database at `path`, making it with mode 0600 if it is missing.
    ///
    /// `clock` decides what has expired.
    pub fn open(path: &Path, clock: Clock) -> Result<Self, StoreError> {
        // SQLite gives its side files the mode of the database, so this covers all three.
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false);
        files::open(path, &mut options).map_err(|source| StoreError::Open {
            path: path.to_owned(),
            source,
        })?;
        let connection = Connection::open(path).map_err(|e| sqlite(path, e))?;
        Self::with(connection, path, clock)
    }

    /// A store that is gone with its last clone, for tests and throw-away clusters.
    pub fn in_memory(clock: Clock) -> Result<Self, StoreError> {
        let path = Path::new(":memory:");
        let connection = Connection::open_in_memory().map_err(|e| sqlite(path, e))?;
        Self::with(connection, path, clock)
    }

    fn with(connection: Connection, path: &Path, clock: Clock) -> Result<Self, StoreError> {
        prepare(&connection, path)?;
        Ok(Self(Arc::new(Inner {
            path: path.to_owned(),
            clock,
            connection: Mutex::new(connection),
            changes: broadcast::Sender::new(CHANGES),
        })))
    }

    /// The resource, unless it is missing or has expired.
    pub fn get(&self, kind: &str, name: &str) -> Result<Option<Resource>, StoreError> {
        self.transaction(|tx| tx.get(kind, name))
    }

    /// All unexpired resources of `kind`, by name.
    pub fn list(&self, kind: &str) -> Result<Vec<Resource>, StoreError> {
        self.transaction(|tx| tx.list(kind))
    }

    /// Writes `resource` and returns it with its new revision.
    pub fn put(&self, resource: Resource, put: &Put) -> Result<Resource, StoreError> {
        self.transaction(|tx| tx.put(resource, put))
    }

    /// Removes the resource; says whether an unexpired one was there.
    pub fn delete(&self, kind: &str, name: &str) -> Result<bool, StoreError> {
        self.transaction(|tx| tx.delete(kind, name))
    }

    /// Runs `work` alone on the store: all of its writes happen, or none if it returns an error.
    ///
    /// `work` must use the [`Tx`] only; a call of the store itself from inside would wait forever.
    pub fn transaction<T, E: From<StoreError>>(
        &self,
        work: impl FnOnce(&Tx<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut connection = self.lock();
        let sqlite = |e| StoreError::Sqlite {
            path: self.0.path.clone(),
            source: e,
        };
        let tx = Tx {
            sql: connection
                .transaction_with_behavior(TransactionBehavior::Deferred)
                .map_err(sqlite)?,
            path: &self.0.path,
            now: micros(self.0.clock.now()),
            changes: RefCell::default(),
        };
        let value = work(&tx)?;
        tx.sql.commit().map_err(sqlite)?;
        // Under the lock, so that listeners hear changes in the order of the writes. Nobody
        // listening is fine.
        for change in tx.changes.into_inner() {
            drop(self.0.changes.send(change));
        }
        Ok(value)
    }

    /// Removes what has expired and tells listeners; returns how many resources that were.
    pub fn sweep(&self) -> Result<usize, StoreError> {
        self.transaction(|tx: &Tx<'_>| Tx::sweep(tx))
    }

    /// Hears of every change from now on. A listener that falls far behind is told so by the
    /// channel and must read everything again.
    #[must_use]
    pub fn changes(&self) -> broadcast::Receiver<Change> {
        self.0.changes.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // A panic inside a transaction rolled it back when it was dropped.
        self.0
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// One running transaction of a [`Store`]; sees its own writes.
#[derive(Debug)]
pub struct Tx<'a> {
    sql: Transaction<'a>,
    path: &'a Path,
    now: i64,
    changes: RefCell<Vec<Change>>,
}

impl Tx<'_> {
    /// As [`Store::get`].
    pub fn get(&self, kind: &str, name: &str) -> Result<Option<Resource>, StoreError> {
        let query = format!("SELECT {COLUMNS} FROM resources WHERE kind = ?1 AND name = ?2");
        let stored = self
            .sql
            .prepare(&query)
            .and_then(|mut statement| statement.query_row([kind, name], Stored::read).optional())
            .map_err(|e| self.sqlite(e))?;
        stored
            .filter(|stored| self.is_alive(stored))
            .map(Stored::parse)
            .transpose()
    }

    /// As [`Store::list`].
    pub fn list(&self, kind: &str) -> Result<Vec<Resource>, StoreError> {
        let query = format!("SELECT {COLUMNS} FROM resources WHERE kind = ?1 ORDER BY name");
        let stored: Vec<Stored> = self
            .sql
            .prepare(&query)
            .and_then(|mut statement| statement.query_map([kind], Stored::read)?.collect())
            .map_err(|e| self.sqlite(e))?;
        stored
            .into_iter()
            .filter(|stored| self.is_alive(stored))
            .map(Stored::parse)
            .collect()
    }

    /// Hands unexpired resources of `kind` to `take`, by name and from the name `start` on, until
    /// it says that it has enough. Holds one of them at a time.
    pub fn each_from(
        &self,
        kind: &str,
        start: &str,
        mut take: impl FnMut(Resource) -> bool,
    ) -> Result<(), StoreError> {
        let query =
            format!("SELECT {COLUMNS} FROM resources WHERE kind = ?1 AND name >= ?2 ORDER BY name");
        let failed = |e| self.sqlite(e);
        let mut statement = self.sql.prepare(&query).map_err(failed)?;
        let mut rows = statement.query([kind, start]).map_err(failed)?;
        while let Some(row) = rows.next().map_err(failed)? {
            let stored = Stored::read(row).map_err(failed)?;
            if self.is_alive(&stored) && !take(stored.parse()?) {
                break;
            }
        }
        Ok(())
    }

    /// As [`Store::put`].
    pub fn put(&self, mut resource: Resource, put: &Put) -> Result<Resource, StoreError> {
        let (kind, name) = (resource.kind.clone(), resource.name.clone());
        let found = match put {
            Put::Upsert => None,
            Put::Create | Put::Update { .. } => self.get(&kind, &name)?,
        };
        match (put, found) {
            (Put::Create, Some(_)) => return Err(StoreError::Exists { kind, name }),
            (Put::Update { .. }, None) => return Err(StoreError::NotFound { kind, name }),
            (Put::Update { revision }, Some(found)) if found.revision != *revision => {
                return Err(StoreError::Conflict {
                    kind,
                    name,
                    found: found.revision,
                });
            }
            _ => {}
        }
        resource.revision = Uuid::new_v4().to_string();
        let expires = resource.expires.map(micros);
        resource.expires = expires.map(from_micros);
        let query = format!(
            "INSERT OR REPLACE INTO resources ({COLUMNS}) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)"
        );
        self.sql
            .prepare(&query)
            .and_then(|mut statement| {
                statement.execute(params![
                    resource.kind,
                    resource.name,
                    resource.sub_kind,
                    resource.version,
                    resource.description,
                    serde_json::json!(resource.labels).to_string(),
                    expires,
                    resource.revision,
                    resource.spec.to_string(),
                    resource.status.to_string(),
                ])
            })
            .map_err(|e| self.sqlite(e))?;
        self.changed(kind, name, false);
        Ok(resource)
    }

    /// As [`Store::delete`].
    pub fn delete(&self, kind: &str, name: &str) -> Result<bool, StoreError> {
        let existed = self.get(kind, name)?.is_some();
        let removed = self
            .sql
            .prepare("DELETE FROM resources WHERE kind = ?1 AND name = ?2")
            .and_then(|mut statement| statement.execute([kind, name]))
            .map_err(|e| self.sqlite(e))?;
        if removed > 0 {
            self.changed(kind.to_owned(), name.to_owned(), true);
        }
        Ok(existed)
    }

    fn sweep(&self) -> Result<usize, StoreError> {
        let gone: Vec<(String, String)> = self
            .sql
            .prepare("DELETE FROM resources WHERE expires <= ?1 RETURNING kind, name")
            .and_then(|mut statement| {
                statement
                    .query_map([self.now], |row| Ok((row.get(0)?, row.get(1)?)))?
                    .collect()
            })
            .map_err(|e| self.sqlite(e))?;
        let count = gone.len();
        for (kind, name) in gone {
            self.changed(kind, name, true);
        }
        Ok(count)
    }

    fn is_alive(&self, stored: &Stored) -> bool {
        stored.expires.is_none_or(|expires| self.now < expires)
    }

    fn changed(&self, kind: String, name: String, deleted: bool) {
        self.changes.borrow_mut().push(Change {
            kind,
            name,
            deleted,
        });
    }

    fn sqlite(&self, source: rusqlite::Error) -> StoreError {
        sqlite(self.path, source)
    }
}

/// A row before its JSON is read.
struct Stored {
    resource: Resource,
    labels: String,
    expires: Option<i64>,
    spec: String,
    status: String,
}

impl Stored {
    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        let expires: Option<i64> = row.get(6)?;
        Ok(Self {
            resource: Resource {
                kind: row.get(0)?,
                name: row.get(1)?,
                sub_kind: row.get(2)?,
                version: row.get(3)?,
                description: row.get(4)?,
                labels: BTreeMap::new(),
                expires: expires.map(from_micros),
                revision: row.get(7)?,
                spec: Value::Null,
                status: Value::Null,
            },
            labels: row.get(5)?,
            expires,
            spec: row.get(8)?,
            status: row.get(9)?,
        })
    }

    fn parse(self) -> Result<Resource, StoreError> {
        let Self {
            mut resource,
            labels,
            spec,
            status,
            ..
        } = self;
        let damaged = |source| StoreError::Damaged {
            kind: resource.kind.clone(),
            name: resource.name.clone(),
            source,
        };
        let labels = serde_json::from_str(&labels).map_err(damaged)?;
        let spec = serde_json::from_str(&spec).map_err(damaged)?;
        let status = serde_json::from_str(&status).map_err(damaged)?;
        (resource.labels, resource.spec, resource.status) = (labels, spec, status);
        Ok(resource)
    }
}

/// Sets durability and brings the layout up to date.
fn prepare(connection: &Connection, path: &Path) -> Result<(), StoreError> {
    let run = || -> rusqlite::Result<i64> {
        connection.busy_timeout(Duration::from_secs(5))?;
        connection.query_row("PRAGMA journal_mode = WAL", [], |_| Ok(()))?;
        connection.execute_batch("PRAGMA synchronous = FULL; PRAGMA secure_delete = ON;")?;
        connection.query_row("PRAGMA user_version", [], |row| row.get(0))
    };
    let found = run().map_err(|e| sqlite(path, e))?;
    if found > SCHEMA {
        return Err(StoreError::Schema {
            path: path.to_owned(),
            found,
        });
    }
    if found < SCHEMA {
        connection
            .execute_batch(&format!(
                "BEGIN IMMEDIATE;
                 CREATE TABLE resources (
                     kind TEXT NOT NULL, name TEXT NOT NULL, sub_kind TEXT NOT NULL,
                     version TEXT NOT NULL, description TEXT NOT NULL, labels TEXT NOT NULL,
                     expires INTEGER, revision TEXT NOT NULL, spec TEXT NOT NULL,
                     status TEXT NOT NULL, PRIMARY KEY (kind, name)
                 ) WITHOUT ROWID, STRICT;
                 CREATE INDEX resources_expires ON resources (expires) WHERE expires IS NOT NULL;
                 PRAGMA user_version = {SCHEMA};
                 COMMIT;"
            ))
            .map_err(|e| sqlite(path, e))?;
    }
    Ok(())
}

fn sqlite(path: &Path, source: rusqlite::Error) -> StoreError {
    StoreError::Sqlite {
        path: path.to_owned(),
        source,
    }
}

/// Microseconds since 1970; times that do not fit are the nearest that do.
fn micros(time: SystemTime) -> i64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_micros()).unwrap_or(i64::MAX),
        Err(before) => {
            i64::try_from(before.duration().as_micros()).map_or(i64::MIN, |micros| -micros)
        }
    }
}

fn from_micros(micros: i64) -> SystemTime {
    let distance = Duration::from_micros(micros.unsigned_abs());
    let time = if micros < 0 {
        UNIX_EPOCH.checked_sub(distance)
    } else {
        UNIX_EPOCH.checked_add(distance)
    };
    time.unwrap_or(UNIX_EPOCH)
}

#[cfg(test)]
mod tests;
