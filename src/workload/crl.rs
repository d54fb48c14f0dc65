//! The revocation lists of the cluster's SPIFFE authorities, passed on as they came.
//!
//! A cluster signs one list, with the authority that signs now. While an authority is rotated, SVIDs of
//! the one before are still held, and whoever checks one wants a list by its issuer: so the last list
//! of each authority is kept for as long as the bundle has it.
//!
//! Clusters sign lists that strict parsers reject (no `nextUpdate`, a `thisUpdate` in the year 1)
//! and sign an unchanged list anew every ten minutes. Bytes are therefore passed through, and only
//! the part that means something is compared before readers are woken.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use der::asn1::AnyRef;
use der::{Decode as _, Encode as _, Reader as _, SliceReader, Tag, TagNumber, Tagged as _};
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use tokio::sync::watch;
use tokio::time::Instant;
use x509_cert::time::Time;

use super::{Bundles, bundle};
use crate::backoff::{Backoff, Loudness, Repeated};
use crate::clock::Clock;
use crate::cluster::events::paced;
use crate::cluster::{Client, ClusterError, Disposition};
use crate::crypto::x509;

/// What is known about revocations.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Crl {
    /// Nothing yet: the cluster was not heard.
    #[default]
    Pending,
    /// The cluster has no revocation list.
    None,
    /// The newest list of each authority, DER, one after the other; the one that came last is first.
    Signed(Bytes),
}

impl Crl {
    /// The lists, one after the other, if there are any.
    pub fn der(&self) -> Option<&Bytes> {
        match self {
            Self::Signed(der) => Some(der),
            Self::Pending | Self::None => None,
        }
    }
}

/// Takes lists that stand one after the other apart. What is no row of DER values is one.
pub fn split(lists: &Bytes) -> Vec<Bytes> {
    match x509::split(lists) {
        Some(all) => all.iter().map(|one| lists.slice_ref(one)).collect(),
        None => vec![lists.clone()],
    }
}

/// A stream of lists; an empty one means that there is none.
pub type Lists = BoxStream<'static, Result<Bytes, ClusterError>>;

/// Where revocation lists come from.
#[async_trait]
pub trait CrlFeed: Send + Sync + fmt::Debug {
    /// Opens the stream: the current list at once, then every new one.
    async fn lists(&self) -> Result<Lists, ClusterError>;
}

#[async_trait]
impl CrlFeed for Client {
    async fn lists(&self) -> Result<Lists, ClusterError> {
        let lists = self.signed_crl().await?;
        Ok(lists
            .map(|list| {
                list.map(|list| Bytes::from(list.crl))
                    .map_err(ClusterError::call("StreamSignedCRL"))
            })
            .boxed())
    }
}

/// The longest that readers wait for the first list. A cluster that has revoked nothing yet may send
/// none at all, and one that is asked for it may not answer: nobody is held up for that.
const FIRST: Duration = Duration::from_secs(2);
/// The longest wait for the answer that opens the stream. Clusters answer with the first list, and
/// sign one every ten minutes.
const OPENING: Duration = Duration::from_mins(15);

/// The most lists that are kept beside the one that came last: more than a cluster has authorities.
const OTHERS: usize = 16;

/// Keeps the lists current until the future is dropped. Readers are woken when their meaning changes;
/// a reader that comes later sees the newest bytes. Whatever the cluster does, they are not
/// [`Crl::Pending`] for long; lists that are `published` when it begins, from before a restart, stand
/// until the cluster is heard. Lists of authorities that are not in the newest of `bundles` are
/// given up when the next one came.
pub async fn follow(
    feed: &dyn CrlFeed,
    clock: &Clock,
    bundles: watch::Receiver<Option<Arc<Bundles>>>,
    published: &watch::Sender<Crl>,
) {
    let give_up = async {
        clock.sleep(FIRST).await;
        published.send_if_modified(|crl| {
            let pending = *crl == Crl::Pending;
            if pending {
                *crl = Crl::None;
            }
            pending
        });
    };
    let known = Known {
        clock,
        bundles: bundles.clone(),
        published,
        heard: AtomicBool::new(false),
    };
    tokio::join!(give_up, keep(feed, &known), known.weed(bundles));
}

