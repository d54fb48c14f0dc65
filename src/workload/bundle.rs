//! The trust bundles that relying parties need, kept current by watching the cluster.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::backoff::{Backoff, Loudness, Repeated};
use crate::clock::Clock;
use crate::cluster::events::{self, Events, EventsError};
use crate::cluster::{Client, ClusterError, Disposition};
use crate::crypto::pem;
use crate::crypto::x509::{self, Certificate};
use crate::pb::proto::event::Resource;
use crate::pb::proto::{Event, Operation, Watch};
use crate::pb::teleport::machineid::v1::SpiffeFederation;
use crate::pb::types::{CaKeySet, CertAuthorityV2, WatchKind};
use crate::spiffe::TrustDomain;
use crate::spiffe::bundle::{Document, DocumentError};
use crate::spiffe::jwt::JwtBundle;

/// The authority whose certificates make the bundle.
const AUTHORITY: &str = "spiffe";
const CA_KIND: &str = "cert_authority";
const FEDERATION_KIND: &str = "spiffe_federation";
/// How often a cluster without a watch is asked again.
const POLL: Duration = Duration::from_mins(5);

/// The bundle of a federated trust domain. It may have lost all of its keys: nothing of that trust
/// domain is to be believed then.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Federated {
    /// DER certificates, one after the other.
    pub x509: Bytes,
    /// The keys that verify its JWT-SVIDs.
    pub jwt: JwtBundle,
}

impl From<Document> for Federated {
    fn from(document: Document) -> Self {
        Self {
            x509: document.x509(),
            jwt: document.jwt,
        }
    }
}

/// The bundles of one moment. Immutable; share it with `Arc`.
#[derive(Debug, Clone)]
pub struct Bundles {
    trust_domain: TrustDomain,
    local: Bytes,
    authorities: Vec<Certificate>,
    jwt: JwtBundle,
    federated: BTreeMap<TrustDomain, Federated>,
}

impl PartialEq for Bundles {
    fn eq(&self, other: &Self) -> bool {
        // The authorities are the local bundle, parsed.
        (&self.trust_domain, &self.local, &self.jwt, &self.federated)
            == (
                &other.trust_domain,
                &other.local,
                &other.jwt,
                &other.federated,
            )
    }
}

impl Bundles {
    /// Reads the cluster's SPIFFE authority: every certificate of its active and additional keys.
    pub fn from_authority(authority: &CertAuthorityV2) -> Result<Self, BundleError> {
        let spec = authority.spec.as_ref().ok_or(BundleError::Empty)?;
        let trust_domain = TrustDomain::new(&spec.cluster_name)
            .map_err(|_source| BundleError::TrustDomain(spec.cluster_name.clone()))?;
        let sets = [&spec.active_keys, &spec.additional_trusted_keys];
        let pairs = sets
            .into_iter()
            .flatten()
            .flat_map(|set: &CaKeySet| &set.tls);
        let mut authorities: Vec<Certificate> = Vec::new();
        for pair in pairs {
            let malformed = || BundleError::Malformed(trust_domain.clone());
            let text = std::str::from_utf8(&pair.cert).map_err(|_source| malformed())?;
            for der in pem::certificates(text).map_err(|_source| malformed())? {
                let certificate = Certificate::from_der(&der).map_err(|_source| malformed())?;
                if authorities
                    .iter()
                    .all(|known| known.der() != certificate.der())
                {
                    authorities.push(certificate);
                }
            }
        }
        if authorities.is_empty() {
            return Err(BundleError::Empty);
        }
        let keys = [&spec.active_keys, &spec.additional_trusted_keys]
            .into_iter()
            .flatten()
            .flat_map(|set| &set.jwt)
            .filter_map(|pair| std::str::from_utf8(&pair.public_key).ok());
        let jwt = JwtBundle::from_pems(keys)
            .map_err(|_source| BundleError::Malformed(trust_domain.clone()))?;
        let local = authorities
            .iter()
            .flat_map(Certificate::der)
            .copied()
            .collect();
        Ok(Self {
            trust_domain,
            local,
            authorities,
            jwt,
            federated: BTreeMap::new(),
        })
    }

