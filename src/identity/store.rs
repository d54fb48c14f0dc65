//! The bot's own identity through crashes: a journal of two slots inside a destination, and a spare
//! one for the day on which one of the two cannot be written.
//!
//! A slot holds one record, replaced as a whole. A new key goes into the slot that does *not* hold
//! the newest identity before it is sent anywhere; the identity made with it replaces it there
//! before it is used. So one complete identity is stored at every instant, and after a stop both
//! slots are tried. The files that upstream's agent keeps are written after that, so that the
//! storage can be handed back to it, and are read when it was that agent that wrote last.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;
use zeroize::{Zeroize, ZeroizeOnDrop};

use super::{Identity, MaterialError};
use crate::crypto::{KeyError, PrivateKey, sha256_hex};
use crate::destination::{Destination, DestinationError, FileSet};
use crate::secret::Secret;

/// The slots' file names; the last is the spare one.
const SLOTS: [&str; 3] = [".slot-0", ".slot-1", ".slot-2"];
/// The first word of a slot and the version of its form.
const MAGIC: &str = "tbot-identity-1";
/// What upstream puts between the authorities in one file.
const JOINER: &str = "$";

/// Why the storage failed. What it held before is still there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The destination failed.
    #[error(transparent)]
    Destination(#[from] DestinationError),
    /// The record cannot be written as text; never happens for keys made here.
    #[error("cannot write the record: {0}")]
    Encode(#[from] serde_json::Error),
}

/// An identity that was stored, and with which token it was made.
#[derive(Debug, Clone)]
pub struct Stored {
    /// The identity, checked against itself. It may be over.
    pub identity: Identity,
    /// Lower-case hex SHA-256 of the join token; empty if it is not known.
    pub token_hash: String,
}

/// What the storage holds.
#[derive(Debug, Default)]
pub struct Loaded {
    /// Every complete identity, newest first.
    pub candidates: Vec<Stored>,
    /// A key that was to be certified when the agent stopped.
    pub pending: Option<PrivateKey>,
    /// What was found and cannot be used, one sentence each, without secrets.
    pub warnings: Vec<String>,
}

/// The bot's own storage.
#[derive(Debug)]
pub struct Store {
    destination: Arc<dyn Destination>,
    position: Mutex<Option<Position>>,
}

/// Where the journal stands.
#[derive(Debug, Clone, Copy, Default)]
struct Position {
    /// The highest sequence number of any slot.
    sequence: u64,
    /// The slot of the newest identity.
    issued: Option<usize>,
}

impl Position {
    /// The slots that may be overwritten, the one to begin with first.
    fn free(self) -> impl Iterator<Item = (usize, &'static str)> {
        let slots = SLOTS.into_iter().enumerate();
        slots.filter(move |(slot, _)| Some(*slot) != self.issued)
    }
}

#[derive(Serialize, Deserialize)]
struct Record {
    sequence: u64,
    state: State,
}

#[derive(Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
#[serde(rename_all = "snake_case")]
enum State {
    /// A key that is about to be sent.
    Pending { key: String },
    /// A complete identity.
    Issued {
        key: String,
        tls: String,
        tls_authorities: Vec<String>,
        ssh: String,
        ssh_authorities: Vec<String>,
        token_hash: String,
    },
}

/// Why stored bytes are not used.
#[derive(Debug, thiserror::Error)]
enum Unusable {
    #[error("it is torn or not this agent's")]
    Torn,
    #[error("its key: {0}")]
    Key(#[from] KeyError),
    #[error(transparent)]
    Material(#[from] MaterialError),
}

enum Slot {
    Pending(PrivateKey),
    Issued(Box<Stored>),
}

impl Store {
    /// A store in `destination`, which must be initialised. Touches nothing yet.
    pub fn open(destination: Arc<dyn Destination>) -> Self {
        Self {
            destination,
            position: Mutex::new(None),
        }
    }

    /// Where everything is kept.
    pub fn destination(&self) -> &Arc<dyn Destination> {
        &self.destination
    }

    /// Reads everything there is. Damaged and unreadable parts are told and left alone.
    ///
    /// # Errors
    /// Something cannot be read, and nothing else holds an identity: it may be in there, and joining
    /// anew would lose it.
    pub async fn load(&self) -> Result<Loaded, StoreError> {
        let mut position = self.position.lock().await;
        let (found, loaded) = self.read().await?;
        *position = Some(found);
        Ok(loaded)
    }

    /// Stores a key before it is sent to the cluster.
    pub async fn begin(&self, key: &PrivateKey) -> Result<(), StoreError> {
        let state = State::Pending {
            key: key.to_pem().expose().clone(),
        };
        self.append(state).await
    }

    /// Stores an identity before it is used.
    pub async fn commit(&self, identity: &Identity, token_hash: &str) -> Result<(), StoreError> {
        let state = State::Issued {
            key: identity.key().to_pem().expose().clone(),
            tls: identity.tls_pem().to_owned(),
            tls_authorities: identity.tls_authorities().to_vec(),
            ssh: identity.ssh_line().to_owned(),
            ssh_authorities: identity.ssh_authorities().to_vec(),
            token_hash: token_hash.to_owned(),
        };
        self.append(state).await?;
        // The identity is safe; other agents' view of it may lag behind.
        if let Err(error) = self
            .destination
            .write(upstream_files(identity, token_hash))
            .await
        {
            tracing::warn!(%error, "The identity is stored, but not in the files that others read");
        }
        Ok(())
    }

    async fn append(&self, state: State) -> Result<(), StoreError> {
        let mut held = self.position.lock().await;
        let position = match *held {
            Some(position) => position,
            None => self.read().await?.0,
        };
        let sequence = position.sequence + 1;
        let issued = matches!(state, State::Issued { .. });
        let bytes = encode(&Record { sequence, state })?;
        // Where the journal stands after a failed write is found out by reading.
        *held = None;
        let mut failed = None;
        for (slot, name) in position.free() {
            let files = FileSet::from([(name.to_owned(), bytes.clone())]);
            match self.destination.write(files).await {
                Ok(()) => {
                    *held = Some(Position {
                        sequence,
                        issued: if issued { Some(slot) } else { position.issued },
                    });
                    return Ok(());
                }
                Err(error) => {
                    failed.get_or_insert(error);
                }
            }
        }
        failed.map_or(Ok(()), |error| Err(error.into()))
    }

    async fn read(&self) -> Result<(Position, Loaded), StoreError> {
        let mut position = Position::default();
        let mut loaded = Loaded::default();
        let mut issued = Vec::new();
        let mut pending: Option<(u64, PrivateKey)> = None;
        let mut unread = None;
        for (slot, name) in SLOTS.into_iter().enumerate() {
            let bytes = match self.destination.read(name).await {
                Ok(Some(bytes)) => bytes,
                Ok(None) => continue,
                Err(error) => {
                    loaded.warnings.push(error.to_string());
                    unread.get_or_insert(error);
                    continue;
                }
            };
            match decode(&bytes) {
                Ok((sequence, content)) => {
                    position.sequence = position.sequence.max(sequence);
                    match content {
                        Slot::Pending(key) => {
                            if pending.as_ref().is_none_or(|(other, _)| sequence > *other) {
                                pending = Some((sequence, key));
                            }
                        }
                        Slot::Issued(stored) => issued.push((sequence, slot, *stored)),
                    }
                }
                Err(problem) => loaded
                    .warnings
                    .push(format!("{name} is not used: {problem}")),
            }
        }
        issued.sort_by_key(|(sequence, _, _)| std::cmp::Reverse(*sequence));
        let newest = issued.first().map(|(sequence, slot, _)| (*sequence, *slot));
        position.issued = newest.map(|(_, slot)| slot);
        loaded.pending = pending
            .filter(|(sequence, _)| newest.is_none_or(|(issued, _)| *sequence > issued))
            .map(|(_, key)| key);
        loaded.candidates = issued.into_iter().map(|(_, _, stored)| stored).collect();
        match self.read_upstream().await {
            Ok(Some(Ok(stored))) => insert(&mut loaded.candidates, stored),
            Ok(Some(Err(problem))) => loaded.warnings.push(format!(
                "the files of another agent are not used: {problem}"
            )),
            Ok(None) => {}
            Err(error) => {
                loaded.warnings.push(error.to_string());
                unread.get_or_insert(error);
            }
        }
        match unread {
            Some(error) if loaded.candidates.is_empty() => Err(error.into()),
            _ => Ok((position, loaded)),
        }
    }

    /// The identity in upstream's files; `None` if there is none.
    async fn read_upstream(&self) -> Result<Option<Result<Stored, Unusable>>, DestinationError> {
        let mut texts = Vec::new();
        for name in [
            "key",
            "tlscert",
            "tlscacerts",
            "key-cert.pub",
            "sshcacerts",
            "tokenhash",
        ] {
            let text = match self.destination.read(name).await? {
                Some(bytes) => std::str::from_utf8(bytes.expose()).map(str::to_owned).ok(),
                None => None,
            };
            // Files that `tbot init` made are there and empty.
            texts.push(Secret::new(text.unwrap_or_default()));
        }
        let [key, tls, tls_authorities, ssh, ssh_authorities, token_hash] = texts.as_slice() else {
            return Ok(None);
        };
        if key.expose().is_empty() || tls.expose().is_empty() {
            return Ok(None);
        }
        let list = |text: &Secret<String>| {
            text.expose()
                .split(JOINER)
                .filter(|part| !part.is_empty())
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        let identity = PrivateKey::from_pem(key.expose())
            .map_err(Unusable::from)
            .and_then(|key| {
                Ok(Identity::new(
                    key,
                    tls.expose().clone(),
                    list(tls_authorities),
                    ssh.expose().clone(),
                    list(ssh_authorities),
                )?)
            });
        Ok(Some(identity.map(|identity| Stored {
            identity,
            token_hash: token_hash.expose().clone(),
        })))
    }
}

/// Adds what upstream's files hold: before the slots if another agent renewed since, after them
/// otherwise, not at all if a slot holds it.
fn insert(candidates: &mut Vec<Stored>, other: Stored) {
    let der = |stored: &Stored| stored.identity.tls().der().to_vec();
    if candidates.iter().any(|stored| der(stored) == der(&other)) {
        return;
    }
    let age = |stored: &Stored| (stored.identity.not_before(), stored.identity.generation());
    match candidates.first() {
        Some(newest) if age(newest) >= age(&other) => candidates.push(other),
        _ => candidates.insert(0, other),
    }
}

fn upstream_files(identity: &Identity, token_hash: &str) -> FileSet {
    let public = identity.key().public_ssh_line().unwrap_or_default();
    let key = identity.key().to_pem().expose().clone();
    [
        ("key", key),
        ("key.pub", public),
        ("tlscert", identity.tls_pem().to_owned()),
        ("tlscacerts", identity.tls_authorities().join(JOINER)),
        ("key-cert.pub", identity.ssh_line().to_owned()),
        ("sshcacerts", identity.ssh_authorities().join(JOINER)),
        ("tokenhash", token_hash.to_owned()),
    ]
    .into_iter()
    .map(|(name, text)| (name.to_owned(), Secret::new(text.into_bytes())))
    .collect()
}

/// One line with the checksum of what follows, then the record as JSON.
fn encode(record: &Record) -> Result<Secret<Vec<u8>>, StoreError> {
    let body = Secret::new(serde_json::to_vec(record)?);
    let mut bytes = format!("{MAGIC} {}\n", sha256_hex(body.expose())).into_bytes();
    bytes.reserve_exact(body.expose().len());
    bytes.extend_from_slice(body.expose());
    Ok(Secret::new(bytes))
}

fn decode(bytes: &Secret<Vec<u8>>) -> Result<(u64, Slot), Unusable> {
    let bytes = bytes.expose();
    let end = bytes
        .iter()
        .position(|byte| *byte == b'\n')
        .ok_or(Unusable::Torn)?;
    let (head, rest) = bytes.split_at_checked(end).ok_or(Unusable::Torn)?;
    let body = rest.get(1..).ok_or(Unusable::Torn)?;
    let expected = format!("{MAGIC} {}", sha256_hex(body));
    if head != expected.as_bytes() {
        return Err(Unusable::Torn);
    }
    let record: Record = serde_json::from_slice(body).map_err(|_foreign| Unusable::Torn)?;
    let slot = match &record.state {
        State::Pending { key } => Slot::Pending(PrivateKey::from_pem(key)?),
        State::Issued {
            key,
            tls,
            tls_authorities,
            ssh,
            ssh_authorities,
            token_hash,
        } => Slot::Issued(Box::new(Stored {
            identity: Identity::new(
                PrivateKey::from_pem(key)?,
                tls.clone(),
                tls_authorities.clone(),
                ssh.clone(),
                ssh_authorities.clone(),
            )?,
            token_hash: token_hash.clone(),
        })),
    };
    Ok((record.sequence, slot))
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Record({}, <redacted>)", self.sequence)
    }
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