/// What is known, and what it is held against.
struct Known<'a> {
    clock: &'a Clock,
    bundles: watch::Receiver<Option<Arc<Bundles>>>,
    published: &'a watch::Sender<Crl>,
    /// Whether the first of the lists came from the cluster: until then, all are of before a restart.
    heard: AtomicBool,
}

impl Known<'_> {
    /// Takes a list in; an empty one says that there is none.
    fn publish(&self, fresh: Bytes) {
        self.heard.store(true, Ordering::Relaxed);
        if fresh.is_empty() {
            return publish(self.published, Crl::None);
        }
        let lists = self.with_others(Some(fresh), &self.published.borrow());
        publish(self.published, lists);
    }

    /// Gives up lists when their authorities leave the bundle.
    async fn weed(&self, mut bundles: watch::Receiver<Option<Arc<Bundles>>>) {
        while bundles.changed().await.is_ok() {
            bundles.mark_unchanged();
            self.published.send_if_modified(|crl| {
                let Some(lists) = crl.der().map(split) else {
                    return false;
                };
                // The cluster's last word stands, whoever signed it.
                let heard = self.heard.load(Ordering::Relaxed);
                let first = lists.into_iter().next().filter(|_| heard);
                let weeded = self.with_others(first, crl);
                let news = *crl != weeded;
                *crl = weeded;
                news
            });
        }
        std::future::pending::<()>().await;
    }

    /// `first`, and the lists in `crl` by others than its issuer.
    fn with_others(&self, first: Option<Bytes>, crl: &Crl) -> Crl {
        let others = self.of_others(first.as_ref(), crl);
        let lists: Vec<Bytes> = first.into_iter().chain(others).collect();
        match lists.as_slice() {
            [] => Crl::None,
            [one] => Crl::Signed(one.clone()),
            several => Crl::Signed(several.concat().into()),
        }
    }

    /// The lists in `crl` by others than the issuer of `first`, as far as those are in the bundle and
    /// the lists are not over.
    fn of_others(&self, first: Option<&Bytes>, crl: &Crl) -> Vec<Bytes> {
        let issuer = match first.map(|first| facts(first)) {
            Some(None) => return Vec::new(),
            Some(Some(first)) => Some(first.issuer),
            None => None,
        };
        let authorities = self.bundles.borrow().clone();
        let vouches = |name: &[u8]| {
            // Before a bundle was heard, nobody can tell.
            authorities.as_ref().is_none_or(|bundles| {
                let mut all = bundles.authorities().iter();
                all.any(|authority| authority.subject_der() == name)
            })
        };
        let now = self.clock.now();
        let good = |list: &Bytes| {
            facts(list).is_some_and(|known| {
                let over = known.next_update.is_some_and(|next| next <= now);
                Some(&known.issuer) != issuer.as_ref() && !over && vouches(&known.issuer)
            })
        };
        let lists = crl.der().map(split).unwrap_or_default();
        lists.into_iter().filter(good).take(OTHERS).collect()
    }
}

async fn keep(feed: &dyn CrlFeed, known: &Known<'_>) {
    let mut backoff = bundle::until_heard();
    let mut failures = Repeated::default();
    loop {
        let error = match session(feed, known).await {
            Ended::Unsupported => {
                publish(known.published, Crl::None);
                return std::future::pending().await;
            }
            Ended::Silent => continue,
            Ended::Closed => None,
            Ended::AfterList(error) => {
                backoff = Backoff::of_streams();
                failures.recovered();
                error
            }
            Ended::Failed(error) => Some(error),
        };
        let problem = error.map_or_else(|| "the stream ended".to_owned(), |e| e.to_string());
        match failures.failed(Instant::now(), &problem) {
            Loudness::Warn => {
                tracing::warn!(
                    problem,
                    "Following the revocation list failed, trying again"
                );
            }
            Loudness::Debug => {
                tracing::debug!(
                    problem,
                    "Following the revocation list failed, trying again"
                );
            }
        }
        known
            .clock
            .sleep(backoff.next_wait(crate::crypto::jitter()))
            .await;
    }
}

