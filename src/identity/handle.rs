//! What services see of the bot's identity.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::{OnceCell, watch};

use super::recent::Recent;
use super::{Identity, Issued, MaterialError};
use crate::clock::Clock;
use crate::cluster::client::Route;
use crate::cluster::dial::Dialer;
use crate::cluster::feature::Lacking;
use crate::cluster::trust::Trust;
use crate::cluster::{Client, ClusterError, Credential, Endpoints, ping};
use crate::crypto::{KeyError, PrivateKey, Purpose, Suite};
use crate::pb::proto::{RouteToApp, RouteToDatabase, UserCertsRequest};
use crate::pb::types::CertAuthorityV2;

/// A certificate that a service asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Request {
    /// Roles to request; empty means every role that the bot may impersonate. Order and repeats do
    /// not matter.
    pub roles: Vec<String>,
    /// Requested life.
    pub ttl: Duration,
    /// Leaf cluster to route to; `None` is the bot's own cluster.
    pub cluster: Option<String>,
    /// Whether the certificate may be re-issued by its holder (`allow_reissue`).
    pub reissuable: bool,
    /// What the certificate leads to.
    pub target: Target,
}

/// What a certificate leads to: the cluster writes it into the certificate, and lets its holder
/// through to nothing else.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub enum Target {
    /// The cluster itself and its hosts.
    #[default]
    Cluster,
    /// An application.
    Application {
        /// Its name.
        name: String,
        /// The host name under which the proxy serves it.
        public_address: String,
    },
    /// A database.
    Database {
        /// The name of its service.
        service: String,
        /// What it speaks, such as `postgres`.
        protocol: String,
        /// The database user; may be empty.
        user: String,
        /// The logical database; may be empty.
        database: String,
    },
    /// A Kubernetes cluster.
    Kubernetes {
        /// Its name.
        cluster: String,
    },
}

impl Target {
    /// What a key for it is used for. Clients of databases are the reason for RSA in every suite.
    fn purpose(&self) -> Purpose {
        match self {
            Self::Database { .. } => Purpose::DatabaseClient,
            Self::Cluster | Self::Application { .. } | Self::Kubernetes { .. } => {
                Purpose::BotImpersonated
            }
        }
    }

    /// Puts it into a request for certificates of `cluster`.
    fn route(&self, cluster: &str, request: &mut UserCertsRequest) {
        match self.clone() {
            Self::Cluster => {}
            Self::Application {
                name,
                public_address,
            } => {
                request.route_to_app = Some(RouteToApp {
                    name,
                    public_addr: public_address,
                    cluster_name: cluster.to_owned(),
                    ..RouteToApp::default()
                });
            }
            Self::Database {
                service,
                protocol,
                user,
                database,
            } => {
                request.route_to_database = Some(RouteToDatabase {
                    service_name: service,
                    protocol,
                    username: user,
                    database,
                    ..RouteToDatabase::default()
                });
            }
            Self::Kubernetes { cluster } => request.kubernetes_cluster = cluster,
        }
    }
}

/// Why an identity could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// The cluster refused or could not be reached.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The cluster's answer is not usable; nothing of it is kept.
    #[error("the cluster's answer is not usable: {0}")]
    Material(#[from] MaterialError),
    /// No key could be made.
    #[error("cannot make a key: {0}")]
    Key(#[from] KeyError),
    /// The bot may not impersonate any role, and the service names none.
    #[error(
        "the bot has no roles to issue with: add roles to the bot (spec.roles) or to the service"
    )]
    NoRoles,
}

/// The bot's own identity, the identities derived from it, and clients bound to them.
///
/// Cloning shares everything.
#[derive(Debug, Clone)]
pub struct Handle(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    clock: Clock,
    dialer: Arc<dyn Dialer>,
    route: Route,
    trust: Trust,
    use_configured_address: bool,
    identity: watch::Receiver<Option<Arc<Identity>>>,
    reload: watch::Receiver<u64>,
    client: Client,
    lacking: Lacking,
    endpoints: OnceCell<Arc<Endpoints>>,
    derived: Mutex<HashMap<Request, Arc<Derived>>>,
    recent: Answers,
}

