//! What a bot keeps in its storage to prove itself again: its keys and the join state, in the files of
//! upstream's agent (`lib/auth/join/boundkeypair/boundkeypair.go`).
//!
//! | file | content |
//! |---|---|
//! | `id_bkp` | the key in use, PEM; absent or empty before the first join by a secret |
//! | `id_bkp.pub` | its public half, an `authorized_keys` line |
//! | `bkp_state` | the join state, as the cluster gave it |
//! | `bkp_key_history.json` | the last keys, newest first |
//!
//! All of them are written as one set, so a stop at any instruction leaves the set before or after. A
//! new key is stored in the history before the cluster hears of it, and stays there until ten newer
//! ones came: whichever key the cluster asks for after a stop is there.

use std::sync::Arc;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::clock::rfc3339_nanos;
use crate::crypto::{KeyError, PrivateKey, ssh};
use crate::destination::{Destination, DestinationError, FileSet};
use crate::secret::Secret;

/// The key in use.
const KEY: &str = "id_bkp";
/// Its public half.
const PUBLIC: &str = "id_bkp.pub";
/// The join state.
const STATE: &str = "bkp_state";
/// The last keys.
const HISTORY: &str = "bkp_key_history.json";
/// How many of them.
const KEPT: usize = 10;

/// Why the keys cannot be used. Nothing was changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum KeysError {
    /// The storage failed.
    #[error("bot storage: {0}")]
    Storage(#[from] DestinationError),
    /// A file holds something else. The bot may be bound to the key that it held: bring it back
    /// from a copy, or remove all four files and register the bot anew.
    #[error(
        "{0} in the bot's storage cannot be read: bring it back, or remove `id_bkp*` and `bkp_*` and \
         register the bot anew"
    )]
    Damaged(&'static str),
    /// A key cannot be written; never happens for keys made here.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The cluster bound a key that is not in the storage.
    #[error(
        "the cluster asks for a key that is not in the bot's storage: is this the storage of another \
         bot, or an old copy?"
    )]
    Unknown,
}

/// The keys and the join state of one bot.
#[derive(Debug, Clone, Default)]
pub(crate) struct Keys {
    active: Option<PrivateKey>,
    history: Vec<Entry>,
    state: Option<Secret<Vec<u8>>>,
}

/// A key, and since when it is kept.
#[derive(Debug, Clone)]
struct Entry {
    time: String,
    /// As it is stored; what cannot be read is kept too.
    pem: Secret<String>,
    key: Option<PrivateKey>,
}

impl Entry {
    fn of(key: PrivateKey, now: SystemTime) -> Self {
        Self {
            time: rfc3339_nanos(now),
            pem: key.to_pem(),
            key: Some(key),
        }
    }

    fn readable(&self) -> bool {
        self.key.is_some()
    }
}

#[derive(Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
struct HistoryFile {
    entries: Vec<HistoryEntry>,
}

#[derive(Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
struct HistoryEntry {
    time: String,
    private_key: String,
}

impl Keys {
    /// Reads what is stored; nothing of it has to be there.
    ///
    /// # Errors
    /// [`KeysError`]: what is there and cannot be read is not taken for absent.
    pub(crate) async fn load(
        storage: &Arc<dyn Destination>,
        now: SystemTime,
    ) -> Result<Self, KeysError> {
        let key = match storage.read(KEY).await? {
            Some(bytes) if !blank(&bytes) => Some(key(&bytes).ok_or(KeysError::Damaged(KEY))?),
            _ => None,
        };
        let state = storage.read(STATE).await?.filter(|bytes| !blank(bytes));
        let mut history = match storage.read(HISTORY).await? {
            Some(bytes) if !blank(&bytes) => match entries(&bytes) {
                Some(history) if history.is_empty() || history.iter().any(Entry::readable) => {
                    let unreadable = history.iter().filter(|entry| !entry.readable()).count();
                    if unreadable > 0 {
                        tracing::warn!(unreadable, "Keys in {HISTORY} cannot be read");
                    }
                    history
                }
                // The key in use is enough, as long as the cluster is not set back.
                _ if key.is_some() => {
                    tracing::warn!(
                        "{HISTORY} in the bot's storage cannot be read and is begun anew"
                    );
                    Vec::new()
                }
                _ => return Err(KeysError::Damaged(HISTORY)),
            },
            _ => Vec::new(),
        };
        if let Some(key) = &key
            && history.is_empty()
        {
            history.push(Entry::of(key.clone(), now));
        }
        Ok(Self {
            active: key,
            history,
            state,
        })
    }

