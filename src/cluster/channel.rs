//! A gRPC channel that always presents the newest credential.
//!
//! An HTTP/2 connection keeps the certificate it was opened with. When the credential changes, the
//! next call goes over a new connection; streams that are open keep the old one until they end.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::sync::watch;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Endpoint, Uri};
use tower::service_fn;

use super::credential::encoded_cluster;
use super::dial::{self, BoxedIo, Dialer, Io};
use super::refused::{Refused, Watched};
use super::{ClusterError, Credential};

/// Pings more often than once a minute are answered by closing the connection.
const KEEPALIVE: Duration = Duration::from_secs(75);
/// How long a keepalive ping may stay unanswered.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// How the auth service is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    /// Through the proxy at this address, which forwards TLS by its first ALPN name.
    Proxy(String),
    /// Straight at this address.
    Direct(String),
}

impl Route {
    /// The `host:port` that is dialled.
    pub fn address(&self) -> &str {
        match self {
            Self::Proxy(address) | Self::Direct(address) => address,
        }
    }

    /// The ALPN list for `cluster`'s auth service.
    fn protocols(&self, cluster: &str) -> Vec<Vec<u8>> {
        let h2 = b"h2".to_vec();
        match self {
            Self::Proxy(_) => vec![
                format!("teleport-auth@{}", encoded_cluster(cluster)).into_bytes(),
                h2,
            ],
            Self::Direct(_) => vec![h2],
        }
    }
}

/// Follows a credential through its renewals.
pub(crate) struct Channel {
    dialer: Arc<dyn Dialer>,
    route: Route,
    credential: watch::Receiver<Option<Arc<Credential>>>,
    open: Mutex<Option<Open>>,
}

/// The channel of one credential.
struct Open {
    of: Arc<Credential>,
    channel: tonic::transport::Channel,
    refused: Refused,
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel")
            .field("route", &self.route)
            .finish_non_exhaustive()
    }
}

impl Channel {
    pub(crate) fn new(
        dialer: Arc<dyn Dialer>,
        route: Route,
        credential: watch::Receiver<Option<Arc<Credential>>>,
    ) -> Self {
        Self {
            dialer,
            route,
            credential,
            open: Mutex::new(None),
        }
    }

    /// The channel for the credential of this moment. Connects when it is first used.
    pub(crate) fn current(&self) -> Result<tonic::transport::Channel, ClusterError> {
        let credential = self
            .credential
            .borrow()
            .clone()
            .ok_or(ClusterError::NotJoined)?;
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = open.as_ref()
            && Arc::ptr_eq(&open.of, &credential)
        {
            return Ok(open.channel.clone());
        }
        let refused = Refused::default();
        let way = Way {
            dialer: Arc::clone(&self.dialer),
            name: credential.server_name()?,
            credential: Arc::clone(&credential),
            route: self.route.clone(),
        };
        let noted = refused.clone();
        let channel = connect_lazily(move || {
            let (way, refused) = (way.clone(), noted.clone());
            async move {
                match way.connect().await {
                    Ok(stream) => Ok(Watched { stream, refused }),
                    Err(error) => {
                        refused.note(&error);
                        Err(error)
                    }
                }
            }
        })?;
        *open = Some(Open {
            of: credential,
            channel: channel.clone(),
            refused,
        });
        Ok(channel)
    }

    /// Whether a connection with the current credential failed because one side does not take the
    /// other's certificate.
    pub(crate) fn is_certificate_refused(&self) -> bool {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.as_ref().is_some_and(|open| open.refused.is_set())
    }
}

/// How to reach the auth service as one identity.
#[derive(Clone)]
struct Way {
    dialer: Arc<dyn Dialer>,
    route: Route,
    name: ServerName<'static>,
    credential: Arc<Credential>,
}

impl Way {
    async fn connect(&self) -> Result<Tls, ClusterError> {
        let address = self.route.address();
        match &self.route {
            Route::Proxy(_) => self.through(address).await,
            Route::Direct(_) if self.dialer.is_proxy(address, false).await => {
                self.through(address).await
            }
            Route::Direct(_) => {
                let tls = self.tls(&self.route);
                match dial::tls(self.dialer.as_ref(), address, self.name.clone(), tls).await {
                    Err(ClusterError::Tls { .. }) if self.dialer.is_proxy(address, true).await => {
                        self.through(address).await
                    }
                    other => other,
                }
            }
        }
    }