    /// What was stored of an earlier moment; `None` if `local` is no row of certificates.
    pub(super) fn restored(
        trust_domain: TrustDomain,
        local: &Bytes,
        jwt: JwtBundle,
        federated: BTreeMap<TrustDomain, Federated>,
    ) -> Option<Self> {
        let authorities = x509::split(local)?
            .into_iter()
            .map(|der| Certificate::from_der(der).ok())
            .collect::<Option<Vec<_>>>()
            .filter(|authorities| !authorities.is_empty())?;
        Some(Self {
            trust_domain,
            local: local.clone(),
            authorities,
            jwt,
            federated,
        })
    }

    /// The cluster's own trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The cluster's own bundle: DER certificates, one after the other.
    pub fn local(&self) -> &Bytes {
        &self.local
    }

    /// The keys that verify the cluster's JWT-SVIDs.
    pub fn jwt(&self) -> &JwtBundle {
        &self.jwt
    }

    /// The certificates of the cluster's own bundle.
    pub fn authorities(&self) -> &[Certificate] {
        &self.authorities
    }

    /// The bundles of the other trust domains that the cluster federates with.
    pub fn federated(&self) -> &BTreeMap<TrustDomain, Federated> {
        &self.federated
    }

    /// The certificates of each other trust domain that has any, DER, one after the other.
    pub fn federated_x509(&self) -> impl Iterator<Item = (&TrustDomain, &Bytes)> {
        self.federated
            .iter()
            .map(|(domain, bundle)| (domain, &bundle.x509))
            .filter(|(_, x509)| !x509.is_empty())
    }

    /// The JWT keys of each other trust domain that has any.
    pub fn federated_jwt(&self) -> impl Iterator<Item = (&TrustDomain, &JwtBundle)> {
        self.federated
            .iter()
            .map(|(domain, bundle)| (domain, &bundle.jwt))
            .filter(|(_, jwt)| !jwt.is_empty())
    }

    /// The keys that verify JWT-SVIDs of `domain`, the own one or a federated one; `None` if nobody
    /// vouches for it.
    pub fn jwt_of(&self, domain: &TrustDomain) -> Option<&JwtBundle> {
        if *domain == self.trust_domain {
            return Some(&self.jwt);
        }
        self.federated.get(domain).map(|bundle| &bundle.jwt)
    }

    /// Takes a federated bundle in. Nobody else speaks for the own trust domain.
    pub(crate) fn insert(&mut self, domain: TrustDomain, bundle: Federated) {
        if domain == self.trust_domain {
            tracing::warn!(%domain, "Leaving out a federation with the cluster's own trust domain");
            return;
        }
        self.federated.insert(domain, bundle);
    }
}

/// Why a bundle could not be used. The last good one stays.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BundleError {
    /// The authority holds no certificate.
    #[error("the cluster's SPIFFE authority holds no certificate")]
    Empty,
    /// The cluster's or the federation's name is no trust domain.
    #[error("{0:?} cannot be a trust domain (1 to 255 characters of a-z, 0-9, '.', '-', '_')")]
    TrustDomain(String),
    /// A certificate or key of the authority cannot be read.
    #[error("the bundle of {0} is malformed")]
    Malformed(TrustDomain),
    /// What the cluster says about a federated trust domain is no bundle.
    #[error("the bundle of {domain} cannot be read: {source}")]
    Document {
        /// Whose bundle it was to be.
        domain: TrustDomain,
        /// What is wrong with it.
        #[source]
        source: DocumentError,
    },
    /// The federated bundle was not fetched by the cluster yet.
    #[error("the cluster has no bundle of {0} yet")]
    NotReady(TrustDomain),
}