/// What outputs that are renewed together ask once.
#[derive(Debug, Default)]
struct Answers {
    suite: Recent<Suite>,
    roles: Recent<Vec<String>>,
    hosts: Recent<Vec<String>>,
    authorities: Mutex<HashMap<&'static str, Arc<RecentAuthorities>>>,
}

type RecentAuthorities = Recent<Arc<[CertAuthorityV2]>>;

impl Handle {
    /// A handle on the identity that `identity` publishes, for a cluster reached by `route`.
    /// `use_configured_address` puts the proxy's configured address into texts for other programs
    /// instead of the one that it advertises (`TBOT_USE_PROXY_ADDR`).
    #[expect(
        clippy::too_many_arguments,
        reason = "each is one thing, and there is one caller"
    )]
    pub fn new(
        clock: Clock,
        dialer: Arc<dyn Dialer>,
        route: Route,
        trust: Trust,
        use_configured_address: bool,
        identity: watch::Receiver<Option<Arc<Identity>>>,
        credential: watch::Receiver<Option<Arc<Credential>>>,
        reload: watch::Receiver<u64>,
    ) -> Self {
        let client = Client::new(Arc::clone(&dialer), route.clone(), credential);
        Self(Arc::new(Inner {
            clock,
            dialer,
            route,
            trust,
            use_configured_address,
            identity,
            reload,
            client,
            lacking: Lacking::default(),
            endpoints: OnceCell::new(),
            derived: Mutex::new(HashMap::new()),
            recent: Answers::default(),
        }))
    }

    /// The bot's own identity, followed through its renewals; `None` until the first join.
    pub fn identity(&self) -> watch::Receiver<Option<Arc<Identity>>> {
        self.0.identity.clone()
    }

    /// Waits until there is an identity. Returns `None` if the agent stops first.
    pub async fn ready(&self) -> Option<Arc<Identity>> {
        let mut identity = self.identity();
        let ready = identity.wait_for(Option::is_some).await.ok()?;
        ready.clone()
    }

    /// Changes when everything is to be renewed at once (operator's signal, CA rotation).
    pub fn reloads(&self) -> watch::Receiver<u64> {
        self.0.reload.clone()
    }

    /// Calls as the bot itself: reading authorities, watching events, heartbeats.
    pub fn client(&self) -> &Client {
        &self.0.client
    }

    /// What the cluster was found to lack.
    pub fn lacking(&self) -> &Lacking {
        &self.0.lacking
    }

    /// What the proxy says about itself; asked once per process.
    pub async fn endpoints(&self) -> Result<Arc<Endpoints>, ClusterError> {
        self.0
            .endpoints
            .get_or_try_init(|| async {
                let address = match &self.0.route {
                    Route::Proxy(address) => address.clone(),
                    Route::Direct(address) if self.0.dialer.is_proxy(address, false).await => {
                        address.clone()
                    }
                    Route::Direct(_) => {
                        let address = self.0.client.ping().await?.proxy_public_addr;
                        if address.is_empty() {
                            return Err(ClusterError::Trust(
                                "the auth service knows no proxy, whose address ssh_config needs: \
                                 set proxy_server, or ssh_config: off"
                                    .into(),
                            ));
                        }
                        ping::with_port(&address, "443")
                    }
                };
                let mut found = ping::find(
                    &self.0.clock,
                    self.0.dialer.as_ref(),
                    &self.0.trust,
                    &address,
                )
                .await?;
                if self.0.use_configured_address {
                    found.ssh_address = Some(address);
                }
                Ok(Arc::new(found))
            })
            .await
            .cloned()
    }

    /// Whether something in front of the proxy at `address` hides ALPN, by which the proxy tells
    /// protocols apart; `false` if that cannot be found out now.
    pub async fn hides_alpn(&self, address: &str) -> bool {
        self.0.dialer.probe(address).await
    }

    /// The cluster's signature algorithm suite, as it is now.
    pub async fn suite(&self) -> Result<Suite, ClusterError> {
        let ask = Box::pin(self.0.client.suite());
        self.recent(&self.0.recent.suite, ask).await
    }

    /// The TLS certificates of the authority that signs the cluster's servers, one PEM text each.
    pub async fn host_authorities(&self) -> Result<Vec<String>, ClusterError> {
        let ask = Box::pin(self.0.client.host_authorities());
        self.recent(&self.0.recent.hosts, ask).await
    }

    /// Every authority of one type (`host`, `user`, `db` …), leaf clusters included, without keys.
    pub async fn authorities(
        &self,
        kind: &'static str,
    ) -> Result<Arc<[CertAuthorityV2]>, ClusterError> {
        let recent = {
            let all = &self.0.recent.authorities;
            let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(all.entry(kind).or_default())
        };
        let ask = Box::pin(async { Ok(self.0.client.cert_authorities(kind).await?.into()) });
        self.recent(&recent, ask).await
    }

    /// The answer that others had a moment ago, or else that of `ask`.
    async fn recent<T: Clone, E>(
        &self,
        recent: &Recent<T>,
        ask: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let reload = *self.0.reload.borrow();
        recent.get(&self.0.clock, reload, ask).await
    }

    /// Issues an identity with a new key.
    pub async fn issue(&self, request: &Request) -> Result<Issued, IdentityError> {
        let own = self.current()?;
        let roles = async {
            if request.roles.is_empty() {
                let ask = Box::pin(self.impersonated(&own));
                self.recent(&self.0.recent.roles, ask).await
            } else {
                Ok(request.roles.clone())
            }
        };
        // What a workload waits for at the start is the longest of the three, not their sum.
        let (roles, suite, hosts) =
            tokio::try_join!(roles, async { Ok(self.suite().await?) }, async {
                Ok(self.host_authorities().await?)
            },)?;
        let key = new_key(suite, request.target.purpose()).await?;
        let expires = self.0.clock.now() + request.ttl;
        let cluster = request.cluster.as_deref().unwrap_or(own.cluster());
        let mut wanted = UserCertsRequest {
            username: own.user(),
            expires: Some(expires.into()),
            route_to_cluster: cluster.to_owned(),
            role_requests: roles,
            use_role_requests: true,
            reissuable_role_impersonation: request.reissuable,
            ssh_public_key: key.public_ssh_line()?.into_bytes(),
            tls_public_key: key.public_pem().into_bytes(),
            ..UserCertsRequest::default()
        };
        request.target.route(cluster, &mut wanted);
        let certs = self.0.client.generate_user_certs(wanted).await?;
        let issued = Identity::from_certs(key, certs, hosts)?;
        issued.expect(self.0.clock.now(), request.ttl, Some(&own.user()))?;
        Ok(issued.with_ssh_authorities(own.ssh_authorities().to_vec()))
    }

    /// A client whose calls are made with the roles of `request`. Equal requests share one identity
    /// and one connection; the identity is renewed when a call finds it past half of its life. Those
    /// who wait for the same renewal share its failure.
    pub async fn derived(&self, request: &Request) -> Result<Client, Arc<IdentityError>> {
        let mut request = request.clone();
        request.roles.sort_unstable();
        request.roles.dedup();
        let derived = {
            let mut all = self
                .0
                .derived
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            Arc::clone(all.entry(request.clone()).or_insert_with(|| {
                Arc::new(Derived::new(
                    Arc::clone(&self.0.dialer),
                    self.0.route.clone(),
                ))
            }))
        };
        derived.refreshed(self, &request).await
    }

    fn current(&self) -> Result<Arc<Identity>, ClusterError> {
        self.0
            .identity
            .borrow()
            .clone()
            .ok_or(ClusterError::NotJoined)
    }

    /// The roles that the bot may impersonate.
    async fn impersonated(&self, own: &Identity) -> Result<Vec<String>, IdentityError> {
        let role = self.0.client.role(&own.user()).await?;
        let roles = role
            .spec
            .and_then(|spec| spec.allow)
            .and_then(|allow| allow.impersonate)
            .map(|impersonate| impersonate.roles)
            .unwrap_or_default();
        if roles.is_empty() {
            return Err(IdentityError::NoRoles);
        }
        Ok(roles)
    }
}