enum Ended {
    Unsupported,
    /// Neither a list nor an error came.
    Silent,
    Closed,
    AfterList(Option<ClusterError>),
    Failed(ClusterError),
}

async fn session(feed: &dyn CrlFeed, known: &Known<'_>) -> Ended {
    let failed = |error: ClusterError| match error.disposition() {
        Disposition::Unsupported => Ended::Unsupported,
        Disposition::Retry | Disposition::Refused => Ended::Failed(error),
    };
    let mut lists = match tokio::time::timeout(OPENING, feed.lists()).await {
        Ok(Ok(lists)) => paced(lists),
        Ok(Err(error)) => return failed(error),
        Err(_elapsed) => return Ended::Silent,
    };
    let mut next = match lists.next().await {
        Some(Ok(list)) => Some(Ok(list)),
        Some(Err(error)) => return failed(error),
        None => return Ended::Closed,
    };
    loop {
        match next {
            Some(Ok(list)) => known.publish(list),
            Some(Err(error)) => return Ended::AfterList(Some(error)),
            None => return Ended::AfterList(None),
        }
        next = lists.next().await;
    }
}

/// Replaces the lists, and wakes readers only if they would act differently.
fn publish(published: &watch::Sender<Crl>, fresh: Crl) {
    published.send_if_modified(|crl| {
        let news = !says_the_same(crl, &fresh);
        *crl = fresh;
        news
    });
}

pub(super) fn says_the_same(old: &Crl, new: &Crl) -> bool {
    match (old, new) {
        (Crl::Signed(old), Crl::Signed(new)) => {
            let (olds, news) = (split(old), split(new));
            let same = |(old, new): (&Bytes, &Bytes)| {
                old == new || essence(old).is_some_and(|it| Some(it) == essence(new))
            };
            olds.len() == news.len() && olds.iter().zip(&news).all(same)
        }
        _ => old == new,
    }
}

/// Issuer and revoked entries, encoded; `None` for a list with a `nextUpdate`, whose newest form
/// matters, and for bytes that are no list.
fn essence(crl: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let facts = facts(crl).filter(|facts| facts.next_update.is_none())?;
    Some((facts.issuer, facts.revoked))
}

/// What a list says of itself.
struct Facts {
    /// The issuer's name, encoded.
    issuer: Vec<u8>,
    next_update: Option<SystemTime>,
    /// The revoked entries, encoded.
    revoked: Vec<u8>,
}

/// `None` for bytes that are no list.
fn facts(crl: &[u8]) -> Option<Facts> {
    // CertificateList ::= SEQUENCE { tbsCertList, signatureAlgorithm, signature } (RFC 5280 5.1)
    let list = sequence(AnyRef::from_der(crl).ok()?)?;
    let mut fields = sequence(*list.first()?)?.into_iter().peekable();
    fields.next_if(|field| field.tag() == Tag::Integer); // version
    let _signature = fields.next()?;
    let issuer = fields.next()?.to_der().ok()?;
    let is_time = |field: &AnyRef<'_>| matches!(field.tag(), Tag::UtcTime | Tag::GeneralizedTime);
    fields.next_if(is_time)?; // thisUpdate
    let next_update = match fields.next_if(is_time) {
        Some(time) => {
            let time = Time::from_der(&time.to_der().ok()?).ok()?;
            Some(time.to_system_time())
        }
        None => None,
    };
    let extensions = Tag::ContextSpecific {
        number: TagNumber::N0,
        constructed: true,
    };
    let revoked = match fields.next() {
        Some(field) if field.tag() == Tag::Sequence => field.to_der().ok()?,
        Some(field) if field.tag() != extensions => return None,
        _ => Vec::new(),
    };
    Some(Facts {
        issuer,
        next_update,
        revoked,
    })
}

/// The elements of a SEQUENCE, unread.
fn sequence(any: AnyRef<'_>) -> Option<Vec<AnyRef<'_>>> {
    if any.tag() != Tag::Sequence {
        return None;
    }
    let mut reader = SliceReader::new(any.value()).ok()?;
    let mut elements = Vec::new();
    while !reader.is_finished() {
        elements.push(AnyRef::decode(&mut reader).ok()?);
    }
    Some(elements)
}
