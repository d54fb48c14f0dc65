//! What was issued, kept beside the cache and across a restart of the agent.
//!
//! While a cluster is away, a workload that asks gets what is still valid, even if the agent was
//! stopped, killed or replaced meanwhile. So SVIDs stay here when their cache entry ends, and with
//! them the bundles and the revocation list that stand beside them in every answer; where the bot's
//! storage is a directory, all of it is written there, after the answer was given and at most every
//! few seconds (`docs/adr/0012`).
//!
//! Nothing of it is believed unchecked: X.509-SVIDs are held against their key and the bundle each
//! time they are taken, JWT-SVIDs against the keys of the bundle and their audiences, and given only to the process that they were issued to, told by its attributes,
//! its ID, the moment in which it began and the boot of the machine. An agent that is pointed elsewhere
//! meanwhile, or joins with another token, begins with an empty shelf.

mod record;
mod row;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

pub(super) use self::row::Holder;
use self::row::{Kept, Row};
use super::issue::{self, Svid};
use super::jwt::{self, JwtSvid};
use super::{Bundles, Crl};
use crate::backoff::{Loudness, Repeated};
use crate::clock::Clock;
use crate::destination::{Destination, FileSet};

/// The file's name in the bot's storage.
const FILE: &str = ".svids";
/// The longest answer of JWT-SVIDs that is kept, in bytes. A token has some 700.
const TOKENS: usize = 16 * 1024;
/// About what an SVID takes besides its longest texts, in bytes.
const OVERHEAD: usize = 512;
/// How often what is over is thrown away.
const SWEEP: Duration = Duration::from_mins(1);
/// The shortest time between two writes.
const PAUSE: Duration = Duration::from_secs(2);
/// The pause after a write as a multiple of what the write took.
const SHARE: u32 = 20;

/// What an answer is found by: a digest of who asked for what.
pub(super) type Mark = [u8; 32];

/// The JWT-SVIDs of one answer. Share it with `Arc`.
#[derive(Debug)]
pub(super) struct Tokens {
    /// When the cluster was asked for them.
    pub(super) asked: SystemTime,
    /// In the cluster's order.
    pub(super) svids: Vec<JwtSvid>,
}

/// What stands beside SVIDs in an answer.
#[derive(Debug, Clone)]
pub struct Beside {
    /// The trust bundles.
    pub bundles: Arc<Bundles>,
    /// The revocation lists, as in [`Crl::Signed`]; `None` if the cluster had none.
    pub crl: Option<Bytes>,
}

/// Whom what is kept comes from, as the configuration names it: the cluster's address, and a hash of the
/// token that says which bot this is; empty where it cannot be read now.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// Where the cluster is.
    pub server: String,
    /// A hash of the join token.
    pub token: String,
}

impl Origin {
    /// Whether both may mean the same bot of the same cluster.
    fn matches(&self, other: &Self) -> bool {
        let tokens = [&self.token, &other.token];
        self.server == other.server
            && (self.token == other.token || tokens.iter().any(|token| token.is_empty()))
    }
}

#[derive(Debug, Default, Clone)]
struct Content {
    svids: Row<Arc<[Svid]>>,
    tokens: Row<Arc<Tokens>>,
    beside: Option<Beside>,
}

/// The shelf. Clones share it. The default one is empty and forgets with the agent.
#[derive(Debug, Clone, Default)]
pub struct Shelf {
    inner: Arc<Inner>,
    _keeper: Option<Arc<AbortOnDropHandle<()>>>,
}

#[derive(Debug, Default)]
struct Inner {
    content: Mutex<Content>,
    changed: Notify,
    origin: Origin,
}

impl Shelf {
    /// A shelf in `storage`, with what an earlier agent of this `origin` left there. It writes until the last clone
    /// is dropped.
    ///
    /// Only a directory of this machine is used: keys of workloads do not leave it. With any other
    /// storage, the shelf forgets with the agent.
    pub async fn open(storage: Arc<dyn Destination>, clock: Clock, origin: Origin) -> Self {
        let lasts = storage.is_persistent() && storage.directory().is_some();
        let storage = Some(storage).filter(|_| lasts);
        let content = match &storage {
            Some(storage) => load(storage.as_ref(), &origin, clock.now()).await,
            None => Content::default(),
        };
        let inner = Arc::new(Inner {
            content: Mutex::new(content),
            changed: Notify::new(),
            origin,
        });
        let keeper = tokio::spawn(keep(Arc::clone(&inner), storage, clock));
        Self {
            inner,
            _keeper: Some(Arc::new(AbortOnDropHandle::new(keeper))),
        }
    }

