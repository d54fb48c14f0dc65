//! A gRPC channel that always presents the newest credential.
//!
//! An HTTP/2 connection keeps the certificate it was opened with. When the credential changes, the
//! next call goes over a new connection; streams that are open keep the old one until they end.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::sync::watch;
use tonic::transport::{Endpoint, Uri};
use tower::service_fn;

use super::credential::encoded_cluster;
use super::dial::{self, Dialer};
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
    open: Mutex<Option<(Arc<Credential>, tonic::transport::Channel)>>,
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
        if let Some((of, channel)) = open.as_ref()
            && Arc::ptr_eq(of, &credential)
        {
            return Ok(channel.clone());
        }
        let name = credential.server_name()?;
        let tls = credential.tls(self.route.protocols(credential.cluster()));
        let channel = connect_lazily(Arc::clone(&self.dialer), self.route.address(), name, tls)?;
        *open = Some((credential, channel.clone()));
        Ok(channel)
    }
}

/// A channel over TLS that connects when it is first used, and again when the connection is lost.
pub(crate) fn connect_lazily(
    dialer: Arc<dyn Dialer>,
    address: &str,
    name: rustls::pki_types::ServerName<'static>,
    tls: Arc<rustls::ClientConfig>,
) -> Result<tonic::transport::Channel, ClusterError> {
    let address: Arc<str> = address.into();
    let connector = service_fn(move |_uri: Uri| {
        let (dialer, address, name, tls) = (
            Arc::clone(&dialer),
            Arc::clone(&address),
            name.clone(),
            Arc::clone(&tls),
        );
        async move {
            dial::tls(dialer.as_ref(), &address, name, tls)
                .await
                .map(TokioIo::new)
        }
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
