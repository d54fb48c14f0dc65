//! The driver of the bot's own identity: does what [`state::decide`] says, and publishes the result.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::handle::{Handle, new_key};
use super::state::{self, Failures, Held, Step};
use super::store::{Store, StoreError};
use super::{Identity, MaterialError};
use crate::backoff::{Backoff, Loudness, Repeated};
use crate::clock::Clock;
use crate::cluster::client::Route;
use crate::cluster::dial::Dialer;
use crate::cluster::trust::Trust;
use crate::cluster::{Client, ClusterError, Credential, Disposition};
use crate::crypto::{KeyError, PrivateKey, Purpose, jitter};
use crate::env::Env;
use crate::health::Reporter;
use crate::join::{
    Hello, JoinError, Older, Prover, Renewal, Session, Surroundings, TokenSource, token_hash,
};
use crate::pb::proto::UserCertsRequest;
use crate::renewal;

/// How long an answer that must not get lost is waited for when the agent is told to stop: the
/// cluster has counted the renewal, or used up the token, as soon as it has the request.
const GRACE: Duration = Duration::from_secs(2);
/// Attempts of a one-shot run against a cluster that cannot be reached.
const ONESHOT_ATTEMPTS: u32 = 3;

/// Everything that a bot needs to hold an identity.
#[derive(Debug)]
pub struct Settings {
    /// How the bot joins.
    pub method: Arc<dyn Prover>,
    /// The agent's environment variables, for join methods that look there.
    pub env: Env,
    /// Its token; needed when nothing usable is stored.
    pub token: Option<TokenSource>,
    /// How the cluster is reached.
    pub route: Route,
    /// Whom to believe at the first join.
    pub trust: Trust,
    /// Whether the configured address of the proxy goes before the advertised one.
    pub use_configured_address: bool,
    /// Requested life of the identity.
    pub ttl: Duration,
    /// Time between renewals.
    pub interval: Duration,
}