    /// A bot with this key and nothing else, to be registered with a cluster.
    pub(crate) fn unbound(key: PrivateKey, now: SystemTime) -> Self {
        let mut keys = Self::default();
        keys.add(key.clone(), now);
        keys.active = Some(key);
        keys
    }

    /// Writes everything as one set, and nothing of a join state before it stays.
    ///
    /// # Errors
    /// [`KeysError`]; what was stored before is still there.
    pub(crate) async fn replace(mut self, storage: &Arc<dyn Destination>) -> Result<(), KeysError> {
        if self.state.is_none() && storage.read(STATE).await?.is_some() {
            self.state = Some(Secret::new(Vec::new()));
        }
        self.store(storage).await
    }

    /// Writes everything as one set.
    ///
    /// # Errors
    /// [`KeysError`]; what was stored before is still there.
    pub(crate) async fn store(&self, storage: &Arc<dyn Destination>) -> Result<(), KeysError> {
        let mut files = FileSet::new();
        let mut put = |name: &str, content: Vec<u8>| {
            files.insert(name.to_owned(), Secret::new(content));
        };
        if let Some(key) = &self.active {
            put(KEY, key.to_pem().expose().clone().into_bytes());
            put(PUBLIC, key.public_ssh_line()?.into_bytes());
        }
        if let Some(state) = &self.state {
            put(STATE, state.expose().clone());
        }
        let history = HistoryFile {
            entries: self
                .history
                .iter()
                .map(|entry| HistoryEntry {
                    time: entry.time.clone(),
                    private_key: entry.pem.expose().clone(),
                })
                .collect(),
        };
        let history = serde_json::to_vec(&history).map_err(|_source| KeyError::Library)?;
        put(HISTORY, history);
        storage.write(files).await?;
        Ok(())
    }

    /// Whether there is any key.
    pub(crate) fn any(&self) -> bool {
        self.active.is_some() || !self.history.is_empty()
    }

    /// The key in use.
    pub(crate) fn active(&self) -> Option<&PrivateKey> {
        self.active.as_ref()
    }

    /// The join state of the last join.
    pub(crate) fn state(&self) -> Option<&Secret<Vec<u8>>> {
        self.state.as_ref()
    }

    /// The key with this public half (an `authorized_keys` line).
    ///
    /// # Errors
    /// [`KeysError::Unknown`].
    pub(crate) fn find(&self, public: &str) -> Result<&PrivateKey, KeysError> {
        let spki = ssh::spki_of_public_line(public).map_err(|_source| KeysError::Unknown)?;
        let history = self.history.iter().filter_map(|entry| entry.key.as_ref());
        self.active
            .iter()
            .chain(history)
            .find(|key| key.public_spki() == spki)
            .ok_or(KeysError::Unknown)
    }

    /// Keeps a new key, to be stored before it is sent. It is not in use yet.
    pub(crate) fn add(&mut self, key: PrivateKey, now: SystemTime) {
        self.history.insert(0, Entry::of(key, now));
        self.history.truncate(KEPT);
    }

    /// Takes what a join ended with: the key that is in use now, and the join state.
    ///
    /// # Errors
    /// [`KeysError::Unknown`]; nothing has changed then.
    pub(crate) fn settle(&mut self, public: &str, state: Vec<u8>) -> Result<(), KeysError> {
        self.active = Some(self.find(public)?.clone());
        self.state = Some(Secret::new(state));
        Ok(())
    }
}

fn blank(bytes: &Secret<Vec<u8>>) -> bool {
    bytes.expose().trim_ascii().is_empty()
}

fn key(bytes: &Secret<Vec<u8>>) -> Option<PrivateKey> {
    PrivateKey::from_pem(std::str::from_utf8(bytes.expose()).ok()?).ok()
}

fn entries(bytes: &Secret<Vec<u8>>) -> Option<Vec<Entry>> {
    let file: HistoryFile = serde_json::from_slice(bytes.expose()).ok()?;
    let entry = |entry: &HistoryEntry| {
        let pem = Secret::new(entry.private_key.clone());
        let key = PrivateKey::from_pem(pem.expose()).ok();
        Entry {
            time: entry.time.clone(),
            pem,
            key,
        }
    };
    Some(file.entries.iter().take(KEPT).map(entry).collect())
}

#[cfg(test)]
#[path = "keys_tests.rs"]
mod tests;
