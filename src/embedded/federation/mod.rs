//! Federation: the trust bundles of other trust domains, fetched and kept current.
//!
//! Data flows one way: [`source`] reads where a bundle comes from, [`schedule`] says when to ask,
//! [`fetch`] asks ([`verify`] is how it knows whom), and what came becomes the resource's `status`,
//! which agents are told ([`message`]). What cannot be fetched or read leaves the last good bundle.

mod fetch;
mod message;
mod schedule;
mod service;
pub(super) mod source;
mod verify;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::ClusterState;
use super::ca::AuthorityType;
use super::instant::rfc3339;
use super::store::{Change, Put, Resource, StoreError};
use crate::backoff::{Backoff, Loudness, Repeated};
use crate::crypto::jitter;
use crate::spiffe::bundle::{Document, DocumentError};
use fetch::{Fetch, FetchError, Profile};
use source::{Source, SourceError};

pub(super) use fetch::Network;
pub(super) use message::{page, to_message};
pub(super) use service::Federations;

/// The kind of the resource; its name is the trust domain.
pub(super) const KIND: &str = "spiffe_federation";
/// The longest that one attempt may take, redirects included.
const ATTEMPT: Duration = Duration::from_secs(30);
/// How many attempts run at a time.
const AT_A_TIME: usize = 8;
/// The first and the longest wait for a first bundle.
const FIRST_WAITS: (Duration, Duration) = (Duration::from_secs(10), Duration::from_mins(5));
/// The pause after the store failed.
const RETRY: Duration = Duration::from_secs(15);

/// Why a trust domain's bundle is not newer than it was.
#[derive(Debug, thiserror::Error)]
pub(super) enum SyncError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error("no answer within {} s", ATTEMPT.as_secs())]
    Timeout,
    #[error("what the endpoint answered is no SPIFFE bundle: {0}")]
    Document(#[from] DocumentError),
    #[error(
        "the endpoint's bundle has spiffe_sequence {found}, older than the {known} that is known \
         (if its publisher began anew, remove the federation and create it again)"
    )]
    Older {
        /// What came.
        found: u64,
        /// What is known.
        known: u64,
    },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the attempt was cut off")]
    Interrupted,
}

/// Keeps every federation current until `shutdown`.
pub(super) async fn run(
    state: &Arc<ClusterState>,
    network: Arc<dyn Fetch>,
    shutdown: &CancellationToken,
) {
    let syncer = Syncer {
        state: Arc::clone(state),
        network,
        failing: BTreeMap::new(),
        running: BTreeSet::new(),
        attempts: JoinSet::new(),
    };
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = syncer.run() => {}
    }
}

struct Syncer {
    state: Arc<ClusterState>,
    network: Arc<dyn Fetch>,
    failing: BTreeMap<String, Failing>,
    running: BTreeSet<String>,
    attempts: JoinSet<(Resource, Result<(), SyncError>)>,
}

/// A trust domain whose last attempt failed.
struct Failing {
    /// What it was then: somebody who writes it anew wants to see it tried.
    revision: String,
    at: SystemTime,
    /// How long it is left alone.
    wait: Duration,
    row: Repeated,
    waits: Backoff,
}

impl Failing {
    /// When it is tried again. A failure that is yet to come was one before the clock was set back, who
    /// knows how long ago.
    fn due(&self, now: SystemTime) -> SystemTime {
        if self.at > now {
            now
        } else {
            self.at + self.wait
        }
    }
}