/// Why the bot has no identity, or no newer one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BotError {
    /// The join failed.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// A call to the cluster failed.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The cluster's certificates are not usable; nothing of them is kept.
    #[error("the cluster's certificates are not usable: {0}")]
    Material(#[from] MaterialError),
    /// No connection can be made with the cluster's certificates; nothing of them is kept.
    #[error("the cluster's certificates are not usable: {0}")]
    Credential(#[source] ClusterError),
    /// No key could be made.
    #[error("cannot make a key: {0}")]
    Key(#[from] KeyError),
    /// The storage failed; the new identity is not used.
    #[error("bot storage: {0}")]
    Store(#[from] StoreError),
    /// There is neither a usable stored identity nor a token.
    #[error("no usable identity is stored and onboarding.token is not set: the bot cannot join")]
    NoToken,
    /// The agent was told to stop before the answer came.
    #[error("the agent is stopping")]
    Stopping,
}

impl BotError {
    /// What to do next.
    pub fn disposition(&self) -> Disposition {
        match self {
            Self::Join(error) => error.disposition(),
            Self::Cluster(error) => error.disposition(),
            Self::NoToken => Disposition::Refused,
            Self::Material(_)
            | Self::Credential(_)
            | Self::Key(_)
            | Self::Store(_)
            | Self::Stopping => Disposition::Retry,
        }
    }
}

/// The bot's own identity and the loop that keeps it fresh.
#[derive(Debug)]
pub struct Bot {
    settings: Settings,
    clock: Clock,
    dialer: Arc<dyn Dialer>,
    store: Store,
    health: Reporter,
    handle: Handle,
    identity: watch::Sender<Option<Arc<Identity>>>,
    credential: watch::Sender<Option<Arc<Credential>>>,
    held: Option<Held>,
    /// Whether there ever was an identity: only a first join that is refused ends the program.
    ever_held: bool,
    pending: Option<PrivateKey>,
    /// Whether the cluster's version is known to lack the newer join service.
    older: Older,
}

impl Bot {
    /// A bot that has looked at nothing yet. `reload` changes when everything is to be renewed.
    pub fn new(
        settings: Settings,
        clock: Clock,
        dialer: Arc<dyn Dialer>,
        store: Store,
        health: Reporter,
        reload: watch::Receiver<u64>,
    ) -> Self {
        let (identity, identity_receiver) = watch::channel(None);
        let (credential, credential_receiver) = watch::channel(None);
        let handle = Handle::new(
            clock.clone(),
            Arc::clone(&dialer),
            settings.route.clone(),
            settings.trust.clone(),
            settings.use_configured_address,
            identity_receiver,
            credential_receiver,
            reload,
        );
        Self {
            settings,
            clock,
            dialer,
            store,
            health,
            handle,
            identity,
            credential,
            held: None,
            ever_held: false,
            pending: None,
            older: Older::default(),
        }
    }

    /// What services see.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Publishes the stored identity if it is usable: valid now and of the configured token.
    pub async fn load(&mut self) -> Result<(), BotError> {
        let loaded = self.store.load().await?;
        for warning in &loaded.warnings {
            tracing::warn!(warning, "Part of the bot's storage cannot be used");
        }
        self.pending = loaded.pending;
        let now = self.clock.now();
        for stored in loaded.candidates {
            if let Some(problem) = self.unusable(&stored.identity, &stored.token_hash, now) {
                tracing::info!(problem, "Not using the stored identity");
                continue;
            }
            match stored.identity.credential(&self.clock) {
                Ok(credential) => {
                    // Certificates are backdated by a minute; the difference does not matter here.
                    self.publish(stored.identity, credential, None);
                    return Ok(());
                }
                Err(error) => tracing::warn!(%error, "Not using the stored identity"),
            }
        }
        Ok(())
    }

    /// Why a stored identity is of no use; `None` if it is of use.
    fn unusable(
        &self,
        identity: &Identity,
        stored_hash: &str,
        now: SystemTime,
    ) -> Option<&'static str> {
        if !identity.is_valid(now) {
            return Some("it is not valid now");
        }
        match self.settings.token.as_ref().map(TokenSource::resolve) {
            Some(Ok(token)) if !stored_hash.is_empty() && token_hash(&token) != stored_hash => {
                Some("it was made with another join token")
            }
            Some(Err(error)) => {
                tracing::warn!(%error, "Keeping the stored identity without comparing its token");
                None
            }
            _ => None,
        }
    }

    /// Keeps the identity fresh until `shutdown`. Returns an error only if the first join is refused.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), BotError> {
        let mut reload = self.handle.reloads();
        let mut failures = Failures::none();
        let mut row = Repeated::default();
        let mut last = String::new();
        loop {
            let now = self.clock.now();
            let wake = match state::decide(now, self.held.as_ref()) {
                Step::Wait(until) => until,
                step => match self.attempt(step, &shutdown).await {
                    Ok(()) => {
                        failures = Failures::none();
                        if let Some(failures) = row.recovered() {
                            tracing::info!(failures, "The bot's identity is fresh again");
                        }
                        continue;
                    }
                    Err(BotError::Stopping) => return Ok(()),
                    Err(error) => {
                        let disposition = error.disposition();
                        if step == Step::Join
                            && !self.ever_held
                            && disposition == Disposition::Refused
                        {
                            return Err(error);
                        }
                        let reason = error.to_string();
                        self.health.unhealthy(reason.clone());
                        // Another reason is news, however long the row.
                        if reason != last {
                            row = Repeated::default();
                            last = reason;
                        }
                        if self.held.is_some_and(|held| held.not_after <= now) {
                            self.withdraw();
                        }
                        let failed = self.clock.now();
                        let wait = failures.wait(
                            failed,
                            self.held.as_ref(),
                            disposition,
                            self.settings.interval,
                            [jitter(), jitter()],
                        );
                        tell(
                            row.failed(Instant::now(), &error),
                            self.settings.route.address(),
                            &error,
                            wait,
                        );
                        failed + wait
                    }
                },
            };
            tokio::select! {
                () = self.clock.sleep_until(wake) => {}
                changed = reload.changed() => {
                    row = Repeated::default();
                    failures = Failures::none();
                    if changed.is_ok() && let Some(held) = self.held.as_mut() {
                        held.renew_at = self.clock.now();
                    }
                }
                () = shutdown.cancelled() => return Ok(()),
            }
        }
    }

    /// Makes the identity fresh once, for a one-shot run.
    pub async fn run_once(&mut self, shutdown: &CancellationToken) -> Result<(), BotError> {
        let mut backoff = Backoff::new(state::FIRST_WAIT, state::CAP);
        loop {
            let step = state::decide(self.clock.now(), self.held.as_ref());
            if let Step::Wait(_) = step {
                return Ok(());
            }
            match self.attempt(step, shutdown).await {
                Ok(()) => return Ok(()),
                Err(BotError::Stopping) => return Err(BotError::Stopping),
                Err(error) if matches!(step, Step::Renew(_)) => {
                    tracing::warn!(%error, "Using the stored identity: it cannot be renewed now");
                    return Ok(());
                }
                Err(error)
                    if error.disposition() != Disposition::Retry
                        || backoff.failures() + 1 >= ONESHOT_ATTEMPTS =>
                {
                    return Err(error);
                }
                Err(error) => {
                    let wait = backoff.next_wait(jitter());
                    tell(Loudness::Warn, self.settings.route.address(), &error, wait);
                    self.clock.sleep(wait).await;
                }
            }
        }
    }

    /// One attempt at a fresh identity: store the key, ask, check, store the answer, use it. Ends
    /// early when `shutdown` comes, but never between an answer and its storage.
    async fn attempt(&mut self, step: Step, shutdown: &CancellationToken) -> Result<(), BotError> {
        let started = self.clock.now();
        let (identity, hash) = match step {
            Step::Wait(_) => return Ok(()),
            Step::Join => self.join(None, shutdown).await?,
            Step::Renew(Renewal::Rejoin) => {
                let client = self.handle.client().clone();
                match self.join(Some(client.clone()), shutdown).await {
                    // The method can prove anew who it is, so a lost identity is no dead end. But
                    // whoever stands in the way must not be able to have it proved to nobody in
                    // particular.
                    Err(error)
                        if client.is_certificate_refused()
                            && self.settings.trust.verifies(&self.settings.route) =>
                    {
                        tracing::warn!(
                            %error,
                            "The cluster's authorities were replaced: joining as for the first time"
                        );
                        self.join(None, shutdown).await?
                    }
                    joined => joined?,
                }
            }
            Step::Renew(Renewal::Certificate) => self.renew_certificate(shutdown).await?,
        };
        self.accept(identity, &hash, step, started).await
    }

    /// Stores and publishes an answer, unless it cannot be used: then what is stored stays.
    async fn accept(
        &mut self,
        identity: Identity,
        token_hash: &str,
        step: Step,
        started: SystemTime,
    ) -> Result<(), BotError> {
        let held = match step {
            Step::Renew(_) => self.identity.borrow().as_ref().map(|held| held.user()),
            Step::Join | Step::Wait(_) => None,
        };
        identity.expect(self.clock.now(), self.settings.ttl, held.as_deref())?;
        let credential = identity
            .credential(&self.clock)
            .map_err(BotError::Credential)?;
        self.store.commit(&identity, token_hash).await?;
        self.pending = None;
        self.publish(identity, credential, Some(started));
        Ok(())
    }

    /// Joins: with the bot's own client again, without one for the first time.
    async fn join(
        &mut self,
        again: Option<Client>,
        shutdown: &CancellationToken,
    ) -> Result<(Identity, String), BotError> {
        let token = self
            .settings
            .token
            .as_ref()
            .ok_or(BotError::NoToken)?
            .resolve()?;
        let method = self.settings.method.method();
        let opening = async {
            let proof = self
                .settings
                .method
                .prepare(&Surroundings {
                    env: &self.settings.env,
                    clock: &self.clock,
                    storage: self.store.destination(),
                })
                .await?;
            let hello = Hello {
                method: method.name(),
                token: token.clone(),
                older: self.older.clone(),
            };
            let session = match again {
                Some(client) => Session::again(&client, hello).await,
                None => {
                    Session::open(
                        &self.clock,
                        &self.dialer,
                        &self.settings.route,
                        &self.settings.trust,
                        hello,
                    )
                    .await
                }
            }
            .map_err(JoinError::cluster(method.name()))?;
            let algorithm = session.suite().algorithm(Purpose::HostIdentity);
            let key = match &self.pending {
                Some(key) if method.counts() && key.algorithm() == algorithm => key.clone(),
                _ => new_key(session.suite(), Purpose::HostIdentity).await?,
            };
            Ok((proof, session, key))
        };
        let (mut proof, session, key) =
            unless_stopped(opening, &self.clock, shutdown, Duration::ZERO).await?;
        self.store.begin(&key).await?;
        self.pending = Some(key.clone());
        let expires = self.clock.now() + self.settings.ttl;
        let joining = async {
            Ok(session
                .join(&key, expires, &mut *proof, &self.clock)
                .await?)
        };
        let grace = if method.counts() {
            GRACE
        } else {
            // It can prove itself again at any time.
            Duration::ZERO
        };
        let certs = unless_stopped(joining, &self.clock, shutdown, grace).await?;
        let identity = Identity::from_certs(key, certs, Vec::new())?;
        Ok((identity, token_hash(&token)))
    }

    async fn renew_certificate(
        &mut self,
        shutdown: &CancellationToken,
    ) -> Result<(Identity, String), BotError> {
        let client = self.handle.client();
        let held = self
            .identity
            .borrow()
            .clone()
            .ok_or(ClusterError::NotJoined)?;
        // A key whose answer never came is used again: a cluster that recognises it can answer once
        // more with the same counter.
        let making = async {
            match &self.pending {
                Some(key) => Ok(key.clone()),
                None => Ok(new_key(client.suite().await?, Purpose::HostIdentity).await?),
            }
        };
        let key = unless_stopped(making, &self.clock, shutdown, Duration::ZERO).await?;
        self.store.begin(&key).await?;
        self.pending = Some(key.clone());
        let request = UserCertsRequest {
            username: held.user(),
            expires: Some((self.clock.now() + self.settings.ttl).into()),
            ssh_public_key: key.public_ssh_line()?.into_bytes(),
            tls_public_key: key.public_pem().into_bytes(),
            ..UserCertsRequest::default()
        };
        let asking = async { Ok(client.generate_user_certs(request).await?) };
        let certs = unless_stopped(asking, &self.clock, shutdown, GRACE).await?;
        let identity = Identity::from_certs(key, certs, Vec::new())?;
        let hash = match &self.settings.token {
            Some(token) => token
                .resolve()
                .map(|token| token_hash(&token))
                .unwrap_or_default(),
            None => String::new(),
        };
        Ok((identity, hash))
    }

    /// Makes an identity the current one. `issued` is when it was asked for; a stored one is taken
    /// to be as old as it says.
    fn publish(&mut self, identity: Identity, credential: Credential, issued: Option<SystemTime>) {
        let fresh = issued.is_some();
        let not_after = identity.not_after();
        let issued = issued.unwrap_or(identity.not_before());
        let held = Held {
            not_before: identity.not_before(),
            not_after,
            renewable: identity.is_renewable(),
            renew_at: renewal::due(issued, not_after, self.settings.interval, jitter()),
            fresh_until: renewal::fresh_until(issued, not_after),
        };
        tracing::info!(
            user = identity.user(),
            cluster = identity.cluster(),
            instance = identity.instance_id().unwrap_or_default(),
            generation = identity.generation(),
            valid_until = %crate::clock::rfc3339(identity.not_after()),
            "{}",
            if fresh { "The bot has a fresh identity" } else { "Using the stored identity" }
        );
        self.health.healthy();
        self.health.fresh_until(held.fresh_until);
        self.held = Some(held);
        self.ever_held = true;
        self.credential.send_replace(Some(Arc::new(credential)));
        self.identity.send_replace(Some(Arc::new(identity)));
    }

    /// Stops offering an identity that is over.
    fn withdraw(&mut self) {
        self.held = None;
        self.credential.send_replace(None);
        self.identity.send_replace(None);
    }
}

/// Does `work`, or gives up `grace` after `shutdown`.
async fn unless_stopped<T>(
    work: impl Future<Output = Result<T, BotError>>,
    clock: &Clock,
    shutdown: &CancellationToken,
    grace: Duration,
) -> Result<T, BotError> {
    let stopped = async {
        shutdown.cancelled().await;
        clock.sleep(grace).await;
    };
    tokio::select! {
        biased;
        done = work => done,
        () = stopped => Err(BotError::Stopping),
    }
}

/// Tells of a failure; `server` is where the cluster should be, which not every error knows.
fn tell(loudness: Loudness, server: &str, error: &BotError, wait: Duration) {
    let retry_in = format!("{:.1}s", wait.as_secs_f64());
    match loudness {
        Loudness::Warn => {
            tracing::warn!(%error, server, retry_in, "The bot's identity could not be renewed");
        }
        Loudness::Debug => {
            tracing::debug!(%error, server, retry_in, "The bot's identity could not be renewed");
        }
    }
}

#[cfg(test)]
#[path = "bot_tests.rs"]
mod tests;
