//! The revocation list of the cluster's SPIFFE authority, passed on as it came.
//!
//! Clusters sign lists that strict parsers reject (no `nextUpdate`, a `thisUpdate` in the year 1)
//! and sign an unchanged list anew every ten minutes. Bytes are therefore passed through, and only
//! the part that means something is compared before readers are woken.

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use der::asn1::AnyRef;
use der::{Decode as _, Encode as _, Reader as _, SliceReader, Tag, TagNumber, Tagged as _};
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::backoff::{Backoff, Loudness, Repeated};
use crate::clock::Clock;
use crate::cluster::events::paced;
use crate::cluster::{Client, ClusterError, Disposition};

/// What is known about revocations.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Crl {
    /// Nothing yet: the cluster was not heard.
    #[default]
    Pending,
    /// The cluster has no revocation list.
    None,
    /// The newest list, DER.
    Signed(Bytes),
}

impl Crl {
    /// The list, if there is one.
    pub fn der(&self) -> Option<&Bytes> {
        match self {
            Self::Signed(der) => Some(der),
            Self::Pending | Self::None => None,
        }
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

/// Keeps the list current until the future is dropped. Readers are woken when its meaning changes;
/// a reader that comes later sees the newest bytes. Whatever the cluster does, it is not
/// [`Crl::Pending`] for long.
pub async fn follow(feed: &dyn CrlFeed, clock: &Clock, published: &watch::Sender<Crl>) {
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
    tokio::join!(give_up, keep(feed, clock, published));
}

async fn keep(feed: &dyn CrlFeed, clock: &Clock, published: &watch::Sender<Crl>) {
    let mut backoff = Backoff::of_streams();
    let mut failures = Repeated::default();
    loop {
        let error = match session(feed, published).await {
            Ended::Unsupported => {
                publish(published, Crl::None);
                return std::future::pending().await;
            }
            Ended::Silent => continue,
            Ended::Closed => None,
            Ended::AfterList(error) => {
                backoff.reset();
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
        clock
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

async fn session(feed: &dyn CrlFeed, published: &watch::Sender<Crl>) -> Ended {
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
            Some(Ok(list)) if list.is_empty() => publish(published, Crl::None),
            Some(Ok(list)) => publish(published, Crl::Signed(list)),
            Some(Err(error)) => return Ended::AfterList(Some(error)),
            None => return Ended::AfterList(None),
        }
        next = lists.next().await;
    }
}

/// Replaces the list, and wakes readers only if they would act differently.
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
            old == new || essence(old).is_some_and(|essence| Some(essence) == self::essence(new))
        }
        _ => old == new,
    }
}

/// Issuer and revoked entries, encoded; `None` for a list with a `nextUpdate`, whose newest form
/// matters, and for bytes that are no list.
fn essence(crl: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    // CertificateList ::= SEQUENCE { tbsCertList, signatureAlgorithm, signature } (RFC 5280 5.1)
    let list = sequence(AnyRef::from_der(crl).ok()?)?;
    let mut fields = sequence(*list.first()?)?.into_iter().peekable();
    fields.next_if(|field| field.tag() == Tag::Integer); // version
    let _signature = fields.next()?;
    let issuer = fields.next()?.to_der().ok()?;
    let is_time = |field: &AnyRef<'_>| matches!(field.tag(), Tag::UtcTime | Tag::GeneralizedTime);
    fields.next_if(is_time)?; // thisUpdate
    if fields.next_if(is_time).is_some() {
        return None;
    }
    let extensions = Tag::ContextSpecific {
        number: TagNumber::N0,
        constructed: true,
    };
    let revoked = match fields.next() {
        Some(field) if field.tag() == Tag::Sequence => field.to_der().ok()?,
        Some(field) if field.tag() != extensions => return None,
        _ => Vec::new(),
    };
    Some((issuer, revoked))
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