/// Where bundles come from.
#[async_trait]
pub trait BundleFeed: Send + Sync + fmt::Debug {
    /// The SPIFFE authority of `cluster`.
    async fn authority(&self, cluster: &str) -> Result<CertAuthorityV2, ClusterError>;
    /// Every federated trust domain.
    async fn federations(&self) -> Result<Vec<SpiffeFederation>, ClusterError>;
    /// Opens a stream of changes.
    async fn watch(&self, watch: Watch) -> Result<Events, ClusterError>;
}

#[async_trait]
impl BundleFeed for Client {
    async fn authority(&self, cluster: &str) -> Result<CertAuthorityV2, ClusterError> {
        self.cert_authority(AUTHORITY, cluster).await
    }

    async fn federations(&self) -> Result<Vec<SpiffeFederation>, ClusterError> {
        self.spiffe_federations().await
    }

    async fn watch(&self, watch: Watch) -> Result<Events, ClusterError> {
        Self::watch(self, watch).await
    }
}

/// The backoff of who was not answered so far. What was issued waits for that, unlike for news.
pub(super) fn until_heard() -> Backoff {
    Backoff::new(Duration::from_secs(1), Duration::from_mins(1))
}

/// Keeps the bundles of `cluster` current until the future is dropped. Publishes only what differs
/// from what was published before.
pub async fn follow(
    feed: &dyn BundleFeed,
    cluster: &str,
    clock: &Clock,
    published: &watch::Sender<Option<Arc<Bundles>>>,
) {
    let mut backoff = if published.borrow().is_none() {
        until_heard()
    } else {
        Backoff::of_streams()
    };
    let mut failures = Repeated::default();
    loop {
        let follower = Follower {
            feed,
            cluster,
            clock,
            published,
        };
        let mut synced = false;
        let error = follower.session(&mut synced).await;
        if synced {
            backoff = Backoff::of_streams();
            if let Some(failures) = failures.recovered() {
                tracing::info!(failures, "Trust bundles are current again");
            }
        }
        match failures.failed(Instant::now(), &error) {
            Loudness::Warn => {
                tracing::warn!(%error, "Following the trust bundles failed, trying again");
            }
            Loudness::Debug => {
                tracing::debug!(%error, "Following the trust bundles failed, trying again");
            }
        }
        clock
            .sleep(backoff.next_wait(crate::crypto::jitter()))
            .await;
    }
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Events(#[from] EventsError),
}

struct Follower<'a> {
    feed: &'a dyn BundleFeed,
    cluster: &'a str,
    clock: &'a Clock,
    published: &'a watch::Sender<Option<Arc<Bundles>>>,
}