    /// Through the proxy that is configured as `address`, where it wants to be reached, or else
    /// where it is configured. The first failure is the one to tell.
    async fn through(&self, address: &str) -> Result<Tls, ClusterError> {
        if let Some(port) = self.dialer.tunnel(address).await {
            return self.in_tunnel(&port).await;
        }
        let mut failed = None;
        for place in self.dialer.places(address).await {
            match self.at(&place).await {
                Ok(stream) => return Ok(stream),
                Err(error) => {
                    tracing::debug!(place, %error, "The proxy cannot be used here");
                    failed.get_or_insert(error);
                }
            }
        }
        Err(failed.unwrap_or(ClusterError::NotJoined))
    }

    /// Through a proxy that only lets SSH pass.
    async fn in_tunnel(&self, port: &str) -> Result<Tls, ClusterError> {
        let identity = self.credential.ssh().ok_or_else(|| {
            let problem = "the proxy is passed by SSH, and this identity has no SSH certificate";
            ClusterError::Trust(problem.to_owned())
        })?;
        let tls = self.tls(&Route::Direct(port.to_owned()));
        dial::tls_in_tunnel(self.dialer.as_ref(), port, identity, self.name.clone(), tls).await
    }

    /// At one place. Only where that fails it is worth looking whether ALPN gets through: the
    /// auth service's certificate proves that it does.
    async fn at(&self, place: &str) -> Result<Tls, ClusterError> {
        let tls = self.tls(&Route::Proxy(place.to_owned()));
        let dialer = self.dialer.as_ref();
        let attempt = || dial::tls_to_proxy(dialer, place, self.name.clone(), Arc::clone(&tls));
        match attempt().await {
            Err(ClusterError::Tls { .. })
                if dialer.hides_alpn(place).is_none() && dialer.probe(place).await =>
            {
                attempt().await
            }
            other => other,
        }
    }

    fn tls(&self, route: &Route) -> Arc<ClientConfig> {
        let credential = &self.credential;
        credential.tls(route.protocols(credential.cluster()))
    }
}

/// A TLS connection of a channel.
pub(crate) type Tls = TlsStream<BoxedIo>;

/// A channel over one connection. When that is lost, so is the channel.
pub(crate) fn over(stream: Tls) -> Result<tonic::transport::Channel, ClusterError> {
    let stream = Mutex::new(Some(stream));
    connect_lazily(move || {
        let stream = stream.lock().unwrap_or_else(PoisonError::into_inner).take();
        async move { stream.ok_or_else(|| ClusterError::Trust("the connection was lost".to_owned())) }
    })
}

/// A channel that connects by `connect` when it is first used, and again when the connection is
/// lost.
pub(crate) fn connect_lazily<F, S>(
    connect: impl Fn() -> F + Send + 'static,
) -> Result<tonic::transport::Channel, ClusterError>
where
    F: Future<Output = Result<S, ClusterError>> + Send + 'static,
    S: Io + 'static,
{
    let connector = service_fn(move |_uri: Uri| {
        let connecting = connect();
        async move { connecting.await.map(TokioIo::new) }
    });
    // The URI only gives requests an authority; the connector knows where to go.
    let endpoint = Endpoint::from_static("http://teleport.cluster.local")
        .user_agent(super::client::USER_AGENT)
        .map_err(|source| ClusterError::Trust(source.to_string()))?
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    Ok(endpoint.connect_with_connector_lazy(connector))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_proxy_route_names_the_auth_service_first() {
        let protocols = Route::Proxy("p:443".into()).protocols("root");
        assert_eq!(
            protocols[0],
            b"teleport-auth@726f6f74.teleport.cluster.local"
        );
        assert_eq!(protocols[1], b"h2");
        assert_eq!(
            Route::Direct("a:3025".into()).protocols("root"),
            [b"h2".to_vec()]
        );
    }
}
