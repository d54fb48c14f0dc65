//! Where an issuer's keys come from: OpenID Connect Discovery 1.0, remembered for a while.
//!
//! Whoever asks while somebody already does waits for the same answer. A key that is not known has
//! them asked for anew, but no issuer more often than once in [`AGAIN`], however many tokens come.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared, WeakShared};
use serde::Deserialize;

use super::keys::{KeySet, KeysError, MAX_SET};
use super::{Claims, Expected, OidcError};
use crate::crypto::jws::Token;

/// How long keys are taken without asking again.
pub const FRESH: Duration = Duration::from_hours(1);
/// How long keys are taken while the issuer does not answer.
pub const STALE: Duration = Duration::from_hours(24);
/// The shortest time between two questions to one issuer.
pub const AGAIN: Duration = Duration::from_secs(10);
/// The longest that finding keys may take, both questions together.
const TIMEOUT: Duration = Duration::from_secs(15);
/// The most issuers that are remembered. Join tokens name them, so they are few.
const REMEMBERED: usize = 1024;

/// Why an issuer's keys cannot be had.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// The address is none that is asked.
    #[error("{0:?} is no https URL")]
    Url(String),
    /// The authorities given for it cannot be used.
    #[error("the join token's `tls_ca`: {0}")]
    Authorities(String),
    /// No answer, or more than is read.
    #[error("{url}: {problem}")]
    Exchange {
        /// What was asked for.
        url: String,
        /// What happened.
        problem: String,
    },
    /// Another status than 200. Redirects are not followed.
    #[error("{url} answered {status}{}", redirected(*.status))]
    Status {
        /// What was asked for.
        url: String,
        /// The HTTP status.
        status: u16,
    },
    /// The discovery document is not JSON, or lacks something.
    #[error("{url} is no OpenID discovery document: {problem}")]
    Document {
        /// Where it came from.
        url: String,
        /// What is wrong.
        problem: String,
    },
    /// The document is another issuer's.
    #[error("the discovery document of {expected:?} is for the issuer {found:?}")]
    Issuer {
        /// Who was asked.
        expected: String,
        /// Who answered.
        found: String,
    },
    /// The keys themselves cannot be read.
    #[error("{url}: {problem}")]
    Keys {
        /// Where they came from.
        url: String,
        /// What is wrong.
        problem: KeysError,
    },
    /// Both questions took too long.
    #[error("no keys of {0:?} within 15 s")]
    Timeout(String),
}

fn redirected(status: u16) -> &'static str {
    match status {
        300..400 => ": redirects are not followed",
        _ => "",
    }
}

/// An issuer, and how it is asked.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Issuer {
    /// Its URL, exactly as in its tokens.
    pub url: String,
    /// Who vouches for its web server (PEM); `None`: the system's roots.
    pub authorities: Option<String>,
    /// Whether it may be asked without TLS. For laboratories.
    pub insecure: bool,
}

impl Issuer {
    /// An issuer on the public web.
    #[must_use]
    pub fn web(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            authorities: None,
            insecure: false,
        }
    }
}

/// Gets documents.
#[async_trait]
pub trait Fetch: Send + Sync + fmt::Debug {
    /// The body behind `url`, of at most `most` bytes, if the status is 200; asked as `issuer` says.
    async fn get(&self, issuer: &Issuer, url: &str, most: usize) -> Result<Vec<u8>, FetchError>;
}

type Outcome = Result<Arc<KeySet>, FetchError>;
type Pending = Shared<BoxFuture<'static, Outcome>>;

/// What is known of an issuer.
#[derive(Default)]
struct Entry {
    keys: Option<(Arc<KeySet>, SystemTime)>,
    /// When it was last asked in vain, and what happened.
    failed: Option<(SystemTime, FetchError)>,
    pending: Option<WeakShared<BoxFuture<'static, Outcome>>>,
}

/// What to do for a token.
#[derive(Debug)]
enum Step {
    Take(Arc<KeySet>),
    Refuse(FetchError),
    Ask,
}

impl Entry {
    fn decide(&self, token: &Token<'_>, now: SystemTime) -> Step {
        let within =
            |since: &SystemTime, limit| now.duration_since(*since).is_ok_and(|age| age < limit);
        let failed = self.failed.as_ref().filter(|(at, _)| within(at, AGAIN));
        match (&self.keys, failed) {
            (Some((keys, at)), _) if within(at, AGAIN) => Step::Take(Arc::clone(keys)),
            (Some((keys, at)), _) if within(at, FRESH) && keys.knows(token) => {
                Step::Take(Arc::clone(keys))
            }
            (Some((keys, at)), Some(_)) if within(at, STALE) => Step::Take(Arc::clone(keys)),
            (_, Some((_, error))) => Step::Refuse(error.clone()),
            _ => Step::Ask,
        }
    }
}