impl Follower<'_> {
    /// Watches, then reads everything, then applies changes: none is missed in between.
    async fn session(&self, synced: &mut bool) -> SessionError {
        match self.try_session(synced).await {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    async fn try_session(
        &self,
        synced: &mut bool,
    ) -> Result<std::convert::Infallible, SessionError> {
        let mut events = match self.opened().await {
            Ok(events) => events,
            Err(EventsError::Cluster(error)) if error.disposition() == Disposition::Unsupported => {
                tracing::debug!(%error, "The cluster tells no changes: asking now and then");
                loop {
                    self.read_all().await?;
                    *synced = true;
                    self.clock.sleep(POLL).await;
                }
            }
            Err(error) => return Err(error.into()),
        };
        self.read_all().await?;
        *synced = true;
        loop {
            let event = events::next(&mut events).await?;
            self.apply(event);
        }
    }

    async fn opened(&self) -> Result<Events, EventsError> {
        let kind = |kind: &str| WatchKind {
            kind: kind.to_owned(),
            ..WatchKind::default()
        };
        let watch = Watch {
            kinds: vec![
                WatchKind {
                    filter: [(AUTHORITY.to_owned(), self.cluster.to_owned())].into(),
                    ..kind(CA_KIND)
                },
                kind(FEDERATION_KIND),
            ],
            ..Watch::default()
        };
        events::begun(self.feed.watch(watch)).await
    }

    async fn read_all(&self) -> Result<(), SessionError> {
        let mut bundles = Bundles::from_authority(&self.feed.authority(self.cluster).await?)?;
        let federations = match self.feed.federations().await {
            Err(error) if error.disposition() == Disposition::Unsupported => Vec::new(),
            answer => answer?,
        };
        for federation in &federations {
            match federated(federation) {
                Ok((domain, bundle)) => {
                    bundles.insert(domain, bundle);
                }
                Err(error) => {
                    tracing::warn!(%error, "Leaving out a federated trust domain");
                    self.keep_last_good(federation, &mut bundles);
                }
            }
        }
        self.publish(bundles);
        Ok(())
    }

    /// A federated bundle that became unreadable does not take the readable one away.
    fn keep_last_good(&self, federation: &SpiffeFederation, bundles: &mut Bundles) {
        let kept = domain_of(federation).ok().and_then(|domain| {
            let published = self.published.borrow();
            let bundle = published.as_ref()?.federated.get(&domain)?.clone();
            Some((domain, bundle))
        });
        bundles.federated.extend(kept);
    }

    fn apply(&self, event: Event) {
        let Some(current) = self.published.borrow().clone() else {
            return;
        };
        let deleted = event.r#type == Operation::Delete as i32;
        let changed = match event.resource {
            Some(Resource::CertAuthority(authority)) if !deleted => {
                let name = authority
                    .spec
                    .as_ref()
                    .map(|spec| (spec.r#type.as_str(), spec.cluster_name.as_str()));
                if name != Some((AUTHORITY, self.cluster)) {
                    return;
                }
                Bundles::from_authority(&authority).map(|fresh| Bundles {
                    federated: current.federated.clone(),
                    ..fresh
                })
            }
            Some(Resource::SpiffeFederation(federation)) if !deleted => {
                federated(&federation).map(|(domain, bundle)| {
                    let mut bundles = Bundles::clone(&current);
                    bundles.insert(domain, bundle);
                    bundles
                })
            }
            Some(Resource::ResourceHeader(header)) if deleted && header.kind == FEDERATION_KIND => {
                let name = header
                    .metadata
                    .map(|metadata| metadata.name)
                    .unwrap_or_default();
                let mut bundles = Bundles::clone(&current);
                bundles.federated.retain(|domain, _| domain.name() != name);
                Ok(bundles)
            }
            // A cluster does not delete its authority; the last good bundle stays if it says so.
            _ => return,
        };
        match changed {
            Ok(bundles) => self.publish(bundles),
            Err(error) => tracing::warn!(%error, "Keeping the last good trust bundle"),
        }
    }

    fn publish(&self, bundles: Bundles) {
        self.published.send_if_modified(|published| {
            let news = published.as_deref() != Some(&bundles);
            if news {
                tracing::debug!(
                    authorities = bundles.authorities.len(),
                    federated = bundles.federated.len(),
                    "Trust bundles changed"
                );
                *published = Some(Arc::new(bundles));
            }
            news
        });
    }
}

fn domain_of(federation: &SpiffeFederation) -> Result<TrustDomain, BundleError> {
    let name = federation
        .metadata
        .as_ref()
        .map_or("", |metadata| &metadata.name);
    TrustDomain::new(name).map_err(|_source| BundleError::TrustDomain(name.to_owned()))
}

/// The bundle of a federated trust domain.
fn federated(federation: &SpiffeFederation) -> Result<(TrustDomain, Federated), BundleError> {
    let domain = domain_of(federation)?;
    let document = federation
        .status
        .as_ref()
        .map_or("", |status| &status.current_bundle);
    if document.is_empty() {
        return Err(BundleError::NotReady(domain));
    }
    match Document::parse(document.as_bytes()) {
        Ok(document) => Ok((domain, document.into())),
        Err(source) => Err(BundleError::Document { domain, source }),
    }
}