    /// The bundles and the revocation list of before the restart, or as last told by
    /// [`Shelf::tell`]. Only as long as there is an SVID that they stand beside.
    pub fn beside(&self, now: SystemTime) -> Option<Beside> {
        let content = self.inner.content();
        let used = content.svids.is_used(now) || content.tokens.is_used(now);
        content.beside.clone().filter(|_| used)
    }

    /// The revocation lists of before the restart, or as last told. They count without an SVID too:
    /// others hold SVIDs of the same authorities.
    pub fn lists(&self) -> Option<Bytes> {
        self.inner.content().beside.as_ref()?.crl.clone()
    }

    /// Tells what the cluster says of bundles and revocations.
    pub fn tell(&self, bundles: &Arc<Bundles>, crl: &Crl) {
        let crl = crl.der().cloned();
        let mut content = self.inner.content();
        let known = content.beside.as_ref();
        if known.is_some_and(|known| *known.bundles == **bundles && known.crl == crl) {
            return;
        }
        content.beside = Some(Beside {
            bundles: Arc::clone(bundles),
            crl,
        });
        drop(content);
        self.inner.changed.notify_one();
    }

    /// Keeps an answer.
    pub(super) fn put(&self, mark: Mark, holder: Holder, svids: &Arc<[Svid]>) {
        let kept = kept_svids(holder, Arc::clone(svids));
        self.inner.change(|content| content.svids.put(mark, kept));
    }

    /// Keeps an answer of JWT-SVIDs, unless they are very long.
    pub(super) fn put_tokens(&self, mark: Mark, holder: Holder, tokens: Tokens) {
        let length: usize = tokens.svids.iter().map(|svid| svid.token.len()).sum();
        if length > TOKENS {
            return self.withdraw_tokens(&mark);
        }
        let kept = kept_tokens(holder, tokens);
        self.inner.change(|content| content.tokens.put(mark, kept));
    }

    /// Throws an answer away.
    pub(super) fn withdraw(&self, mark: &Mark) {
        if self.inner.content().svids.remove(mark) {
            self.inner.changed.notify_one();
        }
    }

    /// The same for JWT-SVIDs.
    pub(super) fn withdraw_tokens(&self, mark: &Mark) {
        if self.inner.content().tokens.remove(mark) {
            self.inner.changed.notify_one();
        }
    }

    /// What is kept under `mark`, if it is still good: not expired, for its key, and issued by an
    /// authority of the current bundle.
    pub(super) fn get(&self, mark: &Mark, now: SystemTime) -> Option<Arc<[Svid]>> {
        let (svids, beside) = {
            let content = self.inner.content();
            let kept = content.svids.get(mark)?;
            (Arc::clone(&kept.what), content.beside.clone()?)
        };
        let good = svids
            .iter()
            .try_for_each(|svid| issue::still_good(svid, &beside.bundles, now));
        match good {
            Ok(()) => Some(svids),
            Err(problem) => {
                tracing::debug!(problem, "What was kept for a workload is not used");
                self.withdraw(mark);
                None
            }
        }
    }

    /// The JWT-SVIDs that are kept under `mark`, if they are still good: not expired, for these
    /// audiences, and signed by a key of the current bundle.
    pub(super) fn tokens(
        &self,
        mark: &Mark,
        audiences: &[String],
        now: SystemTime,
    ) -> Option<Arc<Tokens>> {
        let (tokens, beside) = {
            let content = self.inner.content();
            let kept = content.tokens.get(mark)?;
            (Arc::clone(&kept.what), content.beside.clone()?)
        };
        let good = tokens
            .svids
            .iter()
            .try_for_each(|svid| jwt::still_good(svid, audiences, &beside.bundles, now));
        match good {
            Ok(()) => Some(tokens),
            Err(problem) => {
                tracing::debug!(
                    problem,
                    "JWT-SVIDs that were kept for a workload are not used"
                );
                self.withdraw_tokens(mark);
                None
            }
        }
    }

    /// Throws away all JWT-SVIDs of a process.
    pub(super) fn withdraw_tokens_of(&self, holder: &Holder) {
        if self.inner.content().tokens.remove_of(holder) {
            self.inner.changed.notify_one();
        }
    }
}