impl Syncer {
    async fn run(mut self) {
        let mut changes = self.state.store.changes();
        loop {
            let next = match self.look().await {
                Ok(next) => next,
                Err(error) => {
                    tracing::error!(%error, "the federations cannot be read; trying again");
                    self.state.clock.sleep(RETRY).await;
                    continue;
                }
            };
            let clock = self.state.clock.clone();
            let due = async {
                match next {
                    // Whatever becomes of the clock, it is looked at again when that would be now.
                    Some(at) => tokio::select! {
                        () = clock.sleep_until(at) => {}
                        () = clock.sleep(at.duration_since(clock.now()).unwrap_or_default()) => {}
                    },
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = changed(&mut changes) => {}
                () = due => {}
                Some(ended) = self.attempts.join_next() => match ended {
                    Ok((resource, outcome)) => self.ended(&resource, outcome),
                    // The process is ending.
                    Err(_cancelled) => return,
                },
            }
        }
    }

    /// Starts what is due, and says when the next one is.
    async fn look(&mut self) -> Result<Option<SystemTime>, SyncError> {
        let store = self.state.store.clone();
        let all = tokio::task::spawn_blocking(move || store.list(KIND))
            .await
            .map_err(|_cancelled| SyncError::Interrupted)??;
        let now = self.state.clock.now();
        self.failing
            .retain(|name, _| all.iter().any(|resource| resource.name == *name));
        let mut next: Option<SystemTime> = None;
        for resource in &all {
            if self.running.contains(&resource.name) {
                continue;
            }
            let failing = self.failing.get(&resource.name);
            let failing = failing.filter(|failing| failing.revision == resource.revision);
            let due = failing.map_or_else(
                || schedule::due(resource, now),
                |failing| Some(failing.due(now)),
            );
            match due {
                None => {}
                Some(at) if at > now => next = Some(next.map_or(at, |next| next.min(at))),
                // Whoever ends makes room.
                Some(_) if self.attempts.len() >= AT_A_TIME => {}
                Some(_) => self.start(resource.clone(), &all),
            }
        }
        Ok(next)
    }

    fn start(&mut self, resource: Resource, all: &[Resource]) {
        self.running.insert(resource.name.clone());
        let (state, network) = (Arc::clone(&self.state), Arc::clone(&self.network));
        let source = Source::read(&resource.spec);
        let authorities = match &source {
            Ok(source) => authorities(&state, source, &resource, all),
            Err(_told) => Vec::new(),
        };
        self.attempts.spawn(async move {
            let attempt = attempt(&state, &*network, source, authorities, &resource);
            let outcome = Box::pin(attempt).await;
            (resource, outcome)
        });
    }

    fn ended(&mut self, resource: &Resource, outcome: Result<(), SyncError>) {
        let domain = &resource.name;
        self.running.remove(domain);
        let Err(error) = outcome else {
            let row = self.failing.remove(domain);
            if let Some(failures) = row.and_then(|mut row| row.row.recovered()) {
                tracing::info!(
                    domain,
                    failures,
                    "The bundle of the trust domain is current again"
                );
            }
            return;
        };
        let failing = self
            .failing
            .entry(domain.clone())
            .or_insert_with(|| Failing {
                revision: String::new(),
                at: SystemTime::UNIX_EPOCH,
                wait: Duration::ZERO,
                row: Repeated::default(),
                waits: Backoff::new(FIRST_WAITS.0, FIRST_WAITS.1),
            });
        failing.revision.clone_from(&resource.revision);
        // With a bundle there is no hurry: the next time is when it would have been anyway.
        let wait = current(resource).map_or_else(
            || failing.waits.next_wait(jitter()),
            |known| schedule::interval(known.refresh_hint),
        );
        (failing.at, failing.wait) = (self.state.clock.now(), wait);
        let message = "The bundle of a federated trust domain could not be fetched; the last good \
                       one stays";
        match failing.row.failed(Instant::now(), &error) {
            Loudness::Warn => tracing::warn!(domain, %error, again_in = ?wait, "{message}"),
            Loudness::Debug => tracing::debug!(domain, %error, again_in = ?wait, "{message}"),
        }
    }
}

/// Waits for a change of a federation.
async fn changed(changes: &mut broadcast::Receiver<Change>) {
    loop {
        match changes.recv().await {
            Ok(change) if change.kind != KIND => {}
            Ok(_) | Err(RecvError::Lagged(_)) => return,
            Err(RecvError::Closed) => std::future::pending().await,
        }
    }
}

/// The bundle that a federation has, if it is one.
fn current(resource: &Resource) -> Option<Document> {
    let text = resource.status.get("current_bundle")?.as_str()?;
    Document::parse(text.as_bytes()).ok()
}

/// Who may vouch for an `https_spiffe` endpoint: the newest bundle of the endpoint's own trust domain,
/// or the one that was given to begin with.
fn authorities(
    state: &ClusterState,
    source: &Source,
    resource: &Resource,
    all: &[Resource],
) -> Vec<Vec<u8>> {
    let Source::HttpsSpiffe { id, initial, .. } = source else {
        return Vec::new();
    };
    let domain = id.trust_domain().name();
    if domain == state.name {
        return state.authorities.trusted_tls(AuthorityType::Spiffe);
    }
    let known = all.iter().find(|other| other.name == domain);
    // What was written anew begins anew.
    let begins = domain == resource.name && !schedule::is_from_its_source(resource);
    let given = || Document::parse(initial.as_deref()?.as_bytes()).ok();
    let newest = || known.and_then(current);
    let document = if begins {
        given().or_else(newest)
    } else {
        newest().or_else(given)
    };
    let certificates = document.map(|document| document.authorities);
    let certificates = certificates.unwrap_or_default();
    certificates
        .iter()
        .map(|certificate| certificate.der().to_vec())
        .collect()
}

/// Asks once, and writes down what came.
async fn attempt(
    state: &Arc<ClusterState>,
    network: &dyn Fetch,
    source: Result<Source, SourceError>,
    authorities: Vec<Vec<u8>>,
    resource: &Resource,
) -> Result<(), SyncError> {
    let ask = async |endpoint, profile| {
        let asked = tokio::time::timeout(ATTEMPT, network.fetch(endpoint, profile)).await;
        asked
            .map_err(|_elapsed| SyncError::Timeout)?
            .map_err(SyncError::from)
    };
    let bundle = match source? {
        Source::Static { bundle } => bundle,
        Source::HttpsWeb { endpoint } => ask(endpoint, Profile::Web).await?,
        Source::HttpsSpiffe { endpoint, id, .. } => {
            let now = state.clock.now();
            let profile = Profile::Spiffe {
                id,
                authorities,
                now,
            };
            ask(endpoint, profile).await?
        }
    };
    let document = Document::parse(bundle.as_bytes())?;
    let (state, resource) = (Arc::clone(state), resource.clone());
    tokio::task::spawn_blocking(move || accept(&state, &resource, bundle, &document))
        .await
        .map_err(|_cancelled| SyncError::Interrupted)?
}

/// Makes `bundle` the current one of the federation, unless somebody has changed that meanwhile.
fn accept(
    state: &ClusterState,
    asked: &Resource,
    bundle: String,
    document: &Document,
) -> Result<(), SyncError> {
    let source = asked.spec.get("bundle_source").cloned().unwrap_or_default();
    let now = state.clock.now();
    state.store.transaction(|tx| {
        let Some(mut resource) = tx.get(KIND, &asked.name)? else {
            return Ok(());
        };
        if resource.spec != asked.spec {
            return Ok(());
        }
        if schedule::is_from_its_source(&resource)
            && let Some(known) = current(&resource).and_then(|known| known.sequence)
            && let Some(found) = document.sequence.filter(|found| *found < known)
        {
            return Err(SyncError::Older { found, known });
        }
        let news = resource.status.get("current_bundle") != Some(&Value::from(bundle.as_str()));
        let mut status = json!({
            "current_bundle": bundle,
            "current_bundle_synced_at": rfc3339(now),
            "current_bundle_synced_from": source,
        });
        if source.get("static").is_none() {
            let next = now + schedule::interval(document.refresh_hint);
            crate::join::verify::set(&mut status, "next_sync_at", rfc3339(next));
        }
        resource.status = status;
        let revision = resource.revision.clone();
        tx.put(resource, &Put::Update { revision })?;
        if news {
            tracing::info!(
                domain = asked.name,
                x509_authorities = document.authorities.len(),
                jwt_keys = document.jwt.len(),
                "The bundle of a federated trust domain changed"
            );
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests;