/// The issuers that tokens were verified for.
pub struct Issuers {
    fetch: Arc<dyn Fetch>,
    known: Mutex<HashMap<Issuer, Entry>>,
}

impl fmt::Debug for Issuers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Issuers")
    }
}

impl Issuers {
    /// Asks through `fetch`.
    #[must_use]
    pub fn new(fetch: Arc<dyn Fetch>) -> Self {
        Self {
            fetch,
            known: Mutex::default(),
        }
    }

    /// Verifies `token` with the keys of `issuer`, which has to be its issuer.
    ///
    /// # Errors
    /// [`OidcError`]; [`OidcError::Fetch`] is not the caller's fault.
    pub async fn verify(
        &self,
        issuer: &Issuer,
        token: &str,
        expected: &Expected<'_>,
        now: SystemTime,
    ) -> Result<Claims, OidcError> {
        let token = Token::parse(token)?;
        expected.check(&token.claims, now)?;
        self.keys(issuer, &token, now).await?.check(&token)?;
        Ok(token.claims)
    }

    async fn keys(&self, issuer: &Issuer, token: &Token<'_>, now: SystemTime) -> Outcome {
        let pending = match self.step(issuer, token, now) {
            Ok(pending) => pending,
            Err(outcome) => return outcome,
        };
        let asked = tokio::time::Instant::now();
        let outcome = pending.clone().await;
        // An issuer that takes its time has been asked just now all the same.
        let now = now + asked.elapsed();
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = known.entry(issuer.clone()).or_default();
        match &outcome {
            Ok(keys) => {
                entry.keys = Some((Arc::clone(keys), now));
                entry.failed = None;
            }
            Err(error) => entry.failed = Some((now, error.clone())),
        }
        // Last good wins, for a day.
        match entry.decide(token, now) {
            Step::Take(keys) => Ok(keys),
            Step::Refuse(_) | Step::Ask => outcome,
        }
    }

    /// The question that is under way or has to be asked; `Err` if nothing has to be asked.
    fn step(
        &self,
        issuer: &Issuer,
        token: &Token<'_>,
        now: SystemTime,
    ) -> Result<Pending, Outcome> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= REMEMBERED && !known.contains_key(issuer) {
            known.clear();
        }
        let entry = known.entry(issuer.clone()).or_default();
        match entry.decide(token, now) {
            Step::Take(keys) => return Err(Ok(keys)),
            Step::Refuse(error) => return Err(Err(error)),
            Step::Ask => {}
        }
        if let Some(pending) = entry.pending.as_ref().and_then(WeakShared::upgrade) {
            return Ok(pending);
        }
        let asked = ask(Arc::clone(&self.fetch), issuer.clone())
            .boxed()
            .shared();
        entry.pending = asked.downgrade();
        Ok(asked)
    }
}

/// Both questions.
async fn ask(fetch: Arc<dyn Fetch>, issuer: Issuer) -> Outcome {
    let found = tokio::time::timeout(TIMEOUT, discover(&*fetch, &issuer)).await;
    found.unwrap_or_else(|_elapsed| Err(FetchError::Timeout(issuer.url.clone())))
}

#[derive(Deserialize)]
struct Document {
    issuer: String,
    jwks_uri: String,
}

async fn discover(fetch: &dyn Fetch, issuer: &Issuer) -> Outcome {
    let base = issuer.url.strip_suffix('/').unwrap_or(&issuer.url);
    let url = format!("{base}/.well-known/openid-configuration");
    let body = fetch.get(issuer, &url, MAX_SET).await?;
    let document: Document =
        serde_json::from_slice(&body).map_err(|source| FetchError::Document {
            url,
            problem: source.to_string(),
        })?;
    if document.issuer != issuer.url {
        return Err(FetchError::Issuer {
            expected: issuer.url.clone(),
            found: super::shortened(&document.issuer),
        });
    }
    let url = document.jwks_uri;
    let body = fetch.get(issuer, &url, MAX_SET).await?;
    let keys = KeySet::parse(&body).map_err(|problem| FetchError::Keys { url, problem })?;
    Ok(Arc::new(keys))
}

#[cfg(test)]
mod tests;