fn kept_svids(holder: Holder, svids: Arc<[Svid]>) -> Kept<Arc<[Svid]>> {
    // All of an answer have the same key.
    let key = svids.first().map_or(0, |svid| svid.key.len());
    let bytes = |svid: &Svid| OVERHEAD + svid.chain.len() + svid.hint.len();
    Kept {
        holder,
        bytes: key + svids.iter().map(bytes).sum::<usize>(),
        not_after: first_end(svids.iter().map(|svid| svid.not_after)),
        what: svids,
    }
}

fn kept_tokens(holder: Holder, tokens: Tokens) -> Kept<Arc<Tokens>> {
    let svids = || tokens.svids.iter();
    let bytes = svids().map(|svid| OVERHEAD + svid.token.len() + svid.hint.len());
    Kept {
        holder,
        bytes: bytes.sum(),
        not_after: first_end(svids().map(|svid| svid.not_after)),
        what: Arc::new(tokens),
    }
}

/// When the first of several SVIDs expires.
fn first_end(ends: impl Iterator<Item = SystemTime>) -> SystemTime {
    ends.min().unwrap_or(SystemTime::UNIX_EPOCH)
}

impl Content {
    fn is_empty(&self) -> bool {
        self.svids.len() == 0 && self.tokens.len() == 0
    }
}

impl Inner {
    fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Content)) {
        change(&mut self.content());
        self.changed.notify_one();
    }

    /// Throws away what is over, and what was for processes that have ended. Says whether that was
    /// anything.
    fn sweep(&self, now: SystemTime) -> bool {
        // Processes are looked at while others use the shelf.
        let all = self.content().clone();
        let (svids, tokens) = (all.svids.over(now), all.tokens.over(now));
        let mut content = self.content();
        for mark in &svids {
            content.svids.remove(mark);
        }
        for mark in &tokens {
            content.tokens.remove(mark);
        }
        !(svids.is_empty() && tokens.is_empty())
    }
}

/// What an earlier agent left; nothing if that is of no use.
async fn load(storage: &dyn Destination, origin: &Origin, now: SystemTime) -> Content {
    let content = match storage.read(FILE).await {
        Ok(None) => Ok(<(Origin, Content)>::default()),
        Ok(Some(bytes)) => record::decode(&bytes, now).map_err(str::to_owned),
        Err(error) => Err(error.to_string()),
    };
    let content = content.and_then(|(from, content)| {
        if from.matches(origin) {
            Ok(content)
        } else if content.is_empty() {
            Ok(Content::default())
        } else {
            Err("they are of another cluster or another join token".to_owned())
        }
    });
    match content {
        Ok(content) => {
            if !content.is_empty() {
                tracing::info!(
                    x509 = content.svids.len(),
                    jwt = content.tokens.len(),
                    "Still valid SVIDs were kept from before the restart"
                );
            }
            content
        }
        Err(problem) => {
            tracing::warn!(
                file = FILE,
                problem,
                "SVIDs of before the restart are not used; workloads get new ones"
            );
            Content::default()
        }
    }
}

/// Throws away what is over, and writes what changed: at once after a quiet time, and never back to
/// back.
async fn keep(inner: Arc<Inner>, storage: Option<Arc<dyn Destination>>, clock: Clock) {
    let mut failures = Repeated::default();
    let lasting = storage.is_some();
    // What is stored is behind: a write that failed is tried again with the next sweep.
    let mut behind = false;
    loop {
        tokio::select! {
            () = inner.changed.notified(), if lasting => behind = true,
            () = clock.sleep(SWEEP) => {}
        }
        let (sweeping, now) = (Arc::clone(&inner), clock.now());
        // Looking at thousands of processes, and encoding, take a while.
        let changed = tokio::task::spawn_blocking(move || {
            let changed = sweeping.sweep(now) || behind;
            let content = (changed && lasting).then(|| sweeping.content().clone());
            content.map(|content| record::encode(&sweeping.origin, &content))
        });
        let (Ok(Some(bytes)), Some(storage)) = (changed.await, &storage) else {
            continue;
        };
        let begun = Instant::now();
        let files = FileSet::from([(FILE.to_owned(), bytes)]);
        let written = storage.write(files).await;
        behind = written.is_err();
        match written {
            Ok(()) => {
                failures.recovered();
            }
            Err(error) => match failures.failed(Instant::now(), &error) {
                Loudness::Warn => tracing::warn!(
                    %error,
                    "SVIDs cannot be stored; after a restart, workloads depend on the cluster"
                ),
                Loudness::Debug => tracing::debug!(%error, "SVIDs cannot be stored"),
            },
        }
        clock.sleep(PAUSE.max(begun.elapsed() * SHARE)).await;
    }
}

#[cfg(test)]
mod tests;
