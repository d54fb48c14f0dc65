//! The connection that a join runs on (a proxy's, an auth service's, or the bot's own), and which of
//! the two join protocols is spoken there.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use super::stream::Exchange;
use super::{JoinError, Proof, older};
use crate::clock::Clock;
use crate::cluster::client::{Route, Versioned};
use crate::cluster::dial::Dialer;
use crate::cluster::first::{First, suite_of};
use crate::cluster::trust::Trust;
use crate::cluster::{Client, ClusterError, Disposition};
use crate::crypto::{PrivateKey, Suite};
use crate::pb::proto::Certs;
use crate::secret::Secret;

/// The longest that each half of a join may take; a cluster gives up after a minute.
pub(super) const JOIN: Duration = Duration::from_secs(60);

/// What a join begins with.
#[derive(Debug, Clone)]
pub struct Hello {
    /// The join method that the bot insists on.
    pub method: &'static str,
    /// The token.
    pub token: Secret<String>,
    /// What is known of the cluster from joins before.
    pub older: Older,
}

/// The version of the cluster that was last seen to lack the newer join service, so that it is not
/// asked at every join. One that has been upgraded is asked again. Clones share what they know.
#[derive(Debug, Clone, Default)]
pub struct Older(Arc<Mutex<Option<String>>>);

impl Older {
    fn is(&self, version: &str) -> bool {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.as_deref() == Some(version)
    }

    fn note(&self, version: &str) {
        tracing::debug!(
            version,
            "The cluster has no teleport.join.v1: joining by the older service"
        );
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(version.to_owned());
    }
}

/// An open join connection, and the suite that the cluster wants keys of.
#[derive(Debug)]
pub struct Session {
    hello: Hello,
    channel: Versioned,
    version: String,
    suite: Suite,
    /// The newer protocol, where the cluster has it.
    exchange: Option<Exchange>,
}

impl Session {
    /// Opens a session for a bot that has no certificates.
    pub async fn open(
        clock: &Clock,
        dialer: &Arc<dyn Dialer>,
        route: &Route,
        trust: &Trust,
        hello: Hello,
    ) -> Result<Self, ClusterError> {
        let first = First::contact(clock, dialer, route, trust).await?;
        Self::begin(hello, first.channel, first.version, first.suite).await
    }

    /// A session over the bot's own authenticated connection: the cluster keeps the bot instance.
    pub async fn again(client: &Client, hello: Hello) -> Result<Self, ClusterError> {
        let answer = client.ping().await?;
        let suite = suite_of(&answer);
        Self::begin(hello, client.for_join()?, answer.server_version, suite).await
    }

    /// Begins the newer exchange unless a cluster of this version is known to lack it. `suite` is
    /// what discovery says; the newer exchange says it itself.
    pub(super) async fn begin(
        hello: Hello,
        channel: Versioned,
        version: String,
        suite: Suite,
    ) -> Result<Self, ClusterError> {
        let mut session = Self {
            hello,
            channel,
            version,
            suite,
            exchange: None,
        };
        let hello = &session.hello;
        if hello.older.is(&session.version) {
            return Ok(session);
        }
        let channel = session.channel.clone();
        match Exchange::begin(channel, hello.method, hello.token.expose()).await {
            Ok(exchange) => {
                session.suite = exchange.suite();
                session.exchange = Some(exchange);
            }
            Err(error) if error.disposition() == Disposition::Unsupported => {
                hello.older.note(&session.version);
            }
            Err(error) => return Err(error),
        }
        Ok(session)
    }

    /// The suite that the cluster announced.
    pub fn suite(&self) -> Suite {
        self.suite
    }

    /// Joins with `proof` and a new key, for certificates until `expires`.
    pub async fn join(
        self,
        key: &PrivateKey,
        expires: SystemTime,
        proof: &mut dyn Proof,
        clock: &Clock,
    ) -> Result<Certs, JoinError> {
        if let Some(exchange) = self.exchange {
            match exchange.finish(key, expires, proof, clock).await {
                // It has the service, but not yet for this method.
                Err(error) if error.disposition() == Disposition::Unsupported => {
                    self.hello.older.note(&self.version);
                }
                other => return other,
            }
        }
        let request = older::request(self.hello.token.expose(), key, expires)?;
        older::join(self.channel, self.hello.method, request, proof, clock).await
    }
}

pub(super) fn unusable(call: &'static str, problem: &str) -> ClusterError {
    ClusterError::Answer {
        call,
        problem: problem.to_owned(),
    }
}