/// An identity with its own connection.
#[derive(Debug)]
struct Derived {
    client: Client,
    credential: watch::Sender<Option<Arc<Credential>>>,
    held: tokio::sync::Mutex<Option<Held>>,
    /// The last failure to renew it. Changes with each.
    failure: watch::Sender<Option<Arc<IdentityError>>>,
}

#[derive(Debug)]
struct Held {
    not_after: SystemTime,
    renew_at: SystemTime,
    /// The count of reloads when it was issued: a later one asks for another.
    reload: u64,
}

impl Derived {
    fn new(dialer: Arc<dyn Dialer>, route: Route) -> Self {
        let (credential, receiver) = watch::channel(None);
        Self {
            client: Client::new(dialer, route, receiver),
            credential,
            held: tokio::sync::Mutex::new(None),
            failure: watch::Sender::new(None),
        }
    }

    /// The client, after renewing its identity where that is due. One caller renews, the others
    /// wait for it and take what came of it; a failed renewal is not told while the old identity is
    /// valid.
    async fn refreshed(
        &self,
        handle: &Handle,
        request: &Request,
    ) -> Result<Client, Arc<IdentityError>> {
        let failure = self.failure.subscribe();
        let mut held = self.held.lock().await;
        let now = handle.0.clock.now();
        let reload = *handle.0.reload.borrow();
        let due = |held: &Held| held.renew_at <= now || held.reload != reload;
        if held.as_ref().is_none_or(due) {
            let others = failure.has_changed().unwrap_or(false);
            let others = others.then(|| failure.borrow().clone()).flatten();
            let renewed = match others {
                Some(error) => Err(error),
                None => self.renew(handle, request, reload).await.map_err(|error| {
                    let error = Arc::new(error);
                    self.failure.send_replace(Some(Arc::clone(&error)));
                    error
                }),
            };
            let now = handle.0.clock.now();
            match renewed {
                Ok(new) => *held = Some(new),
                Err(error) if held.as_ref().is_some_and(|held| held.not_after > now) => {
                    tracing::debug!(%error, "Keeping the derived identity: it cannot be renewed now");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(self.client.clone())
    }

    async fn renew(
        &self,
        handle: &Handle,
        request: &Request,
        reload: u64,
    ) -> Result<Held, IdentityError> {
        let now = handle.0.clock.now();
        let identity = handle.issue(request).await?;
        let credential = identity.credential(&handle.0.clock)?;
        self.credential.send_replace(Some(Arc::new(credential)));
        let life = identity.not_after().duration_since(now).unwrap_or_default();
        Ok(Held {
            not_after: identity.not_after(),
            renew_at: now + life / 2,
            reload,
        })
    }
}

/// Makes a key off the async threads: RSA takes its time.
pub(crate) async fn new_key(suite: Suite, purpose: Purpose) -> Result<PrivateKey, KeyError> {
    let algorithm = suite.algorithm(purpose);
    tokio::task::spawn_blocking(move || PrivateKey::generate(algorithm))
        .await
        .unwrap_or(Err(KeyError::Library))
}

#[cfg(test)]
mod tests {
    use std::io;

    use async_trait::async_trait;
    use futures_util::future::join_all;

    use super::*;
    use crate::cluster::dial::BoxedIo;
    use crate::crypto::KeyAlgorithm;
    use crate::identity::fixtures::{Authority, start};

    /// A network that swallows everything.
    #[derive(Debug)]
    struct Hanging;

    #[async_trait]
    impl Dialer for Hanging {
        async fn dial(&self, _address: &str) -> io::Result<BoxedIo> {
            std::future::pending().await
        }
    }

    /// A bot that has joined a cluster which then went away.
    fn left_alone(clock: &Clock) -> Handle {
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        let identity = Authority::new("c").identity(key, 1, clock.now());
        let credential = identity.credential(clock).unwrap();
        Handle::new(
            clock.clone(),
            Arc::new(Hanging),
            Route::Direct("nowhere:3025".to_owned()),
            Trust::default(),
            false,
            watch::channel(Some(Arc::new(identity))).1,
            watch::channel(Some(Arc::new(credential))).1,
            watch::channel(0).1,
        )
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_a_renewal_shares_its_failure() {
        let clock = Clock::simulated(start());
        let handle = left_alone(&clock);
        let request = Request {
            roles: vec!["r".to_owned()],
            ..Request::default()
        };
        let began = clock.now();
        handle.derived(&request).await.unwrap_err();
        let alone = clock.now().duration_since(began).unwrap();
        assert!(alone > Duration::from_secs(1), "{alone:?}: it was refused");

        let began = clock.now();
        let together = join_all((0..20).map(|_| handle.derived(&request))).await;
        assert_eq!(clock.now().duration_since(began).unwrap(), alone);
        let errors: Vec<_> = together.into_iter().map(Result::unwrap_err).collect();
        assert!(errors.iter().all(|error| Arc::ptr_eq(error, &errors[0])));

        let began = clock.now();
        let later = handle.derived(&request).await.unwrap_err();
        assert!(!Arc::ptr_eq(&later, &errors[0]), "failures are not kept");
        assert_eq!(clock.now().duration_since(began).unwrap(), alone);

        // With an identity that is due but not over, nobody hears of it, and nobody waits for more.
        let derived = Arc::clone(handle.0.derived.lock().unwrap().get(&request).unwrap());
        *derived.held.lock().await = Some(Held {
            not_after: clock.now() + Duration::from_hours(1),
            renew_at: clock.now(),
            reload: 0,
        });
        let began = clock.now();
        let together = join_all((0..20).map(|_| handle.derived(&request))).await;
        assert!(together.iter().all(Result::is_ok));
        assert_eq!(clock.now().duration_since(began).unwrap(), alone);
    }

    #[test]
    fn a_certificate_leads_to_its_target_and_nowhere_else() {
        let routed = |target: Target| {
            let mut request = UserCertsRequest::default();
            target.route("root", &mut request);
            request
        };
        assert_eq!(routed(Target::Cluster), UserCertsRequest::default());
        let expected = UserCertsRequest {
            route_to_app: Some(RouteToApp {
                name: "echo".into(),
                public_addr: "echo.example.org".into(),
                cluster_name: "root".into(),
                ..RouteToApp::default()
            }),
            ..UserCertsRequest::default()
        };
        let target = Target::Application {
            name: "echo".into(),
            public_address: "echo.example.org".into(),
        };
        assert_eq!(routed(target), expected);
        let expected = UserCertsRequest {
            route_to_database: Some(RouteToDatabase {
                service_name: "pg".into(),
                protocol: "postgres".into(),
                username: "alice".into(),
                database: "app".into(),
                ..RouteToDatabase::default()
            }),
            ..UserCertsRequest::default()
        };
        let target = Target::Database {
            service: "pg".into(),
            protocol: "postgres".into(),
            user: "alice".into(),
            database: "app".into(),
        };
        assert_eq!(target.purpose(), Purpose::DatabaseClient);
        assert_eq!(routed(target), expected);
        let expected = UserCertsRequest {
            kubernetes_cluster: "k1".into(),
            ..UserCertsRequest::default()
        };
        let target = Target::Kubernetes {
            cluster: "k1".into(),
        };
        assert_eq!(target.purpose(), Purpose::BotImpersonated);
        assert_eq!(routed(target), expected);
    }
}
